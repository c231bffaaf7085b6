"""The longer runs of chapter 03: how many numbers does a task need, from a trained base and from none?

    python benchmarks/chapter03.py        # writes benchmarks/results/chapter03.json

Three starts: the course's base, the same network with random weights, and a smaller base, which is pretrained here. For
each start and each d the stride is climbed with seed 0: from a first guess to its neighbours on LADDER, and on, until the
best lies between two worse ones (by the loss on validation questions). Only that one is run with the other seeds. A seed
draws the projection, the random weights and the order of the questions. The file is written as the runs come in; those
that are in it already are not run again. `--starts random small` needs nothing of the base but its tokenizer.
"""
import argparse
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
from minipeft.lm import GPT, GPTConfig, evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.lm.pretrain import SHAPE, pretrain

STEPS, WARMUP, QUESTIONS = 60, 10, 128
DIMENSIONS, SEEDS = [16, 64, 256, 1024, 4096, 16384], (0, 1, 2)
LADDER = (0.7, 2.0, 6.0, 18.0, 54.0, 160.0, 480.0)      # strides: how far a step of Adam goes, rate * sqrt(d)
FIRST = {"pretrained": 6.0, "random": 54.0, "small": 6.0, "full": 6.0}
SMALL = SHAPE | dict(hidden_size=64, intermediate_size=192, num_hidden_layers=3, head_dim=32)
WAYS = {"hash": dict(projection="hash"), "fastfood": dict(projection="fastfood"),
        "fastfood, structure-aware": dict(projection="fastfood", structure_aware=True)}
COMPARED = 256                                          # the d at which the three ways are compared


def start_model(start: str, seed: int, small: Path):
    if start == "random":
        torch.manual_seed(seed)
        return GPT(GPTConfig(**vars(load_pretrained().config)))
    return load_pretrained(small) if start == "small" else load_pretrained()


def one_run(start: str, way: str, d: int | None, stride: float, seed: int, steps: int, small: Path) -> dict:
    """d None is full fine-tuning."""
    model, tokenizer, sql = start_model(start, seed, small), load_tokenizer(), load_data("sql")
    size = sum(p.numel() for p in model.parameters())
    measure = lambda: evaluate(model, tokenizer, sql, split="valid", limit=QUESTIONS, generate=False, progress=False)
    before = measure()["loss"]
    if d:
        model = get_peft_model(model, SubspaceConfig(d=d, seed=seed, **WAYS[way]))
    history = train(model, sql.train[:16 * steps], tokenizer=tokenizer, steps=steps, lr=stride / (d or size) ** 0.5,
                    warmup=WARMUP, seed=seed, progress=False)
    return {"stride": stride, "seed": seed, "parameters": size, "start_loss": round(before, 4),
            "loss": round(measure()["loss"], 4), "losses": " ".join(f"{loss:.2f}" for loss in history.losses)}


def best(runs: list) -> float:
    """The stride that is best with the first seed."""
    return min(found(runs, seed=SEEDS[0]), key=lambda run: run["loss"])["stride"]


def measured(job: dict) -> list:
    """job: {"start", "way", "d", "on", "steps"} and "small", "runs", "ladder": all runs of this case, old and new."""
    torch.set_num_threads(1)
    job = dict(job)
    small, runs, ladder = job.pop("small"), list(job.pop("runs")), job.pop("ladder")

    def ensure(stride, seed):
        if not found(runs, stride=stride, seed=seed):
            runs.append(job | one_run(job["start"], job["way"], job["d"], stride, seed, job["steps"], small))

    at = ladder.index(FIRST[job["start"] if job["d"] else "full"])
    while True:                                             # until the best has a worse neighbour on each side
        for step in (at - 1, at, at + 1):
            if 0 <= step < len(ladder):
                ensure(ladder[step], SEEDS[0])
        if ladder[at] == best(runs):
            break
        at = ladder.index(best(runs))
    for seed in SEEDS[1:]:
        ensure(best(runs), seed)
    return runs


def small_base(folder: Path, steps: int, seed: int = 7) -> dict:
    """Pretrain the smaller base, unless it is there; returns its facts."""
    if not (folder / "history.json").exists():
        with torch.compiler.set_stance("force_eager"):      # so small a network is trained before it is compiled
            pretrain(folder, steps, seed, tokenizer=load_tokenizer(), shape=SMALL, progress=False)
    record = json.loads((folder / "history.json").read_text())
    return {"steps": record["steps"], "tokens": record["tokens"], "shape": SMALL, "loss": record["loss"][-1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, each with one thread")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dimensions", type=int, nargs="*", default=DIMENSIONS)
    parser.add_argument("--starts", nargs="*", default=["pretrained", "random", "small"])
    parser.add_argument("--small-steps", type=int, default=1200, help="pretraining of the smaller base")
    parser.add_argument("--small", type=Path, default=Path(tempfile.gettempdir()) / f"minipeft_small_base_{vocabulary()}")
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter03.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ground = {"pretrained": weights(), "random": vocabulary(), "small": vocabulary()}   # what a run rests on
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"runs": []}
    runs = [run for run in before["runs"] if run["on"] == ground[run["start"]]]
    started, record = time.time(), facts()
    record |= {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "task": "sql", "steps": given.steps,
               "batch_size": 16, "warmup": WARMUP, "ladder": LADDER, "seeds": SEEDS, "dimensions": given.dimensions,
               "questions": QUESTIONS, "compared": COMPARED}
    if "small" in given.starts:
        record["small base"] = small_base(given.small, given.small_steps)
    minutes = before.get("minutes", 0.0) if runs else 0.0
    cases = [(start, "hash", d) for start in given.starts for d in [None, *given.dimensions]]
    if "pretrained" in given.starts:
        cases += [("pretrained", way, COMPARED) for way in list(WAYS)[1:]]
    jobs = [{"start": start, "way": way, "d": d, "on": ground[start], "steps": given.steps} for start, way, d in cases]
    jobs = [job | {"runs": found(runs, **job), "ladder": LADDER, "small": given.small} for job in jobs]
    with ProcessPoolExecutor(given.jobs) as pool:
        for done in tqdm(pool.map(measured, jobs), total=len(jobs)):
            runs += [run for run in done if run not in runs]
            save(given.out, record | {"minutes": round(minutes + (time.time() - started) / 60, 1), "runs": runs})
    for run in runs:
        print(f"{run['start']:10} {run['way']:26} d {run['d'] or run['parameters']:9,} stride {run['stride']:5} "
              f"seed {run['seed']} loss {run['start_loss']:.2f} -> {run['loss']:.2f}")


if __name__ == "__main__":
    main()
