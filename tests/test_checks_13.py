"""Chapter 13's checks accept the solution, refuse the blank stub, and name the mistake
in what is plausibly wrong."""

import pytest
import torch
from judging import accepts, rejects
from torch.nn.functional import linear

from minipeft.course import check


def stub(*args):
    raise NotImplementedError


# ---------------------------------------------------------------------------- ia3_layer


def layer(x, W, b, l, ff):
    return (x * l) @ W.T + b if ff else (x @ W.T + b) * l


def test_layer_solution():
    accepts(check.ia3_layer, layer)
    accepts(
        check.ia3_layer,
        lambda x, W, b, l, ff: (
            linear(x, W * l, b) if ff else linear(x, W * l[:, None], b * l)
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "scale the output; it is the *input*",
            lambda x, W, b, l, ff: (x @ W.T + b) * (l.mean() if ff else l),
        ),
        (
            "The bias is not scaled",
            lambda x, W, b, l, ff: (x * l) @ W.T + b if ff else (x @ W.T) * l + b,
        ),
        (
            "scaled twice",
            lambda x, W, b, l, ff: (x * l) @ W.T + b if ff else (x @ W.T + b * l) * l,
        ),
        (
            "the factor itself",
            lambda x, W, b, l, ff: (
                (x * (1 + l)) @ W.T + b if ff else (x @ W.T + b) * (1 + l)
            ),
        ),
        ("b is missing", lambda x, W, b, l, ff: (x * l) @ W.T if ff else (x @ W.T) * l),
        ("did nothing", lambda x, W, b, l, ff: x @ W.T + b),
        (
            "You divide",
            lambda x, W, b, l, ff: (x / l) @ W.T + b if ff else (x @ W.T + b) / l,
        ),
        ("Adding is BitFit", lambda x, W, b, l, ff: x @ W.T + b + l),
        (
            "You add l to the input",
            lambda x, W, b, l, ff: (x + l) @ W.T + b if ff else layer(x, W, b, l, ff),
        ),
        ("lost touch", lambda x, W, b, l, ff: layer(x, W, b, l.detach(), ff)),
        (
            "the columns of W, not both",
            lambda x, W, b, l, ff: (
                (x * l) @ (W * l).T + b if ff else layer(x, W, b, l, ff)
            ),
        ),
        (
            "the rows of W, not both",
            lambda x, W, b, l, ff: layer(x, W, b, l, ff) * (1 if ff else l),
        ),
        ("Two shapes do not fit", lambda x, W, b, l, ff: (x @ W.T + b) * l),
        (
            "d_in for an input",
            lambda x, W, b, l, ff: (x @ W.T + b) * l if ff else (x * l) @ W.T + b,
        ),
        ("is there a `return`", lambda x, W, b, l, ff: None),
        ("nothing here yet", stub),
    ],
)
def test_layer_mistakes(says, answer):
    rejects(says, check.ia3_layer, answer)


# ----------------------------------------------------------------------------- fold_ia3


def fold(W, b, l, ff):
    return (W * l, b) if ff else (W * l[:, None], b * l)


def test_fold_solution():
    accepts(check.fold_ia3, fold)
    accepts(
        check.fold_ia3,
        lambda W, b, l, ff: (
            [W @ torch.diag(l), b] if ff else [torch.diag(l) @ W, torch.diag(l) @ b]
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("bias is left as it was", lambda W, b, l, ff: (fold(W, b, l, ff)[0], b)),
        ("W is as it was", lambda W, b, l, ff: (W, b)),
        (
            "that is unmerging",
            lambda W, b, l, ff: (W / l, b) if ff else (W / l[:, None], b / l),
        ),
        (
            "You add l",
            lambda W, b, l, ff: (W + l, b) if ff else (W + l[:, None], b * l),
        ),
        (
            "divide the bias",
            lambda W, b, l, ff: (W * l, b) if ff else (W * l[:, None], b / l),
        ),
        ("Two shapes do not fit", lambda W, b, l, ff: (W * l, b)),
        (
            "stays as it was where the input is scaled",
            lambda W, b, l, ff: (W * l, b * 2) if ff else fold(W, b, l, ff),
        ),
        ("Give me two tensors", lambda W, b, l, ff: fold(W, b, l, ff)[0]),
        ("The bias is lost", lambda W, b, l, ff: (fold(W, b, l, ff)[0], None)),
        ("first the weight", lambda W, b, l, ff: fold(W, b, l, ff)[::-1]),
        ("You multiply by 1 + l", lambda W, b, l, ff: fold(W, b, 1 + l, ff)),
        (
            "is transposed",
            lambda W, b, l, ff: (fold(W, b, l, ff)[0].T, fold(W, b, l, ff)[1]),
        ),
        ("in place", lambda W, b, l, ff: (W.mul_(l if ff else l[:, None]), b)),
        ("nothing here yet", stub),
    ],
)
def test_fold_mistakes(says, answer):
    rejects(says, check.fold_ia3, answer)


# -------------------------------------------------------------------------- find_scales


def find(W, new):
    l = (W * new).sum(1) / W.square().sum(1)
    return l if torch.allclose(l[:, None] * W, new) else None


def test_find_solution():
    accepts(check.find_scales, find)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("None is the answer", lambda W, new: (W * new).sum(1) / W.square().sum(1)),
        ("None is the answer", lambda W, new: new[:, 0] / W[:, 0]),
        (
            "stay zero",  # 0 / 0 at a zero entry
            lambda W, new: (
                l
                if torch.allclose(W * (l := (new / W).mean(1))[:, None], new)
                else None
            ),
        ),
        ("you say that there is no l", lambda W, new: None),
        (
            "Upside down",
            lambda W, new: None if find(W, new) is None else 1 / find(W, new),
        ),
        (
            "sign is lost",
            lambda W, new: (
                None if find(W, new) is None else new.norm(dim=1) / W.norm(dim=1)
            ),
        ),
        (
            "starts at one",
            lambda W, new: None if find(W, new) is None else find(W, new) - 1,
        ),
        (
            "scaled by zero",
            lambda W, new: find(W, new) if (new.abs().sum(1) > 0).all() else None,
        ),
        (
            "one factor for each *row*",
            lambda W, new: (
                l
                if torch.allclose((l := (W * new).sum() / W.square().sum()) * W, new)
                else None
            ),
        ),
        (
            "some are negative",
            lambda W, new: (
                l
                if torch.allclose(
                    (l := new.norm(dim=1) / W.norm(dim=1))[:, None] * W, new
                )
                else None
            ),
        ),
        (
            "up to rounding",
            lambda W, new: (
                l
                if torch.equal(
                    (l := (W * new).sum(1) / W.square().sum(1))[:, None] * W, new
                )
                else None
            ),
        ),
        (
            "the whole diagonal matrix",
            lambda W, new: None if find(W, new) is None else torch.diag(find(W, new)),
        ),
        (
            "should be a tensor",
            lambda W, new: None if find(W, new) is None else find(W, new).tolist(),
        ),
        ("nothing here yet", stub),
    ],
)
def test_find_mistakes(says, answer):
    rejects(says, check.find_scales, answer)


# ------------------------------------------------------------------------ bias_gradient


def test_gradient_solution():
    accepts(check.bias_gradient, lambda g, x: g.sum((0, 1)))
    accepts(
        check.bias_gradient,
        lambda g, x: sum(g[i, t] for i in range(len(g)) for t in range(g.shape[1])),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("mean over the tokens", lambda g, x: g.mean((0, 1))),
        ("rows only", lambda g, x: g.sum(0)),
        ("tokens only", lambda g, x: g.sum(1)),
        ("over everything", lambda g, x: g.sum()),
        ("over the outputs", lambda g, x: g.sum(-1)),
        ("does not contain x", lambda g, x: torch.einsum("bto,bti->oi", g, x)),
        ("sign is wrong", lambda g, x: -g.sum((0, 1))),
        ("signs must cancel", lambda g, x: g.abs().sum((0, 1))),
        ("what Adam keeps", lambda g, x: g.square().sum((0, 1))),
        ("last token only", lambda g, x: g[:, -1].sum(0)),
        ("the mean over the rows", lambda g, x: g.mean(0).sum(0)),
        ("the mean over the tokens: sum over both", lambda g, x: g.sum(0).mean(0)),
        ("of size 1 are left", lambda g, x: g.sum((0, 1), keepdim=True)),
        (
            "a bias never sees it",
            lambda g, x: (g.sum(-1, keepdim=True) * x).sum((0, 1)),
        ),
        ("is there a `return`", lambda g, x: None),
        ("nothing here yet", stub),
    ],
)
def test_gradient_mistakes(says, answer):
    rejects(says, check.bias_gradient, answer)


# ---------------------------------------------------------------------------- count_ia3


def test_count_solution():
    accepts(check.count_ia3, lambda L, H, K, h, w: L * (2 * K * h + w))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("kv_heads · head_dim", lambda L, H, K, h, w: L * (2 * H * h + w)),
        ("one layer", lambda L, H, K, h, w: 2 * K * h + w),
        ("keys or values", lambda L, H, K, h, w: L * (K * h + w)),
        ("vector is missing", lambda L, H, K, h, w: L * 2 * K * h),
        ("not the model's width", lambda L, H, K, h, w: L * (2 * K * h + H * h)),
        ("queries are not scaled", lambda L, H, K, h, w: L * (2 * K * h + H * h + w)),
        ("one vector, at the second", lambda L, H, K, h, w: L * (2 * K * h + 2 * w)),
        ("one head", lambda L, H, K, h, w: L * (2 * h + w)),
        ("one number for each head", lambda L, H, K, h, w: L * (2 * K + w)),
        ("as narrow as the keys", lambda L, H, K, h, w: L * (K * h + H * h + w)),
        (
            "how many queries share a key",
            lambda L, H, K, h, w: L * (2 * (H // K) * h + w),
        ),
        ("you count three", lambda L, H, K, h, w: L * (3 * K * h + w)),
        (
            "You count the matrices",
            lambda L, H, K, h, w: L * (2 * K * h * H * h + H * h * w),
        ),
        ("I count", lambda L, H, K, h, w: 5),
        ("is there a `return`", lambda L, H, K, h, w: None),
        ("nothing here yet", stub),
    ],
)
def test_count_mistakes(says, answer):
    rejects(says, check.count_ia3, answer)
