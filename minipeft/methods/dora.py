"""DoRA: a weight has a magnitude and a direction. Train the magnitudes as they are, and
the directions by a LoRA.

    W' = g (W + s B A),    g = m / ||W + s B A||,    one m and one norm for each row,
      that is for each output

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353
(equation 5). m starts as ||W||, so that training starts from the model as it was. The
paper writes its weights (d_in, d_out) and speaks of columns: a column there is a row
here. To the backward pass the norm is a constant (section 4.3), or it would have to
hold matrices of W's size. It is computed without forming B A, from what is small: with
C = W A^T (d_out, r) and G = A A^T (r, r),

    ||W + s B A||^2 = ||W||^2 + 2 s <B, C> + s^2 <B, B G>    row by row
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .. import weights
from .lora import VARIANTS, Lora, LoraConfig


@dataclass(kw_only=True)
class DoraConfig(LoraConfig):
    """LoraConfig(use_dora=True), and saved as that."""

    use_dora: bool = True


class Dora(Lora):
    """x (..., d_in) -> (..., d_out)"""

    def __init__(self, d_in, d_out, r, scaling, dropout=0.0, bias=False):
        super().__init__(d_in, d_out, r, scaling, dropout)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(d_out))  # m

    def reset(self, base, config):
        super().reset(base, config)
        self.lora_magnitude_vector = nn.Parameter(self.norm(base))

    @torch.no_grad()
    def norm(self, base):
        """||W + s B A|| of each row (d_out,)"""
        W = weights.read_weight(base.frozen)
        # in 16 bits it would be rough
        with torch.autocast("cpu" if W.is_meta else W.device.type, enabled=False):
            W, A, B = (
                tensor.to(W.device, self.lora_A.weight.dtype)
                for tensor in (W, *self.factors)
            )
            inner = (B.T * (2 * (A @ W.T) + self.scaling * (A @ A.T) @ B.T)).sum(0)
            return (
                (torch.linalg.vector_norm(W, dim=1).square() + self.scaling * inner)
                .clamp(min=1e-30)
                .sqrt()
            )

    def forward(self, base, x):
        (A, B), frozen, seen = (
            self.factors,
            base.frozen,
            self.seen(x, self.lora_A.weight.dtype),
        )
        b, g, h = (
            frozen.bias,
            self.lora_magnitude_vector / self.norm(base),
            F.linear(seen, A).reshape(-1, len(A)),
        )
        # W x is nobody else's: add to it in place
        if self.joins(base, x) and frozen is base.module:
            y = F.linear(seen.reshape(-1, A.shape[1]), base.weight)
            z = y.addmm_(h, B.T, alpha=self.scaling)  # (W + s B A) x, (N, d_out)
        # the directions see a thinned x, so W x is needed once more
        elif self.dropout and self.training:
            y, W = base(x), weights.read_weight(frozen).to(A.dtype)
            more = (g - 1) * F.linear(seen, W) + g * self.scaling * F.linear(h, B).view(
                y.shape
            )
            return (y + more).to(y.dtype)
        else:
            y = base(x)
            z = y.to(h.dtype).reshape(-1, len(B))
            z = torch.addmm(z if b is None else z - b, h, B.T, alpha=self.scaling)
        # the magnitude is W's, not the bias's
        out = g * z if b is None else torch.addcmul(b.to(z.dtype), g, z)
        return out.view(*x.shape[:-1], len(B)).to(y.dtype)

    def fold(self, base):
        g, b = self.lora_magnitude_vector / self.norm(base), base.frozen.bias
        if b is not base.bias:  # an adapter before this one has changed it
            base.bias = b + g * (base.bias - b)
        base.weight = g[:, None] * (base.weight + self.delta(base))


VARIANTS["use_dora"] = Dora
