"""The one idea of this package.

**An adapter is a function of the layer below it and the input: y = adapter(base, x).**

A method that adds calls base(x) and adds to it. One that rescales multiplies. One
around the whole model calls it with other arguments. Then stacking adapters is
composing functions, disabling one is not calling it, a batch whose rows want different
adapters is split by rows, and merging an adapter is letting it write itself into the
weights.

So there is one kind of wrapper, the Slot, and it stands where a layer stood. The slot
knows names, order, rows and merging. The adapter knows its own equation and owns
nothing but its own parameters.
"""

import threading
from collections.abc import MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from . import targets, weights
from .errors import NotMergeableError


class AdapterNameError(ValueError):
    """An adapter's name that is unknown, taken or impossible."""


class Adapter(nn.Module):
    """A method: `forward` is its equation. base is the layer below, a Base: base(x)
    runs it. The state_dict names its tensors as files do."""

    mergeable = False  # can `fold` write it into the weights?
    # True: forward never calls base, so adapters inside the layer have no effect
    replaces_base = False
    dropout = 0.0  # on `adapter_input`, in training

    def forward(self, base, *args, **kwargs):
        raise NotImplementedError

    def adapter_input(self, x):
        """x as the adapter reads it: in the adapter's precision (autocast chooses its
        own), and with dropout in training."""
        dtype = next((p.dtype for p in self.parameters()), x.dtype)
        if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            x = x.to(dtype)
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def fold(self, base):
        """Write this adapter into base.weight and base.bias. Raises
        NotMergeableError."""
        raise NotMergeableError(
            f"{type(self).__name__} does not modify a weight, so it cannot be merged"
        )

    def to_file(self):
        """The tensors to save, by name."""
        return self.state_dict()

    def from_file(self, tensors):
        """Load tensors with the names and shapes that `to_file` gives."""
        self.load_state_dict(tensors)


class LinearDelta(Adapter):
    """A method that changes a linear layer's weight: W' = W + delta. Most define only
    delta. The layer reads x, the update reads `adapter_input(x)`."""

    mergeable = True
    kernel = None  # a fused form of `forward`, from kernels.py
    rows_kernel = None  # one of a batch whose rows have different adapters

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in ("kernel", "rows_kernel"):  # a subclass has another equation
            setattr(cls, name, vars(cls).get(name))

    def delta(self, base):
        """The change of the weight, (d_out, d_in)."""
        raise NotImplementedError

    def update(self, base, x):
        """x delta^T: (..., d_in) -> (..., d_out). Override it where there is a cheaper
        way."""
        return F.linear(x, self.delta(base))

    def forward(self, base, x):
        fused = None if self.kernel is None else self.kernel(base, x)
        return self.forward_plain(base, x) if fused is None else fused

    def forward_plain(self, base, x):
        y = base(x)
        return (y + self.update(base, self.adapter_input(x))).to(y.dtype)

    def fold(self, base):
        base.weight = base.weight + self.delta(base)


class Base:
    """An adapter's view of the layer it wraps."""

    def __init__(self, slot, name, inner=None, lossy=False):
        self.slot = slot
        self.name = name
        self.inner = inner or slot.base_layer  # the layer, or the adapter before
        self.lossy = lossy  # may writing the weight round it to 4 bits again?

    def __call__(self, *args, **kwargs):
        """Run the layer, with the adapters that come before this one."""
        return self.inner(*args, **kwargs)

    @property
    def module(self):
        """The frozen layer itself."""
        return self.slot.base_layer

    @property
    def is_plain_linear(self):
        """True for a bare nn.Linear without hooks: multiplying by its weight is the
        same as calling it."""
        return type(self.inner) is nn.Linear and not (
            self.inner._forward_hooks or self.inner._forward_pre_hooks
        )

    @property
    def unmerged(self):
        """The frozen layer as it was before adapters of this slot were merged."""
        for module, parameters, buffers in self.slot.unmerged_params:
            if module is self.module:
                before = object.__new__(type(module))  # copy.copy may be refused
                vars(before).update(
                    vars(module), _parameters=parameters, _buffers=buffers
                )
                return before
        return self.module

    @property
    def weight(self):
        """The frozen weight as a dense (d_out, d_in), however the layer stores it.
        Assigning stores it in the layer's own way."""
        return weights.read_weight(self.module)

    @weight.setter
    def weight(self, weight):
        error = weights.write_weight(self.module, weight, self.lossy)
        if error:
            self.slot.quant_error.append(error)

    @property
    def bias(self):
        """The frozen bias (d_out,), or None."""
        return getattr(self.module, "bias", None)

    @bias.setter
    def bias(self, bias):
        weights.write_bias(self.module, bias)

    @property
    def shared(self):
        """What this adapter shares over all its slots, from its config's
        `create_shared`."""
        return self.slot.shared[self.name]

    def peer(self, name):
        """Another adapter of this slot. Raises AdapterNameError."""
        if name not in self.slot.adapters:
            raise AdapterNameError(
                f"no adapter {name!r} on this layer; there are:"
                f" {', '.join(self.slot.adapters)}"
            )
        return self.slot.adapters[name]


class Slot(nn.Module):
    """Stands where `base_layer` stood, with any number of adapters.

    Merged adapters are part of the weights: a slot with one runs its layer alone, as
    Hugging Face PEFT's layers do.
    """

    is_slot = True  # targets.py, a floor below, knows a slot by it
    layer_name = "base_layer"  # the wrapped layer's name in state_dict

    def __init__(self, base_layer, active):
        super().__init__()
        self.add_module(self.layer_name, base_layer)
        self.adapters = nn.ModuleDict()
        self.active = active  # the model's ActiveAdapters
        # {name: what that adapter shares over its slots}; the PeftModel owns it
        self.shared = {}
        self.merged = []  # names of the adapters that are written into the weights
        # [(a module of the layer, its parameters, its buffers)] from before merging
        self.unmerged_params = []
        # [(norm of the rounding error, norm of the change)] of merged 4-bit weights
        self.quant_error = []

    def forward(self, *args, **kwargs):
        if not self.active.enabled or self.merged:
            return self.base_layer(*args, **kwargs)
        self.active.check_checkpoints(self.training)
        if self.active.rows is not None:
            return self.forward_mixed_batch(self.active.rows, *args, **kwargs)
        return self.forward_stacked(self.active.names, *args, **kwargs)

    def forward_stacked(self, names, *args, **kwargs):
        """Compose: the first adapter's base is the layer, the second's is the first
        adapter, and so on."""
        call = self.base_layer
        for name in names:
            if name in self.adapters:
                call = partial(self.adapters[name], Base(self, name, call))
        return call(*args, **kwargs)

    def forward_mixed_batch(self, rows, *args, **kwargs):
        """Run each row of x (B, ...), the only argument, through its own adapter. rows:
        RowAdapters."""
        if self.adapters.keys().isdisjoint(rows.names):
            return self.base_layer(*args, **kwargs)
        # attention's masks and caches cannot be split by rows
        if len(args) != 1 or kwargs:
            raise ValueError(
                f"this {type(self.base_layer).__name__} is called with more than one"
                " tensor, so its rows cannot go through different adapters. Put the"
                " adapters at its last linear layer instead"
            )
        (x,) = args
        groups, order = rows.group(x.shape[0], x.device)
        fused = self.forward_fused_rows(rows.names, x)
        if fused is not None:
            return fused
        outputs = []
        for name, index in groups:
            with self.active.only(name):  # slots inside this layer see these rows only
                outputs.append(self.forward_stacked([name], x[index]))
        return torch.cat(outputs)[order]

    def forward_fused_rows(self, names, x):
        """All rows at once, where their adapters are of one kind that can do so; or
        None."""
        adapters = [self.adapters[n] if n in self.adapters else None for n in names]
        kinds = {type(adapter) for adapter in adapters if adapter is not None}
        kernel = getattr(kinds.pop(), "rows_kernel", None)
        if kernel is None or kinds:
            return None
        return kernel(adapters, self.base_layer, x)

    def merge(self, names, lossy=False):
        """Write adapters into the weights, and keep the parameters from before."""
        for name in names:
            if name in self.adapters:
                self.unmerged_params = self.unmerged_params or [
                    (module, dict(module._parameters), dict(module._buffers))
                    for module in targets.bare_modules(self.base_layer)
                ]
                self.adapters[name].fold(Base(self, name, lossy=lossy))
                self.merged.append(name)

    def unmerge(self):
        """Put back the very parameters from before merging: no rounding error. Where
        the layer was moved or cast since, so are they."""
        self._put_unmerged()
        self.merged = []
        self.unmerged_params = []
        self.quant_error = []

    def _put_unmerged(self):
        for module, parameters, buffers in self.unmerged_params:
            put_back(parameters, module._parameters)
            put_back(buffers, module._buffers)

    @contextmanager
    def beside(self):
        """Within it the merged adapters run beside the layer, and its parameters are
        those from before merging."""
        active = ActiveAdapters()
        active.names = self.merged
        changes = {"merged": [], "unmerged_params": [], "active": active}
        before = {name: getattr(self, name) for name in changes}
        merged = [
            (module, dict(module._parameters), dict(module._buffers))
            for module, _, _ in self.unmerged_params
        ]
        self._put_unmerged()
        vars(self).update(changes)
        try:
            yield
        finally:
            vars(self).update(before)
            for module, parameters, buffers in merged:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    def _apply(self, fn, recurse=True):  # .to(), .half() ..., of a part of the model
        for module in self.shared.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def get_base_layer(self):
        return self.base_layer

    def __getattr__(self, name):
        """weight, in_features ...: the layer's. lora_A, scaling ...: {adapter's name:
        its own}, as in Hugging Face PEFT."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in (self.layer_name, "adapters"):
                raise
        try:
            return getattr(self.base_layer, name)
        except AttributeError:
            found = AttributeByAdapter(self.adapters, name)
            if not found:
                raise
            return found


class AttributeByAdapter(MutableMapping):
    """{adapter's name: its matrix, or scaling}. What is set is set on the adapter."""

    def __init__(self, adapters, attribute):
        self.adapters = adapters
        self.attribute = attribute

    def __iter__(self):
        for name, adapter in self.adapters.items():
            if self.attribute in {*adapter._parameters, *adapter._modules} or (
                self.attribute == "scaling" and hasattr(adapter, "scaling")
            ):
                yield name

    def __len__(self):
        return sum(1 for _ in self)

    def __getitem__(self, name):
        if name not in iter(self):
            raise KeyError(name)
        return getattr(self.adapters[name], self.attribute)

    def __setitem__(self, name, value):
        if name not in self:
            raise AdapterNameError(
                f"{self.attribute} of {name!r}: no such adapter on this layer; there"
                f" are: {', '.join(self)}"
            )
        setattr(self.adapters[name], self.attribute, value)

    def __delitem__(self, name):
        raise TypeError(
            f"{self.attribute} of {name!r} is a part of its adapter: call"
            " delete_adapter on the PeftModel"
        )

    def __repr__(self):
        return repr(dict(self))


class ModelSlot(Slot):
    """The slot around the whole model. In state_dict the model is `base_model.model`,
    as in Hugging Face PEFT."""

    layer_name = "model"

    @property
    def base_layer(self):
        return self.model

    def __getattr__(self, name):
        if name in OF_PEFT_MODEL:  # transformers' models have some of these, too
            raise AttributeError(
                f"base_model.{name}: call {name} on the PeftModel itself"
            )
        return super().__getattr__(name)

    def forward_mixed_batch(self, rows, *args, **kwargs):
        """Run each group of rows alone through the adapters around the model. Adapters
        inside the model split the rows themselves."""
        if self.adapters.keys().isdisjoint(rows.names):
            return self.base_layer(*args, **kwargs)
        self.check_mixed_batch(kwargs)
        labels = kwargs.pop("labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        size = len(rows.names)
        given = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
        groups, order = rows.group(size, given[0].device)
        outputs = []
        for name, index in groups:
            own_args = [select_rows(value, index, size) for value in args]
            own = {key: select_rows(v, index, size) for key, v in kwargs.items()}
            with self.active.only(name):
                outputs.append(self.forward_stacked([name], *own_args, **own))
        if torch.is_tensor(outputs[0]):
            return torch.cat(outputs)[order]
        if not hasattr(outputs[0], "logits"):
            raise ValueError(
                "rows with different adapters around the model need a model that gives"
                " a tensor, or an object with logits; found a"
                f" {type(outputs[0]).__name__}"
            )
        loss = None
        if labels is not None:
            own_labels = [labels[index] for _, index in groups]
            loss = next_token_loss(outputs, own_labels, items)
        return join_outputs(outputs, order, loss)

    def check_mixed_batch(self, kwargs):
        """Raise ValueError where rows cannot be run in groups."""
        cached = any(kwargs.get(name) is not None for name in CACHES)
        if kwargs.get("use_cache") or cached:
            raise ValueError(MIXED_CACHES)
        config = getattr(self.base_layer, "config", None)
        asked = [
            name
            for name in INNER_OUTPUTS
            if kwargs.get(name, getattr(config, name, False))
        ]
        if asked:
            raise ValueError(
                f"{asked[0]}: adapters around the model give rows of different lengths,"
                " which have no common hidden states: ask for one adapter at a time"
            )
        kind = getattr(self.base_layer, "loss_type", None)  # transformers' name
        if kwargs.get("labels") is not None and kind not in (None, "ForCausalLM"):
            raise ValueError(
                "labels: rows with different adapters around the model have a loss of"
                f" next tokens only, and this {type(self.base_layer).__name__} has"
                " another one: compute it from the logits"
            )

    def generate(self, *args, **kwargs):
        """The model's own generate, wrapped by the active adapters around the model."""
        call = self.base_layer.generate
        rows = self.active.rows
        if rows is not None and not self.adapters.keys().isdisjoint(rows.names):
            raise ValueError(MIXED_CACHES)
        stacked = self.active.enabled and rows is None and not self.merged
        # Reversed: the outermost generate patches the model's forward first, and so
        # ends up innermost.
        for name in reversed(self.active.names) if stacked else ():
            if name in self.adapters:
                call = partial(self.adapters[name].generate, Base(self, name, call))
        return call(*args, **kwargs)


def select_rows(value, index, size):
    """The rows `index` of a tensor that has `size` rows; other values as they are."""
    per_row = torch.is_tensor(value) and value.shape[:1] == (size,)
    return value[index] if per_row else value


def join_outputs(outputs, order, loss):
    """One output of groups of rows, in the batch's order, with the logits (rows, T, V)
    and the loss alone: all else is of one group."""
    # prompts add positions in front: keep those that all rows have
    length = min(output.logits.shape[1] for output in outputs)
    logits = torch.cat([output.logits[:, -length:] for output in outputs])
    return type(outputs[0])(loss=loss, logits=logits[order])


def next_token_loss(outputs, labels, items=None):
    """The mean cross-entropy over all labels (rows, T) of groups of rows; with `items`,
    the sum divided by it. Prompts' positions, in front, have no labels."""
    loss = 0
    count = 0
    for output, own in zip(outputs, labels):
        prompt = output.logits.shape[1] - own.shape[1]
        own = F.pad(own, (prompt, 0), value=IGNORED)[:, 1:].flatten()
        logits = output.logits[:, :-1].flatten(0, 1).float()
        loss = loss + F.cross_entropy(
            logits, own, ignore_index=IGNORED, reduction="sum"
        )
        count += (own != IGNORED).sum()
    return loss / (count if items is None else items)


IGNORED = -100  # the label of a position that is not learnt
# what Hugging Face PEFT has on PeftModel.base_model, and a PeftModel here itself
OF_PEFT_MODEL = {
    "active_adapter",
    "active_adapters",
    "add_weighted_adapter",
    "delete_adapter",
    "merge_adapter",
    "merge_and_unload",
    "peft_config",
    "set_adapter",
    "set_requires_grad",
    "unload",
    "unmerge_adapter",
}
# the cache's name in forward: until and since transformers 5.24
CACHES = {"past_key_values", "cache"}
INNER_OUTPUTS = ("output_hidden_states", "output_attentions")
MIXED_CACHES = (
    "adapters around the model have caches of different lengths: generate for one at a"
    " time"
)


def put_back(before, now):
    """Put {name: tensor} back into `now`, a module's tensors, on the devices and in the
    dtypes that these have."""
    for name, tensor in before.items():
        follow(tensor, now.get(name))
    now.update(before)


def follow(tensor, other):
    """Move `tensor` to the device of `other`, and cast it to its dtype, in place."""
    if tensor is None or other is None or other.is_meta:
        return
    cast = tensor.is_floating_point() and other.is_floating_point()
    dtype = other.dtype if cast else tensor.dtype
    if (tensor.device, tensor.dtype) != (other.device, dtype):
        tensor.data = tensor.data.to(other.device, dtype)


def find_slots(model):
    """{path: slot} of all slots of a model, the outermost first; the path "" is that of
    one around the whole model."""
    found = {"": model} if isinstance(model, Slot) else {}
    inside = {path: module for path, _, _, module in targets.walk(model)}
    return found | {path: m for path, m in inside.items() if isinstance(m, Slot)}


# the attribute by which transformers' modules, and GPT's here, call torch's checkpoint
CHECKPOINT = "_gradient_checkpointing_func"


def autograd_state():
    """What differs within a checkpoint: a reentrant one switches gradients off, others
    have hooks of their own for saved tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), hooks


class ActiveAdapters:
    """Which adapters are active; one object per model, read by every slot.

    A call may change it for its own rows, so a model serves one thread at a time: calls
    from other threads wait for their `turn`.
    """

    def __init__(self):
        self.names = []  # the active adapters, the innermost first
        self.merged = []  # those written into the weights, in the order of merging
        self.enabled = True  # False within disable_adapter()
        self.rows = None  # RowAdapters, where each row has an adapter of its own
        self.autograd_state = None  # at the start of a call with rows and gradients
        self.turn = threading.RLock()

    def __getstate__(self):  # a copy has a lock of its own
        return {key: value for key, value in vars(self).items() if key != "turn"}

    def __setstate__(self, state):
        vars(self).update(state, turn=threading.RLock())

    @contextmanager
    def changed(self, **changes):
        """Within it these attributes have other values."""
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        try:
            yield
        finally:
            vars(self).update(before)

    def only(self, name):
        """Within it one adapter is active, for all rows."""
        return self.changed(names=[name], rows=None)

    @contextmanager
    def call(self, rows, model):
        """One call of `model`, with rows of its own or None. What a checkpoint runs
        again in the backward pass has them again."""
        recomputed = rows is not None and torch.is_grad_enabled()
        state = autograd_state() if recomputed else None
        with ExitStack() as stack:
            stack.enter_context(self.turn)
            stack.enter_context(self.changed(rows=rows, autograd_state=state))
            for module in model.modules() if recomputed else ():
                if checkpoint := vars(module).get(CHECKPOINT):
                    setattr(module, CHECKPOINT, partial(self.checkpoint, checkpoint))
                    stack.callback(setattr, module, CHECKPOINT, checkpoint)
            yield

    def checkpoint(self, checkpoint, function, *args, **kwargs):
        """`checkpoint` of a function that runs with what is active now."""
        bound = partial(self.run_with, self.names, self.rows, function)
        return checkpoint(bound, *args, **kwargs)

    def run_with(self, names, rows, function, *args, **kwargs):
        state = autograd_state()
        changes = dict(names=names, rows=rows, autograd_state=state)
        with self.turn, self.changed(**changes):
            return function(*args, **kwargs)

    def check_checkpoints(self, training):
        """Raise ValueError within a checkpoint that would not bring back the rows."""
        state = self.autograd_state
        if training and state is not None and state != autograd_state():
            raise ValueError(
                "adapter_names in training: found a layer in a checkpoint of the"
                " model's own, or without gradients, which may run it again without"
                f" its rows. Expected one that goes through self.{CHECKPOINT}, which"
                " gradient_checkpointing_enable sets. Or train one adapter at a time"
            )


class RowAdapters:
    """The adapter of each row of a batch; "__base__" for none."""

    def __init__(self, names):
        self.names = list(names)
        self._cache = {}  # {(batch size, device): groups and order}

    def group(self, size, device):
        """([(adapter's name, indices of its rows)], the order that restores the batch).

        A batch may have `size` rows, a multiple of the names: several rows for each
        name, as in beam search, or where a layer takes each token as a row.
        """
        if (size, device) not in self._cache:
            if size % len(self.names):
                raise ValueError(
                    f"{len(self.names)} adapter_names for a batch of {size} rows"
                )
            rows = torch.arange(size, device=device).view(len(self.names), -1)
            groups = []
            for name in dict.fromkeys(self.names):
                mine = [i for i, other in enumerate(self.names) if other == name]
                groups.append((name, rows[mine].flatten()))
            order = torch.cat([index for _, index in groups]).argsort()
            self._cache[size, device] = groups, order
        return self._cache[size, device]
