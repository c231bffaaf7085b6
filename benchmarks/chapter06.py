"""The longer runs of chapter 06: LoRA against DoRA, each at the better of two learning rates, over two seeds.

    python benchmarks/chapter06.py            # writes benchmarks/results/chapter06.json

The rate is chosen by the loss on validation questions with the first seed; the other seed runs with the chosen one.
The file is written as the runs come in; those that are in it already are not run again. Chapters 07 and 08 use the
same sweep.
"""
import argparse
import functools
import json
import os
import time
from pathlib import Path

import torch
from common import RESULTS, facts, save
from tqdm import tqdm

import minipeft
from minipeft import get_peft_model
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.methods.adalora import RankAllocator

STEPS, WARMUP, SEEDS, RATES = 40, 4, (0, 1), (1e-2, 2e-2)
CASES = {"LoRA": ("LoraConfig", dict(r=8, lora_alpha=16)), "DoRA": ("DoraConfig", dict(r=8, lora_alpha=16))}


@functools.cache
def world():
    return load_tokenizer(), load_data("sql")


def one_run(method, config, fields, lr, seed, steps=STEPS):
    """What was trained, how many numbers, and the loss on unseen questions."""
    tokenizer, sql = world()
    torch.manual_seed(seed)
    model = get_peft_model(load_pretrained(), getattr(minipeft, config)(target_modules="all-linear", **fields))
    parameters = model.get_nb_trainable_parameters()[0]
    allocator = RankAllocator(model) if config == "AdaLoraConfig" else None
    history = train(model, sql, tokenizer=tokenizer, steps=steps, lr=lr, warmup=WARMUP, seed=seed, progress=False,
                    log=(lambda *_: allocator.step()) if allocator else None)
    loss = evaluate(model, tokenizer, sql, split="valid", limit=64, generate=False, progress=False)["loss"]
    return {"method": method, "lr": lr, "seed": seed, "parameters": parameters, "loss": round(loss, 4),
            "train_loss": round(history.recent, 4)}


def sweep(name, cases, rates, seeds, description, steps=STEPS):
    """Run what is not in the file yet. cases: {method: (config's name, fields)}; rates: a tuple, or one for each."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--steps", type=int, default=steps)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(given.out.read_text(encoding="utf-8"))["runs"] if given.out.exists() else []
    started = time.time()
    record = facts() | {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "task": "sql", "warmup": WARMUP,
                        "steps": given.steps, "batch_size": 16, "seeds": list(seeds)}

    def best(method):
        first = [run for run in runs if run["method"] == method and run["seed"] == seeds[0]]
        return min(first, key=lambda run: run["loss"])["lr"]

    for seed in seeds:
        for method, (config, fields) in tqdm(cases.items(), desc=f"seed {seed}"):
            own = rates[method] if isinstance(rates, dict) else rates
            for lr in own if seed == seeds[0] else (best(method),):
                if not any((run["method"], run["lr"], run["seed"]) == (method, lr, seed) for run in runs):
                    runs.append(one_run(method, config, fields, lr, seed, given.steps))
                    save(given.out, record | {"minutes": round((time.time() - started) / 60, 1), "runs": runs})
    for run in runs:
        print(f"{run['method']:24} {run['parameters']:9,} lr {run['lr']:<6g} seed {run['seed']} loss {run['loss']:.3f}")


if __name__ == "__main__":
    sweep("chapter06", CASES, RATES, SEEDS, __doc__)
