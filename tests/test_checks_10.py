"""Chapter 10's checks accept the solution, refuse the blank stub kindly, and name the mistake in what is plausibly wrong."""
import pytest
import torch

from judging import accepts, rejects
from minipeft.course import check


def blank(*_):
    raise NotImplementedError


# -------------------------------------------------------------------------------------------------- four_bit_product

def product(forward=None, backward=None):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dequantize):
            ctx.dequantize = dequantize
            return forward(ctx, x, dequantize) if forward else x @ dequantize().T

        @staticmethod
        def backward(ctx, dy):
            return backward(ctx, dy) if backward else (dy @ ctx.dequantize(), None)
    return Product


def keep(ctx, x, dequantize):
    W = dequantize()
    ctx.save_for_backward(W)
    return x @ W.T


def hide(ctx, x, dequantize):
    ctx.W = dequantize()
    return x @ ctx.W.T


def test_four_bit_product_solution():
    accepts(check.four_bit_product, product())


@pytest.mark.parametrize("says, answer", [
    ("nothing here yet", product(blank)),
    ("keep the dense weight", product(keep, lambda ctx, dy: (dy @ ctx.saved_tensors[0], None))),
    ("should have been thrown away", product(hide, lambda ctx, dy: (dy @ ctx.W, None))),
    ("through* the rounding", product(backward=lambda ctx, dy: (dy @ ctx.dequantize() * 0, None))),
    ("Two shapes do not fit", product(backward=lambda ctx, dy: (dy @ ctx.dequantize().T, None))),
    ("x gets no gradient", product(backward=lambda ctx, dy: (None, None))),
    ("Two shapes do not fit", product(lambda ctx, x, dequantize: x @ dequantize())),
    ("sign turned round", product(backward=lambda ctx, dy: (-dy @ ctx.dequantize(), None))),
    ("the class itself", lambda x, dequantize: x @ dequantize().T),
    ("rounded or scaled", product(lambda ctx, x, dequantize: 2 * x @ dequantize().T)),
])
def test_four_bit_product_mistakes(says, answer):
    rejects(says, check.four_bit_product, answer)


# ---------------------------------------------------------------------------------------------- prepare_for_training

def prepare(freeze=True, cast=lambda name, p: p.dtype == torch.bfloat16, hook=True, back=True):
    def function(model):
        for name, p in model.named_parameters():
            if freeze:
                p.requires_grad_(False)
            if cast(name, p):
                p.data = p.data.float()
        if hook:
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        return model if back else None
    return function


def test_prepare_for_training_solution():
    accepts(check.prepare_for_training, prepare())


@pytest.mark.parametrize("says, answer", [
    ("nothing here yet", blank),
    ("lost under checkpointing", prepare(hook=False)),
    ("Not everything is frozen", prepare(freeze=False, hook=False)),
    ("norm is still in 16 bits", prepare(cast=lambda name, p: p.dtype == torch.bfloat16 and "norm" not in name)),
    ("embed.weight", prepare(cast=lambda name, p: "norm" in name)),
    ("packed weight was cast", prepare(cast=lambda name, p: True)),
    ("Return the model", prepare(back=False)),
])
def test_prepare_for_training_mistakes(says, answer):
    rejects(says, check.prepare_for_training, answer)


# ------------------------------------------------------------------------------------------------------- loftq_start

def loftq(scale=lambda s: 1 / s, what=lambda W, Q: W - Q, Q=lambda W, quantize: quantize(W), roots=True, values=True):
    def function(W, r, s, quantize):
        rounded = Q(W, quantize)
        U, S, V = torch.linalg.svd(what(W, rounded), full_matrices=False)
        S = S.sqrt() if roots else S
        S = S if values else torch.ones_like(S)
        return rounded, scale(s) * S[:r, None] * V[:r], U[:, :r] * S[:r]
    return function


def test_loftq_start_solution():
    accepts(check.loftq_start, loftq())


@pytest.mark.parametrize("says, answer", [
    ("nothing here yet", blank),
    ("s times too large", loftq(scale=lambda s: 1)),
    ("s² times too large", loftq(scale=lambda s: s)),
    ("You have decomposed W", loftq(what=lambda W, Q: W)),
    ("sign is turned round", loftq(what=lambda W, Q: Q - W)),
    ("You have decomposed Q", loftq(what=lambda W, Q: Q)),
    ("Q is W itself", loftq(Q=lambda W, quantize: W)),
    ("a square root in each", loftq(scale=lambda s: 1, roots=False)),
    ("left the singular values out", loftq(scale=lambda s: 1, values=False)),
    ("three matrices", lambda W, r, s, quantize: quantize(W)),
    ("has the shape", lambda W, r, s, quantize: (quantize(W), torch.zeros(r, r), torch.zeros(r, r))),
])
def test_loftq_start_mistakes(says, answer):
    rejects(says, check.loftq_start, answer)


# ---------------------------------------------------------------------------------------------------- adam_8bit_step

def adam(correct=(True, True), early=False, root=True, old=False, sign=-1, keep=(True, True), swap=False, square=True,
         corrected=False):
    def function(p, g, m, v, step, lr, keep_m, keep_v):
        before = m, v
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * (g * g if square else g)
        used_m, used_v = before if old else (keep_m(m), keep_v(v)) if early else (m, v)
        c1, c2 = (1 - b ** step if c else 1 for b, c in zip((0.9, 0.999), correct))
        divisor = used_v.abs() / c2
        p = p + sign * lr * (used_m / c1) / ((divisor.sqrt() if root else divisor) + 1e-8)
        if corrected:
            m, v = m / c1, v / c2
        keeps = (keep_v, keep_m) if swap else (keep_m, keep_v)
        return p, keeps[0](m) if keep[0] else m, keeps[1](v) if keep[1] else v
    return function


def test_adam_8bit_step_solution():
    accepts(check.adam_8bit_step, adam())


@pytest.mark.parametrize("says, answer", [
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
    ("three tensors", lambda *given: given[0]),
])
def test_adam_8bit_step_mistakes(says, answer):
    rejects(says, check.adam_8bit_step, answer)


# ---------------------------------------------------------------------------------------------------- training_bytes

def count(frozen, kept, trained, bits):
    return frozen * 4.127 / 8 + 2 * kept + trained * (8 + 2 * bits / 8)


def test_training_bytes_solution():
    accepts(check.training_bytes, count)


@pytest.mark.parametrize("says, answer", [
    ("nothing here yet", blank),
    ("in bits", lambda f, k, t, b: 8 * count(f, k, t, b)),
    ("bits, not bytes: divide", lambda f, k, t, b: f * 4.127 + 2 * k + t * (8 + b / 4)),
    ("gradients of the trained", lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * (4 + b / 4)),
    ("keeps two numbers", lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * (8 + b / 8)),
    ("states are missing", lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * 8),
    ("frozen weights too", lambda f, k, t, b: f * 4.127 / 8 + 2 * k + (t + f) * (8 + b / 4) - 4 * f),
    ("not quantised", lambda f, k, t, b: (f + k) * 4.127 / 8 + t * (8 + b / 4)),
    ("4.127 bits a weight, not 4", lambda f, k, t, b: f / 2 + 2 * k + t * (8 + b / 4)),
    ("bits for each of Adam's", lambda f, k, t, b: f * 4.127 / 8 + 2 * k + t * (8 + 2 * b)),
    ("two bytes a number, not four", lambda f, k, t, b: f * 4.127 / 8 + 4 * k + t * (8 + b / 4)),
    ("four lines", lambda f, k, t, b: 17),
    ("is there a `return`", lambda f, k, t, b: None),
])
def test_training_bytes_mistakes(says, answer):
    rejects(says, check.training_bytes, answer)


# ------------------------------------------------------------------------------------------------------- merge_error

def test_merge_error_solution():
    accepts(check.merge_error, lambda W, d, q: (q(W + d) - W - d).norm() / d.norm())


@pytest.mark.parametrize("says, answer", [
    ("nothing here yet", blank),
    ("size of W", lambda W, d, q: (q(W + d) - W - d).norm() / W.norm()),
    ("size of the merged weight", lambda W, d, q: (q(W + d) - W - d).norm() / (W + d).norm()),
    ("the error itself", lambda W, d, q: (q(W + d) - W - d).norm()),
    ("how far the weight has moved", lambda W, d, q: (q(W + d) - W).norm() / d.norm()),
    ("delta alone", lambda W, d, q: (W + q(d) - W - d).norm() / d.norm()),
    ("That is the square", lambda W, d, q: ((q(W + d) - W - d).norm() / d.norm()) ** 2),
    ("Nothing has been rounded", lambda W, d, q: (W + d - W - d).norm() / d.norm()),
    ("is there a `return`", lambda W, d, q: None),
])
def test_merge_error_mistakes(says, answer):
    rejects(says, check.merge_error, answer)
