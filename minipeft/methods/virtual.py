"""Virtual tokens: what prompts, P-tuning and prefixes share.

n learned vectors stand before every text. The frozen model reads them as if they were
tokens, and they steer it. They stand around the whole model: nothing inside it is
touched, so nothing can be merged.

All the care is in the book-keeping, and it is all here. The text moves n places to the
right. Padding, on either side, must stay hidden while the virtual tokens stay seen. And
in generation only the first step puts them in front: from the second on they are in the
cache, and only mask and positions must go on counting them.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ConfigError, PeftConfig
from ..errors import TargetError
from ..slot import Adapter, Base


@dataclass(kw_only=True)
class VirtualTokensConfig(PeftConfig):
    """Hugging Face PEFT's fields. Those that tell the model's shape are taken from the
    model, and noted in files."""

    # PEFT ignores prompts in files that do not say so
    task_type: str | None = "CAUSAL_LM"
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    # 2 in encoder-decoder models, which we do not have
    num_transformer_submodules: int | None = None
    modules_to_save: list[str] | None = None

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

    def select(self, model):
        config = getattr(model, "config", None)
        if not hasattr(model, "get_input_embeddings") or not hasattr(
            config, "hidden_size"
        ):
            raise TargetError(
                "virtual tokens need a language model, with get_input_embeddings() and "
                f"config.hidden_size; {type(model).__name__} is none"
            )
        for field, value in self.shape(config).items():
            if getattr(self, field) not in (None, value):
                raise ConfigError(
                    f"{field} = {getattr(self, field)}, but this model's is {value}:"
                    " leave the field out"
                )
            setattr(self, field, value)
        return [""]

    def on_load(self):
        # the values will come from there: no initial text to be looked up
        self.given = True


class VirtualTokens(Adapter):
    """Around a model: virtual tokens, then the text. `prompt_embeddings` (n, width) is
    what files hold. An encoder computes them in training, and has done its work when
    they are saved."""

    def __init__(self, start, encoder=None):
        super().__init__()
        # (n, width), or what the encoder reads
        self.prompt_embeddings = nn.Parameter(start)
        self.encoder = encoder

    def embeddings(self):
        """(n, width)"""
        return (
            self.prompt_embeddings
            if self.encoder is None
            else self.encoder(self.prompt_embeddings)
        )

    def to_file(self):
        return {"prompt_embeddings": self.embeddings()}

    def from_file(self, tensors):
        given, old = tensors["prompt_embeddings"], self.prompt_embeddings
        self.prompt_embeddings, self.encoder = (
            nn.Parameter(given.to(old.device, old.dtype)),
            None,
        )

    def begin(self, base, input_ids, position_ids, past, embeds, labels, **kwargs):
        """Run `base` on virtual tokens and text. Mask and positions count the virtual
        tokens already."""
        raise NotImplementedError

    def forward(
        self,
        base,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ):
        n = len(self.prompt_embeddings)
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    "virtual tokens need an attention_mask of (rows, tokens);"
                    f" {attention_mask.dim()} dimensions were given"
                )
            attention_mask = F.pad(attention_mask, (n, 0), value=1)  # (B, n + T)
        if position_ids is not None:
            position_ids = position_ids + n
        if length(past_key_values) == getattr(past_key_values, "virtual", 0):
            return self.begin(
                base,
                input_ids,
                position_ids,
                past_key_values,
                inputs_embeds,
                labels,
                attention_mask=attention_mask,
                **kwargs,
            )
        return base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def generate(self, base, *args, **kwargs):
        """The model's own generate: each time that it runs the model, it runs us around
        it."""
        model, own, before = (
            base.module,
            base.module.forward,
            vars(base.module).get("forward"),
        )
        around = functools.partial(self, Base(base.slot, base.name, own))
        model.forward = functools.wraps(own)(around)  # with the signature that it had
        try:
            return base(*args, **kwargs)
        finally:
            del model.forward
            if before is not None:
                model.forward = before


def length(past):
    """How many places a cache holds: ours, a (keys, values) pair a layer, or Hugging
    Face's."""
    if past is None:
        return 0
    return (
        past[0][0].shape[2] if isinstance(past, tuple) else int(past.get_seq_length())
    )


def token_ids(text, tokenizer, n):
    """n token ids: the text, again and again until there are n."""
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
