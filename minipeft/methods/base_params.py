"""The parameters of a whole model, shifted: for one call, or for good."""

from contextlib import ExitStack, contextmanager

import torch

from .. import targets, weights
from ..slot import Slot


def param_locations(model):
    """For each parameter of the bare model, once: [(module, name)] of all places where
    it stands. A tied one stands in several."""
    found = {}
    for module in targets.bare_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return list(found.values())


def shifted_params(model, shifts):
    """[([(module, name)] of one parameter, its shifted value)]"""
    shifted = []
    for where, shift in zip(param_locations(model), shifts):
        module, name = where[0]
        old = module._parameters[name]
        shifted.append((where, (old + shift.view_as(old)).to(old.dtype)))
    return shifted


def frozen(shifted):
    """The same, as parameters that are not trained."""
    return [(where, weights.frozen(value)) for where, value in shifted]


def put_params(values):
    """Set parameters: [([(module, name)], value)]."""
    for where, value in values:
        for module, name in where:
            module._parameters[name] = value


@contextmanager
def swapped_in(model, shifts):
    """Within it the model's parameters are the shifted ones."""
    training = model.training and torch.is_grad_enabled()
    if training and targets.uses_grad_checkpointing(model):
        raise ValueError(
            "gradient checkpointing runs layers again when the shifted weights are"
            " gone: switch it off"
        )
    with merged_beside(model):
        shifted = shifted_params(model, shifts)
        old = [(where, where[0][0]._parameters[where[0][1]]) for where, _ in shifted]
        try:
            put_params(shifted)
            yield
        finally:
            put_params(old)


@contextmanager
def merged_beside(model):
    """Within it the adapters that are merged in slots of the model run beside their
    layers: what they make of shifted weights is no shift of what they made of others.
    """
    slots = [part for part in model.modules() if isinstance(part, Slot) and part.merged]
    with ExitStack() as stack:
        for slot in reversed(slots):  # the outermost was merged first
            stack.enter_context(slot.beside())
        yield
