"""The longer runs of chapter 03: how many numbers does a task need, from a trained base
and from none?

    python benchmarks/chapter03.py        # writes benchmarks/results/chapter03.json

Three starts: the course's base, the same network with random weights, and a smaller
base, which is pretrained here. For each start and each d the stride is climbed with
seed 0: from a first guess to its neighbours on LADDER, and on, until the best lies
between two worse ones (by the loss on validation questions). Only that one is run with
the other seeds. A seed draws the projection, the random weights and the order of the
questions. A run records the losses on validation and on test questions, before and
after, and the score of its answers to the test questions. Some of the runs are done
once more with twice the steps, at the stride that was best with the fewer (all
parameters climb again), and a few with five times as many (all climb again). The file
is written as the runs come in; those that are in it already are not run again, unless
the base that they rest on has changed.
`--starts random small` needs nothing of the course's base but its tokenizer. The
smaller base is kept in the temporary folder.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from common import (
    RESULTS,
    facts,
    finite,
    fit,
    found,
    save,
    test_scores,
    valid_loss,
    vocabulary,
    weights,
)
from tqdm.auto import tqdm

from minipeft import SubspaceConfig, get_peft_model
from minipeft.lm import (
    GPT,
    GPTConfig,
    evaluate,
    load_data,
    load_pretrained,
    load_tokenizer,
)
from minipeft.lm.pretrain import SHAPE, pretrain

STEPS, WARMUP, QUESTIONS, TEST = 60, 10, 128, 300
LONGER, ONCE_MORE = 120, [64, 1024, 4096, 16384]  # the longer runs: steps, and which d
LONGEST, AT_LAST = 300, [64, 16384]
DIMENSIONS, SEEDS = [16, 64, 256, 1024, 4096, 16384], (0, 1, 2)
# strides: how far a step of Adam goes, rate * sqrt(d)
LADDER = (0.2, 0.7, 2.0, 6.0, 18.0, 54.0, 160.0, 480.0)
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
CASE = ("start", "way", "d", "on", "steps")
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
    before = {"start_loss": valid_loss(model, tokenizer, sql, QUESTIONS)}
    before["test_start_loss"] = finite(
        evaluate(model, tokenizer, sql, limit=TEST, generate=False, progress=False)[
            "loss"
        ]
    )
    if d:
        model = get_peft_model(model, SubspaceConfig(d=d, seed=seed, **WAYS[way]))
    job = {"steps": steps, "lr": stride / (d or size) ** 0.5, "seed": seed}
    history = fit(model, sql.train[: 16 * steps], tokenizer, job, warmup=WARMUP)
    return {
        "stride": stride,
        "seed": seed,
        "parameters": size,
        **before,
        "loss": valid_loss(model, tokenizer, sql, QUESTIONS),
        **test_scores(model, tokenizer, sql, TEST),
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

    def ensure(stride, seed, tested=False):
        old = found(runs, stride=stride, seed=seed)
        if not old or tested and "test_loss" not in old[0]:
            new = one_run(
                job["start"], job["way"], job["d"], stride, seed, job["steps"], small
            )
            runs[:] = [run for run in runs if run not in old] + [job | new]

    ensure(first, SEEDS[0])
    while climb:  # until the best has a worse neighbour on each side
        at = ladder.index(best(runs))
        for step in (at - 1, at + 1):
            if 0 <= step < len(ladder):
                ensure(ladder[step], SEEDS[0])
        climb = ladder[at] != best(runs)
    for seed in SEEDS:
        ensure(best(runs), seed, tested=True)
    return runs


def school(steps: int = SCHOOL, shape: dict = SMALL) -> Path:
    """The folder of a smaller base, pretrained by the base's own recipe, but shorter
    and in 32 bits, if it is not there."""
    made = f"{shape['hidden_size']}x{shape['num_hidden_layers']}_{steps}_{vocabulary()}"
    folder = Path(tempfile.gettempdir()) / f"minipeft_base_{made}"
    if not (folder / "history.json").exists():
        how = {"tokenizer": load_tokenizer(), "shape": shape, "bf16": False}
        pretrain(folder, steps, progress=False, **how)
    return folder


def schooling(folder: Path) -> dict:
    """What a base has read, and its loss at the end."""
    report = json.loads((folder / "history.json").read_text())
    return {
        "steps": report["steps"],
        "tokens": report["tokens"],
        "loss": round(sum(report["loss"][-50:]) / 50, 3),
    }


def arguments():
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
    return parser


def about(given) -> dict:
    """What the record says of all its runs."""
    return facts() | {
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
        "longest": LONGEST,
        "at last": AT_LAST,
        "questions": QUESTIONS,
        "test questions": TEST,
        "compared": COMPARED,
    }


def grounds(starts, small) -> dict:
    """{start: a fingerprint of what its runs rest on}"""
    ground = {"random": vocabulary()}
    ground |= {"pretrained": weights()} if "pretrained" in starts else {}
    return ground | ({"small": weights(str(small))} if small else {})


def shorter_cases(given):
    """(start, way, d, steps, the stride to begin with)"""
    for start in given.starts:
        for d in [None, *given.dimensions]:
            yield start, "hash", d, given.steps, FIRST[start if d else "full"]
    if "pretrained" in given.starts:
        for way in list(WAYS)[1:]:
            yield "pretrained", way, COMPARED, given.steps, FIRST["pretrained"]


def longer_cases(given, runs):
    """The same with more steps, from the stride that was best with the fewer."""
    for steps, dimensions in ((LONGER, ONCE_MORE), (LONGEST, AT_LAST)):
        for start, d in itertools.product(given.starts, [None, *dimensions]):
            if start != "small" and d in (None, *given.dimensions):
                shorter = found(runs, start=start, way="hash", d=d, steps=given.steps)
                yield start, "hash", d, steps, best(shorter)


def main():
    given = arguments().parse_args()
    torch.set_num_threads(1)
    small = school(given.small_steps) if "small" in given.starts else None
    ground = grounds(given.starts, small)
    before = (
        json.loads(given.out.read_text(encoding="utf-8"))
        if given.out.exists()
        else {"runs": []}
    )
    runs = [
        run
        for run in before["runs"]
        if run["on"] == ground.get(run["start"], run["on"])
        and run["steps"] in (given.steps, LONGER, LONGEST)
    ]
    started, record = time.time(), about(given)
    record["small base"] = (
        schooling(small) | {"shape": SMALL} if small else before.get("small base")
    )
    minutes = before.get("minutes", 0.0) if runs else 0.0

    def job_of(start, way, d, steps, first):
        case = dict(zip(CASE, (start, way, d, ground[start], steps)))
        how = {"small": small, "first": first, "climb": steps != LONGER or d is None}
        return case | how | {"runs": found(runs, **case)}

    with ProcessPoolExecutor(given.jobs) as pool:
        for cases in (shorter_cases, partial(longer_cases, runs=runs)):
            jobs = [job_of(*case) for case in cases(given)]
            for done in tqdm(pool.map(measured, jobs), total=len(jobs)):
                case = {key: done[0][key] for key in CASE}
                runs[:] = [run for run in runs if not found([run], **case)] + done
                spent = round(minutes + (time.time() - started) / 60, 1)
                save(given.out, record | {"minutes": spent, "runs": runs})
    for run in runs:
        print(
            f"{run['steps']:3} {run['start']:10} {run['way']:26} d"
            f" {run['d'] or run['parameters']:9,} stride {run['stride']:5} seed"
            f" {run['seed']} loss {run['start_loss']:.2f} -> {run['loss']:.2f}"
            f" test {run.get('test_loss', float('nan')):.2f}"
        )


if __name__ == "__main__":
    main()
