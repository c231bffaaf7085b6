"""Chapter 13, (IA)3 and BitFit: a fold repaired, what scaling reaches predicted, the
scales found, the gradient of a bias, a method for one trial, and (IA)3 built."""

import math
import random
from itertools import product

import torch
from torch import nn

from ...config import LayerConfig
from ...model import get_peft_model
from ...slot import Adapter
from ..comparison import compare as told_apart
from .kinds import Choices
from .practice import missed, number, written
from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "bias_gradient",
    "find_scales",
    "fold_ia3",
    "ia3_adapter",
    "predict_reach",
    "without_trials",
]

BY_SHAPE = (
    "For a square W you scale the wrong side: `feedforward` says whether the input or"
    " the output is scaled, the shapes do not."
)
SHAPES = (
    "W is (d_out, d_in), b is (d_out,), x (…, d_in). l has as many numbers as what it"
    " scales: d_out for an output, d_in for an input."
)


def draw(square=False):
    """d_in, d_out and double-precision x, W, b; the two sizes differ, so that no slip
    can hide, or they are equal, so that shapes do not say which of them is meant."""
    d_in, d_out = random.randint(7, 10), random.randint(12, 16)
    d_in = d_out if square else d_in

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return d_in, d_out, randn(3, 4, d_in), randn(d_out, d_in), randn(d_out)


@checks("Folded: the layer alone now does what layer and scales did.", SHAPES)
def fold_ia3(function) -> None:
    """function(W, b, l, feedforward) -> (W_new, b_new)."""
    for feedforward, square in product((False, True), repeat=2):
        d_in, d_out, _, W, b = draw(square)
        l = torch.rand(d_in if feedforward else d_out, dtype=torch.float64) + 0.3
        l[::2] *= -1
        got = function(W, b, l, feedforward)
        need(
            isinstance(got, (tuple, list)) and len(got) == 2,
            "Give me two tensors: return W_new, b_new.",
        )
        where = f" (feedforward={feedforward})"
        need(got[1] is not None, "The bias is lost: the plain layer has one too.")
        need(
            getattr(got[0], "shape", None) != b.shape,
            "The other way round: first the weight, then the bias.",
        )
        compare(
            got[0],
            W * l if feedforward else W * l[:, None],
            slips_of_weight(W, l, feedforward, square),
            "W_new" + where,
        )
        compare_biases(got[1], b, l, feedforward, square)
    for feedforward in (False, True):
        look_at_zero_factor(function, feedforward)


def slips_of_weight(W, l, feedforward, square) -> dict:
    where = f" (feedforward={feedforward})"
    # a factor for each column of W, or for each row; and the other way round
    scale, other = (l, l[:, None]) if feedforward else (l[:, None], l)
    return {
        BY_SHAPE: W * other if square else None,
        "W is as it was" + where + ".": W,
        "You divide by l" + where + ": that is unmerging.": W / scale,
        "You add l to W" + where + ".": W + scale,
        "l is in it twice" + where + ".": W * scale**2,
        "You multiply by 1 + l"
        + where
        + ": l starts at one, and is the factor itself.": W + W * scale,
        "The sign of l is lost: a factor may be negative.": W * scale * scale.sign(),
        "W_new is transposed" + where + ": keep nn.Linear's (d_out, d_in).": (
            (W * scale).T
        ),
    }


def compare_biases(got, b, l, feedforward, square) -> None:
    if feedforward:
        compare(
            got,
            b,
            {
                "Where the input is scaled the bias stays as it was: it is added"
                " afterwards.": b * l if square else None
            },
            "b_new, which stays as it was where the input is scaled,",
        )
    else:
        compare(
            got,
            b * l,
            {
                "The bias is left as it was: the output is scaled, and the bias"
                " is part of the output.": b,
                "You divide the bias by l.": b / l,
            },
            f"b_new (feedforward={feedforward})",
        )


def look_at_zero_factor(function, feedforward) -> None:
    """A channel is silenced: its factor is zero, and it stays zero."""
    d_in, d_out, _, W, b = draw()
    l = torch.rand(d_in if feedforward else d_out, dtype=torch.float64) + 0.3
    l[1] = 0.0
    what = f"for an l with a zero in it (feedforward={feedforward})"
    W_new, b_new = function(W, b, l, feedforward)
    compare(W_new, W * l if feedforward else W * l[:, None], {}, f"W_new {what}")
    compare(b_new, b if feedforward else b * l, {}, f"b_new {what}")


SCALED = {
    "scaled": (
        "Here W_new = l W, row by row, and you say that there is no l. It has one"
        " factor for each *row*, and some are negative; compare up to rounding."
    ),
    "silenced": "Here one row was scaled by zero: that is a scaling too.",
    "flipped": (
        "Here all rows were scaled by negative numbers: that is a scaling too."
    ),
    "with zeros": (
        "Here W has entries that are zero, which stay zero: that is a scaling too. Do"
        " you divide by them?"
    ),
    "balanced": (
        "Here a row of W adds up to zero, and W_new = l W all the same. Do you divide"
        " by a sum of entries?"
    ),
    "small": (
        "Here W and W_new have entries of some 0.000001, and W_new = l W all the same."
    ),
}
NOT_SCALED = {
    "mixed": "rows were mixed",
    "low rank": "a matrix of rank one was added, as LoRA does",
    "columns": "the *columns* were scaled: the input, not the output",
    "one row": "every row but the last was scaled, and that one was not",
    "one entry": "one entry is off by 0.0005, in a float64 matrix",
    "one of many": "one of 12,000 entries is off by 0.0005, which no mean shows",
    "right angles": "one row has become another one at right angles to it",
    "filled zero": "an entry that is zero in W is not zero in W_new",
    "small row": (
        "one row, whose entries are some 0.000001, has become another one: small"
        " against the other rows, and not against itself"
    ),
}


def one_entry(W):
    """Zero but for one entry."""
    where = torch.zeros_like(W)
    where[-1, -1] = 1.0
    return where


def turned_row(scaled, row):
    """`scaled` with a row number 2 that is at right angles to `row`."""
    other = torch.randn_like(row)
    scaled[2] = other - (other @ row) / (row @ row) * row
    return scaled


def weight_and_scales(kind):
    """W and l of one kind of SCALED or NOT_SCALED."""
    _, d_out, _, W, _ = draw()
    if kind == "one of many":
        d_out, W = 100, torch.randn(100, 120, dtype=torch.float64)
    l = torch.randn(d_out, dtype=torch.float64)
    if kind == "silenced":
        l[random.randrange(d_out)] = 0.0
    if kind == "flipped":
        l = -l.abs()
    if kind in ("with zeros", "filled zero"):
        W[0, 0] = W[:, 1] = 0.0
    if kind == "balanced":
        W[0] -= W[0].mean()
    if kind == "small":
        W *= 1e-6
    if kind == "small row":
        W[1] *= 1e-6
    return W, l


def changed_weight(kind, W, l):
    """W_new: l W, or what no scaling of the rows gives."""
    scaled = W * l[:, None]
    return {
        "mixed": lambda: W[torch.randperm(len(l))] * l[:, None] + 0.1 * W.roll(1, 0),
        "low rank": (
            lambda: W + torch.outer(torch.randn_like(l), torch.randn_like(W[0]))
        ),
        "columns": lambda: W * (torch.rand_like(W[0]) + 0.3),
        "one row": lambda: torch.cat((scaled[:-1], W[-1:].roll(1, 1))),
        "one entry": lambda: scaled + 0.0005 * one_entry(W),
        "one of many": lambda: scaled + 0.0005 * one_entry(W),
        "right angles": lambda: turned_row(scaled, W[2]),
        "filled zero": lambda: scaled + (W == 0),
        "small row": lambda: torch.cat((W[:1], W[1:2].roll(1, 1), scaled[2:])),
    }.get(kind, lambda: scaled)()


@checks(
    "You find the scales where there are some, and say None where no scaling could have"
    " done it."
)
def find_scales(function) -> None:
    """function(W, W_new) -> l (d_out,) with W_new = diag(l) W, or None."""
    first = [kind for kind in SCALED if kind != "with zeros"]
    for kind in (*first, *NOT_SCALED, "with zeros"):
        W, l = weight_and_scales(kind)
        got = function(W, changed_weight(kind, W, l))
        if kind in NOT_SCALED:
            need(
                got is None,
                f"Here {NOT_SCALED[kind]}: no scaling of the rows gives that, so None"
                " is the"
                " answer. Check that l[:, None] * W is W_new, all of it.",
            )
        else:
            need(got is not None, SCALED[kind])
            if isinstance(got, torch.Tensor):
                need(
                    bool(got.isfinite().all()),
                    "There is a NaN or an infinity in your l: where do you divide by"
                    " zero?",
                )
            compare(
                got,
                l,
                {
                    "Upside down: you have W / W_new.": 1 / l,
                    "The sign is lost: a scale may be negative.": l.abs(),
                    "That is the change of the scale: l itself starts at one.": l - 1,
                    "You give the whole diagonal matrix: its diagonal is"
                    " wanted.": torch.diag(l),
                },
                "Your l",
            )


@checks(
    "This is what autograd finds: a bias hears from every token alike, and never looks"
    " at x."
)
def bias_gradient(function) -> None:
    """function(grad_y, x) -> the bias's gradient (d_out,), from grad_y (B, T, d_out) =
    dLoss/dy and x (B, T, d_in)."""
    B, T = random.choice([2, 3]), random.choice([4, 5])
    d_in, d_out, _, _, _ = draw()
    g, x = (torch.randn(B, T, n, dtype=torch.float64) for n in (d_out, d_in))
    x[0, 1] = 0.0  # a token that says nothing
    g[1, 2] = g[0, 0]  # two that want the same
    compare(
        function(g, x),
        g.sum((0, 1)),
        {
            "That is the mean over the tokens: the loss adds up what each of them"
            " does, so sum.": g.mean((0, 1)),
            "You sum over the rows only: the tokens' dimension is left.": g.sum(0),
            "You sum over the tokens only: the rows' dimension is left.": g.sum(1),
            "You sum over everything: one number for each output is wanted.": g.sum(),
            "You sum over the outputs: sum over the first two dimensions, rows and"
            " tokens.": g.sum(-1),
            "That is the weight's gradient: the bias's does not contain x.": (
                torch.einsum("bto,bti->oi", g, x)
            ),
            "The sign is wrong: the step goes down the gradient, the gradient itself"
            " does not.": -g.sum((0, 1)),
            "You sum |grad|: signs must cancel where tokens disagree.": (
                g.abs().sum((0, 1))
            ),
            "You sum the squares: that is what Adam keeps beside the gradient.": (
                g.square().sum((0, 1))
            ),
            "You listen to the last token only: the bias was added at every place.": (
                g[:, -1].sum(0)
            ),
            "You listen to the first row only: every row has the same bias.": (
                g[0].sum(0)
            ),
            "You sum over the tokens, and take the mean over the rows: sum over"
            " both.": (g.mean(0).sum(0)),
            "You sum over the rows, and take the mean over the tokens: sum over"
            " both.": (g.mean(1).sum(0)),
            "Right numbers, but two dimensions of size 1 are left: the bias has one"
            " dimension.": g.sum((0, 1), keepdim=True),
            "You leave out a token whose x is zero: the bias is added there too.": (
                g[x.any(-1)].sum(0)
            ),
            "You count equal gradients once: each token adds its own.": (
                g.flatten(0, 1).unique(dim=0).sum(0)
            ),
            "You multiply by x: a bias never sees it.": (
                (g.sum(-1, keepdim=True) * x).sum((0, 1))
            ),
        },
        "Your gradient",
    )


# ---- what scaling and one direction reach, predicted ---------------------------------

WHY = {
    ("all doubled", 0): "every row gets the factor 2",
    ("all doubled", 1): (
        "the change is W itself, of full rank and with equal singular values: one"
        " direction holds a hundredth of its square"
    ),
    ("negated", 0): "these rows get the factor -1",
    ("negated", 1): (
        "the change is that many rows at right angles and of one length: one direction"
        " takes one of them"
    ),
    ("exchanged", 0): (
        "a row is to become another one at right angles to it: the best factor is zero,"
        " which is off by one length where the untouched row is off by √2"
    ),
    ("exchanged", 1): (
        "write the change down: its rows are differences. Of what rank is it, and how"
        " long are its directions?"
    ),
    ("one added", 0): "no factor of a row makes a part of another row out of it",
    ("one added", 1): "all rows change along one and the same direction",
}


def wanted_weights(W, count):
    """{change: W_new}"""
    negated, exchanged, added = W.clone(), W.clone(), W.clone()
    negated[:count] *= -1
    exchanged[:count] = W[:count].roll(1, 0)
    added[1:] += W[0]
    return {
        "all doubled": 2 * W,
        "negated": negated,
        "exchanged": exchanged,
        "one added": added,
    }


def error_left(W, wanted):
    """What the best factors for the rows, and the best matrix of rank 1, leave of the
    change, relative to its norm."""
    change = wanted - W
    l = (W * wanted).sum(1, keepdim=True) / W.square().sum(1, keepdim=True)
    S = torch.linalg.svdvals(change)
    left = (l * W - wanted).norm(), S[1:].norm()
    return [(part / change.norm()).item() for part in left]


@checks(
    "All eight. Exchanging two outputs looks harder than negating two, and for one"
    " direction it is the easier: what counts is the rank of the change."
)
def predict_reach(predicted, count=2) -> None:
    """predicted: {change: (error left by (IA)3, error left by LoRA of rank 1)}."""
    W, _ = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))
    changes = wanted_weights(W, count)
    predicted = written(
        predicted, changes, "put your eight numbers", "{change: (number, number)}"
    )
    for name, wanted in changes.items():
        pair = predicted[name]
        if isinstance(pair, torch.Tensor):
            pair = pair.tolist()
        need(
            isinstance(pair, (tuple, list)) and len(pair) == 2,
            f"{name!r}: two numbers are wanted, for (IA)³ and for rank 1; you have"
            f" {pair!r}.",
        )
        for at, (got, true) in enumerate(zip(pair, error_left(W, wanted))):
            got = number(name, got)
            method = ("(IA)³", "LoRA, r = 1")[at]
            # two decimals: sqrt(0.99) may be written as 0.99, as 0.995, or as 1.00
            need(
                abs(got - true) <= 0.0075,
                f"{name!r}, {method}: you say {missed(got, true)}. Think of this:"
                f" {WHY[name, at]}.",
            )


# ---- one trial -----------------------------------------------------------------------

nan = math.nan
TRIALS = {  # {method: the mean loss at 0.1, 1 and 10 times its best rate}
    "forgiving": {"A": (0.6, 0.1, 3.0), "B": (0.4, 0.3, 0.5), "C": (0.9, 0.35, 4.0)},
    "worst is nan": {"A": (0.5, 0.1, nan), "B": (0.7, 0.4, 0.8), "C": (2.0, 0.3, 0.6)},
    "best in the mean": {"A": (0.1, 0.2, 1.0), "B": (0.7, 0.6, 0.8)},
    "same": {"A": (0.2, 0.1, 0.3), "B": (0.5, 0.4, 0.6), "C": (0.5, 0.2, 2.0)},
    "not told apart": {"A": (0.9, 0.30, 2.0), "B": (0.5, 0.32, 0.6)},
    "unlucky seeds": {"A": (0.5, 0.1, 0.6), "B": (0.7, 0.25, 0.8)},
    "worse than nan": {"A": (0.5, 0.1, nan), "B": (0.6, 0.4, 5000), "C": (2, 0.3, 7e3)},
    "paired": {"A": (0.9, 0.5, 0.30), "B": (0.6, 0.4, 0.58)},
}


def trials_drawn(kind):
    """{method: {rate: [a loss a seed]}}; the rates are each method's own."""
    noise = 0.06 if kind in ("not told apart", "paired") else 0.004
    names = random.sample(["(IA)³", "BitFit", "LoRA", "prompt"], len(TRIALS[kind]))
    signs = random.sample([1.0, -0.4, -0.6], 3)
    drawn = {}
    for at, (name, means) in enumerate(zip(names, TRIALS[kind].values())):
        own = signs[at:] + signs[:at]  # no two methods have the same good seed
        own = signs if kind == "paired" else own  # a seed is good for both, or bad
        best = random.choice([1e-3, 1e-2, 1e-1])
        drawn[name] = {
            best * factor: [mean + noise * sign for sign in own]
            for factor, mean in zip((0.1, 1, 10), means)
        }
    if kind == "forgiving":  # the first seed alone would choose another rate
        drawn[names[0]][min(drawn[names[0]])] = [0.05, 0.9, 0.85]
    if kind == "same":  # another method's lowest single loss, at its best rate
        name = names[1]
        rate = min(drawn[name], key=lambda rate: sum(drawn[name][rate]))
        drawn[name][rate] = [0.05, 0.6, 0.55]
    if kind == "worst is nan":  # one seed of three diverges, in the middle of the list
        rate = max(drawn[names[0]])
        drawn[names[0]][rate] = [0.2, math.nan, 0.2]
    if kind == "worse than nan":  # the last seed of three diverges
        rate = max(drawn[names[0]])
        drawn[names[0]][rate] = [0.2, 0.2, math.nan]
    if kind == "unlucky seeds":  # worst by one seed, or by the median: another method
        drawn[names[0]][max(drawn[names[0]])] = [0.1, 0.1, 1.6]
        for name, losses in zip(names, ([0.02, 0.13, 0.15], [0.08, 0.09, 0.58])):
            drawn[name][sorted(drawn[name])[1]] = losses
    return dict(sorted(drawn.items(), key=lambda item: random.random()))


def mean_loss(losses):
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf


def median_loss(losses):
    return sorted(x if math.isfinite(x) else math.inf for x in losses)[len(losses) // 2]


@checks(
    "With trials the best of the best, without them the best of the worst; and the"
    " course's rule says whether the trials are worth it."
)
def without_trials(function) -> None:
    """function(losses) -> (tuned, blind, verdict)."""
    choices = Choices(), Choices(), Choices()
    for kind in TRIALS:
        losses = trials_drawn(kind)
        given = {
            name: {rate: list(each) for rate, each in rates.items()}
            for name, rates in losses.items()
        }
        some_trials(function(given), losses, *choices)
    for each in choices:
        each.judge()


def some_trials(got, losses, tuned_ones, blind_ones, verdicts) -> None:
    need(got is not None, "Your function gives None: is there a `return` at its end?")
    need(
        isinstance(got, (tuple, list)) and len(got) == 3,
        f"Return three things: tuned, blind, verdict; you return {got!r}.",
    )
    tuned, blind, verdict = got
    for what, name in (("tuned", tuned), ("blind", blind)):
        need(
            isinstance(name, str) and name in losses,
            f"{what} should be one of the methods, {sorted(losses)}; it is {name!r}.",
        )
    means = {
        name: [mean_loss(each) for each in rates.values()]
        for name, rates in losses.items()
    }
    shown = {
        name: {f"{rate:g}": [round(x, 3) for x in rates[rate]] for rate in rates}
        for name, rates in losses.items()
    }
    shown = f" The losses were {shown}."
    a_tuned_one(tuned, means, losses, shown, tuned_ones)
    a_blind_one(blind, means, losses, shown, blind_ones)
    best = {name: min(losses[name].values(), key=mean_loss) for name in (tuned, blind)}
    right = told_apart(best[tuned], best[blind], loss=True).verdict
    verdicts.add_verdict(
        verdict,
        right,
        "these are losses (loss=True), and it is of tuned against blind.",
        f"You say {verdict!r}; of {tuned!r} against {blind!r}, each at its best rate,"
        f" the course's rule says {right!r}.{shown}",
        {
            "You lose which losses belong together: the rule compares seed by seed, in"
            " the order given (paired=True, as it is by default).": told_apart(
                best[tuned], best[blind], loss=True, paired=False
            ).verdict,
            "You compare both at their middle rate: the best rate is the one with the"
            " lowest mean loss.": told_apart(
                *(losses[name][sorted(losses[name])[1]] for name in (tuned, blind)),
                loss=True,
            ).verdict,
        },
    )


def a_tuned_one(got, means, losses, shown, choices) -> None:
    right = min(means, key=lambda name: min(means[name]))

    def lowest(name):
        return min(x for each in losses[name].values() for x in each if x == x)

    slips = {
        "You take the method with the lowest loss of any seed: take the mean over the"
        " seeds.": min(means, key=lowest),
        "You take the lowest median: `compare` looks at means, and so does the"
        " question.": min(
            means, key=lambda name: min(map(median_loss, losses[name].values()))
        ),
        "You take the largest loss: lower is better.": max(
            means, key=lambda name: min(means[name])
        ),
    }
    choices.add(
        got,
        right,
        slips,
        f"With trials {right!r} has the lowest mean loss at its best rate; you say"
        f" {got!r}.{shown}",
    )


def a_blind_one(got, means, losses, shown, choices) -> None:
    right = min(means, key=lambda name: max(means[name]))

    def without_nan(name):
        kept = [[x for x in each if x == x] for each in losses[name].values()]
        return max(sum(each) / len(each) for each in kept if each)

    slips = {
        "A run that diverged is the worst that can happen: nan counts as infinite,"
        " though max() may pass it by.": min(means, key=without_nan),
        "You take the mean over the rates. Without trials you may land at the worst of"
        " them: look at each method's worst.": min(
            means, key=lambda name: sum(min(x, 1e9) for x in means[name])
        ),
        "You look for the worst loss of a single seed: the worst *mean* counts.": min(
            means,
            key=lambda name: max(
                x if x == x else math.inf
                for each in losses[name].values()
                for x in each
            ),
        ),
        "You take the method with the best rate again. Without trials nobody tells you"
        " that rate.": min(means, key=lambda name: min(means[name])),
        "You take the method that fares worst of all: the *least* bad is wanted.": max(
            means, key=lambda name: max(means[name])
        ),
    }
    choices.add(
        got,
        right,
        slips,
        f"At its worst rate {right!r} has the lowest mean loss; you say {got!r}."
        f"{shown}",
    )


# ---- (IA)3, built --------------------------------------------------------------------


def layer_with(adapter_class, linear, feedforward):
    """A PeftModel around one linear layer, with the learner's adapter on it."""

    class Configured(LayerConfig):
        def create(self, base, path):
            d_out, d_in = base.weight.shape
            adapter = adapter_class(d_in, d_out, feedforward)
            adapter_class(d_in, d_out, not feedforward)  # as another layer's would be
            return adapter

    config = Configured(target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear), config)
    model.add_adapter("second", config)
    return model.double()


@checks(
    "It scales the right side, starts as the base, folds into weight and bias, and"
    " comes out again without a trace.",
    SHAPES,
)
def ia3_adapter(adapter_class) -> None:
    """adapter_class(d_in, d_out, feedforward), an Adapter with the Parameter l."""
    need(
        isinstance(adapter_class, type) and issubclass(adapter_class, Adapter),
        "Give me the class itself, a subclass of Adapter.",
    )
    for feedforward, bias, square in (
        (False, True, False),
        (True, True, False),
        (False, False, False),
        (True, False, True),
        (True, True, True),
        (False, True, True),
    ):
        d_in = random.randint(5, 7)
        d_out = d_in if square else random.randint(9, 12)
        linear = nn.Linear(d_in, d_out, bias=bias)
        model = layer_with(adapter_class, linear, feedforward)
        slot = model.get_base_model()[0]
        adapter = slot.adapters["default"]
        look_at_l(adapter, d_in if feedforward else d_out, feedforward)
        x = torch.randn(2, 3, d_in, dtype=torch.float64)
        start, plain = slot(x), slot.base_layer(x)
        need(
            start.shape == plain.shape,
            f"Your output has the shape {tuple(start.shape)} where the layer's own has"
            f" {tuple(plain.shape)}.",
        )
        need(
            same(start, plain),
            "At the start the layer is not the base's: l begins at one.",
        )
        with torch.no_grad():
            adapter.l.copy_(torch.randn_like(adapter.l))
            adapter.l.view(-1)[0] = 0.0  # a channel that is silenced
        for training in (True, False):
            model.train(training)
            compare_layer(slot, adapter, x.requires_grad_(), feedforward, square)
        look_at_other_shapes(slot, x.detach())
        look_at_two(model, slot, x.detach())
        fold_and_unfold(model, slot, x.detach(), feedforward)


@torch.no_grad()
def look_at_other_shapes(slot, x) -> None:
    """x is (…, d_in): one vector, or a batch of batches, and it is left as it was."""
    right = slot(x.clone())
    for given, wanted in ((x[0, 0], right[0, 0]), (x[None], right[None])):
        mine = given.clone()
        got = slot(mine)
        need(torch.equal(mine, given), "You change x in place: others read it too.")
        compare(got, wanted, {}, f"Your output for x {tuple(given.shape)}")


@torch.no_grad()
def look_at_two(model, slot, x) -> None:
    """Two adapters, one above the other: base(x) runs the one below."""
    first, second = (slot.adapters[name] for name in ("default", "second"))
    second.l.copy_(1 + torch.rand_like(second.l))
    one, own = slot(x), first.l.clone()
    model.set_adapter(["default", "second"])
    both = slot(x)
    model.set_adapter("default")
    first.l.mul_(second.l)
    product = slot(x)
    first.l.copy_(own)
    need(
        not same(both, one) and same(both, product),
        "Two of your adapters on one layer should multiply, and one of them is lost:"
        " call `base(x)`, which runs what lies below, and no layer or weight past it.",
    )


def look_at_l(adapter, length, feedforward):
    p = getattr(adapter, "l", None)
    need(
        isinstance(p, nn.Parameter),
        "I look for an nn.Parameter as self.l: a plain tensor is neither trained nor"
        " saved.",
    )
    side = "the input, d_in" if feedforward else "the output, d_out"
    need(
        p.numel() == length,
        f"With feedforward={feedforward} l scales {side} = {length} channels; yours"
        f" has {p.numel()} entries.",
    )
    more = [name for name in adapter.state_dict() if name != "l"]
    need(not more, f"It saves more than l: {', '.join(more)}.")


def compare_layer(slot, adapter, x, feedforward, square):
    W, b = slot.base_layer.weight, slot.base_layer.bias
    l = adapter.l
    flat = l.reshape(-1)
    b = torch.zeros(len(W), dtype=W.dtype) if b is None else b
    y = x @ W.T
    if feedforward:
        right = (x * flat) @ W.T + b
        mistakes = {
            BY_SHAPE: (y + b) * flat if square else None,
            "You multiply by 1 + l: l starts at one, and is the factor itself.": (
                right + y
            ),
        }
    else:
        right = (y + b) * flat
        mistakes = {
            BY_SHAPE: (x * flat) @ W.T + b if square else None,
            "The bias is not scaled: what is scaled is the layer's whole output,"
            " W x + b.": y * flat + b,
            "You multiply by 1 + l: l starts at one, and is the factor itself.": (
                (y + b) * (1 + flat)
            ),
        }
    positive = flat.clamp(min=0)
    mistakes |= {
        "Negative factors are lost: l may have any sign.": (
            (x * positive) @ W.T + b if feedforward else (y + b) * positive
        ),
        "l did nothing.": y + b,
        "base(x) goes on beside the scaled one: (IA)³ replaces it, it adds nothing.": (
            right + y + b
        ),
    }
    mistakes = {
        message: wrong
        for message, wrong in mistakes.items()
        if wrong is not None and not same(wrong, right)
    }
    what = f"Your output, with feedforward={feedforward},"
    compare(slot(x), right, mistakes, what, {"l": l, "x": x})


def fold_and_unfold(model, slot, x, feedforward):
    where = f"feedforward={feedforward}, bias={slot.base_layer.bias is not None}"
    layer = slot.base_layer
    l = slot.adapters["default"].l.detach().reshape(-1)
    before = slot(x).detach()
    parts = {"W": layer.weight.detach().clone(), "b": layer.bias}
    need(
        slot.adapters["default"].mergeable,
        "It cannot be merged: set `mergeable = True` and write `fold(base)`.",
    )
    for _ in range(2):  # and it can be merged again
        model.merge_adapter()
        merged = slot(x).detach()
        W, b = layer.weight.detach(), layer.bias
        model.unmerge_adapter()
        need(
            same(slot(x).detach(), before),
            "Merged and unmerged, the layer is another: assign base.weight = … and"
            " base.bias = …, and change neither in place.",
        )
        if not same(merged, before):
            break
    look_at_what_is_left(slot.adapters["default"])
    if same(merged, before):
        return
    right = parts["W"] * l if feedforward else parts["W"] * l[:, None]
    need(
        not torch.equal(W, parts["W"]), f"`fold` leaves the weight as it was ({where})."
    )
    need(
        same(W, right),
        f"Merged, the weight is not the folded one ({where}): an input's scale goes"
        " into the columns, an output's into the rows.",
    )
    scaled = not torch.equal(b, parts["b"]) if b is not None else False
    raise Wrong(
        f"The weight is folded rightly, the bias is not ({where}):"
        + (
            " where the input is scaled, it stays."
            if feedforward and scaled
            else " it is part of the output, and scaled with it."
        )
    )


def look_at_what_is_left(adapter) -> None:
    """Merging leaves the adapter as it was."""
    more = [name for name in adapter.state_dict() if name != "l"]
    need(not more, f"After `fold` it saves more than l: {', '.join(more)}.")
    need(adapter.l.requires_grad, "After `fold` l is frozen: it may be trained on.")
