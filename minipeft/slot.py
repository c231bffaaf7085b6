"""Floor 1: the one idea of this package.

**An adapter is a function of the layer below it and the input: y = adapter(base, x).**

A method that adds calls base(x) and adds to it. One that rescales multiplies. One that
stands around the whole model calls it with other arguments. Then stacking adapters is
composing functions, disabling one is not calling it, a batch whose rows want different
adapters is split by rows, and merging an adapter is letting it write itself into the
weights.

So there is one kind of wrapper, the Slot, and it stands where a layer stood. The slot
knows names, order, rows and merging. The adapter knows its own algebra and owns nothing
but its own parameters.
"""

import copy
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from . import weights
from .errors import NotMergeableError


class AdapterNameError(ValueError):
    """An adapter's name that is unknown, taken or impossible."""


class Base:
    """All that an adapter may know of the world: the layer below it."""

    def __init__(self, slot, name, below=None, lossy=False):
        self.slot, self.name, self.below, self.lossy = (
            slot,
            name,
            below or slot.base_layer,
            lossy,
        )

    def __call__(self, *args, **kwargs):
        """Run what lies below: the layer, and the adapters that come before this one."""
        return self.below(*args, **kwargs)

    @property
    def module(self):
        """The frozen layer itself."""
        return self.slot.base_layer

    @property
    def plain(self):
        """Is nothing below but a linear layer of torch's own, unhooked? Then its weight
        may be used in its place."""
        return type(self.below) is nn.Linear and not (
            self.below._forward_hooks or self.below._forward_pre_hooks
        )

    @property
    def frozen(self):
        """That layer as it was before anything was merged into it."""
        for module, parameters, buffers in self.slot.original:
            if module is self.module:
                before = copy.copy(module)
                before._parameters, before._buffers = parameters, buffers
                return before
        return self.module

    @property
    def weight(self):
        """The frozen weight, dense, (d_out, d_in), however the layer stores it.
        Assigning stores it that way again."""
        return weights.read_weight(self.module)

    @weight.setter
    def weight(self, weight):
        rounding = weights.write_weight(self.module, weight, self.lossy)
        if rounding:
            self.slot.rounding.append(rounding)

    @property
    def bias(self):
        """The frozen bias (d_out,), or None."""
        return getattr(self.module, "bias", None)

    @bias.setter
    def bias(self, bias):
        weights.write_bias(self.module, bias)

    @property
    def shared(self):
        """The part that this adapter shares between all its slots, as its config's
        `create_shared` made it."""
        return self.slot.shared[self.name]

    def peer(self, name):
        """Another adapter of this slot."""
        if name not in self.slot.adapters:
            raise AdapterNameError(
                f"no adapter {name!r} on this layer; there are:"
                f" {', '.join(self.slot.adapters)}"
            )
        return self.slot.adapters[name]


class Adapter(nn.Module):
    """A method. `forward` is its equation; the names in its state_dict are those that
    its tensors have in files."""

    mergeable = False

    def forward(self, base, *args, **kwargs):
        raise NotImplementedError

    def fold(self, base):
        """Write yourself into base.weight."""
        raise NotMergeableError(
            f"{type(self).__name__} is no change of a weight: it cannot be merged"
            " into one"
        )

    def to_file(self):
        """The tensors to save, by name."""
        return self.state_dict()

    def from_file(self, tensors):
        """Take over tensors of the names and shapes that `to_file` gives."""
        self.load_state_dict(tensors)


class LinearDelta(Adapter):
    """A method that changes a linear layer's weight: W' = W + delta. Most need only say
    what their delta is."""

    mergeable = True
    dropout = 0.0  # the share of x that the update does not see in training

    def delta(self, base):
        """(d_out, d_in)"""
        raise NotImplementedError

    def update(self, base, x):
        """x delta^T: (..., d_in) -> (..., d_out). Override it where there is a cheaper
        way."""
        return F.linear(x, self.delta(base))

    def forward(self, base, x):
        y = base(x)
        return (y + self.update(base, self.seen(x, next(self.parameters()).dtype))).to(
            y.dtype
        )

    def joins(self, base, x):
        """Could W + delta be put in the place of W, with the same result? Then one
        product with x does for both."""
        same = x.dtype == base.module.weight.dtype == next(self.parameters()).dtype
        thinned, cast = (
            self.dropout and self.training,
            torch.is_autocast_enabled(x.device.type),
        )
        return base.plain and same and not thinned and not cast

    def seen(self, x, dtype):
        """x as the update sees it: in the adapter's precision (autocast does that
        itself), and thinned in training."""
        if (
            x.dtype != dtype
            and x.is_floating_point()
            and not torch.is_autocast_enabled(x.device.type)
        ):
            x = x.to(dtype)
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def plus(self, y, h, B, bias=None):
        """y + s (h B^T + bias) in one call: no delta is formed, nor a second tensor of
        y's size (..., d_out)."""
        rows = y.numel() // len(B)  # not -1: AdaLoRA may leave nothing, r = 0
        out = torch.addmm(
            y.to(h.dtype).reshape(rows, len(B)),
            h.reshape(rows, B.shape[1]),
            B.T,
            alpha=self.scaling,
        )
        return (
            (out if bias is None else out + self.scaling * bias)
            .view(y.shape)
            .to(y.dtype)
        )

    def fold(self, base):
        base.weight = base.weight + self.delta(base)


class Slot(nn.Module):
    """Stands where `base_layer` stood, with any number of adapters."""

    is_slot = True

    def __init__(self, base_layer, switch):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.switch = switch
        # lent: what adapters share over slots belongs to the PeftModel
        self.shared = {}
        self.merged = []  # names of the adapters that are written into the weight
        # [(a module of the layer, its parameters, buffers)] from before
        self.original = []
        # (what was lost to rounding, what was to be written), 4-bit layers only
        self.rounding = []

    def forward(self, *args, **kwargs):
        if not self.switch.enabled:
            return self.base_layer(*args, **kwargs)
        if self.switch.rows is not None:
            return self.by_rows(self.switch.rows, *args, **kwargs)
        return self.stack(self.switch.active, *args, **kwargs)

    def stack(self, names, *args, **kwargs):
        """Compose: the first adapter is given the layer, the second is given the first,
        and so on."""
        call = self.base_layer
        for name in names:
            if name in self.adapters and name not in self.merged:
                call = partial(self.adapters[name], Base(self, name, call))
        return call(*args, **kwargs)

    def by_rows(self, rows, *args, **kwargs):
        """Each row through its own adapter. The one argument is x (B, ...), and so is
        the result."""
        if self.adapters.keys().isdisjoint(rows.names):
            return self.base_layer(*args, **kwargs)
        # attention's masks and caches cannot be told apart by rows
        if len(args) != 1 or kwargs:
            raise ValueError(
                f"a {type(self.base_layer).__name__} is given more than one tensor: its"
                " rows cannot go through different adapters. Put the adapters at its"
                " last linear layer instead"
            )
        (x,) = args
        parts, (groups, order) = [], rows.split(x.shape[0], x.device)
        for name, index in groups:
            # for the slots within this layer: they see these rows only
            with self.switch.alone(name):
                parts.append(self.stack([name], x[index]))
        return torch.cat(parts)[order]

    def merge(self, names, lossy=False):
        """Write adapters into the weight, keeping the parameters from before."""
        for name in names:
            if name in self.adapters:
                self.original = self.original or [
                    (module, dict(module._parameters), dict(module._buffers))
                    for module in self.base_layer.modules()
                ]
                self.adapters[name].fold(Base(self, name, lossy=lossy))
                self.merged.append(name)

    def unmerge(self):
        """Put back the very parameters from before merging: nothing is lost to
        rounding."""
        for module, parameters, buffers in self.original:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        self.merged, self.original, self.rounding = [], [], []

    # whatever else is asked (weight, in_features), the layer answers
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class Switch:
    """Who plays. There is one for the whole model, and every slot reads it."""

    def __init__(self):
        self.active = []  # names of the active adapters, the lowest first
        self.enabled = True
        self.rows = None  # Rows, where each row of the batch wants its own adapter

    @contextmanager
    def alone(self, name):
        """Within it one adapter plays alone, for all rows."""
        before = self.active, self.rows
        self.active, self.rows = [name], None
        try:
            yield
        finally:
            self.active, self.rows = before


class Rows:
    """The adapter that each row of a batch wants. "__base__" is none."""

    def __init__(self, names):
        self.names, self.known = list(names), {}

    def split(self, size, device):
        """([(adapter's name, the rows that want it)], the order that puts all of these
        back in their places).

        A batch may have `size` rows, several for each name: beams, or tokens where a
        layer takes each as a row.
        """
        if (size, device) not in self.known:
            if size % len(self.names):
                raise ValueError(
                    f"{len(self.names)} adapter_names for a batch of {size} rows"
                )
            rows = torch.arange(size, device=device).view(len(self.names), -1)
            groups = [
                (
                    name,
                    rows[
                        [i for i, other in enumerate(self.names) if other == name]
                    ].flatten(),
                )
                for name in dict.fromkeys(self.names)
            ]
            self.known[size, device] = (
                groups,
                torch.cat([index for _, index in groups]).argsort(),
            )
        return self.known[size, device]
