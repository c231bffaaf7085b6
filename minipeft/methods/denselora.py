"""DenseLoRA: layers of one kind share an encoder and a decoder. A layer's own part is
one small dense matrix.

    y = W x + s f(D M f(E x))

    E (r, d_in) and D (d_out, r) shared    M (r, r)    s = alpha / r    f = GELU

Mu et al. 2025, "DenseLoRA: Dense Low-Rank Adaptation of Large Language Models", arXiv
2505.23808. Written from the paper: its published code, as released, adds nothing to the
base.

Layers are of one kind if they have the same last name and the same shape: all q_proj,
all down_proj. D starts at zero; GELU has slope 1/2 there, so D gets a gradient at once,
and the others as soon as D has moved. With f it does not modify a weight, and cannot be
merged. Without (activation="linear") it is W' = W + s D M E, a LoRA whose outer factors
are shared.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import weights
from ..config import LayerConfig
from ..slot import LinearDelta
from .scaling import check_alpha, check_rank


class DenseLora(LinearDelta):
    """x (..., d_in) -> (..., d_out)"""

    def __init__(self, kind, config):
        super().__init__()
        self.lora_M = nn.Parameter(torch.empty(config.r, config.r))
        self.kind = kind
        self.scaling = config.lora_alpha / config.r
        self.dropout = config.lora_dropout
        self.mergeable = config.activation == "linear"
        self.activation = nn.Identity() if self.mergeable else F.gelu

    def factors(self, base):
        """E (r, d_in), D (d_out, r), in M's precision"""
        shared, dtype = base.shared[self.kind], self.lora_M.dtype
        return shared.encoder.to(dtype), shared.decoder.to(dtype)

    def delta(self, base):
        E, D = self.factors(base)
        return self.scaling * D @ self.lora_M @ E

    def update(self, base, x):
        E, D = self.factors(base)
        h = F.linear(self.activation(F.linear(x, E)), self.lora_M)  # (..., r)
        return self.scaling * self.activation(F.linear(h, D))


class SharedFactors(nn.Module):
    """E and D of all layers of one kind."""

    def __init__(self, d_in, d_out, config):
        super().__init__()
        self.encoder = nn.Parameter(torch.empty(config.r, d_in))
        self.decoder = nn.Parameter(torch.empty(d_out, config.r))
        for factor in (self.encoder, self.decoder):
            nn.init.kaiming_uniform_(factor, a=sqrt(5))  # within 1 / sqrt(columns)
        if config.init_lora_weights:
            nn.init.zeros_(self.decoder)


def share_key(base, path):
    """(the name of a layer's kind, d_in, d_out)"""
    d_in, d_out = weights.linear_features(base.module)
    return f"{path.rpartition('.')[2]}_{d_in}x{d_out}", d_in, d_out


@dataclass(kw_only=True)
class DenseLoraConfig(LayerConfig):
    """Hugging Face PEFT does not have it. The fields are named as LoRA's."""

    peft_type: ClassVar[str] = "DENSELORA"
    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0  # on the encoder's input, in training
    activation: str = "gelu"  # "linear": none, so it can be merged
    init_lora_weights: bool = True  # False: D is random too

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("r")
        self.check_probability("lora_dropout")
        check_alpha(lora_alpha=self.lora_alpha)
        self.check_choice("activation", ("gelu", "linear"))

    def create_shared(self, bases):
        for base in bases.values():
            check_rank(self.r, base.module)
        kinds = [share_key(base, path) for path, base in bases.items()]
        return nn.ModuleDict({kind: SharedFactors(i, o, self) for kind, i, o in kinds})

    def create(self, base, path):
        adapter = DenseLora(share_key(base, path)[0], self)
        nn.init.kaiming_uniform_(adapter.lora_M, a=sqrt(5))
        return adapter
