"""What stands where in a model: the records of Hugging Face PEFT's get_layer_status and
get_model_status."""

from dataclasses import dataclass

from . import weights
from .errors import TargetError
from .slot import find_slots


@dataclass
class LayerStatus:
    """One layer with adapters. A value that differs within an adapter is
    "irregular"."""

    name: str
    module_type: str  # the adapters' classes and the layer's
    enabled: bool
    active_adapters: list
    merged_adapters: list
    requires_grad: dict  # {adapter: True, False or "irregular"}
    available_adapters: list
    devices: dict  # {adapter: its devices}
    quantization_backend: str | None


@dataclass
class ModelStatus:
    """The whole model; see LayerStatus."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list
    merged_adapters: list
    requires_grad: dict
    available_adapters: list
    devices: dict
    quantization_backend: str | None


def common(values):
    """The one value that all have, or "irregular"."""
    values = list(values)
    same = all(value == values[0] for value in values)
    return values[0] if same else "irregular"


def quantization_backend(layer):
    if weights.storage(layer) is None or weights.is_dense(layer):
        return None
    foreign = type(layer).__module__.startswith("bitsandbytes")
    return "bnb 4bit" if foreign else "minipeft 4bit"


def layer_status(path, slot):
    adapters = slot.adapters.items()
    kinds = {type(adapter).__name__ for _, adapter in adapters}
    layer = slot.base_layer
    return LayerStatus(
        name=f"model.{path}" if path else "model",
        module_type=f"{'+'.join(sorted(kinds))}.{type(layer).__name__}",
        enabled=slot.active.enabled,
        active_adapters=list(slot.active.names),
        merged_adapters=list(slot.merged),
        requires_grad={
            name: common(p.requires_grad for p in adapter.parameters())
            for name, adapter in adapters
        },
        available_adapters=sorted(slot.adapters),
        devices={
            name: sorted({p.device.type for p in adapter.parameters()})
            for name, adapter in adapters
        },
        quantization_backend=quantization_backend(layer),
    )


def get_layer_status(model):
    """[LayerStatus] of each layer with adapters, in the order of the model. Takes a
    PeftModel, or a model that inject_adapter_in_model has changed."""
    root = getattr(model, "base_model", model)
    slots = find_slots(root if hasattr(model, "peft_config") else model)
    found = [layer_status(path, s) for path, s in slots.items() if s.adapters]
    if not found:
        raise TargetError(f"this {type(model).__name__} has no adapters")
    return found


def union(lists):
    """The different values of several lists, sorted."""
    return sorted({value for each in lists for value in each})


def merge_dicts(dicts, combine):
    """{key: combine(all values of the key)}"""
    keys = sorted({key for each in dicts for key in each})
    return {key: combine([each[key] for each in dicts if key in each]) for key in keys}


def get_model_status(model):
    """ModelStatus of a PeftModel."""
    layers = get_layer_status(model)
    trainable, total = model.get_nb_trainable_parameters()
    merged = union(layer.merged_adapters for layer in layers)
    partly = any(
        set(merged) & set(layer.available_adapters) - set(layer.merged_adapters)
        for layer in layers
    )
    return ModelStatus(
        base_model_type=type(model.get_base_model()).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: c.peft_type for name, c in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=common(layer.enabled for layer in layers),
        active_adapters=common(layer.active_adapters for layer in layers),
        merged_adapters="irregular" if partly else merged,
        requires_grad=merge_dicts([layer.requires_grad for layer in layers], common),
        available_adapters=union(layer.available_adapters for layer in layers),
        devices=merge_dicts([layer.devices for layer in layers], union),
        quantization_backend=common(layer.quantization_backend for layer in layers),
    )
