"""Where a LoRA starts.

The plain start: A random, B zero, W unchanged. Other starts come from the weight
itself, and change the base that is frozen from then on:

    W = W_0 + s B A        W_0 frozen, A and B trained

PiSSA (Meng, Wang, Zhang 2024, arXiv 2404.02948): B A is the matrix of rank r nearest to
W, from its singular value decomposition U S V^T: B = U_r sqrt(S_r / s), A = sqrt(S_r /
s) V_r^T. "pissa_niter_4" finds it by a randomised decomposition with 4 iterations,
which is much faster (Halko, Martinsson, Tropp 2009, arXiv 0909.4061).

OLoRA (Buyukakyuz 2024, arXiv 2406.01775): B = Q_r and A = R_r, from the decomposition
W = Q R.

LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1): s B A is what quantisation loses.

    min ||W - Q - s B A||    by turns    Q = quantise(W - s B A)
                                         s B A = the part of W - Q of rank r

Each factor gets the square roots of the singular values, over s: the start is the same
for every alpha / r. The base becomes Q, dense: quantize_model(model,
double_quant=False) afterwards stores the same numbers in 4 bits. With one iteration Q
is quantise(W), so the adapter fits any base that was quantised in the same way.
loftq_config is PEFT's: {"loftq_bits": 4, "loftq_iter": 1}, with 2, 3, 4 or 8 bits, in
blocks of 64.

With PiSSA and OLoRA the model is as before, but its base is not: it is W_0. Without the
adapter (disabled, unloaded) the model is W_0, and the adapter's file fits only W_0.
Loading computes W_0 from the W that it is given. A plain LoRA of rank 2r says the same
about W itself: s (B A - B_0 A_0) = s [B, -B_0] [A; A_0], with A_0, B_0 the start.
"""

import dataclasses
import difflib
import math
import re
import warnings

import torch
from torch import nn

from .. import weights
from ..config import ConfigError
from ..errors import TargetError
from ..quant import (
    dequantize_4bit,
    dequantize_blockwise,
    normal_float,
    quantize_blockwise,
    quantize_nf4,
)


def initialize(adapter, base, config):
    """Give lora_A and lora_B their start, as config.init_lora_weights says."""
    start = config.init_lora_weights
    if start is False:  # nn.Linear's own: both random
        return
    if adapter.lora_B.bias is not None:
        nn.init.zeros_(adapter.lora_B.bias)
    (kaiming if start is True else find(start))(adapter, base, config)


def kaiming(adapter, base, config):
    # uniform within 1 / sqrt(d_in)
    nn.init.kaiming_uniform_(adapter.lora_A.weight, a=math.sqrt(5))
    nn.init.zeros_(adapter.lora_B.weight)


def gaussian(adapter, base, config):
    nn.init.normal_(adapter.lora_A.weight, std=1 / adapter.lora_A.out_features)
    nn.init.zeros_(adapter.lora_B.weight)


def dense_weight(adapter, base):
    """W (d_out, d_in) in 32 bits. Raises TargetError where W_0 could not be stored, or
    where W has less than r directions."""
    if weights.storage(base.module) not in (
        weights.DenseStorage,
        weights.TransposedStorage,
    ):
        raise TargetError(
            "PiSSA and OLoRA store W - s B A in the base, and this 4-bit"
            f" {type(base.module).__name__} would round it. Make the adapter on the"
            " base in 16 or 32 bits and quantise afterwards"
        )
    W, r = base.weight.detach().float(), adapter.lora_A.out_features
    if r > min(W.shape):
        raise TargetError(
            f"r = {r}, but a weight of shape {tuple(W.shape)} has only {min(W.shape)}"
            " directions"
        )
    return W


@torch.no_grad()
def take_out(adapter, base, W, A, B):
    adapter.lora_A.weight.copy_(A)
    adapter.lora_B.weight.copy_(B)
    base.weight = W - adapter.scaling * B @ A


def pissa(adapter, base, config):
    W, r = dense_weight(adapter, base), adapter.lora_A.out_features
    _, _, iterations = config.init_lora_weights.partition("_niter_")
    if iterations:
        # (d_out, r), (r), (d_in, r)
        U, S, V = torch.svd_lowrank(W, r, niter=int(iterations))
    else:
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        V = Vt.T
    root = (S[:r] / adapter.scaling).sqrt()
    take_out(adapter, base, W, root[:, None] * V[:, :r].T, U[:, :r] * root)


def olora(adapter, base, config):
    W, r = dense_weight(adapter, base), adapter.lora_A.out_features
    Q, R = torch.linalg.qr(W)  # (d_out, n), (n, d_in)
    take_out(adapter, base, W, R[:r], Q[:, :r])


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
    Q, L, R = loftq_factors(
        dense_weight(adapter, base), adapter.lora_A.out_features, bits, iterations
    )
    adapter.lora_A.weight.data.copy_(R / adapter.scaling**0.5)
    adapter.lora_B.weight.data.copy_(L / adapter.scaling**0.5)
    base.weight = Q


# init_lora_weights="name", or "name_4" for "name_[number]"
INITS = {
    "gaussian": gaussian,
    "pissa": pissa,
    "pissa_niter_[number]": pissa,
    "olora": olora,
    "loftq": loftq,
}


def find(name):
    """The function of INITS that init_lora_weights=name means. Raises ConfigError."""
    known = re.sub(r"_\d+$", "_[number]", name)
    if known not in INITS:
        near = difflib.get_close_matches(name, INITS, n=1)
        raise ConfigError(
            f"unknown init_lora_weights {name!r}"
            + (f" (nearest: {near[0]!r})" if near else "")
            + f"; valid: True, False, {', '.join(map(repr, INITS))}"
        )
    return INITS[known]


def changes_base(config):
    """Is the base not the one that it was before this adapter was made?"""
    return str(getattr(config, "init_lora_weights", "")).startswith(
        ("pissa", "olora", "loftq")
    )


def as_lora(config, tensors, start):
    """The adapter {key: tensor} that began as `start`, as a plain LoRA of rank 2r for
    the base from before."""
    if (
        config.peft_type != "LORA"
        or config.use_dora
        or config.init_lora_weights == "loftq"
    ):
        raise ConfigError(
            "only a PiSSA or OLoRA without use_dora can be converted to a plain LoRA of"
            " twice the rank"
        )
    if differ := tensors.keys() ^ start.keys():
        raise ConfigError(
            "the initial adapter is another one: only one of the two has"
            f" {', '.join(sorted(differ))}"
        )
    doubled = dict(tensors)
    for key, tensor in tensors.items():
        if "lora_A" in key or "lora_embedding_A" in key:
            doubled[key] = torch.cat([tensor, start[key].to(tensor)], 0)  # (2r, d_in)
        elif key.endswith("lora_B.weight") or "lora_embedding_B" in key:
            doubled[key] = torch.cat([tensor, -start[key].to(tensor)], 1)  # (d_out, 2r)
    times = math.sqrt(2) if config.use_rslora else 2  # of alpha, so that s stays
    return (
        dataclasses.replace(
            config,
            init_lora_weights=True,
            r=2 * config.r,
            lora_alpha=times * config.lora_alpha,
            rank_pattern={path: 2 * r for path, r in config.rank_pattern.items()},
            alpha_pattern={
                path: times * alpha for path, alpha in config.alpha_pattern.items()
            },
        ),
        doubled,
    )
