"""Two processes: DDP and FSDP2 train as one process does, and save once.

All cases run in one pair of processes, on the CPU with gloo. Each process takes half of
every batch. The parent does the same alone with whole batches.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from tolerance import assert_within
from two_processes import join

from minipeft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from minipeft.lm.gpt import GPT, GPTConfig
from minipeft.quant import quantize_model

STEPS, ROWS, TOKENS = 3, 4, 6
CONFIGS = {
    "lora": lambda: LoraConfig(r=4),
    "dora": lambda: LoraConfig(r=4, use_dora=True),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3),
    "lora, 4 bits": lambda: LoraConfig(r=4),
    "ia3": lambda: IA3Config(),
    "norms": lambda: LNTuningConfig(),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3),
    "head": lambda: LoraConfig(r=4, modules_to_save=["lm_head"]),
}
CASES = [
    ("ddp", "lora"),
    ("ddp", "dora"),
    ("ddp", "prompt"),
    ("ddp", "lora, 4 bits"),
    ("fsdp", "lora"),
    ("fsdp", "dora"),
    ("fsdp", "prompt"),
    ("fsdp", "p-tuning"),
    ("ddp", "ia3"),
    ("ddp", "head"),
    ("fsdp", "ia3"),
    ("fsdp", "norms"),
    ("fsdp", "prefix"),
    ("fsdp", "head"),
]


def make_base(method):
    torch.manual_seed(0)
    base = GPT(
        GPTConfig(
            vocab_size=40,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
    )
    return quantize_model(base) if "4 bits" in method else base


def make(method):
    torch.manual_seed(1)
    return get_peft_model(make_base(method), CONFIGS[method]())


def train(model, rank=0, processes=1):
    """Some steps on this process's share of each batch."""
    data = torch.randint(40, (STEPS, ROWS, TOKENS), generator=torch.manual_seed(2))
    share = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for ids in data[:, share]:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def distribute(kind, model):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank, folder):
    """One of the two processes."""
    join(rank, folder, seconds=120)
    for kind, method in CASES:
        model = make(method)
        wrapped = distribute(kind, model)
        train(wrapped, rank, 2)
        # called by both: sharded tensors are gathered together
        model.save_pretrained(folder / kind / method / f"from {rank}")
        model.save_pretrained(
            folder / kind / method / "asked", is_main_process=rank == 1
        )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have saved."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("kind, method", CASES)
def test_two_processes_train_as_one(kind, method, folder, tmp_path):
    """Gradients are means over two halves: the same numbers, summed in another order.
    Sums have up to 64 terms, and there are nine a layer in each step."""
    model = make(method)
    model.save_pretrained(tmp_path / "start")
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    train(model)
    model.save_pretrained(tmp_path)
    alone = load_file(tmp_path / "adapter_model.safetensors")
    saved = load_file(folder / kind / method / "from 0" / "adapter_model.safetensors")
    assert saved.keys() == alone.keys()
    for name in alone:
        assert_within(saved[name], alone[name], terms=64, steps=9 * 2 * STEPS)
        assert (alone[name] - start[name]).abs().max() > 1e-3, "was not trained"
    again = PeftModel.from_pretrained(
        make_base(method), folder / kind / method / "from 0"
    )
    ids = torch.arange(TOKENS)[None]
    with torch.no_grad():
        logits = [one.eval()(input_ids=ids).logits for one in (again, model)]
    assert_within(*logits, terms=64, steps=9 * 2 * STEPS)


@pytest.mark.parametrize("kind, method", CASES)
def test_one_process_writes(kind, method, folder):
    """The first, or the one that is told to."""
    written = {path.name for path in (folder / kind / method).iterdir()}
    assert written == {"from 0", "asked"}
