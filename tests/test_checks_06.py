"""Chapter 06's checks accept the solution, and name the mistake in what is plausibly
wrong."""

from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import accepts, configured, rejects
from torch import nn

from minipeft import LinearDelta
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
            abs(sum((g > 0) - (g < 0) for g in gaps(runs))) == 3,
        ],
    )


@pytest.mark.parametrize(
    "agree",
    [
        lambda found: len({gap > 0 for gap in found}) == 1,
        lambda found: len({gap < 0 for gap in found}) == 1,
        lambda found: min(found) >= 0 or max(found) <= 0,
        lambda found: min(found) * max(found) >= 0,
    ],
    ids=["not above", "not below", "at least 0", "the product"],
)
def test_with_equal_losses_neither_is_better(agree):
    def answer(runs):
        return mean(gaps(runs)), agree(gaps(runs))

    rejects("one seed both losses are equal", check.fair_gap, answer)


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


def test_fair_gap_of_other_methods():
    def answer(runs, one="full", other="DoRA"):
        names = {one: "LoRA", other: "DoRA"}
        return verdict(gaps([run | {"method": names[run["method"]]} for run in runs]))

    assert check.fair_gap(answer, one="full", other="DoRA")
    wrong = check.fair_gap(
        lambda runs: (-answer(runs)[0], answer(runs)[1]), one="full", other="DoRA"
    )
    assert "That is DoRA minus full" in wrong.message


# -------------------------------------------------------------------------- dora_output


def output(y, x, W, b, A, B, m, s):
    bias = 0 if b is None else b
    return m / norms(W, A, B, s) * (y - bias + s * (x @ A.T) @ B.T) + bias


def added(y, x, W, b, A, B, m, s):
    """In the other form, as a sum to what is there."""
    g = m / gram(W, A, B, s)
    Wx = y if b is None else y - b
    return y + (g - 1) * Wx + g * (s * torch.einsum("...i,ri,or->...o", x, A, B))


def with_norm(norm, detach=True):
    def answer(y, x, W, b, A, B, m, s):
        n = norm(W + s * B @ A)
        g = m / (n.detach() if detach else n)
        bias = 0 if b is None else b
        return g * (y - bias + s * (x @ A.T) @ B.T) + bias

    return answer


def the_planted(y, x, W, b, A, B, m, s):
    norm = (W + s * B @ A).norm(dim=0)
    return m / norm * (y + s * (x @ A.T) @ B.T)


def the_other_planted(y, x, W, b, A, B, m, s):
    g = (m / W.norm(dim=1)).detach()
    Wx = y if b is None else y - b
    return y + (g - 1) * Wx + s * (x @ A.T) @ B.T


def test_dora_output_right_answers():
    accepts(check.dora_output, output)
    accepts(check.dora_output, added)
    accepts(check.dora_output, with_norm(lambda V: V.square().sum(1).sqrt()))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("more than one fault", the_planted),
        ("both faults of the scale", the_other_planted),
        ("not detached", with_norm(lambda V: V.norm(dim=1), detach=False)),
        ("of the columns, one for each", with_norm(lambda V: V.norm(dim=0))),
        (
            "bias is scaled too",
            lambda y, x, W, b, A, B, m, s: (
                m / norms(W, A, B, s) * (y + s * (x @ A.T) @ B.T)
            ),
        ),
        (
            "bias is lost",
            lambda y, x, W, b, A, B, m, s: (
                output(y, x, W, b, A, B, m, s) - (0 if b is None else b)
            ),
        ),
        (
            "You compute W x + b again",
            lambda y, x, W, b, A, B, m, s: output(
                F.linear(x, W, b) + 0 * y, x, W, b, A, B, m, s
            ),
        ),
        ("that is a LoRA", lambda y, x, W, b, A, B, m, s: y + s * (x @ A.T) @ B.T),
        (
            "norm is that of W alone",
            lambda y, x, W, b, A, B, m, s: output(
                y, x, W, b, A, B, m * norms(W, A, B, s) / W.norm(dim=1), s
            ),
        ),
        (
            "update s B A x has to be scaled",
            lambda y, x, W, b, A, B, m, s: (
                output(y, x, W, b, A, 0 * B, m * W.norm(dim=1) / norms(W, A, B, s), s)
                + s * (x @ A.T) @ B.T
            ),
        ),
        (
            "m gets no gradient",
            lambda y, x, W, b, A, B, m, s: output(y, x, W, b, A, B, m.detach(), s),
        ),
        (
            "no gradient reaches x",
            lambda y, x, W, b, A, B, m, s: output(y, x.detach(), W, b, A, B, m, s),
        ),
        (
            "no gradient reaches y",
            lambda y, x, W, b, A, B, m, s: output(y.detach(), x, W, b, A, B, m, s),
        ),
        (
            "then added once more",
            lambda y, x, W, b, A, B, m, s: (
                m / norms(W, A, B, s) * (y + s * (x @ A.T) @ B.T)
                + (0 if b is None else b)
            ),
        ),
        ("Those are squares", with_norm(lambda V: V.square().sum(1))),
        ("sums of absolute values", with_norm(lambda V: V.abs().sum(1))),
        ("norm of the whole matrix", with_norm(lambda V: V.norm())),
        ("You multiply by the norm", with_norm(lambda V: 1 / V.norm(dim=1))),
        (
            "stopped with TypeError",
            lambda y, x, W, b, A, B, m, s: output(y - b + b, x, W, b, A, B, m, s),
        ),
    ],
)
def test_dora_output_mistakes(says, answer):
    rejects(says, check.dora_output, answer)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("W in the norm", lambda *g: knob(*g, norm=lambda W, BA: W + BA.detach())),
        ("s B A in the norm", lambda *g: knob(*g, norm=lambda W, BA: W.detach() + BA)),
        ("no absolute value of it", lambda *g: output(*g[:6], g[6].abs(), g[7])),
        ("gradient reaches b", lambda *g: added(*g[:3], cut(g[3]), *g[4:])),
        (
            "sign of s is lost",
            lambda *g: knob(*g, norm=lambda W, BA: (W + sign(g) * BA).detach()),
        ),
        (
            "Under torch.no_grad()",
            lambda *g: output(*g) if torch.is_grad_enabled() else g[0],
        ),
        ("differs", lambda *g: knob(*g, least=1.0)),
        (
            "stopped with RuntimeError",
            lambda y, x, W, b, A, B, m, s: output(
                y, torch.einsum("bti->bti", x), W, b, A, B, m, s
            ),
        ),
        (
            "bias is scaled too",
            lambda y, x, W, b, A, B, m, s: output(
                y, x, W, b if b is None or b.all() else None, A, B, m, s
            ),
        ),
    ],
)
def test_the_whole_norm_is_a_constant_and_any_layer_counts(says, answer):
    rejects(says, check.dora_output, answer)


def cut(b):
    return None if b is None else b.detach()


def sign(given):
    """Of the scale, wherever it stands."""
    return 1 if next(one for one in given[::-1] if isinstance(one, float)) > 0 else -1


def knob(y, x, W, b, A, B, m, s, norm=None, least=0.0):
    BA = s * B @ A
    V = (W + BA).detach() if norm is None else norm(W, BA)
    shift = 0 if b is None else b
    g = m / V.norm(dim=1).clamp(min=least)
    return g * (y - shift + s * (x @ A.T) @ B.T) + shift


def in_numpy(W, A, B, s):
    w, a, b = (tensor.detach().numpy() for tensor in (W, A, B))
    return torch.from_numpy(np.linalg.norm(w + s * b @ a, axis=1))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("outside torch", in_numpy),
        ("not detached", lambda W, A, B, s: gram(W, A, B, s) + 0 * W[:, 0]),
        ("sign of s is lost", lambda W, A, B, s: gram(W, A, B, abs(s))),
        ("", lambda W, A, B, s: gram(W, A, B, s) ** (1 if s else 2)),
        ("", lambda W, A, B, s: (gram(W, A, B, s) ** 2 - 1e-4).sqrt()),
    ],
)
def test_norms_of_any_size_and_scale(says, answer):
    rejects(says, check.gram_norms, answer)


@pytest.mark.parametrize(
    "agree",
    [
        lambda found: len({(gap > 0) - (gap < 0) for gap in found}) == 1,
        lambda found: 1000 * min(found) > 1 or 1000 * max(found) < -1,
    ],
    ids=["all equal", "by a thousandth"],
)
def test_all_seeds_agree_that_one_is_better(agree):
    rejects("agree", check.fair_gap, lambda runs: (mean(gaps(runs)), agree(gaps(runs))))


def test_seeds_have_any_numbers():
    def of_three(runs):
        return verdict(gaps([run for run in runs if run["seed"] < 3]))

    rejects("stopped with", check.fair_gap, of_three)
    rejects(
        "", check.fair_gap, lambda runs: (sum(gaps(runs)) / 3, verdict(gaps(runs))[1])
    )


# ------------------------------------------------------------------------- predict_dora


def numbers(c=2):
    return {
        "stretched": 1,
        "reversed": -1,
        "turned": 1 / (1 + c**2) ** 0.5,
        "late checkpoint": 1 / c,
        "gradient, m larger": c,
        "gradient, stretched": 1 / c,
        "gradient of m": 1,
    }


def test_predict_dora_right_answers():
    accepts(check.predict_dora, numbers())
    accepts(check.predict_dora, {k: torch.tensor(v) for k, v in numbers().items()})
    accepts(check.predict_dora, numbers() | {"turned": 0.45})
    assert check.predict_dora(numbers(3), c=3)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", [1.0]),
        ("'stretched': you say 2", numbers() | {"stretched": 2.0}),
        ("norm is positive", numbers() | {"reversed": 1.0}),
        ("right triangle", numbers() | {"turned": 0.5}),
        ("rows of the old lengths", numbers() | {"late checkpoint": 1.0}),
        ("everything behind it is LoRA's", numbers() | {"gradient, m larger": 1.0}),
        ("are c times as long", numbers() | {"gradient, stretched": 1.0}),
        ("linear in m", numbers() | {"gradient of m": 2.0}),
        ("expected a number", numbers() | {"gradient of m": "1"}),
        ("nothing here yet", numbers() | {"gradient of m": None}),
        (
            "no prediction for 'turned'",
            {k: v for k, v in numbers().items() if k != "turned"},
        ),
    ],
)
def test_predict_dora_mistakes(says, answer):
    rejects(says, check.predict_dora, answer)


# ------------------------------------------------------------------------ dora_backward


def backward(x, W, A, B, m, s, G, knob=True):
    norm = (W + s * B @ A).norm(dim=1)
    scaled = G * m / norm if knob else G
    z = x @ W.T + s * (x @ A.T) @ B.T
    dx = scaled @ W + s * (scaled @ B) @ A
    dA = s * (scaled @ B).T @ x
    dB = s * scaled.T @ (x @ A.T)
    return dx, dA, dB, (G * z / norm).sum(0)


def with_autograd(x, W, A, B, m, s, G, detach=True):
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B, m)]
    x, A, B, m = leaves
    with torch.enable_grad():
        V = W + s * B @ A
        norm = V.norm(dim=1)
        y = m / (norm.detach() if detach else norm) * (x @ V.T)
        return torch.autograd.grad((y * G).sum(), leaves)


def part(at, change):
    """One of the four is changed."""

    def answer(*given):
        parts = list(backward(*given))
        parts[at] = change(parts[at], *given)
        return parts

    return answer


def without_scale(d, x, W, A, B, m, s, G):
    scaled = G * m / norms(W, A, B, s)
    return scaled @ W + scaled @ B @ A


def by_vjp(x, W, A, B, m, s, G):
    norm = (W + s * B @ A).norm(dim=1)

    def layer(x, A, B, m):
        return m / norm * (x @ W.T + s * (x @ A.T) @ B.T)

    return torch.func.vjp(layer, x, A, B, m)[1](G)


def through_the_knob(d, x, W, A, B, m, s, G):
    g = m / norms(W, A, B, s)
    return (G * g * (x @ W.T + s * (x @ A.T) @ B.T)).sum(0) / m


def clamped(x, W, A, B, m, s, G):
    norm = norms(W, A, B, s)
    return backward(x, W, A, B, m * norm / norm.clamp(min=1), s, G)


def half_scaled(d, x, W, A, B, m, s, G):
    return G @ W + s * (G * m / norms(W, A, B, s)) @ B @ A


def test_dora_backward_right_answers():
    accepts(check.dora_backward, backward)
    accepts(
        check.dora_backward,
        lambda x, W, A, B, m, s, G: (
            torch.einsum(
                "no,o,oi->ni", G, m / norms(W, A, B, s), W + s * torch.mm(B, A)
            ),
            *backward(x, W, A, B, m, s, G)[1:],
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("Return four", lambda *given: backward(*given)[:3]),
        ("autograd computes them", with_autograd),
        ("autograd computes them", by_vjp),
        ("dm contains nan", part(3, through_the_knob)),
        ("dx: the sign of s is lost", lambda *g: backward(*g[:5], abs(g[5]), g[6])),
        ("dx: m may be negative", lambda *g: backward(*g[:4], g[4].abs(), *g[5:])),
        ("dx has the right shape", clamped),
        ("differentiated too", lambda *given: with_autograd(*given, detach=False)),
        ("dx: that is LoRA's", lambda *given: backward(*given, knob=False)),
        ("dA: the scale s is missing", part(1, lambda d, *g: d / g[5])),
        ("dB: the scale s is missing", part(2, lambda d, *g: d / g[5])),
        (
            "two ways",
            part(0, lambda d, x, W, A, B, m, s, G: G * m / norms(W, A, B, s) @ W),
        ),
        ("dx: the sign is turned round", part(0, lambda d, *g: -d)),
        ("dx: the scale s is missing", part(0, without_scale)),
        ("dx: g does not stand before W", part(0, half_scaled)),
        (
            "dx: only the way through s B A",
            part(
                0,
                lambda d, x, W, A, B, m, s, G: s * (G * m / norms(W, A, B, s)) @ B @ A,
            ),
        ),
        ("dA: you take the mean", part(1, lambda d, x, *g: d / len(x))),
        (
            "dm: the norm is missing",
            part(3, lambda d, x, W, A, B, m, s, G: d * norms(W, A, B, s)),
        ),
        ("dA should be a tensor of shape", part(1, lambda d, *g: d.T)),
        ("dB should be a tensor of shape", part(2, lambda d, *g: d.T)),
        ("dm should be a tensor", part(3, lambda d, *g: d.sum())),
        ("dB: that is LoRA's", part(2, lambda d, *g: backward(*g, knob=False)[2])),
        (
            "dm: only one of the two",
            part(
                3,
                lambda d, x, W, A, B, m, s, G: (
                    (G * (x @ W.T)).sum(0) / norms(W, A, B, s)
                ),
            ),
        ),
    ],
)
def test_dora_backward_mistakes(says, answer):
    rejects(says, check.dora_backward, answer)


# -------------------------------------------------------------------------- column_dora


class Columns(LinearDelta):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, W, r, alpha):
        super().__init__()
        d_out, d_in = W.shape
        self.s = alpha / r
        self.A = nn.Parameter(torch.randn(r, d_in) / d_in**0.5)
        self.B = nn.Parameter(torch.zeros(d_out, r))
        self.m = nn.Parameter(W.detach().norm(dim=0))

    def delta(self, base):
        V = base.weight + self.s * self.B @ self.A
        return self.m * V / V.detach().norm(dim=0) - base.weight


class Stale(Columns):
    """With the weight of the time when it was made."""

    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        self.register_buffer("W", W.detach().clone())

    def delta(self, base):
        V = self.W + self.s * self.B @ self.A
        return self.m * V / V.detach().norm(dim=0) - self.W


class StaleToo(Columns):
    """The directions are old, and what is taken off is new."""

    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        self.kept = [W.detach().clone()]

    def delta(self, base):
        V = self.kept[0] + self.s * self.B @ self.A
        return self.m * V / V.detach().norm(dim=0) - base.weight


class Cheaper(Columns):
    def update(self, base, x):
        norm = (base.weight + self.s * self.B @ self.A).detach().norm(dim=0)
        scaled = x * self.m / norm
        low = self.s * (scaled @ self.A.T) @ self.B.T
        return F.linear(scaled, base.weight) + low - F.linear(x, base.weight)


def with_delta(change):
    return configured(type("Changed", (Columns,), {"delta": change}))


def starting(change):
    class Changed(Columns):
        def __init__(self, W, r, alpha):
            super().__init__(W, r, alpha)
            change(self, W)

    return configured(Changed)


def new_weight(self, base, s=None, norm=None):
    V = base.weight + (self.s if s is None else s) * self.B @ self.A
    return self.m * V / (V.detach().norm(dim=0) if norm is None else norm)


class Unwritten(LinearDelta):
    def __init__(self, W, r, alpha):
        super().__init__()
        raise NotImplementedError


class Writes(Columns):
    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        W.data.mul_(2)
        self.m.data.mul_(2)


def test_column_dora_right_answers():
    accepts(check.column_dora, configured(Columns))
    accepts(check.column_dora, configured(Cheaper))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("read base.weight each time", configured(StaleToo)),
        ("read base.weight each time", configured(Stale)),
        ("nothing here yet", configured(Unwritten)),
        ("configuration's class itself", Columns),
        (
            "the new weight itself",
            with_delta(lambda s, b: new_weight(s, b) if s.B.any() else 0 * b.weight),
        ),
        (
            "scale α/r is missing",
            with_delta(lambda s, b: new_weight(s, b, 1.0) - b.weight),
        ),
        (
            "not detached",
            with_delta(
                lambda s, b: (
                    s.m
                    * (b.weight + s.s * s.B @ s.A)
                    / (b.weight + s.s * s.B @ s.A).norm(dim=0)
                    - b.weight
                )
            ),
        ),
        (
            "norm is that of W alone",
            with_delta(
                lambda s, b: new_weight(s, b, norm=b.weight.norm(dim=0)) - b.weight
            ),
        ),
        ("that is a LoRA", with_delta(lambda s, b: s.s * s.B @ s.A + 0 * s.m)),
        ("has to be zero at the start", starting(lambda s, W: s.m.data.fill_(1.0))),
        ("has to be zero at the start", starting(lambda s, W: s.B.data.normal_())),
        ("neither would ever", starting(lambda s, W: s.A.data.zero_())),
        (
            "self.m should have the shape",
            starting(lambda s, W: setattr(s, "m", nn.Parameter(W.norm(dim=1)))),
        ),
        (
            "You train more",
            starting(lambda s, W: setattr(s, "g", nn.Parameter(torch.ones(1)))),
        ),
        (
            "nn.Parameter as self.m",
            starting(lambda s, W: (delattr(s, "m"), setattr(s, "m", W.norm(dim=0)))),
        ),
        ("change the base's weight", configured(Writes)),
    ],
)
def test_column_dora_mistakes(says, answer):
    rejects(says, check.column_dora, answer)


class OwnFunction(Columns):
    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        self.update_of = lambda: self.s * self.B @ self.A

    def delta(self, base):
        V = base.weight + self.update_of()
        return self.m * V / V.detach().norm(dim=0) - base.weight


class Keeps(Columns):
    kept = None

    def delta(self, base):
        if self.training or self.kept is None:
            self.kept = super().delta(base)
        return self.kept


class LastOne(Columns):
    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        LastOne.newest = [self]

    def delta(self, base):
        return Columns.delta(LastOne.newest[0], base)


class AtFirst(Columns):
    done = False

    def delta(self, base):
        if not self.done:
            self.m.data, self.done = base.weight.norm(dim=0), True
        return super().delta(base)


class FoldsOnce(Columns):
    kept = None

    def fold(self, base):
        self.kept = self.delta(base).detach() if self.kept is None else self.kept
        base.weight = base.weight + self.kept


def same_draw(self, W):
    draws = torch.Generator().manual_seed(0)
    self.A.data = torch.randn(self.A.shape, generator=draws)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("rank below r", starting(lambda s, W: s.A.data.fill_(0.3))),
        ("seeds torch's global", starting(lambda s, W: torch.manual_seed(0))),
        ("the same A", starting(same_draw)),
        ("A copy of it", configured(OwnFunction)),
        ("does not follow a change", configured(Keeps)),
        ("", configured(LastOne)),
        ("Loaded into another layer", configured(AtFirst)),
        ("", configured(FoldsOnce)),
        (
            "After model.eval() the layer gives",
            with_delta(
                lambda s, b: Columns.delta(s, b) if s.training else 0 * b.weight
            ),
        ),
        (
            "as large as the weight",
            starting(lambda s, W: s.register_buffer("W", W.detach().clone())),
        ),
        (
            "base.module",
            with_delta(
                lambda s, b: (
                    new_weight(s, SimpleNamespace(weight=b.module.weight))
                    - b.module.weight
                )
            ),
        ),
    ],
)
def test_a_layer_is_the_same_in_every_state(says, answer):
    rejects(says, check.column_dora, answer)
