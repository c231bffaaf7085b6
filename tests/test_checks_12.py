"""Chapter 12's checks accept the solution, refuse the blank stub kindly, and name the
mistakes that are plausible."""

import pytest
import torch
import torch.nn.functional as F
from judging import accepts, rejects

from minipeft.course import check


def blank(*args):
    raise NotImplementedError


# -------------------------------------------------------------------------- soft_prompt


def soft_prompt(prompt, x, mask, labels):
    n = len(prompt)
    return (
        torch.cat((prompt.expand(len(x), -1, -1), x), 1),
        F.pad(mask, (n, 0), value=1),
        F.pad(labels, (n, 0), value=-100),
    )


def with_x(join):
    return lambda prompt, x, *rest: (
        join(prompt.expand(len(x), -1, -1), x),
        *soft_prompt(prompt, x, *rest)[1:],
    )


def with_mask(change):
    def answer(prompt, x, mask, labels):
        x, _, labels = soft_prompt(prompt, x, mask, labels)
        return x, change(mask, len(prompt)), labels

    return answer


def with_labels(change):
    return lambda prompt, x, mask, labels: (
        *soft_prompt(prompt, x, mask, labels)[:2],
        change(labels, len(prompt)),
    )


def ones(mask, n):
    return torch.ones(len(mask), n, dtype=mask.dtype)


def test_soft_prompt_solutions():
    accepts(check.soft_prompt, soft_prompt)
    accepts(
        check.soft_prompt,
        lambda prompt, x, mask, labels: (
            torch.cat((prompt[None].repeat(len(x), 1, 1), x), 1),
            torch.cat((torch.ones_like(mask)[:, : len(prompt)], mask), 1),
            torch.cat((labels.new_full((len(x), len(prompt)), -100), labels), 1),
        ),
    )
    accepts(
        check.soft_prompt,
        with_mask(
            lambda mask, n: torch.cat((torch.ones(len(mask), n), mask), 1).bool()
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("stands behind the text", with_x(lambda p, x: torch.cat((x, p), 1))),
        (
            "You add the prompt",
            with_x(
                lambda p, x: torch.cat((x[:, : p.shape[1]] + p, x[:, p.shape[1] :]), 1)
            ),
        ),
        (
            "takes the place of the first tokens",
            with_x(lambda p, x: torch.cat((p, x[:, p.shape[1] :]), 1)),
        ),
        ("reversed order", with_x(lambda p, x: torch.cat((p.flip(1), x), 1))),
        ("lost touch", with_x(lambda p, x: torch.cat((p.detach(), x), 1))),
        ("the shape", with_x(lambda p, x: x[:, 1:])),
        ("mask hides the prompt", with_mask(lambda mask, n: F.pad(mask, (n, 0)))),
        (
            "at the end of the mask",
            with_mask(lambda mask, n: F.pad(mask, (0, n), value=1)),
        ),
        (
            "padding has become visible",
            with_mask(lambda mask, n: torch.ones(len(mask), mask.shape[1] + n)),
        ),
        (
            "repeat the start of the text's mask",
            with_mask(lambda mask, n: torch.cat((mask[:, :n], mask), 1)),
        ),
        ("mask is as long as before", with_mask(lambda mask, n: mask)),
        ("labels are as long as before", with_labels(lambda labels, n: labels)),
        (
            "labels are 0, and 0 is a token",
            with_labels(lambda labels, n: F.pad(labels, (n, 0))),
        ),
        (
            "labels are -1",
            with_labels(lambda labels, n: F.pad(labels, (n, 0), value=-1)),
        ),
        (
            "belong in front",
            with_labels(lambda labels, n: F.pad(labels, (0, n), value=-100)),
        ),
        (
            "repeat the first label",
            with_labels(
                lambda labels, n: torch.cat((labels[:, :1].expand(-1, n), labels), 1)
            ),
        ),
        (
            "cut the labels",
            with_labels(lambda labels, n: F.pad(labels, (n, 0), value=-100)[:, :-n]),
        ),
        (
            "no whole numbers",
            with_labels(
                lambda labels, n: torch.cat(
                    (torch.full((len(labels), n), -100.0), labels), 1
                )
            ),
        ),
        (
            "a new Parameter",
            with_x(
                lambda p, x: torch.cat((torch.nn.Parameter(p.detach().clone()), x), 1)
            ),
        ),
        ("Your x has the shape", with_x(lambda p, x: torch.cat((p[:, :1], x), 1))),
        (
            "Give me three tensors",
            lambda prompt, x, mask, labels: torch.cat(
                (prompt.expand(len(x), -1, -1), x), 1
            ),
        ),
        (
            "same number of dimensions",
            lambda prompt, x, mask, labels: (torch.cat((prompt, x), 1), mask, labels),
        ),
    ],
)
def test_soft_prompt_mistakes(says, answer):
    rejects(says, check.soft_prompt, answer)


# ------------------------------------------------------------------------------- places


def places(mask, n):
    return F.pad(mask, (n, 0), value=1), (mask.cumsum(1) - 1).clamp(min=0) + n


def positions(change):
    return lambda mask, n: (places(mask, n)[0], change(mask, n))


def masks(change):
    return lambda mask, n: (change(mask, n), places(mask, n)[1])


def test_places_solutions():
    accepts(check.places, places)
    accepts(
        check.places,
        lambda mask, n: (
            (wide := F.pad(mask, (n, 0), value=1)),
            (wide.cumsum(1) - 1)[:, n:],
        ),
    )
    accepts(
        check.places,
        lambda mask, n: (
            torch.cat((mask.new_ones(len(mask), n), mask), 1),
            torch.arange(mask.shape[1]) - mask.argmax(1, keepdim=True) + n,
        ),
    )
    accepts(
        check.places,
        positions(lambda mask, n: (mask.cumsum(1) - 1 + n).masked_fill(mask == 0, 1)),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("not shifted: they begin at 0", positions(lambda mask, n: mask.cumsum(1) - 1)),
        (
            "count the padding on the left",
            positions(
                lambda mask, n: n + torch.arange(mask.shape[1]).expand(mask.shape)
            ),
        ),
        (
            "not shifted, and they count padding",
            positions(lambda mask, n: torch.arange(mask.shape[1]).expand(mask.shape)),
        ),
        ("one too high", positions(lambda mask, n: mask.cumsum(1) + n)),
        ("shifted by n twice", positions(lambda mask, n: mask.cumsum(1) - 1 + 2 * n)),
        (
            "those of the text alone",
            positions(lambda mask, n: F.pad(mask, (n, 0), value=1).cumsum(1) - 1),
        ),
        ("should have", positions(lambda mask, n: 3 * mask.cumsum(1) + n)),
        ("one too low", positions(lambda mask, n: mask.cumsum(1) - 2 + n)),
        (
            "take off all padding, on whichever side",
            positions(
                lambda mask, n: (
                    torch.arange(mask.shape[1]) + n - (mask == 0).sum(1, keepdim=True)
                )
            ),
        ),
        (
            "padded by two on the right",
            positions(
                lambda mask, n: (
                    (mask.cumsum(1) - 1 + n) * (mask[:, -1:] * 1.0) + (1 - mask[:, -1:])
                )
            ),
        ),
        ("has the shape", masks(lambda mask, n: F.pad(mask, (n + 1, 0), value=1))),
        ("mask hides the prefix", masks(lambda mask, n: F.pad(mask, (n, 0)))),
        ("at the end of the mask", masks(lambda mask, n: F.pad(mask, (0, n), value=1))),
        (
            "padding has become visible",
            masks(lambda mask, n: torch.ones(len(mask), mask.shape[1] + n)),
        ),
        ("as long as before", masks(lambda mask, n: mask)),
        ("Give me two tensors", lambda mask, n: F.pad(mask, (n, 0), value=1)),
    ],
)
def test_places_mistakes(says, answer):
    rejects(says, check.places, answer)


# --------------------------------------------------------------------- prefix_attention


def prefix_attention(q, k, v, prefix_k, prefix_v):
    T, n = len(q), len(prefix_k)
    scores = q @ torch.cat((prefix_k, k)).T / q.shape[-1] ** 0.5
    mask = torch.cat((torch.ones(T, n), torch.ones(T, T).tril()), 1).bool()
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ torch.cat(
        (prefix_v, v)
    )


def plain(q, k, v):
    return prefix_attention(q, k, v, k[:0], v[:0])


def free(q, k, v):
    return torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v


def masked(mask_of):
    def answer(q, k, v, pk, pv):
        scores = q @ torch.cat((pk, k)).T / q.shape[-1] ** 0.5
        return torch.softmax(
            scores.masked_fill(~mask_of(len(q), len(pk)).bool(), -torch.inf), -1
        ) @ torch.cat((pv, v))

    return answer


def by_the_gate(q, k, v, pk, pv):
    g = prefix_gate(q, k, pk)[:, None]
    return g * free(q, pk, pv) + (1 - g) * plain(q, k, v)


def scores_and_mask(q, k, pk):
    return (
        q @ torch.cat((pk, k)).T / q.shape[-1] ** 0.5,
        torch.cat(
            (torch.ones(len(q), len(pk)), torch.ones(len(q), len(q)).tril()), 1
        ).bool(),
    )


def zeroed(q, k, v, pk, pv):
    scores, mask = scores_and_mask(q, k, pk)
    return torch.softmax(scores * mask, 1) @ torch.cat((pv, v))


def masked_late(q, k, v, pk, pv):
    scores, mask = scores_and_mask(q, k, pk)
    return (torch.softmax(scores, 1) * mask) @ torch.cat((pv, v))


def over_queries(q, k, v, pk, pv):
    scores, mask = scores_and_mask(q, k, pk)
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), 0) @ torch.cat((pv, v))


def behind(keys, values):
    def answer(q, k, v, pk, pv):
        mask = scores_and_mask(q, k, pk)[1]
        scores = q @ torch.cat((k, pk) if keys else (pk, k)).T / q.shape[-1] ** 0.5
        return torch.softmax(scores.masked_fill(~mask, -torch.inf), 1) @ torch.cat(
            (v, pv) if values else (pv, v)
        )

    return answer


def longer(short, long):
    return F.pad(short, (0, 0, 0, len(long) - len(short)))


def with_queries(q, k, v, pk, pv):
    return plain(torch.cat((pk, q)), torch.cat((pk, k)), torch.cat((pv, v)))


def test_prefix_attention_solutions():
    accepts(check.prefix_attention, prefix_attention)
    accepts(check.prefix_attention, by_the_gate)
    accepts(
        check.prefix_attention,
        lambda q, k, v, pk, pv: with_queries(q, k, v, pk, pv)[len(pk) :],
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("prefix is not used", lambda q, k, v, pk, pv: plain(q, k, v)),
        (
            "mask is not causal",
            lambda q, k, v, pk, pv: free(q, torch.cat((pk, k)), torch.cat((pv, v))),
        ),
        ("covers the prefix too", masked(lambda T, n: torch.ones(T, n + T).tril())),
        (
            "Your prefix is causal",
            masked(
                lambda T, n: torch.cat(
                    (torch.ones(T, n).tril(), torch.ones(T, T).tril()), 1
                )
            ),
        ),
        (
            "add the prefix to the keys and values",
            lambda q, k, v, pk, pv: plain(q, k + longer(pk, k), v + longer(pv, v)),
        ),
        (
            "add the prefix to the queries",
            lambda q, k, v, pk, pv: plain(q + longer(pk, q), k, v),
        ),
        (
            "not divided",
            lambda q, k, v, pk, pv: prefix_attention(
                q * q.shape[-1] ** 0.5, k, v, pk, pv
            ),
        ),
        ("swapped", lambda q, k, v, pk, pv: prefix_attention(q, k, v, pv, pk)),
        (
            "add two attentions",
            lambda q, k, v, pk, pv: plain(q, k, v) + free(q, pk, pv),
        ),
        (
            "average two attentions",
            lambda q, k, v, pk, pv: (plain(q, k, v) + free(q, pk, pv)) / 2,
        ),
        ("n rows too many", with_queries),
        (
            "cut off the wrong end",
            lambda q, k, v, pk, pv: with_queries(q, k, v, pk, pv)[: len(q)],
        ),
        ("not in the same order", behind(True, False)),
        ("not in the same order", behind(False, True)),
        ("your mask has it in front", behind(True, True)),
        (
            "divide by h:",
            lambda q, k, v, pk, pv: prefix_attention(
                q / q.shape[-1] ** 0.5, k, v, pk, pv
            ),
        ),
        (
            "root of a number of tokens",
            lambda q, k, v, pk, pv: prefix_attention(
                q * (q.shape[-1] / len(q)) ** 0.5, k, v, pk, pv
            ),
        ),
        ("masked scores to zero", zeroed),
        ("mask after the softmax", masked_late),
        ("runs over the queries", over_queries),
        (
            "the scores (T, n + T)",
            lambda q, k, v, pk, pv: torch.softmax(q @ torch.cat((pk, k)).T, -1) @ v,
        ),
    ],
)
def test_prefix_attention_mistakes(says, answer):
    rejects(says, check.prefix_attention, answer)


# -------------------------------------------------------------------------- prefix_gate


def scores_of(q, k, pk, root=None, masked=True):
    root = q.shape[-1] ** 0.5 if root is None else root
    text = q @ k.T / root
    return q @ pk.T / root, (
        text.masked_fill(~torch.ones_like(text).tril().bool(), -torch.inf)
        if masked
        else text
    )


def share(prefix, text):
    return torch.softmax(torch.cat((prefix, text), 1), 1)[:, : prefix.shape[1]]


def prefix_gate(q, k, pk):
    return share(*scores_of(q, k, pk)).sum(1)


def by_exp(q, k, pk):
    prefix, text = (scores.exp().sum(1) for scores in scores_of(q, k, pk))
    return prefix / (prefix + text)


def by_logsumexp(q, k, pk):
    prefix, text = (scores.logsumexp(1) for scores in scores_of(q, k, pk))
    return torch.sigmoid(prefix - text)


def by_counting(q, k, pk):
    return len(pk) / (len(pk) + torch.arange(1, len(q) + 1, dtype=q.dtype))


def without_exp(q, k, pk):
    prefix, text = scores_of(q, k, pk, masked=False)
    return prefix.sum(1) / (prefix.sum(1) + text.tril().sum(1))


def two_maxima(q, k, pk):
    prefix, text = (
        (scores - scores.amax(1, keepdim=True)).exp().sum(1)
        for scores in scores_of(q, k, pk)
    )
    return prefix / (prefix + text)


def test_prefix_gate_solutions():
    accepts(check.prefix_gate, prefix_gate)
    accepts(check.prefix_gate, lambda q, k, pk: prefix_gate(q, k, pk)[:, None])
    accepts(check.prefix_gate, by_logsumexp)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("not finite", by_exp),
        ("share for each vector", lambda q, k, pk: share(*scores_of(q, k, pk))),
        (
            "That is the ratio",
            lambda q, k, pk: torch.div(*(s.exp().sum(1) for s in scores_of(q, k, pk))),
        ),
        ("share of the text", lambda q, k, pk: 1 - prefix_gate(q, k, pk)),
        (
            "not masked",
            lambda q, k, pk: share(*scores_of(q, k, pk, masked=False)).sum(1),
        ),
        ("not divided", lambda q, k, pk: share(*scores_of(q, k, pk, root=1)).sum(1)),
        ("You count keys", by_counting),
        ("mean over the prefix", lambda q, k, pk: share(*scores_of(q, k, pk)).mean(1)),
        ("before it is divided", lambda q, k, pk: scores_of(q, k, pk)[0].exp().sum(1)),
        ("leave the exp out", without_exp),
        (
            "over the prefix alone",
            lambda q, k, pk: torch.softmax(scores_of(q, k, pk)[0], 1).sum(1),
        ),
        (
            "masked scores to zero",
            lambda q, k, pk: share(
                scores_of(q, k, pk)[0], scores_of(q, k, pk, masked=False)[1].tril()
            ).sum(1),
        ),
        ("one maximum for both", two_maxima),
        (
            "mask the prefix too",
            lambda q, k, pk: share(
                scores_of(q, k, pk)[0].masked_fill(
                    ~torch.ones(len(q), len(pk)).tril().bool(), -torch.inf
                ),
                scores_of(q, k, pk)[1],
            ).sum(1),
        ),
    ],
)
def test_prefix_gate_mistakes(says, answer):
    rejects(says, check.prefix_gate, answer)


# ------------------------------------------------------------------------ count_virtual


def count_virtual(kind, n, layers, width, heads, kv_heads):
    return (
        n * width if kind == "prompt" else 2 * layers * n * (width // heads * kv_heads)
    )


def either(prompt=count_virtual, prefix=count_virtual):
    return lambda kind, *sizes: (prompt if kind == "prompt" else prefix)(kind, *sizes)


def test_count_virtual_solution():
    accepts(check.count_virtual, count_virtual)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("is there a `return`", lambda *sizes: None),
        (
            "has no part in the layers",
            either(prompt=lambda kind, n, layers, width, heads, kv: layers * n * width),
        ),
        (
            "That is a prefix's count",
            either(prompt=lambda kind, *sizes: count_virtual("prefix", *sizes)),
        ),
        (
            "a prompt has neither",
            either(prompt=lambda kind, n, layers, width, heads, kv: 2 * n * width),
        ),
        (
            "That is one vector",
            either(prompt=lambda kind, n, layers, width, heads, kv: width),
        ),
        (
            "as wide as the model, not",
            either(prompt=lambda kind, n, l, width, heads, kv: n * width // heads * kv),
        ),
        (
            "keys and values to be as wide",
            either(
                prefix=lambda kind, n, layers, width, heads, kv: 2 * layers * n * width
            ),
        ),
        (
            "a factor of 2",
            either(prefix=lambda kind, *sizes: count_virtual("prefix", *sizes) // 2),
        ),
        (
            "one layer's prefix",
            either(
                prefix=lambda kind, n, layers, *sizes: count_virtual(
                    "prefix", n, 1, *sizes
                )
            ),
        ),
        (
            "for one token",
            either(prefix=lambda kind, n, *sizes: count_virtual("prefix", 1, *sizes)),
        ),
        (
            "one head's keys",
            either(
                prefix=lambda kind, n, layers, width, heads, kv: (
                    2 * layers * n * (width // heads)
                )
            ),
        ),
        (
            "That is a prompt's count",
            either(prefix=lambda kind, *sizes: count_virtual("prompt", *sizes)),
        ),
        (
            "I count",
            either(prefix=lambda kind, *sizes: count_virtual("prefix", *sizes) + 1),
        ),
    ],
)
def test_count_virtual_mistakes(says, answer):
    rejects(says, check.count_virtual, answer)
