"""Prefix tuning: in every layer, n learned keys and values stand before those of the
text.

    Attn(q, [K_p; K], [V_p; V]),    K_p and V_p (n, d_kv) of each layer trained

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv
2101.00190. It is as if n tokens had been read whose traces in the cache could be chosen
freely: 2 L n d_kv numbers. With prefix_projection a small network makes them, as in the
paper; it is for training only. Without it this is the deep prompt of P-tuning v2 (Liu
et al. 2021, 2110.07602). The prefix takes up places, but knows of none: the text's
positions begin at n.

He et al. 2021 (2110.04366, section 3): the output is (1 - g) Attn(q, K, V) + g Attn(q,
K_p, V_p), with a gate g that is the share of the softmax that falls on the prefix. So
no prefix begins as a no-op: also zero keys and values (init_weights="zero") take their
share. And as they are alike, they stay alike: n of them learn as one.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .. import targets
from ..config import ConfigError
from .virtual import VirtualTokens, VirtualTokensConfig, length, token_ids


@dataclass(kw_only=True)
class PrefixTuningConfig(VirtualTokensConfig):
    """Hugging Face PEFT's fields and defaults. token_dim and num_attention_heads are
    those of keys and values."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    # None: N(0, 1), and nn.Linear's in the projection; "zero"
    init_weights: str | None = None
    encoder_hidden_size: int | None = None  # of the projection; None: token_dim
    prefix_projection: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ConfigError(
                f"unknown init_weights {self.init_weights!r}; valid: None, 'zero'. From"
                " a text: initialize_kv_prefix_from_text"
            )
        if self.encoder_hidden_size is not None:
            self.check_positive("encoder_hidden_size")

    def shape(self, config):
        heads = (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        width = (
            getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads
        )
        return super().shape(config) | {
            "token_dim": heads * width,
            "num_attention_heads": heads,
        }

    def create(self, base, path):
        n, d, zero = (
            self.num_virtual_tokens,
            self.token_dim,
            self.init_weights == "zero",
        )
        wide, shape = (
            2 * self.num_layers * d,
            (self.num_layers, self.num_attention_heads),
        )
        h = self.encoder_hidden_size = self.encoder_hidden_size or d
        if not self.prefix_projection:
            return Prefix(
                torch.zeros(n, wide) if zero else torch.randn(n, wide), *shape
            )
        start = torch.randn(n, d)
        encoder = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, wide))
        if zero:
            nn.init.zeros_(encoder[-1].weight)
            nn.init.zeros_(encoder[-1].bias)
        return Prefix(start, *shape, encoder)


class Prefix(VirtualTokens):
    """prompt_embeddings (n, 2 L d_kv): for each token the key of layer 0, its value,
    the key of layer 1, ..."""

    def __init__(self, start, num_layers, heads, encoder=None):
        super().__init__(start, encoder)
        self.num_layers, self.heads = num_layers, heads

    def pairs(self, rows, dtype):
        """[(keys, values)] of each layer, (B, K, n, h) both"""
        flat = self.embeddings().to(dtype)  # (n, 2 L K h)
        each = flat.view(len(flat), 2 * self.num_layers, self.heads, -1).permute(
            1, 2, 0, 3
        )
        each = each[:, None].expand(-1, rows, -1, -1, -1)  # (2 L, B, K, n, h)
        return list(zip(each[0::2], each[1::2]))

    def begin(self, base, input_ids, position_ids, past, embeds, labels, **kwargs):
        rows = len(input_ids if embeds is None else embeds)
        past = extended(
            past,
            self.pairs(rows, base.module.get_input_embeddings().weight.dtype),
            base.module,
        )
        return base(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past,
            inputs_embeds=embeds,
            labels=labels,
            **kwargs,
        )


class Pairs(tuple):
    """A cache of ours, (keys, values) a layer, that can be marked."""


def extended(past, pairs, model):
    """The cache, or a new one, with the prefix in it; marked, since there is no text in
    it yet."""
    transformers = sys.modules.get("transformers")
    if transformers and isinstance(model, transformers.PreTrainedModel):
        if model.training and targets.uses_grad_checkpointing(model):
            raise ValueError(
                "no prefix with gradient checkpointing: transformers then takes away"
                " the cache, and with it the prefix. Call"
                " gradient_checkpointing_disable(), or use PromptTuningConfig"
            )
        past = transformers.DynamicCache(config=model.config) if past is None else past
        for layer, (keys, values) in enumerate(pairs):
            past.update(keys, values, layer)
    else:
        pairs = (
            pairs
            if past is None
            else [
                [torch.cat(kv, 2) for kv in zip(old, new)]
                for old, new in zip(past, pairs)
            ]
        )
        past = Pairs(pairs)
    past.virtual = length(past)
    return past


@torch.no_grad()
def initialize_kv_prefix_from_text(model, tokenizer, *, text, adapter_name=None):
    """Start the prefix of a PeftModel with what `text` leaves in the cache: as if the
    model had read it.

    tokenizer: anything with encode(text), or its name. A text shorter than the prefix
    is repeated. ConfigError if it is longer, or if the prefix has a projection, whose
    output cannot be set.
    """
    adapter = model.base_model.adapters[
        model.active_adapter if adapter_name is None else adapter_name
    ]
    if not isinstance(adapter, Prefix) or adapter.encoder is not None:
        raise ConfigError(
            "only a prefix without projection starts from a text so; a prompt has"
            " prompt_tuning_init"
        )
    ids = token_ids(text, tokenizer, len(adapter.prompt_embeddings)).to(
        adapter.prompt_embeddings.device
    )
    training = model.training
    with model.eval().disable_adapter():
        past = model(input_ids=ids[None], use_cache=True).past_key_values
    model.train(training)
    flat = torch.stack([kv[0] for layer in past for kv in layer[:2]])  # (2 L, K, n, h)
    adapter.prompt_embeddings.copy_(flat.permute(2, 0, 1, 3).flatten(1))
