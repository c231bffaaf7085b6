"""Chapter 10's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import numpy as np
import pytest
import torch
from judging import accepts, rejects
from torch import nn

from minipeft import LinearDelta
from minipeft.course import check, compare


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


def on_the_class():
    """The function stands where the next call puts its own."""

    class Shared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dequantize):
            Shared.dequantize = dequantize
            return x @ dequantize().T

        @staticmethod
        def backward(ctx, dy):
            return dy @ Shared.dequantize(), None

    return Shared


def from_a_list():
    calls = []

    def forward(ctx, x, dequantize):
        calls.append(dequantize)
        return x @ dequantize().T

    return product(forward, lambda ctx, dy: (dy @ calls.pop()(), None))


def keeping(ctx, dy):
    ctx.W = ctx.dequantize()
    return dy @ ctx.W, None


def giving_up(ctx, dy):
    W = ctx.dequantize()
    del ctx.dequantize
    return dy @ W, None


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
            "you multiply by Ŵᵀ",
            product(backward=lambda ctx, dy: (dy @ ctx.dequantize().T, None)),
        ),
        ("x gets no gradient", product(backward=lambda ctx, dy: (None, None))),
        ("You compute x Ŵ", product(lambda ctx, x, dequantize: x @ dequantize())),
        ("hand dy down as it is", product(backward=lambda ctx, dy: (dy, None))),
        (
            "twice too large",
            product(backward=lambda ctx, dy: (2 * dy @ ctx.dequantize(), None)),
        ),
        (
            "sign turned round",
            product(backward=lambda ctx, dy: (-dy @ ctx.dequantize(), None)),
        ),
        ("the class itself", lambda x, dequantize: x @ dequantize().T),
        (
            "rounded or scaled",
            product(lambda ctx, x, dequantize: 2 * x @ dequantize().T),
        ),
        ("takes the weight of another call", on_the_class()),
        ("takes the weight of another call", from_a_list()),
        ("still on ctx", product(backward=keeping)),
        ("A second backward pass", product(backward=giving_up)),
        (
            "x gets no gradient",
            product(
                backward=lambda ctx, dy: (
                    dy @ ctx.dequantize() if dy.dim() > 1 else None,
                    None,
                )
            ),
        ),
    ],
)
def test_four_bit_product_mistakes(says, answer):
    rejects(says, check.four_bit_product, answer)


# ----------------------------------------------------------------- prepare_for_training


def short(name, p):
    return p.dtype in (torch.bfloat16, torch.float16)


def prepare(freeze=True, cast=short, hook=True, back=True):
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


def short_and_frozen(name, p):
    """Freezes what it casts, and nothing else."""
    if short(name, p):
        p.requires_grad_(False)
    return short(name, p)


def with_buffers(model):
    model.scales = model.scales.float()
    return prepare()(model)


def asking_the_first(model):
    first = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    first.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return prepare(hook=False)(model)


def patched(model):
    embedding = model.get_input_embeddings()
    forward = embedding.forward
    embedding.forward = lambda ids: forward(ids).requires_grad_()
    return prepare(hook=False)(model)


def detaching(model):
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.detach().requires_grad_()
    )
    return prepare(hook=False)(model)


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
        ("packed weight was cast", with_buffers),
        ("wide_norm", prepare(freeze=False, cast=short_and_frozen)),
        ("has other numbers", lambda model: prepare()(model.bfloat16())),
        ("in eval()", lambda model: prepare()(model.eval())),
        ("lost under checkpointing", asking_the_first),
        ("still looks up the first one's", patched),
        ("is detached", detaching),
        ("Return the model", prepare(back=False)),
    ],
)
def test_prepare_for_training_mistakes(says, answer):
    rejects(says, check.prepare_for_training, answer)


# -------------------------------------------------------------------- predict_gradients

RIGHT = {
    "plain": 8,
    "reentrant": "error",
    "reentrant, head trained": 0,
    "reentrant, input asked": 8,
    "not reentrant": 8,
    "reentrant, embedding trained": 8,
    "reentrant, one block left out": 4,
    "reentrant, every second block": 6,
}


def test_predict_gradients_solution():
    accepts(check.predict_gradients, RIGHT)
    backwards = {case: RIGHT[case] for case in reversed(RIGHT)}
    as_floats = {
        case: said if isinstance(said, str) else float(said)
        for case, said in backwards.items()
    }
    accepts(check.predict_gradients, as_floats)
    as_numpy = {
        case: said if isinstance(said, str) else np.int64(said)
        for case, said in RIGHT.items()
    }
    accepts(check.predict_gradients, as_numpy, blocks=4, left_out=3)
    respelt = {case.upper().replace(",", ""): said for case, said in RIGHT.items()}
    accepts(check.predict_gradients, respelt | {"REENTRANT": " Error"})


def test_predict_gradients_of_other_models():
    six = {case: 12 if said == 8 else said for case, said in RIGHT.items()}
    six |= {"reentrant, one block left out": 10, "reentrant, every second block": 10}
    accepts(check.predict_gradients, six, blocks=6, left_out=2)
    rejects(
        "one backward() gives something else", check.predict_gradients, RIGHT, blocks=6
    )
    two = {case: 4 if said == 8 else said for case, said in RIGHT.items()}
    two |= {"reentrant, one block left out": 4, "reentrant, every second block": 2}
    accepts(check.predict_gradients, two, blocks=2, left_out=1)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", [8] * 8),
        ("no prediction for 'plain'", {"reentrant": 0}),
        ("nowhere to start", RIGHT | {"reentrant": 0}),
        ("nowhere to start", RIGHT | {"reentrant": 8}),
        ("raises no error", RIGHT | {"reentrant, head trained": "error"}),
        ("raises no error", RIGHT | {"reentrant, head trained": 8}),
        ("all that a reentrant", RIGHT | {"reentrant, embedding trained": 0}),
        ("blocks *above* it", RIGHT | {"reentrant, one block left out": 2}),
        ("blocks *above* it", RIGHT | {"reentrant, one block left out": 6}),
        ("block 1 gets nothing", RIGHT | {"reentrant, every second block": 4}),
        ("as if there were no checkpoint", RIGHT | {"not reentrant": 0}),
        ("a number from 0 to 8", RIGHT | {"plain": "all"}),
        ("a number from 0 to 8", RIGHT | {"plain": True}),
        ("a number from 0 to 8", RIGHT | {"plain": 9}),
    ],
)
def test_predict_gradients_mistakes(says, answer):
    rejects(says, check.predict_gradients, answer)


# ------------------------------------------------------------------------- choose_setup


def setup_bytes(setup, gradient=4, means=2, logits=2, adapter=4, kept=2, passing=1):
    total = setup["frozen"] * setup["bits"] / 8 + kept * setup["kept"]
    total += setup["trained"] * (adapter + gradient)
    total += setup["trained"] * means * setup["optimizer_bits"] / 8
    return total + passing * setup["activations"] + logits * setup["logits"]


def choice(
    by="valid",
    over=sum,
    pick=min,
    unit=2**30,
    spare=1,
    fits=True,
    against=min,
    turned=False,
    word=True,
    **parts,
):
    def function(setups, card, reserve):
        size = {name: setup_bytes(setup, **parts) for name, setup in setups.items()}
        room = card * unit - spare * reserve
        fitting = [name for name in setups if size[name] <= room or not fits]
        best = pick(fitting, key=lambda name: over(setups[name][by]))
        pair = [setups[best]["test"], setups[against(fitting, key=size.get)]["test"]]
        result = compare(*(pair[::-1] if turned else pair), loss=True)
        return best, result.verdict if word else result

    return function


def test_choose_setup_solution():
    accepts(check.choose_setup, choice())
    accepts(check.choose_setup, choice(), against="smallest")
    accepts(check.choose_setup, choice(against=max), against="largest")

    def by_numpy(setups, card, reserve):
        names = np.array(list(setups))
        size = np.array([setup_bytes(setups[name]) + reserve for name in names])
        fit = names[size <= card * 2**30]
        best = fit[np.argmin([np.mean(setups[name]["valid"]) for name in fit])]
        other = names[size.argmin()]
        losses = [setups[name]["test"] for name in (best, other)]
        return [str(best), compare(*losses, loss=True).verdict]

    accepts(check.choose_setup, by_numpy)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("whether it fits on the card or not", choice(fits=False)),
        ("one of the two is missing", choice(gradient=0)),
        ("*two* numbers", choice(means=1)),
        ("count them twice", choice(logits=1)),
        ("reserve is missing", choice(spare=0)),
        ("the activations are missing", choice(passing=0)),
        ("what is kept in 16 bits is missing", choice(kept=0)),
        ("one of the two is missing", choice(adapter=0)),
        ("A better one fits", choice(unit=10**9)),
        ("You choose on the test", choice(by="test")),
        ("One lucky seed", choice(over=min)),
        ("lowest mean validation loss", choice(pick=max)),
        ("the smallest that fits", choice(against=max)),
        ("turned round", choice(turned=True)),
        ("The verdict is a word", choice(word=False)),
        ("The name is one of", lambda *_: (3, "ahead")),
        ("Return two things", lambda *_: "a"),
        ("gives None", lambda *_: None),
    ],
)
def test_choose_setup_mistakes(says, answer):
    rejects(says, check.choose_setup, answer)


def test_verdicts_of_setups():
    def weights(setup):
        return setup["frozen"] * setup["bits"]

    def judged(most=None, **how):
        def function(setups, card, reserve):
            size = {name: setup_bytes(setup) for name, setup in setups.items()}
            fit = [name for name in setups if size[name] + reserve <= card * 2**30]
            best = min(fit, key=lambda name: sum(setups[name]["valid"]))
            other = max(fit, key=lambda n: most(setups[n]) if most else size[n])
            pair = setups[best]["test"], setups[other]["test"]
            return best, compare(*pair, loss=True, **how).verdict.upper()

        return function

    accepts(check.choose_setup, judged(), against="largest")
    for says, answer in (
        ("the largest weights", judged(weights)),
        ("belong together", judged(paired=False)),
    ):
        rejects(says, check.choose_setup, answer, against="largest")


def test_choose_setup_against_the_largest():
    rejects("the largest that fits", check.choose_setup, choice(), against="largest")


# ------------------------------------------------------------------------------- repair


class Repair(LinearDelta):
    """The solution; the answers below change one line of it."""

    def __init__(self, W, Q, r, s):
        super().__init__()
        U, S, V = torch.linalg.svd(self.lost(W, Q), full_matrices=False)
        A, B = self.factors(U[:, :r], S[:r], V[:r], s)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.s = s

    def lost(self, W, Q):
        return W - Q

    def factors(self, U, S, V, s):
        root = (S / s).sqrt()
        return root[:, None] * V, U * root

    def delta(self, base):
        return self.s * self.B @ self.A


def repairing(**methods):
    return type("Mine", (Repair,), methods)


class ByRank(LinearDelta):
    """The same as a sum of outer products, with an update of its own."""

    def __init__(self, W, Q, r, s):
        super().__init__()
        U, S, V = torch.svd_lowrank(W - Q, q=min(W.shape), niter=8)
        self.up = nn.Parameter((U[:, :r] * S[:r].sqrt()).T.contiguous())
        self.down = nn.Parameter(S[:r].sqrt()[:, None] / s * V[:, :r].T)
        self.scaling = s

    def delta(self, base):
        return self.scaling * torch.einsum("ro,ri->oi", self.up, self.down)

    def update(self, base, x):
        return self.scaling * (x @ self.down.T) @ self.up


class Zero(Repair):
    def __init__(self, W, Q, r, s):
        super().__init__(W, Q, r, s)
        self.A.data.normal_()
        self.B.data.zero_()


class Keeping(Repair):
    def __init__(self, W, Q, r, s):
        super().__init__(W, Q, r, s)
        self.register_buffer("W", W)


class Frozen(Repair):
    def __init__(self, W, Q, r, s):
        super().__init__(W, Q, r, s)
        self.A.requires_grad_(False)


class Dense(LinearDelta):
    def __init__(self, W, Q, r, s):
        super().__init__()
        self.change = nn.Parameter(W - Q)

    def delta(self, base):
        return self.change


class Once(Repair):
    def __init__(self, W, Q, r, s):
        super().__init__(W, Q, r, s)
        self.first = (self.s * self.B @ self.A).detach()

    def delta(self, base):
        return self.first


def test_repair_solution():
    accepts(check.repair, Repair)
    accepts(check.repair, ByRank)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", repairing(__init__=blank)),
        ("nothing here yet", repairing(delta=blank)),
        ("the class itself", lambda W, Q, r, s: Repair(W, Q, r, s)),
        ("that is a plain LoRA", Zero),
        ("would save more", Keeping),
        ("parameters; A (r, d_in)", Frozen),
        ("parameters; A (r, d_in)", Dense),
        ("lost touch", Once),
        ("You have decomposed W.", repairing(lost=lambda self, W, Q: W)),
        ("You have decomposed Q.", repairing(lost=lambda self, W, Q: Q)),
        ("sign is turned round", repairing(lost=lambda self, W, Q: Q - W)),
        (
            "s times too large",
            repairing(
                factors=lambda self, U, S, V, s: (S.sqrt()[:, None] * V, U * S.sqrt())
            ),
        ),
        ("misses the factor s", repairing(delta=lambda self, base: self.B @ self.A)),
        (
            "their squares",
            repairing(factors=lambda self, U, S, V, s: (S[:, None] * V / s, U * S)),
        ),
        (
            "left the singular values out",
            repairing(factors=lambda self, U, S, V, s: (V / s, U.clone())),
        ),
        (
            "No gradient reaches A",
            repairing(delta=lambda self, base: self.s * self.B @ self.A.detach()),
        ),
        (
            "The base is in it twice",
            repairing(update=lambda self, base, x: base(x) + x @ self.delta(base).T),
        ),
        (
            "right values, but",
            repairing(update=lambda self, base, x: x.detach() @ self.delta(base).T),
        ),
    ],
)
def test_repair_mistakes(says, answer):
    rejects(says, check.repair, answer)


# -------------------------------------------------------------------------- merge_error


def share_lost(W, delta, quantize):
    wanted = W + delta
    return float((quantize(wanted) - wanted).norm() / delta.norm())


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
        ("never above 1", lambda W, d, q: min(1.0, share_lost(W, d, q))),
        (
            "each row by itself",
            lambda W, d, q: share_lost(W, d, lambda m: torch.stack([*map(q, m)])),
        ),
        ("Nothing has been rounded", lambda W, d, q: (W + d - W - d).norm() / d.norm()),
        ("is there a `return`", lambda W, d, q: None),
    ],
)
def test_merge_error_mistakes(says, answer):
    rejects(says, check.merge_error, answer)


# ------------------------------------------------------- what a trial by learners found


def test_what_lies_on_ctx_is_seen():
    def on_ctx(ctx, x, dequantize):
        ctx.dequantize, ctx.given = dequantize, [x]
        return x @ dequantize().T

    rejects("You keep a tensor", check.four_bit_product, product(forward=on_ctx))


def hooking(hook, twice=True):
    def function(model):
        model = prepare(hook=False)(model)
        handle = []

        def forward_hook(module, args, output):
            if not twice:
                handle[0].remove()
            return hook(output)

        embedding = model.get_input_embeddings()
        handle.append(embedding.register_forward_hook(forward_hook))
        return model

    return function


def renewed(model):
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            data = p.data.float() if p.is_floating_point() else p.data
            setattr(module, name, nn.Parameter(data, requires_grad=False))
    return prepare()(model)


def test_prepared_models_compute_what_they_did():
    accepts(check.prepare_for_training, hooking(lambda out: out.requires_grad_(True)))
    for says, answer in (
        ("changes what the embedding gives", hooking(lambda o: 2 * o.requires_grad_())),
        ("gets no gradient", hooking(lambda out: out.requires_grad_(), twice=False)),
        ("one tied table", renewed),
        ("norm is still", prepare(cast=lambda name, p: p.dtype == torch.bfloat16)),
    ):
        rejects(says, check.prepare_for_training, answer)


def test_setups_that_fit_exactly_and_means_of_seeds():
    def strict(setups, card, reserve):
        return choice()(setups, card, reserve + 1)

    rejects("exactly as many bytes", check.choose_setup, strict)
    for look in (max, lambda each: sorted(each)[1], lambda each: each[0]):
        rejects("the mean", check.choose_setup, choice(over=look))


def test_repair_is_a_formula_and_keeps_nothing():
    class InAList(Repair):
        def __init__(self, W, Q, r, s):
            super().__init__(W, Q, r, s)
            self.lost_in = [W - Q]

    class Changing(Repair):
        def __init__(self, W, Q, r, s):
            super().__init__(W, Q, r, s)
            W.sub_(Q)

    class OnlyFirst(Repair):
        def __init__(self, W, Q, r, s):
            super().__init__(W, Q, r, s)
            self.left = s

        def factors(self, U, S, V, s):
            return V, U * S

        def delta(self, base):
            return self.B @ self.A

    class ASlice(Repair):
        def factors(self, U, S, V, s):
            return V, U * S / s

    class InALambda(Repair):
        def __init__(self, W, Q, r, s):
            super().__init__(W, Q, r, s)
            A, B = self.A, self.B
            self.product = lambda: B @ A

        def delta(self, base):
            return self.s * self.product()

    for says, answer in (
        ("A is a slice", ASlice),
        ("A copy of it", InALambda),
        ("as large as W beside A and B", InAList),
        ("change W or Q in place", Changing),
        ("is not s B A", OnlyFirst),
    ):
        rejects(says, check.repair, answer)
