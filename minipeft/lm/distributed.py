"""One training run in several processes: torch's own engine, told what is whose.

`torchrun --nproc-per-node 2 -m -- minipeft finetune ...` starts the same program twice.
Each process computes with its own rows; the first one (rank 0) prints and writes.

    DDP     each process holds the whole model. After the backward pass the gradients of
            what is trained are added up (all-reduce)
    FSDP2   each process holds a part of every weight, trained or frozen. A block's
            weights are gathered while it computes (all-gather), and each process
            receives its part of the gradients (reduce-scatter)

In a single process every function here does nothing.
"""

import contextlib
import inspect
import os

import torch
import torch.distributed as dist

# the one process that prints and writes
from ..io import is_first_process as is_first

store = None  # what the processes of torchrun share: a small key-value server


def processes():
    """How many processes train together; 1 without a process group."""
    on = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if on else 1


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if processes() > 1 else 0


# ---- processes -----------------------------------------------------------------------


@contextlib.contextmanager
def process_group():
    """Within the block the processes that torchrun started form a group, and only the
    first one prints. Without torchrun nothing happens."""
    global store
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    store, number, count = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    # after an error the others may still wait for this process: it just ends
    dist.destroy_process_group()


def may_report():
    """True in the first process that asks, and only there: it says what went wrong."""
    try:
        return store is None or store.add("errors", 1) == 1
    except RuntimeError:  # whoever kept the store has ended
        return False


def own_gpu():
    """ "cuda:1" in the second process of a machine, and so on. ValueError where there
    are more processes than GPUs."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"process {number + 1} of this machine has no GPU of its own: there are"
            f" {torch.cuda.device_count()}; expected --nproc-per-node at most that"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def total(number):
    """The sum of a number over all processes; the same float in each of them."""
    if processes() == 1:
        return number
    number = torch.tensor(float(number), dtype=torch.float64, device=group_device())
    dist.all_reduce(number)
    return number.item()


def group_device():
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def wait():
    """Go on when every process is here."""
    total(0)


def stacked(tensor):
    """A small CPU tensor of each process, as rows: (...) -> (processes, ...)."""
    if processes() == 1:
        return tensor
    mine = tensor.to(group_device())
    found = [torch.empty_like(mine) for _ in range(processes())]
    dist.all_gather(found, mine)
    return torch.stack(found).cpu()


def my_row(tensor):
    """The inverse of `stacked`."""
    return tensor if processes() == 1 else tensor[rank()].clone()


# ---- rows and gradients --------------------------------------------------------------


def my_rows(batch):
    """This process's rows of a global batch {name: (rows, ...)}: of W processes with B
    rows each, rank r takes rows r B to (r + 1) B."""
    rows = len(batch["input_ids"])
    if rows < processes():
        raise ValueError(
            f"a batch of {rows} rows for {processes()} processes: expected at least one"
            " row a process"
        )
    start = rows * rank() // processes()
    stop = rows * (rank() + 1) // processes()
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def parallel(model):
    """What the forward pass is called on: `model` itself in one process or where it is
    sharded; else the model in DDP."""
    if processes() == 1 or is_sharded(model):
        return model
    ddp = torch.nn.parallel.DistributedDataParallel
    # buffers are frozen (4-bit scales) and the same everywhere: they need not travel
    names = inspect.signature(ddp).parameters
    new = "forward_sync_buffers"  # since torch 2.13
    return ddp(model, **{new if new in names else "broadcast_buffers": False})


def sync(model, last):
    """A context: gradients are added up over processes in the backward pass of the last
    of several batches. (FSDP2 adds up each batch's: it has no room for whole ones.)"""
    if last or model_of(model) is model:
        return contextlib.nullcontext()
    return model.no_sync()


def model_of(model):
    """The model within DDP."""
    ddp = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    return model.module if ddp else model


# ---- sharded models ------------------------------------------------------------------


def shard(model):
    """FSDP2: shard every parameter of `model` over all processes, in place, a unit for
    each block and one for the rest. Call it before the optimizer is made.

    4-bit weights are sharded as bytes; their scales (a 1/30 of them) stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (processes(),))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in base.model.layers:
        fully_shard(block, mesh=mesh)
    # the rest too gives its weights back: what is saved is always the shards
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model):
    return any(is_part(p) for p in model.parameters())


def is_part(tensor):
    """True for a DTensor: a tensor of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def local(tensor):
    """What this process holds of a tensor."""
    return tensor.to_local() if is_part(tensor) else tensor


def like(tensor, other):
    """A whole tensor, cut as `other` is."""
    if not is_part(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor, other.device_mesh, other.placements, src_data_rank=None
    )
