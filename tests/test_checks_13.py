"""Chapter 13's checks accept the solution, refuse the blank stub, and name the mistake
in what is plausibly wrong."""

import math

import numpy as np
import pytest
import torch
from judging import accepts, rejects
from torch import nn

from minipeft.course import check, compare
from minipeft.slot import Adapter


def stub(*args):
    raise NotImplementedError


# ----------------------------------------------------------------------------- fold_ia3


def fold(W, b, l, ff):
    return (W * l, b) if ff else (W * l[:, None], b * l)


def test_fold_solution():
    accepts(check.fold_ia3, fold)
    accepts(
        check.fold_ia3,
        lambda W, b, l, ff: (
            [W @ torch.diag(l), b] if ff else [torch.diag(l) @ W, torch.diag(l) @ b]
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("bias is left as it was", lambda W, b, l, ff: (fold(W, b, l, ff)[0], b)),
        ("W is as it was", lambda W, b, l, ff: (W, b)),
        (
            "that is unmerging",
            lambda W, b, l, ff: (W / l, b) if ff else (W / l[:, None], b / l),
        ),
        (
            "You add l",
            lambda W, b, l, ff: (W + l, b) if ff else (W + l[:, None], b * l),
        ),
        (
            "divide the bias",
            lambda W, b, l, ff: (W * l, b) if ff else (W * l[:, None], b / l),
        ),
        ("Two shapes do not fit", lambda W, b, l, ff: (W * l, b)),
        (
            "stays as it was where the input is scaled",
            lambda W, b, l, ff: (W * l, b * 2) if ff else fold(W, b, l, ff),
        ),
        ("Give me two tensors", lambda W, b, l, ff: fold(W, b, l, ff)[0]),
        ("The bias is lost", lambda W, b, l, ff: (fold(W, b, l, ff)[0], None)),
        ("first the weight", lambda W, b, l, ff: fold(W, b, l, ff)[::-1]),
        ("You multiply by 1 + l", lambda W, b, l, ff: fold(W, b, 1 + l, ff)),
        (
            "is transposed",
            lambda W, b, l, ff: (fold(W, b, l, ff)[0].T, fold(W, b, l, ff)[1]),
        ),
        ("in place", lambda W, b, l, ff: (W.mul_(l if ff else l[:, None]), b)),
        ("nothing here yet", stub),
    ],
)
def test_fold_mistakes(says, answer):
    rejects(says, check.fold_ia3, answer)


# -------------------------------------------------------------------------- find_scales


def find(W, new):
    l = (W * new).sum(1) / W.square().sum(1)
    return l if torch.allclose(l[:, None] * W, new) else None


def test_find_solution():
    accepts(check.find_scales, find)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("None is the answer", lambda W, new: (W * new).sum(1) / W.square().sum(1)),
        ("None is the answer", lambda W, new: new[:, 0] / W[:, 0]),
        (
            "stay zero",  # 0 / 0 at a zero entry
            lambda W, new: (
                l
                if torch.allclose(W * (l := (new / W).mean(1))[:, None], new)
                else None
            ),
        ),
        ("you say that there is no l", lambda W, new: None),
        (
            "Upside down",
            lambda W, new: None if find(W, new) is None else 1 / find(W, new),
        ),
        (
            "sign is lost",
            lambda W, new: (
                None if find(W, new) is None else new.norm(dim=1) / W.norm(dim=1)
            ),
        ),
        (
            "starts at one",
            lambda W, new: None if find(W, new) is None else find(W, new) - 1,
        ),
        (
            "scaled by zero",
            lambda W, new: find(W, new) if (new.abs().sum(1) > 0).all() else None,
        ),
        (
            "one factor for each *row*",
            lambda W, new: (
                l
                if torch.allclose((l := (W * new).sum() / W.square().sum()) * W, new)
                else None
            ),
        ),
        (
            "some are negative",
            lambda W, new: (
                l
                if torch.allclose(
                    (l := new.norm(dim=1) / W.norm(dim=1))[:, None] * W, new
                )
                else None
            ),
        ),
        (
            "up to rounding",
            lambda W, new: (
                l
                if torch.equal(
                    (l := (W * new).sum(1) / W.square().sum(1))[:, None] * W, new
                )
                else None
            ),
        ),
        (
            "the whole diagonal matrix",
            lambda W, new: None if find(W, new) is None else torch.diag(find(W, new)),
        ),
        (
            "should be a tensor",
            lambda W, new: None if find(W, new) is None else find(W, new).tolist(),
        ),
        ("nothing here yet", stub),
    ],
)
def test_find_mistakes(says, answer):
    rejects(says, check.find_scales, answer)


# ------------------------------------------------------------------------ bias_gradient


def test_gradient_solution():
    accepts(check.bias_gradient, lambda g, x: g.sum((0, 1)))
    accepts(
        check.bias_gradient,
        lambda g, x: sum(g[i, t] for i in range(len(g)) for t in range(g.shape[1])),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("mean over the tokens", lambda g, x: g.mean((0, 1))),
        ("rows only", lambda g, x: g.sum(0)),
        ("tokens only", lambda g, x: g.sum(1)),
        ("over everything", lambda g, x: g.sum()),
        ("over the outputs", lambda g, x: g.sum(-1)),
        ("does not contain x", lambda g, x: torch.einsum("bto,bti->oi", g, x)),
        ("sign is wrong", lambda g, x: -g.sum((0, 1))),
        ("signs must cancel", lambda g, x: g.abs().sum((0, 1))),
        ("what Adam keeps", lambda g, x: g.square().sum((0, 1))),
        ("last token only", lambda g, x: g[:, -1].sum(0)),
        ("the mean over the rows", lambda g, x: g.mean(0).sum(0)),
        ("the mean over the tokens: sum over both", lambda g, x: g.sum(0).mean(0)),
        ("of size 1 are left", lambda g, x: g.sum((0, 1), keepdim=True)),
        (
            "a bias never sees it",
            lambda g, x: (g.sum(-1, keepdim=True) * x).sum((0, 1)),
        ),
        ("is there a `return`", lambda g, x: None),
        ("nothing here yet", stub),
    ],
)
def test_gradient_mistakes(says, answer):
    rejects(says, check.bias_gradient, answer)


# ------------------------------------------------------------------------ predict_reach

ROOT = math.sqrt(0.5)
REACH = {
    "all doubled": (0.0, math.sqrt(0.99)),
    "negated": (0.0, ROOT),
    "exchanged": (ROOT, 0.0),
    "one added": (1.0, 0.0),
}


def test_reach_right_answers():
    accepts(check.predict_reach, REACH)
    accepts(check.predict_reach, {k: list(np.float32(v)) for k, v in REACH.items()}, 2)
    accepts(check.predict_reach, REACH | {"all doubled": (0, 1)})
    three = {"negated": (0.0, math.sqrt(2 / 3)), "exchanged": (ROOT, ROOT)}
    accepts(check.predict_reach, REACH | three, 3)
    four = {"negated": (0.0, math.sqrt(3 / 4)), "exchanged": (ROOT, ROOT)}
    accepts(check.predict_reach, REACH | four, 4)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", [0.0]),
        (
            "no prediction for 'negated'",
            {k: v for k, v in REACH.items() if k != "negated"},
        ),
        ("two numbers are wanted", REACH | {"negated": 0.0}),
        ("expected a number", REACH | {"negated": (0.0, "0.7")}),
        ("every row gets the factor 2", REACH | {"all doubled": (0.5, 0.99)}),
        ("full rank", REACH | {"all doubled": (0.0, 0.0)}),
        ("factor -1", REACH | {"negated": (1.0, ROOT)}),
        ("one direction takes one", REACH | {"negated": (0.0, 0.0)}),
        ("one direction takes one", REACH | {"negated": (0.0, 0.5)}),
        ("the best factor is zero", REACH | {"exchanged": (1.0, 0.0)}),
        ("its rows are differences", REACH | {"exchanged": (ROOT, ROOT)}),
        ("no factor of a row", REACH | {"one added": (0.0, 0.0)}),
        ("one and the same direction", REACH | {"one added": (1.0, 1.0)}),
    ],
)
def test_reach_mistakes(says, answer):
    rejects(says, check.predict_reach, answer)


# ----------------------------------------------------------------------- without_trials


def finite(losses):
    value = float(np.mean(losses))
    return value if math.isfinite(value) else math.inf


def trials(losses, tuned=None, blind=None, verdict=None):
    def worst(name):
        return max(finite(each) for each in losses[name].values())

    def best(name):
        return min(finite(each) for each in losses[name].values())

    tuned = min(losses, key=tuned(losses) if tuned else best)
    blind = min(losses, key=blind(losses) if blind else worst)
    a, b = (min(losses[name].values(), key=finite) for name in (tuned, blind))
    return tuned, blind, (verdict or judged)(a, b)


def judged(a, b):
    return compare(a, b, loss=True).verdict


def in_arrays(losses):
    """Another style: one array for each method."""
    names = list(losses)
    means = np.array([[np.mean(each) for each in losses[n].values()] for n in names])
    means = np.nan_to_num(means, nan=np.inf)
    tuned, blind = int(means.min(1).argmin()), int(means.max(1).argmin())
    runs = [list(losses[names[i]].values())[means[i].argmin()] for i in (tuned, blind)]
    return [names[tuned], names[blind], compare(*runs, loss=True).verdict]


def by_the_mean(losses):
    return lambda name: sum(min(finite(each), 1e9) for each in losses[name].values())


def forgetting_nan(losses):
    def worst(name):
        return max(np.nanmean(each) for each in losses[name].values())

    return worst


def by_the_best(losses):
    return lambda name: min(finite(each) for each in losses[name].values())


def by_one_seed(losses):
    return lambda name: min(np.nanmin(each) for each in losses[name].values())


def by_the_first_seed(losses):
    """min() of lists looks at their first entries."""

    def at_best(name):
        return min(losses[name].values())

    tuned, blind, _ = trials(losses, lambda x: lambda name: finite(at_best(name)))
    return tuned, blind, compare(at_best(tuned), at_best(blind), loss=True).verdict


def test_trials_right_answers():
    accepts(check.without_trials, trials)
    accepts(check.without_trials, in_arrays)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", stub),
        ("is there a `return`", lambda losses: None),
        ("Return three things", lambda losses: trials(losses)[:2]),
        ("one of the methods", lambda losses: ("none", *trials(losses)[1:])),
        (
            "lower is better",
            lambda losses: trials(losses, lambda x: lambda n: -by_the_best(x)(n)),
        ),
        ("take the mean over the seeds", lambda losses: trials(losses, by_one_seed)),
        ("lowest mean loss at its best rate", by_the_first_seed),
        ("mean over the rates", lambda losses: trials(losses, blind=by_the_mean)),
        ("nan counts as infinite", lambda losses: trials(losses, blind=forgetting_nan)),
        ("nobody tells you", lambda losses: trials(losses, blind=by_the_best)),
        (
            "the *least* bad",
            lambda losses: trials(
                losses, blind=lambda x: lambda n: -max(map(finite, x[n].values()))
            ),
        ),
        (
            "turned round",
            lambda losses: trials(losses, verdict=lambda a, b: compare(a, b).verdict),
        ),
        (
            "the course's rule says 'not told apart'",
            lambda losses: trials(
                losses,
                verdict=lambda a, b: "ahead" if finite(a) < finite(b) else judged(a, b),
            ),
        ),
        (
            "verdict is a word",
            lambda losses: trials(losses, verdict=lambda a, b: compare(a, b)),
        ),
    ],
)
def test_trials_mistakes(says, answer):
    rejects(says, check.without_trials, answer)


# -------------------------------------------------------------------------- ia3_adapter


class Scales(Adapter):
    """The solution; each mistake below changes one line of it."""

    mergeable = True

    def __init__(self, d_in, d_out, feedforward):
        super().__init__()
        self.feedforward = feedforward
        self.l = nn.Parameter(torch.ones(d_in if feedforward else d_out))

    def forward(self, base, x):
        return base(x * self.l) if self.feedforward else base(x) * self.l

    def fold(self, base):
        if self.feedforward:
            base.weight = base.weight * self.l
            return
        base.weight = base.weight * self.l[:, None]
        if base.bias is not None:
            base.bias = base.bias * self.l


class AsColumns(Adapter):
    """Another style: l as the file keeps it, (d_out, 1) or (1, d_in)."""

    mergeable = True

    def __init__(self, d_in, d_out, feedforward):
        super().__init__()
        self.rows = not feedforward
        self.l = nn.Parameter(torch.ones((d_out, 1) if self.rows else (1, d_in)))

    def forward(self, base, x):
        l = self.l.flatten()
        return torch.mul(base(x), l) if self.rows else base(x.mul(l))

    def fold(self, base):
        W, b = base.weight, base.bias
        base.weight = self.l * W
        if self.rows and b is not None:
            base.bias = self.l.flatten() * b


def scales(**methods):
    return type("Changed", (Scales,), methods)


def beginning(change):
    class Changed(Scales):
        def __init__(self, d_in, d_out, feedforward):
            super().__init__(d_in, d_out, feedforward)
            change(self, d_in, d_out)

    return Changed


class BlankAdapter(Adapter):
    def __init__(self, d_in, d_out, feedforward):
        super().__init__()
        raise NotImplementedError


def by_shape(self, base, x):
    return base(x * self.l) if len(self.l) == x.shape[-1] else base(x) * self.l


def bias_left(self, base, x):
    if self.feedforward:
        return base(x * self.l)
    b = 0 if base.bias is None else base.bias
    return (base(x) - b) * self.l + b


def cut(self, base, x):
    with torch.no_grad():
        y = base(x)
    return base(x * self.l) if self.feedforward else y * self.l


def folding(rows=True, bias=True, weight=True, both=False):
    def fold(self, base):
        l = self.l
        if weight:
            columns = self.feedforward if rows else not self.feedforward
            base.weight = base.weight * (l if columns else l[:, None])
        if base.bias is not None and bias and not self.feedforward:
            base.bias = base.bias * l

    return fold


def fold_without_none(self, base):
    base.weight = base.weight * (self.l if self.feedforward else self.l[:, None])
    if not self.feedforward:
        base.bias = base.bias * self.l


def fold_the_bias_too(self, base):
    Scales.fold(self, base)
    if self.feedforward and base.bias is not None:
        base.bias = base.bias * self.l.mean()


def test_adapter_right_answers():
    accepts(check.ia3_adapter, Scales)
    accepts(check.ia3_adapter, AsColumns)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", BlankAdapter),
        ("class itself", nn.Linear),
        ("class itself", 3),
        ("l begins at one", beginning(lambda s, i, o: nn.init.zeros_(s.l))),
        (
            "an nn.Parameter as self.l",
            beginning(
                lambda s, i, o: (delattr(s, "l"), setattr(s, "l", torch.ones(o)))
            ),
        ),
        (
            "channels; yours",
            beginning(lambda s, i, o: setattr(s, "l", nn.Parameter(torch.ones(1)))),
        ),
        (
            "channels; yours",
            beginning(lambda s, i, o: setattr(s, "l", nn.Parameter(torch.ones(o)))),
        ),
        ("saves more", beginning(lambda s, i, o: setattr(s, "more", nn.Linear(2, 2)))),
        ("`feedforward` says", scales(forward=by_shape)),
        ("bias is not scaled", scales(forward=bias_left)),
        ("l did nothing", scales(forward=lambda s, base, x: base(x) + 0 * s.l.sum())),
        ("gradient", scales(forward=cut)),
        (
            "gradient",
            scales(forward=lambda s, base, x: Scales.forward(s, base, x.detach())),
        ),
        (
            "no gradient reaches l",
            scales(
                forward=lambda s, base, x: (
                    base(x * s.l.detach()) if s.feedforward else base(x) * s.l.detach()
                )
            ),
        ),
        ("cannot be merged", scales(mergeable=False)),
        ("leaves the weight", scales(fold=folding(weight=False))),
        ("it is part of the output", scales(fold=folding(bias=False))),
        ("NoneType", scales(fold=fold_without_none)),
        ("where the input is scaled, it stays", scales(fold=fold_the_bias_too)),
    ],
)
def test_adapter_mistakes(says, answer):
    rejects(says, check.ia3_adapter, answer)


# ------------------------------------------------------------- what learners also wrote


def scaled_by(factors, close=torch.allclose):
    """An answer to find_scales: these factors, where they give W_new."""

    def answer(W, new):
        l = factors(W, new)
        return l if close(l[:, None] * W, new) else None

    return answer


def best_factors(W, new):
    return (W * new).sum(1) / W.square().sum(1)


def but_at_zeros(W, new):
    """The factors, where they give W_new at the places that are not zero in W."""
    l = best_factors(W, new)
    return l if torch.allclose((l[:, None] * W)[W != 0], new[W != 0]) else None


def within(share):
    return lambda made, new: bool((made - new).norm() < share * new.norm())


def median_of_seeds(losses):
    return lambda name: min(sorted(map(finite, x))[1] for x in losses[name].values())


def worst_seed(losses):
    def loss(name):
        return max(finite([x]) for each in losses[name].values() for x in each)

    return loss


def only_in_training(self, base, x):
    return Scales.forward(self, base, x) if self.training else base(x)


def fold_the_bias_of_a_square(self, base):
    Scales.fold(self, base)
    if self.feedforward and base.bias is not None and len(base.bias) == len(self.l):
        base.bias = base.bias * self.l.flatten()


def lifted(l):
    return torch.where(l == 0, 1e-3, l)


def unless_silent(W, new):
    l = best_factors(W, new)
    heard = l.abs() > 1e-9
    fits = torch.allclose((l[:, None] * W)[heard], new[heard])
    return l if fits else None


def bounded(losses, most):
    """A loss that is nan becomes a large number."""
    return {
        name: {
            rate: [most] * 3 if any(x != x for x in each) else each
            for rate, each in rates.items()
        }
        for name, rates in losses.items()
    }


def at_best(losses, middle=False, **settings):
    def losses_of(name):
        rates = losses[name]
        own = sorted(rates)[1] if middle else min(rates, key=lambda r: finite(rates[r]))
        return rates[own]

    tuned, blind, _ = trials(losses)
    return compare(losses_of(tuned), losses_of(blind), loss=True, **settings).verdict


def from_the_weight(self, base, x):
    W, b = base.weight, base.bias
    if self.feedforward:
        return nn.functional.linear(x * self.l, W, b)
    return nn.functional.linear(x, W, b) * self.l


def from_the_layer(self, base, x):
    return Scales.forward(self, base.module, x)


def in_place(self, base, x):
    y = Scales.forward(self, base, x)
    if not torch.is_grad_enabled():
        x.zero_()
    return y


def for_three_dimensions(self, base, x):
    rows, tokens, _ = x.shape
    return Scales.forward(self, base, x)


def freezing(self, base):
    Scales.fold(self, base)
    self.l.requires_grad_(False)


def keeping_the_old(self, base):
    self.old = nn.Parameter(base.weight.detach().clone())
    Scales.fold(self, base)


class KindOfTheClass(Scales):
    """The last one that was made says for all which side is scaled."""

    def __init__(self, d_in, d_out, feedforward):
        super().__init__(d_in, d_out, feedforward)
        del self.feedforward
        KindOfTheClass.feedforward = feedforward


def test_two_layers_may_differ_in_kind():
    verdict = check.ia3_adapter(KindOfTheClass)
    assert not verdict


@pytest.mark.parametrize(
    "name, says, answer",
    [
        ("fold_ia3", "sign of l", lambda W, b, l, ff: fold(W, b, l.abs(), ff)),
        (
            "fold_ia3",
            "sign of l",
            lambda W, b, l, ff: fold(W, b, l.square().sqrt(), ff),
        ),
        (
            "fold_ia3",
            "added afterwards",
            lambda W, b, l, ff: (
                (W * l, b * l if len(b) == len(l) else b) if ff else fold(W, b, l, ff)
            ),
        ),
        ("bias_gradient", "first row only", lambda g, x: g[0].sum(0)),
        ("find_scales", "off by 0.0005", scaled_by(best_factors, within(1e-4))),
        (
            "find_scales",
            "off by 0.0005",
            scaled_by(best_factors, lambda a, b: torch.allclose(a, b, atol=1e-3)),
        ),
        (
            "find_scales",
            "off by 0.0005",
            scaled_by(best_factors, lambda a, b: torch.allclose(a, b, rtol=1e-2)),
        ),
        (
            "find_scales",
            "adds up to zero",
            scaled_by(lambda W, new: new.sum(1) / W.sum(1)),
        ),
        (
            "find_scales",
            "adds up to zero",
            scaled_by(lambda W, new: new.mean(1) / W.mean(1)),
        ),
        ("find_scales", "an entry that is zero in W is not", but_at_zeros),
        (
            "find_scales",
            "has the shape",
            lambda W, new: None if find(W, new) is None else find(W, new)[:, None],
        ),
        (
            "without_trials",
            "lowest median",
            lambda losses: trials(losses, median_of_seeds),
        ),
        (
            "without_trials",
            "of a single seed",
            lambda losses: trials(losses, blind=worst_seed),
        ),
        ("ia3_adapter", "l did nothing", scales(forward=only_in_training)),
        ("ia3_adapter", "it stays", scales(fold=fold_the_bias_of_a_square)),
        (
            "ia3_adapter",
            "Your output has the shape",
            scales(forward=lambda s, b, x: Scales.forward(s, b, x).flatten(0, 1)),
        ),
        ("ia3_adapter", "Something is None here", scales(fold=fold_without_none)),
        (
            "fold_ia3",
            "with a zero in it",
            lambda W, b, l, ff: fold(W, b, lifted(l), ff),
        ),
        (
            "bias_gradient",
            "whose x is zero",
            lambda g, x: g[x.abs().sum(-1) > 0].sum(0),
        ),
        (
            "bias_gradient",
            "equal gradients once",
            lambda g, x: g.flatten(0, 1).unique(dim=0).sum(0),
        ),
        (
            "find_scales",
            "small against the other rows",
            scaled_by(best_factors, lambda a, b: torch.allclose(a, b, atol=1e-5)),
        ),
        (
            "find_scales",
            "small against the other rows",
            scaled_by(best_factors, lambda a, b: (a - b).norm() < 1e-6 * b.norm()),
        ),
        (
            "find_scales",
            "some 0.000001",
            scaled_by(
                lambda W, new: (W * new).sum(1) / (W.square().sum(1) + 1e-8),
                lambda a, b: torch.allclose(a, b, rtol=1e-4),
            ),
        ),
        ("find_scales", "at right angles", unless_silent),
        (
            "without_trials",
            "At its worst rate",
            lambda losses: trials(bounded(losses, 10.0)),
        ),
        (
            "without_trials",
            "At its worst rate",
            lambda losses: trials(
                {
                    name: {
                        rate: each[:2] if each[2] != each[2] else each
                        for rate, each in rates.items()
                    }
                    for name, rates in losses.items()
                }
            ),
        ),
        (
            "without_trials",
            "belong together",
            lambda losses: (*trials(losses)[:2], at_best(losses, paired=False)),
        ),
        (
            "without_trials",
            "middle rate",
            lambda losses: (*trials(losses)[:2], at_best(losses, middle=True)),
        ),
        ("ia3_adapter", "one of them is lost", scales(forward=from_the_weight)),
        ("ia3_adapter", "one of them is lost", scales(forward=from_the_layer)),
        ("ia3_adapter", "in place", scales(forward=in_place)),
        (
            "ia3_adapter",
            "not enough values to unpack",
            scales(forward=for_three_dimensions),
        ),
        ("ia3_adapter", "l is frozen", scales(fold=freezing)),
        ("ia3_adapter", "saves more than l: old", scales(fold=keeping_the_old)),
    ],
)
def test_what_learners_wrote(name, says, answer):
    rejects(says, getattr(check, name), answer)


def test_a_pair_may_be_an_array():
    said = {"all doubled": (0, 0.99), "negated": (0, 0.71)}
    said |= {"exchanged": (0.71, 0), "one added": (1, 0)}
    accepts(check.predict_reach, {k: np.array(v) for k, v in said.items()})
    accepts(check.predict_reach, {k: torch.tensor(v) for k, v in said.items()})
    rejects("too large", check.predict_reach, said | {"negated": (0, 0.74)})
    rejects("too small", check.predict_reach, said | {"exchanged": (0.68, 0)})
    rejects("no factor of a row", check.predict_reach, said | {"one added": (0.99, 0)})
    rejects("full rank", check.predict_reach, said | {"all doubled": (0, 0.98)})
