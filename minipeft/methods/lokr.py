"""LoKr: a Kronecker product. Every entry of a small matrix is replaced by that multiple
of another small matrix.

    W' = W + s C (x) D,    C (p, m),  D (q, n),  p q = d_out,  m n = d_in,  s = alpha /
      r

Edalati et al. 2022, "KronA", arXiv 2212.10650; as LoKr: Yeh et al. 2023, 2309.14859.
rank(C (x) D) = rank(C) rank(D), so a few hundred numbers can have full rank. C and D
are whole, or themselves low-rank products where r is small. The product is never formed
to apply it: with x read as a matrix X (m, n), (C (x) D) x is C X D^T, read as a vector.
"""

from dataclasses import dataclass
from math import isqrt, sqrt
from typing import ClassVar

import torch
from torch import nn

from .. import weights
from ..config import ConfigError
from .loha import Lycoris, LycorisConfig


def factorization(dimension, factor=-1):
    """(a, b), a <= b, with a b = dimension: as near to each other as can be. With a
    factor: a is it, if it divides, or else is the largest divisor that is no larger."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    largest = isqrt(dimension) if factor == -1 else min(factor, isqrt(dimension))
    a = max(a for a in range(1, largest + 1) if dimension % a == 0)
    return a, dimension // a


class Kronecker(torch.autograd.Function):
    """C X D^T for each of N rows X (m, n) of x. For the backward pass X D^T is computed
    once more, not kept."""

    @staticmethod
    def forward(ctx, X, C, D):
        ctx.save_for_backward(X, C, D)
        return C @ (X @ D.T)  # (N, p, q)

    @staticmethod
    def backward(ctx, grad):
        # autocast's, if that was on
        X, C, D = (tensor.to(grad.dtype) for tensor in ctx.saved_tensors)
        below = C.T @ grad  # (N, m, q)
        dX, dD = below @ D, below.flatten(0, 1).T @ X.flatten(0, 1)
        del below  # before its like is made again
        return dX, torch.einsum("Npq,Nmq->pm", grad, X @ D.T), dD


class LoKr(Lycoris):
    """x (..., d_in) -> (..., d_out)"""

    def __init__(self, d_in, d_out, r, scaling, config):
        super().__init__(config)
        (m, n), (p, q) = (
            factorization(d, config.decompose_factor) for d in (d_in, d_out)
        )
        self.shape, self.scaling = (p, m, q, n), scaling
        if config.decompose_both and r < max(p, m) / 2:
            self.lokr_w1_a, self.lokr_w1_b = (
                nn.Parameter(torch.empty(p, r)),
                nn.Parameter(torch.empty(r, m)),
            )
        else:
            self.lokr_w1 = nn.Parameter(torch.empty(p, m))
        if r < max(q, n) / 2:
            self.lokr_w2_a, self.lokr_w2_b = (
                nn.Parameter(torch.empty(q, r)),
                nn.Parameter(torch.empty(r, n)),
            )
        else:
            self.lokr_w2 = nn.Parameter(torch.empty(q, n))

    def reset(self, config):
        for factor in self.parameters():
            # uniform within 1 / sqrt(columns)
            nn.init.kaiming_uniform_(factor, a=sqrt(5))
        if config.init_weights:
            zero = (
                ("lokr_w2", "lokr_w2_b")
                if config.init_weights == "lycoris"
                else ("lokr_w1", "lokr_w1_a")
            )
            nn.init.zeros_(
                next(getattr(self, name) for name in zero if hasattr(self, name))
            )

    @property
    def factors(self):
        """C (p, m), D (q, n)"""
        return (
            (
                self.lokr_w1
                if hasattr(self, "lokr_w1")
                else self.lokr_w1_a @ self.lokr_w1_b
            ),
            (
                self.lokr_w2
                if hasattr(self, "lokr_w2")
                else self.lokr_w2_a @ self.lokr_w2_b
            ),
        )

    def delta(self, base):
        # (d_out, d_in): formed for merging only
        return self.scaling * torch.kron(*self.factors)

    def update(self, base, x):
        (p, m, q, n), (C, D) = self.shape, self.factors
        y = Kronecker.apply(x.reshape(-1, m, n), self.scaling * C, D)  # (N, p, q)
        return self.thinned(y.reshape(*x.shape[:-1], p * q))


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "LOKR"
    adapter: ClassVar[type] = LoKr
    decompose_both: bool = False  # C too may be a low-rank product
    # p and m, where they divide; -1: as near to the square root as can be
    decompose_factor: int = -1
    rank_dropout_scale: bool = False  # whether what rank_dropout leaves is scaled up
    # True: C zero; "lycoris": D zero; False: both random
    init_weights: bool | str = True

    def __post_init__(self):
        super().__post_init__()
        f = self.decompose_factor
        if isinstance(f, bool) or not isinstance(f, int) or not (f == -1 or f > 0):
            raise ConfigError(
                f"decompose_factor = {f!r}: expected is a positive integer, or -1: near"
                " the square root"
            )
        self.strict = True
        if isinstance(self.init_weights, str) and self.init_weights != "lycoris":
            raise ConfigError(
                f"unknown init_weights {self.init_weights!r}; valid: True, False,"
                " 'lycoris'"
            )

    def on_load(self):  # whatever PEFT made of it is made of it again
        self.strict = False

    def create(self, base, path):
        for d in (
            weights.linear_features(base.module)
            if self.decompose_factor > 0 and self.strict
            else ()
        ):
            if d % self.decompose_factor:
                fit = ", ".join(str(f) for f in range(2, d) if d % f == 0)
                raise ConfigError(
                    f"{path}: decompose_factor = {self.decompose_factor} does not"
                    f" divide its size {d}"
                    + (f" ({fit} would)" if fit else ": a prime")
                )
        return super().create(base, path)
