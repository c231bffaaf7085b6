"""Floor 3: Hugging Face PEFT's files, both ways: adapter_config.json and
adapter_model.safetensors, never a pickle.

A tensor's key is "base_model.model." + the module's path + the tensor's name in its
adapter, without the adapter's own name: that is chosen anew on loading.
"""

import json
import os
from pathlib import Path

import torch

from . import targets
from .config import CONFIG, AdapterFileError, PeftConfig

TENSORS = "adapter_model.safetensors"


def key(path, name):
    """`path` is None for what all slots share. Adapters around the whole model, at path
    "", have bare keys."""
    return (
        f"base_model.{name}"
        if path is None
        else f"base_model.model.{path}.{name}"
        if path
        else name
    )


def tensors(parts):
    """{key: tensor} of {path: adapter}."""
    return {
        key(path, name): tensor
        for path, part in parts.items()
        for name, tensor in getattr(part, "to_file", part.state_dict)().items()
    }


def fill(parts, found):
    """Give {path: adapter} the values of {key: tensor}: all of them, or
    AdapterFileError and none."""
    check(tensors(parts), found)
    for path, part in parts.items():
        names = getattr(part, "to_file", part.state_dict)()
        getattr(part, "from_file", part.load_state_dict)(
            {name: found[key(path, name)] for name in names}
        )


def adapter(folder, model, is_trainable):
    """The config in a folder, ready for `model`, and the function that fills {path:
    adapter} with what is there."""
    config, found = load(folder)
    config.on_load()
    config.inference_mode = not is_trainable
    config.drop_missing_targets(model)
    modules = {
        key(path, ""): targets.unwrap_slot(module)
        for path, _, _, module in targets.walk(model)
    }
    # PEFT saves adapted embeddings with their base
    for name in [name for name in found if ".base_layer." in name]:
        before, _, tensor = name.partition("base_layer.")
        own = getattr(modules.get(before), tensor, None)
        if own is None or not torch.equal(own, found.pop(name).to(own)):
            raise AdapterFileError(
                f"{name}: this adapter belongs to a model with another base weight"
                " there"
            )
    return config, lambda parts: fill(parts, found)


def save(folder, config, tensors):
    """Write both files beside their places, then move them in: a reader never sees half
    of one."""
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.is_file():
        raise AdapterFileError(f"{folder} is a file; a folder is expected")
    folder.mkdir(parents=True, exist_ok=True)
    # Contiguous copies on the CPU: safetensors takes no tensor that shares its memory
    # with another.
    save_file(
        {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()},
        folder / f".{TENSORS}",
        metadata={"format": "pt"},
    )
    (folder / f".{CONFIG}").write_text(
        json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    )
    os.replace(folder / f".{TENSORS}", folder / TENSORS)
    os.replace(folder / f".{CONFIG}", folder / CONFIG)


def load(folder):
    """(config, {key: tensor}). AdapterFileError or ConfigError says what is wrong with
    the files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = find(folder)
    config = PeftConfig.from_pretrained(folder)
    if not (folder / TENSORS).exists():
        old = (
            " There is an adapter_model.bin, a pickle, which is not opened: convert it"
            " to safetensors with Hugging Face PEFT's save_pretrained."
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise AdapterFileError(f"{folder} has no {TENSORS}.{old}")
    try:
        return config, load_file(folder / TENSORS)
    except SafetensorError as error:
        raise AdapterFileError(
            f"{folder / TENSORS} is damaged or cut short ({error}): copy it again"
        ) from None


def find(folder):
    """The folder itself, or a local copy of the adapter of that name on the Hugging
    Face hub."""
    path = Path(folder)
    if (path / CONFIG).exists():
        return path
    if path.is_dir():
        inside = ", ".join(sorted(p.parent.name for p in path.glob(f"*/{CONFIG}")))
        raise AdapterFileError(
            f"{path} has no {CONFIG}"
            + (f"; folders in it that do: {inside}" if inside else "")
        )
    if str(folder).count("/") != 1 or path.is_absolute():
        raise AdapterFileError(f"there is no folder {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), allow_patterns=[CONFIG, TENSORS]))
    except Exception as error:
        raise AdapterFileError(
            f"there is no folder {path}, and the hub gave none of that name: {error}"
        ) from None


def check(expected, found):
    """AdapterFileError that lists every tensor that is missing, unexpected or of
    another shape."""
    wrong = [
        f"  missing     {k}  {tuple(expected[k].shape)}"
        for k in expected
        if k not in found
    ]
    wrong += [
        f"  unexpected  {k}  {tuple(found[k].shape)}"
        for k in found
        if k not in expected
    ]
    wrong += [
        f"  shape       {k}  {tuple(found[k].shape)}, the model has"
        f" {tuple(expected[k].shape)}"
        for k in expected
        if k in found and expected[k].shape != found[k].shape
    ]
    if wrong:
        prefix = (
            ""
            if not found or expected.keys() & found.keys()
            else (
                f" No key fits: this one's begin like {next(iter(found))!r}, expected"
                f" is {next(iter(expected))!r}."
            )
        )
        raise AdapterFileError(
            f"the adapter does not fit this model; nothing was loaded.{prefix}\n"
            + "\n".join(wrong)
        )
