"""What all checks share: the verdict, comparing values and gradients, naming a mistake
by what it computes, and a word on errors."""

import functools
from pathlib import Path

import torch

from . import sandbox
from .sandbox import NOTHING, TooLong, Watch, Wrong, guarded
from .stop import place

# what 32 bits leave of a result of our sizes: 168 times their rounding, relative to the
# largest entry. A learner may compute in 32 bits where a check computes in 64.
TOLERANCE = 2e-5
watch = Watch()  # of the check that runs


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


def checks(praise: str, shapes: str = "", in_place: bool = False):
    """Turn a function that raises Wrong into a check that returns a Verdict.

    shapes: what to say of the task's shapes when the learner's do not fit together.
    in_place: whether the exercise asks to change an argument.
    """

    def decorate(function):
        @functools.wraps(function)
        def check(*answers, **numbers) -> Verdict:
            global watch
            watch = Watch()
            answers = [watch.wrap(answer, in_place) for answer in answers]
            # twice, with other numbers of the same shapes: a function that remembers
            # its results by their shapes is found out
            for turn in (0, 1):
                try:
                    with guarded(function.__name__, sandbox.LIMIT, turn) as guard:
                        message = failure(function, answers, numbers, shapes, guard)
                except TooLong:  # it came between two lines of the check itself
                    message = too_long()
                if guard.changed:
                    message = changed_settings(guard.changed)
                if message:
                    break
            return Verdict(not message, message or praise)

        return check

    return decorate


def failure(function, answers, numbers: dict, shapes: str, guard) -> str:
    """What is wrong with the answers, or nothing; no error leaves, but the user's own
    interrupt does. numbers: what differs between the variants of an exercise."""
    try:
        function(*answers, **numbers)
    except Wrong as wrong:
        return str(wrong)
    except NotImplementedError as error:
        method = left_to_you(error)
        if method:
            return (
                f"There is no `{method}` of yours: the class that you build on leaves"
                " it to you, and something calls it (the layer's output, or merging)."
            )
        return (
            "There is nothing here yet: put your own lines in the place of `raise"
            " NotImplementedError`."
        )
    except TooLong:
        return too_long()
    except SystemExit:
        return (
            "Your code calls exit() (SystemExit), which would end the whole notebook:"
            " `return` the result instead."
        )
    except BaseException as error:
        if guard.interrupted:
            raise
        return explain(error, shapes, function.__doc__)
    return ""


def left_to_you(error) -> str:
    """The method of a class of the package that raised this, if one did."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code, course = trace.tb_frame.f_code, Path(__file__).parents[1]
    inside = course.parent in Path(code.co_filename).parents
    return code.co_name if inside else ""


def too_long() -> str:
    return (
        f"Your code had not ended after {sandbox.LIMIT:g} seconds, and was stopped."
        " Does a loop never end (a `while` whose condition never changes), or does"
        " the function call itself for ever?"
    )


def changed_settings(names) -> str:
    return (
        f"Your code changes a setting of the whole process ({', '.join(names)}): all"
        " cells after it would run with it. The check has put it back. Use a block"
        " that ends, such as `with torch.no_grad():`, or a `dtype=` of one tensor."
    )


def explain(error: BaseException, shapes: str, form: str) -> str:
    """An error in the learner's code: what, where, and the usual reason. form: the
    check's docstring, which says what an answer looks like."""
    where = place(error)
    if not where and watch.returned is not NOTHING:
        return unusable(form)
    text = str(error)
    kind = type(error).__name__
    return f"Your code stopped with {kind}: {text}{where}.{hint(text, shapes)}"


def unusable(form: str) -> str:
    """The answer ran, and the check cannot work with what it returned."""
    form = " ".join((form or "").split())
    return (
        f"I cannot work with {described(watch.returned)}. The exercise asks for {form}"
    )


def described(value) -> str:
    """What a learner's function returned, in a few words."""
    if value is None:
        return "None (is there a `return` at the end?)"
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    text = repr(value)
    said = f": {text}" if len(text) < 60 else ""
    article = "an" if kind[0] in "aeio" else "a"
    if isinstance(value, list | tuple):
        inside = ", ".join(sorted({type(part).__name__ for part in value}))
        return f"{article} {kind} of {len(value)} ({inside})"
    return f"{article} {kind}{said}"


def hint(text: str, shapes: str) -> str:
    """The usual reason of an error with this text."""
    misfit = "cannot be multiplied", "must match", "size mismatch", "broadcast"
    misfit += "Sizes of tensors", "same number of dimensions"
    if any(words in text for words in misfit):
        return " Two shapes do not fit. " + shapes
    if "cannot assign" in text and "parameter" in text:
        return (
            " A Parameter cannot be replaced by a tensor: change it in place, under"
            " torch.no_grad()."
        )
    if any(words in text for words in ("leaf", "in-place", "inplace")):
        return (
            " Something that autograd needs is changed in place. Make a new tensor"
            " (y = y + z in the place of y += z); a weight is changed by hand under"
            " torch.no_grad()."
        )
    if "dtype" in text or "scalar type" in text:
        return (
            " The tensors that this check gives have 64 bits: make new ones with the"
            " same dtype, dtype=x.dtype or .to(x)."
        )
    if "empty sequence" in text or "iterable argument is empty" in text:
        return " Nothing is left to choose from: what is the answer then?"
    if "NoneType" in text:
        return (
            " Something is None here: a part that may be absent, as a bias, or the"
            " result of a function without a `return`."
        )
    return ""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


def same(a, b, size: float = 1e-2) -> bool:
    """Equal up to rounding in 32 bits, relative to the largest entry of b, or to size
    where that is larger; exactly where b has whole numbers or booleans."""
    if not isinstance(a, torch.Tensor) or b is None or a.shape != b.shape:
        return False
    if not b.numel():
        return True
    a, b = a.detach(), b.detach()
    if not b.is_floating_point() or not b.isfinite().all():
        return bool((a == b).all())
    distance = (a.to(torch.float64) - b.to(torch.float64)).abs().max()
    return bool(distance <= TOLERANCE * b.abs().max().clamp(min=size))


def compare(
    got,
    right,
    mistakes: dict,
    what: str,
    learnt: dict | None = None,
    same_values: dict | None = None,
    formula=None,
) -> None:
    """Raise the message of the known mistake that gives what the learner got; mistakes:
    {message: the wrong result}. formula: a slips.Formula, for mistakes in one step of
    it.

    The gradients are compared too, for every leaf of the graph of `right` that the
    learner's function was given, or for those of learnt: {name: leaf}. same_values:
    {message: a result with the right values and the wrong gradients}."""
    need(got is not None, f"{what} is None: is there a `return` at the end?")
    if isinstance(got, int | float) and not isinstance(got, bool) and not right.dim():
        need(
            not right.requires_grad,
            f"{what} should be a tensor; yours is a {type(got).__name__}, which has"
            " lost touch with what it was computed from (.item() or float()?): nothing"
            " could be learnt through it.",
        )
        got = torch.tensor(got, dtype=right.dtype)
    need(
        isinstance(got, torch.Tensor),
        f"{what} should be a tensor; yours is a {type(got).__name__}.",
    )
    if same(got, right):
        compare_gradients(got, right, what, learnt, same_values or {})
        return
    for message, wrong in mistakes.items():
        if same(got, wrong):
            raise Wrong(message)
    if formula is not None:
        formula.explain(got, what)
    need(
        got.shape == right.shape,
        f"{what} has the shape {tuple(got.shape)}; expected {tuple(right.shape)}.",
    )
    raise Wrong(difference(got, right, what))


def difference(got, right, what: str) -> str:
    """The values differ, by no known mistake: how far, and how to look for it."""
    if got.is_floating_point() and not got.isfinite().all():
        found = "nan" if got.isnan().any() else "inf"
        return (
            f"{what} contains {found}, for inputs where the formula is finite: a"
            " division by zero, a root or a logarithm of something that is not"
            " positive, or exp of a large number?"
        )
    got, right = got.detach().double(), right.detach().double()
    error, size = (got - right).abs().max(), right.abs().max()
    known = kind_of_difference(got, right, error / size)
    if known:
        return f"{what} differs from the formula: {known}"
    return (
        f"{what} has the right shape, but differs from the formula (an entry is off by"
        f" {error:.2g}, where the largest is {size:.2g}), and it is none of the usual"
        " slips. Work out one entry by hand, in the smallest case."
    )


def kind_of_difference(got, right, error: float) -> str:
    """What is wrong with numbers of the right shape, where that can be seen from them
    alone: a factor, a term, another order, some of the entries, or rounding."""
    if got.numel() > 1:
        looks = of_a_factor, of_signs, of_order, of_a_term
        words = next(filter(None, (look(got, right) for look in looks)), "")
        if words:
            return words
    fits = (got - right).abs() <= TOLERANCE * right.abs().max()
    first = [int(at) for at in (~fits).nonzero()[0]]
    if 0.1 <= fits.double().mean() and fits.numel() > 1:
        return (
            f"it is right in {int(fits.sum())} of {fits.numel()} entries; the first"
            f" wrong one is {first}: {got[tuple(first)]:.4g} instead of"
            f" {right[tuple(first)]:.4g}."
        )
    words = of_one_dimension(got, right)
    if words:
        return words
    if error < 0.01:
        return (
            f"it is nearly right, but off by {100 * error:.2g} % of the largest entry,"
            " more than rounding in 32 bits: do you compute in 16 bits, or add an ε?"
        )
    return ""


def of_a_factor(got, right) -> str:
    factor = ((got * right).sum() / right.square().sum()).item()
    if not got.any():
        return "it is zero everywhere."
    if abs(factor - 1) > 1e-3 and same(got, factor * right):
        return (
            f"it is {factor:.4g} times what the formula gives: a factor is missing, or"
            " there is one too many."
        )
    powers = {"the square": right.square(), "the root": right.abs().sqrt()}
    powers["one divided by it"] = 1 / right
    for words, power in powers.items():
        if same(got, power):
            return f"it is {words}, where the formula gives the number itself."
    return ""


def of_signs(got, right) -> str:
    if not same(got.abs(), right.abs()):
        return ""
    off = int((got.sign() != right.sign()).sum())
    return (
        f"the sizes are right, and {off} of {got.numel()} signs are not: an absolute"
        " value is taken or left out, or a part has the other sign."
    )


def of_order(got, right) -> str:
    if same(got.flatten().sort()[0], right.flatten().sort()[0]):
        return (
            "the numbers are right, in other places: something is transposed, flipped,"
            " sorted, or read in another order."
        )
    return ""


def of_a_term(got, right) -> str:
    """The same number everywhere, or one of the arguments, is added or left out."""
    off = got - right
    if same(off, off.mean().expand_as(off)):
        return f"every entry is off by {off.mean():.4g}: one term more, or one less."
    found = {}
    for name, given in watch.given.items():
        if isinstance(given, torch.Tensor) and given.shape == off.shape:
            given = given.detach().double()
            factor = ((off * given).sum() / given.square().sum()).item()
            if given.any() and same(off, factor * given):
                found[name] = factor
    if len(found) != 1:
        return ""
    ((name, factor),) = found.items()
    return f"it is off by {factor:.4g} times `{name}`."


def of_one_dimension(got, right) -> str:
    """Along one dimension it is right but for a factor, or for a term."""
    for dim, size in enumerate(got.shape):
        if got.dim() < 2 or size < 2 or right.square().sum(dim).min() == 0:
            continue
        factor = (got * right).sum(dim, True) / right.square().sum(dim, True)
        term = (got - right).mean(dim, True)
        for words, other in (("factor", factor * right), ("term", term + right)):
            if same(got, other):
                return (
                    f"along dimension {dim} all entries are off by one {words}, and"
                    f" elsewhere by another: a {words} is computed over the wrong"
                    " dimension, or missing."
                )
    return ""


def leaves_of(tensor) -> list:
    """The leaves of a tensor's graph."""
    found, seen, todo = [], set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found


def given_leaves(right) -> dict:
    """{name: leaf} of those that the learner's function was given, in its order."""
    leaves = {id(leaf): leaf for leaf in leaves_of(right)}
    return {name: leaves[key] for key, name in watch.names.items() if key in leaves}


def compare_gradients(got, right, what: str, learnt, same_values: dict) -> None:
    """The gradients of a random weighted sum of `got`, for every leaf in learnt."""
    learnt = given_leaves(right) if learnt is None else learnt
    if not learnt:
        return
    need(
        got.requires_grad,
        f"{what} has the right values, but it has lost touch with"
        f" {' and '.join(learnt)} (.detach(), .data, .item() or no_grad?): nothing"
        " could be learnt through it.",
    )
    weights = torch.randn(right.shape, dtype=torch.float64)
    own = gradients(got, weights, learnt)
    wanted = gradients(right, weights, learnt)
    if alike(own, wanted):
        return
    for message, wrong in same_values.items():
        need(not alike(own, gradients(wrong, weights, learnt)), message)
    lost = [
        name
        for name, mine, right in zip(learnt, own, wanted)
        if mine is None and right is not None and right.any()
    ]
    need(
        not lost,
        f"{what} has the right values, but no gradient reaches {', '.join(lost)}: it"
        " has lost touch (.detach(), .data, a new Parameter or no_grad on the way?).",
    )
    off = [name for name, fits in zip(learnt, alike_each(own, wanted)) if not fits]
    raise Wrong(
        f"{what} has the right values, but not the right gradient of {', '.join(off)}:"
        " something on the way is detached, under no_grad, or rounded."
    )


def gradients(result, weights, learnt: dict) -> tuple:
    """Those of (weights · result).sum(), for each leaf in learnt; None for no way."""
    loss = (weights.to(result.dtype) * result).sum()
    leaves = list(learnt.values())
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)


def alike(own, wanted) -> bool:
    return all(alike_each(own, wanted))


def alike_each(own, wanted) -> list:
    """For each leaf, whether two gradients are the same; None is as good as zeros. One
    that is zero but for rounding (a key's bias under a softmax) is measured by the
    others."""
    largest = max((g.abs().max().item() for g in wanted if g is not None), default=0)
    found = []
    for mine, right in zip(own, wanted):
        if mine is None or right is None:
            other = right if mine is None else mine
            found.append(other is None or other.abs().max() <= TOLERANCE * largest / 10)
        else:
            found.append(same(mine, right, max(1e-2, largest / 10)))
    return found
