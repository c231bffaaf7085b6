"""Chapter 04's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import math
import statistics
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from judging import accepts, judge, rejects
from torch import nn

from minipeft import LayerConfig, LinearDelta, LoraConfig
from minipeft.course import check, compare
from minipeft.course.check import practice
from minipeft.course.check.sandbox import Wrong
from minipeft.weights import linear_features


def stub(*args):
    raise NotImplementedError


# --------------------------------------------------------------------------- lora_delta


def test_lora_delta_solution():
    accepts(check.lora_delta, lambda A, B, alpha, r: alpha / r * B @ A)


def remembered():
    """The first update of each shape, for ever."""
    known = {}

    def update(A, B, alpha, r):
        return known.setdefault((A.shape, B.shape), alpha / r * B @ A)

    return update


@pytest.mark.parametrize(
    "says, answer",
    [
        ("forget to divide by r", lambda A, B, alpha, r: alpha * B @ A),
        ("factor alpha / r is missing", lambda A, B, alpha, r: B @ A),
        ("rsLoRA", lambda A, B, alpha, r: alpha / math.sqrt(r) * B @ A),
        ("upside down", lambda A, B, alpha, r: r / alpha * B @ A),
        ("folded in twice", lambda A, B, alpha, r: (alpha / r) ** 2 * B @ A),
        ("lies on its side", lambda A, B, alpha, r: alpha / r * (B @ A).T),
        ("lies on its side", lambda A, B, alpha, r: alpha / r * A.T @ B.T),
        ("in this order", lambda A, B, alpha, r: alpha / r * A @ B),
        ("whole part", lambda A, B, alpha, r: alpha // r * B @ A),
        ("whole part", lambda A, B, alpha, r: int(alpha / r) * B @ A),
        ("alpha / r is missing", lambda A, B, alpha, r: max(1, alpha / r) * B @ A),
        (
            "In a square matrix",
            lambda A, B, alpha, r: (
                alpha / r * (B @ A if len(B) != A.shape[1] else A.T @ B.T)
            ),
        ),
        (
            "differs from the formula",
            lambda A, B, alpha, r: round(alpha / r, 2) * B @ A,
        ),
        ("After a step of training", remembered()),
        ("lost touch", lambda A, B, alpha, r: alpha / r * (B @ A).detach()),
        ("is there a `return`", lambda A, B, alpha, r: None),
        ("should be a tensor", lambda A, B, alpha, r: 3.0),
        ("every entry is off by 1", lambda A, B, alpha, r: alpha / r * B @ A + 1),
        ("the shape", lambda A, B, alpha, r: alpha / r * (B @ A)[:, :2]),
        (
            "leave the arguments as they are",
            lambda A, B, alpha, r: alpha / r * B.data.mul_(2) @ A / 2,
        ),
    ],
)
def test_lora_delta_mistakes(says, answer):
    rejects(says, check.lora_delta, answer)


# --------------------------------------------------------------------------- lora_layer


class Lora(nn.Module):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale, self.alpha, self.r = alpha / r, alpha, r
        self.dropout = nn.Dropout(dropout)

    def update(self, x):
        return self.scale * self.dropout(x) @ self.A.T @ self.B.T

    def forward(self, x):
        return self.linear(x) + self.update(x)


class ByLinears(nn.Module):
    """Another right way: A and B as Linears."""

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        self.linear, self.scale, self.dropout = (
            linear.requires_grad_(False),
            alpha / r,
            nn.Dropout(dropout),
        )
        self.A = nn.Linear(linear.in_features, r, bias=False)
        self.B = nn.Linear(r, linear.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x):
        return self.linear(x) + self.scale * self.B(self.A(self.dropout(x)))


def after_init(change):
    """A Lora whose __init__ ends with change(self)."""

    class Changed(Lora):
        def __init__(self, linear, r, alpha, dropout=0.0):
            super().__init__(linear, r, alpha, dropout)
            change(self)

    return Changed


def with_forward(forward):
    return type("Changed", (Lora,), {"forward": forward})


def set_parameters(**shapes):
    return after_init(
        lambda self: [
            setattr(self, name, nn.Parameter(shape(self)))
            for name, shape in shapes.items()
        ]
    )


def of_one_seed():
    return torch.Generator().manual_seed(3)


class WithClosure(Lora):
    """A lambda made in __init__ holds A and B: a deep copy has the first one's."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        A, B = self.A, self.B
        self.change = lambda x: self.scale * x @ A.T @ B.T

    def update(self, x):
        return self.change(self.dropout(x))


def masked(self, shape):
    """One mask of each layer, drawn at its first call."""
    if not self.training:
        return torch.ones(shape)
    if "mask" not in vars(self):
        self.mask = self.dropout(torch.ones(shape))
    return self.mask


def drop(self, x):
    return nn.functional.dropout(x, self.dropout.p, self.training)


def test_lora_layer_solutions():
    accepts(check.lora_layer, Lora)
    accepts(check.lora_layer, ByLinears)


class BlankLora(nn.Module):
    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        raise NotImplementedError


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "forget to divide by r",
            after_init(lambda self: setattr(self, "scale", self.alpha)),
        ),
        ("alpha / r is missing", after_init(lambda self: setattr(self, "scale", 1.0))),
        (
            "folded in twice",
            after_init(lambda self: setattr(self, "scale", self.scale**2)),
        ),
        ("both zero", after_init(lambda self: nn.init.zeros_(self.A))),
        ("B is random", after_init(lambda self: nn.init.normal_(self.B))),
        (
            "other way round",
            after_init(lambda self: (nn.init.zeros_(self.A), nn.init.normal_(self.B))),
        ),
        ("all alike", after_init(lambda self: nn.init.ones_(self.A))),
        (
            "are swapped",
            set_parameters(
                A=lambda s: torch.randn(s.linear.out_features, s.r),
                B=lambda s: torch.zeros(s.r, s.linear.in_features),
            ),
        ),
        (
            "are transposed",
            set_parameters(
                A=lambda s: torch.randn(s.linear.in_features, s.r),
                B=lambda s: torch.zeros(s.r, s.linear.out_features),
            ),
        ),
        (
            "A has the shape",
            set_parameters(A=lambda s: torch.randn(1, s.linear.in_features)),
        ),
        (
            "base weight is not frozen",
            after_init(lambda self: self.linear.requires_grad_(True)),
        ),
        (
            "its bias is not",
            after_init(lambda self: self.linear.bias.requires_grad_(True)),
        ),
        ("A or B is frozen", after_init(lambda self: self.A.requires_grad_(False))),
        (
            "Something else would train",
            after_init(
                lambda self: setattr(self, "extra", nn.Parameter(torch.zeros(2)))
            ),
        ),
        (
            "sees only an nn.Parameter",
            after_init(
                lambda self: (
                    delattr(self, "A"),
                    setattr(self, "A", torch.randn(self.r, self.linear.in_features)),
                )
            ),
        ),
        ("there is none", after_init(lambda self: delattr(self, "B"))),
        (
            "bias is added twice",
            with_forward(
                lambda self, x: self.linear(x) + self.update(x) + self.linear.bias
            ),
        ),
        (
            "is missing",
            with_forward(
                lambda self, x: (
                    self.linear(x) * 0
                    + self.update(x)
                    + (0 if self.B.any() else self.linear(x))
                )
            ),
        ),
        (
            "must give exactly what the base gives",
            with_forward(lambda self, x: self.update(x)),
        ),
        ("update never reaches", with_forward(lambda self, x: self.linear(x))),
        (
            "scaled too",
            with_forward(
                lambda self, x: (
                    (self.linear(x) + self.update(x) / self.scale)
                    * (self.scale if self.B.any() else 1)
                )
            ),
        ),
        ("is there a `return`", with_forward(lambda self, x: None)),
        (
            "drop the output",
            with_forward(
                lambda self, x: (
                    self.linear(x) + drop(self, self.scale * x @ self.A.T @ self.B.T)
                )
            ),
        ),
        (
            "numbers in the middle",
            with_forward(
                lambda self, x: (
                    self.linear(x) + self.scale * drop(self, x @ self.A.T) @ self.B.T
                )
            ),
        ),
        (
            "touches the base's path",
            with_forward(lambda self, x: self.linear(self.dropout(x)) + self.update(x)),
        ),
        (
            "touches the base's path",
            with_forward(
                lambda self, x: drop(
                    self, self.linear(x) + self.scale * x @ self.A.T @ self.B.T
                )
            ),
        ),
        (
            "dropout does nothing",
            with_forward(
                lambda self, x: self.linear(x) + self.scale * x @ self.A.T @ self.B.T
            ),
        ),
        (
            "still drops",
            with_forward(
                lambda self, x: (
                    self.linear(x)
                    + self.scale
                    * nn.functional.dropout(x, self.dropout.p)
                    @ self.A.T
                    @ self.B.T
                )
            ),
        ),
        (
            "must grow by",
            with_forward(
                lambda self, x: (
                    self.linear(x)
                    + self.scale
                    * (x * (torch.rand_like(x) > self.dropout.p * self.training))
                    @ self.A.T
                    @ self.B.T
                )
            ),
        ),
        (
            "no gradient reaches A",
            with_forward(
                lambda self, x: (
                    self.linear(x) + self.scale * x @ self.A.T.detach() @ self.B.T
                    if not self.dropout.p
                    else self.linear(x) + self.update(x)
                )
            ),
        ),
        ("seeds torch's global generator", after_init(lambda s: torch.manual_seed(0))),
        (
            "begin with the same A",
            set_parameters(A=lambda s: torch.randn(s.A.shape, generator=of_one_seed())),
        ),
        (
            "then the gradient of B is as small",
            set_parameters(A=lambda s: 1e-9 * torch.randn(s.A.shape)),
        ),
        ("the base's has", with_forward(lambda s, x: Lora.forward(s, x).squeeze(0))),
        (
            "Under torch.no_grad()",
            with_forward(
                lambda s, x: (
                    Lora.forward(s, x) if torch.is_grad_enabled() else s.linear(x)
                )
            ),
        ),
        ("A copy of it", WithClosure),
        (
            "drop the same inputs",
            with_forward(
                lambda s, x: (
                    s.linear(x)
                    + s.scale * (x * masked(s, x.shape[-1:])) @ s.A.T @ s.B.T
                )
            ),
        ),
        (
            "All tokens lose the same inputs",
            with_forward(
                lambda s, x: (
                    s.linear(x)
                    + s.scale * (x * s.dropout(torch.ones(x.shape[-1]))) @ s.A.T @ s.B.T
                )
            ),
        ),
        ("whole part", after_init(lambda s: setattr(s, "scale", s.alpha // s.r))),
        (
            "alpha / r is missing",
            after_init(lambda s: setattr(s, "scale", max(1, s.scale))),
        ),
        (
            "A's numbers have the size",
            set_parameters(A=lambda s: 9 * torch.randn(s.A.shape)),
        ),
        ("the class itself", Lora(nn.Linear(4, 6), 2, 4)),
        ("nothing here yet", BlankLora),
    ],
)
def test_lora_layer_mistakes(says, answer):
    rejects(says, check.lora_layer, answer)


# ------------------------------------------------------------------- predict_first_step


def steps(factor=3):
    """The right predictions."""
    n = f"{factor:g}"
    return {
        f"SGD, s × {n}": factor**2,
        f"Adam, s × {n}": factor,
        f"Adam, s and lr / {n}": 1,
        f"SGD, A × {n}": factor**2,
        f"Adam, A × {n}": factor,
        f"SGD, loss × {n}": factor,
        f"Adam, loss × {n}": 1,
    }


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_first_steps_right_answers(factor):
    judged = partial(check.predict_first_step, factor=factor)
    accepts(judged, steps(factor))
    accepts(judged, {case: np.float32(v) for case, v in steps(factor).items()})
    accepts(judged, {case: torch.tensor(float(v)) for case, v in steps(factor).items()})
    accepts(judged, dict(reversed(steps(factor).items())))
    rejects("Think of this", judged, dict.fromkeys(steps(factor), 1.0))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("'SGD, s × 3': you say 3, which is too small", {"SGD, s × 3": 3}),
        ("only the s before B A is left", {"Adam, s × 3": 9}),
        ("only the s before B A is left", {"Adam, s × 3": 1}),
        ("the smaller step of B loses", {"Adam, s and lr / 3": 3}),
        ("contains A, and so does B A", {"SGD, A × 3": 3}),
        ("the A in B A is left", {"Adam, A × 3": 1}),
        ("that of the loss, once", {"SGD, loss × 3": 9}),
        ("by its own size", {"Adam, loss × 3": 3}),
        ("expected a number, found '9'", {"SGD, s × 3": "9"}),
        ("expected a number", {"SGD, s × 3": float("nan")}),
        ("write your prediction", {"SGD, s × 3": None}),
        ("is not one of", {"SGD, s": 9}),
    ],
)
def test_first_steps_mistakes(says, answer):
    rejects(says, check.predict_first_step, steps() | answer)


def test_first_steps_that_are_not_all_there():
    some = {case: v for case, v in steps().items() if "loss" not in case}
    rejects("no prediction for 'SGD, loss × 3'", check.predict_first_step, some)
    rejects("Give a dictionary", check.predict_first_step, list(steps().values()))
    respelt = {case.upper().replace(" × ", "x"): said for case, said in steps().items()}
    accepts(check.predict_first_step, respelt)
    rejects("nothing here yet", check.predict_first_step, None)


# -------------------------------------------------------------------------- choose_rank


def mean(values):
    return sum(values) / len(values)


def chosen(
    runs, budget, key="valid_loss", join=mean, pick=min, judge=None, largest=False
):
    """The rule; each mistake below changes one of its parts."""
    judge = judge or (lambda a, b: compare(a, b, loss=True).verdict != "behind")
    found = {}
    for run in runs:
        if budget is None or run["parameters"] <= budget:
            by_rate = found.setdefault(run["r"], {})
            by_rate.setdefault(run["lr"], {})[run["seed"]] = run

    def size(by_seed, key):
        return join([run[key] for run in by_seed.values()])

    own = {
        r: pick(rates, key=lambda lr: size(rates[lr], key))
        for r, rates in found.items()
    }
    shown = "valid_score" if "score" in key else "valid_loss"
    losses = {
        r: {seed: run[shown] for seed, run in found[r][own[r]].items()} for r in own
    }
    best = pick(losses, key=lambda r: mean(losses[r].values()))
    good = [r for r in sorted(losses) if judge(losses[r], losses[best])]
    r = good[-1] if largest else good[0]
    return r, own[r]


def unpaired(a, b):
    sides = list(a.values()), list(b.values())
    return compare(*sides, paired=False, loss=True).verdict != "behind"


def by_place(a, b):
    return compare([*a.values()], [*b.values()], loss=True).verdict != "behind"


def stepwise(runs, budget, neighbour):
    """From the best rank down, until one is behind."""
    found = {}
    for run in runs:
        if run["parameters"] <= budget:
            place = found.setdefault(run["r"], {}).setdefault(run["lr"], {})
            place[run["seed"]] = run["valid_loss"]
    own = {r: min(at, key=lambda lr: mean(at[lr].values())) for r, at in found.items()}
    losses = {r: found[r][own[r]] for r in own}
    best = r = min(losses, key=lambda r: mean(losses[r].values()))
    for smaller in sorted((q for q in losses if q < r), reverse=True):
        other = losses[r if neighbour else best]
        if compare(losses[smaller], other, loss=True).verdict == "behind":
            break
        r = smaller
    return r, own[r]


def in_order(runs, budget):
    """With lists, sorted by seed."""
    runs = sorted(runs, key=lambda run: run["seed"])
    groups = {}
    for run in runs:
        if run["parameters"] <= budget:
            groups.setdefault((run["r"], run["lr"]), []).append(run["valid_loss"])
    own = {}
    for key in sorted(groups):
        if key[0] not in own or mean(groups[key]) < mean(groups[own[key[0]]]):
            own[key[0]] = key
    best = min(own.values(), key=lambda key: mean(groups[key]))
    for r in sorted(own):
        if compare(groups[own[r]], groups[best], loss=True).verdict != "behind":
            return np.int64(r), np.float64(own[r][1])


def for_scores(runs, budget, **changes):
    ahead = {"judge": lambda a, b: compare(a, b).verdict != "behind"}
    settings = {"key": "valid_score", "pick": max} | ahead | changes
    return chosen(runs, budget, **settings)


def test_choose_rank_right_answers():
    accepts(check.choose_rank, chosen)
    accepts(check.choose_rank, in_order)
    accepts(check.choose_rank, lambda *given: list(chosen(*given)))
    accepts(partial(check.choose_rank, metric="score"), for_scores)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("by the test loss", lambda *g: chosen(*g, key="test_loss")),
        ("one lucky seed is no reason", lambda *g: chosen(*g, join=min)),
        ("the lowest is the best", lambda *g: chosen(*g, pick=max)),
        (
            "lowest mean. A smaller one is not told apart",
            lambda *g: chosen(*g, judge=lambda a, b: a is b),
        ),
        (
            "you ask the wrong way round",
            lambda *g: chosen(*g, judge=lambda a, b: compare(a, b).verdict != "behind"),
        ),
        ("more than the budget", lambda runs, budget: chosen(runs, None)),
        ("largest rank that is not behind", lambda *g: chosen(*g, largest=True)),
        ("ake the mean", lambda *g: chosen(*g, join=statistics.median)),
        ("exactly as many", lambda runs, budget: chosen(runs, budget - 1)),
        ("belongs together", lambda *g: chosen(*g, judge=unpaired)),
        ("belongs together", lambda *g: chosen(*g, judge=by_place)),
        ("compare each rank with the next one", partial(stepwise, neighbour=True)),
        ("stop at the first rank", partial(stepwise, neighbour=False)),
        ("its own best rate", lambda *g: (chosen(*g)[0], 3e-4)),
        ("There is no run with", lambda *g: chosen(*g)[::-1]),
        ("Return two numbers", lambda *g: chosen(*g)[0]),
        ("is there a `return`", lambda *g: None),
        ("nothing here yet", stub),
    ],
)
def test_choose_rank_mistakes(says, answer):
    rejects(says, check.choose_rank, answer)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("by the test score", lambda *g: for_scores(*g, key="test_score")),
        ("highest score of any seed", lambda *g: for_scores(*g, join=max)),
        ("the highest is the best", lambda *g: for_scores(*g, pick=min)),
        ("highest mean", lambda *g: for_scores(*g, judge=lambda a, b: a is b)),
        ("its own best rate", lambda *g: (for_scores(*g)[0], 3e-4)),
    ],
)
def test_choose_rank_by_scores(says, answer):
    rejects(says, partial(check.choose_rank, metric="score"), answer)


# ------------------------------------------------------------------------------ my_lora


class Own(LinearDelta):
    """The solution; each mistake below changes one part of it."""

    def __init__(self, d_in, d_out, r, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.randn(r, d_in) / d_in**0.5)
        self.B = nn.Parameter(torch.zeros(d_out, r))
        self.scale = alpha / r
        self.r = r
        self.alpha = alpha
        self.finish()

    def finish(self):
        pass

    def delta(self, base):
        return self.scale * self.B @ self.A

    def update(self, base, x):
        return self.scale * (x @ self.A.T) @ self.B.T


class OwnByLinears(LinearDelta):
    def __init__(self, d_in, d_out, r, alpha):
        super().__init__()
        self.A = nn.Linear(d_in, r, bias=False)
        self.B = nn.Linear(r, d_out, bias=False)
        nn.init.zeros_(self.B.weight)
        self.scale = alpha / r

    def delta(self, base):
        return torch.einsum("or,ri->oi", self.scale * self.B.weight, self.A.weight)

    def update(self, base, x):
        return self.B(self.scale * self.A(x))


def own(adapter=Own, **methods):
    """A configuration whose adapters have these methods in the place of the right
    ones."""
    adapter = type("Changed", (adapter,), methods)

    @dataclass(kw_only=True)
    class Config(LayerConfig):
        r: int = 8
        alpha: float = 16

        def create(self, base, path):
            return adapter(*linear_features(base.module), self.r, self.alpha)

    return Config


class Dense(Own):
    """`update` is left to LinearDelta, which forms the matrix."""

    update = LinearDelta.update


@dataclass(kw_only=True)
class Forgetful(LayerConfig):
    """Takes the fields, and does not use them."""

    r: int = 8
    alpha: float = 16

    def create(self, base, path):
        return Own(*linear_features(base.module), 3, 12)


@dataclass(kw_only=True)
class Capped(LayerConfig):
    """The rank is never above 4."""

    r: int = 8
    alpha: float = 16

    def create(self, base, path):
        return Own(*linear_features(base.module), min(self.r, 4), self.alpha)


def with_bias(self, base, x):
    return Own.update(self, base, x) + base.module.bias


@dataclass(kw_only=True)
class Swapped(LayerConfig):
    r: int = 8
    alpha: float = 16

    def create(self, base, path):
        return Own(*linear_features(base.module)[::-1], self.r, self.alpha)


@dataclass(kw_only=True)
class Blank(LayerConfig):
    r: int = 8
    alpha: float = 16

    def create(self, base, path):
        raise NotImplementedError


def held_by_a_lambda(A):
    return lambda x: x @ A.T


def dropped(x):
    return nn.functional.dropout(x, 0.1)


def parameters(**made):
    def finish(self):
        for name, value in made.items():
            setattr(self, name, nn.Parameter(value(self)))

    return finish


@pytest.mark.parametrize("answer", [own(), own(OwnByLinears)], ids=["plain", "linears"])
def test_my_lora_right_answers(answer):
    for verdict in judge(check.my_lora, answer, variants=2):
        assert verdict, verdict


@pytest.mark.parametrize(
    "says, answer",
    [
        ("divide by r", own(finish=lambda s: setattr(s, "scale", s.alpha))),
        ("alpha / r is missing", own(finish=lambda s: setattr(s, "scale", 1.0))),
        ("rsLoRA", own(finish=lambda s: setattr(s, "scale", s.alpha / s.r**0.5))),
        (
            "update holds the base's output",
            own(update=lambda s, b, x: b(x) + Own.update(s, b, x)),
        ),
        (
            "never reaches the output",
            own(update=lambda s, b, x: 0 * Own.update(s, b, x)),
        ),
        (
            "no gradient reaches A",
            own(update=lambda s, b, x: s.scale * x @ s.A.detach().T @ s.B.T),
        ),
        ("gradient of x", own(update=lambda s, b, x: Own.update(s, b, x.detach()))),
        ("matrix of the weight's size is formed", own(Dense)),
        (
            "matrix of the weight's size is formed",
            own(update=lambda s, b, x: x @ s.delta(b).T),
        ),
        ("delta lies on its side", own(delta=lambda s, b: Own.delta(s, b).T)),
        ("update(base, x) has the shape", own(update=lambda s, b, x: x @ s.A.T)),
        ("alpha / r is missing", own(delta=lambda s, b: s.B @ s.A)),
        ("The bias is added twice", own(update=with_bias)),
        ("the new weight itself", own(delta=lambda s, b: b.weight + Own.delta(s, b))),
        ("A has the shape (4, 16)", Capped),
        (
            "begin with the same A",
            own(
                finish=parameters(
                    A=lambda s: torch.randn(s.A.shape, generator=of_one_seed())
                )
            ),
        ),
        (
            "A copy of it",
            own(
                finish=lambda s: setattr(s, "low", held_by_a_lambda(s.A)),
                update=lambda s, b, x: s.scale * s.low(x) @ s.B.T,
                delta=Own.delta,
            ),
        ),
        (
            "keeps tensors of each call",
            own(
                finish=lambda s: setattr(s, "seen", []),
                update=lambda s, b, x: s.seen.append(x) or Own.update(s, b, x),
            ),
        ),
        ("Here is none", own(update=lambda s, b, x: Own.update(s, b, dropped(x)))),
        ("self.alpha", own(finish=lambda s: setattr(s, "scale", 16 / s.r))),
        ("whole part", own(finish=lambda s: setattr(s, "scale", s.alpha // s.r))),
        ("seeds torch's global generator", own(finish=lambda s: torch.manual_seed(0))),
        ("the size", own(finish=parameters(A=lambda s: 30 * torch.randn(s.A.shape)))),
        ("both zero", own(finish=parameters(A=lambda s: torch.zeros_like(s.A)))),
        ("B is random", own(finish=parameters(B=lambda s: torch.ones_like(s.B)))),
        ("more than A and B", own(finish=parameters(bias=lambda s: torch.zeros(3)))),
        ("A has the shape", Swapped),
        ("A has the shape", Forgetful),
        (
            "expected an Adapter",
            own(nn.Linear, __init__=lambda s, i, o, r, a: nn.Linear.__init__(s, i, o)),
        ),
        ("class itself", Own),
        ("class itself", own()(target_modules=["up_proj"])),
        ("nothing here yet", Blank),
    ],
)
def test_my_lora_mistakes(says, answer):
    verdict, *_ = judge(check.my_lora, answer, variants=1)
    assert not verdict and says in verdict.message, verdict.message


def test_a_method_that_does_not_learn_is_not_accepted():
    with pytest.raises(Wrong, match="learns too little"):
        practice.needs_to_learn(LoraConfig(target_modules=["q_proj"]), steps=3, lr=0.0)


# -------------------------------------------------------------------------- six_million


@pytest.mark.parametrize(
    "answer",
    [
        [(8, ["q_proj", "k_proj", "v_proj", "o_proj"]), (16, ["q_proj", "v_proj"])],
        [(16, ["v_proj", "q_proj"]), (13, ["q_proj", "o_proj"])],
    ],
)
def test_six_million_solution(answer):
    accepts(check.six_million, answer)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "exactly twice",
            [
                (16, ["q_proj", "k_proj", "v_proj", "o_proj"]),
                (16, ["q_proj", "v_proj"]),
            ],
        ),
        ("exactly half", [(8, ["q_proj", "v_proj"])]),
        ("there is another", [(16, ["q_proj", "v_proj"]), (16, ["v_proj", "q_proj"])]),
        (
            "for square",
            [(13, ["q_proj", "v_proj"]), (8, ["q_proj", "k_proj", "v_proj", "o_proj"])],
        ),
        ("5,120 r each", [(4, ["q_proj", "v_proj"])]),
        ("are called", [(8, ["q", "k", "v", "o"])]),
        ("Write it as", [8, 16]),
        ("stand in a list", [(26, "q_proj")]),
        ("whole number, 1 or more", [(41.6, ["k_proj"])]),
        ("whole number, 1 or more", [(-16, ["q_proj", "v_proj"])]),
        ("adapted once", [(13, ["q_proj", "q_proj"])]),
        ("nothing here yet", []),
        ("nothing here yet", None),
    ],
)
def test_six_million_mistakes(says, answer):
    rejects(says, check.six_million, answer)


# --------------------------------------------------------------------------- in general


def test_stub_of_a_function():
    rejects("nothing here yet", check.lora_delta, stub)


def test_errors_name_the_learners_line():
    def divides_by_zero(A, B, alpha, r):
        return alpha / 0

    verdict, *_ = judge(check.lora_delta, divides_by_zero)
    assert (
        "ZeroDivisionError" in verdict.message
        and f"line {divides_by_zero.__code__.co_firstlineno + 1} " in verdict.message
    )
    assert str(verdict).startswith(
        "Not yet. "
    ) and verdict._repr_markdown_().startswith("❌")
