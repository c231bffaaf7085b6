"""Bottleneck adapters: small networks of their own, put in beside the frozen ones.

    sequential    y = f(x) + s A(f(x))
                  "houlsby": after attention and feed-forward; "pfeiffer": after the
                  latter only
    parallel      y = f(x) + s A(x)        beside feed-forward, s = 4

    A(h) = W_up act(W_down h + b_down) + b_up    W_down (r, d)    W_up (d, r)

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751;
Pfeiffer et al. 2020, arXiv 2005.00247; parallel: He et al. 2021, "Towards a Unified
View of Parameter-Efficient Transfer Learning", arXiv 2110.04366.

f is a part of a transformer's block, before its output is added to the residual stream.
With reads="stream" the adapter reads the stream itself, as in the library `adapters` on
models that normalise before each part (r: the stream; n: the norm before f):

    pfeiffer      y = r + f(n(r)) + s A(r + f(n(r)))        after the whole block
    parallel      y = r + f(n(r)) + s A(r)                  from before the norm

Because of the non-linearity A does not modify a weight, so it cannot be merged.
Defaults are those of the library `adapters`; Hugging Face PEFT does not have it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import targets, weights
from ..config import ConfigError, LayerConfig
from ..slot import Adapter
from .blocks import (
    find_blocks,
    find_sublayers,
    hidden_states,
    in_out_features,
    norm_before_feed_forward,
    recorded_input,
    with_hidden_states,
)

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leakyrelu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda h: h,
}


class Bottleneck(Adapter):
    """x (..., d) -> (..., d), beside its base or after it."""

    def __init__(self, d_in, r, d_out, parallel, non_linearity, scaling):
        super().__init__()
        self.adapter_down = nn.Linear(d_in, r)  # weight (r, d_in)
        self.adapter_up = nn.Linear(r, d_out)  # weight (d_out, r)
        self.parallel = parallel
        self.act = ACTIVATIONS[non_linearity]
        self.scaling = nn.Parameter(torch.ones(1)) if scaling == "learned" else scaling

    def reset_parameters(self, init):
        if init == "mam":  # nn.Linear's own: uniform within 1 / sqrt(d_in)
            nn.init.kaiming_uniform_(self.adapter_down.weight, a=5**0.5)
        else:
            nn.init.normal_(self.adapter_down.weight, std=0.02)
        nn.init.normal_(self.adapter_up.weight, std=0.02 if init == "bert" else 0.0)
        nn.init.zeros_(self.adapter_down.bias)
        nn.init.zeros_(self.adapter_up.bias)

    def update(self, h):  # s A(h)
        h = self.act(self.adapter_down(self.adapter_input(h)))  # (..., r)
        return self.scaling * self.adapter_up(h)

    def forward(self, base, *args, **kwargs):
        output = base(*args, **kwargs)
        y = hidden_states(output)
        # Hugging Face calls attention with hidden_states=x
        x = args[0] if args else next(iter(kwargs.values()))
        y = (y + self.update(x if self.parallel else y)).to(y.dtype)
        return with_hidden_states(output, y)


class ParallelToBlock(Bottleneck):
    """Around a whole block, beside its feed-forward: reads the residual stream, the
    input of the block's second norm."""

    def forward(self, base, *args, **kwargs):
        norm = norm_before_feed_forward(base.module)
        with recorded_input(norm) as stream:
            output = base(*args, **kwargs)
        if not stream or stream[-1] is None:
            raise RuntimeError(
                "the residual stream cannot be read: the block's second norm did not"
                " run, or ran without gradients, as in a reentrant checkpoint (expected"
                " use_reentrant=False)"
            )
        y = hidden_states(output)
        y = (y + self.update(stream[-1])).to(y.dtype)
        return with_hidden_states(output, y)


# placement: (where in the block, reduction factor, non-linearity, scaling)
PLACEMENTS = {
    "houlsby": (("attention", "feed-forward"), 16, "swish", 1.0),
    "pfeiffer": (("feed-forward",), 16, "relu", 1.0),
    "parallel": (("feed-forward",), 2, "relu", 4.0),
}
INITS = ("identity", "bert", "mam")
READS = ("sublayer", "stream")


@dataclass(kw_only=True)
class BottleneckConfig(LayerConfig):
    """r, or reduction_factor (then r = d / reduction_factor). Fields that are None have
    the placement's own value, see PLACEMENTS.

    init: "identity" W_down normal with sd 0.02, W_up zero; "bert" both normal, nearly
    the identity; "mam" as LoRA. target_modules=None: the right parts of every block,
    found by structure. Named ones may be any module that maps (..., d) to (..., d), or
    to a tuple that begins with it.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    placement: str = "pfeiffer"
    r: int | None = None
    reduction_factor: float | None = None
    non_linearity: str | None = None
    # "sublayer": the part's own output or input; "stream": the residual stream
    reads: str = "sublayer"
    # a number, or "learned": one number a layer, which starts at 1
    scaling: float | str | None = None
    init: str = "identity"
    train_layernorm: bool = False  # train and save the norms too, as Houlsby et al. do

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("placement", PLACEMENTS)
        self.check_choice("non_linearity", (None, *ACTIVATIONS))
        self.check_choice("init", INITS)
        self.check_choice("reads", READS)
        if self.reads == "stream" and self.placement == "houlsby":
            raise ConfigError(
                "reads = 'stream' is for pfeiffer and parallel; houlsby reads the"
                " part's output, in the library adapters too"
            )
        if self.r is not None and self.reduction_factor is not None:
            raise ConfigError(
                "give r or reduction_factor, not both: r = d / reduction_factor"
            )
        self.check_number("r", whole=True, least=1, also=(None,))
        self.check_number("reduction_factor", above=0, also=(None,))
        self.check_number("scaling", also=(None, "learned"))

    def usual_targets(self, model, modules):
        if self.reads == "stream":
            return find_blocks(modules)
        return find_sublayers(modules, PLACEMENTS[self.placement][0])

    def resolve(self, model):
        config = super().resolve(model)
        if self.train_layernorm:
            modules = targets.modules_by_path(model)
            norms = targets.paths_of(modules, weights.is_norm)
            names = targets.shortest_names(modules, norms)
            config.modules_to_save = sorted({*(self.modules_to_save or ()), *names})
        return config

    def create(self, base, path):
        _, factor, act, scaling = PLACEMENTS[self.placement]
        act = self.non_linearity or act
        scaling = scaling if self.scaling is None else self.scaling
        d_in, d_out = in_out_features(base.module)
        parallel = self.placement == "parallel"
        d = d_in if parallel else d_out
        r = self.r or max(1, int(d // (self.reduction_factor or factor)))
        kind = Bottleneck
        if parallel and self.reads == "stream":
            norm_before_feed_forward(base.module)  # refused now, not in the first step
            kind = ParallelToBlock
        adapter = kind(d, r, d_out, parallel, act, scaling)
        adapter.reset_parameters(self.init)
        return adapter
