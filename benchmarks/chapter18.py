"""The recorded numbers of chapter 18: what a training step costs beside a forward pass,
on the shipped model and, where its folder is given, on SmolLM2-135M.

    python benchmarks/chapter18.py --smollm2 FOLDER
      # writes benchmarks/results/chapter18.json

One thread, seconds of the process (other work on the machine counts little); the
fastest of two in each of several repeats, the ways in turn. It is saved after each
repeat; what is in the file already is not repeated.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from common import RESULTS, facts, save

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import load_pretrained

WAYS = ("forward only", "full", "full, checkpointing", "LoRA", "LoRA, checkpointing")
SIZES = {"lanternwick": (16, 64), "SmolLM2-135M": (4, 48)}


def make(folder, way):
    torch.manual_seed(0)
    model = load_pretrained(folder)
    if way.startswith("LoRA"):
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, config)
    if "checkpointing" in way:
        model.gradient_checkpointing_enable()
    return model.train()


def one_step(model, ids, way):
    start = time.process_time()
    if way == "forward only":
        with torch.no_grad():
            model(input_ids=ids, labels=ids)
    else:
        model(input_ids=ids, labels=ids).loss.backward()
    took = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return took


def measure(folder, size, repeats):
    """Yields (repeats, {way: seconds of the fastest step}) after each repeat."""
    best = dict.fromkeys(WAYS, float("inf"))
    for repeat in range(repeats):
        for way in WAYS:
            model = make(folder, way)
            vocabulary = model.get_input_embeddings().weight.shape[0]
            ids = torch.randint(3, vocabulary, size, generator=torch.manual_seed(1))
            for _ in range(2):
                best[way] = min(best[way], one_step(model, ids, way))
        rounded = {way: round(seconds, 4) for way, seconds in best.items()}
        print(f"repeat {repeat}: {rounded}", flush=True)
        yield repeat + 1, rounded


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", metavar="FOLDER", help="without it: not measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter18.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(given.out.read_text()) if given.out.exists() else {"runs": []}
    folders = {"lanternwick": "lanternwick", "SmolLM2-135M": given.smollm2}
    known = facts() | {"command": "python benchmarks/chapter18.py --smollm2 FOLDER"}
    for name, folder in folders.items():
        if folder is None or any(run["model"] == name for run in record["runs"]):
            continue
        rows, tokens = SIZES[name]
        done = record["runs"]
        for repeats, seconds in measure(folder, SIZES[name], given.repeats):
            run = {"model": name, "rows": rows, "tokens": tokens}
            run |= {"repeats": repeats, "seconds": seconds}
            record = known | {"runs": [*done, run]}
            save(given.out, record)


if __name__ == "__main__":
    main()
