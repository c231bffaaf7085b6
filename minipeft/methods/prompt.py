"""Prompt tuning: learned embeddings, prepended to the input.

    model([P; E(x)]),    P (n, d) trained,  E the frozen embedding

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt
Tuning", arXiv 2104.08691. It is the smallest of all methods, n d numbers, and it can
only steer what the model knows. It needs far higher learning rates than other methods,
and works best from the embeddings of real tokens: their entries are some hundredths,
those of RANDOM are about 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..config import ConfigError
from .kv_cache import cache_length, cache_name
from .virtual import VirtualTokens, VirtualTokensConfig, token_ids


class Prompt(VirtualTokens):
    """model([P; E(x)]): n + T embeddings go in, and n + T logits come out, as in
    PEFT."""

    def prepend(self, base, inputs):
        embed = base.module.get_input_embeddings()
        cache = inputs.get(cache_name(base.module))
        x = inputs.pop("inputs_embeds", None)
        ids = inputs.pop("input_ids", None)
        x = embed(ids) if x is None else x  # (B, T, d)
        P = self.embeddings().to(x.dtype).expand(len(x), -1, -1)  # (B, n, d)
        inputs["inputs_embeds"] = torch.cat((P, x), dim=1)  # (B, n + T, d)
        n = P.shape[1]
        if "position_ids" in inputs:
            start = cache_length(cache)  # of prefixes that stand before this prompt
            first = torch.arange(start, start + n, device=x.device)
            first = first.expand(len(inputs["position_ids"]), -1)
            inputs["position_ids"] = torch.cat((first, inputs["position_ids"]), dim=1)
        if "labels" in inputs:  # the last virtual token predicts the first real one
            inputs["labels"] = F.pad(inputs["labels"], (n, 0), value=-100)
        return base(**inputs)


INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@dataclass(kw_only=True)
class PromptTuningConfig(VirtualTokensConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    belongs_to: ClassVar[dict] = {
        "prompt_tuning_init_text": ("prompt_tuning_init", "TEXT"),
        "tokenizer_name_or_path": ("prompt_tuning_init", "TEXT"),
    }
    # N(0, 1); SAMPLE_VOCAB: embeddings of random tokens; TEXT: of a text's
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None  # repeated until the prompt is full
    # for TEXT: its name or folder, or anything with encode(text)
    tokenizer_name_or_path: object = None

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("prompt_tuning_init", INITS)
        if self.prompt_tuning_init == "TEXT" and not (
            self.prompt_tuning_init_text and self.tokenizer_name_or_path
        ):
            raise ConfigError(
                "prompt_tuning_init='TEXT' needs prompt_tuning_init_text and"
                " tokenizer_name_or_path"
            )

    def create(self, base, path):
        n = self.num_virtual_tokens
        embed = base.module.get_input_embeddings()
        P = torch.randn(n, self.token_dim)
        ids = None
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, embed.num_embeddings, (n,))
        elif self.prompt_tuning_init == "TEXT" and not self.from_checkpoint:
            text, tokenizer = self.prompt_tuning_init_text, self.tokenizer_name_or_path
            ids = token_ids(text, tokenizer, n)
        if ids is not None:
            with torch.no_grad():
                P = embed(ids.to(embed.weight.device)).float().clone()
        return Prompt(P)

    def to_dict(self):
        fields = super().to_dict()
        tokenizer = self.tokenizer_name_or_path
        if tokenizer is not None and not isinstance(tokenizer, str):
            fields["tokenizer_name_or_path"] = getattr(
                tokenizer, "name_or_path", type(tokenizer).__name__
            )
        return fields
