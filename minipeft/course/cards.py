"""Large models on paper: what one training step holds, by the memory ledger, and the
cards that have room for it."""

import functools

import torch

from ..lm.memory import memory_ledger
from ..lm.shapes import SHAPES, on_paper
from ..methods import LoraConfig
from ..model import get_peft_model
from ..quant import quantize_model
from ..quant.kbit import prepare_model_for_kbit_training

CARDS = {size: size * 2**30 for size in (24, 48, 80)}  # bytes by the name, in "GB"
WAYS = ("full", "LoRA", "QLoRA", "QLoRA, unprepared", "NF4", "NF4, prepared")


def ledger_on_paper(
    name,
    way,
    rows=1,
    tokens=512,
    optimizer="adamw",
    checkpointing=True,
    r=16,
    layers=None,
):
    """The ledger of one training step of a published shape, on the meta device.

    name     a name in minipeft.lm.SHAPES, such as "llama-2-7b"; weights in bfloat16
    way      "full", "LoRA" or "QLoRA" (rank r on all linear layers); "QLoRA,
             unprepared"; "NF4" (only loaded) or "NF4, prepared"
    layers   as many layers instead of the shape's own

    Raises ValueError for another way."""
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, found {way!r}")
    model = on_paper(name, layers=layers)
    if way not in ("full", "LoRA"):
        quantize_model(model, compute_dtype=torch.bfloat16)
    if way in ("QLoRA", "NF4, prepared"):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if "LoRA" in way:
        with torch.device("meta"):
            model = get_peft_model(
                model, LoraConfig(r=r, lora_alpha=16, target_modules="all-linear")
            )
    return memory_ledger(model.train(), rows, tokens, optimizer=optimizer)


@functools.cache
def step_bytes(name, way, **more):
    """{part: bytes} of the whole model; arguments as in `ledger_on_paper`.

    Each part grows by the same amount with each layer. So the ledgers of two layers
    and of three give that of any number."""
    two, three = (
        ledger_on_paper(name, way, layers=layers, **more).predicted for layers in (2, 3)
    )
    beyond = SHAPES[name]["num_hidden_layers"] - 2
    return {part: two[part] + beyond * (three[part] - two[part]) for part in two}
