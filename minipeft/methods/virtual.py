"""Virtual tokens: what prompt tuning, P-tuning and prefix tuning share.

n learned vectors stand before every text. The frozen model reads them as if they were
tokens, and they steer it. They stand around the whole model: nothing inside it
changes, so there is nothing to merge.

The care is in the bookkeeping, and all of it is here. The text moves n positions to
the right. Padding, on either side, stays hidden while the virtual tokens stay visible.
In generation only the first step prepends them: from the second step on they are in
the cache, and only mask and positions still count them.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import ClassVar

import torch
from torch import nn

from ..config import ConfigError, PeftConfig
from ..slot import Adapter, Base
from .kv_cache import cache_name, holds_text
from .virtual_inputs import (
    by_name,
    check_generation,
    check_language_model,
    named_inputs,
    shifted_inputs,
)


class LearnedEmbeddings(Adapter):
    """n virtual tokens, (n, width), that are trained: themselves, or an encoder that
    computes them. Files hold `prompt_embeddings`, what the encoder gives; whoever loads
    it needs no encoder."""

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
        if self.encoder is None:
            return super().from_file(tensors)
        here = self.prompt_embeddings  # stays the parameter that an optimizer knows
        here.data = tensors["prompt_embeddings"].to(here.device, here.dtype, copy=True)
        here.grad = None
        self.encoder = None


class VirtualTokens(LearnedEmbeddings):
    """n virtual tokens before the text, around the whole model."""

    def prepend(self, base, inputs):
        """The output of `base` for virtual tokens and text. Mask and positions in
        `inputs` count the virtual tokens already."""
        raise NotImplementedError

    def forward(self, base, *args, **kwargs):
        inputs = named_inputs(base.module, args, kwargs)
        inputs = shifted_inputs(base.module, inputs, len(self.prompt_embeddings))
        if holds_text(inputs.get(cache_name(base.module))):
            return base(**inputs)
        return self.prepend(base, inputs)

    def generate(self, base, *args, **kwargs):
        """The model's own generate, with this adapter around the model's forward."""
        model = base.module
        check_generation(model, by_name(model.generate, args, kwargs))
        forward = partial(self, Base(base.slot, base.name, model.forward))
        with patched_forward(model, forward):
            return base(*args, **kwargs)


@contextmanager
def patched_forward(model, forward):
    """Within it `forward` stands in for the model's own, with the signature of that,
    which generate reads."""
    patched = vars(model).get("forward")
    model.forward = wraps(model.forward)(forward)
    try:
        yield
    finally:
        del model.forward
        if patched is not None:
            model.forward = patched


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
    is_prompt_learning: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("num_virtual_tokens")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(
                f"task_type={self.task_type!r}: virtual tokens are for CAUSAL_LM only"
            )

    def shape(self, model):
        """The fields above, from the model and its configuration."""
        config = model.config
        return {
            # not always hidden_size: some project their embeddings to that
            "token_dim": model.get_input_embeddings().weight.shape[-1],
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
        for field, value in self.shape(model).items():
            if getattr(self, field) not in (None, value):
                raise ConfigError(
                    f"{field} = {getattr(self, field)}, but this model's is {value}:"
                    " leave the field out"
                )
            setattr(config, field, value)
        if getattr(self, "encoder_hidden_size", 0) is None:
            config.encoder_hidden_size = config.token_dim
        return config


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
