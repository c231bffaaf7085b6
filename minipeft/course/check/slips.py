"""A formula with one step of it done otherwise. What a learner got is compared with
each such result, so that a check names the step without a list of its own.

    Formula(norms, W, A, B, s).explain(got, "Your norm")

raises "Your norm is what the formula gives when the root of … is left out", where that
is so. It says what the numbers show and nothing more: where several steps, done
otherwise, give the same, it names them all, or nothing if they are many.
"""

import ast
import copy
import functools
import inspect
import textwrap
import warnings

import torch

from .sandbox import Wrong
from .teacher import same

SHOWN = 44  # characters of a part that is quoted
NAMED = 3  # steps that one message names at most


class Formula:
    """A function that is written as the formula stands in the chapter, and its
    arguments. It is taken apart by its source.

    whole: all that the learner's function returned, where a part of it is compared.
    after: what becomes of the formula's result before it is compared.
    """

    def __init__(self, function, *values, whole=None, after=None):
        self.function, self.values = function, values
        self.whole, self.after = whole, after

    def then(self, after):
        """The same formula, with another thing done to its result."""
        return Formula(self.function, *self.values, whole=self.whole, after=after)

    def explain(self, got, what: str) -> None:
        """Raise the name of the step that gives what the learner got."""
        words = self.steps_that_give(got if self.whole is None else self.whole)
        if 1 <= len(words) <= NAMED:
            said = ", or when ".join(words)
            raise Wrong(f"{what} is what the formula gives when {said}.")

    @torch.no_grad()
    def steps_that_give(self, got) -> list:
        """The ways of doing one step otherwise that give this, in words."""
        right, found = self.result(self.function), []
        with warnings.catch_warnings(action="ignore"):
            for words, other in variations(self.function):
                try:
                    wrong = self.result(other)
                except Exception:  # shapes that do not fit, a dimension that is not
                    continue
                if alike(got, wrong) and not alike(wrong, right):
                    found.append(words)
        return list(dict.fromkeys(found))

    def result(self, function):
        result = function(*map(fresh, self.values))
        return result if self.after is None else self.after(result)


def fresh(value):
    """A copy, without its graph."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)(map(fresh, value))
    return copy.copy(value)


def alike(a, b) -> bool:
    """Equal up to rounding: tensors, numbers, and lists or dictionaries of them."""

    if isinstance(b, list | tuple) and isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(b, dict) and isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in b)
    if isinstance(b, torch.Tensor) or isinstance(b, float):
        return same(as_tensor(a), as_tensor(b))
    return type(a) is type(b) and a == b


def as_tensor(value):
    number = isinstance(value, int | float)
    return torch.tensor(float(value), dtype=torch.float64) if number else value


# ---- the steps of a formula, done otherwise ------------------------------------------


def variations(function):
    """(words, function) for each way of doing one of its steps otherwise."""
    names = function.__globals__ | inspect.getclosurevars(function).nonlocals
    for words, code in codes(function.__code__):
        scope = dict(names)
        exec(code, scope)
        yield words, scope[function.__name__]


@functools.cache
def codes(code) -> list:
    """(words, compiled source) of each variation of the function with this code."""
    tree = ast.parse(textwrap.dedent("".join(inspect.getsourcelines(code)[0])))
    found = []
    for parent, field, at in places(tree):
        node = child(parent, field, at)
        for words, new in otherwise(node, parent):
            put(parent, field, at, new)
            ast.fix_missing_locations(tree)
            found.append((words, compile(tree, "<a slip>", "exec")))
            put(parent, field, at, node)
    return found


def places(tree) -> list:
    """Where each node of a tree stands: (parent, field, place in the field's list)."""
    found = []
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if isinstance(value, list):
                found += [(parent, field, at) for at in range(len(value))]
            elif isinstance(value, ast.AST):
                found.append((parent, field, None))
    return found


def child(parent, field, at):
    value = getattr(parent, field)
    return value if at is None else value[at]


def put(parent, field, at, node) -> None:
    if at is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[at] = node


def otherwise(node, parent):
    """(words, the new node) of each way in which one step can go wrong."""
    if is_number(node):
        yield from another_number(node, parent)
    elif isinstance(node, ast.BinOp):
        yield from operation(node)
    elif isinstance(node, ast.UnaryOp):
        what = "minus" if isinstance(node.op, ast.USub) else "“not”"
        yield f"the {what} before {quoted(node.operand)} is left out", node.operand
    elif isinstance(node, ast.Compare):
        yield from comparison(node)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield f"{quoted(node.value)} is not transposed", node.value
    elif isinstance(node, ast.Call):
        yield from call(node)


def quoted(node) -> str:
    """A part of the formula: as it is if it is short, else by what stands in it."""
    text = ast.unparse(node)
    if len(text) <= SHOWN:
        return f"`{text}`"
    called = {id(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)}
    names = [one for one in ast.walk(node) if isinstance(one, ast.Name)]
    names = sorted({f"`{one.id}`" for one in names if id(one) not in called})
    return f"the part with {', '.join(names)}"


def operation(node):
    """A sum, a difference, a product, a quotient or a power."""
    left, right = node.left, node.right
    a, b, both = quoted(left), quoted(right), quoted(node)

    def of(one, operator, other):
        return ast.BinOp(one, operator, other)

    match node.op:
        case ast.Add():
            yield f"the term {b} is left out", left
            yield f"the term {a} is left out", right
            yield f"{b} is subtracted, not added", of(left, ast.Sub(), right)
            yield f"{b} is a factor, not a term", of(left, ast.Mult(), right)
        case ast.Sub():
            yield f"{b} is not subtracted from {a}", left
            yield f"{b} stands in the place of {both}", right
            yield f"{b} is added, not subtracted", of(left, ast.Add(), right)
            yield f"{both} has the other sign", of(right, ast.Sub(), left)
        case ast.Mult():
            yield f"the factor {b} is left out", left
            yield f"the factor {a} is left out", right
            yield f"{a} is divided by {b}, not multiplied", of(left, ast.Div(), right)
            yield f"{b} is divided by {a}, not multiplied", of(right, ast.Div(), left)
            yield f"{b} is added to {a}, not multiplied", of(left, ast.Add(), right)
            yield f"the factor {b} is in it twice", of(node, ast.Mult(), right)
            yield f"the factor {a} is in it twice", of(left, ast.Mult(), node)
        case ast.Div():
            yield f"nothing is divided by {b}", left
            yield f"{b} stands in the place of {both}", right
            yield f"{a} is multiplied by {b}, not divided", of(left, ast.Mult(), right)
            yield f"{both} is turned over", of(right, ast.Div(), left)
            yield f"it is divided by {b} once more", of(node, ast.Div(), right)
        case ast.MatMult():
            yield f"the product with {b} is left out", left
            yield f"the product with {a} is left out", right
            yield f"the sides of {both} are swapped", of(right, ast.MatMult(), left)
        case ast.Pow():
            yield f"the power of {a} is left out", left
            yield f"{b} stands in the place of {both}", right
            yield f"the sides of {both} are swapped", of(right, ast.Pow(), left)
        case _:
            yield f"{a} stands in the place of {both}", left
            yield f"{b} stands in the place of {both}", right
            yield f"the sides of {both} are swapped", of(right, node.op, left)
            if isinstance(node.op, ast.FloorDiv):
                yield f"{both} is no whole number", of(left, ast.Div(), right)


BORDERS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
TURNED = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt}
TURNED |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


def comparison(node):
    kind = type(node.ops[0])
    if kind in BORDERS:
        words = "counts as well" if kind in (ast.Lt, ast.Gt) else "does not count"
        other = ast.Compare(node.left, [BORDERS[kind]()], node.comparators)
        yield f"in {quoted(node)} equality {words}", other
    if kind in TURNED:
        other = ast.Compare(node.left, [TURNED[kind]()], node.comparators)
        yield f"{quoted(node)} is turned round", other


# ---- functions -----------------------------------------------------------------------

DOES = {  # in words
    "sqrt": "the root",
    "abs": "the absolute value",
    "square": "the square",
    "exp": "the exponential",
    "log": "the logarithm",
    "sum": "the sum",
    "mean": "the mean",
    "norm": "the norm",
    "vector_norm": "the norm",
    "softmax": "the softmax",
    "logsumexp": "the logarithm of the sum of exponentials",
    "sigmoid": "the sigmoid",
    "round": "rounding",
    "amax": "the maximum",
    "amin": "the minimum",
    "max": "the maximum",
    "min": "the minimum",
}
RELATIVES = {"sum": "mean", "mean": "sum", "norm": "sum", "amax": "amin"}
RELATIVES |= {"amin": "amax", "max": "min", "min": "max", "argmax": "argmin"}
RELATIVES |= {"any": "all", "all": "any", "tril": "triu", "triu": "tril"}
RELATIVES |= {"argmin": "argmax"}
MODULES = "torch", "F", "nn", "math", "torch.linalg", "nn.functional"


def function_of(node) -> tuple:
    """The name of what is called, and the object whose method it is, or None."""
    if not isinstance(node.func, ast.Attribute):
        return ast.unparse(node.func), None
    owner = node.func.value
    return node.func.attr, None if ast.unparse(owner) in MODULES else owner


def in_words(name: str) -> str:
    return DOES.get(name, f"`{name}`")


def call(node):
    """A function left out, taken for a relative, or without one of its options."""
    name, owner = function_of(node)
    for value in node.args[:1] if owner is None else [owner]:
        yield f"{in_words(name)} of {quoted(value)} is left out", value
    other = RELATIVES.get(name) if owner is not None else None
    if other:
        taken = ast.Attribute(owner, other, ast.Load())
        words = f"{in_words(other)} of {quoted(owner)} is taken, not {in_words(name)}"
        yield words, ast.Call(taken, node.args, node.keywords)
    for at, option in enumerate(node.keywords):
        rest = node.keywords[:at] + node.keywords[at + 1 :]
        without = f"{in_words(name)} is taken without `{ast.unparse(option)}`"
        yield without, ast.Call(node.func, node.args, rest)


def is_number(node) -> bool:
    """A number, perhaps with a minus."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def another_number(node, parent):
    """One more, one less, or the other sign."""
    number = ast.literal_eval(node)
    for other in (number + 1, number - 1, -number):
        if other != number:
            words = f"{other} stands in the place of {number} in {quoted(parent)}"
            if isinstance(parent, ast.Call):
                name, _ = function_of(parent)
                words = f"{in_words(name)} has {other} in the place of {number}"
            yield words, ast.Constant(other)
