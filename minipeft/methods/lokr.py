"""LoKr: a Kronecker product. Every entry of a small matrix is replaced by that multiple
of another small matrix.

    W' = W + s C (x) D

    C (p, m)    D (q, n)    p q = d_out    m n = d_in    s = alpha / r

Edalati et al. 2022, "KronA", arXiv 2212.10650; as LoKr: Yeh et al. 2023, arXiv
2309.14859.

rank(C (x) D) = rank(C) rank(D), so a few hundred numbers can have full rank. C and D
are whole, or low-rank products themselves where r is small. The product is never formed
to apply it: with x read as a matrix X (m, n), (C (x) D) x is C X D^T, read as a vector.
"""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import nn

from .. import kernels, weights
from ..config import ConfigError
from .loha import Lycoris, LycorisConfig


def factorization(dimension, factor=-1):
    """(a, b) with a b = dimension and a <= b, as near to each other as possible. With a
    factor that divides, a is the factor; else a is the largest divisor below it."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    largest = isqrt(dimension) if factor == -1 else min(factor, isqrt(dimension))
    a = max(a for a in range(1, largest + 1) if dimension % a == 0)
    return a, dimension // a


class LoKr(Lycoris):
    """x (..., d_in) -> (..., d_out)"""

    kernel = kernels.lokr

    def __init__(self, d_in, d_out, r, scaling, config):
        super().__init__(config)
        m, n = factorization(d_in, config.decompose_factor)
        p, q = factorization(d_out, config.decompose_factor)
        r_C = r if config.decompose_both and r < max(p, m) / 2 else None
        r_D = r if r < max(q, n) / 2 else None
        add_factor(self, "lokr_w1", (p, m), r_C)
        add_factor(self, "lokr_w2", (q, n), r_D)
        self.scaling = scaling

    def zero_factor(self, config):
        lycoris = config.init_weights == "lycoris"
        names = ("lokr_w2", "lokr_w2_b") if lycoris else ("lokr_w1", "lokr_w1_a")
        return next(p for name, p in self.named_parameters() if name in names)

    @property
    def factors(self):
        """C (p, m), D (q, n)"""
        return read_factor(self, "lokr_w1"), read_factor(self, "lokr_w2")

    def delta(self, base):  # (d_out, d_in), formed for merging only
        return self.scaling * torch.kron(*self.factors)

    def update(self, base, x):
        C, D = self.factors
        X = x.unflatten(-1, (C.shape[1], D.shape[1]))  # (..., m, n)
        return (self.scaling * C @ X @ D.T).flatten(-2)


def add_factor(adapter, name, shape, r=None):
    """A matrix of this shape, whole or as a product of rank r."""
    if r is None:
        setattr(adapter, name, nn.Parameter(torch.empty(shape)))
    else:
        setattr(adapter, f"{name}_a", nn.Parameter(torch.empty(shape[0], r)))
        setattr(adapter, f"{name}_b", nn.Parameter(torch.empty(r, shape[1])))


def read_factor(adapter, name):
    if hasattr(adapter, name):
        return getattr(adapter, name)
    return getattr(adapter, f"{name}_a") @ getattr(adapter, f"{name}_b")


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "LOKR"
    adapter: ClassVar[type] = LoKr
    decompose_both: bool = False  # C too may be a low-rank product
    # p and m, where it divides; -1: as near to the square root as possible
    decompose_factor: int = -1
    rank_dropout_scale: bool = False  # scale up what rank_dropout leaves
    # True: C zero; "lycoris": D zero; False: both random
    init_weights: bool | str = True

    def __post_init__(self):
        super().__post_init__()
        if self.decompose_factor != -1:
            self.check_positive("decompose_factor")
        self.check_choice("init_weights", (True, False, "lycoris"))

    def create(self, base, path):
        # PEFT takes the nearest divisor: so does a file
        if self.decompose_factor > 0 and not self.from_checkpoint:
            for d in weights.linear_features(base.module):
                self.check_divides(d, path)
        return super().create(base, path)

    def check_divides(self, d, path):
        if d % self.decompose_factor:
            fit = ", ".join(str(f) for f in range(2, d) if d % f == 0)
            raise ConfigError(
                f"{path}: decompose_factor = {self.decompose_factor} does not"
                f" divide its size {d}" + (f" ({fit} would)" if fit else ": a prime")
            )
