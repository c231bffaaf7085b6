"""Fixtures for all tests."""
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real():
    """real("stories260K/config.json"): the path of a file of real data; the test is skipped where it is absent."""
    folder = Path(os.environ.get("MINIPEFT_CACHE") or ROOT.parent / "shared" / "real")

    def path_of(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"real data {name!r} is not in the cache folder (set MINIPEFT_CACHE to a folder that holds it)")
        return folder / name

    return path_of
