"""AdapterFusion: attention over adapters that are trained already and stay frozen. At
each layer, for each token:

    p_i = softmax_i((W_q y + b_q) . (W_k u_i + b_k))        out = y + sum_i p_i W_v u_i

    y (d,) the layer's output without adapters: the query
    u_i (d,) what expert i adds to it: key and value

Pfeiffer et al. 2020, "AdapterFusion: Non-Destructive Task Composition for Transfer
Learning", arXiv 2005.00247. Not in Hugging Face PEFT.

W_v starts as the identity, so fusion starts near the experts' mean, and a
regularization 0.01 ||W_v - 1||^2 of the loss keeps it near. It trains 3 d^2 + 2 d
numbers a layer: more than the experts, and not few.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from ..config import ConfigError, PeftConfig
from ..errors import TargetError
from ..slot import Adapter, AdapterNameError, Base, find_slots
from .blocks import hidden_states, in_out_features, with_hidden_states
from .bottleneck import ParallelToBlock
from .modules_to_save import ModuleCopy


class Fusion(Adapter):
    """(B, T, d) -> (B, T, d). The experts are peers on the same slot, not children:
    they are neither trained nor saved with it."""

    def __init__(self, d, experts, value=True):
        super().__init__()
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d, bias=False) if value else None
        self.softmax = nn.Softmax(-1)  # a module, so that a hook can read the attention
        self.experts = experts

    def forward(self, base, *args, **kwargs):
        output, z = run_experts(base, self.experts, args, kwargs)
        y = hidden_states(output)  # (B, T, d)
        u = self.adapter_input(torch.stack([z_i - y for z_i in z], -2))  # (B, T, N, d)
        query = self.query(self.adapter_input(y)).unsqueeze(-1)  # (B, T, d, 1)
        scores = self.key(u) @ query  # (B, T, N, 1), not scaled
        p = self.softmax(scores.squeeze(-1))  # (B, T, N)
        u = u if self.value is None else self.value(u)
        y = (y + (p.unsqueeze(-2) @ u).squeeze(-2)).to(y.dtype)
        return with_hidden_states(output, y)

    def regularization_loss(self):
        """||W_v - 1||^2"""
        W = self.value.weight
        return (W - torch.eye(len(W)).to(W)).square().sum()


def run_experts(base, names, args, kwargs):
    """(the output without adapters, [the output with each expert alone])"""
    output = base(*args, **kwargs)

    def layer(*own, **more):  # the output is known, unless the expert changes the input
        if all(one is other for one, other in zip(own, args)):
            return hidden_states(output)
        return hidden_states(base(*own, **more))

    return output, [
        base.peer(name)(Base(base.slot, name, layer), *args, **kwargs) for name in names
    ]


@contextmanager
def attention(model, name):
    """Within it, records the attention of fusion `name` of a PeftModel: {path: [p (B,
    T, N) of each call]}."""
    recorded = {path: [] for path in model._adapters_by_path(name)}

    def record(path, module, args, p):
        recorded[path].append(p.detach())

    hooks = [
        fusion.softmax.register_forward_hook(partial(record, path))
        for path, fusion in model._adapters_by_path(name).items()
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


# experts that cannot be mixed, and why
CANNOT_MIX = {
    ParallelToBlock: "an expert reads the stream within the block, which a fusion"
    " cannot give it; expected reads='sublayer', or pfeiffer",
    ModuleCopy: "each expert has a copy of its own (modules_to_save): these cannot mix",
}


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
        different = len(set(self.adapters)) == len(self.adapters) >= 2
        if isinstance(self.adapters, str) or not different:
            raise ConfigError(
                f"adapters = {self.adapters!r}: expected a list of two or more"
                " adapters' names"
            )
        self.adapters = list(self.adapters)

    def needed_adapters(self):
        return self.adapters

    def select(self, model):
        slots = find_slots(model)
        places = {
            name: [path for path, slot in slots.items() if name in slot.adapters]
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
            if odd := set(places[name]) ^ set(places[first]):
                raise TargetError(
                    f"{first!r} and {name!r} stand at different layers: only one of"
                    f" them is at {min(odd)}"
                )
        for path in places[first]:
            for name in self.adapters:
                for kind, problem in CANNOT_MIX.items():
                    if isinstance(slots[path].adapters[name], kind):
                        raise TargetError(f"{path}: {problem}")
        return places[first]

    def create(self, base, path):
        adapter = Fusion(in_out_features(base.module)[1], self.adapters, self.value)
        for linear in (adapter.query, adapter.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.value:
            nn.init.constant_(adapter.value.weight, 1e-6)
            adapter.value.weight.data.fill_diagonal_(1.0)
        return adapter

    def regularization_loss(self, adapters):
        if not self.value:
            return 0
        return self.regularization * sum(a.regularization_loss() for a in adapters)
