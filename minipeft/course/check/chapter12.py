"""Chapter 12, prompts and prefixes: the input with a prompt, places, attention with a
prefix, its gate, counting."""

import random

import torch

from .teacher import Wrong, checks, compare, need, same

__all__ = ["count_virtual", "places", "prefix_attention", "prefix_gate", "soft_prompt"]


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
    B = 4
    prompt = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    x = torch.randn(B, T, d, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(B, T, dtype=torch.long)
    # padding on the right in one row, on the left in another
    mask[0, -2:] = mask[1, :1] = 0
    labels = torch.randint(1, 90, (B, T)).masked_fill(mask == 0, -100)
    got = function(prompt, x, mask, labels)
    need(
        isinstance(got, (tuple, list)) and len(got) == 3,
        "Give me three tensors: return x, mask, labels.",
    )
    each = prompt.expand(B, -1, -1)
    new_x, new_mask, new_labels = got
    compare(
        new_x,
        torch.cat((each, x), 1),
        {
            "Your prompt stands behind the text. Tokens see only what comes before"
            " them: so nothing would see it.": torch.cat((x, each), 1),
            "You add the prompt to the embeddings. A prompt is put in front of them:"
            " the sequence becomes longer.": torch.cat((each + x[:, :n], x[:, n:]), 1),
            "The prompt takes the place of the first tokens: they must stay, behind"
            " it.": torch.cat((each, x[:, n:]), 1),
            "The prompt's vectors come in reversed order.": torch.cat(
                (each.flip(1), x), 1
            ),
        },
        "Your x",
    )
    ones, zeros = torch.ones(B, n), torch.zeros(B, n)
    compare(
        as_numbers(new_mask),
        torch.cat((ones, mask), 1),
        {
            "Your mask hides the prompt: 1 means that a place is seen.": torch.cat(
                (zeros, mask), 1
            ),
            "The ones for the prompt are at the end of the mask; the prompt is in"
            " front.": torch.cat((mask, ones), 1),
            "Your mask is 1 everywhere: the padding has become visible.": torch.ones(
                B, n + T
            ),
            "You repeat the start of the text's mask for the prompt. Where a row is"
            " padded on the left, that hides the prompt.": torch.cat(
                (mask[:, :n], mask), 1
            ),
            "Your mask is as long as before: it needs a place for every virtual"
            " token.": mask,
        },
        "Your mask",
    )
    compare(
        as_numbers(new_labels),
        torch.cat((torch.full((B, n), -100), labels), 1),
        {
            "Your labels are as long as before. The logits have n places more: each"
            " label would judge another place.": labels,
            "The prompt's labels are 0, and 0 is a token: the prompt would be trained"
            " to be followed by it. No loss is -100.": torch.cat((zeros, labels), 1),
            "The prompt's labels are -1. The loss skips -100, and nothing else.": (
                torch.cat((-ones, labels), 1)
            ),
            "The labels of the prompt belong in front, where the prompt is.": torch.cat(
                (labels, torch.full((B, n), -100)), 1
            ),
            "You repeat the first label for the prompt: then it is trained to say the"
            " first token n times.": torch.cat(
                (labels[:, :1].expand(-1, n), labels), 1
            ),
            "You cut the labels to the old length: the last tokens' losses are lost,"
            " and all others have moved.": torch.cat(
                (torch.full((B, n), -100), labels), 1
            )[:, :T],
        },
        "Your labels",
    )
    need(
        not new_labels.is_floating_point(),
        "Your labels are no whole numbers any more (torch.full with -100.0?): the loss "
        "wants token ids.",
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
    mask = torch.ones(3, T, dtype=torch.long)
    mask[0, :2], mask[1, -2:] = 0, 0
    got = function(mask.clone(), n)
    need(
        isinstance(got, (tuple, list)) and len(got) == 2,
        "Give me two tensors: return mask, position_ids.",
    )
    ones, real = torch.ones(3, n), mask.bool()
    compare(
        as_numbers(got[0]),
        torch.cat((ones, mask), 1),
        {
            "Your mask hides the prefix: 1 means that a place is seen.": torch.cat(
                (torch.zeros(3, n), mask), 1
            ),
            "The ones for the prefix are at the end of the mask; the prefix stands in"
            " front.": torch.cat((mask, ones), 1),
            "Your mask is 1 everywhere: the padding has become visible.": torch.ones(
                3, n + T
            ),
            "Your mask is as long as before: the keys of the prefix need their places"
            " in it.": mask,
        },
        "Your mask",
    )
    right, along = mask.cumsum(1) - 1 + n, torch.arange(T).expand(3, -1)
    positions = got[1]
    need(
        isinstance(positions, torch.Tensor), "The positions should be a tensor (B, T)."
    )
    need(
        tuple(positions.shape) != (3, n + T),
        "The positions are those of the text alone, (B, T): the prefix is in "
        "the cache already, and asks for none.",
    )
    need(
        positions.shape == mask.shape,
        f"The positions have the shape {tuple(positions.shape)}; it should "
        f"be (3, {T}).",
    )
    slips = {
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

    # what stands at padding is nobody's business
    def of_text(rows):
        return rows.float()[real]

    off = [
        row
        for row in range(3)
        if not same(positions[row].float()[real[row]], right[row].float()[real[row]])
    ]
    if off:
        side = (
            "padded by two on the left",
            "padded by two on the right",
            "without padding",
        )[off[0]]
        raise Wrong(
            next(
                (
                    message
                    for message, wrong in slips.items()
                    if same(of_text(positions), of_text(wrong))
                ),
                f"For a row {side} and n = {n} you give {positions[off[0]].tolist()};"
                f" its real tokens should have {right[off[0]][real[off[0]]].tolist()}.",
            )
        )


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def attention(q, k, v, mask):
    scores = q @ k.T / q.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v


@checks(
    "Every token sees the whole prefix and, of the text, itself and what came"
    " before it.",
    "With the prefix in front, keys and values are (n + T, h), the scores (T, n + T).",
)
def prefix_attention(function) -> None:
    """function(q, k, v, prefix_k, prefix_v) -> (T, h): one head; q, k, v (T, h),
    prefix_k and prefix_v (n, h)."""
    n, T, h = sizes()
    q, k, v = (leaf(T, h) for _ in range(3))
    pk, pv = (leaf(n, h) for _ in range(2))
    causal, seen = torch.ones(T, T).tril().bool(), torch.ones(T, n).bool()
    K, V, mask = torch.cat((pk, k)), torch.cat((pv, v)), torch.cat((seen, causal), 1)
    queries, square = torch.cat((pk, q)), torch.ones(n + T, n + T).tril().bool()
    got = function(q, k, v, pk, pv)
    need(
        not (isinstance(got, torch.Tensor) and got.shape == (n + T, h)),
        "Your output has n rows too many: you gave the prefix queries as well. A prefix"
        " is keys and values; it asks nothing.",
    )
    compare(
        got,
        attention(q, K, V, mask),
        {
            "Your output is that of the text alone: the prefix is not used.": attention(
                q, k, v, causal
            ),
            "Your tokens do not see themselves: the mask's triangle holds the diagonal"
            " too, tril() and not tril(-1).": attention(
                q, K, V, torch.cat((seen, causal.tril(-1)), 1)
            ),
            "Your mask is turned round: each token sees itself and what comes after it."
            " What came before it is tril, not triu.": attention(
                q, K, V, torch.cat((seen, causal.T), 1)
            ),
            "Your mask is not causal: each token sees the tokens after it.": attention(
                q, K, V, torch.ones_like(mask)
            ),
            "Your causal mask covers the prefix too: the first token sees only the"
            " first vector of it. All of the prefix is past for everyone.": attention(
                q, K, V, torch.ones(T, n + T).tril().bool()
            ),
            "Your prefix is causal, as though it began where the text begins: all of"
            " it is past for everyone.": attention(
                q, K, V, torch.cat((torch.ones(T, n).tril().bool(), causal), 1)
            ),
            "You add the prefix to the keys and values of the first tokens: it stands"
            " before them, as more keys and values.": attention(
                q,
                torch.cat((k[:n] + pk, k[n:])),
                torch.cat((v[:n] + pv, v[n:])),
                causal,
            ),
            "The scores are not divided by √h.": attention(q * h**0.5, K, V, mask),
            "You have swapped the prefix's keys and values.": attention(
                q, torch.cat((pv, k)), torch.cat((pk, v)), mask
            ),
            "You add the prefix to the queries. It has no queries: it is looked at,"
            " and does not look.": attention(
                torch.cat((q[:n] + pk, q[n:])), k, v, causal
            ),
            "You add two attentions, that of the text and that of the prefix, each"
            " with a softmax of its own. There is one softmax over both: the two"
            " shares sum to 1.": (
                attention(q, k, v, causal) + attention(q, pk, pv, seen)
            ),
            "You average two attentions. The weights are no halves: one softmax over"
            " both decides.": (
                (attention(q, k, v, causal) + attention(q, pk, pv, seen)) / 2
            ),
            "You gave the prefix queries as well and cut off the wrong end.": attention(
                queries, K, V, square
            )[:T],
            "Keys and values are not in the same order: the prefix is in front in"
            " one, and behind in the other.": next(
                (
                    wrong
                    for keys, values in (
                        (K, torch.cat((v, pv))),
                        (torch.cat((k, pk)), V),
                    )
                    if same(got, wrong := attention(q, keys, values, mask))
                ),
                None,
            ),
            "Your prefix is behind the text, but your mask has it in front.": attention(
                q, torch.cat((k, pk)), torch.cat((v, pv)), mask
            ),
            "You divide by h: the scores are divided by its root.": attention(
                q / h**0.5, K, V, mask
            ),
            "You divide by the root of a number of tokens. It is the root of h, the"
            " width of a query.": next(
                (
                    wrong
                    for count in (T, n, n + T)
                    if same(got, wrong := attention(q * (h / count) ** 0.5, K, V, mask))
                ),
                None,
            ),
            "You set the masked scores to zero. A score of zero still gets a share,"
            " as e⁰ = 1: masked scores are -inf.": (
                torch.softmax(q @ K.T / h**0.5 * mask, 1) @ V
            ),
            "You mask after the softmax: the shares that are left no longer sum to 1."
            " Mask the scores, with -inf.": (
                (torch.softmax(q @ K.T / h**0.5, 1) * mask) @ V
            ),
            "Your softmax runs over the queries: it belongs along the keys, the last"
            " dimension.": (
                torch.softmax((q @ K.T / h**0.5).masked_fill(~mask, -torch.inf), 0) @ V
            ),
        },
        "Your output",
    )


@checks(
    "This is the gate: each token's share of attention that falls on the prefix. It"
    " lies between 0 and 1 and depends on the token's query.",
    "The gate is one number a token: (T,).",
)
def prefix_gate(function) -> None:
    """function(q, k, prefix_k) -> (T,): the share of each token's softmax that falls on
    the prefix."""
    for large in (False, True):
        n, T, h = sizes()
        size = 90 if large else 1
        q, k, pk = (torch.randn(rows, h).double() * size for rows in (T, T, n))
        for each in (q, k, pk):
            each.requires_grad_(not large)
        causal = torch.ones(T, T).tril().bool()

        def mass(scale, keys, mask=None, q=q):
            scores = q @ keys.T / scale
            return scores if mask is None else scores.masked_fill(~mask, -torch.inf)

        def share(prefix, text):
            return torch.softmax(torch.cat((prefix, text), 1), 1)[
                :, : prefix.shape[1]
            ].sum(1)

        root = h**0.5
        on_prefix, on_text = mass(root, pk), mass(root, k, causal)

        def own_maximum(*scores):
            prefix, text = (
                (each - each.max(1, keepdim=True).values).exp().sum(1)
                for each in scores
            )
            return prefix / (prefix + text)

        right = share(on_prefix, on_text)
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
        slips = (
            {}
            if large
            else {
                "That is the ratio of the prefix's mass to the text's. A share is"
                " prefix / (prefix + text).": (
                    on_prefix.exp().sum(1) / on_text.exp().sum(1)
                ),
                "That is the share of the text, 1 - g.": 1 - right,
                "The text's scores are not masked: each token would see those after"
                " it.": share(on_prefix, mass(root, k)),
                "The scores are not divided by √h.": share(
                    mass(1, pk), mass(1, k, causal)
                ),
                "You count keys, n / (n + those seen). The gate depends on the"
                " scores: it is a share of the softmax.": (
                    n / (n + torch.arange(1, T + 1, dtype=torch.float64))
                ),
                "That is the mean over the prefix's vectors: the gate is their sum.": (
                    right / n
                ),
                "That is the prefix's mass, before it is divided by the whole.": (
                    on_prefix.exp().sum(1)
                ),
                "You leave the exp out: the softmax is made of exponentials of the"
                " scores.": (
                    on_prefix.sum(1) / (on_prefix.sum(1) + mass(root, k).tril().sum(1))
                ),
                "That is 1 for everybody: you take the softmax over the prefix alone."
                " It runs over prefix and text together.": torch.ones(
                    T, dtype=torch.float64
                ),
                "You set the masked scores to zero. A score of zero still gets a"
                " share, as e⁰ = 1: masked scores are -inf.": share(
                    on_prefix, mass(root, k).tril()
                ),
                "You subtract from the prefix's scores their own maximum, and from"
                " the text's another: then the two no longer compare. It must be one"
                " maximum for both.": own_maximum(on_prefix, on_text),
                "You mask the prefix too: all of it is past for every token.": share(
                    on_prefix.masked_fill(~torch.ones(T, n).tril().bool(), -torch.inf),
                    on_text,
                ),
            }
        )
        compare(got, right, slips, "Your gate")


@checks("The counts are right, with grouped queries too.")
def count_virtual(function) -> None:
    """function(kind, n, layers, width, heads, kv_heads) -> int; kind is "prompt" or
    "prefix"."""
    small = (
        random.choice([7, 9, 11]),
        random.choice([5, 8]),
        24 * random.randint(2, 4),
        12,
        3,
    )
    for n, layers, width, heads, kv_heads in (
        small,
        (20, 32, 4096, 32, 8),
        (5, 24, 1024, 16, 16),
    ):
        narrow = width // heads * kv_heads  # d_kv: all keys of one token in one layer
        for kind, right in (("prompt", n * width), ("prefix", 2 * layers * n * narrow)):
            got = function(kind, n, layers, width, heads, kv_heads)
            need(
                got is not None,
                "Your function gives None: is there a `return` at its end?",
            )
            slips = {
                "prompt": {
                    "A prompt stands in the input alone: it has no part in the"
                    " layers.": layers * n * width,
                    "That is a prefix's count: the prompt has n vectors of the"
                    " model's width, and nothing else.": 2 * layers * n * narrow,
                    "That is one vector: there are n of them.": width,
                    "You count a key and a value for each: a prompt has neither, it"
                    " is n vectors in the input.": 2 * n * width,
                    "The prompt's vectors are as wide as the model, not as its keys.": (
                        n * narrow
                    ),
                },
                "prefix": {
                    "You take keys and values to be as wide as the model. With"
                    " grouped queries they are narrower: width / heads · kv_heads.": (
                        2 * layers * n * width
                    ),
                    "Keys or values? A prefix has both: a factor of 2 is missing.": (
                        layers * n * narrow
                    ),
                    "That is one layer's prefix: every layer has its own.": (
                        2 * n * narrow
                    ),
                    "That is for one token: there are n.": 2 * layers * narrow,
                    "That is one head's keys: there are kv_heads of them.": (
                        2 * layers * n * (width // heads)
                    ),
                    "That is a prompt's count: n vectors in the input. A prefix has"
                    " keys and values in every layer.": n * width,
                },
            }[kind]
            if got != right:
                raise Wrong(
                    next(
                        (message for message, wrong in slips.items() if got == wrong),
                        f"For a {kind} of {n} in a model of {layers} layers, {width}"
                        f" wide, with {heads} heads and {kv_heads} key-value heads you"
                        f" get {got:,}; I count {right:,}.",
                    )
                )
