"""Walking a model, and finding the modules that target names mean."""

import difflib
import json
import re
import subprocess
import sys

from .errors import TargetError
from .io import brief

REGEX_LENGTH = 100_000  # a longer expression takes minutes to compile
REGEX_SECONDS = 5  # the longest that matching one expression with all paths may take


def unwrap_slot(module):
    """The module itself, out of its slot if it is in one."""
    return module.base_layer if getattr(module, "is_slot", False) else module


def walk(model):
    """Every module below `model` once, parents first, as (path, parent, name, module).
    Slots are seen through: paths are those of the bare model, and a module in a slot is
    given as the slot."""
    yield from below(unwrap_slot(model), "", set())


def below(parent, prefix, seen):
    # not within walk: a function that calls itself from there lives until the garbage
    # collector comes by, and with it every layer that was replaced meanwhile
    for name, module in parent.named_children():
        if module not in seen:
            seen.add(module)
            yield prefix + name, parent, name, module
            yield from below(unwrap_slot(module), f"{prefix}{name}.", seen)


def modules_by_path(model):
    """{path: module} of the bare model, parents first, without slots and adapters."""
    return {path: unwrap_slot(module) for path, _, _, module in walk(model)}


def only_read(modules):
    """The paths of layers whose weights a Mamba mixer multiplies by, always or in a
    fused kernel, without calling them: an adapter there would have no effect."""
    mixers = [
        path
        for path, module in modules.items()
        if hasattr(module, "A_log") and hasattr(module, "D")
    ]
    return {f"{path}.{name}" for path in mixers for name in ("dt_proj", "out_proj")}


def parents_of(model):
    """{id of a module: [those that hold it]}"""
    parents = {}
    for parent in model.modules():
        for module in parent._modules.values():
            parents.setdefault(id(module), []).append(parent)
    return parents


def check_one_place(path, layer, holders, problem):
    """Raise TargetError, which says `problem`, for a layer that several modules, or one
    under several names, hold."""
    if len(holders) > 1:
        raise TargetError(
            f"{path}: this {type(layer).__name__} stands at {len(holders)} places of"
            f" the model, and {problem} at one of them. Give each place a module of its"
            " own (their weights may be tied)"
        )


def paths_of(modules, is_kind):
    """The paths of those of {path: module} that are of a kind."""
    return [path for path, module in modules.items() if is_kind(module)]


def bare_modules(model):
    """The model and every module below it once, parents first, without slots and
    adapters."""
    return [unwrap_slot(model), *modules_by_path(model).values()]


def embeddings(model):
    """(input embeddings, output embeddings) of a model, without slots; None for one
    that it has not."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(unwrap_slot(getattr(model, name)()))
        except (AttributeError, NotImplementedError):
            found.append(None)
    return tuple(found)


# ---- names ---------------------------------------------------------------------------


def matches_suffix(name, path):
    """True where `name` is the whole path or its last parts: "q_proj" matches
    "layers.0.self_attn.q_proj"."""
    return path == name or path.endswith("." + name)


def ends_with(name, path):
    """How modules_to_save matches, as in PEFT: "norm" matches "input_layernorm" too."""
    return path.endswith(name)


def is_found(name, paths, matches=matches_suffix):
    return any(matches(name, path) for path in paths)


def find_targets(paths, targets, matches=matches_suffix):
    """The paths that a list of names, or one regular expression, matches."""
    if isinstance(targets, str):
        return fullmatch_all(targets, paths)
    return [path for path in paths if any(matches(name, path) for name in targets)]


def resolve_targets(paths, targets, what="target_modules", matches=matches_suffix):
    """The paths that `targets` match: a list of names, each of which must be found, or
    one regular expression for whole paths.

    Raises TargetError with the nearest names there are.
    """
    found = find_targets(paths, targets, matches)
    if isinstance(targets, str):
        missing = [] if found else [targets]
    else:
        missing = [name for name in targets if not is_found(name, found, matches)]
    if missing:
        message = missing_message(paths, missing, what)
        if isinstance(targets, str):
            message += ". A string is one regular expression; names stand in a list"
        raise TargetError(message)
    return found


def missing_message(paths, missing, what):
    """ "target_modules finds no module for 'q_prj' (nearest: q_proj). There are: …" """
    last = {path.rpartition(".")[2] for path in paths}
    names = sorted(name for name in last if name and not name.isdigit()) or list(paths)
    hints = []
    for name in missing:
        near = difflib.get_close_matches(name[:200], [*names, *paths], n=3, cutoff=0.4)
        hints.append(brief(name) + f" (nearest: {', '.join(near)})" * bool(near))
    return (
        f"{what} finds no module for {'; '.join(hints)}. There are: {', '.join(names)}"
    )


def shortest_names(paths, found):
    """Names that match `found` and nothing else of `paths`: their last parts where
    these suffice, else whole paths."""
    last = sorted({path.rpartition(".")[2] for path in found})
    matched = [path for path in paths if any(matches_suffix(n, path) for n in last)]
    return last if matched == list(found) else list(found)


# ---- regular expressions -------------------------------------------------------------


def compile_regex(text):
    """A compiled regular expression. Raises TargetError where it is not one, or longer
    than REGEX_LENGTH."""
    if len(text) > REGEX_LENGTH:
        raise TargetError(
            f"{brief(text)}: a regular expression of {len(text):,} characters; expected"
            f" at most {REGEX_LENGTH:,}. Give a list of names"
        )
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise TargetError(
            f"{brief(text)} is not a regular expression: {error}"
        ) from None


def fullmatch_all(text, paths):
    """The paths that the regular expression `text` matches whole.

    Repeats can take exponential time ("(a+)+b"), and Python cannot interrupt its own
    matching: expressions that may hang run in a process of their own.
    Raises TargetError where `text` is not an expression, or needs over REGEX_SECONDS.
    """
    pattern = compile_regex(text)
    paths = list(paths)
    if not may_hang(text) or not sys.executable:
        return [path for path in paths if pattern.fullmatch(path)]
    code = (
        "import json, re, sys; text, paths = json.load(sys.stdin);"
        "print(json.dumps([p for p in paths if re.fullmatch(text, p)]))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code],
            input=json.dumps([text, paths]),
            capture_output=True,
            text=True,
            check=True,
            timeout=REGEX_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise TargetError(
            f"matching {brief(text)} takes more than {REGEX_SECONDS} seconds: repeats"
            ' within repeats, as in "(a+)+b", try every way to split a path. Give a'
            " list of names"
        ) from None
    return json.loads(done.stdout)


def may_hang(text):
    """True for an expression with a repeated group, or with more than one repeat."""
    return bool(re.search(r"\)[*+{]", text)) or len(re.findall(r"[*+{]", text)) > 1


def suffix_regex(key):
    """What a key of rank_pattern means: an expression for a path's last parts."""
    return rf"(.*\.)?({key})"


def match_pattern(patterns, path, default):
    """The value of the first pattern that matches `path`, as in rank_pattern: {regular
    expression for a path's last parts: value}."""
    for key, value in (patterns or {}).items():
        if compile_regex(suffix_regex(key)).fullmatch(path):
            return value
    return default


def layer_index(path, pattern=None):
    """The number of the layer that `path` is within, or None. `pattern` names the list
    of layers (a name, or a list of names to try); None: the outermost list."""
    names = [pattern] if isinstance(pattern, str) else pattern or [r"[^.]*"]
    for name in names:
        found = compile_regex(rf"(?:^|.*?\.){name}\.(\d+)\.").match(path)
        if found:
            return int(found[1])
    return None


def uses_grad_checkpointing(model):
    """Is gradient checkpointing on?"""
    name = "is_activation_checkpointing"  # transformers 5 renamed it
    if not hasattr(model, name):
        name = "is_gradient_checkpointing"
    return bool(getattr(model, name, False))
