"""LoRA: the change of a weight has low rank, so train it as a product of two thin
matrices.

    y = W x + s B A x        (equation 3)

    A (r, d_in)    B (d_out, r)    s = alpha / r

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

W is frozen. B starts at zero, so training starts from the model as it was. A starts
random: with both at zero neither would ever get a gradient. rsLoRA (Kalajdzievski 2023,
arXiv 2312.03732) has s = alpha / sqrt(r), so that a higher rank does not mean a smaller
change.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .. import kernels, weights
from ..slot import LinearDelta
from . import lora_init


class Lora(LinearDelta):
    """x (..., d_in) -> (..., d_out)"""

    kernel = kernels.add_low_rank
    rows_kernel = kernels.add_low_rank_rows

    def __init__(self, d_in, d_out, r, scaling, dropout=0.0, bias=False):
        super().__init__()
        self.lora_A = nn.Linear(d_in, r, bias=False)  # weight (r, d_in)
        self.lora_B = nn.Linear(r, d_out, bias=bias)  # weight (d_out, r)
        self.scaling = scaling
        self.dropout = dropout

    def reset_parameters(self, base, config):
        lora_init.initialize(self, base, config)

    @property
    def factors(self):
        """A (r, d_in), B (d_out, r)"""
        return self.lora_A.weight, self.lora_B.weight

    def delta(self, base):  # (d_out, d_in), formed for merging only
        return self.scaling * self.lora_B.weight @ self.lora_A.weight

    def update(self, base, x):
        return self.scaling * self.lora_B(self.lora_A(x))

    def fold(self, base):
        super().fold(base)
        if self.lora_B.bias is not None:
            old = 0 if base.bias is None else base.bias
            base.bias = old + self.scaling * self.lora_B.bias


class LoraEmbedding(LinearDelta):
    """Token ids x (...) -> (..., d). An embedding is a linear map of one-hot vectors: A
    times one of them is a column of A."""

    def __init__(self, d_in, d_out, r, scaling, dropout=0.0):
        super().__init__()
        self.lora_embedding_A = nn.Parameter(torch.randn(r, d_in))  # (r, vocabulary)
        self.lora_embedding_B = nn.Parameter(torch.randn(d_out, r))  # (d, r)
        self.scaling = scaling

    def reset_parameters(self, base, config):
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_embedding_A)  # here A is the one at zero
            nn.init.normal_(self.lora_embedding_B)

    @property
    def factors(self):
        """A (r, vocabulary), B (d, r)"""
        return self.lora_embedding_A, self.lora_embedding_B

    def delta(self, base):
        return self.scaling * self.lora_embedding_B @ self.lora_embedding_A

    def update(self, base, x):
        Ax = F.embedding(x, self.lora_embedding_A.T, base.module.padding_idx)
        scale = weights.output_scale(base.module) * self.scaling
        return scale * F.linear(Ax, self.lora_embedding_B)
