"""The sweeps of chapter 05: learning rates, rank and alpha, LoRA+, PiSSA, places, data,
dropout.

    python benchmarks/chapter05.py --jobs 2        # writes
      benchmarks/results/chapter05.json

Every run has 100 steps of 8 examples. Seed 0 finds each case's learning rate, by the
loss on validation examples; where the best rate is at an edge of those that were tried,
the next one is tried too. Seeds 1 and 2 repeat the best, and write answers to test
questions. The file is written as the runs come in; those that are in it already, made
on the same base, are not run again, so the script can be stopped and started at will.
"""

import os
from functools import cache

import torch
from common import (
    arguments,
    count_trained,
    curve,
    equal_ranks,
    facts,
    finite,
    fit,
    found,
    sweep,
)

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer
from minipeft.lm.data import Batches
from minipeft.optim import create_loraplus_optimizer

STEPS, BATCH, WARMUP, SEEDS = 100, 8, 10, (0, 1, 2)
LADDER = [5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
LOW, HIGH = LADDER[1:5], LADDER[2:7]  # what full fine-tuning wants, and LoRA
TARGETS = {
    "all-linear": "all-linear",
    "q,k,v,o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
BUDGET_RANK = 4  # all linear layers at this rank set the budget of `places`
# A run is this, with a few fields changed. rate_B: B's own learning rate (LoRA+); r
# None: full fine-tuning; n: examples.
PLAIN = {
    "task": "sql",
    "n": None,
    "r": 8,
    "alpha": 16,
    "rslora": False,
    "init": True,
    "targets": "all-linear",
    "dropout": 0.0,
    "lr": 1e-2,
    "rate_B": None,
    "seed": 0,
}
FULL = {"r": None, "alpha": None, "targets": None}
RANKS, ALPHAS, SIZES, DROPOUTS = [1, 8, 64], [2, 16, 128], [32, 256], [0.1]
RATES_A, RATES_B = HIGH[1:4], HIGH[1:]  # the map of LoRA+
FEW = {"n": SIZES[0]}  # where dropout is tried


@cache
def budget() -> dict:
    """The rank for each choice of places, at the cost of BUDGET_RANK everywhere."""
    return equal_ranks(TARGETS, BUDGET_RANK)


def cases() -> dict:
    """{name: (what is changed in PLAIN, the learning rates to begin with)}"""
    places = {
        f"voice, {targets}": (
            {"task": "voice", "targets": targets, "r": r, "alpha": 2 * r},
            HIGH[1:4],
        )
        for targets, r in budget().items()
    }
    few = {
        f"{name}, {n} examples": (what | {"n": n}, rates)
        for n in SIZES
        for name, what, rates in (("full", FULL, LOW[:3]), ("r = 8", {}, HIGH[1:4]))
    }
    return (
        {
            "full": (FULL, LOW),
            "r = 1": ({"r": 1}, HIGH[1:]),
            "r = 8": ({}, HIGH),
            "r = 64": ({"r": 64}, HIGH),
            "r = 64, rsLoRA": ({"r": 64, "rslora": True}, HIGH[:3]),
            # alpha = r, as its authors have it
            "PiSSA": ({"init": "pissa", "alpha": 8}, HIGH[1:4]),
        }
        | places
        | few
    )


def best(runs: list, **what):
    """The rate with the lowest validation loss of seed 0, and the rate beside it if it
    is at an edge."""
    fixed = {key: value for key, value in (PLAIN | what).items() if key != "lr"}
    tried = sorted(found(runs, **fixed), key=lambda run: run["lr"])
    rates = [run["lr"] for run in tried]
    rate = min(tried, key=lambda run: run["valid_loss"])["lr"]
    beside = LADDER.index(rate) + (rate == rates[-1]) - (rate == rates[0])
    return rate, (
        LADDER[beside]
        if 0 <= beside < len(LADDER) and LADDER[beside] not in rates
        else None
    )


def the_map() -> list:
    """LoRA+: A's rate, and B's."""
    return [
        PLAIN | {"lr": a, "rate_B": None if a == b else b}
        for a in RATES_A
        for b in RATES_B
    ]


def jobs_of(seed: int, runs: list) -> list:
    jobs, swept = (
        [],
        [
            what
            for what, rates in cases().values()
            if all(found(runs, **PLAIN | what | {"lr": lr}) for lr in rates)
        ],
    )
    if seed == 0:
        jobs += [
            PLAIN | what | {"lr": lr}
            for what, rates in cases().values()
            for lr in rates
        ]
        jobs += [
            PLAIN | {"r": r, "alpha": alpha} for r in RANKS for alpha in ALPHAS
        ] + the_map()
    for what in swept:
        rate, beside = best(runs, **what)
        if seed or beside:
            jobs.append(PLAIN | what | {"lr": rate if seed else beside, "seed": seed})
    if FEW in swept:
        rate, _ = best(runs, **FEW)
        jobs += [
            PLAIN | FEW | {"lr": rate, "dropout": p, "seed": seed} for p in DROPOUTS
        ]
    if seed:
        top = min(
            (run for job in the_map() for run in found(runs, **job)),
            key=lambda run: run["valid_loss"],
        )
        jobs.append(PLAIN | {"lr": top["lr"], "rate_B": top["rate_B"], "seed": seed})
    return list({str(job): job for job in jobs}.values())


@cache
def loaded(task: str):
    return load_data(task)


@cache
def batches(task: str, n, seed: int):
    """The same batches as `train` makes of examples; made once for many runs."""
    return Batches(loaded(task).train[:n], load_tokenizer(), BATCH, seed=seed)


def one_run(job: dict) -> dict:
    torch.set_num_threads(1)
    tokenizer, task, model, optimizer = (
        load_tokenizer(),
        loaded(job["task"]),
        load_pretrained(),
        "adamw",
    )
    if job["r"]:
        torch.manual_seed(job["seed"])
        model = get_peft_model(
            model,
            LoraConfig(
                r=job["r"],
                lora_alpha=job["alpha"],
                target_modules=TARGETS[job["targets"]],
                lora_dropout=job["dropout"],
                use_rslora=job["rslora"],
                init_lora_weights=job["init"],
            ),
        )
    if job["rate_B"]:
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=job["lr"],
            betas=(0.9, 0.999),
            loraplus_lr_ratio=job["rate_B"] / job["lr"],
        )
    parameters = count_trained(model)
    data = batches(job["task"], job["n"], job["seed"])
    more = {"steps": STEPS, "warmup": WARMUP, "optimizer": optimizer}
    history = fit(model, data, tokenizer, job, **more)
    measured = {
        split: evaluate(
            model,
            tokenizer,
            task,
            split=split,
            limit=100,
            generate=bool(job["seed"]) and split == "test",
            progress=False,
        )
        for split in ("valid", "test")
    }
    return job | {
        "parameters": parameters,
        "valid_loss": finite(measured["valid"]["loss"]),
        "test_loss": finite(measured["test"]["loss"]),
        "score": measured["test"].get(task.metric),
        "losses": curve(history.losses),
    }


def main(argv=None):
    parser = arguments(__doc__, "chapter05")
    given = parser.parse_args(argv)
    record = facts() | {
        "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
        "steps": STEPS,
        "batch_size": BATCH,
        "warmup": WARMUP,
        "seeds": SEEDS,
        "cases": {name: what for name, (what, _) in cases().items()},
        "ranks": RANKS,
        "alphas": ALPHAS,
        "sizes": SIZES,
        "dropouts": DROPOUTS,
        "budget": budget(),
        "rates_A": RATES_A,
        "rates_B": RATES_B,
    }
    # seed 0 four times: a case whose best rate is at an edge gets up to two rates more,
    # and then dropout its own
    runs = sweep(
        jobs_of, one_run, (0, 0, 0, 0, *SEEDS[1:]), record, given.out, given.jobs
    )
    for run in runs:
        print(
            {
                key: value
                for key, value in run.items()
                if key != "losses" and PLAIN.get(key) != value
            }
        )


if __name__ == "__main__":
    main()
