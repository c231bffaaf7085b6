"""Chapter 05's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import pytest
import torch
from judging import accepts, judge, rejects

from minipeft.course import check
from minipeft.course.check.chapter05 import FOUND, PATIENTS, patient


def stub(*_):
    raise NotImplementedError


# ----------------------------------------------------------------------------- same_run


def same_run(c, rate_A, rate_B, optimizer):
    return rate_A, rate_B / (c if optimizer == "adam" else c**2)


def test_same_run_solution():
    accepts(check.same_run, same_run)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_same_run_oracle_is_the_run(name):
    """Two runs in 64 bits: alpha times c, rates as the solution says; the update is the
    same after 20 steps."""

    def run(s, rates):
        torch.manual_seed(0)
        A, B = (
            (torch.randn(3, 8).double() / 3).requires_grad_(),
            torch.zeros(5, 3).double().requires_grad_(),
        )
        x, target = torch.randn(16, 8).double(), torch.randn(16, 5).double()
        groups = [{"params": [p], "lr": rate} for p, rate in zip((A, B), rates)]
        optimizer = (
            torch.optim.SGD(groups)
            if name == "sgd"
            else torch.optim.Adam(groups, eps=1e-30)
        )
        for _ in range(20):
            optimizer.zero_grad()
            (s * x @ A.T @ B.T - target).square().mean().backward()
            optimizer.step()
        return (s * B @ A).detach()

    torch.testing.assert_close(
        run(6.0, same_run(3.0, 0.01, 0.02, name)), run(2.0, (0.01, 0.02))
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("you changed nothing", lambda c, a, b, optimizer: (a, b)),
        (
            "upside down",
            lambda c, a, b, optimizer: (a, b * (c if optimizer == "adam" else c**2)),
        ),
        ("slow A down too", lambda c, a, b, optimizer: (a / c, b / c)),
        ("swapped", lambda c, a, b, optimizer: (b / c, a)),
        ("plain gradient descent feels both", lambda c, a, b, optimizer: (a, b / c)),
        ("Adam divides by its size", lambda c, a, b, optimizer: (a, b / c**2)),
        ("leave A's rate alone", lambda c, a, b, optimizer: (a * c, b / c)),
        ("should be", lambda c, a, b, optimizer: (a, b / c**0.5)),
        ("two numbers", lambda c, a, b, optimizer: b / c),
        ("nothing here yet", stub),
    ],
)
def test_same_run_mistakes(says, answer):
    rejects(says, check.same_run, answer)


# ----------------------------------------------------------------------- rank_at_budget


def cost(shapes, targets, of=lambda d_out, d_in: d_out + d_in):
    return sum(of(*shapes[name]) for name in targets)


def test_rank_at_budget_solution():
    accepts(
        check.rank_at_budget,
        lambda shapes, layers, targets, budget: (
            budget // (layers * cost(shapes, targets))
        ),
    )
    accepts(
        check.rank_at_budget,
        lambda shapes, layers, targets, budget: max(
            r for r in range(99) if r * layers * cost(shapes, targets) <= budget
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "you round",
            lambda shapes, layers, targets, budget: round(
                budget / (layers * cost(shapes, targets))
            ),
        ),
        (
            "whole number",
            lambda shapes, layers, targets, budget: (
                budget / (layers * cost(shapes, targets))
            ),
        ),
        (
            "count one layer",
            lambda shapes, layers, targets, budget: budget // cost(shapes, targets),
        ),
        (
            "whole matrices",
            lambda shapes, layers, targets, budget: (
                budget
                // (layers * cost(shapes, targets, lambda d_out, d_in: d_out * d_in))
            ),
        ),
        (
            "for square",
            lambda shapes, layers, targets, budget: (
                budget // (layers * cost(shapes, targets, lambda d_out, d_in: 2 * d_in))
            ),
        ),
        (
            "only the targets",
            lambda shapes, layers, targets, budget: (
                budget // (layers * cost(shapes, shapes))
            ),
        ),
        ("numbers a rank", lambda shapes, layers, targets, budget: 1000),
        (
            "count A alone",
            lambda shapes, layers, targets, budget: (
                budget // (layers * cost(shapes, targets, lambda d_out, d_in: d_in))
            ),
        ),
        (
            "count B alone",
            lambda shapes, layers, targets, budget: (
                budget // (layers * cost(shapes, targets, lambda d_out, d_in: d_out))
            ),
        ),
        (
            "spent to the last number",
            lambda shapes, layers, targets, budget: max(
                r for r in range(99) if r * layers * cost(shapes, targets) < budget
            ),
        ),
        ("should be an int", lambda shapes, layers, targets, budget: "8"),
        ("nothing here yet", stub),
    ],
)
def test_rank_at_budget_mistakes(says, answer):
    rejects(says, check.rank_at_budget, answer)


# -------------------------------------------------------------------------- pissa_start


def pissa(
    W,
    r,
    s,
    part=lambda r: slice(r),
    value=lambda S, s: (S / s).sqrt(),
    rest=lambda W, s, BA: W - s * BA,
):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    root, one = value(S, s)[part(r)], part(r)
    A, B = root[:, None] * Vt[one], U[:, one] * root
    return A, B, rest(W, s, B @ A)


def uneven(W, r, s):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    A, B = Vt[:r], U[:, :r] * S[:r] / s
    return A, B, W - s * B @ A


def in_place(W, r, s):
    A, B, rest = pissa(W, r, s)
    W.copy_(rest)
    return A, B, W


def rows_of_V(W, r, s):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / s).sqrt()
    A, B = root[:, None] * Vt.T[:r], U[:, :r] * root
    return A, B, W - s * B @ A


def roots_at_columns(W, r, s):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    A, B = ((S / s).sqrt() * Vt)[:r], (U * (S / s).sqrt())[:, :r]
    return A, B, W - s * B @ A


def olora(W, r, s):
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r], W - s * Q[:, :r] @ R[:r]


def by_eigenvectors(W, r, s):
    """The solution by another way, signs and all."""
    values, V = torch.linalg.eigh(W.T @ W)
    V, S = V.flip(1)[:, :r], values.flip(0)[:r].sqrt()
    root = torch.diag((S / s).sqrt())
    A, B = root @ V.T, W @ V / S @ root
    return [torch.nn.Parameter(A), torch.nn.Parameter(B), W - s * B @ A]


def test_pissa_start_solution():
    accepts(check.pissa_start, pissa)
    accepts(check.pissa_start, by_eigenvectors)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("divide by s", lambda W, r, s: pissa(W, r, s, value=lambda S, s: S.sqrt())),
        (
            "s counts twice",
            lambda W, r, s: pissa(W, r, s, value=lambda S, s: S.sqrt() / s),
        ),
        (
            "has their squares",
            lambda W, r, s: pissa(W, r, s, value=lambda S, s: S / s**0.5),
        ),
        (
            "smallest singular values",
            lambda W, r, s: pissa(W, r, s, part=lambda r: slice(-r, None)),
        ),
        ("W_res is W", lambda W, r, s: pissa(W, r, s, rest=lambda W, s, BA: W.clone())),
        (
            "Subtract s B A, with s",
            lambda W, r, s: pissa(W, r, s, rest=lambda W, s, BA: W - BA),
        ),
        (
            "directions only",
            lambda W, r, s: pissa(W, r, s, value=lambda S, s: torch.ones_like(S)),
        ),
        ("unevenly", uneven),
        ("swapped", lambda W, r, s: (lambda A, B, rest: (B, A, rest))(*pissa(W, r, s))),
        (
            "have the shapes",
            lambda W, r, s: (lambda A, B, rest: (A.T, B, rest))(*pissa(W, r, s)),
        ),
        ("rows of V", rows_of_V),
        ("stand at the columns", roots_at_columns),
        ("OLoRA's start", olora),
        (
            "multiply by s before the root",
            lambda W, r, s: pissa(W, r, s, value=lambda S, s: (S * s).sqrt()),
        ),
        (
            "unevenly",
            lambda W, r, s: (lambda A, B, rest: (A / s, B * s, rest))(*pissa(W, r, s)),
        ),
        (
            "Subtract s B A, with s",
            lambda W, r, s: pissa(W, r, s, rest=lambda W, s, BA: W + s * BA),
        ),
        ("You changed `W` in place", in_place),
        ("three tensors", lambda W, r, s: pissa(W, r, s)[:2]),
        ("nothing here yet", stub),
    ],
)
def test_pissa_start_mistakes(says, answer):
    rejects(says, check.pissa_start, answer)


# ---------------------------------------------------------------------- loraplus_groups


def groups(
    named,
    lr,
    ratio,
    fast=lambda name, p: "lora_B" in name or p.ndim == 1,
    slow_rate=lambda lr, ratio: lr,
    fast_rate=lambda lr, ratio: lr * ratio,
    keep=lambda name, p: p.requires_grad,
):
    named = [(name, p) for name, p in named if keep(name, p)]
    return [
        {
            "params": [p for name, p in named if not fast(name, p)],
            "lr": slow_rate(lr, ratio),
        },
        {
            "params": [p for name, p in named if fast(name, p)],
            "lr": fast_rate(lr, ratio),
        },
    ]


def one_each(named, lr, ratio):
    return tuple(
        {"params": p, "lr": lr * ratio if "lora_B" in name or p.ndim == 1 else lr}
        for name, p in named
        if p.requires_grad
    )


def test_loraplus_groups_solution():
    accepts(check.loraplus_groups, groups)
    accepts(check.loraplus_groups, one_each)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "swapped",
            lambda named, lr, ratio: groups(
                named, lr, ratio, fast=lambda name, p: "lora_A" in name
            ),
        ),
        (
            "frozen weights",
            lambda named, lr, ratio: groups(
                named, lr, ratio, keep=lambda name, p: True
            ),
        ),
        (
            "plain LoRA",
            lambda named, lr, ratio: groups(
                named, lr, ratio, fast_rate=lambda lr, ratio: lr
            ),
        ),
        (
            "slow A down",
            lambda named, lr, ratio: groups(
                named,
                lr,
                ratio,
                slow_rate=lambda lr, ratio: lr / ratio,
                fast_rate=lambda lr, ratio: lr,
            ),
        ),
        (
            "multiply",
            lambda named, lr, ratio: groups(
                named, lr, ratio, fast_rate=lambda lr, ratio: lr + ratio
            ),
        ),
        (
            "never trained",
            lambda named, lr, ratio: groups(
                named, lr, ratio, keep=lambda name, p: "lora" in name
            ),
        ),
        ("two groups", lambda named, lr, ratio: groups(named, lr, ratio) * 2),
        (
            "such as a head",
            lambda named, lr, ratio: groups(
                named, lr, ratio, fast=lambda name, p: "lora_A" not in name
            ),
        ),
        (
            "norm.weight has one dimension",
            lambda named, lr, ratio: groups(
                named, lr, ratio, fast=lambda name, p: "lora_B" in name
            ),
        ),
        (
            "no lr of its own",
            lambda named, lr, ratio: [
                {"params": group["params"]} if group["lr"] == lr else group
                for group in groups(named, lr, ratio)
            ],
        ),
        (
            "That is an optimizer",
            lambda named, lr, ratio: torch.optim.AdamW(groups(named, lr, ratio)),
        ),
        (
            "divide by the ratio",
            lambda named, lr, ratio: groups(
                named, lr, ratio, fast_rate=lambda lr, ratio: lr / ratio
            ),
        ),
        (
            "bias of a lora_B",
            lambda named, lr, ratio: groups(
                named, lr, ratio, fast=lambda name, p: "lora_B.weight" in name
            ),
        ),
        (
            "not their names",
            lambda named, lr, ratio: [
                {"params": [name for name, _ in named], "lr": lr}
            ],
        ),
        ("list of groups", lambda named, lr, ratio: {"A": lr, "B": lr * ratio}),
        ("nothing here yet", stub),
    ],
)
def test_loraplus_groups_mistakes(says, answer):
    rejects(says, check.loraplus_groups, answer)


# ----------------------------------------------------------------------------- diagnose


def diagnose(layer, optimizer, skip=None):
    x = torch.randn(4, layer.linear.in_features)
    rate = {
        id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]
    }
    adds = not torch.equal(layer(x), layer.linear(x))
    tests = {
        "frozen": not (layer.A.requires_grad or layer.B.requires_grad),
        "no rate": not rate.get(id(layer.B)),
        "dead": not layer.A.any() and not layer.B.any(),
        "no scale": layer.scale == 0,
        "disabled": not layer.enabled,
        "twice": layer.merged and adds,
    }
    return next(
        (word for word, sick in tests.items() if sick and word != skip), "healthy"
    )


def by_gradients(layer, optimizer):
    """Another way to look: what a backward pass finds."""
    if not layer.enabled or layer.scale == 0:
        return "no scale" if layer.enabled else "disabled"
    if not any(
        p is layer.B and group["lr"] > 0
        for group in optimizer.param_groups
        for p in group["params"]
    ):
        return "no rate"
    y = layer(torch.randn(3, layer.linear.in_features))
    if not y.requires_grad:
        return "healthy" if layer.merged else "frozen"
    y.sum().backward()
    return (
        "twice"
        if layer.merged
        else "healthy"
        if layer.B.grad.any() or layer.A.grad.any()
        else "dead"
    )


def test_diagnose_solution():
    accepts(check.diagnose, diagnose)
    accepts(check.diagnose, by_gradients)


def cures(layer, optimizer):
    with torch.no_grad():
        layer.B += 1
    return "healthy"


@pytest.mark.parametrize(
    "says, answer",
    [
        ("and you said 'healthy'", lambda layer, optimizer: "healthy"),
        *(
            (
                FOUND[word],
                lambda layer, optimizer, word=word: diagnose(
                    layer, optimizer, skip=word
                ),
            )
            for word in FOUND
            if word != "healthy"
        ),
        (
            "as it should be",
            lambda layer, optimizer: (
                diagnose(layer, optimizer)
                if layer.B.any()
                or not layer.A.any()
                or diagnose(layer, optimizer) != "healthy"
                else "dead"
            ),
        ),
        (
            "as it should be",
            lambda layer, optimizer: (
                "frozen"
                if diagnose(layer, optimizer) == "healthy" and not layer.B.any()
                else diagnose(layer, optimizer)
            ),
        ),
        (
            "left out of its groups",
            lambda layer, optimizer: (
                diagnose(layer, optimizer, skip="no rate")
                if len(optimizer.param_groups) == 1
                else diagnose(layer, optimizer)
            ),
        ),
        (
            "left out of its groups",
            lambda layer, optimizer: (
                diagnose(layer, optimizer, skip="no rate")
                if len(optimizer.param_groups) == 2
                else diagnose(layer, optimizer)
            ),
        ),
        ("small letters", lambda layer, optimizer: diagnose(layer, optimizer).title()),
        (
            "being merged is no disease",
            lambda layer, optimizer: (
                "twice" if layer.merged else diagnose(layer, optimizer)
            ),
        ),
        (
            "rightly so",
            lambda layer, optimizer: (
                "disabled"
                if layer.merged and not layer.adds_when_merged
                else diagnose(layer, optimizer)
            ),
        ),
        ("changed the patient's weights", cures),
        ("none of the words", lambda layer, optimizer: "ill"),
        ("said nothing", lambda layer, optimizer: None),
        ("nothing here yet", stub),
    ],
)
def test_diagnose_mistakes(says, answer):
    rejects(says, check.diagnose, answer)


def test_an_untrained_adapter_is_not_dead():
    """The check stops at the first patient that is mistaken, and this answer mistakes
    several."""
    verdicts = [
        verdict
        for verdict in judge(
            check.diagnose,
            lambda layer, optimizer: "healthy" if layer.B.any() else "dead",
            variants=60,
        )
    ]
    assert not any(verdicts) and any(
        "as it should be" in verdict.message for verdict in verdicts
    )


def test_patients_have_what_they_are_said_to_have():
    assert {disease for disease, *_ in PATIENTS} == set(FOUND)
    for disease, trained, other in PATIENTS:
        layer, optimizer = patient(disease, trained, other)
        assert diagnose(layer, optimizer) == disease
        assert bool(layer.B.any()) == trained
