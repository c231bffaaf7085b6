"""LoRA+: B learns faster than A.

    eta_B = ratio * eta_A

Hayou, Ghosh, Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv
2402.12354.

A reads d_in numbers and B reads r: the wider the network, the smaller B's steps are
beside those it needs. Only the optimizer changes.
"""

from torch import nn

from .config import ConfigError
from .io import check_number


def create_loraplus_optimizer(
    model,
    optimizer_cls,
    *,
    lr,
    loraplus_lr_ratio,
    loraplus_weight_decay=0.0,
    loraplus_lr_embedding=1e-6,
    **kwargs,
):
    """An optimizer over what `model` trains, in Hugging Face PEFT's four groups.

    A and other matrices: lr. LoRA on embeddings: loraplus_lr_embedding. B and vectors:
    lr * loraplus_lr_ratio. Biases and norms: the same, without weight decay. kwargs go
    to optimizer_cls. Raises ConfigError.
    """
    bounds = {"above": 0, "error": ConfigError}
    check_number("lr", lr, **bounds)
    check_number("loraplus_lr_ratio", loraplus_lr_ratio, **bounds)
    check_number("loraplus_lr_embedding", loraplus_lr_embedding, **bounds)
    matrices, embeddings, fast, undecayed = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding_" in name:
            embeddings.append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            owner = model.get_submodule(name.rpartition(".")[0])
            is_norm = isinstance(owner, nn.LayerNorm)
            (undecayed if is_norm or "bias" in name else fast).append(parameter)
        else:
            matrices.append(parameter)
    if not fast and not embeddings:
        raise ConfigError("this model trains no lora_B: LoRA+ would change nothing")

    def group(params, lr, weight_decay=loraplus_weight_decay):
        return {"params": params, "lr": lr, "weight_decay": weight_decay}

    fast_lr = lr * loraplus_lr_ratio
    groups = [
        group(matrices, lr),
        group(embeddings, loraplus_lr_embedding),
        group(fast, fast_lr),
        group(undecayed, fast_lr, weight_decay=0.0),
    ]
    return optimizer_cls(groups, lr=lr, **kwargs)
