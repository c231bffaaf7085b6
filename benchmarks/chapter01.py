"""The longer runs of chapter 01: how the ability to copy appears, and what the loss does not show.

    python benchmarks/chapter01.py        # writes benchmarks/results/chapter01.json

(1) The copy warm-up of a model of two blocks, with and without the hand-written drafts of its circuits, several seeds.
(2) Two short pretrainings of the base's shape on the same text, one after a warm-up and one without: the loss, and how
many questions about a stranger, introduced just before, are answered.
"""
import argparse
import json
import random
import re
from pathlib import Path

import torch
from common import RESULTS, facts, save

from minipeft.lanternwick.documents import strangers
from minipeft.lm import GPT, GPTConfig, generate, load_pretrained, load_tokenizer, train
from minipeft.lm.pretrain import SHAPE, Text, copy_warmup, induction_head, name_head, name_tokens

SMALL = SHAPE | dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, head_dim=32)
SEEDS, MOST, STEPS, EVERY = (0, 1, 2), 400, 500, 50


def warmed(config: GPTConfig, draft: bool, seed: int, most: int):
    """A fresh model after the copy warm-up, and the accuracies of its steps."""
    names = name_tokens(load_tokenizer())
    torch.manual_seed(seed)
    model = GPT(config)
    if draft:
        induction_head(model)
        name_head(model, names)
    return model, copy_warmup(model, names, seed, most=most)


def warmup(draft: bool, seed: int, most: int) -> dict:
    config = GPTConfig(vocab_size=len(load_tokenizer()), bos_token_id=1, eos_token_id=2, pad_token_id=0, **SMALL)
    accuracies = warmed(config, draft, seed, most)[1]
    return {"draft": draft, "seed": seed, "layers": config.num_hidden_layers} | {
        skill: [round(value, 3) for value in values] for skill, values in accuracies.items()}


def answered(model, tokenizer, count=1, questions=120) -> float:
    """Per cent of questions about strangers that the model answers."""
    rng, rows = random.Random(5), []
    while len(rows) < questions:
        document = strangers(rng, count)
        rows += [(document.text[:start].rstrip(" "), answer) for start, answer in document.meta["answers"]]
    plain = lambda text: re.sub(r"^(an?|the) ", "", text.strip(" \"'").lower())
    said = generate(model, tokenizer, [prompt for prompt, _ in rows[:questions]], max_new_tokens=6)
    right = sum(plain(text).startswith(plain(answer)) for text, (_, answer) in zip(said, rows))
    return round(100 * right / questions, 1)


def reading(warm: bool, steps: int, every: int) -> dict:
    """A short pretraining of the base's shape."""
    tokenizer, config = load_tokenizer(), load_pretrained().config
    torch.manual_seed(0)
    model = warmed(config, True, 0, 1200)[0] if warm else GPT(config)
    asked = []

    def log(step, _):
        if (step + 1) % every == 0:
            asked.append([step + 1, answered(model, tokenizer)])

    history = train(model, Text(tokenizer, steps, 7), tokenizer=tokenizer, steps=steps, lr=3e-3, warmup=50,
                    weight_decay=0.1, betas=(0.9, 0.95), bf16=True, log=log)
    return {"warm": warm, "steps": steps, "tokens": history.tokens, "loss": [round(x, 3) for x in history.losses],
            "answered": asked}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=MOST, help="steps of a warm-up that does not succeed")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each short pretraining")
    parser.add_argument("--every", type=int, default=EVERY, help="questions are asked every so many steps")
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter01.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = facts() | {"seeds": list(SEEDS), "warmup": [], "reading": []}
    if given.out.exists():                                           # what is in the file is not run again
        old = json.loads(given.out.read_text(encoding="utf-8"))
        record |= {part: old[part] for part in ("warmup", "reading")}
    for draft, seed in [(draft, seed) for draft in (True, False) for seed in SEEDS]:
        if not any((run["draft"], run["seed"]) == (draft, seed) for run in record["warmup"]):
            record["warmup"].append(warmup(draft, seed, given.most))
            save(given.out, record)
    for warm in (True, False):
        if not any(run["warm"] == warm for run in record["reading"]):
            record["reading"].append(reading(warm, given.steps, given.every))
            save(given.out, record)


if __name__ == "__main__":
    main()
