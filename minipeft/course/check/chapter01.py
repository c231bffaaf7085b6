"""Chapter 01, the model: counting it, learning merges, the loss, a step with the cache,
nucleus sampling, two pairings."""

import random
from collections import Counter
from itertools import combinations

import torch
from torch.overrides import TorchFunctionMode

from .teacher import Wrong, checks, compare, need

__all__ = [
    "cached_step",
    "count_gpt",
    "halves_from_pairs",
    "next_token_loss",
    "nucleus",
    "train_bpe",
]


# ---------------------------------------------------------------------------- count_gpt


def block(d, wide, heads, kv_heads):
    kv = kv_heads * d // heads
    return 2 * d * d + 2 * d * kv + 3 * d * wide + 2 * d


@checks("The count is right, for Llama-3-8B too.")
def count_gpt(function) -> None:
    """function(vocab, d, wide, layers, heads, kv_heads, tied) -> int."""
    heads = random.choice([6, 9])
    small = dict(
        vocab=random.randint(90, 130),
        d=heads * random.choice([5, 7]),
        wide=random.randint(40, 70),
        layers=random.choice([2, 3]),
        heads=heads,
        kv_heads=3,
    )
    llama3 = dict(vocab=128256, d=4096, wide=14336, layers=32, heads=32, kv_heads=8)
    for shape, tied in ((small, True), (small, False), (llama3, False)):
        vocab, d, wide, layers, heads, kv_heads = shape.values()
        got, one = function(*shape.values(), tied), block(d, wide, heads, kv_heads)
        tables, kv = vocab * d * (1 if tied else 2), kv_heads * d // heads
        right = tables + layers * one + d
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        slips = {
            "You count the head and the table, but when tied they are one and the"
            " same.": right + tied * vocab * d,
            "The head is missing: when it is not tied, it is a second table of vocab"
            " × d.": (right - (not tied) * vocab * d),
            "The last norm is missing: d numbers after all the blocks.": right - d,
            "A block has two norms, one before each half: you count one.": (
                right - layers * d
            ),
            "The norms are missing: d numbers each, two in a block and one at the"
            " end.": (right - (2 * layers + 1) * d),
            "You take k and v for square. With grouped queries they are narrower:"
            " kv_heads heads in the place of heads.": (
                right + layers * 2 * d * (d - kv)
            ),
            "You take k and v for one head wide each: they have kv_heads heads.": (
                right - layers * 2 * d * (kv - d // heads)
            ),
            "The MLP has three matrices: you forgot the gate (or up, or down).": (
                right - layers * d * wide
            ),
            "o_proj is missing: it brings the heads back to width d.": (
                right - layers * d * d
            ),
            "k and v are two matrices, each kv_heads heads wide: you count one of"
            " them.": right - layers * d * kv,
            "You count one block: there are `layers` of them.": tables + one + d,
            "The embedding is missing: the table has vocab × d numbers.": (
                right - tables
            ),
        }
        biases = (
            (2 * layers + 1) * d,
            layers * (d + 2 * kv),
            layers * d,
            layers * (2 * wide + d),
            (not tied) * vocab,
        )
        some = {
            sum(parts) for count in range(1, 6) for parts in combinations(biases, count)
        } - {0}
        if got != right:
            need(
                got - right not in some,
                "You count biases: there are none here, in the norms neither.",
            )
            raise Wrong(
                next(
                    (
                        message
                        for message, wrong in slips.items()
                        if got == wrong and wrong != right
                    ),
                    f"For {shape}, tied={tied} you get {got:,}; I count {right:,}.",
                )
            )


# ---------------------------------------------------------------------------- train_bpe


def merge(parts, pair):
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def counted(pieces, weight):
    pairs = Counter()
    for word, parts in pieces.items():
        for pair in zip(parts, parts[1:]):
            pairs[pair] += weight(word)
    return pairs


def learnt(weight, words, n, choose=max, anew=True):
    """The merges, or None where two pairs are equally frequent: such words are no fair
    question."""
    pieces, merges = {word: list(word) for word in words}, []
    pairs = counted(pieces, weight)
    for _ in range(n):
        pairs = (
            counted(pieces, weight)
            if anew
            else Counter({p: c for p, c in pairs.items() if p not in merges})
        )
        most = choose(pairs.values(), default=None)
        best = [pair for pair, often in pairs.items() if often == most]
        if len(best) != 1:
            return None
        merges.append(best[0])
        if anew:
            pieces = {word: merge(parts, best[0]) for word, parts in pieces.items()}
    return merges


def vocabulary():
    """Words with frequencies, such that every question about them has one answer, and
    the usual slips another."""
    while True:
        words = {}
        for _ in range(9):
            # no letter twice in a row
            word = "".join(random.sample("aenrlts", random.randint(4, 6)))
            words[word] = random.randint(1, 40)
        right = learnt(words.get, words, 4)
        once = learnt(lambda word: 1, words, 1)
        still = learnt(words.get, words, 4, anew=False)
        if right and still and still != right and once and once != right[:1]:
            return words, right, still


@checks("The same merges, in the same order, for every vocabulary that I tried.")
def train_bpe(function) -> None:
    """function(words, n) -> list of n pairs; words: {word: how often it occurs}."""
    # "nt" stands twice in "content"
    again = {"nation": 6, "titan": 4, "content": 7, "attention": 1}
    for words, right, still in (
        vocabulary(),
        vocabulary(),
        (again, learnt(again.get, again, 3), None),
    ):
        got = function(dict(words), len(right))
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        need(
            isinstance(got, (list, tuple)),
            f"A list of pairs is wanted; yours is a {type(got).__name__}.",
        )
        need(
            all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in got),
            'Give the pairs, such as ("la", "n"), not what they become.',
        )
        got = [tuple(pair) for pair in got]
        need(
            len(got) == len(right),
            f"{len(right)} merges are wanted; you give {len(got)}.",
        )
        if got == right:
            continue
        need(
            words is again or len(set(got)) == len(got),
            "The same pair comes twice: after a merge it must be gone from every word."
            " Do you merge in all of them, and count anew?",
        )
        need(
            words is not again,
            "A pair may stand twice in a word, as “nt” in “content”: count both, and"
            " merge both. (And “n t” stands in “an t” too, if you look for it in a"
            " string: there it is no pair.)",
        )
        need(
            got != still,
            "You take the n most frequent pairs of letters. After each merge the counts"
            " change, and pairs with the new piece come in: count anew each time.",
        )
        letters = {word: list(word) for word in words}
        pairs, plain = counted(letters, words.get), counted(letters, lambda word: 1)
        need(
            pairs[got[0]] != min(pairs.values()),
            "You take the rarest pair first; take the most frequent.",
        )
        need(
            got[0] == right[0] or plain[got[0]] < max(plain.values()),
            "You count each word once: a word counts as often as it occurs in the text,"
            " words[word] times.",
        )
        need(
            all(pair in plain or any(len(part) > 1 for part in pair) for pair in got),
            "You count pairs that stand in no word: the last letter of one word and the"
            " first of the next are no pair.",
        )
        need(
            set(got) != set(right),
            "These are the right merges in another order: the first learnt comes"
            " first.",
        )
        at = next(
            i for i, (mine, theirs) in enumerate(zip(got, right)) if mine != theirs
        )
        raise Wrong(
            f"Your merge number {at + 1} is {got[at]}; I have {right[at]}. Print the"
            " counts before it, and compare a word by hand."
        )


# ---------------------------------------------------------------------- next_token_loss


class WithoutCrossEntropy(TorchFunctionMode):
    """Refuses the functions that the exercise asks to write."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        need(
            name not in ("cross_entropy", "nll_loss", "cross_entropy_loss"),
            f"You call F.{name}: the exercise is to write the loss without it.",
        )
        return function(*args, **(kwargs or {}))


def check_large_logits(function) -> None:
    """exp(900) is infinite: a softmax has to subtract the maximum."""
    logits = 900 * torch.randn(2, 7, 11, dtype=torch.float64)
    labels = torch.randint(0, 11, (2, 7))
    logp = logits.log_softmax(-1)[:, :-1]
    right = -logp.gather(-1, labels[:, 1:, None]).mean()
    got = function(logits, labels)
    need(
        bool(torch.as_tensor(got).isfinite().all()),
        "Right for small logits, but for large ones exp overflows and your loss is"
        " inf or nan: log_softmax, or logsumexp, subtracts the maximum first.",
    )
    compare(got, right, {}, "Your loss of large logits")


@checks(
    "One shift, the places that are asked, one mean over all of them, in nats; and"
    " gradients flow.",
    "logits are (B, T, V), labels (B, T).",
)
def next_token_loss(function) -> None:
    """function(logits, labels) -> the mean loss, a tensor of no dimension."""
    for rows in (1, 3):
        T, V = random.randint(9, 12), random.randint(17, 23)
        logits = (2 * torch.randn(rows, T, V, dtype=torch.float64)).requires_grad_()
        labels = torch.randint(1, V, (rows, T))
        for row in range(rows):
            # a prompt, of another length in every row
            labels[row, : random.randint(2, 6)] = -100
        z = logits
        logp = z - z.exp().sum(-1, keepdim=True).log()

        def mean(logp, target, keep=None):
            keep = target != -100 if keep is None else keep
            return -logp.gather(-1, target.clamp(min=0)[..., None])[..., 0][keep].mean()

        shifted, target = logp[:, :-1], labels[:, 1:]
        right, every = mean(shifted, target), torch.ones_like(target, dtype=torch.bool)
        rowwise = torch.stack([mean(shifted[i], target[i]) for i in range(rows)]).mean()
        number = (target != -100).sum()
        with WithoutCrossEntropy():
            got = function(logits, labels)
        mistakes = {
            "Nothing is shifted: place t is judged by token t, its own input. It"
            " should be judged by token t + 1.": mean(logp, labels),
            "You shift the wrong way: place t is judged by the token before it.": mean(
                logp[:, 1:], labels[:, :-1]
            ),
            "You shift twice: place t is judged by token t + 2.": mean(
                logp[:, :-2], labels[:, 2:]
            ),
            "You count the places with -100 as if token 0 were wanted there: leave"
            " them out.": mean(shifted, target, every),
            "You count the places with -100 as if the last token were wanted there"
            " (an index of -100, or -1, wraps around): leave them out.": mean(
                shifted, torch.where(target < 0, V - 1, target), every
            ),
            "You divide by all places, also by those that nobody asked about.": (
                right * number / target.numel()
            ),
            "You give the sum: the mean is wanted.": right * number,
            "You divide by all places of the input, also by those that nobody asked"
            " about, and by the last one.": (right * number / labels.numel()),
            "You choose the places before the shift: by their own label, not by that"
            " of the token they are to foresee. So the first token of every answer is"
            " left out.": mean(
                shifted, target, (target != -100) & (labels[:, :-1] != -100)
            ),
            "Your softmax runs over the places: it belongs to the last dimension, the"
            " vocabulary.": mean(
                (z - z.exp().sum(1, keepdim=True).log())[:, :-1], target
            ),
            "Your softmax runs over the places (after the shift): it belongs to the"
            " last dimension, the vocabulary.": mean(
                z[:, :-1] - z[:, :-1].exp().sum(1, keepdim=True).log(), target
            ),
            "You take the mean of the rows' means. Rows with few labels would count"
            " too much: one mean over all places that are asked.": rowwise,
            "The sign is missing: the loss is minus the log of the probability.": (
                -right
            ),
            "You give bits (log2): nats are wanted, the natural logarithm.": (
                right / torch.tensor(2.0).log()
            ),
            "That is the perplexity, e to the loss.": right.exp(),
            "You forgot the logarithm: that is the probability itself.": mean(
                -shifted.exp(), target
            ),
            "You forgot the softmax: logits are not log-probabilities.": mean(
                z[:, :-1], target
            ),
        }
        if rows == 1:
            mistakes = {
                message: wrong
                for message, wrong in mistakes.items()
                if "rows' means" not in message
            }
        compare(got, right, mistakes, "Your loss")
    check_large_logits(function)


# -------------------------------------------------------------------------- cached_step


@checks(
    "The new token is in the cache, every group reads its own head, and no mask was"
    " needed.",
    "q is (B, H, 1, h), the cache (B, K, P, h); tokens are dimension 2, and H is a"
    " multiple of K.",
)
def cached_step(function) -> None:
    """function(q, k, v, past_k, past_v) -> (y, k, v)."""
    for groups in (1, 2):
        B, K, P, h = (
            2,
            random.choice([2, 3]),
            random.randint(4, 7),
            random.choice([5, 7]),
        )
        H = groups * K

        def draw(*shape):
            return torch.randn(shape, dtype=torch.float64)

        shapes = (B, H, 1, h), *[(B, K, 1, h)] * 2, *[(B, K, P, h)] * 2
        q, k, v, past_k, past_v = (draw(*shape).requires_grad_() for shape in shapes)
        got = function(q, k, v, past_k, past_v)
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        need(
            isinstance(got, (tuple, list)) and len(got) == 3,
            "Give three things: y, and the new cache, k and v.",
        )
        y, new_k, new_v = got
        all_k, all_v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        for name, new, right, before, now in (
            ("k", new_k, all_k, past_k, k),
            ("v", new_v, all_v, past_v, v),
        ):
            need(
                isinstance(new, torch.Tensor),
                f"The new cache's {name} should be a tensor.",
            )
            need(
                new.shape != (B, H, P + 1, h) or groups == 1,
                f"You keep {H} heads of {name} in the cache: the copies are for the"
                f" computing only. The cache keeps {K}; that is what grouped queries"
                " save.",
            )
            compare(
                new,
                right,
                {
                    f"The new token stands at the front of the cache's {name}: it"
                    f" comes last, after the past.": torch.cat((now, before), 2),
                    f"The new token is missing from the cache's {name}.": before,
                    "You give v in the place of k, and k in the place of v: the order"
                    " is y, k, v.": all_v if name == "k" else all_k,
                },
                f"The new cache's {name}",
            )

        def attend(
            q, k, v, scale=h**-0.5, repeat=lambda z: z.repeat_interleave(groups, 1)
        ):
            k, v = repeat(k), repeat(v)
            return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v

        mistakes = {
            "The new token does not see itself: attend over the whole new cache.": (
                attend(q, past_k, past_v)
            ),
            "The scale is missing: divide the scores by √h.": attend(
                q, all_k, all_v, 1.0
            ),
            "You divide by h: it should be √h.": attend(q, all_k, all_v, 1 / h),
            "You multiply by √h: divide.": attend(q, all_k, all_v, h**0.5),
            "Your softmax is over the wrong dimension: over the keys, the last one."
            " (Over one query alone it gives 1 everywhere.)": (
                attend(q, 0 * all_k, all_v) * (P + 1)
            ),
            "The wrong heads are paired: query heads 0 and 1 share key-value head 0,"
            " and so on. That is repeat_interleave, not repeat.": attend(
                q, all_k, all_v, repeat=lambda z: z.repeat(1, groups, 1, 1)
            ),
            "A mask keeps the token from the past: nothing here needs one.": (
                v.repeat_interleave(groups, 1)
            ),
            "You mask all but the first place: a triangle of one row is no mask for"
            " one new token.": (all_v[:, :, :1].repeat_interleave(groups, 1)),
            "You mix keys and values: the weights come from the keys, what is summed"
            " are the values.": attend(q, all_k, all_k),
        }
        if groups == 1:
            mistakes = {
                message: wrong
                for message, wrong in mistakes.items()
                if "wrong heads" not in message
            }
        compare(y, attend(q, all_k, all_v), mistakes, "y")


# ------------------------------------------------------------------------------ nucleus


def probabilities(p: float):
    """Probabilities whose sums are not near p, where some are cut off."""
    while True:
        V = random.randint(9, 13)
        probs = (1.5 * torch.randn(V, dtype=torch.float64)).softmax(0)
        total = probs.sort(descending=True).values.cumsum(0)
        enough = 2 <= (total < p).sum() + 1 <= V - 2 or p < 0.1 or p > 0.9
        if enough and min((each - p).abs().min() for each in (total, probs)) > 0.003:
            return probs


@checks("The smallest set that has p, in its old order, and it sums to one.")
def nucleus(function) -> None:
    """function(probs, p) -> probabilities of the same shape (V,)."""
    # binary fractions, whose sums are exact: the first two have 0.75, and no less
    exact = torch.tensor([2, 16, 1, 8, 1, 4], dtype=torch.float64) / 32
    for p in (0.5, 0.8, 0.01, 0.95, 0.75, 1.0):
        probs = exact if p in (0.75, 1.0) else probabilities(p)
        V = len(probs)
        ordered, order = probs.sort(descending=True)
        total = ordered.cumsum(0)
        keep = total - ordered < p  # those before do not have p yet

        def kept(mask, scale=True):
            result = torch.zeros_like(probs)
            result[order[mask]] = ordered[mask]
            return result / result.sum() if scale and result.any() else result

        got = function(probs, p)
        if isinstance(got, torch.Tensor) and got.shape == probs.shape:
            need(
                not got.isnan().any() and bool(got.any()),
                f"For p = {p} you keep nothing. The likeliest token is always kept: the"
                " set has *at least* p, and p is what its tokens have together.",
            )
        sums = ordered[keep] / ordered[keep].sum()
        rising = probs.sort().values
        rare = rising.cumsum(0) - rising < p
        from_below = torch.zeros_like(probs)
        from_below[probs.sort().indices[rare]] = rising[rare]
        mistakes = {
            "The token that crosses the line is missing: together they must have *at"
            " least* p.": kept(total <= p),
            "You keep one token too many where the first ones have exactly p: that is"
            " enough.": kept(total - ordered <= p),
            "What you keep does not sum to one: scale it.": kept(keep, scale=False),
            "You give the probabilities in falling order: put them back in their old"
            " places.": torch.cat((sums, torch.zeros(V - len(sums), dtype=sums.dtype))),
            "You put them back by the order of sorting, and the way back is its"
            " inverse: result[order] = sorted, or take sorted[order.argsort()].": (
                torch.where(keep, ordered, 0)[order] / ordered[keep].sum()
            ),
            "You apply a softmax to probabilities: they need only be divided by their"
            " sum.": (torch.where(kept(keep) > 0, probs, -torch.inf).softmax(0)),
            "You keep the tokens that have p each. p is what they have *together*.": (
                torch.where(probs >= p, probs, 0) / probs[probs >= p].sum()
            ),
            "You keep one token too many: the set has p before it.": kept(
                total - ordered - torch.cat((torch.zeros(1), ordered[:-1])) < p
            ),
            "You begin with the rarest: sort falling.": from_below / from_below.sum(),
            "You drop what should be kept, and keep the tail.": kept(~keep),
            "Nothing is cut off.": probs,
        }
        if p == 1.0:  # all are kept, and most mistakes do not show
            mistakes = {}
        compare(got, kept(keep), mistakes, "Your result")


# -------------------------------------------------------------------- halves_from_pairs


@checks(
    "The rows are where the other way of turning expects them: the scores of all heads"
    " stay the same."
)
def halves_from_pairs(function) -> None:
    """function(weight, heads) -> weight, its rows reordered within each head."""
    heads, half, d = random.choice([2, 4]), random.choice([3, 5]), random.choice([6, 8])
    weight = torch.randn(heads * 2 * half, d, dtype=torch.float64)
    got = function(weight, heads)

    def move(z, a, b):
        return z.view(-1, a, b, z.shape[-1]).transpose(1, 2).reshape(len(z), -1)

    mistakes = {
        "That is the way back, from halves to pairs. Here the rows come as pairs:"
        " view them as (heads, pairs, 2).": move(weight, 2, half),
        "You reorder over all heads at once: each head has its own pairs, and keeps"
        " its own rows.": move(weight, heads * half, 2),
        "You reorder the columns, what is read; the turn is applied to what comes"
        " out, so to the rows.": (move(weight.T.contiguous(), d // 2, 2).T),
        "You swap the two members of each pair: that turns the other way.": (
            weight.view(-1, 2, d).flip(1).reshape(-1, d)
        ),
        "You put the second members first.": move(
            weight.view(-1, 2, d).flip(1).reshape(-1, d), half, 2
        ),
        "The rows are as they were.": weight,
        "You mix whole heads: within each head the rows move, and the heads stay.": (
            weight.view(heads, -1, d).flip(0).reshape(-1, d)
        ),
    }
    compare(got, move(weight, half, 2), mistakes, "Your weight")
