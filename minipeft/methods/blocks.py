"""The parts of a transformer's blocks, found by structure."""

import inspect
from contextlib import contextmanager

import torch
from torch import nn

from .. import targets, weights
from ..errors import TargetError


def in_out_features(module):
    """(d_in, d_out) of a linear layer; of a module that begins with one, its d_in
    twice, for what ends such a module may be a gate."""
    modules = targets.bare_modules(module)
    linear = [weights.features(m) for m in modules if weights.is_linear(m)]
    if not linear:
        raise TargetError(
            f"{type(module).__name__} has no linear layers, so its width is unknown"
        )
    d_in, d_out = linear[0]
    return (d_in, d_out) if weights.is_linear(module) else (d_in, d_in)


def find_sublayers(modules, wanted):
    """The names, for target_modules, of each block's attention and feed-forward, found
    by structure: children of a block with several linear layers. Feed-forward takes x
    alone; attention also takes masks, positions and caches. An adapter after attention
    is put at its last linear layer, which takes one tensor."""
    names, found = {}, []
    all_linear = targets.paths_of(modules, weights.is_linear)
    for path, module in modules.items():
        block = path.rpartition(".")[0]
        stack = modules.get(block.rpartition(".")[0])
        linear = [p for p in all_linear if p.startswith(f"{path}.")]
        part = isinstance(stack, nn.ModuleList) and not isinstance(module, type(stack))
        if part and len(linear) > 1:
            alone = len(inspect.signature(module.forward).parameters) == 1
            if ("feed-forward" if alone else "attention") in wanted:
                found.append(path if alone else linear[-1])
                names[found[-1].removeprefix(f"{block}.")] = None
    if not found:
        raise TargetError(
            "no blocks with attention and feed-forward are found in this model: say"
            " target_modules"
        )
    return list(names) if targets.resolve_targets(modules, names) == found else found


def find_blocks(modules):
    """The paths of the blocks that have a feed-forward part."""
    parts = targets.resolve_targets(modules, find_sublayers(modules, ("feed-forward",)))
    return [path.rpartition(".")[0] for path in parts]


def norm_before_feed_forward(block):
    """The second of a block's two norms, below an adapter of its own or not."""
    parts = [getattr(part, "base_layer", part) for part in block.children()]
    norms = [part for part in parts if weights.is_norm(part)]
    if len(norms) != 2:
        raise TargetError(
            f"{type(block).__name__} has {len(norms)} norms; a parallel adapter that"
            " reads the stream expects two, before attention and feed-forward"
        )
    return norms[1]


def hidden_states(output):
    """The tensor of a layer's output: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden_states(output, y):
    """`output` with y in the place of that tensor."""
    return (y, *output[1:]) if isinstance(output, tuple) else y


@contextmanager
def recorded_input(module):
    """Yields a list that collects the inputs of `module`. None stands for one that ran
    without gradients although they were on, as a reentrant checkpoint does."""
    inputs = []
    grad = torch.is_grad_enabled()

    def read(module, args):
        inputs.append(args[0] if torch.is_grad_enabled() == grad else None)

    handle = module.register_forward_pre_hook(read)
    try:
        yield inputs
    finally:
        handle.remove()
