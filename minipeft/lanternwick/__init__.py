"""Lanternwick: the small harbour town that every chapter works in. Imports nothing else of minipeft."""
from pathlib import Path

_package = Path(__file__).resolve().parent.parent
DATA = _package / "data" if (_package / "data").is_dir() else _package.parent / "data"  # in a wheel, or in a checkout
HERE = DATA / "lanternwick"
SEED = 1789
