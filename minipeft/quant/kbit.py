"""Readying a quantised model for training adapters on it."""

import torch

from ..weights import undo_bnb_cpu_repacking


def prepare_model_for_kbit_training(
    model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None
):
    """Ready a quantised model for training adapters, in place; returns it.

    Everything is frozen. What is not quantised (norms, embeddings, the head) is kept in
    32 bits from now on. Gradient checkpointing is switched on; if it is reentrant, the
    input gets a gradient, without which it gives none.
    """
    undo_bnb_cpu_repacking(model).requires_grad_(False)
    packed = [type(p).__name__ == "Params4bit" for p in model.parameters()]
    for parameter, is_packed in zip(model.parameters(), packed):
        if parameter.dtype in (torch.float16, torch.bfloat16) and not is_packed:
            parameter.data = parameter.data.float()
    if any(packed) and use_gradient_checkpointing:
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
        )
    return model
