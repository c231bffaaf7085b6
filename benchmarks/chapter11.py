"""The longer runs of chapter 11: where an adapter stands, and how it is joined, at
equal parameters; and what it costs.

    python benchmarks/chapter11.py                 # writes
      benchmarks/results/chapter11.json

Each case trains about as many numbers as a LoRA of rank 4 on all linear layers. The
first seed climbs a ladder of rates until the best one has a worse one on either side
(by the loss on validation questions); the other seeds run at the best. What is reported
are the loss and the answers on test questions. The file is written as the runs come in;
those that are in it already are not run again. Latency: forward passes without
gradients, contestants taking turns, each one's fastest.
"""

import copy
import os
import time

import torch
from common import (
    arguments,
    count_trained,
    curve,
    facts,
    fit,
    found,
    rates_of,
    sweep,
    test_scores,
    valid_loss,
)
from tqdm.auto import tqdm

from minipeft import BottleneckConfig, LoraConfig, get_peft_model
from minipeft.lm import load_data, load_pretrained, load_tokenizer

STEPS, WARMUP, SEEDS = 100, 10, (0, 1, 2)
# turns to climb in
LADDER, FIRST, TURNS = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1), 1e-2, 5


def lora(r: int, *targets: str) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets))


CASES = {  # how wide a bottleneck (or how high a rank) -> its configuration
    "LoRA, all linear layers": lambda r: LoraConfig(
        r=r, lora_alpha=2 * r, target_modules="all-linear"
    ),
    "LoRA, attention": lambda r: lora(r, "q_proj", "k_proj", "v_proj", "o_proj"),
    "Houlsby": lambda r: BottleneckConfig(r=r, placement="houlsby", init="mam"),
    "Pfeiffer": lambda r: BottleneckConfig(r=r, placement="pfeiffer", init="mam"),
    "after attention": lambda r: BottleneckConfig(
        r=r, target_modules=["o_proj"], init="mam"
    ),
    "parallel": lambda r: BottleneckConfig(r=r, placement="parallel", init="mam"),
}
# that one sets the budget, and is timed
TRAINED = [name for name in CASES if name != "LoRA, all linear layers"]
SHAPES = {"1": (1, 24), "32": (32, 24)}  # rows, tokens a row


def trained(name: str, r: int) -> int:
    return get_peft_model(
        load_pretrained(), CASES[name](r)
    ).get_nb_trainable_parameters()[0]


def at_budget(name: str, budget: int) -> int:
    """The width with which a case trains nearest to `budget` numbers: its count is a
    straight line in the width."""
    one, two = trained(name, 1), trained(name, 2)
    return max(1, round((budget - 2 * one + two) / (two - one)))


def one_run(job: dict) -> dict:
    """job: {"case", "r", "lr", "seed"}"""
    torch.set_num_threads(1)
    tokenizer, sql = load_tokenizer(), load_data("sql")
    torch.manual_seed(job["seed"])
    model = get_peft_model(load_pretrained(), CASES[job["case"]](job["r"]))
    history = fit(model, sql, tokenizer, job, steps=STEPS, warmup=WARMUP)
    return job | {
        "parameters": count_trained(model),
        "valid_loss": valid_loss(model, tokenizer, sql, 64),
        **test_scores(model, tokenizer, sql, 100),
        "losses": curve(history.losses[:40]),
    }


def latency(widths: dict, rounds: int) -> dict:
    """{rows: {case: milliseconds of processor time a forward pass}}, the fastest;
    "merged": a LoRA that is merged."""
    torch.set_num_threads(1)
    models = {"base": load_pretrained().eval()}
    for name, r in widths.items():
        model = get_peft_model(load_pretrained(), CASES[name](r)).eval()
        models[name] = model
        if name.startswith("LoRA"):
            models[f"{name}, merged"] = copy.deepcopy(model).merge_and_unload()
    times = {rows: {name: [] for name in models} for rows in SHAPES}
    with torch.no_grad():
        for turn in tqdm(range(rounds + 1), desc="latency"):
            for rows, shape in SHAPES.items():
                ids, repeat = torch.randint(5, 1000, shape), 5 if shape[0] == 1 else 1
                names = list(models)
                # everybody starts once, and follows each of the others
                shift = turn % len(names)
                for name in (names[shift:] + names[:shift])[:: 1 if turn % 2 else -1]:
                    if repeat > 1:
                        models[name](input_ids=ids)  # its weights come into the cache
                    started = time.process_time()
                    for _ in range(repeat):
                        models[name](input_ids=ids)
                    if turn:  # the first round warms up
                        times[rows][name].append(
                            1000 * (time.process_time() - started) / repeat
                        )
    return {
        rows: {name: round(min(t), 3) for name, t in each.items()}
        for rows, each in times.items()
    }


def main():
    parser = arguments(__doc__, "chapter11")
    parser.add_argument(
        "--rounds", type=int, default=40, help="rounds of the latency race"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    budget = trained("LoRA, all linear layers", 4)
    widths = {name: at_budget(name, budget) for name in CASES}
    record = facts() | {
        "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
        "task": "sql",
        "steps": STEPS,
        "batch_size": 16,
        "warmup": WARMUP,
        "seeds": SEEDS,
        "ladder": LADDER,
        "widths": widths,
        "shapes": SHAPES,
        "latency_ms": latency(widths, given.rounds),
    }

    def jobs_of(seed, runs):
        for name in TRAINED:
            for lr in rates_of(seed, found(runs, case=name), LADDER, FIRST, SEEDS[0]):
                yield {"case": name, "r": widths[name], "lr": lr, "seed": seed}

    for run in sweep(
        jobs_of,
        one_run,
        [SEEDS[0]] * TURNS + list(SEEDS[1:]),
        record,
        given.out,
        given.jobs,
    ):
        print(
            f"{run['case']:26} r {run['r']:3} lr {run['lr']:<6g} seed {run['seed']}"
            f" {run['parameters']:9,} valid {run['valid_loss']:.3f} test"
            f" {run['test_loss']:.3f} score {run['score']:.1f}"
        )


if __name__ == "__main__":
    main()
