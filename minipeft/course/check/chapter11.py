"""Chapter 11, bottleneck adapters: the faults in an equation, which tensors learn, the
one kind that can be merged, a place under a budget, and the parallel adapter."""

import copy
import random

import torch
import torch.nn.functional as F
from torch import nn

from ... import Adapter, get_peft_model
from ...lm import GPT, GPTConfig
from ..comparison import compare as told_apart
from .kinds import Choices, check_life, configured
from .practice import fit, written
from .slips import Formula
from .teacher import checks, compare, need, same

__all__ = [
    "choose_placement",
    "fold_linear_adapter",
    "parallel_adapter",
    "predict_changes",
    "sequential_adapter",
]

SHAPES = (
    "h is (…, d), W_down (m, d), W_up (d, m): as in nn.Linear the output's size comes"
    " first, so h meets W_down as h @ W_down.T."
)


def draw(m=None):
    """d, m, and double-precision weights of an adapter; m = 0: as wide as d."""
    d = random.randint(9, 13)
    m = random.choice([2, 3, 5]) if m is None else m or d

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return d, m, randn(m, d), randn(m), randn(d, m), randn(d)


# ---- 1. the faults in an equation ----------------------------------------------------


def bottleneck(h, W_down, b_down, W_up, b_up, act):
    return h + act(h @ W_down.T + b_down) @ W_up.T + b_up


def slips_of_sequential(got, h, down, b_down, up, b_up, act) -> dict:
    z = h @ down.T + b_down
    a = act(z) @ up.T + b_up
    normalised = F.layer_norm(h, h.shape[-1:])
    square = len(down) == len(up)
    others = [f for f in (torch.relu, torch.tanh, F.gelu, F.silu) if f is not act]
    bent = [h + other(z) @ up.T + b_up for other in others]
    return {
        "The residual is forgotten: what the frozen part computed, h, must go on too."
        " An adapter of zeros would now silence it.": a,
        "The activation comes after the up-projection: it belongs in the middle,"
        " between the two.": h + act(z @ up.T + b_up),
        "There is no activation: two linear maps in a row are one linear map, of low"
        " rank.": h + z @ up.T + b_up,
        "The activation comes before the down-projection: it belongs after it.": (
            h + (act(h) @ down.T + b_down) @ up.T + b_up
        ),
        "You apply the activation to the sum as well: the residual must pass"
        " untouched.": act(h + a),
        "Both biases are missing.": h + act(h @ down.T) @ up.T,
        "b_down is missing.": h + act(h @ down.T) @ up.T + b_up,
        "b_up is missing.": h + act(z) @ up.T,
        "b_down is added after the activation: it belongs inside.": (
            h + (act(h @ down.T) + b_down) @ up.T + b_up
        ),
        "You subtract the adapter: it is added.": h - a,
        "h goes on twice.": 2 * h + a,
        "The residual is forgotten, and the activation stands at the end: it belongs"
        " between the two matrices.": act(z @ up.T + b_up),
        "The activation stands around everything: it belongs between the two matrices"
        " alone.": act(h + z @ up.T + b_up),
        "A second activation follows W_up: there is one, in the middle.": h + act(a),
        "You normalise h first: the adapter reads it as it is.": (
            h + act(normalised @ down.T + b_down) @ up.T + b_up
        ),
        "W_down and W_up have changed places: their shapes fit that way round without a"
        " .T, but W_down is (m, d), and down comes first: h @ W_down.T.": (
            h + act(h @ up + b_down) @ down + b_up
        ),
        "W_up is turned: where m is d it fits either way round, but W_up is (d, m).": (
            h + act(z) @ up + b_up if square else None
        ),
        "W_down is turned: where m is d it fits either way round, but W_down is (m,"
        " d).": h + act(h @ down + b_down) @ up.T + b_up if square else None,
        "You always take the same activation: it is given to you, as `act`.": (
            next((wrong for wrong in bent if same(got, wrong)), None)
        ),
    }


@checks(
    "Down, activation, up, and back onto what came in; every gradient arrives.", SHAPES
)
def sequential_adapter(function) -> None:
    """function(h, W_down, b_down, W_up, b_up, act) -> (..., d), what goes on from the
    place where h was."""
    draws = (torch.relu, (3, 4), None), (torch.tanh, (1, 1), None), (F.gelu, (5,), 0)
    for act, rows, width in draws:
        d, _, *weights = draw(width)
        h = torch.randn(*rows, d, dtype=torch.float64)
        given = [tensor.clone().requires_grad_() for tensor in (h, *weights)]
        lent = given[0] * 1.0  # as from a layer below: changing it in place is allowed
        got = function(lent, *given[1:], act)
        right = bottleneck(*given, act)
        compare(
            got,
            right,
            slips_of_sequential(got, *given, act),
            "Your output",
            dict(zip(("h", "W_down", "b_down", "W_up", "b_up"), given)),
            formula=Formula(bottleneck, *given, act),
        )
        with torch.no_grad():
            need(
                same(function(lent.clone(), *given[1:], act), right),
                "Under torch.no_grad(), as in evaluation, your function gives something"
                " else.",
            )


# ---- 2. which of the four learn ------------------------------------------------------

STARTS = {  # how W_down and W_up start, act, and why
    "W_up zero": (
        ("random", "zero", torch.relu),
        "W_up and b_up have a gradient at once. That of W_down and b_down contains"
        " W_up, so it is zero until W_up has moved: from the second step on",
    ),
    "both zero": (
        ("zero", "zero", torch.relu),
        "W_up's gradient contains act(0) = 0, and W_down's contains W_up = 0. b_up's"
        " contains neither, and b_up alone will ever change",
    ),
    "both zero, sigmoid": (
        ("zero", "zero", torch.sigmoid),
        "sigmoid(0) is ½ and not 0, so W_up has a gradient although W_down is zero;"
        " then W_up is no longer zero, and the others follow",
    ),
    "W_down zero": (
        ("zero", "random", torch.relu),
        "act(0) = 0 leaves W_up without a gradient; and at exactly 0 PyTorch takes 0"
        " as relu's slope, so W_down and b_down get none either. b_up alone changes",
    ),
    "W_down zero, tanh": (
        ("zero", "random", torch.tanh),
        "tanh has the slope 1 at 0, so W_down and b_down learn through W_up; W_up's"
        " own gradient contains tanh(0) = 0, until W_down has moved",
    ),
    "both random": (
        ("random", "random", torch.relu),
        "nothing is zero: all four have a gradient from the first step on",
    ),
    "W_up zero, h detached": (
        ("random", "zero", torch.relu),
        "A(h.detach()) cuts the gradient to what is below; the adapter's own"
        " parameters do not notice",
    ),
}


def changed_after(case: str, steps: int) -> int:
    """How many of W_down, b_down, W_up, b_up have changed after steps of plain
    gradient descent."""
    starts, act = STARTS[case][0][:2], STARTS[case][0][2]
    d, m = 8, 3
    shapes = {"W_down": (m, d), "b_down": (m,), "W_up": (d, m), "b_up": (d,)}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, start in zip(("W_down", "W_up"), starts):
        if start == "random":
            weights[name].normal_()
    before = {name: w.clone() for name, w in weights.items()}
    for w in weights.values():
        w.requires_grad_()
    h, target = torch.randn(32, d), torch.randn(32, d)
    for _ in range(steps):
        z = (h @ weights["W_down"].T) + weights["b_down"]
        y = h + act(z) @ weights["W_up"].T + weights["b_up"]
        loss = (y - target).square().mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for w, gradient in zip(weights.values(), gradients):
                w -= 0.1 * gradient
    return sum(not torch.equal(weights[name], before[name]) for name in weights)


@checks(
    "All seven. A gradient contains what stands on the other side of the activation:"
    " where that is zero, nothing moves."
)
def predict_changes(predicted, steps=1) -> None:
    """predicted: {start: how many of the four tensors change}."""
    predicted = written(predicted, STARTS, "put your seven numbers", "{start: number}")
    for case, (_, why) in STARTS.items():
        said, true = predicted[case], changed_after(case, steps)
        number = isinstance(said, int | float) and not isinstance(said, bool)
        need(
            number and 0 <= said <= 4,
            f"{case!r}: a number from 0 to 4 is wanted, you have {said!r}.",
        )
        need(
            float(said) == true,
            f"{case!r}: you say {said:g}, and after {steps} step{'s'[: steps - 1]} it"
            f" is another number. Think again: {why}.",
        )


# ---- 3. the one kind that can be merged ----------------------------------------------


def folded(W, b, W_down, b_down, W_up, b_up):
    step = W_up @ W_down
    return W + step @ W, b + step @ b + W_up @ b_down + b_up


def slips_of_the_weight(W, step) -> dict:
    """step: W_up W_down."""
    square = W.shape == step.shape
    return {
        "The residual is forgotten: y itself goes on too, so W stays in the sum.": (
            step @ W
        ),
        "Your weight is as it was: W_up W_down has to be in it.": W,
        "The adapter's matrices are swapped: down is met first, so it stands on the"
        " right.": W + step.T @ W,
        "You subtract: it is added.": W - step @ W,
        "y goes on twice: W is in the sum once.": 2 * W + step @ W,
        "W is missing beside W_up W_down: the adapter reads y, not x.": (
            W + step if square else None
        ),
        "The order is turned: the adapter reads what W has written, so W stands on the"
        " right, W_up W_down W.": W + W @ step if square else None,
    }


def slips_of_the_bias(b, step, b_down, W_up, b_up) -> dict:
    right = b + step @ b + W_up @ b_down + b_up
    return {
        "The layer's bias b passes through the adapter too: W_up W_down b is"
        " missing.": b + W_up @ b_down + b_up,
        "b itself is missing: it goes on beside the adapter.": right - b,
        "What the adapter makes of b_down is missing: it still has to go through"
        " W_up.": right - W_up @ b_down,
        "b_up is missing.": right - b_up,
        "What the adapter makes of b and b_down is missing: both go through it.": (
            b + b_up
        ),
        "The bias is as it was; the adapter's biases, and what it makes of b, belong to"
        " it.": b,
        "Only the adapter's biases are in it: b, and what the adapter makes of b, are"
        " missing.": W_up @ b_down + b_up,
    }


@checks(
    "The same outputs without the adapter. So what keeps this one from being merged is"
    " its activation alone.",
    SHAPES + " The frozen layer is y = W x + b, with W (d, d_in).",
)
def fold_linear_adapter(function) -> None:
    """function(W, b, W_down, b_down, W_up, b_up) -> (W_new, b_new) of one linear layer
    that does what layer and adapter did, where the adapter has no activation: y + W_up
    (W_down y + b_down) + b_up."""
    for more in (random.choice([2, 4]), 0):
        d, _, down, b_down, up, b_up = draw()
        W = torch.randn(d, d + more, dtype=torch.float64)
        b = torch.randn(d, dtype=torch.float64)
        before = W.clone(), b.clone()
        got = function(W, b, down, b_down, up, b_up)
        need(
            torch.equal(W, before[0]) and torch.equal(b, before[1]),
            "You changed W or b in place: give new ones.",
        )
        need(
            isinstance(got, (tuple, list)) and len(got) == 2,
            "Give me two tensors: return W_new, b_new.",
        )
        right = folded(W, b, down, b_down, up, b_up)
        formula = Formula(folded, W, b, down, b_down, up, b_up, whole=got)
        slips = slips_of_the_weight(W, up @ down)
        compare(got[0], right[0], slips, "W_new", formula=formula)
        slips = slips_of_the_bias(b, up @ down, b_down, up, b_up)
        compare(got[1], right[1], slips, "b_new", formula=formula)


# ---- 4. a place and a width under a budget -------------------------------------------


def trained_numbers(case, houlsby=2, biases=True) -> int:
    d, m = case["d"], case["m"]
    adapters = houlsby if case["placement"] == "houlsby" else 1
    return case["layers"] * adapters * (2 * d * m + biases * (m + d))


def sweep(best: float, edge: str = "") -> dict:
    """{rate: mean validation loss}; edge: where the best rate lies."""
    rates = [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]
    place = {"low": 0, "high": 4}.get(edge, random.choice([1, 2, 3]))
    losses = {
        rate: round(best + 0.05 * abs(at - place) + 0.001 * random.random(), 5)
        for at, rate in enumerate(rates)
    }
    return {rate: losses[rate] for rate in random.sample(rates, 5)}  # in any order


OF_EACH_SEED = {  # test losses of the best case, and of those that it is compared with
    "pairs": ([0.2, 0.4, 0.6], [0.3, 0.51, 0.7]),
    "five seeds": ([0.30, 0.31, 0.30, 0.55, 0.20], [0.40, 0.41, 0.40, 0.20, 0.55]),
}


def cases_drawn(kind: str):
    """(cases, budget)"""
    d, layers = random.choice([96, 128]), random.choice([4, 5, 6])
    good = {"placement": random.choice(["pfeiffer", "parallel"]), "m": 16}
    if kind == "exact":
        good = {"placement": "houlsby", "m": 8}
    budget = trained_numbers({"d": d, "layers": layers} | good)
    decoy = {
        "budget": {"placement": "parallel", "m": 24},
        "twice": {"placement": "houlsby", "m": 12},
        "biases": {"placement": "parallel", "m": 17},
    }.get(kind, {"placement": "pfeiffer", "m": 8})
    wide = {"d": d, "layers": layers}
    if kind in ("own width", "own depth"):  # that is what makes it too large
        wide |= {"d": 2 * d} if kind == "own width" else {"layers": 9}
        decoy = {"placement": good["placement"], "m": 16}
    if kind == "biases":  # one parameter too many
        budget = trained_numbers({"d": d, "layers": layers} | decoy) - 1
    drawn = {
        "good": good | {"valid": sweep(0.30), "test": 0.30},
        "decoy": decoy | {"valid": sweep(0.20), "test": 0.25},
        "plain": {"placement": "houlsby", "m": 4, "valid": sweep(0.40), "test": 0.40},
        "other": {"placement": "parallel", "m": 4, "valid": sweep(0.50), "test": 0.30},
        # not allowed, and worse than all: too large, or its best rate at an edge
        "huge": {"placement": "houlsby", "m": 64, "valid": sweep(0.80), "test": 0.80},
        "edge": {"placement": "parallel", "m": 4, "valid": sweep(0.70, "low")}
        | {"test": 0.70},
    }
    if kind == "steep":  # the worst at its worst rate, and not at its best
        rates = drawn["plain"]["valid"]
        rates[max(rates, key=rates.get)] = 2.0
    if kind in ("low", "high"):
        drawn["decoy"]["valid"] = sweep(0.20, kind)
    if kind == "test":
        drawn["decoy"] |= {"valid": sweep(0.45), "test": 0.10}
    if kind == "exact":
        drawn["decoy"]["valid"] = sweep(0.60)
    if kind == "steep" or kind in OF_EACH_SEED:
        drawn["decoy"]["valid"] = sweep(0.45)
    if kind == "flat":  # better in its mean and at its worst rate, not at its best
        losses = 0.32, 0.33, 0.32, 0.31, 0.32
        drawn["decoy"]["valid"] = dict(zip(sorted(drawn["good"]["valid"]), losses))
    if kind == "tie":
        drawn["decoy"]["valid"], drawn["plain"]["test"] = sweep(0.6), 0.30
    names = random.sample(["a", "b", "c", "d", "e", "f"], 6)
    seeds = 5 if kind == "five seeds" else 3
    cases, spread = {}, 0.2 if kind == "tie" else 0.01
    for name, (role, case) in zip(names, drawn.items()):
        losses = [case["test"] + spread * random.uniform(-1, 1) for _ in range(seeds)]
        if kind == "tie" and role in ("good", "plain"):  # one seed turns the order
            losses = [0.4, 0.3, 0.5] if role == "good" else [0.42, 0.52, 0.32]
        if kind in OF_EACH_SEED and role in ("good", "plain", "other"):
            losses = OF_EACH_SEED[kind][role != "good"]
        size = wide if role == "decoy" else {"d": d, "layers": layers}
        cases[name] = case | size | {"test": list(losses)}
    return {name: cases[name] for name in sorted(cases)}, budget


@checks(
    "Counted with the biases, no best rate taken from an edge, chosen on validation,"
    " and the difference judged by the course's rule."
)
def choose_placement(function, against="second") -> None:
    """function(cases, budget) -> (name, rate, verdict)."""
    kinds = "test", "budget", "twice", "biases", "exact", "low", "high", "flat", "tie"
    kinds += "own width", "own depth", "steep", *OF_EACH_SEED
    names, rates, verdicts = Choices(), Choices(), Choices()
    for kind in kinds:
        cases, budget = cases_drawn(kind)
        got = function(copy.deepcopy(cases), budget)
        need(got is not None, "Your function gives None: is there a `return`?")
        need(
            isinstance(got, tuple | list) and len(got) == 3,
            f"Return three things: a name, a rate, a verdict; you return {got!r}.",
        )
        a_case(got[0], cases, budget, names)
        good = best_case(cases, allowed_cases(cases, budget))
        a_rate(got[1], good, cases[good]["valid"], rates)
        of_the_tests(got[2], cases, budget, against, verdicts)
    names.judge()
    rates.judge()
    verdicts.judge()


def inside(rates) -> bool:
    """Whether the best rate has a worse one on either side."""
    return min(rates) < best_rate(rates) < max(rates)


def best_rate(rates) -> float:
    return min(rates, key=rates.get)


def allowed_cases(cases, budget, count=trained_numbers, edges=inside) -> list:
    """Those within the budget whose best rate has a worse one on either side."""
    return [
        name
        for name, case in cases.items()
        if edges(case["valid"]) and count(case) <= budget
    ]


def best_case(cases, names, look=min):
    """The one of these that is best by a look at its validation losses."""
    return min(names, key=lambda n: look(cases[n]["valid"].values()), default=None)


def placement_slips(cases, budget) -> dict:
    def chosen(**changed):
        return best_case(cases, allowed_cases(cases, budget, **changed))

    def counted(**changed):
        return chosen(count=lambda case: trained_numbers(case, **changed))

    allowed = allowed_cases(cases, budget)
    smallest = min(cases.values(), key=lambda case: case["d"] * case["layers"])
    return {
        "You count too few parameters: Houlsby has two adapters in each block.": (
            counted(houlsby=1)
        ),
        "You count too few parameters: an adapter has two matrices and two biases, m +"
        " d numbers more.": counted(biases=False),
        "You take the best of all, and it may be too large: the budget counts.": chosen(
            count=lambda case: 0
        ),
        "You count with the d or the layers of another case: each has its own.": [
            chosen(count=lambda case: trained_numbers(case | {"d": smallest["d"]})),
            chosen(
                count=lambda case: trained_numbers(
                    case | {"layers": smallest["layers"]}
                )
            ),
            chosen(
                count=lambda case: trained_numbers(
                    case | {"d": smallest["d"], "layers": smallest["layers"]}
                )
            ),
        ],
        "A case that trains exactly as many parameters as the budget has is allowed.": (
            best_case(cases, allowed_cases(cases, budget - 1))
        ),
        "A case is not allowed if its best rate is the lowest or the highest that was"
        " tried: nobody knows whether the next one is better still, so it is not at its"
        " best.": [
            chosen(edges=lambda rates: True),
            chosen(edges=lambda rates: best_rate(rates) > min(rates)),
            chosen(edges=lambda rates: best_rate(rates) < max(rates)),
        ],
        "You look at all rates of a case, or at its worst one: a case counts with the"
        " loss at its best rate.": [
            best_case(cases, allowed, look) for look in (sum, max)
        ],
        "You choose on the test. Choose by the validation loss, and look at the test"
        " once.": min(allowed, key=lambda name: sum(cases[name]["test"])),
    }


def a_case(name, cases, budget, names) -> None:
    need(
        isinstance(name, str) and name in cases,
        f"The name is one of {', '.join(cases)}; yours is {name!r}.",
    )
    right = best_case(cases, allowed_cases(cases, budget))
    count = trained_numbers(cases[name])
    said = (
        f"You choose {name!r}; of those that are allowed, {right!r} has the lowest"
        " validation loss."
    )
    if count > budget:
        said = f"{name!r} trains {count:,} parameters; the budget is {budget:,}."
    elif not inside(cases[name]["valid"]):
        said = f"The best rate of {name!r} has a worse one on one side only."
    names.add(name, right, placement_slips(cases, budget), said)


def a_rate(rate, good, valid, rates) -> None:
    right = best_rate(valid)
    said = (
        f"You return the rate {rate!r}; of {good!r} the one with the lowest validation"
        f" loss is {right:g}."
    )
    highest = max(valid, key=valid.get)
    rates.add(
        rate, right, {"You return the rate with the highest loss.": highest}, said
    )


def of_the_tests(verdict, cases, budget, against, verdicts) -> None:
    """The verdict of the best case against the second best, or the worst."""
    allowed = allowed_cases(cases, budget)
    order = sorted(allowed, key=lambda name: min(cases[name]["valid"].values()))
    good, other = order[0], order[1 if against == "second" else -1]
    wanted = told_apart(cases[good]["test"], cases[other]["test"], loss=True).verdict
    place = "second best" if against == "second" else "worst"

    def worst_of(names, look=min):
        other = max(names, key=lambda name: look(cases[name]["valid"].values()))
        pair = cases[good]["test"], cases[other]["test"]
        return told_apart(*pair, loss=True).verdict

    losses = cases[good]["test"], cases[other]["test"]
    small = [name for name in cases if trained_numbers(cases[name]) <= budget]
    mistakes = {
        "A seed belongs to the same seed of the other case: compare them as they stand,"
        " in pairs.": told_apart(*losses, loss=True, paired=False).verdict
    }
    if against == "worst":
        mistakes |= {
            "You compare with the worst of all cases; the worst of those that are"
            " *allowed* is asked for.": [
                worst_of(cases),
                worst_of(small),
                worst_of(allowed_cases(cases, float("inf"))),
            ],
            "The worst case is the one with the highest loss at its *best* rate, and"
            " not at any rate.": worst_of(allowed, max),
        }
    verdicts.add_verdict(
        verdict,
        wanted,
        "compare(a, b, loss=True) says whether *a* is ahead of b, and lower losses are"
        " better.",
        f"You say {verdict!r}; the course's rule says {wanted!r} of {good!r} against"
        f" {other!r}, the {place} of those that are allowed.",
        mistakes,
    )


# ---- 5. the parallel adapter ---------------------------------------------------------


class Beside(nn.Module):
    """A frozen part with an adapter, as a slot calls it."""

    def __init__(self, part, adapter):
        super().__init__()
        self.part, self.adapter = part, adapter

    def forward(self, x):
        return self.adapter(self.part, x)


@checks(
    "Nothing changes at the start, the adapter reads x beside the part, the scale is on"
    " the adapter alone, and 40 steps in a small model are ahead of no training, by the"
    " course's rule over three seeds. This is the parallel adapter of He et al."
)
def parallel_adapter(adapter_class) -> None:
    """adapter_class(d, m, scaling): an Adapter with Linears `down` and `up`; forward:
    base(x) + scaling up(relu(down(x)))"""
    need(
        isinstance(adapter_class, type) and issubclass(adapter_class, Adapter),
        "Give me the class itself, a subclass of Adapter.",
    )
    equation_of_parallel(adapter_class)
    trained, untrained = zip(
        *(losses_in_a_model(adapter_class, seed) for seed in range(3))
    )
    result = told_apart(trained, untrained, loss=True)
    need(
        result.verdict == "ahead",
        f"In a small model, on its feed-forwards, 40 steps change the loss like this:"
        f" {result}. Something keeps it from learning.",
    )


def equation_of_parallel(adapter_class) -> None:
    for _ in range(2):
        d, m = random.randint(9, 13), random.choice([2, 3, 5])
        one_parallel(adapter_class, d, m, random.choice([2.5, 0.4]))


def one_parallel(adapter_class, d, m, scaling) -> None:
    part = nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d))
    part.requires_grad_(False)
    part.called = 0
    part.register_forward_hook(count_calls)
    layer = Beside(copy.deepcopy(part), adapter_class(d, m, scaling))
    down, up = (linear(layer.adapter, name) for name in ("down", "up"))
    check_linears(down, up, d, m)
    own = *down.parameters(), *up.parameters()
    check_trained(layer, own)

    def right(x):
        return part(x) + scaling * up(torch.relu(down(x)))

    x = torch.randn(4, 3, d)
    need(
        layer(x) is None or same(layer(x), layer(x)),
        "Two calls give two results: nothing is random here (dropout?).",
    )
    need(same(layer(x), part(x)), start(layer(x), part(x), layer, up, x))
    with torch.no_grad():
        for p in own:
            p.copy_(torch.randn(p.shape))
    learnt = {
        f"{name}.{kind}": getattr(one, kind)
        for name, one in (("down", down), ("up", up))
        for kind in ("weight", "bias")
    }
    got = layer(x)
    slips = slips_of_parallel(layer, part(x), down, up, scaling, x)
    compare(got, right(x), slips, "Your output", learnt)
    check_calls(layer, x)
    check_copies(adapter_class, (d, m, scaling), layer, part, own, x)
    below, straight = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(below).square().sum().backward()
    right(straight).square().sum().backward()
    need(
        below.grad is not None and same(below.grad, straight.grad),
        "The outputs are right, but the gradient that goes down to x is not: the part"
        " is frozen, and yet what is below learns through it. No torch.no_grad() and no"
        " .detach() in forward.",
    )


def check_linears(down, up, d, m) -> None:
    shapes = tuple(down.weight.shape), tuple(up.weight.shape)
    need(
        shapes != ((d, m), (m, d)),
        "down and up are swapped: down goes from d to m, up from m back to d.",
    )
    need(
        shapes == ((m, d), (d, m)),
        f"down and up have weights of shapes {shapes}; ({m}, {d}) and ({d}, {m}) are"
        " expected: nn.Linear(d, m) and nn.Linear(m, d).",
    )
    need(
        down.bias is not None and up.bias is not None,
        "An adapter's two Linears have biases: this is no LoRA.",
    )
    need(
        bool(down.weight.any()) or bool(up.weight.any()),
        "down and up are both zero. Then no gradient reaches either: each one's"
        " contains the other. Make up zero, and leave down as it is.",
    )


def check_trained(layer, own) -> None:
    """own: the parameters of down and up, all that may be trained."""
    mine = {id(p) for p in own}
    trained = {id(p): name for name, p in layer.named_parameters() if p.requires_grad}
    need(
        mine <= set(trained),
        "The adapter's own parameters are frozen: they are all that is trained.",
    )
    theirs = [name for key, name in trained.items() if key not in mine]
    need(
        all(
            "down" not in name and "up" not in name and "scal" not in name
            for name in theirs
        ),
        f"{', '.join(theirs)} is trained too. Here the scale is a fixed number, and all"
        " that is trained is in down and up.",
    )
    need(
        not theirs,
        f"{', '.join(theirs)} is trained too: all that is trained is in down and up.",
    )


def slips_of_parallel(layer, y, down, up, scaling, x) -> dict:
    """y: what the part gives for x."""

    def adapter(h):
        a = torch.relu(h @ down.weight.T + down.bias)
        return (a @ up.weight.T + up.bias).detach()

    z, right = adapter(x), y + scaling * up(torch.relu(down(x)))
    others = F.gelu, F.silu, torch.tanh, torch.sigmoid
    bent = [(y + scaling * up(other(down(x)))).detach() for other in others]
    return {
        "That is the sequential adapter: it reads what the part has computed. The"
        " parallel one reads x.": y + scaling * adapter(y),
        "That is the sequential adapter, without the scale: it reads what the part has"
        " computed.": y + adapter(y),
        "The scale is missing: the adapter is multiplied by it.": y + z,
        "The whole sum is scaled: the scale belongs to the adapter alone.": (
            scaling * (y + z)
        ),
        "The part's output is missing: your layer gives the adapter alone.": (
            scaling * z
        ),
        "The part's output is scaled: the scale belongs to the adapter.": (
            scaling * y + z
        ),
        "x is added as well: the residual stream around this layer does that"
        " already.": right + x,
        "The activation is missing: relu between down and up.": (
            y + scaling * down_up(x, down, up).detach()
        ),
        "The adapter never reaches the output.": y,
        "The scale is in it as its root.": y + scaling**0.5 * z,
        "The scale multiplies x: it multiplies what the adapter says.": (
            y + adapter(scaling * x)
        ),
        "A second relu follows up: there is one, in the middle.": (
            y + scaling * torch.relu(z)
        ),
        "You normalise x first: the adapter reads it as it is.": (
            y + scaling * adapter(F.layer_norm(x, x.shape[-1:]))
        ),
        "You divide by the scale.": y + z / scaling,
        "The scale misses up's bias: it multiplies all that the adapter says.": (
            (y + scaling * (z - up.bias) + up.bias).detach()
        ),
        "relu comes after up: it belongs between the two, where the numbers are few.": (
            y + scaling * torch.relu(down_up(x, down, up)).detach()
        ),
        "That is another activation: relu is asked for.": next(
            (wrong for wrong in bent if same(layer(x), wrong)), None
        ),
    }


def check_calls(layer, x) -> None:
    """The part is called once, and a batch of one has its own shape."""
    layer.part.called = 0
    layer(x)
    need(
        layer.part.called < 2,
        "You call base(x) twice: the frozen part is the expensive one. Keep what it"
        " gives.",
    )
    one = x[:1, :1]
    need(
        layer(one).shape == one.shape,
        f"For x of shape {tuple(one.shape)} your layer gives"
        f" {tuple(layer(one).shape)}: a batch of one keeps its axes.",
    )


def check_copies(adapter_class, sizes, layer, part, own, x) -> None:
    """A second adapter, a copy, one that is loaded, and one in 64 bits."""
    same_size = adapter_class(*sizes)
    need(
        not {id(p) for p in same_size.parameters()} & {id(p) for p in own},
        "Two adapters share their parameters: each has Linears of its own, made in"
        " __init__.",
    )

    def another(more=False):
        larger = [size + 1 for size in sizes]
        return Beside(part, adapter_class(*(larger if more else sizes)))

    check_life(layer, lambda layer: layer.adapter, another, x)
    twice = copy.deepcopy(layer).double()
    need(
        twice(x.double()).dtype == torch.float64,
        "In 64 bits your layer gives another precision than it was given.",
    )


def count_calls(module, args, output):
    module.called += 1


def down_up(x, down, up):
    return x @ down.weight.T @ up.weight.T + down.bias @ up.weight.T + up.bias


def linear(layer, name):
    found = getattr(layer, name, None)
    need(
        found is not None, f"I look for your Linear as self.{name}, and there is none."
    )
    need(
        isinstance(found, nn.Linear),
        f"self.{name} is a {type(found).__name__}; an nn.Linear is expected.",
    )
    return found


def start(got, right, layer, up, x) -> str:
    if got is None:
        return "forward gives None: is there a `return` at its end?"
    if up.weight.any() or up.bias.any():
        return (
            "Before training your layer must give exactly what the part gives, and it"
            " does not: make up's weight and bias zero."
        )
    if same(got, right + x):
        return (
            "x is added as well: the residual stream around this layer does that"
            " already."
        )
    return (
        "up is zero, so your layer must give exactly what the part gives; it does not."
    )


def losses_in_a_model(adapter_class, seed: int):
    """(loss after 40 steps, loss before), of texts that count upwards; the adapter
    stands at the feed-forwards of a small model."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    model = GPT(GPTConfig(vocab_size=16, **shape, **heads))

    config = configured(lambda base: adapter_class(16, 8, 4.0))
    model = get_peft_model(model, config(target_modules=["mlp"]))

    def loss():
        start = torch.randint(16, (8, 1), generator=generator)
        ids = (start + torch.arange(6)) % 16
        return model(input_ids=ids, labels=ids).loss

    with torch.no_grad():
        before = loss().item()
    fit(loss, model.parameters(), steps=40, lr=2e-2)
    with torch.no_grad():
        return loss().item(), before
