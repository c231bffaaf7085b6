"""Caches of keys and values: ours, a (keys, values) pair a layer, and Hugging
Face's."""

import inspect
import sys

import torch

from .. import targets
from ..errors import TargetError
from ..recognized import is_transformers_model


def cache_name(model):
    """The argument of model.forward that takes the cache, also the output's field:
    "cache" since transformers 5.24, "past_key_values" before and in our GPT."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def cache_length(cache):
    """The number of tokens in a cache, virtual ones included."""
    if cache is None:
        return 0
    if isinstance(cache, tuple):
        return cache[0][0].shape[2]
    return int(cache.get_seq_length())


def holds_text(cache):
    """True when a cache holds more than a prefix, which notes its length there."""
    return cache_length(cache) > getattr(cache, "prefix_length", 0)


class KVCache(tuple):
    """Our GPT's cache, (keys, values) a layer, which may note its prefix_length."""


def extend_cache(cache, prefix, model):
    """The cache, or a new one, with the prefix at its end. It notes that it holds no
    text yet."""
    if is_transformers_model(model):
        if model.training and targets.uses_grad_checkpointing(model):
            raise ValueError(
                "a prefix does not work with gradient checkpointing: transformers then"
                " drops the cache, and the prefix with it. Call"
                " gradient_checkpointing_disable(), or use PromptTuningConfig"
            )
        if cache is None:
            cache = sys.modules["transformers"].DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys, values, layer)
    elif cache is None:
        cache = KVCache(prefix)
    else:
        pairs = zip(cache, prefix)
        cache = KVCache([torch.cat(kv, 2) for kv in zip(*pair)] for pair in pairs)
    cache.prefix_length = cache_length(cache)
    return cache


def wants_cache(model, inputs):
    """True when the caller asks for a cache in the output."""
    use_cache = inputs.get("use_cache")
    return getattr(model.config, "use_cache", False) if use_cache is None else use_cache


def without_cache(output, cache):
    """A transformers output, less the cache that only carried the prefix."""
    if isinstance(output, tuple):
        return tuple(value for value in output if value is not cache)
    if isinstance(output, dict):
        kept = {name: value for name, value in output.items() if value is not cache}
        return type(output)(**kept)
    return output


def key_value_shape(config):
    """(heads, width of a head) of the keys in the cache."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "num_key_value_heads", None):
        heads = config.num_key_value_heads
    elif getattr(config, "multi_query", False):
        # Falcon's new decoder repeats its keys for all heads before it stores them
        heads = heads if getattr(config, "new_decoder_architecture", False) else 1
    return heads, width


def other_layers(config):
    """The kinds of a model's layers that are not attention: recurrent, convolutions."""
    names = ("layer_types", "layers_block_type")
    kinds = (getattr(config, name, None) for name in names)
    return set(next(filter(None, kinds), ())) - ATTENTION


def check_plain_cache(model):
    """Raise TargetError unless each layer of `model` caches keys and values of one
    shape."""
    config, problem = model.config, None
    if cache_name(model) not in inspect.signature(model.forward).parameters:
        problem = "its forward takes no cache"
    elif other_layers(config):
        problem = "not all of its layers are attention"
    elif getattr(config, "kv_lora_rank", None):
        problem = "it caches compressed keys and values"
    elif getattr(config, "num_kv_shared_layers", None):
        problem = "some of its layers share keys and values"
    if problem:
        raise TargetError(
            f"a prefix cannot stand before {type(model).__name__}: {problem}. Use"
            " PromptTuningConfig"
        )


ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
