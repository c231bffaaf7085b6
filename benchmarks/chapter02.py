"""The longer runs of chapter 02: what full fine-tuning learns and forgets, at every
rate, and what helps.

    python benchmarks/chapter02.py        # writes benchmarks/results/chapter02.json

Ways: "full"; "rehearsal", every fourth batch is fresh text of the pretraining's kind;
"leash", after each step all weights are pulled back by a share of their way from the
start; "lora", rank 8 on all linear layers, for comparison. What is compared is run with
three seeds; the outermost rates, which only show where the range ends, with one. The
file is written as the runs come in; those that are in it already are not run again.
"""

import copy
import os
import random
import re

import torch
from common import arguments, facts, sweep, valid_loss

from minipeft import LoraConfig, get_peft_model
from minipeft.lanternwick.documents import heldout_questions, stream
from minipeft.lm import (
    evaluate,
    generate,
    load_data,
    load_pretrained,
    load_tokenizer,
    train,
)
from minipeft.lm.data import Batches, Example
from minipeft.lm.evaluation import completion_loss
from minipeft.lm.pretrain import TextBatches

STEPS, WARMUP, SEEDS = 80, 8, (0, 1, 2)
RATES = {
    "full": [3e-4, 1e-3, 3e-3, 1e-2],
    "rehearsal": [1e-3, 3e-3],
    "leash": [1e-3, 3e-3],
    "lora": [3e-3, 1e-2],
}
OUTERMOST = [("full", 3e-4), ("full", 1e-2), ("lora", 3e-3)]
PULL = 0.02  # the leash: the share of the way back after each step, at the peak rate
ITEMS = 100  # of the test split
# steps at which both losses are looked at, besides the first and the last
LOOKS = (10, 40)


def town_text(documents: int = 50) -> list:
    texts = stream("not seen before")
    return [Example("", next(texts).text, {}) for _ in range(documents)]


def recalled(model, tokenizer, questions: int = 80) -> float:
    """Per cent of facts of the register."""

    def plain(text):
        return re.sub(r"^(an?|the) ", "", text.strip(" \"'").lower())

    asked = random.Random(3).sample(heldout_questions(), questions)
    said = generate(
        model,
        tokenizer,
        [f"Question: {row['question']} Answer:" for row in asked],
        max_new_tokens=6,
    )
    return round(
        100
        * sum(
            plain(text).startswith(plain(row["answer"]))
            for text, row in zip(said, asked)
        )
        / questions,
        1,
    )


class Mixed:
    """The task's batches; every fourth one is the pretraining's kind of text."""

    def __init__(self, task, text):
        self.task, self.text = task, text

    def batch(self, step):
        if step % 4 < 3:
            return self.task.batch(step)
        batch = self.text.batch(step)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def rows_of(job, sql, tokenizer):
    """The batches: with rehearsal, of the town's text too."""
    data = Batches(sql.train, tokenizer, 16, seed=job["seed"])
    if job["way"] == "rehearsal":
        data = Mixed(
            data, TextBatches(tokenizer, 10**9, f"rehearsal {job['seed']}", rows=4)
        )
        # the mixture that the base's pretraining ended with
        data.text.phase = lambda step: "late"
    return data


def moved_by(model, base):
    """How far the weights are from the base's, as a share of their length."""

    def flat(m):
        return torch.cat([p.detach().flatten() for p in m.parameters()])

    before = flat(base)
    return ((flat(model) - before).norm() / before.norm()).item()


def one_run(job: dict) -> dict:
    """job: {"way", "lr", "seed", "steps"}"""
    torch.set_num_threads(1)
    tokenizer, sql, base = load_tokenizer(), load_data("sql"), load_pretrained()
    model, town = copy.deepcopy(base), town_text()
    if job["way"] == "lora":
        torch.manual_seed(job["seed"])
        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        )
    data = rows_of(job, sql, tokenizer)
    start = [p.detach().clone() for p in model.parameters()]
    path = []

    def look(step):
        path.append(
            {
                "step": step,
                "task": valid_loss(model, tokenizer, sql, 64),
                "town": round(completion_loss(model, tokenizer, town)["loss"], 4),
            }
        )

    def log(step, info):
        if job["way"] == "leash":
            with torch.no_grad():
                for p, p0 in zip(model.parameters(), start):
                    p.lerp_(p0, PULL * info["lr"] / job["lr"])
        if step + 1 in LOOKS and step + 1 < job["steps"]:
            look(step + 1)

    look(0)
    history = train(
        model,
        data,
        tokenizer=tokenizer,
        steps=job["steps"],
        lr=job["lr"],
        warmup=WARMUP,
        seed=job["seed"],
        progress=False,
        log=log,
    )
    look(job["steps"])
    score = evaluate(model, tokenizer, sql, limit=ITEMS, progress=False)[sql.metric]
    known = recalled(model, tokenizer)
    plain = model.merge_and_unload() if job["way"] == "lora" else model
    return job | {
        "stopped": history.stopped,
        "score": round(score, 1),
        "facts": known,
        "town": path[-1]["town"],
        "distance": round(moved_by(plain, base), 5),
        "path": path,
    }


def main():
    parser = arguments(__doc__, "chapter02")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, base = load_tokenizer(), load_pretrained()
    record = facts() | {
        "base": {
            "name": os.environ.get("MINIPEFT_BASE", "lanternwick"),
            "facts": recalled(base, tokenizer),
            "town": round(completion_loss(base, tokenizer, town_text())["loss"], 4),
        },
        "task": "sql",
        "steps": given.steps,
        "batch_size": 16,
        "rates": RATES["full"],
        "pull": PULL,
        "seeds": SEEDS,
        "items": ITEMS,
    }

    def jobs(seed, runs):
        return [
            {"way": way, "lr": lr, "seed": seed, "steps": given.steps}
            for way, rates in RATES.items()
            for lr in rates
            if seed == SEEDS[0] or (way, lr) not in OUTERMOST
        ]

    runs = sweep(jobs, one_run, SEEDS, record, given.out, given.jobs)
    for run in runs:
        print(
            f"{run['way']:10} lr {run['lr']:<7g} seed {run['seed']} score"
            f" {run['score']:5.1f} town {run['town']:.3f} facts {run['facts']:5.1f}"
            f" distance {run['distance']:.3f}"
        )


if __name__ == "__main__":
    main()
