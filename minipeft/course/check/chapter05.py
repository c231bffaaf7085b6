"""Chapter 05, LoRA in practice: equal budgets, one run by other knobs, the first step
predicted, a sweep judged, a diagnosis, and a PiSSA that leaves the base as it is."""

import math
import random

import torch
from torch import nn

from ..comparison import compare as told_apart
from .kinds import TURNED, Built, Choices, judge_numbers
from .slips import Formula
from .teacher import checks, need, same

__all__ = [
    "diagnose",
    "judge_sweep",
    "pissa_adapter",
    "predict_dials",
    "rank_at_budget",
    "same_run",
]


def near(a, b) -> bool:
    return abs(a - b) <= 1e-5 * max(abs(a), abs(b), 1e-30)  # in 32 bits too


@checks(
    "The run is the same, step for step, under both optimizers: A keeps its rate, and B"
    " pays for the scale."
)
def same_run(function) -> None:
    """function(c, rate_A, rate_B, optimizer) -> (rate_A, rate_B) that undo alpha's
    being multiplied by c."""
    for optimizer in ("adam", "sgd"):
        for c in (2.5, 0.4, random.choice([2.0, 3.0, 5.0])):
            a, b = (random.uniform(0.001, 0.01), random.uniform(0.02, 0.1))
            got = function(c, a, b, optimizer)
            if isinstance(got, torch.Tensor) and got.dim() == 1:
                got = got.tolist()
            need(
                isinstance(got, tuple | list)
                and len(got) == 2
                and not any(isinstance(rate, str) for rate in got),
                "Give me two numbers: return rate_A, rate_B.",
            )
            judge_rates(*(float(rate) for rate in got), c, a, b, optimizer)


def judge_rates(got_a, got_b, c, a, b, optimizer) -> None:
    """a, b: the rates before alpha was multiplied by c."""
    said = f"With {optimizer}: "
    power = 1 if optimizer == "adam" else 2
    need(
        not (near(got_a, b) or near(got_b, a)),
        said + "the two rates are swapped: A's comes first.",
    )
    need(
        not (near(got_a, a) and near(got_b, b)),
        said + "you changed nothing; but alpha is c times what it was, and so is"
        " each step of B.",
    )
    need(
        not (near(got_b, b * c**power) and near(got_a, a)),
        said + "upside down: alpha has grown, so B has to take smaller steps, not"
        " larger ones.",
    )
    need(
        not near(got_a, a / c),
        said + "you slow A down too. A's gradient contains s B, and that product is"
        " to stay as it was: so A's rate stays.",
    )
    need(
        near(got_a, a),
        said + f"A's rate has become {got_a / a:.2g} times what it was. The function"
        " s B A x stays the same, and so does A's gradient: leave A's rate"
        " alone.",
    )
    need(
        not (optimizer == "sgd" and near(got_b, b / c)),
        said + "B / c needs its steps to be c times smaller, and its gradient has"
        " become c times larger: plain gradient descent feels both.",
    )
    need(
        not (optimizer == "adam" and near(got_b, b / c**2)),
        said + "you count the larger gradient, but Adam divides by its size: only"
        " B's own scale is left.",
    )
    need(
        near(got_b, b / c**power),
        said + f"B's rate should be {c**-power:.3g} times what it was, for "
        f"c = {c:g}; yours is {got_b / b:.3g} times.",
    )


@checks("The largest rank that the budget pays for, in every place.")
def rank_at_budget(function) -> None:
    """function(shapes, layers, targets, budget) -> int; shapes: {"q_proj": (d_out,
    d_in), ...} of one layer."""
    choices = Choices()
    for _ in range(4):
        d, f, layers = (
            random.randint(40, 60),
            random.randint(110, 150),
            random.randint(3, 6),
        )
        shapes = {
            "q_proj": (d, d),
            "k_proj": (d // 4, d),
            "v_proj": (d // 4, d),
            "up_proj": (f, d),
            "down_proj": (d, f),
            "gate_up_proj": (2 * f, d),
        }
        two_alike = ["q_proj", "k_proj", "v_proj"]
        places = ["q_proj", "v_proj"], ["up_proj", "down_proj"], two_alike, list(shapes)
        for targets in places:
            both = sum(
                d_out + d_in for d_out, d_in in (shapes[name] for name in targets)
            )
            right = random.randint(9, 20)
            # something is left over, or nothing; and not enough for one rank
            ranks = right + random.uniform(0.6, 0.9), right
            budgets = [int(rank * layers * both) for rank in ranks]
            for budget in (*budgets, 0, layers * both - 1):
                a_budget(function, shapes, layers, targets, budget, choices)
    choices.judge()


def a_budget(function, shapes, layers, targets, budget, choices) -> None:
    one = layers * sum(map(sum, (shapes[name] for name in targets)))
    right = budget // one
    mistakes = budget_slips(shapes, layers, targets, budget, right)
    got = function(dict(shapes), layers, list(targets), budget)
    need(
        not isinstance(got, float) or got.is_integer(),
        f"A rank is a whole number; yours is {got}. A part of a direction cannot be"
        " bought.",
    )
    need(
        isinstance(got, int | float),
        f"The rank should be an int; yours is a {type(got).__name__}.",
    )
    said = (
        f"For a budget of {budget:,} on {', '.join(targets)} ({layers} layers, together"
        f" {one:,} numbers a rank) the rank is {right}; yours is {got}."
    )
    if not right:
        said = (
            f"A budget of {budget:,} does not pay for one rank, which costs {one:,}:"
            f" the answer is 0, and yours is {got}."
        )
    choices.add(got, right, mistakes, said)


def budget_slips(shapes, layers, targets, budget, right) -> dict:
    """{message: the wrong rank}"""

    def costs(of, names=targets, layers=layers, rounded=math.floor):
        return rounded(budget / (layers * sum(of(*shapes[name]) for name in names)))

    def both(d_out, d_in):
        return d_out + d_in

    one = layers * sum(map(sum, (shapes[name] for name in targets)))
    different = {shapes[name]: name for name in targets}.values()
    alike = [name for name in shapes if name.endswith(tuple(targets))]
    return {
        "One too many: you round, and the budget is exceeded. What is left over does"
        " not pay for another rank.": [
            costs(both, rounded=round),
            costs(both, rounded=math.ceil),
            right + 1,
        ],
        "One too few: the budget may be spent to the last number.": [
            max(0, (budget - 1) // one),
            right - 1,
        ],
        "You count one layer: the model has more.": costs(both, layers=1),
        "You took every matrix for square, with d_in on both sides: B is (d_out, r).": (
            costs(lambda d_out, d_in: 2 * d_in)
        ),
        "You took every matrix for square, with d_out on both sides: A is (r, d_in).": (
            costs(lambda d_out, d_in: 2 * d_out)
        ),
        "You count A alone, r · d_in numbers: B has r · d_out more.": costs(
            lambda d_out, d_in: d_in
        ),
        "You count B alone, d_out · r numbers: A has r · d_in more.": costs(
            lambda d_out, d_in: d_out
        ),
        "You count the whole matrices, d_out · d_in; LoRA costs d_out + d_in for each"
        " rank.": costs(lambda d_out, d_in: d_out * d_in),
        "You count all matrices; only the targets are adapted.": costs(both, shapes),
        "You count two targets of one shape once: each has a LoRA of its own.": costs(
            both, different
        ),
        "You count layers whose names only contain a target's: gate_up_proj is another"
        " one than up_proj.": costs(both, alike),
        "Where the budget does not pay for one rank the answer is 0: there is no least"
        " rank.": max(1, right),
    }


# ---- predictions ---------------------------------------------------------------------


@checks(
    "All of them. Under Adam only s and the number of terms that pull together count;"
    " under gradient descent s enters twice, and the size of the loss once."
)
def predict_dials(predicted, c=4) -> None:
    """predicted: {case: factor}; c is the factor in the question."""
    judge_numbers(predicted, dial_cases(c), near=0.06)


def first_move(optimizer, r=4096, s=1.0, loss=1.0) -> float:
    """How far the output for one input moves in the first step, from B = 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        d = 32
        x, pull = torch.randn(d).double(), torch.randn(d).double()
        A = (torch.randn(r, d).double() / d**0.5).requires_grad_()
        B = torch.zeros(d, r, dtype=torch.float64, requires_grad=True)
    extra = {"eps": 1e-30} if optimizer is torch.optim.Adam else {}
    step = optimizer([A, B], lr=1e-3, **extra)
    (loss * pull @ (s * B @ (A @ x))).backward()
    step.step()
    return (s * B @ (A @ x)).norm().item()


def dial_cases(c: float) -> dict:
    """{case: (factor, what to think of)}, by making the steps."""
    adam, sgd, r = torch.optim.Adam, torch.optim.SGD, 4096

    def factor(optimizer, **changed):
        return first_move(optimizer, **changed) / first_move(optimizer)

    wide = round(c * r)
    return {
        "α, Adam": (
            factor(adam, s=c),
            "A step of B is about η, whatever its gradient; s multiplies it once.",
        ),
        "α, SGD": (
            factor(sgd, s=c),
            "s multiplies B's gradient, and what B then adds.",
        ),
        "rank, α/r, Adam": (
            factor(adam, r=wide, s=1 / c),
            "s falls by c, and c times as many terms pull the same way.",
        ),
        "rank, α/√r, Adam": (
            factor(adam, r=wide, s=c**-0.5),
            "s falls by √c, and c times as many terms pull the same way.",
        ),
        "rank, α/r, SGD": (
            factor(sgd, r=wide, s=1 / c),
            "s enters twice, and falls by c; the number of terms enters once.",
        ),
        "loss, Adam": (
            factor(adam, loss=c),
            "Adam divides a gradient by its own size.",
        ),
        "loss, SGD": (factor(sgd, loss=c), "The step is the gradient times the rate."),
    }


# ---- choosing a rate -----------------------------------------------------------------

LADDER = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
EDGES = {
    "trap": (3, 1),
    "inside": (2, 1),
    "tie": (1, 3),
    "behind": (2, 3),
    "first up": (4, 2),
    "second down": (2, 0),
    "short ladder": (2, 3),
    "other seeds": (2, 1),
    "first seed": (2, 1),
    "pairs": (1, 2),
    "five seeds": (2, 3),
}  # where the best rate of either case lies on the ladder


@checks(
    "A comparison only where either rate has a worse one on both sides; chosen on"
    " validation, judged on the test, seed by seed."
)
def judge_sweep(function, extend="extend", up="up", down="down") -> None:
    """function(runs, one, other) -> ("extend", case, "up" or "down"), or ("verdict",
    word)."""
    words = {extend: "extend", up: "up", down: "down"}
    plans = Choices()
    for kind in EDGES:
        runs = sweep_drawn(kind)
        got = function([dict(run) for run in runs], "one", "other")
        need(
            isinstance(got, tuple | list) and len(got) in (2, 3),
            f'Return ("{extend}", case, "{up}" or "{down}"), or ("verdict", word); you'
            f" return {got!r}.",
        )
        got = tuple(words.get(part, part) for part in got)
        plans.add(got, plan(runs), plan_slips(runs), no_plan(got, plan(runs)))
    plans.judge()


def sweep_drawn(kind: str) -> list:
    """Runs, in any order."""
    runs = []
    for case, at in zip(("one", "other"), EDGES[kind]):
        gain = {"inside": 0.1, "trap": 0.1, "behind": -0.1}.get(kind, 0.0)
        if kind in ("other seeds", "first seed", "pairs", "five seeds"):
            gain = 0.1
        short = kind == "short ladder" and case == "other"
        for number, lr in enumerate(LADDER[:4] if short else LADDER):
            seeds = 5 if kind == "five seeds" else 3
            for seed in range(seeds if number == at else 1):
                valid = 0.3 + 0.05 * abs(number - at) + random.uniform(-0.01, 0.01)
                test = 0.5 + 0.05 * abs(number - at) + random.uniform(-0.005, 0.005)
                if kind == "other seeds" and seed:  # only seed 0 chooses the rate
                    valid += 0.2
                if kind == "first seed" and case == "one" and not seed:
                    test += 0.4
                if kind == "tie":
                    test += (0.06, -0.06, 0)[seed] * (1 if case == "one" else -1)
                if kind == "pairs":  # the seeds differ, and both cases do with them
                    test += (0.0, 0.3, 0.6)[seed]
                if kind == "five seeds" and seed > 2:  # they turn the order
                    test += (0.3, -0.3)[seed - 3] * (1 if case == "one" else -1)
                if kind == "trap" and number == 4:  # lucky on the test, at an edge
                    test -= 0.4
                if case == "one":
                    test -= gain
                runs.append(
                    dict(case=case, lr=lr, seed=seed, valid_loss=valid, test_loss=test)
                )
    for lr in (*LADDER, 5e-2):  # another case, of which nothing was asked
        valid, test = abs(lr - 2e-2), random.uniform(0.1, 0.2)
        runs.append(
            dict(case="one more", lr=lr, seed=0, valid_loss=valid, test_loss=test)
        )
    random.shuffle(runs)
    while kind == "pairs" and in_one_order(runs):
        random.shuffle(runs)
    return runs


def in_one_order(runs) -> bool:
    """Whether the seeds of both cases' best rates stand in the same order."""
    best = [(case, LADDER[at]) for case, at in zip(("one", "other"), EDGES["pairs"])]
    seeds = [
        [run["seed"] for run in runs if (run["case"], run["lr"]) == place]
        for place in best
    ]
    return seeds[0] == seeds[1]


def losses_at(runs, case: str, key: str) -> dict:
    """{rate: {seed: loss}} of a case."""
    found = {}
    for run in runs:
        if run["case"] == case:
            found.setdefault(run["lr"], {})[run["seed"]] = run[key]
    return found


def of_seed_0(losses: dict) -> float:
    return losses[0]


def as_listed(losses: dict) -> list:
    return list(losses.values())


def plan(
    runs,
    key="valid_loss",
    look=of_seed_0,
    edges=True,
    judged="test_loss",
    given=dict,
    **options,
):
    """What to do by the rule: extend a ladder, or compare."""
    pair = []
    for case in ("one", "other"):
        chosen = losses_at(runs, case, key)
        rate = min(chosen, key=lambda rate: look(chosen[rate]))
        if edges and rate in (min(chosen), max(chosen)):
            return "extend", case, "up" if rate == max(chosen) else "down"
        pair.append(given(losses_at(runs, case, judged)[rate]))
    return "verdict", told_apart(*pair, loss=True, **options).verdict


def plan_slips(runs) -> dict:
    def turned(part):
        return {"up": "down", "down": "up"}.get(part, part)

    def opposite(part):
        return TURNED.get(part, part)

    def of_all_seeds(losses):
        return sum(losses.values()) / len(losses)

    return {
        "The direction is turned round: a best rate at the upper end asks for a larger"
        " one.": tuple(map(turned, plan(runs))),
        "Your verdict is turned round: these are losses, and lower is better"
        " (loss=True).": tuple(map(opposite, plan(runs))),
        "You choose by the test loss: then it cannot judge any more. Choose"
        " by the validation loss with seed 0.": plan(runs, "test_loss"),
        "You choose the rates by all seeds that are there: only seed 0 has run at"
        " every rate, so choose by seed 0.": plan(runs, look=of_all_seeds),
        "You compare rates at the end of their ladder, too: nobody knows whether the"
        " next rate is better. Ask for it before you compare.": plan(runs, edges=False),
        "You judge by the validation loss, which has chosen already: judge by the test"
        " loss.": plan(runs, judged="valid_loss"),
        "You compare the losses in the order in which they stand, or unpaired: a seed"
        " belongs to the same seed of the other case.": [
            plan(runs, given=as_listed),
            plan(runs, paired=False),
        ],
    }


def no_plan(got, wanted) -> str:
    """What to say of a plan that is wrong by no known slip."""
    if wanted[0] == "extend" != got[0]:
        return (
            f"The best rate of {wanted[1]!r} is the last one that was tried for it:"
            " nobody knows whether the next is better. Ask for it before you compare."
        )
    if wanted[0] == "extend":
        return f"You return {got!r}; {wanted!r} is right."
    if got[0] != "verdict":
        return (
            "Both best rates have a worse one on either side, by the validation loss"
            " with seed 0, so they can be compared."
        )
    return (
        f"You say {got[1]!r}; the course's rule says {wanted[1]!r}. Choose each rate by"
        " seed 0 alone, as every rate has it; then give `compare` the test losses of"
        " *all* seeds at that rate, {seed: loss}, so that it pairs them."
    )


# ---- PiSSA without touching the base -------------------------------------------------


def since_the_start(A, B, start, alpha, r):
    s = alpha / r
    return s * (B @ A - start)


@checks(
    "The start of PiSSA, and a base that stays what it was: what is added is the change"
    " since the start.",
    "W is (d_out, d_in), A is (r, d_in), B is (d_out, r); torch.linalg.svd gives V"
    " transposed already.",
)
def pissa_adapter(config_class) -> None:
    """config_class(target_modules=..., r=..., lora_alpha=...), a LayerConfig."""
    for d_in, d_out, r, alpha in ((9, 7, 2, 6), (6, 8, 3, 3), (7, 7, 2, 1)):
        built = Built(config_class, d_in, d_out, r=r, lora_alpha=alpha)
        built.check_parameters({"A": (r, d_in), "B": (d_out, r)})
        built.check_start()
        s, A, B = alpha / r, built.adapter.A, built.adapter.B
        U, S, Vt = torch.linalg.svd(built.W, full_matrices=False)
        best = U[:, :r] * S[:r] @ Vt[:r]
        check_pissa_start(A.detach(), B.detach(), s, U, S, Vt)
        built.fill()
        mistakes = {
            "Your start moves along with what is learnt, so that the change is always"
            " zero: keep a copy of it (detach().clone()), not a reference.": 0 * B @ A,
            "The start is not taken off: what is added is s B A minus what it was at"
            " first.": s * B @ A,
            "The scale is missing: s (B A - B₀ A₀).": B @ A - best / s,
            "The scale is there twice: once is enough.": s * (s * B @ A - best),
            "You multiply by α: divide by r.": alpha * B @ A - alpha / s * best,
            "The start is taken off without its scale.": s * B @ A - best / s,
            "delta is the new weight itself: return what is added to W.": built.W
            + s * B @ A
            - best,
        }
        right = s * B @ A - best
        mistakes = {m: w for m, w in mistakes.items() if not same(w, right)}
        formula = Formula(since_the_start, A, B, best / s, alpha, r)
        built.compare(right, mistakes, formula=formula)
        built.check_life(r=r + 1, lora_alpha=alpha + 4)
    Built(config_class, 8, 10, r=2, lora_alpha=4).check_learning()


def check_pissa_start(A, B, s, U, S, Vt) -> None:
    """A and B are PiSSA's, up to the order and signs of the directions."""
    r, product = len(A), B @ A
    best = U[:, :r] * S[:r] @ Vt[:r]
    need(
        bool(product.abs().max() > 1e-6),
        "B A is zero at the start: that is LoRA's. PiSSA's A and B are the largest"
        " singular directions of W.",
    )
    need(
        not same(s * product, U[:, -r:] * S[-r:] @ Vt[-r:]),
        "You took the smallest singular values: PiSSA trains the largest.",
    )
    need(
        not same(product, best) or same(s * product, best),
        "B A is the best part of rank r, but the layer computes s B A: divide the"
        " singular values by s before you take the root.",
    )
    need(
        not same(s * product, U[:, :r] * S[:r] ** 2 @ Vt[:r]),
        "The singular values are in A and in B in full, so B A has their squares: give"
        " each the root.",
    )
    need(
        not same(product, U[:, :r] @ Vt[:r]),
        "The singular values are missing: A and B hold directions only.",
    )
    need(
        same(s * product, best),
        "s B A is not the best approximation of W of rank r: it should be the first r"
        " singular directions with their values.",
    )
    sizes = A.square().sum(1)
    need(
        same(sizes.sort(descending=True).values, S[:r] / s)
        and same(B.square().sum(0), sizes),
        "The product is right, but A and B share it unevenly: PiSSA gives each the root"
        " of S / s.",
    )


# ---- a diagnosis ---------------------------------------------------------------------


class Patient(nn.Module):
    """A layer with a LoRA. `adds_when_merged` is the one thing that a learner sees only
    by running it."""

    def __init__(self, d_in=6, d_out=5, r=2):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out).requires_grad_(False)
        self.A, self.B = (
            nn.Parameter(torch.randn(r, d_in)),
            nn.Parameter(torch.zeros(d_out, r)),
        )
        self.scale, self.enabled, self.merged, self.adds_when_merged = (
            2.0,
            True,
            False,
            False,
        )

    def forward(self, x):
        y = self.linear(x)
        if self.enabled and (not self.merged or self.adds_when_merged):
            y = y + self.scale * x @ self.A.T @ self.B.T
        return y


FOUND = {
    "healthy": "is well",
    "frozen": "has an A and a B that require no gradient",
    "dead": "has A and B both zero, so that neither will ever get a gradient",
    "no scale": "has the scale 0",
    "disabled": "is switched off: its update is never added",
    "no rate": (
        "has a B that the optimizer does not move, with a rate of 0 or left out of its"
        " groups"
    ),
    "twice": "is merged into the weight, and adds its update all the same",
}


def patient(disease, trained=False, other=False) -> tuple:
    """(layer, optimizer) with that disease, before or after training. `other`: B left
    out of the groups rather than at rate 0; a healthy one merged."""
    layer = Patient()
    with torch.no_grad():
        if trained:
            layer.B.copy_(torch.randn(layer.B.shape))
        if disease == "dead" or other == "A zero":
            layer.A.zero_()
        if other == "small":  # an update that is there, and small
            layer.B.mul_(5e-4)
        if other == "balanced":
            layer.A[1] = -layer.A[0]
        if other == "one-sided":
            layer.A.copy_(-layer.A.abs())
            layer.A[0] = 0
        if other == "small A":
            layer.A.mul_(1e-4)
        if other == "hidden":  # from x of ones, from one input or output, from a sum
            layer.A[:, 0] = layer.B[0] = 0
            layer.A[:, 1:] -= layer.A[:, 1:].mean(1, keepdim=True)
            layer.B[1:] -= layer.B[1:].mean(0, keepdim=True)
    if other in ("small scale", "negative scale"):
        layer.scale = 5e-4 if other == "small scale" else -2.0
    rates, kept = {"A": 1e-3, "B": 1e-3}, "AB"
    if other == "small rate":
        rates = {"A": 1e-8, "B": 1e-8}
    if other == "A at rate 0":
        rates["A"] = 0.0
    if disease == "frozen":
        layer.requires_grad_(False)
    elif disease == "no scale":
        layer.scale = 0.0
    elif disease == "disabled":
        layer.enabled = False
    elif disease == "no rate":
        rates["B"], kept = (1e-3, "A") if other else (0.0, "AB")
    elif other == "B alone":
        layer.A.requires_grad_(False)
    elif disease == "twice" or other is True:
        layer.merged, layer.adds_when_merged = True, disease == "twice"
        with torch.no_grad():
            layer.linear.weight += layer.scale * layer.B @ layer.A
    groups = [{"params": [getattr(layer, name)], "lr": rates[name]} for name in kept]
    if other == "a copy":  # the optimizer has another B of the same numbers
        stranger = nn.Parameter(layer.B.detach().clone())
        groups.append({"params": [stranger], "lr": 1e-3})
    return layer, torch.optim.AdamW(groups)


# {what is special about a healthy one: (the word for it that is wrong, why)}
HEALTHY = {
    "A zero": (
        "dead",
        "its A is zero, and its B is not: A gets a gradient through B. Dead are both at"
        " zero.",
    ),
    "small scale": ("no scale", "its scale is small, and not 0."),
    "negative scale": (
        "no scale",
        "its scale is below 0, so that the update is taken off. That is not 0.",
    ),
    "small rate": (
        "no rate",
        "its rate is small, as in the first steps of a warm-up, and not 0.",
    ),
    "A at rate 0": (
        "no rate",
        "A's rate is 0, and B's is not. Look for the group in which B is.",
    ),
    "B alone": (
        "frozen",
        "its A is, but its B learns. LoRA-FA trains B alone, and that is no disease.",
    ),
}

MORE = {
    "a copy": " Its optimizer holds another tensor with B's numbers: look for the"
    " parameter that *is* B (`is`), not for one that is equal.",
    "small": " Its update is small: allow the difference only what rounding makes.",
    "hidden": " Its update does not show at every input and output: compare all"
    " outputs, for random inputs.",
}

PATIENTS = [
    ("healthy", False, False),
    ("healthy", True, False),
    ("healthy", True, True),
    ("healthy", False, "B alone"),
    ("healthy", True, "B alone"),
    ("healthy", True, "A zero"),
    ("healthy", True, "small scale"),
    ("healthy", True, "negative scale"),
    ("healthy", False, "small rate"),
    ("healthy", True, "A at rate 0"),
    ("healthy", False, "balanced"),
    ("healthy", False, "one-sided"),
    ("healthy", False, "small A"),
    ("dead", False, False),
    ("twice", True, False),
    ("twice", True, "small"),
    ("twice", True, "hidden"),
    ("no rate", True, "a copy"),
    ("no rate", False, "a copy"),
    ("no rate", False, True),
    ("no rate", True, True),
]
PATIENTS += [
    (disease, trained, False)
    for disease in ("frozen", "no scale", "disabled", "no rate")
    for trained in (False, True)
]


def switches_of(layer) -> dict:
    """What may be switched in a patient, besides its weights."""
    return {
        "enabled": layer.enabled,
        "merged": layer.merged,
        "scale": layer.scale,
        "A.requires_grad": layer.A.requires_grad,
        "B.requires_grad": layer.B.requires_grad,
    }


def examined(function, layer, optimizer):
    """What the learner's function says of a patient, whom it leaves as it was."""
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    switches = switches_of(layer)
    said = function(layer, optimizer)
    need(
        all(
            torch.equal(tensor, before[name])
            for name, tensor in layer.state_dict().items()
        ),
        "Your examination changed the patient's weights: look, compute gradients if"
        " you like, but do not step.",
    )
    need(
        not optimizer.state,
        "Your examination took a step of the optimizer: its means are no longer those"
        " of a patient who was not examined. Look into its groups.",
    )
    changed = [
        name for name, now in switches_of(layer).items() if now != switches[name]
    ]
    need(
        not changed,
        f"After your examination {', '.join(changed)} is not what it was. The"
        " doctor only looks: put back what you change for a test.",
    )
    return said


def spare_the_healthy(said, word, trained, other) -> None:
    """What looks like a disease and is none. word: what the learner has for `said`."""
    wrong, why = HEALTHY.get(other, ("", ""))
    need(said != wrong, f"You called a healthy one {word!r}: {why}")
    need(
        trained or said in ("healthy", "twice"),
        f"You called a healthy one {word!r}: its B is zero because it has not been"
        " trained yet, and that is as it should be. Only with A zero too is it"
        " dead.",
    )
    need(
        said != "twice",
        f"You called a healthy one {word!r}: being merged is no disease. Look"
        " whether its output differs from layer.linear's, though the weight holds"
        " the update already.",
    )
    need(
        said != "disabled",
        "You called a healthy one 'disabled': merged, it adds nothing any more, and"
        " rightly so.",
    )


@checks("Every patient was found out, and the healthy ones were sent home.")
def diagnose(function, dead="dead", twice="twice") -> None:
    """function(layer, optimizer) -> one of the words of FOUND; of two of them a variant
    of the exercise has others."""
    words = {name: name for name in FOUND} | {"dead": dead, "twice": twice}
    names = {word: name for name, word in words.items()}
    # every kind, in any order
    for disease, trained, other in random.sample(PATIENTS, len(PATIENTS)):
        said = examined(function, *patient(disease, trained, other))
        need(
            said is not None,
            "Your function said nothing of a patient that "
            + FOUND[disease]
            + ": return a word in every case.",
        )
        need(
            isinstance(said, str) and said in names,
            f"{said!r} is none of the words: {', '.join(names)}. (In small letters.)",
        )
        word, said = said, names[said]
        if disease == "healthy":
            spare_the_healthy(said, word, trained, other)
        need(
            said == disease,
            f"There was a patient that {FOUND[disease]}, and you said {word!r}."
            + MORE.get(other, ""),
        )
