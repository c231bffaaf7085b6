"""The bake-off of chapter 16: every method on every task, with the same number of
trials.

    python benchmarks/chapter16.py        # adds to benchmarks/results/chapter16.json
    python benchmarks/chapter16.py --tasks mood voice        # these tasks only
    python benchmarks/chapter16.py --parts sizes --tasks sql  # examples against score

For each task and method, seed 0 tries four learning rates for 100 steps: one from the
chapters before, its two neighbours, and a fourth, beyond the best where that one is at
the edge, else between the best and the better neighbour. The loss on 128 validation
examples decides. At the best rate three seeds train for 300 steps and answer 300 test
examples; which of them are right is kept (minipeft.course.compare). Each trained model
is also asked what it still knows of the town. Before all that: what the base does
untrained, with and without examples in its prompt, and what a step of each method
costs. After it: other numbers of training examples, and 1,000 steps.

The plan begins with new facts, trained or not, and goes on task by task and, within a
task, method by method, so that a record that was cut has complete methods. Every run is
written when it ends. Several processes may write to the same record. "seconds" are
seconds of processor time.
"""

import argparse
import contextlib
import functools
import json
import os
import time
from pathlib import Path

import torch
from chapter02 import recalled, town_text
from common import (
    RESULTS,
    count_trained,
    facts,
    finite,
    fit,
    found,
    right_answers,
    save,
    valid_loss,
    weights,
)
from longer import CASES as LONGER
from longer import lora
from tqdm.auto import tqdm

from minipeft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SubspaceConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from minipeft.course.measuring import peak_bytes
from minipeft.lm import GPT, evaluate, load_data, load_pretrained, load_tokenizer
from minipeft.lm.data import Batches, Example
from minipeft.lm.evaluation import completion_loss
from minipeft.methods.rank_allocator import RankAllocator
from minipeft.optim import create_loraplus_optimizer
from minipeft.quant import quantize_model

TASKS = ("sql", "records", "mood", "voice", "extract", "newcomers")
BATCH, SEEDS, STEPS, TRIAL_STEPS, TRIALS = 16, (0, 1, 2), 300, 100, 4
VALID, TEST, SHOTS, SIZES, LONG = 128, 300, (1, 2, 4), (32, 128, 512, 2048), 1000
LADDER = tuple(float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 3))
TOKENS, TEXT, RATIO = 10, "The clerk sat down and wrote", 16

# method: (a function from the job to the configuration, the rate to begin with). The
# first ones are also run with other numbers of examples, and for 1,000 steps.
METHODS = {
    "full": (None, 1e-3),
    "LoRA r 4": (lora(4), 1e-2),
    "(IA)³": (LONGER["(IA)³"], 1e-1),
    "prefix": (lambda job: PrefixTuningConfig(num_virtual_tokens=TOKENS), 1e-1),
    "Pfeiffer": (LONGER["Pfeiffer"], 1e-2),
    "DoRA": (LONGER["DoRA r 4"], 1e-2),
    "LoRA r 1": (lora(1), 3e-2),
    "BitFit": (LONGER["BitFit"], 3e-2),
    "prompt": (
        lambda job: PromptTuningConfig(
            num_virtual_tokens=TOKENS, prompt_tuning_init="SAMPLE_VOCAB"
        ),
        3e-1,
    ),
    "LoRA r 16": (lora(16), 3e-3),
    "random init": (None, 3e-3),
    "QLoRA": (lora(4), 1e-2),
    "parallel": (LONGER["parallel"], 1e-2),
    "Houlsby": (LONGER["Houlsby"], 1e-2),
    "VeRA": (LONGER["VeRA r 256"], 3e-2),
    "LayerNorm tuning": (LONGER["LayerNorm tuning"], 1e-1),
    "AdaLoRA": (LONGER["AdaLoRA 6 to 3"], 3e-2),
    "LoHa": (LONGER["LoHa r 2"], 3e-2),
    "LoKr": (LONGER["LoKr r 64"], 1e-2),
    "DenseLoRA": (LONGER["DenseLoRA r 16"], 1e-2),
    "PiSSA": (
        lambda job: LoraConfig(
            r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa"
        ),
        3e-3,
    ),
    "rsLoRA": (lora(16, use_rslora=True), 3e-3),
    "LoRA+": (lora(4), 1e-3),
    "P-tuning": (lambda job: PromptEncoderConfig(num_virtual_tokens=TOKENS), 3e-3),
    "subspace": (lambda job: SubspaceConfig(d=1000), 1e-2),
}
PARTS = ("whole", "sizes", "long")  # all tasks; numbers of examples; 1,000 steps
CORE = ("full", "LoRA r 4", "(IA)³", "prefix", "Pfeiffer", "DoRA")
FACTS = ("full", "LoRA r 4")  # what `newcomers` is asked first


# ----------------------------------------------------------------------- one training


def learner(case: str, job: dict):
    """The model to train, made from the job's seed."""
    torch.manual_seed(job["seed"])
    base = load_pretrained()
    if case == "random init":
        return GPT(base.config)
    if case == "QLoRA":
        base = quantize_model(base, double_quant=False)
    config = METHODS[case][0]
    if config is None:
        return base
    model = get_peft_model(base, config(job))
    if case == "prefix":  # what the base makes of a text is a better start than noise
        initialize_kv_prefix_from_text(model, load_tokenizer(), text=TEXT)
    return model


def optimizer_of(case: str, model, lr: float) -> dict:
    """The optimizer as an argument of train; LoRA+ has its own."""
    if case != "LoRA+":
        return {}
    made = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=RATIO
    )
    return {"optimizer": made}


@functools.cache
def data_of(task: str, examples, seed: int):
    """The task and its batches; of few examples, each seed has others."""
    task = load_data(task)
    start = seed * examples if examples and 3 * examples <= len(task.train) else 0
    few = task.train[start:][:examples]
    return task, Batches(few, load_tokenizer(), BATCH, seed=seed)


def answers(model, task, examples=None) -> dict:
    """The loss and the score on the test split (or on these examples, which ask the
    test's questions in another prompt), and which answers are right."""
    asked = examples or task.test[:TEST]
    test = evaluate(model, load_tokenizer(), asked, predictions=True, progress=False)
    said = test["predictions"]
    return {
        "test_loss": finite(test["loss"]),
        "score": round(task.score(said, task.test[: len(said)])[task.metric], 2),
        "right": right_answers(said, task),
    }


def kept(model) -> dict:
    """What is left of the base's knowledge: the loss on texts of the town in nats per
    token, and the facts of the register that are recalled, in per cent."""
    loss = completion_loss(model, load_tokenizer(), town_text())["loss"]
    return {"town": finite(loss), "facts": recalled(model, load_tokenizer())}


def one_run(job: dict) -> dict:
    """job: {"task", "case", "examples", "steps", "lr", "seed", "trial"}; a trial is
    judged by its validation loss and writes no answers."""
    started = time.process_time()
    task, batches = data_of(job["task"], job["examples"], job["seed"])
    model = learner(job["case"], job)
    more = optimizer_of(job["case"], model, job["lr"])
    allocator = RankAllocator(model) if job["case"] == "AdaLoRA" else None
    if allocator:
        more["log"] = lambda *_: allocator.step()
    done = {"parameters": count_trained(model)}
    warmup = job["steps"] // 10
    history = fit(
        model, batches, load_tokenizer(), job, warmup=warmup, batch_size=BATCH, **more
    )
    done["stopped"] = history.stopped
    done["valid_loss"] = valid_loss(model, load_tokenizer(), task, VALID)
    if not job["trial"]:
        done |= answers(model, task)
        if job["examples"] is None:
            done |= kept(model)
    return job | done | {"seconds": round(time.process_time() - started, 1)}


# -------------------------------------------------------------- without any training


def shown(task, k: int) -> list:
    """The test examples, each after the first k training examples."""
    before = "".join(f"{e.prompt}{e.completion}\n" for e in task.train[:k])
    return [Example(before + e.prompt, e.completion, e.meta) for e in task.test[:TEST]]


def yardstick(name: str, k: int) -> dict:
    """The untrained base with k training examples in its prompt."""
    started = time.process_time()
    task = load_data(name)
    done = answers(load_pretrained(), task, shown(task, k))
    return (
        {"task": name, "shots": k}
        | done
        | {"floor": task.floor, "seconds": round(time.process_time() - started, 1)}
    )


def step_times(rounds: int, shape) -> dict:
    """{method: milliseconds of processor time a training step}, the fastest of
    `rounds`; the methods take turns."""
    job = {"seed": 0, "steps": STEPS}
    made = {}
    for case in METHODS:
        model = learner(case, job).train()
        params = [p for p in model.parameters() if p.requires_grad]
        made[case] = (model, torch.optim.AdamW(params, lr=0.0))
    ids = torch.randint(5, 1000, shape)
    times = {case: [] for case in made}
    for turn in range(rounds + 1):
        for case, (model, optimizer) in made.items():
            started = time.process_time()
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if turn:  # the first round warms up
                times[case].append(1000 * (time.process_time() - started))
    return {case: round(min(each), 1) for case, each in times.items()}


def costs(rounds=8, shape=(BATCH, 48)) -> dict:
    """What a step of each method costs: parameters, bytes at its fullest moment,
    milliseconds."""
    times = step_times(rounds, shape)
    table = {}
    for case in METHODS:
        model = learner(case, {"seed": 0, "steps": STEPS})
        table[case] = {
            "parameters": count_trained(model),
            "peak_bytes": peak_bytes(model, *shape),
            "step_ms": times[case],
        }
    return {"shape": shape, "rounds": rounds, "methods": table}


# ------------------------------------------------------------------------ the record


@contextlib.contextmanager
def alone_in(folder: Path):
    """Within it no other process is: a lock on the folder itself."""
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Record:
    """The file. Every change reads it again under a lock, so that processes can
    share it. It names every machine that added to it."""

    def __init__(self, path: Path):
        self.path = path
        self.about = facts() | {
            "weights": weights(),
            "batch_size": BATCH,
            "warmup": "a tenth of the steps",
            "seeds": SEEDS,
            "steps": STEPS,
            "trial_steps": TRIAL_STEPS,
            "trials": TRIALS,
            "ladder": LADDER,
            "valid": VALID,
            "test": TEST,
            "shots": SHOTS,
            "sizes": SIZES,
            "long": LONG,
            "loraplus_lr_ratio": RATIO,
            "tasks": TASKS,
            "methods": list(METHODS),
            "core": CORE,
        }

    def read(self) -> dict:
        empty = {"yardsticks": [], "runs": []}
        if not self.path.exists():
            return empty
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        return kept if kept.get("weights") == self.about["weights"] else empty

    def change(self, part: str, value) -> None:
        """Append `value` to a list of the record, or set it."""
        with alone_in(self.path.parent):
            record = self.read()
            listed = isinstance(record.get(part), list)
            record[part] = [*record[part], value] if listed else value
            parts = {
                name: record[name]
                for name in ("costs", "yardsticks", "runs")
                if name in record
            }
            machines = record.get("machine", "").split("; ")
            machines += [self.about["machine"]]
            known = {"machine": "; ".join(filter(None, dict.fromkeys(machines)))}
            save(self.path, self.about | known | parts)


# -------------------------------------------------------------------------- the plan


def next_rates(tried: dict, first: float) -> list:
    """The rates still to try, tried being {rate: validation loss}: `first` and its
    neighbours, then one more."""
    at = LADDER.index(first)
    rates = [rate for rate in LADDER[at - 1 : at + 2] if rate not in tried]
    if rates or len(tried) >= TRIALS:
        return rates
    best = min(tried, key=tried.get)
    if best == min(tried):
        return [LADDER[at - 2]]
    if best == max(tried):
        return [LADDER[at + 2]]
    beside = min((rate for rate in tried if rate != best), key=tried.get)
    return [float(f"{(best * beside) ** 0.5:.1e}")]


def tried_rates(runs: list, task: str, case: str) -> dict:
    trials = found(runs, task=task, case=case, trial=True)
    return {run["lr"]: run["valid_loss"] for run in trials}


def next_jobs(runs: list, task: str, case: str, examples, steps: int) -> list:
    """The runs that this entry of the plan still lacks."""
    tried = tried_rates(runs, task, case)
    what = {"task": task, "case": case}
    if rates := next_rates(tried, METHODS[case][1]):
        trial = {"examples": None, "steps": TRIAL_STEPS, "seed": 0, "trial": True}
        return [what | trial | {"lr": rate} for rate in rates]
    what |= {"examples": examples, "steps": steps, "trial": False}
    best = min(tried, key=tried.get)
    jobs = [what | {"lr": best, "seed": seed} for seed in SEEDS]
    return [job for job in jobs if not found(runs, **job)]


def plan(tasks, parts=PARTS) -> list:
    """(task, case, examples, steps), the most telling first."""
    facts_first = [("newcomers", case, None, STEPS) for case in FACTS]
    whole = [
        *(entry for entry in facts_first if entry[0] in tasks),
        *((task, case, None, STEPS) for task in tasks for case in METHODS),
    ]
    sizes = [(task, case, n, STEPS) for task in tasks for n in SIZES for case in CORE]
    long = [(task, case, None, LONG) for task in tasks for case in CORE]
    entries = {"whole": whole, "sizes": sizes, "long": long}
    return [entry for part in PARTS if part in parts for entry in entries[part]]


def line_of(run: dict) -> str:
    score = "trial" if run["trial"] else f"score {run['score']:.1f}"
    return (
        f"{time.strftime('%H:%M')} {run['task']:9} {run['case']:16} examples"
        f" {run['examples'] or 'all':>4} steps {run['steps']:4} lr {run['lr']:<7g} seed"
        f" {run['seed']} valid {run['valid_loss']:.4f} {score} ({run['seconds']} s)"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter16.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(given.out)
    for task in given.tasks:
        for k in (0, *SHOTS):
            if not found(record.read()["yardsticks"], task=task, shots=k):
                record.change("yardsticks", yardstick(task, k))
    if "costs" not in record.read():
        record.change("costs", costs())
    for entry in plan(given.tasks, given.parts):
        if entry[1] not in given.methods:
            continue
        while jobs := next_jobs(record.read()["runs"], *entry):
            for job in tqdm(jobs, desc=" ".join(entry[:2]), disable=None):
                run = one_run(job)
                record.change("runs", run)
                print(line_of(run), flush=True)


if __name__ == "__main__":
    main()
