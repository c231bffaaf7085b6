"""What virtual tokens ask of a model and of its inputs, and what they do to these."""

import inspect

import torch
import torch.nn.functional as F

from ..errors import TargetError
from .kv_cache import cache_length, cache_name, other_layers


def check_language_model(model):
    """Raise TargetError unless `model` is a decoder-only language model."""
    parameters = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    missing = [f"forward({name}=…)" for name in NEEDED if name not in parameters]
    missing += [f"config.{name}" for name in SIZES if not hasattr(config, name)]
    if not hasattr(model, "get_input_embeddings"):
        missing.append("get_input_embeddings()")
    if getattr(config, "is_encoder_decoder", False):
        missing.append("a decoder alone (it has an encoder)")
    if missing:
        raise TargetError(
            "virtual tokens need a decoder-only language model;"
            f" {type(model).__name__} lacks {', '.join(missing)}"
        )


NEEDED = ("input_ids", "attention_mask", "inputs_embeds")
SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers")


def check_generation(model, options):
    """Raise ValueError for kinds of generation whose caches virtual tokens would
    shift."""
    config = options.get("generation_config") or getattr(
        model, "generation_config", None
    )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if options.get(name, getattr(config, name, None)) is not None:
            raise ValueError(
                f"{name}: assisted generation cuts the cache at the length of the text,"
                " which the virtual tokens exceed; leave it out"
            )
    if any(cache_length(options.get(name)) for name in ("cache", "past_key_values")):
        raise ValueError(
            "generate with virtual tokens starts from the text: leave out the cache of"
            " earlier tokens, and give the whole text as input_ids"
        )


def by_name(function, args, kwargs):
    """The arguments of a call of `function`, by name."""
    return dict(zip(inspect.signature(function).parameters, args)) | kwargs


def named_inputs(model, args, kwargs):
    """The arguments of model.forward by name, without those that are None.

    Raises ValueError for arguments that virtual tokens would not fit into.
    """
    inputs = by_name(model.forward, args, kwargs)
    if "past_key_values" in inputs and cache_name(model) not in inputs:
        inputs[cache_name(model)] = inputs.pop("past_key_values")
    # until transformers 5.2: where the text's tokens go in the cache
    inputs.pop("cache_position", None)
    inputs = {name: value for name, value in inputs.items() if value is not None}
    cache = inputs.get(cache_name(model))
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"virtual tokens do not fit into a {type(cache).__name__}, a static cache:"
            " its size is fixed for the text alone. Leave out"
            " cache_implementation='static'; where a model always makes such a cache,"
            " give use_cache=False"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and not (torch.is_tensor(mask) and mask.dim() == 2):
        found = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {found}: virtual tokens need an attention_mask of"
            " (rows, tokens)"
        )
    if "token_type_ids" in inputs:
        raise ValueError("virtual tokens have no token_type_ids: leave them out")
    return inputs


# their ALiBi counts places in the batch, where others' counts tokens by the mask;
# so do layers that are not attention
COUNT_PADDING = ("mpt",)
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")


def check_left_padding(config, mask, n):
    """Raise ValueError where a row's left padding, which stands between the virtual
    tokens and the text, would be counted."""
    padded = not mask[:, 0].all()
    kind = getattr(config, "model_type", None)
    if padded and (kind in COUNT_PADDING or other_layers(config)):
        raise ValueError(
            f"a row is padded on the left, and {kind} counts the padding"
            f" between it and the {n} virtual tokens: pad on the right, or run rows of"
            " unequal length one at a time"
        )
    windows = [getattr(config, name, None) for name in WINDOWS]
    window = min(filter(None, windows), default=None)
    if window and n + mask.shape[1] > window and padded:
        raise ValueError(
            f"{n} virtual tokens and {mask.shape[1]} others, padded on the left, exceed"
            f" the sliding window of {window}, which the padding between them shifts:"
            " pad on the right, or run rows of unequal length one at a time"
        )


def shifted_inputs(model, inputs, n):
    """`inputs` whose mask and positions count n virtual tokens before the text."""
    inputs = dict(inputs)
    if "attention_mask" in inputs:  # (B, T) -> (B, n + T)
        check_left_padding(model.config, inputs["attention_mask"], n)
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (n, 0), value=1)
    if "position_ids" in inputs:  # (B, T)
        inputs["position_ids"] = inputs["position_ids"] + n
    return inputs
