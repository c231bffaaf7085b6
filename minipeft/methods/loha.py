"""LoHa: the entry-by-entry product of two low-rank matrices. Ranks multiply: twice r
numbers a side give a rank of up to r^2.

    W' = W + s (B1 A1) * (B2 A2)

    A1, A2 (r, d_in)    B1, B2 (d_out, r)    s = alpha / r

Hyeon-Woo, Ye-Bin and Oh 2021, "FedPara: Low-Rank Hadamard Product for
Communication-Efficient Federated Learning", arXiv 2108.06098 (proposition 1); as an
adapter: Yeh et al. 2023, "Navigating Text-To-Image Customization", arXiv 2309.14859.

It has twice the parameters of a LoRA of the same r. There is no way to apply it without
forming the change.
"""

from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar

import torch
from torch import nn

from .. import kernels, targets, weights
from ..config import ConfigError, LayerConfig
from ..slot import LinearDelta
from .scaling import check_alpha, check_rank


class Lycoris(LinearDelta):
    """What LoHa and LoKr share: their start, and dropouts of single outputs and of
    whole layers."""

    def __init__(self, config):
        super().__init__()
        self.rank_dropout = config.rank_dropout
        self.module_dropout = config.module_dropout
        self.rescaled = getattr(config, "rank_dropout_scale", True)

    def reset_parameters(self, config):
        for factor in self.parameters():
            nn.init.kaiming_uniform_(factor, a=sqrt(5))  # within 1 / sqrt(columns)
        if config.init_weights:  # one factor is zero, so the product is
            nn.init.zeros_(self.zero_factor(config))

    def forward(self, base, x):
        if not (self.training and (self.rank_dropout or self.module_dropout)):
            return super().forward(base, x)
        y = base(x)
        if self.module_dropout and torch.rand(1) <= self.module_dropout:
            return y
        update = self.drop_outputs(self.update(base, self.adapter_input(x)))
        return (y + update).to(y.dtype)

    def drop_outputs(self, update):  # (..., d_out)
        if not self.rank_dropout:
            return update
        mask = (torch.rand(update.shape[-1]) > self.rank_dropout).to(update)
        scale = mask.mean().clamp(min=1e-6) if self.rescaled else 1
        return update * (mask / scale)


class LoHa(Lycoris):
    """x (..., d_in) -> (..., d_out)"""

    kernel = kernels.loha

    def __init__(self, d_in, d_out, r, scaling, config):
        super().__init__(config)
        self.hada_w1_a = nn.Parameter(torch.empty(d_out, r))  # B1
        self.hada_w1_b = nn.Parameter(torch.empty(r, d_in))  # A1
        self.hada_w2_a = nn.Parameter(torch.empty(d_out, r))  # B2
        self.hada_w2_b = nn.Parameter(torch.empty(r, d_in))  # A2
        self.scaling = scaling

    def zero_factor(self, config):
        return self.hada_w2_b

    @property
    def factors(self):
        """B1, A1, B2, A2"""
        return self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b

    def delta(self, base):
        B1, A1, B2, A2 = self.factors
        return self.scaling * (B1 @ A1) * (B2 @ A2)


@dataclass(kw_only=True)
class LycorisConfig(LayerConfig):
    """The fields that LoHa and LoKr share, with Hugging Face PEFT's names and
    defaults."""

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0  # in training: the share of outputs without an update
    module_dropout: float = 0.0  # in training: how often a layer has no update at all
    # for PEFT: it is for convolutions, which are not adapted here
    use_effective_conv2d: bool = False
    init_weights: bool = True  # False: all random, so training starts elsewhere
    # {expression for the end of a path: r for such layers}
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # likewise

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("r", **self.pattern("rank_pattern"))
        self.check_probability("rank_dropout", "module_dropout")
        check_alpha(alpha=self.alpha, **self.pattern("alpha_pattern"))
        if self.use_effective_conv2d:
            raise ConfigError(
                "use_effective_conv2d=True is for convolutions, which get no adapters"
                " here: leave it out"
            )

    @classmethod
    def from_file_fields(cls, data):  # of no effect on the linear layers of a file
        return super().from_file_fields(data | {"use_effective_conv2d": False})

    def create(self, base, path):
        r = targets.match_pattern(self.rank_pattern, path, self.r)
        alpha = targets.match_pattern(self.alpha_pattern, path, self.alpha)
        check_rank(r, base.module)
        adapter = self.adapter(
            *weights.linear_features(base.module), r, alpha / r, self
        )
        adapter.reset_parameters(self)
        return adapter


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "LOHA"
    adapter: ClassVar[type] = LoHa
