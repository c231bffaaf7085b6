"""Two processes on this machine that compute together, by gloo."""

import datetime

import torch
import torch.distributed as dist


def join(rank, folder, seconds=240):
    """Called by each of the two: one thread each, and a meeting point in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=seconds),
    )
