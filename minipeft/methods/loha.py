"""LoHa: the entry-by-entry product of two low-rank matrices. Ranks multiply: r twice
gives a rank up to r^2.

    W' = W + s (B1 A1) * (B2 A2),    A (r, d_in),  B (d_out, r),  s = alpha / r

Hyeon-Woo, Ye-Bin and Oh 2021, "FedPara: Low-Rank Hadamard Product for
Communication-Efficient Federated Learning", arXiv 2108.06098 (proposition 1); as an
adapter: Yeh et al. 2023, "Navigating Text-To-Image Customization", 2309.14859. It has
twice the parameters of a LoRA of the same r. There is no way to apply it without
forming the change; where nothing stands between, W joins it, and one product with x
does for both.
"""

from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import targets, weights
from ..config import LayerConfig
from ..slot import LinearDelta


@dataclass(kw_only=True)
class LycorisConfig(LayerConfig):
    """The fields that LoHa and LoKr have in common, with Hugging Face PEFT's names and
    defaults."""

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0  # the share of outputs that get no update, in training
    module_dropout: float = 0.0  # how often a layer gets no update at all, in training
    # for PEFT: it concerns convolutions, which are not adapted here
    use_effective_conv2d: bool = False
    init_weights: bool = True  # False: all random, so that the start is another model
    # {expression for the end of a path: r for such layers}
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # likewise

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("r", **self.rank_pattern)
        self.check_probability("rank_dropout", "module_dropout")

    def create(self, base, path):
        r = targets.match_pattern(self.rank_pattern, path, self.r)
        alpha = targets.match_pattern(self.alpha_pattern, path, self.alpha)
        adapter = self.adapter(
            *weights.linear_features(base.module), r, alpha / r, self
        )
        adapter.reset(self)
        return adapter


class Lycoris(LinearDelta):
    """What LoHa and LoKr do alike: dropout, of outputs and of whole layers."""

    def __init__(self, config):
        super().__init__()
        self.rank_dropout, self.module_dropout = (
            config.rank_dropout,
            config.module_dropout,
        )
        self.rescaled = getattr(config, "rank_dropout_scale", True)

    def forward(self, base, x):
        if (
            self.training
            and self.module_dropout
            and torch.rand(1) <= self.module_dropout
        ):
            return base(x)
        return super().forward(base, x)

    def thinned(self, update):
        """Without some outputs, (..., d_out)"""
        if not (self.training and self.rank_dropout):
            return update
        stays = (torch.rand(update.shape[-1]) > self.rank_dropout).to(update)
        return update * (
            stays / stays.mean().clamp(min=1e-6) if self.rescaled else stays
        )


class Hadamard(torch.autograd.Function):
    """W + s (B1 A1) * (B2 A2). For the backward pass it keeps the factors and forms
    their products once more."""

    @staticmethod
    def forward(ctx, W, B1, A1, B2, A2, scaling):
        ctx.save_for_backward(B1, A1, B2, A2)
        ctx.scaling = scaling
        delta = (B1 @ A1).mul_(B2 @ A2).mul_(scaling)  # (d_out, d_in)
        return delta if W is None else delta.add_(W)

    @staticmethod
    def backward(ctx, grad):
        B1, A1, B2, A2 = ctx.saved_tensors
        grad = grad * ctx.scaling
        one, two = grad * (B2 @ A2), grad * (B1 @ A1)
        return None, one @ A1.T, B1.T @ one, two @ A2.T, B2.T @ two, None


class LoHa(Lycoris):
    """x (..., d_in) -> (..., d_out)"""

    def __init__(self, d_in, d_out, r, scaling, config):
        super().__init__(config)
        self.hada_w1_a, self.hada_w1_b = (
            nn.Parameter(torch.empty(d_out, r)),
            nn.Parameter(torch.empty(r, d_in)),
        )
        self.hada_w2_a, self.hada_w2_b = (
            nn.Parameter(torch.empty(d_out, r)),
            nn.Parameter(torch.empty(r, d_in)),
        )
        self.scaling = scaling

    def reset(self, config):
        for factor in self.parameters():
            # uniform within 1 / sqrt(columns)
            nn.init.kaiming_uniform_(factor, a=sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)  # one of the four is zero, so the product is

    def delta(self, base, W=None):
        return Hadamard.apply(
            W,
            self.hada_w1_a,
            self.hada_w1_b,
            self.hada_w2_a,
            self.hada_w2_b,
            self.scaling,
        )

    def update(self, base, x):
        return self.thinned(F.linear(x, self.delta(base)))

    def forward(self, base, x):
        if self.joins(base, x) and not (
            self.training and (self.rank_dropout or self.module_dropout)
        ):
            return F.linear(x, self.delta(base, base.weight), base.bias)
        return super().forward(base, x)


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "LOHA"
    adapter: ClassVar[type] = LoHa
