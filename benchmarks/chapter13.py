"""The longer runs of chapter 13: amplifying what the base can do against teaching it something new; and few examples.

    python benchmarks/chapter13.py --jobs 2        # writes benchmarks/results/chapter13.json

`voice` asks for words and phrases that the base uses in its stories; `sql` for a rule that it never saw at work. Each
method runs on both with two seeds, at a learning rate from earlier trials (benchmarks/spread.py has most of them). Then
some run once more on the first 16, 64 and 256 examples of voice only. The file is written as the runs come in; those in
it are not run again.
"""
import argparse
import dataclasses
import os
from pathlib import Path

import torch
from common import RESULTS, facts, sweep

from minipeft import BitFitConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train

STEPS, WARMUP, SEEDS, SIZES = 80, 10, (0, 1), (16, 64, 256)
CASES = {                                       # the configuration (None: full fine-tuning), the rates on voice and on sql
    "prompt, 10 tokens": (lambda: PromptTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM"), (0.3, 0.1)),
    "(IA)³": (IA3Config, (1e-1, 1e-1)),
    "BitFit": (BitFitConfig, (3e-2, 3e-2)),
    "LoRA, r = 1, q and v": (lambda: LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"]), (6e-2, 6e-2)),
    "LoRA, r = 8, all linear": (lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), (3e-3, 1e-2)),
    "full fine-tuning": (None, (1e-3, 1e-3)),
}
FEW = ("(IA)³", "LoRA, r = 8, all linear", "full fine-tuning")


def one_run(job: dict) -> dict:
    """job: {"case", "task", "examples", "lr", "seed"}; examples None: all of them."""
    torch.set_num_threads(1)
    tokenizer, task, model = load_tokenizer(), load_data(job["task"]), load_pretrained()
    torch.manual_seed(job["seed"])
    if CASES[job["case"]][0]:
        model = get_peft_model(model, CASES[job["case"]][0]())
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    small = dataclasses.replace(task, train=task.train[:job["examples"]])
    history = train(model, small, tokenizer=tokenizer, steps=STEPS, lr=job["lr"], warmup=WARMUP, seed=job["seed"],
                    progress=False)
    valid = evaluate(model, tokenizer, task, split="valid", limit=64, generate=False, progress=False)
    test = evaluate(model, tokenizer, task, split="test", limit=100, progress=False)
    return job | {"parameters": parameters, "valid_loss": round(valid["loss"], 4), "test_loss": round(test["loss"], 4),
                  "train_loss": round(sum(history.losses[-10:]) / 10, 4), "score": round(test[task.metric], 2),
                  "losses": " ".join(f"{loss:.3f}" for loss in history.losses[:40])}


def jobs_of(seed: int, runs: list):
    for case, (_, (on_voice, on_sql)) in CASES.items():
        yield {"case": case, "task": "voice", "examples": None, "lr": on_voice, "seed": seed}
        yield {"case": case, "task": "sql", "examples": None, "lr": on_sql, "seed": seed}
        if case in FEW:
            yield from ({"case": case, "task": "voice", "examples": n, "lr": on_voice, "seed": seed} for n in SIZES)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter13.json")
    given = parser.parse_args()
    record = facts() | {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "steps": STEPS, "batch_size": 16,
                        "warmup": WARMUP, "seeds": list(given.seeds), "sizes": list(SIZES), "cases": list(CASES),
                        "few": list(FEW)}
    for run in sweep(jobs_of, one_run, given.seeds, record, given.out, given.jobs):
        print(f"{run['task']:6} {run['case']:26} {run['examples'] or 'all':>4} lr {run['lr']:<6g} seed {run['seed']} "
              f"{run['parameters']:9,} valid {run['valid_loss']:.3f} score {run['score']:.1f}")


if __name__ == "__main__":
    main()
