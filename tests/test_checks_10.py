"""Chapter 10's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import pytest
import torch
from judging import accepts, rejects

from minipeft.course import check


def blank(*_):
    raise NotImplementedError


# --------------------------------------------------------------------- four_bit_product


def product(forward=None, backward=None):
    class MatMul4bit(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dequantize):
            ctx.dequantize = dequantize
            return forward(ctx, x, dequantize) if forward else x @ dequantize().T

        @staticmethod
        def backward(ctx, dy):
            return backward(ctx, dy) if backward else (dy @ ctx.dequantize(), None)

    return MatMul4bit


def keep(ctx, x, dequantize):
    W = dequantize()
    ctx.save_for_backward(W)
    return x @ W.T


def hide(ctx, x, dequantize):
    ctx.W = dequantize()
    return x @ ctx.W.T


def test_four_bit_product_solution():
    accepts(check.four_bit_product, product())
    accepts(
        check.four_bit_product,
        product(
            lambda ctx, x, dequantize: torch.einsum(
                "...i, oi -> ...o", x, dequantize()
            ),
            lambda ctx, dy: (
                torch.einsum("...o, oi -> ...i", dy, ctx.dequantize()),
                None,
            ),
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", product(blank)),
        (
            "keep the dense weight",
            product(keep, lambda ctx, dy: (dy @ ctx.saved_tensors[0], None)),
        ),
        (
            "should have been thrown away",
            product(hide, lambda ctx, dy: (dy @ ctx.W, None)),
        ),
        (
            "none is needed",
            product(
                lambda ctx, x, dequantize: (
                    ctx.save_for_backward(x),
                    x @ dequantize().T,
                )[1]
            ),
        ),
        (
            "would be that of W",
            product(
                backward=lambda ctx, dy: (dy.flatten(0, -2).T @ dy.flatten(0, -2), None)
            ),
        ),
        (
            "one gradient for each argument",
            product(backward=lambda ctx, dy: dy @ ctx.dequantize()),
        ),
        (
            "through* the rounding",
            product(backward=lambda ctx, dy: (dy @ ctx.dequantize() * 0, None)),
        ),
        (
            "Two shapes do not fit",
            product(backward=lambda ctx, dy: (dy @ ctx.dequantize().T, None)),
        ),
        ("x gets no gradient", product(backward=lambda ctx, dy: (None, None))),
        ("Two shapes do not fit", product(lambda ctx, x, dequantize: x @ dequantize())),
        (
            "sign turned round",
            product(backward=lambda ctx, dy: (-dy @ ctx.dequantize(), None)),
        ),
        ("the class itself", lambda x, dequantize: x @ dequantize().T),
        (
            "rounded or scaled",
            product(lambda ctx, x, dequantize: 2 * x @ dequantize().T),
        ),
    ],
)
def test_four_bit_product_mistakes(says, answer):
    rejects(says, check.four_bit_product, answer)


# ----------------------------------------------------------------- prepare_for_training


def prepare(
    freeze=True, cast=lambda name, p: p.dtype == torch.bfloat16, hook=True, back=True
):
    def function(model):
        for name, p in model.named_parameters():
            if freeze:
                p.requires_grad_(False)
            if cast(name, p):
                p.data = p.data.float()
        if hook:
            model.get_input_embeddings().register_forward_hook(
                lambda module, args, output: output.requires_grad_(True)
            )
        return model if back else None

    return function


def test_prepare_for_training_solution():
    accepts(check.prepare_for_training, prepare())

    def in_one_go(model):  # .float() leaves integers alone
        model.float().requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_()
        )
        return model

    accepts(check.prepare_for_training, in_one_go)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("lost under checkpointing", prepare(hook=False)),
        ("Not everything is frozen", prepare(freeze=False, hook=False)),
        (
            "norm is still in 16 bits",
            prepare(
                cast=lambda name, p: p.dtype == torch.bfloat16 and "norm" not in name
            ),
        ),
        ("embed.weight", prepare(cast=lambda name, p: "norm" in name)),
        ("In 64 bits", lambda model: prepare()(model.double())),
        (
            "Not everything is frozen",
            lambda model: (
                prepare(freeze=False, hook=False)(
                    model.requires_grad_(False)
                ).embed.requires_grad_()
                and model
            ),
        ),
        ("packed weight was cast", prepare(cast=lambda name, p: True)),
        ("Return the model", prepare(back=False)),
    ],
)
def test_prepare_for_training_mistakes(says, answer):
    rejects(says, check.prepare_for_training, answer)


# -------------------------------------------------------------------------- loftq_start


def loftq(
    scale=lambda s: 1 / s,
    what=lambda W, Q: W - Q,
    Q=lambda W, quantize: quantize(W),
    roots=True,
    values=True,
):
    def function(W, r, s, quantize):
        rounded = Q(W, quantize)
        U, S, V = torch.linalg.svd(what(W, rounded), full_matrices=False)
        S = S.sqrt() if roots else S
        S = S if values else torch.ones_like(S)
        return rounded, scale(s) * S[:r, None] * V[:r], U[:, :r] * S[:r]

    return function


def test_loftq_start_solution():
    accepts(check.loftq_start, loftq())

    # all of S and 1/s in one factor, by another function
    def lopsided(W, r, s, quantize):
        Q = quantize(W)
        U, S, V = torch.svd_lowrank(W - Q, q=min(W.shape), niter=8)
        return Q, V[:, :r].T, U[:, :r] * S[:r] / s

    accepts(check.loftq_start, lopsided)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("s times too large", loftq(scale=lambda s: 1)),
        ("s² times too large", loftq(scale=lambda s: s)),
        ("You have decomposed W", loftq(what=lambda W, Q: W)),
        ("sign is turned round", loftq(what=lambda W, Q: Q - W)),
        ("You have decomposed Q", loftq(what=lambda W, Q: Q)),
        ("Q is W itself", loftq(Q=lambda W, quantize: W)),
        ("a square root in each", loftq(scale=lambda s: 1, roots=False)),
        ("left the singular values out", loftq(scale=lambda s: 1, values=False)),
        (
            "a plain LoRA's start",
            lambda W, r, s, quantize: (
                quantize(W),
                torch.randn(r, W.shape[1]).to(W),
                torch.zeros(len(W), r).to(W),
            ),
        ),
        (
            "both zero",
            lambda W, r, s, quantize: (
                quantize(W),
                torch.zeros(r, W.shape[1]).to(W),
                torch.zeros(len(W), r).to(W),
            ),
        ),
        (
            "smallest singular values",
            lambda W, r, s, quantize: (
                lambda U, S, V: (quantize(W), S[-r:, None] * V[-r:] / s, U[:, -r:])
            )(*torch.linalg.svd(W - quantize(W), full_matrices=False)),
        ),
        (
            "only a second round",
            lambda W, r, s, quantize: (lambda Q, A, B: (quantize(W - s * B @ A), A, B))(
                *loftq(what=lambda W, Q: W)(W, r, s, quantize)
            ),
        ),
        ("three matrices", lambda W, r, s, quantize: quantize(W)),
        (
            "has the shape",
            lambda W, r, s, quantize: (
                quantize(W),
                torch.zeros(r, r),
                torch.zeros(r, r),
            ),
        ),
    ],
)
def test_loftq_start_mistakes(says, answer):
    rejects(says, check.loftq_start, answer)


# ----------------------------------------------------------------------- adam_8bit_step


def adam(
    correct=(True, True),
    early=False,
    root=True,
    old=False,
    sign=-1,
    keep=(True, True),
    swap=False,
    square=True,
    corrected=False,
):
    def function(p, g, m, v, step, lr, keep_m, keep_v):
        before = m, v
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * (g * g if square else g)
        used_m, used_v = before if old else (keep_m(m), keep_v(v)) if early else (m, v)
        c1, c2 = (1 - b**step if c else 1 for b, c in zip((0.9, 0.999), correct))
        divisor = used_v.abs() / c2
        p = p + sign * lr * (used_m / c1) / (
            (divisor.sqrt() if root else divisor) + 1e-8
        )
        if corrected:
            m, v = m / c1, v / c2
        keeps = (keep_v, keep_m) if swap else (keep_m, keep_v)
        return p, keeps[0](m) if keep[0] else m, keeps[1](v) if keep[1] else v

    return function


def linear(x, steps):
    return (x / x.abs().max() * steps).round() / steps * x.abs().max()


def test_adam_8bit_step_solution():
    accepts(check.adam_8bit_step, adam())

    def by_torch(p, g, m, v, step, lr, keep_m, keep_v):
        m, v = torch.lerp(m, g, 0.1), v.mul(0.999).addcmul(g, g, value=0.001)
        size = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        return (
            torch.addcdiv(
                p, m, v.sqrt() + 1e-8 * (1 - 0.999**step) ** 0.5, value=-size
            ),
            keep_m(m),
            keep_v(v),
        )

    accepts(check.adam_8bit_step, by_torch)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("Both bias corrections", adam(correct=(False, False))),
        ("correction of m is missing", adam(correct=(False, True))),
        ("correction of v is missing", adam(correct=(True, False))),
        ("before the update", adam(early=True)),
        ("square root of v", adam(root=False)),
        ("the old means", adam(old=True)),
        ("it is subtracted", adam(sign=1)),
        ("not g squared", adam(square=False)),
        ("m comes back in full precision", adam(keep=(False, True))),
        ("v comes back in full precision", adam(keep=(True, False))),
        ("m goes through keep_v", adam(swap=True)),
        ("the corrected one", adam(corrected=True)),
        (
            "equal steps of your own",
            lambda *given: adam()(*given[:-1], lambda v: linear(v, 255)),
        ),
        (
            "equal steps of your own",
            lambda *given: adam()(*given[:-2], lambda m: linear(m, 127), given[-1]),
        ),
        (
            "learning rate is missing",
            lambda p, g, m, v, step, lr, *keep: adam()(p, g, m, v, step, 1.0, *keep),
        ),
        ("wrong order", lambda *given: (lambda p, m, v: (p, v, m))(*adam()(*given))),
        (
            "the step alone",
            lambda p, *more: (lambda new, m, v: (p - new, m, v))(*adam()(p, *more)),
        ),
        (
            "there is no decay",
            lambda p, g, m, v, step, lr, *keep: (
                lambda new, m, v: (new - 0.01 * lr * p, m, v)
            )(*adam()(p, g, m, v, step, lr, *keep)),
        ),
        ("three tensors", lambda *given: given[0]),
    ],
)
def test_adam_8bit_step_mistakes(says, answer):
    rejects(says, check.adam_8bit_step, answer)


# ----------------------------------------------------------------------- training_bytes


def count(frozen, kept, trained, bits):
    return frozen * 4.127 / 8 + 2 * kept + trained * (8 + 2 * bits / 8)


def test_training_bytes_solution():
    accepts(check.training_bytes, count)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("in bits", lambda f, k, t, b: 8 * count(f, k, t, b)),
        (
            "bits, not bytes: divide",
            lambda f, k, t, b: f * 4.127 + 2 * k + t * (8 + b / 4),
        ),
        (
            "gradients of the trained",
            lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * (4 + b / 4),
        ),
        (
            "keeps two numbers",
            lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * (8 + b / 8),
        ),
        ("states are missing", lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * 8),
        (
            "frozen weights too",
            lambda f, k, t, b: f * 4.127 / 8 + 2 * k + (t + f) * (8 + b / 4) - 4 * f,
        ),
        ("not quantised", lambda f, k, t, b: (f + k) * 4.127 / 8 + t * (8 + b / 4)),
        (
            "4.127 bits a weight, not 4",
            lambda f, k, t, b: f / 2 + 2 * k + t * (8 + b / 4),
        ),
        (
            "bits for each of Adam's",
            lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * (8 + 2 * b),
        ),
        (
            "two bytes a number, not four",
            lambda f, k, t, b: f * 4.127 / 8 + 4 * k + t * (8 + b / 4),
        ),
        ("in gigabytes", lambda f, k, t, b: count(f, k, t, b) / 1e9),
        ("both have 32", lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * (6 + b / 4)),
        (
            "both are in 16 bits",
            lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * (2 + 2 + b / 4),
        ),
        ("four lines", lambda f, k, t, b: 17),
        ("is there a `return`", lambda f, k, t, b: None),
    ],
)
def test_training_bytes_mistakes(says, answer):
    rejects(says, check.training_bytes, answer)


# -------------------------------------------------------------------------- merge_error


def test_merge_error_solution():
    accepts(check.merge_error, lambda W, d, q: (q(W + d) - W - d).norm() / d.norm())
    accepts(
        check.merge_error,
        lambda W, d, q: float(((q(W + d) - q(W) - d) ** 2).sum() / (d**2).sum()) ** 0.5,
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("size of W", lambda W, d, q: (q(W + d) - W - d).norm() / W.norm()),
        (
            "size of the merged weight",
            lambda W, d, q: (q(W + d) - W - d).norm() / (W + d).norm(),
        ),
        ("the error itself", lambda W, d, q: (q(W + d) - W - d).norm()),
        (
            "how far the weight has moved",
            lambda W, d, q: (q(W + d) - W).norm() / d.norm(),
        ),
        ("delta alone", lambda W, d, q: (W + q(d) - W - d).norm() / d.norm()),
        (
            "That is the square",
            lambda W, d, q: ((q(W + d) - W - d).norm() / d.norm()) ** 2,
        ),
        ("upside down", lambda W, d, q: d.norm() / (q(W + d) - W - d).norm()),
        (
            "mean sizes",
            lambda W, d, q: (q(W + d) - W - d).abs().mean() / d.abs().mean(),
        ),
        (
            "largest entries",
            lambda W, d, q: (q(W + d) - W - d).abs().max() / d.abs().max(),
        ),
        ("Nothing has been rounded", lambda W, d, q: (W + d - W - d).norm() / d.norm()),
        ("is there a `return`", lambda W, d, q: None),
    ],
)
def test_merge_error_mistakes(says, answer):
    rejects(says, check.merge_error, answer)
