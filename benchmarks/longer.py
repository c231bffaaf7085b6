"""Longer runs for chapters 02 to 13: 300 and 1,000 steps, three seeds, every answer.

    python benchmarks/longer.py                # goes through the whole plan
    python benchmarks/longer.py --chapters 07 13

The short runs of the chapters' own scripts show how a method starts. These show where
it arrives. Each entry of the plan is a case on a task for a number of steps. Seed 0
climbs a ladder of learning rates until the best one has a worse one on either side, by
the loss on validation examples; then the other seeds run at the best. A run records the
validation loss along the way, the loss and the score on 300 test examples, and which of
them were answered right, so that two cases can be compared answer by answer
(minipeft.course.compare). A run that several chapters use is made once and written into
the record of each: benchmarks/results/chapterNN.json, under "long_runs". The records
are written as the runs come in, and the script goes on where it was stopped.
"""

import argparse
import functools
import json
import time
from functools import partial

import chapter05
import chapter14
import torch
from chapter02 import recalled, town_text
from chapter06 import moved
from chapter13 import the_task
from common import (
    RESULTS,
    climb,
    count_trained,
    curve,
    facts,
    finite,
    fit,
    found,
    right_answers,
    save,
    valid_loss,
    weights,
)

from minipeft import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    DenseLoraConfig,
    DoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from minipeft.lm import evaluate, load_pretrained, load_tokenizer
from minipeft.lm.data import Batches
from minipeft.lm.evaluation import completion_loss
from minipeft.methods.rank_allocator import RankAllocator

SEEDS, BATCH, VALID, TEST = (0, 1, 2), 16, 128, 300
LADDER = tuple(
    float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 2, 5)
)
LOOKS = (30, 100, 300)  # steps after which the validation loss is measured on the way
# what tells a run from the others: with the same, it is the same run made again
WHAT = ("case", "task", "examples", "steps", "lr", "seed", "fields")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def lora(r, targets="all-linear", config=LoraConfig, **fields):
    return lambda job: config(r=r, lora_alpha=2 * r, target_modules=targets, **fields)


def bottleneck(r, **fields):
    return lambda job: BottleneckConfig(r=r, init="mam", **fields)


def adalora(init_r=6, **fields):
    """To rank 3, with the schedule of chapter 07, stretched to the run."""
    return lambda job: AdaLoraConfig(
        init_r=init_r,
        target_r=3,
        tinit=job["steps"] // 10,
        tfinal=4 * job["steps"] // 10,
        deltaT=job["steps"] // 20,
        total_step=job["steps"],
        lora_alpha=2 * init_r,
        target_modules="all-linear",
        **fields,
    )


def pattern(order):
    """LoRA with the ranks that AdaLoRA ended with at the same seed, in this order."""

    def config(job):
        run = found(pool(), case="AdaLoRA 6 to 3", steps=job["steps"], seed=job["seed"])
        ranks = min(run, key=lambda run: run["valid_loss"])["ranks"]
        # a matrix without rank is left alone
        wanted = {path: rank for path, rank in order(ranks).items() if rank}
        return LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=list(wanted),
            rank_pattern=wanted,
            alpha_pattern={path: 2 * rank for path, rank in wanted.items()},
        )

    return config


def backwards(ranks: dict) -> dict:
    """The layer that had the highest rank gets the lowest, among layers of a kind (so
    that as many parameters are trained)."""
    kinds = {}
    for path in ranks:
        kinds.setdefault(path.rsplit(".", 1)[1], []).append(path)
    turned = {}
    for paths in kinds.values():
        rising = sorted(paths, key=ranks.get)
        turned |= {path: ranks[rising[-1 - at]] for at, path in enumerate(rising)}
    return {path: turned[path] for path in ranks}


CASES = {  # a function from the job to the configuration; None is full fine-tuning
    "full": None,
    "LoRA r 1": lora(1),
    "LoRA r 2": lora(2),
    "LoRA r 3": lora(3),
    "LoRA r 4": lora(4),
    "LoRA r 8": lora(8),
    "LoRA r 32": lora(32),
    "LoRA r 1, q and v": lora(1, ["q_proj", "v_proj"]),
    "LoRA r 8, q and v": lora(8, ["q_proj", "v_proj"]),
    "LoRA r 11, attention": lora(11, ATTENTION),
    "LoRA r 6, MLP": lora(6, MLP),
    "LoRA r 22, q and v": lora(22, ["q_proj", "v_proj"]),
    "DoRA r 1": lora(1, config=DoraConfig),
    "DoRA r 2": lora(2, config=DoraConfig),
    "DoRA r 4": lora(4, config=DoraConfig),
    "DoRA r 8": lora(8, config=DoraConfig),
    "AdaLoRA 6 to 3": adalora(),
    "AdaLoRA 6 to 3, no penalty": adalora(orth_reg_weight=0.0),
    "AdaLoRA 3, no search": adalora(init_r=3),
    "LoRA, AdaLoRA's ranks": pattern(lambda ranks: ranks),
    "LoRA, AdaLoRA's ranks reversed": pattern(backwards),
    "Houlsby": bottleneck(18, placement="houlsby"),
    "Pfeiffer": bottleneck(37, placement="pfeiffer"),
    "parallel": bottleneck(37, placement="parallel"),
    # as the library adapters reads them on models that normalise before each part
    "Pfeiffer, after the block": bottleneck(37, target_modules=r"model\.layers\.\d+"),
    "parallel, raw stream": bottleneck(37, placement="parallel"),
    "after attention": bottleneck(37, target_modules=["o_proj"]),
    "LoHa r 2": lambda job: LoHaConfig(r=2, alpha=4, target_modules="all-linear"),
    "LoKr r 64": lambda job: LoKrConfig(r=64, alpha=64, target_modules="all-linear"),
    "VeRA r 256": lambda job: VeraConfig(r=256, target_modules="all-linear"),
    "VeRA r 256, a draw a seed": lambda job: VeraConfig(
        r=256, projection_prng_key=job["seed"], target_modules="all-linear"
    ),
    "DenseLoRA r 16": lambda job: DenseLoraConfig(
        r=16, lora_alpha=16, target_modules="all-linear"
    ),
    "prompt, 10 tokens": lambda job: PromptTuningConfig(
        num_virtual_tokens=10, task_type="CAUSAL_LM"
    ),
    "prefix, 6 tokens": lambda job: PrefixTuningConfig(num_virtual_tokens=6),
    "prefix, 6 tokens, reparametrised": lambda job: PrefixTuningConfig(
        num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=128
    ),
    "(IA)³": lambda job: IA3Config(),
    "BitFit": lambda job: BitFitConfig(),
    "LayerNorm tuning": lambda job: LNTuningConfig(),
}
# whose weights are compared with the base's, and who is asked what the town knows
COMPARED = ("full", "LoRA r 8", "DoRA r 8")


def entry(chapters, case, steps, first, task="sql", examples=None, seeds=SEEDS, **more):
    """One line of the plan; `first` is the rate to begin with, or a list of the only
    rates to try. more: fields of the job besides the case."""
    what = {"case": case, "task": task, "examples": examples, "steps": steps} | more
    return {"chapters": chapters.split(), "what": what, "first": first, "seeds": seeds}


MORE_SEEDS = (0, 1, 2, 3, 4)  # seeds where a run is short
PLAN = [  # the most telling first
    # 13: a rule that the base has never seen; kind and place against count
    *(
        entry("13", case, 60, first, "stowaway")
        for case, first in {
            "LoRA r 1": 2e-2,
            "LayerNorm tuning": 1e-1,
            "full": 2e-3,
            "LoRA r 8": 1e-2,
            "BitFit": 1e-1,
            "(IA)³": 5e-1,
            "LoRA r 1, q and v": 5e-2,
            "prompt, 10 tokens": 2.0,
        }.items()
    ),
    # 07: the final rank, from the start or searched
    entry("04 07", "LoRA r 3", 300, 1e-2),
    entry("07", "AdaLoRA 6 to 3", 300, [5e-2]),
    # 05, 11: which place, on a task that is not learnt at once
    *(
        entry("05 11 13", case, 60, 1e-2, "stowaway")
        for case in ("LoRA r 6, MLP", "LoRA r 11, attention", "LoRA r 4")
    ),
    # 02, 04, 06: the same runs, told once
    entry("02 04 06 08", "LoRA r 8", 300, [5e-3]),
    entry("02 04 06", "full", 300, [5e-4]),
    # 14: all the answers there are, and five seeds where few examples decide
    *(
        entry("14", case, 80, [3e-3], "mix", 24, seeds=MORE_SEEDS)
        for case in ("fusion", "one LoRA")
    ),
    # 11: the place held fixed, and the kind
    entry("11 04", "LoRA r 6, MLP", 300, [1e-2]),
    entry("11", "parallel", 300, [1e-2]),
    entry("11 04", "LoRA r 11, attention", 300, [1e-2]),
    entry("06", "DoRA r 8", 300, [5e-3]),
    # 06: low ranks, DoRA's own rate
    *(
        entry("06", f"{kind} r {r}", 100, 2e-2)
        for r in (1, 2, 4)
        for kind in ("LoRA", "DoRA")
    ),
    # 11: two readings of one name
    *(
        entry("11", case, 100, rates)
        for case, rates in {
            "Pfeiffer": 2e-2,
            "Pfeiffer, after the block": 1e-2,
            "parallel": 1e-2,
            "parallel, raw stream": 1e-2,
        }.items()
    ),
    # 05: the best cells of the map with more seeds, and the column beside its edge
    *(
        entry(
            "05",
            f"LoRA+, A {a:g}, B {b:g}",
            100,
            [a],
            seeds=MORE_SEEDS if a > 0.002 else (0,),
            fields={"rate_B": None if a == b else b},
        )
        for a, b in [
            (5e-3, 1e-2),
            (1e-2, 1e-2),
            (5e-3, 2e-2),
            (1e-2, 5e-3),
            (2e-3, 1e-2),
            (2e-3, 2e-2),
            (2e-3, 5e-2),
        ]
    ),
    # 12: reparametrised or not, both from noise
    entry("12", "prefix, 6 tokens", 100, 2e-1, "voice"),
    entry("12", "prefix, 6 tokens, reparametrised", 100, 5e-3, "voice"),
    # 07: is the searched pattern better than another one?
    entry("07", "LoRA, AdaLoRA's ranks", 300, 2e-2),
    entry("07", "LoRA, AdaLoRA's ranks reversed", 300, 2e-2),
    # 12: few examples of a task that is not already known
    *(
        entry("12", case, 100, first, "sql", 64)
        for case, first in {
            "prompt, 10 tokens": 5e-1,
            "prefix, 6 tokens": 1e-1,
            "LoRA r 1": 1e-2,
            "full": 5e-4,
        }.items()
    ),
    # rates beside the ones above
    entry("07", "AdaLoRA 6 to 3", 300, 5e-2),
    entry("02 04 06 08", "LoRA r 8", 300, 5e-3),
    entry("02 04 06", "full", 300, 5e-4),
    entry("11 04", "LoRA r 6, MLP", 300, 1e-2),
    entry("11", "parallel", 300, 1e-2),
    entry("11", "Pfeiffer", 300, 2e-2),
    # 05: few examples, below the edge of the rates that were tried
    *(
        entry("05", f"{case}, {n} examples", 100, first, examples=n, fields=fields)
        for n in (32, 256)
        for case, first, fields in (
            ("full", 5e-4, chapter05.FULL),
            ("LoRA r 8", 1e-3 if n == 32 else 1e-2, {}),
        )
    ),
    # 13 again: longer
    *(
        entry("13", case, 300, first, "stowaway")
        for case, first in {
            "(IA)³": 2e-1,
            "LayerNorm tuning": 1e-1,
            "BitFit": 5e-2,
            "LoRA r 1": 2e-2,
            "full": 1e-3,
            "LoRA r 1, q and v": 5e-2,
            "prompt, 10 tokens": 2.0,
        }.items()
    ),
    entry("04 06 08 12", "LoRA r 1", 300, 2e-2),
    entry("08", "VeRA r 256", 300, 1e-1),
    entry("08", "LoKr r 64", 300, 5e-2),
    entry("04", "LoRA r 32", 300, 2e-3),
    entry("04 06 08", "LoRA r 4", 300, 1e-2),
    entry("06", "DoRA r 8", 300, 5e-3),
    entry("11 04", "LoRA r 11, attention", 300, 1e-2),
    # where training goes on improving
    entry("07", "LoRA r 3", 1000, 1e-2),
    entry("07", "AdaLoRA 6 to 3", 1000, 2e-2),
    entry("02 04 08", "full", 1000, 2e-4),
    entry("02 04 08", "LoRA r 8", 1000, 2e-3),
    entry("08", "LoRA r 1", 1000, 1e-2),
    entry("08", "VeRA r 256", 1000, 5e-2),
    entry("08", "LoKr r 64", 1000, 1e-2),
    # each seed with frozen matrices of its own, at the rate found with one draw
    entry("08", "VeRA r 256, a draw a seed", 300, [1e-1]),
    entry("08", "VeRA r 256, a draw a seed", 1000, [5e-2]),
    *(
        entry("13", case, 1000, first, "stowaway")
        for case, first in {
            "(IA)³": 1e-1,
            "LayerNorm tuning": 5e-2,
            "LoRA r 1, q and v": 2e-2,
        }.items()
    ),
    # 14: longer, with a ladder of rates of its own
    *(
        entry("14", case, 300, first, "mix", size)
        for size in (24, 192)
        for case, first in {
            "fusion": 2e-3,
            "one LoRA": 2e-3,
            "one adapter": 2e-2,
        }.items()
    ),
    # the rest
    *(
        entry("14", case, 80, [rate], "mix", size)
        for size, case, rate in (
            (192, "fusion", 3e-3),
            (192, "one LoRA", 3e-3),
            (24, "one adapter", 3e-2),
            (192, "one adapter", 3e-2),
        )
    ),
    entry("06", "DoRA r 1", 300, 2e-2),
    entry("05 11 13", "LoRA r 22, q and v", 60, 1e-2, "stowaway"),
    entry("11", "after attention", 300, 2e-2),
    entry("11", "Houlsby", 300, 2e-2),
    entry("08", "LoHa r 2", 300, 5e-2),
    entry("08", "DenseLoRA r 16", 300, 2e-2),
    # 06: low ranks, longer
    entry("06", "LoRA r 2", 300, 1e-2),
    entry("06", "DoRA r 2", 300, 1e-2),
    entry("06", "DoRA r 4", 300, 1e-2),
    # 12: on a task that the base has not seen
    entry("12", "prefix, 6 tokens", 300, 1e-1),
    entry("12", "prefix, 6 tokens, reparametrised", 300, 1e-2),
    entry("12", "prompt, 10 tokens", 300, 5e-1),
    # 07: the parts of AdaLoRA, longer
    entry("07", "AdaLoRA 6 to 3, no penalty", 300, 2e-2),
    entry("07", "AdaLoRA 3, no search", 300, 2e-2),
]


def path_of(chapter: str):
    return RESULTS / f"chapter{chapter}.json"


@functools.cache
def records() -> dict:
    chapters = sorted({chapter for line in PLAN for chapter in line["chapters"]})
    return {c: json.loads(path_of(c).read_text(encoding="utf-8")) for c in chapters}


def pool() -> list:
    """All longer runs on this base, each once."""
    runs = []
    for record in records().values():
        longer = record.get("long_runs", {})
        if longer.get("weights") == ground():
            runs += [run for run in longer["runs"] if run not in runs]
    return runs


@functools.cache
def ground() -> str:
    return weights()


def keep(run: dict, chapters: list) -> None:
    """Write the run into the record of each chapter."""
    for chapter in chapters:
        record = records()[chapter]
        before = record.get("long_runs", {})
        runs = before.get("runs", []) if before.get("weights") == ground() else []
        about = {
            "weights": ground(),
            "batch_size": BATCH,
            "warmup": "a tenth of the steps",
            "ladder": LADDER,
            "valid": VALID,
            "test": TEST,
            "seeds": SEEDS,
        }
        if not found(runs, **{key: run.get(key) for key in WHAT}):
            runs = [*runs, run]
        about["command"] = f"python benchmarks/longer.py --chapters {chapter}"
        record["long_runs"] = facts() | about | {"runs": runs}
        save(path_of(chapter), record)


@functools.cache
def data_of(task: str, examples, seed: int):
    """The task and its batches; of few examples, each seed has others."""
    task = the_task(task)
    few = task.train[seed * (examples or 0) :][:examples]
    return task, Batches(few, load_tokenizer(), BATCH, seed=seed)


def answers(model, tokenizer, task) -> dict:
    """The loss and the score on the test split, and which answers are right."""
    test = evaluate(
        model, tokenizer, task, limit=TEST, predictions=True, progress=False
    )
    return {
        "test_loss": finite(test["loss"]),
        "score": round(test[task.metric], 2),
        "right": right_answers(test["predictions"], task),
    }


def read_raw_stream(model) -> None:
    """Let the parallel adapters read what the norm before feed-forward reads, as the
    library adapters does: the stream itself."""
    modules = dict(model.get_base_model().named_modules())
    for path, slot in modules.items():
        if not path.endswith(".mlp"):
            continue
        adapter, read = slot.adapters["default"], []
        norm = modules[path.replace(".mlp", ".post_attention_layernorm")]
        norm.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        adapter.update = partial(update_of, adapter.update, read)


def update_of(update, read, _):
    return update(read.pop())


def mixed_run(job: dict) -> dict:
    """A run of chapter 14: all answers to the three skills, one after the other."""
    asked = {key: job[key] for key in ("case", "examples", "steps", "lr", "seed")}
    run = chapter14.one_run(asked | {"trial": False, "items": TEST})
    scores, losses = run["scores"].values(), run["losses"].values()
    return {
        "parameters": run["parameters"],
        "valid_loss": run["valid_loss"],
        "test_loss": sum(losses) / len(losses),
        "score": round(sum(scores) / len(scores), 2),
        "scores": run["scores"],
        "right": "".join(run["right"].values()),
    }


def small_batch_run(job: dict) -> dict:
    """A run of chapter 05, which takes eight examples a step."""
    asked = chapter05.PLAIN | job["fields"]
    asked |= {"n": job["examples"], "lr": job["lr"], "seed": job["seed"]}
    run = chapter05.one_run(asked)
    return {key: run[key] for key in ("parameters", "valid_loss", "test_loss", "score")}


def one_run(job: dict) -> dict:
    """job: {"case", "task", "examples", "steps", "lr", "seed"}"""
    started = time.time()
    if job["task"] == "mix" or "fields" in job:
        done = mixed_run(job) if job["task"] == "mix" else small_batch_run(job)
        return job | done | {"seconds": round(time.time() - started)}
    tokenizer, model = load_tokenizer(), load_pretrained()
    task, batches = data_of(job["task"], job["examples"], job["seed"])
    torch.manual_seed(job["seed"])
    if CASES[job["case"]]:
        model = get_peft_model(model, CASES[job["case"]](job))
    if job["case"] == "parallel, raw stream":
        read_raw_stream(model)
    allocator = RankAllocator(model) if job["case"].startswith("AdaLoRA") else None
    done = {"parameters": count_trained(model)}
    along = {}

    def log(step, info):
        if allocator:
            allocator.step()
        if step + 1 in LOOKS and step + 1 < job["steps"]:
            along[step + 1] = valid_loss(model, tokenizer, task, VALID)

    history = fit(model, batches, tokenizer, job, warmup=job["steps"] // 10, log=log)
    tens = [history.losses[at : at + 10] for at in range(0, len(history.losses), 10)]
    done |= {"stopped": history.stopped, "along": along}
    done["valid_loss"] = valid_loss(model, tokenizer, task, VALID)
    done |= answers(model, tokenizer, task)
    done["losses"] = curve(sum(ten) / len(ten) for ten in tens)
    if allocator:
        done["ranks"] = {p: sum(part.kept) for p, part in allocator.adapters.items()}
    if job["case"] in COMPARED and job["task"] == "sql":
        done |= compared(model, tokenizer)
    return job | done | {"seconds": round(time.time() - started)}


def compared(model, tokenizer) -> dict:
    """What the model still knows of the town, and how far its weights moved."""
    town = completion_loss(model, tokenizer, town_text())["loss"]
    done = {"facts": recalled(model, tokenizer), "town": finite(town)}
    plain = (
        model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    ).state_dict()
    base = load_pretrained().state_dict()
    gone = sum((plain[name] - base[name]).square().sum() for name in base)
    length = sum(value.square().sum() for value in base.values())
    return done | {
        "distance": round((gone / length).sqrt().item(), 5),
        "moved": moved(model),
    }


def next_jobs(line: dict) -> list:
    """The runs that an entry of the plan still lacks."""
    what, first, seeds = line["what"], line["first"], line["seeds"]
    tried = {
        run["lr"]: run["valid_loss"] or 0  # None where only one rate is tried
        for run in found(pool(), **what)
        if run["seed"] == seeds[0]
    }
    if isinstance(first, list):
        rates = [rate for rate in first if rate not in tried]
    else:
        rates = climb(tried, LADDER, first)
    if rates:
        return [what | {"lr": rate, "seed": seeds[0]} for rate in rates]
    best = min(tried, key=tried.get)
    jobs = [what | {"lr": best, "seed": seed} for seed in seeds[1:]]
    return [job for job in jobs if not found(pool(), **job)]


def line_of(run: dict) -> str:
    """A run in one line; a run of chapter 14 has no validation loss, one of chapter 05
    may have no score."""
    valid, score = run["valid_loss"], run["score"]
    return (
        f"{time.strftime('%H:%M')} {run['task']:8} {run['case']:30} steps"
        f" {run['steps']:4} lr {run['lr']:<6g} seed {run['seed']}"
        f" valid {'-' if valid is None else f'{valid:.4f}'}"
        f" test {run['test_loss']:.4f}"
        f" score {'-' if score is None else f'{score:.1f}'} ({run['seconds']} s)"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chapters", nargs="+", help="only what these use")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for line in PLAN:
        if given.chapters and not set(given.chapters) & set(line["chapters"]):
            continue
        for run in found(pool(), **line["what"]):  # made for another chapter
            keep(run, line["chapters"])
        while jobs := next_jobs(line):
            for job in jobs:
                run = one_run(job)
                keep(run, line["chapters"])
                print(line_of(run), flush=True)


if __name__ == "__main__":
    main()
