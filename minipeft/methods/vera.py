"""VeRA: all layers share one pair of random, frozen matrices. Only two vectors a layer
are trained.

    y = W x + b * (B (d * (A x)))        (equation 2)

    A (r, d_in) and B (d_out, r) drawn once    d (r)    b (d_out)

Kopiczko, Blankevoort and Asano 2023, "VeRA: Vector-based Random Matrix Adaptation",
arXiv 2310.11454.

A and B have the sizes of the largest layer; the others use their first columns and
rows. b starts at zero, so training starts from the model as it was. A file holds A and
B, or (save_projection=False) only the seed that they are drawn with.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import kernels, weights
from ..config import ConfigError, LayerConfig
from ..peft_tables import VERA_TARGETS
from ..slot import LinearDelta
from .scaling import check_rank


class Vera(LinearDelta):
    """x (..., d_in) -> (..., d_out)"""

    kernel = kernels.vera

    def __init__(self, d_in, d_out, config):
        super().__init__()
        self.vera_lambda_b = nn.Parameter(torch.zeros(d_out))
        self.vera_lambda_d = nn.Parameter(torch.full((config.r,), config.d_initial))
        self.d_in = d_in
        self.d_out = d_out
        self.dropout = config.vera_dropout

    def reset_parameters(self, config):
        if not config.init_weights:
            nn.init.ones_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d)

    def projections(self, base):
        """A (r, d_in), B (d_out, r), in the precision of b and d"""
        A, B = base.shared.vera_A[:, : self.d_in], base.shared.vera_B[: self.d_out]
        return A.to(self.vera_lambda_d.dtype), B.to(self.vera_lambda_d.dtype)

    def delta(self, base):
        A, B = self.projections(base)
        return (self.vera_lambda_b[:, None] * B * self.vera_lambda_d) @ A

    def update(self, base, x):
        A, B = self.projections(base)
        h = self.vera_lambda_d * F.linear(x, A)  # (..., r)
        return self.vera_lambda_b * F.linear(h, B)


class Projection(nn.Module):
    """A and B, which all layers share and none trains."""

    def __init__(self, d_in, d_out, config):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        shapes = {"vera_A": (config.r, d_in), "vera_B": (d_out, config.r)}
        for name, shape in shapes.items():
            bound = sqrt(6 / shape[1])  # uniform numbers with variance 2 / columns
            drawn = torch.empty(shape, device="cpu").uniform_(
                -bound, bound, generator=generator
            )
            self.register_buffer(name, drawn, persistent=config.save_projection)


@dataclass(kw_only=True)
class VeraConfig(LayerConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "VERA"
    default_targets: ClassVar[dict] = VERA_TARGETS
    r: int = 256
    projection_prng_key: int = 0  # the seed of A and B
    # False: small files, but random numbers may differ between versions
    save_projection: bool = True
    vera_dropout: float = 0.0  # on A's input, in training
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True  # False: b is ones and d random
    # for PEFT; here the layer's class says how its weight is stored
    fan_in_fan_out: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("r")
        self.check_probability("vera_dropout")
        if self.bias != "none":
            raise ConfigError(
                f"bias={self.bias!r} is not supported; BitFitConfig trains biases"
            )

    def create_shared(self, bases):
        for base in bases.values():
            check_rank(self.r, base.module)
        sizes = [weights.linear_features(base.module) for base in bases.values()]
        return Projection(*map(max, zip(*sizes)), self)

    def create(self, base, path):
        adapter = Vera(*weights.linear_features(base.module), self)
        adapter.reset_parameters(self)
        return adapter
