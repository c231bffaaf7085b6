"""Data for training: by name or from your own file, then rows of tokens, then batches.

    load_data("sql")          one of Lanternwick's tasks
    load_data("e2e_nlg")      a real data set: fetched once from its public home, checked, kept in a cache
    load_data("my.jsonl")     your own: {"prompt": ..., "completion": ...} or {"text": ...} a line; or my.txt, plain text

All are a Task: Examples in train, valid and test, and a score. The cache is ~/.cache/minipeft, or the folder MINIPEFT_CACHE.
"""
import csv
import difflib
import hashlib
import io
import json
import os
import random
import urllib.error
import urllib.request
import zipfile
from collections import defaultdict
from http.client import HTTPException
from pathlib import Path

import torch
from tqdm.auto import tqdm

E2E, NLTK = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/", "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/"
POLARITY = NLTK + "packages/corpora/sentence_polarity.zip"
HOMES = {  # file in the cache: (its home, sha256). A home that ends in .zip holds a member of that name
    "e2e_nlg/trainset.csv": (E2E + "trainset.csv", "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6"),
    "e2e_nlg/devset.csv": (E2E + "devset.csv", "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9"),
    "e2e_nlg/testset_w_refs.csv": (E2E + "testset_w_refs.csv", "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd"),
    "sentence_polarity/rt-polarity.pos": (POLARITY, "c2dc6b2f55bcf725725372916287cc3f8f9b19402edaa9167de5287cb3ade421"),
    "sentence_polarity/rt-polarity.neg": (POLARITY, "614274f81185a850e5a88d533d4679f916d6f62e9af6f0b4ec71fb94bf466ea5"),
    "tinyshakespeare/input.txt": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                                  "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
}
LONGEST_LINE = 1_000_000  # characters; more is not text that somebody wrote


class DataError(ValueError):
    """Something is wrong with the data, and the message says what, where, and what to do."""


# ---- from examples to batches ---------------------------------------------------------------------------------------------------

def room(model):
    """How many tokens a row may have: the model's positions, or None where it sets no limit."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def encode(tokenizer, example, max_length=None, truncate=False):
    """An Example -> (ids, labels): [bos] prompt completion [eos], with labels -100 on bos and prompt: only the completion is learnt.

    A row of more than max_length tokens is a DataError that names it; with truncate=True the prompt loses its beginning."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    prompt = tokenizer.encode(example.prompt) if example.prompt else []
    completion = tokenizer.encode(example.completion) + [tokenizer.eos_token_id]
    if max_length and (over := len(start + prompt + completion) - max_length) > 0:
        if not truncate or over > len(prompt):
            meta = example.meta or {}
            where = f"{meta['file']}, line {meta['line']}" if "line" in meta else f"the example {(example.prompt or example.completion)[:60]!r}"
            raise DataError(f"{where}: {over + max_length} tokens, but a row holds {max_length}. Shorten or remove it"
                            + ("" if truncate else ", or pass truncate=True to cut its prompt from the left"))
        prompt = prompt[over:]
    ids = start + prompt + completion
    return ids, [-100] * len(start + prompt) + completion


class Batches:
    """Examples as batches: `.batch(step)` is a pure function of (seed, step), so training can stop and go on anywhere.

    Each epoch is a new permutation of the rows; what does not fill its last batch is left out of that epoch. Rows are padded on
    the right. A text without a prompt that is too long for a row becomes several rows, each overlapping the one before by one
    token, so every token is predicted once. bucket=True puts rows of like length together: less padding, less chance.
    """

    def __init__(self, examples, tokenizer, batch_size=16, seed=0, max_length=None, truncate=False, bucket=False):
        if not examples:
            raise DataError("no examples to make batches of")
        self.batch_size, self.seed, self.bucket = batch_size, seed, bucket
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.rows, self.truncated, self._epoch = [], 0, (None, None)
        for example in tqdm(examples, desc="encoding", leave=False, delay=3):
            ids, labels = encode(tokenizer, example, None)
            if not max_length or len(ids) <= max_length:
                self.rows.append((ids, labels))
            elif not example.prompt:
                for at in range(0, len(ids) - 1, max_length - 1):
                    self.rows.append((ids[at:at + max_length], labels[at:at + max_length]))
            else:
                self.rows.append(encode(tokenizer, example, max_length, truncate))
                self.truncated += 1
        if self.truncated:
            print(f"{self.truncated} of {len(examples)} prompts lost their beginning to fit into {max_length} tokens")

    def __len__(self):
        """Batches an epoch."""
        return max(1, len(self.rows) // self.batch_size)

    def _order(self, epoch):
        if self._epoch[0] != epoch:
            chance = random.Random(f"{self.seed}/{epoch}")
            order = chance.sample(range(len(self.rows)), len(self.rows))
            size, many = self.batch_size, 32 * self.batch_size
            if self.bucket:  # sort within each 32 batches, then shuffle the batches
                order = [i for at in range(0, len(order), many) for i in sorted(order[at:at + many], key=lambda i: len(self.rows[i][0]))]
            batches = [order[at:at + size] for at in range(0, len(self) * size, size)]
            if self.bucket:
                chance.shuffle(batches)
            self._epoch = (epoch, batches)
        return self._epoch[1]

    def batch(self, step):
        """Step (from 0) -> {"input_ids", "labels", "attention_mask"}, each (B, T) int64, T the longest row's length."""
        epoch, at = divmod(step, len(self))
        return self.pad_rows([self.rows[i] for i in self._order(epoch)[at]])

    def in_order(self):
        """Every row once, the short ones first: for evaluation."""
        rows = sorted(self.rows, key=lambda row: len(row[0]))
        for at in range(0, len(rows), self.batch_size):
            yield self.pad_rows(rows[at:at + self.batch_size])

    def pad_rows(self, rows):
        longest = max(len(ids) for ids, _ in rows)
        fill = lambda values, with_: values + [with_] * (longest - len(values))
        return {"input_ids": torch.tensor([fill(ids, self.pad) for ids, _ in rows]),
                "labels": torch.tensor([fill(labels, -100) for _, labels in rows]),
                "attention_mask": torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows])}
