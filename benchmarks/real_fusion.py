"""AdapterFusion on a real language model: two experts, and who does best on both tasks.

    python benchmarks/real_fusion.py --experts FOLDER

The model is that of real_size.py, and found as there; without it nothing runs. Two
bottleneck adapters are trained apart: on E2E NLG, and on Shakespeare's plays. (They are
kept in FOLDER, and taken from there where it has them.) Then 192 short texts, half of
each kind, are the new task. On it: the experts alone and their mean, without training;
a fusion over both; a LoRA from the base. For the last two short trials choose the
learning rate by the loss on validation texts of both kinds. The record is written as
the runs come in, and the script goes on where it was stopped.
"""

import argparse
import json
import random
import time
from pathlib import Path

import real_size
import torch
from common import RESULTS, count_trained, facts, found, save, weights
from real_size import BATCH, MODEL, TRIAL, data, lora, loss_of, plays, trained

from minipeft import BottleneckConfig, FusionConfig, PeftModel, get_peft_model
from minipeft.lm import load_pretrained, load_tokenizer
from minipeft.lm.data import Example

OUT = RESULTS / "real_fusion.json"
STEPS = {"expert": 100, "fusion": 50, "LoRA r 8": 50}
EXPERT_RATE = 3e-3  # the best of two for E2E in real_size.json
RATES = {"fusion": (3e-4, 1e-3, 3e-3), "LoRA r 8": (3e-4, 1e-3, 3e-3)}
MIX, PIECE = 192, 200  # texts; characters of a piece of a play
TEST = 80  # records
PLAYS = 6000  # characters of the plays' validation text for the test; then 20 pieces


def pieces(split, count, start=0):
    """Pieces of the plays, as examples of their own."""
    (text,) = plays(split, start + count * PIECE, start)
    text = text.completion
    starts = range(0, len(text), PIECE)
    return [Example("", text[at : at + PIECE], {}) for at in starts]


def mixed():
    """The new task: texts of both kinds in one order, an E2E text first."""
    half = MIX // 2
    rest = [*data(TEST).train[1:half], *pieces("train", half)]
    random.Random(0).shuffle(rest)
    return [data(TEST).train[0], *rest]


class Bench:
    """The model with its two experts, and the losses of whatever is active."""

    def __init__(self, base, bf16):
        self.base = base
        self.bf16 = bf16
        self.tokenizer = load_tokenizer(base)
        self.judges = {
            "valid": (data(TEST).valid, pieces("valid", 20, PLAYS)),
            "test": (data(TEST).test, plays("valid", PLAYS)),
        }

    def train(self, model, examples, steps, lr, seed=0):
        return trained(model, self.tokenizer, examples, steps, lr, seed, self.bf16)

    def losses(self, model, split="test"):
        return {
            name: loss_of(model, self.tokenizer, examples, self.bf16)
            for name, examples in zip(("e2e", "plays"), self.judges[split])
        }

    def experts(self, folder):
        """The model with both adapters, from `folder` or trained and kept there."""
        model = None
        tasks = {"e2e": data(TEST).train, "plays": plays("train", 200_000)}
        for name, examples in tasks.items():
            kept = Path(folder) / name
            torch.manual_seed(0)
            if kept.is_dir():
                if model is None:
                    raw = load_pretrained(self.base)
                    model = PeftModel.from_pretrained(raw, kept, name)
                else:
                    model.load_adapter(kept, name)
                continue
            config = BottleneckConfig(reduction_factor=36)
            if model is None:
                model = get_peft_model(load_pretrained(self.base), config, name)
            else:
                model.add_adapter(name, config)
            model.set_adapter(name)
            self.train(model, examples, STEPS["expert"], EXPERT_RATE)
            model.save_pretrained(folder, selected_adapters=[name])
        return model

    def fresh(self, model, case):
        """What a run trains: a new fusion over the experts, or a LoRA on the base."""
        torch.manual_seed(0)
        if case == "LoRA r 8":
            return get_peft_model(load_pretrained(self.base), lora(8))
        if "fusion" in model.peft_config:
            model.set_adapter("e2e")
            model.delete_adapter("fusion")
        model.add_adapter("fusion", FusionConfig(adapters=["e2e", "plays"]))
        model.set_adapter("fusion")
        return model


def stored():
    if OUT.is_file():
        return json.loads(OUT.read_text(encoding="utf-8"))
    return {"trials": [], "runs": []}


def keep(where, run, about):
    record = stored()
    made = {key: record[key] for key in ("trials", "runs")}
    made[where].append(run)
    save(OUT, record | facts() | about | made)
    shown = {key: value for key, value in run.items() if key != "losses"}
    print(time.strftime("%H:%M"), where, shown, flush=True)


def untrained(bench, model, about):
    """The base, each expert, and the mean of both: a fusion whose query is zero."""
    done = {run["case"] for run in stored()["runs"]}
    cases = {"base": None, "expert e2e": "e2e", "expert plays": "plays", "mean": "mean"}
    for case, active in cases.items():
        if case in done:
            continue
        if case == "mean":
            fused = bench.fresh(model, "fusion")
            with torch.no_grad():
                for name, p in fused.named_parameters():
                    if ".fusion.query" in name:
                        p.zero_()
        elif active:
            model.set_adapter(active)
        if active:
            losses = bench.losses(model)
        else:
            with model.disable_adapter():
                losses = bench.losses(model)
        keep("runs", {"case": case, "steps": 0, "parameters": 0} | losses, about)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL, help="a name or a folder")
    parser.add_argument("--experts", required=True, metavar="FOLDER")
    parser.add_argument("--fp32", action="store_true", help="without bfloat16")
    given = parser.parse_args()
    if real_size.where_is(given.model) is None:
        return print(f"skipped: no model {given.model} here")
    about = {
        "model": MODEL,
        "weights": weights(given.model),
        "task": f"{MIX} texts, half of E2E NLG, half pieces of Shakespeare's plays",
        "batch_size": BATCH,
        "steps": STEPS,
        "expert": f"a bottleneck 16 wide, rate {EXPERT_RATE:g}",
        "schedule": "a tenth of the steps warm-up, cosine; AdamW; "
        + ("fp32" if given.fp32 else "bf16 autocast"),
    }
    bench = Bench(given.model, not given.fp32)
    model = bench.experts(given.experts)
    untrained(bench, model, about)
    for case, rates in RATES.items():
        tried = {}
        for lr in rates:
            job = {"case": case, "lr": lr, "steps": TRIAL, "seed": 0}
            if not found(stored()["trials"], **job):
                made = bench.fresh(model, case)
                bench.train(made, mixed(), TRIAL, lr)
                losses = bench.losses(made, "valid")
                keep("trials", job | losses | {"valid_loss": mean_of(losses)}, about)
            tried[lr] = found(stored()["trials"], **job)[0]["valid_loss"]
        best = min(tried, key=tried.get)
        job = {"case": case, "lr": best, "steps": STEPS[case], "seed": 0}
        if not found(stored()["runs"], **job):
            made = bench.fresh(model, case)
            size = {"parameters": count_trained(made)}
            size["losses"] = bench.train(made, mixed(), STEPS[case], best)
            keep("runs", job | size | bench.losses(made), about)


def mean_of(losses):
    return round(sum(losses.values()) / len(losses), 4)


if __name__ == "__main__":
    main()
