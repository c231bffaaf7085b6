"""The longer runs of chapter 12: how prompts and prefixes start, at which rate, how long they are, and a smaller base.

    python benchmarks/chapter12.py --jobs 2        # writes benchmarks/results/chapter12.json

Three parts. "starts": every start at every rate, one seed. "lengths": prompts and prefixes of equal numbers of
parameters, from the text, each at its best rate of "starts", on two tasks. "sizes": the shipped base against a smaller
one, which the script pretrains first (`--small-steps`), on the same kind of text but on less of it: that takes long and
is done only if asked for. The file is written as the runs come in; those that are in it already are not run again,
unless the base has changed.
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
from common import RESULTS, facts, found, save, weights
from tqdm.auto import tqdm

from minipeft import (LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model,
                      initialize_kv_prefix_from_text)
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.lm.data import Batches
from minipeft.lm.pretrain import SHAPE, pretrain

STEPS, WARMUP, N, SEEDS = 60, 10, 10, (0,)
RATES = (1e-4, 1e-2, 1e-1)
STARTS = [("prompt", start) for start in ("RANDOM", "SAMPLE_VOCAB", "TEXT")] + \
    [("prefix", start) for start in ("RANDOM", "ZERO", "TEXT")]
TEXT = {"voice": "Told again by the old captain:",                         # what one might write before the question
        "sql": "The clerk writes a query:"}
PREFIXES = (1, 4, 16)                           # tokens; a prompt of as many parameters is `ratio` times longer
SMALL = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=3)
OTHERS = {"LoRA, r = 1": (1, 1e-2), "full fine-tuning": (None, 3e-3)}


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
    r, _ = OTHERS[method]
    return model if r is None else get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))


def one_run(job: dict) -> dict:
    """job: {"part", "base", "task", "method", "start", "n", "lr", "seed"}; base None is the shipped one."""
    torch.set_num_threads(1)
    tokenizer, data, batches = data_of(job["task"], job["seed"])
    model = make(job, load_pretrained(small_base() if job["base"] else None), tokenizer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    history = train(model, batches, tokenizer=tokenizer, steps=STEPS, lr=job["lr"], warmup=WARMUP, seed=job["seed"],
                    progress=False)
    result = {"parameters": trained, "first_loss": round(history.losses[0], 3), "stopped": history.stopped,
              "valid_loss": round(evaluate(model, tokenizer, data, split="valid", limit=96, generate=False,
                                           progress=False)["loss"], 4)}
    if job["part"] != "starts":
        test = evaluate(model, tokenizer, data, split="test", limit=50, progress=False)
        result["score"] = round(test[data.metric], 1)
    return job | result | {"losses": " ".join(f"{loss:.3f}" for loss in history.losses[:30])}


def small_base() -> str:
    return os.environ["CHAPTER12_SMALL"]


def best_rate(runs: list, method: str) -> float:
    """The rate at which a start from the text ends with the lowest loss."""
    return min(found(runs, part="starts", method=method, start="TEXT"), key=lambda run: run["valid_loss"])["lr"]


def ratio() -> int:
    """How many virtual tokens of a prompt have as many numbers as one of a prefix."""
    shape = load_pretrained().config
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim // shape.hidden_size


def jobs_of(part: str, runs: list) -> list:
    job = lambda task, method, start, n, lr, seed=0, base=None: {
        "part": part, "base": base, "task": task, "method": method, "start": start, "n": n, "lr": lr, "seed": seed}
    if part == "starts":
        return [job("voice", method, start, N, lr) for method, start in STARTS for lr in RATES] + \
            [job("voice", "p-tuning", "RANDOM", N, lr) for lr in RATES]
    rates = {method: best_rate(runs, method) for method in ("prompt", "prefix")}
    if part == "lengths":
        sizes = [("prefix", n) for n in PREFIXES] + [("prompt", n * ratio()) for n in PREFIXES]
        return [job(task, method, None, None, lr) for task in TEXT for method, (_, lr) in OTHERS.items()] + \
            [job(task, method, "TEXT", n, rates[method], seed)
             for seed in SEEDS for task in TEXT for method, n in sizes]
    jobs = []
    for base in (None, "small"):
        jobs += [job("voice", method, "TEXT", N, lr, base=base) for method, lr in rates.items()]
        jobs += [job("voice", method, None, None, lr, base=base) for method, (_, lr) in OTHERS.items()]
    return jobs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--parts", nargs="*", default=["starts", "lengths"])
    parser.add_argument("--small-steps", type=int, default=3000, help="pretraining steps of the smaller base")
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter12.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    before, started = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}, time.time()
    record = facts() | {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "weights": weights(), "steps": STEPS,
                        "batch_size": 16, "warmup": WARMUP, "n": N, "rates": RATES, "text": TEXT, "prefixes": PREFIXES,
                        "ratio": ratio(), "small": SMALL, "small_steps": given.small_steps,
                        "sizes": {"shipped": sum(p.numel() for p in load_pretrained().parameters())}}
    runs = before.get("runs", []) if before.get("weights") == record["weights"] else []
    if "sizes" in given.parts:
        folder = Path(gettempdir()) / f"minipeft_small_{given.small_steps}"
        os.environ["CHAPTER12_SMALL"] = str(folder)
        if not (folder / "model.safetensors").exists():
            pretrain(folder, given.small_steps, tokenizer=load_tokenizer(), shape=SHAPE | SMALL)
        record["sizes"]["small"] = sum(p.numel() for p in load_pretrained(folder).parameters())
    for part in given.parts:
        jobs = [job for job in jobs_of(part, runs) if not found(runs, **job)]
        with ProcessPoolExecutor(given.jobs) as pool:
            for run in tqdm(pool.map(one_run, jobs), total=len(jobs), desc=part):
                runs.append(run)
                save(given.out, record | {"minutes": round((time.time() - started) / 60, 1), "runs": runs})
    for run in runs:
        print(f"{run['part']:8} {run['base'] or '':6} {run['task']:6} {run['method']:16} {run['start'] or '':12} "
              f"n {run['n'] or 0:3} lr {run['lr']:<6g} seed {run['seed']} {run['parameters']:9,} "
              f"valid {run['valid_loss']:.3f} score {run.get('score', '')}")


if __name__ == "__main__":
    main()
