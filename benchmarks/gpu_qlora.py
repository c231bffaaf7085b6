"""QLoRA at full size on one GPU: peak memory and speed, ours beside transformers + peft
+ bitsandbytes.

    python benchmarks/gpu_qlora.py                                  # Llama-3-8B's shape
      and Llama-3-70B's, all three sides
    python benchmarks/gpu_qlora.py --shapes tiny --steps 3          # seconds, on a CPU
      too: does it run?

No download: weights are random numbers, drawn and put into 4 bits one matrix at a time,
so that the model in 16 bits never exists. LoRA of rank 16 on all linear layers,
gradient checkpointing, AdamW, one row of 512 tokens, 20 steps. Each side runs in a
process of its own, with the same sizes; the first steps are not timed. Writes
benchmarks/results/gpu_qlora.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from common import RESULTS, facts, save
from torch import nn

import minipeft
from minipeft.lm import GPT, SHAPES, GPTConfig, memory_ledger
from minipeft.quant.linear4bit import BACKENDS, quantizable_layers

SIDES = {
    "minipeft": "torch",
    "minipeft + bitsandbytes": "bitsandbytes",
    "transformers + peft + bitsandbytes": "bitsandbytes",
}
TINY = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
WARM = 3  # steps before the clock starts


def empty_model(shape, side):
    """The model on the meta device: sizes without memory, 16 bits."""
    fields = TINY if shape == "tiny" else SHAPES[shape]
    with torch.device("meta"):
        if side != "transformers + peft + bitsandbytes":
            return GPT(GPTConfig(**fields)).bfloat16()
        import transformers

        fields = {
            key: value
            for key, value in fields.items()
            if value is not None and key not in ("norm_eps", "model_type")
        }
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**fields)
        ).bfloat16()


@torch.no_grad()
def fill(model, backend, device):
    """Random numbers for every parameter, linear layers straight into 4 bits: never
    more than one of them dense."""

    def draw(p):
        return nn.Parameter(
            (0.02 * torch.randn(p.shape, device=device)).to(p.dtype),
            requires_grad=False,
        )

    for layer, put in list(quantizable_layers(model).values()):
        for name, p in list(layer._parameters.items()):
            layer._parameters[name] = None if p is None else draw(p)
        put(BACKENDS[backend](layer, compute_dtype=torch.bfloat16))
        layer._parameters.clear()
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.is_meta:
                module._parameters[name] = (
                    nn.Parameter(torch.ones(p.shape, dtype=p.dtype, device=device))
                    if p.dim() == 1
                    else draw(p)
                )
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    if rotary is not None:  # transformers keeps a table that nobody has filled
        model.model.rotary_emb = type(rotary)(model.config).to(device)
    return model


def adapted(shape, side, device):
    """The 4-bit base with its LoRA, ready to train: ours or peft's."""
    model = fill(empty_model(shape, side), SIDES[side], device)
    library = minipeft
    if side.startswith("transformers"):
        import peft as library
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers renames things
        model = library.prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        names = [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
        return library.get_peft_model(
            model, library.LoraConfig(r=16, lora_alpha=16, target_modules=names)
        ).train()


def one_run(shape, side, steps, tokens, rows, device):
    torch.manual_seed(0)
    started = time.perf_counter()
    model = adapted(shape, side, device)
    built = time.perf_counter() - started
    on_gpu = device == "cuda"
    if on_gpu:  # from here on the peak is that of training
        built_peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    times, losses = [], []
    for _ in range(steps):
        ids = torch.randint(vocabulary, (rows, tokens), device=device)
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU
        times.append(time.perf_counter() - start)
    timed = times[WARM:] or times
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    run = {
        "shape": shape,
        "side": side,
        "steps": steps,
        "tokens": tokens,
        "rows": rows,
        "built_seconds": round(built, 1),
        "peak_gb": round(peak / 1e9, 3),
        "tokens_per_second": round(rows * tokens * len(timed) / sum(timed), 1),
        "losses": [round(loss, 3) for loss in losses],
        "trained": sum(p.numel() for p in trained),
    }
    if on_gpu:
        run["built_peak_gb"] = round(built_peak / 1e9, 3)
        run["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)
    if not side.startswith("transformers"):
        run["ledger_gb"] = round(memory_ledger(model, rows, tokens).total() / 1e9, 3)
        # two tensors like the logits, see chapter 10
        run["passing_gb"] = round(2 * rows * (tokens - 1) * vocabulary * 4 / 1e9, 3)
    return run


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["llama-3-8b", "llama-3-70b"],
        choices=["tiny", *SHAPES],
    )
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_qlora.json")
    # in a process of its own
    parser.add_argument(
        "--one", nargs=2, metavar=("SHAPE", "SIDE"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    sizes = (given.steps, given.tokens, given.rows, given.device)
    if given.one:
        print(json.dumps(one_run(*given.one, *sizes)))
        return
    if given.device == "cpu" and set(given.shapes) != {"tiny"}:
        parser.error("there is no GPU here: only --shapes tiny makes sense")
    gpu = torch.cuda.get_device_name() if given.device == "cuda" else None
    runs = []
    for shape in given.shapes:
        for side in given.sides:
            ask = [
                sys.executable,
                __file__,
                "--one",
                shape,
                side,
                "--steps",
                str(given.steps),
                "--tokens",
                str(given.tokens),
                "--rows",
                str(given.rows),
                "--device",
                given.device,
            ]
            done = subprocess.run(ask, capture_output=True, text=True)
            if done.returncode:
                print(f"{shape}, {side}: {done.stderr.strip().splitlines()[-1]}")
                continue
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            run = runs[-1]
            print(
                f"{shape:12} {side:36} peak {run['peak_gb']:7.2f} GB  "
                f" {run['tokens_per_second']:8.1f} tokens/s"
            )
            save(given.out, facts() | {"gpu": gpu, "runs": runs})


if __name__ == "__main__":
    main()
