"""IA3: rescale what is there. One number for each channel of the keys, the values and
the feed-forward's middle.

    k = l_k * (W_k x)    v = l_v * (W_v x)    FFN(x) = W_2 (l_ff * act(W_1 x))

    all l start at one

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", arXiv 2205.05638. The name: Infused Adapter by Inhibiting and
Amplifying Inner Activations.

A channel can be amplified or silenced, but none is mixed with another: the layer can
express only what it could express before.
"""

import re
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .. import targets, weights
from ..config import LayerConfig, known_kind
from ..errors import TargetError
from ..peft_tables import IA3_FEEDFORWARD, IA3_TARGETS
from ..slot import Adapter


class IA3(Adapter):
    """x (..., d_in) -> (..., d_out). l (d_out, 1) scales the rows of a weight
    (d_out, d_in), that is the output; l (1, d_in) scales its columns, that is the
    input."""

    mergeable = True

    def __init__(self, shape, ones=True):
        super().__init__()
        self.ia3_l = nn.Parameter(torch.randn(shape))
        if ones:
            nn.init.ones_(self.ia3_l)
        self.feedforward = shape[0] == 1

    def forward(self, base, x):
        scale = self.ia3_l.flatten()
        if self.feedforward:
            return base((x * scale).to(x.dtype))
        y = base(x)
        return (y * scale).to(y.dtype)

    def fold(self, base):
        base.weight = base.weight * self.ia3_l
        if base.bias is not None and not self.feedforward:
            base.bias = base.bias * self.ia3_l.flatten()


@dataclass(kw_only=True)
class IA3Config(LayerConfig):
    """Hugging Face PEFT's fields and defaults.

    feedforward_modules: those targets whose input is scaled, as the paper does in W_2;
    the others have their output scaled. A list of names, or one regular expression for
    whole paths.
    """

    peft_type: ClassVar[str] = "IA3"
    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True  # False: random, for tests
    # for PEFT; here the layer's class says how its weight is stored
    fan_in_fan_out: bool = False
    default_targets: ClassVar[dict] = IA3_TARGETS

    def resolve(self, model):
        config = super().resolve(model)
        if config.feedforward_modules is None:
            modules = targets.modules_by_path(model)
            kind = known_kind(IA3_TARGETS, model, modules)
            if kind is None:
                raise TargetError(
                    "say feedforward_modules: those of target_modules whose input is"
                    " scaled; [] for none"
                )
            with warnings.catch_warnings(action="ignore"):  # `select` runs again
                found = LayerConfig.select(config, model)
            config.feedforward_modules = [
                name
                for name in IA3_FEEDFORWARD[kind]
                if targets.is_found(name, found, targets.ends_with)
            ]
        return config

    def select(self, model):
        found = super().select(model)
        if self.feedforward_modules and not self.from_checkpoint:
            targets.resolve_targets(
                found,
                self.feedforward_modules,
                "feedforward_modules, among the targets,",
                targets.ends_with,
            )
        return found

    def create(self, base, path):
        if isinstance(base.module, nn.Embedding):
            raise TargetError("IA3 rescales linear layers, not embeddings")
        d_in, d_out = weights.linear_features(base.module)
        names = self.feedforward_modules
        feedforward = (
            re.fullmatch(names, path)
            if isinstance(names, str)
            else any(targets.ends_with(n, path) for n in names)
        )
        return IA3((1, d_in) if feedforward else (d_out, 1), self.init_ia3_weights)
