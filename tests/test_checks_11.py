"""Chapter 11's checks accept the solution, refuse the blank stub, and name the mistake
in what is plausibly wrong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import accepts, judge, rejects
from torch import nn

from minipeft import Adapter
from minipeft.course import check, compare


def stub(*args):
    raise NotImplementedError


# ------------------------------------------------------------------- sequential_adapter


def test_sequential_solution():
    accepts(
        check.sequential_adapter,
        lambda h, D, b, U, c, act: h + act(h @ D.T + b) @ U.T + c,
    )
    accepts(
        check.sequential_adapter,
        lambda h, D, b, U, c, act: F.linear(act(F.linear(h, D, b)), U, c).add(h),
    )
    accepts(
        check.sequential_adapter,
        lambda h, D, b, U, c, act: (
            torch.einsum("dm,...m->...d", U, act((D @ h[..., None])[..., 0] + b))
            + h
            + c
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "residual is forgotten",
            lambda h, D, b, U, c, act: act(h @ D.T + b) @ U.T + c,
        ),
        (
            "after the up-projection: it belongs in the middle",
            lambda h, D, b, U, c, act: h + act((h @ D.T + b) @ U.T + c),
        ),
        ("no activation", lambda h, D, b, U, c, act: h + (h @ D.T + b) @ U.T + c),
        (
            "before the down-projection",
            lambda h, D, b, U, c, act: h + (act(h) @ D.T + b) @ U.T + c,
        ),
        (
            "residual must pass untouched",
            lambda h, D, b, U, c, act: act(h + act(h @ D.T + b) @ U.T + c),
        ),
        ("Both biases", lambda h, D, b, U, c, act: h + act(h @ D.T) @ U.T),
        ("b_down is missing", lambda h, D, b, U, c, act: h + act(h @ D.T) @ U.T + c),
        ("b_up is missing", lambda h, D, b, U, c, act: h + act(h @ D.T + b) @ U.T),
        (
            "after the activation",
            lambda h, D, b, U, c, act: h + (act(h @ D.T) + b) @ U.T + c,
        ),
        ("it is added", lambda h, D, b, U, c, act: h - act(h @ D.T + b) @ U.T - c),
        (
            "lost touch with h and W_down and b_down and W_up and b_up",
            lambda h, D, b, U, c, act: (h + act(h @ D.T + b) @ U.T + c).detach(),
        ),
        (
            "no gradient reaches h:",
            lambda h, D, b, U, c, act: h.detach() + act(h.detach() @ D.T + b) @ U.T + c,
        ),
        (
            "changed `h` in place",
            lambda h, D, b, U, c, act: h.add_(act(h.clone() @ D.T + b) @ U.T + c),
        ),
        (
            "W_down and W_up have changed places",
            lambda h, D, b, U, c, act: h + act(h @ U + b) @ D + c,
        ),
        (
            "always take the same activation",
            lambda h, D, b, U, c, act: h + torch.relu(h @ D.T + b) @ U.T + c,
        ),
        (
            "always take the same activation",
            lambda h, D, b, U, c, act: h + F.gelu(h @ D.T + b) @ U.T + c,
        ),
        (
            "h goes on twice",
            lambda h, D, b, U, c, act: 2 * h + act(h @ D.T + b) @ U.T + c,
        ),
        (
            "differs from the formula",
            lambda h, D, b, U, c, act: h + 2 * act(h @ D.T + b) @ U.T + c,
        ),
        (
            "should be a tensor",
            lambda h, D, b, U, c, act: (h, act(h @ D.T + b) @ U.T + c),
        ),
        (
            "output's size comes first",
            lambda h, D, b, U, c, act: h + act(h @ D + b) @ U + c,
        ),
        ("is there a `return`", lambda h, D, b, U, c, act: None),
        ("nothing here yet", stub),
    ],
)
def test_sequential_mistakes(says, answer):
    rejects(says, check.sequential_adapter, answer)


# --------------------------------------------------------------------- parallel_adapter


class Parallel(Adapter):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, d, m, scaling):
        super().__init__()
        self.scaling = scaling
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def adapter(self, h):
        return self.up(torch.relu(self.down(h)))

    def forward(self, base, x):
        return base(x) + self.scaling * self.adapter(x)


def with_forward(forward):
    return type("Changed", (Parallel,), {"forward": forward})


def after_init(change):
    class Changed(Parallel):
        def __init__(self, d, m, scaling):
            super().__init__(d, m, scaling)
            change(self, d, m)

    return Changed


class Blank(Adapter):
    def __init__(self, d, m, scaling):
        super().__init__()
        raise NotImplementedError


class Written(Adapter):
    """Right, and written otherwise: zeros by filling, the scale on relu's output, the
    base last."""

    def __init__(self, d, m, scaling):
        super().__init__()
        self.register_buffer("s", torch.tensor(scaling))
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        with torch.no_grad():
            for p in self.up.parameters():
                p.fill_(0)

    def forward(self, base, x, *args, **kwargs):
        said = self.up(F.relu(self.down(x))).mul(self.s)
        return said + base(x, *args, **kwargs)


class SelfMade(Parallel, nn.Module):
    def forward(self, base, x):
        hidden = (x @ self.down.weight.T + self.down.bias).clamp(min=0)
        change = hidden @ self.up.weight.T + self.up.bias
        return torch.add(base(x), change, alpha=self.scaling)


def test_layer_solution():
    accepts(check.parallel_adapter, Parallel)
    accepts(check.parallel_adapter, Written)
    accepts(check.parallel_adapter, SelfMade)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "That is the sequential adapter: it reads",
            with_forward(lambda s, b, x: b(x) + s.scaling * s.adapter(b(x))),
        ),
        (
            "sequential adapter, without the scale",
            with_forward(lambda s, b, x: b(x) + s.adapter(b(x))),
        ),
        ("The scale is missing", with_forward(lambda s, b, x: b(x) + s.adapter(x))),
        (
            "The whole sum is scaled",
            with_forward(
                lambda s, b, x: (
                    (b(x) + s.adapter(x)) * (s.scaling if s.up.weight.any() else 1)
                )
            ),
        ),
        (
            "must give exactly what the part gives; it does not",
            with_forward(lambda s, b, x: s.scaling * s.adapter(x)),
        ),
        (
            "residual stream around this layer",
            with_forward(lambda s, b, x: x + b(x) + s.scaling * s.adapter(x)),
        ),
        (
            "relu between down and up",
            with_forward(lambda s, b, x: b(x) + s.scaling * s.up(s.down(x))),
        ),
        ("never reaches", with_forward(lambda s, b, x: b(x))),
        (
            "divide by the scale",
            with_forward(lambda s, b, x: b(x) + s.adapter(x) / s.scaling),
        ),
        (
            "scale misses up's bias",
            with_forward(
                lambda s, b, x: b(x) + s.up(s.scaling * torch.relu(s.down(x)))
            ),
        ),
        (
            "relu comes after up",
            with_forward(
                lambda s, b, x: b(x) + s.scaling * torch.relu(s.up(s.down(x)))
            ),
        ),
        (
            "another activation",
            with_forward(lambda s, b, x: b(x) + s.scaling * s.up(F.gelu(s.down(x)))),
        ),
        (
            "gradient that goes down to x",
            with_forward(lambda s, b, x: b(x).detach() + s.scaling * s.adapter(x)),
        ),
        (
            "gradient that goes down to x",
            with_forward(lambda s, b, x: b(x) + s.scaling * s.adapter(x.detach())),
        ),
        (
            "scaling is trained too",
            after_init(
                lambda s, d, m: setattr(
                    s, "scaling", nn.Parameter(torch.tensor(s.scaling))
                )
            ),
        ),
        ("is there a `return`", with_forward(lambda s, b, x: None)),
        (
            "make up's weight and bias zero",
            after_init(lambda s, d, m: nn.init.normal_(s.up.weight)),
        ),
        (
            "make up's weight and bias zero",
            after_init(lambda s, d, m: nn.init.normal_(s.up.bias)),
        ),
        ("both zero", after_init(lambda s, d, m: nn.init.zeros_(s.down.weight))),
        (
            "own parameters are frozen",
            after_init(lambda s, d, m: s.requires_grad_(False)),
        ),
        (
            "swapped",
            after_init(
                lambda s, d, m: (
                    setattr(s, "down", nn.Linear(m, d)),
                    setattr(s, "up", nn.Linear(d, m)),
                )
            ),
        ),
        (
            "this is no LoRA",
            after_init(lambda s, d, m: setattr(s, "down", nn.Linear(d, m, bias=False))),
        ),
        ("there is none", after_init(lambda s, d, m: delattr(s, "down"))),
        (
            "more is trained too",
            after_init(
                lambda s, d, m: setattr(s, "more", nn.Parameter(torch.zeros(1)))
            ),
        ),
        ("a subclass of Adapter", nn.Linear),
        ("nothing here yet", Blank),
    ],
)
def test_layer_mistakes(says, answer):
    rejects(says, check.parallel_adapter, answer)


# ---------------------------------------------------------------------- predict_changes

RIGHT = {
    "W_up zero": 2,
    "both zero": 1,
    "both zero, sigmoid": 2,
    "W_down zero": 1,
    "W_down zero, tanh": 3,
    "both random": 4,
    "W_up zero, h detached": 2,
}


def test_predict_changes_solution():
    accepts(check.predict_changes, RIGHT)
    accepts(
        check.predict_changes,
        {case: np.int64(RIGHT[case]) for case in sorted(RIGHT)},
        steps=1,
    )
    two = {case: 1 if RIGHT[case] == 1 else 4 for case in RIGHT}
    accepts(check.predict_changes, two, steps=2)
    rejects("after 2 steps it is another", check.predict_changes, RIGHT, steps=2)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", [2, 1, 2, 1, 3, 4, 2]),
        ("There is no prediction for", {"W_up zero": 2}),
        ("until W_up has moved", RIGHT | {"W_up zero": 4}),
        ("until W_up has moved", RIGHT | {"W_up zero": 1}),
        ("b_up alone will ever change", RIGHT | {"both zero": 0}),
        ("sigmoid(0) is ½", RIGHT | {"both zero, sigmoid": 1}),
        ("0 as relu's slope", RIGHT | {"W_down zero": 3}),
        ("slope 1 at 0", RIGHT | {"W_down zero, tanh": 1}),
        ("slope 1 at 0", RIGHT | {"W_down zero, tanh": 4}),
        ("nothing is zero", RIGHT | {"both random": 2}),
        ("do not notice", RIGHT | {"W_up zero, h detached": 0}),
        ("a number from 0 to 4", RIGHT | {"both random": "all"}),
        ("a number from 0 to 4", RIGHT | {"both random": 7}),
    ],
)
def test_predict_changes_mistakes(says, answer):
    rejects(says, check.predict_changes, answer)


# --------------------------------------------------------------------- choose_placement


def placing(
    houlsby=2,
    biases=True,
    edges=True,
    by="valid",
    budgeted=True,
    pick=1,
    turned=False,
    word=True,
    best_rate=min,
):
    def function(cases, budget):
        allowed = {}
        for name, case in cases.items():
            d, m, valid = case["d"], case["m"], case["valid"]
            adapters = houlsby if case["placement"] == "houlsby" else 1
            numbers = 2 * d * m + ((m + d) if biases else 0)
            rate = min(valid, key=valid.get)
            inside = min(valid) < rate < max(valid) or not edges
            small = case["layers"] * adapters * numbers <= budget or not budgeted
            if inside and small:
                allowed[name] = sum(case["test"]) if by == "test" else valid[rate]
        order = sorted(allowed, key=allowed.get)
        best, valid = order[0], cases[order[0]]["valid"]
        pair = [cases[name]["test"] for name in (best, order[pick])]
        result = compare(*(pair[::-1] if turned else pair), loss=True)
        rate = best_rate(valid, key=valid.get)
        return best, rate, result.verdict if word else result

    return function


def test_choose_placement_solution():
    accepts(check.choose_placement, placing())
    accepts(check.choose_placement, placing(), against="second")
    accepts(check.choose_placement, placing(pick=-1), against="worst")
    accepts(check.choose_placement, lambda *given: list(placing()(*given)))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", stub),
        ("the best of all, and it may be too large", placing(budgeted=False)),
        ("two adapters in each block", placing(houlsby=1)),
        ("m + d numbers more", placing(biases=False)),
        ("is the lowest or the highest that was tried", placing(edges=False)),
        ("You choose on the test", placing(by="test")),
        ("the second best of those", placing(pick=-1)),
        ("turned round", placing(turned=True)),
        ("The verdict is a word", placing(word=False)),
        ("You return the rate", placing(best_rate=max)),
        ("three things", lambda *given: "a"),
        ("The name is one of", lambda *given: ("x", 0.01, "ahead")),
        ("gives None", lambda *given: None),
    ],
)
def test_choose_placement_mistakes(says, answer):
    rejects(says, check.choose_placement, answer)


# ------------------------------------------------------------------ fold_linear_adapter


def fold(W, b, D, c, U, e):
    step = U @ D
    return W + step @ W, b + step @ b + U @ c + e


def by_probing(W, b, D, c, U, e):
    """What the two do to zero is the bias; what they do to unit vectors, the weight."""

    def both(x):
        return (y := F.linear(x, W, b)) + F.linear(F.linear(y, D, c), U, e)

    zero = torch.zeros(W.shape[1], dtype=W.dtype)
    return (both(torch.eye(W.shape[1], dtype=W.dtype)) - both(zero)).T, both(zero)


def test_fold_solution():
    accepts(check.fold_linear_adapter, fold)
    accepts(check.fold_linear_adapter, by_probing)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "so W stays in the sum",
            lambda W, b, D, c, U, e: (U @ D @ W, fold(W, b, D, c, U, e)[1]),
        ),
        ("has to be in it", lambda W, b, D, c, U, e: (W, fold(W, b, D, c, U, e)[1])),
        ("down is met first", lambda W, b, D, c, U, e: (W + (U @ D).T @ W, b)),
        ("it is added", lambda W, b, D, c, U, e: (W - U @ D @ W, b)),
        (
            "passes through the adapter too",
            lambda W, b, D, c, U, e: (W + U @ D @ W, b + U @ c + e),
        ),
        (
            "b itself is missing",
            lambda W, b, D, c, U, e: (W + U @ D @ W, fold(W, b, D, c, U, e)[1] - b),
        ),
        (
            "go through W_up",
            lambda W, b, D, c, U, e: (W + U @ D @ W, b + U @ D @ b + e),
        ),
        (
            "b_up is missing",
            lambda W, b, D, c, U, e: (W + U @ D @ W, fold(W, b, D, c, U, e)[1] - e),
        ),
        ("bias is as it was", lambda W, b, D, c, U, e: (W + U @ D @ W, b)),
        (
            "Only the adapter's biases",
            lambda W, b, D, c, U, e: (W + U @ D @ W, U @ c + e),
        ),
        ("Two shapes do not fit", lambda W, b, D, c, U, e: (W + U @ D, b)),
        (
            "Two shapes do not fit",
            lambda W, b, D, c, U, e: (W + U @ D @ W, b + U @ D @ b + c + e),
        ),
        ("W_new has the shape", lambda W, b, D, c, U, e: fold(W, b, D, c, U, e)[::-1]),
        (
            "W_new has the shape",
            lambda W, b, D, c, U, e: (fold(W, b, D, c, U, e)[0].T, b),
        ),
        ("Give me two tensors", lambda W, b, D, c, U, e: W + U @ D @ W),
        ("Two shapes do not fit", lambda W, b, D, c, U, e: (W + W @ U @ D, b)),
        ("in place", lambda W, b, D, c, U, e: (W.add_(U @ D @ W), b)),
        ("nothing here yet", stub),
    ],
)
def test_fold_mistakes(says, answer):
    rejects(says, check.fold_linear_adapter, answer)


# ------------------------------------------------------- what a trial by learners found


def test_square_layers_tell_orders_apart():
    def without_W(W, b, D, c, U, e):
        weight, bias = fold(W, b, D, c, U, e)
        return (W + U @ D if W.shape[0] == W.shape[1] else weight), bias

    def turned(W, b, D, c, U, e):
        weight, bias = fold(W, b, D, c, U, e)
        return (W + W @ U @ D if W.shape[0] == W.shape[1] else weight), bias

    rejects("W is missing beside", check.fold_linear_adapter, without_W)
    rejects("The order is turned", check.fold_linear_adapter, turned)


def flat(look):
    """A case is judged by a look at all its rates."""

    def answer(cases, budget):
        seen = {}
        for name, case in cases.items():
            rate = min(case["valid"], key=case["valid"].get)
            seen[name] = case | {"valid": dict(case["valid"])}
            seen[name]["valid"][rate] = look(list(case["valid"].values())) - 1
        name, rate, verdict = placing()(seen, budget)
        return name, rate, verdict

    return answer


def test_a_case_counts_at_its_best_rate():
    for look in (max, lambda losses: sum(losses) / len(losses)):
        rejects("look at all rates", check.choose_placement, flat(look))


def test_rates_come_in_no_order():
    def as_they_come(cases, budget):
        allowed = {}
        for name, case in cases.items():
            rates = list(case["valid"])
            best = min(rates, key=case["valid"].get)
            if best not in (rates[0], rates[-1]):
                allowed[name] = case
        if len(allowed) < 2:
            return None
        return placing()(allowed, budget)

    for verdict in judge(check.choose_placement, as_they_come):
        assert not verdict


def test_training_and_evaluation_and_nothing_random():
    def in_training(self, base, x):
        return Parallel.forward(self, base, x) if self.training else base(x)

    def dropping(self, base, x):
        return base(x) + self.scaling * F.dropout(self.adapter(x), 0.5)

    rejects("In evaluation", check.parallel_adapter, with_forward(in_training))
    for verdict in judge(check.parallel_adapter, with_forward(dropping)):
        assert not verdict


# ----------------------------------------------- what a second trial by learners found


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "has the shape",
            lambda h, D, b, U, c, act: (h + act(h @ D.T + b) @ U.T + c).squeeze(),
        ),
        (
            "W_up is turned",
            lambda h, D, b, U, c, act: (
                h + act(h @ D.T + b) @ (U if len(D) == len(U) else U.T) + c
            ),
        ),
        (
            "W_down is turned",
            lambda h, D, b, U, c, act: (
                h + act(h @ (D if len(D) == len(U) else D.T) + b) @ U.T + c
            ),
        ),
        (
            "always take the same activation",
            lambda h, D, b, U, c, act: (
                h + (torch.relu if act is F.gelu else act)(h @ D.T + b) @ U.T + c
            ),
        ),
        (
            "Under torch.no_grad()",
            lambda h, D, b, U, c, act: (
                h + act(h @ D.T + b) @ U.T + c if torch.is_grad_enabled() else h
            ),
        ),
    ],
)
def test_sequential_shapes_and_modes(says, answer):
    rejects(says, check.sequential_adapter, answer)


class Equal(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


def test_a_number_is_compared_as_a_number():
    rejects("is another number", check.predict_changes, {k: Equal(3) for k in RIGHT})


def against(worst, seeds=None, **options):
    """The solution, but for the case that is compared with the chosen one."""

    def answer(cases, budget):
        name, rate, _ = placing(pick=-1)(cases, budget)
        other = worst(cases, budget)
        pair = [cases[one]["test"][:seeds] for one in (name, other)]
        return name, rate, compare(*pair, loss=True, **options).verdict

    return answer


def worst_by(look=min, among=lambda case, budget: True):
    def worst(cases, budget):
        names = [name for name, case in cases.items() if among(case, budget)]
        return max(names, key=lambda name: look(cases[name]["valid"].values()))

    return worst


def is_allowed(case, budget, edges=True):
    valid, adapters = case["valid"], 2 if case["placement"] == "houlsby" else 1
    d, m = case["d"], case["m"]
    small = case["layers"] * adapters * (2 * d * m + m + d) <= budget
    rate = min(valid, key=valid.get)
    return small and (not edges or min(valid) < rate < max(valid))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("those that are *allowed*", against(worst_by())),
        (
            "those that are *allowed*",
            against(worst_by(among=lambda *given: is_allowed(*given, edges=False))),
        ),
        ("at its *best* rate", against(worst_by(max, is_allowed))),
        ("in pairs", against(worst_by(among=is_allowed), paired=False)),
        ("the worst of those", against(worst_by(among=is_allowed), seeds=3)),
    ],
)
def test_the_worst_case_is_one_that_is_allowed(says, answer):
    accepts(
        check.choose_placement, against(worst_by(among=is_allowed)), against="worst"
    )
    rejects(says, check.choose_placement, answer, against="worst")


@pytest.mark.parametrize("key", ["d", "layers"])
def test_each_case_has_its_own_size(key):
    def answer(cases, budget):
        one = min(case[key] for case in cases.values())
        return placing()({n: case | {key: one} for n, case in cases.items()}, budget)

    rejects("each has its own", check.choose_placement, answer)


LINEARS = {}


class Shared(Parallel):
    def __init__(self, d, m, scaling):
        super().__init__(d, m, scaling)
        self.up = LINEARS.setdefault((d, m), self.up)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)


class OfTheClass(Parallel):
    def __init__(self, d, m, scaling):
        super().__init__(d, m, scaling)
        del self.scaling
        OfTheClass.scaling = scaling


class OnACopy(Parallel):
    def __init__(self, d, m, scaling):
        super().__init__(d, m, scaling)
        self.change = lambda x: self.scaling * self.adapter(x)

    def forward(self, base, x):
        return base(x) + self.change(x)


class AtTheFirstCall(Parallel):
    begun = False

    def forward(self, base, x):
        if not self.begun:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
            self.begun = True
        return super().forward(base, x)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("share their parameters", Shared),
        ("not on the class", OfTheClass),
        ("A copy of it", OnACopy),
        ("loaded into a new adapter", AtTheFirstCall),
        (
            "keeps its axes",
            with_forward(lambda s, b, x: Parallel.forward(s, b, x).squeeze(0)),
        ),
        (
            "another precision",
            with_forward(lambda s, b, x: Parallel.forward(s, b, x).float()),
        ),
        (
            "base(x) twice",
            with_forward(lambda s, b, x: Parallel.forward(s, b, x) + 0 * b(x)),
        ),
    ],
)
def test_an_adapter_lives_in_a_model(says, answer):
    rejects(says, check.parallel_adapter, answer)


def test_a_scale_is_no_whole_number():
    def rounded(self, d, m):
        self.scaling = int(self.scaling)

    for verdict in judge(check.parallel_adapter, after_init(rounded)):
        assert not verdict
