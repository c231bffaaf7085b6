"""Chapter 05's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import copy
from statistics import fmean

import numpy as np
import pytest
import torch
from judging import accepts, configured, judge, rejects
from torch import nn

from minipeft import LinearDelta
from minipeft.course import at_best_rate, check, compare
from minipeft.course.check.chapter05 import FOUND, PATIENTS, patient


def stub(*_):
    raise NotImplementedError


# ----------------------------------------------------------------------------- same_run


def same_run(c, rate_A, rate_B, optimizer):
    return rate_A, rate_B / (c if optimizer == "adam" else c**2)


def test_same_run_solution():
    accepts(check.same_run, same_run)
    accepts(check.same_run, lambda *given: torch.tensor(same_run(*given)))
    accepts(check.same_run, lambda *given: np.float32(same_run(*given)))


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
        ("two numbers", lambda *given: tuple(map(str, same_run(*given)))),
        ("two numbers", lambda *given: torch.tensor(same_run(*given)[:1])),
        ("should be", lambda c, *rest: same_run(max(1, int(c)), *rest)),
        ("should be", lambda c, *rest: same_run(round(c) or 1, *rest)),
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
                (r for r in range(99) if r * layers * cost(shapes, targets) < budget),
                default=0,
            ),
        ),
        (
            "Nothing is left to choose from",
            lambda shapes, layers, targets, budget: max(
                r for r in range(99) if r * layers * cost(shapes, targets) < budget
            ),
        ),
        (
            "two targets of one shape once",
            lambda shapes, layers, targets, budget: (
                budget // (layers * sum(map(sum, {shapes[name] for name in targets})))
            ),
        ),
        ("should be an int", lambda shapes, layers, targets, budget: "8"),
        ("nothing here yet", stub),
    ],
)
def test_rank_at_budget_mistakes(says, answer):
    rejects(says, check.rank_at_budget, answer)


# -------------------------------------------------------------------------- pissa_start


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


def with_other(**changes):
    """diagnose, with another view of one thing."""

    def answer(layer, optimizer):
        for word, sick in changes.items():
            if sick(layer, optimizer):
                return word.replace("_", " ")
        return diagnose(layer, optimizer)

    return answer


def adds_up_to_zero(layer, optimizer):
    return abs(layer.A.sum()) < 1e-4 and not layer.B.any()


def by_value(layer, optimizer):
    """B is looked for by its numbers."""
    rates = [
        group["lr"]
        for group in optimizer.param_groups
        for p in group["params"]
        if p.shape == layer.B.shape and torch.equal(p, layer.B)
    ]
    found = diagnose(layer, optimizer)
    return "healthy" if found == "no rate" and any(rates) else found


def generous(layer, optimizer):
    x = torch.randn(8, layer.linear.in_features)
    found = diagnose(layer, optimizer)
    near = torch.allclose(layer(x), layer.linear(x), atol=1.0)
    return "healthy" if found == "twice" and near else found


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
                if diagnose(layer, optimizer) == "healthy"
                and not layer.B.any()
                and layer.A.requires_grad
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
        ("A gets a gradient through B", with_other(dead=lambda p, o: not p.A.any())),
        ("is small, and not 0", with_other(no_scale=lambda p, o: abs(p.scale) < 0.1)),
        ("as it should be", with_other(dead=adds_up_to_zero)),
        ("that *is* B", by_value),
        ("only what rounding makes", generous),
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


def test_lora_fa_is_told_of_before_training_too():
    def answer(layer, optimizer):
        return diagnose(layer, optimizer) if layer.A.requires_grad else "frozen"

    for verdict in judge(check.diagnose, answer, variants=10):
        assert not verdict and "LoRA-FA trains B alone" in verdict.message


def test_patients_have_what_they_are_said_to_have():
    assert {disease for disease, *_ in PATIENTS} == set(FOUND)
    for disease, trained, other in PATIENTS:
        layer, optimizer = patient(disease, trained, other)
        assert diagnose(layer, optimizer) == disease
        assert bool(layer.B.any()) == trained


def test_a_variant_has_other_words():
    def other(layer, optimizer):
        word = diagnose(layer, optimizer)
        return {"dead": "both zero", "twice": "doubled"}.get(word, word)

    assert check.diagnose(other, dead="both zero", twice="doubled")
    said = check.diagnose(diagnose, dead="both zero", twice="doubled").message
    assert "is none of the words" in said


# ------------------------------------------------------------------------ predict_dials


def factors(c=4):
    return {
        "α, Adam": c,
        "α, SGD": c**2,
        "rank, α/r, Adam": 1,
        "rank, α/√r, Adam": c**0.5,
        "rank, α/r, SGD": 1 / c,
        "loss, Adam": 1,
        "loss, SGD": c,
    }


def test_predict_dials_right_answers():
    accepts(check.predict_dials, factors())
    accepts(check.predict_dials, {k: torch.tensor(v) for k, v in factors().items()})
    accepts(check.predict_dials, {k: float(v) for k, v in factors().items()})
    assert check.predict_dials(factors(9), c=9)
    assert check.predict_dials(factors(2), c=2)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", [4]),
        ("whatever its gradient", factors() | {"α, Adam": 16}),
        ("what B then adds", factors() | {"α, SGD": 4}),
        ("s falls by c, and c times", factors() | {"rank, α/r, Adam": 0.25}),
        ("s falls by √c", factors() | {"rank, α/√r, Adam": 1}),
        ("s enters twice", factors() | {"rank, α/r, SGD": 1}),
        ("divides a gradient", factors() | {"loss, Adam": 4}),
        ("gradient times the rate", factors() | {"loss, SGD": 1}),
        ("expected a number", factors() | {"loss, SGD": "4"}),
    ],
)
def test_predict_dials_mistakes(says, answer):
    rejects(says, check.predict_dials, answer)


# -------------------------------------------------------------------------- judge_sweep


def planned(runs, one, other, by="valid_loss", key="test_loss", edges=True, loss=True):
    losses = []
    for case in (one, other):
        mine = [run for run in runs if run["case"] == case]
        rates = sorted({run["lr"] for run in mine})
        best = min((r for r in mine if r["seed"] == 0), key=lambda run: run[by])["lr"]
        if edges and best in (rates[0], rates[-1]):
            return "extend", case, "down" if best == rates[0] else "up"
        losses.append({r["seed"]: r[key] for r in mine if r["lr"] == best})
    return "verdict", compare(*losses, loss=loss).verdict


def by_means(runs, one, other):
    """The rate by the mean of all its seeds."""
    cut = []
    for case in (one, other):
        mine = [run for run in runs if run["case"] == case]
        rates = sorted({run["lr"] for run in mine})
        at = {lr: [r for r in mine if r["lr"] == lr] for lr in rates}
        valid = {lr: fmean(r["valid_loss"] for r in rs) for lr, rs in at.items()}
        best = min(rates, key=valid.get)
        if best in (rates[0], rates[-1]):
            return "extend", case, "down" if best == rates[0] else "up"
        cut.append({r["seed"]: r["test_loss"] for r in at[best]})
    both = cut[0].keys() & cut[1].keys()
    pair = [{seed: losses[seed] for seed in both} for losses in cut]
    return "verdict", compare(*pair, loss=True).verdict


def one_grid(runs, one, other):
    """The ends are those of all cases together."""
    ends = min(run["lr"] for run in runs), max(run["lr"] for run in runs)
    got = planned(runs, one, other)
    if got[0] == "verdict":
        return got
    mine = [r for r in runs if r["case"] == got[1] and r["seed"] == 0]
    best = min(mine, key=lambda r: r["valid_loss"])["lr"]
    return got if best in ends else planned(runs, one, other, edges=False)


def without_the_first(runs, one, other):
    got = planned(runs, one, other)
    if got[0] == "extend":
        return got
    pair = []
    for case in (one, other):
        later = [run for run in at_best_rate(runs, case=case) if run["seed"]]
        pair.append({r["seed"]: r["test_loss"] for r in later})
    return "verdict", compare(*pair, loss=True).verdict


def turned(runs, one, other):
    got = planned(runs, one, other)
    swap = {"up": "down", "down": "up"}
    return (*got[:-1], swap.get(got[-1], got[-1]))


def unpaired(runs, one, other):
    got = planned(runs, one, other)
    if got[0] == "extend":
        return got
    means = []
    for case in (one, other):
        at = [run["test_loss"] for run in at_best_rate(runs, case=case)]
        means.append(sum(at) / len(at))
    return "verdict", "ahead" if means[0] < means[1] else "behind"


def test_judge_sweep_right_answers():
    accepts(check.judge_sweep, planned)
    accepts(check.judge_sweep, lambda *given: list(planned(*given)))
    accepts(check.judge_sweep, lambda runs, *rest: planned(runs[::-1], *rest))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", stub),
        ("nobody knows", lambda *given: planned(*given, edges=False)),
        ("choose by the test loss", lambda *given: planned(*given, by="test_loss")),
        ("lower is better", lambda *given: planned(*given, loss=False)),
        ("direction is turned", turned),
        ("the course's rule says", unpaired),
        ("seed 0", by_means),
        ("tried for it", one_grid),
        ("*all* seeds", without_the_first),
        ("Return (", lambda *given: planned(*given)[-1]),
        ("the course's rule says", lambda *given: ("verdict", "not told apart")),
        ("can be compared", lambda *given: ("extend", "one", "up")),
    ],
)
def test_judge_sweep_mistakes(says, answer):
    rejects(says, check.judge_sweep, answer)


# ------------------------------------------------------------------------ pissa_adapter


class Pissa(LinearDelta):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, W, r, alpha):
        super().__init__()
        self.s = alpha / r
        U, S, Vt = torch.linalg.svd(W.detach(), full_matrices=False)
        root = (S[:r] / self.s).sqrt()
        self.A = nn.Parameter(root[:, None] * Vt[:r])
        self.B = nn.Parameter(U[:, :r] * root)
        self.register_buffer("start", (self.B @ self.A).detach().clone())

    def delta(self, base):
        return self.s * (self.B @ self.A - self.start)


class OfRankTwoR(Pissa):
    """As PEFT converts it: a LoRA of rank 2 r, whose second half is the start."""

    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()

    def delta(self, base):
        B = torch.cat([self.B, -self.B0], 1)
        return self.s * B @ torch.cat([self.A, self.A0])

    def update(self, base, x):
        low = x @ torch.cat([self.A, self.A0]).T
        return self.s * low @ torch.cat([self.B, -self.B0], 1).T


def with_delta(change):
    return configured(type("Changed", (Pissa,), {"delta": change}))


def starting(factors):
    """A and B are what factors(W, U, S, Vt, r, s) gives."""

    class Changed(Pissa):
        def __init__(self, W, r, alpha):
            super().__init__(W, r, alpha)
            U, S, Vt = torch.linalg.svd(W.detach(), full_matrices=False)
            A, B = factors(U, S, Vt, r, self.s)
            self.A, self.B = nn.Parameter(A), nn.Parameter(B)
            self.start = (B @ A).clone()

    return configured(Changed)


class Referring(Pissa):
    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        self.A0, self.B0 = self.A.detach(), self.B.detach()

    def delta(self, base):
        return self.s * (self.B @ self.A - self.B0 @ self.A0)


class Unwritten(LinearDelta):
    def __init__(self, W, r, alpha):
        super().__init__()
        raise NotImplementedError


class Residual(Pissa):
    """As the paper has it: W_res in the place of W."""

    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        W.data -= self.s * self.start

    def delta(self, base):
        return self.s * self.B @ self.A


def test_pissa_adapter_right_answers():
    accepts(check.pissa_adapter, configured(Pissa))
    accepts(check.pissa_adapter, configured(OfRankTwoR))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", configured(Unwritten)),
        ("configuration's class itself", Pissa),
        ("not a reference", configured(Referring)),
        ("change the base's weight", configured(Residual)),
        ("has to be zero at the start", with_delta(lambda a, b: a.s * a.B @ a.A)),
        ("The scale is missing", with_delta(lambda a, b: a.B @ a.A - a.start)),
        (
            "not the right gradient",
            with_delta(lambda a, b: a.s * ((2 * a.B - a.B.detach()) @ a.A - a.start)),
        ),
        (
            "no gradient reaches A, B",
            with_delta(lambda a, b: a.s * (a.B.detach() @ a.A.detach() - a.start)),
        ),
        (
            "that is LoRA's",
            starting(lambda U, S, Vt, r, s: (torch.randn(r, len(Vt[0])), 0 * U[:, :r])),
        ),
        (
            "divide the singular values by s",
            starting(
                lambda U, S, Vt, r, s: (
                    S[:r].sqrt()[:, None] * Vt[:r],
                    U[:, :r] * S[:r].sqrt(),
                )
            ),
        ),
        (
            "directions only",
            starting(lambda U, S, Vt, r, s: (Vt[:r].clone(), U[:, :r].clone())),
        ),
        (
            "share it unevenly",
            starting(
                lambda U, S, Vt, r, s: ((S[:r] / s)[:, None] * Vt[:r], U[:, :r].clone())
            ),
        ),
        (
            "smallest singular values",
            starting(
                lambda U, S, Vt, r, s: (
                    (S[-r:] / s).sqrt()[:, None] * Vt[-r:],
                    U[:, -r:] * (S[-r:] / s).sqrt(),
                )
            ),
        ),
        (
            "have the shape",
            starting(lambda U, S, Vt, r, s: (Vt[: r + 1], U[:, : r + 1])),
        ),
    ],
)
def test_pissa_adapter_mistakes(says, answer):
    rejects(says, check.pissa_adapter, answer)


# ------------------------------------------------------- what a trial by learners found


def by_endings(shapes, layers, targets, budget):
    names = [name for name in shapes if name.endswith(tuple(targets))]
    return budget // (layers * cost(shapes, names))


def test_a_target_is_a_whole_name():
    rejects("only contain a target's", check.rank_at_budget, by_endings)


def listed(runs, one, other, cut=None, **options):
    """The losses as the runs stand, without their seeds."""
    got = planned(runs, one, other)
    if got[0] == "extend":
        return got
    pair = []
    for case in (one, other):
        at = at_best_rate([run for run in runs if run["case"] == case])
        at = [run for run in runs if run in at]
        at = sorted(at, key=lambda run: run["seed"]) if cut else at
        pair.append([run["test_loss"] for run in at][:cut])
    return "verdict", compare(*pair, loss=True, **options).verdict


def by_name(runs, one, other):
    """Another case's name begins like this one's."""
    of = [{**run, "case": one} if run["case"] == "one more" else run for run in runs]
    return planned(of, one, other)


def test_seeds_belong_together_and_all_of_them_count():
    rejects("a seed belongs to the same seed", check.judge_sweep, listed)
    rejects(
        "a seed belongs to the same seed",
        check.judge_sweep,
        lambda *given: listed(*given, paired=False),
    )
    rejects("*all* seeds", check.judge_sweep, lambda *given: listed(*given, cut=3))
    for verdict in judge(check.judge_sweep, by_name):
        assert not verdict


def leaving(**changed):
    def answer(layer, optimizer):
        found = diagnose(layer, optimizer)
        for name, value in changed.items():
            setattr(layer, name, value)
        return found

    return answer


def unfreezing(layer, optimizer):
    found = diagnose(layer, optimizer)
    layer.B.requires_grad_()
    return found


def stepping_back(layer, optimizer):
    """It steps, and puts the weights back; the optimizer has its means by then."""
    found = diagnose(layer, optimizer)
    before = copy.deepcopy(layer.state_dict())
    for p in (layer.A, layer.B):
        p.grad = torch.ones_like(p)
    optimizer.step()
    layer.load_state_dict(before)
    return found


def looking_at(x_of, part=lambda y: y, atol=0.0):
    """Doubled is what differs in this part, for these inputs, by more than this."""

    def answer(layer, optimizer):
        x = x_of(4, layer.linear.in_features)
        found = diagnose(layer, optimizer)
        near = torch.allclose(part(layer(x)), part(layer.linear(x)), atol=atol)
        return "healthy" if found == "twice" and near else found

    return answer


@pytest.mark.parametrize(
    "says, answer",
    [
        ("enabled is not what it was", leaving(enabled=False)),
        ("merged is not what it was", leaving(merged=False)),
        ("B.requires_grad is not", unfreezing),
        ("step of the optimizer", stepping_back),
        ("not 0", with_other(no_scale=lambda p, o: p.scale <= 0)),
        ("not 0", with_other(no_scale=lambda p, o: abs(p.scale) < 1e-3)),
        (
            "and not 0",
            with_other(
                no_rate=lambda p, o: max(g["lr"] for g in o.param_groups) < 1e-6
            ),
        ),
        (
            "the group in which B is",
            with_other(no_rate=lambda p, o: any(not g["lr"] for g in o.param_groups)),
        ),
        (
            "as it should be",
            with_other(dead=lambda p, o: p.A.max() == 0 and p.B.max() == 0),
        ),
        (
            "as it should be",
            with_other(dead=lambda p, o: not (p.A[0].any() or p.B.any())),
        ),
        (
            "as it should be",
            with_other(dead=lambda p, o: p.A.abs().max() < 1e-2 and not p.B.any()),
        ),
        ("only what rounding makes", looking_at(torch.randn, atol=0.03)),
        ("for random inputs", looking_at(torch.ones, atol=1e-4)),
        ("for random inputs", looking_at(torch.randn, lambda y: y[:, 0])),
        ("for random inputs", looking_at(torch.randn, lambda y: y.sum(1), 1e-4)),
        ("for random inputs", looking_at(lambda n, d: torch.eye(d)[:1])),
    ],
)
def test_the_doctor_looks_at_all_and_changes_nothing(says, answer):
    """Patients come in a random order: another one may be mistaken first."""
    verdicts = judge(check.diagnose, answer, variants=20)
    assert not any(verdicts)
    assert any(says in verdict.message for verdict in verdicts)


class OfTheClass(Pissa):
    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        OfTheClass.s = self.__dict__.pop("s")


class OnACopy(Pissa):
    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        self.change = lambda: self.s * (self.B @ self.A - self.start)

    def delta(self, base):
        return self.change()


class AtTheFirstCall(Pissa):
    def __init__(self, W, r, alpha):
        super().__init__(W, r, alpha)
        del self.start
        self.first = None

    def delta(self, base):
        if self.first is None:
            self.first = (self.B @ self.A).detach().clone()
        return self.s * (self.B @ self.A - self.first)


class InTraining(Pissa):
    def delta(self, base):
        return super().delta(base) * self.training


def test_an_adapter_lives_in_a_model():
    rejects("not on the class", check.pissa_adapter, configured(OfTheClass))
    rejects("A copy of it", check.pissa_adapter, configured(OnACopy))
    rejects(
        "loaded into a new adapter", check.pissa_adapter, configured(AtTheFirstCall)
    )
    rejects("In evaluation", check.pissa_adapter, configured(InTraining))
