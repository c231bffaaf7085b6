"""Models on disk in Hugging Face's layout: what is saved here opens in transformers,
and the other way round.

A folder holds config.json and model.safetensors, or the shards that
model.safetensors.index.json lists. A file's header gives every tensor's name and shape,
so all is checked before a single weight is read. Then the model, built without memory
on torch's "meta" device, is filled tensor by tensor: there is never much more than one
copy of the weights.
"""

import difflib
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ..lanternwick import DATA
from ..quant.linear4bit import (
    BACKENDS,
    BitsAndBytesConfig,
    Linear4bit,
    from_bitsandbytes,
    linear_layers,
)
from .gpt import GPT, MODEL_TYPES, GPTConfig, nearest

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDED = ["config.json", "tokenizer*.json", "model*.safetensors", INDEX]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# Fields of GPTConfig that config.json calls otherwise.
RENAMED = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3"), {"norm_eps": "rms_norm_eps"}
)
RENAMED["gpt2"] = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon",
}
# never left out
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
LLAMA_ONLY = (
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
)
# What transformers takes for a field that config.json leaves out, where GPTConfig would
# take something else.
ABSENT = {
    kind: {"norm_eps": 1e-6, "tie_word_embeddings": False, **more}
    for kind, more in {
        "llama": {"max_position_embeddings": 2048},
        "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
        "qwen2": {"num_key_value_heads": 32},
        "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
        "gpt2": {
            "norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
        },
    }.items()
}
# tables that old files hold
IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# GPT-2's files have other names, and q, k and v side by side in one matrix, which is
# stored transposed (d_in, d_out).
GPT2_NAMES = {
    "model.embed_tokens": "wte",
    "model.embed_positions": "wpe",
    "model.layers.": "h.",
    "model.norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
}


# Fields that must have this value, or the result would be wrong.
UNSUPPORTED = {
    "partial_rotary_factor": 1.0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


class ModelFileError(ValueError):
    """A model's folder that cannot be read; the message lists everything that is wrong
    with it."""


def cache_folder():
    """Where downloads are kept: the folder MINIPEFT_CACHE, by default
    ~/.cache/minipeft."""
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
        if not (DATA / "base" / "config.json").is_file():
            raise FileNotFoundError(
                "the base model is not here; `make pretrain` makes it"
            )
        return DATA / "base"
    for folder in (Path(name).expanduser(), cache_folder() / name):
        if folder.is_dir():
            return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no folder {name}")
    # here: slow to import and seldom needed
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED))
    except Exception as error:
        here = ["lanternwick"] + [
            p.parent.name for p in cache_folder().glob("*/config.json")
        ]
        close = difflib.get_close_matches(name, here, n=1)
        raise FileNotFoundError(
            f"no model {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}: it"
            f" is not a folder, not in {cache_folder()}, and Hugging Face's hub did not"
            f" give it ({type(error).__name__}:"
            f" {(str(error).splitlines() or [''])[0]}). Without a network, copy its"
            f" folder to {cache_folder() / name} or give its path."
        ) from error


def read_config(folder):
    """config.json -> GPTConfig. Raises ModelFileError for any model that GPT would
    compute wrongly."""
    return _read_config(folder)[0]


def _read_config(folder):
    """(GPTConfig, how its weights are stored in 4 bits: a BitsAndBytesConfig, or None)"""
    file = Path(folder) / "config.json"
    if not file.is_file():
        adapter = (file.parent / "adapter_config.json").is_file()
        raise FileNotFoundError(
            f"no config.json in {folder}"
            + (
                "; it holds an adapter: open its base model, then "
                "PeftModel.from_pretrained(base, folder)"
                if adapter
                else ""
            )
        )
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(theirs, dict):
            raise ValueError("not a JSON object")
        stored = theirs.get("quantization_config")
        if stored and stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
            raise ValueError(
                f"quantization_config: quant_method {stored['quant_method']!r} is not"
                " supported, only 'bitsandbytes'"
            )
        return _to_ours(theirs), BitsAndBytesConfig.make(stored) if stored else None
    except (ValueError, TypeError) as error:
        raise ModelFileError(f"{file}: {error}") from None


def _to_ours(theirs):
    kind = theirs.get("model_type")
    nearest("model_type", kind, MODEL_TYPES)
    name = {
        field: RENAMED[kind].get(field, field)
        for field in GPTConfig.__dataclass_fields__
    }
    ours = {field: theirs[name[field]] for field in name if name[field] in theirs}
    if missing := [name[field] for field in SIZES if field not in ours]:
        raise ValueError(f"{', '.join(missing)} missing")
    ours = {**ABSENT[kind], **ours}
    # GPT-2: may be null
    ours["intermediate_size"] = ours.get("intermediate_size") or 4 * ours["hidden_size"]
    # Newer files have one dict, rope_parameters; older ones rope_theta, and
    # rope_scaling with "rope_type" or "type".
    rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    ours["rope_theta"] = rope.pop("rope_theta", theirs.get("rope_theta") or 10000.0)
    old_name = rope.pop("type", "default")
    rope.setdefault("rope_type", old_name)
    ours["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if kind.startswith("qwen") and not theirs.get("use_sliding_window"):
        ours["sliding_window"] = None
    for field, only in UNSUPPORTED.items():
        if (value := theirs.get(field, rope.get(field, only))) != only:
            raise ValueError(f"{field} = {value} is not supported, only {only}")
    return GPTConfig(**ours)


def _to_theirs(config, dtype):
    """GPTConfig -> what config.json holds."""
    kind = config.model_type
    theirs = {
        RENAMED[kind].get(field, field): value
        for field, value in config.to_dict().items()
    }
    for field in LLAMA_ONLY if kind == "gpt2" else ():
        del theirs[field]
    if kind.startswith("qwen"):
        theirs["use_sliding_window"] = config.sliding_window is not None
    return {
        "architectures": [ARCHITECTURES[kind]],
        **theirs,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _layout(model):
    """{name in the file: the parameters that it holds}: one, or q, k and v for GPT-2's
    c_attn. No tied head."""
    layout = {}
    for name, _ in model.named_parameters():
        key = name
        for ours, theirs in GPT2_NAMES.items() if model.config.is_gpt2 else ():
            key = key.replace(ours, theirs)
        layout.setdefault(key, []).append(name)
    return layout


def _is_conv1d(key, config):
    return (
        config.is_gpt2
        and key.endswith(".weight")
        and (".attn." in key or ".mlp." in key)
    )


def _pack(key, tensors, config):
    whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return whole.T if _is_conv1d(key, config) else whole


def _unpack(key, whole, parts, config):
    return (whole.T if _is_conv1d(key, config) else whole).chunk(parts)


def _open(file):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        size = file.stat().st_size
        raise ModelFileError(
            f"{file} ({size:,} bytes) is cut short or damaged, fetch it again: {error}"
        ) from None


def _weight_files(folder):
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"no {WEIGHTS} or {INDEX} in {folder} (other formats, pickles above all,"
            " are not read)"
        )
    try:
        shards = sorted(
            set(
                json.loads((folder / INDEX).read_text(encoding="utf-8"))[
                    "weight_map"
                ].values()
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{folder / INDEX} is damaged: {error!r}") from None
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX} lists"
        )
    return [folder / shard for shard in shards]


def _locate(folder, model, layout, packed=()):
    """{key: (file, its name there)}, after every name and shape is checked: one error
    lists all that is wrong.

    packed: the keys of weights that are stored in 4 bits. What stands beside them in
    the file is in the result too."""
    config, parameters = model.config, dict(model.named_parameters())
    shapes = {
        key: tuple(_pack(key, [parameters[n] for n in names], config).shape)
        for key, names in layout.items()
    }
    shapes |= {key: ((math.prod(shapes[key]) + 1) // 2, 1) for key in packed}
    where, unexpected, wrong = {}, [], []
    for file in _weight_files(folder):
        with _open(file) as weights:
            for stored in weights.keys():
                key = stored.removeprefix("transformer.") if config.is_gpt2 else stored
                shape = tuple(weights.get_slice(stored).get_shape())
                if (
                    key not in shapes
                    and re.sub(r"\.weight\..*", ".weight", key) in packed
                ):
                    pass  # the scales of a packed weight, and what else it needs
                elif key not in shapes:
                    harmless = (
                        key.endswith(IGNORED)
                        or key == "lm_head.weight"
                        and config.tie_word_embeddings
                    )
                    unexpected += [] if harmless else [f"{stored} {shape}"]
                elif shape != shapes[key]:
                    wrong.append(f"{stored} {shape}, expected {shapes[key]}")
                where[key] = file, stored
    missing = [f"{key} {shape}" for key, shape in shapes.items() if key not in where]
    faults = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    if any(faults.values()):
        raise ModelFileError(
            f"{folder} does not fit its config.json. "
            + " ".join(
                f"{len(tensors)} tensors {what}: {'; '.join(tensors)}."
                for what, tensors in faults.items()
                if tensors
            )
        )
    return where


def load_pretrained(name=None, dtype=None, device=None, quantization=None):
    """A GPT from `name` (see resolve), in evaluation mode. dtype None: as it is stored.
    device None: the CPU.

    quantization: "nf4", a dict of the fields of BitsAndBytesConfig, or one of
    transformers: linear layers are put into 4 bits as they are read, so that hardly
    more memory is needed than they then take. What was saved in 4 bits stays so. Raises
    FileNotFoundError for files that are not there, ModelFileError for those that do not
    fit or are damaged."""
    folder = resolve(name)
    config, stored = _read_config(folder)
    with torch.device("meta"):
        model = GPT(config)
    layout = _layout(model)
    if stored and quantization:
        raise ValueError(
            f"{base_name(name)} is stored in 4 bits already: leave quantization out"
        )
    options = (
        (stored or BitsAndBytesConfig.make(quantization)).options()
        if stored or quantization
        else {"skip": ()}
    )
    backend, skip = options.pop("backend", None), options.pop("skip")
    chosen = (
        {path: put for path, (_, put) in linear_layers(model, skip).items()}
        if options
        else {}
    )
    packed = {f"{path}.weight" for path in chosen} if stored else set()
    where = _locate(folder, model, layout, packed)

    def read(key):
        file, stored_name = where[key]
        # opened anew each time: else all that was read stays in memory
        with _open(file) as weights:
            return weights.get_tensor(stored_name)

    for key, names in tqdm(layout.items(), desc=f"loading {base_name(name)}", delay=3):
        for ours, part in zip(
            names,
            (
                [read(key)]
                if key in packed
                else _unpack(key, read(key), len(names), config)
            ),
        ):
            module, _, attribute = ours.rpartition(".")
            layer = model.get_submodule(module)
            # read where it lies in the file, else copied
            rounded = attribute == "weight" and module in chosen
            part = part.to(
                device or "cpu",
                None if key in packed else dtype,
                copy=key in packed or not rounded,
            )
            part = part.contiguous()
            if key in packed:
                beside = {
                    k.removeprefix(f"{key}."): read(k).to(part.device)
                    for k in where
                    if k.startswith(f"{key}.")
                }
                new = Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    device="meta",
                    compute_dtype=options["compute_dtype"],
                )
                new.store(from_bitsandbytes(part, beside))
                new.bias = layer.bias
                chosen[module](new)
            else:
                setattr(layer, attribute, nn.Parameter(part))
                if rounded:
                    chosen[module](BACKENDS[backend](layer, **options))
    model.tie_weights()
    model.name_or_path = base_name(name)
    return model.eval()


def save_pretrained(model, folder, tokenizer=None):
    """Write config.json, model.safetensors and the tokenizer's files, if given.
    ValueError: the model is adapted.

    Layers in 4 bits are written as bitsandbytes and transformers store them."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    config = replace(model.config, tie_word_embeddings=tied)
    with torch.device("meta"):
        plain = GPT(config)
    shapes = lambda m: {name: p.shape for name, p in m.named_parameters()}
    four = {
        path: module
        for path, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    if four and config.is_gpt2:
        raise ValueError(
            "a GPT-2 in 4 bits cannot be saved: its file joins q, k and v into one"
            " matrix"
        )
    unpacked = {
        f"{path}.weight": torch.Size((m.out_features, m.in_features))
        for path, m in four.items()
    }
    shapes_now = shapes(model) | unpacked
    if shapes(plain) != shapes_now:
        odd, _ = min(set(shapes_now.items()) ^ set(shapes(plain).items()))
        raise ValueError(
            f"this is no longer a plain GPT (look at {odd}): merge_and_unload() its"
            " adapters first, or save those alone"
        )
    have = {name: p.detach() for name, p in model.named_parameters()}
    tensors = {
        key: _pack(key, [have[n] for n in names], config).contiguous()
        for key, names in _layout(plain).items()
    }
    theirs = _to_theirs(config, model.dtype)
    if four:  # and what stands beside the packed weights
        tensors |= {
            key: t.contiguous()
            for key, t in model.state_dict().items()
            if ".weight." in key
        }
        theirs["quantization_config"] = _describe(four)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # beside, renamed when all is there
    save_file(tensors, folder / (WEIGHTS + ".part"), metadata={"format": "pt"})
    text = json.dumps(theirs, indent=2) + "\n"
    (folder / "config.json.part").write_text(text, encoding="utf-8")
    for file in (WEIGHTS, "config.json"):
        os.replace(folder / (file + ".part"), folder / file)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _describe(four):
    """quantization_config of a model whose layers in 4 bits are {path: layer}."""
    first = next(iter(four.values()))
    if isinstance(first, Linear4bit):
        double, size = first.double_quant, first.block_size
    else:  # bitsandbytes' own
        double, size = first.weight.compress_statistics, first.weight.blocksize
    kind = (
        first.quant_type if isinstance(first, Linear4bit) else first.weight.quant_type
    )
    return BitsAndBytesConfig(
        True, kind, double, first.compute_dtype, block_size=size
    ).to_dict()
