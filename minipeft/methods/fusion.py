"""AdapterFusion: attention over adapters that were trained before and stay frozen. At
each place, for each token:

    p = softmax_i((W_q y + b_q) . (W_k u_i + b_k)),    out = y + sum_i p_i W_v u_i

y is the layer's output without adapters (the query), u_i what expert i adds to it (key
and value). W_v starts as the identity, so that fusion starts near the experts' mean,
and a penalty 0.01 ||W_v - 1||^2 on the loss keeps it near. Pfeiffer et al. 2020,
"AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv
2005.00247. 3 d^2 + 2 d trained numbers at each place: more than the experts, and not
few.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .. import targets
from ..config import ConfigError, PeftConfig
from ..errors import TargetError
from ..slot import Adapter, AdapterNameError
from .bottleneck import width
from .modules_to_save import ModuleCopy


@dataclass(kw_only=True)
class FusionConfig(PeftConfig):
    """adapters: the names of the experts, which are on the model already, all at the
    same layers. There fusion goes.

    value=False: no W_v and no penalty, the "static" fusion of the library `adapters`;
    with it, its "dynamic" one.
    """

    peft_type: ClassVar[str] = "FUSION"
    regularized: ClassVar[bool] = True
    adapters: list[str]
    value: bool = True
    regularization: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if (
            isinstance(self.adapters, str)
            or len(self.adapters) < 2
            or len(set(self.adapters)) < len(self.adapters)
        ):
            raise ConfigError(
                f"adapters = {self.adapters!r}: a list of two or more adapters' names"
                " is expected"
            )
        self.adapters = list(self.adapters)

    def select(self, model):
        slots = {
            path: module
            for path, _, _, module in targets.walk(model)
            if getattr(module, "is_slot", False)
        }
        places = {
            name: {path for path, slot in slots.items() if name in slot.adapters}
            for name in self.adapters
        }
        unknown = [name for name in self.adapters if not places[name]]
        if unknown:
            there = sorted({name for slot in slots.values() for name in slot.adapters})
            raise AdapterNameError(
                "fusion needs its experts on the model's layers first. There is no"
                f" {unknown}; there are: {', '.join(there) or 'none'}"
            )
        first, *others = self.adapters
        for name in others:
            if places[name] != places[first]:
                odd = sorted(places[name] ^ places[first])
                raise TargetError(
                    f"{first!r} and {name!r} stand at different layers: only one of"
                    f" them is at {odd[0]}"
                )
        for path in places[first]:
            if any(
                isinstance(slots[path].adapters[name], ModuleCopy)
                for name in self.adapters
            ):
                raise TargetError(
                    f"{path}: each expert has a copy of its own (modules_to_save):"
                    " these cannot mix"
                )
        return [path for path in slots if path in places[first]]

    def create(self, base, path):
        return Fusion(
            width(base.module)[1], self.adapters, self.value, self.regularization
        )


class Fusion(Adapter):
    """(B, T, d) -> (B, T, d). The experts are peers on the same slot, not children:
    neither trained nor saved again."""

    def __init__(self, d, experts, value=True, regularization=0.01):
        super().__init__()
        self.query, self.key = nn.Linear(d, d), nn.Linear(d, d)
        self.value = nn.Linear(d, d, bias=False) if value else None
        self.softmax = nn.Softmax(-1)  # a module, so that a hook can read the attention
        self.experts, self.regularization = experts, regularization
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if value:
            nn.init.constant_(self.value.weight, 1e-6)
            self.value.weight.data.fill_diagonal_(1.0)

    def forward(self, base, *args, **kwargs):
        output = base(*args, **kwargs)
        y, *rest = output if isinstance(output, tuple) else [output]
        z = [
            base.peer(name)(lambda *a, **k: y, *args, **kwargs) for name in self.experts
        ]
        # (B, T, N, d)
        u = torch.stack([z_i - y for z_i in z], -2).to(self.query.weight.dtype)
        # (B, T, N, 1), not scaled
        scores = self.key(u) @ self.query(y.to(u.dtype)).unsqueeze(-1)
        p = self.softmax(scores.squeeze(-1))  # (B, T, N)
        u = u if self.value is None else self.value(u)
        y = (y + (p.unsqueeze(-2) @ u).squeeze(-2)).to(y.dtype)
        return (y, *rest) if isinstance(output, tuple) else y

    def regularization_loss(self):
        """What is added to the loss: regularization ||W_v - 1||^2."""
        if self.value is None:
            return 0.0
        weight = self.value.weight
        return (
            self.regularization
            * (weight - torch.eye(len(weight)).to(weight)).square().sum()
        )


@contextmanager
def attention(model, name):
    """Within it, what fusion `name` of a PeftModel looks at is noted: {path: [p (B, T,
    N), one for each call]}."""
    seen, hooks = {}, []
    for path, part in model._adapters_by_path(name).items():
        seen[path] = []
        hooks.append(
            part.softmax.register_forward_hook(
                lambda m, args, p, path=path: seen[path].append(p.detach())
            )
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
