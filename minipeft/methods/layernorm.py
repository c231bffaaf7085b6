"""LayerNorm tuning: train the norms' gains and biases, and nothing else.

    LN(x) = g * (x - mean) / sd + b    RMSNorm(x) = g * x / rms

    g and b are trained, from where they were

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM
Finetuning", arXiv 2312.11420. BitFit's sibling: the other vectors of a transformer. Of
all methods it trains the fewest numbers.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

from .. import targets, weights
from ..config import LayerConfig, known_kind
from ..errors import TargetError
from ..peft_tables import LN_TUNING_TARGETS
from ..slot import Adapter
from .modules_to_save import copy_into


class LNTuning(Adapter):
    """x (..., d) -> (..., d): a trained copy of a norm, computed in the copy's
    precision. It never calls its base: of two that are active only the last counts."""

    mergeable = True
    replaces_base = True

    def __init__(self, norm):
        super().__init__()
        self.ln_tuning_layers = copy.deepcopy(norm)

    def forward(self, base, x):
        y = self.ln_tuning_layers(x.to(self.ln_tuning_layers.weight.dtype))
        return y.to(x.dtype)

    def fold(self, base):
        copy_into(base.module, self.ln_tuning_layers)


@dataclass(kw_only=True)
class LNTuningConfig(LayerConfig):
    """Hugging Face PEFT's fields. target_modules=None: PEFT's default for this kind of
    model; where it has none, every norm, found by its one-dimensional weight."""

    peft_type: ClassVar[str] = "LN_TUNING"
    default_targets: ClassVar[dict] = LN_TUNING_TARGETS

    def usual_targets(self, model, modules):
        if known_kind(self.default_targets, model, modules):
            return super().usual_targets(model, modules)
        norms = targets.paths_of(modules, weights.is_norm)
        return targets.shortest_names(modules, norms)

    def create(self, base, path):
        if not weights.is_norm(base.module):
            raise TargetError(f"{type(base.module).__name__} is not a norm")
        return LNTuning(base.module)
