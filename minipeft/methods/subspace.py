"""Intrinsic dimension: all D parameters of a model move, but only within a random
subspace of d dimensions.

    theta = theta_0 + P theta_d,                    P (D, d) random and frozen, theta_d
      (d) trained from zero
    theta_i = theta_0i + lambda_i (P theta_(d-m))_i     structure-aware (SAID): one
      factor for each of the m tensors

Li, Farkhoor, Liu, Yosinski 2018, "Measuring the Intrinsic Dimension of Objective
Landscapes", arXiv 1804.08838; Aghajanyan, Zettlemoyer, Gupta 2020, "Intrinsic
Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", 2012.13255. It
is a measuring instrument: how many numbers does this task need? P's columns have length
1 and are (nearly) orthogonal, so the model moves as far as theta_d does. P comes from a
seed, and files hold d numbers.
"""

import difflib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .. import targets
from ..config import ConfigError, PeftConfig
from ..errors import TargetError
from ..slot import Adapter
from .projections import PROJECTIONS, fingerprint


def places(model):
    """For each parameter of the bare model, once: all (module, name) where it stands.
    Tied ones stand in several."""
    found = {}
    for module in [
        model,
        *(targets.unwrap_slot(module) for _, _, _, module in targets.walk(model)),
    ]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return list(found.values())


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
        if self.projection not in PROJECTIONS:
            near = difflib.get_close_matches(str(self.projection), PROJECTIONS, n=1)
            raise ConfigError(
                f"unknown projection {self.projection!r}"
                + (f" (nearest: {near[0]!r})" if near else "")
                + f"; valid: {', '.join(map(repr, PROJECTIONS))}"
            )

    def create(self, base, path):
        shapes = [where[0][0]._parameters[where[0][1]] for where in places(base.module)]
        if any(not p.is_floating_point() for p in shapes):
            raise TargetError(
                "packed 4-bit weights cannot be moved by small steps: take the base in"
                " 16 or 32 bits"
            )
        sizes, m = (
            [p.numel() for p in shapes],
            (len(shapes) if self.structure_aware else 0),
        )
        if self.d > sum(sizes):
            raise ConfigError(
                f"d = {self.d:,}, but the model has only {sum(sizes):,} parameters"
            )
        if self.d <= m:
            raise ConfigError(
                f"d = {self.d}: structure_aware spends {m} numbers on {m} tensors, so d"
                " must be larger"
            )
        P = PROJECTIONS[self.projection](
            sum(sizes), self.d - m, torch.Generator().manual_seed(self.seed)
        )
        check = fingerprint(P, [p.shape for p in shapes])
        if self.check not in (None, check):
            raise ConfigError(
                f"seed {self.seed} gives another projection here than where this"
                " adapter was made: the model has other tensors, or PyTorch draws"
                " other random numbers"
            )
        self.check = check
        return Subspace(P, self.d, sizes, m)


class Subspace(Adapter):
    """Around the whole model: for each call, its parameters are those moved by P theta."""

    mergeable = True

    def __init__(self, P, d, sizes, m):
        super().__init__()
        self.P, self.sizes = P, sizes
        self.theta = nn.Parameter(torch.zeros(d - m))
        self.lambdas = nn.Parameter(torch.ones(m)) if m else None

    def moved(self, model):
        """[(where a parameter stands, its value)]"""
        steps, where = self.P(self.theta).split(self.sizes), places(model)
        if self.lambdas is not None:
            steps = [factor * step for factor, step in zip(self.lambdas, steps)]
        old = [module._parameters[name] for (module, name), *_ in where]
        return [
            (at, (p + step.view_as(p)).to(p.dtype))
            for at, p, step in zip(where, old, steps)
        ]

    @contextmanager
    def inside(self, model):
        """Within it the model's parameters are the moved ones."""
        if (
            self.training
            and torch.is_grad_enabled()
            and targets.uses_grad_checkpointing(model)
        ):
            raise ValueError(
                "gradient checkpointing runs layers again when the moved weights are"
                " gone: switch it off"
            )
        new = self.moved(model)
        old = [module._parameters[name] for ((module, name), *_), _ in new]
        try:
            for at, value in new:
                for module, name in at:
                    module._parameters[name] = value
            yield
        finally:
            for (at, _), value in zip(new, old):
                for module, name in at:
                    module._parameters[name] = value

    def forward(self, base, *args, **kwargs):
        with self.inside(base.module):
            return base(*args, **kwargs)

    generate = forward  # there base is the model's own generate

    def fold(self, base):
        for at, value in self.moved(base.module):
            parameter = nn.Parameter(value.detach(), requires_grad=False)
            for module, name in at:
                module._parameters[name] = parameter
