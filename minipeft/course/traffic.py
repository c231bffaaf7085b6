"""What two processes send each other in a training step, counted.

    torchrun --standalone --nproc-per-node 2 -m minipeft.course.traffic

For each engine and way of training the second step of the shipped model is watched: the
bytes of its collectives, and the bytes of weights that a process holds. The first
process prints one JSON object.
"""

import json
import subprocess
import sys

import torch
import torch.distributed as dist

from .. import LoraConfig, get_peft_model
from ..lm import distributed, load_pretrained
from ..quant import quantize_model

CASES = [
    ("DDP", "full"),
    ("DDP", "LoRA"),
    ("FSDP2", "full"),
    ("FSDP2", "LoRA"),
    ("FSDP2", "QLoRA"),
]
ROWS, TOKENS = 2, 32  # a process
# the collectives, by which of their tensors is the whole payload
if hasattr(dist, "all_gather_single"):  # since torch 2.13
    WATCHED = {"all_gather_single": 0, "reduce_scatter_single": 1}
else:
    WATCHED = {"all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}


def make(way):
    """The shipped model, as it is trained: "full", "LoRA" (r 8, all linear layers), or
    "QLoRA"."""
    torch.manual_seed(0)
    model = load_pretrained()
    if way == "QLoRA":
        model = quantize_model(model)
    if way == "full":
        return model.train()
    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    ).train()


def count_ddp(model, sent):
    """The model in DDP, whose buckets of gradients are counted as they leave."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hook(group, bucket):
        sent["all-reduce"] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    wrapped = distributed.parallel(model)
    wrapped.register_comm_hook(None, hook)
    return wrapped


def watch(name, sent):
    """torch.distributed's function `name`, counting payloads; returns the plain one."""
    plain = getattr(dist, name)
    kind = "-".join(name.split("_")[:2])

    def counted(*arguments, **options):
        given = [*arguments, *options.values()]
        tensors = [each for each in given if torch.is_tensor(each)]
        sent[kind] += tensors[WATCHED[name]].nbytes
        return plain(*arguments, **options)

    setattr(dist, name, counted)
    return plain


def one_case(engine, way):
    """{"all-reduce": bytes, "all-gather": ..., "reduce-scatter": ..., "held": bytes of
    weights in this process}"""
    sent = dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter"), 0)
    model = make(way)
    words = min(2000, model.get_input_embeddings().num_embeddings)
    model = count_ddp(model, sent) if engine == "DDP" else distributed.shard(model)
    plain = {name: watch(name, sent) for name in WATCHED}
    ids = torch.randint(3, words, (ROWS, TOKENS))
    for step in range(2):
        sent |= dict.fromkeys(sent, 0)
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
    for name, function in plain.items():
        setattr(dist, name, function)
    held = [*model.parameters(), *model.buffers()]
    return sent | {"held": sum(distributed.local(t).nbytes for t in held)}


def count_traffic(timeout=300):
    """{(engine, way): one_case's result}, from two processes that are started here."""
    ask = "-m torch.distributed.run --standalone --nproc-per-node 2 -m".split()
    done = subprocess.run(
        [sys.executable, *ask, __name__],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return {tuple(name.split(", ")): counts for name, counts in found.items()}


def main():
    with distributed.process_group():
        found = {", ".join(case): one_case(*case) for case in CASES}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
