"""The rows of `make bench` on a real language model, SmolLM2-135M-Instruct, against
Hugging Face's peft and transformers.

    python benchmarks/bench_real.py    # these rows alone, printed; about five minutes

They are skipped, and the table says so, where the model is absent: see
benchmarks/real_size.py, which also makes it without a hub.
"""

import copy
import time
from contextlib import nullcontext
from pathlib import Path

import bench
import torch
from common import processor
from real_size import MODEL, NF4, where_is

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import load_pretrained

BATCH, LENGTH, NEW_TOKENS = 8, 48, 40
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
# of a step against peft's; of a step against one that only passes gradients through
GOALS = {"fp32": 0.85, "bf16": 0.72}
LIMIT = 1.15


def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def has_bf16():
    """True where the processor multiplies bfloat16 itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(precision):
    bf16 = precision == "bf16"
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def stepper(model, ids, precision):
    """A function that does one training step: forward, backward, AdamW."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step():
        with autocast(precision):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def passer(model, ids, precision):
    """A function that sends gradients through the frozen base and trains nothing: what
    every adapter in every layer has to pay."""
    model.train().requires_grad_(False)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()

    def step():
        with autocast(precision):
            loss = model(inputs_embeds=embeds, labels=ids).loss
        loss.backward()
        embeds.grad = None

    return step


def steps(folder, rounds, batch, length):
    import peft

    torch.manual_seed(0)
    base = load_pretrained(folder)
    ids = torch.randint(5, base.config.vocab_size, (batch, length))
    for precision, goal in GOALS.items():
        if precision == "bf16" and not has_bf16():
            continue
        settings = peft.LoraConfig(**LORA, task_type="CAUSAL_LM")
        contestants = {
            "peft": stepper(
                peft.get_peft_model(theirs(folder), settings), ids, precision
            ),
            "minipeft": stepper(
                get_peft_model(copy.deepcopy(base), LoraConfig(**LORA)), ids, precision
            ),
            "limit": passer(copy.deepcopy(base), ids, precision),
        }
        raced = bench.race(contestants, rounds)
        what = f"LoRA r 8 step, {precision}"
        yield what + " / peft's", raced["minipeft"], "s", raced["peft"], goal
        against = " / gradients only passed through the frozen base"
        yield what + against, raced["minipeft"], "s", raced["limit"], LIMIT


def generation(folder, rounds, new_tokens):
    ours, other = load_pretrained(folder), theirs(folder).eval()
    torch.manual_seed(0)
    ids = torch.randint(5, ours.config.vocab_size, (1, 24))
    exact = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    contestants = {
        "transformers": lambda: other.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, **exact
        ),
        # an end token that is never drawn
        "minipeft": lambda: ours.generate(
            ids, max_new_tokens=new_tokens, eos_token_id=-1
        ),
    }
    texts = [contestant() for contestant in contestants.values()]
    assert texts[0].shape == texts[1].shape
    raced = bench.race(contestants, rounds)
    what = f"generating {new_tokens} tokens / transformers'"
    yield what, raced["minipeft"], "s", raced["transformers"], 0.6


def loading(folder, rounds):
    def once(load):
        """Load, and read every weight."""
        started = time.process_time()
        sum(p.sum() for p in load(folder).parameters())
        return time.process_time() - started

    turns = [(once(load_pretrained), once(theirs)) for _ in range(rounds + 1)][1:]
    ours, others = zip(*turns)
    yield "loading and reading the model / transformers'", ours, "s", others, 1.2


def bytes_of(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def peak_of_loading(folder, quantized):
    """In a fresh process: MB at its peak after loading."""
    torch.set_num_threads(1)
    model = load_pretrained(folder, quantization=NF4 if quantized else None)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return peak if model else None


def memory(folder):
    held = {
        kind: bytes_of(load_pretrained(folder, quantization=quantization))
        for kind, quantization in (("nf4", NF4), ("fp32", None))
    }
    what = "NF4 base, parameters and buffers / fp32's"
    yield what, held["nf4"], "MB", held["fp32"], 0.35
    if Path("/proc/self/status").is_file():
        peaks = [
            bench.child("peak_of_loading", str(folder), nf4) for nf4 in (True, False)
        ]
        yield (
            "NF4 base, peak of the loading process / fp32's",
            peaks[0],
            "MB",
            peaks[1],
            None,
        )


def rows(rounds, folder=None, batch=BATCH, length=LENGTH, new_tokens=NEW_TOKENS):
    """Rows for the table; one that says so where the model is absent."""
    folder = folder or where_is(MODEL)
    name = "SmolLM2-135M"
    if folder is None:
        yield bench.row(f"{name}: skipped, {MODEL} is not here", [], "")
        return
    parts = (
        steps(folder, rounds, batch, length),
        generation(folder, rounds, new_tokens),
        loading(folder, rounds),
        memory(folder),
    )
    for part in parts:
        for what, value, unit, against, goal in part:
            line = f"{name}, {processor()}: {what}"
            value, against = (
                list(x) if isinstance(x, tuple) else x for x in (value, against)
            )
            yield bench.row(line, value, unit, against, goal)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in rows(5):
        print(line["what"], bench.show(line["value"]), bench.show(line["against"]))
        print(
            "   ", line["ratio"], "goal", line["goal"], "met", line["met"], flush=True
        )
