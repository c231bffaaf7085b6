"""Chapter 04, LoRA: the update, a layer with faults, the first step predicted, a rank
chosen, a detective's question, and LoRA as a method of one's own."""

import copy
import math
import random
import statistics

import torch
from torch import nn

from ... import Base, LayerConfig, LinearDelta, get_peft_model
from ..comparison import compare as told_apart
from .kinds import Choices, update_fits
from .practice import (
    SEEDS,
    Adam,
    LargestTensor,
    chains,
    copy_stands_alone,
    held,
    missed,
    needs_to_learn,
    numbers,
    small_gpt,
    without_seeding,
)
from .slips import Formula
from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "choose_rank",
    "lora_delta",
    "lora_layer",
    "my_lora",
    "predict_first_step",
    "six_million",
]

SHAPES = (
    "A is (r, d_in) and B is (d_out, r), so the product is B @ A, in this order; x (…,"
    " d_in) meets A first: x @ A.T."
)


def draw(kind="plain"):
    """r, d_in, d_out, alpha: all different, so that no slip can hide behind two equal
    numbers; "small": alpha is smaller than r, else alpha // r is at least 2; "square":
    d_in is d_out."""
    r = 3 if kind == "square" else random.choice([2, 3, 5])  # alpha / 3 has no end
    d_in = random.randint(7, 11)
    d_out = d_in if kind == "square" else random.randint(12, 17)
    alpha = 1.5 if kind == "small" else random.choice([11.0, 13.0, 19.0])
    return r, d_in, d_out, alpha


def wrong_scales(product, alpha, r) -> dict:
    """The update with every scale that people use by mistake. product: B A."""
    return {
        "Your update is r times too large: you multiply by alpha. Did you forget to"
        " divide by r?": (alpha * product),
        "Your update is B A alone: the factor alpha / r is missing.": product,
        "You multiply by alpha / √r. That is rsLoRA, of chapter 05; LoRA's factor is"
        " alpha / r.": alpha / r**0.5 * product,
        "Your factor is upside down: you have r / alpha, and it should be alpha / r.": (
            r / alpha * product
        ),
        "The scale alpha / r is folded in twice: once is enough.": (
            (alpha / r) ** 2 * product
        ),
        "You divide by r, but alpha is missing: the factor is alpha / r.": product / r,
        "You subtract the update: the sign is wrong.": -alpha / r * product,
        "You take the whole part of alpha / r (`//`, or int): it is a fraction.": (
            alpha // r * product
        ),
        "Your factor is never below 1: alpha may be smaller than r.": (
            max(1, alpha / r) * product
        ),
    }


def scaled(A, B, alpha, r):
    return alpha / r * B @ A


def scaled_of(x, A, B, alpha, r):
    low = x @ A.T
    return alpha / r * low @ B.T


@checks(
    "Your update is (alpha / r) B A, for every shape that I tried, and gradients flow"
    " through it.",
    SHAPES,
)
def lora_delta(function) -> None:
    """function(A, B, alpha, r) -> the update of the weight, (d_out, d_in)."""
    for kind in ("plain", "small", "square"):
        r, d_in, d_out, alpha = draw(kind)
        A = torch.randn(r, d_in, dtype=torch.float64, requires_grad=True)
        B = torch.randn(d_out, r, dtype=torch.float64, requires_grad=True)
        got, product = function(A, B, alpha, r), B @ A
        need(
            not (isinstance(got, torch.Tensor) and got.shape == (d_in, d_out))
            or d_in == d_out,
            "Your update lies on its side: it is (d_in, d_out). PyTorch keeps a weight"
            " as (d_out, d_in), and B @ A has that shape already: nothing needs a"
            " transpose.",
        )
        wrong = wrong_scales(product, alpha, r)
        if d_in == d_out:
            wrong["In a square matrix yours lies on its side: it is B @ A."] = (
                alpha / r * product.T
            )
        formula = Formula(scaled, A, B, alpha, r)
        compare(got, alpha / r * product, wrong, "Your update", formula=formula)
        with torch.no_grad():
            A += 1  # as a step of training does
        again = function(A, B, alpha, r)
        need(
            same(again, alpha / r * B @ A),
            "After a step of training A has other numbers, and your update is the old"
            " one: compute it at each call, and keep nothing.",
        )


@checks(
    "Frozen base, A and B of the right shapes, nothing changes at the start, (alpha /"
    " r) B A after it, dropout on the input alone, gradients in A and B alone. This is"
    " LoRA.",
    SHAPES,
)
def lora_layer(layer_class) -> None:
    """layer_class(linear, r, alpha, dropout=0.0), an nn.Module with parameters A (r,
    d_in) and B (d_out, r)."""
    need(
        isinstance(layer_class, type) and issubclass(layer_class, nn.Module),
        "Give me the class itself, a subclass of nn.Module.",
    )
    for kind in ("plain", "small"):
        r, d_in, d_out, alpha = draw(kind)
        linear = nn.Linear(d_in, d_out)
        original = copy.deepcopy(linear)
        layer = without_seeding(lambda: layer_class(linear, r, alpha))
        A, B = (matrix(layer, name) for name in "AB")
        check_shapes(A, B, r, d_in, d_out)
        check_start(A, B)
        other = layer_class(nn.Linear(d_in, d_out), r, alpha)
        need(not torch.equal(matrix(other, "A"), A), ONE_START)
        check_trainable(layer, original, A, B)
        # (B, T, d_in), as in a transformer; a single row too
        x = torch.randn(1 if kind == "small" else 4, 3, d_in)
        weight, bias = original.weight.detach(), original.bias.detach()
        base = x @ weight.T + bias
        need(same(layer(x), base), at_start(layer(x), base, bias))
        x.requires_grad_()
        check_output(layer, A, B, x, original, alpha, r)
        copy_stands_alone(layer, lambda module: module(x))
        check_dropout(layer_class, alpha)
        check_rate(layer_class, alpha)
        check_training(layer, A, B, x)
        need(
            same(linear.weight, weight) and same(linear.bias, bias),
            "The base's weight has changed: LoRA never touches it.",
        )


def matrix(layer, name):
    """The parameter A or B of a learner's layer; an nn.Linear of that name will do as
    well."""
    found = getattr(layer, name, None)
    if isinstance(found, nn.Linear):
        need(
            found.bias is None,
            f"self.{name} is a Linear with a bias: LoRA's two matrices have none"
            " (bias=False).",
        )
        found = found.weight
    need(
        found is not None, f"I look for your matrix as self.{name}, and there is none."
    )
    need(
        isinstance(found, nn.Parameter),
        f"self.{name} is a {type(found).__name__}: an optimizer sees only an"
        " nn.Parameter.",
    )
    return found


def check_shapes(A, B, r, d_in, d_out) -> None:
    a, b = tuple(A.shape), tuple(B.shape)
    need(
        (a, b) != ((d_out, r), (r, d_in)),
        "A and B are swapped: A reads the input, (r, d_in); B writes the output,"
        " (d_out, r).",
    )
    need(
        (a, b) != ((d_in, r), (r, d_out)),
        "A and B are transposed: as in nn.Linear the output's size comes first, so A is"
        " (r, d_in) and B is (d_out, r).",
    )
    need(
        a == (r, d_in),
        f"A has the shape {a}; it takes d_in numbers to r, so it is (r, d_in) ="
        f" {(r, d_in)}.",
    )
    need(
        b == (d_out, r),
        f"B has the shape {b}; it takes r numbers to d_out, so it is (d_out, r) ="
        f" {(d_out, r)}.",
    )


ONE_START = (
    "Two layers begin with the same A: it is drawn with a fixed seed. Each layer should"
    " draw its own."
)


def check_start(A, B) -> None:
    a, b = bool(A.any()), bool(B.any())
    need(
        a or b,
        "A and B are both zero. Then each one's gradient is zero too, as it contains"
        " the other: nothing would ever learn. Make A random and leave B zero.",
    )
    need(
        not (a and b),
        "B is random at the start, so B A is not zero, and the model is damaged before"
        " the first step. B starts at zero.",
    )
    need(
        a,
        "You made A zero and B random. That starts at zero too, and learns; but the"
        " convention, which every file of weights follows, is the other way round: A"
        " random, B zero.",
    )
    need(
        A.std() < 5,
        f"A's numbers have the size {A.std():.2g}: then the first step of B is"
        " enormous. About 1 / √d_in is usual.",
    )
    need(
        A.std() == 0 or A.std() > 1e-4,
        f"A's numbers have the size {A.std():.2g}: then the gradient of B is as small."
        " About 1 / √d_in is usual.",
    )
    need(
        not torch.allclose(A[0], A[1], rtol=1e-2),
        "The rows of A are all alike: then all r of them learn the same thing. Draw"
        " them at random.",
    )


def check_trainable(layer, original, A, B) -> None:
    trained = {id(p): name for name, p in layer.named_parameters() if p.requires_grad}
    need(
        id(A) in trained and id(B) in trained,
        "A or B is frozen (requires_grad is False): they are all that LoRA trains.",
    )
    extra = [name for number, name in trained.items() if number not in (id(A), id(B))]
    sizes = {tuple(p.shape) for name, p in layer.named_parameters() if name in extra}
    need(
        tuple(original.weight.shape) not in sizes,
        "The base weight is not frozen: an optimizer would train it as well. Set"
        " requires_grad to False, for the weight and for the bias.",
    )
    need(
        tuple(original.bias.shape) not in sizes,
        "The base's weight is frozen, but its bias is not.",
    )
    need(
        not extra,
        f"Something else would train too: {', '.join(extra)}. LoRA has A and B, and"
        " nothing more.",
    )


def at_start(got, base, bias) -> str:
    if got is None:
        return "forward gives None: is there a `return` at its end?"
    if isinstance(got, torch.Tensor) and got.shape != base.shape:
        return (
            f"Your output has the shape {tuple(got.shape)}, where the base's has"
            f" {tuple(base.shape)}."
        )
    if same(got, base + bias):
        return (
            "The bias is added twice: the base's output holds it already, and LoRA has"
            " none."
        )
    return (
        "Before training, B is zero, so your layer must give exactly what the base"
        " gives; it does not."
    )


def check_output(layer, A, B, x, original, alpha, r) -> None:
    """The output and its gradients, with random numbers in A and B."""
    weight, bias = original.weight.detach(), original.bias.detach()
    with torch.no_grad():
        A.copy_(torch.randn(A.shape))
        B.copy_(torch.randn(B.shape))
    base, update = x @ weight.T + bias, x @ A.T @ B.T
    right = base + alpha / r * update
    layer.eval()
    compare(
        layer(x),
        right,
        output_slips(base, update, bias, alpha, r),
        "Your output",
        {"A": A, "B": B, "x": x},
        formula=Formula(scaled_of, x, A, B, alpha, r, after=base.detach().add),
    )
    with torch.no_grad():
        need(
            same(layer(x), right),
            "Under torch.no_grad(), as in generation, your layer gives another output.",
        )


def output_slips(base, update, bias, alpha, r) -> dict:
    """{message: the wrong output}; update: B A x, without its scale."""
    wrong = wrong_scales(update, alpha, r)
    return {message: base + other for message, other in wrong.items()} | {
        "Your layer gives the update alone: the output of the base is missing.": (
            alpha / r * update
        ),
        "Your layer gives the base's output alone: the update never reaches it.": base,
        "The bias is added twice: the base's output holds it already, and LoRA"
        " has none.": base + alpha / r * update + bias,
        "The base's output is scaled too: alpha / r belongs to the update alone.": (
            alpha / r * (base + update)
        ),
    }


def check_training(layer, A, B, x) -> None:
    layer.train()
    layer(x).square().sum().backward()
    need(
        A.grad is not None and B.grad is not None,
        "After backward() A or B has no gradient: something detaches them in forward.",
    )


def check_dropout(layer_class, alpha) -> None:
    """Tell apart the places where a dropout may sit. r = 1, so that dropping A x drops
    a whole row of the update."""
    d_in, d_out, p = 64, 32, 0.5
    x = torch.randn(4000, d_in)
    linear = nn.Linear(d_in, d_out)
    need(
        same(layer_class(linear, 1, alpha, p).train()(x), linear(x)),
        "B is zero, so the output must be the base's, in training too; but it changes."
        " Your dropout touches the base's path: drop only what goes into A.",
    )
    layer = layer_class(zero_linear(d_in, d_out), 1, alpha, p).train()
    with torch.no_grad():
        B = matrix(layer, "B")
        B.copy_(torch.randn(B.shape))
        update, got = alpha * x @ matrix(layer, "A").T @ B.T, layer(x)
        need(
            not same(got, update),
            "In train() mode your dropout does nothing: is it used in forward?",
        )
        need(
            not same(layer(x), got),
            "Two calls in train() mode drop the same inputs: draw them anew at each"
            " call.",
        )
        nothing = got == 0
        need(
            nothing.all(dim=1).float().mean() < p / 2,
            "You drop A x, the r numbers in the middle. LoRA's dropout is on the input:"
            " dropout(x) goes into A.",
        )
        need(
            nothing.float().mean() < p / 2,
            "You drop the output of the update. LoRA's dropout is on the input:"
            " dropout(x) goes into A.",
        )
        size = ((got * update).sum() / update.square().sum()).item()
        if abs(size - 1) > 0.2:
            check_rate(layer_class, alpha)  # one mask for all tokens has its own name
            raise Wrong(
                "Your dropout changes the average size of the update: what is kept must"
                " grow by 1 / (1 - p). nn.Dropout does it for you."
            )
        layer.eval()
        need(
            same(layer(x), update),
            "In eval() mode your layer still drops: use nn.Dropout, which knows about"
            " train() and eval().",
        )


def zero_linear(d_in, d_out):
    """A base that gives zero, and a copy of it does too: the output is the update."""
    linear = nn.Linear(d_in, d_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def check_rate(layer_class, alpha) -> None:
    """How many inputs are dropped: A reads one input, so each zero is one dropped."""
    x = torch.ones(4000, 8)
    for p in (0.4, 0.1):
        layer = layer_class(zero_linear(8, 6), 1, alpha, p).train()
        A, B = (matrix(layer, name) for name in "AB")
        A.copy_(torch.eye(8)[:1])
        B.fill_(1.0)
        rates = [(layer(x)[:, 0] == 0).double().mean().item() for _ in range(20)]
        need(
            max(rates) < 1 or min(rates) > 0,
            "All tokens lose the same inputs: draw for each entry of x by itself.",
        )
        rate = rates[0]
        need(
            abs(rate - p) < 0.05,  # 6 standard deviations of 4,000 draws
            f"With dropout={p} your layer drops {rate:.0%} of the inputs: `dropout` is"
            " the share that is dropped, as nn.Dropout takes it.",
        )


LLAMA3_8B = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    # (d_out, d_in)
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}


@checks(
    "Both give 6,815,744. So the number alone does not say which of them was run, and"
    " neither is the one that was printed beside it."
)
def six_million(answer) -> None:
    """answer: two configurations, each (r, targets), which on Llama-3-8B train
    6,815,744 numbers."""
    wanted, layers = 6_815_744, 32
    need(
        answer is not None and answer != [],
        "There is nothing here yet: write your two configurations, [(r, [targets]), (r,"
        " [targets])].",
    )
    pairs = isinstance(answer, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 for one in answer
    )
    need(pairs, "Write it as [(r, [targets]), (r, [targets])].")
    found = set()
    for r, targets in answer:
        need(
            isinstance(r, int) and not isinstance(r, bool) and r > 0,
            f"r = {r!r}: a rank is a whole number, 1 or more.",
        )
        need(
            isinstance(targets, list | tuple | set | frozenset),
            f"The targets stand in a list, also when there is one; yours is"
            f" {targets!r}.",
        )
        need(
            len(set(targets)) == len(targets),
            f"{', '.join(map(str, targets))}: a module is adapted once, however often"
            " it is named.",
        )
        attention = {
            name: shape for name, shape in LLAMA3_8B.items() if name[1:] == "_proj"
        }
        unknown = [str(name) for name in targets if name not in attention]
        need(
            not unknown,
            f"{', '.join(unknown)}: the attention's matrices are called"
            f" {', '.join(attention)}.",
        )
        count = layers * r * sum(sum(attention[name]) for name in set(targets))
        said = f"r = {r} on {', '.join(targets)} trains {count:,}"
        need(count != 2 * wanted, f"{said}: exactly twice the number.")
        need(count != wanted / 2, f"{said}: exactly half the number.")
        need(
            count != layers * wanted,
            f"{said}: your number is right for one layer; the model has {layers}.",
        )
        need(
            count == wanted or layers * r * 8192 * len(set(targets)) != wanted,
            f"{said}: you took k_proj and v_proj for square; with grouped queries they"
            " are 1024 × 4096.",
        )
        need(
            count == wanted,
            f"{said}: in one layer q and o cost 8,192 r each, k and v 5,120 r each, and"
            f" there are {layers} layers.",
        )
        found.add((r, frozenset(targets)))
    need(
        len(found) > 1, "That is right, and it is one configuration: there is another."
    )


# ---- the first step, predicted -------------------------------------------------------

# {case: (optimizer, factors of s, A's start, the loss and the rate, why)}
FIRST_STEPS = {
    "SGD, s": ("SGD", (1, 0, 0, 0), "s scales B's gradient, and then B A"),
    "Adam, s": (
        "Adam",
        (1, 0, 0, 0),
        "Adam's first step of B has one length, lr, for"
        " each entry; only the s before B A is left",
    ),
    "Adam, s and lr / {}": (
        "Adam",
        (1, 0, 0, -1),
        "what s gains in B A, the smaller step of B loses",
    ),
    "SGD, A": ("SGD", (0, 1, 0, 0), "the gradient of B contains A, and so does B A"),
    "Adam, A": (
        "Adam",
        (0, 1, 0, 0),
        "the gradient's size is divided out; the A in B A is left",
    ),
    "SGD, loss": ("SGD", (0, 0, 1, 0), "the gradient of B is that of the loss, once"),
    "Adam, loss": ("Adam", (0, 0, 1, 0), "Adam divides each gradient by its own size"),
}


def case_name(case: str, factor) -> str:
    return case.format(f"{factor:g}") if "{}" in case else f"{case} × {factor:g}"


def first_step(optimizer, s=1.0, a=1.0, loss=1.0, lr=1.0) -> float:
    """The size of s B A after one step from B = 0."""
    torch.manual_seed(5)
    X, target = torch.randn(2, 30, 9, dtype=torch.float64)
    A = nn.Parameter(a * torch.randn(4, 9, dtype=torch.float64))
    B = nn.Parameter(torch.zeros(9, 4, dtype=torch.float64))
    loss = loss * (s * X @ A.T @ B.T - target).square().mean()
    if optimizer == "Adam":
        Adam([A, B], lr=1e-3 * lr).step(loss)
    else:
        B = -1e-3 * lr * torch.autograd.grad(loss, B)[0]
    return (s * B @ A).norm().item()


@checks(
    "All seven. Gradient descent counts a factor as often as it stands in the gradient"
    " of B and in B A; Adam forgets those in the gradient."
)
def predict_first_step(predicted, factor=3) -> None:
    """predicted: {case: how many times the first ΔW is longer}."""
    cases = {case_name(case, factor): row for case, row in FIRST_STEPS.items()}
    said = numbers(predicted, cases)
    for case, (optimizer, powers, why) in cases.items():
        changed = first_step(optimizer, *(float(factor) ** power for power in powers))
        true = changed / first_step(optimizer)
        need(
            abs(said[case] - true) <= 0.02 * true,
            f"{case!r}: you say {missed(said[case], true)}. Think of this: {why}.",
        )


# ---- a rank, chosen ------------------------------------------------------------------


SPLITS = "valid", "test"
# {kind: {rank: the three seeds' losses at its best rate}}
EXACT = {
    # 8 is behind 16; 4, whose mean is worse, is not
    "gap": {
        2: (0.5, 0.51, 0.5),
        4: (0.26, 0.2, 0.3),
        8: (0.23, 0.24, 0.236),
        16: (0.2, 0.21, 0.205),
    },
    # 8 is not behind 16, and 4 is not behind 8; but 4 is behind 16
    "chain": {
        2: (0.5, 0.51, 0.5),
        4: (0.23, 0.242, 0.236),
        8: (0.21, 0.21, 0.225),
        16: (0.2, 0.21, 0.205),
    },
    # one seed of 4 is the best of all
    "lucky top": {
        2: (0.5, 0.51, 0.505),
        4: (0.1, 0.4, 0.4),
        8: (0.256, 0.266, 0.2612),
        16: (0.25, 0.26, 0.255),
    },
    # the test puts 2 first
    "test top": {
        2: (0.3, 0.31, 0.306),
        4: (0.26, 0.27, 0.266),
        8: (0.23, 0.24, 0.236),
        16: (0.2, 0.21, 0.205),
    },
}


def sweep_drawn(rng, kind):
    """Runs of a sweep, in random order. Rank 8 is no better than rank 4, but for
    luck; rank 64 is better, and too large; the test prefers other rates."""
    rates = {2: 3e-2, 4: 1e-2, 8: 3e-3, 16: 1e-3, 64: 3e-4}
    on_test = {2: 1e-2, 4: 3e-3, 8: 1e-3, 16: 3e-4, 64: 1e-3}
    loss = {2: 0.40, 4: 0.30, 8: 0.295, 16: 0.31, 64: 0.20}
    if kind == "rank counts":
        rates |= {2: 1e-3}
        on_test |= {2: 3e-3}
        loss |= {4: 0.34, 8: 0.22, 16: 0.215}
    if kind == "all alike":
        loss |= {2: 0.301}
    if kind == "unlucky":
        loss |= {8: 0.25}
    runs = []
    for r in loss:
        for lr in (3e-2, 1e-2, 3e-3, 1e-3, 3e-4):
            for seed in SEEDS:
                away = abs(math.log10(lr / rates[r]))
                noise = rng.uniform(-0.004, 0.004) + (0.004, -0.005, 0.001)[seed]
                valid = loss[r] + 0.1 * away + noise + 0.002 * seed
                # one lucky seed at a rate that is bad otherwise
                if kind == "lucky" and r == 4 and lr == 3e-2:
                    valid = (0.15, 0.55, 0.60)[seed]
                # one unlucky seed at the rate that is best for all others
                if kind == "unlucky" and r == 4 and lr == 1e-2:
                    valid = (0.28, 0.28, 0.60)[seed]
                if kind in EXACT:
                    exact = EXACT[kind] | {64: (0.1, 0.1, 0.1)}
                    valid = exact[r][seed] + (0 if lr == rates[r] else 0.3 + 0.1 * away)
                test = 0.5 + valid / 2 + rng.uniform(-0.01, 0.01)
                test -= 0.3 * (lr == on_test[r])
                if kind == "test top" and r == 2 and lr == rates[2]:
                    test = 0.1 + 0.01 * seed
                runs.append(
                    {"r": r, "lr": lr, "seed": seed + 1, "parameters": 1000 * r}
                    | {"valid_loss": valid, "test_loss": test}
                )
    rng.shuffle(runs)
    return runs


def losses_of(runs, r, lr, key="valid_loss"):
    return {run["seed"]: run[key] for run in runs if at(run, r, lr)}


def at(run, r, lr):
    return (run["r"], run["lr"]) == (r, lr)


def rate_of(runs, r, key="valid_loss", join=None):
    """The rate of rank r with the lowest loss, by default in the mean of the seeds."""
    join = join or (lambda losses: sum(losses) / len(losses))
    found = {}
    for run in runs:
        if run["r"] == r:
            found.setdefault(run["lr"], []).append(run[key])
    return min(found, key=lambda lr: join(found[lr]))


def not_behind(a, b) -> bool:
    return told_apart(a, b, loss=True).verdict != "behind"


def rank_by_rule(
    runs,
    budget,
    rate=rate_of,
    alike=not_behind,
    key="valid_loss",
    pick=min,
    top=None,
    join=sum,
):
    """(r, lr) of the smallest rank within the budget that is not behind the best
    there. top: the loss that says which is the best; join: what of its seeds."""
    ranks = sorted({run["r"] for run in runs if run["parameters"] <= budget})
    losses = {r: losses_of(runs, r, rate(runs, r), key) for r in ranks}
    tops = {r: losses_of(runs, r, rate(runs, r), top or key) for r in ranks}
    best = min(ranks, key=lambda r: join(tops[r].values()))
    r = pick(r for r in ranks if alike(losses[r], losses[best]))
    return r, rate(runs, r)


def rank_by_steps(runs, budget, neighbour):
    """The same, from the best rank down until one is behind: behind the best, or
    behind its neighbour."""
    ranks = sorted({run["r"] for run in runs if run["parameters"] <= budget})
    losses = {r: losses_of(runs, r, rate_of(runs, r)) for r in ranks}
    best = r = min(ranks, key=lambda r: sum(losses[r].values()))
    for smaller in reversed(ranks[: ranks.index(best)]):
        if not not_behind(losses[smaller], losses[r if neighbour else best]):
            break
        r = smaller
    return r, rate_of(runs, r)


@checks(
    "Each rank at its own best rate, by validation and by all seeds; and no more rank"
    " than the seeds can tell apart."
)
def choose_rank(function, metric="loss") -> None:
    """function(runs, budget) -> (r, lr)."""
    kinds = "plain", "rank counts", "lucky", "all alike", "unlucky", *EXACT
    choices = Choices()
    for number, kind in enumerate(kinds):
        runs = sweep_drawn(random.Random(number), kind)
        more = () if kind in EXACT else (16_000, 5_000)
        for budget in (20_000, 8_000, *more):
            got = function([shown(run, metric) for run in runs], budget)
            a_rank(got, runs, budget, metric, choices)
    choices.judge()


def shown(run, metric):
    """The run as the learner gets it; metric "score": higher is better."""
    if metric == "loss":
        return dict(run)
    scores = {f"{part}_score": 100 - 100 * run[f"{part}_loss"] for part in SPLITS}
    return {key: run[key] for key in ("r", "lr", "seed", "parameters")} | scores


def a_rank(got, runs, budget, metric, choices) -> None:
    need(got is not None, "Your function gives None: is there a `return` at its end?")
    need(
        isinstance(got, (tuple, list)) and len(got) == 2,
        f"Return two numbers, (r, lr); you return {got!r}.",
    )
    r, lr = got
    need(
        any(at(run, r, lr) for run in runs),
        f"There is no run with r = {r!r} and lr = {lr!r}: return (r, lr).",
    )
    right = rank_by_rule(runs, budget)
    said = (
        f"You choose r = {r}; the smallest rank that is not behind the best within the"
        f" budget, each at its own rate, is {right[0]}."
    )
    if 1000 * r > budget:
        said = (
            f"r = {r} trains {1000 * r:,} parameters: more than the budget of"
            f" {budget:,}."
        )
    elif r == right[0]:
        said = (
            f"r = {r} is right, but its own best rate, by the mean validation {metric},"
            f" is {right[1]:g}, not {lr:g}."
        )
    choices.add((r, lr), right, rank_slips(runs, budget, metric), said)


def rank_slips(runs, budget, metric) -> dict:
    """{message: what people choose instead}"""
    best = "lowest" if metric == "loss" else "highest"
    small = [run for run in runs if run["parameters"] <= budget]
    return {
        f"You choose by the test {metric}: then nothing is left that would judge the"
        f" choice. The validation {metric} chooses.": chosen_by_test(runs, budget),
        f"That is the rank with the {best} mean. A smaller one is not told apart from"
        " it by `compare`: take the smallest that is not behind.": [
            rank_by_rule(runs, budget, alike=never)
        ],
        f"You take the rate with the {best} {metric} of any seed: one lucky seed is no"
        " reason. Take the mean over the seeds.": looked(runs, budget, min),
        f"The best rank is that with the {best} mean; you take the {best} {metric} of"
        " any seed.": rank_by_rule(runs, budget, join=min),
        "A rank that trains exactly as many parameters as the budget is within it.": (
            rank_by_rule(runs, budget - 1)
        ),
        "The same seed of both sides belongs together, and the runs stand in no order:"
        " you compare other seeds with each other.": [
            rank_by_rule(runs, budget, alike=unpaired),
            rank_by_rule(runs, budget, alike=in_file_order),
        ],
        "You compare each rank with the next one: each is compared with the best.": (
            rank_by_steps(runs, budget, neighbour=True)
        ),
        "You stop at the first rank that is behind: a smaller one may not be.": (
            rank_by_steps(runs, budget, neighbour=False)
        ),
        "You take the median over the seeds: take the mean.": looked(
            runs, budget, statistics.median
        ),
        f"You take the rate with the worst {metric}: the {best} is the best.": [
            rank_by_rule(runs, budget, worst_rate),
            rank_by_rule(runs, budget, worst_rate, always),
        ],
        "You take the smallest rank of all, though it may be behind the best. If you"
        " ask `compare`, you ask the wrong way round: for losses lower is better, and"
        " `compare(..., loss=True)` says so; for scores higher is.": (
            rank_by_rule(runs, budget, alike=always)
        ),
        "You take the largest rank that is not behind the best: take the smallest.": (
            rank_by_rule(runs, budget, pick=max)
        ),
        "You take the largest rank within the budget: take the smallest that is not"
        " behind the best.": largest_rank(runs, budget),
        "You take the first run of the list: the runs stand in no order.": [
            (run["r"], run["lr"]) for run in (runs[0], small[0])
        ],
    }


# What stands in the place of `not_behind`.


def never(a, b) -> bool:
    return a == b


def always(a, b) -> bool:
    return True


def unpaired(a, b) -> bool:
    found = told_apart(list(a.values()), list(b.values()), paired=False, loss=True)
    return found.verdict != "behind"


def in_file_order(a, b) -> bool:
    return not_behind(list(a.values()), list(b.values()))


# What people choose instead, in several forms.


def worst_rate(runs, r):
    return rate_of(runs, r, join=lambda losses: -sum(losses))


def largest_rank(runs, budget) -> tuple:
    r = max(run["r"] for run in runs if run["parameters"] <= budget)
    return r, rate_of(runs, r)


def chosen_by_test(runs, budget) -> list:
    """What is chosen where test losses have a say in the rate, the best, or both."""

    def by_test(runs, r):
        return rate_of(runs, r, "test_loss")

    small = [run for run in runs if run["parameters"] <= budget]
    lowest = min(small, key=lambda run: run["test_loss"])
    return [
        rank_by_rule(runs, budget, by_test),
        rank_by_rule(runs, budget, by_test, key="test_loss"),
        rank_by_rule(runs, budget, by_test, never, "test_loss"),
        rank_by_rule(runs, budget, key="test_loss"),
        rank_by_rule(runs, budget, key="test_loss", top="valid_loss"),
        rank_by_rule(runs, budget, top="test_loss"),
        (lowest["r"], lowest["lr"]),
    ]


def looked(runs, budget, join) -> list:
    """What is chosen by another look at the seeds than the mean."""

    def rate(runs, r):
        return rate_of(runs, r, join=join)

    each = {}
    for run in runs:
        if run["parameters"] <= budget:
            each.setdefault((run["r"], run["lr"]), []).append(run["valid_loss"])
    lowest = min(each, key=lambda key: join(each[key]))
    return [
        rank_by_rule(runs, budget, rate),
        rank_by_rule(runs, budget, rate, never),
        lowest,
    ]


# ---- LoRA as a method of one's own ---------------------------------------------------


@checks(
    "Start, equation, both gradients and the merge are LoRA's, no dense matrix is"
    " formed on the way, and it learns: trained on a small task with three seeds it is"
    " ahead of the frozen base by the course's rule.",
    SHAPES,
)
def my_lora(config_class) -> None:
    """config_class(r=..., alpha=..., target_modules=[...]), a LayerConfig whose
    adapters are LinearDeltas with the parameters A (r, d_in) and B (d_out, r)."""
    need(
        isinstance(config_class, type) and issubclass(config_class, LayerConfig),
        "Give me the configuration's class itself, a subclass of LayerConfig.",
    )
    model = plugged_in(config_class, r=3, alpha=12, names=["up_proj", "down_proj"])
    slots = [layer.mlp for layer in model.get_base_model().model.layers]
    slots = [slot for mlp in slots for slot in (mlp.up_proj, mlp.down_proj)]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    need(
        len({id(slot.adapters["default"]) for slot in slots}) == len(slots),
        "create gives one adapter to several layers: each layer needs a new one.",
    )
    for slot in slots:
        adapter = slot.adapters["default"]
        need(
            isinstance(adapter, LinearDelta),
            f"create gives a {type(adapter).__name__}: the adapter should be a"
            " LinearDelta, which makes forward and merging of your update.",
        )
        A, B = (matrix(adapter, name) for name in "AB")
        d_out, d_in = slot.base_layer.weight.shape
        check_shapes(A, B, 3, d_in, d_out)
        check_start(A, B)
        trained -= {id(A), id(B)}
        more = [n for n, p in adapter.named_parameters() if p is not A and p is not B]
        need(not more, f"The adapter has more than A and B: {', '.join(more)}.")
    need(not trained, "Something else would train beside A and B.")
    starts = [matrix(slot.adapters["default"], "A") for slot in slots]
    need(not torch.equal(starts[0], starts[2]), ONE_START)  # of two layers, alike
    for slot in slots[:2]:
        look_at_layer(slot, r=3, alpha=12)
    slot = plugged_in(config_class, r=6, alpha=5, names=["up_proj"])
    look_at_layer(slot.get_base_model().model.layers[0].mlp.up_proj, r=6, alpha=5)
    look_at_merge(model)
    config = config_class(r=4, alpha=8, target_modules=["q_proj", "up_proj"])
    needs_to_learn(config)


def plugged_in(config_class, r, alpha, names):
    base = small_gpt(random.randrange(10**6))
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(torch.randn(module.out_features))
    config = config_class(r=r, alpha=alpha, target_modules=names)
    return without_seeding(lambda: get_peft_model(base, config))


def look_at_layer(slot, r, alpha):
    adapter = slot.adapters["default"].double()
    slot.base_layer.double()
    A, B = (matrix(adapter, name) for name in "AB")
    d_out, d_in = slot.base_layer.weight.shape
    check_shapes(A, B, r, d_in, d_out)
    x = torch.randn(2, 5, d_in, dtype=torch.float64, requires_grad=True)
    y = slot.base_layer(x)
    lies_on_its_side(adapter, slot)
    update_fits(slot, x)
    start = slot(x)
    need(not same(start, 2 * y), TWICE)
    need(same(start, y), at_start(start, y, slot.base_layer.bias))
    with torch.no_grad():
        A.copy_(torch.randn(A.shape))
        B.copy_(torch.randn(B.shape))
    need(
        same(slot(x), slot(x)),
        "Two calls with the same x give two outputs: is there a dropout? Here is none.",
    )
    low = x @ A.T @ B.T
    compare(
        slot(x),
        y + alpha / r * low,
        slot_slips(y, low, alpha, r),
        "The layer's output",
        {"A": A, "B": B, "x": x},
        formula=Formula(scaled_of, x, A, B, alpha, r, after=y.detach().add),
    )
    base = Base(slot, "default")
    copy_stands_alone(adapter, lambda one: one(base, x))
    look_at_memory(slot, base, x)
    delta, product = slot.adapters["default"].delta(base), B @ A
    wrong = wrong_scales(product, alpha, r)
    wrong["delta is the new weight itself: return what is added to it."] = (
        slot.base_layer.weight + alpha / r * product
    )
    formula = Formula(scaled, A, B, alpha, r)
    compare(delta, alpha / r * product, wrong, "delta(base)", formula=formula)


TWICE = "update holds the base's output too: LinearDelta adds it."


def slot_slips(y, low, alpha, r) -> dict:
    """{message: the wrong output}; y: that of the base, low: B A x."""
    wrong = {m: y + w for m, w in wrong_scales(low, alpha, r).items()}
    return wrong | {
        "Your alpha is 16, the default, whatever is asked for: self.alpha.": (
            y + 16 / r * low
        ),
        "You divide by 8, the default rank, whatever is asked for: self.r.": (
            y + alpha / 8 * low
        ),
        TWICE: 2 * y + alpha / r * low,
        "The update never reaches the output.": y,
    }


def look_at_memory(slot, base, x) -> None:
    """Nothing is kept from call to call, and no matrix of the weight's size is made."""
    adapter = slot.adapters["default"]
    kept = len(held(adapter))
    for _ in range(3):
        slot(x.clone())
    need(
        len(held(adapter)) <= kept,
        "Your adapter keeps tensors of each call: memory grows with every step.",
    )
    with torch.no_grad(), LargestTensor() as watched:
        adapter.update(base, x)
    need(
        watched.entries < slot.base_layer.weight.numel(),
        "On the way to the update a matrix of the weight's size is formed. Write"
        " `update(base, x)`: x meets A first, then B.",
    )


def lies_on_its_side(adapter, slot):
    delta = adapter.delta(Base(slot, "default"))
    need(
        not isinstance(delta, torch.Tensor)
        or delta.shape != slot.base_layer.weight.T.shape
        or delta.shape[0] == delta.shape[1],
        "delta lies on its side: a weight is (d_out, d_in), and so is B @ A.",
    )


def look_at_merge(model):
    ids = chains(3, 5)
    model.double().eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
    need(same(merged, before), "Merged, the model gives other logits.")
