"""Real models' shapes, from their published configurations: to reckon with on the meta
device, without their weights."""

import torch

from ..io import check_choice
from .gpt import GPT, SIZES, GPTConfig

FIELDS = (*SIZES, "num_key_value_heads")
TABLE = {
    "llama-33b": (32000, 6656, 17920, 60, 52, 2048, 52),
    "llama-65b": (32000, 8192, 22016, 80, 64, 2048, 64),
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 4096, 32),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 4096, 40),
    "llama-2-70b": (32000, 8192, 28672, 80, 64, 4096, 8),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8192, 8),
    "llama-3-70b": (128256, 8192, 28672, 80, 64, 8192, 8),
    "mistral-7b": (32000, 4096, 14336, 32, 32, 32768, 8),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 32768, 4),
}
MORE = {
    "llama-3-8b": {"rope_theta": 500_000.0},
    "llama-3-70b": {"rope_theta": 500_000.0},
    "mistral-7b": {"model_type": "mistral"},
    "qwen2.5-7b": {"model_type": "qwen2", "rope_theta": 1e6, "norm_eps": 1e-6},
}
# {name: GPTConfig's fields}
SHAPES = {
    name: {**dict(zip(FIELDS, row)), "tie_word_embeddings": False, **MORE.get(name, {})}
    for name, row in TABLE.items()
}


def on_paper(name, dtype=torch.bfloat16, layers=None):
    """A GPT of that shape on the meta device: it has sizes, and takes no memory.
    `layers`: with so many instead."""
    check_choice("shape", name, SHAPES)
    fields = dict(SHAPES[name])
    if layers:
        fields["num_hidden_layers"] = layers
    with torch.device("meta"):
        return GPT(GPTConfig(**fields)).to(dtype)
