"""Text from a model: greedy or sampled, many prompts at once, with a key-value cache.

Rows of unequal length are padded on the left, so that every row's next token is in the
last column. It runs on anything that speaks Hugging Face's language: our GPT, an
adapted model, a transformers model. Only .logits and the cache of the output are
used.
"""

import inspect
import math

import torch


def check(max_new_tokens, temperature=0.0, top_k=None, top_p=None, generator=None):
    """ValueError for settings that mean nothing."""
    for name, value, good, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        (
            "temperature",
            temperature,
            0 <= temperature < math.inf,
            "0, for the likeliest, or a positive number",
        ),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or None"),
        (
            "top_p",
            top_p,
            top_p is None or 0 < top_p <= 1,
            "above 0 and at most 1, or None",
        ),
    ):
        if not good:
            raise ValueError(f"{name} = {value!r}: expected is {expected}")


def choose(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """Pick the next token of each row. logits (B, V) -> (B,) int64.

    temperature 0: the likeliest. top_k: only the k likeliest may come. top_p: only the
    likeliest that together have probability p (nucleus sampling, Holtzman et al. 2020,
    arXiv 1904.09751); the first of them always may."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(descending=True)
        late = probs.cumsum(-1) - probs >= top_p  # those before it have p already
        logits = logits.masked_fill(late.scatter(-1, order, late), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def pick_rows(past, rows):
    """Keep some rows of a cache: ours (a (keys, values) pair a layer) or transformers'
    Cache."""
    if hasattr(past, "batch_select_indices"):
        past.batch_select_indices(rows)
        return past
    return tuple((k[rows], v[rows]) for k, v in past)


@torch.no_grad()
def steps(model, rows, max_new_tokens, is_over, adapter_names=None, **sampling):
    """Continue `rows` (lists of token ids); yields [(index of the row, its next token),
    ...] once a step.

    `is_over(index, token)` is asked about each: the rows that are over leave the batch,
    and it ends with the last."""
    check(max_new_tokens, **sampling)
    device = next(model.parameters()).device
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(plain.forward).parameters
    extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    # transformers' name since 5.24
    cache_name = "cache" if "cache" in parameters else "past_key_values"
    width = max(map(len, rows))
    # (B, T)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    # (B, T)
    mask = torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device
    )
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    alive, past, training = list(range(len(rows))), None, model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if adapter_names is not None:
                extra["adapter_names"] = [adapter_names[i] for i in alive]
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                use_cache=True,
                **{cache_name: past},
                **extra,
            )
            past = getattr(out, cache_name)
            token = choose(out.logits[:, -1], **sampling)
            new = list(zip(alive, token.tolist()))
            keep = [b for b, (i, t) in enumerate(new) if not is_over(i, t)]
            yield new
            if not keep:
                return
            ids, position = token[:, None], position[:, -1:] + 1
            if len(keep) < len(alive):  # the rows that are over need no more work
                at = torch.tensor(keep, device=device)
                ids, position, mask, past = (
                    ids[at],
                    position[at],
                    mask[at],
                    pick_rows(past, at),
                )
                alive = [alive[b] for b in keep]
            mask = torch.cat((mask, mask.new_ones(len(keep), 1)), dim=1)
    finally:
        model.train(training)


def _generator(model, seed):
    return (
        None
        if seed is None
        else torch.Generator(next(model.parameters()).device).manual_seed(seed)
    )


def _ends(model, tokenizer=None):
    """The token ids that end a text: the tokenizer's and the configuration's, which may
    list several."""
    ends = getattr(getattr(model, "config", None), "eos_token_id", None)
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    return {
        e for e in [*ends, getattr(tokenizer, "eos_token_id", None)] if e is not None
    }


def generate(
    model,
    tokenizer,
    prompts,
    max_new_tokens=64,
    temperature=0.0,
    top_k=None,
    top_p=None,
    stop=None,
    seed=None,
    stream=False,
    batch_size=64,
    adapter_names=None,
):
    """Continue a prompt (str -> str) or many (list -> list). Returns what comes after
    each prompt, end token left out.

    stop: strings or token ids at which a text ends, themselves left out. seed: makes
    sampling repeatable. stream: True gives an iterator over pieces of text, a function
    is called with each piece; for one prompt only. adapter_names: one a prompt, for a
    model that holds several adapters."""
    single = isinstance(prompts, str)
    prompts = [prompts] if single else list(prompts)
    if stream and not single:
        raise ValueError("stream needs one prompt, a str")
    stop = [stop] if isinstance(stop, (str, int)) else list(stop or [])
    ends = _ends(model, tokenizer) | {s for s in stop if not isinstance(s, str)}
    stop = [s for s in stop if isinstance(s, str)]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows = [list(tokenizer.encode(prompt)) for prompt in prompts]
    # a transformers tokenizer puts it there itself
    rows = [row if row[:1] == bos else bos + row for row in rows]
    if not all(rows):
        raise ValueError("an empty prompt needs a tokenizer with a bos token")
    said, texts = [[] for _ in rows], [""] * len(rows)
    before = [tokenizer.decode(row[len(bos) :]) for row in rows]

    def read(i):  # the new tokens alone would lose their leading space
        texts[i] = tokenizer.decode(rows[i][len(bos) :] + said[i])[len(before[i]) :]
        at = min((texts[i].find(s) for s in stop if s in texts[i]), default=None)
        texts[i] = texts[i][:at]
        return at is not None

    def is_over(i, token):
        if token in ends:
            return True
        said[i].append(token)
        return bool(stop) and read(i)

    sampling = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=_generator(model, seed),
    )

    # half a character, or what may become a stop string: not shown yet
    def unsure(text):
        return text.endswith("\ufffd") or any(
            text.endswith(s[:n]) for s in stop for n in range(1, len(s))
        )

    def pieces():
        # like lengths together: less padding
        shown, order = 0, sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            names = adapter_names and [adapter_names[i] for i in batch]
            for _ in steps(
                model,
                [rows[i] for i in batch],
                max_new_tokens,
                lambda b, token: is_over(batch[b], token),
                names,
                **sampling,
            ):
                if stream and not (read(0) or unsure(texts[0])):
                    yield texts[0][shown:]
                    shown = len(texts[0])
        for i in range(len(rows)):
            read(i)
        if stream and texts[0][shown:]:
            yield texts[0][shown:]

    if stream is True:
        return pieces()
    for piece in pieces():
        stream(piece)
    return texts[0] if single else texts


@torch.no_grad()
def generate_ids(
    model,
    input_ids,
    attention_mask=None,
    max_new_tokens=20,
    do_sample=False,
    temperature=1.0,
    top_k=None,
    top_p=None,
    eos_token_id=None,
    pad_token_id=None,
    seed=None,
    adapter_names=None,
):
    """Hugging Face's generate: (B, T) int64, padded on the left where attention_mask is
    0, -> (B, T + new), filled up with pad_token_id (else the end token) behind a row's
    end."""
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [row[real.bool()].tolist() for row, real in zip(input_ids, keep)]
    eos = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    ends = _ends(model) if eos is None else set(eos)
    if pad_token_id is None:
        pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    pad = pad_token_id if pad_token_id is not None else min(ends, default=0)
    columns, temperature = [], temperature if do_sample else 0.0
    for new in steps(
        model,
        rows,
        max_new_tokens,
        lambda i, token: token in ends,
        adapter_names,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        generator=_generator(model, seed),
    ):
        columns.append(torch.full_like(input_ids[:, :1], pad))
        for i, token in new:
            columns[-1][i] = token
    return torch.cat([input_ids, *columns], dim=1)
