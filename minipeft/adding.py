"""Adding an adapter to a PeftModel: all of it is created, then all of it is put in; or
nothing happens."""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from . import merging, targets
from .config import as_config, check_for_json
from .errors import ConfigError, TargetError
from .io import brief, progress
from .methods import lora_init
from .methods.adalora import AdaLoraConfig
from .methods.modules_to_save import ModuleCopy
from .slot import Adapter, AdapterNameError, Base, Slot
from .weights import device_and_dtype


def check_new_name(model, name):
    """Adapters' names become names of modules and of folders."""
    if not isinstance(name, str) or not name or hasattr(nn.ModuleDict(), name):
        impossible = True
    else:
        impossible = name == "__base__" or not {".", "/", "\\", "\0"}.isdisjoint(name)
    if impossible:
        raise AdapterNameError(
            f"{brief(name)} cannot name an adapter: expected a string without dots"
            " and slashes, which is neither '__base__' nor the name of a method or"
            " attribute of torch's ModuleDict"
        )
    if name in model.peft_config:
        raise AdapterNameError(
            f"there is an adapter {name!r} already; delete it first, or take"
            " another name"
        )


@contextmanager
def adding(model, name, config, autocast_adapter_dtype=True):
    """Create adapter `name` and yield {path: adapter}; what they share has the path
    None. When the block ends it is put in, frozen and inactive; when it fails the
    model is as before."""
    check_new_name(model, name)
    config = as_config(config)
    check_for_json(config)
    config = config.resolve(model.get_base_model())
    if not config.base_model_name_or_path:
        base_name = getattr(model.get_base_model(), "name_or_path", None)
        config.base_model_name_or_path = base_name or None
    if model.peft_config and lora_init.changes_base(config):
        raise ConfigError(
            f"{config.init_lora_weights!r} changes the base, on which"
            f" {', '.join(model.peft_config)} stand: make it on a model without"
            " adapters, or load it converted to a plain LoRA"
        )
    with merging.unmerged(model):  # a start may read the base's weights
        sites = sites_of(model.base_model)
        slots, copied = slots_for(model, config, sites)
        bases = {p: Base(slots[p], name, lossy=True) for p in slots if p not in copied}
        before = [(b.module, dict(b.module._parameters)) for b in bases.values()]
        try:
            adapters = create(model, config, bases, autocast_adapter_dtype)
            for path in copied:
                adapters[path] = ModuleCopy(slots[path].base_layer)
            yield adapters
        except BaseException:  # an initialisation may have changed weights
            for module, parameters in before:
                module._parameters.update(parameters)
            raise
        for adapter in adapters.values():
            adapter.requires_grad_(False)
        put_in(model, name, adapters, slots, sites)
        model.peft_config[name] = config.noted(adapters.values())
    if isinstance(config, AdaLoraConfig):  # PEFT's scripts call it there
        model.base_model.update_and_allocate = model.update_and_allocate


def sites_of(root):
    """{path: (the module or slot there, a function that replaces it)}"""
    return {"": (root, None)} | {
        path: (module, partial(setattr, parent, name))
        for path, parent, name, module in targets.walk(root)
    }


def put_in(model, name, adapters, slots, sites):
    shared = adapters.get(None)
    if shared is not None:
        model.shared[name] = shared
    for path, slot in slots.items():
        slot.training = slot.base_layer.training
        slot.adapters[name] = adapters[path].train(slot.training)
        if shared is not None:
            slot.shared[name] = shared
        module, replace = sites[path]
        if slot is not module:
            replace(slot)


def slots_for(model, config, sites):
    """({path: the slot there, or a new one}, the paths of modules_to_save)"""
    selected = config.select(model.get_base_model())
    copied = config.copied_modules(sites)
    slots = {}
    for path in [*selected, *copied]:
        module, _ = sites[path]
        if not isinstance(module, Slot):
            module = Slot(module, model.base_model.active)
        slots[path] = module
    check_places(model.base_model, {p: slot for p, slot in slots.items() if p})
    for path in copied:
        inside = slots[path].base_layer.modules()
        if any(isinstance(module, Slot) for module in inside):
            raise TargetError(f"modules_to_save: {path} holds adapters")
    return slots, copied


def check_places(root, slots):
    """Raise TargetError for a layer that also stands elsewhere in the model, where it
    would have no adapter, or whose weight is read without a call."""
    parents = targets.parents_of(root)
    read = targets.only_read(targets.modules_by_path(root))
    for path, slot in slots.items():
        layer = slot.base_layer
        if path in read:
            raise TargetError(
                f"{path}: Mamba reads the weight of this {type(layer).__name__} and"
                " does not call it, so an adapter has no effect. Leave it out"
            )
        holders = [p for p in parents.get(id(layer), ()) if p is not slot]
        targets.check_one_place(path, layer, holders, "would have an adapter")
        fast = torch.backends.mha.get_fastpath_enabled()
        if fast and any(isinstance(p, nn.TransformerEncoderLayer) for p in holders):
            raise TargetError(
                f"{path}: in eval mode torch's TransformerEncoderLayer reads the weight"
                f" of this {type(layer).__name__} and does not call it, so an adapter"
                " has no effect. Call torch.backends.mha.set_fastpath_enabled(False)"
                " first"
            )


def create(model, config, bases, autocast_adapter_dtype):
    """{path: a new adapter}; what they share has the path None."""
    adapters = {}
    of_base = storages(
        (name, tensor)
        for module in targets.bare_modules(model.base_model)
        for name, tensor in own_tensors(module, recurse=False)
    )
    shared = config.create_shared(bases)
    if shared is not None:
        check_apart(shared, of_base)
        first = next(iter(bases.values())).module
        adapters[None] = shared.to(*device_and_dtype(first, autocast_adapter_dtype))
    for path, base in progress(list(bases.items()), "making adapters"):
        like = device_and_dtype(base.module, autocast_adapter_dtype)
        where = f"{path}: " if path else ""  # "" is the whole model
        try:
            adapter = config.create(base, path)
        except TargetError as error:
            raise TargetError(f"{where}{error}") from None
        if not isinstance(adapter, Adapter):
            missing = " (does it end without a return?)" * (adapter is None)
            raise ConfigError(
                f"{where}{type(config).__name__}.create returns {brief(adapter)}"
                f"{missing}: expected an Adapter"
            )
        check_apart(adapter, of_base, where)
        adapters[path] = adapter.to(*like)
    return adapters


def own_tensors(module, recurse=True):
    """(name, tensor) of a module's parameters and buffers."""
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


def storages(tensors):
    """{what tensors that share their memory have in common: a name} of (name, tensor).
    Sparse ones have no such thing."""
    return {
        tensor.untyped_storage()._cdata: name
        for name, tensor in tensors
        if tensor.layout is torch.strided
    }


def check_apart(adapter, of_base, where=""):
    """Raise ConfigError where a tensor of an adapter, or of what adapters share, is the
    base's. of_base: the storages of the base's tensors."""
    own = storages(own_tensors(adapter))
    if both := [name for storage, name in own.items() if storage in of_base]:
        raise ConfigError(
            f"{where}{both[0]} of this {type(adapter).__name__} is the base's, which"
            " would be trained and saved with the adapter. Keep the layer where torch"
            " does not register it (self.layer = [base.module]), or take it in"
            " forward(base, x): base.module, base.weight"
        )
