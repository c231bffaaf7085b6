"""Chapter 14, AdapterFusion: how to read it, the attention repaired, its shares
predicted, the experts that are needed, its penalty, and the module."""

import math
import random
from itertools import combinations

import torch
from torch import nn

from ..comparison import compare as told_apart
from .kinds import Choices, judge_numbers, told_by_the_mean
from .practice import copy_stands_alone
from .slips import Formula
from .teacher import checks, compare, need, same

__all__ = [
    "fewest_experts",
    "fuse",
    "fusion_module",
    "fusion_penalty",
    "predict_shares",
    "whom_it_hears",
]

SHAPES = (
    "y is (B, T, d), updates (N, B, T, d), weights (d, d) as nn.Linear has them: the"
    " query is y @ W_q.T. The softmax is over the N experts."
)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def leaf(*shape):
    return draw(*shape).requires_grad_()


def attention_over_experts(y, updates, W_q, W_k, W_v):
    scores = ((y @ W_q.T) * (updates @ W_k.T)).sum(-1)
    p = scores.softmax(0)
    return y + (p[..., None] * (updates @ W_v.T)).sum(0)


@checks(
    "Each token asks, each expert answers, and their answers are weighed and added.",
    SHAPES,
)
def fuse(function) -> None:
    """function(y, updates, W_q, W_k, W_v) -> (B, T, d)."""
    # 400: exp of a score is infinite
    for N, size in ((2, 1), (3, 1), (3, 400), (1, 1), (2, 0)):
        B, T, d = 2, random.choice([4, 5]), random.choice([7, 9])
        y, u = (max(size, 1) * draw(B, T, d)).requires_grad_(), leaf(N, B, T, d)
        if size == 0:  # all sizes but d are equal, and one expert says nothing
            y, u = leaf(N, N, d), leaf(N, N, N, d)
            u.data[0] = 0
        W_q, W_k, W_v = ((draw(d, d) / d**0.5).requires_grad_() for _ in range(3))
        given = y, u, W_q, W_k, W_v
        compare(
            function(*given),
            fused(*given),
            slips_of_sum(*given) | slips_of_weights(*given) | slips_of_shares(*given),
            "Your output" if N > 1 else "With one expert alone your output",
            formula=Formula(attention_over_experts, *given),
        )


def scores_of(query, keys, W_q, W_k):
    return torch.einsum("btd,nbtd->nbt", query @ W_q.T, keys @ W_k.T)


def with_shares(y, shares, values):
    return y + torch.einsum("nbt,nbtd->btd", shares, values)


def fused(y, u, W_q, W_k, W_v):
    return with_shares(y, scores_of(y, u, W_q, W_k).softmax(0), u @ W_v.T)


def slips_of_sum(y, u, W_q, W_k, W_v) -> dict:
    """Of what the shares weigh, and what it is added to."""
    right = fused(y, u, W_q, W_k, W_v)
    shares = scores_of(y, u, W_q, W_k).softmax(0)
    return {
        "The residual is forgotten: the layer's own output y goes on too.": (
            with_shares(0 * y, shares, u @ W_v.T)
        ),
        "The values are y + update: take the updates alone, since y is added at the"
        " end. (In the keys it would not matter: y shifts all scores of a token"
        " alike.)": with_shares(y, shares, (y + u) @ W_v.T),
        "The residual is in it twice: take the shares' sum of the updates alone, and"
        " add y once.": with_shares(2 * y, shares, u @ W_v.T),
        "You divide the sum by N: the shares sum to one already.": (
            y + (right - y) / len(u)
        ),
        "y passes through W_v too: only the updates do.": (
            with_shares(y @ W_v.T, shares, u @ W_v.T)
        ),
        "The experts do not add anything: that is y.": 1 * y,
    }


def slips_of_weights(y, u, W_q, W_k, W_v) -> dict:
    """Of the three matrices: left out, swapped, or transposed."""
    one = torch.eye(len(W_q), dtype=torch.float64)
    return {
        "The values do not pass through W_v.": fused(y, u, W_q, W_k, one),
        "The keys do not pass through W_k.": fused(y, u, W_q, one, W_v),
        "The query does not pass through W_q.": fused(y, u, one, W_k, W_v),
        "Query and key are swapped: the layer's output asks, the experts' updates are"
        " the keys.": fused(y, u, W_k, W_q, W_v),
        "All weights are transposed: nn.Linear computes x @ W.T.": (
            fused(y, u, W_q.T, W_k.T, W_v.T)
        ),
        "W_v is transposed: nn.Linear computes x @ W.T.": fused(y, u, W_q, W_k, W_v.T),
        "W_q is transposed: nn.Linear computes x @ W.T.": fused(y, u, W_q.T, W_k, W_v),
        "W_k is transposed: nn.Linear computes x @ W.T.": fused(y, u, W_q, W_k.T, W_v),
        "W_q and W_k are transposed: nn.Linear computes x @ W.T.": (
            fused(y, u, W_q.T, W_k.T, W_v)
        ),
        "The keys are made with W_v.": fused(y, u, W_q, W_v, W_v),
    }


def slips_of_shares(y, u, W_q, W_k, W_v) -> dict:
    """Of the softmax, and of the scores that it is given."""
    scores = scores_of(y, u, W_q, W_k)

    def shared(shares):
        return with_shares(y, shares, u @ W_v.T)

    return {
        "An expert whose update is zero gets no share in yours: its score is a score"
        " like any other.": shared(
            scores.masked_fill((u == 0).all(-1), -math.inf).softmax(0)
        ),
        "You attend over the inputs: keys are made of what the experts *say*, the"
        " updates, not of y. With equal keys every expert gets the same share.": (
            y + (u @ W_v.T).mean(0)
        ),
        "You divide the scores by √d. AdapterFusion does not scale them.": (
            shared((scores * len(W_q) ** -0.5).softmax(0))
        ),
        "Your softmax is over the tokens: each token chooses among the experts by"
        " itself.": shared(scores.softmax(2)),
        "Your softmax is over the rows of the batch.": shared(scores.softmax(1)),
        "The experts ask themselves: the query is made of y.": shared(
            torch.einsum("nbtd,nbtd->nbt", u @ W_q.T, u @ W_k.T).softmax(0)
        ),
        "You take a sigmoid: the shares of a token must sum to one.": (
            shared(scores.sigmoid())
        ),
        "Your softmax is over everything at once: each token chooses for itself.": (
            shared(scores.flatten().softmax(0).view_as(scores))
        ),
        "The softmax is missing: the shares of a token must sum to one.": (
            shared(scores)
        ),
        "You take the strongest expert alone: it is a soft choice.": (
            shared(one_hot(scores))
        ),
    }


def one_hot(scores):
    return nn.functional.one_hot(scores.argmax(0), len(scores)).movedim(-1, 0).double()


def weighed(y, query, keys, values):
    p = (query * keys).sum(-1).softmax(0)
    return y + (p[..., None] * values).sum(0)


LINEARS = "query", "key", "value"


@checks(
    "The experts are frozen and are not saved again, W_v starts as the identity, and"
    " each token makes its choice."
)
def fusion_module(module_class) -> None:
    """module_class(experts, d), an nn.Module with Linears `query`, `key`, `value`;
    experts map y to their update."""
    need(
        isinstance(module_class, type) and issubclass(module_class, nn.Module),
        "Give me the class itself, a subclass of nn.Module.",
    )
    d, N = random.choice([6, 8]), 4
    experts = [nn.Linear(d, d) for _ in range(N)]
    kept = [expert.weight.detach().clone() for expert in experts]
    module = module_class(experts, d)
    for name in LINEARS:
        need(
            isinstance(getattr(module, name, None), nn.Linear),
            f"I look for an nn.Linear as self.{name}.",
        )
    look_at_experts(module, experts)
    look_at_linears(module, d)
    y = torch.randn(4, 5, d)
    compare_fusions(module, experts, y)
    look_at_gradients(module, experts, y)
    need(
        all(
            torch.equal(expert.weight, before) for expert, before in zip(experts, kept)
        ),
        "An expert's weight has changed.",
    )
    copies_and_one_expert(module_class, module, experts, y, d)


def look_at_experts(module, experts) -> None:
    """They are frozen, and not the module's own."""
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    theirs = {id(p) for expert in experts for p in expert.parameters()}
    need(
        not theirs & trained,
        "The experts would be trained too. Freeze them: in AdapterFusion only query,"
        " key and value learn.",
    )
    need(
        not any(p.requires_grad for expert in experts for p in expert.parameters()),
        "The experts are not frozen: whoever trains the model would train them too"
        " (expert.requires_grad_(False)).",
    )
    need(
        not theirs & {id(p) for p in module.parameters()},
        "The experts are children of your module: frozen, but saved a second time with"
        " it. Keep them where PyTorch does not register them: in a plain list, not in"
        " an nn.ModuleList.",
    )


def look_at_linears(module, d) -> None:
    """Their biases, how W_v starts, and that they are what is trained."""
    need(
        module.value.bias is None,
        "W_v has no bias: with one, fusion would speak even where no expert does.",
    )
    need(
        module.query.bias is not None and module.key.bias is not None,
        "Query and key have biases here.",
    )
    need(
        bool((module.value.weight.detach() - torch.eye(d)).abs().max() < 1e-4),
        "W_v must start as the identity, so that the experts' updates arrive"
        " unchanged.",
    )
    need(
        module.query.weight is not module.key.weight,
        "`query` and `key` are one and the same layer: each has its own weights.",
    )
    asking = (*module.query.parameters(), *module.key.parameters())
    need(
        any(p.any() for p in asking),
        "`query` and `key` are both zero at the start: then neither of them ever gets a"
        " gradient, and all experts have the same share for ever. Leave one of them as"
        " nn.Linear makes it.",
    )
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    own = own_parameters(module)
    extra = [name for name in trained if name not in own]
    need(not extra, f"Something else would be trained too: {', '.join(extra)}.")
    frozen = sorted(own.keys() - {*trained})
    need(
        not frozen,
        f"{', '.join(frozen)}: frozen (requires_grad is False), and it is what fusion"
        " trains.",
    )


def own_parameters(module) -> dict:
    """{name: those of query, key and value}"""
    return {
        name: p
        for name, p in sorted(module.named_parameters())
        if name.partition(".")[0] in LINEARS
    }


@torch.no_grad()
def compare_fusions(module, experts, y) -> None:
    """In training and in evaluation, and the second time with other weights."""
    u = torch.stack([expert(y) for expert in experts])
    for training in (True, False):
        before = y.clone()
        got = module.train(training)(y)
        need(torch.equal(y, before), "You change y in place: make a new tensor.")
        compare(
            got,
            fused_by(module, y, u),
            slips_of_module(module, y, u),
            "Your output" if training else "Your output after .eval()",
            formula=Formula(
                weighed, y, module.query(y), module.key(u), module.value(u)
            ),
        )
        for p in (module.query.weight, module.key.weight, module.value.weight):
            p += torch.randn(p.shape)


def scores_by(module, y, u):
    return torch.einsum("btd,nbtd->nbt", module.query(y), module.key(u))


def fused_by(module, y, u):
    return with_shares(y, scores_by(module, y, u).softmax(0), module.value(u))


def slips_of_module(module, y, u) -> dict:
    scores, right = scores_by(module, y, u), fused_by(module, y, u)
    swapped = torch.einsum("btd,nbtd->nbt", module.key(y), module.query(u))
    asking = (module.query(u) * module.key(u)).sum(-1)

    def shared(shares):
        return with_shares(y, shares, module.value(u))

    return {
        "The values are y + update: take the updates alone, and add y itself.": (
            torch.einsum("nbt,nbtd->btd", scores.softmax(0), module.value(y + u))
        ),
        "You take a sigmoid: the shares of a token must sum to one.": (
            shared(scores.sigmoid())
        ),
        "The experts ask themselves: the query is made of y.": (
            shared(asking.softmax(0))
        ),
        "The residual is forgotten: y goes on too.": right - y,
        "You take the plain mean of the experts: the attention is missing, or its keys"
        " are made of y, so that all are equal.": y + module.value(u).mean(0),
        "Only one expert is heard.": y + module.value(u)[0],
        "The residual is in it twice: add y once.": right + y,
        "You divide the scores by √d. AdapterFusion does not scale them.": (
            shared((scores * y.shape[-1] ** -0.5).softmax(0))
        ),
        "Your softmax is over the tokens: each token chooses among the experts by"
        " itself.": shared(scores.softmax(2)),
        "Your softmax is over the rows of the batch.": shared(scores.softmax(1)),
        "Query and key are swapped: y asks, the updates are the keys.": (
            shared(swapped.softmax(0))
        ),
        "The updates do not pass through `value`.": (
            with_shares(y, scores.softmax(0), u)
        ),
    }


def look_at_gradients(module, experts, y) -> None:
    """That of y, and those of query, key and value."""

    def right(y):
        return fused_by(module, y, torch.stack([expert(y) for expert in experts]))

    asked = [y.clone().requires_grad_() for _ in range(2)]
    for out in (module(asked[0]), right(asked[1])):
        if out.requires_grad:
            out.square().sum().backward()
    need(
        asked[0].grad is not None
        and torch.allclose(asked[0].grad, asked[1].grad, rtol=1e-3, atol=1e-3),
        "The output is right, but not the gradient that goes down to y. A frozen expert"
        " must still be passed by it: freeze its parameters (requires_grad_(False));"
        " no_grad() and detach() would cut the way.",
    )
    compare(module(y), right(y), {}, "Your output", own_parameters(module))


@torch.no_grad()
def copies_and_one_expert(module_class, module, experts, y, d) -> None:
    copy_stands_alone(module, lambda module: module(y))
    expert = nn.Linear(d, d)
    alone = module_class([expert], d)
    alone.value.weight.normal_()
    compare(
        alone(y),
        y + alone.value(expert(y)),
        {"With one expert its update has to pass through `value` too.": y + expert(y)},
        "With one expert your output",
        learnt={},
    )


def distance(W_v, one, strength):
    return strength * (W_v - one).square().sum()


def at_the_start(function, d) -> None:
    """At the identity itself, and with a strength of zero."""
    for strength in (0.5, 0.0):
        W = torch.eye(d, dtype=torch.float64, requires_grad=True)
        found = function(W, strength)
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            need(
                strength > 0 or not isinstance(found, int | float),
                "With a strength of zero you return a number: a tensor is asked for"
                " then, too.",
            )
            return
        if not found.requires_grad:
            return
        found.sum().backward()
        need(
            bool(W.grad.isfinite().all()),
            "At the identity, where W_v starts, your gradient is nan: the root has no"
            " slope at zero, and squaring it afterwards does not help.",
        )


@checks("The distance from the identity, squared and summed.")
def fusion_penalty(function) -> None:
    """function(W_v, strength) -> strength ||W_v - 1||^2."""
    for strength in (0.01, 0.3):
        d = random.choice([5, 8])
        W = (torch.eye(d, dtype=torch.float64) + 0.3 * draw(d, d)).requires_grad_()
        got = function(W, strength)
        keeps_precision(function, got, W, strength)
        at_the_start(function, d)
        one = torch.eye(d, dtype=torch.float64)
        compare(
            got,
            distance(W, one, strength),
            slips_of_penalty(W, strength),
            "Your penalty",
            formula=Formula(distance, W, one, strength),
        )


def keeps_precision(function, got, W, strength) -> None:
    """got: the penalty of W."""
    for kept in (W, W.detach().bfloat16(), W.detach().float()):
        found = got if kept is W else function(kept, strength)
        need(
            not isinstance(found, torch.Tensor) or found.dtype == kept.dtype,
            "Your penalty is not in the precision of W_v, but in another one:"
            " torch.eye gives 32 bits if you say no dtype.",
        )


def slips_of_penalty(W, strength) -> dict:
    d, one = len(W), torch.eye(len(W), dtype=torch.float64)
    off = W - one
    return {
        "You pull W_v to zero: it should stay near the identity.": (
            strength * W.square().sum()
        ),
        "You take the mean of the squares: the sum is wanted.": (
            strength * off.square().mean()
        ),
        "The norm is not squared.": strength * off.norm(),
        "You sum |W_v - 1|: squares are wanted.": strength * off.abs().sum(),
        "The strength is missing.": off.square().sum(),
        "There is a half too much or too little.": strength * off.square().sum() / 2,
        "You take 1 from every entry: the identity has ones on the diagonal only.": (
            strength * (W - 1).square().sum()
        ),
        "You look at what stands beside the diagonal only.": (
            strength * (off - off.diagonal().diag()).square().sum()
        ),
        "You divide by d: the sum of all squares is wanted.": (
            strength * off.square().sum() / d
        ),
        "You ask whether W_v is orthogonal (W Wᵀ): it should stay near the identity"
        " itself.": strength * (W @ W.T - one).square().sum(),
        "That is the largest singular value: the squares of all entries are wanted.": (
            strength * torch.linalg.matrix_norm(off, 2) ** 2
        ),
        "You sum first and square then: squares first.": strength * off.sum().square(),
        "The sign is wrong: a penalty is added to the loss.": (
            -strength * off.square().sum()
        ),
        "You look at the diagonal only.": strength * off.diagonal().square().sum(),
        "The strength is squared too: it stands before the square.": (
            strength**2 * off.square().sum()
        ),
        "That is each entry's part: sum them.": strength * off.square(),
    }


@checks("Each real token counts once, and padding does not.")
def whom_it_hears(function) -> None:
    """function(p, mask) -> (N,): the mean share of each expert; p (B, T, N), mask (B,
    T), 1 for real tokens."""
    B, T, N = 3, 6, 4
    p = (2 * draw(B, T, N)).softmax(-1)
    p[0, 1] = p[0, 0]  # two tokens may have the same shares
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, random.choice([2, 3]) :] = 0
    mask[2, :2] = 0  # padding may stand before the text
    got = function(p, mask)
    need(
        not (
            isinstance(got, torch.Tensor)
            and same(got, p[mask].mean(0))
            or isinstance(got, torch.Tensor)
            and same(got, p[mask].mean((0, 1, 2)))
        ),
        "p[mask] with a mask of whole numbers takes rows 0 and 1 of p, over and over. A"
        " boolean mask picks tokens: mask.bool().",
    )
    right = (p * mask[..., None]).sum((0, 1)) / mask.sum()
    compare(got, right, wrong_shares(p, mask), "Your shares")
    spoilt = p.masked_fill(mask[..., None] == 0, torch.nan)
    need(
        same(function(spoilt, mask), right),
        "Padding may hold anything, nan too, and nan times 0 is nan: pick the real"
        " tokens, p[mask.bool()], before you add up.",
    )


def wrong_shares(p, mask) -> dict:
    """{what to say: the shares that this mistake gives}"""
    B, _, N = p.shape
    kept = p * mask[..., None]
    rows = kept.sum(1) / mask.sum(1, keepdim=True)
    return {
        "You count the padding too: it also has an attention, which means"
        " nothing.": p.mean((0, 1)),
        "You divide by all places, padding included: the shares should sum to"
        " one.": kept.mean((0, 1)),
        "You take the mean of the rows' means: short rows would count too much.": (
            rows.mean(0)
        ),
        "You give the sum: divide by the number of real tokens.": kept.sum((0, 1)),
        "You keep the padding and drop the text.": (
            (p * (1 - mask)[..., None]).sum((0, 1)) / (1 - mask).sum()
        ),
        "You count how often each expert has the largest share: the mean of the"
        " shares is wanted.": (
            (nn.functional.one_hot(p.argmax(-1), N) * mask[..., None]).sum((0, 1))
            / mask.sum()
        ),
        "You take the first tokens of each row: padding may stand before the text."
        " Ask the mask.": torch.cat(
            [row[: int(n)] for row, n in zip(p, mask.sum(1))]
        ).mean(0),
        "Tokens that have the same shares count once: each token counts.": (
            p[mask.bool()].unique(dim=0).mean(0)
        ),
        "That is the median: the mean is wanted.": (p[mask.bool()].median(0).values),
        "The rows are left: one number for each expert is wanted.": rows,
        "You average over the experts: average over the tokens.": (
            p[mask.bool()].mean(-1)
        ),
        "You divide by the number of rows: divide by the number of real tokens.": (
            kept.sum((0, 1)) / B
        ),
    }


# ---- shares, predicted ---------------------------------------------------------------


def share_cases(share, d=16):
    """{case: (what the formula gives for vectors that have these shares, why)}; the
    first of three experts has `share`, the other two have the rest in equal parts."""
    q = torch.randn(d, dtype=torch.float64)
    log_odds = torch.tensor(share).double().div((1 - share) / 2).log()
    u = torch.randn(3, d, dtype=torch.float64)
    u -= torch.outer(u @ q, q) / q.square().sum()  # scores of zero
    u[0] += log_odds * q / q.square().sum()

    def first(keys=u, query=q, scale=1.0):
        return (keys @ query * scale).softmax(0)[0].item()

    loud, quiet = u.clone(), u.clone()
    loud[0] *= 2
    quiet[0] = 0
    return {
        "listed twice": (
            first(torch.cat((u[:1], u))),
            "the softmax has one more entry, as large as the first",
        ),
        "query doubled": (first(query=2 * q), "all scores double: odds are squared"),
        "key bias": (
            first(u + torch.randn(d, dtype=torch.float64)),
            "q · b is added to all scores alike, as in chapter 13",
        ),
        "update doubled": (
            first(loud),
            "the key is made of the update: with it the expert's score doubles",
        ),
        "its part then": (
            2 * first(loud) / first(),
            "what counts is share times update, and both have grown",
        ),
        "silenced": (
            first(quiet),
            "an update of zero gives a score of zero, as the other two have here: the"
            " softmax still gives it a share",
        ),
        "divided by 4": (
            first(scale=0.25),
            "a quarter of each score: the fourth root of the odds",
        ),
    }


@checks(
    "All seven. A share says how an expert's score compares with the others', and not"
    " how much it does: an expert that says nothing has one too."
)
def predict_shares(predicted, share=0.5) -> None:
    """predicted: {case: number}; share: the first expert's before any change."""
    cases = share_cases(share)
    said = {
        case: (true, f"Think of this: {why}.") for case, (true, why) in cases.items()
    }
    judge_numbers(predicted, said, near=0.022)


# ---- which experts are needed --------------------------------------------------------


def fusion_of(kind):
    """(names, {set of names: [a loss a seed]}) of a fusion whose experts matter in this
    way."""
    names = random.sample(["voice", "records", "extract", "sql"], 4)
    a, b, c, d = names
    harm = {
        "one does it all": lambda s: 0.7 * (a not in s),
        "large and uncertain": lambda s: 0.5 * (a not in s),
        "one is useless": lambda s: 0.5 * len({a, b, c} - s),
        "copies": lambda s: 0.6 * (not s & {a, b}) + 0.4 * (c not in s),
        "small and certain": lambda s: 0.02 * (d not in s) + 0.5 * len({a, b} - s),
        "all are needed": lambda s: 0.3 * len({*names} - s),
        "a pair off the path": lambda s: (
            0 if s >= {b, c} or s >= {a, b, d} else 0.2 if a in s else 0.6
        ),
        "pairs told by the mean": lambda s: 0.0 if len(s) > 2 else 0.9,
        "one alone": lambda s: 0.0 if s == {a} or len(s) > 3 else 0.4,
        "seeds in another order": lambda s: 0.5 * (a not in s) + 0.01 * (len(s) < 4),
    }[kind]
    losses = {}
    for chosen in sets_of(names):
        noise = [0.004, -0.001, -0.003]
        if len(chosen) < 4 and kind != "small and certain":
            noise = random.choice([noise[1:] + noise[:1], noise[2:] + noise[:2]])
        level = 0.2 + harm(chosen) + 0.0003 * len(chosen)
        if kind == "copies" and a not in chosen:
            level += 0.002
        if kind == "large and uncertain":
            level -= 0.002 * (chosen >= {a, b}) + 0.002 * (chosen == {a, b, c})
            if b not in chosen:
                noise = random.sample([0.09, -0.02, 0.02], 3)
        if kind == "seeds in another order":
            noise = [0.3, 0.1, 0.2] if len(chosen) == 4 else [0.1, 0.2, 0.3]
        losses[chosen] = [level + one for one in noise]
    if kind == "a pair off the path":  # silencing one after the other leads elsewhere
        for chosen, less in (({a, b, d}, 0.001), ({b, c}, 0.002)):
            losses[frozenset(chosen)] = [x - less for x in losses[frozenset(names)]]
    if kind == "pairs told by the mean":
        pairs = [{c, d}, {a, c}, {a, d}]
        losses |= dict(zip(map(frozenset, pairs), told_by_the_mean()))
    return names, losses


def sets_of(names):
    """All sets of one or more of the names."""
    for size in range(1, len(names) + 1):
        yield from map(frozenset, combinations(names, size))


KINDS = (
    "one does it all",
    "large and uncertain",
    "one is useless",
    "copies",
    "small and certain",
    "all are needed",
    "a pair off the path",
    "pairs told by the mean",
    "one alone",
    "seeds in another order",
)


@checks(
    "The smallest set that the course's rule does not tell from all: copies are kept"
    " once, and what is small but certain counts."
)
def fewest_experts(function) -> None:
    """function(names, losses_of) -> a list or set of names."""
    choices = Choices()
    for kind in KINDS:
        names, losses = fusion_of(kind)
        some_experts(function, names, losses, choices)
    choices.judge()


def some_experts(function, names, losses, choices) -> None:
    def losses_of(chosen):
        need(
            not isinstance(chosen, str) and {*chosen} <= {*names} and len(chosen) > 0,
            "losses_of takes a list of one or more of the names; you give it"
            f" {chosen!r}.",
        )
        return list(losses[frozenset(chosen)])

    got = function(list(names), losses_of)
    need(got is not None, "Your function gives None: is there a `return` at its end?")
    need(
        isinstance(got, (list, tuple, set, frozenset))
        and all(isinstance(name, str) for name in got)
        and {*got} <= {*names},
        f"Return a list or a set of names; yours is {got!r}.",
    )
    need(len({*got}) == len(got), f"A name stands twice in {got!r}.")
    everyone = frozenset(names)
    got = frozenset(got)
    mean = {chosen: sum(each) / len(each) for chosen, each in losses.items()}

    def worse(chosen):
        result = told_apart(losses[chosen], losses[everyone], loss=True)
        return result.verdict == "behind"

    good = [chosen for chosen in losses if not worse(chosen)]
    fewest = min(map(len, good))
    right = min((s for s in good if len(s) == fewest), key=mean.get)
    slips = expert_slips(right, names, losses, mean, worse)
    choices.add(got, right, slips, no_experts(got, right, everyone, losses, worse))


def fewest_of(losses, mean, worse):
    good = [chosen for chosen in losses if not worse(chosen)]
    return min(good, key=lambda chosen: (len(chosen), mean[chosen]))


def downwards(losses, mean, worse):
    """By all sets that are one smaller than a good one, as far as one of them is."""
    level = [max(losses, key=len)]
    while True:
        below = {one - {name} for one in level for name in one if len(one) > 1}
        good = [chosen for chosen in below if not worse(chosen)]
        if not good:
            return min(level, key=mean.get)
        level = good


def expert_slips(right, names, losses, mean, worse) -> dict:
    everyone = frozenset(names)
    one_less = {name: everyone - {name} for name in names}
    alone = frozenset(name for name in names if worse(one_less[name]))
    by_mean = [chosen for chosen in losses if mean[chosen] <= mean[everyone]]

    def sorted_is_worse(chosen):
        sides = sorted(losses[chosen]), sorted(losses[everyone])
        return told_apart(*sides, loss=True).verdict == "behind"

    return {
        "You silence one expert at a time. Two that say the same can each be missed,"
        " and not both: try sets.": alone,
        "You take the set with the lowest mean loss. The question is which experts are"
        " *needed*: the smallest set that is not behind.": min(mean, key=mean.get),
        "You ask for a mean no higher than that of all: a mean that is higher by chance"
        " is no reason. Ask `compare`.": min(
            by_mean, key=lambda chosen: (len(chosen), mean[chosen])
        ),
        "You name the experts that can be spared: name those that are needed.": (
            everyone - right
        ),
        "You sort the losses before you compare: each belongs to its seed, and"
        " `compare` pairs them.": fewest_of(losses, mean, sorted_is_worse),
        "You take one expert away after the other, and go no further where no set one"
        " smaller will do: a far smaller one may.": downwards(losses, mean, worse),
    }


def no_experts(got, right, everyone, losses, worse) -> str:
    """What to say of a wrong set that has no name."""
    shown = {
        " + ".join(sorted(s)): [round(x, 3) for x in losses[s]]
        for s in (everyone, right, got)
        if s
    }
    if not got:
        return "You return no name at all: at least one expert is needed."
    if worse(got):
        return (
            f"Without the others {sorted(got)} is really behind all of them, by the"
            f" course's rule: {shown}."
        )
    if len(got) > len(right):
        return f"{sorted(got)} will do, and so will fewer: {shown}."
    return f"Of the smallest sets another has a lower mean loss: {shown}."
