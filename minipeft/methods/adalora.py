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
from ..slot import LinearDelta
from .lora import LoraConfig
from .scaling import check_rank


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
    rank_pattern: dict | None = None

    def __post_init__(self):
        pattern = self.rank_pattern
        self.rank_pattern = {}  # lists of booleans, not ranks as in LoRA
        if not isinstance(pattern, dict | None):
            raise ConfigError(
                f"rank_pattern = {pattern!r}: expected the allocator's notes, a dict"
            )
        super().__post_init__()
        self.rank_pattern = pattern
        if self.r != 8:
            warnings.warn(
                f"AdaLoRA does not use r = {self.r}: init_r is the first rank,"
                " target_r the final one",
                stacklevel=4,
            )
        self.check_positive("init_r", "target_r", "total_step", "deltaT")
        if self.target_r > self.init_r:
            raise ConfigError(
                f"target_r = {self.target_r} is above init_r = {self.init_r}: ranks are"
                " only taken away"
            )
        if (
            min(self.tinit, self.tfinal) < 0
            or self.tinit + self.tfinal >= self.total_step
        ):
            raise ConfigError(
                f"tinit + tfinal = {self.tinit} + {self.tfinal} leaves none of the"
                f" total_step = {self.total_step} steps for the budget to fall in"
            )
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ConfigError(
                f"beta1 = {self.beta1}, beta2 = {self.beta2}: expected numbers"
                " between 0 and 1"
            )
        if self.orth_reg_weight < 0:
            raise ConfigError(
                f"orth_reg_weight = {self.orth_reg_weight}: expected a weight of"
                " 0 or more"
            )
        for name in ("use_dora", "use_rslora", "lora_bias", "alpha_pattern"):
            if getattr(self, name):
                raise ConfigError(f"AdaLoRA has no {name}")
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"init_lora_weights = {self.init_lora_weights!r}: AdaLoRA has only"
                " True and False"
            )

    # nothing is shared, but the penalty is a mean over all layers
    def create_shared(self, bases):
        self.weight = self.orth_reg_weight / (2 * len(bases))

    def create(self, base, path):
        check_rank(self.init_r, base.module, useful=False)
        rows = (self.rank_pattern or {}).get(f"{path}.lora_E", [True] * self.init_r)
        adapter = AdaLora(*weights.linear_features(base.module), rows, self)
        if self.init_lora_weights:
            adapter.reset_parameters()
        return adapter


class AdaLora(LinearDelta):
    """x (..., d_in) -> (..., d_out)"""

    kernel = kernels.add_low_rank

    def __init__(self, d_in, d_out, rows, config):
        super().__init__()
        r = sum(rows)  # rows: which of the init_r triplets this layer has
        self.lora_A = nn.Parameter(torch.randn(r, d_in))
        self.lora_B = nn.Parameter(torch.randn(d_out, r))
        self.lora_E = nn.Parameter(torch.randn(r, 1))
        alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
        self.scaling = alpha / (config.init_r + 1e-5)
        self.dropout = config.lora_dropout
        self.weight = config.weight
        self.rows = rows
        self.kept = [True] * r  # which of these are not pruned: what a file holds

    def reset_parameters(self):
        nn.init.zeros_(self.lora_E)
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)

    @property
    def factors(self):
        """diag(E) A (r, d_in), B (d_out, r)"""
        return self.lora_A * self.lora_E, self.lora_B

    def delta(self, base):
        return self.scaling * self.lora_B @ (self.lora_E * self.lora_A)

    def update(self, base, x):
        return self.scaling * F.linear(
            F.linear(x, self.lora_E * self.lora_A), self.lora_B
        )

    def regularization_loss(self):
        grams = self.lora_A @ self.lora_A.T, self.lora_B.T @ self.lora_B
        identity = torch.eye(len(self.lora_E)).to(self.lora_E)
        return self.weight * sum(torch.linalg.norm(gram - identity) for gram in grams)

    def to_file(self):
        kept = torch.tensor(self.kept, dtype=torch.bool)
        return {
            "lora_A": self.lora_A[kept],
            "lora_B": self.lora_B[:, kept],
            "lora_E": self.lora_E[kept],
        }

    def pattern(self):
        """[is this triplet kept?] for all init_r"""
        kept = iter(self.kept)
        return [there and next(kept) for there in self.rows]

    def drop_pruned(self):
        """Free the memory of the pruned triplets, for good. Create a new optimizer
        afterwards."""
        trained = self.lora_E.requires_grad
        for name, tensor in self.to_file().items():
            setattr(
                self, name, nn.Parameter(tensor.detach().clone(), requires_grad=trained)
            )
        self.rows, self.kept = self.pattern(), [True] * len(self.lora_E)


class RankAllocator:
    """Prunes triplets while an AdaLoRA trains. Used like a scheduler: call `step` after
    optimizer.step() and before zero_grad(), for it reads the gradients."""

    def __init__(self, model, adapter_name="default"):
        self.config = model.peft_config[adapter_name]
        if not isinstance(self.config, AdaLoraConfig):
            raise ConfigError(
                f"{adapter_name!r} is not an AdaLoRA: {type(self.config).__name__}"
            )
        self.adapters = {
            path: part
            for path, part in model._adapters_by_path(adapter_name).items()
            if isinstance(part, AdaLora)
        }
        self.sensitivity = {
            p: torch.zeros_like(p)
            for a in self.adapters.values()
            for p in a.parameters()
        }
        self.uncertainty = {p: torch.zeros_like(p) for p in self.sensitivity}
        self.steps = 0  # done so far

    def budget(self, step):
        """The number of triplets that all layers together may keep after `step`
        steps."""
        config = self.config
        first = sum(len(adapter.lora_E) for adapter in self.adapters.values())
        last = config.target_r * len(self.adapters)
        steps = config.total_step - config.tfinal - config.tinit
        rest = min(max(1 - (step - config.tinit) / steps, 0), 1)
        return int((first - last) * rest**3 + last)

    @torch.no_grad()
    def step(self):
        self.steps += 1
        config, step = self.config, self.steps
        end = config.total_step - config.tfinal
        if step < end:
            self.smooth()
        if config.tinit < step <= end and (step % config.deltaT == 0 or step == end):
            self.allocate(self.budget(step))
        elif step > end:  # the choice is final
            self.mask()

    def smooth(self):
        """Update sensitivity and uncertainty from the gradients."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for p in self.sensitivity:
            now = (p * (0 if p.grad is None else p.grad)).abs()
            self.sensitivity[p].lerp_(now, 1 - beta1)
            self.uncertainty[p].lerp_((now - self.sensitivity[p]).abs(), 1 - beta2)

    def importance(self):
        """{path: the importance of each triplet (r,)}"""

        def score(p):
            return self.sensitivity[p] * self.uncertainty[p]

        return {
            path: (
                score(a.lora_E)[:, 0]
                + score(a.lora_A).mean(1)
                + score(a.lora_B).mean(0)
            )
            for path, a in self.adapters.items()
        }

    @torch.no_grad()
    def allocate(self, budget):
        """Prune all but the `budget` most important triplets of all layers."""
        scores = self.importance()
        worst = torch.cat(list(scores.values())).sort().values[:-budget]
        for path, adapter in self.adapters.items():
            adapter.kept = (
                (scores[path] > worst[-1]).tolist()
                if len(worst)
                else [True] * len(adapter.lora_E)
            )
        self.config.rank_pattern = {
            f"{path}.lora_E": a.pattern() for path, a in self.adapters.items()
        }
        self.mask()

    @torch.no_grad()
    def mask(self):
        for adapter in self.adapters.values():
            adapter.lora_E[~torch.tensor(adapter.kept)] = 0
