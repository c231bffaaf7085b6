"""The sweeps of chapter 05: learning rates, rank and alpha, LoRA+, PiSSA and OLoRA, places, data, dropout.

    python benchmarks/chapter05.py --jobs 2        # writes benchmarks/results/chapter05.json

Every run has 60 steps of 8 examples. The file is written as the runs come in; those that are in it already, made on the same base, are
not run again, so the script can be stopped and started at will.
"""
import argparse
import hashlib
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch
from common import RESULTS, facts, found, save
from tqdm import tqdm

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.lm.data import Batches
from minipeft.optim import create_loraplus_optimizer

STEPS, BATCH, WARMUP = 60, 8, 10
LOW, HIGH = [1e-3, 2e-3, 5e-3, 1e-2], [2e-3, 5e-3, 1e-2, 2e-2, 5e-2]     # what full fine-tuning wants, and LoRA
TARGETS = {
    "all-linear": "all-linear",
    "q,v": ["q_proj", "v_proj"],
    "q,k,v,o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
BUDGET_RANK = 4                                       # all linear layers at this rank set the budget of `places`
# A run is this, with a few fields changed. rate_B: B's own learning rate (LoRA+); r None: full fine-tuning; n: examples.
PLAIN = {"task": "sql", "n": None, "r": 8, "alpha": 16, "rslora": False, "init": True, "targets": "all-linear",
         "dropout": 0.0, "lr": 1e-2, "rate_B": None, "seed": 0}
FULL = {"r": None, "alpha": None, "targets": None}
CURVES = {"full": FULL, "r = 1": {"r": 1}, "r = 8": {}, "r = 64": {"r": 64},
          "r = 64, rsLoRA": {"r": 64, "rslora": True}}
STARTS = {"pissa": {"init": "pissa", "alpha": 8}, "olora": {"init": "olora", "alpha": 8}}   # alpha = r, as their authors
RATES = {name: HIGH for name in CURVES | STARTS} | {"full": LOW, "r = 64, rsLoRA": HIGH[:4]}
RANKS, ALPHAS, SIZES = [1, 8, 64], [2, 16, 128], [32, 256, 2400]


def equal_ranks() -> dict:
    """For each choice of places, the rank that trains about as many numbers as all linear layers at BUDGET_RANK."""
    cost = {}
    for name, targets in TARGETS.items():
        model = get_peft_model(load_pretrained(), LoraConfig(r=1, target_modules=targets))
        cost[name] = model.get_nb_trainable_parameters()[0]
    return {name: round(BUDGET_RANK * cost["all-linear"] / c) for name, c in cost.items()}


def sweeps() -> dict:
    """{sweep: its runs, with seed 0}; the same run may serve two sweeps."""
    run = lambda **changes: PLAIN | changes
    return {
        "rates": [run(**what, lr=lr) for name, what in CURVES.items() for lr in RATES[name]],
        "starts": [run(**what, lr=lr) for what in STARTS.values() for lr in HIGH],
        "plus": [run(lr=a, rate_B=None if a == b else b) for a in HIGH[1:4] for b in HIGH[1:4]],
        "grid": [run(r=r, alpha=alpha) for r in RANKS for alpha in ALPHAS],
        "data": [run(**what, n=None if n == SIZES[-1] else n, lr=lr) for n in SIZES
                 for what, rates in ((FULL, (1e-3, 2e-3)), ({}, (5e-3, 1e-2))) for lr in rates],
        "dropout": [run(n=256, dropout=p) for p in (0.1, 0.3)],
        "places": [run(task="records", targets=targets, r=r, alpha=2 * r, lr=lr)
                   for targets, r in equal_ranks().items() for lr in (5e-3, 1e-2, 2e-2)],
    }


def second_seed(runs: list) -> list:
    """Each curve of `rates` and `starts` at its best rate, once more."""
    again = []
    for name, what in (CURVES | STARTS).items():
        tried = [found(runs, **PLAIN | what | {"lr": lr})[0] for lr in RATES[name]]
        again.append(PLAIN | what | {"lr": min(tried, key=lambda run: run["valid_loss"])["lr"], "seed": 1})
    return again


@cache
def loaded(task: str):
    return load_data(task)


@cache
def batches(task: str, n, seed: int):
    """The same batches as `train` makes of examples; made once for many runs."""
    return Batches(loaded(task).train[:n], load_tokenizer(), BATCH, seed=seed)


def one_run(job: dict) -> dict:
    torch.set_num_threads(1)
    tokenizer, task, model, optimizer = load_tokenizer(), loaded(job["task"]), load_pretrained(), "adamw"
    if job["r"]:
        torch.manual_seed(job["seed"])
        model = get_peft_model(model, LoraConfig(
            r=job["r"], lora_alpha=job["alpha"], target_modules=TARGETS[job["targets"]], lora_dropout=job["dropout"],
            use_rslora=job["rslora"], init_lora_weights=job["init"]))
    if job["rate_B"]:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=job["lr"], betas=(0.9, 0.999),
                                              loraplus_lr_ratio=job["rate_B"] / job["lr"])
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    history = train(model, batches(job["task"], job["n"], job["seed"]), steps=STEPS, lr=job["lr"], warmup=WARMUP,
                    optimizer=optimizer, seed=job["seed"], progress=False)
    loss = {split: evaluate(model, tokenizer, task, split=split, limit=limit, generate=False, progress=False)["loss"]
            for split, limit in (("valid", 100), ("test", 200))}
    finite = lambda x: round(x, 4) if x < 100 else 100.0      # a run that went off; JSON knows no infinity
    return job | {"parameters": parameters, "valid_loss": finite(loss["valid"]), "test_loss": finite(loss["test"]),
                  "losses": " ".join(f"{loss:.3f}" for loss in history.losses)}


def fingerprint(model) -> str:
    """Which base the runs were made on."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--only", nargs="*", help="only these sweeps, without the second seed")
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter05.json")
    given = parser.parse_args(argv)
    record = facts() | {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "fingerprint": fingerprint(load_pretrained()),
                        "steps": STEPS, "batch_size": BATCH, "warmup": WARMUP, "rates": RATES, "curves": CURVES,
                        "starts": STARTS, "ranks": RANKS, "alphas": ALPHAS, "sizes": SIZES, "budget": equal_ranks()}
    old = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    runs = old["runs"] if old.get("fingerprint") == record["fingerprint"] else []
    spent = old.get("minutes", 0) if runs else 0
    started = time.time()
    with ProcessPoolExecutor(given.jobs) as pool:
        for name, jobs in [*sweeps().items(), ("second seed", None)]:
            if given.only and name not in given.only:
                continue
            jobs = [job for job in jobs or second_seed(runs) if not found(runs, **job)]
            for run in tqdm(pool.map(one_run, jobs), total=len(jobs), desc=name):
                runs.append(run)
                save(given.out, record | {"minutes": round(spent + (time.time() - started) / 60, 1), "runs": runs})
    for run in runs:
        print({key: value for key, value in run.items() if key != "losses" and PLAIN.get(key) != value})


if __name__ == "__main__":
    main()
