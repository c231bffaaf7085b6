"""Chapter 13, (IA)3 and BitFit: scaling, folding, finding the scales, the gradient of a
bias, counting."""

import random
from itertools import product

import torch

from .teacher import Wrong, checks, compare, need, same

__all__ = ["bias_gradient", "count_ia3", "find_scales", "fold_ia3", "ia3_layer"]

BY_SHAPE = (
    "For a square W you scale the wrong side: `feedforward` says whether the input or"
    " the output is scaled, the shapes do not."
)
SHAPES = (
    "W is (d_out, d_in), b is (d_out,), x (…, d_in). l has as many numbers as what it"
    " scales: d_out for an output, d_in for an input."
)


def draw(square=False):
    """d_in, d_out and double-precision x, W, b; the two sizes differ, so that no slip
    can hide, or they are equal, so that shapes do not say which of them is meant."""
    d_in, d_out = random.randint(7, 10), random.randint(12, 16)
    d_in = d_out if square else d_in

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return d_in, d_out, randn(3, 4, d_in), randn(d_out, d_in), randn(d_out)


@checks(
    "Outputs of k and v are scaled, bias and all; of the feed-forward's second matrix"
    " the input is, and its bias is left alone. Gradients reach l.",
    SHAPES,
)
def ia3_layer(function) -> None:
    """function(x, W, b, l, feedforward) -> (..., d_out)."""
    for feedforward, square in product((False, True), repeat=2):
        d_in, d_out, x, W, b = draw(square)
        x.requires_grad_()
        l = torch.rand(d_in if feedforward else d_out, dtype=torch.float64) + 0.3
        l.requires_grad_()
        got, v = function(x, W, b, l, feedforward), l
        y = x @ W.T
        if feedforward:
            right = (x * v) @ W.T + b
            mistakes = {
                BY_SHAPE: (y + b) * v if square else None,
                "l did nothing.": y + b,
                "You multiply by 1 + l: l starts at one, and is the factor itself.": (
                    (x * (1 + v)) @ W.T + b
                ),
                "b is missing.": right - b,
                "You divide by l.": (x / v) @ W.T + b,
                "You add l to the input: it is multiplied.": (x + v) @ W.T + b,
                "l is in it twice: scale the input, or the columns of W, not both.": (
                    (x * v * v) @ W.T + b
                ),
            }
            need(
                not (
                    isinstance(got, torch.Tensor)
                    and got.shape == right.shape
                    and same(
                        (got.detach() / (y + b)).std(0), torch.zeros_like(right[0])
                    )
                )
                or same(got, y + b),
                "For feed-forward you scale the output; it is the *input* of the second"
                " matrix that is scaled.",
            )
        else:
            right = (y + b) * v
            mistakes = {
                BY_SHAPE: (x * v) @ W.T + b if square else None,
                "The bias is not scaled: what is scaled is the layer's whole output,"
                " W x + b.": y * v + b,
                "l did nothing.": y + b,
                "You multiply by 1 + l: l starts at one, and is the factor itself.": (
                    (y + b) * (1 + v)
                ),
                "b is missing.": y * v,
                "The bias is scaled twice.": (y + b * v) * v,
                "You divide by l.": (y + b) / v,
                "You add l to the output: it is multiplied. Adding is BitFit.": (
                    y + b + v
                ),
                "l is in it twice: scale the output, or the rows of W, not both.": (
                    (y + b) * v * v
                ),
            }
        compare(
            got,
            right,
            mistakes,
            "Your output, with feedforward=" + str(feedforward) + ",",
        )


@checks("Folded: the layer alone now does what layer and scales did.", SHAPES)
def fold_ia3(function) -> None:
    """function(W, b, l, feedforward) -> (W_new, b_new)."""
    for feedforward, square in product((False, True), repeat=2):
        d_in, d_out, _, W, b = draw(square)
        l = torch.rand(d_in if feedforward else d_out, dtype=torch.float64) + 0.3
        got = function(W, b, l, feedforward)
        need(
            isinstance(got, (tuple, list)) and len(got) == 2,
            "Give me two tensors: return W_new, b_new.",
        )
        where = f" (feedforward={feedforward})"
        need(got[1] is not None, "The bias is lost: the plain layer has one too.")
        need(
            getattr(got[0], "shape", None) != b.shape,
            "The other way round: first the weight, then the bias.",
        )
        right = W * l if feedforward else W * l[:, None]
        compare(
            got[0],
            right,
            {
                BY_SHAPE: (W * l[:, None] if feedforward else W * l)
                if square
                else None,
                "W is as it was" + where + ".": W,
                "You divide by l" + where + ": that is unmerging.": (
                    W / l if feedforward else W / l[:, None]
                ),
                "You add l to W" + where + ".": (
                    W + l if feedforward else W + l[:, None]
                ),
                "l is in it twice" + where + ".": (
                    W * l**2 if feedforward else W * l[:, None] ** 2
                ),
                "You multiply by 1 + l"
                + where
                + ": l starts at one, and is the factor itself.": W + right,
                "W_new is transposed" + where + ": keep nn.Linear's (d_out, d_in).": (
                    right.T
                ),
            },
            "W_new" + where,
        )
        if feedforward:
            compare(
                got[1], b, {}, "b_new, which stays as it was where the input is scaled,"
            )
        else:
            compare(
                got[1],
                b * l,
                {
                    "The bias is left as it was: the output is scaled, and the bias"
                    " is part of the output.": b,
                    "You divide the bias by l.": b / l,
                },
                "b_new" + where,
            )


SCALED = {
    "scaled": (
        "Here W_new = l W, row by row, and you say that there is no l. It has one"
        " factor for each *row*, and some are negative; compare up to rounding."
    ),
    "silenced": "Here one row was scaled by zero: that is a scaling too.",
    "flipped": (
        "Here all rows were scaled by negative numbers: that is a scaling too."
    ),
    "with zeros": (
        "Here W has entries that are zero, which stay zero: that is a scaling too. Do"
        " you divide by them?"
    ),
}
NOT_SCALED = {
    "mixed": "rows were mixed",
    "low rank": "a matrix of rank one was added, as LoRA does",
    "columns": "the *columns* were scaled: the input, not the output",
    "one row": "every row but the last was scaled, and that one was not",
    "one entry": "one entry is off by 0.01, in a float64 matrix",
}


def one_entry(W):
    """Zero but for one entry."""
    where = torch.zeros_like(W)
    where[-1, -1] = 1.0
    return where


@checks(
    "You find the scales where there are some, and say None where no scaling could have"
    " done it."
)
def find_scales(function) -> None:
    """function(W, W_new) -> l (d_out,) with W_new = diag(l) W, or None."""
    first = [kind for kind in SCALED if kind != "with zeros"]
    for kind in (*first, *NOT_SCALED, "with zeros"):
        d_in, d_out, _, W, _ = draw()
        l = torch.randn(d_out, dtype=torch.float64)
        if kind == "silenced":
            l[random.randrange(d_out)] = 0.0
        if kind == "flipped":
            l = -l.abs()
        if kind == "with zeros":
            W[0, 0] = W[:, 1] = 0.0
        new = {
            "mixed": lambda: W[torch.randperm(d_out)] * l[:, None] + 0.1 * W.roll(1, 0),
            "low rank": (
                lambda: W + torch.outer(torch.randn_like(l), torch.randn_like(W[0]))
            ),
            "columns": lambda: W * (torch.rand_like(W[0]) + 0.3),
            "one row": lambda: torch.cat((W[:-1] * l[:-1, None], W[-1:].roll(1, 1))),
            "one entry": lambda: W * l[:, None] + 0.01 * one_entry(W),
        }.get(kind, lambda: W * l[:, None])()
        got = function(W, new)
        if kind in NOT_SCALED:
            need(
                got is None,
                f"Here {NOT_SCALED[kind]}: no scaling of the rows gives that, so None"
                " is the"
                " answer. Check that l[:, None] * W is W_new, all of it.",
            )
        else:
            need(got is not None, SCALED[kind])
            if isinstance(got, torch.Tensor):
                need(
                    bool(got.isfinite().all()),
                    "There is a NaN or an infinity in your l: where do you divide by"
                    " zero?",
                )
            compare(
                (
                    got.flatten()
                    if isinstance(got, torch.Tensor) and got.numel() == d_out
                    else got
                ),
                l,
                {
                    "Upside down: you have W / W_new.": 1 / l,
                    "The sign is lost: a scale may be negative.": l.abs(),
                    "That is the change of the scale: l itself starts at one.": l - 1,
                    "You give the whole diagonal matrix: its diagonal is"
                    " wanted.": torch.diag(l),
                },
                "Your l",
            )


@checks(
    "This is what autograd finds: a bias hears from every token alike, and never looks"
    " at x."
)
def bias_gradient(function) -> None:
    """function(grad_y, x) -> the bias's gradient (d_out,), from grad_y (B, T, d_out) =
    dLoss/dy and x (B, T, d_in)."""
    B, T = random.choice([2, 3]), random.choice([4, 5])
    d_in, d_out, _, _, _ = draw()
    g, x = (torch.randn(B, T, n, dtype=torch.float64) for n in (d_out, d_in))
    compare(
        function(g, x),
        g.sum((0, 1)),
        {
            "That is the mean over the tokens: the loss adds up what each of them"
            " does, so sum.": g.mean((0, 1)),
            "You sum over the rows only: the tokens' dimension is left.": g.sum(0),
            "You sum over the tokens only: the rows' dimension is left.": g.sum(1),
            "You sum over everything: one number for each output is wanted.": g.sum(),
            "You sum over the outputs: sum over the first two dimensions, rows and"
            " tokens.": g.sum(-1),
            "That is the weight's gradient: the bias's does not contain x.": (
                torch.einsum("bto,bti->oi", g, x)
            ),
            "The sign is wrong: the step goes down the gradient, the gradient itself"
            " does not.": -g.sum((0, 1)),
            "You sum |grad|: signs must cancel where tokens disagree.": (
                g.abs().sum((0, 1))
            ),
            "You sum the squares: that is what Adam keeps beside the gradient.": (
                g.square().sum((0, 1))
            ),
            "You listen to the last token only: the bias was added at every place.": (
                g[:, -1].sum(0)
            ),
            "You sum over the tokens, and take the mean over the rows: sum over"
            " both.": (g.mean(0).sum(0)),
            "You sum over the rows, and take the mean over the tokens: sum over"
            " both.": (g.mean(1).sum(0)),
            "Right numbers, but two dimensions of size 1 are left: the bias has one"
            " dimension.": g.sum((0, 1), keepdim=True),
            "You multiply by x: a bias never sees it.": (
                (g.sum(-1, keepdim=True) * x).sum((0, 1))
            ),
        },
        "Your gradient",
    )


@checks("The count is right, for Llama-3-8B and for Llama-2-7B too.")
def count_ia3(function) -> None:
    """function(layers, heads, kv_heads, head_dim, wide) -> int: IA3 on keys, values and
    the feed-forward's middle."""
    small = dict(
        layers=random.choice([3, 5]),
        heads=12,
        kv_heads=3,
        head_dim=random.choice([4, 7]),
        wide=random.randint(50, 90),
    )
    for shape in (
        small,
        dict(layers=32, heads=32, kv_heads=8, head_dim=128, wide=14336),
        dict(layers=32, heads=32, kv_heads=32, head_dim=128, wide=11008),
    ):
        layers, heads, kv_heads, h, wide = shape.values()
        got, d, kv = function(*shape.values()), heads * h, kv_heads * h
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        right = layers * (2 * kv + wide)
        slips = {
            "With grouped queries keys and values are narrower than the model:"
            " kv_heads · head_dim.": (layers * (2 * d + wide)),
            "You count one layer.": 2 * kv + wide,
            "One of the two, keys or values, is missing.": layers * (kv + wide),
            "The feed-forward's vector is missing.": layers * 2 * kv,
            "The feed-forward's vector scales its middle, which is `wide` long, not"
            " the model's width.": (layers * (2 * kv + d)),
            "The queries are not scaled.": layers * (2 * kv + d + wide),
            "The feed-forward has one vector, at the second matrix.": (
                layers * (2 * kv + 2 * wide)
            ),
            "You count one head: each has numbers of its own.": layers * (2 * h + wide),
            "You count one number for each head: each of its channels has one.": (
                layers * (2 * kv_heads + wide)
            ),
            "The values are as narrow as the keys: kv_heads of them, too.": (
                layers * (kv + d + wide)
            ),
            "heads // kv_heads says how many queries share a key. How many keys there"
            " are is kv_heads.": (layers * (2 * (heads // kv_heads) * h + wide)),
            "Two vectors in attention, for keys and values: you count three.": (
                layers * (3 * kv + wide)
            ),
            "You count the matrices: (IA)³ trains one number for each of their"
            " channels.": (layers * (2 * kv * d + d * wide)),
        }
        if got != right:
            raise Wrong(
                next(
                    (message for message, wrong in slips.items() if got == wrong),
                    f"For {shape} you get {got:,}; I count {right:,}.",
                )
            )
