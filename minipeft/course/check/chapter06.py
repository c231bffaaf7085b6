"""Chapter 06, DoRA: its norm, its norm without a large matrix, its layer, how far a
weight has moved, a fair comparison."""

import random
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .sandbox import unwatched
from .teacher import checks, compare, need, same

__all__ = [
    "dora_forward",
    "fair_gap",
    "gram_norms",
    "length_and_direction",
    "row_norms",
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


def right_norms(W, A, B, s):
    return (W + s * B @ A).detach().norm(dim=1)


@checks(
    "One norm for each output, of W and its update together, and a constant to the"
    " backward pass.",
    SHAPES,
)
def row_norms(function) -> None:
    """function(W, A, B, s) -> (d_out,)"""
    for _ in range(3):
        W, A, B, s = draw()
        got = function(W, A, B, s)
        compare(got, right_norms(W, A, B, s), wrong_norms(W, A, B, s), "Your norm")
        need(
            not got.requires_grad,
            "The numbers are right, but the norm is part of the graph: it is not"
            " detached, so the backward pass would keep a matrix of W's size (section"
            " 2.4).",
        )


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
    for _ in range(3):
        W, A, B, s = draw()
        got = function(W, A, B, s)
        with Largest(W.shape, allowed=(len(W), len(W))) as largest:
            unwatched(function)(W, A, B, s)
        compare(got, right_norms(W, A, B, s), wrong_norms(W, A, B, s), "Your norm")
        need(
            not largest.made,
            "The numbers are right, but you make a tensor as large as W"
            f" ({largest.made[:1]}): W @ A.T and A @ A.T are all you need, and"
            " vector_norm for W itself.",
        )
        need(
            not got.requires_grad,
            "The numbers are right, but the norm is not detached.",
        )


@checks(
    "Scaled outputs, a bias that is not, and gradients in A, B and m as the paper has"
    " them. This is DoRA.",
    SHAPES,
)
def dora_forward(function) -> None:
    """function(x, W, b, A, B, m, s) -> (..., d_out)"""
    for _ in range(3):
        W, A, B, s = draw()
        b, x = (
            torch.randn(len(W), dtype=torch.float64),
            torch.randn(4, 3, W.shape[1], dtype=torch.float64).requires_grad_(),
        )
        m = (
            W.norm(dim=1) * (1 + 0.3 * torch.rand(len(W), dtype=torch.float64))
        ).requires_grad_()
        norm, z = right_norms(W, A, B, s), x @ (W + s * B @ A).T
        right, plain, g = m / norm * z + b, z + b, m / norm
        mistakes = {
            "The bias is scaled too: the magnitude belongs to the weight. Scale"
            " first, then add b.": (g * (z + b)),
            "The bias is missing.": g * z,
            "That is LoRA: nothing is scaled by m / ‖W + sBA‖.": plain,
            "You multiply by m, but do not divide by the norm.": m * z + b,
            "You divide by the norm, but do not multiply by m.": z / norm + b,
            "The norm is that of W alone: it has to be that of W + s B A, as it is"
            " now.": (m / W.norm(dim=1) * z + b),
            "Only W x is scaled: the update s B A x has to be scaled with it.": (
                g * (x @ W.T) + s * x @ A.T @ B.T + b
            ),
            "Only the update is scaled: W x has to be scaled with it.": (
                x @ W.T + g * (s * x @ A.T @ B.T) + b
            ),
            "The update has lost its scale s.": m / norm * (x @ (W + B @ A).T) + b,
            "The knob stands on its head: it is m / norm.": norm / m * z + b,
            "You divide the output by its own length. The norm is that of the"
            " weight's rows, the same for every x.": (
                m * z / z.norm(dim=-1, keepdim=True) + b
            ),
        }
        got = function(x, W, b, A, B, m, s)
        moving = m / (W + s * B @ A).norm(dim=1) * z + b
        fixed = m.detach() / norm * z + b
        compare(
            got,
            right,
            mistakes,
            "Your output",
            same_values={
                "The outputs are right, but the norm is not detached: the gradient"
                " flows through it.": moving,
                "The outputs are right, but m gets no gradient: only the norm is a"
                " constant.": fixed,
            },
        )


@checks(
    "The mean change of length and the mean change of direction, row by row.",
    "Both weights are (d_out, d_in), and a row is one output.",
)
def length_and_direction(function) -> None:
    """function(new, old) -> (mean change of length, mean of 1 - cosine) of the rows."""
    for _ in range(3):
        old, *_ = draw()
        new = old + 0.5 * torch.randn_like(old)
        got = function(new, old)
        need(
            isinstance(got, tuple | list) and len(got) == 2,
            "Return two numbers: (ΔM, ΔD).",
        )
        got = [torch.as_tensor(value, dtype=torch.float64) for value in got]
        lengths, cosine = (
            (new.norm(dim=1) - old.norm(dim=1)),
            F.cosine_similarity(new, old, dim=1),
        )
        down = (new.norm(dim=0) - old.norm(dim=0)), F.cosine_similarity(new, old, dim=0)
        right = [lengths.abs().mean(), (1 - cosine).mean()]
        need(
            not (same(got[0], right[1]) and same(got[1], right[0])),
            "The two are swapped: first ΔM, then ΔD.",
        )
        compare(
            got[0],
            right[0],
            {
                "ΔM is taken over columns: a length belongs to a row, that is to an"
                " output.": (down[0].abs().mean()),
                "In ΔM changes up and down cancel: take the absolute value before the"
                " mean.": (lengths.mean()),
                "In ΔM the absolute value comes too late, after the mean.": (
                    lengths.mean().abs()
                ),
                "ΔM is the length of the difference, which holds the turn as well:"
                " take the difference of the lengths.": (
                    (new - old).norm(dim=1).mean()
                ),
                "ΔM is a sum: it should be a mean over the rows.": lengths.abs().sum(),
                "ΔM has one number for each row: the mean over them is asked for.": (
                    lengths.abs()
                ),
                "ΔM is relative to the old length: the formula does not divide.": (
                    (lengths.abs() / old.norm(dim=1)).mean()
                ),
                "ΔM takes each matrix for one long vector: its rows have lengths of"
                " their own.": ((new.norm() - old.norm()).abs()),
                "ΔM is squared: it is the absolute value.": lengths.square().mean(),
            },
            "ΔM",
        )
        compare(
            got[1],
            right[1],
            {
                "ΔD is taken over columns: a direction belongs to a row.": (
                    (1 - down[1]).mean()
                ),
                "ΔD is the cosine itself, which is 1 where nothing turned: take 1 -"
                " cosine.": (cosine.mean()),
                "ΔD is a sum: it should be a mean over the rows.": (1 - cosine).sum(),
                "ΔD is a scalar product, not a cosine: divide by both lengths.": (
                    (1 - (new * old).sum(1)).mean()
                ),
                "ΔD has one number for each row: the mean over them is asked for.": (
                    1 - cosine
                ),
                "ΔD is an angle: it is 1 - cos, without the arc.": (
                    cosine.clamp(-1, 1).acos().mean()
                ),
                "ΔD takes each matrix for one long vector: its rows have directions"
                " of their own.": (
                    1 - F.cosine_similarity(new.flatten(), old.flatten(), dim=0)
                ),
                "ΔD compares the change with the old row: compare the new row with"
                " the old one.": (
                    (1 - F.cosine_similarity(new - old, old, dim=1)).mean()
                ),
            },
            "ΔD",
        )


RATES, SEEDS = (5e-3, 1e-2, 2e-2, 5e-2), (0, 1, 2)
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


def slips(losses) -> dict:
    """What people report instead: {message: the difference that they get}."""
    best = chosen(losses)
    lowest = {
        method: min(seed[TEST] for rate in table for seed in rate)
        for method, table in losses.items()
    }
    shared = "You give both methods one rate: each has its own best."
    return {
        "That is DoRA minus LoRA: the other way round is asked for.": -fmean(
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
        shared + " (You took DoRA's.)": fmean(
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


def sweep(agree: bool) -> dict:
    """Made-up losses of both methods, in which each slip gives another difference."""

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
                    for _ in SEEDS
                ]
                for rate in range(len(RATES))
            ]
            for method, at in zip(("LoRA", "DoRA"), random.sample(range(4), 2))
        }
        best = chosen(losses)
        right = gap(losses, best)
        if (min(right) > 0 or max(right) < 0) == agree and chosen(
            losses, TEST
        ) != best != chosen(losses, over=min):
            values = sorted([fmean(right), *slips(losses).values()])
            apart = min(b - a for a, b in zip(values, values[1:])) > 1e-4
            if apart and has_clear_winners(losses):
                return losses
    raise RuntimeError("no such runs were found")


@checks(
    "Each at its own rate, chosen on validation questions, judged on test questions,"
    " seed by seed. That is fair."
)
def fair_gap(function) -> None:
    """function(runs) -> (mean of LoRA minus DoRA, do all seeds agree who is better?)"""
    for agree in (True, False, True, False):
        losses = sweep(agree)
        runs = [
            {
                "method": method,
                "lr": lr,
                "seed": seed,
                "valid_loss": both[VALID],
                "test_loss": both[TEST],
            }
            for method, table in losses.items()
            for lr, row in zip(RATES, table)
            for seed, both in zip(SEEDS, row)
        ]
        random.shuffle(runs)
        got = function(runs)
        need(
            isinstance(got, tuple | list) and len(got) == 2,
            "Return two things: the mean difference, and True or False.",
        )
        difference, right = float(got[0]), fmean(gap(losses, chosen(losses)))

        def near(value):
            return abs(difference - value) < 1e-6

        if not near(right):
            message = next(
                (text for text, value in slips(losses).items() if near(value)), None
            )
            need(
                False,
                message
                or (
                    f"Your difference is {difference:+.4f}, and it is {right:+.4f}:"
                    f" for each method choose the rate with the lowest mean"
                    f" validation loss, then subtract the test losses."
                ),
            )
        need(
            got[1] in (True, False),
            "The difference is right. The second thing is True or False: do all seeds"
            " agree?",
        )
        need(
            bool(got[1]) == agree,
            "The difference is right, but whether the seeds agree is not: subtract seed"
            " by seed, and look whether all differences have one sign.",
        )
