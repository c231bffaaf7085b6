"""BitFit: train the biases, and nothing else.

    y = W x + b + delta        delta (d_out,) starts at zero

Ben Zaken, Ravfogel, Goldberg 2021, "BitFit: Simple Parameter-efficient Fine-tuning for
Transformer-based Masked Language-models", arXiv 2106.10199.

The adapter holds the change of a bias rather than the bias: a change can be removed,
stacked on another and merged. A bias moves every token's output by the same vector,
whichever the token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .. import targets, weights
from ..config import LayerConfig
from ..errors import TargetError
from ..slot import Adapter


class BitFit(Adapter):
    """x (..., d_in) -> (..., d_out), for a module that ends by adding a bias to the
    last dimension: a linear layer, a LayerNorm."""

    def __init__(self, d_out, mergeable=True):
        super().__init__()
        self.bias_delta = nn.Parameter(torch.zeros(d_out))
        self.mergeable = mergeable  # into a bias that exists

    def forward(self, base, x):
        y = base(x)
        return (y + self.bias_delta).to(y.dtype)

    def fold(self, base):
        base.bias = base.bias + self.bias_delta


@dataclass(kw_only=True)
class BitFitConfig(LayerConfig):
    """Not in Hugging Face PEFT. target_modules=None: every linear layer and LayerNorm
    with a bias. Those of convolutions and batch norms, one a channel, stay frozen.

    add_bias: modules without a bias may be named too, and get one that starts at zero;
    all linear layers, if none are named. Such a bias cannot be merged, for the plain
    model has no bias to add it to.
    """

    peft_type: ClassVar[str] = "BITFIT"
    add_bias: bool = False

    def usual_targets(self, model, modules):
        found = targets.paths_of(modules, ends_with_bias)
        read = targets.only_read(modules)
        found = [path for path in found if path not in read]
        if not found and not self.add_bias:
            raise TargetError(
                "this model has no biases to train: Llama-like models have none."
                " With add_bias=True every linear layer gets one, which starts at"
                " zero"
            )
        return targets.shortest_names(modules, found) if found else "all-linear"

    def create(self, base, path):
        if not has_bias(base.module) and not self.add_bias:
            raise TargetError(
                f"this {type(base.module).__name__} has no bias; add_bias=True gives"
                " it one"
            )
        weights.check_forward(base.module)
        if has_bias(base.module) and not ends_with_bias(base.module):
            raise TargetError(
                f"this {type(base.module).__name__} does not end by adding its bias to"
                " the last dimension, as a linear layer or a LayerNorm does"
            )
        if has_bias(base.module):
            return BitFit(base.module.bias.numel())
        return BitFit(weights.linear_features(base.module)[1], mergeable=False)


def has_bias(module):
    return (
        isinstance(getattr(module, "bias", None), nn.Parameter)
        and module.bias.dim() == 1
    )


def ends_with_bias(module):
    """True for linear layers and norms that add a bias to the last dimension; others'
    are one a channel, or are added elsewhere."""
    by_channel = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    plain = weights.is_linear(module) or weights.is_norm(module)
    return has_bias(module) and plain and not by_channel
