"""Is the base worth adapting? Full fine-tuning, LoRA, BitFit, (IA)3, prefix and prompt
tuning on the tasks, each at its best of three rates.

    python benchmarks/spread.py [--tasks sql voice ...] [--jobs 2]         adds to
      benchmarks/results/spread.json

200 steps of batch 16; the rate is chosen by the loss on the validation split; one seed,
scores on 128 test items (so plus or minus 8 points). Only the base it was measured on
counts: on another one all runs are made again.
"""

import argparse

import torch
from common import RESULTS, count_trained, facts, fit, sweep, test_scores, valid_loss

from minipeft import (
    BitFitConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from minipeft.lm import GPT, load_data, load_pretrained, load_tokenizer
from minipeft.methods.prefix import initialize_kv_prefix_from_text

STEPS, ITEMS, TOKENS = 200, 128, 10
TEXT = "The clerk sat down and wrote"  # where the prefix starts
METHODS = {
    "full": (1e-3, 3e-3, 6e-3),
    "random init": (1e-3, 3e-3, 6e-3),
    "lora r8 all": (3e-3, 1e-2, 2e-2),
    "lora r8 q,v": (6e-3, 2e-2, 4e-2),
    "lora r1 q,v": (6e-3, 2e-2, 6e-2),
    "bitfit": (1e-2, 3e-2, 1e-1),
    "ia3": (3e-2, 1e-1, 3e-1),
    "prefix": (2e-2, 6e-2, 2e-1),
    "prompt": (3e-2, 1e-1, 3e-1),
}

# a task of one word an answer wants smaller rates: all are multiplied by this
CALMER = {"mood": 0.3}


def adapted(method, base, tokenizer):
    """The model to train."""
    if method == "full":
        return base
    if method == "random init":
        return GPT(base.config)
    # what the base makes of a text is a far better start than noise
    if method == "prefix":
        model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=TOKENS))
        initialize_kv_prefix_from_text(model, tokenizer, text=TEXT)
        return model
    if method.startswith("lora"):
        _, rank, where = method.split()
        targets = "all-linear" if where == "all" else ["q_proj", "v_proj"]
        return get_peft_model(
            base,
            LoraConfig(
                r=int(rank[1:]), lora_alpha=2 * int(rank[1:]), target_modules=targets
            ),
        )
    configs = {
        "bitfit": BitFitConfig,
        "ia3": IA3Config,
        "prompt": lambda: PromptTuningConfig(
            num_virtual_tokens=TOKENS, prompt_tuning_init="SAMPLE_VOCAB"
        ),
    }
    return get_peft_model(base, configs[method]())


def run(job):
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    tokenizer, task = load_tokenizer(), load_data(job["task"])
    model = adapted(job["method"], load_pretrained(), tokenizer)
    more = {"steps": STEPS, "warmup": 20, "schedule": "cosine"}
    history = fit(model, task, tokenizer, job, **more)
    return job | {
        "trained": count_trained(model),
        "valid_loss": valid_loss(model, tokenizer, task, ITEMS),
        "score": test_scores(model, tokenizer, task, ITEMS, digits=1)["score"],
        "seconds": round(history.seconds),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tasks", nargs="+", default=["sql", "mood", "records", "voice"]
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()

    def jobs(seed, runs):
        return [
            {
                "task": task,
                "method": method,
                "lr": round(lr * CALMER.get(task, 1), 6),
                "seed": seed,
            }
            for task in given.tasks
            for method in given.methods
            for lr in METHODS[method]
        ]

    record = {**facts(), "steps": STEPS, "batch": 16, "items": ITEMS}
    print(table(sweep(jobs, run, [0], record, RESULTS / "spread.json", given.jobs)))


def table(runs):
    """Markdown: a row a method, the score at its best rate."""
    tasks = sorted({r["task"] for r in runs}, key=[r["task"] for r in runs].index)
    lines = [
        "| method | trained | " + " | ".join(tasks) + " |",
        "|---|---|" + "---|" * len(tasks),
    ]
    for method in METHODS:
        best = {
            t: min(
                (r for r in runs if r["task"] == t and r["method"] == method),
                key=lambda r: r["valid_loss"],
                default=None,
            )
            for t in tasks
        }
        one = next((r for r in best.values() if r), None)
        if one:
            cells = [
                f"{r['score']:.0f} ({r['lr']:g})" if r else "" for r in best.values()
            ]
            lines.append(
                f"| {method} | {one['trained']:,} | " + " | ".join(cells) + " |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
