"""The longer runs of chapter 15: many adapters on one base.

    python benchmarks/chapter15.py            # writes benchmarks/results/chapter15.json

For each seed three LoRAs learn voice, records and extract, each alone. Then

merging      every combination type, its one weight found on 24 examples
negation     one skill subtracted, from the base and from a LoRA that has all three
in a row     the three skills one after the other: in one adapter, and stacked
the mix      what learns from all three at once: one LoRA with as many parameters as
             the three together, from all training examples in the steps of one of
             them, or from 24 examples; and a fusion of three bottleneck adapters, each
             as large as one of the LoRAs, from the same 24 examples

What learns from 24 examples has the best rate of three, by the validation loss of the
first seed after half of the steps ("trial"); the others have the rates that earlier
chapters found. The file is written as the runs come in; those in it are not run again.
"""

import itertools
import os
import tempfile
from pathlib import Path

import torch
from chapter02 import town_text
from common import arguments, facts, finite, found, right_answers, sweep, weights

from minipeft import (
    BottleneckConfig,
    FusionConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.lm.evaluation import completion_loss

SKILLS = ("voice", "records", "extract")
RANK, STEPS, BATCH, WARMUP, SEEDS, ITEMS = 8, 300, 8, 20, (0, 1, 2), 64
LORA_RATE = 5e-3  # the best of chapter 04's longer runs, LoRA r 8 at 300 steps
BOTTLENECK_RATE = 1e-2  # chapter 14's
FEW, FEW_STEPS, FEW_RATES, FUSION_RATES = 24, 80, (1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2)
WIDTH = 76  # of a bottleneck adapter that trains as much as a LoRA of rank 8
MERGES = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": RANK},
    "ties": {"density": 0.2},
    "ties_svd": {"density": 0.2, "svd_rank": 3 * RANK},
    "dare_linear": {"density": 0.5},
    "dare_linear_svd": {"density": 0.5, "svd_rank": 3 * RANK},
    "magnitude_prune_svd": {"density": 0.2, "svd_rank": 3 * RANK},
}
SHARES = (0.2, 1 / 3, 0.5, 0.7, 1.0, 1.4)  # the weight of each of the three
NEGATIVE = (0.0, -0.25, -0.5, -1.0)


def lora(rank=RANK):
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def bottleneck():
    return BottleneckConfig(r=WIDTH, init="mam")


def mix(size: int) -> list:
    """`size` examples of the three skills in turn, which no expert has seen: the first
    of the validation splits. The last 96 of these choose rates."""
    parts = zip(*(load_data(skill).valid for skill in SKILLS))
    return list(itertools.islice(itertools.chain(*parts), size))


def everything() -> list:
    """The three training splits, in turn."""
    return list(itertools.chain(*zip(*(load_data(skill).train for skill in SKILLS))))


def learn(model, data, seed, lr, steps=STEPS):
    train(
        model,
        data,
        tokenizer=load_tokenizer(),
        steps=steps,
        lr=lr,
        warmup=WARMUP,
        batch_size=BATCH,
        seed=seed,
        progress=False,
    )
    return model.get_nb_trainable_parameters()[0]


def loss_on(model, examples) -> float:
    return completion_loss(model, load_tokenizer(), examples)["loss"]


def valid_loss(model, skills=SKILLS) -> float:
    losses = [loss_on(model, load_data(skill).valid[-32:]) for skill in skills]
    return finite(sum(losses) / len(losses))


def test(model, write=True) -> dict:
    """Losses on the three skills; with `write` also which answers are right."""
    done = {"losses": {}, "right": {}}
    for skill in SKILLS:
        task = load_data(skill)
        result = evaluate(
            model,
            load_tokenizer(),
            task,
            limit=ITEMS,
            generate=write,
            predictions=write,
            progress=False,
        )
        done["losses"][skill] = finite(result["loss"])
        if write:
            done["right"][skill] = right_answers(result["predictions"], task)
    return done if write else {"losses": done["losses"]}


# ---- adapters that later runs need ---------------------------------------------------


def kept(name: str, seed: int) -> Path:
    folder = Path(tempfile.gettempdir()) / f"minipeft-chapter15-{weights()}-{seed}"
    return folder / name


def keep(model, adapter: str, name: str, seed: int):
    """Save one adapter of the model under another name."""
    folder = kept(name, seed)
    model.save_pretrained(folder, selected_adapters=[adapter])


def with_adapters(names, seed: int, apart=False):
    """A PeftModel with adapters trained before; apart: from a seed each."""
    model = None
    for number, name in enumerate(names):
        from_seed = SEEDS[(seed + number) % len(SEEDS)] if apart else seed
        folder = kept(name, from_seed) / "new"
        if model is None:
            model = PeftModel.from_pretrained(load_pretrained(), folder, name)
        else:
            model.load_adapter(folder, name)
    return model


def fresh(config, seed):
    torch.manual_seed(seed)
    return get_peft_model(load_pretrained(), config, "new")


# ---- one kind of run each ------------------------------------------------------------


def train_expert(job):
    """One skill in an adapter of its own."""
    kind, skill = job["case"].split()
    model = fresh(lora() if kind == "LoRA" else bottleneck(), job["seed"])
    parameters = learn(model, load_data(skill), job["seed"], job["lr"], job["steps"])
    done = {"parameters": parameters}
    if job["trial"]:
        return done | {"valid_loss": valid_loss(model, [skill])}
    keep(model, "new", job["case"], job["seed"])
    return done | test(model, write=kind == "LoRA")


def train_mix(job):
    """One LoRA on examples of all three."""
    rank = int(job["case"].split()[-1])
    model = fresh(lora(rank), job["seed"])
    data = mix(job["examples"]) if job["examples"] else everything()
    parameters = learn(model, data, job["seed"], job["lr"], job["steps"])
    done = {"parameters": parameters}
    if job["trial"]:
        return done | {"valid_loss": valid_loss(model)}
    if not job["examples"]:
        keep(model, "new", job["case"], job["seed"])
    return done | test(model)


def train_fusion(job):
    names = [f"bottleneck {skill}" for skill in SKILLS]
    model = with_adapters(names, job["seed"])
    torch.manual_seed(job["seed"])
    model.add_adapter("fusion", FusionConfig(adapters=names))
    model.set_adapter("fusion")
    data = mix(job["examples"])
    done = {"parameters": learn(model, data, job["seed"], job["lr"], job["steps"])}
    if job["trial"]:
        return done | {"valid_loss": valid_loss(model)}
    return done | test(model)


def rescale(model, name, by):
    """Set the weight of a merged adapter, whose scaling is 1."""
    for module in model.modules():
        if getattr(module, "is_slot", False) and name in module.adapters:
            module.adapters[name].scaling = by


def merge(job):
    """One combination type, its weight chosen by the loss on 24 examples. "merge":
    the three LoRAs began with the same A. "apart": they come from three seeds."""
    names = [f"LoRA {skill}" for skill in SKILLS]
    together = job["case"].startswith("merge")
    model = with_adapters(names, job["seed"], apart=not together)
    kind = job["case"].split()[-1]
    torch.manual_seed(job["seed"])
    model.add_weighted_adapter(
        names, [1.0] * 3, "merged", combination_type=kind, **MERGES[kind]
    )
    model.set_adapter("merged")
    few = mix(FEW)
    searched = {}
    for share in SHARES:
        rescale(model, "merged", share)
        searched[f"{share:.2f}"] = finite(loss_on(model, few))
    best = min(SHARES, key=lambda share: searched[f"{share:.2f}"])
    rescale(model, "merged", best)
    return {"searched": searched, "share": round(best, 2)} | test(model)


def merge_searched(job):
    """cat with three weights of their own, found one at a time, twice round."""
    names = [f"LoRA {skill}" for skill in SKILLS]
    model = with_adapters(names, job["seed"])
    few = mix(FEW)
    seen = {}

    def loss_of(shares):
        if shares not in seen:
            model.add_weighted_adapter(names, list(shares), "try", "cat")
            model.set_adapter("try")
            seen[shares] = finite(loss_on(model, few))
            model.set_adapter(names[0])
            model.delete_adapter("try")
        return seen[shares]

    shares = (0.7,) * 3
    for place in (0, 1, 2) * 2:
        choices = [shares[:place] + (share,) + shares[place + 1 :] for share in SHARES]
        shares = min(choices, key=loss_of)
    model.add_weighted_adapter(names, list(shares), "merged", "cat")
    model.set_adapter("merged")
    found_shares = [round(share, 2) for share in shares]
    return {"shares": found_shares, "tried": len(seen)} | test(model)


def negate(job):
    """Voice subtracted, from the base or from the LoRA that has all three skills."""
    model = with_adapters(["LoRA voice"], job["seed"])
    active = ["LoRA voice"]
    if job["case"].startswith("all three"):
        name = f"mix {3 * RANK}"
        model.load_adapter(kept(name, job["seed"]) / "new", "all")
        active.append("all")
    model.set_adapter(active)
    scaling = 2.0
    path = []
    town = town_text()
    for weight in NEGATIVE:
        rescale(model, "LoRA voice", weight * scaling)
        result = test(model, write=job["case"].startswith("all three"))
        path.append({"weight": weight, "town": finite(loss_on(model, town))} | result)
    return {"path": path}


def in_a_row(job):
    """Voice, records, extract, one after the other. In one adapter, or each in a new
    adapter on top of the frozen ones before it."""
    model = with_adapters(["LoRA voice"], job["seed"])
    active = ["LoRA voice"]
    path = [test(model)]
    for skill in SKILLS[1:]:
        torch.manual_seed(job["seed"])
        if job["case"] == "stacked":
            model.add_adapter(skill, lora())
            active.append(skill)
            model.set_adapter(active)
            for name, p in model.named_parameters():
                p.requires_grad_(f".adapters.{skill}." in name)
        else:
            model.set_adapter(active)
        learn(model, load_data(skill), job["seed"], job["lr"], job["steps"])
        path.append(test(model))
    return {"path": path}


RUN = {
    "LoRA": train_expert,
    "bottleneck": train_expert,
    "mix": train_mix,
    "fusion": train_fusion,
    "merge": merge,
    "apart": merge,
    "searched": merge_searched,
    "minus": negate,
    "all": negate,
    "one": in_a_row,
    "stacked": in_a_row,
}


def one_run(job: dict) -> dict:
    torch.set_num_threads(1)
    return job | RUN[job["case"].split()[0]](job)


# ---- what is to run ------------------------------------------------------------------


def job(case, seed, lr=None, steps=STEPS, examples=0, trial=False):
    return {
        "case": case,
        "examples": examples,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "trial": trial,
    }


EXPERTS = [f"LoRA {skill}" for skill in SKILLS]
BOTTLENECKS = [f"bottleneck {skill}" for skill in SKILLS]
LARGE = f"mix {3 * RANK}"


def trained(cases, lr, steps, examples=0):
    return lambda seed, runs: (job(case, seed, lr, steps, examples) for case in cases)


def untrained(cases):
    return trained(cases, None, 0)


def trials(case, rates, steps, examples):
    return lambda seed, runs: (
        job(case, seed, lr, steps, examples, trial=True) for lr in rates
    )


def at_best_rate(case, steps, examples):
    def jobs(seed, runs):
        tried = found(runs, case=case, examples=examples, trial=True)
        best = min(tried, key=lambda run: run["valid_loss"])
        yield job(case, seed, best["lr"], steps, examples)

    return jobs


def stages():
    """(the jobs of a turn, is a turn every seed or the first alone), in order of
    need."""
    yield trained(EXPERTS, LORA_RATE, STEPS), True
    yield untrained([f"merge {kind}" for kind in MERGES]), True
    yield untrained([f"apart {kind}" for kind in ("linear", "cat", "ties_svd")]), True
    yield untrained(["searched cat", "minus voice"]), True
    yield trials(LARGE, FEW_RATES, FEW_STEPS // 2, FEW), False
    yield at_best_rate(LARGE, FEW_STEPS, FEW), True
    yield trained(["one adapter", "stacked"], LORA_RATE, STEPS), False
    yield trained([LARGE], LORA_RATE, STEPS), True
    yield untrained(["all three minus voice"]), True
    yield trained(["one adapter", "stacked"], LORA_RATE, STEPS), True
    yield trained(BOTTLENECKS, BOTTLENECK_RATE, STEPS), True
    yield trials("fusion", FUSION_RATES, FEW_STEPS // 2, FEW), False
    yield at_best_rate("fusion", FEW_STEPS, FEW), True


def main():
    parser = arguments(__doc__, "chapter15")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    record = facts() | {
        "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
        "skills": list(SKILLS),
        "rank": RANK,
        "steps": STEPS,
        "batch_size": BATCH,
        "warmup": WARMUP,
        "items": ITEMS,
        "few": FEW,
        "few_steps": FEW_STEPS,
        "shares": [round(share, 2) for share in SHARES],
        "merges": MERGES,
        "seeds": list(given.seeds),
    }
    for jobs, every_seed in stages():
        turns = given.seeds if every_seed else given.seeds[:1]
        sweep(jobs, one_run, turns, record, given.out, given.jobs)


if __name__ == "__main__":
    main()
