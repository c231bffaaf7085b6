"""Chapter 01's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import accepts, judge, rejects
from torch import nn

from minipeft.course import check, compare
from minipeft.lm import GPT, GPTConfig
from minipeft.lm.generation import sample
from minipeft.lm.gpt import Rotary, rotate


def stub(*arguments):
    raise NotImplementedError


# ---------------------------------------------------------------------- next_token_loss


def flat(logits, labels, reduction="mean"):
    """F.cross_entropy over all places, which the exercise does without."""
    asked = labels != -100
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    if reduction == "none":
        return -picked * asked
    return -picked[asked].mean() if reduction == "mean" else -picked[asked].sum()


def loss(logits, labels):
    return flat(logits[:, :-1], labels[:, 1:])


def with_cross_entropy(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def by_module(logits, labels):
    return torch.nn.NLLLoss()(
        logits[:, :-1].log_softmax(-1).flatten(0, 1), labels[:, 1:].flatten()
    )


def unstable(logits, labels):
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    asked = labels[:, 1:] != -100
    return -p[:, :-1][asked].gather(-1, labels[:, 1:][asked][:, None]).log().mean()


def with_zero(logits, labels):
    return flat(logits[:, :-1], labels[:, 1:].clamp(min=0))


def without_zero(logits, labels):
    return loss(logits, labels.masked_fill(labels == 0, -100))


def wraps(logits, labels):
    target = labels[:, 1:]
    return flat(logits[:, :-1], torch.where(target < 0, logits.shape[-1] - 1, target))


def rows(logits, labels):
    return torch.stack(
        [loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(logits))]
    ).mean()


def probability(logits, labels):
    target = labels[:, 1:]
    asked = target != -100
    return logits[:, :-1].softmax(-1)[asked].gather(-1, target[asked][:, None]).mean()


def no_softmax(logits, labels):
    target = labels[:, 1:]
    asked = target != -100
    return -logits[:, :-1][asked].gather(-1, target[asked][:, None]).mean()


def chosen_before_the_shift(logits, labels):
    target, asked = labels[:, 1:], labels[:, :-1] != -100
    return (
        -logits[:, :-1].log_softmax(-1)[asked].gather(-1, target[asked][:, None]).mean()
    )


def softmax_over(places):
    def loss(logits, labels):
        logp, target = (
            (
                logits.log_softmax(1)[:, :-1]
                if places == "all"
                else logits[:, :-1].log_softmax(1)
            ),
            labels[:, 1:],
        )
        asked = target != -100
        return -logp[asked].gather(-1, target[asked][:, None]).mean()

    return loss


def spoils(logits, labels):
    right = loss(logits, labels)
    labels[labels == -100] = 0
    return right


def test_loss_solution():
    accepts(check.next_token_loss, loss)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("You leave token 0 out", without_zero),
        ("You call F.cross_entropy", with_cross_entropy),
        ("without it", by_module),
        ("exp overflows", unstable),
        ("Nothing is shifted", flat),
        ("wrong way", lambda logits, labels: flat(logits[:, 1:], labels[:, :-1])),
        ("shift twice", lambda logits, labels: flat(logits[:, :-2], labels[:, 2:])),
        ("token 0 were wanted", with_zero),
        ("wraps", wraps),
        (
            "divide by all places",
            lambda logits, labels: flat(
                logits[:, :-1], labels[:, 1:], reduction="none"
            ).mean(),
        ),
        (
            "the last one",
            lambda logits, labels: (
                flat(logits[:, :-1], labels[:, 1:], reduction="sum") / labels.numel()
            ),
        ),
        ("choose the places before the shift", chosen_before_the_shift),
        ("runs over the places", softmax_over("all")),
        ("runs over the places", softmax_over("the shifted")),
        (
            "the mean is wanted",
            lambda logits, labels: flat(logits[:, :-1], labels[:, 1:], reduction="sum"),
        ),
        ("sign is missing", lambda logits, labels: -loss(logits, labels)),
        ("bits", lambda logits, labels: loss(logits, labels) / torch.tensor(2.0).log()),
        ("perplexity", lambda logits, labels: loss(logits, labels).exp()),
        ("forgot the logarithm", probability),
        ("forgot the softmax", no_softmax),
        ("lost touch", lambda logits, labels: loss(logits, labels).detach()),
        ("in place", spoils),
        ("should be a tensor", lambda logits, labels: loss(logits, labels).item()),
        ("is there a `return`", lambda logits, labels: None),
        ("nothing here yet", stub),
    ],
)
def test_loss_mistakes(says, answer):
    rejects(says, check.next_token_loss, answer)


def test_loss_mean_of_rows():
    # rows may happen to have labels equally many
    verdicts = judge(check.next_token_loss, rows)
    assert any("mean of the rows' means" in verdict.message for verdict in verdicts)


# ------------------------------------------------------------------------------ nucleus


def AS_ASKED(total, ordered, p):
    return total - ordered < p


def top_p(probs, p, keep=AS_ASKED, scale=True, back=True, falling=True):
    ordered, order = probs.sort(descending=falling)
    mask = keep(ordered.cumsum(0), ordered, p)
    mask[0] |= p == 0 and falling and keep is AS_ASKED
    result = torch.zeros_like(probs)
    result[order[mask] if back else torch.arange(len(probs))[: mask.sum()]] = ordered[
        mask
    ]
    return result / result.sum() if scale else result


def nucleus_with(**change):
    return lambda probs, p: top_p(probs, p, **change)


def undone_by_the_order(probs, p, inverse=False):
    ordered, order = probs.sort(descending=True)
    mask = ordered.cumsum(0) - ordered < p
    mask[0] = True
    kept = ordered * mask
    return (kept / kept.sum())[order.argsort() if inverse else order]


def sorted_mask(probs, p):
    """The mask of the sorted row, laid over the unsorted one."""
    ordered, order = probs.sort(descending=True)
    keep = ordered.cumsum(0) - ordered < p
    keep[0] = True
    kept = probs * keep[order]
    return kept / kept.sum()


def by_smallest(probs, p):
    """Those equal to the last one are kept too."""
    smallest = top_p(probs, max(p, 1e-3), scale=False)
    smallest = smallest[smallest > 0].min()
    kept = torch.where(probs >= smallest, probs, 0.0)
    return kept / kept.sum()


def nothing_for_zero(probs, p):
    kept = top_p(probs, p, lambda total, ordered, p: total - ordered < p, scale=False)
    return kept / kept.sum().clamp(min=1e-9)


def top_share(probs, p):
    ordered, order = probs.sort(descending=True)
    n = max(1, round(p * len(probs)))
    kept = torch.zeros_like(probs)
    kept[order[:n]] = ordered[:n]
    return kept / kept.sum()


def rarest_of_equals(probs, p):
    """Of equal ones the last ones, by a loop."""
    order = sorted(range(len(probs)), key=lambda i: (-probs[i].item(), -i))
    kept, total = torch.zeros_like(probs), 0.0
    for i in order:
        if total >= p and total:
            break
        kept[i] = probs[i]
        total += probs[i].item()
    return kept / kept.sum()


def test_nucleus_solution():
    accepts(check.nucleus, top_p)
    accepts(check.nucleus, rarest_of_equals)
    accepts(check.nucleus, lambda probs, p: undone_by_the_order(probs, p, inverse=True))


def test_nucleus_oracle_is_the_package():
    probs = (1.5 * torch.randn(12)).softmax(0)
    drawn = sample(
        probs.log().expand(4000, -1),
        temperature=1.0,
        top_p=0.7,
        generator=torch.Generator().manual_seed(0),
    )
    assert set(drawn.tolist()) == set(top_p(probs, 0.7).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "says, answer",
    [
        ("at least* p", nucleus_with(keep=lambda total, ordered, p: total <= p)),
        (
            "crosses the line",
            nucleus_with(
                keep=lambda total, ordered, p: (total <= p) | (total == ordered)
            ),
        ),
        ("does not sum to one", nucleus_with(scale=False)),
        ("falling order", nucleus_with(back=False)),
        ("together", nucleus_with(keep=lambda total, ordered, p: ordered >= p)),
        ("begin with the rarest", nucleus_with(falling=False)),
        (
            "keep the tail",
            nucleus_with(keep=lambda total, ordered, p: total - ordered >= p),
        ),
        ("its inverse", lambda probs, p: undone_by_the_order(probs, p)),
        (
            "You apply a softmax",
            lambda probs, p: torch.where(
                top_p(probs, p) > 0, probs, -torch.inf
            ).softmax(0),
        ),
        ("Nothing is cut off", lambda probs, p: probs),
        ("lay it over the old one", sorted_mask),
        ("two of them are enough", by_smallest),
        ("two of them are enough", lambda probs, p: by_smallest(probs, p - 1e-9)),
        ("For p = 0.0 you keep nothing", nothing_for_zero),
        ("the share p of the tokens", top_share),
        ("in place", lambda probs, p: probs.mul_(2)),
        ("is there a `return`", lambda probs, p: None),
        ("nothing here yet", stub),
    ],
)
def test_nucleus_mistakes(says, answer):
    rejects(says, check.nucleus, answer)


# -------------------------------------------------------------------- halves_from_pairs


def halves(weight, heads, a=None, b=None, blocks=None):
    rows, d = weight.shape
    half = rows // heads // 2
    return (
        weight.view(blocks or heads, -1 if blocks else a or half, b or 2, d)
        .transpose(1, 2)
        .reshape(rows, d)
    )


def test_halves_solution():
    accepts(check.halves_from_pairs, halves)


def test_halves_oracle_is_the_rotation():
    """Turning neighbours with the old rows gives the scores that turning halves gives
    with the new ones."""
    config = GPTConfig(hidden_size=16, num_attention_heads=2)
    cos, sin = Rotary(config)(torch.arange(5)[None])
    x, weights = torch.randn(1, 5, 16), torch.randn(2, 16, 16)

    def scores(turn, weights):
        q, k = (turn((x @ w.T).view(1, 5, 2, 8).transpose(1, 2)) for w in weights)
        return q @ k.transpose(-1, -2)

    def neighbours(z):
        a, b, c, s = z[..., ::2], z[..., 1::2], cos[..., :4], sin[..., 4:]
        return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)

    new = [halves(w, 2) for w in weights]
    torch.testing.assert_close(
        scores(neighbours, weights), scores(lambda z: rotate(z, cos, sin), new)
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("the way back", lambda w, heads: halves(w, heads, 2, len(w) // heads // 2)),
        ("over all heads", lambda w, heads: halves(w, heads, blocks=1)),
        ("the columns", lambda w, heads: halves(w.T.contiguous(), 1).T),
        (
            "the other way",
            lambda w, heads: w.view(-1, 2, w.shape[1]).flip(1).reshape(w.shape),
        ),
        (
            "second members first",
            lambda w, heads: halves(
                w.view(-1, 2, w.shape[1]).flip(1).reshape(w.shape), heads
            ),
        ),
        ("as they were", lambda w, heads: w.clone()),
        (
            "whole heads",
            lambda w, heads: w.view(heads, -1, w.shape[1]).flip(0).reshape(w.shape),
        ),
        (
            "the heads come first",
            lambda w, heads: (
                w.view(len(w) // heads // 2, 2, heads, -1)
                .permute(2, 1, 0, 3)
                .reshape(w.shape)
            ),
        ),
        ("in place", lambda w, heads: w.mul_(2)),
        ("is there a `return`", lambda w, heads: None),
        ("nothing here yet", stub),
    ],
)
def test_halves_mistakes(says, answer):
    rejects(says, check.halves_from_pairs, answer)


# ------------------------------------------------------------------------- predict_same

SAME = {
    "a": {
        "positions + 7": "same",
        "norm × 2, q k v / 2": "same",
        "head + c": "same",
        "last token": "same",
        "q × 2, k / 2": "same",
        "gate × 2, up / 2": "other",
        "heads 0 and 1": "same",
        "final norm × 2": "other",
    },
    "b": {
        "positions + 7": "same",
        "norm × 2, q k v / 2": "same",
        "head + c": "same",
        "first token": "other",
        "v × 2, o / 2": "same",
        "up × 2, down / 2": "same",
        "heads 1 and 2": "other",
        "embedding × 2": "other",
    },
}


@pytest.mark.parametrize("form", ["a", "b"])
def test_same_right_answers(form):
    judged = partial(check.predict_same, form=form)
    accepts(judged, SAME[form])
    accepts(judged, dict(reversed(SAME[form].items())))
    accepts(judged, {edit: np.str_(said) for edit, said in SAME[form].items()})


@pytest.mark.parametrize(
    "form, edit, why",
    [
        ("a", "positions + 7", "only distances count"),
        ("a", "norm × 2, q k v / 2", "what q, k and v read"),
        ("a", "head + c", "softmax forgets it"),
        ("a", "last token", "nobody looks ahead"),
        ("a", "q × 2, k / 2", "product of both"),
        ("a", "gate × 2, up / 2", "silu is not linear"),
        ("a", "heads 0 and 1", "the same key-value head"),
        ("a", "final norm × 2", "temperature of one half"),
        ("b", "first token", "sees what came before"),
        ("b", "v × 2, o / 2", "only weighted sums"),
        ("b", "up × 2, down / 2", "down is linear"),
        ("b", "heads 1 and 2", "other keys and values"),
        ("b", "embedding × 2", "as large as before"),
    ],
)
def test_same_mistakes(form, edit, why):
    turned = {"same": "other", "other": "same"}[SAME[form][edit]]
    judged = partial(check.predict_same, form=form)
    rejects(why, judged, SAME[form] | {edit: turned})


def test_same_that_is_no_prediction():
    some = {edit: said for edit, said in SAME["a"].items() if "heads" not in edit}
    rejects("no prediction for 'heads 0 and 1'", check.predict_same, some)
    more = SAME["a"] | {"tokens": "same"}
    rejects("'tokens' is not one of", check.predict_same, more)
    said = SAME["a"] | {"head + c": True}
    rejects('expected "same" or "other", found True', check.predict_same, said)
    rejects("Give a dictionary", check.predict_same, list(SAME["a"]))
    rejects("nothing here yet", check.predict_same, None)


# -------------------------------------------------------------------------- choose_base


def mean(values):
    return sum(values) / len(values)


def bytewise(model, upside_down=False):
    share = model["tokens"] / model["bytes"]
    share = 1 / share if upside_down else share
    return {seed: loss * share for seed, loss in model["loss"].items()}


def chosen(models, unit=bytewise, join=mean, pick=min, judged=bytewise, **settings):
    """The rule; each mistake below changes one of its parts."""
    best = pick(models, key=lambda name: join(unit(models[name]).values()))
    token = min(models, key=lambda name: mean(models[name]["loss"].values()))
    settings = {"loss": True} | settings
    found = compare(judged(models[best]), judged(models[token]), **settings)
    return best, found.verdict


def in_bits(models):
    """In another unit, with numpy, by seed, and a list."""
    unit = {
        name: np.array([loss for _, loss in sorted(model["loss"].items())])
        * model["tokens"]
        / model["bytes"]
        / np.log(2)
        for name, model in models.items()
    }
    best = min(unit, key=lambda name: unit[name].mean())
    token = min(models, key=lambda name: mean(models[name]["loss"].values()))
    return [best, compare(list(unit[best]), list(unit[token]), loss=True).verdict]


def from_perplexity(models):
    models = {
        name: model
        | {"loss": {seed: np.log(x) for seed, x in model["perplexity"].items()}}
        for name, model in models.items()
    }
    return chosen(models)


def per_token(model):
    return model["loss"]


def two_of(models):
    """The losses per byte of the best, and of the best per token; None if it is one."""
    best = min(models, key=lambda name: mean(bytewise(models[name]).values()))
    token = min(models, key=lambda name: mean(models[name]["loss"].values()))
    if best == token:
        return None
    return [list(bytewise(models[name]).values()) for name in (best, token)]


def own_rule(models, ahead):
    pair = two_of(models)
    true = chosen(models)[1]
    if pair is None or true == "ahead":
        return true
    return "ahead" if ahead(*pair) else "not told apart"


def if_all_agree(models):
    return own_rule(models, lambda a, b: all(x < y for x, y in zip(a, b)))


def if_apart(models):
    return own_rule(models, lambda a, b: max(a) < min(b))


def if_two_agree(models):
    return own_rule(models, lambda a, b: sum(x < y for x, y in zip(a, b)) > 2)


def test_choose_base_right_answers():
    accepts(check.choose_base, chosen)
    accepts(check.choose_base, in_bits)
    accepts(partial(check.choose_base, given="perplexity"), from_perplexity)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("compare losses per token", lambda m: chosen(m, unit=per_token)),
        (
            "compare losses per token",
            lambda m: chosen(m, unit=lambda model: bytewise(model, True)),
        ),
        ("One lucky seed", lambda m: chosen(m, join=min)),
        ("You take the worst", lambda m: chosen(m, pick=max)),
        ("compares the losses per token", lambda m: chosen(m, judged=per_token)),
        ("turned round: these are losses", lambda m: chosen(m, loss=False)),
        ("with loss=True", lambda m: (chosen(m)[0], "ahead")),
        ("That all seeds agree", lambda m: (chosen(m)[0], if_all_agree(m))),
        ("That all seeds agree", lambda m: (chosen(m)[0], if_apart(m))),
        ("That all seeds agree", lambda m: (chosen(m)[0], if_two_agree(m))),
        ("verdict is a word", lambda m: (chosen(m)[0], compare([1, 2, 3], [3, 4, 5]))),
        ("by nats a byte it is", lambda m: ("none", "ahead")),
        ("Return two things", lambda m: chosen(m)[0]),
        ("is there a `return`", lambda m: None),
        ("nothing here yet", stub),
    ],
)
def test_choose_base_mistakes(says, answer):
    rejects(says, check.choose_base, answer)


# --------------------------------------------------------------------------- my_decoder


class MyBlock(nn.Module):
    """The solution; each mistake below changes one part of it."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.first = nn.RMSNorm(d)
        self.second = nn.RMSNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def split(self, x):
        B, T, d = x.shape
        qkv = self.qkv(self.first(x)).view(B, T, 3, self.heads, d // self.heads)
        return qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, h) each

    def look(self, q, k, v):
        T = q.shape[-2]
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v

    def attend(self, x):
        y = self.look(*self.split(x))
        return self.o(y.transpose(1, 2).reshape(x.shape))

    def forward(self, x):
        x = x + self.attend(x)
        return x + self.mlp(self.second(x))


class MyDecoder(nn.Module):
    block = MyBlock

    def __init__(self, vocab, d, heads, layers):
        super().__init__()
        self.table = nn.Embedding(vocab, d)
        self.place = nn.Embedding(64, d)
        self.blocks = nn.ModuleList(self.block(d, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)

    def begin(self, ids):
        return self.table(ids) + self.place(torch.arange(ids.shape[1]))

    def forward(self, ids):
        x = self.begin(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def turned(x):
    T, h = x.shape[-2:]
    f = 100.0 ** (-torch.arange(0, h, 2) / h)
    angle = torch.arange(T)[:, None] * f
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class WithRotation(MyBlock):
    def look(self, q, k, v):
        return F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)


class Rotated(MyDecoder):
    block = WithRotation

    def begin(self, ids):
        return self.table(ids)

    def __init__(self, *shape):
        super().__init__(*shape)
        del self.place


class FromZero(MyDecoder):
    """Positions, and what attention writes, start at zero."""

    def __init__(self, *shape):
        super().__init__(*shape)
        nn.init.zeros_(self.place.weight)
        for block in self.blocks:
            nn.init.zeros_(block.o.weight)


class SmallPositions(MyDecoder):
    """They have to grow first."""

    def __init__(self, *shape):
        super().__init__(*shape)
        nn.init.normal_(self.place.weight, std=0.02)


class InOneRow(nn.Module):
    """Block, norm and head in one Sequential: a second layer moves their numbers."""

    def __init__(self, vocab, d, heads, layers):
        super().__init__()
        parts = [WithRotation(d, heads) for _ in range(layers)]
        parts += [nn.LayerNorm(d), nn.Linear(d, vocab)]
        self.all = nn.Sequential(nn.Embedding(vocab, d), *parts)

    def forward(self, ids):
        return self.all(ids)


class TheCourses(nn.Module):
    """The package's own model is a decoder too."""

    def __init__(self, vocab, d, heads, layers):
        super().__init__()
        shape = {
            "hidden_size": d,
            "intermediate_size": 2 * d,
            "num_hidden_layers": layers,
        }
        shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
        self.model = GPT(GPTConfig(vocab_size=vocab, head_dim=d // heads, **shape))

    def forward(self, ids):
        return self.model(input_ids=ids).logits


DECODERS = MyDecoder, Rotated, FromZero, SmallPositions, InOneRow, TheCourses


@pytest.mark.parametrize("answer", DECODERS)
def test_my_decoder_right_answers(answer):
    for verdict in judge(check.my_decoder, answer, variants=1):
        assert verdict, verdict


def decoder(**methods):
    block = {k: v for k, v in methods.items() if k in ("look", "attend", "split")}
    rest = {k: v for k, v in methods.items() if k not in block}
    return type(
        "Mine", (MyDecoder,), {"block": type("Block", (MyBlock,), block), **rest}
    )


def everywhere(self, q, k, v):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def only_before(self, x):
    """Place t sees the places before t, and not itself."""
    y = self.look(*self.split(x)).transpose(1, 2).reshape(x.shape)
    return self.o(F.pad(y, (0, 0, 1, 0))[:, :-1]) - x


def across_rows(self, x):
    return MyBlock.attend(self, x.flatten(0, 1)[None]).view(x.shape)


def softmaxed(self, ids):
    return MyDecoder.forward(self, ids).softmax(-1)


class OneLayer(MyDecoder):
    def __init__(self, vocab, d, heads, layers):
        super().__init__(vocab, d, heads, 1)


def with_block(forward):
    return type(
        "Mine", (MyDecoder,), {"block": type("Block", (MyBlock,), {"forward": forward})}
    )


def replaces(self, x):
    x = self.attend(x)
    return x + self.mlp(self.second(x))


def replaces_the_stream(self, x):
    x = x + self.attend(x)
    return self.mlp(self.second(x))


def norm_outside(self, x):
    x = self.first(x + self.attend(x))
    return self.second(x + self.mlp(x))


class OneHead(MyDecoder):
    def __init__(self, vocab, d, heads, layers):
        super().__init__(vocab, d, 1, layers)


class TwoHeads(MyDecoder):
    def __init__(self, vocab, d, heads, layers):
        super().__init__(vocab, d, 2, layers)


class Idle(MyDecoder):
    def __init__(self, vocab, d, heads, layers):
        super().__init__(vocab, d, heads, layers)
        self.unused = nn.Linear(d, d)


class Blank(nn.Module):
    def __init__(self, vocab, d, heads, layers):
        super().__init__()
        raise NotImplementedError


@pytest.mark.parametrize(
    "says, answer",
    [
        ("sees what comes after it", decoder(look=everywhere)),
        ("does not see its own token", decoder(attend=only_before)),
        ("does not see the place before it", decoder(attend=lambda self, x: 0 * x)),
        ("A row of the batch changes", decoder(attend=across_rows)),
        ("knows no positions", decoder(begin=lambda self, ids: self.table(ids))),
        ("Expected logits of shape", decoder(forward=MyDecoder.begin)),
        ("before the softmax", decoder(forward=softmaxed)),
        (
            "before the softmax",
            decoder(forward=lambda s, i: MyDecoder.forward(s, i).log_softmax(-1)),
        ),
        ("`layers` has no effect", OneLayer),
        ("`heads` has no effect", OneHead),
        ("`heads` has no effect", TwoHeads),
        ("adds nothing", with_block(replaces)),
        ("adds nothing", with_block(replaces_the_stream)),
        ("adds nothing", with_block(norm_outside)),
        ("No gradient reaches unused.weight", Idle),
        (
            "No gradient reaches table.weight",
            decoder(
                begin=lambda s, i: (
                    s.table(i).detach() + s.place(torch.arange(i.shape[1]))
                )
            ),
        ),
        ("is there a `return`", decoder(forward=lambda s, i: None)),
        ("class itself", MyDecoder(12, 16, 2, 1)),
        ("class itself", len),
        ("nothing here yet", Blank),
    ],
)
def test_my_decoder_mistakes(says, answer):
    for verdict in judge(check.my_decoder, answer, variants=1):
        assert not verdict and says in verdict.message, verdict.message


def test_a_decoder_that_learns_nothing_is_not_accepted():
    """It sees all it should, and its logits are too small to learn in the time."""

    class Faint(MyDecoder):
        def forward(self, ids):
            return 1e-3 * super().forward(ids)

    verdict = check.my_decoder(Faint)
    assert not verdict and "not their order" in verdict.message


# ------------------------------------------------------------ what a trial got through


def fifty_at_most(probs, p):
    best = probs.topk(min(50, len(probs))).indices
    kept = top_p(probs, p, scale=False) * torch.zeros_like(probs).index_fill(0, best, 1)
    return kept / kept.sum()


def rounded(total, ordered, p):
    return (100 * (total - ordered)).round() / 100 < p


@pytest.mark.parametrize("answer", [fifty_at_most, nucleus_with(keep=rounded)])
def test_nucleus_of_many_and_of_near_sums(answer):
    for verdict in judge(
        check.nucleus, lambda probs, p: answer(probs, p) if p else top_p(probs, p)
    ):
        assert not verdict


def test_loss_of_one_place():
    def answer(logits, labels):
        number = (labels[:, 1:] != -100).sum()
        return loss(logits, labels) * number / number.clamp(min=2)

    rejects("one place that is asked", check.next_token_loss, answer)


def test_bases_are_paired_by_seed():
    def in_the_order_given(models):
        best, _ = chosen(models)
        token = min(models, key=lambda name: mean(models[name]["loss"].values()))
        pair = [list(bytewise(models[name]).values()) for name in (best, token)]
        return best, compare(*pair, loss=True).verdict

    rejects("belong together", check.choose_base, in_the_order_given)
    rejects("belong together", check.choose_base, lambda m: chosen(m, paired=False))


class OneHead(MyBlock):
    """`heads` counts in the scale alone."""

    def attend(self, x):
        q, k, v = (
            z.transpose(1, 2).flatten(2)[:, None] * (1 if at else self.heads**0.5)
            for at, z in enumerate(self.split(x))
        )
        return self.o(self.look(q, k, v)[:, 0])


def placed(places):
    return decoder(begin=lambda s, i: s.table(i) + s.place(places(i.shape[1])))


class NoMLP(MyBlock):
    def __init__(self, d, heads):
        super().__init__(d, heads)
        del self.mlp, self.second

    def forward(self, x):
        return x + self.attend(self.first(x))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("four times", type("Mine", (MyDecoder,), {"block": OneHead})),
        ("when more tokens follow", placed(lambda n: torch.arange(n).flip(0))),
        ("one 2 places after", placed(lambda n: torch.arange(n) % 2)),
        ("one 16 places after", placed(lambda n: torch.arange(n) % 16)),
        ("index out of range", placed(lambda n: torch.arange(n) * 64 // 63)),
        ("Is there an MLP", type("Mine", (MyDecoder,), {"block": NoMLP})),
    ],
)
def test_places_heads_and_parts_of_a_decoder(says, answer):
    for verdict in judge(check.my_decoder, answer, variants=1):
        assert not verdict and says in verdict.message, verdict.message
