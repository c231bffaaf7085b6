"""Checkpoints of a training run: one safetensors file, written beside its place and
renamed, so there is always a whole one.

Its tensors are the trained weights ("model.*"), the optimizer's state ("optimizer.*"),
that of what runs after each step ("after.*"), and the random state ("rng.*"; of several
processes, a row each). Everything else is JSON in its header. No pickle: opening a
checkpoint never runs code.
"""

import json
from pathlib import Path

import torch

from ..errors import FileError
from ..io import (
    open_safetensors,
    parse_json,
    read_safetensors,
    whole,
    with_prefix,
    write_safetensors,
)
from ..quant.optimizers import load_uncast
from .distributed import is_first, like, my_row, stacked


def trained_tensors(model):
    """Name -> tensor: all that requires a gradient, and the buffers beside it (running
    statistics)."""
    found = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = {
            prefix + name: p
            for name, p in module._parameters.items()
            if p is not None and p.requires_grad
        }
        found |= own
        for name, buffer in module._buffers.items() if own else ():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[prefix + name] = buffer
    return found


def drop_shared(tensors):
    """safetensors refuses shared memory: the first name of each tensor alone (a tied
    head is its embedding). Sharded ones whole."""
    seen = {}
    return {
        name: whole(t.detach()).contiguous()
        for name, t in tensors.items()
        if seen.setdefault(id(t), name) == name
    }


def save_checkpoint(path, model, optimizer=None, after_step=None, **metadata):
    """Write the trained weights to `path`; with an optimizer also its state and the
    random state. after_step: see train. metadata: any JSON. All processes call it; the
    first one writes."""
    weights = drop_shared(trained_tensors(model))
    tensors = {f"model.{name}": t for name, t in weights.items()}
    if after_step is not None:
        state = after_step.state_dict()
        tensors |= {f"after.{name}": t.contiguous() for name, t in state.items()}
    if optimizer is not None:
        # torch's own: bitsandbytes' nests its state
        state = torch.optim.Optimizer.state_dict(optimizer)
        scalars = {}
        for i, values in state["state"].items():
            for name, value in values.items():
                if torch.is_tensor(value):
                    value = whole(value.detach())
                    tensors[f"optimizer.{i}.{name}"] = value.contiguous()
                else:
                    scalars[f"{i}.{name}"] = value
        groups = state["param_groups"]
        metadata["optimizer"] = {"scalars": scalars, "groups": groups}
        tensors["rng.cpu"] = stacked(torch.get_rng_state())
        if (kind := next(model.parameters()).device.type) in ("cuda", "mps"):
            tensors["rng.device"] = stacked(getattr(torch, kind).get_rng_state())
    if not is_first():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, {"minipeft": json.dumps(metadata)})


def read_metadata(path):
    """What stands beside the tensors: settings and history. FileError where `path` is
    not a whole checkpoint."""
    with open_safetensors(path) as file:
        return parse_metadata(path, file.metadata() or {})


def parse_metadata(path, header):
    if "minipeft" not in header:
        raise FileError(f"{path} is not a checkpoint of minipeft")
    return parse_json(header["minipeft"], f"the header of {path}")


def load_checkpoint(path, model, optimizer=None, after_step=None):
    """Put what `path` holds into `model` (also into the optimizer, with the random
    state, where it is given); returns the metadata. after_step: see train; it takes its
    state, and a file that holds one needs it."""
    saved, header = read_safetensors(path)
    metadata = parse_metadata(path, header)
    found = with_prefix(saved, "model.")
    check_fits(path, found, drop_shared(trained_tensors(model)))
    after = with_prefix(saved, "after.")
    if after_step is not None:
        after_step.load_state_dict(after)
    elif after:
        raise ValueError(
            f"{path} holds the state of an after_step ({min(after)}, ...): pass the one"
            " that it was trained with, such as after_step=RankAllocator(model)"
        )
    for name, tensor in trained_tensors(model).items():
        if name in found:
            tensor.detach().copy_(like(found[name], tensor))
    if optimizer is not None:
        state = optimizer_state(saved, metadata["optimizer"])
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, values in state["state"].items():
            for name, value in values.items():
                if torch.is_tensor(value):
                    values[name] = like(value, params[i])
        load_uncast(optimizer, state)
        torch.set_rng_state(my_row(saved["rng.cpu"]))
        if "rng.device" in saved:
            device = next(model.parameters()).device.type
            getattr(torch, device).set_rng_state(my_row(saved["rng.device"]))
    return metadata


def check_fits(path, found, expected):
    """ValueError that lists every tensor of the file that the model does not train, and
    the reverse."""

    def shape(tensors, name, absent):
        return list(tensors[name].shape) if name in tensors else absent

    wrong = []
    for name in sorted(found.keys() | expected.keys()):
        there = shape(found, name, "absent")
        here = shape(expected, name, "not trained")
        if there != here:
            wrong.append(f"{name}: {there} in the file, {here} in the model")
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(f"{path} belongs to another model or adapter:\n  {listed}")


def optimizer_state(saved, metadata):
    """The state_dict of an optimizer: tensors from the file, the rest from its
    header."""
    values = with_prefix(saved, "optimizer.") | metadata["scalars"]
    state = {}
    for key, value in values.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    groups = metadata["groups"]
    for group in groups:  # JSON has no tuples
        lists = [k for k, v in group.items() if isinstance(v, list) and k != "params"]
        group |= {k: tuple(group[k]) for k in lists}
    return {"state": state, "param_groups": groups}
