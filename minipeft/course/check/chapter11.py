"""Chapter 11, bottleneck adapters: the equation, the layer, counting, and the one kind
that can be merged."""

import copy
import random

import torch
import torch.nn.functional as F
from torch import nn

from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "adapter_layer",
    "count_adapters",
    "fold_linear_adapter",
    "sequential_adapter",
]

SHAPES = (
    "h is (…, d), W_down (m, d), W_up (d, m): as in nn.Linear the output's size comes"
    " first, so h meets W_down as h @ W_down.T."
)


def draw():
    """d, m, and double-precision weights of an adapter."""
    d, m = random.randint(9, 13), random.choice([2, 3, 5])

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return d, m, randn(m, d), randn(m), randn(d, m), randn(d)


@checks("Down, bend, up, and back onto what came in; and gradients flow.", SHAPES)
def sequential_adapter(function) -> None:
    """function(h, W_down, b_down, W_up, b_up, act) -> (..., d), what goes on from the
    place where h was."""
    for act in (torch.relu, torch.tanh):
        d, m, down, b_down, up, b_up = draw()
        h = torch.randn(3, 4, d, dtype=torch.float64)
        given = [
            tensor.clone().requires_grad_() for tensor in (h, down, b_down, up, b_up)
        ]
        lent = given[0] * 1.0  # as from a layer below: changing it in place is allowed
        got = function(lent, *given[1:], act)
        h, down, b_down, up, b_up = given
        z = h @ down.T + b_down
        a = act(z) @ up.T + b_up
        bent = {"relu": torch.relu, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu}
        compare(
            got,
            h + a,
            {
                "The residual is forgotten: what the frozen part computed, h, must go"
                " on too. An adapter of zeros would now silence it.": a,
                "The activation comes after the up-projection: it belongs in the"
                " middle, between the two.": (h + act(z @ up.T + b_up)),
                "There is no activation: two linear maps in a row are one linear map,"
                " of low rank.": h + z @ up.T + b_up,
                "The activation comes before the down-projection: it belongs after"
                " it.": (h + (act(h) @ down.T + b_down) @ up.T + b_up),
                "You bend the sum as well: the residual must pass untouched.": act(
                    h + a
                ),
                "Both biases are missing.": h + act(h @ down.T) @ up.T,
                "b_down is missing.": h + act(h @ down.T) @ up.T + b_up,
                "b_up is missing.": h + act(z) @ up.T,
                "b_down is added after the activation: it belongs inside.": (
                    h + (act(h @ down.T) + b_down) @ up.T + b_up
                ),
                "You subtract the adapter: it is added.": h - a,
                "h goes on twice.": 2 * h + a,
                "W_down and W_up have changed places: their shapes fit that way round"
                " without a .T, but W_down is (m, d), and down comes first: h @"
                " W_down.T.": (h + act(h @ up + b_down) @ down + b_up),
                "You always bend in the same way: the activation is given to you, as"
                " `act`.": next(
                    (
                        wrong
                        for name, other in bent.items()
                        if other is not act
                        and same(got, wrong := h + other(z) @ up.T + b_up)
                    ),
                    None,
                ),
            },
            "Your output",
            dict(zip(("h", "W_down", "b_down", "W_up", "b_up"), given)),
        )


@checks(
    "The frozen part stays frozen, nothing changes at the start, the adapter reads x"
    " beside the part, and the scale is on the adapter alone. This is the parallel"
    " adapter of He et al."
)
def adapter_layer(layer_class) -> None:
    """layer_class(part, d, m, scaling): an nn.Module with Linears `down` and `up`,
    part(x) + scaling up(relu(down(x)))"""
    need(
        isinstance(layer_class, type) and issubclass(layer_class, nn.Module),
        "Give me the class itself, a subclass of nn.Module.",
    )
    for _ in range(2):
        d, m, scaling = (
            random.randint(9, 13),
            random.choice([2, 3, 5]),
            random.choice([3.0, 4.0]),
        )
        part = nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d))
        frozen = copy.deepcopy(part)
        layer = layer_class(part, d, m, scaling)
        down, up = (linear(layer, name) for name in ("down", "up"))
        shapes = tuple(down.weight.shape), tuple(up.weight.shape)
        need(
            shapes != ((d, m), (m, d)),
            "down and up are swapped: down goes from d to m, up from m back to d.",
        )
        need(
            shapes == ((m, d), (d, m)),
            f"down and up have weights of shapes {shapes}; ({m}, {d}) and ({d}, {m})"
            " are expected: nn.Linear(d, m) and nn.Linear(m, d).",
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
        mine = {id(p) for p in (*down.parameters(), *up.parameters())}
        trained = {
            id(p): name for name, p in layer.named_parameters() if p.requires_grad
        }
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
            f"{', '.join(theirs)} is trained too. Here the scale is a fixed number, and"
            " all that is trained is in down and up.",
        )
        need(
            not theirs,
            "The part is not frozen: an optimizer would train it as well."
            " part.requires_grad_(False)",
        )
        x = torch.randn(4, 3, d)
        need(same(layer(x), frozen(x)), start(layer(x), frozen(x), layer, up, x))
        with torch.no_grad():
            for p in (*down.parameters(), *up.parameters()):
                p.copy_(torch.randn(p.shape))
        y = frozen(x)

        def adapter(h):
            return (
                torch.relu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias
            ).detach()

        z, right = adapter(x), y + scaling * up(torch.relu(down(x)))
        compare(
            layer(x),
            right,
            {
                "That is the sequential adapter: it reads what the part has computed."
                " The parallel one reads x.": (y + scaling * adapter(y)),
                "That is the sequential adapter, without the scale: it reads what the"
                " part has computed.": (y + adapter(y)),
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
                "You divide by the scale.": y + z / scaling,
                "The scale misses up's bias: it multiplies all that the adapter"
                " says.": ((y + scaling * (z - up.bias) + up.bias).detach()),
                "relu comes after up: it belongs between the two, where the numbers"
                " are few.": (y + scaling * torch.relu(down_up(x, down, up)).detach()),
                "That is another activation: relu is asked for.": next(
                    (
                        wrong
                        for other in (F.gelu, F.silu, torch.tanh, torch.sigmoid)
                        if same(
                            layer(x),
                            wrong := (y + scaling * up(other(down(x)))).detach(),
                        )
                    ),
                    None,
                ),
            },
            "Your output",
            {
                f"{name}.{kind}": getattr(one, kind)
                for name, one in (("down", down), ("up", up))
                for kind in ("weight", "bias")
            },
        )
        below, straight = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(below).square().sum().backward()
        (
            frozen(straight) + scaling * up(torch.relu(down(straight)))
        ).square().sum().backward()
        need(
            below.grad is not None and same(below.grad, straight.grad),
            "The outputs are right, but the gradient that goes down to x is not: the"
            " part is frozen, and yet what is below learns through it. No"
            " torch.no_grad() and no .detach() in forward.",
        )


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


@checks("The count is right, for BERT-large too.")
def count_adapters(function) -> None:
    """function(d, m, layers, placement) -> int; placement "houlsby", "pfeiffer" or
    "parallel"."""
    for d, m, layers in (
        (random.randint(40, 90), random.randint(3, 9), random.choice([3, 5, 7])),
        (1024, 64, 24),
    ):
        for placement, times in (("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)):
            got = function(d, m, layers, placement)
            need(
                got is not None,
                "Your function gives None: is there a `return` at its end?",
            )
            one = 2 * d * m + m + d
            right, every = layers * times * one, layers * times
            slips = {
                "Houlsby puts two adapters into each layer, one after attention and"
                " one after feed-forward.": right // 2 if times == 2 else None,
                f"“{placement}” has one adapter a layer; only Houlsby has two.": (
                    2 * right if times == 1 else None
                ),
                "The biases are missing: m for the down-projection, d for the"
                " up-projection.": every * 2 * d * m,
                "The bias of the down-projection is missing, m numbers.": (
                    every * (2 * d * m + d)
                ),
                "The bias of the up-projection is missing, d numbers.": (
                    every * (2 * d * m + m)
                ),
                "Each adapter has two matrices, down and up: you count one.": (
                    every * (d * m + m + d)
                ),
                "You count one layer: there are `layers` of them.": times * one,
                "Each bias is as long as what its Linear gives: m for down, d for up."
                " You have d twice.": (every * (2 * d * m + 2 * d)),
                "Each bias is as long as what its Linear gives: m for down, d for up."
                " You have m twice.": (every * (2 * d * m + 2 * m)),
                "You count the norms too. Houlsby et al. train them, but here the"
                " adapters alone are counted.": next(
                    (
                        right + layers * norms
                        for norms in (2 * d, 4 * d)
                        if got == right + layers * norms
                    ),
                    None,
                ),
                "You count d × d matrices: the bottleneck is m wide.": (
                    every * (2 * d * d + 2 * d)
                ),
            }
            if got != right:
                raise Wrong(
                    next(
                        (message for message, wrong in slips.items() if got == wrong),
                        f"For d = {d}, m = {m}, {layers} layers, “{placement}”, you get"
                        f" {got:,}; I count {right:,}.",
                    )
                )


@checks(
    "The same outputs without the adapter. So what keeps a real adapter from being"
    " merged is its activation alone.",
    SHAPES + " The frozen layer is y = W x + b, with W (d, d_in).",
)
def fold_linear_adapter(function) -> None:
    """function(W, b, W_down, b_down, W_up, b_up) -> (W_new, b_new) of one linear layer
    that does what layer and adapter did, where the adapter has no activation: y + W_up
    (W_down y + b_down) + b_up."""
    for _ in range(2):
        d, m, down, b_down, up, b_up = draw()
        d_in = d + random.choice([2, 4])
        W, b = (
            torch.randn(d, d_in, dtype=torch.float64),
            torch.randn(d, dtype=torch.float64),
        )
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
        step = up @ down
        compare(
            got[0],
            W + step @ W,
            {
                "The residual is forgotten: y itself goes on too, so W stays in the"
                " sum.": step @ W,
                "Your weight is as it was: W_up W_down has to be in it.": W,
                "The order is turned: the adapter reads what W has written, so W"
                " stands on the right, W_up W_down W.": (W + (W.T @ step.T).T.flip(0)),
                "The adapter's matrices are swapped: down is met first, so it stands"
                " on the right.": (W + (up @ down).T @ W),
                "You subtract: it is added.": W - step @ W,
            },
            "W_new",
        )
        right = b + step @ b + up @ b_down + b_up
        compare(
            got[1],
            right,
            {
                "The layer's bias b passes through the adapter too: W_up W_down b is"
                " missing.": b + up @ b_down + b_up,
                "b itself is missing: it goes on beside the adapter.": right - b,
                "b_down is carried over as it is, or not at all: it still has to go"
                " through W_up.": right - up @ b_down,
                "b_up is missing.": right - b_up,
                "The bias is as it was; the adapter's biases, and what it makes of b,"
                " belong to it.": b,
                "Only the adapter's biases are in it: b, and what the adapter makes"
                " of b, are missing.": up @ b_down + b_up,
            },
            "b_new",
        )
