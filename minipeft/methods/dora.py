"""DoRA: a weight has a magnitude and a direction. Train the magnitudes directly, and
the directions by a LoRA.

    W' = g (W + s B A)    g = m / ||W + s B A||

    A (r, d_in)    B (d_out, r)    m, g (d_out,): one number for each row, that is for
    each output

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353
(equation 5). The paper speaks of the norm of each column; its code takes one for each
output, and so does everybody since: a row of W (d_out, d_in).

m starts as ||W||, so training starts from the model as it was. For the backward pass
the norm is a constant (section 4.3), or it would have to keep matrices of W's size. It
is computed without forming B A, from the small C = W A^T (d_out, r) and G = A A^T
(r, r), row by row:

    ||W + s B A||^2 = ||W||^2 + 2 s <B, C> + s^2 <B, B G>
"""

import torch
import torch.nn.functional as F
from torch import nn

from .. import kernels, weights
from .lora import Lora


class Dora(Lora):
    """x (..., d_in) -> (..., d_out). A, B and delta, the change of the direction, are
    LoRA's."""

    kernel = kernels.dora

    def __init__(self, d_in, d_out, r, scaling, dropout=0.0):
        super().__init__(d_in, d_out, r, scaling, dropout)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(d_out))  # m

    def reset_parameters(self, base, config):
        super().reset_parameters(base, config)
        self.lora_magnitude_vector = nn.Parameter(self.norm(base))

    def norm(self, base):  # ||W + s B A|| of each row (d_out,)
        # the layer's own W: adapters that are merged before this one do not count
        W = weights.read_weight(base.unmerged)
        return row_norms(W, *self.factors, self.scaling)

    def forward_plain(self, base, x):
        g = self.lora_magnitude_vector / self.norm(base)
        y, b = base(x), base.unmerged.bias
        h = self.adapter_input(x)
        Wx = y if b is None else y - b  # the magnitude is W's, not the bias's
        if self.dropout and self.training:
            Wx = F.linear(h, weights.read_weight(base.unmerged).to(h.dtype))
        return (y + (g - 1) * Wx + g * self.update(base, h)).to(y.dtype)

    def fold(self, base):
        g, b = self.lora_magnitude_vector / self.norm(base), base.unmerged.bias
        if b is not base.bias:  # an adapter before this one has changed it
            base.bias = b + g * (base.bias - b)
        base.weight = g[:, None] * (base.weight + self.delta(base))


@torch.no_grad()
def row_norms(W, A, B, s):
    """||W + s B A|| of each row (d_out,), in A's precision."""
    W = W.to(A.dtype)
    A, B = A.to(W.device), B.to(W.device)
    # 16 bits would be too rough
    with torch.autocast("cpu" if W.is_meta else W.device.type, enabled=False):
        added = (B.T * (2 * (A @ W.T) + s * (A @ A.T) @ B.T)).sum(0)
        square = torch.linalg.vector_norm(W, dim=1).square() + s * added
        return square.clamp(min=1e-30).sqrt()
