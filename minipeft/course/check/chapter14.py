"""Chapter 14, AdapterFusion: the attention, the module, its penalty, its cost, and how
to read it."""

import random

import torch
from torch import nn

from .teacher import Wrong, checks, compare, need, same

__all__ = ["count_fusion", "fuse", "fusion_module", "fusion_penalty", "whom_it_hears"]

SHAPES = (
    "y is (B, T, d), updates (N, B, T, d), weights (d, d) as nn.Linear has them: the"
    " query is y @ W_q.T. The softmax is over the N experts."
)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def leaf(*shape):
    return draw(*shape).requires_grad_()


@checks(
    "Each token asks, each expert answers, and their answers are weighed and added.",
    SHAPES,
)
def fuse(function) -> None:
    """function(y, updates, W_q, W_k, W_v) -> (B, T, d)."""
    for N in (2, 3):
        B, T, d = 2, random.choice([4, 5]), random.choice([7, 9])
        y, u = leaf(B, T, d), leaf(N, B, T, d)
        W_q, W_k, W_v = ((draw(d, d) / d**0.5).requires_grad_() for _ in range(3))

        def out(
            key=u,
            value=u,
            query=y,
            scale=1.0,
            over=0,
            residual=y,
            W_q=W_q,
            W_k=W_k,
            W_v=W_v,
        ):
            scores = torch.einsum("btd,nbtd->nbt", query @ W_q.T, key @ W_k.T) * scale
            return residual + torch.einsum(
                "nbt,nbtd->btd", scores.softmax(over), value @ W_v.T
            )

        one = torch.eye(d, dtype=torch.float64)
        mean = y + (u @ W_v.T).mean(0)
        compare(
            function(y, u, W_q, W_k, W_v),
            out(),
            {
                "The residual is forgotten: the layer's own output y goes on too.": out(
                    residual=0 * y
                ),
                "You attend over the inputs: keys are made of what the experts *say*,"
                " the updates, not of y. With equal keys every expert gets the same"
                " share.": mean,
                "The values are y + update: take the updates alone, since y is added"
                " at the end. (In the keys it would not matter: y shifts all scores"
                " of a token alike.)": out(value=y + u),
                "The residual is in it twice: take the shares' sum of the updates"
                " alone, and add y once.": out(residual=2 * y),
                "You divide the scores by √d. AdapterFusion does not scale them.": out(
                    scale=d**-0.5
                ),
                "You divide the sum by N: the shares sum to one already.": (
                    y + (out() - y) / N
                ),
                "The values do not pass through W_v.": out(W_v=one),
                "The keys do not pass through W_k.": out(W_k=one),
                "The query does not pass through W_q.": out(W_q=one),
                "Your softmax is over the tokens: each token chooses among the"
                " experts by itself.": out(over=2),
                "Your softmax is over the rows of the batch.": out(over=1),
                "Query and key are swapped: the layer's output asks, the experts'"
                " updates are the keys.": out(W_q=W_k, W_k=W_q),
                "All weights are transposed: nn.Linear computes x @ W.T.": out(
                    W_q=W_q.T, W_k=W_k.T, W_v=W_v.T
                ),
                "The softmax is missing: the shares of a token must sum to one.": (
                    y
                    + torch.einsum(
                        "nbt,nbtd->btd",
                        torch.einsum("btd,nbtd->nbt", y @ W_q.T, u @ W_k.T),
                        u @ W_v.T,
                    )
                ),
                "You take the strongest expert alone: it is a soft choice.": (
                    y
                    + torch.einsum(
                        "nbt,nbtd->btd",
                        one_hot(torch.einsum("btd,nbtd->nbt", y @ W_q.T, u @ W_k.T)),
                        u @ W_v.T,
                    )
                ),
            },
            "Your output",
        )


def one_hot(scores):
    return nn.functional.one_hot(scores.argmax(0), len(scores)).movedim(-1, 0).double()


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
    d, N = random.choice([6, 8]), 3
    experts = [nn.Linear(d, d) for _ in range(N)]
    kept = [expert.weight.detach().clone() for expert in experts]
    module = module_class(experts, d)
    for name in ("query", "key", "value"):
        need(
            isinstance(getattr(module, name, None), nn.Linear),
            f"I look for an nn.Linear as self.{name}.",
        )
    trained = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    theirs = {id(p) for expert in experts for p in expert.parameters()}
    need(
        not theirs & set(trained),
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
    expected = {"query", "key", "value"}
    extra = [
        name for name in trained.values() if name.partition(".")[0] not in expected
    ]
    need(not extra, f"Something else would be trained too: {', '.join(extra)}.")
    wanted = {name for name, _ in module.named_parameters() if name[-1:]}
    wanted = {name for name in wanted if name.partition(".")[0] in expected}
    frozen = sorted(wanted - set(trained.values()))
    need(
        not frozen,
        f"{', '.join(frozen)}: frozen (requires_grad is False), and it is what fusion"
        " trains.",
    )
    y = torch.randn(4, 5, d)

    def right(y=y, scale=1.0, over=0, swapped=False, speak=None):
        u = torch.stack(
            [expert(y) if speak is None else speak(expert, y) for expert in experts]
        )
        asks, answers = (
            (module.key, module.query) if swapped else (module.query, module.key)
        )
        scores = torch.einsum("btd,nbtd->nbt", asks(y), answers(u)) * scale
        return y + torch.einsum("nbt,nbtd->btd", scores.softmax(over), module.value(u))

    with torch.no_grad():
        u = torch.stack([expert(y) for expert in experts])
        for _ in range(2):
            compare(
                module(y),
                right(),
                {
                    "The residual is forgotten: y goes on too.": right() - y,
                    "You take the plain mean of the experts: the attention is"
                    " missing, or its keys are made of y, so that all are equal.": (
                        y + module.value(u).mean(0)
                    ),
                    "Only one expert is heard.": y + module.value(u)[0],
                    "The residual is in it twice: add y once.": right() + y,
                    "You divide the scores by √d. AdapterFusion does not scale them.": (
                        right(scale=d**-0.5)
                    ),
                    "Your softmax is over the tokens: each token chooses among the"
                    " experts by itself.": right(over=2),
                    "Your softmax is over the rows of the batch.": right(over=1),
                    "Query and key are swapped: y asks, the updates are the keys.": (
                        right(swapped=True)
                    ),
                    "The updates do not pass through `value`.": (
                        y
                        + torch.einsum(
                            "nbt,nbtd->btd",
                            torch.einsum(
                                "btd,nbtd->nbt", module.query(y), module.key(u)
                            ).softmax(0),
                            u,
                        )
                    ),
                },
                "Your output",
            )
            for p in (module.query.weight, module.key.weight, module.value.weight):
                p += torch.randn(p.shape)
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
    parameters = dict(module.named_parameters())
    own = {name: parameters[name] for name in sorted(wanted)}
    compare(module(y), right(), {}, "Your output", own)
    need(
        all(
            torch.equal(expert.weight, before) for expert, before in zip(experts, kept)
        ),
        "An expert's weight has changed.",
    )


@checks("The distance from the identity, squared and summed.")
def fusion_penalty(function) -> None:
    """function(W_v, strength) -> strength ||W_v - 1||^2."""
    for strength in (0.01, 0.3):
        d = random.choice([5, 8])
        W = (torch.eye(d, dtype=torch.float64) + 0.3 * draw(d, d)).requires_grad_()
        got = function(W, strength)
        off = W - torch.eye(d, dtype=torch.float64)
        compare(
            got,
            strength * off.square().sum(),
            {
                "You pull W_v to zero: it should stay near the identity.": (
                    strength * W.square().sum()
                ),
                "You take the mean of the squares: the sum is wanted.": (
                    strength * off.square().mean()
                ),
                "The norm is not squared.": strength * off.norm(),
                "You sum |W_v - 1|: squares are wanted.": strength * off.abs().sum(),
                "The strength is missing.": off.square().sum(),
                "There is a half too much or too little.": (
                    strength * off.square().sum() / 2
                ),
                "You take 1 from every entry: the identity has ones on the diagonal"
                " only.": (strength * (W - 1).square().sum()),
                "You look at the diagonal only.": (
                    strength * off.diagonal().square().sum()
                ),
                "The strength is squared too: it stands before the square.": (
                    strength**2 * off.square().sum()
                ),
                "That is each entry's part: sum them.": strength * off.square(),
            },
            "Your penalty",
        )


@checks("The count is right, for BERT-base too. It is a fifth of that model.")
def count_fusion(function) -> None:
    """function(d, places) -> int: query and key with biases, value without."""
    for d, places in ((random.randint(30, 70), random.choice([3, 5, 8])), (768, 12)):
        got, right = function(d, places), places * (3 * d * d + 2 * d)
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        slips = {
            "The biases of query and key are missing.": places * 3 * d * d,
            "The value has no bias: query and key have.": places * (3 * d * d + 3 * d),
            "Two biases of d numbers each: you count one.": places * (3 * d * d + d),
            "You count one place.": 3 * d * d + 2 * d,
            "There are three matrices: query, key and value.": (
                places * (2 * d * d + 2 * d)
            ),
            "The matrices are d × d, not bottlenecks.": places * 3 * d,
            "There is no fourth matrix after the attention, as in ordinary"
            " attention.": (places * (4 * d * d + 2 * d)),
            "A bias of a linear layer has d numbers, not one.": (
                places * (3 * d * d + 2)
            ),
        }
        if got != right:
            raise Wrong(
                next(
                    (message for message, wrong in slips.items() if got == wrong),
                    f"For d = {d} and {places} places you get {got:,}; I count"
                    f" {right:,}.",
                )
            )


@checks("Each real token counts once, and padding does not.")
def whom_it_hears(function) -> None:
    """function(p, mask) -> (N,): the mean share of each expert; p (B, T, N), mask (B,
    T), 1 for real tokens."""
    B, T, N = 3, 6, 4
    p = (2 * draw(B, T, N)).softmax(-1)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, random.choice([2, 3]) :] = 0
    mask[2, 5:] = 0
    kept = p * mask[..., None]
    rows = kept.sum(1) / mask.sum(1, keepdim=True)
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
    compare(
        got,
        kept.sum((0, 1)) / mask.sum(),
        {
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
            "The rows are left: one number for each expert is wanted.": rows,
            "You average over the experts: average over the tokens.": (
                p[mask.bool()].mean(-1)
            ),
            "You divide by the number of rows: divide by the number of real tokens.": (
                kept.sum((0, 1)) / B
            ),
        },
        "Your shares",
    )
