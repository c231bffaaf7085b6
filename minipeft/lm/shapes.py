"""Real models' shapes, from their published configurations: to reckon with on the meta
device, without their weights."""

import difflib

import torch

from .gpt import GPT, GPTConfig


def llama(
    vocab_size,
    hidden_size,
    intermediate_size,
    num_hidden_layers,
    num_attention_heads,
    num_key_value_heads=None,
    **more,
):
    return dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        tie_word_embeddings=False,
        **more,
    )


SHAPES = {
    "llama-33b": llama(32000, 6656, 17920, 60, 52),
    "llama-65b": llama(32000, 8192, 22016, 80, 64),
    "llama-2-7b": llama(32000, 4096, 11008, 32, 32, max_position_embeddings=4096),
    "llama-2-13b": llama(32000, 5120, 13824, 40, 40, max_position_embeddings=4096),
    "llama-2-70b": llama(32000, 8192, 28672, 80, 64, 8, max_position_embeddings=4096),
    "llama-3-8b": llama(
        128256,
        4096,
        14336,
        32,
        32,
        8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
    "llama-3-70b": llama(
        128256,
        8192,
        28672,
        80,
        64,
        8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
    "mistral-7b": llama(
        32000,
        4096,
        14336,
        32,
        32,
        8,
        max_position_embeddings=32768,
        model_type="mistral",
    ),
    "qwen2.5-7b": llama(
        152064,
        3584,
        18944,
        28,
        28,
        4,
        max_position_embeddings=32768,
        rope_theta=1e6,
        norm_eps=1e-6,
        model_type="qwen2",
    ),
}


def on_paper(name, dtype=torch.bfloat16, layers=None):
    """A GPT of that shape on the meta device: it has sizes, and takes no memory.
    `layers`: with so many instead."""
    if name not in SHAPES:
        close = difflib.get_close_matches(str(name), SHAPES, n=1)
        raise ValueError(
            "unknown shape"
            f" {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}; there are: "
            + ", ".join(SHAPES)
        )
    with torch.device("meta"):
        return GPT(
            GPTConfig(
                **SHAPES[name] | ({"num_hidden_layers": layers} if layers else {})
            )
        ).to(dtype)
