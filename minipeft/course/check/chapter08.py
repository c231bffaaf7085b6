"""Chapter 08, beyond low rank: ranks predicted, the fault in a Kronecker product, LoHa
written as a LoRA, a choice within a budget, the nearest Kronecker product, and a
Kronecker adapter."""

import functools
import math
import random
from statistics import fmean

import torch

from ... import Base
from ..comparison import compare as told_apart
from .chapter06 import Largest
from .kinds import (
    TRAPS,
    Built,
    Choices,
    alike_answers,
    by_one_look,
    judge_numbers,
    trap,
)
from .practice import copy_stands_alone, python_bytes, without_seeding
from .sandbox import unwatched
from .slips import Formula
from .teacher import TOLERANCE, Wrong, checks, compare, need

__all__ = [
    "choose_within",
    "kron_adapter",
    "loha_as_lora",
    "lokr_apply",
    "nearest_kron",
    "predict_ranks",
]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@checks(
    "C X Dᵀ, for every shape that I tried, with its gradients, and the large product"
    " was never formed.",
    "Each x is read as X (m, n); C is (p, m), D is (q, n), so C @ X @ D.T is (p, q).",
)
def lokr_apply(function) -> None:
    """function(x, C, D) -> (N, p q)"""
    for rows in (3, 1, 2):
        p, m, q, n = random.sample(range(4, 9), 4)
        if rows == 2:  # square factors of one size: nothing can be read from shapes
            p = m = q = n
        C, D, x = double(p, m), double(q, n), double(rows, m * n)
        with Largest(torch.empty(p * q, m * n).shape) as largest:
            unwatched(function)(x, C, D)
        for tensor in (C, D, x):
            tensor.requires_grad_()
        got = function(x, C, D)
        X = x.view(rows, m, n)
        need(
            not (isinstance(got, torch.Tensor) and got.shape == (rows, p, q)),
            "You return a matrix for each x, (N, p, q): read it as a vector again"
            " (flatten).",
        )
        mistakes = {
            "The factors are swapped: yours is D ⊗ C. The outer index, of the blocks,"
            " belongs to C.": (x @ torch.kron(D, C).T),
            "You read the result column by column: (p, q) is flattened row by row.": (
                (C @ X @ D.T).mT.flatten(1)
            ),
        }
        swapped_reading = (C @ x.view(rows, n, m).mT @ D.T).flatten(1)
        mistakes[
            "You read x column by column: of its two indices, which runs faster?"
        ] = swapped_reading
        compare(got, x @ torch.kron(C, D).T, mistakes, "Your output")
        large = double(1, 400), double(20, 20), double(20, 20)
        need(
            not largest.made and python_bytes(unwatched(function), *large) < 4 * 400**2,
            "The numbers are right, but you form a matrix of the size of C ⊗ D: read x"
            " as a matrix instead.",
        )


def drawn_target(kind: str, p, m, q, n):
    """A Kronecker product, with noise or without, or a target in which a slip shows."""
    exact = torch.kron(double(p, m), double(q, n))
    T = exact + random.choice([0.0, 0.8]) * double(p * q, m * n)
    if kind == "first block of zeros":
        T[:q, :n] = 0
    if kind == "close":  # two products that are nearly as large as each other
        T = two_products(p, m, q, n, 0.9)
    return T


def two_products(p, m, q, n, second):
    """A sum of two Kronecker products at right angles; the second has this size, the
    first has size 1."""
    U, V = (torch.linalg.qr(double(rows, 2))[0] for rows in (p * m, q * n))
    laid_out = U @ torch.diag(torch.tensor([1.0, second]).double()) @ V.T
    return laid_out.view(p, m, q, n).transpose(1, 2).reshape(p * q, m * n)


def outer_product(got, p, m, q, n):
    """The learner's C and D as the matrix of rank 1 that has a row for each block."""
    need(isinstance(got, tuple | list) and len(got) == 2, "Return the pair (C, D).")
    C, D = (torch.as_tensor(part).detach().double() for part in got)
    need(
        (C.shape, D.shape) != ((q, n), (p, m)),
        "The two are swapped: first C, one number for each block, then D, the block.",
    )
    need(
        C.shape == (p, m),
        f"C has the shape {tuple(C.shape)}, and should have (p, m) = {(p, m)}: one"
        " number for each block.",
    )
    need(
        D.shape == (q, n),
        f"D has the shape {tuple(D.shape)}, and should have (q, n) = {(q, n)}: it is a"
        " block.",
    )
    fit = torch.outer(C.flatten(), D.flatten())
    need(
        bool(fit.isfinite().all()),
        "C or D contains nan or inf: what does your way do with a block of zeros?",
    )
    return fit


def slips_of_the_nearest(U, S, V, as_it_lies) -> dict:
    """U, S, V: of T with a row for each block; as_it_lies: T's numbers in their order,
    in that shape."""

    def pair(at, size):
        return size * torch.outer(U[:, at], V[at])

    others = torch.linalg.svd(as_it_lies)
    return {
        "The size is missing: the singular value belongs to C, or to D, or its root to"
        " both.": pair(0, 1.0),
        "The singular value is in both: once is enough, or its root in each.": pair(
            0, S[0] ** 2
        ),
        "Only the root of the singular value is in: it is missing once more.": pair(
            0, S[0].sqrt()
        ),
        "You take the smallest singular value; the nearest product has the largest.": (
            pair(len(S) - 1, S[-1])
        ),
        "Your SVD is of T's numbers in the order in which they lie: each block has to"
        " become one row first.": (
            others[1][0] * torch.outer(others[0][:, 0], others[2][0])
        ),
        "Right up to its sign: the SVD's two vectors belong together.": -pair(0, S[0]),
    }


@checks(
    "As near as any Kronecker product of these sizes can come to the target.",
    "T is (p q, m n): p rows of blocks, m blocks in each, and a block is (q, n). C is"
    " (p, m), D is (q, n).",
)
def nearest_kron(function) -> None:
    """function(T, p, m, q, n) -> (C, D) with the smallest ||T - C ⊗ D||"""
    for kind in ("any", "any", "first block of zeros", "close", "any"):
        p, m, q, n = random.sample(range(3, 8), 4)
        T = drawn_target(kind, p, m, q, n)
        fit = outer_product(function(T.clone(), p, m, q, n), p, m, q, n)
        laid_out = T.reshape(p, q, m, n).transpose(1, 2).reshape(p * m, q * n)
        U, S, V = torch.linalg.svd(laid_out)
        away, best = (laid_out - fit).norm(), S[1:].norm()
        if away <= best + TOLERANCE * S[0]:
            continue
        slips = slips_of_the_nearest(U, S, V, T.reshape(p * m, q * n))
        for message, wrong in slips.items():
            need((fit - wrong).norm() > TOLERANCE * S[0], message)
        raise Wrong(
            f"Not the nearest: ‖T − C ⊗ D‖ is {away:.3f}, and it can be {best:.3f}."
            " Each block of C ⊗ D is a number times D: with the blocks laid out as"
            " rows you look for the nearest matrix of rank 1."
        )


# ---- predictions ---------------------------------------------------------------------


@checks(
    "All of them: entry by entry ranks multiply up to the smaller width, a Kronecker"
    " product multiplies them too, and a row of zeros is a row of zeros."
)
def predict_ranks(predicted, r=3) -> None:
    """predicted: {case: rank}; r is the rank in the question."""
    judge_numbers(predicted, rank_cases(r), near=1e-6)


def rank_cases(r: int) -> dict:
    """{case: (rank, what to think of)}, by making the matrices."""

    def rank(matrix):
        return torch.linalg.matrix_rank(matrix, rtol=1e-9).item()

    def low(rank, rows=64, columns=48):
        return double(rows, rank) @ double(rank, columns)

    b = double(60, 1) * (torch.arange(60) % 3 > 0).double()[:, None]
    wide = 3 * r
    return {
        "LoHa": (
            rank(low(r) * low(r)),
            "The product of two sums of r outer products has r · r terms.",
        ),
        "LoHa, wide": (
            rank(low(wide) * low(wide)),
            "No matrix has a larger rank than its smaller width.",
        ),
        "LoRA, equal size": (
            rank(low(2 * r)),
            "A LoHa has two products, so as many parameters as a LoRA of rank 2r.",
        ),
        "LoHa + LoRA": (
            rank(low(2) * low(2) + low(r)),
            "Ranks of unrelated matrices add up.",
        ),
        "Kronecker": (
            rank(torch.kron(low(r, 8, 6), low(4, 8, 8))),
            "rank(C ⊗ D) = rank(C) · rank(D).",
        ),
        "VeRA": (
            rank(double(64, 1) * double(64, 16) @ (double(16, 1) * double(16, 48))),
            "All passes through r = 16 numbers.",
        ),
        "VeRA, silent": (
            rank(b * double(60, 256) @ (double(256, 1) * double(256, 60))),
            "Where b is zero a row of the change is zero.",
        ),
        "DenseLoRA": (
            rank(double(64, 16) @ low(r, 16, 16) @ double(16, 48)),
            "A product has at most the rank of its factors, the middle one included.",
        ),
    }


# ---- LoHa as a LoRA ------------------------------------------------------------------


@checks(
    "A LoRA of rank r², term by term, with its gradients, and ΔW was never formed.",
    "B1 and B2 are (d_out, r), A1 and A2 are (r, d_in); B is (d_out, r²) and A (r²,"
    " d_in).",
)
def loha_as_lora(function) -> None:
    """function(B1, A1, B2, A2) -> (B, A) with B A = (B1 A1) ⊙ (B2 A2)"""
    for r, d_out, d_in in ((3, 23, 31), (1, 9, 11), (2, 19, 17), (4, 9, 14)):
        shapes = ((d_out, r), (r, d_in)) * 2
        factors = [double(*shape) for shape in shapes]
        with Largest(torch.empty(d_out, d_in).shape) as largest:
            unwatched(function)(*factors)
        B1, A1, B2, A2 = (factor.requires_grad_() for factor in factors)
        got = function(B1, A1, B2, A2)
        need(
            isinstance(got, tuple | list)
            and len(got) == 2
            and all(isinstance(part, torch.Tensor) for part in got),
            "Return two tensors: B (d_out, r²) and A (r², d_in).",
        )
        B, A = got
        need(
            r == 1 or B.shape != (d_out, r),
            "You keep r terms, i = j alone: every b_i meets every u_j, which makes r²"
            " terms.",
        )
        need(
            (B.shape, A.shape) != ((r * r, d_in), (d_out, r * r)),
            "You return (A, B): B comes first.",
        )
        need(
            B.shape == (d_out, r * r) and A.shape == (r * r, d_in),
            f"B should be {(d_out, r * r)} and A {(r * r, d_in)}; yours are"
            f" {tuple(B.shape)} and {tuple(A.shape)}.",
        )
        compare_loha(B @ A, B1, A1, B2, A2)
        if r * r > d_out:  # B and A themselves are larger than ΔW
            continue
        large = [double(*shape) for shape in ((400, 2), (2, 400)) * 2]
        need(
            not largest.made and python_bytes(unwatched(function), *large) < 4 * 400**2,
            "Right, but you form a matrix of the size of ΔW: the terms are products of"
            " columns of B1 and B2, and of rows of A1 and A2.",
        )


def by_terms(B1, A1, B2, A2):
    B = (B1[:, :, None] * B2[:, None, :]).flatten(1)
    A = (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)
    return B @ A


def compare_loha(made, B1, A1, B2, A2) -> None:
    def terms(order):
        """Column i, j of B meets row order(i, j) of A."""
        pairs = [(i, j) for i in range(len(A1)) for j in range(len(A1))]
        return sum(
            torch.outer(B1[:, i] * B2[:, j], A1[order(i, j)[0]] * A2[order(i, j)[1]])
            for i, j in pairs
        )

    one, two = B1 @ A1, B2 @ A2
    right = one * two
    mistakes = {
        "The terms of B and of A come in another order: column (i, j) of B belongs to"
        " row (i, j) of A.": terms(lambda i, j: (j, i)),
        "You add where the product multiplies: (b_i ⊙ u_j)(a_i ⊙ v_j)^T.": sum(
            torch.outer(B1[:, i] + B2[:, j], A1[i] + A2[j])
            for i in range(len(A1))
            for j in range(len(A1))
        ),
        "That is a sum of the two products: LoHa multiplies them entry by entry.": (
            one + two
        ),
        "You divide by r²: there is no mean here.": right / len(A1) ** 2,
        "Only the first column of a factor is in it: every b_i meets every u_j.": (
            sum(
                torch.outer(B1[:, i] * B2[:, j], A1[i] * A2[0])
                for i in range(len(A1))
                for j in range(len(A1))
            )
        ),
        "You add columns where they are multiplied: b_i ⊙ u_j.": sum(
            torch.outer(B1[:, i] + B2[:, j], A1[i] * A2[j])
            for i in range(len(A1))
            for j in range(len(A1))
        ),
    }
    mistakes = {
        text: wrong
        for text, wrong in mistakes.items()
        if not torch.allclose(wrong, right)
    }
    learnt = {"B1": B1, "A1": A1, "B2": B2, "A2": A2}
    formula = Formula(by_terms, B1, A1, B2, A2)
    compare(made, right, mistakes, "B A", learnt=learnt, formula=formula)


# ---- a choice within a budget --------------------------------------------------------

SIZES = {"LoRA r 1": 12_160, "LoKr": 12_800, "VeRA": 15_360}
SIZES |= {"LoHa r 2": 48_640, "LoRA r 4": 48_640, "LoRA r 8": 97_280}
RATES = (5e-3, 2e-2, 1e-1)


@checks(
    "Within the budget, each at its own rate, chosen on validation, and judged once by"
    " all answers."
)
def choose_within(function, plain="LoRA r 1") -> None:
    """function(runs, budget) -> (method, its verdict against `plain`)."""
    choices, verdicts = Choices(), Choices()
    for budget, gain, kind in (
        (16_000, 0.45, "test"),
        (50_000, 0.0125, "lucky"),  # two answers more: no tie, and not told apart
        (15_360, -0.35, "worst"),
        (50_000, 0.45, "median"),
        (20_000, -0.35, "first"),
        (20_000, -0.35, "last"),
        (16_000, 0.06, "percent"),
        (50_000, 0.0, "plain"),  # it may be the best itself
        (50_000, 0.05, "paired"),
    ):
        runs = runs_within(budget, gain, kind, plain)
        got = function([dict(run) for run in runs], budget)
        need(
            isinstance(got, tuple | list) and len(got) == 2,
            f"Return two things, the method and the verdict; you return {got!r}.",
        )
        a_choice_within(got[0], runs, budget, plain, choices)
        a_verdict_within(got[1], runs, budget, plain, verdicts)
    choices.judge()
    verdicts.judge()


def runs_within(budget: int, gain: float, kind: str, plain: str) -> list:
    """Runs; one method is the best within the budget by validation. kind: another one
    is lucky on the test, or by one look at the seeds; the plain one is the best; or the
    seeds weigh more than the methods."""
    allowed = [name for name, size in SIZES.items() if size <= budget and name != plain]
    exact = [name for name in allowed if SIZES[name] == budget]
    best = plain if kind == "plain" else random.choice(exact or allowed)
    other = random.choice([name for name in allowed if name != best] or [None])
    own, seeming = trap(kind, 0.1, 0.02) if kind in TRAPS else ([0.1] * 3, [0.12] * 3)
    runs = []
    for name, size in SIZES.items():
        rates = random.sample(RATES, 3)
        far = 0.9 if name == best else 0.2  # at the rates that are not its best
        losses = [[far + random.uniform(0, 0.03) for _ in range(3)] for _ in rates]
        losses[0] = [0.05 if size > budget else 0.16] * 3
        share = {best: 0.5 + gain, plain: 0.5}.get(name, 0.4)
        share = 0.95 if size > budget else share
        shares = [share, share - 0.15, share - 0.15]
        if name == best:
            losses[0] = own
        elif name == other:
            losses[0] = seeming
            shares[1] = 0.99 if kind == "test" else shares[1]
        if name == plain and kind != "plain":  # of its two best rates one only seems so
            losses[:2] = trap(kind if kind in TRAPS else "first", 0.3, 0.02)
            losses[2] = [0.6] * 3
            shares = [0.5, 0.9 if gain > 0 else 0.05, 0.3]
        for at, (lr, valid, tested) in enumerate(zip(rates, losses, shares)):
            answers = alike_answers(tested, 160)
            if kind == "paired":
                answers = nested_answers(13 * (name == best) - 3 * at)
            for seed, (loss, right) in enumerate(zip(valid, answers)):
                found = dict(method=name, numbers=size, lr=lr, seed=seed)
                runs.append(found | {"valid_loss": loss, "right": right})
    random.shuffle(runs)
    if kind == "paired":  # the seeds of the plain one stand in another order
        runs.sort(key=lambda run: (run["seed"] + (run["method"] == plain)) % 3)
    return runs


def nested_answers(more: int) -> list:
    """For each seed a string: the seeds differ widely, and whoever is better answers
    the same questions and a few more in each."""
    rights = [int(160 * share) + more for share in (0.3, 0.5, 0.7)]
    return ["1" * right + "0" * (160 - right) for right in rights]


def grouped(runs, budget: int) -> dict:
    """{(method, rate): its runs, by seed}, of the methods within the budget."""
    groups = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["numbers"] <= budget:
            groups.setdefault((run["method"], run["lr"]), []).append(run)
    return groups


def best_within(groups) -> tuple:
    """The (method, rate) with the lowest mean validation loss."""
    return min(groups, key=lambda key: fmean(run["valid_loss"] for run in groups[key]))


def a_choice_within(name, runs, budget: int, plain: str, choices) -> None:
    need(
        isinstance(name, str) and name in SIZES,
        f"{name!r} is not a method of the runs.",
    )
    groups = grouped(runs, budget)
    losses = {key: [r["valid_loss"] for r in group] for key, group in groups.items()}
    tested = max(groups, key=lambda k: sum(r["right"].count("1") for r in groups[k]))
    means = {}
    for (method, _), found in losses.items():
        means[method] = means.get(method, 0) + sum(found)
    looks = by_one_look(losses).items()
    slips = {text: [key[0] for key in keys] for text, keys in looks}
    slips |= {
        "You choose by the test answers: then they cannot judge any more. Choose by the"
        " validation loss.": tested[0],
        "You take the mean over all rates: a method is judged at its best one.": min(
            means, key=means.get
        ),
        "You choose among all methods, whatever they cost: at most `budget` parameters"
        " are allowed.": best_within(grouped(runs, math.inf))[0],
        "You leave out a method that has exactly `budget` parameters: at most so many"
        " are allowed.": best_within(grouped(runs, budget - 1))[0],
        f"You return {plain!r}: the question is what you choose.": plain,
    }
    right = best_within(groups)[0]
    said = (
        f"You choose {name!r}; by the mean validation loss at its best rate it is"
        f" {right!r}."
    )
    if SIZES[name] > budget:
        said = f"{name} has {SIZES[name]:,} parameters, and the budget is {budget:,}."
    choices.add(name, right, slips, said)


def a_verdict_within(verdict, runs, budget: int, plain: str, verdicts) -> None:
    best = best_within(grouped(runs, budget))
    groups = grouped(runs, math.inf)  # the plain one may cost more
    own = best_within({key: groups[key] for key in groups if key[0] == plain})

    def answers(key, score=str):
        return {run["seed"]: score(run["right"]) for run in groups[key]}

    def percent(right):
        return 100 * right.count("1") / len(right)

    def as_they_stand(key):
        return [r["right"] for r in runs if (r["method"], r["lr"]) == key]

    wanted = told_apart(answers(best), answers(own)).verdict
    apart = (
        told_apart(as_they_stand(best), as_they_stand(own)),
        told_apart(answers(best, percent), answers(own, percent), answers=160),
    )
    verdicts.add_verdict(
        verdict,
        wanted,
        "compare(a, b) says whether *a* is ahead of b, and right answers are not a"
        " loss.",
        f"{best[0]} against {plain}, each at its best rate: you say {verdict!r}; the"
        f" course's rule says {wanted!r}. Give `compare` the answers of all seeds,"
        " {seed: string}, so that it sees every answer.",
        {
            "You compare percentages, and the rule no longer knows how many answers"
            " they stand for: give `compare` the strings themselves.": told_apart(
                answers(best, percent), answers(own, percent)
            ).verdict,
            "The rule is not told what belongs together: {seed: string} pairs the"
            " seeds, in whatever order their runs stand, and the questions.": [
                result.verdict for result in apart
            ],
        },
    )


# ---- a Kronecker adapter -------------------------------------------------------------


def applied(x, C, D):
    X = x.unflatten(-1, (C.shape[1], len(D)))
    return (C @ X @ D.T).flatten(-2)


@checks(
    "C ⊗ D, silent at the start, applied by reshaping and merged when asked: a LoKr of"
    " your own.",
    "C is (d_out / block, d_in / block), D is (block, block).",
)
def kron_adapter(config_class) -> None:
    """config_class(target_modules=..., block=...), a LayerConfig."""
    for d_in, d_out, block in ((12, 20, 4), (6, 9, 3), (8, 8, 2)):
        built = without_seeding(
            functools.partial(Built, config_class, d_in, d_out, block=block)
        )
        shapes = {"C": (d_out // block, d_in // block), "D": (block, block)}
        built.check_parameters(shapes)
        built.check_start()
        C, D = built.adapter.C, built.adapter.D
        need(
            bool((C != 0).any()) or bool((D != 0).any()),
            "C and D are both zero: then neither ever gets a gradient.",
        )
        need(
            not bool(C.any()) or not bool(D.any()),
            "At the start one of C and D is exactly zero: else the change is not.",
        )
        built.fill()
        right = torch.kron(C, D)
        parts = right.detach().view(d_out, d_in)
        mistakes = {
            "delta is the new weight itself: return what is added to W.": (
                built.W + right
            )
        }
        swapped = torch.kron(D, C)
        mistakes[
            "The factors are swapped: C holds one number for each block, D is the"
            " block."
        ] = swapped
        mistakes["The sign is turned round."] = -parts
        mistakes["D lies on its side: the change has D, and x meets D^T."] = torch.kron(
            C, D.T.contiguous()
        )
        mistakes["C lies on its side."] = torch.kron(C.T.contiguous(), D).reshape(
            parts.shape
        )
        mistakes["The change is in it twice."] = 2 * parts
        built.compare(right, mistakes, update=Formula(applied, built.x, C, D))
        base = Base(built.slot, "default")
        again_and_elsewhere(built, base, C, D)
        row = built.x[:1, 0]  # (1, d_in)
        with torch.no_grad(), Largest(built.W.shape) as largest:
            built.adapter.update(base, row)
        need(
            not largest.made,
            "Right, but `update` forms a matrix of W's size. Read x as a matrix in its"
            " place, as in section 2.2.",
        )
    Built(config_class, 8, 12, block=2).check_learning()


@torch.no_grad()
def again_and_elsewhere(built, base, C, D) -> None:
    """`update` takes x of any number of dimensions, and a copy has its own numbers."""
    for x in (built.x, built.x[0, 0], built.x[:, None]):
        compare(
            built.adapter.update(base, x),
            applied(x, C, D),
            {},
            f"update(base, x), for x of shape {tuple(x.shape)},",
            learnt={},
        )
    copy_stands_alone(built.adapter, lambda adapter: adapter.update(base, built.x))
