"""Readying a quantised model for training adapters on it."""

import torch

from ..weights import is_packed, undo_bnb_cpu_repacking


def prepare_model_for_kbit_training(
    model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None
):
    """Ready a quantised model for training adapters, in place; returns it.

    Everything is frozen. What is not quantised (norms, embeddings, the head) is kept in
    32 bits from now on. Gradient checkpointing is switched on; if it is reentrant, the
    input gets a gradient, without which it gives none.
    """
    undo_bnb_cpu_repacking(model).requires_grad_(False)
    for parameter in model.parameters():
        in_16 = parameter.dtype in (torch.float16, torch.bfloat16)
        if in_16 and not is_packed(parameter):
            parameter.data = parameter.data.float()
    if any(map(is_packed, model.parameters())) and use_gradient_checkpointing:
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
        )
    return model
