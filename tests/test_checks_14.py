"""Chapter 14's checks accept the solution, refuse the blank stub, and name the mistake
in what is plausibly wrong."""

from itertools import combinations

import numpy as np
import pytest
import torch
from judging import accepts, rejects
from torch import nn

from minipeft.course import check, compare


def stub(*args):
    raise NotImplementedError


# --------------------------------------------------------------------------------- fuse


def solution(y, u, q, k, v, scale=1.0, over=0, key=None, value=None):
    key, value = u if key is None else key, u if value is None else value
    p = (((y @ q.T) * (key @ k.T)).sum(-1) * scale).softmax(over)
    return y + (p.unsqueeze(-1) * (value @ v.T)).sum(0)


def test_fuse_solution():
    accepts(check.fuse, solution)

    def by_hand(y, u, q, k, v):
        shares = torch.softmax(
            torch.stack(
                [((y @ q.T) * (one @ k.T)).sum(-1, keepdim=True) for one in u], -1
            ),
            -1,
        )
        return y + sum(shares[..., i] * (one @ v.T) for i, one in enumerate(u))

    accepts(check.fuse, by_hand)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("residual is forgotten", lambda y, u, q, k, v: solution(y, u, q, k, v) - y),
        (
            "attend over the inputs",
            lambda y, u, q, k, v: solution(y, u, q, k, v, key=y.expand_as(u)),
        ),
        (
            "In the keys it would not matter",
            lambda y, u, q, k, v: solution(y, u, q, k, v, value=y + u),
        ),
        (
            "In the keys it would not matter",
            lambda y, u, q, k, v: solution(y, y + u, q, k, v),
        ),
        (
            "does not scale them",
            lambda y, u, q, k, v: solution(y, u, q, k, v, scale=y.shape[-1] ** -0.5),
        ),
        ("over the tokens", lambda y, u, q, k, v: solution(y, u, q, k, v, over=2)),
        ("over the rows", lambda y, u, q, k, v: solution(y, u, q, k, v, over=1)),
        (
            "through W_v",
            lambda y, u, q, k, v: solution(y, u, q, k, torch.eye(len(v)).to(v)),
        ),
        (
            "through W_k",
            lambda y, u, q, k, v: solution(y, u, q, torch.eye(len(v)).to(v), v),
        ),
        ("swapped", lambda y, u, q, k, v: solution(y, u, k, q, v)),
        ("transposed", lambda y, u, q, k, v: solution(y, u, q.T, k.T, v.T)),
        ("residual is in it twice", lambda y, u, q, k, v: solution(y, u, q, k, v) + y),
        (
            "shares sum to one already",
            lambda y, u, q, k, v: y + (solution(y, u, q, k, v) - y) / len(u),
        ),
        (
            "Query and key are swapped",
            lambda y, u, q, k, v: (
                y
                + (
                    ((u @ q.T) * (y @ k.T)).sum(-1).softmax(0)[..., None] * (u @ v.T)
                ).sum(0)
            ),
        ),
        (
            "softmax is missing",
            lambda y, u, q, k, v: (
                y + (((y @ q.T) * (u @ k.T)).sum(-1, keepdim=True) * (u @ v.T)).sum(0)
            ),
        ),
        ("a soft choice", lambda y, u, q, k, v: solution(y, u, 1e6 * q, k, v)),
        ("is there a `return`", lambda y, u, q, k, v: None),
        ("nothing here yet", stub),
    ],
)
def test_fuse_mistakes(says, answer):
    rejects(says, check.fuse, answer)


# ------------------------------------------------------------------------ fusion_module


class Fusion(nn.Module):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, experts, d):
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(d, d),
            nn.Linear(d, d),
            nn.Linear(d, d, bias=False),
        )
        nn.init.eye_(self.value.weight)
        self.experts = list(experts)
        for expert in experts:
            expert.requires_grad_(False)

    def forward(self, y):
        u = torch.stack([expert(y) for expert in self.experts])
        p = (self.query(y) * self.key(u)).sum(-1).softmax(0)
        return y + (p.unsqueeze(-1) * self.value(u)).sum(0)


def after_init(change):
    class Changed(Fusion):
        def __init__(self, experts, d):
            super().__init__(experts, d)
            change(self, experts, d)

    return Changed


def with_forward(forward):
    return type("Changed", (Fusion,), {"forward": forward})


def updates(self, y):
    return torch.stack([expert(y) for expert in self.experts])


def attend(self, y, u=None, over=0, scale=1.0, query=None, key=None, value=None):
    u = updates(self, y) if u is None else u
    p = (((query or self.query)(y) * (key or self.key)(u)).sum(-1) * scale).softmax(
        over
    )
    return y + (p.unsqueeze(-1) * (value or self.value)(u)).sum(0)


class Blank(nn.Module):
    def __init__(self, experts, d):
        super().__init__()
        raise NotImplementedError


def test_module_solution():
    accepts(check.fusion_module, Fusion)

    def loop(self, y):
        said = [expert(y) for expert in self.experts]
        scores = torch.stack(
            [torch.einsum("btd,btd->bt", self.query(y), self.key(u)) for u in said], -1
        )
        return y + sum(
            p[..., None] * self.value(u)
            for p, u in zip(scores.softmax(-1).unbind(-1), said)
        )

    accepts(check.fusion_module, with_forward(loop))
    accepts(
        check.fusion_module, after_init(lambda s, e, d: nn.init.zeros_(s.key.weight))
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "would be trained too. Freeze",
            after_init(
                lambda s, e, d: setattr(
                    s,
                    "experts",
                    nn.ModuleList([expert.requires_grad_(True) for expert in e]),
                )
            ),
        ),
        (
            "saved a second time",
            after_init(lambda s, e, d: setattr(s, "experts", nn.ModuleList(e))),
        ),
        (
            "start as the identity",
            after_init(lambda s, e, d: nn.init.normal_(s.value.weight)),
        ),
        (
            "has no bias",
            after_init(lambda s, e, d: setattr(s, "value", nn.Linear(d, d))),
        ),
        (
            "I look for an nn.Linear as self.key",
            after_init(lambda s, e, d: delattr(s, "key")),
        ),
        (
            "Something else",
            after_init(lambda s, e, d: setattr(s, "extra", nn.Linear(2, 2))),
        ),
        ("residual is forgotten", with_forward(lambda s, y: Fusion.forward(s, y) - y)),
        (
            "attention is missing",
            with_forward(lambda s, y: y + s.value(updates(s, y)).mean(0)),
        ),
        (
            "Query and key have biases",
            after_init(
                lambda s, e, d: setattr(s, "query", nn.Linear(d, d, bias=False))
            ),
        ),
        (
            "cut the way",
            with_forward(lambda s, y: attend(s, y, updates(s, y).detach())),
        ),
        ("softmax is over the tokens", with_forward(lambda s, y: attend(s, y, over=2))),
        ("softmax is over the rows", with_forward(lambda s, y: attend(s, y, over=1))),
        (
            "does not scale them",
            with_forward(lambda s, y: attend(s, y, scale=y.shape[-1] ** -0.5)),
        ),
        (
            "Query and key are swapped",
            with_forward(lambda s, y: attend(s, y, query=s.key, key=s.query)),
        ),
        ("in it twice", with_forward(lambda s, y: attend(s, y) + y)),
        (
            "do not pass through `value`",
            with_forward(lambda s, y: attend(s, y, value=lambda u: u)),
        ),
        ("Only one expert", with_forward(lambda s, y: y + s.value(updates(s, y))[0])),
        ("is there a `return`", with_forward(lambda s, y: None)),
        ("nothing here yet", Blank),
    ],
)
def test_module_mistakes(says, answer):
    rejects(says, check.fusion_module, answer)


# ----------------------------------------------------------------------- fusion_penalty


def eye(W):
    return torch.eye(len(W)).to(W)


def test_penalty_solution():
    accepts(check.fusion_penalty, lambda W, s: s * (W - eye(W)).square().sum())
    accepts(
        check.fusion_penalty, lambda W, s: s * torch.linalg.matrix_norm(W - eye(W)) ** 2
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("pull W_v to zero", lambda W, s: s * W.square().sum()),
        ("mean of the squares", lambda W, s: s * (W - eye(W)).square().mean()),
        ("not squared", lambda W, s: s * (W - eye(W)).norm()),
        ("squares are wanted", lambda W, s: s * (W - eye(W)).abs().sum()),
        ("strength is missing", lambda W, s: (W - eye(W)).square().sum()),
        ("half", lambda W, s: s * (W - eye(W)).square().sum() / 2),
        ("ones on the diagonal only", lambda W, s: s * (W - 1).square().sum()),
        ("diagonal only", lambda W, s: s * (W - eye(W)).diagonal().square().sum()),
        ("strength is squared too", lambda W, s: (s * (W - eye(W))).square().sum()),
        ("sum them", lambda W, s: s * (W - eye(W)) ** 2),
        ("lost touch with", lambda W, s: s * (W - eye(W)).square().sum().item()),
        ("lost touch with", lambda W, s: s * (W.detach() - eye(W)).square().sum()),
        ("nothing here yet", stub),
    ],
)
def test_penalty_mistakes(says, answer):
    rejects(says, check.fusion_penalty, answer)


# ------------------------------------------------------------------------ whom_it_hears


def test_hears_solution():
    accepts(check.whom_it_hears, lambda p, mask: p[mask.bool()].mean(0))
    accepts(
        check.whom_it_hears,
        lambda p, mask: (
            torch.where(mask.bool()[..., None], p, 0).sum((0, 1)) / mask.sum()
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("padding too", lambda p, mask: p.mean((0, 1))),
        ("all places", lambda p, mask: (p * mask[..., None]).mean((0, 1))),
        (
            "rows' means",
            lambda p, mask: (
                (p * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            ).mean(0),
        ),
        ("give the sum", lambda p, mask: (p * mask[..., None]).sum((0, 1))),
        ("drop the text", lambda p, mask: p[~mask.bool()].mean(0)),
        (
            "largest share",
            lambda p, mask: (
                torch.nn.functional.one_hot(p.argmax(-1), 4)[mask.bool()]
                .double()
                .mean(0)
            ),
        ),
        ("takes rows 0 and 1", lambda p, mask: p[mask].mean(0)),
        ("takes rows 0 and 1", lambda p, mask: p[mask].mean((0, 1, 2))),
        ("average over the tokens", lambda p, mask: p[mask.bool()].mean(-1)),
        ("number of rows", lambda p, mask: (p * mask[..., None]).sum((0, 1)) / len(p)),
        (
            "rows are left",
            lambda p, mask: (p * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
        ),
        (
            "nan times 0 is nan",
            lambda p, mask: torch.einsum("btn,bt->n", p, mask.to(p)) / mask.sum(),
        ),
        ("is there a `return`", lambda p, mask: None),
        ("nothing here yet", stub),
    ],
)
def test_hears_mistakes(says, answer):
    rejects(says, check.whom_it_hears, answer)


# ----------------------------------------------------------------------- predict_shares


def shares_of(share):
    odds = share / ((1 - share) / 2)

    def f(o):
        return o / (o + 2)

    return {
        "listed twice": odds / (2 * odds + 2),
        "query doubled": f(odds**2),
        "key bias": share,
        "update doubled": f(odds**2),
        "its part then": 2 * f(odds**2) / share,
        "silenced": 1 / 3,
        "divided by 4": f(odds**0.25),
    }


SHARES = shares_of(0.5)


def test_predict_shares_right_answers():
    accepts(check.predict_shares, SHARES)
    accepts(check.predict_shares, {k: np.float32(v) for k, v in SHARES.items()}, 0.5)
    accepts(check.predict_shares, {k: round(v, 2) for k, v in reversed(SHARES.items())})
    accepts(check.predict_shares, shares_of(0.6), 0.6)
    accepts(check.predict_shares, shares_of(2 / 3), 2 / 3)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", [0.5]),
        ("no prediction for", {k: v for k, v in SHARES.items() if k != "silenced"}),
        ("expected a number", SHARES | {"key bias": "1/2"}),
        ("one more entry", SHARES | {"listed twice": 0.5}),
        ("one more entry", SHARES | {"listed twice": 0.25}),
        ("odds are squared", SHARES | {"query doubled": 0.5}),
        ("odds are squared", SHARES | {"query doubled": 1.0}),
        ("added to all scores alike", SHARES | {"key bias": 0.6}),
        ("score doubles", SHARES | {"update doubled": 0.5}),
        ("share times update", SHARES | {"its part then": 2.0}),
        ("still gives it a share", SHARES | {"silenced": 0.0}),
        ("fourth root", SHARES | {"divided by 4": 0.125}),
    ],
)
def test_predict_shares_mistakes(says, answer):
    rejects(says, check.predict_shares, answer)


# ----------------------------------------------------------------------- fewest_experts


def behind(losses_of, chosen, names):
    return compare(losses_of(chosen), losses_of(names), loss=True).verdict == "behind"


def mean(values):
    return sum(values) / len(values)


def fewest(names, losses_of):
    for size in range(1, len(names) + 1):
        good = [
            list(chosen)
            for chosen in combinations(names, size)
            if not behind(losses_of, list(chosen), names)
        ]
        if good:
            return min(good, key=lambda chosen: mean(losses_of(chosen)))


def by_bits(names, losses_of):
    """Another style: all sets at once, sorted."""
    sets = [
        {name for i, name in enumerate(names) if bits >> i & 1}
        for bits in range(1, 2 ** len(names))
    ]
    sets.sort(key=lambda chosen: (len(chosen), np.mean(losses_of(chosen))))
    return next(chosen for chosen in sets if not behind(losses_of, chosen, names))


def one_at_a_time(names, losses_of):
    return [
        name
        for name in names
        if behind(losses_of, [other for other in names if other != name], names)
    ]


def all_sets(names):
    for size in range(1, len(names) + 1):
        yield from map(list, combinations(names, size))


def test_fewest_right_answers():
    accepts(check.fewest_experts, fewest)
    accepts(check.fewest_experts, by_bits)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", stub),
        ("is there a `return`", lambda names, losses_of: None),
        ("a list or a set of names", lambda names, losses_of: names[0]),
        ("losses_of takes a list", lambda names, losses_of: losses_of(names[0])),
        ("losses_of takes a list", lambda names, losses_of: losses_of([])),
        ("one expert at a time", one_at_a_time),
        (
            "lowest mean loss. The question",
            lambda names, losses_of: min(
                all_sets(names), key=lambda chosen: mean(losses_of(chosen))
            ),
        ),
        (
            "higher by chance is no reason",
            lambda names, losses_of: min(
                (
                    chosen
                    for chosen in all_sets(names)
                    if mean(losses_of(chosen)) <= mean(losses_of(names))
                ),
                key=lambda chosen: (len(chosen), mean(losses_of(chosen))),
            ),
        ),
        (
            "name those that are needed",
            lambda names, losses_of: {*names} - {*fewest(names, losses_of)},
        ),
        ("and so will fewer", lambda names, losses_of: names),
        ("really behind", lambda names, losses_of: fewest(names, losses_of)[:1]),
        (
            "another has a lower mean",
            lambda names, losses_of: max(
                (
                    chosen
                    for chosen in all_sets(names)
                    if len(chosen) == len(fewest(names, losses_of))
                    and not behind(losses_of, chosen, names)
                ),
                key=lambda chosen: mean(losses_of(chosen)),
            ),
        ),
    ],
)
def test_fewest_mistakes(says, answer):
    rejects(says, check.fewest_experts, answer)


# ------------------------------------------------------------- what learners also wrote


def mixed(y, u, q, k, v, shares=None, u_out=None):
    """The equation with other shares: a function of the scores (N, B, T)."""
    scores = ((y @ q.T) * (u @ k.T)).sum(-1)
    p = scores.softmax(0) if shares is None else shares(scores)
    return y + (p.unsqueeze(-1) * (u @ v.T)).sum(0)


def not_behind(losses_of, some, names):
    return compare(losses_of(some), losses_of(names), loss=True).verdict != "behind"


def one_after_the_other(names, losses_of):
    """Silence the expert whose loss is missed least, as long as the rest will do."""
    kept = list(names)
    while len(kept) > 1:
        fewer = [[n for n in kept if n != name] for name in kept]
        fewer = [some for some in fewer if not_behind(losses_of, some, names)]
        if not fewer:
            break
        kept = min(fewer, key=lambda some: sum(losses_of(some)))
    return kept


def one_more_each_time(names, losses_of):
    kept = []
    while not kept or not not_behind(losses_of, kept, names):
        more = [[*kept, name] for name in names if name not in kept]
        kept = min(more, key=lambda some: sum(losses_of(some)))
    return kept


def fewest_by(key):
    """The smallest sets, told apart by something else than the mean."""

    def answer(names, losses_of):
        for size in range(1, len(names) + 1):
            sets = [list(some) for some in combinations(names, size)]
            good = [some for some in sets if not_behind(losses_of, some, names)]
            if good:
                return min(good, key=lambda some: key(losses_of(some)))
        return list(names)

    return answer


def test_the_fewest_by_the_mean():
    accepts(check.fewest_experts, fewest_by(sum))


@pytest.mark.parametrize(
    "name, says, answer",
    [
        (
            "whom_it_hears",
            "first tokens of each row",
            lambda p, mask: torch.cat([r[: m.sum()] for r, m in zip(p, mask)]).mean(0),
        ),
        ("whom_it_hears", "median", lambda p, m: p[m.bool()].median(0).values),
        (
            "fuse",
            "contains nan",
            lambda *a: mixed(*a, lambda s: s.exp() / s.exp().sum(0)),
        ),
        (
            "fuse",
            "contains nan",
            lambda *a: (
                mixed(*a, lambda s: 2**s / (2**s).sum(0))
                if a[0].abs().max() > 50
                else mixed(*a)
            ),
        ),
        ("fuse", "a sigmoid", lambda *a: mixed(*a, torch.sigmoid)),
        (
            "fuse",
            "everything at once",
            lambda *a: mixed(*a, lambda s: s.flatten().softmax(0).view_as(s)),
        ),
        ("fuse", "W_v is transposed", lambda y, u, q, k, v: solution(y, u, q, k, v.T)),
        ("fuse", "W_q is transposed", lambda y, u, q, k, v: solution(y, u, q.T, k, v)),
        ("fuse", "made with W_v", lambda y, u, q, k, v: solution(y, u, q, v, v)),
        ("fewest_experts", "so will fewer", one_after_the_other),
        ("fewest_experts", "so will fewer", one_more_each_time),
        ("fewest_experts", "a lower mean", fewest_by(min)),
        ("fewest_experts", "a lower mean", fewest_by(lambda x: x[0])),
        ("fewest_experts", "a lower mean", fewest_by(lambda x: sorted(x)[1])),
        ("fewest_experts", "a lower mean", fewest_by(lambda x: x[-1])),
        ("fewest_experts", "a lower mean", fewest_by(lambda x: 0)),
        ("fewest_experts", "stands twice", lambda n, l: 2 * fewest_by(sum)(n, l)),
        (
            "fusion_penalty",
            "not in the precision",
            lambda W, s: s * (W - torch.eye(len(W))).square().sum(),
        ),
        (
            "fusion_penalty",
            "not in the precision",
            lambda W, s: s * (W.float() - torch.eye(len(W))).square().sum(),
        ),
        (
            "fusion_penalty",
            "not in the precision",
            lambda W, s: s * (W.double() - torch.eye(len(W)).double()).square().sum(),
        ),
        (
            "fusion_penalty",
            "beside the diagonal",
            lambda W, s: s * (W - W.diagonal().diag()).square().sum(),
        ),
        (
            "fusion_module",
            "right shape, but differs",
            after_init(lambda s, e, d: setattr(s, "experts", list(e)[:3])),
        ),
        (
            "fusion_module",
            "after .eval() is what the formula gives when the term",
            with_forward(lambda s, y: attend(s, y) if s.training else y),
        ),
        (
            "fusion_module",
            "change y in place",
            with_forward(lambda s, y: y.copy_(attend(s, y))),
        ),
    ],
)
def test_what_learners_wrote(name, says, answer):
    rejects(says, getattr(check, name), answer)


def test_two_decimals_are_asked_for():
    rejects(
        "0.36, which is too small",
        check.predict_shares,
        SHARES | {"divided by 4": 0.36},
    )
    rejects(
        "0.52, which is too large", check.predict_shares, SHARES | {"key bias": 0.52}
    )
    rejects("is not one of", check.predict_shares, SHARES | {"key": 0.5})


# ---------------------------------------------- what a second trial by learners found


def top_down(names, losses_of):
    level = [tuple(names)]
    while True:
        below = {s for one in level for s in combinations(one, len(one) - 1) if s}
        good = [one for one in below if not behind(losses_of, list(one), names)]
        if not good:
            return min(level, key=lambda one: mean(losses_of(list(one))))
        level = good


def by_sorted_losses(names, losses_of):
    return fewest(names, lambda some: sorted(losses_of(some)))


def alone_as_it_is(y, u, q, k, v):
    return y + u[0] if len(u) == 1 else solution(y, u, q, k, v)


def without_silent_ones(y, u, q, k, v):
    def shares(scores):
        silent = (u == 0).all(-1)
        return scores.masked_fill(silent, float("-inf")).softmax(0).nan_to_num()

    return mixed(y, u, q, k, v, shares)


class Closed(Fusion):
    def __init__(self, experts, d):
        super().__init__(experts, d)
        self.run = lambda y: Fusion.forward(self, y)

    def forward(self, y):
        return self.run(y)


def silent(module, experts, d):
    for p in (*module.query.parameters(), *module.key.parameters()):
        nn.init.zeros_(p)


@pytest.mark.parametrize(
    "name, says, answer",
    [
        ("fewest_experts", "a far smaller one may", top_down),
        ("fewest_experts", "belongs to its seed", by_sorted_losses),
        ("fuse", "do not pass through W_v", alone_as_it_is),
        ("fuse", "a score like any other", without_silent_ones),
        (
            "whom_it_hears",
            "each token counts",
            lambda p, m: p[m.bool()].unique(dim=0).mean(0),
        ),
        (
            "fusion_penalty",
            "no slope at zero",
            lambda W, s: s * (W - eye(W)).square().sum().sqrt() ** 2,
        ),
        (
            "fusion_penalty",
            "strength of zero",
            lambda W, s: s and s * (W - eye(W)).square().sum(),
        ),
        (
            "fusion_module",
            "one and the same layer",
            after_init(lambda s, e, d: setattr(s, "key", s.query)),
        ),
        ("fusion_module", "neither of them ever gets a gradient", after_init(silent)),
        (
            "fusion_module",
            "`value` too",
            with_forward(
                lambda s, y: (
                    y + updates(s, y)[0] if len(s.experts) == 1 else attend(s, y)
                )
            ),
        ),
        ("fusion_module", "A copy of it", Closed),
    ],
)
def test_what_more_learners_wrote(name, says, answer):
    rejects(says, getattr(check, name), answer)
