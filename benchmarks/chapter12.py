"""The longer runs of chapter 12: how prompts and prefixes start, at which rate, how
long they are, and how large the base is.

    python benchmarks/chapter12.py                 # writes
      benchmarks/results/chapter12.json

Four parts. "starts": every start at every rate on voice, one seed; also P-tuning and a
LoRA of rank 1. "voice": prompts and prefixes of equal numbers of parameters, from the
text; LoRA and full fine-tuning beside them. "sql": the longer ones and LoRA on a task
that the base has never seen. "sizes": a smaller base, which the script pretrains first
by the base's recipe, twice: a short run of it, and a longer one (they are kept in the
temporary folder; the longer one is chapter 03's); on both, prompt and full fine-tuning
on voice. In the last three the first seed tries rates until the best has a worse one on
either side, and the other two seeds run at the best. The file is written as the runs
come in; those that are in it already are not run again, unless the base that they rest
on, or the number of steps, has changed.
"""

import functools
import json
import os

import torch
from chapter03 import SCHOOL, school, schooling
from common import (
    arguments,
    climb,
    count_trained,
    curve,
    facts,
    fit,
    found,
    save,
    sweep,
    test_scores,
    valid_loss,
    weights,
)

from minipeft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from minipeft.lm import load_data, load_pretrained, load_tokenizer
from minipeft.lm.data import Batches
from minipeft.lm.pretrained import resolve

STEPS, WARMUP, N, SEEDS = {"voice": 100, "sql": 150}, 10, 10, (0, 1, 2)
# of all that stands in front of the text, and of LoRA
RATES = (1e-4, 1e-2, 1e-1, 3e-1, 1.0)
LORA, FULL = "LoRA, r = 1", "full fine-tuning"
FIRST = {
    ("voice", FULL): 3e-4,
    ("sql", "prompt"): 1e-1,
    ("sql", "prefix"): 3e-1,
    ("sql", LORA): 3e-2,
    ("sizes", "prompt"): 1e-1,
    ("sizes", FULL): 1e-3,
}  # where the climb begins
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
STAGES = 4  # of a climb: enough to get from one end of what is likely to the other
STARTS = [
    ("prompt", "RANDOM"),
    ("prompt", "SAMPLE_VOCAB"),
    ("prompt", "TEXT"),
    ("prefix", "RANDOM"),
    ("prefix", "ZERO"),
    ("prefix", "TEXT"),
    ("p-tuning", "RANDOM"),
    (LORA, None),
]
# what one might write before the question
TEXT = {"voice": "Told again by the old captain:", "sql": "The clerk writes a query:"}
PREFIXES = (1, 6)  # tokens; a prompt of as many parameters is `ratio` times longer
# the steps of their pretraining
SMALLER = {"small, read little": 1200, "small": SCHOOL}


@functools.cache
def data_of(task: str, seed: int):
    tokenizer, data = load_tokenizer(), load_data(task)
    return tokenizer, data, Batches(data.train, tokenizer, 16, seed=seed)


def make(job: dict, model, tokenizer):
    """The model with the adapter that the job asks for, from the job's seed."""
    torch.manual_seed(job["seed"])
    method, n, start = job["method"], job["n"], job["start"]
    # as many of its words as fit
    text = tokenizer.decode(tokenizer.encode(TEXT[job["task"]])[:n])
    if method == "prompt":
        text = (
            dict(prompt_tuning_init_text=text, tokenizer_name_or_path=tokenizer)
            if start == "TEXT"
            else {}
        )
        return get_peft_model(
            model,
            PromptTuningConfig(num_virtual_tokens=n, prompt_tuning_init=start, **text),
        )
    if method == "p-tuning":
        return get_peft_model(model, PromptEncoderConfig(num_virtual_tokens=n))
    if method == "prefix":
        zero = "zero" if start == "ZERO" else None
        model = get_peft_model(
            model, PrefixTuningConfig(num_virtual_tokens=n, init_weights=zero)
        )
        if start == "TEXT":
            initialize_kv_prefix_from_text(model, tokenizer, text=text)
        return model
    return (
        get_peft_model(
            model, LoraConfig(r=1, lora_alpha=2, target_modules="all-linear")
        )
        if method == LORA
        else model
    )


def one_run(job: dict) -> dict:
    """job: {"part", "base", "on", "task", "steps", "method", "start", "n", "lr",
    "seed"}; base None is the shipped one."""
    torch.set_num_threads(1)
    tokenizer, data, batches = data_of(job["task"], job["seed"])
    model = make(job, load_pretrained(folder(job["base"])), tokenizer)
    trained = count_trained(model)
    history = fit(model, batches, tokenizer, job, warmup=WARMUP)
    result = {
        "parameters": trained,
        "first_loss": round(history.losses[0], 3),
        "stopped": history.stopped,
        "valid_loss": valid_loss(model, tokenizer, data, 96),
    }
    if job["part"] != "starts":
        test = test_scores(model, tokenizer, data, 100, digits=1)
        result["score"] = test["score"]
    return job | result | {"losses": curve(history.losses[:30])}


def folder(base: str | None) -> str | None:
    return base and str(school(SMALLER[base]))


@functools.cache
def ground(base: str | None) -> str:
    """What a run rests on: the fingerprint of its base."""
    return weights(folder(base))


# -------------------------------------------------------------------------- what is run


def losses(runs: list, **wanted) -> dict:
    """By rate."""
    return {
        run["lr"]: run["valid_loss"] for run in found(runs, seed=SEEDS[0], **wanted)
    }


def best_rate(runs: list, **wanted) -> float:
    tried = losses(runs, **wanted)
    return min(tried, key=tried.get)


def ratio() -> int:
    """How many virtual tokens of a prompt have as many numbers as one of a prefix."""
    shape = load_pretrained().config
    return (
        2
        * shape.num_hidden_layers
        * shape.num_key_value_heads
        * shape.head_dim
        // shape.hidden_size
    )


def a_job(part, case, lr, seed=SEEDS[0]):
    task = "sql" if part == "sql" else "voice"
    where = {"part": part, "on": ground(case["base"]), "task": task}
    return where | {"steps": STEPS[task]} | case | {"lr": lr, "seed": seed}


def a_case(m, n, base=None):
    start = "TEXT" if m in ("prompt", "prefix") else None
    return {"base": base, "method": m, "start": start, "n": n}


def starting_jobs(runs: list, stage: int) -> list:
    """Part "starts": all RATES, then further ones where the best is at an edge."""
    part = "starts"
    cases = [
        a_case(m, None if m == LORA else N) | {"start": start} for m, start in STARTS
    ]
    if stage == 0:
        return [a_job(part, case, lr) for case in cases for lr in RATES]
    tried = [(case, losses(runs, part=part, **case)) for case in cases]
    return [
        a_job(part, case, lr)
        for case, tried in tried
        if min(tried, key=tried.get) in (min(tried), max(tried)) and stage <= STAGES
        for lr in climb(tried, LADDER, None)
    ]


def cases_of(part: str, runs: list) -> list:
    """(case, the rate to begin with)"""
    lengths = {
        "prompt": [n * ratio() for n in PREFIXES],
        "prefix": list(PREFIXES),
        LORA: [None],
        FULL: [None],
    }
    if part == "voice":  # beginning where "starts" was best

        def first(m):
            return FIRST.get((part, m)) or best_rate(
                runs, part="starts", method=m, start=a_case(m, None)["start"]
            )

        return [(a_case(m, n), first(m)) for m in lengths for n in lengths[m]]
    return [
        (a_case(m, lengths[m][-1], base), rate)
        for base in (SMALLER if part == "sizes" else [None])
        for (where, m), rate in FIRST.items()
        if where == part
    ]


def jobs_of(part: str, runs: list, stage: int) -> list:
    """The runs of a part. At the last stage the other seeds, before it the rates."""
    if part == "starts":
        return starting_jobs(runs, stage)
    cases = cases_of(part, runs)
    if stage < STAGES:
        return [
            a_job(part, case, lr)
            for case, first in cases
            for lr in climb(losses(runs, part=part, **case), LADDER, first)
        ]
    return [
        a_job(part, case, best_rate(runs, part=part, **case), seed)
        for case, _ in cases
        for seed in SEEDS[1:]
    ]


def main(argv=None):
    parser = arguments(__doc__, "chapter12")
    parser.add_argument(
        "--parts", nargs="*", default=["starts", "voice", "sql", "sizes"]
    )
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = facts() | {
        "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
        "steps": STEPS,
        "batch_size": 16,
        "warmup": WARMUP,
        "n": N,
        "rates": RATES,
        "text": TEXT,
        "prefixes": PREFIXES,
        "ratio": ratio(),
        "seeds": SEEDS,
        "sizes": {},
    }
    for name in ("shipped", *(SMALLER if "sizes" in given.parts else ())):
        where = resolve(folder(name) if name in SMALLER else None)
        model = load_pretrained(str(where))
        record["sizes"][name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "width": model.config.hidden_size,
            "layers": model.config.num_hidden_layers,
        }
        record["sizes"][name] |= (
            schooling(where) if (where / "history.json").exists() else {}
        )
    if given.out.exists():  # without runs of other steps, or on another smaller base
        before = json.loads(given.out.read_text(encoding="utf-8"))
        known = {name: ground(name) for name in record["sizes"] if name in SMALLER}

        def holds(run):
            return run.get("steps") == STEPS[run["task"]] and run["on"] == known.get(
                run["base"], run["on"]
            )

        record["sizes"] = before["sizes"] | record["sizes"]
        save(
            given.out, before | {"runs": [run for run in before["runs"] if holds(run)]}
        )
    turns = [(part, stage) for part in given.parts for stage in range(STAGES + 1)]
    runs = sweep(
        lambda turn, runs: jobs_of(turn[0], runs, turn[1]),
        one_run,
        turns,
        record,
        given.out,
        given.jobs,
    )
    for run in runs:
        print(
            f"{run['part']:7} {run['base'] or '':18} {run['task']:6} {run['method']:16}"
            f" {run['start'] or '':12} n {run['n'] or 0:3} lr {run['lr']:<6g} seed"
            f" {run['seed']} {run['parameters']:9,} valid {run['valid_loss']:.3f} score"
            f" {run.get('score', '')}"
        )


if __name__ == "__main__":
    main()
