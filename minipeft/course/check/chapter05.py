"""Chapter 05, LoRA in practice: one run by other knobs, equal budgets, PiSSA's start,
LoRA+'s groups, and a diagnosis."""

import random

import torch
from torch import nn

from .teacher import checks, need, same

__all__ = ["diagnose", "loraplus_groups", "pissa_start", "rank_at_budget", "same_run"]


def near(a, b) -> bool:
    return abs(a - b) <= 1e-5 * max(abs(a), abs(b), 1e-30)  # in 32 bits too


@checks(
    "The run is the same, step for step, under both optimizers: A keeps its rate, and B"
    " pays for the scale."
)
def same_run(function) -> None:
    """function(c, rate_A, rate_B, optimizer) -> (rate_A, rate_B) that undo alpha's
    being multiplied by c."""
    for optimizer, power in (("adam", 1), ("sgd", 2)):
        for _ in range(3):
            c, a, b = (
                random.choice([2.0, 3.0, 5.0]),
                random.uniform(0.001, 0.01),
                random.uniform(0.02, 0.1),
            )
            got = function(c, a, b, optimizer)
            need(
                isinstance(got, tuple | list) and len(got) == 2,
                "Give me two numbers: return rate_A, rate_B.",
            )
            got_a, got_b = (float(rate) for rate in got)
            said = f"With {optimizer}: "
            need(
                not (near(got_a, b) or near(got_b, a)),
                said + "the two rates are swapped: A's comes first.",
            )
            need(
                not (near(got_a, a) and near(got_b, b)),
                said
                + "you changed nothing; but alpha is c times what it was, and so is"
                " each step of B.",
            )
            need(
                not (near(got_b, b * c**power) and near(got_a, a)),
                said
                + "upside down: alpha has grown, so B has to take smaller steps, not"
                " larger ones.",
            )
            need(
                not near(got_a, a / c),
                said
                + "you slow A down too. A's gradient contains s B, and that product is"
                " to stay as it was: so A's rate stays.",
            )
            need(
                near(got_a, a),
                said
                + f"A's rate has become {got_a / a:.2g} times what it was. The function"
                " s B A x stays the same, and so does A's gradient: leave A's rate"
                " alone.",
            )
            need(
                not (optimizer == "sgd" and near(got_b, b / c)),
                said
                + "B / c needs its steps to be c times smaller, and its gradient has"
                " become c times larger: plain gradient descent feels both.",
            )
            need(
                not (optimizer == "adam" and near(got_b, b / c**2)),
                said
                + "you count the larger gradient, but Adam divides by its size: only"
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
    for _ in range(4):
        d, f, layers = (
            random.randint(40, 60),
            random.randint(110, 150),
            random.randint(3, 6),
        )
        shapes = {
            "q_proj": (d, d),
            "v_proj": (d // 4, d),
            "up_proj": (f, d),
            "down_proj": (d, f),
        }
        for targets in (["q_proj", "v_proj"], ["up_proj", "down_proj"], list(shapes)):
            both = sum(
                d_out + d_in for d_out, d_in in (shapes[name] for name in targets)
            )
            right = random.randint(9, 20)
            # something is left over, or nothing
            for left in (random.uniform(0.6, 0.9), 0):
                budget = int((right + left) * layers * both)
                a_budget(function, shapes, layers, targets, both, right, budget)
            for budget in (0, layers * both - 1):
                got = function(dict(shapes), layers, list(targets), budget)
                need(
                    got == 0,
                    f"A budget of {budget:,} does not pay for one rank, which costs"
                    f" {layers * both:,}: the answer is 0, and yours is {got}.",
                )


def a_budget(function, shapes, layers, targets, both, right, budget) -> None:
    def costs(of, names=targets):
        return budget // (layers * sum(of(*shapes[name]) for name in names))

    mistakes = {
        right + 1: (
            "One too many: you round, and the budget is exceeded. What is left over"
            " does not pay for another rank."
        ),
        right - 1: (
            "One too few: the budget may be spent to the last number, and here it pays"
            " for one rank more."
        ),
        budget // both: f"You count one layer; the model has {layers}.",
        costs(lambda d_out, d_in: 2 * d_in): (
            "You took every matrix for square, with d_in on both sides: B is"
            " (d_out, r)."
        ),
        costs(lambda d_out, d_in: 2 * d_out): (
            "You took every matrix for square, with d_out on both sides: A is (r,"
            " d_in)."
        ),
        costs(
            lambda d_out, d_in: d_in
        ): "You count A alone, r · d_in numbers: B has r · d_out more.",
        costs(
            lambda d_out, d_in: d_out
        ): "You count B alone, d_out · r numbers: A has r · d_in more.",
        costs(lambda d_out, d_in: d_out * d_in): (
            "You count the whole matrices, d_out · d_in; LoRA costs d_out + d_in for"
            " each rank."
        ),
        costs(
            lambda d_out, d_in: d_out + d_in, shapes
        ): "You count all matrices; only the targets are adapted.",
    }
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
    need(got == right or got not in mistakes, mistakes.get(got, ""))
    need(
        got == right,
        f"For a budget of {budget:,} on {', '.join(targets)} ({layers} layers, together"
        f" {layers * both:,} numbers a rank) the rank is {right}; yours is {got}.",
    )


@checks(
    "W = W_res + s B A, s B A is the best part of rank r, and A and B share its size"
    " evenly. This is PiSSA.",
    "W is (d_out, d_in), so A is (r, d_in) and B is (d_out, r); torch.linalg.svd gives"
    " V transposed already.",
)
def pissa_start(function) -> None:
    """function(W, r, s) -> A (r, d_in), B (d_out, r), W_res (d_out, d_in)."""
    for _ in range(3):
        d_out, d_in, r, s = (
            random.randint(12, 16),
            random.randint(7, 10),
            random.choice([2, 3]),
            random.choice([0.5, 3.0]),
        )
        W = torch.randn(d_out, d_in, dtype=torch.float64)
        got = function(W, r, s)
        need(
            isinstance(got, tuple | list) and len(got) == 3,
            "Give me three tensors: return A, B, W_res.",
        )
        A, B, rest = got
        shapes = tuple(A.shape), tuple(B.shape)
        need(
            shapes != ((d_out, r), (r, d_in)),
            "A and B are swapped: A reads, (r, d_in); B writes, (d_out, r).",
        )
        need(
            shapes == ((r, d_in), (d_out, r)),
            f"A and B have the shapes {shapes[0]} and {shapes[1]}; they should have "
            f"{(r, d_in)} and {(d_out, r)}.",
        )
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        best, worst = (
            U[:, part] * S[part] @ Vt[part] for part in (slice(r), slice(-r, None))
        )
        product = B @ A
        need(
            not same(rest, W),
            "W_res is W: then the main part of W is there twice, once frozen and once"
            " in B A.",
        )
        need(
            not same(s * product, worst),
            "You took the smallest singular values: PiSSA trains the largest.",
        )
        need(
            not same(product, best),
            "B A is the best part of rank r, but the layer computes s B A: divide by s "
            "before you take the root.",
        )
        need(
            not same(s * s * product, best),
            "You divide A and B by s each: then s counts twice. Divide the singular "
            "values by s, once.",
        )
        need(
            not same(s * product, U[:, :r] * S[:r].square() @ Vt[:r]),
            "The singular values are in A and in B in full, so B A has their squares:"
            " give each the root.",
        )
        need(
            not same(product, U[:, :r] @ Vt[:r]),
            "The singular values are missing: A and B hold directions only.",
        )
        root = (S / s).sqrt()
        need(
            not same(A, root[:r, None] * Vt.T[:r]),
            "A is made of the rows of V. linalg.svd returns V transposed, and its rows "
            "are the directions: take the first r rows of what it returns.",
        )
        need(
            not same(A, (root * Vt)[:r]),
            "In A the roots stand at the columns. The i-th row of V transposed belongs"
            " to the i-th value: root[:, None] * Vt.",
        )
        need(
            not same(product, s * best),
            "You multiply by s before the root: the layer multiplies by s once more."
            " Divide.",
        )
        Q, R = torch.linalg.qr(W)
        need(
            not same(product, Q[:, :r] @ R[:r])
            and not same(s * product, Q[:, :r] @ R[:r]),
            "This is OLoRA's start, from W = Q R. PiSSA takes the singular value"
            " decomposition.",
        )
        need(
            same(s * product, best),
            "s B A is not the best approximation of W of rank r: it should be the first"
            " r singular directions with their values.",
        )
        need(
            same(rest + s * product, W),
            "W_res + s B A is not W: the model would have changed. Subtract s B A,"
            " with s.",
        )
        sizes = A.square().sum(1)  # the directions may come in any order
        need(
            same(sizes.sort(descending=True).values, S[:r] / s)
            and same(A @ A.T, torch.diag(sizes))
            and same(B.T @ B, torch.diag(sizes)),
            "The product is right, but A and B share it unevenly: PiSSA gives each the"
            " root of S / s.",
        )


@checks(
    "Every trained number is in one group, B and the vectors learn at lr · ratio, the"
    " rest at lr."
)
def loraplus_groups(function) -> None:
    """function(named, lr, ratio) -> [{"params": [...], "lr": ...}, ...]; named: [(name,
    parameter), ...]."""
    names = {
        "layers.0.lora_A.weight": (2, 5),
        "layers.0.lora_B.weight": (4, 2),
        "layers.0.lora_B.bias": (4,),
        "layers.1.lora_A.weight": (2, 4),
        "layers.1.lora_B.weight": (5, 2),
        "norm.weight": (5,),
        "head.weight": (3, 5),
    }
    for _ in range(2):
        named = [
            (name, nn.Parameter(torch.randn(shape))) for name, shape in names.items()
        ]
        frozen = [
            (f"layers.{i}.weight", nn.Parameter(torch.randn(4, 5), requires_grad=False))
            for i in range(2)
        ]
        everything = named + frozen
        random.shuffle(everything)
        lr, ratio = random.choice([0.001, 0.002]), random.choice([4.0, 16.0])
        groups = function(everything, lr, ratio)
        need(
            not isinstance(groups, torch.optim.Optimizer),
            "That is an optimizer. Return the groups that you gave it.",
        )
        need(
            isinstance(groups, list | tuple)
            and all(isinstance(group, dict) and "params" in group for group in groups),
            'Give me a list of groups, as an optimizer takes them: [{"params": [...],'
            ' "lr": ...}, ...].',
        )
        need(
            all("lr" in group for group in groups),
            "A group has no lr of its own. An optimizer would give it its default: "
            "write the rate into each group.",
        )

        def alone(group):
            return (
                [group["params"]]
                if isinstance(group["params"], torch.Tensor)
                else list(group["params"])
            )

        groups = [group | {"params": alone(group)} for group in groups]
        rates, name_of = {}, {id(parameter): name for name, parameter in everything}
        for group in groups:
            for parameter in group["params"]:
                name = name_of.get(id(parameter))
                need(
                    name is not None,
                    "A group holds something that is none of the parameters: put the"
                    " parameters in, not their names and no copies.",
                )
                need(
                    name not in rates,
                    f"{name} is in two groups: an optimizer refuses that.",
                )
                rates[name] = group["lr"]
        need(
            not any(name in rates for name, _ in frozen),
            "The frozen weights of the base are in your groups: take only "
            "what requires a gradient.",
        )
        missing = [name for name, _ in named if name not in rates]
        need(not missing, f"{', '.join(missing)}: in no group, so never trained.")
        rate = {kind: rates[f"layers.0.lora_{kind}.weight"] for kind in "AB"}
        need(
            not near(rate["A"], rate["B"]),
            "A and B have the same rate: that is plain LoRA.",
        )
        need(
            not near(rate["A"], lr * ratio),
            "A and B are swapped: it is B that learns faster.",
        )
        need(
            not near(rate["A"], lr / ratio),
            "You slow A down by the ratio. The convention, PEFT's too, is to leave A at"
            " lr and to give B lr · ratio.",
        )
        need(not near(rate["B"], lr + ratio), "You add the ratio: multiply.")
        need(
            not near(rate["B"], lr / ratio),
            "You divide by the ratio, and B gets the smaller rate: it is to learn"
            " faster.",
        )
        need(
            near(rate["A"], lr) and near(rate["B"], lr * ratio),
            f"A should learn at {lr:g} and B at {lr * ratio:g}; "
            f"yours learn at {rate['A']:g} and {rate['B']:g}.",
        )
        need(
            near(rates["layers.0.lora_B.bias"], lr * ratio),
            "The bias of a lora_B goes with B, at lr · ratio.",
        )
        need(
            near(rates["norm.weight"], lr * ratio),
            "norm.weight has one dimension, so it goes with B, at lr · ratio, whatever "
            "its name.",
        )
        need(
            near(rates["head.weight"], lr),
            "Matrices that are no lora_B, such as a head, learn at lr.",
        )
        for name, parameter in named:
            fast = "lora_B" in name or parameter.dim() == 1
            need(
                near(rates[name], lr * ratio if fast else lr),
                f"{name} learns at {rates[name]:g}: the rule is the same in every"
                " layer.",
            )


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
        if disease == "dead":
            layer.A.zero_()
    rates, kept = {"A": 1e-3, "B": 1e-3}, "AB"
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
    elif disease == "twice" or other:
        layer.merged, layer.adds_when_merged = True, disease == "twice"
        with torch.no_grad():
            layer.linear.weight += layer.scale * layer.B @ layer.A
    groups = [{"params": [getattr(layer, name)], "lr": rates[name]} for name in kept]
    return layer, torch.optim.AdamW(groups)


PATIENTS = [
    ("healthy", False, False),
    ("healthy", True, False),
    ("healthy", True, True),
    ("healthy", False, "B alone"),
    ("healthy", True, "B alone"),
    ("dead", False, False),
    ("twice", True, False),
    ("no rate", False, True),
    ("no rate", True, True),
]
PATIENTS += [
    (disease, trained, False)
    for disease in ("frozen", "no scale", "disabled", "no rate")
    for trained in (False, True)
]


@checks("Every patient was found out, and the healthy ones were sent home.")
def diagnose(function) -> None:
    """function(layer, optimizer) -> one of the words of FOUND."""
    # every kind, in any order
    for disease, trained, other in random.sample(PATIENTS, len(PATIENTS)):
        layer, optimizer = patient(disease, trained, other)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
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
            said is not None,
            "Your function said nothing of a patient that "
            + FOUND[disease]
            + ": return a word in every case.",
        )
        need(
            said in FOUND,
            f"{said!r} is none of the words: {', '.join(FOUND)}. (In small letters.)",
        )
        need(
            not (
                disease == "healthy"
                and not trained
                and said not in ("healthy", "twice")
            ),
            f"You called a healthy one {said!r}: its B is zero because it has not been"
            " trained yet, and that is as it should be. Only with A zero too is it"
            " dead.",
        )
        need(
            not (other == "B alone" and said == "frozen"),
            "You called a healthy one 'frozen': its A is, but its B learns. LoRA-FA"
            " trains B alone, and that is no disease.",
        )
        need(
            not (disease == "healthy" and said == "twice"),
            "You called a healthy one 'twice': being merged is no disease. Look whether"
            " its output differs from layer.linear's, though the weight holds the"
            " update already.",
        )
        need(
            not (disease == "healthy" and said == "disabled"),
            "You called a healthy one 'disabled': merged, it adds nothing any more, and"
            " rightly so.",
        )
        need(
            said == disease,
            f"There was a patient that {FOUND[disease]}, and you said {said!r}.",
        )
