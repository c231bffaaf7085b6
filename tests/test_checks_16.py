"""Chapter 16's checks accept the solution, refuse the blank stub, and name the mistake
in what is plausibly wrong."""

import functools
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from judging import accepts, rejects
from torch import nn

from minipeft import Adapter, LayerConfig
from minipeft.course import check
from minipeft.weights import linear_features


def stub(*args):
    raise NotImplementedError


# -------------------------------------------------------------------------- fair_search


def search(
    run,
    methods,
    rates,
    seeds,
    *,
    key="valid_loss",
    pick=min,
    report="test_score",
    skip_nan=True,
    every=False,
    last_seeds=None,
):
    found = {}
    for method in methods:
        tried = {lr: run(method, lr, seeds[0]) for lr in rates}
        if every:
            for seed in seeds[1:]:
                for lr in rates:
                    run(method, lr, seed)
        usable = [
            lr for lr in rates if not (skip_nan and math.isnan(tried[lr]["valid_loss"]))
        ]
        lr = pick(usable, key=lambda lr: tried[lr][key])
        scores = [run(method, lr, seed)[report] for seed in last_seeds or seeds]
        found[method] = {"lr": lr, "scores": scores}
    return found


def test_search_solution():
    accepts(check.fair_search, search)

    def once(run, methods, rates, seeds):
        """The first seed's run at the best rate is not made again."""
        found = {}
        for method in methods:
            tried = [(run(method, lr, seeds[0]), lr) for lr in rates]
            good = [pair for pair in tried if pair[0]["valid_loss"] < math.inf]
            best, lr = min(good, key=lambda pair: pair[0]["valid_loss"])
            rest = [run(method, lr, seed)["test_score"] for seed in seeds[1:]]
            found[method] = {"lr": lr, "scores": (best["test_score"], *rest)}
        return found

    accepts(check.fair_search, once)


def of_scores(run, methods, rates, seeds, change):
    found = search(run, methods, rates, seeds)
    return {
        m: one | {"scores": list(change(one["scores"]))} for m, one in found.items()
    }


def but_nan(scores):
    return [score for score in scores if not math.isnan(score)]


def narrowed(run, methods, rates, seeds):
    """A rate at which a method diverged is not tried again."""
    found = {}
    for method in methods:
        tried = {lr: run(method, lr, seeds[0])["valid_loss"] for lr in rates}
        rates = [lr for lr in rates if not math.isnan(tried[lr])]
        best = min(rates, key=tried.get)
        scores = [run(method, best, seed)["test_score"] for seed in seeds]
        found[method] = {"lr": best, "scores": scores}
    return found


def test_scores_as_an_array():
    accepts(check.fair_search, lambda *a: of_scores(*a, np.array))


def one_rate(run, methods, rates, seeds):
    found = search(run, methods, rates, seeds)
    lr = found[methods[0]]["lr"]
    scores = {m: [run(m, lr, s)["test_score"] for s in seeds] for m in methods}
    return {m: {"lr": lr, "scores": scores[m]} for m in methods}


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "choose the rate by the test score",
            lambda *a: search(*a, key="test_score", pick=max),
        ),
        ("less is better", lambda *a: search(*a, pick=max)),
        ("with nan is false", lambda *a: search(*a, skip_nan=False)),
        ("report validation losses", lambda *a: search(*a, report="valid_loss")),
        ("only the best one", lambda *a: search(*a, every=True)),
        ("one for each seed", lambda *a: search(*a, last_seeds=[7])),
        ("in this order", lambda *a: search(*a, last_seeds=[7, 5, 3])),
        ("left out for the other methods too", narrowed),
        ("two are alike or one is nan", lambda *a: of_scores(*a, {}.fromkeys)),
        ("two are alike or one is nan", lambda *a: of_scores(*a, but_nan)),
        ("an entry for each method", lambda *a: {}),
        ("is there a `return`", lambda *a: None),
        ("nothing here yet", stub),
    ],
)
def test_search_mistakes(says, answer):
    rejects(says, check.fair_search, answer)


def test_one_rate_for_all_is_not_accepted():
    verdicts = [check.fair_search(one_rate) for _ in range(20)]
    assert any("All methods get the same rate" in v.message for v in verdicts)


# ------------------------------------------------------------------------------- leaked


def plain(text):
    return tuple(re.findall(r"\w+", text.lower()))


def test_leaked_solution():
    def by_words(train, test):
        seen = {plain(text) for text in train}
        return [i for i, text in enumerate(test) if plain(text) in seen]

    accepts(check.leaked, by_words)

    def by_letters(train, test):
        """Another style: numpy, and a set of joined words."""
        seen = {" ".join(plain(text)) for text in train}
        hits = [" ".join(plain(text)) in seen for text in test]
        return list(np.flatnonzero(hits))

    accepts(check.leaked, by_letters)
    accepts(check.leaked, lambda *given: np.array(by_letters(*given)))
    accepts(check.leaked, lambda *given: iter(by_words(*given)))


def matching(normal):
    def answer(train, test):
        seen = {normal(text) for text in train}
        return [i for i, text in enumerate(test) if normal(text) in seen]

    return answer


@pytest.mark.parametrize(
    "says, answer",
    [
        ("letter by letter", matching(lambda text: text)),
        ("Spaces, line ends or punctuation", matching(str.lower)),
        ("Punctuation still", matching(lambda text: tuple(text.lower().split()))),
        ("Capital letters", matching(lambda text: tuple(re.findall(r"\w+", text)))),
        (
            "is another question",
            lambda train, test: [
                i
                for i, text in enumerate(test)
                if any(" ".join(plain(text)) in " ".join(plain(t)) for t in train)
            ],
        ),
        (
            "did not leak",
            lambda train, test: [
                i for i, t in enumerate(test) if plain(t) not in map(plain, train)
            ],
        ),
        (
            "not the questions themselves",
            lambda train, test: [t for t in test if plain(t) in map(plain, train)],
        ),
        ("list of indices", lambda train, test: 3),
        ("is there a `return`", lambda train, test: None),
        ("nothing here yet", stub),
    ],
)
def test_leaked_mistakes(says, answer):
    rejects(says, check.leaked, answer)


# ------------------------------------------------------------------------- items_needed


def exact(p, gap, z=1.96):
    return 2 * z**2 * p * (1 - p) / gap**2


def test_items_solution():
    accepts(check.items_needed, lambda p, gap: math.ceil(exact(p, gap)))
    accepts(check.items_needed, lambda p, gap: np.int64(np.ceil(exact(p, gap))))
    accepts(check.items_needed, lambda p, gap: np.ceil(exact(p, gap)))

    def counting(p, gap):
        n = 1
        while 1.96 * math.sqrt(2 * p * (1 - p) / n) > gap:
            n += 1
        return n

    accepts(check.items_needed, counting)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("round down", lambda p, gap: math.floor(exact(p, gap))),
        ("one method alone", lambda p, gap: math.ceil(exact(p, gap) / 2)),
        ("1.96 is missing", lambda p, gap: math.ceil(exact(p, gap, 1))),
        ("1.96 is squared too", lambda p, gap: math.ceil(exact(p, gap) / 1.96)),
        ("difference is squared", lambda p, gap: math.ceil(exact(p, gap) * gap)),
        ("on one side", lambda p, gap: math.ceil(exact(p, gap, 1.645))),
        ("not p.", lambda p, gap: math.ceil(exact(p, gap) / (1 - p))),
        ("Round up", exact),
        ("to the nearest", lambda p, gap: round(exact(p, gap))),
        ("together", lambda p, gap: 2 * math.ceil(exact(p, gap))),
        ("one side of the difference", lambda p, gap: math.ceil(4 * exact(p, gap))),
        ("the margin would be", lambda p, gap: 1),
        ("is there a `return`", lambda p, gap: None),
        ("nothing here yet", stub),
    ],
)
def test_items_mistakes(says, answer):
    rejects(says, check.items_needed, answer)


# --------------------------------------------------------------------------- best_split


def all_splits(budget, train, item, spread_seed, spread_item, most, step=1):
    def error(seeds, items):
        return spread_seed**2 / seeds + spread_item**2 / items

    found = [
        (seeds, min(most, int((budget / seeds - train) / item + 1e-9)))
        for seeds in range(2, int(budget / train) + 1, step)
    ]
    return min((s for s in found if s[1] >= 1), key=lambda s: error(*s))


def test_split_solution():
    accepts(check.best_split, all_splits)

    def in_a_loop(budget, train, item, spread_seed, spread_item, most):
        best, answer = math.inf, None
        for items in range(1, most + 1):
            seeds = int(budget // (train + items * item))
            if seeds >= 2:
                error = spread_seed**2 / seeds + spread_item**2 / items
                if error < best:
                    best, answer = error, (seeds, items)
        return list(answer)

    accepts(check.best_split, in_a_loop)
    accepts(check.best_split, lambda *given: np.array(all_splits(*given), float))


def until_worse(budget, train, item, spread_seed, spread_item, most):
    """It stops where one seed more is worse for the first time."""
    best, answer = math.inf, None
    for seeds in range(2, int(budget / train) + 1):
        items = min(most, int((budget / seeds - train) / item + 1e-9))
        if items < 1:
            continue
        error = spread_seed**2 / seeds + spread_item**2 / items
        if error > best:
            break
        best, answer = error, (seeds, items)
    return answer


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "trained *and* answers",
            lambda budget, train, item, a, b, most: (int(budget / train), most),
        ),
        (
            "trained *and* answers",
            lambda budget, train, item, a, b, most: (
                int((budget - most * item) / train),
                most,
            ),
        ),
        ("More seeds", until_worse),
        ("tells nothing apart", lambda budget, train, item, a, b, most: (1, most)),
        ("questions: you ask", lambda *a: (2, a[-1] + 1)),
        ("more questions", lambda *a: (all_splits(*a)[0], all_splits(*a)[1] - 1)),
        ("seeds and", functools.partial(all_splits, step=2)),
        ("can be had", lambda *a: (2, 20)),
        (
            "can be had",
            lambda budget, train, item, a, b, most: (
                2,
                min(most, int((budget / 2 - train) / item)),
            ),
        ),
        ("two whole numbers", lambda *a: 3),
        ("two whole numbers", lambda *a: (2.5, 10)),
        ("is there a `return`", lambda *a: None),
        ("nothing here yet", stub),
    ],
)
def test_split_mistakes(says, answer):
    rejects(says, check.best_split, answer)


# ---------------------------------------------------------------------- said_beforehand

RUNS = {
    "best": {0: 0.050, 1: 0.052, 2: 0.051},
    "near": {0: 0.049, 1: 0.056, 2: 0.050},
    "noisy": {0: 0.040, 1: 0.090, 2: 0.070},
    "worst": {0: 0.150, 1: 0.153, 2: 0.151},
}
TIE = "not told apart"
RIGHT = {
    ("best", "worst"): "ahead",
    ("worst", "near"): "behind",
    ("best", "near"): TIE,
    ("best", "noisy"): TIE,
}


def test_beforehand_solution():
    accepts(check.said_beforehand, RIGHT, RUNS)
    more = RIGHT | {("noisy", "near"): TIE}
    accepts(check.said_beforehand, more, RUNS)
    shouted = {pair: f" {said.upper()}. " for pair, said in RIGHT.items()}
    accepts(check.said_beforehand, shouted, RUNS)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("is no verdict", RIGHT | {("best", "near"): "ahead"}),
        ("larger than the seeds explain", RIGHT | {("best", "worst"): TIE}),
        ("less is better", RIGHT | {("best", "worst"): "behind"}),
        ("at least four", {("best", "worst"): "ahead"}),
        ("is not a pair of methods", RIGHT | {("best", "other"): TIE}),
        ("against itself", RIGHT | {("best", "best"): TIE}),
        ("is not one of", RIGHT | {("best", "near"): "a tie"}),
        ("Give a dictionary", [1, 2, 3, 4]),
        ("nothing here yet", None),
    ],
)
def test_beforehand_mistakes(says, answer):
    rejects(says, check.said_beforehand, answer, RUNS)


def test_ties_alone_are_not_enough():
    pairs = [("best", "near"), ("near", "best"), ("best", "noisy"), ("noisy", "best")]
    said = {pair: TIE for pair in pairs}
    rejects("same verdict", check.said_beforehand, said, RUNS)


# ---------------------------------------------------------------------------- own_entry


class Scale(Adapter):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d_out))
        self.shift = nn.Parameter(torch.zeros(d_out))

    def forward(self, base, x):
        return self.scale * base(x) + self.shift


class FromZero(Scale):
    """The scale is one and a parameter that begins at zero."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        nn.init.zeros_(self.scale)

    def forward(self, base, x):
        return (1 + self.scale) * base(x) + self.shift


class Stacked(Adapter):
    """Scale and shift as one parameter."""

    dim = 0

    def __init__(self, d_in, d_out):
        super().__init__()
        both = torch.stack([torch.ones(d_out), torch.zeros(d_out)], self.dim)
        self.both = nn.Parameter(both)

    def forward(self, base, x):
        scale, shift = self.both.unbind(self.dim)
        return scale * base(x) + shift


class Folding(Scale):
    """A merge that forgets the shift."""

    mergeable = True

    def fold(self, base):
        base.weight = base.weight * self.scale[:, None]


def bias_left_alone(self, base, x):
    y = nn.functional.linear(x, base.weight)
    return self.scale * y + base.bias + self.shift


def with_a_lambda(self, d_in, d_out):
    scale, shift = self.scale, self.shift
    self.affine = lambda y: scale * y + shift


def config_of(adapter):
    @dataclass(kw_only=True)
    class Config(LayerConfig):
        peft_type: ClassVar[str] = "TEST_SCALE_AND_SHIFT"

        def create(self, base, path):
            return adapter(*linear_features(base.module))

    return Config


def computing(forward):
    return config_of(type("Changed", (Scale,), {"forward": forward}))


def starting_adapter(change):
    class Changed(Scale):
        def __init__(self, d_in, d_out):
            super().__init__(d_in, d_out)
            change(self, d_in, d_out)

    return Changed


def starting(change):
    return config_of(starting_adapter(change))


class Blank(Adapter):
    def __init__(self, d_in, d_out):
        raise NotImplementedError


def under_no_grad(self, base, x):
    with torch.no_grad():
        y = base(x)
    return self.scale * y + self.shift


def buffer_for_shift(self, d_in, d_out):
    del self.shift
    self.register_buffer("shift", torch.zeros(d_out))


def set_parameter(name, value):
    return lambda self, i, o: setattr(self, name, nn.Parameter(value(i, o)))


def test_entry_solution():
    accepts(check.own_entry, config_of(Scale))
    accepts(
        check.own_entry,
        computing(lambda s, base, x: torch.addcmul(s.shift, base(x), s.scale)),
    )
    accepts(check.own_entry, config_of(FromZero))
    for dim in (0, 1):
        accepts(check.own_entry, config_of(type("Stack", (Stacked,), {"dim": dim})))


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "no longer the base",
            starting(set_parameter("scale", lambda i, o: torch.zeros(o))),
        ),
        (
            "no longer the base",
            starting(set_parameter("shift", lambda i, o: torch.ones(o))),
        ),
        (
            "for the whole layer",
            config_of(
                type(
                    "Whole",
                    (Scale,),
                    {"__init__": lambda s, i, o: Scale.__init__(s, i, 1)},
                )
            ),
        ),
        ("Only one number per output", starting(buffer_for_shift)),
        (
            "each of the layer's 16 inputs",
            starting(set_parameter("scale", lambda i, o: torch.ones(i))),
        ),
        ("each of the layer's 16 inputs", config_of(lambda i, o: Scale(o, i))),
        (
            "You shift before you scale",
            computing(lambda s, base, x: s.scale * (base(x) + s.shift)),
        ),
        ("no effect", computing(lambda s, base, x: s.scale * base(x) + 0 * s.shift)),
        ("taken away", computing(lambda s, base, x: s.scale * base(x) - s.shift)),
        ("bias is not scaled", computing(bias_left_alone)),
        (
            "forgets the one below",
            computing(lambda s, base, x: s.scale * base.module(x) + s.shift),
        ),
        (
            "For x of one row",
            computing(lambda s, base, x: Scale.forward(s, base, x).squeeze(0)),
        ),
        (
            "the gradient of scale or shift is not",
            computing(
                lambda s, base, x: (s.scale + s.scale.detach()) / 2 * base(x) + s.shift
            ),
        ),
        (
            "no longer the base",
            starting(set_parameter("shift", lambda i, o: 1e-3 * torch.ones(o))),
        ),
        ("Merged", config_of(Folding)),
        (
            "A copy of it",
            config_of(
                type(
                    "Held",
                    (starting_adapter(with_a_lambda),),
                    {"forward": lambda s, base, x: s.affine(base(x))},
                )
            ),
        ),
        ("The way down is cut", computing(under_no_grad)),
        (
            "the gradient of scale or shift is not",
            computing(lambda s, b, x: s.scale.detach() * b(x) + s.shift),
        ),
        ("class itself", 3),
        ("nothing here yet", config_of(Blank)),
    ],
)
def test_entry_mistakes(says, answer):
    rejects(says, check.own_entry, answer)


# ------------------------------------------------------------- as other classes have it


def test_more_pairs_may_be_asked_for():
    five = RIGHT | {("noisy", "near"): TIE}
    assert check.said_beforehand(five, RUNS, least="five")
    wrong = check.said_beforehand(RIGHT, RUNS, least="five")
    assert not wrong and "at least five" in wrong.message


def test_more_seeds_may_be_asked_for():
    def three(budget, train, item, spread_seed, spread_item, most):
        best = math.inf, None
        for seeds in range(3, int(budget / train) + 1):
            items = min(most, int((budget / seeds - train) / item + 1e-9))
            if items >= 1:
                error = spread_seed**2 / seeds + spread_item**2 / items
                best = min(best, (error, (seeds, items)))
        return best[1]

    assert check.best_split(three, fewest=3)
    wrong = check.best_split(all_splits, fewest=3)
    assert not wrong and "3 seeds are asked for" in wrong.message


# ------------------------------------------------------------- what learners also wrote


def by_places(train, test):
    """Right: each place in test counts."""
    return [i for i, text in enumerate(test) if plain(text) in map(plain, train)]


def without_marks(text):
    return tuple(re.sub(r"[^\w\s]", "", text.lower()).split())


def but_short_words(text):
    return tuple(word for word in plain(text) if word not in ("a", "an", "the"))


def found_in(pattern, text):
    return tuple(re.findall(pattern, text.lower()))


def without_accents(text):
    letters = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore")
    return plain(letters.decode())


def holding(train, test):
    return [
        i
        for i, text in enumerate(test)
        if any(" ".join(plain(one)) in " ".join(plain(text)) for one in train)
    ]


def at_most(seeds_at_most):
    def answer(budget, train, item, spread_seed, spread_item, most):
        found = []
        for seeds in range(2, seeds_at_most + 1):
            items = min(most, int((budget / seeds - train) / item + 1e-9))
            if items >= 1:
                error = spread_seed**2 / seeds + spread_item**2 / items
                found.append((error, (seeds, items)))
        return min(found)[1]

    return answer


class NoType(LayerConfig):
    def create(self, base, path):
        return Scale(*linear_features(base.module))


@pytest.mark.parametrize(
    "name, says, answer",
    [
        ("fair_search", "in this order", lambda *a: search(*a, last_seeds=[5, 3, 7])),
        ("fair_search", "never asked for", lambda *a: search(*a, last_seeds=range(3))),
        (
            "fair_search",
            "in this order",
            lambda *a: {
                name: found | {"scores": sorted(found["scores"])}
                for name, found in search(*a).items()
            },
        ),
        ("leaked", "order of the words", matching(lambda t: tuple(sorted(plain(t))))),
        ("leaked", "You get", matching(lambda t: plain(t)[:8])),
        ("leaked", "sets of words", matching(lambda t: frozenset(plain(t)))),
        ("leaked", "stand twice", matching(lambda t: tuple(dict.fromkeys(plain(t))))),
        ("leaked", "where words end", matching(lambda t: re.sub(r"\W", "", t.lower()))),
        ("leaked", "leave no space", matching(without_marks)),
        ("leaked", "short words", matching(but_short_words)),
        (
            "leaked",
            "Only a to z are",
            matching(lambda t: tuple(re.findall("[a-z]+", t.lower()))),
        ),
        (
            "leaked",
            "Only a to z and digits",
            matching(lambda t: tuple(re.findall("[a-z0-9]+", t.lower()))),
        ),
        ("leaked", "holds a shorter one", holding),
        (
            "leaked",
            "go through the places",
            lambda train, test: [test.index(test[i]) for i in by_places(train, test)],
        ),
        (
            "leaked",
            "twice in test once",
            lambda train, test: sorted(
                {test.index(test[i]) for i in by_places(train, test)}
            ),
        ),
        (
            "leaked",
            "the last place",
            lambda train, test: sorted(
                {test[i]: i for i in by_places(train, test)}.values()
            ),
        ),
        ("items_needed", "add one", lambda p, gap: int(exact(p, gap)) + 1),
        ("items_needed", "add one", lambda p, gap: math.floor(exact(p, gap) + 1)),
        ("items_needed", "1.96 standard", lambda p, gap: math.ceil(exact(p, gap, 2))),
        ("best_split", "More seeds", at_most(10)),
        ("best_split", "More seeds", at_most(20)),
        ("leaked", "numbers out", matching(lambda t: found_in(r"[^\W\d]+", t))),
        ("leaked", "of one letter", matching(lambda t: found_in(r"\w\w+", t))),
        ("leaked", "é for e", matching(without_accents)),
        (
            "leaked",
            "only train tells",
            lambda train, test: [
                i
                for i, text in enumerate(test)
                if plain(text) in map(plain, [*train, *test[:i]])
            ],
        ),
        ("own_entry", "no peft_type", NoType),
        (
            "own_entry",
            "loses its sign",
            computing(lambda s, base, x: s.scale.abs() * base(x) + s.shift),
        ),
        (
            "own_entry",
            "not being trained",
            computing(
                lambda s, base, x: Scale.forward(s, base, x) if s.training else base(x)
            ),
        ),
    ],
)
def test_what_learners_wrote(name, says, answer):
    rejects(says, getattr(check, name), answer)


def test_a_pair_and_its_mirror_are_one():
    said = {("best", "worst"): "ahead", ("worst", "best"): "behind"}
    said |= {("best", "near"): TIE, ("near", "best"): TIE}
    rejects("are one", check.said_beforehand, said, RUNS)
    apart = {pair: RIGHT[pair] for pair in RIGHT if RIGHT[pair] != TIE}
    mirrored = {("worst", "best"): "behind", ("near", "worst"): "ahead"}
    rejects("at least one that is not", check.said_beforehand, apart | mirrored, RUNS)
