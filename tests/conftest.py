"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def seed():
    # torch.manual_seed would also format the stack each time, for CUDA's sake
    torch.default_generator.manual_seed(0)


class RealData(type(Path())):
    """A folder; `real / "stories260K"` is a path in it, or the test is skipped,
    visibly, where that is absent."""

    def __truediv__(self, name):
        path = super().__truediv__(name)
        if not path.exists():
            pytest.skip(
                f"real data {path.name!r} is not here (set MINIPEFT_CACHE to a folder"
                " that holds it)"
            )
        return path


@pytest.fixture(scope="session")
def real():
    return RealData(os.environ.get("MINIPEFT_CACHE") or ROOT.parent / "shared" / "real")
