"""LoRA: the change of a weight has low rank, so train it as a product of two thin
matrices.

    y = W x + s B A x,    A (r, d_in),  B (d_out, r),  s = alpha / r
      (equation 3)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
W is frozen. B starts at zero, so that training starts from the model as it was. A
starts random: with both at zero neither would ever get a gradient. rsLoRA
(Kalajdzievski 2023, 2312.03732): s = alpha / sqrt(r), so that a higher rank does not
make for a smaller change.
"""

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import targets, weights
from ..config import ConfigError, LayerConfig
from ..errors import TargetError
from ..slot import LinearDelta

# init_lora_weights="name", or "name_4" for "name_[number]": a function (adapter, base,
# config)
INITS = {}
# a field of LoraConfig, such as "use_dora": the class of adapter that is made where the
# field is set
VARIANTS = {}


@dataclass(kw_only=True)
class LoraConfig(LayerConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "LORA"
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0  # on what A reads, in training
    bias: str = "none"  # the base's biases stay frozen; to train them, see BitFitConfig
    use_rslora: bool = False  # s = alpha / sqrt(r)
    use_dora: bool = False
    lora_bias: bool = False  # a trained bias on B
    # True: A as nn.Linear does, B zero; "gaussian"; False: both random
    init_lora_weights: bool | str = True
    # for "loftq": {"loftq_bits": 4, "loftq_iter": 1}
    loftq_config: dict = field(default_factory=dict)
    # {expression for the end of a path: r for such layers}
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # likewise
    # for PEFT; here the layer's class says how its weight is stored
    fan_in_fan_out: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("r", **self.rank_pattern)
        self.check_probability("lora_dropout")
        if self.bias != "none":
            raise ConfigError(
                f"bias={self.bias!r} is not supported; BitFitConfig trains biases,"
                " lora_bias adds some"
            )
        if isinstance(self.init_lora_weights, str):
            initialiser(self.init_lora_weights)
        if self.use_dora and self.lora_bias:
            raise ConfigError(
                "use_dora has no lora_bias: it has no B of its own that a bias could go"
                " with"
            )

    def on_load(self):
        if "niter" in str(self.init_lora_weights):
            raise ConfigError(
                f"{self.init_lora_weights} draws random numbers: the base that this"
                " adapter fits cannot be made again. If you saved that base, and it is"
                ' the model given, write "init_lora_weights": true into the file. Or'
                " save the adapter as a plain LoRA"
            )

    def create(self, base, path):
        r = targets.match_pattern(self.rank_pattern, path, self.r)
        alpha = targets.match_pattern(self.alpha_pattern, path, self.lora_alpha)
        variant = next((name for name in VARIANTS if getattr(self, name)), None)
        embedding = isinstance(base.module, nn.Embedding)
        if embedding and (variant or self.lora_bias):
            raise TargetError(
                f"{variant or 'lora_bias'} is for linear layers, not for embeddings"
            )
        kind = LoraEmbedding if embedding else VARIANTS.get(variant, Lora)
        adapter = kind(
            *weights.features(base.module),
            r,
            alpha / (math.sqrt(r) if self.use_rslora else r),
            dropout=self.lora_dropout,
            bias=self.lora_bias,
        )
        adapter.reset(base, self)
        return adapter


def gaussian(adapter, base, config):
    nn.init.normal_(adapter.lora_A.weight, std=1 / adapter.lora_A.out_features)
    nn.init.zeros_(adapter.lora_B.weight)


INITS["gaussian"] = gaussian


def initialiser(name):
    known = re.sub(r"_\d+$", "_[number]", name)
    if known not in INITS:
        near = difflib.get_close_matches(name, INITS, n=1)
        raise ConfigError(
            f"unknown init_lora_weights {name!r}"
            + (f" (nearest: {near[0]!r})" if near else "")
            + f"; valid: True, False, {', '.join(map(repr, INITS))}"
        )
    return INITS[known]


class Lora(LinearDelta):
    """x (..., d_in) -> (..., d_out)"""

    def __init__(self, d_in, d_out, r, scaling, dropout=0.0, bias=False):
        super().__init__()
        self.lora_A = nn.Linear(d_in, r, bias=False)  # weight (r, d_in)
        self.lora_B = nn.Linear(r, d_out, bias=bias)  # weight (d_out, r)
        self.scaling, self.dropout = scaling, dropout

    @property
    def factors(self):
        return self.lora_A.weight, self.lora_B.weight

    def reset(self, base, config):
        if config.init_lora_weights is True:
            # uniform within 1 / sqrt(d_in)
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B.weight)
        elif config.init_lora_weights:
            initialiser(config.init_lora_weights)(self, base, config)
        if config.init_lora_weights and self.lora_B.bias is not None:
            nn.init.zeros_(self.lora_B.bias)

    def delta(self, base):
        # (d_out, d_in): formed for merging only
        return self.scaling * self.lora_B.weight @ self.lora_A.weight

    def forward(self, base, x):
        A = self.lora_A.weight
        h = F.linear(self.seen(x, A.dtype), A)  # (..., r)
        return self.plus(base(x), h, self.lora_B.weight, self.lora_B.bias)

    def fold(self, base):
        if self.lora_B.bias is not None:
            base.bias = (
                0 if base.bias is None else base.bias
            ) + self.scaling * self.lora_B.bias
        super().fold(base)


class LoraEmbedding(LinearDelta):
    """x (...) token ids -> (..., d). An embedding is a linear map of one-hot vectors: A
    times one picks a column."""

    def __init__(self, d_in, d_out, r, scaling, dropout=0.0, bias=False):
        super().__init__()
        self.lora_embedding_A = nn.Parameter(torch.randn(r, d_in))  # (r, vocabulary)
        self.lora_embedding_B = nn.Parameter(torch.randn(d_out, r))  # (d, r)
        self.scaling = scaling

    @property
    def factors(self):
        return self.lora_embedding_A, self.lora_embedding_B

    def reset(self, base, config):
        if config.init_lora_weights:
            # here A is the one that starts at zero
            nn.init.zeros_(self.lora_embedding_A)
            nn.init.normal_(self.lora_embedding_B)

    def delta(self, base):
        return self.scaling * self.lora_embedding_B @ self.lora_embedding_A

    def update(self, base, x):
        # (..., r)
        h = (
            F.embedding(x, self.lora_embedding_A.T, base.module.padding_idx)
            * self.scaling
        )
        return F.linear(h, self.lora_embedding_B)
