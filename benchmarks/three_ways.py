"""One training of a real language model, done three times: by minipeft, by peft with
transformers' Trainer, and by peft in an accelerate loop.

    python benchmarks/three_ways.py        # writes benchmarks/results/three_ways.json

SmolLM2-135M-Instruct on E2E NLG, LoRA of rank 8 on all linear layers, in float32. The
three begin with the same adapter file and see the same rows in the same order. The
record holds every step's loss, how far the logits of each adapter differ between the
libraries that open it, and the processor time. real_size.py says how the model is found
or made; without it nothing runs.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from accelerate import Accelerator
from common import RESULTS, facts, save, weights
from real_size import BATCH, MODEL, data, lora, where_is
from tqdm.auto import tqdm

import minipeft
from minipeft import get_peft_model
from minipeft.lm import load_pretrained, load_tokenizer, train
from minipeft.lm.data import Batches

STEPS, RATE, ASKED = 20, 1e-3, 8  # ASKED: test records whose logits are compared
READERS = ("minipeft", "minipeft on transformers", "peft")


class InOrder(transformers.Trainer):
    """The rows as they come; every step's loss is kept."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=BATCH)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def their_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )


def by_minipeft(folder, rows, start, out):
    base = load_pretrained(folder)
    model = minipeft.PeftModel.from_pretrained(base, start, is_trainable=True)
    history = train(model, rows, steps=STEPS, lr=RATE, schedule="constant")
    model.save_pretrained(out)
    return history.losses


def by_trainer(folder, rows, start, out):
    batches = [rows.batch(step) for step in range(STEPS)]
    width = max(batch["input_ids"].shape[1] for batch in batches)
    padded = [{k: widened(k, v, width) for k, v in batch.items()} for batch in batches]
    model = peft.PeftModel.from_pretrained(their_base(folder), start, is_trainable=True)
    settings = transformers.TrainingArguments(
        output_dir=out.parent / "trainer_log",
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH,
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    one_by_one = [{k: v[i] for k, v in b.items()} for b in padded for i in range(BATCH)]
    trainer = InOrder(model=model, args=settings, train_dataset=one_by_one)
    trainer.train()
    model.save_pretrained(out)
    return trainer.losses


def widened(name, tensor, width):
    """A batch's tensor with columns of padding on the right: (B, T) -> (B, width)."""
    filler = -100 if name == "labels" else 0  # neither attended to nor learnt
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=filler)


def by_accelerate(folder, rows, start, out):
    accelerator = Accelerator(cpu=True)
    model = peft.PeftModel.from_pretrained(their_base(folder), start, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    losses = []
    for step in tqdm(range(STEPS), desc="accelerate", disable=None):
        loss = model(**rows.batch(step)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.unwrap_model(model).save_pretrained(out)
    return losses


WAYS = {
    "minipeft": by_minipeft,
    "peft + Trainer": by_trainer,
    "peft + accelerate": by_accelerate,
}


@torch.no_grad()
def logits(reader, folder, adapter, batch):
    """What an adapter makes of a batch, opened by one of READERS: (tokens, V)."""
    opener = peft if reader == "peft" else minipeft
    base = load_pretrained(folder) if reader == "minipeft" else their_base(folder)
    model = base
    if adapter is not None:
        model = opener.PeftModel.from_pretrained(base, adapter)
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.eval()(**asked).logits[batch["attention_mask"].bool()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL, help="a name or a folder")
    parser.add_argument("--out", type=Path, default=RESULTS / "three_ways.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = where_is(given.model)
    if folder is None:
        sys.exit(f"{given.model} is not here; real_size.py says how to make it")
    tokenizer, task = load_tokenizer(folder), data()
    rows = Batches(task.train, tokenizer, BATCH, seed=0)
    record = {"model": MODEL, "weights": weights(folder), "steps": STEPS}
    record |= {"rate": RATE, "batch": BATCH, "seed": 0, "losses": {}, "cpu_minutes": {}}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        torch.manual_seed(0)
        get_peft_model(load_pretrained(folder), lora(8)).save_pretrained(work / "start")
        for name, way in WAYS.items():
            used = time.process_time()
            record["losses"][name] = way(folder, rows, work / "start", work / name)
            minutes = (time.process_time() - used) / 60
            record["cpu_minutes"][name] = round(minutes, 2)
            print(f"{name}: {record['losses'][name][-1]:.6f}", flush=True)
        asked = Batches(task.test[:ASKED], tokenizer, ASKED, seed=0).batch(0)
        untrained = logits("peft", folder, None, asked)
        record["logits_off"] = {}
        for maker in WAYS:
            found = {
                reader: logits(reader, folder, work / maker, asked)
                for reader in READERS
            }
            record["logits_off"][maker] = {
                reader: (found[reader] - found["peft"]).abs().max().item()
                for reader in READERS
            }
            moved = (found["peft"] - untrained).abs().max().item()
            record["logits_off"][maker]["without the adapter"] = moved
            print(maker, record["logits_off"][maker], flush=True)
    save(given.out, record | facts())


if __name__ == "__main__":
    main()
