"""The longer runs of chapter 14: fusion against one LoRA with as many numbers, and against one adapter.

    python benchmarks/chapter14.py --jobs 2        # writes benchmarks/results/chapter14.json

For each seed three adapters (Pfeiffer's) learn voice, records and extract. Then a small mix of all three is learnt: by
fusion over the three, by a LoRA that trains as many numbers from the untouched base, and by one more adapter of the same
kind; each at one learning rate, from short trials. The file is written as the runs come in.
"""
import argparse
import itertools
import os
import tempfile
from pathlib import Path

import torch
from common import RESULTS, facts, sweep, weights

from minipeft import BottleneckConfig, FusionConfig, LoraConfig, PeftModel, get_peft_model
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train

SKILLS, WIDTH, EXPERT_STEPS, EXPERT_RATE = ("voice", "records", "extract"), 32, 80, 1e-2
STEPS, WARMUP, SEEDS, SIZES = 60, 10, (0, 1), (24, 192)
RATES = {"fusion": 3e-3, "LoRA": 3e-3, "one adapter": 1e-2}


def expert():
    return BottleneckConfig(r=WIDTH, init="mam")


def with_experts(seed: int):
    """A PeftModel with an adapter for each skill, trained one after the other; kept for the runs that come after."""
    folder, tokenizer = Path(tempfile.gettempdir()) / f"minipeft-chapter14-{weights()}-{seed}", load_tokenizer()
    model = None
    for skill in SKILLS:
        torch.manual_seed(seed)
        kept = (folder / skill / "adapter_model.safetensors").exists()
        if model is None:
            model = (PeftModel.from_pretrained(load_pretrained(), folder / skill, skill) if kept else
                     get_peft_model(load_pretrained(), expert(), skill))
        elif kept:
            model.load_adapter(folder / skill, skill)
        else:
            model.add_adapter(skill, expert())
        if not kept:
            model.set_adapter(skill)
            train(model, load_data(skill), tokenizer=tokenizer, steps=EXPERT_STEPS, lr=EXPERT_RATE, warmup=WARMUP,
                  seed=seed, progress=False)
            model.save_pretrained(folder, selected_adapters=[skill])
    return model


def mix(size: int) -> list:
    """`size` examples, of the three skills in turn."""
    return list(itertools.islice(itertools.chain(*zip(*(load_data(skill).train for skill in SKILLS))), size))


def learner(case: str, seed: int):
    """The model that is to learn the mix."""
    model = with_experts(seed) if case == "fusion" else None
    torch.manual_seed(seed)
    if case == "fusion":
        model.add_adapter("fusion", FusionConfig(adapters=list(SKILLS)))
        model.set_adapter("fusion")
        return model
    if case == "one adapter":
        return get_peft_model(load_pretrained(), expert())
    shape = load_pretrained().config
    fusion = shape.num_hidden_layers * (3 * shape.hidden_size ** 2 + 2 * shape.hidden_size)
    smallest = get_peft_model(load_pretrained(), LoraConfig(r=1, target_modules="all-linear"))
    r = round(fusion / smallest.get_nb_trainable_parameters()[0])
    return get_peft_model(load_pretrained(), LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))


def one_run(job: dict) -> dict:
    """job: {"case", "examples", "lr", "seed"}"""
    torch.set_num_threads(1)
    tokenizer, model = load_tokenizer(), learner(job["case"], job["seed"])
    train(model, mix(job["examples"]), tokenizer=tokenizer, steps=STEPS, lr=job["lr"], warmup=WARMUP, seed=job["seed"],
          progress=False)
    tasks = {skill: load_data(skill) for skill in SKILLS}
    valid = [evaluate(model, tokenizer, task, split="valid", limit=32, generate=False, progress=False)["loss"]
             for task in tasks.values()]
    tests = {skill: evaluate(model, tokenizer, task, split="test", limit=40, progress=False)
             for skill, task in tasks.items()}
    return job | {"parameters": model.get_nb_trainable_parameters()[0], "valid_loss": round(sum(valid) / len(valid), 4),
                  "losses": {skill: round(test["loss"], 4) for skill, test in tests.items()},
                  "scores": {skill: round(test[tasks[skill].metric], 2) for skill, test in tests.items()}}


def jobs_of(seed: int, runs: list):
    for case, size in itertools.product(RATES, SIZES):
        yield {"case": case, "examples": size, "lr": RATES[case], "seed": seed}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter14.json")
    given = parser.parse_args()
    record = facts() | {"base": os.environ.get("MINIPEFT_BASE", "lanternwick"), "skills": list(SKILLS), "steps": STEPS,
                        "expert_steps": EXPERT_STEPS, "seeds": list(given.seeds), "sizes": list(SIZES), "cases": list(RATES)}
    for run in sweep(jobs_of, one_run, given.seeds, record, given.out, given.jobs):
        print(f"{run['case']:12} {run['examples']:4} lr {run['lr']:<6g} seed {run['seed']} {run['parameters']:9,} "
              f"valid {run['valid_loss']:.3f} {run['scores']}")


if __name__ == "__main__":
    main()
