"""What all checks share: the verdict, naming a mistake by what it computes, and a word
on errors."""

import functools
from pathlib import Path

import torch


class Verdict:
    """What a check found: `bool(verdict)`, and a message."""

    def __init__(self, right: bool, message: str):
        self.right, self.message = right, message

    def __bool__(self):
        return self.right

    def __str__(self):
        return ("Right. " if self.right else "Not yet. ") + self.message

    __repr__ = __str__

    def _repr_markdown_(self):
        return ("✅ **Right.** " if self.right else "❌ **Not yet.** ") + self.message


class Wrong(Exception):
    """Raised inside a check; its text is the message."""


def checks(praise: str, shapes: str = ""):
    """Turn a function that raises Wrong into a check that returns a Verdict.

    shapes: what to say of the task's shapes when the learner's do not fit together.
    """

    def decorate(function):
        @functools.wraps(function)
        def check(*answers) -> Verdict:
            try:
                function(*answers)
            except Wrong as wrong:
                return Verdict(False, str(wrong))
            except NotImplementedError:
                return Verdict(
                    False,
                    "There is nothing here yet: put your own lines in the place of "
                    "`raise NotImplementedError`.",
                )
            except Exception as error:
                return Verdict(False, explain(error, shapes))
            return Verdict(True, praise)

        return check

    return decorate


def explain(error: Exception, shapes: str) -> str:
    """An error in the learner's code: what, where, and the usual reason."""
    text, where, trace = str(error), "", error.__traceback__
    while trace is not None:  # the deepest line that is neither ours nor a library's
        file = trace.tb_frame.f_code.co_filename
        if (
            Path(file).parent != Path(__file__).parent
            and "site-packages" not in file
            and "/lib/python" not in file
        ):
            where = f" (line {trace.tb_lineno} of your cell)"
        trace = trace.tb_next
    hint = ""
    if any(
        words in text
        for words in (
            "cannot be multiplied",
            "must match",
            "size mismatch",
            "broadcast",
        )
    ):
        hint = " Two shapes do not fit. " + shapes
    elif "cannot assign" in text and "parameter" in text:
        hint = (
            " A Parameter cannot be replaced by a tensor: change it in place, under"
            " torch.no_grad()."
        )
    elif any(words in text for words in ("leaf", "in-place", "inplace")):
        hint = (
            " Changing a weight by hand is no part of the graph: do it under"
            " torch.no_grad()."
        )
    return f"Your code stopped with {type(error).__name__}: {text}{where}.{hint}"


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


def same(a, b) -> bool:
    """Equal up to rounding, for the precision of the numbers."""
    if not isinstance(a, torch.Tensor) or b is None or a.shape != b.shape:
        return False
    tolerance = 1e-8 if a.dtype == torch.float64 else 2e-4
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


def compare(got, right, mistakes: dict, what: str) -> None:
    """Raise the message of the known mistake that gives what the learner got; mistakes:
    {message: the wrong result}."""
    need(got is not None, f"{what} is None: is there a `return` at the end?")
    need(
        isinstance(got, torch.Tensor),
        f"{what} should be a tensor; yours is a {type(got).__name__}.",
    )
    if same(got, right):
        return
    for message, wrong in mistakes.items():
        if same(got, wrong):
            raise Wrong(message)
    need(
        got.shape == right.shape,
        f"{what} has the shape {tuple(got.shape)}, and should have"
        f" {tuple(right.shape)}.",
    )
    error = ((got - right).norm() / right.norm()).item()
    raise Wrong(
        f"{what} has the right shape, but differs from the formula (relative error"
        f" {error:.0%}), and it is none of the usual slips. Work out one entry by hand,"
        " in the smallest case."
    )
