"""`make demo`: LoRA in half a minute. What the model says before, the training, what
it says after, and what that cost.

    python benchmarks/demo.py                 # questions -> SQL
    python benchmarks/demo.py --task voice --keep voice-lora
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch

from minipeft import LoraConfig, get_peft_model
from minipeft.cli import sentence
from minipeft.doctor import free_space
from minipeft.io import make_folder
from minipeft.lm import (
    evaluate,
    generate,
    load_data,
    load_pretrained,
    load_tokenizer,
    memory_ledger,
    train,
)
from minipeft.lm.memory import human

LENGTH = 64  # tokens of a row, for the memory


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task",
        default="sql",
        help="sql, voice, records, mood, extract, newcomers, or your own .jsonl",
    )
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--limit", type=int, default=100, help="test examples to score")
    parser.add_argument("--keep", type=Path, help="save the adapter in this folder")
    given = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return run(given, folder)


def make_room(model, folder):
    """Make the folder. OSError, before the training, if the adapter would not fit."""
    trained, _ = model.get_nb_trainable_parameters()
    needed = 4 * trained + 100_000
    if (free := free_space(folder)) < needed:
        raise OSError(
            f"{folder}: the adapter needs {human(needed)} of disk, and {human(free)}"
            " are free"
        )
    make_folder(folder)


def show_texts(examples, texts, expected=False):
    for example, text in zip(examples, texts):
        print(f"  {example.prompt!r}\n    {' '.join(text.split())[:80]}")
        if expected:
            print(f"    {example.completion.strip()}   <- expected")


def run(given, folder):
    started = time.perf_counter()
    torch.manual_seed(0)
    # the fastest for a model this small, and above all on a machine that is busy
    torch.set_num_threads(1)
    tokenizer, task = load_tokenizer(), load_data(given.task)
    model = load_pretrained()
    examples = task.test[:3]
    # everything trained: full fine-tuning
    whole = memory_ledger(model, seq_len=LENGTH)
    model = get_peft_model(
        model,
        LoraConfig(r=given.r, lora_alpha=2 * given.r, target_modules="all-linear"),
    )
    make_room(model, folder)
    print(
        f"{given.task}: {task.description}. A LoRA of rank {given.r} on every linear"
        " layer; the model itself stays frozen."
    )
    model.print_trainable_parameters()

    def look():
        said = generate(model, tokenizer, [example.prompt for example in examples], 40)
        return said, evaluate(model, tokenizer, task, limit=given.limit)

    before, scored_before = look()
    print("\nBefore:")
    show_texts(examples, before)
    print()
    history = train(
        model,
        task,
        tokenizer=tokenizer,
        steps=given.steps,
        lr=given.lr,
        warmup=min(10, given.steps // 2),
    )
    after, scored_after = look()
    print("\nAfter:")
    show_texts(examples, after, expected=True)

    model.save_pretrained(folder)
    rows = gained(given, task, scored_before, scored_after)
    rows += cost(model, whole, folder)
    rows += [
        (
            "training",
            f"{history.seconds:.0f} s",
            f"{history.tokens_per_second:,.0f} tokens/s",
        ),
        ("everything", f"{time.perf_counter() - started:.0f} s", ""),
    ]
    lines = (f"{what:34}{one:>14}{other:>16}".rstrip() for what, one, other in rows)
    print("\n" + "\n".join(lines))
    return scored_before, scored_after


def gained(given, task, before, after):
    """What the training brought: lines of (what, before, after)."""
    rows = [(f"{given.steps} steps of 16 examples", "before", "after")]
    if task.score:
        scores = (f"{scored[task.metric]:.1f}" for scored in (before, after))
        rows.append((f"{task.metric} of {given.limit} test items", *scores))
    losses = (f"{scored['loss']:.2f}" for scored in (before, after))
    return [*rows, ("loss a token, nats", *losses), ("", "", "")]


def cost(model, whole, folder):
    """What it cost: lines of (what, LoRA, training all). whole: the ledger of full
    fine-tuning."""
    size = (folder / "adapter_model.safetensors").stat().st_size
    ledger = memory_ledger(model, seq_len=LENGTH)
    trained, everything = model.get_nb_trainable_parameters()
    return [
        ("what it cost", "LoRA", "training all"),
        ("trained parameters", f"{trained:,}", f"{everything - trained:,}"),
        *(
            (f"memory: {name}", human(ledger.predicted[name]), human(n))
            for name, n in whole.predicted.items()
        ),
        (
            f"memory: in all, 16 x {LENGTH} tokens",
            human(ledger.total()),
            human(whole.total()),
        ),
        ("the file to keep", human(size), human(whole.predicted["weights"])),
        ("", "", ""),
    ]


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if (text := sentence(error)) is None:
            raise
        sys.exit(f"demo: {text}")
