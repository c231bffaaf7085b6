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
from ..slot import LinearDelta
from . import lora_init


class Dora(LinearDelta):
    """x (..., d_in) -> (..., d_out)"""

    kernel = kernels.dora

    def __init__(self, d_in, d_out, r, scaling, dropout=0.0):
        super().__init__()
        self.lora_A = nn.Linear(d_in, r, bias=False)  # weight (r, d_in)
        self.lora_B = nn.Linear(r, d_out, bias=False)  # weight (d_out, r)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(d_out))  # m
        self.scaling = scaling
        self.dropout = dropout

    def reset_parameters(self, base, config):
        lora_init.initialize(self, base, config)
        self.lora_magnitude_vector = nn.Parameter(self.norm(base))

    @torch.no_grad()
    def norm(self, base):  # ||W + s B A|| of each row (d_out,)
        s = self.scaling
        W = weights.read_weight(base.unmerged).to(self.lora_A.weight.dtype)
        A, B = self.lora_A.weight.to(W.device), self.lora_B.weight.to(W.device)
        # 16 bits would be too rough
        with torch.autocast("cpu" if W.is_meta else W.device.type, enabled=False):
            added = (B.T * (2 * (A @ W.T) + s * (A @ A.T) @ B.T)).sum(0)
            square = torch.linalg.vector_norm(W, dim=1).square() + s * added
            return square.clamp(min=1e-30).sqrt()

    def forward_plain(self, base, x):
        g = self.lora_magnitude_vector / self.norm(base)
        y, b = base(x), base.unmerged.bias
        h = self.adapter_input(x)
        Wx = y if b is None else y - b  # the magnitude is W's, not the bias's
        if self.dropout and self.training:
            Wx = F.linear(h, weights.read_weight(base.unmerged).to(h.dtype))
        BAx = self.scaling * self.lora_B(self.lora_A(h))
        return (y + (g - 1) * Wx + g * BAx).to(y.dtype)

    def delta(self, base):  # of the direction
        return self.scaling * self.lora_B.weight @ self.lora_A.weight

    def fold(self, base):
        g, b = self.lora_magnitude_vector / self.norm(base), base.unmerged.bias
        if b is not base.bias:  # an adapter before this one has changed it
            base.bias = b + g * (base.bias - b)
        base.weight = g[:, None] * (base.weight + self.delta(base))
