"""Prompt tuning: a prompt whose words are learned vectors, that need not be any word's.

    model([P; E(x)]),    P (n, d) trained,  E the frozen embedding

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt
Tuning", arXiv 2104.08691. It is the smallest of all methods, n d numbers, and it can
only steer what the model knows. It wants learning rates far above those of other
methods, and a start among real tokens: their entries are some hundredths, those of
RANDOM are about 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..config import ConfigError
from .virtual import VirtualTokens, VirtualTokensConfig, length, token_ids

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@dataclass(kw_only=True)
class PromptTuningConfig(VirtualTokensConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    # N(0, 1); SAMPLE_VOCAB: embeddings of random tokens; TEXT: of a text's
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None  # repeated until the prompt is full
    # for TEXT: its name or folder, or anything with encode(text)
    tokenizer_name_or_path: object = None

    def __post_init__(self):
        super().__post_init__()
        if self.prompt_tuning_init not in INITS:
            raise ConfigError(
                f"unknown prompt_tuning_init {self.prompt_tuning_init!r}; valid:"
                f" {', '.join(INITS)}"
            )
        if self.prompt_tuning_init == "TEXT" and not (
            self.prompt_tuning_init_text and self.tokenizer_name_or_path
        ):
            raise ConfigError(
                "prompt_tuning_init='TEXT' needs prompt_tuning_init_text and"
                " tokenizer_name_or_path"
            )

    def create(self, base, path):
        n, embed = self.num_virtual_tokens, base.module.get_input_embeddings()
        start, ids = torch.randn(n, self.token_dim), None
        if self.prompt_tuning_init == "TEXT" and not getattr(self, "given", False):
            ids = token_ids(
                self.prompt_tuning_init_text, self.tokenizer_name_or_path, n
            )
        elif self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, embed.num_embeddings, (n,))
        if ids is not None:
            with torch.no_grad():
                start = embed(ids.to(embed.weight.device)).float().clone()
        return Prompt(start)

    def to_dict(self):
        fields, tokenizer = super().to_dict(), self.tokenizer_name_or_path
        if tokenizer is not None and not isinstance(tokenizer, str):
            fields["tokenizer_name_or_path"] = getattr(
                tokenizer, "name_or_path", type(tokenizer).__name__
            )
        return fields


class Prompt(VirtualTokens):
    """Virtual tokens in the input: n + T embeddings go in, and as many logits come out,
    as in PEFT."""

    def begin(self, base, input_ids, position_ids, past, embeds, labels, **kwargs):
        # (B, T, d)
        x = base.module.get_input_embeddings()(input_ids) if embeds is None else embeds
        prompt = self.embeddings().to(x.dtype)
        x = torch.cat((prompt.expand(len(x), -1, -1), x), dim=1)  # (B, n + T, d)
        if position_ids is not None:
            own = length(past) + torch.arange(len(prompt), device=x.device).expand(
                len(position_ids), -1
            )
            position_ids = torch.cat((own, position_ids), dim=1)  # (B, n + T)
        if labels is not None:  # the last virtual token predicts the first real one
            labels = F.pad(labels, (len(prompt), 0), value=-100)
        return base(
            inputs_embeds=x,
            position_ids=position_ids,
            past_key_values=past,
            labels=labels,
            **kwargs,
        )
