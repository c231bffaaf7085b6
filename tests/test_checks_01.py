"""Chapter 01's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from judging import accepts, judge, rejects

from minipeft.course import check
from minipeft.lm import GPT, GPTConfig
from minipeft.lm.generation import sample
from minipeft.lm.gpt import Rotary, attend, rotate


def stub(*arguments):
    raise NotImplementedError


# ---------------------------------------------------------------------------- count_gpt


def counting(block=0, end=0, square=False, narrow=False, tables=None, blocks=None):
    """The solution, or with one thing wrong: numbers added to each block, in units of
    (d, d², d · wide), or at the end."""

    def count(vocab, d, wide, layers, heads, kv_heads, tied):
        kv = d if square else d // heads if narrow else kv_heads * d // heads
        one = 2 * d * d + 2 * d * kv + 3 * d * wide + 2 * d
        one += {
            "one norm": -d,
            "no norms": -2 * d,
            "no gate": -d * wide,
            "no o": -d * d,
        }.get(block, 0)
        return (
            vocab * d * ((1 if tied else 2) if tables is None else tables)
            + (blocks or layers) * one
            + d
            + end * d
        )

    return count


def test_count_solution():
    accepts(check.count_gpt, counting())


def test_count_oracle_is_the_model():
    for tied in (True, False):
        model = GPT(
            GPTConfig(
                vocab_size=50,
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=tied,
            )
        )
        assert counting()(50, 24, 40, 3, 4, 2, tied) == sum(
            p.numel() for p in model.parameters()
        )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("one and the same", counting(tables=2)),
        ("second table", counting(tables=1)),
        ("last norm", counting(end=-1)),
        ("two norms", counting(block="one norm")),
        ("norms are missing", counting(block="no norms", end=-1)),
        ("take k and v for square", counting(square=True)),
        ("one head wide", counting(narrow=True)),
        ("three matrices", counting(block="no gate")),
        ("o_proj", counting(block="no o")),
        (
            "you count one of them",
            lambda vocab, d, wide, layers, heads, kv_heads, tied: (
                counting()(vocab, d, wide, layers, heads, kv_heads, tied)
                - layers * d * kv_heads * d // heads
            ),
        ),
        (
            "You count biases",
            lambda vocab, d, wide, layers, heads, kv_heads, tied: (
                counting()(vocab, d, wide, layers, heads, kv_heads, tied)
                + layers * (d + 2 * kv_heads * d // heads)
            ),
        ),
        (
            "You count biases",
            lambda vocab, d, wide, layers, heads, kv_heads, tied: (
                counting()(vocab, d, wide, layers, heads, kv_heads, tied)
                + (2 * layers + 1) * d
            ),
        ),
        ("one block", counting(blocks=1)),
        ("embedding is missing", counting(tables=0)),
        ("I count", lambda *shape: 7),
        ("is there a `return`", lambda *shape: None),
        ("nothing here yet", stub),
    ],
)
def test_count_mistakes(says, answer):
    rejects(says, check.count_gpt, answer)


# ---------------------------------------------------------------------------- train_bpe


def bpe(
    weight=lambda words, word: words[word],
    best=max,
    everywhere=True,
    give=lambda merges: merges,
    anew=True,
):
    def train(words, n):
        pieces, merges, pairs = {word: list(word) for word in words}, [], Counter()
        for number in range(n):
            if anew or not number:
                pairs = Counter()
                for word, parts in pieces.items():
                    for pair in zip(parts, parts[1:]):
                        pairs[pair] += weight(words, word)
            else:
                del pairs[merges[-1]]
            merges.append(best(pairs, key=pairs.get))
            for parts in list(pieces.values())[: None if everywhere else 0]:
                i = 0
                while i < len(parts) - 1:
                    if (parts[i], parts[i + 1]) == merges[-1]:
                        parts[i : i + 2] = [parts[i] + parts[i + 1]]
                    i += 1
        return give(merges)

    return train


def first_in_each_word(words, n):
    """Merges a pair only where it stands first in a word."""
    pieces, merges = {word: list(word) for word in words}, []
    for _ in range(n):
        pairs = Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        merges.append(max(pairs, key=pairs.get))
        for parts in pieces.values():
            at = next(
                (
                    i
                    for i, pair in enumerate(zip(parts, parts[1:]))
                    if pair == merges[-1]
                ),
                None,
            )
            if at is not None:
                parts[at : at + 2] = ["".join(merges[-1])]
    return merges


def by_strings(words, n):
    """The usual way with `" ".join` and regular expressions, which is right: spaces on
    both sides of a piece."""
    texts, merges = {word: f" {' '.join(word)} " for word in words}, []
    for _ in range(n):
        pairs = Counter()
        for word, text in texts.items():
            for pair in zip(text.split(), text.split()[1:]):
                pairs[pair] += words[word]
        merges.append(max(pairs, key=pairs.get))
        texts = {
            word: text.replace(f" {' '.join(merges[-1])} ", f" {''.join(merges[-1])} ")
            for word, text in texts.items()
        }
    return merges


def empties(words, n):
    merges = bpe()(words, n)
    words.clear()
    return merges


def test_bpe_solution():
    accepts(check.train_bpe, bpe())
    accepts(check.train_bpe, by_strings)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("count anew each time", bpe(anew=False)),
        ("same pair comes twice", bpe(everywhere=False)),
        ("rarest pair first", bpe(best=min)),
        ("as often as it occurs", bpe(weight=lambda words, word: 1)),
        ("another order", bpe(give=lambda merges: merges[::-1])),
        (
            "not what they become",
            bpe(give=lambda merges: ["".join(pair) for pair in merges]),
        ),
        ("merges are wanted; you give", bpe(give=lambda merges: merges[:2])),
        ("stand twice in a word", first_in_each_word),
        ("stand in no word", bpe(give=lambda merges: [("z", "q"), *merges[1:]])),
        ("You changed `words`", empties),
        ("A list of pairs", bpe(give=lambda merges: 3)),
        ("merge number 4", bpe(give=lambda merges: [*merges[:3], ("abc", "de")])),
        ("is there a `return`", lambda words, n: None),
        ("nothing here yet", stub),
    ],
)
def test_bpe_mistakes(says, answer):
    rejects(says, check.train_bpe, answer)


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


# -------------------------------------------------------------------------- cached_step


def step(
    q,
    k,
    v,
    past_k,
    past_v,
    front=False,
    new=True,
    scale=lambda h: h**-0.5,
    repeat=torch.repeat_interleave,
    dim=-1,
    keep=lambda z, group: z,
    mask=None,
    mix=False,
    seen=slice(None),
):
    k, v = (
        torch.cat((now, past) if front else (past, now), 2) if new else past
        for now, past in ((k, past_k), (v, past_v))
    )
    group = q.shape[1] // k.shape[1]
    many_k, many_v = repeat(k, group, 1)[:, :, seen], repeat(v, group, 1)[:, :, seen]
    scores = q @ many_k.transpose(-1, -2) * scale(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask(scores), -torch.inf)
    return (
        scores.softmax(dim) @ (many_k if mix else many_v),
        keep(k, group),
        keep(v, group),
    )


def changed(**change):
    return lambda *tensors: step(*tensors, **change)


def test_cached_step_solution():
    accepts(check.cached_step, step)


def test_cached_step_oracle_is_the_package():
    q, k, v = torch.randn(2, 4, 1, 6), torch.randn(2, 2, 1, 6), torch.randn(2, 2, 1, 6)
    past_k, past_v = torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6)
    y, k, v = step(q, k, v, past_k, past_v)
    torch.testing.assert_close(y, attend(q, k, v))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("at the front", changed(front=True)),
        ("is missing from the cache", changed(new=False)),
        (
            "the copies are for the computing",
            changed(keep=lambda z, group: z.repeat_interleave(group, 1)),
        ),
        ("scale is missing", changed(scale=lambda h: 1)),
        ("divide by h", changed(scale=lambda h: 1 / h)),
        ("multiply by √h", changed(scale=lambda h: h**0.5)),
        ("wrong dimension", changed(dim=-2)),
        ("not repeat", changed(repeat=lambda z, n, dim: z.repeat(1, n, 1, 1))),
        ("does not see itself", changed(seen=slice(0, -1))),
        (
            "all but the first",
            changed(mask=lambda s: torch.ones_like(s, dtype=torch.bool).triu(1)),
        ),
        ("mix keys and values", changed(mix=True)),
        (
            "the order is y, k, v",
            lambda *tensors: tuple(step(*tensors)[i] for i in (0, 2, 1)),
        ),
        ("Give three things", lambda *tensors: step(*tensors)[0]),
        ("is there a `return`", lambda *tensors: None),
        ("nothing here yet", stub),
    ],
)
def test_cached_step_mistakes(says, answer):
    rejects(says, check.cached_step, answer)


# ------------------------------------------------------------------------------ nucleus


def top_p(
    probs,
    p,
    keep=lambda total, ordered, p: total - ordered < p,
    scale=True,
    back=True,
    falling=True,
):
    ordered, order = probs.sort(descending=falling)
    mask = keep(ordered.cumsum(0), ordered, p)
    result = torch.zeros_like(probs)
    result[order[mask] if back else torch.arange(len(probs))[: mask.sum()]] = ordered[
        mask
    ]
    return result / result.sum() if scale else result


def nucleus_with(**change):
    return lambda probs, p: top_p(probs, p, **change)


def undone_by_the_order(probs, p, inverse=False):
    ordered, order = probs.sort(descending=True)
    kept = ordered * (ordered.cumsum(0) - ordered < p)
    return (kept / kept.sum())[order.argsort() if inverse else order]


def test_nucleus_solution():
    accepts(check.nucleus, top_p)
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
        ("in place", lambda w, heads: w.mul_(2)),
        ("is there a `return`", lambda w, heads: None),
        ("nothing here yet", stub),
    ],
)
def test_halves_mistakes(says, answer):
    rejects(says, check.halves_from_pairs, answer)
