"""What every benchmark writes down besides its numbers, and how: in one piece, or not
at all."""

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import evaluate, load_pretrained, train
from minipeft.lm.pretrained import resolve

RESULTS = Path(__file__).parent / "results"
BESIDE = ("long_runs", "subspaces")  # parts of a record that are written apart


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip()
            for line in lines
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def facts():
    """How to get these numbers again: command, processor, versions, date, commit."""

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    ask = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(
        ask, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "command": (
            "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        ),
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "commit": commit.stdout.strip() or None,
        "machine": (
            f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
            " used"
        ),
        "versions": (
            {"python": platform.python_version()}
            | {
                name: installed(name)
                for name in ("torch", "peft", "transformers", "sacrebleu")
            }
        ),
    }


def save(path, record):
    """Write beside, then rename."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    beside = Path(path).with_suffix(".partial")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def found(runs: list, **wanted) -> list:
    return [
        run
        for run in runs
        if all(run.get(key) == value for key, value in wanted.items())
    ]


def finite(loss: float) -> float:
    """As it is written down: a run that went off has 100."""
    return round(min(loss, 100.0), 4) if loss == loss else 100.0


def count_trained(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fit(model, data, tokenizer, job: dict, *, warmup, **more):
    """Train with the job's rate, seed and number of steps (more: train's arguments);
    returns the history."""
    options = {"steps": job.get("steps"), "lr": job["lr"], "seed": job["seed"]} | more
    return train(
        model, data, tokenizer=tokenizer, warmup=warmup, progress=False, **options
    )


def valid_loss(model, tokenizer, task, limit) -> float:
    """The loss on the first `limit` validation examples, as it is written down."""
    return finite(
        evaluate(
            model,
            tokenizer,
            task,
            split="valid",
            limit=limit,
            generate=False,
            progress=False,
        )["loss"]
    )


def test_scores(model, tokenizer, task, limit, digits=2) -> dict:
    """The loss and the score on the first `limit` test examples."""
    test = evaluate(model, tokenizer, task, split="test", limit=limit, progress=False)
    return {
        "test_loss": finite(test["loss"]),
        "score": round(test[task.metric], digits),
    }


def curve(losses: list, digits=3) -> str:
    """A training curve as one string, as short as JSON allows."""
    return " ".join(f"{loss:.{digits}f}" for loss in losses)


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """The arguments that all sweeps have; `name` is the chapter's."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each with one thread"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def right_answers(predictions: list, task) -> str:
    """Which answers to the first test examples are right, as a string of 0 and 1."""
    scores = [
        task.score([said], [example])[task.metric]
        for said, example in zip(predictions, task.test)
    ]
    return "".join("1" if score > 99 else "0" for score in scores)


def climb(tried: dict, ladder, first) -> list:
    """The rates to try next, tried being {rate: loss}: `first` and its neighbours, then
    on until the best has a worse one on either side."""
    at = ladder.index(min(tried, key=tried.get) if tried else first)
    return [rate for rate in ladder[max(at - 1, 0) : at + 2] if rate not in tried]


def equal_ranks(targets: dict, budget_rank: int) -> dict:
    """For each choice of target_modules, the rank of a LoRA that trains about as many
    numbers as all-linear at `budget_rank`."""
    cost = {
        name: count_trained(
            get_peft_model(load_pretrained(), LoraConfig(r=1, target_modules=modules))
        )
        for name, modules in targets.items()
    }
    return {
        name: round(budget_rank * cost["all-linear"] / c) for name, c in cost.items()
    }


def rates_of(seed, runs: list, ladder, first, first_seed=0) -> list:
    """The rates to run next: those that `climb` asks for with the first seed, and the
    best of them, by the loss on validation examples, with the others."""
    tried = {run["lr"]: run["valid_loss"] for run in found(runs, seed=first_seed)}
    if seed == first_seed:
        return climb(tried, ladder, first)
    return [min(tried, key=tried.get)]


def weights(base: str | None = None) -> str:
    """A fingerprint of the base: runs on another one are not kept."""
    numbers = b"".join(
        p.detach().numpy().tobytes() for p in load_pretrained(base).parameters()
    )
    return hashlib.sha256(numbers).hexdigest()[:12]


def vocabulary() -> str:
    """A fingerprint of the base's tokenizer: for runs that begin from nothing, and need
    no more of the base."""
    return hashlib.sha256((resolve() / "tokenizer.json").read_bytes()).hexdigest()[:12]


def sweep(jobs_of, one_run, turns, record: dict, out: Path, workers: int) -> list:
    """Run jobs_of(turn, runs so far) for every turn (a seed, say), keep the results in
    `out` as they come in, return all of them. What else was written there stays."""
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    started = time.time()
    record = record | {"weights": weights()}
    record |= {key: before[key] for key in BESIDE if key in before}
    runs = before["runs"] if before.get("weights") == record["weights"] else []
    spent = before.get("minutes", 0) if runs else 0
    with ProcessPoolExecutor(workers) as pool:
        for turn in turns:
            jobs = [job for job in jobs_of(turn, runs) if not found(runs, **job)]
            for run in tqdm(
                pool.map(one_run, jobs),
                total=len(jobs),
                desc=f"turn {turn}",
                disable=not jobs,
            ):
                runs.append(run)
                save(
                    out,
                    record
                    | {
                        "minutes": round(spent + (time.time() - started) / 60, 1),
                        "runs": runs,
                    },
                )
    return runs
