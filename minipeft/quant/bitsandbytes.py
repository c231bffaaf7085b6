"""bitsandbytes: its files, read and written without it, and its layers.

Its state_dict holds a packed weight and beside it absmax, the codebooks (quant_map),
the same for the quantised scales (nested_*), and quant_state: JSON as bytes.
"""

import json
import logging
import math
import warnings

import torch

from .. import weights
from ..errors import FileError
from ..io import check_choice, check_number, parse_json
from .blockwise import dynamic_map
from .nf4 import CODES, QTensor, quantize_4bit


def import_bitsandbytes():
    """The module, without the advice and warnings that its import prints about kernels
    not used here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    return bitsandbytes


def as_dtype(name):
    dtype = getattr(torch, name)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype {name!r}")
    return dtype


def as_float(what, given):
    """A dtype to compute in, given itself or by its name, or None. ValueError, which
    calls it `what`, for any other."""
    dtype = getattr(torch, str(given).removeprefix("torch."), None)
    if dtype not in FLOATS:
        check_choice(what, given, (None, *FLOATS))
    return dtype


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_bytes(quant_state):
    """A dict as JSON, in a tensor of bytes."""
    return torch.tensor(list(json.dumps(quant_state).encode()), dtype=torch.uint8)


def to_bitsandbytes(q):
    """{name: tensor}: the scales, the codebooks, and quant_state (JSON, as bytes)."""
    quant_state = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {"absmax": q.absmax, "quant_map": CODES[q.quant_type].clone()}
    if q.absmax2 is not None:
        quant_state["nested_blocksize"] = 256
        quant_state["nested_dtype"] = "float32"
        quant_state["nested_offset"] = 0.0 if q.offset.is_meta else q.offset.item()
        tensors["nested_absmax"] = q.absmax2
        tensors["nested_quant_map"] = dynamic_map()
    tensors[f"quant_state.bitsandbytes__{q.quant_type}"] = as_bytes(quant_state)
    return {name: tensor.to(q.absmax.device) for name, tensor in tensors.items()}


def from_bitsandbytes(packed, beside, shape=None):
    """The QTensor of a packed weight and {name: tensor} beside it in a file. shape:
    what it has to be. FileError where something is missing or does not fit."""
    state = [t for name, t in beside.items() if name.startswith("quant_state.")]
    if not state or "absmax" not in beside:
        raise FileError(
            "a 4-bit weight without its quant_state and absmax: the file is not whole"
        )
    quant_state = parse_json(bytes(state[0].tolist()), "quant_state")
    try:
        q = _read_quant_state(packed, beside, quant_state)
        blocks = -(-math.prod(q.shape) // q.block_size)
    except (KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as p:
        raise FileError(f"quant_state is damaged: {p!r}") from None
    if shape is not None and tuple(q.shape) != tuple(shape):
        raise FileError(f"found {tuple(q.shape)} in 4 bits, expected {tuple(shape)}")
    expected = {"weight": (math.prod(q.shape) + 1) // 2, "absmax": blocks}
    found = {"weight": q.packed.numel(), "absmax": q.absmax.numel()}
    if q.absmax2 is not None:
        expected["nested_absmax"] = -(-blocks // 256)
        found["nested_absmax"] = q.absmax2.numel()
    if found != expected:
        raise FileError(
            f"sizes {found} do not fit {tuple(q.shape)}: expected {expected}"
        )
    scales = [t for t in (q.absmax, q.absmax2, q.offset) if t is not None]
    if not all(t.isfinite().all() for t in scales):
        raise FileError("NaN or infinity among the scales: expected finite numbers")
    return q


def _read_quant_state(packed, beside, quant_state):
    check_choice("quant_type", quant_state["quant_type"], CODES, FileError)
    if quant_state.get("nested_blocksize", 256) != 256:
        raise FileError(
            f"nested_blocksize {quant_state['nested_blocksize']}: expected 256"
        )
    check_number(
        "blocksize", quant_state["blocksize"], whole=True, least=1, error=FileError
    )
    nested = "nested_absmax" in beside
    offset = None
    if nested:
        offset = torch.tensor(quant_state["nested_offset"], device=packed.device)
    return QTensor(
        # bnb_4bit_quant_storage: the same bytes, called another dtype
        packed.reshape(-1, 1).view(torch.uint8).reshape(-1, 1),
        beside["absmax"],
        torch.Size(quant_state["shape"]),
        as_dtype(quant_state["dtype"]),
        quant_state["quant_type"],
        quant_state["blocksize"],
        beside.get("nested_absmax"),
        offset,
    )


def bitsandbytes_layer(
    layer, quant_type="nf4", block_size=64, double_quant=True, compute_dtype=None
):
    """A bitsandbytes Linear4bit with this layer's weight, quantised here and now."""
    bnb = import_bitsandbytes()
    if block_size != 64:
        raise ValueError(
            "bitsandbytes' layers have blocks of 64; other sizes need backend='torch'"
        )
    weight, (d_in, d_out) = weights.read_weight(layer), weights.features(layer)
    if weight.device.type == "cpu" and d_in % 64 and d_in % 16 == 0:
        raise ValueError(
            f"on a CPU, bitsandbytes (0.50) computes wrong weights for {d_in} inputs: a"
            " multiple of 16, but not of its blocks of 64. Take backend='torch'"
        )
    # the same bytes in less time and memory
    q = quantize_4bit(weight, block_size, double_quant, quant_type)
    new = bnb.nn.Linear4bit(
        d_in,
        d_out,
        bias=False,
        compute_dtype=as_float("compute_dtype", compute_dtype),
        quant_type=quant_type,
        compress_statistics=double_quant,
        device="meta",
    )
    new.weight = bnb.nn.Params4bit.from_prequantized(
        q.packed, to_bitsandbytes(q), device=weight.device, module=new
    )
    # see weights.undo_bnb_cpu_repacking
    new.bias, new.support_avx512bf16_for_cpu = getattr(layer, "bias", None), False
    return new.train(layer.training)
