"""Where a learner's code stopped: the line, the part of it that could not be computed,
and what each of its names held.

    place(error)  ->  " (line 3 of your cell, at `x @ A`: x is (4, 5), A is (3, 5))"
"""

import ast
import itertools
import linecache
import textwrap
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch
from torch import nn

SHOWN = 90  # characters of an expression
PACKAGE = Path(__file__).parents[2]


def place(error: BaseException) -> str:
    """The deepest place that is neither the package's nor a library's, or nothing;
    "<string>" is a dataclass's own `__init__`."""
    where, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if of_the_learner(file) and not (where and file == "<string>"):
            where = f" (line {trace.tb_lineno} of your cell{at(trace)})"
        trace = trace.tb_next
    return where


def of_the_learner(file: str) -> bool:
    return (
        PACKAGE not in Path(file).parents
        and "site-packages" not in file
        and "/lib/python" not in file
    )


def at(trace: TracebackType) -> str:
    """The expression that failed, and what its names held."""
    text = expression(trace.tb_frame.f_code, trace.tb_lasti)
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return ""
    if len(text) > SHOWN:
        return ""
    values = [(name, held(node, trace.tb_frame)) for name, node in names(tree)]
    told = [f"{name} is {value}" for name, value in values if value]
    return f", at `{text}`" + (f": {', '.join(told)}" if told else "")


def expression(code: CodeType, instruction: int) -> str:
    """The source of the part that an instruction belongs to, on one line; nothing
    where the source is not known."""
    span = next(itertools.islice(code.co_positions(), instruction // 2, None), None)
    if span is None or None in span:
        return ""
    first, last, begin, end = span
    lines = [
        linecache.getline(code.co_filename, n).encode() for n in range(first, last + 1)
    ]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][begin:]
    text = b"".join(lines).decode(errors="ignore")
    return looped_over(text, begin) or " ".join(text.split())


def looped_over(text: str, begin: int) -> str:
    """Where a whole loop failed, what it goes through; else nothing. begin: how far
    the first line was indented."""
    if not text.startswith("for "):
        return ""
    try:
        (loop,) = ast.parse(textwrap.dedent(" " * begin + text)).body
    except SyntaxError:
        return ""
    return ast.unparse(loop.iter)


def names(tree: ast.AST) -> list:
    """(text, node) of each name and each attribute that is read, once, in their order;
    what is called is left out."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = {}
    for node in ast.walk(tree):
        of_a_name = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if (isinstance(node, ast.Name) or of_a_name) and id(node) not in called:
            found.setdefault(ast.unparse(node), node)
    return sorted(found.items(), key=lambda each: (each[1].lineno, each[1].col_offset))


def held(node: ast.AST, frame: FrameType) -> str:
    """What a name or a module's attribute holds, in a few words, or nothing."""
    scope = frame.f_globals | frame.f_locals
    if isinstance(node, ast.Name):
        return in_words(scope[node.id]) if node.id in scope else ""
    owner = scope.get(node.value.id)
    if not isinstance(owner, nn.Module) or not hasattr(owner, node.attr):
        return ""
    return in_words(getattr(owner, node.attr))


def in_words(value) -> str:
    """A tensor's shape, a short number or text, a list's length, None; nothing of
    anything else."""
    if isinstance(value, torch.Tensor):
        kind = "" if value.is_floating_point() else f" {str(value.dtype)[6:]}"
        return f"{tuple(value.shape)}{kind}" if value.dim() else f"one number{kind}"
    if isinstance(value, list | tuple | dict | set):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 20 else ""
    return ""
