"""PiSSA and OLoRA: LoRA that starts from the weight itself.

    W = W_res + s B A,    W_res frozen,  A and B trained

PiSSA (Meng, Wang, Zhang 2024, arXiv 2404.02948): B A is the part of W of rank r that is
nearest to W, from its singular value decomposition U S V^T: B = U_r sqrt(S_r / s), A =
sqrt(S_r / s) V_r^T. "pissa_niter_4" finds it by a randomised decomposition with 4
iterations, which is much faster (Halko, Martinsson, Tropp 2009, 0909.4061). OLoRA
(Buyukakyuz 2024, 2406.01775): B = Q_r and A = R_r, from the decomposition W = Q R.

The model is as before, but its base is not: what is frozen now is W_res. Without the
adapter (disabled, unloaded) the model is W_res, and the adapter's file fits only W_res.
Loading makes W_res anew, from the W that it is given. A plain LoRA of rank 2r says the
same of W itself: s (B A - B_0 A_0) = s [B, -B_0] [A; A_0], with A_0, B_0 the start.
"""

import dataclasses
import math

import torch

from .. import weights
from ..config import ConfigError
from ..errors import TargetError
from .lora import INITS


def dense(adapter, base):
    """W (d_out, d_in) in 32 bits. Raises TargetError where W_res could not be stored,
    or has no r directions."""
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
    W, r = dense(adapter, base), adapter.lora_A.out_features
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
    W, r = dense(adapter, base), adapter.lora_A.out_features
    Q, R = torch.linalg.qr(W)  # (d_out, n), (n, d_in)
    take_out(adapter, base, W, R[:r], Q[:, :r])


INITS.update({"pissa": pissa, "pissa_niter_[number]": pissa, "olora": olora})


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
