"""Chapter 10, QLoRA: the faults in a product with a packed weight, which adapters get
a gradient, preparation, a setup for a card, an adapter that starts from what rounding
lost, merging."""

import copy
import functools
import itertools
import random
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ... import LinearDelta, LoraConfig, get_peft_model
from ...slot import Base
from ..comparison import compare as told_apart
from .kinds import TRAPS, Choices, by_one_look, configured, trap
from .practice import copy_stands_alone, fit, held, held_entries, written
from .slips import Formula
from .teacher import checks, compare, need, same

__all__ = [
    "choose_setup",
    "four_bit_product",
    "merge_error",
    "predict_gradients",
    "prepare_for_training",
    "repair",
]


# ---- 1. the faults in a product ------------------------------------------------------


@checks(
    "x Wᵀ forward, dy W backward, and the dense weight is made again instead of kept."
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
    for d_in, d_out, rows, dtype in (
        (7, 7, (3, 4), torch.float32),
        (random.randint(5, 9), random.randint(10, 14), (1,), torch.float64),
        (random.randint(10, 14), random.randint(5, 9), (3, 2), torch.float32),
        (6, 8, (1, 3), torch.float32),
        (6, 8, (), torch.float32),
    ):
        W = torch.randn(d_out, d_in, dtype=dtype)
        x = torch.randn(*rows, d_in, dtype=dtype, requires_grad=True)
        one_product(function_class, W, x)
    for order in ((0, 1), (1, 0)):
        two_products(function_class, order)


def again(W):
    """A function that dequantises."""
    return lambda: W.clone()


def two_products(function_class, order):
    """Two layers, and a call whose gradient nobody wants; then a second backward()."""
    Ws, xs = torch.randn(2, 4, 5), torch.randn(2, 3, 5)
    inputs = [x.clone().requires_grad_() for x in xs]
    functions = [again(W) for W in Ws]
    ys = [function_class.apply(*both) for both in zip(inputs, functions)]
    with torch.no_grad():
        function_class.apply(xs[0], again(torch.randn(4, 5)))
    dy = torch.randn(3, 4)
    for at in order:
        dx = torch.autograd.grad(ys[at], inputs[at], dy, retain_graph=True)[0]
        need(
            same(dx, dy @ Ws[at]),
            "With two layers in a model, the backward pass of one takes the weight of"
            " another call: what belongs to one call stands on its ctx.",
        )
    y, x = ys[order[0]], inputs[order[0]]
    need(
        not any(t.shape == Ws[0].shape for t in held(vars(y.grad_fn), functions)),
        "After the backward pass the dense weight is still on ctx: use it, and let it"
        " go.",
    )
    try:
        dx = torch.autograd.grad(y, x, dy)[0]
    except Exception:
        dx = None
    need(
        same(dx, dy @ Ws[order[0]]),
        "A second backward pass through the same graph (retain_graph=True) fails: the"
        " first one has changed what stands on ctx.",
    )


def product(x, W):
    return x @ W.T


def one_product(function_class, W, x):
    calls, kept = [], []

    def dequantize():
        calls.append(1)
        return W.clone()

    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t, lambda t: t
    ):
        y = function_class.apply(x, dequantize)
    right = (x @ W.T).detach()
    need(y is not None, "forward returns None: is there a `return`?")
    mistakes = {
        "Your output is rounded or scaled once more: dequantize() gives the weight as"
        " it is meant.": 2 * right
    }
    if W.shape[0] == W.shape[1]:
        mistakes["You compute x Ŵ. A layer's weight is (d_out, d_in): x Ŵᵀ."] = (
            x @ W
        ).detach()
    compare(y.detach(), right, mistakes, "Your output", formula=Formula(product, x, W))
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
    on_ctx = held(vars(y.grad_fn), without=[dequantize])
    need(
        not kept and not any(t.shape == x.shape for t in on_ctx),
        "You keep a tensor for the backward pass (x, perhaps), and none is needed: dx ="
        " dy W asks for dy, which comes by itself, and for W, which is made again. x"
        " would be wanted for the gradient of W; W has none.",
    )
    backward_of_product(y, x, W, calls)


def backward_of_product(y, x, W, calls):
    forward_calls, dy = len(calls), torch.randn(y.shape, dtype=y.dtype)
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
        "x gets no gradient: backward has to return one for each argument of forward,"
        " that of x first, and None for the function.",
    )
    if W.shape[0] == W.shape[1]:
        need(
            not same(x.grad, dy),
            "You hand dy down as it is. W is not the identity: rounding is not"
            " differentiated at all, W is a constant, and dx = dy W.",
        )
        need(
            not same(x.grad, dy @ W.T),
            "The gradient of x is dy Ŵ, and you multiply by Ŵᵀ. On a square layer that"
            " raises no error, and trains what is below in a wrong direction.",
        )
    need(
        len(calls) > forward_calls,
        "The dense weight of the forward pass is still there in the backward pass (on"
        " ctx?): it should have been thrown away and made again by dequantize().",
    )
    compare(
        x.grad,
        dy @ W,
        {
            "The gradient of x is all zero. Rounding has no gradient, but this is not"
            " the gradient *through* the rounding: W is a constant here, and dx = dy"
            " W.": torch.zeros_like(x),
            "Your gradient has the sign turned round.": -(dy @ W),
            "You return x's own values as the gradient: it is dy W.": x.detach(),
            "Your gradient is twice too large.": 2 * dy @ W,
            "You ignore dy: dx = dy W.": torch.ones_like(dy) @ W,
        },
        "The gradient of x",
    )


# ---- 2. which adapters get a gradient ------------------------------------------------

SITUATIONS = {
    "plain": "without checkpointing autograd records every operation on an adapter's"
    " matrices, whatever is frozen below",
    "reentrant": "a reentrant checkpoint builds no graph unless an *input* of the block"
    " requires a gradient, and the output of a frozen embedding does not: so nothing"
    " in the whole model requires one, and backward() has nowhere to start",
    "reentrant, head trained": "the head has a gradient, so backward() raises no error;"
    " the blocks below it are as in 'reentrant'",
    "reentrant, input asked": "the first block's input requires a gradient, so its"
    " graph is built, its output requires one too, and so on",
    "not reentrant": "this kind records the block as if there were no checkpoint",
    "reentrant, embedding trained": "the output of a trained embedding requires a"
    " gradient: that is all that a reentrant checkpoint asks of its input",
    "reentrant, one block left out": "the block without a checkpoint records its"
    " adapter, so its output requires a gradient: for it and all blocks *above* it all"
    " is well, and those below get nothing",
    "reentrant, every second block": "block 1 gets nothing; block 2 has no checkpoint,"
    " so it and all blocks above it learn",
}


class AdaptedBlock(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.frozen = nn.Linear(d, d).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, d))
        self.B = nn.Parameter(torch.zeros(d, 2))

    def forward(self, x):
        return x + self.frozen(x) + x @ self.A.T @ self.B.T


def gradients_that_arrive(case: str, blocks: int, left_out: int):
    """The number of adapter matrices with a gradient after one backward(), or
    "error"."""
    embedding = nn.Embedding(9, 8).requires_grad_("embedding trained" in case)
    head = nn.Linear(8, 9).requires_grad_("head trained" in case)
    stack = [AdaptedBlock() for _ in range(blocks)]
    x = embedding(torch.arange(5))
    if "asked" in case:
        x.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, block in enumerate(stack, 1):
            bare = case == "plain"
            bare |= "left out" in case and number == left_out
            bare |= "every second" in case and number % 2 == 0
            reentrant = not case.startswith("not")
            x = block(x) if bare else checkpoint(block, x, use_reentrant=reentrant)
        try:
            head(x).square().sum().backward()
        except RuntimeError:
            return "error"
    return sum(p.grad is not None for block in stack for p in (block.A, block.B))


@checks(
    "All eight. What a reentrant checkpoint asks is whether the block's *input*"
    " requires a gradient; what is inside does not count."
)
def predict_gradients(predicted, blocks=4, left_out=3) -> None:
    """predicted: {situation: a number of matrices, or "error"}."""
    form = "{situation: number}"
    predicted = written(predicted, SITUATIONS, "put your eight predictions", form)
    for case, why in SITUATIONS.items():
        one_prediction(predicted[case], case, why, blocks, left_out)


def one_prediction(said, case, why, blocks, left_out):
    wanted = (
        f'{case!r}: a number from 0 to {2 * blocks} or "error" is wanted; you have'
        f" {said!r}."
    )
    if isinstance(said, str):
        said = said.strip().lower()
        need(said == "error", wanted)
    else:
        number = isinstance(said, int | float) and not isinstance(said, bool)
        need(number and 0 <= said <= 2 * blocks, wanted)
    true = gradients_that_arrive(case, blocks, left_out)
    need(
        said == true,
        f"{case!r}: you say {said}, and one backward() gives something else. Think"
        f" again: {why}.",
    )


# ---- 3. preparation ------------------------------------------------------------------


class Tiny(nn.Module):
    """Embedding and norms in 16 bits, one packed weight, checkpointed."""

    def __init__(self):
        super().__init__()
        # not the one that get_input_embeddings gives
        self.positions = nn.Embedding(9, 6, dtype=torch.bfloat16)
        self.embed = nn.Embedding(11, 6, dtype=torch.bfloat16)
        self.wide_norm = nn.LayerNorm(6)  # in 32 bits already
        self.register_buffer("scales", torch.randint(0, 255, (3,), dtype=torch.uint8))
        self.norm = nn.LayerNorm(6, dtype=torch.bfloat16)
        self.packed = nn.Parameter(
            torch.randint(0, 255, (18, 1), dtype=torch.uint8), requires_grad=False
        )
        self.last_norm = nn.LayerNorm(6, dtype=torch.float16)
        nn.init.normal_(self.last_norm.weight)
        self.head = nn.Linear(6, 11, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight  # tied, as in many models

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
        x = self.last_norm(x.to(self.last_norm.weight.dtype))
        return self.head(x.to(self.head.weight.dtype))


@checks(
    "Frozen, norms and embeddings in 32 bits, packed bytes untouched, and gradients"
    " arrive under checkpointing."
)
def prepare_for_training(function) -> None:
    """function(model) -> the model. Changed in place or not, as you like."""
    model = Tiny()
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    result = function(model)
    need(result is not None, "Return the model at the end.")
    need(
        isinstance(result, nn.Module),
        f"Return the model; yours is a {type(result).__name__}.",
    )
    check_parameters(result, before)
    need(
        result.training,
        "Your function leaves the model in eval(): it comes in train(), for training.",
    )
    need(
        result.head.weight is result.embed.weight,
        "Embedding and head were one tied table, and are two now: cast a parameter's"
        " data, p.data = p.data.float(), and leave the Parameter itself.",
    )
    need(
        all(adapter_learns(result) for _ in range(2)),
        "The adapter gets no gradient: it is lost under checkpointing. A reentrant"
        " checkpoint runs its block without a graph unless an *input* of it requires a"
        " gradient, and the output of a frozen embedding does not. Make it so, with a"
        " forward hook on get_input_embeddings() that calls"
        " output.requires_grad_(True).",
    )
    check_hook(result)


def check_parameters(model, before: dict) -> None:
    """Bytes as they were, all frozen, and the same numbers in 32 bits."""
    need(
        model.packed.dtype == torch.uint8
        and torch.equal(model.packed, before["packed"])
        and model.scales.dtype == torch.uint8,
        "The packed weight was cast too: its bytes are codes, not numbers. Cast only"
        " what is float16 or bfloat16.",
    )
    loose = [name for name, p in model.named_parameters() if p.requires_grad]
    need(
        not loose,
        f"Not everything is frozen: {', '.join(loose)} would be trained, and gets a"
        " gradient and optimizer states.",
    )
    wide = [name for name, p in model.named_parameters() if p.dtype == torch.float64]
    need(
        not wide,
        f"In 64 bits: {', '.join(wide)}. 32 are enough: float(), not double().",
    )
    short = [
        name
        for name, p in model.named_parameters()
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
    other = [
        name
        for name, t in model.state_dict().items()
        if name in before and not torch.equal(t, before[name].to(t.dtype))
    ]
    need(
        not other,
        f"{', '.join(other)} has other numbers than before: cast once, with float(),"
        " and not by way of the other kind of 16 bits.",
    )


def check_hook(model) -> None:
    """It works in eval() too, changes nothing, moves along, and detaches nothing."""
    ids, table = torch.arange(5), model.embed.weight
    need(
        model.eval().embed(ids).requires_grad,
        "After .eval() the embedding's output requires no gradient any more.",
    )
    need(
        torch.equal(model.embed(ids).detach(), table[ids]),
        "Your hook changes what the embedding gives: it only has to require a"
        " gradient.",
    )
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embed.weight += 1
    moved = twin.embed(ids)
    need(
        moved.requires_grad and same(moved, table[ids] + 1),
        "A deep copy of the model still looks up the first one's embedding: its forward"
        " is another function now. A forward hook moves along.",
    )
    table.requires_grad_(True)
    model.embed(ids).sum().backward()
    need(
        table.grad is not None,
        "The embedding's output is detached: what somebody trains in the embedding"
        " later, an adapter say, would get no gradient.",
    )


def adapter_learns(model) -> bool:
    """Whether an adapter inside the checkpoint gets a gradient."""
    adapter = nn.Linear(6, 6)
    with warnings.catch_warnings():
        # torch says, too, that no input requires a gradient
        warnings.simplefilter("ignore")
        try:
            model(torch.arange(5)[None], adapter).square().sum().backward()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
    return adapter.weight.grad is not None


# ---- 4. a setup for a card -----------------------------------------------------------

# What a learner may leave out of the ledger, and its message: from the largest to the
# smallest, so that only the one that is left out makes the decoy fit
LEFT_OUT = {
    "activations": "the activations are missing",
    "reserve": "the reserve is missing: CUDA and the allocator's gaps take it",
    "kept": "what is kept in 16 bits is missing, 2 bytes each",
    "gradient": "the trained parameters and their gradients take 4 bytes each, and one"
    " of the two is missing",
    "logits' gradient": "the logits and their gradient are both there at the start of"
    " the backward pass: count them twice",
    "square": "Adam keeps *two* numbers for each trained one, m and v",
}


def setup_parts(setup, reserve) -> dict:
    """{part: bytes} of a training step."""
    trained = setup["trained"]
    return {
        "frozen": setup["frozen"] * setup["bits"] / 8,
        "kept": 2 * setup["kept"],
        "adapter": 4 * trained,
        "gradient": 4 * trained,
        "mean": trained * setup["optimizer_bits"] / 8,
        "square": trained * setup["optimizer_bits"] / 8,
        "activations": setup["activations"],
        "logits": setup["logits"],
        "logits' gradient": setup["logits"],
        "reserve": reserve,
    }


def drawn_setup(share: float, limit: float, reserve: float, over: str = "") -> dict:
    """A setup whose step needs a share of the limit; over: it needs nearly as much as
    this part more than the limit."""
    setup = {
        "bits": 4.127,
        "frozen": 0,
        "kept": random.randrange(450, 550) * 10**6,
        "trained": random.randrange(150, 200) * 10**6,
        "optimizer_bits": 32 if 1 < share < 1.1 else 8,
        "activations": random.randrange(2600, 3200) * 10**6,
        "logits": random.randrange(350, 450) * 10**6,
    }
    parts = setup_parts(setup, reserve)
    total = limit + 0.95 * parts[over] if over else share * limit
    setup["frozen"] = int((total - sum(parts.values())) * 8 / setup["bits"])
    return setup


def losses_around(mean, spread=0.01):
    return [mean + spread * random.uniform(-1, 1) for _ in range(3)]


def setups_drawn(kind: str, card, reserve) -> dict:
    """Setups with a decoy, which a slip chooses."""
    limit, names = card * 2**30, ["a", "b", "c", "d"]
    random.shuffle(names)
    thrifty, good, other, decoy = names
    over = kind if kind in LEFT_OUT else ""
    share = {"GiB": 0.9998, "nearly": 1.0002, "too large": 1.6}.get(kind, 0.8)
    setups = {
        thrifty: drawn_setup(0.5, limit, reserve),
        good: drawn_setup(0.7, limit, reserve),
        other: drawn_setup(0.75, limit, reserve),
        decoy: drawn_setup(share, limit, reserve, over),
    }
    valid = {thrifty: 0.6, good: 0.4, other: 0.5, decoy: 0.3}
    test = {thrifty: 0.6, good: random.choice([0.3, 0.6, 0.8]), other: 0.5, decoy: 0.3}
    if kind == "test":
        valid[decoy], test[decoy] = 0.55, 0.1
    for name, setup in setups.items():
        setup["valid"] = losses_around(valid[name])
        setup["test"] = losses_around(test[name])
    if kind == "test":  # the largest of those that fit, and few of it are weights
        setups[decoy]["activations"] += 3 * 10**9
        setups[decoy]["frozen"] -= int(3 * 10**9 * 8 / setups[decoy]["bits"])
        setups[good]["test"] = losses_around(0.3)
    if kind == "nearly":  # the seeds differ more than the setups do
        seeds = (0.2, -0.1, 0.0)
        for name, mean in ((good, 0.45), (thrifty, 0.5), (other, 0.5)):
            near = losses_around(mean, 0.002)
            setups[name]["test"] = [a + b for a, b in zip(near, seeds)]
    if kind in TRAPS:
        setups[good]["valid"], setups[decoy]["valid"] = trap(kind, 0.4, 0.02)
    if kind == "exact":  # whole numbers, so that every order of adding gives the same
        parts = setup_parts(setups[decoy] | {"bits": 4, "frozen": 0}, reserve)
        left = int(limit - sum(parts.values()))
        setups[decoy] |= {"bits": 4, "frozen": 2 * left}
    order = sorted(setups)
    return {name: setups[name] for name in order}


@checks(
    "Every byte counted, the choice made on validation among what fits, and the test"
    " asked once, by the course's rule."
)
def choose_setup(function, against="smallest") -> None:
    """function(setups, card, reserve) -> (name, verdict)."""
    kinds = "too large", *LEFT_OUT, "GiB", "exact", "nearly", "test", *TRAPS
    choices, verdicts = Choices(), Choices()
    for number, kind in enumerate(kinds):
        card, reserve = (24, 16, 48)[number % 3], (2e9, 1.5e9)[number % 2]
        setups = setups_drawn(kind, card, reserve)
        got = function(copy.deepcopy(setups), card, reserve)
        need(got is not None, "Your function gives None: is there a `return`?")
        need(
            isinstance(got, tuple | list) and len(got) == 2,
            f"Return two things, the name and the verdict; you return {got!r}.",
        )
        a_setup(got[0], setups, card, reserve, choices)
        of_the_test(got[1], setups, fitting(setups, card, reserve), against, verdicts)
    choices.judge()
    verdicts.judge()


def fitting(setups, card, reserve, left_out="", unit=2**30, spare=0) -> dict:
    """{name: bytes} of the setups that fit, if this part is left out of the bill."""
    found = {}
    for name, setup in setups.items():
        parts = setup_parts(setup, reserve)
        total = sum(parts.values()) - parts.get(left_out, 0)
        if total + spare <= card * unit:
            found[name] = total
    return found


def best_setup(setups, names, key="valid"):
    """The one of these with the lowest mean loss."""
    return min(names, key=lambda name: sum(setups[name][key]), default=None)


def a_setup(name, setups, card, reserve, choices) -> None:
    need(
        isinstance(name, str) and name in setups,
        f"The name is one of {', '.join(setups)}; yours is {name!r}.",
    )
    fit = fitting(setups, card, reserve)
    slips = {
        f"You count too few bytes, by about as many as this: {text}.": best_setup(
            setups, fitting(setups, card, reserve, part)
        )
        for part, text in LEFT_OUT.items()
    }
    slips |= by_one_look({name: setups[name]["valid"] for name in fit})
    slips |= {
        "You take the best by validation, whether it fits on the card or not.": (
            best_setup(setups, setups)
        ),
        "A better one fits: you count too many bytes, or a GB is 10⁹ bytes to you, and"
        " it is 2³⁰.": best_setup(setups, fitting(setups, card, reserve, unit=10**9)),
        "A better one fits: it needs exactly as many bytes as may be used, and that is"
        " not too many.": best_setup(setups, fitting(setups, card, reserve, spare=1)),
        "You choose on the test. Choose by the validation loss, and look at the test"
        " once.": best_setup(setups, fit, "test"),
    }
    right = best_setup(setups, fit)
    said = (
        f"You choose {name!r}; of those that fit, {right!r} has the lowest mean"
        " validation loss."
    )
    if name not in fit:
        needed = sum(setup_parts(setups[name], reserve).values()) / 2**30
        said = (
            f"Your choice needs {needed:.3f} of {card} GiB, the reserve included: it"
            " does not fit. Add its parts up once by hand."
        )
    choices.add(name, right, slips, said)


def of_the_test(verdict, setups, fit, against, verdicts) -> None:
    """The verdict of the best setup against the smallest, or largest, that fits."""
    right = best_setup(setups, fit)
    other = (max if against == "largest" else min)(fit, key=fit.get)

    def judged(key, other=other, **how):
        pair = setups[right][key], setups[other][key]
        return told_apart(*pair, loss=True, **how).verdict

    wanted, heaviest = judged("test"), {}
    if against == "largest":
        most = max(fit, key=lambda name: setup_parts(setups[name], 0)["frozen"])
        heaviest = {
            "You compare with the setup that has the largest weights: all of its bytes"
            " count.": judged("test", most)
        }
    verdicts.add_verdict(
        verdict,
        wanted,
        "compare(a, b, loss=True) says whether *a* is ahead of b, and lower losses are"
        " better.",
        f"You say {verdict!r}; the course's rule says {wanted!r} of the test losses of"
        f" {right!r} against those of {other!r}, the {against} that fits.",
        {
            "You compare validation losses, which have chosen already: compare the test"
            " losses.": judged("valid"),
            "Losses of one seed belong together: `compare` pairs them, and yours are"
            " compared as if they did not.": judged("test", paired=False),
        }
        | heaviest,
    )


# ---- 5. an adapter that starts from what rounding lost -------------------------------


def best(matrix, r):
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :r] * S[:r]) @ V[:r]


def three_levels(W):
    """W rounded to -1, 0 or 1 times the largest entry of its row."""
    scale = W.abs().amax(1, keepdim=True)
    return (W / scale).round() * scale


@checks(
    "It starts with what rounding lost, learns both factors, merges; and after 40 steps"
    " it is ahead of a LoRA that starts at zero, by the course's rule, three seeds.",
    "W and Q are (d_out, d_in), A (r, d_in), B (d_out, r).",
)
def repair(adapter_class) -> None:
    """adapter_class(W, Q, r, s), a LinearDelta with s B A near W - Q at the start."""
    need(
        isinstance(adapter_class, type) and issubclass(adapter_class, LinearDelta),
        "Give me the class itself, a subclass of LinearDelta.",
    )
    for d_in, d_out, r, s in ((9, 12, 3, 2.0), (11, 8, 2, 0.5), (8, 8, 1, 4.0)):
        W = torch.randn(d_out, d_in, dtype=torch.float64)
        adapter_of_one(adapter_class, W, three_levels(W), r, s)
    own = [trained_loss(adapter_class, seed) for seed in range(3)]
    result = told_apart(own, losses_of_lora(), loss=True)
    need(
        result.verdict == "ahead",
        f"The start is right, but after 40 steps yours is {result}, as against a LoRA"
        " that starts at zero: are both factors trained, and do they start alike in"
        " size (the root of the singular values in each)?",
    )


def adapter_of_one(adapter_class, W, Q, r, s):
    given = W.clone(), Q.clone()
    adapter = adapter_class(*given, r, s)
    need(
        torch.equal(given[0], W) and torch.equal(given[1], Q),
        "You change W or Q in place: leave them as they are.",
    )
    trained = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
    need(trained, "Nothing is trained: A and B must be nn.Parameters.")
    count, right = sum(p.numel() for p in trained.values()), r * sum(W.shape)
    need(
        count == right,
        f"You train {count} parameters; A (r, d_in) and B (d_out, r) have {right}.",
    )
    saved = sum(t.numel() for t in adapter.state_dict().values())
    need(
        saved == right,
        "It would save more than A and B: a copy of W or Q is as large as the base"
        " itself.",
    )
    empty = [name for name, p in trained.items() if not p.any()]
    need(
        not empty,
        f"{', '.join(empty)} is zero at the start: that is a plain LoRA. Here A and B"
        " begin with what rounding lost.",
    )
    layer = nn.Linear(*W.T.shape, bias=False, dtype=W.dtype)
    layer.weight.data.copy_(Q)
    model = nn.Sequential(layer)
    model = get_peft_model(model, configured(lambda base: adapter)(target_modules="0"))
    slot = model.get_base_model()[0]
    adapter = slot.adapters["default"]
    base = Base(slot, "default")
    lost = W - Q
    compare(
        adapter.delta(base).detach(),
        best(lost, r),
        slips_of_start(W, Q, r, s),
        "s B A",
        formula=Formula(started, W, Q, r, s),
    )
    equation_holds(slot, adapter, base, W, s)
    copy_stands_alone(adapter, lambda one: one.delta(base))
    before = slot(torch.eye(len(W.T), dtype=W.dtype)).detach()
    model.merge_adapter()
    after = slot(torch.eye(len(W.T), dtype=W.dtype)).detach()
    need(same(after, before), "Merged, the layer gives something else.")
    need(
        held_entries(slot.adapters) < W.numel(),
        "Your adapter keeps something as large as W beside A and B (in a list, or in a"
        " closure?).",
    )
    for name, p in trained.items():
        need(
            p.untyped_storage().nbytes() == p.nbytes,
            f"{name} is a slice of a larger matrix, all of which stays in memory:"
            " .clone() it.",
        )


def started(W, Q, r, s):
    U, S, V = torch.linalg.svd(W - Q, full_matrices=False)
    root = (S[:r] / s).sqrt()
    A = root[:, None] * V[:r]
    B = U[:, :r] * root
    return s * B @ A


def slips_of_start(W, Q, r, s) -> dict:
    lost = W - Q
    U, S, V = torch.linalg.svd(lost, full_matrices=False)
    right = best(lost, r)
    mistakes = {
        "Your update misses the factor s, or the start is divided by it once too"
        " often: the layer adds s B A.": right / s,
        "Your start is s times too large: the layer multiplies B A by s, so divide by"
        " s here.": s * right,
        "Your start is s² times too large: divide by s, not multiply.": s**2 * right,
        "You have decomposed W. What is wanted is what rounding lost, W - Q.": best(
            W, r
        ),
        "You have decomposed W, and not divided by s.": s * best(W, r),
        "The sign is turned round: the adapter has to add W - Q.": -right,
        "You return the whole weight, Q + s B A: only what is added.": Q + right,
        "Only the largest singular value is in it: r of them belong there.": best(
            lost, 1
        ),
        "You take rows of V where torch.linalg.svd gives its transpose: V[:r] of U, S,"
        " V = svd(M) are the right vectors.": (U[:, :r] * S[:r]) @ V[:, :r].T
        if V.shape[0] == V.shape[1]
        else None,
        "You have decomposed Q. What is wanted is W - Q.": best(Q, r),
        "You have left the singular values out: U and V alone are not enough.": (
            U[:, :r] @ V[:r]
        ),
        "You have left the singular values out, and s.": s * U[:, :r] @ V[:r],
        "Each factor has the whole singular values, so the product has their squares:"
        " a root in each.": (U[:, :r] * S[:r] ** 2) @ V[:r],
        "Each factor has the whole singular values divided by s, so the product has"
        " their squares: a root in each.": (U[:, :r] * S[:r] ** 2) @ V[:r] / s,
        "You have taken the smallest singular values: the best rank-r part has the"
        " largest, which come first.": (U[:, -r:] * S[-r:]) @ V[-r:],
    }
    return {
        m: wrong
        for m, wrong in mistakes.items()
        if wrong is not None and not same(wrong, right)
    }


def equation_holds(slot, adapter, base, W, s):
    """With other A and B: output, gradients of A, B and x."""
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1 + torch.rand_like(p))
    x = torch.randn(2, 3, len(W.T), dtype=W.dtype, requires_grad=True)
    delta = adapter.delta(base)
    right = slot.base_layer(x) + x @ delta.T
    learnt = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
    need(
        delta.requires_grad,
        "delta(base) has lost touch with A and B: it is computed once, or detached.",
    )
    reached = torch.autograd.grad(
        delta.square().sum(), learnt.values(), retain_graph=True, allow_unused=True
    )
    lost = [name for name, found in zip(learnt, reached) if found is None]
    need(not lost, f"No gradient reaches {', '.join(lost)}: it is detached.")
    need(
        any(same(delta, s * product) for product in products(learnt.values(), delta)),
        "With other A and B delta(base) is not s B A: the start was right, the formula"
        " is not.",
    )
    mistakes = {
        "The base is in it twice: `update` is only what is added.": right
        + slot.base_layer(x),
        "The update is in it twice.": right + x @ delta.T,
    }
    mistakes = {message: wrong.detach() for message, wrong in mistakes.items()}
    compare(slot(x), right, mistakes, "The layer's output", learnt | {"x": x})


def products(factors, like) -> list:
    """The products of two factors with the shape of `like`, in either order; a learner
    may keep a factor's transpose."""
    found = []
    for one, two in itertools.permutations(factors, 2):
        for left, right in itertools.product((one, one.T), (two, two.T)):
            if left.shape[1] == right.shape[0]:
                found.append(left @ right)
    return [product for product in found if product.shape == like.shape]


@functools.cache
def losses_of_lora() -> list:
    return [trained_loss(None, seed) for seed in range(3)]


def trained_loss(adapter_class, seed: int) -> float:
    """The loss after 40 steps of two layers in three levels, whose task is the dense
    network with a change of rank one; adapter_class: None for a LoRA."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    dense = [draw(32, 24) / 24**0.5, draw(10, 32) / 32**0.5]
    task = dense[0] + 0.3 * draw(32, 1) @ draw(1, 24) / 24**0.5
    model = nn.Sequential(
        nn.Linear(24, 32, bias=False), nn.ReLU(), nn.Linear(32, 10, bias=False)
    )
    originals = {}
    for layer, W in zip((model[0], model[2]), dense):
        layer.weight.data.copy_(three_levels(W))
        originals[id(layer)] = W
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"])
    if adapter_class:

        def make(base):
            layer = getattr(base, "module", base)
            W = originals[id(layer)]
            return adapter_class(W.clone(), layer.weight.detach().clone(), 8, 2.0)

        config = configured(make)(target_modules=["0", "2"])
    model = get_peft_model(model, config)

    def loss(rows=64):
        x = draw(rows, 24)
        return (model(x) - torch.relu(x @ task.T) @ dense[1].T).square().mean()

    fit(loss, model.parameters(), steps=40, lr=1e-2)
    with torch.no_grad():
        return loss(512).item()


# ---- 6. what merging loses -----------------------------------------------------------


def lost_in_merging(W, delta, quantize):
    wanted = W + delta
    return (quantize(wanted) - wanted).norm() / delta.norm()


def slips_of_merging(W, delta, quantize) -> dict:
    wanted, stored = W + delta, quantize(W + delta)
    error = (stored - wanted).norm()
    by_rows = torch.stack([*map(quantize, wanted)])
    return {
        "You compare with the size of W: then any error looks small. What counts is how"
        " much of the *adapter's change* is lost.": error / W.norm(),
        "You compare with the size of the merged weight: then any error looks small."
        " Divide by that of delta.": error / wanted.norm(),
        "That is the error itself; divide it by the norm of delta.": error,
        "You measure how far the weight has moved, not how far it is from where it"
        " should be.": (stored - W).norm() / delta.norm(),
        "You quantise delta alone. It is the sum that is stored.": (
            (W + quantize(delta) - wanted).norm() / delta.norm()
        ),
        "That is the square: take norms, not their squares.": (
            error**2 / delta.norm() ** 2
        ),
        "Your fraction is upside down: the error comes above, the adapter's change"
        " below.": delta.norm() / error,
        "You compare mean sizes of the entries. Take norms: large errors weigh more"
        " than small ones.": (stored - wanted).abs().mean() / delta.abs().mean(),
        "You compare the largest entries. Take norms: all entries count.": (
            (stored - wanted).abs().max() / delta.abs().max()
        ),
        "Your error is never above 1: rounding may cost more than the adapter's whole"
        " change.": (error / delta.norm()).clamp(max=1),
        "You quantise each row by itself: hand the whole matrix to `quantize`.": (
            (by_rows - wanted).norm() / delta.norm()
        ),
        "You give per cent: a share is asked for.": 100 * error / delta.norm(),
        "You take the largest singular value: the Frobenius norm is asked for.": (
            torch.linalg.matrix_norm(stored - wanted, 2)
            / torch.linalg.matrix_norm(delta, 2)
        ),
        "You subtract the norms: take the norm of the difference.": (
            (stored.norm() - wanted.norm()).abs() / delta.norm()
        ),
        "You take the mean over the rows: one norm is of the whole matrix.": (
            (stored - wanted).norm(dim=1) / delta.norm(dim=1)
        ).mean(),
        "Nothing has been rounded: quantise the sum, then compare.": 0 * error,
        "You quantise W again, without the adapter: W is what four bits can say, so"
        " nothing happens. Add delta first.": (
            (quantize(W) + delta - wanted).norm() / delta.norm()
        ),
    }


@checks(
    "What rounding does to the merged weight, measured against what the adapter wanted:"
    " the number that matters."
)
def merge_error(function) -> None:
    """function(W, delta, quantize) -> the error of requantising, relative to the
    adapter's change. W is dequantised."""

    # blocks of 39, each with a scale, and steps that are not equal: as in NF4
    def quantize(W):
        blocks = []
        for block in W.flatten().split(39):
            scale = block.abs().max().clamp(min=1e-300)
            roots = (5 * (block / scale).abs().sqrt()).round() / 5
            blocks.append(scale * block.sign() * roots**2)
        return torch.cat(blocks).reshape(W.shape)

    for size in (0.2, 0.2, 0.02):  # of the last one rounding takes more than all
        W = quantize(torch.randn(9, 13, dtype=torch.float64))
        delta = size * torch.randn(9, 13, dtype=torch.float64)
        got = function(W.clone(), delta.clone(), quantize)
        need(got is not None, "Your result is None: is there a `return` at the end?")
        if not isinstance(got, torch.Tensor) or got.numel() == 1:
            got = torch.as_tensor(got, dtype=torch.float64).reshape(())
        compare(
            got,
            lost_in_merging(W, delta, quantize),
            slips_of_merging(W, delta, quantize),
            "Your error",
            formula=Formula(lost_in_merging, W, delta, quantize),
        )
