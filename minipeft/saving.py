"""Hugging Face PEFT's files, both ways: adapter_config.json and
adapter_model.safetensors, never a pickle.

A tensor's key is "base_model.model." + the module's path + the tensor's name in its
adapter. The adapter's own name is not in it: it is chosen again on loading.
"""

import copy
import inspect
import json
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch

from . import io, targets
from .config import CONFIG, PeftConfig, as_config, resolve_folder
from .errors import AdapterFileError, ConfigError
from .io import whole
from .methods.lora_conversion import as_lora
from .methods.lora_init import changes_base
from .methods.virtual import LearnedEmbeddings
from .model_card import CARD, model_card, updated_card
from .slot import Adapter, AdapterNameError

TENSORS = "adapter_model.safetensors"
# what adapters' files hold: 8-bit floats mean nothing without their scales
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ---- tensors of adapters -------------------------------------------------------------


def tensor_key(path, name):
    """`path` is None for what all slots share. Adapters around the whole model, at path
    "", have bare keys."""
    if path is None:
        return f"base_model.{name}"
    return f"base_model.model.{path}.{name}" if path else name


def tensors_to_file(part):
    """{name: tensor} of an adapter, or of a module that adapters share."""
    return part.to_file() if isinstance(part, Adapter) else part.state_dict()


def adapter_state_dict(adapters):
    """{key: tensor} of {path: adapter}."""
    return {
        tensor_key(path, name): tensor
        for path, part in adapters.items()
        for name, tensor in tensors_to_file(part).items()
    }


def load_tensors(adapters, found):
    """Give {path: adapter} the values of {key: tensor}: all of them, or
    AdapterFileError and none."""
    check_tensors(adapter_state_dict(adapters), found)
    for path, part in adapters.items():
        load = part.from_file if isinstance(part, Adapter) else part.load_state_dict
        names = tensors_to_file(part)
        load({name: found[tensor_key(path, name)] for name in names})


def check_tensors(expected, found):
    """Raise AdapterFileError with every tensor that is missing, unexpected, of another
    shape, or without a finite number for each weight."""
    wrong = [
        f"  missing     {key}  {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key not in found
    ]
    for key, tensor in found.items():
        shape = tuple(tensor.shape)
        if key not in expected:
            wrong.append(f"  unexpected  {key}  {shape}")
        elif shape != tuple(expected[key].shape):
            here = tuple(expected[key].shape)
            wrong.append(f"  shape       {key}  {shape}, the model has {here}")
        elif not expected[key].is_floating_point():  # a buffer that counts
            if tensor.dtype != expected[key].dtype:
                there = expected[key].dtype
                wrong.append(f"  type        {key}  {tensor.dtype}, expected {there}")
        elif tensor.dtype not in FLOATS:
            wrong.append(f"  type        {key}  {tensor.dtype}, expected floats")
        elif not tensor.to(expected[key].dtype).isfinite().all():
            wrong.append(f"  not finite  {key}  {shape}, as {expected[key].dtype}")
    if wrong:
        prefix = ""
        if found and not expected.keys() & found.keys():
            prefix = (
                f" No key fits: this one's begin like {next(iter(found))!r}, expected"
                f" {next(iter(expected))!r}."
            )
        raise AdapterFileError(
            f"the adapter does not fit this model; nothing was loaded.{prefix}\n"
            + "\n".join(wrong)
        )


# ---- writing -------------------------------------------------------------------------


def save(folder, config, tensors):
    """Write both files, and a model card where there is none of somebody's own. Files
    are written beside their places and then renamed: a reader never sees half of one.
    Raises AdapterFileError where that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not config.peft_type:
        kind = type(config).__name__
        raise AdapterFileError(
            f"{kind} has no peft_type, by which a loader would find it again. Give the"
            f" class one, here {kind}.peft_type = 'MY_METHOD', and save again"
        )
    folder = io.make_folder(folder, AdapterFileError)
    # Contiguous copies on the CPU: safetensors takes no two tensors that share memory.
    tensors = {
        key: tensor.detach().cpu().clone().contiguous()
        for key, tensor in tensors.items()
    }
    card = model_card(config, tensors, folder)

    def new(name):
        return io.replacing(folder / name)

    try:
        with ExitStack() as files:  # all are whole before the first is renamed
            text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
            files.enter_context(new(CONFIG)).write_text(text, encoding="utf-8")
            save_file(tensors, files.enter_context(new(TENSORS)), {"format": "pt"})
            if card:
                files.enter_context(new(CARD)).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"cannot write into {folder}: {error}") from None


def warn_of_changed_base(name, config):
    if changes_base(config):
        warnings.warn(
            f"{name!r} began as {config.init_lora_weights!r}, which changed the base:"
            " what is saved fits only a base that was changed likewise. For a plain"
            " LoRA, which fits the base from before, give"
            " path_initial_model_for_weight_conversion",
            stacklevel=3,
        )


def push_to_hub(model, repo_id, commit_message, private, token, **more):
    """See PeftModel.push_to_hub."""
    from huggingface_hub import HfApi

    saved = inspect.signature(model.save_pretrained).parameters
    with tempfile.TemporaryDirectory() as folder:
        options = {name: more.pop(name) for name in saved.keys() & more.keys()}
        model.save_pretrained(folder, **options)
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            **more,
        )


def write_card(folder, config, tensors):
    """Write only the model card. Of one that somebody else has written, the text stays,
    and its metadata learns of the adapter."""
    folder = io.make_folder(folder, AdapterFileError)
    card = model_card(config, tensors, folder) or updated_card(config, folder)
    io.write_text(folder / CARD, card)


def file_content(model, name, initial=None, state_dict=None, embeddings="auto"):
    """(configuration, {key: tensor}): what is saved of adapter `name` of a PeftModel.

    initial: the folder of the adapter before training; see PeftModel.save_pretrained.
    state_dict: the model's, with values to be saved in place of the model's own.
    """
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    adapters = model._adapters_by_path(name)
    if state_dict is not None:
        adapters = filled_copies(model, adapters, state_dict)
    tensors = {k: whole(t) for k, t in adapter_state_dict(adapters).items()}
    if initial is not None:
        config, tensors = as_lora(config, tensors, load(initial)[1])
    for path in embeddings_to_save(model, config, embeddings):
        module = targets.modules_by_path(model.base_model)[path]
        slotted = "base_layer." if is_slotted(model, path) else ""
        for tensor_name, tensor in module.state_dict().items():
            key = tensor_key(path, slotted + tensor_name)
            tensors.setdefault(key, whole(tensor))
    return config, tensors


def filled_copies(model, adapters, state_dict):
    """Copies of {path: adapter} with the values of the whole model's state_dict."""
    prefix = {id(module): f"{name}." for name, module in model.named_modules()}
    copies = {}
    for path, part in adapters.items():
        start = prefix[id(part)]
        own = io.with_prefix(state_dict, start)
        missing = part.state_dict().keys() - own.keys()
        if missing:
            raise AdapterFileError(
                f"state_dict has no {start}{sorted(missing)[0]}: expected the"
                " state_dict of the whole PeftModel"
            )
        copies[path] = copy.deepcopy(part)
        copies[path].load_state_dict({key: whole(own[key]) for key in own})
    return copies


# ---- embeddings ----------------------------------------------------------------------


def embedding_paths(model):
    """The paths of a base model's input and output embeddings."""
    modules = targets.modules_by_path(model).items()
    return [
        path
        for embedding in targets.embeddings(model)
        for path, module in modules
        if module is embedding
    ]


def is_slotted(model, path):
    return path in model._slots()


def embeddings_to_save(model, config, choice="auto"):
    """The paths of embeddings that are saved whole beside the adapter. "auto": both,
    where the vocabulary is not as large as that of base_model_name_or_path, a
    folder."""
    if choice not in (True, False, "auto"):
        raise ConfigError(
            f"save_embedding_layers = {io.brief(choice)}: expected True, False or"
            " 'auto'"
        )
    base = model.get_base_model()
    if choice == "auto":
        file = Path(config.base_model_name_or_path or "") / "config.json"
        size = getattr(getattr(base, "config", None), "vocab_size", None)
        choice = size is not None and file.is_file()
        if choice:
            before = io.read_json(file, dict, AdapterFileError).get("vocab_size", size)
            choice = before != size
    return embedding_paths(base) if choice else []


# ---- reading -------------------------------------------------------------------------


def load(folder, config=None, **more):
    """(configuration, {key: tensor}) of an adapter's folder. more: see hub_arguments.
    Raises AdapterFileError or ConfigError, which say what is wrong with the files."""
    folder = resolve_folder(folder, [CONFIG, TENSORS], **hub_arguments(more))
    if config is None:
        config = PeftConfig.from_pretrained(folder)
    if not (folder / TENSORS).exists():
        pickle = ""
        if (folder / "adapter_model.bin").exists():
            pickle = (
                " There is an adapter_model.bin, a pickle, which is not opened: convert"
                " it to safetensors with Hugging Face PEFT's save_pretrained."
            )
        raise AdapterFileError(f"{folder} has no {TENSORS}.{pickle}")
    return config, io.read_safetensors(folder / TENSORS, AdapterFileError)[0]


def prepare_load(folder, model, is_trainable=False, config=None, **more):
    """(configuration, {key: tensor}, new rows of embeddings) of an adapter's folder,
    made to fit the base `model`. config: used in place of the folder's. New rows: see
    drop_base_weights."""
    config = None if config is None else copy.deepcopy(as_config(config))
    config, tensors = load(folder, config, **more)
    config.from_checkpoint = True
    config.on_load()
    config.inference_mode = not is_trainable
    config.drop_missing_targets(model)
    rows = drop_base_weights(tensors, model)
    if getattr(config, "modules_to_save", None):
        drop_second_names(tensors)
    add_saved_embeddings(config, tensors, model)
    return config, tensors, rows


# fields of a configuration that say nothing about the adapter's tensors
NOT_COMPARED = {"base_model_name_or_path", "revision", "inference_mode", "task_type"}


def check_same_config(name, here, found):
    """Raise AdapterNameError where the configuration of adapter `name` is not the one
    found in a file."""
    here, found = here.to_dict(), found.to_dict()
    for field in sorted((found.keys() | here.keys()) - NOT_COMPARED):
        if found.get(field) != here.get(field):
            raise AdapterNameError(
                f"there is an adapter {name!r} already, with {field} ="
                f" {io.brief(here.get(field))}, in the file"
                f" {io.brief(found.get(field))}: delete it first, or take another name"
            )


def check_no_encoder(name, adapters):
    """Raise AdapterFileError where an adapter is computed by an encoder: its training
    cannot go on from a file."""
    prompts = [p for p in adapters.values() if isinstance(p, LearnedEmbeddings)]
    if any(prompt.encoder is not None for prompt in prompts):
        raise AdapterFileError(
            f"{name!r} trains an encoder of its virtual tokens, and the encoder is not"
            " in the file, so this training cannot go on from it. Train the file's"
            " virtual tokens themselves, in a new optimizer: call"
            " PeftModel.from_pretrained(base, ..., is_trainable=True)"
        )


def drop_base_weights(tensors, model):
    """PEFT saves adapted embeddings with their base, which this model has already, but
    for the rows of tokens that were added to it. Returns what of these differs:
    [(the model's weight, the number of the first such row, the saved rows)]."""
    modules = {tensor_key(p, ""): m for p, m in targets.modules_by_path(model).items()}
    embeddings = {tensor_key(path, "") for path in embedding_paths(model)}
    rows = []
    for key in [key for key in tensors if ".base_layer." in key]:
        before, _, name = key.partition("base_layer.")
        here = getattr(modules.get(before), name, None)
        saved = tensors.pop(key)
        first = first_other_row(key, here, saved, before in embeddings)
        if first is not None:
            rows.append((here, first, saved[first:]))
    return rows


def first_other_row(key, here, saved, is_embedding):
    """The number of the first row in which a saved base weight is not the model's, or
    None. Raises AdapterFileError where that cannot be a row added to an embedding."""
    other_base = AdapterFileError(
        f"{key}: this adapter belongs to a model with another base weight there"
    )
    there = torch.is_tensor(here)  # and no method that is called so
    if not there or (here.shape != saved.shape and not is_embedding):
        raise other_base
    if here.shape != saved.shape:
        raise AdapterFileError(other_vocabulary(key, saved, here))
    other = here.detach().cpu() != saved.to("cpu", here.dtype)
    other = other.reshape(len(other), -1).any(1)  # of a weight or of a bias
    if not other.any():
        return None
    first = int(other.int().argmax())
    if first == 0 or not is_embedding or not saved.isfinite().all():
        raise other_base
    return first


def write_rows(rows):
    """Give the base the rows that drop_base_weights found, as PEFT does."""
    with torch.no_grad():
        for weight, first, saved in rows:
            weight[first:] = saved.to(weight)


def drop_second_names(tensors):
    """PEFT writes an embedding of modules_to_save under two more names, where it saves
    embeddings."""
    for key in list(tensors):
        if ".modules_to_save." in key:
            plain = key.replace(".modules_to_save.", ".")
            tensors[plain] = tensors.pop(key)
        elif ".original_module." in key:
            del tensors[key]


def other_vocabulary(key, saved, here):
    if saved.shape[1:] != here.shape[1:] or not saved.dim():
        found, expected = tuple(saved.shape), tuple(here.shape)
        return f"{key} {found}, expected the shape of the model's embedding, {expected}"
    return (
        f"{key} has {len(saved)} rows, the model's vocabulary {len(here)}: call"
        f" model.resize_token_embeddings({len(saved)}) before loading"
    )


def add_saved_embeddings(config, tensors, model):
    """PEFT saves whole embeddings where the vocabulary was resized. Where they are not
    the model's own, they become modules_to_save."""
    modules = targets.modules_by_path(model)
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    for path in embedding_paths(model):
        key = tensor_key(path, "weight")
        if key not in tensors or path.endswith(saved):
            continue
        here, there = modules[path].weight, tensors[key]
        if here.shape != there.shape:
            raise AdapterFileError(other_vocabulary(key, there, here))
        if same(here, there):
            del tensors[key]
        else:
            config.modules_to_save = sorted({*saved, path})
            saved = tuple(config.modules_to_save)


def same(here, saved):
    return torch.equal(here.detach().cpu(), saved.to("cpu", here.dtype))


# arguments of PEFT's loaders that lead to files; that say where tensors are put while
# loading; that ask for what is not built
HUB = (
    "revision",
    "subfolder",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
)
PLACING = ("torch_device", "low_cpu_mem_usage", "device_map", "max_memory")
NOT_BUILT = {
    "ephemeral_gpu_offload": "weights are not moved between devices",
    "key_mapping": "rename the keys in the file",
    "ignore_mismatched_sizes": "every tensor has to fit",
    "offload_folder": "weights are not offloaded",
    "offload_dir": "weights are not offloaded",
    "offload_index": "weights are not offloaded",
}


def hub_arguments(given):
    """Those of PEFT's loaders' arguments that lead to files. Those of PLACING have no
    effect: adapters are created beside the layers that they adapt. Raises ConfigError
    for what is not built, TypeError for unknown names."""
    given = dict(given)
    if not given.pop("use_safetensors", True):
        raise ConfigError(
            "use_safetensors=False would read a pickle: adapters are read from"
            " safetensors only"
        )
    for name, value in given.items():
        if name in NOT_BUILT and value:
            raise ConfigError(
                f"{name}={io.brief(value)} is not built: {NOT_BUILT[name]}"
            )
        if name not in (*HUB, *PLACING, *NOT_BUILT):
            hint = io.did_you_mean(name, (*HUB, *PLACING))
            raise TypeError(f"unexpected argument {name!r}{hint}")
    return {name: given[name] for name in HUB if given.get(name) is not None}
