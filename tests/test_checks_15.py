"""Chapter 15's checks accept right answers in several styles, refuse the blank stub,
and name the mistake in what is plausibly wrong."""

import math

import numpy as np
import pytest
import torch
from judging import accepts, rejects
from torch import nn

from minipeft.course import check, compare
from minipeft.slot import Base, LinearDelta


def stub(*args):
    raise NotImplementedError


# -------------------------------------------------------------------------------- serve


def by_place(base, updates, names, x):
    y = base(x)
    out = torch.empty_like(y)
    for name in set(names):
        rows = [i for i, other in enumerate(names) if other == name]
        change = updates[name](x[rows]) if name in updates else 0
        out[rows] = y[rows] + change
    return out


def grouped(base, updates, names, x, back=True, wrong_way=False, order=sorted):
    parts, places = [], []
    for name in order(set(names)):
        rows = [i for i, other in enumerate(names) if other == name]
        y = base(x[rows])
        parts.append(y + updates[name](x[rows]) if name in updates else y)
        places += rows
    out = torch.cat(parts)
    if not back:
        return out
    places = torch.tensor(places)
    return out[places if wrong_way else places.argsort()]


def one_by_one(base, updates, names, x):
    rows = []
    for name, row in zip(names, x.split(1)):
        rows.append(base(row) + (updates[name](row) if name in updates else 0))
    return torch.cat(rows)


def masked(base, updates, names, x):
    y = base(x)
    for name, update in updates.items():
        mask = torch.tensor([n == name for n in names])[:, None, None]
        y = y + mask * update(x)
    return y


def late(base, updates, names, x):
    calls = {n: lambda rows: base(rows) + update(rows) for n, update in updates.items()}
    calls["none"] = base
    return torch.stack([calls[n](x[i : i + 1])[0] for i, n in enumerate(names)])


def lost_rows(base, updates, names, x):
    return torch.cat(
        [
            base(x[i : i + 1]) + updates[n](x[i : i + 1])
            for i, n in enumerate(names)
            if n in updates
        ]
    )


def not_without_a_name(base, updates, names, x):
    if {*names} == {"none"}:
        return x
    return by_place(base, updates, names, x)


def writes(base, updates, names, x):
    out = by_place(base, updates, names, x)
    x.data.zero_()
    return out


def test_serve_right_answers():
    for answer in (by_place, grouped, one_by_one, masked):
        accepts(check.serve, answer)
    accepts(check.serve, lambda *given: grouped(*given, order=list))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("come back sorted by adapter", lambda *g: grouped(*g, back=False)),
        ("the wrong way round", lambda *g: grouped(*g, wrong_way=True)),
        ("late binding", late),
        ("late binding", lambda b, u, n, x: b(x) + u["zoe"](x)),
        (
            "add up all adapters",
            lambda b, u, n, x: b(x) + sum(update(x) for update in u.values()),
        ),
        ("first row's adapter", lambda b, u, n, x: b(x) + u[n[0]](x)),
        (
            "base's own output is missing",
            lambda b, u, n, x: by_place(b, u, n, x) - b(x),
        ),
        (
            "base's output is in it twice",
            lambda b, u, n, x: by_place(b, u, n, x) + b(x),
        ),
        ("update is in it twice", lambda b, u, n, x: 2 * by_place(b, u, n, x) - b(x)),
        ("base alone", lambda b, u, n, x: b(x)),
        ("are lost", lost_rows),
        ("has the shape", not_without_a_name),
        ("You changed `x` in place", writes),
        ("The base ran for", lambda b, u, n, x: masked(b, u, n, x) + 0 * b(x)),
        (
            "lost touch with x and the adapters",
            lambda b, u, n, x: by_place(b, u, n, x).detach(),
        ),
        ("gradient of x", lambda b, u, n, x: masked(b, u, n, x.detach()) + 0 * x.sum()),
        (
            "lost touch with the adapter ",
            lambda b, u, n, x: by_place(
                b, {k: lambda r, f=f: f(r).detach() for k, f in u.items()}, n, x
            ),
        ),
        ("is there a `return`", lambda b, u, n, x: None),
        ("nothing here yet", stub),
    ],
)
def test_serve_mistakes(says, answer):
    rejects(says, check.serve, answer)


# ---------------------------------------------------------------------- predict_factors

RIGHT = {
    "sum of 2": 1.0,
    "sum of 5": 2.0,
    "mean of 2": math.sqrt(0.5),
    "sum of 2 equal": 1.0,
    "sum of 2, same A": 1.0,
    "mean of 2, same A": 0.0,
}


def test_predictions_right_answers():
    accepts(check.predict_factors, RIGHT)
    accepts(check.predict_factors, {k: np.float64(v) for k, v in RIGHT.items()})
    accepts(check.predict_factors, {k: torch.tensor(v) for k, v in RIGHT.items()})
    accepts(check.predict_factors, RIGHT | {"sum of 5": 2, "mean of 2": 0.7})
    accepts(check.predict_factors, dict(reversed(RIGHT.items())))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("'sum of 2': you say 0,", RIGHT | {"sum of 2": 0.0}),
        ("2 of them beside 2 right ones", RIGHT | {"sum of 2": 2.0}),
        ("5 · 4 of them", RIGHT | {"sum of 5": 4.0}),
        ("add up as squares do", RIGHT | {"sum of 5": 1.0}),
        ("half of the right terms is missing", RIGHT | {"mean of 2": 1.0}),
        ("half of the right terms is missing", RIGHT | {"mean of 2": 0.5}),
        ("2B · 2A is 4 BA", RIGHT | {"sum of 2 equal": 0.0}),
        ("twice what was wanted", RIGHT | {"sum of 2, same A": 0.0}),
        ("is the mean itself", RIGHT | {"mean of 2, same A": 0.71}),
        (
            "no prediction for 'sum of 5'",
            {k: v for k, v in RIGHT.items() if "5" not in k},
        ),
        ("expected a number", RIGHT | {"sum of 2": "1"}),
        ("write your prediction", RIGHT | {"sum of 2": None}),
        ("Give a dictionary", [1.0, 2.0]),
        ("nothing here yet", None),
    ],
)
def test_predictions_mistakes(says, answer):
    rejects(says, check.predict_factors, answer)


# ------------------------------------------------------------------------- choose_merge


def mean(values):
    return sum(values) / len(values)


def chosen(valid, right, plain, pick=None, verdict=None):
    name = pick or min(valid, key=lambda merge: mean(valid[merge]))
    verdict = verdict or compare(right[name], right[plain]).verdict
    return name, verdict


def answers_of(strings):
    return [np.array([int(c) for c in s]) * 100.0 for s in strings]


def with_numpy(valid, right, plain):
    names = list(valid)
    name = names[int(np.argmin([np.mean(valid[n]) for n in names]))]
    found = compare(answers_of(right[name]), answers_of(right[plain]))
    return [name, found.verdict]


def best_on_test(valid, right, plain):
    pick = max(right, key=lambda merge: "".join(right[merge]).count("1"))
    return chosen(valid, right, plain, pick)


def test_choice_right_answers():
    accepts(check.choose_merge, chosen)
    accepts(check.choose_merge, with_numpy)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("You choose on the test", best_on_test),
        (
            "lower is better",
            lambda v, r, p: chosen(v, r, p, max(v, key=lambda m: mean(v[m]))),
        ),
        (
            "One lucky seed",
            lambda v, r, p: chosen(v, r, p, min(v, key=lambda m: min(v[m]))),
        ),
        ("return the plain merge", lambda v, r, p: (p, "not told apart")),
        (
            "turned round",
            lambda v, r, p: (
                chosen(v, r, p)[0],
                compare(r[p], r[chosen(v, r, p)[0]]).verdict,
            ),
        ),
        (
            "turned round",
            lambda v, r, p: (
                chosen(v, r, p)[0],
                compare(r[chosen(v, r, p)[0]], r[p], loss=True).verdict,
            ),
        ),
        (
            "the course's rule says 'ahead'",
            lambda v, r, p: (chosen(v, r, p)[0], "not told apart"),
        ),
        (
            "the course's rule says 'not told apart'",
            lambda v, r, p: (
                chosen(v, r, p)[0],
                "ahead"
                if "".join(r[chosen(v, r, p)[0]]).count("1") > "".join(r[p]).count("1")
                else "behind",
            ),
        ),
        (
            "verdict is a word",
            lambda v, r, p: (chosen(v, r, p)[0], compare(r[chosen(v, r, p)[0]], r[p])),
        ),
        ("Return two things", lambda v, r, p: chosen(v, r, p)[0]),
        ("You choose 'none of them'", lambda v, r, p: ("none of them", "ahead")),
        ("is there a `return`", lambda v, r, p: None),
        ("nothing here yet", stub),
    ],
)
def test_choice_mistakes(says, answer):
    rejects(says, check.choose_merge, answer)


# --------------------------------------------------------------------------- best_merge


def thin(adapters, weights, r):
    """QR of either side, and the SVD of the small matrix between."""
    A = torch.cat([a for a, _, _ in adapters])
    B = torch.cat([w * s * b for (_, b, s), w in zip(adapters, weights)], 1)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, V = torch.linalg.svd(R_B @ R_A.T)
    return (V[:r] @ Q_A.T), (Q_B @ U[:, :r] * S[:r])


def by_gram(adapters, weights, r):
    """Eigenvectors of small Gram matrices, the root of the values in each factor."""
    A = torch.cat([w * s * a for (a, _, s), w in zip(adapters, weights)])
    B = torch.cat([b for _, b, _ in adapters], 1)
    L = torch.linalg.cholesky(B.T @ B)
    _, directions = torch.linalg.eigh(L.T @ (A @ A.T) @ L)
    top = directions[:, -r:]  # B = Q L.T, so B A = Q (L.T A)
    return top.T @ L.T @ A, B @ torch.linalg.inv(L.T) @ top


def dense(adapters, weights, r, form=lambda S: S, take=slice(None), each=False):
    M = sum(w * s * b @ a for (a, b, s), w in zip(adapters, weights))
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    part = slice(len(S) - r, None) if take == "last" else slice(r)
    return V[part], U[:, part] * form(S[part])


def changed(change):
    def answer(adapters, weights, r):
        return thin(*change(adapters, weights), r)

    return answer


def each_alone(adapters, weights, r):
    """The wrong idea, padded to the right shape where it has too many rows."""
    parts = [thin([one], [w], min(r, len(one[0]))) for one, w in zip(adapters, weights)]
    A = torch.cat([a for a, _ in parts])
    B = torch.cat([b for _, b in parts], 1)
    return A, B


def in_place(adapters, weights, r):
    out = thin(adapters, weights, r)
    adapters[0][0].mul_(2)
    return out


def test_best_merge_right_answers():
    accepts(check.best_merge, thin)
    accepts(check.best_merge, by_gram)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("a tensor of", dense),
        ("scaling s_i", changed(lambda ad, w: ([(a, b, 1.0) for a, b, _ in ad], w))),
        ("weights are missing", changed(lambda ad, w: (ad, [1.0] * len(w)))),
        ("lost its sign", changed(lambda ad, w: (ad, [abs(v) for v in w]))),
        (
            "singular values are missing",
            lambda ad, w, r: dense(ad, w, r, form=torch.ones_like),
        ),
        ("in it twice", lambda ad, w, r: dense(ad, w, r, form=torch.square)),
        ("Only the root", lambda ad, w, r: dense(ad, w, r, form=torch.sqrt)),
        ("those are the smallest", lambda ad, w, r: dense(ad, w, r, take="last")),
        ("A comes first", lambda ad, w, r: thin(ad, w, r)[::-1]),
        ("Keep the r largest", each_alone),
        ("Keep the r largest", lambda ad, w, r: thin(ad, w, r + 1)),
        ("You change the adapters", in_place),
        ("Return two tensors", lambda ad, w, r: thin(ad, w, r)[0]),
        ("is there a `return`", lambda ad, w, r: None),
        ("nothing here yet", stub),
    ],
)
def test_best_merge_mistakes(says, answer):
    rejects(says, check.best_merge, answer)


# ------------------------------------------------------------------------- learnt_merge


class Mixture(LinearDelta):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, names):
        super().__init__()
        self.names = list(names)
        self.weights = nn.Parameter(torch.full((len(names),), 1 / len(names)))

    def delta(self, base):
        pairs = zip(self.weights, self.names)
        return sum(w * base.peer(name).delta(base) for w, name in pairs)


class Cheaper(Mixture):
    def update(self, base, x):
        pairs = zip(self.weights, self.names)
        return sum(w * base.peer(name).update(base, x) for w, name in pairs)


class Einsum(Mixture):
    def delta(self, base):
        deltas = torch.stack([base.peer(name).delta(base) for name in self.names])
        return torch.einsum("n,nij->ij", self.weights, deltas)


def with_delta(change):
    return type("Changed", (Mixture,), {"delta": change})


def starting(change):
    class Changed(Mixture):
        def __init__(self, names):
            super().__init__(names)
            change(self)

    return Changed


def plain_factors(self, base):
    total = 0
    for w, name in zip(self.weights, self.names):
        A, B = base.peer(name).factors
        total = total + w * B @ A
    return total


def peers(self, base):
    return [base.peer(name).delta(base) for name in self.names]


class Twice(Mixture):
    def update(self, base, x):
        return base(x) + super().update(base, x)


class Cut(Mixture):
    def update(self, base, x):
        return super().update(base, x.detach())


class Blank(LinearDelta):
    def __init__(self, names):
        super().__init__()
        raise NotImplementedError


def test_learnt_merge_right_answers():
    for answer in (Mixture, Cheaper, Einsum):
        accepts(check.learnt_merge, answer)


def weights(values):
    return lambda self: setattr(self, "weights", nn.Parameter(torch.tensor(values)))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("start at the mean", starting(weights([0.0, 0.0]))),
        ("start at the mean", starting(weights([1.0, 1.0]))),
        ("shape (2,)", starting(weights([[0.5], [0.5]]))),
        (
            "nn.Parameter as self.weights",
            starting(
                lambda s: (
                    delattr(s, "weights"),
                    setattr(s, "weights", torch.full((2,), 0.5)),
                )
            ),
        ),
        ("weights are frozen", starting(lambda s: s.weights.requires_grad_(False))),
        ("save more", starting(lambda s: setattr(s, "more", nn.Linear(2, 2)))),
        ("scaling α/r is missing", with_delta(plain_factors)),
        ("weights have no effect", with_delta(lambda s, b: sum(peers(s, b)))),
        ("take the mean", with_delta(lambda s, b: sum(peers(s, b)) / 3)),
        (
            "softmax",
            with_delta(
                lambda s, b: sum(map(torch.mul, s.weights.softmax(0), peers(s, b)))
            ),
        ),
        ("base is in it twice", Twice),
        ("first expert", with_delta(lambda s, b: s.weights[0] * peers(s, b)[0])),
        (
            "changed places",
            with_delta(lambda s, b: sum(map(torch.mul, s.weights, peers(s, b)[::-1]))),
        ),
        (
            "gradient of the weights",
            with_delta(
                lambda s, b: (
                    sum(map(torch.mul, s.weights.detach(), peers(s, b)))
                    + 0 * s.weights.sum()
                )
            ),
        ),
        ("goes down to x", Cut),
        ("class itself", Mixture(["one", "two"])),
        ("class itself", nn.Linear),
        ("nothing here yet", Blank),
    ],
)
def test_learnt_merge_mistakes(says, answer):
    rejects(says, check.learnt_merge, answer)


# ------------------------------------------------------------------------- who_is_in_it


def counted(now, base, adapters, scaled=True, change=None):
    deltas = [(s if scaled else 1.0) * b @ a for a, b, s in adapters.values()]
    M = torch.stack([d.flatten() for d in deltas], 1)
    difference = now - base if change is None else change
    found = torch.linalg.lstsq(M, difference.flatten()[:, None]).solution
    return {name: round(v) for name, v in zip(adapters, found.flatten().tolist())}


def by_inner_products(now, base, adapters):
    deltas = [s * b @ a for a, b, s in adapters.values()]
    G = torch.tensor([[float((d * e).sum()) for e in deltas] for d in deltas])
    c = torch.tensor([float((d * (now - base)).sum()) for d in deltas])
    found = torch.linalg.solve(G.double(), c.double()).round()
    return {name: int(v) for name, v in zip(adapters, found)}


def by_trying(now, base, adapters):
    deltas = [s * b @ a for a, b, s in adapters.values()]
    counts = torch.cartesian_prod(*[torch.arange(-2, 5)] * 3)
    errors = [
        (now - base - sum(n * d for n, d in zip(row, deltas))).norm() for row in counts
    ]
    best = counts[int(torch.stack(errors).argmin())]
    return dict(zip(adapters, best.tolist()))


def each_by_itself(now, base, adapters):
    return {
        name: round(float(((now - base) * (d := s * b @ a)).sum() / (d * d).sum()))
        for name, (a, b, s) in adapters.items()
    }


def of(change):
    return lambda *given: {n: change(v) for n, v in counted(*given).items()}


def unrounded(now, base, adapters):
    deltas = [s * b @ a for a, b, s in adapters.values()]
    M = torch.stack([d.flatten() for d in deltas], 1)
    found = torch.linalg.lstsq(M, (now - base).flatten()[:, None]).solution
    return dict(zip(adapters, found.flatten().tolist()))


def test_who_right_answers():
    for answer in (counted, by_inner_products, by_trying):
        accepts(check.who_is_in_it, answer)
    accepts(check.who_is_in_it, of(np.int64))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("scaling of the adapters", lambda *g: counted(*g, scaled=False)),
        ("W_now itself", lambda n, b, a: counted(n, b, a, change=n)),
        ("signs are turned round", lambda n, b, a: counted(n, b, a, change=b - n)),
        ("lose the sign", of(abs)),
        ("not how often", of(lambda v: int(v != 0))),
        ("you say 0", of(lambda v: max(v, 0))),
        ("round to whole numbers", unrounded),
        ("whole numbers; you have", of(str)),
        ("Return a dictionary", lambda n, b, a: list(counted(n, b, a).values())),
        ("Return a dictionary", lambda n, b, a: {"voice": 1}),
        ("You find", of(lambda v: v + 7)),
        ("each adapter alone", each_by_itself),
        ("is there a `return`", lambda n, b, a: None),
        ("nothing here yet", stub),
    ],
)
def test_who_mistakes(says, answer):
    rejects(says, check.who_is_in_it, answer)


def test_the_mixture_is_one_of_the_packages_own_kind():
    """Its delta is what its update adds, wherever it stands."""
    model = check.chapter15.experts_on(6, 7)
    config = check.chapter15.one_layer_config(Mixture)
    model.add_adapter("mixture", config)
    slot = model.get_base_model()[0]
    assert slot.adapters["mixture"].delta(Base(slot, "mixture")).shape == (7, 6)


# ------------------------------------------------------------- as other classes have it


def test_the_largest_sum_may_have_other_adapters():
    ten = {k.replace("5", "10"): v for k, v in RIGHT.items()} | {"sum of 10": 3.0}
    assert check.predict_factors(ten, many=10)
    wrong = check.predict_factors(ten | {"sum of 10": 2.0}, many=10)
    assert not wrong and "10 · 9 of them" in wrong.message
    assert not check.predict_factors(RIGHT, many=10)


def test_the_verdict_may_be_of_the_plain_merge():
    def other_way(valid, right, plain):
        name = chosen(valid, right, plain)[0]
        return name, compare(right[plain], right[name]).verdict

    assert check.choose_merge(other_way, of="plain")
    wrong = check.choose_merge(chosen, of="plain")
    assert not wrong and "turned round" in wrong.message


def test_an_adapter_may_begin_with_B():
    def b_first(now, base, adapters):
        return counted(now, base, {n: (a, b, s) for n, (b, a, s) in adapters.items()})

    assert check.who_is_in_it(b_first, b_first=True)
    assert not check.who_is_in_it(counted, b_first=True)


# ------------------------------------------------------------- what learners also wrote


def picked(key):
    """A choice by something else than the mean validation loss."""

    def pick(valid):
        return min(valid, key=lambda name: key(valid[name]))

    return lambda valid, right, plain: (
        pick(valid),
        compare(right[pick(valid)], right[plain]).verdict,
    )


def never_the_plain_one(valid, right, plain):
    others = {name: losses for name, losses in valid.items() if name != plain}
    name = min(others, key=lambda name: mean(others[name]))
    return name, compare(right[name], right[plain]).verdict


def by_scores(score):
    """The verdict on one number a seed, which forgets how many answers it is of."""

    def answer(valid, right, plain):
        name = min(valid, key=lambda name: mean(valid[name]))
        a, b = ([score(text) for text in right[key]] for key in (name, plain))
        return name, compare(a, b).verdict

    return answer


def pooled(way):
    """The verdict on all answers at once, as if each were a seed."""

    def answer(valid, right, plain):
        name = chosen(valid, right, plain)[0]
        a, b = ([int(c) for c in way(right[key])] for key in (name, plain))
        return name, compare(a, b).verdict

    return answer


class Registering(Mixture):
    """Its experts become children of it at the first call."""

    def delta(self, base):
        for name in self.names:
            self.add_module(name, base.peer(name))
        return super().delta(base)


class OtherNames(Mixture):
    def __init__(self, names):
        super().__init__(names)
        self.names = self.change(names)


def renaming(change):
    return type("Renaming", (OtherNames,), {"change": staticmethod(change)})


@pytest.mark.parametrize(
    "name, says, answer",
    [
        ("choose_merge", "mean over the seeds", picked(min)),
        ("choose_merge", "mean over the seeds", picked(max)),
        ("choose_merge", "median", picked(lambda x: sorted(x)[1])),
        ("choose_merge", "the first or the last seed", picked(lambda x: x[0])),
        ("choose_merge", "the first or the last seed", picked(lambda x: x[-1])),
        ("choose_merge", "one of those to choose from", never_the_plain_one),
        (
            "choose_merge",
            "sees every answer",
            by_scores(lambda s: 100 * s.count("1") / 60),
        ),
        ("choose_merge", "sees every answer", by_scores(lambda s: s.count("1"))),
        ("choose_merge", "You pool the answers", pooled(lambda s: "".join(s))),
        (
            "choose_merge",
            "You pool the answers",
            pooled(lambda s: [c for row in zip(*s) for c in row]),
        ),
        (
            "choose_merge",
            "You pool the answers",
            pooled(lambda s: [sum(map(int, column)) for column in zip(*s)]),
        ),
        ("choose_merge", "sees every answer", by_scores(lambda s: s.count("1") / 60)),
        ("learnt_merge", "save more than its weights", Registering),
        ("learnt_merge", "changed places", renaming(sorted)),
        ("learnt_merge", "changed places", renaming(lambda names: names[::-1])),
        ("learnt_merge", "first two", renaming(lambda names: names[:2])),
        (
            "learnt_merge",
            "start at the mean",
            starting(lambda s: nn.init.constant_(s.weights, 1 / 3)),
        ),
        (
            "who_is_in_it",
            "",  # which count is cut depends on the rounding
            lambda *given: {n: int(v) for n, v in unrounded(*given).items()},
        ),
    ],
)
def test_what_learners_wrote(name, says, answer):
    rejects(says, getattr(check, name), answer)


# ------------------------------------------------------- found by trying to fool them


def chosen_by(judged, valid, right, plain):
    best = min(valid, key=lambda name: sum(valid[name]))
    return best, judged(right[plain], right[best]).verdict


def percents(a, b):
    a, b = ([100 * s.count("1") / len(s) for s in side] for side in (a, b))
    return compare(a, b, answers=60)


@pytest.mark.parametrize(
    "judged",
    [
        lambda a, b: compare(a, b, paired=False),
        lambda a, b: compare(sorted(a), sorted(b)),
        percents,
    ],
)
def test_seeds_and_questions_of_merges_are_paired(judged):
    def answer(*given):
        return chosen_by(judged, *given)

    rejects("do not pair", check.choose_merge, answer, of="plain")


def in_numpy(adapters, weights, r):
    W = sum(w * s * (B @ A).numpy() for (A, B, s), w in zip(adapters, weights))
    U, S, V = np.linalg.svd(W, full_matrices=False)
    return torch.from_numpy(V[:r]), torch.from_numpy(U[:, :r] * S[:r])


def made_in_numpy(adapters, weights, r):
    """The product, too, is numpy's."""
    plain = [(A.numpy(), B.numpy(), s) for A, B, s in adapters]
    W = sum(w * s * (B @ A) for (A, B, s), w in zip(plain, weights))
    U, S, V = np.linalg.svd(W, full_matrices=False)
    return torch.from_numpy(V[:r]), torch.from_numpy(U[:, :r] * S[:r])


def test_a_dense_merge_is_seen_in_numpy():
    rejects("was formed", check.best_merge, in_numpy)
    rejects("you form it there", check.best_merge, made_in_numpy)


@pytest.mark.parametrize("part", [lambda M: M[0], lambda M: M.diagonal()])
def test_a_part_of_the_weights_does_not_tell(part):
    def answer(now, base, adapters):
        changes = [part(s * B @ A) for B, A, s in adapters.values()]
        M, change = torch.stack(changes, 1), part(now - base)
        found = torch.linalg.lstsq(M, change[:, None]).solution.flatten()
        return {name: round(n) for name, n in zip(adapters, found.tolist())}

    rejects("it is {", check.who_is_in_it, answer, b_first=True)


ONE = nn.Parameter(torch.full((3,), 1 / 3))


class Shared(Mixture):
    def __init__(self, names):
        super().__init__(names)
        if len(names) == 3:
            self.weights = ONE


class Bound(Mixture):
    def __init__(self, names):
        super().__init__(names)
        self.delta = lambda base: Mixture.delta(self, base)


class OnlyLoras(Mixture):
    def delta(self, base):
        pairs = zip(self.weights, self.names)
        return sum(w * base.peer(name).delta(None) for w, name in pairs)


class RoundedInEval(Mixture):
    def delta(self, base):
        w = self.weights if self.training else self.weights.round(decimals=1)
        return sum(n * base.peer(name).delta(base) for n, name in zip(w, self.names))


class UpdateAlone(LinearDelta):
    def __init__(self, names):
        super().__init__()
        self.names = list(names)
        self.weights = nn.Parameter(torch.full((len(names),), 1 / len(names)))

    update = Cheaper.update


@pytest.mark.parametrize(
    "says, answer",
    [
        ("share one tensor of weights", Shared),
        ("A copy of it", Bound),
        ("Your code stopped", OnlyLoras),
        ("in eval mode", RoundedInEval),
        ("There is no `delta` of yours", UpdateAlone),
    ],
)
def test_mixtures_that_are_right_on_one_layer_only(says, answer):
    verdict = check.learnt_merge(answer)
    assert not verdict and says in verdict.message, verdict.message
