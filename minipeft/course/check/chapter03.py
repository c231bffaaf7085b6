"""Chapter 03, intrinsic dimension: the gradient in a subspace, Hadamard's transform,
hashing, SAID, d90."""

import random

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .sandbox import package_calls, unwatched
from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "d90",
    "fast_hadamard",
    "hash_project",
    "structure_aware",
    "subspace_gradient",
]


@checks(
    "Your gradient is Pᵀg: the full gradient, seen through the d columns of P.",
    "P is (D, d), g is (D): what you want has d numbers.",
)
def subspace_gradient(function) -> None:
    """function(P, g) -> the gradient for theta_d, from the gradient g for all D
    parameters."""
    for _ in range(3):
        D, d = random.randint(30, 40), random.randint(4, 9)
        P, g = (
            torch.randn(D, d, dtype=torch.float64) / D**0.5,
            torch.randn(D, dtype=torch.float64),
        )
        got, right = function(P, g), P.T @ g
        need(
            not (isinstance(got, torch.Tensor) and got.shape == (D,)),
            "You give D numbers, and θ_d has only d: this is a gradient for all"
            " parameters, and it should be one for the few that are trained.",
        )
        compare(
            got,
            right,
            {
                "You give the point of the subspace that is nearest to g (least"
                " squares). The chain rule asks for less: Pᵀg.": (
                    torch.linalg.lstsq(P, g[:, None]).solution[:, 0]
                ),
                "The sign is wrong: the step goes against the gradient, the gradient"
                " itself does not.": -right,
                "You take the mean over the D parameters: each adds its own part, so"
                " sum.": right / D,
                "You take the mean over the d columns: each has its own gradient.": (
                    right / d
                ),
                "You divide by the lengths of P's columns: the chain rule does not.": (
                    right / P.norm(dim=0)
                ),
                "You have P's sign only: the size of its entries counts too.": (
                    P.sign().T @ g
                ),
            },
            "Your gradient",
        )


class Largest(TorchDispatchMode):
    """Sees the size of the largest tensor that is made while it is on; stops what takes
    far too many operations."""

    numel = operations = work = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.operations += 1
        need(
            self.operations < 60_000,
            "Right numbers, but not fast: for 512 of them you need more than 60,000"
            " operations. If your function calls itself, twice is enough: keep H a and"
            " H b, or transform a + b and a - b.",
        )
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
                self.work += tensor.numel()
        return out


def stages(x, which):
    """Some of the stages of the fast transform: those with these distances."""
    for h in which:
        a, b = x.view(-1, 2, h).unbind(1)
        x = torch.stack([a + b, a - b], 1).flatten()
    return x


@checks(
    "Your transform is H x, for every length that I tried, and it never builds the"
    " matrix.",
    "The input has n = 2^k numbers, and so has the result.",
)
def fast_hadamard(function) -> None:
    """function(x) -> H x for x (n), n = 2^k, where H[i, j] = (-1)^(number of binary
    ones that i and j share)."""
    for k in (1, 3, 5):
        n = 2**k
        i = torch.arange(n)
        ones = sum(((i[:, None] & i[None]) >> bit) & 1 for bit in range(k))
        H, x = (1 - 2 * (ones % 2)).double(), torch.randn(n, dtype=torch.float64)
        got, right = function(x), H @ x
        powers = [2**j for j in range(k)]
        reverse = torch.tensor([int(f"{j:0{k}b}"[::-1], 2) for j in range(n)])
        compare(
            got,
            right,
            {
                "You divide by √n: that makes H orthogonal, but here its entries are"
                " +1 and -1.": right / n**0.5,
                "You divide by n: that is the way back, the inverse.": right / n,
                "Only one stage was done: neighbours are added and subtracted, and"
                " now the same has to follow for distances 2, 4, 8 …": stages(
                    x, powers[:1]
                ),
                "The last stage is missing: the distance has to run up to n / 2.": (
                    stages(x, powers[:-1])
                ),
                "Only the stage with the largest distance was done: it recurs within"
                " both halves.": stages(x, powers[-1:]),
                "Within a pair you have the difference first: it is (a + b, a - b).": (
                    right.flip(0)
                ),
                "The values are right, but in bit-reversed order.": right[reverse],
                "You add only: one of each pair is a difference.": torch.full_like(
                    x, x.sum().item()
                ),
            },
            "Your transform",
        )
    borrowed = package_calls(function, torch.randn(8))
    need(
        not borrowed,
        f"You call the course's own {borrowed[:1]}: the exercise is to write it.",
    )
    n = 512
    with Largest() as seen:
        unwatched(function)(torch.randn(n))
    need(
        seen.numel < n**2 / 8,
        "Right numbers, but on the way you build a matrix of n² entries. For n = 4096"
        " it would have 16 million: add and subtract instead, in log₂ n stages.",
    )
    need(
        seen.work < n**2 / 2,
        f"Right numbers, but not fast: for n = {n} you make {seen.work:,} entries in"
        f" all, as many as n² = {n**2:,} has; n log₂ n = {9 * n:,} are enough, a few"
        " times over.",
    )


@checks(
    "Your projection has orthogonal columns of length 1, and one number for each"
    " parameter.",
    "index and sign have D entries, theta has d.",
)
def hash_project(function) -> None:
    """function(theta, index, sign) -> P theta (D): row i of P has sign[i] in column
    index[i], columns of length 1."""
    for _ in range(3):
        d = random.randint(3, 6)
        D = random.randint(8 * d, 9 * d)
        index = torch.cat([torch.arange(d), torch.randint(d, (D - d,))])[
            torch.randperm(D)
        ]
        sign = torch.randint(2, (D,)).float() * 2 - 1
        theta = torch.randn(d, requires_grad=True)
        count = torch.bincount(index).float()
        value, got = theta, function(theta, index, sign)
        right = value[index] * sign / count.sqrt()[index]
        need(
            not (isinstance(got, torch.Tensor) and got.shape == (d,)),
            "You give d numbers: that is the way back, from parameters to θ_d. Each of"
            " the D parameters takes its number from theta.",
        )
        compare(
            got,
            right,
            {
                "The columns are too long: with c entries of ±1 a column has the"
                " length √c. Divide by it.": value[index] * sign,
                "You divide by the number of entries of a column: its length is the"
                " square root of that.": value[index] * sign / count[index],
                "The signs are missing: without them all parameters of a column move"
                " the same way.": (value[index] / count.sqrt()[index]),
                "The columns have length 1 only on average: you divide by √(D/d), but"
                " each column has its own number of entries.": (
                    value[index] * sign / (D / d) ** 0.5
                ),
                "You multiply by the column's length: divide by it.": (
                    value[index] * sign * count.sqrt()[index]
                ),
                "You divide by √d: a column's length comes from its own entries.": (
                    value[index] * sign / d**0.5
                ),
                "You divide by √D: a column has far fewer entries than D.": (
                    value[index] * sign / D**0.5
                ),
            },
            "Your P θ",
        )


@checks(
    "Each tensor gets its own part of the random vector, times its own λ.",
    "flat is as long as all shapes together; there is one λ for each shape.",
)
def structure_aware(function) -> None:
    """function(flat, lambdas, shapes) -> [lambda_i times the i-th part of flat, in the
    i-th shape]."""
    for _ in range(3):
        shapes = [
            (random.randint(2, 4), random.randint(5, 7)),
            (random.randint(8, 9),),
            (3, 2, random.randint(2, 4)),
        ]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.randn(sum(sizes), dtype=torch.float64)
        lambdas = torch.randn(3, dtype=torch.float64, requires_grad=True)
        got, factors = function(flat, lambdas, shapes), lambdas
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes)]
        right = [factor * part for factor, part in zip(factors, parts)]
        need(got is not None, "Your answer is None: is there a `return` at the end?")
        need(
            isinstance(got, (list, tuple)),
            "Give me a list, with a tensor for each shape.",
        )
        need(
            len(got) == len(shapes),
            f"There are {len(shapes)} shapes, and you give {len(got)} tensors.",
        )
        for i, (mine, expected) in enumerate(zip(got, right)):
            need(
                not (
                    isinstance(mine, torch.Tensor)
                    and mine.shape == (sizes[i],) != tuple(shapes[i])
                ),
                "Your parts are flat: each should have its tensor's shape.",
            )
            mistakes = {
                "The λ is missing: you give the part as it is.": parts[i],
                "You add λ: it is a factor.": factors[i] + parts[i],
                "You multiply by the sum of all λ: each tensor has its own.": (
                    factors.sum() * parts[i]
                ),
                "You multiply by the first λ throughout: each tensor has its own.": (
                    factors[0] * parts[i]
                ),
                "Every tensor gets the beginning of the random vector: move on by the"
                " size of what came before.": (
                    factors[i] * flat[: sizes[i]].view(shapes[i])
                ),
                "Your parts come from the end of the random vector: take them in the"
                " order of the shapes.": (
                    factors[i]
                    * (flat[-sum(sizes[: i + 1]) :][: sizes[i]]).view(shapes[i])
                ),
                "The factor is 1 + λ: it is λ alone, and starts at 1.": (
                    (1 + factors[i]) * parts[i]
                ),
            }
            if i == 0:  # where some mistakes do not show yet
                mistakes = {
                    message: wrong
                    for message, wrong in mistakes.items()
                    if not same(wrong, expected)
                }
            compare(mine, expected, mistakes, f"Tensor {i}")


@checks("You count gain, from where training starts to where full fine-tuning ends.")
def d90(function) -> None:
    """function({d: loss}, start, full) -> the smallest d with 90 % of full
    fine-tuning's gain, or None."""

    def ask(losses, start, full, right, mistakes):
        got = function(dict(losses), start, full)
        if got == right and not isinstance(got, bool):
            return
        said = f"From losses {losses}, start {start}, full {full} you get {got!r}"
        for message, wrong in mistakes.items():
            need(not (wrong != right and got == wrong), f"{said}. {message}")
        raise Wrong(
            f"{said}, and it should be {right}. The gain of d is start - loss, the"
            " whole gain start - full."
        )

    start, full = 4.0, 1.0  # 90 % of the gain: a loss of 1.3 or less
    ask(
        {1024: 1.02, 8: 3.0, 128: 1.25, 512: 1.05, 32: 1.6, 4096: 1.01},
        start,
        full,
        128,
        {
            "You take the first in the order of the dictionary, which need not be"
            " sorted.": 1024,
            "You take the largest d that reaches it: the smallest is wanted.": 4096,
            "You compare the losses themselves, loss with full: what that says"
            " depends on where zero is. Compare what was gained.": 512,
            "You give the loss: give the dimension.": 1.25,
            "The threshold lies at 10 % of the gain: it is 90 %.": 8,
            "One of them does reach 90 %. Is there a `return`? And is the whole gain"
            " start - full, not start?": (None),
        },
    )
    ask(
        {8: 2.0, 32: 1.01, 128: 1.4, 512: 1.0},
        start,
        full,
        32,
        {
            "Curves are noisy: d = 32 reached it, though 128 did not. The smallest"
            " that does is wanted.": (512)
        },
    )
    ask(
        {8: 3.9, 32: 3.5, 128: 2.0},
        start,
        full,
        None,
        {"None of them reaches 90 % of the gain: give None, not the largest.": 128},
    )
    ask(  # the sums are exact: d = 4 has 9 of 10
        {2: 2.0, 4: 1.0, 16: 0.5},
        10.0,
        0.0,
        4,
        {"Exactly 90 % is enough: the smallest d with *at least* 90 %.": 16},
    )
    share = "The bar is 90 % of the whole gain, 0.9 · (start - full)"
    ask(  # the bar lies at 1.3; 0.9 · start - full and full + 0.1 · start are at 1.4
        {8: 1.35, 64: 1.2},
        start,
        full,
        64,
        {f"{share}: full is multiplied by 0.9 as well.": 8},
    )
    ask(  # the bar lies at 3.1, and 0.9 · start at 3.6
        {8: 3.4, 64: 3.05},
        4.0,
        3.0,
        64,
        {f"{share}, and not a share of the loss itself.": 8},
    )
    ask(
        {4: 1.5, 16: 0.9},
        2.0,
        1.0,
        16,
        {"A loss below full's counts too: it is more than the whole gain.": None},
    )
