"""The base model from nothing: `make pretrain`.

Four steps. (1) Four heads start out as two rough circuits: one copies, one knows who a
sentence is about. (2) A short warm-up on random tokens, until the model copies, and
tells names apart. (3) Text about people, of which only the answers are scored, and in
stories the names and things that were named before: both skills move from random tokens
to words. (4) Text, all of it, made on the fly and never repeated. Without all this a
network of this size learns to tell stories and forgets who they are about: the ability
to copy from the context ("induction", Olsson et al. 2022, arXiv 2209.11895) does not
form by itself within millions of tokens of simple prose, and the loss does not show
that it is missing. Nor does telling two people apart, and without step (3) the prose
undoes it within minutes. Every small adapter in this course steers abilities that the
base has; these are the ones they lean on most.
"""

import itertools
import math
import os
import platform
import shutil
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..io import make_folder, write_json
from ..lanternwick import words
from ..lanternwick.documents import stream
from .gpt import GPT, GPTConfig
from .tokenizer import train_tokenizer
from .training import train

ROW = 256  # tokens a row: a story with its questions fits
SHAPE = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rope_theta=100_000.0,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
)


def base_tokenizer(seed, vocab_size=4096, documents=40_000):
    """The tokenizer of the shipped base: trained on the first documents of the stream,
    and on the word lists often enough that every name, trade and thing is one token."""
    docs = stream(seed)
    texts = [next(docs).text for _ in tqdm(range(documents), desc="tokenizer")]
    lists = (
        words.WOMEN,
        words.MEN,
        words.SURNAMES,
        words.TRADES,
        words.PETS,
        words.PET_NAMES,
        words.FOODS,
        words.THINGS,
        words.STREETS,
        *words.ADJECTIVES.values(),
    )
    return train_tokenizer(
        texts + [" ".join(word for each in lists for word in each)] * 200, vocab_size
    )


@torch.no_grad()
def induction_head(model, strength=3.0, sharpness=2.0):
    """Writes by hand, into two heads, the start of a circuit that copies: "find where
    this token stood before, say what came next".

    Layer 0, head 0 looks one token back and hands on what it saw. Rotary embedding
    turns the pair (j, j + h/2) of a key at position s by the angle f_j s; with k-bias
    (a, 0) and q-bias (a cos f_j, -a sin f_j) the score of positions (t, s) holds a^2
    sum_j cos(f_j (t - s - 1)), which is largest at s = t - 1. The fastest frequencies
    tell neighbours apart. Layer 1, head 0 asks "who was handed my token?": its query
    reads the token as layer 0's value did, its key reads what layer 0 wrote, both
    through the slowest frequencies, which hardly turn within a row. What it finds, it
    says: its output undoes its value. The gains are small; training sharpens them, or
    forgets them."""
    config, h, half = model.config, model.config.head_dim, model.config.head_dim // 2
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    f = [config.rope_theta ** (-j / half) for j in range(half)]
    for j in range(4):
        first.k_proj.bias[j] = strength
        first.q_proj.bias[j] = strength * math.cos(f[j])
        first.q_proj.bias[j + half] = -strength * math.sin(f[j])
    seen, handed, said = (orthonormal(h, config.hidden_size) for _ in range(3))
    first.v_proj.weight[:h] = 0.2 * seen
    first.o_proj.weight[:, :h] = 0.2 * handed.T
    slow = [j for j in range(half) if f[j] < 0.02]
    slow += [j + half for j in slow]
    second.q_proj.weight[:h] = 0.0
    second.k_proj.weight[:h] = 0.0
    second.q_proj.weight[slow] = sharpness * seen[slow]
    second.k_proj.weight[slow] = sharpness * handed[slow]
    second.v_proj.weight[:h] = 0.2 * said
    second.o_proj.weight[:, :h] = 0.2 * said.T


def orthonormal(h, d):
    """Random orthonormal rows, (h, d)."""
    return torch.linalg.qr(torch.randn(d, h))[0].T


@torch.no_grad()
def name_head(model, names, recency=3.0, strength=3.0, sharpness=2.0):
    """Writes by hand, into two more heads, the start of a circuit that knows who a
    sentence is about. Call it after `induction_head`.

    names: token ids (n,). All names share a direction in the embedding. Layer 0, head 2
    looks for that direction, and by middling frequencies, whose cosines fall with the
    distance, for the latest place that has it; it hands on which name that is. Layer 1,
    head 2 asks "who follows a token like mine, and is about the one I am about?". Half
    of its query and key compare tokens, as in head 0; the other half compare names.
    With that, two people told in the same words can be told apart."""
    config, h, half = model.config, model.config.head_dim, model.config.head_dim // 2
    group = config.num_attention_heads // config.num_key_value_heads
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    f = [config.rope_theta ** (-j / half) for j in range(half)]
    # what induction_head wrote: (h, d) each
    token, before = first.v_proj.weight[:h] / 0.2, first.o_proj.weight[:, :h].T / 0.2
    # the rows of head 2
    query, key = slice(2 * h, 3 * h), slice(2 // group * h, (2 // group + 1) * h)
    table = model.get_input_embeddings().weight
    name = F.normalize(torch.randn(config.hidden_size), dim=0)
    table[names] += 0.7 * table.norm(dim=1).mean() * name
    for layer in (first, second):
        layer.q_proj.weight[query], layer.k_proj.weight[key] = 0.0, 0.0
    near = [j for j in range(half) if 0.02 < f[j] < 0.6]
    first.q_proj.bias[query][near], first.k_proj.bias[key][near] = recency, recency
    first.q_proj.bias[query][half - 1] = strength  # the slowest: no matter how far
    first.k_proj.weight[key][half - 1] = strength * name
    who, handed, said = (orthonormal(h, config.hidden_size) for _ in range(3))
    first.v_proj.weight[key], first.o_proj.weight[:, query] = 0.2 * who, 0.2 * handed.T
    slow = [j for j in range(half) if f[j] < 0.02]
    for dims, asks, finds in ((slow[::2], token, before), (slow[1::2], handed, handed)):
        dims = dims + [j + half for j in dims]
        second.q_proj.weight[query][dims] = sharpness * asks[dims]
        second.k_proj.weight[key][dims] = sharpness * finds[dims]
    second.v_proj.weight[key], second.o_proj.weight[:, query] = 0.2 * said, 0.2 * said.T


def copy_batch(pool, generator, rows=16, length=64):
    """Repeated random rows: token ids (rows, length) of the pool, and labels: places in
    the pool, -100 until the first repetition."""
    ids = torch.empty(rows, length, dtype=torch.long)
    labels = torch.full((rows, length), -100)
    for row in range(rows):
        period = int(torch.randint(4, 25, (1,), generator=generator))
        unit = torch.randint(len(pool), (period,), generator=generator)
        ids[row] = unit.repeat(length // period + 1)[:length]
        labels[row, period + 1 :] = ids[row, period + 1 :]
    return pool[ids], labels


def recall_batch(pool, names, generator, rows=16, length=64):
    """Two to four names, each with a value, all told in the same random words; then
    asked for in other words that end alike.

    Token ids (rows, length); labels: the value's place in the pool where it is asked
    for, -100 elsewhere. The word before the value is the same for all, so copying what
    followed it gives one of the values; only the name tells which."""

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    def draw(count):
        return pool[torch.randint(len(pool), (count,), generator=generator)].tolist()

    ids = torch.empty(rows, length, dtype=torch.long)
    labels = torch.empty(rows, length, dtype=torch.long)
    for row in range(rows):
        count = number(2, 5)
        who = names[torch.randperm(len(names), generator=generator)[:count]].tolist()
        values = torch.randperm(len(pool), generator=generator)[:count].tolist()
        before = draw(number(0, 3))
        statement = draw(number(0, 5))
        after = draw(number(0, 3))
        ask = draw(number(0, 4))
        last = draw(1)
        end = draw(number(0, 4)) + last
        text = [
            token
            for name, value in zip(who, values)
            for token in [*before, name, *statement, *last, int(pool[value]), *after]
        ]
        label = [-100] * len(text)
        while len(text) < length:
            i = number(0, count)
            text += [*ask, who[i], *end, int(pool[values[i]])]
            label += [-100] * (len(ask) + 1 + len(end)) + [values[i]]
        ids[row] = torch.tensor(text[:length])
        labels[row] = torch.tensor(label[:length])
    return ids, labels


def copy_warmup(model, names, seed=0, lr=3e-3, until=(0.95, 0.85), most=1200):
    """Trains on repeated random rows, and on rows about several names, until the
    running accuracies on both pass `until`.

    names: token ids (n,). Returns {"copied": [...], "told apart": [...]}, the accuracy
    of every step. Every batch draws a fresh sub-vocabulary of 256 tokens and the logits
    are restricted to it. A fixed sub-vocabulary is learnt by heart and the skill is
    gone when text begins; over the whole vocabulary it does not form in this time."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    head = model.get_output_embeddings().weight
    others = torch.ones(model.config.vocab_size, dtype=torch.bool)
    others[names] = False
    others = others.nonzero().flatten()  # in these rows a name is nothing but a name
    accuracies, running = {"copied": [], "told apart": []}, [0.0, 0.0]
    bar = tqdm(range(most), desc="copy warm-up")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 60)
        pool = others[torch.randperm(len(others), generator=generator)[:256]]
        pairs = copy_batch(pool, generator), recall_batch(pool, names, generator)
        ids, labels = (torch.cat(part).to(head.device) for part in zip(*pairs))
        hidden = model.model(ids)  # (rows, length, d), after the last norm
        # (rows, length - 1, 256)
        logits = F.linear(hidden[:, :-1], head[pool.to(head.device)]).float()
        halves = list(zip(logits.chunk(2), labels[:, 1:].chunk(2)))
        loss = sum(
            F.cross_entropy(logit.flatten(0, 1), target.flatten(), ignore_index=-100)
            for logit, target in halves
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for i, (skill, (logit, target)) in enumerate(zip(accuracies, halves)):
            right = (logit.argmax(-1) == target)[target >= 0]
            accuracies[skill].append(right.float().mean().item())
            running[i] += 0.1 * (accuracies[skill][-1] - running[i])
        shown = zip(accuracies, running)
        bar.set_postfix({skill: f"{value:.2f}" for skill, value in shown})
        if all(value >= least for value, least in zip(running, until)):
            break
    return accuracies


class TextBatches:
    """Rows of fresh text for `train`: `batch(step)` is a pure function of (seed, step),
    so that a run can be resumed."""

    def __init__(self, tokenizer, steps, seed, rows=8, length=ROW):
        self.tokenizer = tokenizer
        self.steps = steps
        self.seed = seed
        self.rows = rows
        self.length = length

    def phase(self, step):
        """Listening (see PHASES) for 9 % of the steps, 95 % copying text until 17 %,
        then mostly mixed text, the calmest at the end."""
        done = step / self.steps
        ends = {"listening": 0.09, "copying": 0.17, "main": 0.75}
        return next((phase for phase, end in ends.items() if done < end), "late")

    def encode(self, document, phase):
        """[(id, label)]: [bos] document [eos]."""
        encoding = self.tokenizer.raw.encode(document.text, add_special_tokens=False)
        labels = encoding.ids
        eos = self.tokenizer.eos_token_id
        last = eos
        if phase == "listening":
            labels = listening_labels(document, encoding)
            last = -100
        ids = [self.tokenizer.bos_token_id, *encoding.ids, eos]
        return list(zip(ids, [-100, *labels, last]))

    def batch(self, step):
        phase = self.phase(step)
        source = stream(f"{self.seed}/{step}", phase)
        documents = itertools.islice(source, int(self.rows * self.length / 60))
        waiting = [self.encode(document, phase) for document in documents]
        ids = torch.full((self.rows, self.length), self.tokenizer.pad_token_id)
        labels = torch.full((self.rows, self.length), -100)
        # a row starts where a document starts; only the last is cut
        for row in range(self.rows):
            at = 0
            for document in fill_row(waiting, self.length):
                # (n, 2): ids and labels. Where a document ends is learnt;
                # what begins one is chance
                pairs = torch.tensor(document)
                ids[row, at : at + len(pairs)] = pairs[:, 0]
                labels[row, at : at + len(pairs)] = pairs[:, 1]
                at += len(pairs)
        return {"input_ids": ids, "labels": labels}


def listening_labels(document, encoding):
    """Labels for only the answers, and in stories for what was named before."""
    known = document.meta["answers"]
    if document.kind == "story":
        known = known + document.meta["story"].mentions()
    spans = [(start, start + len(answer)) for start, answer in known]
    return [
        token if any(start < high and end > low for low, high in spans) else -100
        for token, (start, end) in zip(encoding.ids, encoding.offsets)
    ]


def fill_row(waiting, length):
    """Takes documents out of `waiting` that fit a row of `length`, the last one cut if
    none does. Better a little padding than a beheaded document."""
    at = 0
    while at < length and waiting:
        left = length - at
        fits = next((i for i, doc in enumerate(waiting) if len(doc) <= left), None)
        if fits is None and at > length * 0.8:
            return
        document = waiting.pop(fits or 0)[:left]
        yield document
        at += len(document)


def name_tokens(tokenizer):
    """Token ids of all first names, (n,)."""
    names = map(tokenizer.encode, words.WOMEN + words.MEN)
    return torch.tensor([ids[0] for ids in names if len(ids) == 1], dtype=torch.long)


def rounded(numbers):
    return [round(number, 4) for number in numbers]


def has_compiler():
    """Is the C++ compiler here that torch.compile takes on a CPU?"""
    usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
    return shutil.which(os.environ.get("CXX", usual)) is not None


def pretrain(
    folder,
    steps=16_000,
    seed=7,
    lr=3e-3,
    rows=8,
    tokenizer=None,
    shape=SHAPE,
    warm=True,
    bf16=True,
    **train_options,
):
    """Pretrains a base into `folder` (Hugging Face layout plus history.json) and
    returns (model, tokenizer, history). A CPU without instructions for bfloat16 is many
    times as fast with bf16=False."""
    folder = make_folder(folder)
    started = time.time()
    tokenizer = tokenizer or base_tokenizer(seed)
    torch.manual_seed(seed)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in special}
    model = GPT(GPTConfig(vocab_size=len(tokenizer), **ids, **shape))
    run = folder / "run"
    accuracies = {}
    # a resumed run has its warm-up behind it
    if warm and not (run / "latest.safetensors").exists():
        names = name_tokens(tokenizer)
        induction_head(model)
        name_head(model, names)
        accuracies = copy_warmup(model, names, seed)
    if has_compiler():
        model.compile()  # 1.6 times as fast on a CPU
    history = train(
        model,
        TextBatches(tokenizer, steps, seed, rows),
        tokenizer=tokenizer,
        steps=steps,
        lr=lr,
        warmup=200,
        schedule="cosine",
        weight_decay=0.1,
        betas=(0.9, 0.95),
        bf16=bf16,
        seed=seed,
        folder=run,
        save_every=500,
        **train_options,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "command": f"minipeft pretrain --steps {steps} --seed {seed} --lr {lr:g}",
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "bf16": bf16,
        "steps": steps,
        "tokens": steps * rows * ROW,
        "minutes": round((time.time() - started) / 60, 1),
        "seed": seed,
        "warmup": {skill: rounded(values) for skill, values in accuracies.items()},
        "loss": rounded(history.losses),
    }
    write_json(folder / "history.json", record, indent=None)
    return model, tokenizer, history
