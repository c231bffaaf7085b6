"""VeRA: all layers share one pair of random, frozen matrices. Only two vectors a layer
are trained.

    y = W x + b * (B (d * (A x))),    A (r, d_in) and B (d_out, r) drawn once, d (r), b
      (d_out)

Kopiczko, Blankevoort and Asano 2023, "VeRA: Vector-based Random Matrix Adaptation",
arXiv 2310.11454 (equation 2). A and B have the sizes of the largest layer; the others
use their first columns and rows. b starts at zero, so that training starts from the
model as it was. A file holds A and B, or (save_projection=False) only the seed that
they were drawn with.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import weights
from ..config import ConfigError, LayerConfig
from ..peft_tables import VERA_TARGETS
from ..slot import LinearDelta


@dataclass(kw_only=True)
class VeraConfig(LayerConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "VERA"
    default_targets: ClassVar[dict] = VERA_TARGETS
    r: int = 256
    projection_prng_key: int = 0  # the seed of A and B
    # False: small files, but random numbers may differ between versions
    save_projection: bool = True
    vera_dropout: float = 0.0  # on what A reads, in training
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
        sizes = [weights.linear_features(base.module) for base in bases.values()]
        return Projection(*map(max, zip(*sizes)), self)

    def create(self, base, path):
        return Vera(*weights.linear_features(base.module), self)


class Projection(nn.Module):
    """A and B, which all layers read and none trains."""

    def __init__(self, d_in, d_out, config):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name, shape in (
            ("vera_A", (config.r, d_in)),
            ("vera_B", (d_out, config.r)),
        ):
            # a uniform number within it has variance 2 / columns
            bound = sqrt(6 / shape[1])
            drawn = torch.empty(shape, device="cpu").uniform_(
                -bound, bound, generator=generator
            )
            self.register_buffer(name, drawn, persistent=config.save_projection)


class Joined(torch.autograd.Function):
    """x (W + b * B d A)^T + bias in one product. The backward pass makes what b and d
    need of it, b's and d's gradient in B d A as M (d_out, r), in the cheaper order;
    autograd would make the gradient of all of W first."""

    @staticmethod
    def forward(ctx, x, W, bias, b, B, d, A):
        weight = torch.addmm(W, b[:, None] * B * d, A)  # (d_out, d_in)
        ctx.save_for_backward(x, weight, b, B, d, A)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, b, B, d, A = ctx.saved_tensors
        rows = grad.reshape(-1, len(B))  # (N, d_out)
        M = B * torch.linalg.multi_dot((rows.T, x.reshape(len(rows), -1), A.T))
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            None,
            None,
            M @ d,
            None,
            b @ M,
            None,
        )


class Vera(LinearDelta):
    """x (..., d_in) -> (..., d_out)"""

    def __init__(self, d_in, d_out, config):
        super().__init__()
        self.vera_lambda_b = nn.Parameter(
            torch.zeros(d_out) if config.init_weights else torch.ones(d_out)
        )
        self.vera_lambda_d = nn.Parameter(
            torch.full((config.r,), config.d_initial)
            if config.init_weights
            else torch.randn(config.r)
        )
        self.d_in, self.d_out, self.dropout = d_in, d_out, config.vera_dropout

    def projections(self, base):
        """A (r, d_in), B (d_out, r)"""
        return base.shared.vera_A[:, : self.d_in], base.shared.vera_B[: self.d_out]

    def delta(self, base):
        A, B = self.projections(base)
        return (self.vera_lambda_b[:, None] * B * self.vera_lambda_d) @ A

    def forward(self, base, x):
        (A, B), r, N = (
            self.projections(base),
            len(self.vera_lambda_d),
            x.numel() // self.d_in,
        )
        # multiplications
        joined, apart = (
            (N + 2 * r) * self.d_in * self.d_out,
            2 * N * r * (self.d_in + self.d_out),
        )
        if joined < apart and self.joins(base, x):
            return Joined.apply(
                x, base.weight, base.bias, self.vera_lambda_b, B, self.vera_lambda_d, A
            )
        y = base(x)
        h = F.linear(self.seen(x, self.vera_lambda_d.dtype), A)  # (..., r)
        return torch.addcmul(
            y, self.vera_lambda_b, F.linear(self.vera_lambda_d * h, B)
        ).to(y.dtype)
