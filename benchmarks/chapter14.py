"""The longer runs of chapter 14: fusion against what is free, one LoRA with as many
numbers, and one adapter.

    python benchmarks/chapter14.py            # writes benchmarks/results/chapter14.json

For each seed three adapters (Pfeiffer's) learn voice, records and extract. What is
free: their mean, each alone, and for each skill its own expert (told which). Then a
small mix of all three is learnt: by fusion over the three, by a LoRA that trains as
many numbers from the untouched base, and by one new adapter of the same kind. For each
the first seed climbs a ladder of rates until the best has a worse one on either side
(by the loss on the validation splits: the larger mix, half of the steps). The file is
written as the runs come in; those in it are not run again.
"""

import itertools
import os
import tempfile
from pathlib import Path

import torch
from common import (
    arguments,
    climb,
    facts,
    finite,
    fit,
    found,
    right_answers,
    sweep,
    valid_loss,
    weights,
)

from minipeft import (
    BottleneckConfig,
    FusionConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer

SKILLS, WIDTH, EXPERT_STEPS, EXPERT_RATE = ("voice", "records", "extract"), 32, 80, 1e-2
STEPS, WARMUP, SEEDS, SIZES, ITEMS = 80, 10, (0, 1, 2), (24, 192), 32
LADDER, TURNS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), 3  # turns to climb in
FIRST = {"fusion": 3e-3, "one LoRA": 3e-3, "one adapter": 1e-2}
# no training on the mix: all three experts, or one of them alone
FREE = ("the mean", *SKILLS)


def expert():
    return BottleneckConfig(r=WIDTH, init="mam")


def with_experts(seed: int):
    """A PeftModel with an adapter for each skill, trained one after the other; kept for
    the runs that come after."""
    folder, tokenizer = (
        Path(tempfile.gettempdir()) / f"minipeft-chapter14-{weights()}-{seed}",
        load_tokenizer(),
    )
    model = None
    for skill in SKILLS:
        torch.manual_seed(seed)
        kept = (folder / skill / "adapter_model.safetensors").exists()
        if model is None:
            model = (
                PeftModel.from_pretrained(load_pretrained(), folder / skill, skill)
                if kept
                else get_peft_model(load_pretrained(), expert(), skill)
            )
        elif kept:
            model.load_adapter(folder / skill, skill)
        else:
            model.add_adapter(skill, expert())
        if not kept:
            model.set_adapter(skill)
            job = {"steps": EXPERT_STEPS, "lr": EXPERT_RATE, "seed": seed}
            fit(model, load_data(skill), tokenizer, job, warmup=WARMUP)
            model.save_pretrained(folder, selected_adapters=[skill])
    return model


def mix(size: int) -> list:
    """`size` examples, of the three skills in turn."""
    return list(
        itertools.islice(
            itertools.chain(*zip(*(load_data(skill).train for skill in SKILLS))), size
        )
    )


def learner(case: str, seed: int):
    """The model that learns the mix, or, for what is free, is used as it is."""
    model = with_experts(seed) if case in ("fusion", *FREE) else None
    torch.manual_seed(seed)
    if case in SKILLS:
        model.set_adapter(case)
        return model
    if model is not None:
        model.add_adapter("fusion", FusionConfig(adapters=list(SKILLS)))
        model.set_adapter("fusion")
        for name, p in model.named_parameters():
            if case == "the mean" and ".fusion.query" in name:
                p.data.zero_()  # equal scores, equal shares
        return model
    if case == "one adapter":
        return get_peft_model(load_pretrained(), expert())
    shape = load_pretrained().config
    fusion = shape.num_hidden_layers * (
        3 * shape.hidden_size**2 + 2 * shape.hidden_size
    )
    smallest = get_peft_model(
        load_pretrained(), LoraConfig(r=1, target_modules="all-linear")
    )
    r = round(fusion / smallest.get_nb_trainable_parameters()[0])
    return get_peft_model(
        load_pretrained(),
        LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"),
    )


def one_run(job: dict) -> dict:
    """job: {"case", "examples", "lr", "seed", "trial"}; a trial is not scored, what is
    free is not trained. "steps": others than usual. "items": more answers a skill than
    usual, which of them are right, and the loss on validation examples."""
    torch.set_num_threads(1)
    tokenizer, model = load_tokenizer(), learner(job["case"], job["seed"])
    done = {
        "parameters": (
            0 if job["case"] in FREE else model.get_nb_trainable_parameters()[0]
        )
    }
    if job["case"] not in FREE:
        steps = STEPS // 2 if job["trial"] else job.get("steps", STEPS)
        warmup = WARMUP if job["trial"] else WARMUP * steps // STEPS
        fit(model, mix(job["examples"]), tokenizer, job, steps=steps, warmup=warmup)
    tasks = {skill: load_data(skill) for skill in SKILLS}
    if job["trial"] or "items" in job:
        limit = 32 if job["trial"] else 128
        losses = [valid_loss(model, tokenizer, task, limit) for task in tasks.values()]
        done["valid_loss"] = finite(sum(losses) / len(losses))
    if job["trial"]:
        return job | done
    tests = {
        skill: evaluate(
            model,
            tokenizer,
            task,
            split="test",
            limit=job.get("items", ITEMS),
            predictions="items" in job,
            progress=False,
        )
        for skill, task in tasks.items()
    }
    if "items" in job:
        done["right"] = {
            skill: right_answers(test["predictions"], tasks[skill])
            for skill, test in tests.items()
        }
    return (
        job
        | done
        | {
            "losses": {skill: finite(test["loss"]) for skill, test in tests.items()},
            "scores": {
                skill: round(test[tasks[skill].metric], 2)
                for skill, test in tests.items()
            },
        }
    )


def jobs_of(seed: int, runs: list, trials: bool):
    """What is to run with this seed: the trials of all rates, or what runs at the best
    of them."""
    if not trials:
        yield from (
            {"case": case, "examples": 0, "lr": None, "seed": seed, "trial": False}
            for case in FREE
        )
    for case, first in FIRST.items():
        job = {"case": case, "examples": SIZES[-1], "seed": seed, "trial": trials}
        tried = {
            run["lr"]: run["valid_loss"] for run in found(runs, case=case, trial=True)
        }
        if trials:
            yield from (job | {"lr": lr} for lr in climb(tried, LADDER, first))
        else:
            yield from (
                job | {"lr": min(tried, key=tried.get), "examples": size}
                for size in SIZES
            )


def main():
    parser = arguments(__doc__, "chapter14")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    record = facts() | {
        "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
        "skills": list(SKILLS),
        "steps": STEPS,
        "expert_steps": EXPERT_STEPS,
        "items": ITEMS,
        "seeds": list(given.seeds),
        "sizes": list(SIZES),
        "cases": list(FIRST),
        "ladder": LADDER,
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
            f"{run['case']:12} {run['examples']:4} lr {run['lr'] or 0:<6g} seed"
            f" {run['seed']} {run['parameters']:9,} "
            + (
                f"valid {run['valid_loss']:.3f}"
                if run["trial"]
                else f"{run['losses']} {run['scores']}"
            )
        )


if __name__ == "__main__":
    main()
