"""The longer runs of chapter 04: which rank, which layers, at each one's best of four learning rates (full fine-tuning: of three), over two seeds.

    python benchmarks/chapter04.py --jobs 2        # writes benchmarks/results/chapter04.json

The learning rate is chosen by the loss on validation questions with seed 0; only the chosen one is run with seed 1 too.
"""
import argparse
import copy
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import RESULTS, facts, save
from tqdm.auto import tqdm

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train

STEPS, WARMUP, RANKS, SEEDS = 150, 10, [1, 2, 4, 8, 16, 32], (0, 1)
RATES = {"lora": (5e-3, 1e-2, 2e-2, 4e-2), "full": (1e-3, 3e-3, 1e-2)}
TARGETS = {
    "all-linear": "all-linear",
    "q,v": ["q_proj", "v_proj"],
    "q,k,v,o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


def one_run(job: dict) -> dict:
    """job: {"kind", "targets", "r", "lr", "seed"}; targets None is full fine-tuning."""
    torch.set_num_threads(1)
    tokenizer, sql = load_tokenizer(), load_data("sql")
    model = load_pretrained()
    if job["targets"]:
        torch.manual_seed(job["seed"])
        model = get_peft_model(model, LoraConfig(r=job["r"], lora_alpha=2 * job["r"], target_modules=TARGETS[job["targets"]]))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    history = train(model, sql, tokenizer=tokenizer, steps=STEPS, lr=job["lr"], warmup=WARMUP, seed=job["seed"], progress=False)
    valid = evaluate(model, tokenizer, sql, split="valid", generate=False, progress=False)
    test = evaluate(model, tokenizer, sql, split="test", progress=False)
    return job | {"parameters": parameters, "valid_loss": round(valid["loss"], 4), "score": round(test[sql.metric], 2),
                  "test_loss": round(test["loss"], 4), "losses": " ".join(f"{loss:.3f}" for loss in history.losses)}


def equal_ranks(budget_rank: int) -> dict:
    """For each choice of targets, the rank that trains about as many numbers as all-linear at `budget_rank`."""
    cost = {}
    for name, targets in TARGETS.items():
        model = get_peft_model(copy.deepcopy(load_pretrained()), LoraConfig(r=1, target_modules=targets))
        cost[name] = model.get_nb_trainable_parameters()[0]
    return {name: round(budget_rank * cost["all-linear"] / c) for name, c in cost.items()}


def best(runs, **wanted) -> dict:
    """The mean score over the seeds, at the rate that is best on the validation questions with seed 0."""
    runs = [run for run in runs if all(run[key] == value for key, value in wanted.items())]
    rate = min((run for run in runs if run["seed"] == SEEDS[0]), key=lambda run: run["valid_loss"])["lr"]
    chosen = [run for run in runs if run["lr"] == rate]
    return chosen[0] | {"score": sum(run["score"] for run in chosen) / len(chosen)}


def draw(record: dict, path: Path) -> None:
    """The rank sweep as a picture for the README."""
    import matplotlib
    matplotlib.use("Agg")
    from minipeft.course import figures
    path.parent.mkdir(exist_ok=True)
    label = {"all-linear": "LoRA on all linear layers", "q,v": "LoRA on q and v"}
    sweep = {label[targets]: (RANKS, [best(record["runs"], kind="rank", targets=targets, r=r)["score"] for r in RANKS]) for targets in label}
    figures.curves(sweep, f"English to SQL: a frozen 1.5M-parameter base, {record['steps']} steps", "rank r (log scale)", "queries answered right (%)",
                   logx=2, marks=True, ylim=(0, 102), xticks=RANKS, levels={"full fine-tuning": best(record["runs"], kind="full")["score"]}, save=path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--budget-rank", type=int, default=4, help="the rank of all-linear that sets the budget of equal parameters")
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter04.json")
    arguments = parser.parse_args()
    started = time.time()
    cases = [{"kind": "full", "targets": None, "r": None}]
    cases += [{"kind": "rank", "targets": targets, "r": r} for targets in ("all-linear", "q,v") for r in RANKS]
    cases += [{"kind": "targets", "targets": targets, "r": r} for targets, r in equal_ranks(arguments.budget_rank).items()]
    first = [case | {"lr": lr, "seed": SEEDS[0]} for case in cases for lr in RATES["lora" if case["targets"] else "full"]]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        runs = list(tqdm(pool.map(one_run, first), total=len(first), desc="every rate"))
        chosen = [min((run for run in runs if all(run[key] == case[key] for key in case)), key=lambda run: run["valid_loss"]) for case in cases]
        again = [case | {"lr": run["lr"], "seed": seed} for case, run in zip(cases, chosen) for seed in SEEDS[1:]]
        runs += tqdm(pool.map(one_run, again), total=len(again), desc="the best, again")
    record = facts() | {"minutes": round((time.time() - started) / 60, 1), "base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "task": "sql",
                        "steps": STEPS, "batch_size": 16, "warmup": WARMUP, "alpha": "2 r", "seeds": list(SEEDS), "ranks": RANKS, "runs": runs}
    save(arguments.out, record)
    draw(record, RESULTS.parents[1] / "chapters" / "figures" / "rank_sweep.png")
    for run in runs:
        print(f"{run['kind']:8} {run['targets'] or '':10} r {run['r'] or 0:3} lr {run['lr']:g} seed {run['seed']}: {run['parameters']:8,} "
              f"valid {run['valid_loss']:.3f} score {run['score']:.1f}")


if __name__ == "__main__":
    main()
