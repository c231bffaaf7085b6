"""Merging: write adapters into the weights, and put the old weights back.

The merged adapters are one list of names for the whole model. Whenever it changes, all
old weights are put back first, and then the whole list is written again, the outermost
slot first. So the weights that an inner slot saves are always those that the slots
around it have written; and putting them back in reverse gives the base, bit for bit,
whatever was merged, refused or deleted in between.

Every function here does all of its work, or raises and leaves the model as it was.
"""

import warnings
from contextlib import contextmanager

import torch

from . import io, targets
from .errors import NotMergeableError
from .quant import linear4bit


def merge(model, names, safe_merge=False, lossy=False):
    """Write the adapters `names` of a PeftModel into its weights, after those that are
    merged already. Arguments and errors: see PeftModel.merge_adapter."""
    before = model.base_model.active.merged
    check_enabled(model)
    names = [name for name in dict.fromkeys(names) if name not in before]
    if not names:
        return
    check_mergeable(model, names)
    try:
        write(model, [*before, *names], lossy=[*before, *names] if lossy else before)
        if safe_merge:
            check_finite(model, names)
    except BaseException:
        write(model, before)
        raise


def unmerge(model):
    """Put back the weights from before merging."""
    restore(model)
    model.base_model.active.merged = []


@contextmanager
def unmerged(model):
    """Within it the weights are the base's. Afterwards the adapters that are merged
    then are written again, unless adapters are disabled."""
    restore(model)
    try:
        yield
    finally:
        active = model.base_model.active
        if active.enabled:
            write(model, active.merged)


def merge_and_unload(model, names, safe_merge=False, lossy=False, dequantize=False):
    """The plain model with adapters written into it. See PeftModel.merge_and_unload."""
    check_enabled(model)
    base = model.get_base_model()
    before = model.base_model.active.merged
    layers = linear4bit.linear_layers(base) if dequantize else []
    try:
        if layers:
            unmerge(model)
            linear4bit.dequantize_model(base)
        merge(model, [*before, *names], safe_merge, lossy)
    except BaseException:
        restore(model)  # before the layers that it knows are replaced
        for _, layer, put in layers:
            put(layer)
        write(model, before)
        raise
    warn_of_quant_error(model, stacklevel=4)
    model._remove_slots()
    update_tie(base)
    return base


def guard_backward(model, output):
    """Training a merged model ends in a clear error: its loss depends on no parameter
    that is trained. Returns the output. (Logits are guarded in training mode only.)"""
    merged = model.merged_adapters
    if not merged or not torch.is_grad_enabled():
        return output
    anchor = torch.zeros((), requires_grad=True)
    if torch.is_tensor(output):
        guarded = model.training and not output.requires_grad
        return NoBackward.apply(output, anchor, merged) if guarded else output
    for name in ("loss", "logits") if model.training else ("loss",):
        value = getattr(output, name, None)
        if value is not None and not value.requires_grad:
            setattr(output, name, NoBackward.apply(value, anchor, merged))
    return output


class NoBackward(torch.autograd.Function):
    """y = x, without a backward pass."""

    @staticmethod
    def forward(ctx, x, anchor, merged):
        ctx.merged = merged
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise NotMergeableError(
            f"{ctx.merged} are merged, so nothing can be trained: call"
            " unmerge_adapter() first"
        )


def write(model, names, lossy=None):
    """Put all old weights back, then write the adapters `names`. Only those in `lossy`
    (None: all) may be rounded to 4 bits."""
    restore(model)
    replaced = {}  # {path of a layer: the merged adapter that replaces it whole}
    for path, slot in io.progress(model._slots().items(), "merging"):
        outer = [replaced[q] for q in replaced if is_inside(path, q)]
        if outer:  # adapters of this slot have no effect, as before merging
            slot.merged = outer
            continue
        for name in names:
            slot.merge([name], lossy=lossy is None or name in lossy)
            if name in slot.merged and slot.adapters[name].replaces_base:
                replaced[path] = name
    model.base_model.active.merged = list(names)


def restore(model):
    slots = model._slots()
    for path, slot in slots.items():
        check_layers_are_there(path, slot)
    for slot in reversed(slots.values()):  # the outermost was written first
        slot.unmerge()


def check_layers_are_there(path, slot):
    """Raise NotMergeableError where a layer was replaced while adapters were merged."""
    there = {id(module) for module in targets.bare_modules(slot.base_layer)}
    for module, _, _ in slot.unmerged_params:
        if id(module) not in there:
            raise NotMergeableError(
                f"{path or 'the model'}: a {type(module).__name__} was replaced while"
                f" {slot.merged} were merged, so the weights from before cannot be put"
                " back. Put it back, or load the base again"
            )


def is_inside(path, outer):
    """True where module `path` is within module `outer`; "" is the whole model."""
    return path != outer and (not outer or path.startswith(f"{outer}."))


def check_enabled(model):
    if not model.base_model.active.enabled:
        raise NotMergeableError(
            "adapters cannot be merged within disable_adapter(): leave its `with` block"
            " first"
        )


def check_mergeable(model, names):
    for name in names:
        for adapter in model._adapters_by_path(name).values():
            if not getattr(adapter, "mergeable", True):
                raise NotMergeableError(
                    f"{name!r} cannot be merged: {type(adapter).__name__} does not"
                    " modify a weight"
                )


def check_finite(model, names):
    for path, slot in model._slots().items():
        modules = targets.bare_modules(slot.base_layer) if slot.merged else []
        parameters = [p for module in modules for p in module.parameters(recurse=False)]
        if not all(p.isfinite().all() for p in parameters):
            raise NotMergeableError(
                f"merging {names} gives weights that are not finite"
                f"{' in ' * bool(path)}{path}: the adapter is broken"
            )


def warn_of_quant_error(model, stacklevel):
    """Say how much of the adapters' change rounding to 4 bits has cost."""
    errors = [pair for slot in model._slots().values() for pair in slot.quant_error]
    if errors:
        error, change = torch.tensor(errors).norm(dim=0).tolist()
        warnings.warn(
            f"rounding {len(errors)} merged weights to 4 bits again: the error is"
            f" {error / change:.0%} of the size of the adapter's change",
            stacklevel=stacklevel,
        )


def update_tie(model):
    """Merging into one of two tied embeddings ends the tie: say so in the config."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    head = model.get_output_embeddings()
    if head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        config.tie_word_embeddings = tied
