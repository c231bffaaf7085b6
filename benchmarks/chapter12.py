"""The longer runs of chapter 12: how prompts and prefixes start, at which rate, how long they are, and how large the base is.

    python benchmarks/chapter12.py                 # writes benchmarks/results/chapter12.json

Four parts. "starts": every start at every rate on voice, one seed; also P-tuning, a LoRA of rank 1 and full fine-tuning,
which have rates of their own. "voice": prompts and prefixes of equal numbers of parameters, from the text, each method at
its best rate of "starts", three seeds; LoRA and full fine-tuning beside them, one seed. "sql": the same on a task that the
base has never seen, where each method first looks for its own rate (full fine-tuning keeps that of voice); the middle
length and LoRA with three seeds, the rest with one. "sizes": a smaller base, which the script pretrains first by a short
run of the base's recipe (it is kept in the temporary folder, and is chapter 03's), and on it prompt and full fine-tuning
on voice, each at its best rate, three seeds. A best rate at
the edge of what was tried asks for the next one. The file is written as the runs come in; those that are in it already are
not run again, unless the base has changed.
"""
import argparse
import functools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import gettempdir

import torch
from chapter03 import SMALL
from common import RESULTS, facts, found, save, vocabulary, weights
from tqdm.auto import tqdm

from minipeft import (LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model,
                      initialize_kv_prefix_from_text)
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.lm.data import Batches
from minipeft.lm.pretrain import pretrain

STEPS, WARMUP, N, SEEDS = {"voice": 60, "sql": 90}, 10, 10, (0, 1, 2)
RATES = (1e-4, 1e-2, 1e-1)                      # of all that stands in front of the text
LORA, FULL = "LoRA, r = 1", "full fine-tuning"
OWN = {LORA: RATES, FULL: (1e-3, 3e-3, 1e-2)}
SQL_RATES = {"prompt": (3e-2, 1e-1, 3e-1), "prefix": (3e-2, 1e-1, 3e-1), LORA: (1e-2, 3e-2, 1e-1)}
SIZES_RATES = {"prompt": (3e-2, 1e-1, 3e-1), FULL: (1e-3, 3e-3, 1e-2)}
STARTS = [("prompt", start) for start in ("RANDOM", "SAMPLE_VOCAB", "TEXT")] + \
    [("prefix", start) for start in ("RANDOM", "ZERO", "TEXT")]
TEXT = {"voice": "Told again by the old captain:",                         # what one might write before the question
        "sql": "The clerk writes a query:"}
PREFIXES = (1, 3, 9)                            # tokens; a prompt of as many parameters is `ratio` times longer
SMALLER, SCHOOL = {"small": SMALL}, 1200        # smaller bases, and the steps of their pretraining


@functools.cache
def data_of(task: str, seed: int):
    tokenizer, data = load_tokenizer(), load_data(task)
    return tokenizer, data, Batches(data.train, tokenizer, 16, seed=seed)


def make(job: dict, model, tokenizer):
    """The model with the adapter that the job asks for, from the job's seed."""
    torch.manual_seed(job["seed"])
    method, n, start = job["method"], job["n"], job["start"]
    text = tokenizer.decode(tokenizer.encode(TEXT[job["task"]])[:n])        # as many of its words as fit
    if method == "prompt":
        text = dict(prompt_tuning_init_text=text, tokenizer_name_or_path=tokenizer) if start == "TEXT" else {}
        return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=n, prompt_tuning_init=start, **text))
    if method == "p-tuning":
        return get_peft_model(model, PromptEncoderConfig(num_virtual_tokens=n))
    if method == "prefix":
        zero = "zero" if start == "ZERO" else None
        model = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=n, init_weights=zero))
        if start == "TEXT":
            initialize_kv_prefix_from_text(model, tokenizer, text=text)
        return model
    return get_peft_model(model, LoraConfig(r=1, lora_alpha=2, target_modules="all-linear")) if method == LORA else model


def one_run(job: dict) -> dict:
    """job: {"part", "base", "task", "method", "start", "n", "lr", "seed", "trial"}; a trial is not scored."""
    torch.set_num_threads(1)
    tokenizer, data, batches = data_of(job["task"], job["seed"])
    model = make(job, load_pretrained(job["base"] and school(job["base"])), tokenizer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    history = train(model, batches, tokenizer=tokenizer, steps=STEPS[job["task"]], lr=job["lr"], warmup=WARMUP, seed=job["seed"],
                    progress=False)
    result = {"parameters": trained, "first_loss": round(history.losses[0], 3), "stopped": history.stopped,
              "valid_loss": round(evaluate(model, tokenizer, data, split="valid", limit=96, generate=False,
                                           progress=False)["loss"], 4)}
    if not job["trial"]:
        test = evaluate(model, tokenizer, data, split="test", limit=100, progress=False)
        result["score"] = round(test[data.metric], 1)
    return job | result | {"losses": " ".join(f"{loss:.3f}" for loss in history.losses[:30])}


def school(name: str) -> Path:
    """The folder of a smaller base, pretrained by the base's own recipe, but shorter, if it is not there."""
    folder = Path(gettempdir()) / f"minipeft_{name}_base_{vocabulary()}"        # chapter 03 has the same small one
    if not (folder / "history.json").exists():
        with torch.compiler.set_stance("force_eager"):      # so small a network is trained before it is compiled
            pretrain(folder, SCHOOL, tokenizer=load_tokenizer(), shape=SMALLER[name], progress=False)
    return folder


# ------------------------------------------------------------------------------------------------------ what is run

def best_rate(runs: list, **wanted) -> float:
    return min(found(runs, **wanted), key=lambda run: run["valid_loss"])["lr"]


def next_rates(runs: list, **wanted) -> list:
    """The rate beyond the edge, if the best one is at the edge of what was tried."""
    tried = sorted({run["lr"] for run in found(runs, **wanted)})
    best = best_rate(runs, **wanted)
    return [float(f"{rate:.1g}") for edge, rate in ((0, best / 3.2), (-1, best * 3.2)) if best == tried[edge]]


def ratio() -> int:
    """How many virtual tokens of a prompt have as many numbers as one of a prefix."""
    shape = load_pretrained().config
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim // shape.hidden_size


def jobs_of(part: str, runs: list, stage: int) -> list:
    """The runs of a part: at stage 0 the rates to try, at stage 1 those beyond an edge, at stage 2 what is compared."""
    def job(method, start, n, lr, seed=0, base=None, trial=False):
        return {"part": part, "base": base, "task": "sql" if part == "sql" else "voice", "method": method, "start": start, "n": n,
                "lr": lr, "seed": seed, "trial": trial}
    lengths = {"prompt": [n * ratio() for n in PREFIXES], "prefix": list(PREFIXES), LORA: [None], FULL: [None]}
    middle = {m: each[len(each) // 2] for m, each in lengths.items()}
    start = {m: "TEXT" if middle[m] else None for m in lengths}
    if part == "starts" and stage == 0:
        return [job(m, s, N, lr, trial=True) for m, s in [*STARTS, ("p-tuning", "RANDOM")] for lr in RATES] + \
            [job(m, None, None, lr, trial=True) for m, rates in OWN.items() for lr in rates]
    if part == "starts":
        return [job(m, start[m], middle[m] and N, lr, trial=True) for m in lengths
                for lr in next_rates(runs, part="starts", method=m, start=start[m])] if stage == 1 else []
    if part == "voice" and stage < 2:
        return []
    known = {m: best_rate(runs, part="starts", method=m, start=start[m]) for m in lengths}
    if part == "voice":
        return [job(m, start[m], n, known[m], seed) for seed in SEEDS for m in lengths for n in lengths[m]
                if seed == SEEDS[0] or n]
    if part == "sql":
        if stage == 0:
            return [job(m, start[m], middle[m], lr, trial=True) for m, rates in SQL_RATES.items() for lr in rates]
        tried = {m: dict(part="sql", method=m, trial=True) for m in SQL_RATES}
        if stage == 1:
            return [job(m, start[m], middle[m], lr, trial=True) for m in tried for lr in next_rates(runs, **tried[m])]
        rates = {m: best_rate(runs, **tried[m]) for m in tried} | {FULL: known[FULL]}
        return [job(m, start[m], n, rates[m], seed) for seed in SEEDS for m in lengths for n in lengths[m]
                if n == middle[m] and (seed == SEEDS[0] or m != FULL) or n == lengths[m][-1] and seed == SEEDS[0]]
    tried = {(base, m): dict(part="sizes", base=base, method=m, trial=True) for base in SMALLER for m in SIZES_RATES}
    if stage < 2:
        return [job(m, start[m], middle[m], lr, base=base, trial=True) for base, m in tried
                for lr in (next_rates(runs, **tried[base, m]) if stage else SIZES_RATES[m])]
    return [job(m, start[m], middle[m], best_rate(runs, **tried[base, m]), seed, base) for base, m in tried for seed in SEEDS]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--parts", nargs="*", default=["starts", "voice", "sql", "sizes"])
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter12.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before, started = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}, time.time()
    base = load_pretrained()
    record = facts() | {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "weights": weights(), "steps": STEPS,
                        "batch_size": 16, "warmup": WARMUP, "n": N, "rates": RATES, "text": TEXT, "prefixes": PREFIXES,
                        "ratio": ratio(), "seeds": SEEDS, "school": SCHOOL,
                        "sizes": {"shipped": {"parameters": sum(p.numel() for p in base.parameters()),
                                              "width": base.config.hidden_size, "layers": base.config.num_hidden_layers}}}
    runs = before.get("runs", []) if before.get("weights") == record["weights"] else []
    earlier = before.get("minutes", 0) if runs else 0
    if "sizes" in given.parts:
        for name, shape in SMALLER.items():
            report = json.loads((school(name) / "history.json").read_text())
            record["sizes"][name] = {"parameters": sum(p.numel() for p in load_pretrained(school(name)).parameters()),
                                     "width": shape["hidden_size"], "layers": shape["num_hidden_layers"],
                                     "tokens": report["tokens"], "loss": round(sum(report["loss"][-50:]) / 50, 3)}
    with ProcessPoolExecutor(given.jobs) as pool:
        for part, stage in ((part, stage) for part in given.parts for stage in range(3)):
            jobs = [job for job in jobs_of(part, runs, stage) if not found(runs, **job)]
            for run in tqdm(pool.map(one_run, jobs), total=len(jobs), desc=part, disable=not jobs):
                runs.append(run)
                save(given.out, record | {"minutes": round(earlier + (time.time() - started) / 60, 1), "runs": runs})
    for run in runs:
        print(f"{run['part']:7} {run['base'] or '':6} {run['task']:6} {run['method']:16} {run['start'] or '':12} n {run['n'] or 0:3} "
              f"lr {run['lr']:<6g} seed {run['seed']} {run['parameters']:9,} valid {run['valid_loss']:.3f} score {run.get('score', '')}")


if __name__ == "__main__":
    main()
