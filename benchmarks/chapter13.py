"""The longer runs of chapter 13: amplifying what the base can do against teaching it
something new; and few examples.

    python benchmarks/chapter13.py            # writes benchmarks/results/chapter13.json

`voice` asks for words that the base uses in its stories. `stowaway` has the same
sentences and the same words, but each of the captain's words stands for another one: a
rule that the base never saw. For each method the first seed climbs a ladder of rates
until the best has a worse one on either side (by the loss on validation sentences): on
stowaway after half of the steps, on voice after training on 64 examples. At the best
run three seeds on both tasks, three seeds of some methods on 16, 64 and 256 examples of
voice (others for each seed), and (IA)³ on stowaway for three times as many steps. The
file is written as the runs come in; those in it are not run again.
"""

import dataclasses
import os
import re

import torch
from common import (
    arguments,
    climb,
    count_trained,
    curve,
    facts,
    finite,
    fit,
    found,
    sweep,
    test_scores,
    valid_loss,
)

from minipeft import (
    BitFitConfig,
    IA3Config,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from minipeft.lanternwick.voices import LEXICON
from minipeft.lm import load_data, load_pretrained, load_tokenizer

STEPS, WARMUP, SEEDS, SIZES, LONGER, ITEMS = (
    {"voice": 30, "stowaway": 60},
    5,
    (0, 1, 2),
    (16, 64, 256),
    3,
    64,
)
# turns to climb
LADDER, TURNS = (
    (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0),
    5,
)
CASES = {  # the configuration (None: full fine-tuning), and the rate to begin with
    "prompt, 10 tokens": (
        lambda: PromptTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM"),
        1e-1,
    ),
    "(IA)³": (IA3Config, 1e-1),
    "BitFit": (BitFitConfig, 3e-2),
    "LoRA, r = 1, q and v": (
        lambda: LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
        3e-2,
    ),
    "LoRA, r = 8, all linear": (
        lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        1e-2,
    ),
    "full fine-tuning": (None, 1e-3),
}
FEW, PATIENT = ("(IA)³", "LoRA, r = 8, all linear", "full fine-tuning"), ("(IA)³",)


def stowaway(voice):
    """The task voice, told by one who uses the captain's words, each for another: a
    fixed exchange."""
    own = sorted(set(LEXICON.values()))
    exchanged = dict(zip(own, own[5:] + own[:5]))

    def muddle(example):
        told = re.sub(
            r"[\w']+", lambda word: exchanged.get(word[0], word[0]), example.completion
        )
        return dataclasses.replace(
            example,
            completion=told,
            meta={"slots": sorted(set(re.findall(r"[\w']+", told)))},
        )

    return dataclasses.replace(
        voice,
        **{
            split: [muddle(example) for example in getattr(voice, split)]
            for split in ("train", "valid", "test")
        },
    )


def the_task(name: str):
    return stowaway(load_data("voice")) if name == "stowaway" else load_data(name)


def one_run(job: dict) -> dict:
    """job: {"case", "task", "examples", "steps", "lr", "seed", "trial"}; examples None:
    all; a trial is not scored."""
    torch.set_num_threads(1)
    tokenizer, task, model = load_tokenizer(), the_task(job["task"]), load_pretrained()
    torch.manual_seed(job["seed"])
    if CASES[job["case"]][0]:
        model = get_peft_model(model, CASES[job["case"]][0]())
    parameters = count_trained(model)
    few = job["examples"]
    small = (
        dataclasses.replace(task, train=task.train[job["seed"] * few :][:few])
        if few
        else task
    )
    history = fit(model, small, tokenizer, job, warmup=WARMUP)
    done = {
        "parameters": parameters,
        "train_loss": finite(sum(history.losses[-10:]) / 10),
    }
    if job["trial"]:
        return job | done | {"valid_loss": valid_loss(model, tokenizer, task, 32)}
    done |= test_scores(model, tokenizer, task, ITEMS)
    return job | done | {"losses": curve(history.losses[:20])}


def jobs_of(seed: int, runs: list, trials: bool):
    """What is to run with this seed: the trials of all rates, or what runs at the best
    of them."""

    def run(case, task, lr, **more):
        return {
            "case": case,
            "task": task,
            "examples": None,
            "steps": STEPS[task],
            "lr": lr,
            "seed": seed,
            "trial": False,
        } | more

    tried = {
        (case, task): {
            run["lr"]: run["valid_loss"]
            for run in found(runs, case=case, task=task, trial=True)
        }
        for case in CASES
        for task in STEPS
    }
    if trials:
        yield from (
            run(case, "stowaway", lr, steps=STEPS["stowaway"] // 2, trial=True)
            for case, (_, first) in CASES.items()
            for lr in climb(tried[case, "stowaway"], LADDER, first)
        )
        yield from (
            run(case, "voice", lr, examples=SIZES[1], trial=True)
            for case, (_, first) in CASES.items()
            for lr in climb(tried[case, "voice"], LADDER, first)
        )
        return
    best = {at: min(losses, key=losses.get) for at, losses in tried.items()}
    yield from (run(case, task, best[case, task]) for task in STEPS for case in CASES)
    yield from (
        run(case, "voice", best[case, "voice"], examples=size)
        for size in SIZES
        for case in FEW
    )
    yield from (
        run(case, "stowaway", best[case, "stowaway"], steps=LONGER * STEPS["stowaway"])
        for case in PATIENT
    )


def main():
    parser = arguments(__doc__, "chapter13")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    record = facts() | {
        "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
        "steps": STEPS,
        "batch_size": 16,
        "warmup": WARMUP,
        "seeds": list(given.seeds),
        "sizes": list(SIZES),
        "longer": LONGER,
        "items": ITEMS,
        "ladder": LADDER,
        "cases": list(CASES),
        "few": list(FEW),
        "patient": list(PATIENT),
    }
    for trials in (True, False):  # the rates first
        runs = sweep(
            lambda seed, runs: jobs_of(seed, runs, trials),
            one_run,
            given.seeds[:1] * TURNS if trials else given.seeds,
            record,
            given.out,
            given.jobs,
        )
    for run in runs:
        print(
            f"{run['task']:9} {run['case']:26} {run['examples'] or 'all':>4} steps"
            f" {run['steps']:3} lr {run['lr']:<6g} seed {run['seed']}"
            f" {run['parameters']:9,} "
            + (
                f"valid {run['valid_loss']:.3f}"
                if run["trial"]
                else f"test {run['test_loss']:.3f} score {run['score']:.1f}"
            )
        )


if __name__ == "__main__":
    main()
