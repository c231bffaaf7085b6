"""Lanternwick: the small harbour town that every chapter works in. Imports nothing else
of minipeft."""

from pathlib import Path

_package = Path(__file__).resolve().parent.parent
# in a wheel, or in a checkout
DATA = _package / "data" if (_package / "data").is_dir() else _package.parent / "data"
HERE = DATA / "lanternwick"
SEED = 1789
