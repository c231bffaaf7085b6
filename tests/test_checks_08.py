"""Chapter 08's checks accept the solution, and name the mistake in what is plausibly
wrong."""

import pytest
import torch
from judging import accepts, rejects

from minipeft.course import check


def blank(*_):
    raise NotImplementedError


def test_loha_delta_solution():
    accepts(
        check.loha_delta,
        lambda B1, A1, B2, A2, alpha, r: alpha / r * (B1 @ A1) * (B2 @ A2),
    )
    accepts(
        check.loha_delta,
        lambda B1, A1, B2, A2, alpha, r: torch.einsum(
            "or,ri,os,si->oi", B1 * alpha / r, A1, B2, A2
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("α / r is missing", lambda B1, A1, B2, A2, alpha, r: (B1 @ A1) * (B2 @ A2)),
        ("α is missing", lambda B1, A1, B2, A2, alpha, r: (B1 @ A1) * (B2 @ A2) / r),
        (
            "forget to divide by r",
            lambda B1, A1, B2, A2, alpha, r: alpha * (B1 @ A1) * (B2 @ A2),
        ),
        (
            "You add the two products",
            lambda B1, A1, B2, A2, alpha, r: alpha / r * (B1 @ A1 + B2 @ A2),
        ),
        (
            "in both products",
            lambda B1, A1, B2, A2, alpha, r: (
                (alpha / r * B1 @ A1) * (alpha / r * B2 @ A2)
            ),
        ),
        ("crossed", lambda B1, A1, B2, A2, alpha, r: alpha / r * (B1 @ A2) * (B2 @ A1)),
        (
            "lost touch with B1 and A1",
            lambda B1, A1, B2, A2, alpha, r: (
                alpha / r * ((B1 @ A1) * (B2 @ A2)).detach()
            ),
        ),
        ("is there a `return`", lambda *_: None),
        (
            "entry by entry, and then",
            lambda B1, A1, B2, A2, alpha, r: alpha / r * (B1 * B2) @ (A1 * A2),
        ),
        (
            "as rsLoRA does",
            lambda B1, A1, B2, A2, alpha, r: alpha / r**0.5 * (B1 @ A1) * (B2 @ A2),
        ),
        ("that is a LoRA", lambda B1, A1, B2, A2, alpha, r: alpha / r * B1 @ A1),
        (
            "Two shapes do not fit",
            lambda B1, A1, B2, A2, alpha, r: alpha / r * (B1 @ A1) @ (B2 @ A2),
        ),
    ],
)
def test_loha_delta_mistakes(says, answer):
    rejects(says, check.loha_delta, answer)


def lokr(x, C, D):
    return (C @ x.view(len(x), C.shape[1], D.shape[1]) @ D.T).flatten(1)


def test_lokr_apply_solution():
    accepts(check.lokr_apply, lokr)
    accepts(
        check.lokr_apply,
        lambda x, C, D: torch.einsum(
            "pm,bmn,qn->bpq", C, x.view(len(x), C.shape[1], D.shape[1]), D
        ).flatten(1),
    )
    accepts(
        check.lokr_apply,
        lambda x, C, D: torch.stack(
            [(C @ one.view(C.shape[1], -1) @ D.T).flatten() for one in x]
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("factors are swapped", lambda x, C, D: x @ torch.kron(D, C).T),
        ("size of C ⊗ D", lambda x, C, D: x @ torch.kron(C, D).T),
        (
            "x column by column",
            lambda x, C, D: (
                C @ x.view(len(x), D.shape[1], C.shape[1]).mT @ D.T
            ).flatten(1),
        ),
        (
            "result column by column",
            lambda x, C, D: lokr(x, C, D).view(len(x), len(C), len(D)).mT.flatten(1),
        ),
        (
            "a matrix for each x",
            lambda x, C, D: lokr(x, C, D).view(len(x), len(C), len(D)),
        ),
        ("Two shapes do not fit", lambda x, C, D: C @ x @ D.T),
        (
            "Two shapes do not fit",
            lambda x, C, D: C @ x.view(len(x), C.shape[1], D.shape[1]) @ D,
        ),
        (
            "size of C ⊗ D",
            lambda x, C, D: (
                x
                @ (C[:, None, :, None] * D[None, :, None, :])
                .reshape(len(C) * len(D), -1)
                .T
            ),
        ),
        (
            "result column by column",
            lambda x, C, D: torch.einsum(
                "pm,bmn,qn->bqp", C, x.view(len(x), C.shape[1], D.shape[1]), D
            ).flatten(1),
        ),
    ],
)
def test_lokr_apply_mistakes(says, answer):
    rejects(says, check.lokr_apply, answer)


def vera(x, A, B, d, b):
    return b * ((d * (x @ A[:, : x.shape[1]].detach().T)) @ B[: len(b)].detach().T)


def test_vera_forward_solution():
    accepts(check.vera_forward, vera)
    accepts(
        check.vera_forward,
        lambda x, A, B, d, b: (
            x
            @ (
                b[:, None]
                * B.detach()[: len(b)]
                @ (d[:, None] * A.detach()[:, : x.shape[1]])
            ).T
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        (
            "A and B are trained too",
            lambda x, A, B, d, b: (
                b * ((d * (x @ A[:, : x.shape[1]].T)) @ B[: len(b)].T)
            ),
        ),
        ("d is missing", lambda x, A, B, d, b: vera(x, A, B, torch.ones_like(d), b)),
        ("b is missing", lambda x, A, B, d, b: vera(x, A, B, d, torch.ones_like(b))),
        (
            "A's last columns",
            lambda x, A, B, d, b: vera(x, A[:, -x.shape[1] :], B, d, b),
        ),
        ("B's last rows", lambda x, A, B, d, b: vera(x, A, B[-len(b) :], d, b)),
        ("no such scale", lambda x, A, B, d, b: vera(x, A, B, d, b) / len(d)),
        ("Two shapes do not fit", lambda x, A, B, d, b: b * ((d * (x @ A.T)) @ B.T)),
        (
            "lost touch with x and d and b",
            lambda x, A, B, d, b: vera(x, A, B, d, b).detach(),
        ),
        (
            "A and B are trained too",
            lambda x, A, B, d, b: (
                b * ((d * (x @ A[:, : x.shape[1]].detach().T)) @ B[: len(b)].T)
            ),
        ),
        ("d is applied twice", lambda x, A, B, d, b: vera(x, A, B, d * d, b)),
        ("no gradient reaches d", lambda x, A, B, d, b: vera(x, A, B, d.detach(), b)),
        (
            "b and d are added",
            lambda x, A, B, d, b: (
                b + (d + x @ A[:, : x.shape[1]].detach().T) @ B[: len(b)].detach().T
            ),
        ),
        ("Two shapes do not fit", lambda x, A, B, d, b: vera(x, A, B, b, d)),
    ],
)
def test_vera_forward_mistakes(says, answer):
    rejects(says, check.vera_forward, answer)


def numbers(shapes, r, **changed):
    def each(count):
        return sum(count(o, i) for _, o, i in shapes)

    return {
        "lora": each(lambda o, i: r * (o + i)),
        "loha": each(lambda o, i: 2 * r * (o + i)),
        "vera": each(lambda o, i: o + r),
        "denselora": sum(r * (o + i) for _, o, i in set(shapes)) + r * r * len(shapes),
    } | changed


def test_trainable_numbers_solution():
    accepts(check.trainable_numbers, numbers)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("twice a LoRA", lambda s, r: numbers(s, r, loha=numbers(s, r)["lora"])),
        (
            "frozen, and not trained",
            lambda s, r: numbers(
                s, r, vera=numbers(s, r)["vera"] + numbers(s, r)["lora"]
            ),
        ),
        (
            "count them once",
            lambda s, r: numbers(
                s, r, denselora=numbers(s, r)["lora"] + r * r * len(s)
            ),
        ),
        (
            "matrices are missing",
            lambda s, r: numbers(
                s, r, denselora=numbers(s, r)["denselora"] - r * r * len(s)
            ),
        ),
        (
            "you count d_in",
            lambda s, r: numbers(s, r, vera=sum(i + r for _, o, i in s)),
        ),
        (
            "is not shared",
            lambda s, r: numbers(
                s, r, denselora=numbers(s, r)["denselora"] - r * r * (len(s) - 4)
            ),
        ),
        ("a dictionary", lambda s, r: 5),
        ("no entry vera", lambda s, r: {"lora": 1, "loha": 2, "denselora": 3}),
        (
            "they are shared makes them",
            lambda s, r: numbers(
                s, r, vera=numbers(s, r)["vera"] + r * (64 + max(i for *_, i in s))
            ),
        ),
        (
            "each layer has its own d and b",
            lambda s, r: numbers(s, r, vera=sum(o + r for _, o, i in set(s))),
        ),
        ("trained too, one pair", lambda s, r: numbers(s, r, denselora=r * r * len(s))),
        ("rank is r²", lambda s, r: numbers(s, r, loha=numbers(s, r)["lora"] * r)),
        (
            "every layer has its own A and B",
            lambda s, r: numbers(s, r, lora=sum(r * (o + i) for _, o, i in set(s))),
        ),
        ("lora: you have", lambda s, r: numbers(s, r, lora=2 * numbers(s, r)["lora"])),
    ],
)
def test_trainable_numbers_mistakes(says, answer):
    rejects(says, check.trainable_numbers, answer)


def kron_factors(T, p, m, q, n, size=lambda s: (s, 1.0), at=0, swap=True):
    laid_out = (
        T.reshape(p, q, m, n).transpose(1, 2).reshape(p * m, q * n)
        if swap
        else T.reshape(p * m, q * n)
    )
    U, S, V = torch.linalg.svd(laid_out, full_matrices=False)
    one, two = size(S[at])
    return one * U[:, at].reshape(p, m), two * V[at].reshape(q, n)


def by_turns(T, p, m, q, n):
    blocks, D = (
        T.view(p, q, m, n),
        torch.ones(q, n, dtype=T.dtype) + torch.eye(q, n, dtype=T.dtype),
    )
    for _ in range(2000):
        C = torch.einsum("pqmn,qn->pm", blocks, D) / D.square().sum()
        D = torch.einsum("pqmn,pm->qn", blocks, C) / C.square().sum()
    return C, D


def test_nearest_kron_solution():
    accepts(check.nearest_kron, kron_factors)
    accepts(
        check.nearest_kron,
        lambda *a: kron_factors(*a, size=lambda s: (s.sqrt(), s.sqrt())),
    )
    accepts(check.nearest_kron, by_turns)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("size is missing", lambda *a: kron_factors(*a, size=lambda s: (1.0, 1.0))),
        ("in both", lambda *a: kron_factors(*a, size=lambda s: (s, s))),
        ("up to its sign", lambda *a: kron_factors(*a, size=lambda s: (-s, 1.0))),
        ("Only the root", lambda *a: kron_factors(*a, size=lambda s: (s.sqrt(), 1.0))),
        ("smallest singular value", lambda *a: kron_factors(*a, at=-1)),
        ("in the order in which they lie", lambda *a: kron_factors(*a, swap=False)),
        ("two are swapped", lambda *a: kron_factors(*a)[::-1]),
        (
            "one number for each block",
            lambda T, p, m, q, n: (torch.ones(p * m, dtype=T.dtype), T[:q, :n]),
        ),
        (
            "it is a block",
            lambda T, p, m, q, n: (torch.ones(p, m, dtype=T.dtype), T[:q, :n].T),
        ),
        (
            "Not the nearest",
            lambda T, p, m, q, n: (
                T.view(p, q, m, n).mean((1, 3)),
                T.view(p, q, m, n).mean((0, 2)),
            ),
        ),
        ("the pair", lambda *a: torch.kron(*kron_factors(*a))),
    ],
)
def test_nearest_kron_mistakes(says, answer):
    rejects(says, check.nearest_kron, answer)
