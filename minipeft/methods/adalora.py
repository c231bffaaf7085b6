"""AdaLoRA: give each matrix the rank that it needs. The change is written like an SVD,
and what matters least is pruned.

    W' = W + s B diag(E) A

    A (r, d_in)    E (r, 1)    B (d_out, r)

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv 2303.10512.

A regularization keeps rows of A and columns of B near orthonormal, so the entries of E
behave like singular values, and one of them can go without the others changing. A
triplet is E_i with its row and its column. It matters as much as the mean over its
entries of sensitivity |w dL/dw| times its uncertainty, both smoothed over steps. The
budget of triplets falls from init_r to target_r for each layer, cubically:

    b(t) = b_T + (b_0 - b_T) (1 - (t - t_init) / (T - t_final - t_init))^3

A pruned triplet keeps its row and column, so it can come back until the budget is
final. As in Hugging Face PEFT, s is lora_alpha / init_r throughout, and the
regularization is the mean over all A's and B's of ||A A^T - I|| or ||B^T B - I||.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import kernels, weights
from ..config import ConfigError
from ..peft_tables import ADALORA_TARGETS
from .lora_config import LoraConfig
from .pruning import PrunableDelta
from .scaling import check_rank


class AdaLora(PrunableDelta):
    """x (..., d_in) -> (..., d_out)"""

    kernel = kernels.add_low_rank

    def __init__(self, d_in, d_out, rank_pattern, scaling, dropout=0.0):
        super().__init__(rank_pattern)
        r = sum(rank_pattern)
        self.lora_A = nn.Parameter(torch.randn(r, d_in))
        self.lora_B = nn.Parameter(torch.randn(d_out, r))
        self.lora_E = nn.Parameter(torch.randn(r, 1))
        self.scaling = scaling
        self.dropout = dropout

    @property
    def factors(self):
        """diag(E) A (r, d_in), B (d_out, r)"""
        return self.lora_A * self.lora_E, self.lora_B

    def delta(self, base):
        return self.scaling * self.lora_B @ (self.lora_E * self.lora_A)

    def update(self, base, x):
        EAx = F.linear(x, self.lora_E * self.lora_A)  # (..., r)
        return self.scaling * F.linear(EAx, self.lora_B)

    def regularization_loss(self):
        """||A A^T - I|| + ||B^T B - I||"""
        grams = self.lora_A @ self.lora_A.T, self.lora_B.T @ self.lora_B
        identity = torch.eye(len(self.lora_E)).to(self.lora_E)
        return sum(torch.linalg.norm(gram - identity) for gram in grams)


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "ADALORA"
    regularized: ClassVar[bool] = True
    default_targets: ClassVar[dict] = ADALORA_TARGETS
    init_r: int = 12  # every layer's rank at first (r itself is not used)
    target_r: int = 8  # the final average rank
    tinit: int = 0  # steps before the budget begins to fall
    tfinal: int = 0  # steps at the end in which it does not change
    deltaT: int = 1  # steps from one pruning to the next
    beta1: float = 0.85  # smoothing of the sensitivity
    beta2: float = 0.85  # smoothing of its uncertainty
    # of the penalty, in training (PEFT adds it to losses in eval mode too)
    orth_reg_weight: float = 0.5
    total_step: int | None = None  # required: the length of the training
    # {path + ".lora_E": [is the triplet kept?]}, from the allocator
    rank_pattern: dict[str, list[bool]] | None = None

    def check_ranks(self):
        if self.r != 8:
            warnings.warn(
                f"AdaLoRA does not use r = {self.r}: init_r is the first rank,"
                " target_r the final one",
                stacklevel=5,
            )
        self.check_positive("init_r", "target_r", "total_step", "deltaT")
        if self.target_r > self.init_r:
            raise ConfigError(
                f"target_r = {self.target_r} is above init_r = {self.init_r}: ranks are"
                " only taken away"
            )
        self.check_number("tinit", least=0)
        self.check_number("tfinal", least=0)
        if self.tinit + self.tfinal >= self.total_step:
            raise ConfigError(
                f"tinit + tfinal = {self.tinit} + {self.tfinal} leaves none of the"
                f" total_step = {self.total_step} steps for the budget to fall in"
            )
        self.check_number("beta1", above=0, below=1)
        self.check_number("beta2", above=0, below=1)
        self.check_number("orth_reg_weight", least=0)
        for name in ("use_dora", "use_rslora", "lora_bias", "alpha_pattern"):
            if getattr(self, name):
                raise ConfigError(f"AdaLoRA has no {name}")
        self.check_choice("init_lora_weights", (True, False))

    def unused_patterns(self, field, found):
        if field != "rank_pattern":
            return super().unused_patterns(field, found)
        layers = {f"{path}.lora_E" for path in found}
        return [key for key in self.rank_pattern or () if key not in layers]

    def create(self, base, path):
        check_rank(self.init_r, base.module, useful=False)
        whole = [True] * self.init_r
        pattern = (self.rank_pattern or {}).get(f"{path}.lora_E", whole)
        alpha = self.lora_alpha if self.lora_alpha > 0 else self.init_r
        scaling = alpha / (self.init_r + 1e-5)
        d_in, d_out = weights.linear_features(base.module)
        adapter = AdaLora(d_in, d_out, pattern, scaling, self.lora_dropout)
        if self.init_lora_weights:
            nn.init.zeros_(adapter.lora_E)
            nn.init.normal_(adapter.lora_A, std=0.02)
            nn.init.normal_(adapter.lora_B, std=0.02)
        return adapter

    def regularization_loss(self, adapters):
        ours = [a for a in adapters if isinstance(a, AdaLora)]  # not modules_to_save
        losses = [adapter.regularization_loss() for adapter in ours]
        return self.orth_reg_weight * sum(losses) / (2 * len(losses))
