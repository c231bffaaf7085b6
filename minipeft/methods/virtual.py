"""Virtual tokens: what prompt tuning, P-tuning and prefix tuning share.

n learned vectors stand before every text. The frozen model reads them as if they were
tokens, and they steer it. They stand around the whole model: nothing inside it
changes, so there is nothing to merge.

The care is in the bookkeeping, and all of it is here. The text moves n positions to
the right. Padding, on either side, stays hidden while the virtual tokens stay visible.
In generation only the first step prepends them: from the second step on they are in
the cache, and only mask and positions still count them.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ConfigError, PeftConfig
from ..errors import TargetError
from ..slot import Adapter, Base


@dataclass(kw_only=True)
class VirtualTokensConfig(PeftConfig):
    """Hugging Face PEFT's fields. Those that give the model's shape are read from the
    model, and saved in files.

    Raises ConfigError for values outside a field's range, and TargetError for a model
    that is not a decoder-only language model.
    """

    # PEFT ignores prompts in files without it
    task_type: str | None = "CAUSAL_LM"
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    # 2 in encoder-decoder models, which minipeft does not support
    num_transformer_submodules: int | None = None
    modules_to_save: list[str] | None = None
    # True: the values come from a file, and there is no initial text to look up
    from_checkpoint: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("num_virtual_tokens")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(
                f"task_type={self.task_type!r}: virtual tokens are for CAUSAL_LM only"
            )

    def shape(self, config):
        """The fields above, from the model's configuration."""
        return {
            "token_dim": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "num_transformer_submodules": 1,
        }

    def check_model(self, model):
        """Raise TargetError where the virtual tokens cannot stand before `model`."""
        check_language_model(model)

    def resolve(self, model):
        self.check_model(model)
        config = super().resolve(model)
        for field, value in self.shape(model.config).items():
            if getattr(self, field) not in (None, value):
                raise ConfigError(
                    f"{field} = {getattr(self, field)}, but this model's is {value}:"
                    " leave the field out"
                )
            setattr(config, field, value)
        return config

    def on_load(self):
        self.from_checkpoint = True


class VirtualTokens(Adapter):
    """n virtual tokens before the text, around the whole model. Files hold
    `prompt_embeddings`, (n, width). In training an encoder may compute them; saving
    stores its output and drops it."""

    def __init__(self, prompt_embeddings, encoder=None):
        super().__init__()
        # (n, width), or the encoder's input
        self.prompt_embeddings = nn.Parameter(prompt_embeddings)
        self.encoder = encoder

    def embeddings(self):
        """The virtual tokens, (n, width)."""
        if self.encoder is None:
            return self.prompt_embeddings
        return self.encoder(self.prompt_embeddings)

    def to_file(self):
        return {"prompt_embeddings": self.embeddings()}

    def from_file(self, tensors):
        saved, here = tensors["prompt_embeddings"], self.prompt_embeddings
        if self.encoder is None:
            with torch.no_grad():
                here.copy_(saved)
            return
        saved = saved.to(here.device, here.dtype)
        self.prompt_embeddings = nn.Parameter(saved, here.requires_grad)
        self.encoder = None

    def prepend(self, base, inputs):
        """The output of `base` for virtual tokens and text. Mask and positions in
        `inputs` count the virtual tokens already."""
        raise NotImplementedError

    def forward(self, base, *args, **kwargs):
        inputs = named_inputs(base.module, args, kwargs)
        n = len(self.prompt_embeddings)
        if "attention_mask" in inputs:  # (B, T) -> (B, n + T)
            check_window(base.module.config, inputs["attention_mask"], n)
            inputs["attention_mask"] = F.pad(inputs["attention_mask"], (n, 0), value=1)
        if "position_ids" in inputs:  # (B, T)
            inputs["position_ids"] = inputs["position_ids"] + n
        if holds_text(inputs.get(cache_name(base.module))):
            return base(**inputs)
        return self.prepend(base, inputs)

    def generate(self, base, *args, **kwargs):
        """The model's own generate, with this adapter around the model's forward."""
        model = base.module
        check_generation(model, by_name(model.generate, args, kwargs))
        forward = model.forward
        patched = vars(model).get("forward")
        around = functools.partial(self, Base(base.slot, base.name, forward))
        # wraps keeps the signature, which generate reads
        model.forward = functools.wraps(forward)(around)
        try:
            return base(*args, **kwargs)
        finally:
            del model.forward
            if patched is not None:
                model.forward = patched


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


def check_window(config, mask, n):
    """Raise ValueError where a sliding window would count a row's left padding."""
    window = getattr(config, "sliding_window", None)
    if window and n + mask.shape[1] > window and not mask[:, 0].all():
        raise ValueError(
            f"{n} virtual tokens and {mask.shape[1]} others, padded on the left, exceed"
            f" the sliding window of {window}, which the padding between them shifts:"
            " pad on the right, or run rows of unequal length one at a time"
        )


# Caches: ours, a (keys, values) pair a layer, and Hugging Face's.


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


def token_ids(text, tokenizer, n):
    """(n,) token ids: the text, repeated up to n tokens."""
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    ids = list(tokenizer.encode(text))
    if not ids:
        raise ConfigError("the initial text is empty")
    if len(ids) > n:
        raise ConfigError(
            f"the initial text has {len(ids)} tokens, which do not fit into {n} virtual"
            f" ones: shorten it or set num_virtual_tokens = {len(ids)}"
        )
    return torch.tensor((ids * n)[:n])
