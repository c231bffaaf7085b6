"""Chapter 06, DoRA: the faults in a layer, its norm without a large matrix, what it
does predicted, a fair comparison, its gradients by hand, and a DoRA of the columns."""

import random
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ... import Base
from .kinds import Built, Choices, judge_numbers
from .practice import calls_of_autograd, python_bytes, without_seeding
from .sandbox import unwatched
from .slips import Formula
from .teacher import checks, compare, need, same

__all__ = [
    "column_dora",
    "dora_backward",
    "dora_output",
    "fair_gap",
    "gram_norms",
    "predict_dora",
]

SHAPES = (
    "W is (d_out, d_in), A is (r, d_in), B is (d_out, r): B @ A has W's shape, and"
    " there is one norm an output."
)


def draw():
    """W, A, B, s with sizes that are all different, so that no slip can hide; double
    precision."""
    r, d_in, d_out = random.choice([2, 3]), random.randint(6, 9), random.randint(11, 14)
    W, A, B = (
        torch.randn(*shape, dtype=torch.float64)
        for shape in ((d_out, d_in), (r, d_in), (d_out, r))
    )
    return W, A.requires_grad_(), B.requires_grad_(), random.choice([0.7, 1.6, 2.5])


def wrong_norms(W, A, B, s) -> dict:
    """Every norm that people take by mistake."""
    BA = (B @ A).detach()
    return {
        "Your norms are those of the columns, one for each input: DoRA takes the"
        " rows, one for each output (dim=1).": ((W + s * BA).norm(dim=0)),
        "That is the norm of the whole matrix, one number: there is one for each"
        " row.": ((W + s * BA).norm()),
        "Right numbers, but of the shape (d_out, 1): one norm for each output is"
        " (d_out,), without keepdim.": (W + s * BA).norm(dim=1, keepdim=True),
        "Those are squares: the root is missing.": (W + s * BA).norm(dim=1) ** 2,
        "Those are the norms of W, without the update s B A.": W.norm(dim=1),
        "The update has lost its scale: it is s B A, not B A.": (W + BA).norm(dim=1),
        "Those are the norms of the update alone: W is missing.": (s * BA).norm(dim=1),
        "The last term is missing: (a + b)² has b² too.": (
            (W.norm(dim=1) ** 2 + 2 * s * (W * BA).sum(1)).clamp(min=0).sqrt()
        ),
        "The norm of W is not squared in the sum: ‖w‖² + 2 s w·c + s² ‖c‖².": (
            (W.norm(dim=1) + 2 * s * (W * BA).sum(1) + s**2 * BA.norm(dim=1) ** 2)
            .clamp(min=0)
            .sqrt()
        ),
        "The term in the middle is missing: (a + b)² has 2 a b.": (
            (W.norm(dim=1) ** 2 + (s * BA).norm(dim=1) ** 2).sqrt()
        ),
        "The term in the middle lacks its 2: (a + b)² has 2 a b.": (
            (W.norm(dim=1) ** 2 + s * (W * BA).sum(1) + (s * BA).norm(dim=1) ** 2)
            .clamp(min=0)
            .sqrt()
        ),
        "In the last term the scale is not squared: s² ‖B A‖².": (
            (W.norm(dim=1) ** 2 + 2 * s * (W * BA).sum(1) + s * BA.norm(dim=1) ** 2)
            .clamp(min=0)
            .sqrt()
        ),
        "The sign of s is lost: a scale may be negative, and the middle term shows it"
        " (or is it an absolute value?).": (W + abs(s) * BA).norm(dim=1),
        "In the middle term the scale is missing: (w + s c)² has 2 s w c.": (
            (W.norm(dim=1) ** 2 + 2 * (W * BA).sum(1) + s**2 * BA.norm(dim=1) ** 2)
            .clamp(min=0)
            .sqrt()
        ),
        "You add the norms of W and of the update: the norm of a sum is not the sum"
        " of the norms.": (W.norm(dim=1) + (s * BA).norm(dim=1)),
        "You divide by r, but s = α / r holds that already.": (
            (W + s / A.shape[0] * BA).norm(dim=1)
        ),
        "Those are the unit rows, the directions: the exercise asks for the lengths"
        " that they are divided by.": F.normalize((W + s * BA), dim=1),
        "That is the root of the mean square: the norm is the root of the sum.": (
            (W + s * BA).square().mean(1).sqrt()
        ),
        "Those are sums of absolute values: the norm is the Euclidean one.": (
            (W + s * BA).abs().sum(1)
        ),
    }


def expanded_norms(W, A, B, s):
    middle = 2 * s * (B * (W @ A.T)).sum(1)
    last = s**2 * (B * (B @ (A @ A.T))).sum(1)
    return (W.norm(dim=1) ** 2 + middle + last).sqrt()


def right_norms(W, A, B, s):
    return (W + s * B @ A).detach().norm(dim=1)


class Largest(TorchDispatchMode):
    """Notes every tensor of a shape that operations make."""

    def __init__(self, shape, allowed=None):
        super().__init__()
        self.shape, self.allowed, self.made = shape, allowed, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {
            tensor.untyped_storage().data_ptr()
            for tensor in args
            if isinstance(tensor, torch.Tensor)
        }
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.numel() >= self.shape.numel()
                and tuple(tensor.shape) != self.allowed
                and tensor.untyped_storage().data_ptr() not in known
            ):
                self.made.append(str(function))
        return result


@checks("The same norms, and no matrix of W's size was made on the way.", SHAPES)
def gram_norms(function) -> None:
    """function(W, A, B, s) -> (d_out,), without tensors of W's size."""
    for kind in ("any", "any", "s < 0", "s = 0", "small", "learnt"):
        W, A, B, s = draw()
        s = {"s < 0": -s, "s = 0": 0.0}.get(kind, s)
        if kind == "small":
            W, B = 1e-3 * W, (1e-3 * B).detach().requires_grad_()
        W.requires_grad_(kind == "learnt")
        got = function(W, A, B, s)
        with Largest(W.shape, allowed=(len(W), len(W))) as largest:
            unwatched(function)(W, A, B, s)
        compare(
            got,
            right_norms(W, A, B, s),
            wrong_norms(W, A, B, s),
            "Your norm",
            formula=Formula(expanded_norms, W, A, B, s),
        )
        need(
            not largest.made,
            "The numbers are right, but you make a tensor as large as W"
            f" ({largest.made[:1]}): W @ A.T and A @ A.T are all you need, and"
            " vector_norm for W itself.",
        )
        need(
            not got.requires_grad,
            "The numbers are right, but the norm is not detached: it is a constant for"
            " W, A and B alike.",
        )
    W, A, B = torch.randn(300, 400), torch.randn(2, 400), torch.randn(300, 2)
    need(
        python_bytes(unwatched(function), W, A, B, 0.7) < W.nbytes,
        "The numbers are right, but you make something as large as W outside torch (a"
        " numpy array, a list): that costs as much memory as a tensor does.",
    )


# ---- the faults in a layer -----------------------------------------------------------


def dora_of_output(y, x, W, b, A, B, m, s):
    bias = 0 if b is None else b
    norm = (W + s * B @ A).norm(dim=1)
    return m / norm * (y - bias + s * (x @ A.T) @ B.T) + bias


@checks(
    "Right with and without a bias, on every shape, and on whatever the layer below"
    " gives; and the norm is a constant to the backward pass.",
    SHAPES + " y is (..., d_out).",
)
def dora_output(function) -> None:
    """function(y, x, W, b, A, B, m, s) -> (..., d_out)"""
    for square, with_bias, kind in (
        (True, True, "any"),
        (False, True, "any"),
        (False, False, "any"),
        (False, True, "small"),
        (False, True, "s < 0"),
        (False, False, "m < 0"),
        (False, True, "one token"),
        (False, True, "rank 1"),
    ):
        W, A, B, s = draw()
        if square:
            W = torch.randn(len(W), len(W), dtype=torch.float64)
            A = torch.randn(len(A), len(W), dtype=torch.float64).requires_grad_()
        if kind == "rank 1":
            A, B = A[:1].detach().requires_grad_(), B[:, :1].detach().requires_grad_()
        if kind == "small":  # every other row
            W[::2] *= 0.05
            B = B.detach()
            B[::2] *= 0.05
            B.requires_grad_()
        s = -s if kind == "s < 0" else s
        b = torch.randn(len(W), dtype=torch.float64) if with_bias else None
        if kind == "small":
            b[::2] = 0
        rows = () if kind == "one token" else (4, 3)
        x = torch.randn(*rows, W.shape[1], dtype=torch.float64).requires_grad_()
        y = F.linear(x.detach(), W, b) + 0.5 * torch.randn(*rows, len(W)).double()
        m = W.norm(dim=1) * (1 + 0.3 * torch.rand(len(W), dtype=torch.float64))
        if kind == "m < 0":
            m[::3] *= -1
        for leaf in (y, m, W, *([] if b is None else [b])):
            leaf.requires_grad_()
        one_output(function, y, x, W, b, A, B, m, s)


def one_output(function, y, x, W, b, A, B, m, s):
    """Compare one output; y is not W x + b, as another adapter stands below."""
    given = y, x, W, b, A, B, m, s
    Wx, low, shift = terms(y, x, b, A, B, s)
    right = m / right_norms(W, A, B, s) * (Wx + low) + shift
    mistakes = output_slips(*given) | slips_of_norm(*given)
    got = function(*given)
    compare(
        got,
        right,
        {text: wrong for text, wrong in mistakes.items() if not same(wrong, right)},
        "Your output",
        learnt={"y": y, "x": x, "A": A, "B": B, "m": m, "W": W}
        | ({} if b is None else {"b": b}),
        same_values=slips_of_constants(*given),
        formula=Formula(dora_of_output, *given),
    )
    with torch.no_grad():
        need(
            same(unwatched(function)(*given), right),
            "Under torch.no_grad(), as in evaluation, your output is another one.",
        )


def terms(y, x, b, A, B, s) -> tuple:
    """W x, s B A x and the bias."""
    shift = 0 if b is None else b
    return y - shift, s * (x @ A.T) @ B.T, shift


def output_slips(y, x, W, b, A, B, m, s) -> dict:
    """{message: the wrong output} where a part is scaled, or left out, wrongly."""
    Wx, low, shift = terms(y, x, b, A, B, s)
    norm = right_norms(W, A, B, s)
    g = m / norm
    return {
        "The bias is scaled too: the magnitude belongs to the weight. Take b off"
        " first, scale, and add b again.": g * (y + low),
        "The bias is scaled with the rest, and then added once more: take b off"
        " first.": g * (y + low) + shift,
        "You multiply by the norm: the knob is m / norm.": m * norm * (Wx + low)
        + shift,
        "The bias is lost on the way: add it again after scaling.": g * (Wx + low),
        "You compute W x + b again. y is what the layer below gives, and another"
        " adapter or a hook may have changed it: use y.": g * (x @ W.T + low) + shift,
        "Nothing is scaled: that is a LoRA.": y + low,
        "The norm is that of W alone: it has to be that of W + s B A, as it is now.": (
            m / W.norm(dim=1) * (Wx + low) + shift
        ),
        "Only W x is scaled: the update s B A x has to be scaled with it.": (
            g * Wx + low + shift
        ),
        "Only the update is scaled: W x has to be scaled with it.": (
            Wx + g * low + shift
        ),
        "You have taken both faults of the scale for one: the norm is that of W + s B"
        " A, and the update is scaled too.": m / W.norm(dim=1) * Wx + low + shift,
        "The update has lost its scale s.": g * (Wx + low / s) + shift,
        "The update is missing.": g * Wx + shift,
        "The magnitude stands on its head: it is m / norm.": (
            norm / m * (Wx + low) + shift
        ),
        "You multiply by m, but do not divide by the norm.": m * (Wx + low) + shift,
        "m is trained, and may become negative: no absolute value of it.": (
            m.abs() / norm * (Wx + low) + shift
        ),
        "You divide by the norm, but do not multiply by m.": (
            (Wx + low) / norm + shift
        ),
    }


def slips_of_norm(y, x, W, b, A, B, m, s) -> dict:
    """{message: the output} with a wrong norm."""
    Wx, low, shift = terms(y, x, b, A, B, s)
    found = {}
    if W.shape[0] == W.shape[1]:
        columns = (W + s * B @ A).detach().norm(dim=0)
        found = {
            "Your norm is that of the columns, one for each input: it is one for"
            " each output (dim=1). In a square matrix nothing complains.": (
                m / columns * (Wx + low) + shift
            ),
            "Your norm is that of the columns, one for each input, and the bias is"
            " scaled too: there is more than one fault.": m / columns * (y + low),
        }
    for text, wrong in wrong_norms(W, A, B, s).items():
        if wrong.dim() == 0 or wrong.shape == m.shape:
            found[f"The norm is not the one of DoRA. {text}"] = (
                m / wrong * (Wx + low) + shift
            )
    return found


def slips_of_constants(y, x, W, b, A, B, m, s) -> dict:
    """{message: the output} with the right values, where not the norm alone is a
    constant, or not all of it."""
    Wx, low, shift = terms(y, x, b, A, B, s)
    BA = s * B @ A
    moving = {
        "A": W + s * B.detach() @ A,
        "B": W + s * B @ A.detach(),
        "s B A": W.detach() + BA,
        "W": W + BA.detach(),
    }
    halves = {
        f"The outputs are right, but {what} in the norm is not detached: the whole"
        " norm is a constant.": m / weight.norm(dim=1) * (Wx + low) + shift
        for what, weight in moving.items()
    }
    return halves | {
        "The outputs are right, but the norm is not detached: the gradient flows"
        " through it, and each layer keeps a matrix of W's size.": (
            m / (W + BA).norm(dim=1) * (Wx + low) + shift
        ),
        "The outputs are right, but m gets no gradient: only the norm is a constant.": (
            m / right_norms(W, A, B, s)
        ).detach()
        * (Wx + low)
        + shift,
    }


# ---- predictions ---------------------------------------------------------------------


@checks(
    "All of them. What the LoRA does to a row's length is taken out again, m alone says"
    " how long it is, and a longer W + s B A learns more slowly."
)
def predict_dora(predicted, c=2.0) -> None:
    """predicted: {case: number}; c is the factor in the question."""
    judge_numbers(predicted, dora_cases(c))


def dora_cases(c: float) -> dict:
    """{case: (number, what to think of)}, by simulation on random matrices."""
    W = torch.randn(12, 8, dtype=torch.float64)
    m, x, G = W.norm(dim=1), torch.randn(8).double(), torch.randn(12).double()

    def new_weight(change, weight=W, lengths=m):
        V = weight + change
        return (lengths / V.norm(dim=1))[:, None] * V

    def ratio(one, other):
        """The factor between two tensors that are parallel, with its sign."""
        return ((one * other).sum() / other.square().sum()).item()

    aside = torch.randn_like(W)
    aside -= (aside * W).sum(1, keepdim=True) / m[:, None] ** 2 * W
    aside *= c * m[:, None] / aside.norm(dim=1, keepdim=True)
    turned = new_weight(aside)
    cosine = F.cosine_similarity(turned, W, dim=1).mean().item()
    A = torch.randn(2, 8, dtype=torch.float64)

    def gradient_of_B(change, lengths):
        """At W + change, of the loss G · y with the norm a constant."""
        g = lengths / (W + change).norm(dim=1)
        return torch.outer(g * G, A @ x)

    def gradient_of_m(lengths):
        lengths = lengths.clone().requires_grad_()
        loss = G @ (new_weight(0.3 * aside, W, lengths) @ x)
        return torch.autograd.grad(loss, lengths)[0]

    lora = torch.outer(G, A @ x)
    return {
        "stretched": (
            ratio(new_weight((c - 1) * W), W),
            "W + s B A is c W, and its norm is c times as large too.",
        ),
        "reversed": (
            ratio(new_weight(-c * W), W),
            "W + s B A is (1 - c) W. A norm is positive: dividing by it takes out the"
            " size, and leaves the sign.",
        ),
        "turned": (
            cosine,
            "W and s B A are the sides of a right triangle, 1 and c long; the cosine is"
            " that of the angle between W and the longest side.",
        ),
        "late checkpoint": (
            ratio(new_weight(torch.zeros_like(W), c * W), c * W),
            "The layer still has rows of the old lengths m, and the new weight has"
            " rows c times as long.",
        ),
        "gradient, m larger": (
            ratio(gradient_of_B(torch.zeros_like(W), c * m), lora),
            "At B = 0 the knob is g = m / ‖W‖ = c, and everything behind it is LoRA's.",
        ),
        "gradient, stretched": (
            ratio(gradient_of_B((c - 1) * W, m), lora),
            "g = m / ‖W + s B A‖, and the rows of W + s B A are c times as long.",
        ),
        "gradient of m": (
            ratio(gradient_of_m(c * m), gradient_of_m(m)),
            "y = m ⊙ (V x) / ‖V‖ + b is linear in m: its gradient does not contain m.",
        ),
    }


# ---- gradients by hand ---------------------------------------------------------------


def dora_gradients(x, W, A, B, m, s, G):
    norm = (W + s * B @ A).norm(dim=1)
    z = x @ W.T + s * (x @ A.T) @ B.T
    G_z = m / norm * G
    G_low = s * G_z @ B
    dx = G_z @ W + G_low @ A
    dA = G_low.T @ x
    dB = s * G_z.T @ (x @ A.T)
    dm = (G * z / norm).sum(0)
    return dx, dA, dB, dm


@checks(
    "The gradients of x, A, B and m, as autograd has them with the norm a constant.",
    "G is (n, d_out), x is (n, d_in): dx is (n, d_in), dA (r, d_in), dB (d_out, r), dm"
    " (d_out,).",
)
def dora_backward(function) -> None:
    """function(x, W, A, B, m, s, G) -> (dx, dA, dB, dm)"""
    kinds = "any", "any", "B = 0", "float32", "small", "s < 0", "m <= 0"
    for n, kind in zip((5, 1, 4, 6, 5, 4, 5), kinds):
        W, A, B, s = draw()
        x = torch.randn(n, W.shape[1], dtype=torch.float64)
        G = torch.randn(n, len(W), dtype=torch.float64)
        m = W.norm(dim=1) * (0.4 + torch.rand(len(W), dtype=torch.float64))
        if kind == "m <= 0":
            m[::3], m[1] = -m[::3], 0
        if kind == "small":  # every other row
            W[::2], B, m[::2] = 0.05 * W[::2], B.detach(), 0.05 * m[::2]
            B[::2] *= 0.05
        s = -s if kind == "s < 0" else s
        given = [x, W, A.detach(), B.detach(), m]
        if kind == "B = 0":
            given[3] = torch.zeros_like(given[3])
        if kind == "float32":
            given, G = [tensor.float() for tensor in given], G.float()
        one_backward(function, *given, s, G)


def one_backward(function, x, W, A, B, m, s, G):
    given = x, W, A, B, m, s, G
    with torch.no_grad():
        got = function(*given)
    names = "dx", "dA", "dB", "dm"
    look_at_shapes(got, names, (x, A, B, m))
    right = by_autograd(*given)
    wrong = slips_of_formula(*given, right) | slips_of_way_back(*given, right)
    formula = Formula(dora_gradients, *given, whole=got)
    for at, name in enumerate(names):
        mistakes = {
            f"{name}: {text}": parts[at]
            for text, parts in wrong.items()
            if parts[at] is not None and not same(parts[at], right[at])
        }
        compare(got[at], right[at], mistakes, name, learnt={}, formula=formula)
    need(
        not calls_of_autograd(function, *given),
        "The gradients are right, but autograd computes them: the exercise asks for"
        " matrix products alone.",
    )


def look_at_shapes(got, names, leaves) -> None:
    need(
        isinstance(got, tuple | list) and len(got) == 4,
        "Return four tensors: dx, dA, dB, dm.",
    )
    for name, mine, tensor in zip(names, got, leaves):
        need(
            isinstance(mine, torch.Tensor) and mine.shape == tensor.shape,
            f"{name} should be a tensor of shape {tuple(tensor.shape)}, as"
            f" {name[1:]} is; yours is "
            + (
                f"of shape {tuple(mine.shape)}."
                if isinstance(mine, torch.Tensor)
                else f"a {type(mine).__name__}."
            ),
        )


def slips_of_formula(x, W, A, B, m, s, G, right) -> dict:
    """{message: [dx, dA, dB, dm]} of another formula."""
    norm = (W + s * B @ A).norm(dim=1)
    return {
        "the norm is differentiated too; it is a constant.": by_autograd(
            x, W, A, B, m, s, G, constant=False
        ),
        "that is LoRA's gradient: the knob g = m / norm stands before everything.": (
            by_autograd(x, W, A, B, norm, s, G)
        ),
        "the norm is that of W alone.": by_autograd(x, W, A, B, m, s, G, whole=False),
        "the sign of s is lost.": by_autograd(x, W, A, B, m, abs(s), G),
        "the sign is turned round.": [-part for part in right],
        "m may be negative: no absolute value of it.": by_autograd(
            x, W, A, B, m.abs(), s, G
        ),
    }


def slips_of_way_back(x, W, A, B, m, s, G, right) -> dict:
    """{message: [dx, dA, dB, dm]} where a factor or a way of the backward pass is
    missing, or is there once more; None for what is as it should be."""
    V = W + s * B @ A
    norm = V.norm(dim=1)
    scaled = m / norm * G
    return {
        "g does not stand before W: it scales both ways.": [
            G @ W + s * scaled @ B @ A,
            None,
            None,
            None,
        ],
        "only the way through s B A is there: x acts through W too.": [
            s * scaled @ B @ A,
            None,
            None,
            None,
        ],
        "the scale s counts once.": [None, right[1] * s, right[2] * s, None],
        "the scale s is missing.": [
            scaled @ W + scaled @ B @ A,
            right[1] / s,
            right[2] / s,
            (G * (x @ (W + B @ A).T)).sum(0) / norm,
        ],
        "only one of the two ways is there: x acts through W and through s B A.": [
            scaled @ W,
            None,
            None,
            (G * (x @ W.T)).sum(0) / norm,
        ],
        "you take the mean over the rows of x: their gradients add up.": [
            *(part / len(x) for part in right)
        ],
        "you multiply by g once more.": [
            scaled * m / norm @ V,
            *by_autograd(x, W, A, B, m, s, scaled)[1:],
        ],
        "the norm is missing: y = m z / norm, so dm is divided by it.": [
            None,
            None,
            None,
            right[3] * norm,
        ],
    }


def by_autograd(x, W, A, B, m, s, G, constant=True, whole=True) -> list:
    """The gradients of (G · y).sum() for x, A, B and m."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, A, B, m)]
    x, A, B, m = leaves
    V = W + s * B @ A
    norm = (V if whole else W).norm(dim=1)
    y = m / (norm.detach() if constant else norm) * (x @ V.T)
    return [part.detach() for part in torch.autograd.grad((G * y).sum(), leaves)]


# ---- a DoRA of the columns -----------------------------------------------------------


def columns_scaled(W, A, B, m, alpha, r):
    V = W + alpha / r * B @ A
    return m * V / V.norm(dim=0) - W


@checks(
    "One length for each input, a constant norm, a start at the base, and a merge: this"
    " is the paper's formula, read literally.",
    "m is (d_in,), A is (r, d_in), B is (d_out, r); a norm over dim=0 of a (d_out,"
    " d_in) matrix is (d_in,).",
)
def column_dora(config_class) -> None:
    """config_class(target_modules=..., r=..., lora_alpha=...), a LayerConfig."""
    for d_in, d_out, r, alpha, bias in (
        (9, 7, 2, 6, True),
        (6, 6, 3, 3, True),
        (5, 8, 2, 3, False),
    ):
        built = without_seeding(
            lambda: Built(config_class, d_in, d_out, bias, r=r, lora_alpha=alpha)
        )
        built.check_parameters({"A": (r, d_in), "B": (d_out, r), "m": (d_in,)})
        built.check_start()
        W, A, B, m = built.W, built.adapter.A, built.adapter.B, built.adapter.m
        look_at_start(A, B, r)
        other = Built(config_class, d_in, d_out, bias, r=r, lora_alpha=alpha)
        need(
            not torch.equal(other.adapter.A, A),
            "Two layers start with the same A: each draws its own.",
        )
        built.fill()
        V = W + alpha / r * B @ A
        norm = V.norm(dim=0)
        built.compare(
            m / norm.detach() * V - W,
            column_slips(W, A, B, m, alpha, r),
            {
                "The outputs are right, but the norm is not detached: it is a constant"
                " to the backward pass.": m / norm * V - W
            },
            Formula(columns_scaled, W, A, B, m, alpha, r),
        )
        look_at_another_weight(built, alpha / r)
        built.check_modes()
        built.check_copies(other)
    Built(config_class, 8, 10, r=2, lora_alpha=4).check_learning()


def look_at_start(A, B, r) -> None:
    need(
        bool((B == 0).all()) and bool((A != 0).any()),
        "A starts with random numbers and B with zeros, as LoRA's do: with both"
        " zero neither would ever get a gradient.",
    )
    need(
        int(torch.linalg.matrix_rank(A.detach())) == r,
        "A starts with a rank below r (all numbers alike?), and stays so: make it"
        " random.",
    )


def column_slips(W, A, B, m, alpha, r) -> dict:
    """{message: the wrong delta}"""
    V, whole, by_alpha = W + alpha / r * B @ A, W + B @ A, W + alpha * B @ A
    norm = V.norm(dim=0)
    found = {
        "The scale α/r is missing.": m / whole.norm(dim=0) * whole - W,
        "The update is multiplied by α: divide by r.": (
            m / by_alpha.norm(dim=0) * by_alpha - W
        ),
        "The norm is that of W alone: it is that of W + s B A.": (
            m / W.norm(dim=0) * V - W
        ),
        "Nothing is divided by the norm.": m * V - W,
        "Nothing is scaled: that is a LoRA.": V - W,
        "delta is the new weight itself: return what is added to W.": m / norm * V,
        "Only the update is scaled.": alpha / r * m / norm * (B @ A),
        "The lengths m have no effect.": W.norm(dim=0) / norm * V - W,
    }
    if len(W) == len(m):
        rows = V.norm(dim=1, keepdim=True)
        found[
            "Those are the rows, one length for each output: that is DoRA as"
            " everybody has it. Here each *column* has one."
        ] = m[:, None] / rows * V - W
    return found


@torch.no_grad()
def look_at_another_weight(built, s):
    """delta is for the weight as it is now: a checkpoint may have come later, or
    another adapter may be merged into it."""
    A, B, m = built.adapter.A, built.adapter.B, built.adapter.m
    new = torch.randn_like(built.W)
    built.layer.weight.copy_(new)
    V, old = new + s * B @ A, built.W + s * B @ A
    stale = (
        "The weight below has changed since the adapter was made, and your delta still"
        " takes the old one: read base.weight each time."
    )
    compare(
        built.delta(),
        m / V.norm(dim=0) * V - new,
        {
            stale: m / old.norm(dim=0) * old - built.W,
            stale + " (Both times.)": m / old.norm(dim=0) * old - new,
        },
        "delta(base) for another weight",
        learnt={},
    )
    below = Base(built.slot, "default")
    below.__class__ = Stacked
    below.given = old
    need(
        same(
            built.adapter.delta(below),
            m / (old + s * B @ A).norm(dim=0) * (old + s * B @ A) - old,
        ),
        "You read the frozen layer's weight (base.module): what is below may be more"
        " than that layer, and its weight is base.weight.",
    )


class Stacked(Base):
    """A layer below whose weight is not the frozen module's."""

    weight = property(lambda self: self.given)


# ---- a fair comparison ---------------------------------------------------------------

RATES = 5e-3, 1e-2, 2e-2, 5e-2
VALID, TEST = 0, 1


def gap(losses, rates, key=TEST) -> list:
    """LoRA minus DoRA, seed by seed. losses: {method: [for each rate: [for each seed:
    (valid, test)]]}; rates: {method: which}"""
    return [
        a[key] - b[key]
        for a, b in zip(losses["LoRA"][rates["LoRA"]], losses["DoRA"][rates["DoRA"]])
    ]


def chosen(losses, key=VALID, over=fmean) -> dict:
    """{method: which rate is its best}"""
    scores = {
        method: [over([seed[key] for seed in rate]) for rate in table]
        for method, table in losses.items()
    }
    return {method: found.index(min(found)) for method, found in scores.items()}


def slips(losses, one="LoRA", other="DoRA") -> dict:
    """What people report instead: {message: the difference that they get}."""
    best = chosen(losses)
    lowest = {
        method: min(seed[TEST] for rate in table for seed in rate)
        for method, table in losses.items()
    }
    shared = "You give both methods one rate: each has its own best."
    return {
        f"That is {other} minus {one}: the other way round is asked for.": -fmean(
            gap(losses, best)
        ),
        "You choose the rate by the test loss. Then the test questions have helped to"
        " tune: choose by the validation loss.": fmean(
            gap(losses, chosen(losses, TEST))
        ),
        "The rates are right, but you report validation losses: they were used to"
        " choose. Report the test losses.": fmean(gap(losses, best, VALID)),
        "You choose the rate of the luckiest single run: take the mean over the seeds"
        " first.": fmean(gap(losses, chosen(losses, over=min))),
        "You compare the best test loss of each, over all rates and seeds: that"
        " rewards luck.": lowest["LoRA"] - lowest["DoRA"],
        "You average over all rates: the bad ones count as much as the best.": fmean(
            fmean(gap(losses, dict.fromkeys(best, rate))) for rate in range(len(RATES))
        ),
        shared: fmean(gap(losses, dict.fromkeys(best, best["LoRA"]))),
        shared + f" (You took {other}'s.)": fmean(
            gap(losses, dict.fromkeys(best, best["DoRA"]))
        ),
        "That is a sum over the seeds: take the mean.": sum(gap(losses, best)),
    }


def has_clear_winners(losses) -> bool:
    """False where two rates tie in their mean validation loss: then the order in which
    one sums decides which is the best."""
    for table in losses.values():
        means = sorted(fmean([seed[VALID] for seed in rate]) for rate in table)
        if means[1] - means[0] < 1e-4:
            return False
    return True


def tied(losses, seed: int) -> dict:
    """The same, and with this seed both methods have one test loss at their best
    rates."""
    best = chosen(losses)
    test = losses["LoRA"][best["LoRA"]][seed][TEST]
    row = losses["DoRA"][best["DoRA"]]
    row[seed] = row[seed][VALID], test
    return losses


def signs(losses) -> set:
    """Which signs the differences of the seeds have: -1, 0, 1."""
    return {(one > 0) - (one < 0) for one in gap(losses, chosen(losses))}


def sweep(wanted: set, seeds: int = 3) -> dict:
    """Made-up losses of both methods, with these signs of their differences, in which
    each slip gives another difference."""
    if wanted == {0}:  # all of them equal
        losses = sweep({0, 1}, seeds)
        for seed in range(seeds):
            tied(losses, seed)
        return losses

    def noise():
        return round(random.uniform(-0.06, 0.06), 3)

    for _ in range(100_000):
        losses = {
            method: [
                [
                    (
                        0.4 + 0.05 * abs(rate - at) + noise(),
                        0.4 + 0.05 * abs(rate - at) + noise(),
                    )
                    for _ in range(seeds)
                ]
                for rate in range(len(RATES))
            ]
            for method, at in zip(("LoRA", "DoRA"), random.sample(range(4), 2))
        }
        losses = tied(losses, random.randrange(seeds)) if 0 in wanted else losses
        best = chosen(losses)
        right = gap(losses, best)
        if signs(losses) == wanted and chosen(losses, TEST) != best != chosen(
            losses, over=min
        ):
            values = sorted([fmean(right), *slips(losses).values()])
            apart = min(b - a for a, b in zip(values, values[1:])) > 1e-4
            if apart and has_clear_winners(losses):
                return losses
    raise RuntimeError("no such runs were found")


def scaled(losses, factor: float) -> dict:
    return {
        method: [[(a * factor, b * factor) for a, b in row] for row in table]
        for method, table in losses.items()
    }


@checks(
    "Each at its own rate, chosen on validation questions, judged on test questions,"
    " seed by seed. That is fair."
)
def fair_gap(function, one="LoRA", other="DoRA") -> None:
    """function(runs) -> (mean of one minus other, do all seeds agree who is better?)"""
    names = {"LoRA": one, "DoRA": other}

    def near(a, b):
        return abs(a - b) < 1e-6

    differences, agreements = Choices(near), Choices()
    for wanted in ({1}, {1, -1}, {-1}, {0, 1}, {0, -1}, {0}):
        losses = sweep(wanted, seeds=4 if wanted == {1, -1} else 3)
        if wanted == {-1}:  # small losses: how far they are apart decides nothing
            losses = scaled(losses, 0.02)
        seeds = random.sample(range(100), 4)
        runs = [
            {
                "method": names[method],
                "lr": lr,
                "seed": seed,
                "valid_loss": both[VALID],
                "test_loss": both[TEST],
            }
            for method, table in losses.items()
            for lr, row in zip(RATES, table)
            for seed, both in zip(seeds, row)
        ]
        random.shuffle(runs)
        got = function(runs)
        need(
            isinstance(got, tuple | list) and len(got) == 2,
            "Return two things: the mean difference, and True or False.",
        )
        need(
            got[1] in (True, False),
            "The second thing is True or False: do all seeds agree?",
        )
        difference, right = float(got[0]), fmean(gap(losses, chosen(losses)))
        differences.add(
            difference,
            right,
            slips(losses, one, other),
            f"Your difference is {difference:+.4f}, and it is {right:+.4f}: for each"
            " method choose the rate with the lowest mean validation loss, then"
            " subtract the test losses.",
        )
        agreements.add(
            bool(got[1]),
            wanted in ({1}, {-1}),
            {
                "With one seed both losses are equal, so that neither is better there:"
                " then not all seeds agree.": [
                    len(wanted) == 1 or wanted in ties
                    for ties in ([], [{0, 1}], [{0, -1}], [{0, 1}, {0, -1}])
                ]
            },
            "The difference is right, but whether the seeds agree is not: subtract seed"
            " by seed, and look whether all differences have one sign.",
        )
    differences.judge()
    agreements.judge()
