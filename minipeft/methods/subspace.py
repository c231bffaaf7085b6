"""Intrinsic dimension: all D parameters of a model move, but only within a random
subspace of d dimensions.

    theta = theta_0 + P theta_d

    P (D, d) random and frozen    theta_d (d,) trained from zero

    theta_i = theta_0i + lambda_i (P theta_(d-m))_i

    structure-aware (SAID): one factor lambda_i for each of the m tensors

Li, Farkhoor, Liu, Yosinski 2018, "Measuring the Intrinsic Dimension of Objective
Landscapes", arXiv 1804.08838; Aghajanyan, Zettlemoyer, Gupta 2020, "Intrinsic
Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", arXiv
2012.13255. Not in Hugging Face PEFT.

It is a measuring instrument: how many numbers does this task need? P's columns have
length 1 and are (nearly) orthogonal, so the model moves as far as theta_d does. P comes
from a seed, and files hold d numbers.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..config import ConfigError, PeftConfig
from ..errors import TargetError
from ..slot import Adapter
from .base_params import frozen, param_locations, put_params, shifted_params, swapped_in
from .projections import PROJECTIONS, fingerprint


class Subspace(Adapter):
    """Around the whole model: each call runs it with theta_0 + P theta_d in place of
    its parameters."""

    mergeable = True

    def __init__(self, P, d, shapes, m=0):
        super().__init__()
        self.P = P
        self.shapes = shapes
        self.theta = nn.Parameter(torch.zeros(d - m))
        self.lambdas = nn.Parameter(torch.ones(m)) if m else None

    def shifts(self):  # P theta_d, in parts: lambda_i (P theta_d)_i of each parameter
        shifts = self.P(self.theta).split([shape.numel() for shape in self.shapes])
        if self.lambdas is None:
            return shifts
        return [factor * shift for factor, shift in zip(self.lambdas, shifts)]

    def forward(self, base, *args, **kwargs):
        with swapped_in(base.module, self.shifts()):
            return base(*args, **kwargs)

    generate = forward  # there base is the model's own generate

    def fold(self, base):
        put_params(frozen(shifted_params(base.module, self.shifts())))


@dataclass(kw_only=True)
class SubspaceConfig(PeftConfig):
    """Hugging Face PEFT has none of this."""

    peft_type: ClassVar[str] = "SUBSPACE"
    d: int = 256  # how many numbers are trained
    projection: str = "fastfood"  # or "dense", "hash"
    structure_aware: bool = False  # of the d numbers m are the lambdas
    seed: int = 0  # of P
    check: int | None = None  # noted in files: P made from the seed has to be this one

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("d")
        self.check_choice("projection", PROJECTIONS)

    def create(self, base, path):
        where = param_locations(base.module)
        parameters = [module._parameters[name] for (module, name), *_ in where]
        if any(not p.is_floating_point() for p in parameters):
            raise TargetError(
                "packed 4-bit weights cannot be moved by small steps: take the base in"
                " 16 or 32 bits"
            )
        shapes = [p.shape for p in parameters]
        sizes = [p.numel() for p in parameters]
        m = len(parameters) if self.structure_aware else 0
        if self.d > sum(sizes):
            raise ConfigError(
                f"d = {self.d:,}, but the model has only {sum(sizes):,} parameters"
            )
        if self.d <= m:
            raise ConfigError(
                f"d = {self.d}: structure_aware spends {m} numbers on {m} tensors, so d"
                " must be larger"
            )
        generator = torch.Generator().manual_seed(self.seed)
        P = PROJECTIONS[self.projection](sum(sizes), self.d - m, generator)
        if self.check not in (None, fingerprint(P, shapes)):
            raise ConfigError(
                f"seed {self.seed} gives another projection here than where this"
                " adapter was made: the model has other tensors, or PyTorch draws"
                " other random numbers"
            )
        return Subspace(P, self.d, shapes, m)

    def noted(self, adapters):
        (adapter,) = adapters
        check = fingerprint(adapter.P, adapter.shapes)
        return dataclasses.replace(self, check=check)
