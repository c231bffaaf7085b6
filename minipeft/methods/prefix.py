"""Prefix tuning: n learned keys and values before those of the text, in every layer.

    Attn(q, [K_p; K], [V_p; V]),    K_p and V_p (n, d_kv) of each layer trained

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv
2101.00190. It is as if the model had read n tokens whose keys and values we choose
freely: 2 L n d_kv numbers. With prefix_projection a small network computes them, as in
the paper, in training only. Without it this is the deep prompt of P-tuning v2 (Liu et
al. 2021, 2110.07602). The prefix occupies n cache entries but has no positions: the
text's positions start at n.

He et al. 2021 (2110.04366, section 3): the output is (1 - g) Attn(q, K, V) + g Attn(q,
K_p, V_p), where the gate g is the prefix's share of the softmax. So no prefix starts as
a no-op: zero keys and values (init_weights="zero") take their share too. And n equal
virtual tokens get equal gradients, and stay equal: they learn as one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..config import ConfigError
from .kv_cache import (
    cache_name,
    check_plain_cache,
    extend_cache,
    key_value_shape,
    wants_cache,
    without_cache,
)
from .virtual import VirtualTokens, VirtualTokensConfig, token_ids


class Prefix(VirtualTokens):
    """Attn(q, [K_p; K], [V_p; V]): the prefix goes into the cache before the text.

    prompt_embeddings (n, 2 L d_kv): for each token the key of layer 0, its value, the
    key of layer 1, ..."""

    def __init__(self, prompt_embeddings, num_layers, heads, encoder=None):
        super().__init__(prompt_embeddings, encoder)
        self.num_layers, self.heads = num_layers, heads

    def key_values(self, rows, dtype):
        """[(K_p, V_p)] of each layer, both (B, K, n, h)."""
        flat = self.embeddings().to(dtype)  # (n, 2 L K h)
        each = flat.view(len(flat), 2 * self.num_layers, self.heads, -1)
        each = each.permute(1, 2, 0, 3)[:, None]  # (2 L, 1, K, n, h)
        each = each.expand(-1, rows, -1, -1, -1)  # (2 L, B, K, n, h)
        return list(zip(each[0::2], each[1::2]))

    def prepend(self, base, inputs):
        model, name = base.module, cache_name(base.module)
        text = inputs.get("input_ids", inputs.get("inputs_embeds"))
        dtype = model.get_input_embeddings().weight.dtype
        prefix = self.key_values(len(text), dtype)
        cache = extend_cache(inputs.get(name), prefix, model)
        output = base(**inputs | {name: cache})
        if name in inputs or wants_cache(model, inputs):
            return output
        return without_cache(output, cache)


@torch.no_grad()
def initialize_kv_prefix_from_text(model, tokenizer, *, text, adapter_name=None):
    """Start the prefix of a PeftModel with the keys and values of `text`, as if the
    model had read it.

    tokenizer: anything with encode(text), or its name. A text shorter than the prefix
    is repeated. Raises ConfigError if it is longer, or if the prefix has a projection,
    whose output cannot be set.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    adapter, base = model.base_model.adapters[name], model.get_base_model()
    if not isinstance(adapter, Prefix) or adapter.encoder is not None:
        raise ConfigError(
            "only a prefix without projection starts from a text here; a prompt has"
            " prompt_tuning_init"
        )
    prefix = adapter.prompt_embeddings
    ids = token_ids(text, tokenizer, len(prefix)).to(prefix.device)
    training = model.training
    with model.eval().disable_adapter():
        output = model(input_ids=ids[None], use_cache=True)
    model.train(training)
    cache = getattr(output, cache_name(base))
    flat = torch.stack([kv[0] for layer in cache for kv in layer[:2]])  # (2 L, K, n, h)
    prefix.copy_(flat.permute(2, 0, 1, 3).flatten(1))


@dataclass(kw_only=True)
class PrefixTuningConfig(VirtualTokensConfig):
    """Hugging Face PEFT's fields and defaults. token_dim and num_attention_heads are
    those of keys and values."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    belongs_to: ClassVar[dict] = {"encoder_hidden_size": ("prefix_projection", True)}
    # None: N(0, 1), and nn.Linear's in the projection; "zero"
    init_weights: str | None = None
    encoder_hidden_size: int | None = None  # of the projection; None: token_dim
    prefix_projection: bool = False

    def __post_init__(self):
        super().__post_init__()
        # from a text: initialize_kv_prefix_from_text
        self.check_choice("init_weights", (None, "zero"))
        self.check_number("encoder_hidden_size", whole=True, least=1, also=(None,))

    def check_model(self, model):
        super().check_model(model)
        check_plain_cache(model)

    def shape(self, model):
        heads, width = key_value_shape(model.config)
        return super().shape(model) | {
            "token_dim": heads * width,
            "num_attention_heads": heads,
        }

    def create(self, base, path):
        n, d = self.num_virtual_tokens, self.token_dim
        layers, heads = self.num_layers, self.num_attention_heads
        width = 2 * layers * d
        h = self.encoder_hidden_size
        zero = self.init_weights == "zero"
        if not self.prefix_projection:
            flat = torch.zeros(n, width) if zero else torch.randn(n, width)
            return Prefix(flat, layers, heads)
        Z = torch.randn(n, d)
        encoder = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, width))
        if zero:
            nn.init.zeros_(encoder[-1].weight)
            nn.init.zeros_(encoder[-1].bias)
        return Prefix(Z, layers, heads, encoder)
