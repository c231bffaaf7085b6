"""Chapter 06's checks accept the solution, and name the mistake in what is plausibly
wrong."""

from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from judging import accepts, rejects

from minipeft.course import check


def blank(*_):
    raise NotImplementedError


def norms(W, A, B, s):
    return (W + s * B @ A).detach().norm(dim=1)


def gram(W, A, B, s, middle=2, power=2):
    W, A, B = W.detach(), A.detach(), B.detach()
    inner = middle * s * (B * (W @ A.T)).sum(1) + s**power * (B * (B @ (A @ A.T))).sum(
        1
    )
    return (torch.linalg.vector_norm(W, dim=1) ** 2 + inner).clamp(min=0).sqrt()


def test_row_norms_solution():
    accepts(check.row_norms, norms)
    accepts(
        check.row_norms,
        lambda W, A, B, s: torch.stack(
            [(w + s * b @ A).detach().norm() for w, b in zip(W, B)]
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "without keepdim",
            lambda W, A, B, s: (W + s * B @ A).detach().norm(dim=1, keepdim=True),
        ),
        ("nothing here yet", blank),
        (
            "norms are those of the columns",
            lambda W, A, B, s: (W + s * B @ A).detach().norm(dim=0),
        ),
        ("not detached", lambda W, A, B, s: (W + s * B @ A).norm(dim=1)),
        ("the whole matrix", lambda W, A, B, s: (W + s * B @ A).detach().norm()),
        (
            "the root is missing",
            lambda W, A, B, s: (W + s * B @ A).detach().square().sum(1),
        ),
        ("without the update", lambda W, A, B, s: W.norm(dim=1)),
        ("lost its scale", lambda W, A, B, s: (W + B @ A).detach().norm(dim=1)),
        (
            "Two shapes do not fit",
            lambda W, A, B, s: (W + s * A @ B).detach().norm(dim=1),
        ),
        (
            "sum of the norms",
            lambda W, A, B, s: W.norm(dim=1) + (s * B @ A).detach().norm(dim=1),
        ),
        (
            "holds that already",
            lambda W, A, B, s: (W + s / len(A) * B @ A).detach().norm(dim=1),
        ),
        ("unit rows", lambda W, A, B, s: F.normalize((W + s * B @ A).detach(), dim=1)),
        (
            "root of the mean square",
            lambda W, A, B, s: (W + s * B @ A).detach().square().mean(1).sqrt(),
        ),
        ("absolute values", lambda W, A, B, s: (W + s * B @ A).detach().abs().sum(1)),
        ("W is missing", lambda W, A, B, s: (s * B @ A).detach().norm(dim=1)),
        ("not detached", lambda W, A, B, s: (W.detach() + s * B @ A).norm(dim=1)),
    ],
)
def test_row_norms_mistakes(says, answer):
    rejects(says, check.row_norms, answer)


def columns(W, A, B, s):
    inner = 2 * s * (A * (B.T @ W)).sum(0) + s**2 * (A * (B.T @ B @ A)).sum(0)
    return (torch.linalg.vector_norm(W, dim=0) ** 2 + inner).sqrt()


def test_gram_norms_solution():
    accepts(check.gram_norms, gram)
    accepts(
        check.gram_norms,
        lambda W, A, B, s: torch.stack(
            [(w + s * b @ A).detach().norm() for w, b in zip(W, B)]
        ),
    )
    accepts(
        check.gram_norms,
        torch.no_grad()(
            lambda W, A, B, s: (
                torch.linalg.vector_norm(W, dim=1) ** 2
                + torch.einsum("or,or->o", B, 2 * s * (W @ A.T) + s**2 * B @ (A @ A.T))
            ).sqrt()
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("as large as W", norms),
        ("lacks its 2", lambda W, A, B, s: gram(W, A, B, s, middle=1)),
        ("not squared", lambda W, A, B, s: gram(W, A, B, s, power=1)),
        ("middle is missing", lambda W, A, B, s: gram(W, A, B, s, middle=0)),
        (
            "as large as W",
            lambda W, A, B, s: (
                (W**2).sum(1) + gram(W, A, B, s) ** 2 - W.norm(dim=1) ** 2
            ).sqrt(),
        ),
        ("the root is missing", lambda W, A, B, s: gram(W, A, B, s) ** 2),
        ("scale is missing", lambda W, A, B, s: gram(W, A, B, s, middle=2 / s)),
        (
            "not detached",
            lambda W, A, B, s: torch.stack(
                [(w + s * b @ A).norm() for w, b in zip(W, B)]
            ),
        ),
        (
            "those of the columns",
            lambda W, A, B, s: columns(W.detach(), A.detach(), B.detach(), s),
        ),
        ("as large as W", lambda W, A, B, s: (norms(W, A, B, s) ** 2).sqrt()),
    ],
)
def test_gram_norms_mistakes(says, answer):
    rejects(says, check.gram_norms, answer)


def forward(x, W, b, A, B, m, s):
    return m / norms(W, A, B, s) * (x @ W.T + s * x @ A.T @ B.T) + b


def test_dora_forward_solution():
    accepts(check.dora_forward, forward)
    accepts(
        check.dora_forward,
        lambda x, W, b, A, B, m, s: F.linear(
            x, (m / norms(W, A, B, s))[:, None] * (W + s * B @ A), b
        ),
    )
    accepts(
        check.dora_forward,
        lambda x, W, b, A, B, m, s: (
            F.linear(x, W, b)
            + (m / norms(W, A, B, s) - 1) * F.linear(x, W)
            + (m / norms(W, A, B, s) * (s * x @ A.T @ B.T))
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        (
            "norm is not detached",
            lambda x, W, b, A, B, m, s: (
                m / (W + s * B @ A).norm(dim=1) * (x @ (W + s * B @ A).T) + b
            ),
        ),
        (
            "bias is scaled too",
            lambda x, W, b, A, B, m, s: (
                m / norms(W, A, B, s) * (x @ (W + s * B @ A).T + b)
            ),
        ),
        (
            "bias is missing",
            lambda x, W, b, A, B, m, s: m / norms(W, A, B, s) * (x @ (W + s * B @ A).T),
        ),
        ("That is LoRA", lambda x, W, b, A, B, m, s: x @ (W + s * B @ A).T + b),
        ("do not divide", lambda x, W, b, A, B, m, s: m * (x @ (W + s * B @ A).T) + b),
        (
            "norm is that of W alone",
            lambda x, W, b, A, B, m, s: m / W.norm(dim=1) * (x @ (W + s * B @ A).T) + b,
        ),
        (
            "Only W x is scaled",
            lambda x, W, b, A, B, m, s: (
                m / norms(W, A, B, s) * (x @ W.T) + s * x @ A.T @ B.T + b
            ),
        ),
        (
            "no gradient",
            lambda x, W, b, A, B, m, s: (
                m / norms(W, A, B, s) * (x @ (W + s * B @ A).T).detach() + b
            ),
        ),
        (
            "bias is scaled too",
            lambda x, W, b, A, B, m, s: (
                F.linear(x, W, b)
                + (m / norms(W, A, B, s) - 1) * F.linear(x, W, b)
                + m / norms(W, A, B, s) * (s * x @ A.T @ B.T)
            ),
        ),
        (
            "own length",
            lambda x, W, b, A, B, m, s: (
                m * F.normalize(x @ (W + s * B @ A).T, dim=-1) + b
            ),
        ),
        (
            "no gradient",
            lambda x, W, b, A, B, m, s: forward(x, W, b, A, B, m.detach(), s),
        ),
        (
            "no gradient",
            lambda x, W, b, A, B, m, s: F.linear(
                x, m[:, None] * F.normalize(W + s * B @ A, dim=1).detach(), b
            ),
        ),
        (
            "stands on its head",
            lambda x, W, b, A, B, m, s: (
                norms(W, A, B, s) / m * (x @ (W + s * B @ A).T) + b
            ),
        ),
        (
            "lost its scale",
            lambda x, W, b, A, B, m, s: m / norms(W, A, B, s) * (x @ (W + B @ A).T) + b,
        ),
        (
            "Two shapes do not fit",
            lambda x, W, b, A, B, m, s: m / W.norm(dim=0) * (x @ (W + s * B @ A).T) + b,
        ),
    ],
)
def test_dora_forward_mistakes(says, answer):
    rejects(says, check.dora_forward, answer)


def moved(new, old, dim=1):
    return (new.norm(dim=dim) - old.norm(dim=dim)).abs().mean(), (
        1 - F.cosine_similarity(new, old, dim=dim)
    ).mean()


def test_length_and_direction_solution():
    accepts(check.length_and_direction, moved)
    accepts(
        check.length_and_direction,
        lambda new, old: tuple(value.item() for value in moved(new, old)),
    )
    accepts(
        check.length_and_direction,
        lambda new, old: [
            ((new**2).sum(1).sqrt() - (old**2).sum(1).sqrt()).abs().mean(),
            1 - (F.normalize(new) * F.normalize(old)).sum(1).mean(),
        ],
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("over columns", lambda new, old: moved(new, old, 0)),
        ("two are swapped", lambda new, old: moved(new, old)[::-1]),
        (
            "up and down cancel",
            lambda new, old: (
                (new.norm(dim=1) - old.norm(dim=1)).mean(),
                moved(new, old)[1],
            ),
        ),
        (
            "holds the turn as well",
            lambda new, old: ((new - old).norm(dim=1).mean(), moved(new, old)[1]),
        ),
        (
            "cosine itself",
            lambda new, old: (
                moved(new, old)[0],
                F.cosine_similarity(new, old, dim=1).mean(),
            ),
        ),
        ("two numbers", lambda new, old: moved(new, old)[0]),
        (
            "one number for each row",
            lambda new, old: (
                (new.norm(dim=1) - old.norm(dim=1)).abs(),
                moved(new, old)[1],
            ),
        ),
        (
            "relative",
            lambda new, old: (
                ((new.norm(dim=1) - old.norm(dim=1)).abs() / old.norm(dim=1)).mean(),
                moved(new, old)[1],
            ),
        ),
        (
            "one long vector",
            lambda new, old: ((new.norm() - old.norm()).abs(), moved(new, old)[1]),
        ),
        (
            "directions of their own",
            lambda new, old: (
                moved(new, old)[0],
                1 - F.cosine_similarity(new.flatten(), old.flatten(), dim=0),
            ),
        ),
        (
            "an angle",
            lambda new, old: (
                moved(new, old)[0],
                F.cosine_similarity(new, old, dim=1).acos().mean(),
            ),
        ),
        (
            "compares the change",
            lambda new, old: (
                moved(new, old)[0],
                (1 - F.cosine_similarity(new - old, old, dim=1)).mean(),
            ),
        ),
        (
            "ΔM is squared",
            lambda new, old: (
                (new.norm(dim=1) - old.norm(dim=1)).square().mean(),
                moved(new, old)[1],
            ),
        ),
    ],
)
def test_length_and_direction_mistakes(says, answer):
    rejects(says, check.length_and_direction, answer)


def gaps(runs, key="test_loss", by="valid_loss", over=mean, rates=None):
    def score(m, lr):
        return over(run[by] for run in runs if (run["method"], run["lr"]) == (m, lr))

    best = {
        m: min({run["lr"] for run in runs}, key=lambda lr: score(m, lr))
        for m in ("LoRA", "DoRA")
    }
    best = best if rates is None else dict.fromkeys(best, best[rates])
    loss = {
        (run["method"], run["seed"]): run[key]
        for run in runs
        if run["lr"] == best[run["method"]]
    }
    return [
        loss["LoRA", seed] - loss["DoRA", seed]
        for seed in sorted({run["seed"] for run in runs})
    ]


def verdict(found):
    return mean(found), min(found) > 0 or max(found) < 0


def lowest(runs, method):
    return min(run["test_loss"] for run in runs if run["method"] == method)


def test_fair_gap_solution():
    accepts(check.fair_gap, lambda runs: verdict(gaps(runs)))
    accepts(
        check.fair_gap,
        lambda runs: [
            torch.tensor(gaps(runs), dtype=torch.float64).mean(),
            len({g > 0 for g in gaps(runs)}) == 1,
        ],
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("one rate", lambda runs: verdict(gaps(runs, rates="LoRA"))),
        ("one rate", lambda runs: verdict(gaps(runs, rates="DoRA"))),
        ("by the test loss", lambda runs: verdict(gaps(runs, by="test_loss"))),
        (
            "report validation losses",
            lambda runs: verdict(gaps(runs, key="valid_loss")),
        ),
        ("luckiest", lambda runs: verdict(gaps(runs, over=min))),
        (
            "rewards luck",
            lambda runs: (lowest(runs, "LoRA") - lowest(runs, "DoRA"), True),
        ),
        ("DoRA minus LoRA", lambda runs: verdict([-g for g in gaps(runs)])),
        ("take the mean", lambda runs: (sum(gaps(runs)), True)),
        (
            "whether the seeds agree",
            lambda runs: (mean(gaps(runs)), mean(gaps(runs)) > 0),
        ),
        ("whether the seeds agree", lambda runs: (mean(gaps(runs)), True)),
        ("two things", lambda runs: mean(gaps(runs))),
        ("True or False", lambda runs: (mean(gaps(runs)), gaps(runs))),
    ],
)
def test_fair_gap_mistakes(says, answer):
    rejects(says, check.fair_gap, answer)
