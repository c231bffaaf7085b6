"""The longer runs of chapter 12: how prompts and prefixes start, at which rate, how long they are, and how large the base is.

    python benchmarks/chapter12.py                 # writes benchmarks/results/chapter12.json

Four parts. "starts": every start at every rate on voice, one seed; also P-tuning, a LoRA of rank 1 and full fine-tuning.
"voice": prompts and prefixes of equal numbers of parameters, from the text, each method at its best rate of "starts",
three seeds; LoRA and full fine-tuning beside them, one seed. "sql": the longer ones and LoRA on a task that the base has
never seen; the first seed tries two rates, the other two run at the better. "sizes": a smaller base, which the script
pretrains first by a short run of the base's recipe (it is kept in the temporary folder, and is chapter 03's), and on it
prompt and full fine-tuning on voice, in the same way. Where the best rate of "starts" is at the edge of what was tried, the
next one is tried too. The file is written as the runs come in; those that are in it already are not run again, unless the
base has changed.
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

STEPS, WARMUP, N, SEEDS = {"voice": 50, "sql": 75}, 10, 10, (0, 1, 2)
RATES = (1e-4, 1e-2, 1e-1)                      # of all that stands in front of the text, and of LoRA
LORA, FULL = "LoRA, r = 1", "full fine-tuning"
TWO_RATES = {"sql": {"prompt": (1e-1, 3e-1), "prefix": (1e-1, 3e-1), LORA: (1e-2, 3e-2)},
             "sizes": {"prompt": (1e-1, 3e-1), FULL: (3e-3, 1e-2)}}
STARTS = [("prompt", "RANDOM"), ("prompt", "TEXT"), ("prefix", "RANDOM"), ("prefix", "ZERO"), ("prefix", "TEXT"),
          ("p-tuning", "RANDOM"), (LORA, None)]
TEXT = {"voice": "Told again by the old captain:",                         # what one might write before the question
        "sql": "The clerk writes a query:"}
PREFIXES = (1, 6)                               # tokens; a prompt of as many parameters is `ratio` times longer
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
    """job: {"part", "base", "task", "method", "start", "n", "lr", "seed"}; base None is the shipped one."""
    torch.set_num_threads(1)
    tokenizer, data, batches = data_of(job["task"], job["seed"])
    model = make(job, load_pretrained(job["base"] and school(job["base"])), tokenizer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    history = train(model, batches, tokenizer=tokenizer, steps=STEPS[job["task"]], lr=job["lr"], warmup=WARMUP, seed=job["seed"],
                    progress=False)
    result = {"parameters": trained, "first_loss": round(history.losses[0], 3), "stopped": history.stopped,
              "valid_loss": round(evaluate(model, tokenizer, data, split="valid", limit=96, generate=False,
                                           progress=False)["loss"], 4)}
    if job["part"] != "starts":
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
    """The runs of a part: at stage 0 the first seed, at stage 1 what follows from its best rates."""
    def job(method, n, lr, seed=SEEDS[0], start=None, base=None):
        return {"part": part, "base": base, "task": "sql" if part == "sql" else "voice", "method": method, "start": start, "n": n,
                "lr": lr, "seed": seed}
    lengths = {"prompt": [n * ratio() for n in PREFIXES], "prefix": list(PREFIXES), LORA: [None], FULL: [None]}
    start = {m: "TEXT" if m in ("prompt", "prefix") else None for m in lengths}
    if part == "starts" and stage == 0:
        return [job(m, None if m == LORA else N, lr, start=s) for m, s in STARTS for lr in RATES] + \
            [job(FULL, None, lr) for lr in (1e-3, 3e-3)]
    if part == "starts":
        return [job(m, N if start[m] else None, lr, start=start[m]) for m in lengths
                for lr in next_rates(runs, part="starts", method=m, start=start[m])]
    if part == "voice":
        rates = {m: best_rate(runs, part="starts", method=m, start=start[m]) for m in lengths}
        return [job(m, n, rates[m], seed, start[m]) for seed in SEEDS for m in lengths for n in lengths[m] if seed == SEEDS[0] or n]
    bases = list(SMALLER) if part == "sizes" else [None]
    if stage == 0:
        return [job(m, lengths[m][-1], lr, SEEDS[0], start[m], base) for base in bases for m, rates in TWO_RATES[part].items() for lr in rates]
    return [job(m, lengths[m][-1], best_rate(runs, part=part, base=base, method=m, seed=SEEDS[0]), seed, start[m], base)
            for base in bases for m in TWO_RATES[part] for seed in SEEDS[1:]]


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
        for part, stage in ((part, stage) for part in given.parts for stage in (0, 1)):
            jobs = [job for job in jobs_of(part, runs, stage) if not found(runs, **job)]
            for run in tqdm(pool.map(one_run, jobs), total=len(jobs), desc=part, disable=not jobs):
                runs.append(run)
                save(given.out, record | {"minutes": round(earlier + (time.time() - started) / 60, 1), "runs": runs})
    for run in runs:
        print(f"{run['part']:7} {run['base'] or '':6} {run['task']:6} {run['method']:16} {run['start'] or '':12} n {run['n'] or 0:3} "
              f"lr {run['lr']:<6g} seed {run['seed']} {run['parameters']:9,} valid {run['valid_loss']:.3f} score {run.get('score', '')}")


if __name__ == "__main__":
    main()
