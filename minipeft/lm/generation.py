"""Text from a model: greedy or sampled, many prompts at once, with a key-value cache.

Rows of unequal length are padded on the left, so that every row's next token is in the
last column. It runs on anything that speaks Hugging Face's language: our GPT, an
adapted model, a transformers model. Only .logits and the cache of the output are
used.
"""

import inspect
import os
import warnings
from contextlib import contextmanager

import torch

from ..io import brief, check_number
from .data import check_ids, max_tokens
from .tokenizer import wrap
from .user_data import trim


def check_sampling(temperature=0.0, top_k=None, top_p=None, generator=None):
    """ValueError for settings that mean nothing."""
    check_number("temperature", temperature, least=0)
    check_number("top_k", top_k, whole=True, least=1, also=(None,))
    check_number("top_p", top_p, above=0, most=1, also=(None,))


def sample(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """The next token of each row. logits (B, V) -> (B,) int64.

    temperature 0: the likeliest. top_k: only the k likeliest may come. top_p: only the
    likeliest that together have probability p (nucleus sampling, Holtzman et al. 2020,
    arXiv 1904.09751); the first of them always may. ValueError for NaN or infinity."""
    if not logits.amax(-1).isfinite().all():
        raise ValueError(
            "the model's logits are NaN or infinite: look for NaN among its weights, or"
            " load it with a dtype of a wider range, such as float32"
        )
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    # the largest is 0, so that a small temperature gives no infinity less infinity
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(descending=True)
        late = probs.cumsum(-1) - probs >= top_p  # those before it have p already
        late[:, 0] = False
        logits = logits.masked_fill(late.scatter(-1, order, late), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def unwrap_peft(model):
    """The model itself, without a PeftModel around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def in_mode(model, training=True):
    """Within it the model is in training mode, or in evaluation mode."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def pick_rows(past, rows):
    """Keep some rows of a cache: ours (a (keys, values) pair a layer) or transformers'
    Cache."""
    if hasattr(past, "batch_select_indices"):
        past.batch_select_indices(rows)
        return past
    return tuple((k[rows], v[rows]) for k, v in past)


def left_pad(rows, device):
    """Lists of token ids -> (ids, mask), each (B, T) int64."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def check_prompts(model, rows):
    """ValueError for a prompt that the model cannot read."""
    if not rows or not all(rows):
        raise ValueError("a row without tokens: nothing can be continued")
    check_ids(model, [max(row) for row in rows], "the prompt")
    longest = max(map(len, rows))
    limit = max_tokens(model)
    if limit and longest > limit:
        raise ValueError(
            f"a prompt has {longest} tokens, but the model's context holds {limit}:"
            " shorten it"
        )


@torch.no_grad()
def decode(model, rows, max_new_tokens, is_over, adapter_names=None, **sampling):
    """Continue `rows` (lists of token ids); yields [(index of the row, its next token),
    ...] once a step.

    `is_over(index, token)` is asked about each: the rows that are over leave the batch,
    and it ends with the last. A row also ends where the model's context is full."""
    check_number("max_new_tokens", max_new_tokens, whole=True, least=0)
    check_sampling(**sampling)
    check_prompts(model, rows)
    parameters = inspect.signature(unwrap_peft(model).forward).parameters
    extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    # transformers' name since 5.24
    cache_name = "cache" if "cache" in parameters else "past_key_values"
    limit = max_tokens(model) or float("inf")
    ids, mask = left_pad(rows, next(model.parameters()).device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
    alive = list(range(len(rows)))
    past = None
    with in_mode(model, training=False):
        for step in range(1, max_new_tokens + 1):
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
            token = sample(out.logits[:, -1], **sampling)
            new = list(zip(alive, token.tolist()))
            keep = [b for b, (i, t) in enumerate(new) if not is_over(i, t)]
            yield new
            full = [b for b in keep if len(rows[alive[b]]) + step > limit]
            if full and step < max_new_tokens:
                warnings.warn(
                    f"a text ends where the model's context of {limit} tokens is full",
                    stacklevel=2,
                )
                keep = [b for b in keep if b not in full]
            if not keep:
                return
            ids = token[:, None]
            position = position[:, -1:] + 1
            if len(keep) < len(alive):  # the rows that are over need no more work
                at = torch.tensor(keep, device=ids.device)
                ids, position, mask = ids[at], position[at], mask[at]
                past = pick_rows(past, at)
                alive = [alive[b] for b in keep]
            mask = torch.cat((mask, mask.new_ones(len(keep), 1)), dim=1)


def seeded_generator(model, seed):
    check_number("seed", seed, whole=True, least=0, most=2**64 - 1, also=(None,))
    if seed is None:
        return None
    return torch.Generator(next(model.parameters()).device).manual_seed(seed)


def eos_ids(model, tokenizer=None):
    """The token ids that end a text: the tokenizer's and the configuration's, which may
    list several."""
    ids = getattr(getattr(model, "config", None), "eos_token_id", None)
    ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    ids.append(getattr(tokenizer, "eos_token_id", None))
    return {i for i in ids if i is not None}


# ---- text ----------------------------------------------------------------------------


def check_stop(stop):
    """(stop strings, stop ids) of what a caller gives: one, several or None."""
    stop = [stop] if isinstance(stop, (str, int, bytes)) else list(stop or [])
    for each in stop:
        if isinstance(each, str) and each == "":
            raise ValueError('stop = "": an empty string would end every text at once')
        if not isinstance(each, (str, int)) or isinstance(each, bool):
            raise ValueError(f"stop = {brief(each)}: expected strings or token ids")
    texts = [each for each in stop if isinstance(each, str)]
    return texts, {each for each in stop if not isinstance(each, str)}


def as_texts(prompts):
    """A list of prompts, given one or several. ValueError for what is not text."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, dict)) or not hasattr(prompts, "__iter__"):
        raise ValueError(
            f"found {brief(prompts)}: expected a prompt, or a list of them"
        )
    texts = list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"found {brief(text)} as a prompt: expected a text")
    return texts


def prompt_ids(tokenizer, prompt):
    """(ids of [bos] prompt, ids of the prompt), as training reads a prompt."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise ValueError(f"the prompt is not text: {problem}") from None
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = list(tokenizer.encode(trim(prompt)))
    if not bos + ids:
        raise ValueError("an empty prompt needs a tokenizer with a bos token")
    return bos + ids, ids


class Writer:
    """The text of one row: its new tokens, read after its prompt (alone they would lose
    a leading space), up to the first stop string."""

    def __init__(self, tokenizer, prompt, ends, stops):
        self.tokenizer = tokenizer
        self.row, self.prompt = prompt_ids(tokenizer, prompt)
        self.before = tokenizer.decode(self.prompt)
        self.ends = ends
        self.stops = stops
        self.new_ids = []
        self.shown = 0

    def is_over(self, token):
        """Take the next token; True if the text ends with it."""
        if token in self.ends:
            return True
        self.new_ids.append(token)
        return bool(self.stops) and self.read(self.settled())[1]

    def settled(self):
        """How many of the new tokens read the same whatever follows."""
        is_partial = getattr(self.tokenizer, "is_partial", lambda token: False)
        count = len(self.new_ids)
        while count and is_partial(self.new_ids[count - 1]):
            count -= 1
        return count

    def read(self, count=None):
        """(the text of the first `count` new tokens, does it end at a stop string)"""
        whole = self.tokenizer.decode(self.prompt + self.new_ids[:count])
        # the prompt's own last character may read differently now
        text = whole[len(os.path.commonprefix([self.before, whole])) :]
        ends = [text.find(stop) for stop in self.stops if stop in text]
        return (text[: min(ends)], True) if ends else (text, False)

    def piece(self, at_end=False):
        """What can be shown now, and was not shown before."""
        text, is_over = self.read(None if at_end else self.settled())
        if not at_end and not is_over:
            text = text.rstrip("\ufffd")  # the first bytes of a character
            text = text[: len(text) - self.begins_stop(text)]
        piece = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return piece

    def begins_stop(self, text):
        """The length of the longest end of `text` that a stop string begins with."""
        lengths = [n for stop in self.stops for n in range(1, len(stop))]
        starts = {n for stop in self.stops for n in lengths if text.endswith(stop[:n])}
        return max(starts, default=0)


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
    each prompt, end token left out. Spaces at a prompt's end are dropped, as in
    training: the text begins with its own.

    stop: strings or token ids at which a text ends, themselves left out. seed: makes
    sampling repeatable. stream: True gives an iterator over pieces of the same text, a
    function is called with each piece; for one prompt only. adapter_names: one a
    prompt, for a model that holds several adapters. Raises ValueError for a prompt
    longer than the model's context."""
    single = isinstance(prompts, str)
    prompts = as_texts(prompts)
    if stream and not single:
        raise ValueError("stream needs one prompt, a str")
    tokenizer = wrap(tokenizer)
    check_number("batch_size", batch_size, whole=True, least=1)
    if adapter_names is not None and len(adapter_names) != len(prompts):
        raise ValueError(
            f"{len(adapter_names)} adapter_names for {len(prompts)} prompts: expected"
            " one name a prompt"
        )
    stops, ends = check_stop(stop)
    ends = ends | eos_ids(model, tokenizer)
    writers = [Writer(tokenizer, prompt, ends, stops) for prompt in prompts]
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling["generator"] = seeded_generator(model, seed)

    def write(batch):  # the numbers of some prompts
        rows = [writers[i].row for i in batch]
        names = adapter_names and [adapter_names[i] for i in batch]

        def is_over(b, token):
            return writers[batch[b]].is_over(token)

        return decode(model, rows, max_new_tokens, is_over, names, **sampling)

    def steps():
        # like lengths together: less padding
        order = sorted(range(len(writers)), key=lambda i: len(writers[i].row))
        for start in range(0, len(order), batch_size):
            yield from write(order[start : start + batch_size])

    def pieces():
        for _ in steps():
            if piece := writers[0].piece():
                yield piece
        if piece := writers[0].piece(at_end=True):
            yield piece

    if stream is True:
        return pieces()
    if stream:
        for piece in pieces():
            stream(piece)
    else:
        for _ in steps():
            pass
    texts = [writer.read()[0] for writer in writers]
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
    ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    ends = eos_ids(model) if ends is None else set(ends)
    if pad_token_id is None:
        pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    if pad_token_id in (None, -1):  # -1: LLaMA-1's files
        pad_token_id = min(ends, default=0)
    columns = []
    for new in decode(
        model,
        rows,
        max_new_tokens,
        lambda i, token: token in ends,
        adapter_names,
        temperature=temperature if do_sample else 0.0,
        top_k=top_k or None,
        top_p=top_p,
        generator=seeded_generator(model, seed),
    ):
        column = torch.full_like(input_ids[:, :1], pad_token_id)
        for i, token in new:
            column[i] = token
        columns.append(column)
    return torch.cat([input_ids, *columns], dim=1)
