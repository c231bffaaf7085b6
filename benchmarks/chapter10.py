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

import os
import warnings

import torch
from chapter06 import batches
from common import (
    arguments,
    facts,
    finite,
    fit,
    found,
    rates_of,
    sweep,
    test_scores,
    valid_loss,
)

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import load_data, load_pretrained, load_tokenizer
from minipeft.methods.loftq import fake_quantize
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
    return test_scores(model, load_tokenizer(), load_data("sql"), test, digits=1)


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
    start = valid_loss(model, tokenizer, sql, 100)
    history = fit(model, batches(job["seed"]), tokenizer, job, warmup=WARMUP)
    run = job | {
        "start": start,
        "valid_loss": valid_loss(model, tokenizer, sql, 100),
        **judge(model, job["test"]),
        "train_loss": finite(history.recent),
    }
    return run | (merged_again(model, job["test"]) if job["way"] == "NF4" else {})


def main(argv=None):
    parser = arguments(__doc__, "chapter10")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--test", type=int, default=100, help="questions of the test set"
    )
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
            tried = found(runs, way=way, **more)
            for lr in rates_of(seed, tried, LADDER, FIRST, SEEDS[0]):
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
