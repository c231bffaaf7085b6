"""The longer runs of chapter 06: full fine-tuning, LoRA and DoRA, each at its own best learning rate, three seeds.

    python benchmarks/chapter06.py --jobs 2        # writes benchmarks/results/chapter06.json

For each method the first seed climbs a ladder of rates until the best has a worse one on either side (by the loss on
validation questions); the other seeds then run the best, at rank 8 both its neighbours too. What is reported is the loss on test
questions, and how far the lengths and directions of the q and v projections moved. The file is written as the runs come
in; those that are in it already, made on the same base, are not run again. Chapters 07 and 08 use the same climb.
"""
import argparse
import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, facts, found, sweep

import minipeft
from minipeft import get_peft_model
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.lm.data import Batches
from minipeft.methods.adalora import RankAllocator

WARMUP, BATCH, SEEDS = 10, 16, (0, 1, 2)
LADDER = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)
ROUNDS = 4                                            # of climbing, with the first seed
CASES = {"full": (None, {})}
CASES |= {f"{name} r {r}": (config, dict(r=r, lora_alpha=2 * r))
          for r in (2, 8) for name, config in (("LoRA", "LoraConfig"), ("DoRA", "DoraConfig"))}


@functools.cache
def batches(seed):
    return Batches(load_data("sql").train, load_tokenizer(), BATCH, seed=seed)


def moved(model) -> list:
    """[[mean change of length, mean change of direction]] of the q and v projections, row by row as in the chapter."""
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    new, old = merged.state_dict(), load_pretrained().state_dict()
    pairs = [(new[name], old[name]) for name in old if "q_proj.weight" in name or "v_proj.weight" in name]
    return [[round((new.norm(dim=1) - old.norm(dim=1)).abs().mean().item(), 5),
             round((1 - F.cosine_similarity(new, old, dim=1)).mean().item(), 6)] for new, old in pairs]


def one_run(job: dict) -> dict:
    """job: {"method", "config", "fields", "lr", "seed", "steps", "test", "answers"}; config None is full fine-tuning."""
    torch.set_num_threads(1)
    tokenizer, sql, seed, model = load_tokenizer(), load_data("sql"), job["seed"], load_pretrained()
    torch.manual_seed(seed)
    if job["config"]:
        model = get_peft_model(model, getattr(minipeft, job["config"])(target_modules="all-linear", **job["fields"]))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    allocator = RankAllocator(model) if job["config"] == "AdaLoraConfig" else None
    history = train(model, batches(seed), steps=job["steps"], lr=job["lr"], warmup=WARMUP, seed=seed, progress=False,
                    log=(lambda *_: allocator.step()) if allocator else None)
    valid = evaluate(model, tokenizer, sql, split="valid", limit=100, generate=False, progress=False)["loss"]
    test = evaluate(model, tokenizer, sql, split="test", limit=job["test"], generate=job["answers"], progress=False)
    more = {"ranks": {path: sum(part.kept) for path, part in allocator.adapters.items()}} if allocator else {}
    if job["answers"]:
        more |= {"score": round(test[sql.metric], 1), "moved": moved(model)}
    finite = lambda loss: round(min(loss, 100.0), 4) if loss == loss else 100.0      # a run that went off
    return job | {"parameters": parameters, "valid_loss": finite(valid), "test_loss": finite(test["loss"]),
                  "train_loss": finite(history.recent)} | more


def best(runs: list, method: str, seed=SEEDS[0]) -> float:
    """The rate with the lowest loss on validation questions."""
    return min(found(runs, method=method, seed=seed), key=lambda run: run["valid_loss"])["lr"]


def climb(cases: dict, start: dict, around: tuple, more: dict, seed: int, runs: list) -> list:
    """The next jobs. First seed: the start, then the neighbours of the best so far. Other seeds: the best; the methods in
    `around` its neighbours too."""
    jobs, runs = [], found(runs, **more)
    for method, (config, fields) in cases.items():
        if seed == SEEDS[0] and not found(runs, method=method):
            rates = [start[method]]
        else:
            at, wide = LADDER.index(best(runs, method)), int(seed == SEEDS[0] or method in around)
            rates = LADDER[max(at - wide, 0):at + wide + 1]
        jobs += [{"method": method, "config": config, "fields": fields, "lr": lr, "seed": seed} | more for lr in rates]
    return jobs


def main(name, cases, start, description, *, steps, around=(), answers=False, extra=None, argv=None):
    """answers: let the models write queries as well, and execute them; extra: jobs at the end that depend on the runs so far,
    `extra(runs)`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--test", type=int, default=100, help="questions of the test set")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    given = parser.parse_args(argv)
    record = facts() | {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "task": "sql", "steps": given.steps,
                        "batch_size": BATCH, "warmup": WARMUP, "seeds": list(SEEDS), "test": given.test}
    more = {"steps": given.steps, "test": given.test, "answers": answers}
    plan = functools.partial(climb, cases, start, around, more)
    seeds = [SEEDS[0]] * ROUNDS + list(SEEDS[1:])
    runs = sweep(plan, one_run, seeds, record, given.out, given.jobs)
    if extra:
        runs = sweep(lambda seed, runs: extra(runs), one_run, [SEEDS[0]], record, given.out, given.jobs)
    for run in runs:
        print(f"{run['method']:32} {run['parameters']:9,} lr {run['lr']:<6g} seed {run['seed']} "
              f"valid {run['valid_loss']:.3f} test {run['test_loss']:.3f} {run.get('score', '')}")
    return runs


if __name__ == "__main__":
    start = {method: 1e-2 if config else 2e-3 for method, (config, _) in CASES.items()}
    main("chapter06", CASES, start, __doc__, steps=100, around=("LoRA r 8", "DoRA r 8"), answers=True)
