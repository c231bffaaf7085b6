"""Walking through a model, and finding the modules that target names mean."""

import difflib
import re

from .errors import TargetError


def unwrap_slot(module):
    """The module itself, out of its slot if it is in one."""
    return module.base_layer if getattr(module, "is_slot", False) else module


def walk(model):
    """Every module below `model` once, parents first, as (path, parent, name, module).
    Slots are seen through: paths are those of the bare model, and a module that is in a
    slot comes as the slot."""
    seen = set()

    def below(parent, prefix):
        for name, module in parent.named_children():
            if module not in seen:
                seen.add(module)
                yield prefix + name, parent, name, module
                yield from below(unwrap_slot(module), f"{prefix}{name}.")

    yield from below(unwrap_slot(model), "")


def bare_modules(model):
    """The model and every module below it once, parents first, without slots and
    adapters."""
    return [
        unwrap_slot(model),
        *(unwrap_slot(module) for _, _, _, module in walk(model)),
    ]


def progress(items, what):
    """Shows progress over a list of layers, once it takes longer than three seconds."""
    from tqdm import tqdm

    return tqdm(items, desc=what, delay=3, leave=False)


def matches_suffix(name, path):
    """Does `name` mean `path`? It is the whole path or its end: "q_proj" means
    "layers.0.self_attn.q_proj"."""
    return path == name or path.endswith("." + name)


def ends_with(name, path):
    """What modules_to_save means by a name, as in PEFT: "norm" means "input_layernorm"
    too."""
    return path.endswith(name)


def compile_regex(text):
    """A compiled regular expression; TargetError where it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise TargetError(f"{text!r} is no regular expression: {error}") from None


def match_pattern(patterns, path, default):
    """The value of the first pattern (a regular expression for the end of a path) that
    fits, as in rank_pattern."""
    return next(
        (
            value
            for key, value in (patterns or {}).items()
            if compile_regex(rf"(.*\.)?({key})$").match(path)
        ),
        default,
    )


def in_layers(path, indices, pattern):
    """Is `path` within one of the numbered layers `indices`? `pattern` names the list
    of layers; None: any list."""
    lists = [pattern] if isinstance(pattern, str) else pattern or [r"[^.]*"]
    found = next(
        filter(
            None,
            (
                compile_regex(rf"(?:^|.*?\.){name}\.(\d+)\.").match(path)
                for name in lists
            ),
        ),
        None,
    )
    return found is not None and int(found[1]) in (
        [indices] if isinstance(indices, int) else indices
    )


def resolve_targets(paths, targets, what="target_modules", fits=matches_suffix):
    """The paths that `targets` mean: a list of names, each of which must be found, or
    one regular expression.

    Raises TargetError that lists the nearest names there are.
    """
    if isinstance(targets, str):
        found = [path for path in paths if compile_regex(targets).fullmatch(path)]
        missing = [] if found else [targets]
    else:
        found = [path for path in paths if any(fits(name, path) for name in targets)]
        missing = [
            name for name in targets if not any(fits(name, path) for path in found)
        ]
    if missing:
        short = {path.rpartition(".")[2] for path in paths}
        short = sorted(name for name in short if name and not name.isdigit()) or list(
            paths
        )
        near = {
            name: difflib.get_close_matches(name, [*short, *paths], n=3, cutoff=0.4)
            for name in missing
        }
        hints = [
            f"{name!r}" + (f" (nearest: {', '.join(near[name])})" if near[name] else "")
            for name in missing
        ]
        raise TargetError(
            f"{what} finds no module for {'; '.join(hints)}. There are:"
            f" {', '.join(short)}"
        )
    return found


def shortest_names(paths, found):
    """Names for `found` that mean just these of all `paths`: the last parts, if they
    suffice; else whole paths."""
    ends = sorted({path.rpartition(".")[2] for path in found})
    return (
        ends
        if [path for path in paths if any(matches_suffix(name, path) for name in ends)]
        == list(found)
        else list(found)
    )


def uses_grad_checkpointing(model):
    """Does it compute activations again in the backward pass?"""
    name = "is_activation_checkpointing"  # transformers 5 renamed it
    return bool(
        getattr(
            model, name if hasattr(model, name) else "is_gradient_checkpointing", False
        )
    )
