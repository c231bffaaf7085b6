"""The longer runs of chapter 13: amplifying what the base can do against teaching it something new; and few examples.

    python benchmarks/chapter13.py            # writes benchmarks/results/chapter13.json

`voice` asks for words that the base uses in its stories. `stowaway` has the same sentences and the same words, but each
of the captain's words stands for another one: a rule that the base never saw. The rate of each method is the best of
three by the loss on validation sentences (first seed): on stowaway after half of the steps, on voice after training on
64 examples. With it run three seeds on both tasks, three seeds of some methods on the first 16, 64 and 256 examples of
voice only, and (IA)³ once on stowaway for three times as many steps. The file is written as the runs come in; those in
it are not run again.
"""
import argparse
import dataclasses
import os
import re
from pathlib import Path

import torch
from common import RESULTS, facts, found, sweep

from minipeft import BitFitConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from minipeft.lanternwick.voices import LEXICON
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train

STEPS, WARMUP, SEEDS, SIZES, LONGER, ITEMS = {"voice": 30, "stowaway": 60}, 5, (0, 1, 2), (16, 64, 256), 3, 64
CASES = {                                       # the configuration (None: full fine-tuning), and the rates that are tried
    "prompt, 10 tokens": (lambda: PromptTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM"), (3e-2, 1e-1, 3e-1)),
    "(IA)³": (IA3Config, (3e-2, 1e-1, 3e-1)),
    "BitFit": (BitFitConfig, (1e-2, 3e-2, 1e-1)),
    "LoRA, r = 1, q and v": (lambda: LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
                             (2e-2, 6e-2, 2e-1)),
    "LoRA, r = 8, all linear": (lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), (3e-3, 1e-2, 2e-2)),
    "full fine-tuning": (None, (3e-4, 1e-3, 3e-3)),
}
FEW, PATIENT = ("(IA)³", "LoRA, r = 8, all linear", "full fine-tuning"), ("(IA)³",)


def stowaway(voice):
    """The task voice, told by one who uses the captain's words, each for another: a fixed exchange."""
    own = sorted(set(LEXICON.values()))
    exchanged = dict(zip(own, own[5:] + own[:5]))

    def muddle(example):
        told = re.sub(r"[\w']+", lambda word: exchanged.get(word[0], word[0]), example.completion)
        return dataclasses.replace(example, completion=told, meta={"slots": sorted(set(re.findall(r"[\w']+", told)))})
    return dataclasses.replace(voice, **{split: [muddle(example) for example in getattr(voice, split)]
                                         for split in ("train", "valid", "test")})


def the_task(name: str):
    return stowaway(load_data("voice")) if name == "stowaway" else load_data(name)


def one_run(job: dict) -> dict:
    """job: {"case", "task", "examples", "steps", "lr", "seed", "trial"}; examples None: all; a trial is not scored."""
    torch.set_num_threads(1)
    tokenizer, task, model = load_tokenizer(), the_task(job["task"]), load_pretrained()
    torch.manual_seed(job["seed"])
    if CASES[job["case"]][0]:
        model = get_peft_model(model, CASES[job["case"]][0]())
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    small = dataclasses.replace(task, train=task.train[:job["examples"]])
    history = train(model, small, tokenizer=tokenizer, steps=job["steps"], lr=job["lr"], warmup=WARMUP, seed=job["seed"],
                    progress=False)
    done = {"parameters": parameters, "train_loss": round(sum(history.losses[-10:]) / 10, 4)}
    if job["trial"]:
        loss = evaluate(model, tokenizer, task, split="valid", limit=32, generate=False, progress=False)["loss"]
        return job | done | {"valid_loss": round(loss, 4)}
    test = evaluate(model, tokenizer, task, split="test", limit=ITEMS, progress=False)
    return job | done | {"test_loss": round(test["loss"], 4), "score": round(test[task.metric], 2),
                         "losses": " ".join(f"{loss:.3f}" for loss in history.losses[:20])}


def jobs_of(seed: int, runs: list, trials: bool):
    """What is to run with this seed: the trials of all rates, or what runs at the best of them."""
    run = lambda case, task, lr, **more: {"case": case, "task": task, "examples": None, "steps": STEPS[task], "lr": lr,
                                          "seed": seed, "trial": False} | more
    if trials:
        yield from (run(case, "stowaway", lr, steps=STEPS["stowaway"] // 2, trial=True)
                    for case, (_, rates) in CASES.items() for lr in rates)
        yield from (run(case, "voice", lr, examples=SIZES[1], trial=True)
                    for case, (_, rates) in CASES.items() for lr in rates)
        return
    best = {(case, task): min(found(runs, case=case, task=task, trial=True), key=lambda tried: tried["valid_loss"])["lr"]
            for case in CASES for task in STEPS}
    yield from (run(case, task, best[case, task]) for task in STEPS for case in CASES)
    yield from (run(case, "voice", best[case, "voice"], examples=size) for size in SIZES for case in FEW)
    if seed == 0:
        yield from (run(case, "stowaway", best[case, "stowaway"], steps=LONGER * STEPS["stowaway"]) for case in PATIENT)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter13.json")
    given = parser.parse_args()
    record = facts() | {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "steps": STEPS, "batch_size": 16,
                        "warmup": WARMUP, "seeds": list(given.seeds), "sizes": list(SIZES), "longer": LONGER, "items": ITEMS,
                        "cases": list(CASES), "few": list(FEW), "patient": list(PATIENT)}
    for trials in (True, False):                # the rates first
        runs = sweep(lambda seed, runs: jobs_of(seed, runs, trials), one_run,
                     given.seeds[:1] if trials else given.seeds, record, given.out, given.jobs)
    for run in runs:
        print(f"{run['task']:9} {run['case']:26} {run['examples'] or 'all':>4} steps {run['steps']:3} lr {run['lr']:<6g} "
              f"seed {run['seed']} {run['parameters']:9,} " + (f"valid {run['valid_loss']:.3f}" if run["trial"] else
                                                              f"test {run['test_loss']:.3f} score {run['score']:.1f}"))


if __name__ == "__main__":
    main()
