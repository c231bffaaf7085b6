"""Chapter 12, prompts and prefixes: a soft prompt and a prefix's places repaired, the
gate predicted and computed, a search over rates that has to go on, and a prompt of low
rank."""

import math
import random

import torch

from ...config import PeftConfig
from ...lm import GPT, GPTConfig
from ...model import get_peft_model
from ...slot import Adapter, Base
from ..comparison import compare as told_apart
from .kinds import TRAPS, Choices, by_one_look, trap
from .practice import copy_stands_alone, numbers, without_seeding
from .sandbox import unwatched
from .slips import Formula
from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "low_rank_prompt",
    "places",
    "predict_gate",
    "prefix_gate",
    "search_on",
    "soft_prompt",
]


def sizes():
    """n, T, d: all different."""
    return random.choice([2, 3]), random.choice([5, 6]), random.choice([8, 12])


@checks(
    "The prompt stands before every row, the mask sees it, the loss does not; and"
    " gradients reach it.",
    "prompt is (n, d), x is (B, T, d): give the prompt a row for each row of the batch,"
    " then join along dimension 1.",
)
def soft_prompt(function) -> None:
    """function(prompt, x, mask, labels) -> (x, mask, labels), each longer by n."""
    n, T, d = sizes()
    for B, length in ((4, n), (1, n + 1), (2, T + 2)):  # one longer than the text
        one_prompt(function, B, length, T, d)


def one_prompt(function, B, n, T, d):
    prompt = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    x = torch.randn(B, T, d, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(B, T, dtype=torch.long)
    # padding on the right in one row, on the left in another
    mask[0, -2:] = mask[1:2, :1] = 0
    labels = torch.randint(1, 90, (B, T))
    labels[:, 2] = 0  # a token, too
    labels.masked_fill_(mask == 0, -100)
    got = function(prompt, x, mask, labels)
    need(
        isinstance(got, (tuple, list)) and len(got) == 3,
        "Give me three tensors: return x, mask, labels.",
    )
    each = prompt.expand(B, -1, -1)
    new_x, new_mask, new_labels = got
    compare(new_x, torch.cat((each, x), 1), slips_of_x(each, x), "Your x")
    compare(
        as_numbers(new_mask),
        torch.cat((torch.ones(B, n), mask), 1),
        slips_of_mask(mask, labels, n),
        "Your mask",
    )
    whole_numbers(new_mask, "mask")
    compare(
        as_numbers(new_labels),
        torch.cat((torch.full((B, n), -100), labels), 1),
        slips_of_labels(labels, n),
        "Your labels",
    )
    need(
        not new_labels.is_floating_point(),
        "Your labels are no whole numbers any more (torch.full with -100.0?): the loss "
        "wants token ids.",
    )
    with torch.no_grad():
        again = unwatched(function)(prompt, x, mask, labels)
        need(
            same(again[0], torch.cat((each, x), 1)),
            "Under torch.no_grad(), as in evaluation, your x is another one.",
        )


def slips_of_x(each, x) -> dict:
    """each: the prompt, for each row (B, n, d)."""
    n, T = each.shape[1], x.shape[1]
    return {
        "Your prompt stands behind the text. Tokens see only what comes before"
        " them: so nothing would see it.": torch.cat((x, each), 1),
        "You add the prompt to the embeddings. A prompt is put in front of them:"
        " the sequence becomes longer.": (
            torch.cat((each[:, :T] + x[:, :n], x[:, n:]), 1)
        ),
        "The prompt takes the place of the first tokens: they must stay, behind"
        " it.": torch.cat((each, x[:, n:]), 1),
        "The prompt's vectors come in reversed order.": (
            torch.cat((each.flip(1), x), 1)
        ),
    }


def slips_of_mask(mask, labels, n) -> dict:
    """Of a soft prompt's."""
    B, T = mask.shape
    ones, zeros = torch.ones(B, n), torch.zeros(B, n)
    return {
        "Your mask hides the prompt: 1 means that a place is seen.": (
            torch.cat((zeros, mask), 1)
        ),
        "The ones for the prompt are at the end of the mask; the prompt is in"
        " front.": torch.cat((mask, ones), 1),
        "Your mask is 1 everywhere: the padding has become visible.": (
            torch.ones(B, n + T)
        ),
        "You repeat the start of the text's mask for the prompt. Where a row is"
        " padded on the left, that hides the prompt.": (
            torch.cat((mask[:, :n], mask), 1)
        ),
        "Your mask is as long as before: it needs a place for every virtual"
        " token.": mask,
        "Mask and labels are swapped: return x, mask, labels.": (
            torch.cat((torch.full((B, n), -100), labels), 1)
        ),
    }


def slips_of_labels(labels, n) -> dict:
    B, T = labels.shape
    ones, zeros = torch.ones(B, n), torch.zeros(B, n)
    no_loss = torch.full((B, n), -100)
    return {
        "Your labels are as long as before. The logits have n places more: each"
        " label would judge another place.": labels,
        "The prompt's labels are 0, and 0 is a token: the prompt would be trained"
        " to be followed by it. No loss is -100.": torch.cat((zeros, labels), 1),
        "The prompt's labels are -1. The loss skips -100, and nothing else.": (
            torch.cat((-ones, labels), 1)
        ),
        "The labels of the prompt belong in front, where the prompt is.": (
            torch.cat((labels, no_loss), 1)
        ),
        "You repeat the first label for the prompt: then it is trained to say the"
        " first token n times.": torch.cat((labels[:, :1].expand(-1, n), labels), 1),
        "You cut the labels to the old length: the last tokens' losses are lost,"
        " and all others have moved.": torch.cat((no_loss, labels), 1)[:, :T],
    }


def whole_numbers(tensor, what: str) -> None:
    need(
        not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point(),
        f"Your {what}: found floating-point numbers, expected integers.",
    )


def as_numbers(tensor):
    return tensor.float() if isinstance(tensor, torch.Tensor) else tensor


@checks(
    "Mask and positions are right, with padding on either side: the text stands n"
    " places further, and padding stays hidden.",
    "The mask becomes (B, n + T); the positions are those of the text alone, (B, T).",
)
def places(function) -> None:
    """function(mask, n) -> (mask (B, n + T), position_ids (B, T)); n: of the prefix."""
    n, T, _ = sizes()
    for tokens, prefix in ((T, n), (T, n + 3), (300, n)):  # more than 8 bits can count
        one_batch(function, prefix, tokens)
    one_batch(function, n, T, rows=1)  # with padding, too


def one_batch(function, n, T, rows=3):
    mask = torch.ones(3, T, dtype=torch.long)
    mask[0, :2], mask[1, -2:] = 0, 0
    mask = mask[:rows]
    got = function(mask.clone(), n)
    need(
        isinstance(got, (tuple, list)) and len(got) == 2,
        "Give me two tensors: return mask, position_ids.",
    )
    ones = torch.ones(rows, n)
    compare(
        as_numbers(got[0]),
        torch.cat((ones, mask), 1),
        {
            "Your mask hides the prefix: 1 means that a place is seen.": torch.cat(
                (torch.zeros(rows, n), mask), 1
            ),
            "The ones for the prefix are at the end of the mask; the prefix stands in"
            " front.": torch.cat((mask, ones), 1),
            "Your mask is 1 everywhere: the padding has become visible.": torch.ones(
                rows, n + T
            ),
            "Your mask is as long as before: the keys of the prefix need their places"
            " in it.": mask,
        },
        "Your mask",
    )
    whole_numbers(got[0], "mask")
    look_at_positions(got[1], mask, n)


def look_at_positions(positions, mask, n) -> None:
    """Where the text's real tokens stand: what stands at padding is nobody's
    business."""
    B, T = mask.shape
    need(
        isinstance(positions, torch.Tensor), "The positions should be a tensor (B, T)."
    )
    need(
        tuple(positions.shape) != (B, n + T),
        "The positions are those of the text alone, (B, T): the prefix is in "
        "the cache already, and asks for none.",
    )
    need(
        positions.shape == mask.shape,
        f"The positions have the shape {tuple(positions.shape)}; it should "
        f"be ({B}, {T}).",
    )
    real, right = mask.bool(), mask.cumsum(1) - 1 + n
    off = [
        row
        for row in range(B)
        if not same(positions[row].float()[real[row]], right[row].float()[real[row]])
    ]
    if off:
        for message, wrong in slips_of_positions(mask, n).items():
            need(not same(positions.float()[real], wrong.float()[real]), message)
        side = (
            "padded by two on the left",
            "padded by two on the right",
            "without padding",
        )[off[0]]
        raise Wrong(
            f"For a row {side} and n = {n} you give {shown(positions[off[0]])}; its"
            f" real tokens should have {shown(right[off[0]][real[off[0]]])}."
        )
    whole_numbers(positions, "positions")


def slips_of_positions(mask, n) -> dict:
    B, T = mask.shape
    right, along = mask.cumsum(1) - 1 + n, torch.arange(T).expand(B, -1)
    return {
        "Your positions are not shifted: they begin at 0, but n places are taken by"
        " the prefix. They begin at n.": right - n,
        "Your positions count the padding on the left: a row's first real token"
        " should stand at n, however much padding is before it.": along + n,
        "Your positions are not shifted, and they count padding too: the first real"
        " token of each row stands at n.": along,
        "Your positions are one too high: the first real token stands at n, not at n"
        " + 1.": right + 1,
        "Your positions are one too low: the first real token stands at n, not at n -"
        " 1.": right - 1,
        "Your positions are shifted by n twice.": right + n,
        "You take off all padding, on whichever side. Only what stands before a word"
        " moves it: padding on the right does not.": (
            along + n - (1 - mask).sum(1, keepdim=True)
        ),
    }


def shown(positions) -> str:
    """A row of numbers; of a long one its ends."""
    row = [str(number) for number in positions.tolist()]
    row = row if len(row) < 20 else [*row[:3], "…", *row[-3:]]
    return f"[{', '.join(row)}]"


def gate(q, k, prefix_k):
    past = torch.ones(len(q), len(q)).tril().bool()
    text = (q @ k.T / q.shape[1] ** 0.5).masked_fill(~past, -torch.inf)
    prefix = q @ prefix_k.T / q.shape[1] ** 0.5
    return torch.sigmoid(prefix.logsumexp(1) - text.logsumexp(1))


@checks(
    "This is the gate: each token's share of attention that falls on the prefix. It"
    " lies between 0 and 1 and depends on the token's query.",
    "The gate is one number a token: (T,).",
)
def prefix_gate(function) -> None:
    """function(q, k, prefix_k) -> (T,): the share of each token's softmax that falls on
    the prefix."""
    for large in (False, True, "negative", "one token"):
        n, T, h = sizes()
        if large == "one token":
            large, n, T = False, 5, 1
        size = 90 if large else 1
        q, k, pk = (torch.randn(rows, h).double() * size for rows in (T, T, n))
        if large == "negative":  # all scores are far below zero
            q, k, pk = q.abs(), -k.abs(), -(k[:1].abs() + 0.01 * pk / size)
        for each in (q, k, pk):
            each.requires_grad_(not large)
        one_gate(function, q, k, pk, large)


def one_gate(function, q, k, pk, large) -> None:
    """large: whether the scores are so large that exp overflows, or far below zero."""
    T, n = len(q), len(pk)
    right = share_on(*scores_on(q, k, pk))
    got = function(q, k, pk)
    if isinstance(got, torch.Tensor) and got.shape == (T, 1):
        got = got[:, 0]
    need(
        not (large and isinstance(got, torch.Tensor) and not got.isfinite().all()),
        "With large scores your gate is not finite: exp overflows. torch.softmax,"
        " or torch.logsumexp, takes care of that.",
    )
    need(
        not (isinstance(got, torch.Tensor) and got.shape == (T, n)),
        "You give a share for each vector of the prefix: the gate is their sum, one"
        " number a token.",
    )
    slips = {}
    if not large:
        slips = slips_of_scores(q, k, pk) | slips_of_share(q, k, pk)
    compare(got, right, slips, "Your gate", formula=Formula(gate, q, k, pk))


def scores_of(q, keys, scale, mask=None):
    scores = q @ keys.T / scale
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def share_on(prefix, text):
    """Each token's share of a softmax over both that falls on the prefix."""
    return torch.softmax(torch.cat((prefix, text), 1), 1)[:, : prefix.shape[1]].sum(1)


def scores_on(q, k, pk):
    """The scores of prefix and text, divided by √h, and no token sees a later one."""
    T, h = q.shape
    past = torch.ones(T, T).tril().bool()
    return scores_of(q, pk, h**0.5), scores_of(q, k, h**0.5, past)


def slips_of_scores(q, k, pk) -> dict:
    """Of the mask, and of what the scores are divided by."""
    (T, h), n = q.shape, len(pk)
    past = torch.ones(T, T).tril().bool()
    on_prefix, on_text = scores_on(q, k, pk)
    all_text = scores_of(q, k, h**0.5)

    def masked_by(mask):
        return share_on(on_prefix, scores_of(q, k, h**0.5, mask))

    def divided_by(scale):
        return share_on(scores_of(q, pk, scale), scores_of(q, k, scale, past))

    return {
        "The text's scores are not masked: each token would see those after it.": (
            share_on(on_prefix, all_text)
        ),
        "The scores are not divided by √h.": divided_by(1),
        "The scores are divided by h: √h is asked for.": divided_by(h),
        "The scores are divided by the root of the text's length: it is √h.": (
            divided_by(T**0.5)
        ),
        "A token sees itself: the mask keeps its diagonal.": masked_by(past.tril(-1)),
        "The mask is turned round: a token sees what comes before it.": (
            masked_by(past.T)
        ),
        "You set the masked scores to zero. A score of zero still gets a share, as e⁰ ="
        " 1: masked scores are -inf.": share_on(on_prefix, all_text.tril()),
        "You mask the prefix too: all of it is past for every token.": share_on(
            on_prefix.masked_fill(~torch.ones(T, n).tril().bool(), -torch.inf), on_text
        ),
    }


def slips_of_share(q, k, pk) -> dict:
    """Of how a share is made of right scores."""
    (T, h), n = q.shape, len(pk)
    on_prefix, on_text = scores_on(q, k, pk)
    right = share_on(on_prefix, on_text)

    def own_maximum(*scores):
        prefix, text = (
            (each - each.max(1, keepdim=True).values).exp().sum(1) for each in scores
        )
        return prefix / (prefix + text)

    return {
        "That is the ratio of the prefix's mass to the text's. A share is prefix /"
        " (prefix + text).": on_prefix.exp().sum(1) / on_text.exp().sum(1),
        "That is the share of the text, 1 - g.": 1 - right,
        "You compare the largest scores: the gate compares sums of e^score.": (
            torch.sigmoid(on_prefix.amax(1) - on_text.amax(1))
        ),
        "You sum the prefix over all tokens: each token has its own gate.": (
            torch.sigmoid(on_prefix.logsumexp((0, 1)) - on_text.logsumexp(1))
        ),
        "Your softmax runs over the tokens: it runs over the keys.": (
            torch.softmax(torch.cat((on_prefix, on_text), 1), 0)[:, :n].sum(1)
        ),
        "You count keys, n / (n + those seen). The gate depends on the scores: it is a"
        " share of the softmax.": (
            n / (n + torch.arange(1, T + 1, dtype=torch.float64))
        ),
        "That is the mean over the prefix's vectors: the gate is their sum.": right / n,
        "That is the prefix's mass, before it is divided by the whole.": (
            on_prefix.exp().sum(1)
        ),
        "You leave the exp out: the softmax is made of exponentials of the scores.": (
            on_prefix.sum(1)
            / (on_prefix.sum(1) + scores_of(q, k, h**0.5).tril().sum(1))
        ),
        "That is 1 for everybody: you take the softmax over the prefix alone. It runs"
        " over prefix and text together.": torch.ones(T, dtype=torch.float64),
        "You subtract from the prefix's scores their own maximum, and from the text's"
        " another: then the two no longer compare. It must be one maximum for both.": (
            own_maximum(on_prefix, on_text)
        ),
    }


# ---- the gate, predicted -------------------------------------------------------------


def gate_cases(n, T):
    """{case: (what the gate is by simulation, why)} for one query, a prefix of n keys
    and a text of T."""
    zero, two = torch.zeros(n), torch.full((n,), 2.0)
    text = torch.zeros(T)
    many = torch.randn(10_000 * n, dtype=torch.float64)
    plenty = torch.zeros(10_000 * T, dtype=torch.float64)
    return {
        "zero keys": (
            share_of(zero, text),
            "a score of zero gets a share like any other: count the keys",
        ),
        "score 2": (
            share_of(two, text),
            f"the weights are e² for each of {n} keys, and e⁰ = 1 for each of {T}",
        ),
        "all up by 3": (
            share_of(two + 3, text + 3),
            "a softmax does not see what is added to all scores alike",
        ),
        "query doubled": (
            share_of(2 * two, 2 * text),
            "twice the query is twice each score: e⁴ and e⁰",
        ),
        "stands twice": (
            share_of(torch.cat((zero, zero)), text),
            f"equal vectors each get a share: {2 * n} keys beside {T}",
        ),
        "spread": (
            share_of(many, plenty),
            "the mean of e^s is not e^(mean of s): for s of N(0, 1) it is e^(1/2)",
        ),
        "what is left": (
            1 - share_of(zero, text),
            "all that is read from the text is weakened by 1 - g",
        ),
    }


def share_of(prefix, text):
    """The share of a softmax over both scores that falls on `prefix`."""
    return torch.softmax(torch.cat((prefix, text)), 0)[: len(prefix)].sum().item()


@checks(
    "All seven, within a hundredth or two. The gate counts keys, weighed by e^score;"
    " what all scores have in common it does not see."
)
def predict_gate(predicted, n=10, T=30) -> None:
    """predicted: {case: number}; n keys in the prefix, T in the text."""
    cases = gate_cases(n, T)
    said = numbers(predicted, cases)
    for case, (true, why) in cases.items():
        got = said[case]
        need(
            0 <= got <= 1,
            f"{case!r}: a share lies between 0 and 1; yours is {got:.3g}.",
        )
        need(
            abs(got - true) <= 0.02,
            f"{case!r}: {got:.3g} is too {'large' if got > true else 'small'}. Think of"
            f" this: {why}.",
        )


# ---- a search over rates -------------------------------------------------------------

LADDER = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SEARCHES = {  # for each rate of a ladder, the mean loss; noise: how far seeds differ
    "done": ((0.9, 0.6, 0.2, 0.5, 0.8), 0.005),
    "best at the top": ((0.9, 0.8, 0.6, 0.4, 0.2), 0.005),
    "best at the bottom": ((0.2, 0.4, 0.5, 0.7, 0.9), 0.005),
    "neighbour not told apart": ((0.9, 0.7, 0.6, 0.2, 0.21), 0.03),
    "told apart further on": ((0.9, 0.7, 0.2, 0.21, 0.8), 0.03),
    "diverges above": ((0.9, 0.7, 0.5, 0.2, math.nan), 0.005),
    "one seed diverges": ((0.9, 0.7, 0.5, 0.2, 0.1), 0.005),
    "noisy, and diverges before": ((0.9, 0.7, 0.2, math.nan, 0.48), 0.005),
    "one lucky seed": ((0.9, 0.5, 0.2, 0.3, 0.9), 0.005),
    "noisy above": ((0.9, 0.7, 0.6, 0.2, 0.48), 0.005),
    "noisy end": ((0.9, 0.7, 0.2, 0.5, 0.48), 0.005),
    "one rate": ((0.4,), 0.01),
}
SEARCHES |= {kind: ((0.9, 0.5, 0.2, 0.21, 0.9), 0.005) for kind in TRAPS}


def ladder_of(kind):
    """{rate: [a loss a seed]}, in any order; nan where a run has diverged."""
    means, noise = SEARCHES[kind]
    pattern = [1.0, -0.4, -0.6] if random.random() < 0.5 else [-0.7, 1.0, -0.3]
    losses = {}
    for at, mean in enumerate(means):
        signs = pattern if at % 2 else pattern[::-1]
        losses[LADDER[at]] = [mean + noise * sign for sign in signs]
    if kind == "one seed diverges":
        losses[LADDER[4]][random.randrange(3)] = math.nan
    if kind == "one lucky seed":
        losses[LADDER[3]] = [0.05, 0.5, 0.5]
    if kind.startswith("noisy"):  # not told apart from the best
        losses[LADDER[4]] = [0.24, 0.9, 0.3]
    if kind in TRAPS:
        losses[LADDER[2]], losses[LADDER[3]] = trap(kind, 0.2, 0.02)
    order = sorted(losses, key=lambda rate: random.random())
    if kind == "diverges above":  # min() keeps a nan that comes first
        order = sorted(losses, reverse=True)
    return {rate: losses[rate] for rate in order}


def diverged(losses):
    return any(not math.isfinite(loss) for loss in losses)


def mean_of(losses):
    return sum(losses) / len(losses)


def means_of(losses):
    return {rate: mean_of(each) for rate, each in losses.items() if not diverged(each)}


def open_sides(losses, best, worse):
    """The sides on which no rate is worse(rate) than the best."""
    below = [rate for rate in losses if rate < best]
    above = [rate for rate in losses if rate > best]
    sides = {"smaller": below, "larger": above}
    return {name for name, rates in sides.items() if not any(map(worse, rates))}


def next_to(losses, best):
    rates = sorted(losses)
    at = rates.index(best)
    return rates[max(at - 1, 0) : at] + rates[at + 1 : at + 2]


@checks(
    "The best rate by all seeds, and a search that ends only where something worse"
    " than the best, by the course's rule, stands on either side."
)
def search_on(function, asked="open") -> None:
    """function(losses) -> (rate, sides), sides a set of "smaller" and "larger".
    asked: "open" for the sides on which to go on, "done" for the others."""
    rates, ends = Choices(), Choices()
    for kind in SEARCHES:
        losses = ladder_of(kind)
        given = {rate: list(each) for rate, each in losses.items()}
        got = function(given)
        need(got is not None, "Your function gives None: is there a `return`?")
        need(
            isinstance(got, (tuple, list)) and len(got) == 2,
            f"Return two things, the rate and the sides; you return {got!r}.",
        )
        a_rate(got[0], losses, rates)
        some_sides(got[1], losses, asked, ends)
    rates.judge()
    ends.judge()


def a_rate(rate, losses, rates) -> None:
    means = means_of(losses)
    best = min(means, key=means.get)
    need(
        isinstance(rate, int | float) and rate in losses,
        f"The rate should be one of {sorted(losses)}; yours is {rate!r}.",
    )
    slips = by_one_look({rate: each for rate, each in losses.items() if rate in means})
    slips["You take the largest mean: these are losses."] = max(means, key=means.get)
    said = f"By the mean over seeds the rate is {best:g}; you say {rate}."
    if diverged(losses[rate]):
        said = (
            "You choose a rate of which a seed has diverged (nan). Comparisons with nan"
            " are all false, so min() may keep it; and a mean without that seed is too"
            " good."
        )
    rates.add(rate, best, slips, said)


def some_sides(sides, losses, asked, ends) -> None:
    need(
        isinstance(sides, (set, frozenset, list, tuple))
        and all(isinstance(side, str) for side in sides)
        and {*sides} <= {"smaller", "larger"},
        'The sides are a set of "smaller" and "larger", perhaps empty; yours is'
        f" {sides!r}.",
    )
    both = {"smaller", "larger"}
    means = means_of(losses)
    best = min(means, key=means.get)
    found = {*sides} if asked == "open" else both - {*sides}

    def really(rate):
        result = told_apart(losses[best], losses[rate], loss=True)
        return diverged(losses[rate]) or result.verdict == "ahead"

    right = open_sides(losses, best, really)
    slips = slips_of_sides(losses, best, really, right, asked)
    seen = {rate: [round(loss, 3) for loss in losses[rate]] for rate in sorted(losses)}
    verb = "the search has to go on at" if asked == "open" else "it is done at"
    named = right if asked == "open" else both - right
    ends.add(
        found,
        right,
        slips,
        f"Of {seen} you say {sorted(sides)}; {verb}"
        f" {' and '.join(sorted(named)) or 'neither side'}.",
    )


def slips_of_sides(losses, best, really, right, asked) -> dict:
    """really(rate): whether it is really worse than the best. right: the open sides."""
    near = next_to(losses, best)
    ends = min(losses), max(losses)
    wide = 1.1 * mean_of(losses[best])
    other = {"smaller": "larger", "larger": "smaller"}
    return {
        "You stop where a rate has been tried on either side. Its loss may be higher by"
        " chance: is it really worse? Ask `compare`.": open_sides(
            losses, best, lambda rate: True
        ),
        "You look at the next rate alone. If that one is not told apart from the best,"
        " one further on may be.": open_sides(
            losses, best, lambda rate: rate in near and really(rate)
        ),
        "You look at the last rate of a side alone: any rate on it may be the one that"
        " is really worse.": open_sides(
            losses, best, lambda rate: rate in ends and really(rate)
        ),
        "A mean that is higher is not really worse: ask `compare`.": open_sides(
            losses,
            best,
            lambda rate: diverged(losses[rate]) or mean_of(losses[rate]) > wide,
        ),
        "A rate at which a seed diverged is worse than the best: no need to search"
        " beyond it.": open_sides(
            losses, best, lambda rate: not diverged(losses[rate]) and really(rate)
        ),
        "The sides are turned round: a side is done where something worse stands.": {
            other[side] for side in right
        },
        "You name the sides that are done: name those on which to go on."
        if asked == "open"
        else "You name the sides on which to go on: name those that are done.": (
            other.keys() - right
        ),
    }


# ---- a prompt of low rank ------------------------------------------------------------


def small_model():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return GPT(GPTConfig(vocab_size=40, **shape, **heads)).double()


def around(model, adapter_class, start, r):
    """`model` with the learner's adapter around it, in 64 bits."""

    class Configured(PeftConfig):
        def create(self, base, path):
            return adapter_class(start, r)

    return get_peft_model(model, Configured()).double()


def padded_batch():
    """ids, mask, labels (3, T): a row padded on the left, one on the right."""
    T = random.choice([6, 7])
    ids = torch.randint(1, 40, (3, T))
    mask = torch.ones(3, T, dtype=torch.long)
    mask[0, :2] = mask[1, -2:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def read_with(
    model, P, ids, mask, labels, behind=False, value=1, no_loss=-100, mask_behind=None
):
    """(logits at real places of the text, loss) of the text with P in front."""
    x = model.get_input_embeddings()(ids)
    each = P.expand(len(x), -1, -1)
    n = len(P)
    pad = torch.nn.functional.pad
    sides = (0, n) if behind else (n, 0)
    mask_sides = sides if mask_behind is None else (0, n) if mask_behind else (n, 0)
    out = model(
        inputs_embeds=torch.cat((x, each) if behind else (each, x), 1),
        attention_mask=pad(mask, mask_sides, value=value),
        labels=pad(labels, sides, value=no_loss),
    )
    return out.logits[:, :-n] if behind else out.logits[:, n:], out.loss


@checks(
    "The prompt starts as the words, r (n + d) parameters change it, mask and labels"
    " know of it, and gradients reach both factors.",
    "start is (n, d), A (n, r), B (r, d), the embeddings (B, T, d).",
)
def low_rank_prompt(adapter_class) -> None:
    """adapter_class(start, r), an Adapter with the Parameters A (n, r) and B (r, d)."""
    need(
        isinstance(adapter_class, type) and issubclass(adapter_class, Adapter),
        "Give me the class itself, a subclass of Adapter.",
    )
    for r in (2, 3):
        one_low_rank(adapter_class, random.choice([3, 4]), r)


def one_low_rank(adapter_class, n, r):
    d = 16
    start = torch.randn(n, d, dtype=torch.float64)
    given = start.clone()
    model = without_seeding(lambda: around(small_model(), adapter_class, given, r))
    need(
        torch.equal(given, start),
        "You change `start` in place: leave it as it is, and keep a copy or itself.",
    )
    adapter = model.base_model.adapters["default"]
    look_at_factors(adapter, start, r)
    batch = padded_batch()
    base = model.get_base_model()
    with torch.no_grad():
        need(
            not (adapter.A @ adapter.B).any(),
            "At the start the prompt is not the words in `start`: A B must be zero"
            " then, so that P = start.",
        )
        adapter.A.normal_()
        adapter.B.normal_()
    compare_prompts(model, adapter, base, start, batch)
    look_at_other_calls(model, adapter, base, start, batch)


@torch.no_grad()
def look_at_other_calls(model, adapter, base, start, batch):
    """In evaluation, with labels alone, with positions, through `base`, in a copy."""
    ids, mask, labels = batch
    n, (B, T) = len(start), ids.shape
    for mode in ("train", "eval"):
        model.train(mode == "train")
        for name in "AB":
            getattr(adapter, name).normal_()
            P = start + adapter.A @ adapter.B
            logits, loss = read_with(base, P, *batch)
            out = run(model, *batch)
            need(
                same(out.logits[:, n:], logits)
                and out.loss is not None
                and same(out.loss, loss),
                f"After model.{mode}() under torch.no_grad() the prompt does not follow"
                f" a change of {name}, or mask and labels are treated in another way.",
            )
    out = model(input_ids=ids, labels=ids)
    need(
        out.loss is not None
        and same(out.loss, read_with(base, P, ids, torch.ones_like(mask), ids)[1]),
        "With labels and without a mask the loss is wrong: each of the two may be None"
        " alone.",
    )
    places = torch.arange(n + T).expand(B, -1) + 3 * torch.arange(n + T)
    given = dict(input_ids=ids, position_ids=places)
    each = torch.cat((P.expand(B, -1, -1), base.get_input_embeddings()(ids)), 1)
    need(
        same(
            model(**given).logits, base(inputs_embeds=each, position_ids=places).logits
        ),
        "`position_ids` does not reach the model as it came: hand on whatever other"
        " arguments come (**others).",
    )
    below = Through(model.base_model, "default")
    adapter(below, input_ids=ids)
    need(
        below.calls == 1,
        "You run the frozen model itself (base.module), which leaves out other adapters"
        " around it: run `base(...)`, once.",
    )
    copy_stands_alone(model, lambda model: run(model, *batch).logits)


class Through(Base):
    """What stands below, counting how often it is run."""

    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


def run(model, ids, mask, labels):
    return model(input_ids=ids, attention_mask=mask, labels=labels)


def look_at_factors(adapter, start, r):
    n, d = start.shape
    for name, shape in (("A", (n, r)), ("B", (r, d))):
        p = getattr(adapter, name, None)
        need(
            isinstance(p, torch.nn.Parameter),
            f"I look for an nn.Parameter as self.{name}: a plain tensor is neither"
            " trained nor saved.",
        )
        need(
            p.shape == shape,
            f"{name} should have the shape {shape}, not {tuple(p.shape)}.",
        )
    trained = {name for name, p in adapter.named_parameters() if p.requires_grad}
    need(
        trained == {"A", "B"},
        "More is trained than A and B:"
        f" {', '.join(sorted(trained - {'A', 'B'}))}. `start` is a constant: keep it"
        " as a buffer, since `get_peft_model` trains every Parameter of an adapter.",
    )
    buffers = dict(adapter.named_buffers()).values()
    need(
        any(b.shape == start.shape for b in buffers),
        "I find no buffer of start's shape: by register_buffer it moves with the"
        " model.",
    )
    for name in "AB":
        p = getattr(adapter, name).detach()
        need(
            not p.any() or int(torch.linalg.matrix_rank(p)) == r,
            f"{name} starts with the rank 1 (all numbers alike?), and stays so: the"
            " other factor's gradient has its rank. Make it random.",
        )
    zero = [name for name in "AB" if not getattr(adapter, name).detach().any()]
    need(
        zero != ["A", "B"],
        "A and B both start at zero: then neither gets a gradient, as in chapter 04."
        " One of them is random.",
    )


def compare_prompts(model, adapter, base, start, batch):
    ids, mask, labels = batch
    n = len(start)
    P = start + adapter.A @ adapter.B
    out = run(model, *batch)
    need(
        out is not None and hasattr(out, "logits"),
        "forward gives no output of the model: return what base(...) returns.",
    )
    T = ids.shape[1]
    need(
        out.logits.shape[1] == n + T,
        f"{T} tokens and {n} virtual ones go in, so {n + T} logits come out; yours are"
        f" {out.logits.shape[1]}.",
    )
    real = mask.bool()
    logits, loss = read_with(base, P, *batch)
    behind = [
        read_with(base, P, *batch, behind=True, mask_behind=side)[0][real]
        for side in (False, True)
    ]
    need(
        not any(same(out.logits[:, :T][real], wrong) for wrong in behind),
        "Your prompt stands behind the text. Tokens see only what comes before them: so"
        " nothing sees it.",
    )
    learnt = {"A": adapter.A, "B": adapter.B}
    compare(
        out.logits[:, n:][real],
        logits[real],
        {
            message: wrong[real]
            for message, wrong in slips_of_prompt(adapter, base, start, batch).items()
        },
        "The logits of the text",
        learnt,
    )
    compare(
        out.loss,
        loss,
        {
            "The prompt's labels are 0, and 0 is a token: no loss is -100.": read_with(
                base, P, *batch, no_loss=0
            )[1]
        },
        "The loss",
        learnt,
    )
    look_at_options(model, base, P, batch)


def look_at_options(model, base, P, batch):
    """Other arguments than mask and labels, and neither of these."""
    ids, mask, labels = batch
    few = model(
        input_ids=ids, attention_mask=mask, labels=labels, labels_only=True
    ).logits
    need(
        few.dim() == 2,
        "`labels_only=True` does not reach the model: hand on whatever other arguments"
        " come (**others).",
    )
    plain = model(input_ids=ids).logits
    need(
        same(
            plain[:, len(P) :], read_with(base, P, ids, torch.ones_like(mask), ids)[0]
        ),
        "Without mask and labels the logits are wrong: leave both None then.",
    )


def slips_of_prompt(adapter, base, start, batch) -> dict:
    """{message: the logits of the text}"""
    ids, mask, labels = batch
    A, B = adapter.A, adapter.B
    P = start + A @ B

    def logits(prompt, **changed):
        return read_with(base, prompt, *batch, **changed)[0]

    return {
        "`start` is missing: P = start + A B.": logits(A @ B),
        "A B is missing: that is the prompt of the words.": logits(start),
        "Your mask hides the prompt: 1 means that a place is seen.": (
            logits(P, value=0)
        ),
        "Your mask is 1 everywhere, or gone: the padding has become visible.": (
            read_with(base, P, ids, torch.ones_like(mask), labels)[0]
        ),
        "The sign is turned round: P = start + A B.": logits(start - A @ B),
        "The prompt's vectors come in reversed order.": logits(P.flip(0)),
        "All places have the first vector: each has its own.": (
            logits(P[:1].expand(len(P), -1))
        ),
        "You multiply start by 1 + A B: P = start + A B.": logits(start * (1 + A @ B)),
        "The product has a factor too many: P = start + A B.": (
            logits(start + A @ B / A.shape[1])
        ),
    }
