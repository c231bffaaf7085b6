"""Chapter 04, LoRA: the update, the layer, merging, counting, the gradients, and a
detective's question."""

import copy
import random

import torch
from torch import nn

from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "count_parameters",
    "first_gradients",
    "lora_delta",
    "lora_layer",
    "merging",
    "six_million",
]

SHAPES = (
    "A is (r, d_in) and B is (d_out, r), so the product is B @ A, in this order; x (…,"
    " d_in) meets A first: x @ A.T."
)


def draw():
    """r, d_in, d_out, alpha: all different, so that no slip can hide behind two equal
    numbers."""
    r = random.choice([2, 3, 5])
    return (
        r,
        random.randint(7, 11),
        random.randint(12, 17),
        random.choice([7.0, 13.0, 19.0]),
    )


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
    }


@checks(
    "Your update is (alpha / r) B A, for every shape that I tried, and gradients flow"
    " through it.",
    SHAPES,
)
def lora_delta(function) -> None:
    """function(A, B, alpha, r) -> the update of the weight, (d_out, d_in)."""
    for _ in range(3):
        r, d_in, d_out, alpha = draw()
        A = torch.randn(r, d_in, dtype=torch.float64, requires_grad=True)
        B = torch.randn(d_out, r, dtype=torch.float64, requires_grad=True)
        got, product = function(A, B, alpha, r), B @ A
        need(
            not (isinstance(got, torch.Tensor) and got.shape == (d_in, d_out)),
            "Your update lies on its side: it is (d_in, d_out). PyTorch keeps a weight"
            " as (d_out, d_in), and B @ A has that shape already: nothing needs a"
            " transpose.",
        )
        compare(
            got, alpha / r * product, wrong_scales(product, alpha, r), "Your update"
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
    for _ in range(2):
        r, d_in, d_out, alpha = draw()
        linear = nn.Linear(d_in, d_out)
        original = copy.deepcopy(linear)
        layer = layer_class(linear, r, alpha)
        A, B = (matrix(layer, name) for name in "AB")
        check_shapes(A, B, r, d_in, d_out)
        check_start(A, B)
        check_trainable(layer, original, A, B)
        x = torch.randn(4, 3, d_in)  # (B, T, d_in), as in a transformer
        weight, bias = original.weight.detach(), original.bias.detach()
        base = x @ weight.T + bias
        need(same(layer(x), base), at_start(layer(x), base, bias))
        with torch.no_grad():
            A.copy_(torch.randn(A.shape))
            B.copy_(torch.randn(B.shape))
        x.requires_grad_()
        base = x @ weight.T + bias
        update = x @ A.T @ B.T
        layer.eval()
        mistakes = {
            message: base + wrong
            for message, wrong in wrong_scales(update, alpha, r).items()
        }
        mistakes |= {
            "Your layer gives the update alone: the output of the base is missing.": (
                alpha / r * update
            ),
            "Your layer gives the base's output alone: the update never reaches it.": (
                base
            ),
            "The bias is added twice: the base's output holds it already, and LoRA"
            " has none.": base + alpha / r * update + bias,
            "The base's output is scaled too: alpha / r belongs to the update alone.": (
                alpha / r * (base + update)
            ),
        }
        compare(
            layer(x),
            base + alpha / r * update,
            mistakes,
            "Your output",
            {"A": A, "B": B, "x": x},
        )
        check_dropout(layer_class, alpha)
        check_rate(layer_class, alpha)
        layer.train()
        layer(x).square().sum().backward()
        need(
            A.grad is not None and B.grad is not None,
            "After backward() A or B has no gradient: something detaches them in"
            " forward.",
        )
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
        A.std() > 0 and not torch.allclose(A[0], A[1]),
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
    if same(got, base + bias):
        return (
            "The bias is added twice: the base's output holds it already, and LoRA has"
            " none."
        )
    return (
        "Before training, B is zero, so your layer must give exactly what the base"
        " gives; it does not."
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
        need(
            abs(size - 1) < 0.2,
            "Your dropout changes the average size of the update: what is kept must"
            " grow by 1 / (1 - p). nn.Dropout does it for you.",
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
    for p in (0.1, 0.4):
        layer = layer_class(zero_linear(8, 6), 1, alpha, p).train()
        A, B = (matrix(layer, name) for name in "AB")
        A.copy_(torch.eye(8)[:1])
        B.fill_(1.0)
        rate = (layer(torch.ones(4000, 8))[:, 0] == 0).double().mean().item()
        need(
            abs(rate - p) < 0.05,  # 6 standard deviations of 4,000 draws
            f"With dropout={p} your layer drops {rate:.0%} of the inputs: `dropout` is"
            " the share that is dropped, as nn.Dropout takes it.",
        )


class AdaptedLinear(nn.Module):
    """What the merging exercise works on; the chapter's toy has the same attributes."""

    def __init__(self, d_in, d_out, r, alpha):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out).double().requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, d_in, dtype=torch.float64))
        self.B = nn.Parameter(torch.randn(d_out, r, dtype=torch.float64))
        self.r, self.alpha, self.merged = r, alpha, False

    def forward(self, x):
        y = self.linear(x)
        return y if self.merged else y + self.alpha / self.r * x @ self.A.T @ self.B.T


@checks(
    "Merged = unmerged, twice is once, the bias is untouched, and unmerging brings the"
    " old weight back.",
    SHAPES,
)
def merging(merge, unmerge) -> None:
    """merge(layer) and unmerge(layer), in place, on a layer with .linear, .A, .B,
    .alpha, .r and .merged."""
    r, d_in, d_out, alpha = draw()
    layer = AdaptedLinear(d_in, d_out, r, alpha)
    x = torch.randn(6, d_in, dtype=torch.float64)
    weight, bias, A, B = (
        t.detach().clone()
        for t in (layer.linear.weight, layer.linear.bias, layer.A, layer.B)
    )
    output, product = layer(x).detach(), B @ A
    right = weight + alpha / r * product
    merge(layer)
    got = layer.linear.weight
    need(
        isinstance(got, nn.Parameter) and not got.requires_grad and got.grad_fn is None,
        "Your merged weight still hangs on A and B by the graph: merge under"
        " torch.no_grad(), in place.",
    )
    need(
        same(layer.A, A) and same(layer.B, B),
        "Merging changed A or B (is a scale folded into them?): then nobody can"
        " unmerge, and the scale counts twice. Leave them as they are.",
    )
    need(
        layer.linear.bias is not None and same(layer.linear.bias, bias),
        "You changed the bias. LoRA's update has none: so the base's bias would count"
        " twice.",
    )
    mistakes = {
        message: weight + wrong
        for message, wrong in wrong_scales(product, alpha, r).items()
    }
    mistakes |= {
        "merge has not changed layer.linear.weight.": weight,
        "You replaced the weight by the update: add it to the old weight.": (
            alpha / r * product
        ),
    }
    compare(got.detach(), right, mistakes, "The merged weight")
    need(
        layer.merged is True,
        "The weight is right, but layer.merged is still False: so forward adds the"
        " update a second time.",
    )
    need(
        same(layer(x), output),
        "The merged layer gives another output than the unmerged one.",
    )
    merge(layer)
    need(
        same(layer.linear.weight, right),
        "Called a second time, merge adds the update again: look at layer.merged"
        " first.",
    )
    unmerge(layer)
    need(
        not same(layer.linear.weight, right + alpha / r * product),
        "unmerge adds the update again: it has to subtract it.",
    )
    need(
        not same(layer.linear.weight, right),
        "unmerge leaves the merged weight as it is.",
    )
    need(
        same(layer.linear.weight, weight),
        "unmerge does not bring the old weight back: subtract exactly what merge"
        " added.",
    )
    need(
        layer.merged is False,
        "unmerge must set layer.merged to False: now forward would leave the update"
        " out.",
    )
    unmerge(layer)
    need(
        same(layer.linear.weight, weight),
        "Called on a layer that is not merged, unmerge must do nothing.",
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


@checks("The count is right, for Llama-3-8B too.")
def count_parameters(function) -> None:
    """function(shapes, layers, r, targets) -> int; shapes: {"q_proj": (d_out, d_in),
    ...} of one layer."""
    d, f = random.randint(40, 90), random.randint(100, 190)
    small = {
        "q_proj": (d, d),
        "k_proj": (d // 4, d),
        "v_proj": (d // 4, d),
        "o_proj": (d, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
    }
    for sizes, layers, r, targets in (
        (small, 3, 5, ["q_proj", "v_proj"]),
        (small, 7, 2, ["k_proj", "down_proj"]),
        (LLAMA3_8B, 32, 16, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ):
        got, chosen = (
            function(sizes, layers, r, targets),
            [sizes[name] for name in targets],
        )
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        right = layers * r * sum(o + i for o, i in chosen)
        slips = {
            "You count every linear layer: only the targets get an adapter.": (
                layers * r * sum(o + i for o, i in sizes.values())
            ),
            "You count one layer of the model: there are `layers` of them.": (
                r * sum(o + i for o, i in chosen)
            ),
            "The rank is missing: A has r rows and B has r columns.": (
                layers * sum(o + i for o, i in chosen)
            ),
            "That counts A alone: B has d_out · r numbers more.": (
                layers * r * sum(i for o, i in chosen)
            ),
            "That counts B alone: A has r · d_in numbers more.": (
                layers * r * sum(o for o, i in chosen)
            ),
            "That is 2 · r · d_in for each target, right only for square matrices."
            " With grouped queries k_proj and v_proj are narrower, and the MLP is"
            " wider: r (d_in + d_out).": (layers * r * sum(2 * i for o, i in chosen)),
            "That is 2 · r · d_out for each target, right only for square matrices: r"
            " (d_in + d_out).": (layers * r * sum(2 * o for o, i in chosen)),
            "You count the frozen weights, d_in · d_out, with the adapters.": (
                layers * sum(o * i + r * (o + i) for o, i in chosen)
            ),
            "That is r · d_in · d_out. A and B stand beside each other, their sizes"
            " add: r (d_in + d_out).": (layers * r * sum(o * i for o, i in chosen)),
            "You count B A, which has d_in · d_out numbers; what is trained and kept"
            " are its two thin factors.": (layers * sum(o * i for o, i in chosen)),
        }
        if got != right:
            raise Wrong(
                next(
                    (message for message, wrong in slips.items() if got == wrong),
                    f"For {len(targets)} targets in {layers} layers at r = {r} you get"
                    f" {got:,}; I count {right:,}.",
                )
            )


@checks(
    "These are the gradients that autograd finds. Look at grad_A: it contains B, so at"
    " the first step it is zero.",
    "A gradient has the shape of its parameter: grad_A (r, d_in), grad_B (d_out, r)."
    " Let that tell you the order.",
)
def first_gradients(function) -> None:
    """function(x, grad_y, A, B, alpha, r) -> (grad_A, grad_B); x (n, d_in), grad_y (n,
    d_out) = dLoss/dy."""
    for at_zero in (False, True):
        r, d_in, d_out, alpha = draw()
        n, s = random.randint(18, 24), alpha / r
        x, g = (
            torch.randn(n, d_in, dtype=torch.float64),
            torch.randn(n, d_out, dtype=torch.float64),
        )
        A = torch.randn(r, d_in, dtype=torch.float64)
        B = torch.randn(d_out, r, dtype=torch.float64) * (not at_zero)
        got = function(x, g, A, B, alpha, r)
        need(
            isinstance(got, (tuple, list)) and len(got) == 2,
            "Give me two tensors: return grad_A, grad_B.",
        )
        right_A, right_B = s * B.T @ g.T @ x, s * g.T @ x @ A.T  # (r, d_in), (d_out, r)
        grad_A, grad_B = got
        if isinstance(grad_A, torch.Tensor) and isinstance(grad_B, torch.Tensor):
            pair = tuple(grad_A.shape), tuple(grad_B.shape)
            need(
                pair != ((d_out, r), (r, d_in)),
                "The two are swapped: grad_A, of A's shape, comes first.",
            )
            need(
                pair != ((d_in, r), (r, d_out)),
                "Both gradients are transposed: a gradient has the shape of its"
                " parameter.",
            )
        for name, other, gradient, right in (
            ("grad_A", "B", grad_A, right_A),
            ("grad_B", "A", grad_B, right_B),
        ):
            mistakes = {
                f"{name} lacks the scale: alpha / r stands before B A, so it stands"
                f" before the gradient.": right / s,
                f"In {name} the scale is alpha: it should be alpha / r.": right * r,
                f"{name} has the scale twice: it passes through alpha / r only once.": (
                    right * s
                ),
                f"{name} is the mean over the rows: the loss adds them up, so sum.": (
                    right / n
                ),
                f"{name} has the wrong sign: the step goes down the gradient, the"
                f" gradient itself does not.": -right,
                f"{name} is zero, though {other} is not: have you taken the first"
                f" step's answer for every step?": (0 * right),
            }
            compare(gradient, right, mistakes if right.any() else {}, name)


@checks(
    "Both give 6,815,744. So the number alone does not say which of them was run, and"
    " neither is the one that was printed beside it."
)
def six_million(answer) -> None:
    """answer: two configurations, each (r, targets), which on Llama-3-8B train
    6,815,744 numbers."""
    wanted, layers = 6_815_744, 32
    if answer is None or answer == []:
        raise NotImplementedError
    pairs = isinstance(answer, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 for one in answer
    )
    need(
        pairs
        and all(
            isinstance(r, int) and not isinstance(targets, str) for r, targets in answer
        ),
        "Write it as [(r, [targets]), (r, [targets])].",
    )
    found = set()
    for r, targets in answer:
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
