"""Eight bits and fewer: any codebook, one scale a block.

    x ~ absmax * code[q],    absmax = max |x| of the block,    q = the index of the code
      nearest to x / absmax

The codebook that optimizer states and the scales of NF4 are kept in is the dynamic map
(Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning", arXiv
1511.04561): seven decades, each with twice as many numbers as the one below, so that
small numbers keep a small relative error.
"""

import torch
import torch.nn.functional as F

from ..io import check_number

# bitsandbytes on a CPU looks codes up in a table of so many steps between -1 and 1
GRID = 65535


def dynamic_map(signed=True):
    """(256,) float32, sorted: -0.993 to 1, or 0 to 1. To the bit bitsandbytes'
    create_dynamic_map."""
    positive = []
    for i in range(7):
        # whatever the default
        edges = torch.linspace(0.1, 1, 2**i * (1 if signed else 2) + 1, device="cpu")
        positive += (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    negative = [-x for x in positive] if signed else []
    return torch.tensor(sorted([*negative, 0.0, *positive, 1.0]), device="cpu")


def linear_map(bits=8, signed=True):
    """Equal steps: (2^bits - 1,) from -1 to 1 with a zero in the middle, or (2^bits,)
    from 0 to 1."""
    if signed:
        return torch.linspace(-1, 1, 2**bits - 1)
    return torch.linspace(0, 1, 2**bits)


def check_code(code):
    """ValueError unless a codebook has up to 256 numbers, sorted."""
    fits = 1 <= len(code) <= 256
    if not fits or not (code[1:] >= code[:-1]).all():
        unsorted = " that are not sorted" * fits
        raise ValueError(
            f"code: found {len(code)} numbers{unsorted}; expected 1 to 256, sorted"
        )


def quantize_blockwise(x, code, block_size=256, grid=None):
    """x of any shape -> (q of that shape, uint8; absmax (blocks,) float32). `code`: up
    to 256 numbers, sorted.

    grid: first round x / absmax to so many steps, as bitsandbytes does on a CPU (GRID):
    to have its very bits. Raises ValueError for NaN or infinity, and for a codebook or
    a block size that cannot be."""
    check_number("block_size", block_size, whole=True, least=1)
    if x.is_meta:  # shapes alone; torch would take milliseconds for each layer
        blocks = -(-x.numel() // block_size)
        return torch.empty_like(x, dtype=torch.uint8), x.new_empty(blocks).float()
    check_code(code)
    q, absmax = nearest_codes(x, code, block_size, grid)
    if not absmax.isfinite().all():
        raise ValueError("NaN or infinity among the numbers: they cannot be quantised")
    return q, absmax


def nearest_codes(x, code, block_size, grid=None):
    """quantize_blockwise without its checks, for which a GPU would be waited for."""
    flat = x.detach().reshape(-1).float()
    # (blocks, block_size)
    rows = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = rows.abs().amax(1)
    y = rows * (1 / absmax)[:, None]  # between -1 and 1
    if grid:
        y = ((y + 1) * 0.5 * grid + 0.5).floor() / grid * 2 - 1
    code = code.to(y.device)
    # the nearest; ties: the lower
    q = torch.bucketize(y, (code[1:] + code[:-1]) / 2, out_int32=True).to(torch.uint8)
    q.masked_fill_((absmax == 0)[:, None], 0)
    return q.view(-1)[: len(flat)].clone().view(x.shape), absmax


def dequantize_blockwise(q, absmax, code, block_size=256):
    """float32, of q's shape."""
    check_number("block_size", block_size, whole=True, least=1)
    flat = q.reshape(-1)
    y = code.to(q.device).index_select(0, flat.int())
    rows = F.pad(y, (0, -len(y) % block_size)).view(-1, block_size) * absmax[:, None]
    return rows.view(-1)[: len(flat)].view(q.shape)
