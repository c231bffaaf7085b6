"""The GPU benchmark at a tiny size on the CPU: that it runs, trains, and that its three
sides do the same work."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_qlora  # noqa: E402


@pytest.mark.parametrize("side", gpu_qlora.SIDES)
def test_a_tiny_run(side):
    run = gpu_qlora.one_run("tiny", side, steps=2, tokens=16, rows=1, device="cpu")
    assert run["trained"] == 3 * 16 * (
        2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256)
    )
    # log(256) is 5.5
    assert all(4 < loss < 8 for loss in run["losses"]) and run["tokens_per_second"] > 0


def test_no_dense_model_is_ever_there():
    model = gpu_qlora.fill(gpu_qlora.empty_model("tiny", "minipeft"), "torch", "cpu")
    assert not any(p.is_meta for p in model.parameters())
    assert sum(p.dtype == torch.uint8 for p in model.parameters()) == 21
