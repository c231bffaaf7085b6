"""Hugging Face's layout of a model's folder: config.json and model.safetensors, or the
shards that model.safetensors.index.json lists.

Names and shapes only, and writing. Reading weights into a model is pretrained.py's.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import FileError
from ..io import (
    brief,
    check_choice,
    check_number,
    make_folder,
    open_safetensors,
    read_json,
    replacing,
    whole,
    write_safetensors,
)
from ..quant.linear4bit import BitsAndBytesConfig, Linear4bit, is_4bit, linear_layers
from .distributed import is_first

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# fields of GPTConfig that have another name in config.json
LLAMA_NAMES = {"norm_eps": "rms_norm_eps"}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon",
}
ROPE_TYPES = {  # the fields of rope_scaling that each kind needs
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
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
# transformers' default for a field that config.json leaves out, where GPTConfig's
# differs
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gpt2": {
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    },
}
# fields that must have this value, or the result would be wrong
UNSUPPORTED = {
    "partial_rotary_factor": 1.0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
# GPT-2's tensors have other names, and q, k and v side by side in one matrix, which is
# stored transposed (d_in, d_out)
GPT2_TENSORS = {
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


class ModelFileError(FileError):
    """A model's folder that cannot be read; the message lists everything that is wrong
    with it."""


# ---- config.json ---------------------------------------------------------------------


def file_name(field, model_type):
    """What a field of GPTConfig is called in config.json."""
    names = GPT2_NAMES if model_type == "gpt2" else LLAMA_NAMES
    return names.get(field, field)


def read_config_file(folder):
    """config.json as a dict. FileNotFoundError where there is none."""
    file = Path(folder) / CONFIG
    if not file.is_file():
        hint = ""
        if (file.parent / "adapter_config.json").is_file():
            hint = (
                "; it holds an adapter: open its base model, then"
                " PeftModel.from_pretrained(base, folder)"
            )
        raise FileNotFoundError(f"no config.json in {folder}{hint}")
    return read_json(file, error=ModelFileError)


def config_fields(theirs, fields):
    """What config.json holds -> {field of GPTConfig: value}. fields: GPTConfig's.
    ValueError for any model that GPT would compute wrongly."""
    kind = theirs.get("model_type")
    check_choice("model_type", kind, ARCHITECTURES)
    if kind == "gpt2":
        ignored = (*LLAMA_ONLY, "rope_parameters")
        theirs = {name: theirs[name] for name in theirs if name not in ignored}
    names = {field: file_name(field, kind) for field in fields}
    ours = {field: theirs[name] for field, name in names.items() if name in theirs}
    if missing := [names[field] for field in SIZES if field not in ours]:
        raise ValueError(f"{', '.join(missing)} missing")
    for field in SIZES:
        check_number(names[field], ours[field], whole=True, least=1)
    ours = {"norm_eps": 1e-6, "tie_word_embeddings": False, **DEFAULTS[kind], **ours}
    # GPT-2: may be null
    if ours.get("intermediate_size") is None:
        ours["intermediate_size"] = 4 * ours["hidden_size"]
    rope = read_rope(theirs)
    ours["rope_theta"] = rope.pop("rope_theta", None) or theirs.get("rope_theta") or 1e4
    used = ("rope_type", *ROPE_TYPES[rope["rope_type"]])
    scaling = {name: rope[name] for name in used if name in rope}
    ours["rope_scaling"] = scaling if rope["rope_type"] != "default" else None
    if kind.startswith("qwen") and not theirs.get("use_sliding_window"):
        ours["sliding_window"] = None
    for field, only in UNSUPPORTED.items():
        if (value := theirs.get(field, rope.get(field, only))) != only:
            raise ValueError(f"{field} = {value} is not supported, only {only}")
    return ours


def read_rope(theirs):
    """Newer files have one dict, rope_parameters; older ones rope_theta, and
    rope_scaling with "rope_type" or "type"."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters = {brief(rope)}: expected an object")
    rope = dict(rope)
    old_name = rope.pop("type", "default")
    rope.setdefault("rope_type", old_name)
    check_choice("rope_type", rope["rope_type"], ROPE_TYPES)
    return rope


def read_quantization(theirs):
    """The BitsAndBytesConfig of a model stored in 4 bits, or None."""
    stored = theirs.get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, dict):
        raise ValueError(f"quantization_config = {brief(stored)}: expected an object")
    method = stored.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ValueError(
            f"quantization_config: quant_method {brief(method)} is not supported, only"
            " 'bitsandbytes'"
        )
    return BitsAndBytesConfig.make(stored)


def config_to_hf(config, dtype):
    """GPTConfig -> what config.json holds."""
    kind = config.model_type
    fields = config.to_dict()
    for field in LLAMA_ONLY if kind == "gpt2" else ():
        del fields[field]
    theirs = {file_name(field, kind): value for field, value in fields.items()}
    if kind.startswith("qwen"):
        theirs["use_sliding_window"] = config.sliding_window is not None
    dtype = str(dtype).removeprefix("torch.")
    return {"architectures": [ARCHITECTURES[kind]], **theirs, "dtype": dtype}


# ---- tensors -------------------------------------------------------------------------


def file_layout(model):
    """{name in the file: the parameters that it holds}: one, or q, k and v for GPT-2's
    c_attn. No tied head."""
    layout = {}
    for name, _ in model.named_parameters():
        key = name
        for ours, theirs in GPT2_TENSORS.items() if model.config.is_gpt2 else ():
            key = key.replace(ours, theirs)
        layout.setdefault(key, []).append(name)
    return layout


def is_conv1d(key, config):
    inside = ".attn." in key or ".mlp." in key
    return config.is_gpt2 and key.endswith(".weight") and inside


def pack(key, tensors, config):
    """The parameters of one tensor in the file -> that tensor."""
    whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return whole.T if is_conv1d(key, config) else whole


def unpack(key, whole, parts, config):
    """The reverse of pack."""
    return (whole.T if is_conv1d(key, config) else whole).chunk(parts)


def weight_files(folder):
    """The paths of the model's safetensors files."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"no {WEIGHTS} or {INDEX} in {folder} (other formats, pickles above all,"
            " are not read)"
        )
    shards = read_json(index, error=ModelFileError).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelFileError(
            f"{index}: weight_map = {brief(shards)}: expected an object"
        )
    for shard in shards.values():
        plain = isinstance(shard, str) and Path(shard).name == shard
        if not plain or shard in ("", ".."):
            raise ModelFileError(
                f"{index} names {brief(shard)}: expected the name of a file in this"
                " folder"
            )
    shards = sorted(set(shards.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX} lists"
        )
    return [folder / shard for shard in shards]


def open_weights(file):
    return open_safetensors(file, ModelFileError)


# ---- writing -------------------------------------------------------------------------


def save_pretrained(model, folder, tokenizer=None):
    """Write config.json, model.safetensors and the tokenizer's files, if given; each
    whole or not at all. ValueError: the model is adapted.

    Of several processes all call it, and the first one writes. Layers in 4 bits are
    written as bitsandbytes and transformers store them."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    config = replace(model.config, tie_word_embeddings=tied)
    packed = {path: m for path, m in model.named_modules() if is_4bit(m)}
    if packed and config.is_gpt2:
        raise ValueError(
            "a GPT-2 in 4 bits cannot be saved: its file joins q, k and v into one"
            " matrix"
        )
    with torch.device("meta"):
        plain = type(model)(config)
    check_plain(model, plain, packed)
    have = {name: whole(p.detach()) for name, p in model.named_parameters()}
    tensors = {
        key: pack(key, [have[name] for name in names], config).contiguous()
        for key, names in file_layout(plain).items()
    }
    theirs = config_to_hf(config, model.dtype)
    if packed:
        for key, tensor in model.state_dict().items():
            if ".weight." in key:  # what stands beside a packed weight
                tensors[key] = whole(tensor).contiguous()
        dense = [path for path, *_ in linear_layers(model) if path not in packed]
        theirs["quantization_config"] = quantization_config(packed, dense)
    if not is_first():
        return
    folder = make_folder(folder)
    # both are whole before either is renamed
    with replacing(folder / CONFIG) as config_file:
        config_file.write_text(json.dumps(theirs, indent=2) + "\n")
        write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_plain(model, plain, packed):
    """ValueError unless the parameters are those of `plain`, a GPT without adapters.
    packed: {path: layer in 4 bits}."""
    expected = {name: p.shape for name, p in plain.named_parameters()}
    found = {name: p.shape for name, p in model.named_parameters()}
    for path, layer in packed.items():
        found[f"{path}.weight"] = torch.Size((layer.out_features, layer.in_features))
    if found != expected:
        odd, _ = min(set(found.items()) ^ set(expected.items()))
        raise ValueError(
            f"this is no longer a plain GPT (look at {odd}): merge_and_unload() its"
            " adapters first, or save those alone"
        )


def quantization_config(packed, dense):
    """What config.json says of layers in 4 bits, {path: layer}. dense: the paths of
    linear layers that are not."""
    first = next(iter(packed.values()))
    if isinstance(first, Linear4bit):
        fields = first.quant_type, first.double_quant, first.block_size
    else:  # bitsandbytes' own
        weight = first.weight
        fields = weight.quant_type, weight.compress_statistics, weight.blocksize
    kind, double, size = fields
    dtype = first.compute_dtype
    skip = None if dense == ["lm_head"] else dense
    return BitsAndBytesConfig(True, kind, double, dtype, skip, size).to_dict()
