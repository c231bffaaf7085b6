"""Checkpoints of a training run: ONE safetensors file, written beside and renamed, so
that there is always a whole one.

Its tensors are the trained weights ("model.*"), the optimizer's state ("optimizer.*")
and the random state ("rng.*"). What is no tensor stands as JSON in its header. No
pickle: opening a checkpoint never runs code.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def trained_tensors(model):
    """Name -> tensor: all that requires a gradient, and the buffers that stand beside
    it (running statistics)."""
    found = {}
    for prefix, module in model.named_modules():
        own = {
            f"{prefix}.{name}" if prefix else name: p
            for name, p in module._parameters.items()
            if p is not None and p.requires_grad
        }
        if own:
            skip = module._non_persistent_buffers_set
            own |= {
                f"{prefix}.{name}" if prefix else name: b
                for name, b in module._buffers.items()
                if b is not None and name not in skip
            }
        found |= own
    return found


def unshared(tensors):
    """safetensors refuses shared memory: keep the first name of each tensor (a tied
    head is its embedding)."""
    seen = {}
    return {
        name: t.detach().contiguous()
        for name, t in tensors.items()
        if seen.setdefault(id(t), name) == name
    }


def save_checkpoint(path, model, optimizer=None, **facts):
    """Write the trained weights to `path`; with an optimizer also its state and the
    random state. `facts`: any JSON."""
    tensors = {
        f"model.{name}": t for name, t in unshared(trained_tensors(model)).items()
    }
    if optimizer is not None:
        scalars = {}
        for i, p in enumerate(
            p for group in optimizer.param_groups for p in group["params"]
        ):
            for name, value in optimizer.state.get(p, {}).items():
                kept, key = (
                    (tensors, "optimizer.") if torch.is_tensor(value) else (scalars, "")
                )
                kept[f"{key}{i}.{name}"] = (
                    value.detach().contiguous() if torch.is_tensor(value) else value
                )
        facts["optimizer"] = {
            "scalars": scalars,
            "groups": [
                {k: v for k, v in group.items() if k != "params"}
                for group in optimizer.param_groups
            ],
        }
        tensors["rng.cpu"] = torch.get_rng_state()
        if (kind := next(model.parameters()).device.type) in ("cuda", "mps"):
            tensors["rng.device"] = getattr(torch, kind).get_rng_state()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    save_file(tensors, beside, {"minipeft": json.dumps(facts)})
    os.replace(beside, path)


def read_facts(path):
    """What is saved beside the tensors: settings and history."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["minipeft"])


def load_checkpoint(path, model, optimizer=None):
    """Put what `path` holds into `model` (with an optimizer: also into that, and the
    random state); returns the facts."""
    facts, saved = read_facts(path), load_file(path)
    mine = unshared(trained_tensors(model))
    theirs = {
        name.removeprefix("model."): t
        for name, t in saved.items()
        if name.startswith("model.")
    }
    wrong = [
        f"{name}: {list(theirs[name].shape) if name in theirs else 'absent'} in the"
        f" file, {list(mine[name].shape) if name in mine else 'not trained'} in the"
        " model"
        for name in sorted(mine.keys() | theirs.keys())
        if name not in mine
        or name not in theirs
        or mine[name].shape != theirs[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{path} belongs to another model or adapter:\n  " + "\n  ".join(wrong)
        )
    for name, tensor in trained_tensors(model).items():
        if name in theirs:
            tensor.detach().copy_(theirs[name])
    if optimizer is not None:
        params = [
            (p, group) for group in optimizer.param_groups for p in group["params"]
        ]
        optimizer.state.clear()
        for name, value in [
            (n.removeprefix("optimizer."), t)
            for n, t in saved.items()
            if n.startswith("optimizer.")
        ] + list(facts["optimizer"]["scalars"].items()):
            i, key = name.split(".", 1)
            p, group = params[int(i)]
            if torch.is_tensor(value) and (
                key != "step" or group.get("fused") or group.get("capturable")
            ):
                # not load_state_dict: it would cast 8-bit states to the weight's dtype
                value = value.to(p.device)
            optimizer.state[p][key] = value
        for group, kept in zip(
            optimizer.param_groups, facts["optimizer"]["groups"], strict=True
        ):
            group.update(
                {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
            )
        torch.set_rng_state(saved["rng.cpu"])
        if "rng.device" in saved:
            getattr(torch, next(model.parameters()).device.type).set_rng_state(
                saved["rng.device"]
            )
    return facts
