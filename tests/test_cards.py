"""The ledger of large models on paper."""

import pytest

from minipeft.course.cards import WAYS, ledger_on_paper, step_bytes
from minipeft.lm import SHAPES

SMALLEST = min(SHAPES, key=lambda name: SHAPES[name]["num_hidden_layers"])


@pytest.mark.parametrize("way", WAYS)
def test_two_layers_and_three_give_every_layer(way):
    """The whole model's ledger, layer by layer, equals the one that was extended."""
    layers = SHAPES[SMALLEST]["num_hidden_layers"]
    whole = ledger_on_paper(SMALLEST, way, tokens=64, layers=layers).predicted
    assert step_bytes(SMALLEST, way, tokens=64) == whole


def test_ways_differ_where_they_should():
    full, lora, qlora = (step_bytes(SMALLEST, way) for way in ("full", "LoRA", "QLoRA"))
    assert full["weights"] < lora["weights"]  # the adapter comes on top
    assert qlora["weights"] < 0.6 * full["weights"]
    assert lora["gradients"] == qlora["gradients"] < 0.05 * full["gradients"]


def test_another_way_is_refused():
    with pytest.raises(ValueError, match="one of full, LoRA, QLoRA.*found 'qlora'"):
        ledger_on_paper(SMALLEST, "qlora")
