"""LoRA's configuration. The equations: lora.py, dora.py; how A and B start:
lora_init.py."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from .. import targets, weights
from ..config import ConfigError, LayerConfig
from ..errors import TargetError
from . import lora_init
from .dora import Dora
from .lora import Lora, LoraEmbedding
from .scaling import check_alpha, check_rank


@dataclass(kw_only=True)
class LoraConfig(LayerConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "LORA"
    belongs_to: ClassVar[dict] = {"loftq_config": ("init_lora_weights", "loftq")}
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0  # on A's input, in training
    bias: str = "none"  # the base's biases stay frozen; BitFitConfig trains them
    use_rslora: bool = False  # s = alpha / sqrt(r)
    use_dora: bool = False
    lora_bias: bool = False  # a trained bias on B
    # True: A as in nn.Linear, B zero; False: both random; or a name in lora_init.INITS
    init_lora_weights: bool | str = True
    # for "loftq": {"loftq_bits": 4, "loftq_iter": 1}
    loftq_config: dict = field(default_factory=dict)
    # {regular expression for the end of a path: r of those layers}
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # likewise
    # for PEFT; here the layer's class says how its weight is stored
    fan_in_fan_out: bool = False
    # PEFT: tied embeddings share their adapters. Here: refused where they are tied
    ensure_weight_tying: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.check_ranks()
        self.check_probability("lora_dropout")
        check_alpha(lora_alpha=self.lora_alpha, **self.pattern("alpha_pattern"))
        if self.bias != "none":
            raise ConfigError(
                f"bias={self.bias!r} is not supported; BitFitConfig trains biases,"
                " lora_bias adds some"
            )
        if isinstance(self.init_lora_weights, str):
            lora_init.find(self.init_lora_weights)
        if self.use_dora and self.lora_bias:
            raise ConfigError("use_dora has no lora_bias: DoRA's B has no bias")

    def check_ranks(self):
        self.check_positive("r", **self.pattern("rank_pattern"))

    @classmethod
    def from_file_fields(cls, data):
        init = data.get("init_lora_weights")
        if init in ("eva", "orthogonal", "mica"):  # the base stays as it is
            data = data | {"init_lora_weights": True}
        elif init in ("corda", "lora_ga"):
            raise ConfigError(
                f"init_lora_weights = {init!r} changed the base, and is not built here:"
                " save the adapter as a plain LoRA with PEFT's"
                " path_initial_model_for_weight_conversion; or, for the changed base"
                ' itself, write "init_lora_weights": true into the file'
            )
        return super().from_file_fields(data)

    def select(self, model):
        found = super().select(model)
        if self.ensure_weight_tying:
            check_untied(model, found, self.modules_to_save or ())
        return found

    def on_load(self):
        if "niter" in str(self.init_lora_weights):
            raise ConfigError(
                f"{self.init_lora_weights} draws random numbers: the base that this"
                " adapter fits cannot be made again. If you saved that base, and it is"
                ' the model given, write "init_lora_weights": true into the file. Or'
                " save the adapter as a plain LoRA"
            )

    def create(self, base, path):
        weights.check_forward(base.module)
        r = targets.match_pattern(self.rank_pattern, path, self.r)
        check_rank(r, base.module, useful=False)
        alpha = targets.match_pattern(self.alpha_pattern, path, self.lora_alpha)
        scaling = alpha / (math.sqrt(r) if self.use_rslora else r)
        options = {"bias": True} if self.lora_bias else {}
        adapter = self.adapter_class(base.module)(
            *weights.features(base.module), r, scaling, self.lora_dropout, **options
        )
        adapter.reset_parameters(base, self)
        return adapter

    def adapter_class(self, layer):
        if not isinstance(layer, nn.Embedding):
            return Dora if self.use_dora else Lora
        for name in ("use_dora", "lora_bias"):
            if getattr(self, name):
                raise TargetError(f"{name} is for linear layers, not for embeddings")
        return LoraEmbedding


def check_untied(model, found, modules_to_save):
    """ConfigError where a module that is adapted or copied shares its weight."""
    modules = targets.modules_by_path(model)
    owners = Counter(
        id(p) for m in modules.values() for p in m._parameters.values() if p is not None
    )
    found = {*found, *targets.find_targets(modules, modules_to_save, targets.ends_with)}
    for path in found:
        if any(owners[id(p)] > 1 for p in modules[path].parameters(recurse=False)):
            raise ConfigError(
                f"ensure_weight_tying: {path} shares its weight with another module,"
                " and adapters or copies of the two are not tied here"
            )


@dataclass(kw_only=True)
class DoraConfig(LoraConfig):
    """LoraConfig(use_dora=True), and saved as that. DoRA is in dora.py."""

    use_dora: bool = True
