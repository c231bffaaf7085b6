"""Models by name: where they lie, and their weights read into a GPT.

A file's header gives every tensor's name and shape, so all is checked before a single
weight is read. Then the model, built without memory on torch's "meta" device, is filled
tensor by tensor: there is never much more than one copy of the weights.
"""

import math
import os
import re
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..io import did_you_mean, progress, with_prefix
from ..lanternwick import DATA
from ..quant.bitsandbytes import as_float, from_bitsandbytes
from ..quant.linear4bit import (
    BACKENDS,
    BitsAndBytesConfig,
    Linear4bit,
    quantizable_layers,
)
from .gpt import GPT, GPTConfig
from .hf_format import (
    CONFIG,
    INDEX,
    ModelFileError,
    config_fields,
    file_layout,
    open_weights,
    pack,
    read_config_file,
    read_quantization,
    unpack,
    weight_files,
)

GENERATION = "generation_config.json"
NEEDED = [CONFIG, GENERATION, "tokenizer*.json", "model*.safetensors", INDEX]
FLOATS = ("F64", "F32", "F16", "BF16")
# what a tied model holds once
HEADS = ("lm_head.weight", "embed_tokens.weight", "wte.weight")
# of a packed weight (bnb_4bit_quant_storage), and their bytes
STORAGE = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
# tables that old files hold
IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# a file in use cannot be replaced there: save_pretrained into its folder would fail
MUST_COPY = os.name == "nt"


# ---- where a model lies --------------------------------------------------------------


def cache_folder():
    """The folder for downloads: MINIPEFT_CACHE, by default ~/.cache/minipeft."""
    return Path(os.environ.get("MINIPEFT_CACHE") or Path.home() / ".cache" / "minipeft")


def base_name(name=None):
    return str(name or os.environ.get("MINIPEFT_BASE") or "lanternwick")


def resolve(name=None):
    """The folder of a model: "lanternwick" (the shipped base), a folder, a name in the
    cache folder, or one on the hub.

    None is the environment's MINIPEFT_BASE, or else "lanternwick". Raises
    FileNotFoundError with what to do."""
    name = base_name(name)
    if name == "lanternwick":
        if not (DATA / "base" / CONFIG).is_file():
            raise FileNotFoundError(
                "the base model is not here; `make pretrain` makes it"
            )
        return DATA / "base"
    for folder in (Path(name).expanduser(), cache_folder() / name):
        if folder.is_dir():
            return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no folder {name}")
    return download(name)


def download(name):
    """The folder of a model on Hugging Face's hub, fetched unless its cache has it."""
    # here: slow to import and seldom needed
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED))
    except Exception as error:
        cache = cache_folder()
        here = ["lanternwick", *(p.parent.name for p in cache.glob(f"*/{CONFIG}"))]
        reason = (str(error).splitlines() or [""])[0]
        raise FileNotFoundError(
            f"no model {name!r}{did_you_mean(name, here)}: it is not a folder, not in"
            f" {cache}, and Hugging Face's hub did not give it"
            f" ({type(error).__name__}: {reason}). Without a network, copy its folder"
            f" to {cache / name} or give its path."
        ) from error


# ---- reading it ----------------------------------------------------------------------


def read_configs(folder):
    """config.json -> (GPTConfig, the BitsAndBytesConfig of weights stored in 4 bits, or
    None). Raises ModelFileError for any model that GPT would compute wrongly."""
    theirs = read_config_file(folder)
    try:
        config = GPTConfig(**config_fields(theirs, GPTConfig.__dataclass_fields__))
        return config, read_quantization(theirs)
    except (ValueError, TypeError) as error:
        raise ModelFileError(f"{Path(folder) / CONFIG}: {error}") from None


def locate(folder, model, layout, packed=()):
    """{key: (file, its name there)}, after every name, shape and dtype is checked: one
    error lists all that is wrong.

    packed: the keys of weights stored in 4 bits. What stands beside them in the file is
    in the result too."""
    config = model.config
    parameters = dict(model.named_parameters())
    shapes = {}
    for key, names in layout.items():
        whole = pack(key, [parameters[name] for name in names], config)
        shapes[key] = tuple(whole.shape)
    for key in packed:
        shapes[key] = ((math.prod(shapes[key]) + 1) // 2, 1)
    where = {}
    faults = {"missing": [], "unexpected": [], "of the wrong shape": []}
    faults["of the wrong type"] = []
    for file in weight_files(folder):
        with open_weights(file) as weights:
            for stored in weights.keys():
                key = stored.removeprefix("transformer.") if config.is_gpt2 else stored
                tensor = weights.get_slice(stored)
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                where[key] = file, stored
                types = STORAGE if key in packed else FLOATS
                held = shape  # of a packed weight in bytes
                if key in packed and shape:
                    held = (shape[0] * STORAGE.get(dtype, 1), *shape[1:])
                if key not in shapes:
                    if not is_harmless(key, packed, config):
                        faults["unexpected"].append(f"{stored} {shape}")
                elif held != shapes[key]:
                    expected = f"{stored} {shape}, expected {shapes[key]}"
                    faults["of the wrong shape"].append(expected)
                elif dtype not in types:
                    expected = f"{stored} {dtype}, expected one of {', '.join(types)}"
                    faults["of the wrong type"].append(expected)
    faults["missing"] = [f"{key} {shapes[key]}" for key in shapes if key not in where]
    if any(faults.values()):
        listed = [
            f"{len(tensors)} tensors {what}: {'; '.join(tensors)}."
            for what, tensors in faults.items()
            if tensors
        ]
        raise ModelFileError(
            f"{folder} does not fit its config.json. {' '.join(listed)}"
        )
    return where


def has_own_head(folder):
    """True if the files hold a head and an embedding of different values; transformers
    does not tie them then."""
    found = []
    for file in weight_files(folder):
        with open_weights(file) as weights:
            names = [name for name in weights.keys() if name.endswith(HEADS)]
            found += [weights.get_tensor(name) for name in names]
    return len(found) == 2 and not torch.equal(found[0].to(found[1].dtype), found[1])


def is_harmless(key, packed, config):
    """True for a tensor that is not a parameter and may be there all the same."""
    beside = re.sub(r"\.weight\..*", ".weight", key) in packed
    tied_head = key == "lm_head.weight" and config.tie_word_embeddings
    return beside or tied_head or key.endswith(IGNORED)


def load_pretrained(name=None, dtype=None, device=None, quantization=None):
    """A GPT from `name` (see resolve), in evaluation mode. dtype None: as it is stored;
    else one of torch's, or its name. device None: the CPU.

    quantization: "nf4", a dict of the fields of BitsAndBytesConfig, or one of
    transformers: linear layers are put into 4 bits as they are read, which needs hardly
    more memory than they take then. What was saved in 4 bits stays so.

    Dense weights that need no conversion are not copied: as in transformers they are
    the file's pages, read when they are first used; what is trained gets its own. A new
    file may take the old one's place meanwhile (save_pretrained writes so), but one
    that is written over in place changes the weights, too.

    Raises FileNotFoundError for files that are not there, ModelFileError for those that
    do not fit or are damaged."""
    dtype = as_float("dtype", dtype)
    folder = resolve(name)
    config, stored = read_configs(folder)
    if config.tie_word_embeddings and has_own_head(folder):
        warnings.warn(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from"
            " the embedding: the model is not tied",
            stacklevel=2,
        )
        config = replace(config, tie_word_embeddings=False)
    if stored and quantization:
        raise ValueError(
            f"{base_name(name)} is stored in 4 bits already: leave quantization out"
        )
    with torch.device("meta"):
        model = GPT(config)
    layout = file_layout(model)
    options, chosen = to_quantize(model, stored, quantization)
    packed = {f"{path}.weight" for path in chosen} if stored else set()
    where = locate(folder, model, layout, packed)
    make = BACKENDS[options.pop("backend")] if options else None
    device = device or "cpu"
    with Weights(where, keep_open=not chosen) as weights:
        for key, names in progress(layout.items(), f"loading {base_name(name)}"):
            if key in packed:
                layer, path, _ = owner(model, key)
                chosen[path](read_packed(weights, key, layer, options, device))
                continue
            parts = unpack(key, weights.read(key), len(names), config)
            for ours, part in zip(names, parts):
                layer, path, attribute = owner(model, ours)
                quantized = attribute == "weight" and path in chosen
                copied = MUST_COPY or (bool(chosen) and not quantized)
                part = part.to(device, dtype, copy=copied).contiguous()
                setattr(layer, attribute, nn.Parameter(part))
                if quantized:
                    chosen[path](make(layer, **options))
    model.tie_weights()
    model.name_or_path = base_name(name)
    return model.eval()


def to_quantize(model, stored, quantization):
    """(the options of 4-bit layers, {path: the function that puts one there})"""
    if not (stored or quantization):
        return {}, {}
    options = (stored or BitsAndBytesConfig.make(quantization)).options()
    found = quantizable_layers(model, options.pop("skip"), strict=not stored)
    return options, {path: put for path, (_, put) in found.items()}


def owner(model, parameter):
    """(the module of a parameter, that module's path, the parameter's name in it)"""
    path, _, attribute = parameter.rpartition(".")
    return model.get_submodule(path), path, attribute


class Weights(ExitStack):
    """The tensors of a model's files. where: {key: (file, its name there)}.

    keep_open: each file is opened once, which is faster. If not, it is opened for each
    tensor alone: what is read from an open file stays in memory, and weights that are
    quantised should not."""

    def __init__(self, where, keep_open):
        super().__init__()
        self.where = where
        self.keep_open = keep_open
        self.files = {}

    def read(self, key):
        """One tensor, where it lies in its file."""
        file, stored_name = self.where[key]
        if self.keep_open and file not in self.files:
            self.files[file] = self.enter_context(open_weights(file))
        opened = self.files.get(file)
        with nullcontext(opened) if opened else open_weights(file) as weights:
            return weights.get_tensor(stored_name)

    def beside(self, key):
        """{what is stored beside a packed weight: the tensor}"""
        beside = with_prefix(self.where, f"{key}.")
        return {name: self.read(f"{key}.{name}") for name in beside}


def read_packed(weights, key, layer, options, device):
    """The Linear4bit of a weight that is stored in 4 bits, in the place of `layer`."""
    packed = weights.read(key).to(device, copy=True).contiguous()
    beside = {name: part.to(device) for name, part in weights.beside(key).items()}
    new = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        device="meta",
        compute_dtype=options["compute_dtype"],
    )
    try:
        shape = (layer.out_features, layer.in_features)
        new.set_weight(from_bitsandbytes(packed, beside, shape))
    except ValueError as problem:
        raise ModelFileError(f"{weights.where[key][0]}: {key}: {problem}") from None
    new.bias = layer.bias
    return new
