"""The longer runs of chapter 01: how the ability to copy appears.

    python benchmarks/chapter01.py        # writes benchmarks/results/chapter01.json

The copy warm-up of a model of two blocks, with and without the hand-written drafts of
its circuits, several seeds. The file is written as the runs come in; those that are in
it already are not run again.
"""

import argparse
import json
from pathlib import Path

import torch
from common import RESULTS, facts, save, vocabulary

from minipeft.lm import GPT, GPTConfig, load_tokenizer
from minipeft.lm.pretrain import (
    SHAPE,
    copy_warmup,
    induction_head,
    name_head,
    name_tokens,
)

SMALL = SHAPE | dict(
    hidden_size=64, intermediate_size=192, num_hidden_layers=2, head_dim=32
)
SEEDS, MOST = (0, 1, 2), 200


def warmup(draft: bool, seed: int, most: int) -> dict:
    """The accuracies of every step."""
    tokenizer = load_tokenizer()
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            vocab_size=len(tokenizer),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **SMALL,
        )
    )
    names = name_tokens(tokenizer)
    if draft:
        induction_head(model)
        name_head(model, names)
    accuracies = copy_warmup(model, names, seed, most=most)
    return {"draft": draft, "seed": seed} | {
        skill: [round(a, 3) for a in values] for skill, values in accuracies.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--most",
        type=int,
        default=MOST,
        help="steps of a warm-up that does not succeed",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "chapter01.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = facts() | {
        "steps": given.most,  # at most: a warm-up that succeeds ends earlier
        "seeds": list(SEEDS),
        "tokenizer": vocabulary(),
        "warmup": [],
    }
    before = (
        json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    )
    # what is in the file is not run again
    if before.get("tokenizer") == record["tokenizer"]:
        record["warmup"] = before["warmup"]
    for draft, seed in [(draft, seed) for draft in (True, False) for seed in SEEDS]:
        if not any(
            (run["draft"], run["seed"]) == (draft, seed) for run in record["warmup"]
        ):
            record["warmup"].append(warmup(draft, seed, given.most))
            save(given.out, record)


if __name__ == "__main__":
    main()
