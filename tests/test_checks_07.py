"""Chapter 07's checks accept the solution, and name the mistake in what is plausibly wrong."""
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
    accepts(check.orthogonality, lambda A, B: norm(A @ A.T - eye(len(A))) + norm(B.T @ B - eye(len(A))))


@pytest.mark.parametrize("says, answer", [
    ("nothing here yet", blank),
    ("penalty of A alone", lambda A, B: norm(A @ A.T - eye(len(A)))),
    ("norms are squared", lambda A, B: norm(A @ A.T - eye(len(A))) ** 2 + norm(B.T @ B - eye(len(A))) ** 2),
    ("A for lying on its side", lambda A, B: norm(A.T @ A - eye(A.shape[1])) + norm(B.T @ B - eye(len(A)))),
    ("B for lying on its side", lambda A, B: norm(A @ A.T - eye(len(A))) + norm(B @ B.T - eye(len(B)))),
    ("identity is missing", lambda A, B: norm(A @ A.T) + norm(B.T @ B)),
    ("no gradient", lambda A, B: (norm(A @ A.T - eye(len(A))) + norm(B.T @ B - eye(len(A)))).detach()),
])
def test_orthogonality_mistakes(says, answer):
    rejects(says, check.orthogonality, answer)


def score(weights, gradients, beta1, beta2, size=lambda w, g: (w * g).abs(), early=False, combine=torch.mul):
    average = spread = torch.zeros_like(weights[0])
    for w, g in zip(weights, gradients):
        now, before = size(w, g), average
        average = beta1 * average + (1 - beta1) * now
        spread = beta2 * spread + (1 - beta2) * (now - (before if early else average)).abs()
    return combine(average, spread)


def test_importance_solution():
    accepts(check.importance, score)


@pytest.mark.parametrize("says, answer", [
    ("nothing here yet", blank),
    ("uncertainty is missing", lambda *a: score(*a, combine=lambda average, spread: average)),
    ("sensitivity is missing", lambda *a: score(*a, combine=lambda average, spread: spread)),
    ("their product", lambda *a: score(*a, combine=torch.add)),
    ("from before this step", lambda *a: score(*a, early=True)),
    ("pluses and minuses cancel", lambda *a: score(*a, size=torch.mul)),
    ("size of the gradient", lambda *a: score(*a, size=lambda w, g: g.abs())),
    ("betas are swapped", lambda w, g, one, two: score(w, g, two, one)),
    ("the old average has β", lambda w, g, one, two: score(w, g, 1 - one, 1 - two)),
    ("last step alone", lambda w, g, one, two: (w[-1] * g[-1]).abs()),
])
def test_importance_mistakes(says, answer):
    rejects(says, check.importance, answer)


def budget(t, b0, bT, tinit, tfinal, total, power=3):
    return int(bT + (b0 - bT) * min(max(1 - (t - tinit) / (total - tinit - tfinal), 0), 1) ** power)


def test_rank_budget_solution():
    accepts(check.rank_budget, budget)


@pytest.mark.parametrize("says, answer", [
    ("nothing here yet", blank),
    ("straight line", lambda *a: budget(*a, power=1)),
    ("is a square", lambda *a: budget(*a, power=2)),
    ("nothing is pruned", lambda t, b0, bT, i, f, T: budget(t, b0, bT, 0, f, T)),
    ("divide by T - tinit - tfinal", lambda t, b0, bT, i, f, T: budget(t, b0, bT, i, 0, T)),
    ("last tfinal steps", lambda t, b0, bT, i, f, T: budget(t, b0, bT, i, f, T) + (t > T - f)),
    ("not an integer", lambda *a: float(budget(*a)) + 0.25),
    ("is there a `return`", lambda *a: None),
])
def test_rank_budget_mistakes(says, answer):
    rejects(says, check.rank_budget, answer)


def allocate(scores, budget, off=0):
    threshold = torch.cat(list(scores.values())).sort(descending=True).values[budget - 1 + off]
    return {name: (score >= threshold).tolist() for name, score in scores.items()}


def test_allocate_solution():
    accepts(check.allocate, allocate)
    accepts(check.allocate, lambda s, b: {n: torch.tensor(mask) for n, mask in allocate(s, b).items()})


@pytest.mark.parametrize("says, answer", [
    ("nothing here yet", blank),
    ("True is for what is kept", lambda s, b: {n: [not one for one in mask] for n, mask in allocate(s, b).items()}),
    ("One too few", lambda s, b: allocate(s, b, -1)),
    ("One too many", lambda s, b: allocate(s, b, 1)),
    ("same names", lambda s, b: list(allocate(s, b).values())),
    ("for all of them together", lambda s, b: {n: [True] + [False] * (len(v) - 1) for n, v in s.items()}),
    ("matter least", lambda s, b: {n: [not one for one in m] for n, m in
                                   allocate(s, sum(map(len, s.values())) - b).items()}),
])
def test_allocate_mistakes(says, answer):
    rejects(says, check.allocate, answer)
