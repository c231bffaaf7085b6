"""Random matrices P (D, d) with columns of length 1, (nearly) orthogonal, made from a
seed. P(theta) is the product.

Three ways to have one. A dense matrix takes D d numbers, and as many multiplications.
The other two never form it.
"""

import math
import zlib

import torch
from torch import nn

from ..config import ConfigError


class Dense(nn.Module):
    """Gaussian numbers: the plain definition, for small D d."""

    def __init__(self, D, d, random):
        super().__init__()
        if D * d > 2**28:
            raise ConfigError(
                f"a dense projection of {D:,} x {d:,} would take {4 * D * d / 1e9:.1f}"
                ' GB: take projection="fastfood" or "hash"'
            )
        P = torch.randn(D, d, generator=random) / math.sqrt(D)
        self.register_buffer("P", P, persistent=False)

    def forward(self, theta):  # (d) -> (D)
        return self.P @ theta


class Hash(nn.Module):
    """Each parameter follows one number of theta_d, chosen by lot, with a sign (Chen et
    al. 2015, 1504.04788): the columns have no row in common, so they are orthogonal."""

    def __init__(self, D, d, random):
        super().__init__()
        # (D): all numbers equally often
        index = torch.randperm(D, generator=random) % d
        sign = torch.randint(2, (D,), generator=random) * 2.0 - 1
        entry = sign / torch.bincount(index).sqrt()[index]
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("entry", entry, persistent=False)

    def forward(self, theta):
        return theta.index_select(0, self.index) * self.entry


class Fastfood(nn.Module):
    """As good as Gaussian, in O(D log d) time and O(D) memory: blocks H G Pi H B of n =
    2^k >= d rows, one above the other (Le, Sarlos, Smola 2013, 1408.3060). B signs, Pi
    a permutation, G Gaussian, H Walsh and Hadamard's matrix."""

    def __init__(self, D, d, random):
        super().__init__()
        self.D = D
        self.n = 2 ** math.ceil(math.log2(d))
        self.piece = math.ceil(2**18 / self.n)  # so many blocks at a time
        blocks = math.ceil(D / self.n), self.n
        sign = torch.randint(2, blocks, generator=random, dtype=torch.int8) * 2 - 1
        gauss = torch.randn(blocks, generator=random)
        order = torch.empty(blocks, dtype=torch.long)
        for part in order.split(self.piece):
            lots = torch.rand(part.shape, generator=random)
            part.copy_(lots.argsort(dim=-1, stable=True))
        gauss /= math.sqrt(self.n) * gauss.norm()  # columns of length 1
        for name, value in (("sign", sign), ("order", order), ("gauss", gauss)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, theta):
        theta = nn.functional.pad(theta, (0, self.n - len(theta)))
        blocks = (self.sign, self.order, self.gauss)
        pieces = zip(*(each.split(self.piece) for each in blocks))
        x = [
            hadamard(hadamard(theta * sign).gather(-1, order) * gauss)
            for sign, order, gauss in pieces
        ]
        return torch.cat(x).flatten()[: self.D]  # of (blocks, n)


def hadamard(x):
    """x H over the last dimension n = 2^k, for H[i, j] = -1 where i and j have an odd
    number of binary ones in common, else 1. As H of size a b is the Kronecker product
    of those of sizes a and b, small ones suffice."""
    n = x.shape[-1]
    if n <= 32:
        H = torch.ones(1, 1, dtype=x.dtype, device=x.device)
        while len(H) < n:
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        return x @ H
    x = hadamard(x.unflatten(-1, (32, n // 32)))  # within the parts
    # and across them
    return hadamard(x.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


PROJECTIONS = {"dense": Dense, "fastfood": Fastfood, "hash": Hash}


def fingerprint(P, shapes):
    """A number that tells projections apart. Gaussians are rounded: their last digits
    depend on the processor."""
    parts = [
        (10 * value.flatten()[:1024] / value.abs().max()).round().int()
        for value in P.buffers()
    ]
    told = [list(map(tuple, shapes)), torch.cat(parts).tolist()]
    return zlib.crc32(repr(told).encode())
