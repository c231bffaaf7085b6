"""The longer runs of chapter 10: LoRA over a base in 32, 4 and 2 bits, with and without
LoftQ, and DoRA over NF4.

    python benchmarks/chapter10.py --jobs 2        # writes
      benchmarks/results/chapter10.json

All with the same rank, steps and data. The first seed climbs a ladder of rates until
the best one has a worse one on either side (by the loss on validation questions); the
other seeds run at the best. Over NF4 the trained adapter is also merged back into four
bits, at every rate, and what comes of it is measured. Two bits have no packed form
here: that base holds the rounded numbers, dense. Runs that are in the file already are
not repeated.
"""

import argparse
import os
import warnings
from pathlib import Path

import torch
from chapter06 import batches
from common import RESULTS, climb, facts, finite, found, sweep

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.methods.lora_init import fake_quantize
from minipeft.quant import quantize_model
from minipeft.weights import write_weight

R, ALPHA, WARMUP, SEEDS = 8, 16, 10, (0, 1, 2)
# turns to climb in
LADDER, FIRST, TURNS = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2), 1e-2, 4
WAYS = {
    "32 bits": {},
    "NF4": {"bits": 4},
    "NF4 + LoftQ": {"bits": 4, "loftq": True},
    "NF4, DoRA": {"bits": 4, "dora": True},
    "2 bits": {"bits": 2},
    "2 bits + LoftQ": {"bits": 2, "loftq": True},
}


def make(bits=32, loftq=False, dora=False):
    """The adapted model."""
    base = load_pretrained()
    more = (
        dict(
            init_lora_weights="loftq",
            loftq_config={"loftq_bits": bits, "loftq_iter": 5},
        )
        if loftq
        else {}
    )
    if not loftq and bits == 4:
        quantize_model(base, double_quant=False)
    elif not loftq and bits < 4:
        for module in list(base.model.layers.modules()):
            if isinstance(module, torch.nn.Linear):
                write_weight(module, fake_quantize(module.weight.detach(), bits))
    model = get_peft_model(
        base,
        LoraConfig(
            r=R, lora_alpha=ALPHA, target_modules="all-linear", use_dora=dora, **more
        ),
    )
    return quantize_model(model, double_quant=False) if loftq and bits == 4 else model


def judge(model, test):
    tokenizer, sql = load_tokenizer(), load_data("sql")
    result = evaluate(model, tokenizer, sql, split="test", limit=test, progress=False)
    return {"test_loss": finite(result["loss"]), "score": round(result[sql.metric], 1)}


def merged_again(model, test):
    """The adapter written into four bits: its error, relative to the adapter's change,
    and what the model can do then."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merged = model.merge_and_unload(lossy=True)
    percent = next(
        int(str(w.message).split("error is ")[1].split("%")[0])
        for w in said
        if "error is " in str(w.message)
    )
    return {"merge_error": percent} | {
        f"merged_{key}": value for key, value in judge(merged, test).items()
    }


def one_run(job):
    """job: {"way", "lr", "seed", "steps", "test"}."""
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    tokenizer, sql, model = load_tokenizer(), load_data("sql"), make(**WAYS[job["way"]])

    def valid_loss():
        return evaluate(
            model,
            tokenizer,
            sql,
            split="valid",
            limit=100,
            generate=False,
            progress=False,
        )["loss"]

    start = valid_loss()
    history = train(
        model,
        batches(job["seed"]),
        steps=job["steps"],
        lr=job["lr"],
        warmup=WARMUP,
        seed=job["seed"],
        progress=False,
    )
    run = job | {
        "start": finite(start),
        "valid_loss": finite(valid_loss()),
        **judge(model, job["test"]),
        "train_loss": finite(history.recent),
    }
    return run | (merged_again(model, job["test"]) if job["way"] == "NF4" else {})


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each with one thread"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--test", type=int, default=100, help="questions of the test set"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter10.json")
    given = parser.parse_args(argv)
    more = {"steps": given.steps, "test": given.test}
    record = (
        facts()
        | {
            "base": os.environ.get("MINIPEFT_BASE", "lanternwick"),
            "task": "sql",
            "r": R,
            "alpha": ALPHA,
            "ladder": LADDER,
            "batch_size": 16,
            "warmup": WARMUP,
            "seeds": list(SEEDS),
        }
        | more
    )

    def jobs_of(seed, runs):
        for way in WAYS:
            tried = {
                run["lr"]: run["valid_loss"]
                for run in found(runs, way=way, seed=SEEDS[0], **more)
            }
            for lr in (
                climb(tried, LADDER, FIRST)
                if seed == SEEDS[0]
                else [min(tried, key=tried.get)]
            ):
                yield {"way": way, "lr": lr, "seed": seed} | more

    runs = sweep(
        jobs_of,
        one_run,
        [SEEDS[0]] * TURNS + list(SEEDS[1:]),
        record,
        given.out,
        given.jobs,
    )
    for run in runs:
        print(
            f"{run['way']:16} lr {run['lr']:<6g} seed {run['seed']} start"
            f" {run['start']:.3f} valid {run['valid_loss']:.3f} test"
            f" {run['test_loss']:.3f} score {run['score']:.0f}"
        )


if __name__ == "__main__":
    main()
