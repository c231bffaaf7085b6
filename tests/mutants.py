"""Mutation analysis of the course's checks: `python tests/mutants.py` writes the table
tests/data/mutants.json, and test_mutants.py holds it.

Each solution of a notebook is changed mechanically, one node of its syntax tree at a
time: operands swapped, a term or a factor dropped, a transpose, a sign, an axis, a
comparison, a number off by one, a detach. A check should refuse every mutant that
behaves differently. Whether it does is judged without the check: solution and mutant
get the arguments that the check has used, other numbers of the same shapes (in 64 and
in 32 bits, zeros, equal ones), and outputs and all gradients are compared. A mutant
that is accepted and differs is a hole in the check.
"""

import argparse
import ast
import builtins
import contextlib
import copy
import functools
import hashlib
import importlib
import io
import json
import linecache
import sys
from pathlib import Path

import torch

from minipeft.course import check
from minipeft.course.check import sandbox

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "data" / "mutants.json"
LIMIT = 5  # seconds for one mutant, of the processor's time alone
PATIENCE = 1000  # by the clock, so that a busy machine refuses none
# what a learner's answer may differ by from the solution: no rounding, a judgement
ALIKE = {"rtol": 1e-3, "atol": 1e-5}
# a message that names no mistake; an error that is shown with its place does: it quotes
# the expression and says what its names hold
UNNAMED = "none of the usual slips", "I cannot work with"
STOPPED, PLACED = "Your code stopped with", " of your cell, at `"


# ----------------------------------------------------------------------- the solutions


def solutions() -> dict:
    """{exercise: (chapter, source of the solution, names that the check is given, its
    keyword arguments)}"""
    found = {}
    for path in sorted((ROOT / "chapters").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            marks = cell["metadata"].get("minipeft", {})
            if marks.get("role") == "solution":
                source = "".join(cell["source"])
                called = asked(source)
                if called:
                    check_name, names, settings = called
                    found[check_name] = path.name[:2], source, names, settings
    return found


def fingerprint(source: str) -> str:
    """Of what a solution computes: its syntax tree, without comments and layout, and
    without empty fields, of which each Python has others."""

    def said(node):
        if isinstance(node, list):
            return [said(one) for one in node]
        if not isinstance(node, ast.AST):
            return node
        kept = [(n, said(v)) for n, v in ast.iter_fields(node) if v not in (None, [])]
        return (type(node).__name__, kept)

    return hashlib.sha256(repr(said(ast.parse(source))).encode()).hexdigest()[:12]


def asked(source: str):
    """The name of the check at the end of a solution, those of what it is given, and
    its keyword arguments."""
    for node in reversed(ast.parse(source).body):
        call = getattr(node, "value", None)
        if isinstance(node, ast.Expr) and isinstance(call, ast.Call):
            if ast.unparse(call.func).startswith("check."):
                names = [ast.unparse(one) for one in call.args]
                settings = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
                return call.func.attr, names, settings
    return None


def namespace() -> dict:
    """What the first cell of a chapter imports."""
    values = {"cut_graph": cut_graph}
    exec(
        "import copy, itertools, math, random, re, zlib\n"
        "from collections import Counter\n"
        "from itertools import combinations, product\n"
        "from dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from minipeft import *\nfrom minipeft.course import compare\n"
        "from minipeft.weights import linear_features\n"
        "from statistics import NormalDist, fmean, mean\n"
        "import statistics\nimport numpy as np\nimport torch\n"
        "import torch.nn.functional as F\n"
        "from torch import nn\nfrom types import SimpleNamespace\n",
        values,
    )
    return values


def built(tree: ast.Module, names) -> list:
    """The answers that a solution's tree defines, without its call of the check."""
    body = [node for node in tree.body if not ast.unparse(node).startswith("check.")]
    values = namespace()
    text = ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
    # as a notebook does it, so that a message can quote the line
    linecache.cache["<answer>"] = len(text), None, text.splitlines(True), "<answer>"
    exec(compile(text, "<answer>", "exec"), values)
    return [values[name] for name in names]


# ------------------------------------------------------------------------- the mutants

COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
}
CALLS = {"sum": "mean", "mean": "sum", "tril": "triu", "amax": "amin", "any": "all"}
CALLS |= {"all": "any", "max": "min", "min": "max", "argmax": "argmin", "norm": "sum"}


def changes(node):
    """(what is changed, the new node) for every change of one expression."""
    if isinstance(node, ast.BinOp):
        yield "left alone", node.left
        yield "right alone", node.right
        if not isinstance(node.op, ast.Add | ast.Mult):  # which commute
            yield "operands swapped", ast.BinOp(node.right, node.op, node.left)
        if type(node.op) in OPERATORS:
            other = OPERATORS[type(node.op)]()
            yield "operator", ast.BinOp(node.left, other, node.right)
    if isinstance(node, ast.UnaryOp):
        yield "sign or not dropped", node.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        other = [COMPARED[type(node.ops[0])]()]
        yield "comparison", ast.Compare(node.left, other, node.comparators)
    if isinstance(node, ast.BoolOp):
        other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield "and, or", ast.BoolOp(other, node.values)
    if isinstance(node, ast.Constant):
        yield from constants(node.value)
    if isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield "transpose dropped", node.value
    if isinstance(node, ast.Call):
        yield from calls(node)


def constants(value):
    if isinstance(value, bool):
        yield "boolean", ast.Constant(not value)
    elif isinstance(value, int | float):
        yield "one more", ast.Constant(value + 1)
        yield "one less", ast.Constant(value - 1)


def calls(node):
    """A method left out, replaced by a relative, or without one of its options."""
    function = node.func
    if isinstance(function, ast.Attribute):
        root = ast.unparse(function.value)
        if root not in (
            "torch",
            "F",
            "nn",
            "math",
            "nn.init",
            "torch.linalg",
            "super()",
        ):
            yield "call dropped", function.value
        if function.attr in CALLS:
            other = ast.Attribute(function.value, CALLS[function.attr], ast.Load())
            yield "other call", ast.Call(other, node.args, node.keywords)
    for at in range(len(node.keywords)):
        rest = node.keywords[:at] + node.keywords[at + 1 :]
        yield "option dropped", ast.Call(function, node.args, rest)


def detached(node):
    """A variable that is read, cut from its graph."""
    known = namespace()
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        if node.id in known or node.id in dir(builtins):
            return
        cut = ast.parse(f"cut_graph({node.id})", mode="eval").body
        yield "detached", cut


def mutants(source: str, learnt: bool) -> list:
    """(what, source) for each change of each expression in a solution; learnt: whether
    gradients count."""
    tree = ast.parse(source)
    tree.body = tree.body[:-1]  # without the call of the check
    count = sum(1 for _ in ast.walk(tree))
    found, seen = [], set()
    for at in range(count):
        node = list(ast.walk(tree))[at]
        for kind, _ in options(node, learnt):
            changed = copy.deepcopy(tree)
            place = list(ast.walk(changed))[at]
            new = next(new for other, new in options(place, learnt) if other == kind)
            Replace(place, new).visit(changed)
            text = ast.unparse(ast.fix_missing_locations(changed))
            if text not in seen:
                seen.add(text)
                line = getattr(node, "lineno", 0)
                found.append((f"line {line}: {kind} in {ast.unparse(node)}", text))
    return found


def options(node, learnt: bool) -> list:
    return [*changes(node), *(detached(node) if learnt else [])]


class Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def generic_visit(self, node):
        if node is self.old:
            return self.new
        return super().generic_visit(node)


def cut_graph(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


# --------------------------------------------------------------------------- the judge


def record(name: str, answers, settings=None) -> list:
    """[(which answer, its arguments)] of the calls that a check makes."""
    seen = []

    def noting(at, answer):
        def called(*args, **kwargs):
            seen.append((at, copied(args)))
            return answer(*args, **kwargs)

        return called

    for sandbox.variant in (0, 1):
        noted = [noting(at, one) for at, one in enumerate(answers)]
        getattr(check, name)(*noted, **(settings or {}))
    sandbox.variant = 0
    return seen


def copied(args):
    """Copies of arguments, tensors as leaves with the same requires_grad."""
    return [
        one.detach().clone().requires_grad_(one.requires_grad)
        if isinstance(one, torch.Tensor)
        else copy.deepcopy(one)
        for one in args
    ]


def inputs(args, generator) -> list:
    """The arguments themselves, and others of the same shapes: random, in 32 bits,
    with zeros, all alike."""

    def each(change):
        return [
            change(one.detach()).requires_grad_(one.requires_grad)
            if isinstance(one, torch.Tensor) and one.is_floating_point()
            else copy.deepcopy(one)
            for one in args
        ]

    def noise(tensor):
        fresh = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        scaled = fresh * tensor.double().std(correction=0).clamp(min=0.1)
        return (scaled.abs() if (tensor >= 0).all() else scaled).to(tensor.dtype)

    return [each(torch.clone), each(noise), each(lambda tensor: noise(tensor).float())]


def outcome(answer, args):
    """What an answer does: its values and all gradients, or its error."""
    leaves = [one for one in args if learnable(one)]
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = answer(*args)
    except Exception as error:
        return "error", type(error).__name__, []
    parts = flat(result)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    learnt = [part for part in tensors if part.requires_grad]
    grads = []
    if learnt and leaves:
        total = sum((part * part.detach().cos()).sum() for part in learnt)
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        grads = [torch.zeros_like(a) if g is None else g for a, g in zip(leaves, found)]
    return "value", parts, grads


def learnable(value) -> bool:
    """Whether the exercise gives it as a leaf."""
    return isinstance(value, torch.Tensor) and value.requires_grad


def flat(result) -> list:
    if isinstance(result, dict):
        return [part for key in sorted(result, key=str) for part in flat(result[key])]
    if isinstance(result, list | tuple):
        return [len(result), *(part for one in result for part in flat(one))]
    return [result]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape:
            return False
        both = a.detach().double(), b.detach().double()
        return torch.allclose(*both, **ALIKE, equal_nan=True)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= ALIKE["atol"] * max(abs(a), abs(b)) or a == b
    return a == b


def differs(reference, mutant, calls) -> bool:
    """Whether some input gives other outputs, or other gradients."""
    generator = torch.Generator().manual_seed(0)
    for at, args in calls:
        for given in inputs(args, generator):
            one, two = (
                outcome(answers[at], copied(given)) for answers in (reference, mutant)
            )
            if one[0] == "error":
                continue  # no fair question
            if one[0] != two[0] or len(one[1]) != len(two[1]):
                return True
            if not all(map(equal, one[1] + one[2], two[1] + two[2])):
                return True
            if len(one[2]) != len(two[2]):
                return True
    return False


# --------------------------------------------------------------------------- the table


def is_named(message: str) -> bool:
    if any(words in message for words in UNNAMED):
        return False
    return STOPPED not in message or PLACED in message


def analysed(name: str, source: str, names, settings, step: int = 1) -> dict:
    """The row of an exercise: how many mutants, how many killed, named, and left."""
    judge = functools.partial(getattr(check, name), **settings)
    row = {"mutants": 0, "killed": 0, "named": 0}
    row |= {"equivalent": [], "holes": [], "unjudged": []}
    answers = built(ast.parse(source), names)
    judged = all(callable(one) and not isinstance(one, type) for one in answers)
    calls = record(name, answers, settings) if judged else []
    verdict = judge(*answers)
    if not verdict:  # it needs other cells of its chapter
        raise LookupError(f"{name}: {verdict.message}")
    learnt = not judged or any(learnable(one) for _, args in calls for one in args)
    for what, text in mutants(source, learnt)[::step]:
        try:
            mutant = built(ast.parse(text), names)
        except Exception:
            continue  # it cannot even be defined
        row["mutants"] += 1
        with contextlib.redirect_stdout(io.StringIO()):
            verdict = judge(*mutant)
        if not verdict:
            row["killed"] += 1
            row["named"] += is_named(verdict.message)
        elif not judged:
            row["unjudged"].append(what)
        else:
            wrong = differs(answers, mutant, calls)
            row["holes" if wrong else "equivalent"].append(what)
    return row


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exercises", nargs="*", help="only these (default: all)")
    chosen = parser.parse_args(argv).exercises
    importlib.import_module("torch._dynamo")  # torch.optim's first use loads it
    sandbox.LIMIT, sandbox.PATIENCE = LIMIT, PATIENCE
    table = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else {}
    found = solutions()
    table = {name: row for name, row in table.items() if name in found}
    for name, (chapter, source, names, settings) in found.items():
        if chosen and name not in chosen:
            continue
        if table.get(name, {}).get("solution") == fingerprint(source) and not chosen:
            continue  # a table that was cut goes on
        try:
            row = analysed(name, source, names, settings)
        except (LookupError, NameError) as error:
            print("left out:", error)
            table.pop(name, None)
            continue
        table[name] = {"chapter": chapter, "solution": fingerprint(source)} | row
        print(name, row, flush=True)
        ordered = dict(sorted(table.items(), key=lambda one: (one[1]["chapter"], one)))
        text = json.dumps(ordered, indent=1, ensure_ascii=False)
        TABLE.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
