"""Chapter 03's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import pytest
import torch
from judging import accepts, judge, rejects

from minipeft.course import check

# -------------------------------------------------------------------- subspace_gradient


def test_subspace_gradient_solution():
    accepts(check.subspace_gradient, lambda P, g: P.T @ g)
    accepts(check.subspace_gradient, lambda P, g: g @ P)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("θ_d has only d", lambda P, g: P @ (P.T @ g)),
        ("least squares", lambda P, g: torch.linalg.pinv(P) @ g),
        ("sign is wrong", lambda P, g: -P.T @ g),
        ("mean over the D parameters", lambda P, g: (P * g[:, None]).mean(0)),
        ("mean over the d columns", lambda P, g: P.T @ g / P.shape[1]),
        ("lengths of P's columns", lambda P, g: (P / P.norm(dim=0)).T @ g),
        ("Two shapes do not fit", lambda P, g: P @ g),
        ("is there a `return`", lambda P, g: None),
        ("the shape", lambda P, g: (P.T @ g).sum()),
        ("the shape", lambda P, g: P.T @ g[:, None]),
    ],
)
def test_subspace_gradient_mistakes(says, answer):
    rejects(says, check.subspace_gradient, answer)


# ------------------------------------------------------------------------ fast_hadamard


def fast(x, last=None, scale=1.0):
    h = 1
    while h < (last or len(x)):
        a, b = x.view(-1, 2, h).unbind(1)
        x = torch.stack([a + b, a - b], 1).flatten()
        h *= 2
    return x * scale


def recursive(x):
    if len(x) == 1:
        return x
    a, b = x.chunk(2)
    return torch.cat([recursive(a + b), recursive(a - b)])


def dense(x):
    H = torch.ones(1, 1, dtype=x.dtype)
    while len(H) < len(x):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H @ x


def two_calls(x):
    """Another right way: transform the halves, then add and subtract."""
    if len(x) == 1:
        return x
    a, b = (two_calls(half) for half in x.chunk(2))
    return torch.cat([a + b, a - b])


def four_calls(x):
    if len(x) == 1:
        return x
    a, b = x.chunk(2)
    return torch.cat([four_calls(a) + four_calls(b), four_calls(a) - four_calls(b)])


def difference_first(x):
    h = 1
    while h < len(x):
        a, b = x.view(-1, 2, h).unbind(1)
        x = torch.stack([a - b, a + b], 1).flatten()
        h *= 2
    return x


def neighbours_only(x):
    a, b = x.view(-1, 2).unbind(1)
    return torch.stack([a + b, a - b], 1).flatten()


def in_place(x):
    x.copy_(fast(x))
    return x


def test_fast_hadamard_solutions():
    accepts(check.fast_hadamard, fast)
    accepts(check.fast_hadamard, recursive)
    accepts(check.fast_hadamard, two_calls)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("divide by √n", lambda x: fast(x) / len(x) ** 0.5),
        ("the way back", lambda x: fast(x) / len(x)),
        ("build a matrix", dense),
        ("not fast", four_calls),
        ("in place", in_place),
        ("is there a `return`", lambda x: None),
        ("fit", lambda x: torch.ones(3, 3) @ x),
    ],
)
def test_fast_hadamard_mistakes(says, answer):
    rejects(says, check.fast_hadamard, answer)


@pytest.mark.parametrize(
    "answer", [difference_first, neighbours_only, lambda x: fast(x, len(x) // 2)]
)
def test_fast_hadamard_slips(answer):
    """With two numbers some of them look alike: what counts is that each is refused
    with a word on the stages."""
    for verdict in judge(check.fast_hadamard, answer):
        assert not verdict
        assert any(word in verdict.message for word in ("stage", "difference first")), (
            verdict.message
        )


# ------------------------------------------------------------------------- hash_project


def count(index):
    return torch.bincount(index).float()


def test_hash_project_solution():
    accepts(
        check.hash_project,
        lambda theta, index, sign: theta[index] * sign / count(index).sqrt()[index],
    )
    accepts(
        check.hash_project,
        lambda theta, index, sign: (
            theta[index] * sign / torch.bincount(index).sqrt()[index]
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("length √c", lambda theta, index, sign: theta[index] * sign),
        (
            "square root of that",
            lambda theta, index, sign: theta[index] * sign / count(index)[index],
        ),
        (
            "signs are missing",
            lambda theta, index, sign: theta[index] / count(index).sqrt()[index],
        ),
        (
            "only on average",
            lambda theta, index, sign: (
                theta[index] * sign * (len(theta) / len(index)) ** 0.5
            ),
        ),
        (
            "divide by √d",
            lambda theta, index, sign: theta[index] * sign / len(theta) ** 0.5,
        ),
        (
            "divide by √D",
            lambda theta, index, sign: theta[index] * sign / len(index) ** 0.5,
        ),
        (
            "the way back",
            lambda theta, index, sign: torch.zeros(len(theta)).index_add(
                0, index, sign
            ),
        ),
        (
            "lost touch",
            lambda theta, index, sign: (
                theta.detach()[index] * sign / count(index).sqrt()[index]
            ),
        ),
        ("is there a `return`", lambda theta, index, sign: None),
    ],
)
def test_hash_project_mistakes(says, answer):
    rejects(says, check.hash_project, answer)


# ---------------------------------------------------------------------- structure_aware


def said(flat, lambdas, shapes, change=lambda factor, part: factor * part):
    parts = flat.split([torch.Size(shape).numel() for shape in shapes])
    return [
        change(factor, part.view(shape))
        for factor, part, shape in zip(lambdas, parts, shapes)
    ]


def test_structure_aware_solution():
    accepts(check.structure_aware, said)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("λ is missing", lambda f, l, s: said(f, l, s, lambda factor, part: part)),
        ("add λ", lambda f, l, s: said(f, l, s, lambda factor, part: factor + part)),
        ("sum of all λ", lambda f, l, s: said(f, [l.sum()] * 3, s)),
        ("first λ", lambda f, l, s: said(f, [l[0]] * 3, s)),
        ("1 + λ", lambda f, l, s: said(f, 1 + l, s)),
        ("parts are flat", lambda f, l, s: [part.flatten() for part in said(f, l, s)]),
        (
            "beginning of the random vector",
            lambda f, l, s: [
                a * f[: torch.Size(b).numel()].view(b) for a, b in zip(l, s)
            ],
        ),
        ("from the end", lambda f, l, s: said(f, l.flip(0), s[::-1])[::-1]),
        ("lost touch", lambda f, l, s: said(f, l.detach(), s)),
        ("you give 1 tensors", lambda f, l, s: [f]),
        ("is there a `return`", lambda f, l, s: None),
    ],
)
def test_structure_aware_mistakes(says, answer):
    rejects(says, check.structure_aware, answer)


# ---------------------------------------------------------------------------------- d90


def right(losses, start, full):
    return min(
        (d for d, loss in losses.items() if start - loss >= 0.9 * (start - full)),
        default=None,
    )


def test_d90_solution():
    accepts(check.d90, right)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "order of the dictionary",
            lambda losses, start, full: next(
                d for d in losses if start - losses[d] >= 0.9 * (start - full)
            ),
        ),
        (
            "largest d",
            lambda losses, start, full: max(
                d for d in losses if start - losses[d] >= 0.9 * (start - full)
            ),
        ),
        (
            "compare the losses themselves",
            lambda losses, start, full: min(
                d for d in losses if full / losses[d] >= 0.9
            ),
        ),
        (
            "not start?",
            lambda losses, start, full: min(
                (d for d in losses if losses[d] <= 0.1 * start), default=None
            ),
        ),
        (
            "give the dimension",
            lambda losses, start, full: losses[right(losses, start, full)],
        ),
        (
            "10 % of the gain",
            lambda losses, start, full: min(
                d for d in losses if start - losses[d] >= 0.1 * (start - full)
            ),
        ),
        (
            "Curves are noisy",
            lambda losses, start, full: (
                512 if losses.get(128) == 1.4 else right(losses, start, full)
            ),
        ),
        (
            "give None",
            lambda losses, start, full: right(losses, start, full) or max(losses),
        ),
        ("not start?", lambda losses, start, full: None),
    ],
)
def test_d90_mistakes(says, answer):
    rejects(says, check.d90, answer)


def blank(*answers):
    raise NotImplementedError


@pytest.mark.parametrize(
    "name",
    ["subspace_gradient", "fast_hadamard", "hash_project", "structure_aware", "d90"],
)
def test_a_blank_stub_is_refused_kindly(name):
    rejects("There is nothing here yet", getattr(check, name), blank)
