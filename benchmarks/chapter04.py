"""The longer runs of chapter 04: which rank, which layers, each at its own best
learning rate, over three seeds.

    python benchmarks/chapter04.py --jobs 2        # writes
      benchmarks/results/chapter04.json

The learning rate is chosen by the loss on validation questions with seed 0; where the
best is at an edge of those that were tried, the next one is tried too. Only the chosen
one is run with the other seeds. The file is written as the runs come in; those that are
in it already, made on the same base, are not run again.
"""

import argparse
import os
from functools import cache
from pathlib import Path

import torch
from common import RESULTS, facts, found, sweep

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train

STEPS, WARMUP, SEEDS, QUESTIONS = 100, 10, (0, 1, 2), 100
# and, on q and v, the rank of equal parameters
RANKS = {"all-linear": [1, 4, 8, 32], "q,v": [1, 8]}
# the first grid is the middle
LADDERS = {"lora": [2e-3, 5e-3, 1e-2, 3e-2, 1e-1], "full": [3e-4, 1e-3, 3e-3, 1e-2]}
TARGETS = {
    "all-linear": "all-linear",
    "q,v": ["q_proj", "v_proj"],
    "q,k,v,o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


def one_run(job: dict) -> dict:
    """job: {"targets", "r", "lr", "seed"}; targets None is full fine-tuning."""
    torch.set_num_threads(1)
    tokenizer, sql, model = load_tokenizer(), load_data("sql"), load_pretrained()
    if job["targets"]:
        torch.manual_seed(job["seed"])
        config = LoraConfig(
            r=job["r"], lora_alpha=2 * job["r"], target_modules=TARGETS[job["targets"]]
        )
        model = get_peft_model(model, config)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    history = train(
        model,
        sql,
        tokenizer=tokenizer,
        steps=STEPS,
        lr=job["lr"],
        warmup=WARMUP,
        seed=job["seed"],
        progress=False,
    )
    valid = evaluate(
        model,
        tokenizer,
        sql,
        split="valid",
        limit=QUESTIONS,
        generate=False,
        progress=False,
    )
    test = evaluate(
        model, tokenizer, sql, split="test", limit=QUESTIONS, progress=False
    )
    return job | {
        "parameters": parameters,
        "valid_loss": round(valid["loss"], 4),
        "score": round(test[sql.metric], 2),
        "test_loss": round(test["loss"], 4),
        "losses": " ".join(f"{loss:.3f}" for loss in history.losses),
    }


@cache
def equal_ranks(budget_rank: int) -> dict:
    """For each choice of targets, the rank that trains about as many numbers as
    all-linear at `budget_rank`."""
    cost = {}
    for name, targets in TARGETS.items():
        model = get_peft_model(
            load_pretrained(), LoraConfig(r=1, target_modules=targets)
        )
        cost[name] = model.get_nb_trainable_parameters()[0]
    return {
        name: round(budget_rank * cost["all-linear"] / c) for name, c in cost.items()
    }


def rate_of(runs: list, **wanted) -> tuple:
    """The rate that is best on the validation questions with seed 0, and the one beside
    it if it is at an edge."""
    tried, ladder = (
        found(runs, seed=0, **wanted),
        LADDERS["lora" if wanted["targets"] else "full"],
    )
    rate, rates = (
        min(tried, key=lambda run: run["valid_loss"])["lr"],
        sorted(run["lr"] for run in tried),
    )
    beside = ladder.index(rate) + (rate == rates[-1]) - (rate == rates[0])
    return rate, (
        ladder[beside]
        if 0 <= beside < len(ladder) and ladder[beside] not in rates
        else None
    )


def jobs_of(seed: int, runs: list, budget: dict) -> list:
    cases = [(None, None), *((targets, r) for targets in RANKS for r in RANKS[targets])]
    jobs = []
    for targets, r in cases + [case for case in budget.items() if case not in cases]:
        what = {"targets": targets, "r": r, "seed": seed}
        first = [
            what | {"lr": lr} for lr in LADDERS["lora" if targets else "full"][1:4]
        ]
        jobs += first if seed == 0 else []
        if all(found(runs, **job | {"seed": 0}) for job in first):
            rate, beside = rate_of(runs, targets=targets, r=r)
            jobs += [what | {"lr": rate if seed else beside}] if seed or beside else []
    return jobs


def best(runs: list, **wanted) -> dict:
    """The mean score over the seeds, at the rate that is best on the validation
    questions with seed 0."""
    chosen = found(runs, lr=rate_of(runs, **wanted)[0], **wanted)
    return chosen[0] | {"score": sum(run["score"] for run in chosen) / len(chosen)}


def draw(record: dict, path: Path) -> None:
    """The rank sweep as a picture for the README."""
    import matplotlib

    matplotlib.use("Agg")
    from minipeft.course import figures

    path.parent.mkdir(exist_ok=True)
    runs, labels = (
        record["runs"],
        {"all-linear": "LoRA on all linear layers", "q,v": "LoRA on q and v"},
    )
    ranks = {
        targets: sorted({run["r"] for run in runs if run["targets"] == targets})
        for targets in labels
    }
    scores = {
        targets: [best(runs, targets=targets, r=r)["score"] for r in ranks[targets]]
        for targets in labels
    }
    figures.curves(
        {label: (ranks[targets], scores[targets]) for targets, label in labels.items()},
        f"From English to SQL: a frozen base of 1.5M parameters, {STEPS} steps",
        "rank r (log scale)",
        "queries answered right (%)",
        levels={"full fine-tuning": best(runs, targets=None)["score"]},
        logx=2,
        marks=True,
        ylim=(0, 102),
        xticks=ranks["all-linear"],
        save=path,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each with one thread"
    )
    parser.add_argument(
        "--budget-rank",
        type=int,
        default=4,
        help="all-linear at this rank sets the budget",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter04.json")
    given = parser.parse_args()
    budget = equal_ranks(given.budget_rank)
    record = facts() | {
        "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
        "task": "sql",
        "steps": STEPS,
        "batch_size": 16,
        "warmup": WARMUP,
        "alpha": "2 r",
        "seeds": SEEDS,
        "questions": QUESTIONS,
        "budget": budget,
    }
    # seed 0 three times: a case whose best rate is at an edge gets up to two rates more
    runs = sweep(
        lambda seed, runs: jobs_of(seed, runs, budget),
        one_run,
        (0, 0, 0, *SEEDS[1:]),
        record,
        given.out,
        given.jobs,
    )
    draw(
        record | {"runs": runs},
        RESULTS.parents[1] / "chapters" / "figures" / "rank_sweep.png",
    )
    for run in runs:
        print(
            f"{run['targets'] or 'full':10} r {run['r'] or 0:3} lr {run['lr']:<5g} seed"
            f" {run['seed']} {run['parameters']:9,} valid {run['valid_loss']:.3f} score"
            f" {run['score']:.1f}"
        )


if __name__ == "__main__":
    main()
