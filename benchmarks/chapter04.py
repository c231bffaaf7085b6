"""The longer runs of chapter 04: which rank, which layers, each at its own best
learning rate, over three seeds.

    python benchmarks/chapter04.py --jobs 2        # writes
      benchmarks/results/chapter04.json
    python benchmarks/chapter04.py --subspaces     # adds what section 7 of the LoRA
      paper measures: which directions do two ranks, two seeds share; what is amplified

The learning rate is chosen by the loss on validation questions with seed 0; where the
best is at an edge of those that were tried, the next one is tried too. Only the chosen
one is run with the other seeds. The file is written as the runs come in; those that are
in it already, made on the same base, are not run again.
"""

import json
import os
from pathlib import Path

import torch
from common import (
    RESULTS,
    arguments,
    count_trained,
    curve,
    equal_ranks,
    facts,
    fit,
    found,
    save,
    sweep,
    test_scores,
    valid_loss,
)

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import load_data, load_pretrained, load_tokenizer, train

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
    parameters = count_trained(model)
    history = fit(model, sql, tokenizer, job, steps=STEPS, warmup=WARMUP)
    return job | {
        "parameters": parameters,
        "valid_loss": valid_loss(model, tokenizer, sql, QUESTIONS),
        **test_scores(model, tokenizer, sql, QUESTIONS),
        "losses": curve(history.losses),
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


def overlap(A, B, i: int, j: int) -> float:
    """How much of the span of A's first i right-singular vectors lies in that of B's
    first j (Hu et al. 2021, equation 4): 0 to 1. By chance: max(i, j) / width."""
    first, second = (torch.linalg.svd(factor).Vh for factor in (A, B))
    return ((first[:i] @ second[:j].T).square().sum() / min(i, j)).item()


def amplification(delta, W, r: int) -> list:
    """The size of an update; of W within the update's own directions; of W within W's
    own r directions (table 7 of the paper); and of W within r random directions."""

    def within(U, Vh):
        return (U[:, :r].T @ W @ Vh[:r].T).norm().item()

    U, _, Vh = torch.linalg.svd(delta)
    own, _, own_h = torch.linalg.svd(W)
    some = torch.linalg.qr(torch.randn(W.shape[0], r, dtype=W.dtype)).Q
    others = torch.linalg.qr(torch.randn(W.shape[1], r, dtype=W.dtype)).Q
    parts = [delta.norm().item(), within(U, Vh), within(own, own_h)]
    return [round(part, 4) for part in [*parts, within(some, others.T)]]


def subspaces() -> dict:
    """Four runs, rank 8 and 64 with two seeds each, and what they have in common: for
    each of the q and v projections."""
    torch.set_num_threads(1)
    tokenizer, sql, models = load_tokenizer(), load_data("sql"), {}
    for r, lr in ((8, 1e-2), (64, 2e-3)):
        for seed in SEEDS[:2]:
            torch.manual_seed(seed)
            config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
            models[r, seed] = get_peft_model(load_pretrained(), config)
            settings = {"steps": STEPS, "lr": lr, "warmup": WARMUP, "seed": seed}
            train(models[r, seed], sql, tokenizer=tokenizer, progress=False, **settings)
    layers = {
        at: {path: part.double() for path, part in lora_parts(model).items()}
        for at, model in models.items()
    }
    base, found = load_pretrained(), {}
    for path in layers[8, 0]:
        A = {at: parts[path].lora_A.weight.detach() for at, parts in layers.items()}
        W = base.get_submodule(path).weight.detach().double()
        pairs = {"r 8, r 64": ((8, 0), (64, 0)), "two seeds": ((64, 0), (64, 1))}
        pairs["two seeds, r 8"] = ((8, 0), (8, 1))
        found[path] = {
            name: {
                f"{i}, {j}": round(overlap(A[one], A[two], i, j), 3)
                for i in (1, 2, 4, 8)
                for j in (1, 2, 4, 8)
            }
            for name, (one, two) in pairs.items()
        }
        found[path]["amplification"] = {
            f"r {r}": amplification(layers[r, 0][path].delta(None).detach(), W, r)
            for r in (8, 64)
        }
    return facts() | {
        "steps": STEPS,
        "seeds": SEEDS[:2],
        "rates": {"8": 1e-2, "64": 2e-3},
        "found": found,
    }


def lora_parts(model) -> dict:
    """{path in the base: adapter} of the q and v projections."""
    layers = model.get_base_model().named_modules()
    return {
        path: layer.adapters["default"]
        for path, layer in layers
        if path.endswith(("q_proj", "v_proj")) and hasattr(layer, "adapters")
    }


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

    # every seed is a point, the line goes through the means
    def at_best(**what):
        return found(runs, lr=rate_of(runs, **what)[0], **what)

    scores = {
        targets: [
            [run["score"] for run in at_best(targets=targets, r=r)]
            for r in ranks[targets]
        ]
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
    parser = arguments(__doc__, "chapter04")
    parser.add_argument(
        "--budget-rank",
        type=int,
        default=4,
        help="all-linear at this rank sets the budget",
    )
    parser.add_argument("--subspaces", action="store_true")
    given = parser.parse_args()
    if given.subspaces:
        record = json.loads(given.out.read_text(encoding="utf-8"))
        save(given.out, record | {"subspaces": subspaces()})
        return
    budget = equal_ranks(TARGETS, given.budget_rank)
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
