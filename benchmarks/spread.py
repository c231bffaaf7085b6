"""Is the base worth adapting? Full fine-tuning, LoRA, BitFit, prefix and prompt tuning on the tasks, each at its best of three rates.

    python benchmarks/spread.py [--tasks sql voice ...] [--jobs 2]         adds to benchmarks/results/spread.json

200 steps of batch 16; the rate is chosen by the loss on the validation split; one seed, scores on 128 test items (so plus or minus
8 points). BitFit, prefix and prompt tuning are written out here in a few lines: they get chapters of their own later.
"""
import argparse
import json
from concurrent.futures import ProcessPoolExecutor

import torch
from common import RESULTS, facts, save
from torch import nn
from tqdm import tqdm

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import GPT, evaluate, load_data, load_pretrained, load_tokenizer, train

STEPS, ITEMS, TOKENS = 200, 128, 10
METHODS = {
    "full": (1e-3, 3e-3, 6e-3),
    "random init": (1e-3, 3e-3, 6e-3),
    "lora r8 all": (3e-3, 1e-2, 2e-2),
    "lora r8 q,v": (6e-3, 2e-2, 4e-2),
    "lora r1 q,v": (6e-3, 2e-2, 6e-2),
    "bitfit": (1e-2, 3e-2, 1e-1),
    "prefix": (2e-2, 6e-2, 2e-1),
    "prompt": (3e-2, 1e-1, 3e-1),
}


class Virtual(nn.Module):
    """Prefix or prompt tuning around a frozen base: `TOKENS` learnt keys and values in every layer, or learnt embeddings in front."""

    def __init__(self, base, deep):
        super().__init__()
        self.base, self.config, self.deep = base.requires_grad_(False), base.config, deep
        embedding = base.get_input_embeddings().weight
        some = torch.randint(len(embedding), (1, TOKENS))
        with torch.no_grad():                                   # real tokens are a far better start than noise
            start = base(some, use_cache=True).past_key_values if deep else ((embedding[some],),)
        self.learnt = nn.ParameterList(t.detach().clone() for pair in start for t in pair)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None, **options):
        B, first = len(input_ids), past_key_values is None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([mask.new_ones(B, TOKENS), mask], 1)
        rows = [p.expand(B, *p.shape[1:]) for p in self.learnt]
        if position_ids is not None:
            position_ids = position_ids + TOKENS
        if self.deep:
            past = list(zip(rows[::2], rows[1::2])) if first else past_key_values
            return self.base(input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=past, labels=labels, **options)
        if not first:
            return self.base(input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=past_key_values, **options)
        x = torch.cat([rows[0], self.base.get_input_embeddings()(input_ids)], 1)
        if labels is not None:
            labels = torch.cat([labels.new_full((B, TOKENS), -100), labels], 1)
        if position_ids is not None:
            position_ids = torch.cat([torch.arange(TOKENS).expand(B, TOKENS), position_ids], 1)
        return self.base(inputs_embeds=x, attention_mask=mask, position_ids=position_ids, labels=labels, **options)


def adapted(method, base):
    """The model to train, and whether it starts from the base's weights."""
    if method == "full":
        return base
    if method == "random init":
        return GPT(base.config)
    if method == "bitfit":
        for name, p in base.named_parameters():
            p.requires_grad_(name.endswith("bias"))
        return base
    if method in ("prefix", "prompt"):
        return Virtual(base, method == "prefix")
    _, rank, where = method.split()
    targets = "all-linear" if where == "all" else ["q_proj", "v_proj"]
    return get_peft_model(base, LoraConfig(r=int(rank[1:]), lora_alpha=2 * int(rank[1:]), target_modules=targets))


def run(job):
    base_name, task_name, method, lr = job
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer, task = load_tokenizer(base_name), load_data(task_name)
    model = adapted(method, load_pretrained(base_name))
    history = train(model, task, tokenizer=tokenizer, steps=STEPS, lr=lr, warmup=20, schedule="cosine", progress=False)
    valid = evaluate(model, tokenizer, task, split="valid", limit=ITEMS, generate=False, progress=False)["loss"]
    score = evaluate(model, tokenizer, task, limit=ITEMS, progress=False)[task.metric]
    return {"task": task_name, "method": method, "lr": lr, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "valid_loss": round(valid, 4), "score": round(score, 1), "seconds": round(history.seconds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="lanternwick")
    parser.add_argument("--tasks", nargs="+", default=["sql", "voice", "records", "mood"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="spread")
    given = parser.parse_args()
    file = RESULTS / f"{given.out}.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    done = {(r["task"], r["method"], r["lr"]) for r in runs}
    jobs = [(given.base, t, m, lr) for t in given.tasks for m in given.methods for lr in METHODS[m] if (t, m, lr) not in done]
    with ProcessPoolExecutor(given.jobs) as pool:
        for result in tqdm(pool.map(run, jobs), total=len(jobs)):
            runs.append(result)
            save(file, {**facts(), "steps": STEPS, "batch": 16, "items": ITEMS, "seed": 0, "runs": runs})
    print(table(runs))


def table(runs):
    """Markdown: a row a method, the score at its best rate."""
    tasks = sorted({r["task"] for r in runs}, key=[r["task"] for r in runs].index)
    lines = ["| method | trained | " + " | ".join(tasks) + " |", "|---|---|" + "---|" * len(tasks)]
    for method in METHODS:
        best = {t: min((r for r in runs if r["task"] == t and r["method"] == method), key=lambda r: r["valid_loss"], default=None) for t in tasks}
        one = next((r for r in best.values() if r), None)
        if one:
            cells = [f"{r['score']:.0f} ({r['lr']:g})" if r else "" for r in best.values()]
            lines.append(f"| {method} | {one['trained']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
