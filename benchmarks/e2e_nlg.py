"""Real data, real models: the E2E NLG Challenge (Novikova et al. 2017), the data of the
LoRA paper's GPT-2 table.

    python benchmarks/e2e_nlg.py                     # both bases; writes
      benchmarks/results/e2e_nlg.json after every run
    python benchmarks/e2e_nlg.py --base stories260K  # one of them; runs that are
      already in the file are not run again

Full fine-tuning, LoRA at two ranks on every linear layer, and the same network from
random weights: equal steps, equal batches, two seeds. The rate is chosen by the loss on
validation data after one short run a rate; where the best is at an edge, further rates
are tried until it has a worse one on either side. BLEU (sacrebleu, mixed case) is that
of greedy texts for the test set's meaning representations, against all their
references.
"""

import argparse
import json
import math
import time
from functools import cache, partial
from pathlib import Path

import torch
from common import RESULTS, climb, facts, found, save, weights

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import GPT, evaluate, load_data, load_pretrained, load_tokenizer, train
from minipeft.lm.data import Batches, max_tokens

METHODS = {
    "full": (1e-3, 3e-3, 1e-2),
    "lora r=8": (3e-3, 1e-2, 3e-2),
    "lora r=1": (3e-3, 1e-2, 3e-2),
    "random init": (1e-3, 3e-3, 1e-2),
}  # and the rates to try
# a best rate at the end of those is followed along here until a worse one is found
LADDER = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# examples a step; the test records whose texts are kept
BATCH, SHOWN = 16, (0, 200, 600)


def make(base, method, seed):
    torch.manual_seed(seed)
    model = load_pretrained(base)
    if method == "random init":
        model = GPT(model.config)
    if method.startswith("lora"):
        r = int(method.split("=")[1])
        model = get_peft_model(
            model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
        )
    return model


def one_run(
    task, base, tokenizer, batches, method, lr, seed, steps, limit=None, final=True
):
    """Train and judge; a short run (final=False) is judged by its validation loss
    alone."""
    model, rows = make(base, method, seed), batches(seed)
    started, used = time.perf_counter(), time.process_time()
    history = train(
        model,
        rows,
        steps=steps,
        lr=lr,
        warmup=min(20, steps // 5),
        seed=seed,
        bf16=True,
    )
    run = {
        "base": base,
        "method": method,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_loss": round(sum(history.losses[-20:]) / len(history.losses[-20:]), 4),
        "stopped": history.stopped,
        "train_minutes": round((time.perf_counter() - started) / 60, 2),
        "train_cpu_minutes": round((time.process_time() - used) / 60, 2),
    }
    valid = evaluate(
        model, tokenizer, task, split="valid", limit=limit or 200, generate=False
    )
    run["valid_loss"] = round(valid["loss"], 4)
    if final:
        result = evaluate(
            model, tokenizer, task, split="test", limit=limit, predictions=True
        )
        run |= {
            "test_loss": round(result["loss"], 4),
            "bleu": result["bleu"],
            "test_records": result["examples"],
            "minutes": round((time.perf_counter() - started) / 60, 2),
            "samples": [
                result["predictions"][i].strip()
                for i in SHOWN
                if i < result["examples"]
            ],
        }
    return run


def table(record):
    """One line a base and method, means over the seeds."""
    lines = [
        "base         method         rate    trained test loss  BLEU, each seed "
        " minutes of CPU"
    ]
    for base in dict.fromkeys(run["base"] for run in record["runs"]):
        for method in METHODS:
            if runs := [
                r for r in record["runs"] if (r["base"], r["method"]) == (base, method)
            ]:

                def mean(key):
                    return sum(run[key] for run in runs) / len(runs)

                bleu = ", ".join(f"{run['bleu']:.1f}" for run in runs)
                lines.append(
                    f"{base:12} {method:12} {runs[0]['lr']:6g} {runs[0]['trained']:10,}"
                    f" {mean('test_loss'):9.3f} {bleu:>16}"
                    f" {mean('train_cpu_minutes'):15.1f}"
                )
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base",
        nargs="+",
        default=["lanternwick", "stories260K"],
        help="names or folders of base models",
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sweep-steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--limit",
        type=int,
        help="only so many validation and test records (default: 200 and all)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "e2e_nlg.json")
    return parser


def about(task):
    """What the record says of all its runs."""
    return facts() | {
        "task": task.description,
        "train_texts": len(task.train),
        "batch_size": BATCH,
        "alpha": "2 r",
        "targets": "all-linear",
        "schedule": "20 steps of warm-up, cosine; AdamW; bf16 autocast",
        "decoding": "greedy",
        "shown": [
            {"prompt": e.prompt, "references": e.meta["references"]}
            for i, e in enumerate(task.test)
            if i in SHOWN
        ],
    }


class Record:
    """The file of results. It is read anew each time: another process may work on
    another base."""

    def __init__(self, path, header):
        self.path, self.header = path, header

    def stored(self):
        if self.path.is_file():
            return json.loads(self.path.read_text(encoding="utf-8"))
        return {"sweep": [], "runs": []}

    def once(self, where, mark, do, **job):
        """The run of this job, made on these weights: from the file, or else by `do`,
        and then it is in the file."""
        if known := found(self.stored()[where], weights=mark, **job):
            return known[0]
        print(where, job, flush=True)
        run = do(final=where == "runs", **job)

        def now(rows):
            return [
                row
                for row in rows
                if row["base"] != job["base"] or row.get("weights") == mark
            ]

        stored = self.stored()
        record = self.header | {key: now(stored[key]) for key in ("sweep", "runs")}
        record[where].append(run | {"weights": mark, "commit": self.header["commit"]})
        save(self.path, record)
        return run


def best_rate(sweep, choices):
    """The rate with the lowest validation loss. sweep(lr) makes a short run; the ladder
    is climbed until the best rate has a worse one on either side."""
    tried, wanted = {}, list(choices)
    while wanted:
        for lr in wanted:
            run = sweep(lr)
            tried[lr] = math.inf if run["stopped"] else run["valid_loss"]
        wanted = climb(tried, LADDER, None)
    return min(tried, key=tried.get)


def main(argv=None):
    given = arguments().parse_args(argv)
    task = load_data("e2e_nlg")
    record = Record(given.out, about(task))
    for base in given.base:
        tokenizer = load_tokenizer(base)
        longest, mark = max_tokens(load_pretrained(base)), weights(base)
        batches = cache(
            partial(
                Batches, task.train, tokenizer, BATCH, max_length=longest, bucket=True
            )
        )
        do = partial(
            one_run, task, tokenizer=tokenizer, batches=batches, limit=given.limit
        )
        rates = {}
        for seed in given.seeds:  # the first seed of every method first
            for method, choices in METHODS.items():
                job = {"base": base, "method": method}
                short = job | {"seed": 0, "steps": given.sweep_steps}
                if method not in rates:
                    sweep = partial(record.once, "sweep", mark, do, **short)
                    rates[method] = best_rate(lambda lr: sweep(lr=lr), choices)
                job |= {"lr": rates[method], "seed": seed, "steps": given.steps}
                record.once("runs", mark, do, **job)
    print(table(record.stored()))


if __name__ == "__main__":
    main()
