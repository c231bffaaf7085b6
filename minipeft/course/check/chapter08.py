"""Chapter 08, beyond low rank: LoHa's product, LoKr by reshaping, VeRA's two vectors,
counting, the nearest Kronecker product."""

import random

import torch

from .chapter06 import Largest
from .teacher import TOLERANCE, checks, compare, need

__all__ = [
    "loha_delta",
    "lokr_apply",
    "nearest_kron",
    "trainable_numbers",
    "vera_forward",
]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@checks(
    "(α/r) (B₁ A₁) ⊙ (B₂ A₂), and gradients flow through it.",
    "B is (d_out, r) and A is (r, d_in): B @ A, and then entry by entry.",
)
def loha_delta(function) -> None:
    """function(B1, A1, B2, A2, alpha, r) -> (d_out, d_in)"""
    for _ in range(3):
        r, alpha = random.choice([2, 3]), random.choice([7.0, 13.0])
        d_in, d_out = random.randint(6, 9), random.randint(11, 14)
        B1, A1, B2, A2 = (
            double(*shape).requires_grad_() for shape in ((d_out, r), (r, d_in)) * 2
        )
        one, two = B1 @ A1, B2 @ A2
        compare(
            function(B1, A1, B2, A2, alpha, r),
            alpha / r * one * two,
            {
                "The factor α / r is missing: your update is the product alone.": (
                    one * two
                ),
                "α is missing: you divide by r, but the factor is α / r.": (
                    one * two / r
                ),
                "You multiply by α: did you forget to divide by r?": alpha * one * two,
                "You divide by r²: there are two products, but one scale, α / r.": (
                    alpha / r**2 * one * two
                ),
                "The scale is in both products: once is enough.": (
                    (alpha / r) ** 2 * one * two
                ),
                "You add the two products. LoHa multiplies them, entry by entry.": (
                    alpha / r * (one + two)
                ),
                "The factors are crossed: B₁ belongs to A₁, and B₂ to A₂.": (
                    alpha / r * (B1 @ A2) * (B2 @ A1)
                ),
                "Only the first product is there: that is a LoRA.": alpha / r * one,
                "You multiply the factors entry by entry, and then the results as"
                " matrices: it is the other way round.": (
                    alpha / r * (B1 * B2) @ (A1 * A2)
                ),
                "You divide by √r, as rsLoRA does: LoHa's scale is α / r.": (
                    alpha / r**0.5 * one * two
                ),
                "Your update lies on its side: it should be (d_out, d_in).": (
                    (alpha / r * one * two).T
                ),
            },
            "Your update",
        )


@checks(
    "C X Dᵀ, for every shape that I tried, and the large product was never formed.",
    "Each x is read as X (m, n); C is (p, m), D is (q, n), so C @ X @ D.T is (p, q).",
)
def lokr_apply(function) -> None:
    """function(x, C, D) -> (N, p q)"""
    for _ in range(3):
        p, m, q, n = random.sample(range(4, 9), 4)
        C, D, x = double(p, m), double(q, n), double(3, m * n)
        with Largest(torch.empty(p * q, m * n).shape) as largest:
            got = function(x, C, D)
        X = x.view(3, m, n)
        need(
            not (isinstance(got, torch.Tensor) and got.shape == (3, p, q)),
            "You return a matrix for each x, (N, p, q): read it as a vector again"
            " (flatten).",
        )
        mistakes = {
            "The factors are swapped: yours is D ⊗ C. The outer index, of the blocks,"
            " belongs to C.": (x @ torch.kron(D, C).T),
            "You read the result column by column: (p, q) is flattened row by row.": (
                (C @ X @ D.T).mT.flatten(1)
            ),
        }
        swapped_reading = (C @ x.view(3, n, m).mT @ D.T).flatten(1)
        mistakes[
            "You read x column by column: X is (m, n), row by row, x.view(-1, m, n)."
        ] = swapped_reading
        compare(got, x @ torch.kron(C, D).T, mistakes, "Your output")
        need(
            not largest.made,
            "The numbers are right, but you form a matrix of the size of C ⊗ D: read x"
            " as a matrix instead.",
        )


@checks(
    "b ⊙ B (d ⊙ A x), cut to this layer's size, and only the two vectors learn. This is"
    " VeRA.",
    "A is (r, columns), B is (rows, r); x is (N, d_in), d is (r,), b is (d_out,).",
)
def vera_forward(function) -> None:
    """function(x, A, B, d, b) -> (N, d_out); A and B may be larger than needed."""
    for _ in range(3):
        r, d_in, d_out = (
            random.choice([3, 5]),
            random.randint(6, 8),
            random.randint(9, 12),
        )
        A, B = (
            double(r, d_in + 4).requires_grad_(),
            double(d_out + 3, r).requires_grad_(),
        )
        x, d, b = (
            double(4, d_in).requires_grad_(),
            double(r).requires_grad_(),
            double(d_out).requires_grad_(),
        )
        a, c = A[:, :d_in].detach(), B[:d_out].detach()
        right = b * ((d * (x @ a.T)) @ c.T)
        got = function(x, A, B, d, b)
        last = b * ((d * (x @ A[:, -d_in:].detach().T)) @ c.T)
        compare(
            got,
            right,
            {
                "d is missing.": b * (x @ a.T @ c.T),
                "b is missing.": (d * (x @ a.T)) @ c.T,
                "You take A's last columns: it is the first ones.": last,
                "You take B's last rows: it is the first ones.": (
                    b * ((d * (x @ a.T)) @ B[-d_out:].detach().T)
                ),
                "b and d are added, not multiplied.": b + (d + x @ a.T) @ c.T,
                "You divide by r: VeRA has no such scale.": right / r,
                "d is applied twice: once is enough.": b * ((d * d * (x @ a.T)) @ c.T),
            },
            "Your update",
        )
        grads = torch.autograd.grad(got.sum(), [A, B], allow_unused=True)
        need(
            grads[0] is None and grads[1] is None,
            "The numbers are right, but A and B are trained too: freeze them.",
        )


@checks(
    "All four counts are right, with what is shared counted once and what is frozen not"
    " at all."
)
def trainable_numbers(function) -> None:
    """function(shapes, r) -> {"lora", "loha", "vera", "denselora": numbers}; shapes:
    [(kind, d_out, d_in)]."""
    for _ in range(3):
        r, sizes = (
            random.choice([4, 8]),
            {
                "q": (64, 48),
                "k": (20, 48),
                "v": (20, 48),  # another kind than k, though of the same shape
                "down": (48, random.choice([80, 96])),
            },
        )
        shapes = [
            (kind, *sizes[kind]) for _ in range(random.choice([3, 5])) for kind in sizes
        ]
        got = function(list(shapes), r)
        need(
            isinstance(got, dict),
            'Return a dictionary: {"lora": …, "loha": …, "vera": …, "denselora": …}.',
        )
        missing = [
            name for name in ("lora", "loha", "vera", "denselora") if name not in got
        ]
        need(not missing, f"There is no entry {', '.join(missing)}.")

        def each(count):
            return sum(count(o, i) for _, o, i in shapes)

        def ends(layers):
            return sum(r * (o + i) for _, o, i in layers)

        lora = each(lambda o, i: r * (o + i))
        slips = {
            "lora": (
                lora,
                {
                    "lora: you count the matrices in full.": each(lambda o, i: o * i),
                    "lora: you count each kind once, but every layer has its own A"
                    " and B.": ends(set(shapes)),
                },
            ),
            "loha": (
                2 * lora,
                {
                    "loha: there are two products, so it is twice a LoRA of the same"
                    " r.": lora,
                    "loha: the rank is r², the number of parameters is not.": lora * r,
                },
            ),
            "vera": (
                each(lambda o, i: o + r),
                {
                    "vera: A and B are frozen, and not trained: only d (r) and b"
                    " (d_out) are.": (each(lambda o, i: o + r) + lora),
                    "vera: A and B are frozen: that they are shared makes them one"
                    " pair, but they are not trained at all.": (
                        each(lambda o, i: o + r)
                        + r
                        * (max(o for _, o, _ in shapes) + max(i for *_, i in shapes))
                    ),
                    "vera: each layer has its own d and b; only A and B are shared.": (
                        sum(o + r for _, o, _ in set(shapes))
                    ),
                    "vera: you count d_in, but the vectors have d_out and r numbers.": (
                        each(lambda o, i: i + r)
                    ),
                    "vera: d has r numbers in every layer: you left it out.": each(
                        lambda o, i: o
                    ),
                },
            ),
            "denselora": (
                ends(set(shapes)) + r * r * len(shapes),
                {
                    "denselora: encoder and decoder are shared by the layers of a"
                    " kind: count them once.": (lora + r * r * len(shapes)),
                    "denselora: q, k, v … are kinds: two of them have pairs of their"
                    " own, though their shapes are the same.": (
                        sum(r * (o + i) for o, i in {shape[1:] for shape in shapes})
                        + r * r * len(shapes)
                    ),
                    "denselora: encoder and decoder are trained too, one pair for"
                    " each kind.": (r * r * len(shapes)),
                    "denselora: the r × r matrices are missing, one for each layer.": (
                        ends(set(shapes))
                    ),
                    "denselora: the r × r matrix is not shared: there is one for each"
                    " layer.": (ends(set(shapes)) + r * r * len(set(shapes))),
                },
            ),
        }
        for name, (right, wrong) in slips.items():
            if got[name] != right:
                message = next(
                    (text for text, value in wrong.items() if value == got[name]), None
                )
                need(
                    False,
                    message
                    or (
                        f"{name}: you have {got[name]:,}, and it is {right:,} for"
                        f" layers {shapes[:3]} … ({len(shapes)} of them), r = {r}."
                    ),
                )


@checks(
    "As near as any Kronecker product of these sizes can come to the target.",
    "T is (p q, m n): p rows of blocks, m blocks in each, and a block is (q, n). C is"
    " (p, m), D is (q, n).",
)
def nearest_kron(function) -> None:
    """function(T, p, m, q, n) -> (C, D) with the smallest ||T - C ⊗ D||"""
    for _ in range(3):
        p, m, q, n = random.sample(range(3, 8), 4)
        exact = torch.kron(double(p, m), double(q, n))
        T = exact + random.choice([0.0, 0.8]) * double(p * q, m * n)
        got = function(T.clone(), p, m, q, n)
        need(isinstance(got, tuple | list) and len(got) == 2, "Return the pair (C, D).")
        C, D = (torch.as_tensor(part).detach().double() for part in got)
        need(
            (C.shape, D.shape) != ((q, n), (p, m)),
            "The two are swapped: first C, one number for each block, then D, the"
            " block.",
        )
        need(
            C.shape == (p, m),
            f"C has the shape {tuple(C.shape)}, and should have (p, m) = {(p, m)}: one"
            " number for each block.",
        )
        need(
            D.shape == (q, n),
            f"D has the shape {tuple(D.shape)}, and should have (q, n) = {(q, n)}: it"
            " is a block.",
        )
        laid_out = T.reshape(p, q, m, n).transpose(1, 2).reshape(p * m, q * n)
        U, S, V = torch.linalg.svd(laid_out)
        fit = torch.outer(C.flatten(), D.flatten())
        away, best = (laid_out - fit).norm(), S[1:].norm()
        if away <= best + TOLERANCE * S[0]:
            continue

        def pair(at, size):
            return size * torch.outer(U[:, at], V[at])

        as_it_lies = torch.linalg.svd(T.reshape(p * m, q * n))
        mistakes = {
            "The size is missing: the singular value belongs to C, or to D, or its"
            " root to both.": pair(0, 1.0),
            "The singular value is in both: once is enough, or its root in each.": pair(
                0, S[0] ** 2
            ),
            "Only the root of the singular value is in: it is missing once more.": pair(
                0, S[0].sqrt()
            ),
            "You take the smallest singular value; the nearest product has the"
            " largest.": pair(len(S) - 1, S[-1]),
            "Your SVD is of T's numbers in the order in which they lie. Lay out each"
            " block as one row first: view(p, q, m, n), then swap q and m.": (
                as_it_lies[1][0] * torch.outer(as_it_lies[0][:, 0], as_it_lies[2][0])
            ),
            "Right up to its sign: the SVD's two vectors belong together.": -pair(
                0, S[0]
            ),
        }
        for message, wrong in mistakes.items():
            need((fit - wrong).norm() > TOLERANCE * S[0], message)
        need(
            False,
            f"Not the nearest: ‖T − C ⊗ D‖ is {away:.3f}, and it can be {best:.3f}."
            " Each block of C ⊗ D is a number times D: with the blocks laid out as"
            " rows you look for the nearest matrix of rank 1.",
        )
