"""The longer runs of chapter 03: how many numbers does a task need, from a trained base
and from none?

    python benchmarks/chapter03.py        # writes benchmarks/results/chapter03.json

Three starts: the course's base, the same network with random weights, and a smaller
base, which is pretrained here. For each start and each d the stride is climbed with
seed 0: from a first guess to its neighbours on LADDER, and on, until the best lies
between two worse ones (by the loss on validation questions). Only that one is run with
the other seeds. A seed draws the projection, the random weights and the order of the
questions. Some of the runs are done once more with twice the steps, at the stride that
was best with the fewer (all parameters climb again). The file is written as the runs
come in; those that are in it already are not run again, unless the base that they rest
on has changed. `--starts random small` needs nothing of the course's base but its
tokenizer. The smaller base is kept in the temporary folder.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import RESULTS, facts, found, save, vocabulary, weights
from tqdm.auto import tqdm

from minipeft import SubspaceConfig, get_peft_model
from minipeft.lm import (
    GPT,
    GPTConfig,
    evaluate,
    load_data,
    load_pretrained,
    load_tokenizer,
    train,
)
from minipeft.lm.pretrain import SHAPE, pretrain

STEPS, WARMUP, QUESTIONS = 60, 10, 128
LONGER, ONCE_MORE = 120, [64, 1024, 4096, 16384]  # the longer runs: steps, and which d
DIMENSIONS, SEEDS = [16, 64, 256, 1024, 4096, 16384], (0, 1, 2)
# strides: how far a step of Adam goes, rate * sqrt(d)
LADDER = (0.7, 2.0, 6.0, 18.0, 54.0, 160.0, 480.0)
FIRST = {"pretrained": 6.0, "random": 54.0, "small": 6.0, "full": 6.0}
SMALL = SHAPE | dict(
    hidden_size=64, intermediate_size=192, num_hidden_layers=3, head_dim=32
)
SCHOOL = 4800  # steps of the smaller base's pretraining
WAYS = {
    "hash": dict(projection="hash"),
    "fastfood": dict(projection="fastfood"),
    "fastfood, structure-aware": dict(projection="fastfood", structure_aware=True),
}
COMPARED = 256  # the d at which the three ways are compared


def start_model(start: str, seed: int, small: Path):
    if start == "random":
        torch.manual_seed(seed)
        return GPT(GPTConfig(**vars(load_pretrained().config)))
    return load_pretrained(small) if start == "small" else load_pretrained()


def one_run(
    start: str,
    way: str,
    d: int | None,
    stride: float,
    seed: int,
    steps: int,
    small: Path,
) -> dict:
    """d None is full fine-tuning."""
    model, tokenizer, sql = (
        start_model(start, seed, small),
        load_tokenizer(),
        load_data("sql"),
    )
    size = sum(p.numel() for p in model.parameters())

    def measure():
        return evaluate(
            model,
            tokenizer,
            sql,
            split="valid",
            limit=QUESTIONS,
            generate=False,
            progress=False,
        )

    before = measure()["loss"]
    if d:
        model = get_peft_model(model, SubspaceConfig(d=d, seed=seed, **WAYS[way]))
    history = train(
        model,
        sql.train[: 16 * steps],
        tokenizer=tokenizer,
        steps=steps,
        lr=stride / (d or size) ** 0.5,
        warmup=WARMUP,
        seed=seed,
        progress=False,
    )
    return {
        "stride": stride,
        "seed": seed,
        "parameters": size,
        "start_loss": round(before, 4),
        "loss": round(measure()["loss"], 4),
        "losses": " ".join(f"{loss:.2f}" for loss in history.losses),
    }


def best(runs: list) -> float:
    """The stride that is best with the first seed."""
    return min(found(runs, seed=SEEDS[0]), key=lambda run: run["loss"])["stride"]


def measured(job: dict) -> list:
    """job: {"start", "way", "d", "on", "steps"} and "small", "runs", "first", "climb":
    all runs of this case, old and new."""
    torch.set_num_threads(1)
    job, ladder = dict(job), LADDER
    small, runs, first, climb = (
        job.pop(key) for key in ("small", "runs", "first", "climb")
    )

    def ensure(stride, seed):
        if not found(runs, stride=stride, seed=seed):
            runs.append(
                job
                | one_run(
                    job["start"],
                    job["way"],
                    job["d"],
                    stride,
                    seed,
                    job["steps"],
                    small,
                )
            )

    ensure(first, SEEDS[0])
    while climb:  # until the best has a worse neighbour on each side
        at = ladder.index(best(runs))
        for step in (at - 1, at + 1):
            if 0 <= step < len(ladder):
                ensure(ladder[step], SEEDS[0])
        climb = ladder[at] != best(runs)
    for seed in SEEDS[1:]:
        ensure(best(runs), seed)
    return runs


def school(steps: int = SCHOOL, shape: dict = SMALL) -> Path:
    """The folder of a smaller base, pretrained by the base's own recipe, but shorter,
    if it is not there."""
    made = f"{shape['hidden_size']}x{shape['num_hidden_layers']}_{steps}_{vocabulary()}"
    folder = Path(tempfile.gettempdir()) / f"minipeft_base_{made}"
    if not (folder / "history.json").exists():
        pretrain(folder, steps, tokenizer=load_tokenizer(), shape=shape, progress=False)
    return folder


def schooling(folder: Path) -> dict:
    """What a base has read, and its loss at the end."""
    report = json.loads((folder / "history.json").read_text())
    return {
        "steps": report["steps"],
        "tokens": report["tokens"],
        "loss": round(sum(report["loss"][-50:]) / 50, 3),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="cases at a time, each with one thread"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dimensions", type=int, nargs="*", default=DIMENSIONS)
    parser.add_argument(
        "--starts", nargs="*", default=["pretrained", "random", "small"]
    )
    parser.add_argument(
        "--small-steps",
        type=int,
        default=SCHOOL,
        help="pretraining of the smaller base",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter03.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    small = school(given.small_steps) if "small" in given.starts else None
    ground = {"random": vocabulary()}  # what a run rests on
    ground |= {"pretrained": weights()} if "pretrained" in given.starts else {}
    ground |= {"small": weights(str(small))} if small else {}
    before = (
        json.loads(given.out.read_text(encoding="utf-8"))
        if given.out.exists()
        else {"runs": []}
    )
    runs = [
        run
        for run in before["runs"]
        if run["on"] == ground.get(run["start"], run["on"])
        and run["steps"] in (given.steps, LONGER)
    ]
    started, record = time.time(), facts()
    record |= {
        "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
        "task": "sql",
        "steps": given.steps,
        "longer": LONGER,
        "batch_size": 16,
        "warmup": WARMUP,
        "ladder": LADDER,
        "seeds": SEEDS,
        "dimensions": given.dimensions,
        "once more": ONCE_MORE,
        "questions": QUESTIONS,
        "compared": COMPARED,
    }
    record["small base"] = (
        schooling(small) | {"shape": SMALL} if small else before.get("small base")
    )
    minutes = before.get("minutes", 0.0) if runs else 0.0

    def case(start, way, d, steps, first, **more):
        job = {"start": start, "way": way, "d": d, "on": ground[start], "steps": steps}
        return (
            job
            | {
                "runs": found(runs, **job),
                "small": small,
                "first": first,
                "climb": True,
            }
            | more
        )

    def cases():
        for start in given.starts:
            for d in [None, *given.dimensions]:
                yield case(start, "hash", d, given.steps, FIRST[start if d else "full"])
        if "pretrained" in given.starts:
            for way in list(WAYS)[1:]:
                yield case(
                    "pretrained", way, COMPARED, given.steps, FIRST["pretrained"]
                )

    def longer():  # where the shorter ones were best
        for start, d in itertools.product(given.starts, [None, *ONCE_MORE]):
            if start != "small" and d in (None, *given.dimensions):
                shorter = found(runs, start=start, way="hash", d=d, steps=given.steps)
                yield case(start, "hash", d, LONGER, best(shorter), climb=d is None)

    with ProcessPoolExecutor(given.jobs) as pool:
        for jobs in (cases, longer):
            jobs = list(jobs())
            for done in tqdm(pool.map(measured, jobs), total=len(jobs)):
                runs += [run for run in done if run not in runs]
                save(
                    given.out,
                    record
                    | {
                        "minutes": round(minutes + (time.time() - started) / 60, 1),
                        "runs": runs,
                    },
                )
    for run in runs:
        print(
            f"{run['steps']:3} {run['start']:10} {run['way']:26} d"
            f" {run['d'] or run['parameters']:9,} stride {run['stride']:5} seed"
            f" {run['seed']} loss {run['start_loss']:.2f} -> {run['loss']:.2f}"
        )


if __name__ == "__main__":
    main()
