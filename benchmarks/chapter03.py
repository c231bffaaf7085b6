"""The longer runs of chapter 03: how many numbers does a task need, from a trained base and from none?

    python benchmarks/chapter03.py --jobs 2        # writes benchmarks/results/chapter03.json

Three starts: the course's base, the same network with random weights, and a smaller base, which is pretrained here. For
each d the rate is chosen by the loss on validation questions with seed 0; only that one is run with the other seeds.
A seed draws the projection, the random weights and the order of the questions. The file is written as the runs come in;
those that are in it already are not run again.
"""
import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import RESULTS, facts, found, save
from tqdm.auto import tqdm

from minipeft import SubspaceConfig, get_peft_model
from minipeft.lm import GPT, GPTConfig, evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.lm.pretrain import SHAPE, pretrain

STEPS, WARMUP, QUESTIONS = 40, 10, 128
DIMENSIONS, SEEDS = [16, 64, 256, 1024, 4096, 16384], (0, 1)
# For each start, how far a step of Adam goes: rate * sqrt(d). Random weights want longer strides.
STRIDES = {"pretrained": (2.0, 6.0), "random": (6.0, 20.0, 60.0), "small": (2.0, 6.0)}
FULL_STRIDES = (2.0, 6.0)
SMALL = SHAPE | dict(hidden_size=64, intermediate_size=192, num_hidden_layers=3)
WAYS = {"hash": dict(projection="hash"), "fastfood": dict(projection="fastfood"),
        "fastfood, structure-aware": dict(projection="fastfood", structure_aware=True)}


def start_model(start: str, seed: int, small: Path):
    if start == "random":
        torch.manual_seed(seed)
        return GPT(GPTConfig(**vars(load_pretrained().config)))
    return load_pretrained(small) if start == "small" else load_pretrained()


def one_run(job: dict) -> dict:
    """job: {"start", "way", "d", "stride", "seed", "small"}; d None is full fine-tuning."""
    torch.set_num_threads(1)
    job = dict(job)
    model, tokenizer, sql = start_model(job["start"], job["seed"], job.pop("small")), load_tokenizer(), load_data("sql")
    size = sum(p.numel() for p in model.parameters())
    measure = lambda: evaluate(model, tokenizer, sql, split="valid", limit=QUESTIONS, generate=False, progress=False)
    before = measure()["loss"]
    if job["d"]:
        model = get_peft_model(model, SubspaceConfig(d=job["d"], seed=job["seed"], **WAYS[job["way"]]))
    rate = job["stride"] / (job["d"] or size) ** 0.5
    steps = job.pop("steps")
    history = train(model, sql.train[:16 * steps], tokenizer=tokenizer, steps=steps, lr=rate, warmup=WARMUP,
                    seed=job["seed"], progress=False)
    return job | {"parameters": size, "start_loss": round(before, 4), "loss": round(measure()["loss"], 4),
                  "losses": " ".join(f"{loss:.2f}" for loss in history.losses)}


def chosen(runs: list, **wanted) -> list:
    """All seeds at the stride that is best on the validation questions with seed 0."""
    stride = min(found(runs, seed=SEEDS[0], **wanted), key=lambda run: run["loss"])["stride"]
    return found(runs, stride=stride, **wanted)


def small_base(folder: Path, steps: int, seed: int = 7) -> dict:
    """Pretrain the smaller base, on text alone, unless it is there; returns its facts."""
    if not (folder / "history.json").exists():
        with torch.compiler.set_stance("force_eager"):      # so small a network is trained before it is compiled
            pretrain(folder, steps, seed, tokenizer=load_tokenizer(), shape=SMALL, warm=False, progress=False)
    record = json.loads((folder / "history.json").read_text())
    return {"steps": record["steps"], "tokens": record["tokens"], "shape": SMALL, "loss": record["loss"][-1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dimensions", type=int, nargs="*", default=DIMENSIONS)
    parser.add_argument("--starts", nargs="*", default=list(STRIDES))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--small-steps", type=int, default=300, help="pretraining of the smaller base")
    parser.add_argument("--small", type=Path, default=Path(tempfile.gettempdir()) / "minipeft_chapter03_small_base")
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter03.json")
    given = parser.parse_args()
    runs = json.loads(given.out.read_text(encoding="utf-8"))["runs"] if given.out.exists() else []
    started, record = time.time(), facts()
    record |= {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "task": "sql", "steps": given.steps,
               "batch_size": 16, "warmup": WARMUP, "strides": STRIDES | {"full": FULL_STRIDES},
               "seeds": list(given.seeds), "dimensions": given.dimensions, "questions": QUESTIONS}
    if "small" in given.starts:
        record["small base"] = small_base(given.small, given.small_steps)
    cases = [(start, "hash", d) for start in given.starts for d in [None, *given.dimensions]]
    if "pretrained" in given.starts:
        cases += [("pretrained", way, d) for way in list(WAYS)[1:] for d in given.dimensions if 200 < d < 1000]
    with ProcessPoolExecutor(given.jobs) as pool:
        for seed in given.seeds:  # the first seed finds the stride, the others repeat it
            jobs = [{"start": start, "way": way, "d": d, "stride": stride, "seed": seed} for start, way, d in cases
                    for stride in ((STRIDES[start] if d else FULL_STRIDES) if seed == SEEDS[0] else
                                   [chosen(runs, start=start, way=way, d=d)[0]["stride"]])]
            jobs = [job | {"small": given.small, "steps": given.steps} for job in jobs if not found(runs, **job)]
            for run in tqdm(pool.map(one_run, jobs), total=len(jobs), desc=f"seed {seed}"):
                runs.append(run)
                save(given.out, record | {"minutes": round((time.time() - started) / 60, 1), "runs": runs})
    for run in runs:
        print(f"{run['start']:10} {run['way']:26} d {run['d'] or run['parameters']:9,} stride {run['stride']} "
              f"seed {run['seed']} loss {run['start_loss']:.2f} -> {run['loss']:.2f}")


if __name__ == "__main__":
    main()
