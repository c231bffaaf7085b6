"""Four bits a weight: one of sixteen numbers, times the scale of its block.

    w ~ absmax * code[q],    absmax = max |w| of the block,    q = the index of the code
      nearest to w / absmax

NF4's sixteen numbers are quantiles of the normal distribution: where trained weights
are dense, so are they. Two codes go in a byte. Double quantisation keeps the scales
themselves in 8 bits: less their mean, in blocks of 256.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314,
section 3. Codes, bytes and dequantised values are those of bitsandbytes, to the bit.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import NormalDist

import torch
import torch.nn.functional as F

from ..io import check_choice, check_number
from .blockwise import GRID, dequantize_blockwise, dynamic_map, quantize_blockwise


def normal_float(bits=4):
    """(2^bits,) float32, sorted: the quantiles that NF4 is made of, for any number of
    bits; a zero is among them.

    2^(bits-1) positive numbers and one fewer negative ones, each half equally spaced in
    probability up to the same outermost quantile, then all divided by the largest."""
    half = 2 ** (bits - 1)
    # the mean of half a bin with 2^bits, and one less
    outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    quantile = NormalDist().inv_cdf

    def side(count):
        return [
            quantile(outermost + (0.5 - outermost) * i / count) for i in range(count)
        ]

    numbers = sorted([*side(half), 0.0, *(-q for q in side(half - 1))])
    return torch.tensor([number / numbers[-1] for number in numbers])


# normal_float(4) as bitsandbytes has it: the outermost probability was rounded to
# 0.9677083, so the last digits differ.
NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
# A sign, two bits of exponent, one of mantissa, in the order of their bits: half of it
# negative, two zeros.
FP4_CODE = (
    torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3])
    / 12
)
# equal steps from -7/7 to 7/7; -8/7 is never the nearest
INT4_CODE = torch.arange(-8, 8) / 7
CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE, "int4": INT4_CODE}


@dataclass
class QTensor:
    """A tensor in 4 bits."""

    # (ceil(n / 2), 1) uint8: two codes a byte, the first in the high half
    packed: torch.Tensor
    absmax: torch.Tensor  # (blocks,) float32; uint8 where the scales are quantised too
    shape: torch.Size
    dtype: torch.dtype  # what it was before, and is again by default
    quant_type: str = "nf4"
    block_size: int = 64
    # (ceil(blocks / 256),) float32: the scales of the scales
    absmax2: torch.Tensor | None = None
    offset: torch.Tensor | None = None  # () float32: their mean

    def scales(self):
        """(blocks,) float32"""
        if self.absmax2 is None:
            return self.absmax
        code = _dynamic_map(self.absmax.device)
        return dequantize_blockwise(self.absmax, self.absmax2, code) + self.offset

    def tensors(self):
        tensors = (self.packed, self.absmax, self.absmax2, self.offset)
        return [t for t in tensors if t is not None]

    @property
    def nbytes(self):
        return sum(t.nbytes for t in self.tensors())

    @property
    def bits(self):
        """Bits a weight, scales included."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def to(self, device):
        moved = {k: t.to(device) for k, t in vars(self).items() if torch.is_tensor(t)}
        return replace(self, **moved)


def quantize_blocks(rows, code, short=False):
    """rows (blocks, block_size) float32, code (16,) sorted -> (q of rows' shape uint8,
    absmax (blocks,)). short: the last block was padded; bitsandbytes divides there, and
    multiplies elsewhere, which may round differently."""
    absmax = rows.abs().amax(1)
    y = rows * (1 / absmax.clamp(min=1e-38))[:, None]  # from -1 to 1
    if short:
        absmax[-1].clamp_(min=1e-38)
        y[-1] = rows[-1] / absmax[-1]
    bounds = (code[1:] + code[:-1]) / 2  # halfway between neighbours
    return sum((y > bound).byte() for bound in bounds.tolist()), absmax


# Drivers: in chunks, two codes a byte


def _chunk(tensor):
    """How many numbers at a time: what fits the CPU's cache, or a small part of a GPU's
    memory."""
    return 1 << 17 if tensor.device.type == "cpu" else 1 << 24


@cache
def _dynamic_map(device):
    return dynamic_map().to(device)


@cache
def _pairs(quant_type, device):
    """(256,): the two numbers of every byte, as one complex number: one look-up for
    both."""
    code, byte = CODES[quant_type], torch.arange(256, device="cpu")
    return torch.complex(code[byte >> 4], code[byte & 15]).to(device)


def to_rows(flat, block_size):
    """(n,) -> (blocks, block_size), the last block padded with zeros."""
    short = -len(flat) % block_size
    return (F.pad(flat, (0, short)) if short else flat).view(-1, block_size)


def _check_quantizable(w, block_size, quant_type):
    check_choice("quant_type", quant_type, CODES)
    check_number("block_size", block_size, whole=True, least=32, most=4096)
    if not w.is_floating_point():
        raise ValueError(f"expected floating-point weights, found {w.dtype}")


def quantize_4bit(w, block_size=64, double_quant=True, quant_type="nf4"):
    """w, of any shape, 16 or 32 bits -> QTensor. Blocks run through the flattened
    tensor; the last may be shorter.

    Raises ValueError for NaN or infinity, and for a block size outside 32 to 4096."""
    _check_quantizable(w, block_size, quant_type)
    flat = w.detach().reshape(-1)
    n = flat.numel()
    code, order = CODES[quant_type].sort()  # fp4's codes are not sorted
    zero = int((code < 0).sum())  # the code of 0, which fills up the last byte
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), device=w.device)
    # whole blocks, and whole bytes
    step = 2 * max(1, _chunk(w) // 2 // block_size) * block_size
    for start in range(0, 0 if w.is_meta else n, step):
        x = flat[start : start + step].float()
        rows = to_rows(x, block_size)
        q, scale = quantize_blocks(rows, code, short=rows.numel() > len(x))
        q = F.pad(q.view(-1)[: len(x)], (0, len(x) % 2), value=zero)
        if quant_type == "fp4":
            q = order.to(q)[q.int()]
        packed[start // 2 : (start + step) // 2] = (q[::2] << 4) | q[1::2]
        absmax[start // block_size : (start + step) // block_size] = scale
    if not w.is_meta and not absmax.isfinite().all():
        raise ValueError("NaN or infinity among the weights: they cannot be quantised")
    q = QTensor(packed[:, None], absmax, w.shape, w.dtype, quant_type, block_size)
    return quantize_scales(q) if double_quant else q


def quantize_scales(q):
    """Double quantisation: the scales, less their mean, in 8 bits."""
    offset = q.absmax.mean() if q.absmax.numel() else q.absmax.sum()
    code = _dynamic_map(q.absmax.device)
    codes, absmax2 = quantize_blockwise(q.absmax - offset, code, grid=GRID)
    return replace(q, absmax=codes, absmax2=absmax2, offset=offset)


def dequantize_4bit(q, dtype=None):
    """QTensor -> the dense tensor it stands for, in q.dtype unless another is given."""
    n = math.prod(q.shape)
    size = q.block_size
    out = torch.empty(n, dtype=dtype or q.dtype, device=q.packed.device)
    if q.packed.is_meta:
        return out.view(q.shape)
    packed = q.packed.view(-1)
    scales = q.scales()
    pairs = _pairs(q.quant_type, packed.device)
    step = max(1, _chunk(packed) // 2 // size) * size  # bytes: a whole number of blocks
    for start in range(0, len(packed), step):
        byte = packed[start : start + step].int()
        values = torch.view_as_real(pairs.index_select(0, byte)).view(-1)
        values = values[: n - 2 * start]
        rows = to_rows(values, size)
        rows = rows * scales[2 * start // size :][: len(rows), None]
        out[2 * start : 2 * (start + step)] = rows.view(-1)[: len(values)]
    return out.view(q.shape)


quantize_nf4 = partial(quantize_4bit, quant_type="nf4")
quantize_fp4 = partial(quantize_4bit, quant_type="fp4")
quantize_int4 = partial(quantize_4bit, quant_type="int4")
dequantize_nf4 = dequantize_fp4 = dequantize_int4 = dequantize_4bit
