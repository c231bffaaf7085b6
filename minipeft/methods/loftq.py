"""LoftQ: s B A starts as what quantisation loses.

    min ||W - Q - s B A||    by turns    Q = quantise(W - s B A)
                                         s B A = the part of W - Q of rank r

Each factor gets the square roots of the singular values, over s: the start is the same
for every alpha / r. The base becomes Q, dense: quantize_model(model,
double_quant=False) afterwards stores the same numbers in 4 bits. With one iteration Q
is quantise(W), so the adapter fits any base that was quantised in the same way.
loftq_config is PEFT's: {"loftq_bits": 4, "loftq_iter": 1}, with 2, 3, 4 or 8 bits, in
blocks of 64.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
arXiv 2310.08659, algorithm 1.
"""

import torch

from ..quant import (
    dequantize_4bit,
    dequantize_blockwise,
    normal_float,
    quantize_blockwise,
    quantize_nf4,
)


def fake_quantize(W, bits):
    """W as quantisation leaves it: NF4 itself, or the same quantiles for another number
    of bits."""
    if bits == 4:
        return dequantize_4bit(quantize_nf4(W, double_quant=False))
    code = normal_float(bits)
    return dequantize_blockwise(*quantize_blockwise(W, code, 64), code, 64)


@torch.no_grad()
def loftq_factors(W, r, bits=4, iterations=1):
    """W (d_out, d_in) -> Q (d_out, d_in), L (d_out, r), R (r, d_in), with Q + L R near
    W."""
    LR = 0
    for _ in range(iterations):
        Q = fake_quantize(W - LR, bits)
        U, S, Vt = torch.linalg.svd(W - Q, full_matrices=False)
        L, R = U[:, :r] * S[:r].sqrt(), S[:r, None].sqrt() * Vt[:r]
        LR = L @ R
    return Q, L, R
