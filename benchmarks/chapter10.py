"""The longer runs of chapter 10: LoRA over a base in 32 bits, in NF4, in 3 bits, with and without LoftQ, and DoRA over NF4.

    python benchmarks/chapter10.py --jobs 2        # writes benchmarks/results/chapter10.json

All with the same rank, rate, steps and data; each over several seeds. Runs that are in the file already are not repeated.
"""
import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import RESULTS, facts, save
from tqdm import tqdm

from minipeft import LoraConfig, get_peft_model
from minipeft.layers import write_weight
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.methods.loftq import rounded
from minipeft.quant import quantize_model

R, ALPHA, LR, WARMUP = 8, 16, 1e-2, 10
WAYS = {"32 bits": (32, False, False), "NF4": (4, False, False), "NF4 + LoftQ": (4, True, False),
        "3 bits": (3, False, False), "3 bits + LoftQ": (3, True, False), "NF4, DoRA": (4, False, True)}


def make(way, seed):
    """The adapted model. Three bits have no packed form here: the base holds the rounded numbers, dense."""
    bits, loftq, dora = WAYS[way]
    base = load_pretrained()
    more = dict(init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 5}) if loftq else {}
    if not loftq and bits == 4:
        quantize_model(base, double_quant=False)
    elif not loftq and bits == 3:
        for module in list(base.model.layers.modules()):
            if isinstance(module, torch.nn.Linear):
                write_weight(module, rounded(module.weight.detach(), 3))
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", use_dora=dora, **more))
    return quantize_model(model, double_quant=False) if loftq and bits == 4 else model


def one_run(job):
    torch.set_num_threads(1)
    tokenizer, sql, model = load_tokenizer(), load_data("sql"), make(job["way"], job["seed"])
    start = evaluate(model, tokenizer, sql, split="valid", limit=100, generate=False, progress=False)["loss"]
    history = train(model, sql, tokenizer=tokenizer, steps=job["steps"], lr=LR, warmup=WARMUP, seed=job["seed"], progress=False)
    valid = evaluate(model, tokenizer, sql, split="valid", limit=100, generate=False, progress=False)["loss"]
    test = evaluate(model, tokenizer, sql, split="test", progress=False, limit=job["test"])
    return job | {"start": round(start, 4), "valid_loss": round(valid, 4), "score": round(test[sql.metric], 2),
                  "losses": " ".join(f"{loss:.3f}" for loss in history.losses)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=200, help="questions of the test set")
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter10.json")
    given = parser.parse_args()
    runs, started = json.loads(given.out.read_text(encoding="utf-8"))["runs"] if given.out.exists() else [], time.time()
    jobs = [{"way": way, "seed": seed, "steps": given.steps, "test": given.test}
            for seed in range(given.seeds) for way in WAYS]
    jobs = [job for job in jobs if not any(job.items() <= run.items() for run in runs)]
    record = facts() | {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "task": "sql", "r": R, "alpha": ALPHA, "lr": LR,
                        "batch_size": 16, "warmup": WARMUP}
    with ProcessPoolExecutor(given.jobs) as pool:
        for run in tqdm(pool.map(one_run, jobs), total=len(jobs)):
            runs.append(run)
            save(given.out, record | {"minutes": round((time.time() - started) / 60, 1), "runs": runs})
    for run in runs:
        print(f"{run['way']:16} seed {run['seed']} start {run['start']:.3f} valid {run['valid_loss']:.3f} score {run['score']:.1f}")


if __name__ == "__main__":
    main()
