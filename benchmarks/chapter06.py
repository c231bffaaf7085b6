"""The longer runs of chapter 06: LoRA, DoRA and full fine-tuning, each at its own best
learning rate, three seeds.

    python benchmarks/chapter06.py --jobs 2        # writes
      benchmarks/results/chapter06.json

For each method the first seed tries a rate and its neighbours on a ladder, until the
best has a worse one on either side (by the loss on validation questions); the other
seeds then run the best. What is reported is the loss on test questions, how many of the
queries written for them give the right answer, and how far the lengths and directions
of the q and v projections moved. The file is written as the runs come in; those that
are in it already, made on the same base, are not run again. Chapters 07 and 08 do the
same.
"""

import functools
import os

import torch
import torch.nn.functional as F
from common import (
    arguments,
    climb,
    count_trained,
    facts,
    finite,
    fit,
    found,
    sweep,
    test_scores,
    valid_loss,
)

import minipeft
from minipeft import get_peft_model
from minipeft.lm import load_data, load_pretrained, load_tokenizer
from minipeft.lm.data import Batches
from minipeft.methods.rank_allocator import RankAllocator

STEPS, WARMUP, BATCH, SEEDS = 100, 10, 16, (0, 1, 2)
LADDER = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)
CASES = {
    "full": (None, {}),
    "LoRA r 8": ("LoraConfig", dict(r=8, lora_alpha=16)),
    "DoRA r 8": ("DoraConfig", dict(r=8, lora_alpha=16)),
}


@functools.cache
def batches(seed):
    return Batches(load_data("sql").train, load_tokenizer(), BATCH, seed=seed)


def moved(model) -> list:
    """[[mean change of length, mean change of direction]] of the q and v projections,
    row by row as in the chapter."""
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    new, old = merged.state_dict(), load_pretrained().state_dict()
    pairs = [
        (new[name], old[name])
        for name in old
        if "q_proj.weight" in name or "v_proj.weight" in name
    ]
    return [
        [
            round((new.norm(dim=1) - old.norm(dim=1)).abs().mean().item(), 5),
            round((1 - F.cosine_similarity(new, old, dim=1)).mean().item(), 6),
        ]
        for new, old in pairs
    ]


def one_run(job: dict) -> dict:
    """job: {"method", "config", "fields", "lr", "seed", "steps", "test", "moves"};
    config None is full fine-tuning."""
    torch.set_num_threads(1)
    tokenizer, sql, seed, model = (
        load_tokenizer(),
        load_data("sql"),
        job["seed"],
        load_pretrained(),
    )
    torch.manual_seed(seed)
    if job["config"]:
        model = get_peft_model(
            model,
            getattr(minipeft, job["config"])(
                target_modules="all-linear", **job["fields"]
            ),
        )
    parameters = count_trained(model)
    allocator = RankAllocator(model) if job["config"] == "AdaLoraConfig" else None
    log = (lambda *_: allocator.step()) if allocator else None
    history = fit(model, batches(seed), tokenizer, job, warmup=WARMUP, log=log)
    more = (
        {"ranks": {path: sum(part.kept) for path, part in allocator.adapters.items()}}
        if allocator
        else {}
    )
    if job["moves"]:
        more["moved"] = moved(model)
    return (
        job
        | {
            "parameters": parameters,
            "valid_loss": valid_loss(model, tokenizer, sql, 100),
            **test_scores(model, tokenizer, sql, job["test"], digits=1),
            "train_loss": finite(history.recent),
        }
        | more
    )


def best(runs: list, method: str, seed=SEEDS[0]) -> float:
    """The rate with the lowest loss on validation questions."""
    return min(
        found(runs, method=method, seed=seed), key=lambda run: run["valid_loss"]
    )["lr"]


def start(lr, *methods, seeds=SEEDS[:1]):
    return lambda runs: [(method, lr, seed) for seed in seeds for method in methods]


def around(*methods, times=4):
    """The neighbours of the best rate so far, and so on, until the best has both of its
    neighbours."""

    def turn(runs):
        tried = {
            method: {
                run["lr"]: run["valid_loss"]
                for run in found(runs, method=method, seed=SEEDS[0])
            }
            for method in methods
        }
        return [
            (method, lr, SEEDS[0])
            for method in methods
            for lr in climb(tried[method], LADDER, None)
        ]

    return [turn] * times


def again(*methods, seeds=SEEDS[1:], rate_of=None):
    """At the best rate (of another method, if `rate_of` names it), with these seeds."""
    return lambda runs: [
        (method, best(runs, rate_of or method), seed)
        for seed in seeds
        for method in methods
    ]


def main(name, cases, turns, description, *, steps=STEPS, moves=False, argv=None):
    """turns: functions from the runs so far to the next (method, rate, seed)s."""
    parser = arguments(description, name)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument(
        "--test", type=int, default=128, help="questions of the test set"
    )
    given = parser.parse_args(argv)
    more = {"steps": given.steps, "test": given.test, "moves": moves}
    record = (
        facts()
        | {
            "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
            "task": "sql",
            "batch_size": BATCH,
            "warmup": WARMUP,
            "seeds": list(SEEDS),
        }
        | more
    )

    def jobs(turn, runs):
        next_ones = turns[turn](found(runs, **more))
        return [
            {
                "method": method,
                "config": cases[method][0],
                "fields": cases[method][1],
                "lr": lr,
                "seed": seed,
            }
            | more
            for method, lr, seed in next_ones
        ]

    for run in sweep(jobs, one_run, range(len(turns)), record, given.out, given.jobs):
        print(
            f"{run['method']:32} {run['parameters']:9,} lr {run['lr']:<6g} seed"
            f" {run['seed']} valid {run['valid_loss']:.3f} test {run['test_loss']:.3f}"
            f" right {run['score']:.0f} %"
        )


TURNS = [
    start(1e-2, "LoRA r 8", "DoRA r 8"),
    start(1e-3, "full"),
    *around(*CASES),
    again(*CASES),
]

if __name__ == "__main__":
    main("chapter06", CASES, TURNS, __doc__, moves=True)
