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

LoftQ starts from what quantisation loses: see loftq.py.

With PiSSA and OLoRA the model is as before, but its base is not: it is W_0. Without the
adapter (disabled, unloaded) the model is W_0, and the adapter's file fits only W_0.
Loading computes W_0 from the W that it is given. A plain LoRA of rank 2r says the same
about W itself: s (B A - B_0 A_0) = s [B, -B_0] [A; A_0], with A_0, B_0 the start.
"""

import math
import re
import warnings

import torch
from torch import nn

from .. import weights
from ..config import ConfigError
from ..errors import TargetError
from ..io import check_choice, check_number
from .loftq import loftq_factors


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
    if not weights.is_dense(base.module):
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


LOFTQ_FIELDS = ("loftq_bits", "loftq_iter")


def loftq(adapter, base, config):
    settings = {"loftq_bits": 4, "loftq_iter": 1, **config.loftq_config}
    bits, iterations = settings["loftq_bits"], settings["loftq_iter"]
    for name in settings:
        check_choice("field of loftq_config", name, LOFTQ_FIELDS, ConfigError)
    check_choice("loftq_bits", bits, (2, 3, 4, 8), ConfigError)
    check_number("loftq_iter", iterations, whole=True, least=1, error=ConfigError)
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
        check_choice("init_lora_weights", name, (True, False, *INITS), ConfigError)
    return INITS[known]


def changes_base(config):
    """Is the base not the one that it was before this adapter was made?"""
    return str(getattr(config, "init_lora_weights", "")).startswith(
        ("pissa", "olora", "loftq")
    )
