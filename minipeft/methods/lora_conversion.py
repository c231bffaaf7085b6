"""A PiSSA or OLoRA as a plain LoRA of twice the rank. See lora_init.py."""

import dataclasses
import math

import torch

from ..config import ConfigError


def as_lora(config, tensors, start):
    """The adapter {key: tensor} that began as `start`, as a plain LoRA of rank 2r for
    the base from before."""
    is_lora = config.peft_type == "LORA" and not config.use_dora
    if not is_lora or config.init_lora_weights == "loftq":
        raise ConfigError(
            "only a PiSSA or OLoRA without use_dora can be converted to a plain LoRA of"
            " twice the rank"
        )
    if differ := tensors.keys() ^ start.keys():
        raise ConfigError(
            "the initial adapter is another one: only one of the two has"
            f" {', '.join(sorted(differ))}"
        )
    doubled = dict(tensors)
    for key, tensor in tensors.items():
        if "lora_A" in key or "lora_embedding_A" in key:
            doubled[key] = torch.cat([tensor, start[key].to(tensor)], 0)  # (2r, d_in)
        elif key.endswith("lora_B.weight") or "lora_embedding_B" in key:
            doubled[key] = torch.cat([tensor, -start[key].to(tensor)], 1)  # (d_out, 2r)
    times = math.sqrt(2) if config.use_rslora else 2  # of alpha, so that s stays
    config = dataclasses.replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=times * config.lora_alpha,
        rank_pattern={path: 2 * r for path, r in config.rank_pattern.items()},
        alpha_pattern={path: times * a for path, a in config.alpha_pattern.items()},
    )
    return config, doubled
