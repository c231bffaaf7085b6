"""LoftQ: a LoRA that starts from what quantisation loses.

    min ||W - Q - s B A||:    Q = quantise(W - s B A),  then  s B A = the rank-r part of
      W - Q,  and again

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
arXiv 2310.08659, algorithm 1. Each factor gets the square roots of the singular values,
over s: whatever alpha / r is, the start is the same.

The base becomes Q, dense: quantize_model(model, double_quant=False) afterwards stores
the same numbers in 4 bits. With one iteration Q is quantise(W), so that the adapter
fits any base that was quantised likewise. Loading onto W makes Q anew. loftq_config as
in Hugging Face PEFT: {"loftq_bits": 4, "loftq_iter": 1}; bits 2, 3, 4 or 8, in blocks
of 64.
"""

import warnings

import torch

from .. import weights
from ..config import ConfigError
from ..quant import (
    dequantize_4bit,
    dequantize_blockwise,
    normal_float,
    quantize_blockwise,
    quantize_nf4,
)
from .lora import INITS
from .lora_init import dense


def rounded(W, bits):
    """W as quantisation leaves it: NF4 itself, or the same quantiles for another number
    of bits."""
    if bits == 4:
        return dequantize_4bit(quantize_nf4(W, double_quant=False))
    code = normal_float(bits)
    return dequantize_blockwise(*quantize_blockwise(W, code, 64), code, 64)


@torch.no_grad()
def alternate(W, r, bits=4, iterations=1):
    """W (d_out, d_in) -> Q (d_out, d_in), L (d_out, r), R (r, d_in), with Q + L R near
    W."""
    LR = 0
    for _ in range(iterations):
        Q = rounded(W - LR, bits)
        U, S, Vt = torch.linalg.svd(W - Q, full_matrices=False)
        L, R = U[:, :r] * S[:r].sqrt(), S[:r, None].sqrt() * Vt[:r]
        LR = L @ R
    return Q, L, R


def loftq(adapter, base, config):
    given = dict(getattr(config.loftq_config, "__dict__", config.loftq_config) or {})
    bits, iterations = given.pop("loftq_bits", 4), given.pop("loftq_iter", 1)
    if (
        given
        or bits not in (2, 3, 4, 8)
        or not isinstance(iterations, int)
        or iterations < 1
    ):
        raise ConfigError(
            f"loftq_config={config.loftq_config!r}: expected loftq_bits 2, 3, 4 or 8,"
            " and loftq_iter of 1 or more"
        )
    if not weights.is_dense(base.module):
        torch.nn.init.zeros_(adapter.lora_B.weight)
        if not config.inference_mode:
            warnings.warn(
                "LoftQ starts from what rounding loses, and here the base is in 4 bits"
                " already: a plain start. Make the adapter first, then quantize_model."
                " (If its file is being loaded, all is well)",
                stacklevel=2,
            )
        return
    Q, L, R = alternate(
        dense(adapter, base), adapter.lora_A.out_features, bits, iterations
    )
    adapter.lora_A.weight.data.copy_(R / adapter.scaling**0.5)
    adapter.lora_B.weight.data.copy_(L / adapter.scaling**0.5)
    base.weight = Q


INITS["loftq"] = loftq
