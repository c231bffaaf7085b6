"""Data for training: by name or from your own file, then rows of tokens, then batches.

    load_data("sql")          one of Lanternwick's tasks
    load_data("e2e_nlg")      a real data set: fetched once from its public home,
      checked, kept in a cache
    load_data("my.jsonl")     your own, {"prompt": ..., "completion": ...} a line; or
      .csv, .txt (see user_data.py)

All are a Task: Examples in train, valid and test, and a score. The cache is
~/.cache/minipeft, or MINIPEFT_CACHE.
"""

import csv
import os
import random
import zlib
from array import array
from collections import defaultdict
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch

from ..io import brief, check_file, check_number, did_you_mean, progress, read_text
from ..lanternwick.scoring import bleu, percent, plain
from ..lanternwick.tasks import TASKS, Example, Task, load_task
from .fetch import DataError, fetch
from .tokenizer import wrap
from .user_data import PARTS, SUFFIXES, paragraphs, read_user_file


def load_data(name, tokenizer=None):
    """A Task by name (Lanternwick's or a real one), or from the path of a .txt, .jsonl
    or .csv file. Raises DataError.

    tokenizer: its chat template puts instructions and messages into words."""
    if not isinstance(name, str | os.PathLike):
        names = ", ".join([*TASKS, *PUBLIC_DATASETS])
        raise DataError(f"{brief(name)} is not a name: expected one of {names}")
    if name in TASKS:
        return load_task(name)
    if name in PUBLIC_DATASETS:
        return PUBLIC_DATASETS[name]()
    path = Path(name)
    if path.suffix in SUFFIXES and os.path.exists(path):
        return load_file(path, tokenizer)
    raise DataError(not_there(name, path))


def not_there(name, path):
    """Why there are no data of this name: what it is instead, or what is near."""
    if os.path.isdir(path):  # no error for a name that is too long
        return f"{name} is a folder: expected a .txt, .jsonl or .csv file"
    if os.path.isfile(path):
        kind = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        hint = ". .jsonl is JSON with one record a line" * (path.suffix == ".json")
        return f"{name} is {kind}: expected a .txt, .jsonl or .csv file{hint}"
    names = [*TASKS, *PUBLIC_DATASETS]
    files = beside(path, lambda file: file.suffix in SUFFIXES and file.exists())
    near = did_you_mean(name, [*names, *files])
    if path.suffix in SUFFIXES:
        check_file(path, lambda reason: DataError(f"{reason}{near}"))
    expected = f"expected one of {', '.join(names)}, or a .txt, .jsonl or .csv file"
    return f"no data set {str(name)!r}{near}: {expected}"


def beside(path, wanted, most=1000):
    """What stands in a path's folder and is wanted, as the path would be written."""
    try:
        return [str(at) for at in islice(path.parent.iterdir(), most) if wanted(at)]
    except (OSError, ValueError):
        return []


def split(groups):
    """Lists of Examples -> train, valid, test: a tenth of the groups for valid and for
    test, the same every time."""
    groups = random.Random("split").sample(groups, len(groups))
    tenth = max(1, len(groups) // 10)
    parts = groups[2 * tenth :], groups[:tenth], groups[tenth : 2 * tenth]
    return [[example for group in part for example in group] for part in parts]


# ---- real data sets ------------------------------------------------------------------


def e2e_nlg():
    """Restaurants, from data to text: Novikova et al. 2017 (arXiv 1706.09254), CC BY-SA
    4.0.

    An example a text in train; an example a record in valid and test, with all its
    texts as references."""
    short = {
        "eatType": "type",
        "priceRange": "price",
        "customer rating": "rating",
        "familyFriendly": "family friendly",
    }

    def read(file):
        references = defaultdict(list)  # prompt -> what people wrote
        with open(fetch(f"e2e_nlg/{file}"), encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                slots = row["mr"].split(", ")  # ["food[French]", "area[city]"]
                pairs = [slot.rstrip("]").split("[", 1) for slot in slots]
                record = " ; ".join(f"{short.get(key, key)}: {v}" for key, v in pairs)
                references[f"Record: {record}\nText:"].append(plain(row["ref"]))
        return references

    train = [
        Example(prompt, f" {text}", {})
        for prompt, texts in read("trainset.csv").items()
        for text in texts
    ]
    valid, test = (
        [
            Example(prompt, f" {texts[0]}", {"references": texts})
            for prompt, texts in read(file).items()
        ]
        for file in ("devset.csv", "testset_w_refs.csv")
    )

    def score(predictions, examples):
        return {"bleu": bleu(predictions, [e.meta["references"] for e in examples])}

    return Task(
        "e2e_nlg",
        "restaurants, from data to text (real; sacrebleu with all references)",
        train,
        valid,
        test,
        "bleu",
        0.0,
        score,
    )


def sentence_polarity():
    """Sentences of film reviews, for or against: Pang and Lee 2005 (arXiv cs/0506075),
    CC BY 4.0."""
    examples = [
        Example(f"Review: {line.strip()}\nThe writer felt", f" {word}", {})
        for word, end in (("glad", "pos"), ("sad", "neg"))
        for line in read_text(
            fetch(f"sentence_polarity/rt-polarity.{end}")
        ).splitlines()
    ]

    def score(predictions, examples):
        return {"accuracy": exact(predictions, examples)["exact"]}

    return Task(
        "sentence_polarity",
        "film reviews: is the writer glad or sad? (real)",
        *split([[example] for example in examples]),
        "accuracy",
        50.0,
        score,
    )


def tinyshakespeare():
    """A megabyte of Shakespeare's plays (public domain). Its last tenth is for valid
    and test."""
    blocks = [
        Example("", text, {})
        for _, text in paragraphs(fetch("tinyshakespeare/input.txt"))
    ]
    n = len(blocks) // 20
    return Task(
        "tinyshakespeare",
        "Shakespeare's plays (real; plain text)",
        blocks[: -2 * n],
        blocks[-2 * n : -n],
        blocks[-n:],
        *PLAIN_TEXT,
    )


PUBLIC_DATASETS = {
    "e2e_nlg": e2e_nlg,
    "sentence_polarity": sentence_polarity,
    "tinyshakespeare": tinyshakespeare,
}
# metric, floor, score: there is no right answer to compare with
PLAIN_TEXT = "perplexity", None, None


def exact(predictions, examples):
    pairs = zip(predictions, examples, strict=True)
    return {"exact": percent(plain(p) == plain(e.completion) for p, e in pairs)}


# ---- your own file -------------------------------------------------------------------


def load_file(path, tokenizer=None):
    """A Task from a user's file; equal prompts stay in one split."""
    groups = defaultdict(list)
    records = read_user_file(path, tokenizer)
    for prompt, completion, number in records:
        groups[prompt or completion].append(
            Example(prompt, completion, {"file": str(path), "line": number})
        )
    has_prompts = bool(records) and records[0][0] != ""
    if len(groups) < 3:
        what = "prompt" if has_prompts else "text"
        plural = "" if len(groups) == 1 else "s"
        raise DataError(
            f"{path}: found {len(groups)} {what}{plural}, equal ones counted once;"
            " expected at least 3, one each for train, valid and test."
            f" {PARTS[path.suffix]}"
        )
    judged = ("exact", 0.0, exact) if has_prompts else PLAIN_TEXT
    return Task(
        path.stem, f"your file {path.name}", *split(list(groups.values())), *judged
    )


# ---- from examples to batches --------------------------------------------------------


def max_tokens(model):
    """How many tokens a row may have: the model's positions, or None where it sets no
    limit."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def encode(tokenizer, example, max_length=None, truncate=False):
    """An Example -> (ids, labels): [bos] prompt completion [eos]; only the completion
    is learnt, other labels are -100.

    More than max_length tokens are a DataError that names the example; with
    truncate=True its prompt loses its start."""
    check_example(example)
    tokenizer = wrap(tokenizer)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = tokenizer.encode(example.prompt) if example.prompt else []
    completion = completion_ids(tokenizer, example.prompt, example.completion)
    completion = [*completion, tokenizer.eos_token_id]
    length = len(start + prompt + completion)
    over = length - (max_length or length)
    if over > 0:
        if not truncate or over > len(prompt):
            advice = ", or make Batches(..., truncate=True), which cut its prompt"
            raise too_long(example, length, max_length, "" if truncate else advice)
        prompt = prompt[over:]
    ids = start + prompt + completion
    return ids, [-100] * len(start + prompt) + completion


def too_long(example, length, max_length, advice=""):
    """The DataError for an example that does not fit a row."""
    meta = example.meta or {}
    where = f"the example {(example.prompt or example.completion)[:60]!r}"
    if "line" in meta:
        where = f"{meta['file']}, line {meta['line']}"
    return DataError(
        f"{where}: {length} tokens, but a row holds {max_length}. Shorten or remove"
        f" it{advice}"
    )


def check_examples(examples):
    """DataError for what is no list of Examples, or other iterable of them."""
    is_iterable = hasattr(examples, "__iter__") or hasattr(examples, "__getitem__")
    if isinstance(examples, str) or not is_iterable:
        raise DataError(
            f"{brief(examples)} is not data: expected a list of Examples, such as"
            " load_data('sql').train"
        )


def check_example(example):
    """DataError for anything else."""
    prompt = getattr(example, "prompt", 0)
    completion = getattr(example, "completion", None)
    if not isinstance(prompt, str | None) or not isinstance(completion, str):
        raise DataError(
            f"found {brief(example)}: expected an Example with two texts, its prompt"
            " and its completion"
        )


def check_lengths(tokenizer, examples, max_length):
    """DataError for the first example with a prompt that has more than max_length
    tokens. (A text without one is cut into rows.)"""
    check_examples(examples)
    tokenizer = cached_tokenizer(tokenizer)
    for example in examples:
        check_example(example)
        if max_length and example.prompt:
            length = len(encode(tokenizer, example)[0])
            if length > max_length:
                raise too_long(example, length, max_length)


def check_ids(model, ids, what="the tokenizer"):
    """ValueError if the largest of `ids` is beyond the model's embedding."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    largest = max(ids, default=0)
    if size is not None and largest >= size:
        raise ValueError(
            f"{what} gives the id {largest}, but the model's vocabulary has"
            f" {size} tokens: expected the model's own tokenizer"
        )


def cached_tokenizer(tokenizer):
    """What `encode` needs of a tokenizer, with a memory: prompts come again, with other
    completions."""
    tokenizer = wrap(tokenizer)
    pad = tokenizer.pad_token_id
    return SimpleNamespace(
        encode=lru_cache(None)(tokenizer.encode),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )


def completion_ids(tokenizer, prompt, completion):
    """The completion's ids as they follow the prompt's. Alone, a word at the start of a
    text would be taken for one with a space before it."""
    if prompt and not completion.startswith(" "):
        before = tokenizer.encode(prompt)
        both = tokenizer.encode(prompt + completion)
        if both[: len(before)] == before:
            return both[len(before) :]
    return tokenizer.encode(completion)


class Batches:
    """Examples as batches: `.batch(step)` is a pure function of (seed, step), so
    training can stop and go on anywhere.

    Each epoch is a new permutation of the rows; those that do not fill its last batch
    are left out of it. Rows are padded on the right. A text without a prompt that is
    too long for a row becomes several rows, each overlapping the one before by a token,
    so every token is predicted once. bucket=True puts rows of like length together:
    less padding to compute.
    """

    def __init__(
        self,
        examples,
        tokenizer,
        batch_size=16,
        seed=0,
        max_length=None,
        truncate=False,
        bucket=False,
    ):
        if not examples:
            raise DataError("no examples to make batches of")
        check_examples(examples)
        check_number("batch_size", batch_size, whole=True, least=1, error=DataError)
        bounds = {"least": 2, "also": (None,)}  # a token, and one that it predicts
        check_number("max_length", max_length, whole=True, **bounds, error=DataError)
        self.batch_size = batch_size
        self.seed = seed
        self.bucket = bucket
        cached = cached_tokenizer(tokenizer)
        self.pad = cached.pad_token_id
        self.rows = []
        self.truncated = 0
        self._epoch = (None, None)
        for example in progress(examples, "encoding"):
            self._add(cached, example, max_length, truncate)
        if self.truncated:
            print(
                f"{self.truncated} of {len(examples)} prompts lost their beginning to"
                f" fit into {max_length} tokens"
            )

    def _add(self, tokenizer, example, max_length, truncate):
        ids, labels = encode(tokenizer, example)
        if not max_length or len(ids) <= max_length:
            self.rows.append((ids, labels))
        elif not example.prompt:
            for at in range(0, len(ids) - 1, max_length - 1):
                end = at + max_length
                self.rows.append((ids[at:end], labels[at:end]))
        else:
            self.rows.append(encode(tokenizer, example, max_length, truncate))
            self.truncated += 1

    def __len__(self):
        """Batches an epoch."""
        return max(1, len(self.rows) // self.batch_size)

    def largest_id(self):
        return max(max(ids) for ids, _ in self.rows)

    def checksum(self):
        """CRC-32 of all rows: equal numbers, equal batches for equal seeds."""
        crc = 0
        for ids, labels in self.rows:
            numbers = array("q", [len(ids), *ids, *labels])
            crc = zlib.crc32(numbers.tobytes(), crc)
        return crc

    def _order(self, epoch):
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffle(random.Random(f"{self.seed}/{epoch}")))
        return self._epoch[1]

    def _shuffle(self, rng):
        size = self.batch_size
        many = 32 * size
        order = rng.sample(range(len(self.rows)), len(self.rows))
        if self.bucket:  # sort within each 32 batches, then shuffle the batches
            parts = [order[at : at + many] for at in range(0, len(order), many)]

            def length(i):
                return len(self.rows[i][0])

            order = [i for part in parts for i in sorted(part, key=length)]
        batches = [order[at : at + size] for at in range(0, len(self) * size, size)]
        if self.bucket:
            rng.shuffle(batches)
        return batches

    def batch(self, step):
        """Step (from 0) -> {"input_ids", "labels", "attention_mask"}, each (B, T)
        int64, T the longest row's length."""
        epoch, at = divmod(step, len(self))
        return self.pad_rows([self.rows[i] for i in self._order(epoch)[at]])

    def in_order(self):
        """Every row once, the short ones first: for evaluation."""
        rows = sorted(self.rows, key=lambda row: len(row[0]))
        for at in range(0, len(rows), self.batch_size):
            yield self.pad_rows(rows[at : at + self.batch_size])

    def pad_rows(self, rows):
        longest = max(len(ids) for ids, _ in rows)

        def pad(row, value):
            return row + [value] * (longest - len(row))

        ids = [pad(ids, self.pad) for ids, _ in rows]
        labels = [pad(labels, -100) for _, labels in rows]
        mask = [pad([1] * len(ids), 0) for ids, _ in rows]
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "attention_mask": torch.tensor(mask),
        }
