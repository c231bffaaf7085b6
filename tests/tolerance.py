"""How far two right results may lie apart: what rounding can do, on any processor.

A processor adds a sum's terms in an order of its own: one after the other, in 8 or 16
partial sums, with or without fused multiply-add. Each addition rounds by at most eps/2
of what it has added up so far, to either side. Such errors add up as a random walk
does, with the root of their number (Higham and Mary 2019, "A new approach to
probabilistic rounding error analysis", doi:10.1137/18M1226312). Two results are
therefore closer than

    eps · size · sqrt(terms · steps)

tests/test_tolerance.py tries it: no order of a sum breaks it, and one
term that is wrong by a thousandth does. Formats of 16 bits are added up in float32 and
rounded once: there terms and steps count roundings, not additions.

Two more reasons for a difference have a name here: `printed`, where one of the two was
rounded to be read, and `chance`, where one is a mean of random draws. No test has a
tolerance of its own beside these: test_tolerance.py reads all of them."""

import math

import torch


def tolerance(dtype, size=1.0, terms=1, steps=1) -> float:
    """The largest difference between two right results, as an absolute number.

    dtype: the coarsest format on the way, whose eps counts.
    size: the largest value that is added up, or that comes out, whichever is larger.
    terms: the length of the longest sum, say a matrix' rows.
    steps: how many such sums follow one another: layers, optimizer steps, tokens."""
    return torch.finfo(dtype).eps * float(size) * math.sqrt(terms * steps)


def printed(decimals) -> float:
    """Half of the last decimal of a number that was printed, as a paper, a table or a
    record prints it; a trifle more, as decimals end nowhere in binary."""
    return (0.5 + 1e-6) * 10.0**-decimals


def chance(spread, draws, errors=4) -> float:
    """How far the mean of independent draws may lie from what is expected: so many
    standard errors. Four are exceeded once in 16,000 times.

    spread: the standard deviation of one draw."""
    return errors * float(spread) / math.sqrt(draws)


def size(*tensors) -> float:
    """The largest absolute value in these tensors."""
    return max(float(tensor.detach().abs().max()) for tensor in tensors)


def assert_within(actual, expected, terms=1, steps=1, dtype=None, least=0.0):
    """Equal but for rounding: nowhere farther apart than the tolerance of these values.

    dtype: where something was computed in a coarser format than the two results have.
    least: the size of what was added up, where it cancels out in the result."""
    coarsest = max(
        (actual.dtype, expected.dtype, dtype or actual.dtype),
        key=lambda one: torch.finfo(one).eps,
    )
    allowed = tolerance(coarsest, max(size(expected), least), terms, steps)
    apart = float((actual.detach().double() - expected.detach().double()).abs().max())
    assert apart <= allowed, (
        f"differ by {apart:.2e}, where rounding makes {allowed:.2e}"
    )
