"""Chapter 10, QLoRA: a product with a packed weight, preparation, LoftQ, Adam in 8
bits, the ledger, merging."""

import random

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "adam_8bit_step",
    "four_bit_product",
    "loftq_start",
    "merge_error",
    "prepare_for_training",
    "training_bytes",
]


@checks(
    "x Wᵀ forward, dy W backward, and the dense weight is made anew instead of kept."
    " This is the heart of QLoRA.",
    "The weight is (d_out, d_in): y = x @ W.T is (…, d_out), and dx = dy @ W is (…,"
    " d_in).",
)
def four_bit_product(function_class) -> None:
    """function_class: a torch.autograd.Function; apply(x, dequantize) -> y.
    dequantize() gives the dense W (d_out, d_in)."""
    need(
        isinstance(function_class, type)
        and issubclass(function_class, torch.autograd.Function),
        "Give me the class itself, a subclass of torch.autograd.Function with two"
        " static methods, forward and backward.",
    )
    for _ in range(2):
        d_in, d_out, calls = random.randint(5, 9), random.randint(10, 14), []
        W = torch.randn(d_out, d_in)

        def dequantize():
            calls.append(1)
            return W.clone()

        x = torch.randn(3, 4, d_in, requires_grad=True)
        dy = torch.randn(3, 4, d_out)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t) or t, lambda t: t
        ):
            y = function_class.apply(x, dequantize)
        need(y is not None, "forward returns None: is there a `return`?")
        compare(
            y.detach(),
            (x @ W.T).detach(),
            {
                "Your output is rounded or scaled once more: dequantize() gives the"
                " weight as it is meant.": (2 * (x @ W.T).detach())
            },
            "Your output",
        )
        need(
            y.requires_grad,
            "Your output has lost touch with x: nothing below this layer could learn.",
        )
        need(
            not any(t.shape in (W.shape, W.T.shape) for t in kept),
            "You keep the dense weight for the backward pass (save_for_backward): then"
            " nothing is saved, for all layers keep theirs at the same time. Keep the"
            " *function*, ctx.dequantize = dequantize, and call it again.",
        )
        need(
            not kept,
            "You keep a tensor for the backward pass (x, perhaps), and none is needed:"
            " dx = dy W asks for dy, which comes by itself, and for W, which is made"
            " again. x would be wanted for the gradient of W; W has none.",
        )
        forward_calls = len(calls)
        try:
            y.backward(dy)
        except RuntimeError as error:
            need(
                "invalid gradient" not in str(error),
                "The gradient of x has another shape than x. It is dy W; dyᵀ x would be"
                " that of W, which is not wanted.",
            )
            need(
                "number of gradients" not in str(error),
                "backward returns one gradient for each argument of forward: that of x,"
                " and None for the function.",
            )
            raise
        need(
            x.grad is not None,
            "x gets no gradient: backward has to return one for each argument of"
            " forward, that of x first, and None for the function.",
        )
        need(
            len(calls) > forward_calls,
            "The dense weight of the forward pass is still there in the backward pass"
            " (on ctx?): it should have been thrown away and made again by"
            " dequantize().",
        )
        compare(
            x.grad,
            dy @ W,
            {
                "The gradient of x is all zero. Rounding has no gradient, but this is"
                " not the gradient *through* the rounding: W is a constant here, and"
                " dx = dy W.": torch.zeros_like(x),
                "Your gradient has the sign turned round.": -(dy @ W),
                "You return x's own values, or dy's, as the gradient: it is dy W.": (
                    x.detach()
                ),
            },
            "The gradient of x",
        )


class Tiny(nn.Module):
    """Embedding and norms in 16 bits, one packed weight, checkpointed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(6, dtype=torch.bfloat16)
        self.packed = nn.Parameter(
            torch.randint(0, 255, (18, 1), dtype=torch.uint8), requires_grad=False
        )
        self.head = nn.Linear(6, 11, dtype=torch.bfloat16)

    def get_input_embeddings(self):
        return self.embed

    def enable_input_require_grads(self):
        self.embed.register_forward_hook(lambda _, given, out: out.requires_grad_(True))

    def forward(self, ids, adapter):
        def block(x):
            return x + adapter(self.norm(x.to(self.norm.weight.dtype)).float()).to(
                x.dtype
            )

        x = checkpoint(block, self.embed(ids), use_reentrant=True)
        return self.head(x.to(self.head.weight.dtype))


@checks(
    "Frozen, norms and embeddings in 32 bits, packed bytes untouched, and gradients"
    " arrive under checkpointing."
)
def prepare_for_training(function) -> None:
    """function(model) -> the model. Changed in place or not, as you like."""
    import warnings

    model = Tiny()
    bytes_before = model.packed.detach().clone()
    result = function(model)
    need(result is not None, "Return the model at the end.")
    need(
        isinstance(result, nn.Module),
        f"Return the model; yours is a {type(result).__name__}.",
    )
    need(
        result.packed.dtype == torch.uint8 and torch.equal(result.packed, bytes_before),
        "The packed weight was cast too: its bytes are codes, not numbers. Cast only"
        " what is float16 or bfloat16.",
    )
    loose = [name for name, p in result.named_parameters() if p.requires_grad]
    need(
        not loose,
        f"Not everything is frozen: {', '.join(loose)} would be trained, and gets a"
        " gradient and optimizer states.",
    )
    wide = [name for name, p in result.named_parameters() if p.dtype == torch.float64]
    need(
        not wide,
        f"In 64 bits: {', '.join(wide)}. 32 are enough: float(), not double().",
    )
    short = [
        name
        for name, p in result.named_parameters()
        if p.dtype in (torch.bfloat16, torch.float16)
    ]
    need(
        not any("norm" in name for name in short),
        "The norm is still in 16 bits: what is not quantised goes to 32.",
    )
    need(
        not short,
        f"Still in 16 bits: {', '.join(short)}. Norms, embeddings and the head all go"
        " to 32.",
    )
    adapter = nn.Linear(6, 6)
    with warnings.catch_warnings():
        # torch says, too, that no input requires a gradient
        warnings.simplefilter("ignore")
        try:
            result(torch.arange(5)[None], adapter).square().sum().backward()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
    need(
        adapter.weight.grad is not None,
        "The adapter gets no gradient: it is lost under checkpointing. A reentrant"
        " checkpoint runs its block without a graph unless an *input* of it requires a"
        " gradient, and the output of a frozen embedding does not. Make it so, with a"
        " forward hook on get_input_embeddings() that calls"
        " output.requires_grad_(True).",
    )


def best(matrix, r):
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :r] * S[:r]) @ V[:r]


@checks(
    "Q is the rounded weight, and s B A the best that rank r can say about what"
    " rounding lost: one round of LoftQ.",
    "W and Q are (d_out, d_in), A (r, d_in), B (d_out, r).",
)
def loftq_start(function) -> None:
    """function(W, r, s, quantize) -> (Q, A, B), with Q + s B A near W. quantize(W)
    gives W as its four bits leave it."""

    def quantize(W):
        return (4 * W).round() / 4

    for _ in range(3):
        r, d_in, d_out, s = (
            random.choice([2, 3]),
            random.randint(7, 9),
            random.randint(10, 13),
            random.choice([0.5, 2.0, 4.0]),
        )
        W = torch.randn(d_out, d_in, dtype=torch.float64)
        got = function(W.clone(), r, s, quantize)
        need(
            isinstance(got, (tuple, list)) and len(got) == 3,
            "Return three matrices: Q, A, B.",
        )
        Q, A, B = got
        rounded, lost = quantize(W), W - quantize(W)
        need(not same(Q, W), "Your Q is W itself: the base would not be quantised.")
        need(
            not same(Q, rounded - best(lost, r))
            and not same(Q, quantize(W - best(W, r))),
            "In the first round Q is quantize(W); only a second round would quantise W"
            " - s B A.",
        )
        compare(Q, rounded, {}, "Q")
        need(
            tuple(A.shape) == (r, d_in) and tuple(B.shape) == (d_out, r),
            f"A has the shape {tuple(A.shape)} and B {tuple(B.shape)}; they should be"
            f" {(r, d_in)} and {(d_out, r)}.",
        )
        need(
            bool(A.any()) or bool(B.any()),
            "Your A and B are both zero: neither would ever learn, and nothing of what"
            " was lost is given back.",
        )
        need(
            bool(B.any()),
            "Your B is zero: that is a plain LoRA's start. Here A and B begin with what"
            " rounding lost.",
        )
        U, S, V = torch.linalg.svd(lost, full_matrices=False)
        compare(
            s * B @ A,
            best(lost, r),
            {
                "You have taken the smallest singular values. The best rank-r part"
                " has the largest, which come first.": ((U[:, -r:] * S[-r:]) @ V[-r:]),
                "Your B A is s times too large: the layer multiplies it by s, so"
                " divide by s here.": (s * best(lost, r)),
                "Your B A is s² times too large: divide by s once, not multiply.": (
                    s**2 * best(lost, r)
                ),
                "Your B A is s times too small: share 1/s between the two, √ each, or"
                " give it to one of them.": (best(lost, r) / s),
                "You have decomposed W. What is wanted is what rounding lost, W - Q.": (
                    best(W, r)
                ),
                "You have decomposed W, and not divided by s.": s * best(W, r),
                "The sign is turned round: it is W - Q, not Q - W, that the adapter"
                " has to add.": -best(lost, r),
                "You have decomposed Q. What is wanted is W - Q.": best(rounded, r),
                "You have left the singular values out: U and V alone are not"
                " enough.": s * U[:, :r] @ V[:r],
                "Each factor has the whole singular values, so the product has their"
                " squares: a square root in each.": (
                    s * (U[:, :r] * S[:r] ** 2) @ V[:r]
                ),
            },
            "s B A",
        )


@checks(
    "The update in full precision, with both corrections; then each mean is put back"
    " into its own eight bits."
)
def adam_8bit_step(function) -> None:
    """function(p, g, m, v, step, lr, keep_m, keep_v) -> (p, m, v). keep_m(x) gives x as
    its eight bits leave it."""
    b1, b2, eps = 0.9, 0.999, 1e-8
    keep_m, keep_v = (
        (lambda x: (100 * x).round() / 100),
        (lambda x: (1000 * x).round() / 1000 + 1e-4),
    )
    for step in (1, 4, 30):
        p, g, m = (torch.randn(9, dtype=torch.float64) for _ in range(3))
        v, lr = 0.02 * torch.rand(9, dtype=torch.float64) + 0.002, 0.1
        # one tiny gradient, without a past: its step depends on ε, and on its place
        g[0], m[0], v[0] = 3e-8, 0.0, 0.0
        m1, v1 = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        c1, c2 = 1 - b1**step, 1 - b2**step

        def update(m, v, c1=c1, c2=c2, eps=eps):
            return p - lr * (m / c1) / ((v / c2).sqrt() + eps)

        got = function(
            p.clone(), g.clone(), m.clone(), v.clone(), step, lr, keep_m, keep_v
        )
        need(
            isinstance(got, (tuple, list)) and len(got) == 3,
            "Return three tensors: the weight and the two means.",
        )
        new_p, new_m, new_v = got
        compare(
            new_p,
            update(m1, v1),
            {
                "Both bias corrections are missing: divide m by 1 - 0.9^step and v by"
                " 1 - 0.999^step.": update(m1, v1, 1, 1),
                "The bias correction of m is missing: divide it by 1 - 0.9^step.": (
                    update(m1, v1, 1, c2)
                ),
                "The bias correction of v is missing: divide it by 1 - 0.999^step.": (
                    update(m1, v1, c1, 1)
                ),
                "You round the means before the update. Update first, in full"
                " precision, and put them away afterwards.": update(
                    keep_m(m1), keep_v(v1)
                ),
                "v takes in g, not g squared.": update(
                    m1, (b2 * v + (1 - b2) * g).abs()
                ),
                "ε is missing: it is added to the root, so that nothing is divided by"
                " zero.": update(m1, v1, eps=0.0),
                "ε stands under the root: it is added after the root is taken.": (
                    p - lr * (m1 / c1) / (v1 / c2 + eps).sqrt()
                ),
                "Your ε is another one: here it is 1e-8.": next(
                    (
                        wrong
                        for other in (1e-4, 1e-5, 1e-6, 1e-7, 1e-9, 1e-10, 1e-12)
                        if same(new_p, wrong := update(m1, v1, eps=other))
                    ),
                    None,
                ),
                "You forget the square root of v.": (
                    p - lr * (m1 / c1) / (v1 / c2 + eps)
                ),
                "You update with the old means: take in the new gradient first.": (
                    update(m, v)
                ),
                "You add the step; it is subtracted.": 2 * p - update(m1, v1),
                "You use the plain gradient, not its running mean.": update(g * c1, v1),
                "The learning rate is missing.": p - (p - update(m1, v1)) / lr,
                "You have let the weight decay; here there is no decay.": (
                    update(m1, v1) - 0.01 * lr * p
                ),
                "The new weight is the step alone: subtract it from p.": (
                    p - update(m1, v1)
                ),
                "0.9 and 0.999 are swapped.": (
                    p
                    - lr
                    * ((b2 * m + (1 - b2) * g) / c2)
                    / (((b1 * v + (1 - b1) * g * g) / c1).sqrt() + eps)
                ),
            },
            "The new weight",
        )

        def even(x, steps):  # equal steps up to the largest in size
            return (x / x.abs().max() * steps).round() / steps * x.abs().max()

        linear = (
            "is kept in equal steps of your own. Small ones become zero that way, and"
            " the run breaks: put it through "
        )
        need(
            not (same(new_m, keep_v(v1)) and same(new_v, keep_m(m1))),
            "The two means come back in the wrong order: first m, then v.",
        )
        compare(
            new_m,
            keep_m(m1),
            {
                f"m {linear}keep_m.": even(m1, 127),
                "m comes back in full precision: put it through keep_m, or nothing is"
                " saved.": m1,
                "m goes through keep_v, which is made for numbers that are never"
                " negative: it has codes of its own, keep_m.": keep_v(m1),
                "The m that comes back is the corrected one: what is kept is the mean"
                " itself.": keep_m(m1 / c1),
            },
            "The new m",
        )
        compare(
            new_v,
            keep_v(v1),
            {
                f"v {linear}keep_v.": even(v1, 255),
                f"Your v {linear}keep_v.": even(v1, 127),
                "v comes back in full precision: put it through keep_v, or nothing is"
                " saved.": v1,
                "v goes through keep_m: its small numbers need codes of their own,"
                " without a sign. That is keep_v.": keep_m(v1),
                "The v that comes back is the corrected one: what is kept is the mean"
                " itself.": keep_v(v1 / c2),
            },
            "The new v",
        )


@checks(
    "Four bits and a bit for the frozen, two bytes for the kept, and everything else"
    " for the trained alone."
)
def training_bytes(function) -> None:
    """function(frozen, kept, trained, optimizer_bits) -> bytes, without activations."""
    for frozen, kept, trained, bits in (
        (1_000_000, 50_000, 9_000, 8),
        (7_000_000_000, 500_000_000, 40_000_000, 32),
    ):
        base, rest = (
            frozen * 4.127 / 8 + 2 * kept,
            lambda state: trained * (4 + 4 + 2 * state / 8),
        )
        right = base + rest(bits)
        mistakes = {
            "That is in bits: divide by eight.": 8 * right,
            "4.127 are bits, not bytes: divide by eight.": (
                frozen * 4.127 + 2 * kept + rest(bits)
            ),
            "The gradients of the trained numbers (or these themselves) are missing,"
            " or both are in 16 bits: 4 bytes each.": (
                base + trained * (4 + 2 * bits / 8)
            ),
            "Adam keeps two numbers for each trained one: a mean, and a mean of"
            " squares.": (base + trained * (8 + bits / 8)),
            "The optimizer's states are missing (or the trained numbers, or their"
            " gradients, are in 16 bits: both have 32).": base + trained * 8,
            "You charge gradients and states for the frozen weights too: they have"
            " none.": (base + (trained + frozen) * (8 + 2 * bits / 8) - 4 * frozen),
            "You have put what is kept in 16 bits into four as well: embeddings, head"
            " and norms are not quantised.": ((frozen + kept) * 4.127 / 8 + rest(bits)),
            "The scales are missing: NF4 with double quantisation takes 4.127 bits a"
            " weight, not 4.": (frozen * 4 / 8 + 2 * kept + rest(bits)),
            "optimizer_bits are bits for each of Adam's numbers, not bytes.": (
                base + trained * (8 + 2 * bits)
            ),
            "That is in gigabytes: bytes are asked for.": right / 1e9,
            "What is kept in 16 bits takes two bytes a number, not four.": (
                base + 2 * kept + rest(bits)
            ),
        }
        got = function(frozen, kept, trained, bits)
        need(got is not None, "Your result is None: is there a `return` at the end?")
        got = float(got)
        if abs(got - right) > 1e-6 * right:
            for message, wrong in mistakes.items():
                if abs(got - wrong) <= 1e-6 * wrong:
                    raise Wrong(message)
            raise Wrong(
                f"For {frozen:,} frozen, {kept:,} kept and {trained:,} trained numbers"
                f" with {bits}-bit states you have {got:,.0f} bytes. Write the four"
                " parts on four lines and compare with section 2.6."
            )


@checks(
    "What rounding does to the merged weight, measured against what the adapter wanted:"
    " the number that matters."
)
def merge_error(function) -> None:
    """function(W, delta, quantize) -> the error of requantising, relative to the
    adapter's change. W is dequantised."""

    # steps that are not equal, as in NF4
    def quantize(W):
        return W.sign() * ((3 * W.abs().sqrt()).round() / 3) ** 2

    for _ in range(3):
        W = quantize(torch.randn(9, 13, dtype=torch.float64))
        delta = 0.2 * torch.randn(9, 13, dtype=torch.float64)
        wanted, stored = W + delta, quantize(W + delta)
        error = (stored - wanted).norm()
        mistakes = {
            "You compare with the size of W: then any error looks small. What counts"
            " is how much of the *adapter's change* is lost.": (error / W.norm()),
            "You compare with the size of the merged weight: then any error looks"
            " small. Divide by that of delta.": (error / wanted.norm()),
            "That is the error itself; divide it by the norm of delta.": error,
            "You measure how far the weight has moved, not how far it is from where"
            " it should be.": ((stored - W).norm() / delta.norm()),
            "You quantise delta alone. It is the sum that is stored.": (
                (W + quantize(delta) - wanted).norm() / delta.norm()
            ),
            "That is the square: take norms, not their squares.": (
                error**2 / delta.norm() ** 2
            ),
            "Your fraction is upside down: the error comes above, the adapter's"
            " change below.": (delta.norm() / error),
            "You compare mean sizes of the entries. Take norms: large errors weigh"
            " more than small ones.": (
                (stored - wanted).abs().mean() / delta.abs().mean()
            ),
            "You compare the largest entries. Take norms: all entries count.": (
                (stored - wanted).abs().max() / delta.abs().max()
            ),
            "Nothing has been rounded: quantise the sum, then compare.": torch.zeros(
                (), dtype=torch.float64
            ),
            "You quantise W again, without the adapter: W is what four bits can say,"
            " so nothing happens. Add delta first.": (
                (quantize(W) + delta - wanted).norm() / delta.norm()
            ),
        }
        got = function(W.clone(), delta.clone(), quantize)
        need(got is not None, "Your result is None: is there a `return` at the end?")
        compare(
            torch.as_tensor(got, dtype=torch.float64).reshape(()),
            error / delta.norm(),
            mistakes,
            "Your error",
        )
