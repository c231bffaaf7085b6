"""Chapter 07's checks accept the solution, and name the mistake in what is plausibly
wrong."""

import math

import pytest
import torch
from judging import accepts, rejects

from minipeft.course import check

norm = torch.linalg.norm


def blank(*_):
    raise NotImplementedError


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def test_orthogonality_solution():
    accepts(
        check.orthogonality,
        lambda A, B: norm(A @ A.T - eye(len(A))) + norm(B.T @ B - eye(len(A))),
    )
    accepts(
        check.orthogonality,
        lambda A, B: sum(
            (G - eye(len(G))).square().sum().sqrt() for G in (A @ A.T, B.T @ B)
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("penalty of A alone", lambda A, B: norm(A @ A.T - eye(len(A)))),
        (
            "norms are squared",
            lambda A, B: (
                norm(A @ A.T - eye(len(A))) ** 2 + norm(B.T @ B - eye(len(A))) ** 2
            ),
        ),
        (
            "A for lying on its side",
            lambda A, B: norm(A.T @ A - eye(A.shape[1])) + norm(B.T @ B - eye(len(A))),
        ),
        (
            "B for lying on its side",
            lambda A, B: norm(A @ A.T - eye(len(A))) + norm(B @ B.T - eye(len(B))),
        ),
        ("identity is missing", lambda A, B: norm(A @ A.T) + norm(B.T @ B)),
        (
            "lost touch with A and B",
            lambda A, B: (
                norm(A @ A.T - eye(len(A))) + norm(B.T @ B - eye(len(A)))
            ).detach(),
        ),
        (
            "root of the sum of squares",
            lambda A, B: (
                norm(A @ A.T - eye(len(A))) ** 2 + norm(B.T @ B - eye(len(A))) ** 2
            ).sqrt(),
        ),
        (
            "add absolute values",
            lambda A, B: (
                (A @ A.T - eye(len(A))).abs().sum()
                + (B.T @ B - eye(len(A))).abs().sum()
            ),
        ),
        (
            "spectral norm",
            lambda A, B: (
                norm(A @ A.T - eye(len(A)), 2) + norm(B.T @ B - eye(len(A)), 2)
            ),
        ),
        (
            "means of squares",
            lambda A, B: (
                (A @ A.T - eye(len(A))).square().mean()
                + (B.T @ B - eye(len(A))).square().mean()
            ),
        ),
        (
            "leave out the diagonal",
            lambda A, B: (
                norm(A @ A.T * (1 - eye(len(A)))) + norm(B.T @ B * (1 - eye(len(A))))
            ),
        ),
    ],
)
def test_orthogonality_mistakes(says, answer):
    rejects(says, check.orthogonality, answer)


def score(
    weights,
    gradients,
    beta1,
    beta2,
    size=lambda w, g: (w * g).abs(),
    early=False,
    combine=torch.mul,
    away=torch.abs,
):
    average = spread = torch.zeros_like(weights[0])
    for w, g in zip(weights, gradients):
        now, before = size(w, g), average
        average = beta1 * average + (1 - beta1) * now
        spread = beta2 * spread + (1 - beta2) * away(
            now - (before if early else average)
        )
    return combine(average, spread)


def started(weights, gradients, beta1, beta2):
    average, spread = (weights[0] * gradients[0]).abs(), torch.zeros_like(weights[0])
    for now in [(w * g).abs() for w, g in zip(weights, gradients)][1:]:
        average = beta1 * average + (1 - beta1) * now
        spread = beta2 * spread + (1 - beta2) * (now - average).abs()
    return average * spread


def plain(sizes):
    return sizes.mean(0) * (sizes - sizes.mean(0)).abs().mean(0)


def lerped(weights, gradients, beta1, beta2):
    average, spread = torch.zeros_like(weights[0]), torch.zeros_like(weights[0])
    for w, g in zip(weights, gradients):
        average.lerp_((w * g).abs(), 1 - beta1)
        spread.lerp_(((w * g).abs() - average).abs(), 1 - beta2)
    return average * spread


def test_importance_solution():
    accepts(check.importance, score)
    accepts(check.importance, lerped)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        (
            "uncertainty is missing",
            lambda *a: score(*a, combine=lambda average, spread: average),
        ),
        (
            "sensitivity is missing",
            lambda *a: score(*a, combine=lambda average, spread: spread),
        ),
        ("their product", lambda *a: score(*a, combine=torch.add)),
        ("from before this step", lambda *a: score(*a, early=True)),
        ("pluses and minuses cancel", lambda *a: score(*a, size=torch.mul)),
        ("size of the gradient", lambda *a: score(*a, size=lambda w, g: g.abs())),
        ("betas are swapped", lambda w, g, one, two: score(w, g, two, one)),
        ("the old average has β", lambda w, g, one, two: score(w, g, 1 - one, 1 - two)),
        ("last step alone", lambda w, g, one, two: (w[-1] * g[-1]).abs()),
        ("up and down cancel", lambda *a: score(*a, away=lambda x: x)),
        ("squares the deviation", lambda *a: score(*a, away=torch.square)),
        ("starts at the first", started),
        (
            "plain means",
            lambda w, g, one, two: plain(
                torch.stack([(x * y).abs() for x, y in zip(w, g)])
            ),
        ),
        (
            "add up the scores",
            lambda w, g, one, two: sum(
                score(w[:t], g[:t], one, two) for t in range(1, len(w) + 1)
            ),
        ),
        (
            "a tuple",
            lambda *a: score(*a, combine=lambda average, spread: (average, spread)),
        ),
    ],
)
def test_importance_mistakes(says, answer):
    rejects(says, check.importance, answer)


def budget(t, b0, bT, tinit, tfinal, total, power=3):
    return int(
        bT
        + (b0 - bT)
        * min(max(1 - (t - tinit) / (total - tinit - tfinal), 0), 1) ** power
    )


def test_rank_budget_solution():
    accepts(check.rank_budget, budget)
    accepts(
        check.rank_budget,
        lambda t, b0, bT, i, f, T: (
            b0
            if t <= i
            else (
                bT
                if t >= T - f
                else int((b0 - bT) * ((T - f - t) / (T - f - i)) ** 3 + bT)
            )
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("straight line", lambda *a: budget(*a, power=1)),
        ("is a square", lambda *a: budget(*a, power=2)),
        ("nothing is pruned", lambda t, b0, bT, i, f, T: budget(t, b0, bT, 0, f, T)),
        (
            "divide by T - tinit - tfinal",
            lambda t, b0, bT, i, f, T: budget(t, b0, bT, i, 0, T),
        ),
        (
            "last tfinal steps",
            lambda t, b0, bT, i, f, T: budget(t, b0, bT, i, f, T) + (t > T - f),
        ),
        ("not an integer", lambda *a: float(budget(*a)) + 0.25),
        ("is there a `return`", lambda *a: None),
        (
            "other way round",
            lambda t, b0, bT, i, f, T: int(
                b0 - (b0 - bT) * min(max((t - i) / (T - i - f), 0), 1) ** 3
            ),
        ),
        ("target bT is missing", lambda t, b0, bT, i, f, T: budget(t, b0, 0, i, f, T)),
        (
            "target bT is missing",
            lambda t, b0, bT, i, f, T: budget(t, b0 - bT, 0, i, f, T),
        ),
        (
            "round down",
            lambda t, b0, bT, i, f, T: math.ceil(
                bT + (b0 - bT) * min(max(1 - (t - i) / (T - i - f), 0), 1) ** 3
            ),
        ),
        (
            "nothing is pruned",
            lambda t, b0, bT, i, f, T: int(
                bT + (b0 - bT) * (1 - (t - i) / (T - i - f)) ** 3
            ),
        ),
    ],
)
def test_rank_budget_mistakes(says, answer):
    rejects(says, check.rank_budget, answer)


def allocate(scores, budget, off=0):
    order = torch.cat(list(scores.values())).sort(descending=True).values
    threshold = order[budget - 1 + off] if budget else torch.inf
    return {name: (score >= threshold).tolist() for name, score in scores.items()}


def chosen(scores, budget):
    order = sorted(
        (
            (v, n, i)
            for n, score in scores.items()
            for i, v in enumerate(score.tolist())
        ),
        reverse=True,
    )
    best = {(n, i) for _, n, i in order[:budget]}
    return {
        n: [(n, i) in best for i in range(len(score))] for n, score in scores.items()
    }


def test_allocate_solution():
    accepts(check.allocate, allocate)
    accepts(
        check.allocate,
        lambda s, b: {n: torch.tensor(mask) for n, mask in allocate(s, b).items()},
    )
    accepts(check.allocate, chosen)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        (
            "True is for what is kept",
            lambda s, b: {
                n: [not one for one in mask] for n, mask in allocate(s, b).items()
            },
        ),
        ("One too few", lambda s, b: allocate(s, b, -1)),
        ("One too many", lambda s, b: allocate(s, b, 1)),
        ("same names", lambda s, b: list(allocate(s, b).values())),
        (
            "for all of them together",
            lambda s, b: {n: [True] + [False] * (len(v) - 1) for n, v in s.items()},
        ),
        (
            "matter least",
            lambda s, b: {
                n: [not one for one in m]
                for n, m in allocate(s, sum(map(len, s.values())) - b).items()
            },
        ),
        (
            "you return other numbers",
            lambda s, b: {
                n: [v * k for v, k in zip(s[n].tolist(), m)]
                for n, m in allocate(s, b).items()
            },
        ),
        (
            "One boolean for each",
            lambda s, b: {n: [k for k in m if k] for n, m in allocate(s, b).items()},
        ),
        (
            "divide each matrix's scores",
            lambda s, b: allocate({n: v / v.sum() for n, v in s.items()}, b),
        ),
        (
            "triplets, and the budget is",
            lambda s, b: {
                n: (v > torch.cat(list(s.values())).median()).tolist()
                for n, v in s.items()
            },
        ),
    ],
)
def test_allocate_mistakes(says, answer):
    rejects(says, check.allocate, answer)
