"""A linear layer whose frozen weight is kept in 4 bits, and models made of such layers.

    y = x dequantise(W)^T + b,    dx = dy dequantise(W)

Dettmers et al. 2023, arXiv 2305.14314, equation 5. The dense weight exists only while a
product is computed: once in the forward pass, once more in the backward pass. The
weight itself gets no gradient; x does, for the adapters below.
"""

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .. import weights
from ..targets import matches_suffix, unwrap_slot, walk
from .blockwise import dynamic_map
from .nf4 import CODES, QTensor, dequantize_4bit, quantize_4bit


class Params4bit(nn.Parameter):
    """Packed codes, two a byte. By this name bitsandbytes and PEFT know that each byte
    counts as two weights."""


class Product(torch.autograd.Function):
    """x (..., d_in), QTensor (d_out, d_in), bias (d_out,) or None -> (..., d_out), in
    x's dtype."""

    @staticmethod
    def forward(ctx, x, q, bias):
        ctx.q = q
        return F.linear(x, dequantize_4bit(q, x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        dx = dy @ dequantize_4bit(ctx.q, dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class Linear4bit(nn.Linear):
    """nn.Linear's shape, a bias in full precision, a weight in 4 bits.
    `Linear4bit.of(linear)` makes one.

    compute_dtype: what the product is computed in; None: whatever x is. The result has
    x's dtype. Its state_dict has bitsandbytes' names, and loads there; a dense weight
    that is loaded into it is quantised.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        compute_dtype=None,
        quant_type="nf4",
        block_size=64,
        double_quant=True,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device or "cpu", dtype)
        self.compute_dtype, self.quant_type, self.block_size = (
            compute_dtype,
            quant_type,
            block_size,
        )
        self.double_quant = double_quant
        for name in ("absmax", "absmax2", "offset"):
            # _save_to_state_dict saves them
            self.register_buffer(name, None, persistent=False)
        self.store(self.weight)

    @classmethod
    def of(cls, layer, **options):
        """A 4-bit copy of whatever linear layer. Its bias is the same Parameter."""
        d_in, d_out = weights.features(layer)
        new = cls(d_in, d_out, bias=False, device="meta", **options)
        new.store(weights.read_weight(layer))
        new.bias = getattr(layer, "bias", None)
        return new.train(layer.training)

    def store(self, weight):
        """Quantise a dense weight (d_out, d_in), or take over a QTensor."""
        options = self.block_size, self.double_quant, self.quant_type
        q = weight if isinstance(weight, QTensor) else quantize_4bit(weight, *options)
        self.weight = Params4bit(q.packed, requires_grad=False)
        self.absmax, self.absmax2, self.offset, self.dtype = (
            q.absmax,
            q.absmax2,
            q.offset,
            q.dtype,
        )
        self.block_size, self.double_quant, self.quant_type = (
            q.block_size,
            q.absmax2 is not None,
            q.quant_type,
        )

    @property
    def quantized(self):
        """The weight as a QTensor."""
        return QTensor(
            self.weight.data,
            self.absmax,
            torch.Size((self.out_features, self.in_features)),
            self.dtype,
            self.quant_type,
            self.block_size,
            self.absmax2,
            self.offset,
        )

    def forward(self, x):
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = (
            torch.get_autocast_dtype(device)
            if autocast
            else self.compute_dtype or x.dtype
        )
        y = Product.apply(
            x.to(dtype),
            self.quantized,
            None if self.bias is None else self.bias.to(dtype),
        )
        return y if autocast else y.to(x.dtype)

    # .bfloat16() is meant for weights: the scales stay what they are
    def _apply(self, fn, recurse=True):
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self

    def extra_repr(self):
        return (
            f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in to_bitsandbytes(self.quantized).items():
            destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(self, state_dict, prefix, *args):
        parts = {
            key.removeprefix(f"{prefix}weight."): state_dict.pop(key)
            for key in list(state_dict)
            if key.startswith(f"{prefix}weight.")
        }
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None:
            device = (
                self.weight.device
                if self.weight.device.type != "meta"
                else weight.device
            )
            if weight.is_floating_point() and weight.shape == (
                self.out_features,
                self.in_features,
            ):
                self.store(weight.to(device))
            elif parts:
                self.store(from_bitsandbytes(weight, parts).to(device))
            if weight.is_floating_point() or parts:
                state_dict[f"{prefix}weight"] = self.weight.data
        super()._load_from_state_dict(state_dict, prefix, *args)


def to_bitsandbytes(q):
    """{name: tensor}: what stands beside the packed weight in bitsandbytes' files. Its
    facts are JSON, as bytes."""
    facts = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    device = q.absmax.device
    tensors = {
        "absmax": q.absmax,
        "quant_map": CODES[q.quant_type].to(device, copy=True),
    }
    if q.absmax2 is not None:
        offset = 0.0 if q.offset.is_meta else q.offset.item()
        facts |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
        tensors |= {
            "nested_absmax": q.absmax2,
            "nested_quant_map": dynamic_map().to(device),
        }
    text = torch.tensor(
        list(json.dumps(facts).encode()), dtype=torch.uint8, device=device
    )
    return tensors | {f"quant_state.bitsandbytes__{q.quant_type}": text}


def from_bitsandbytes(packed, parts):
    """The QTensor that a packed weight and the tensors beside it in a file make.
    ValueError where one is missing."""
    state = next(
        (
            t
            for name, t in parts.items()
            if name.startswith("quant_state.bitsandbytes__")
        ),
        None,
    )
    if state is None or "absmax" not in parts:
        raise ValueError(
            "a 4-bit weight without its quant_state and absmax: the file is not whole"
        )
    facts = json.loads(bytes(state.tolist()))
    if facts.get("nested_blocksize", 256) != 256:
        raise ValueError(f"nested_blocksize {facts['nested_blocksize']}: expected 256")
    nested = "nested_absmax" in parts
    return QTensor(
        packed.reshape(-1, 1),
        parts["absmax"],
        torch.Size(facts["shape"]),
        getattr(torch, facts["dtype"]),
        facts["quant_type"],
        facts["blocksize"],
        parts["nested_absmax"] if nested else None,
        torch.tensor(facts["nested_offset"], device=packed.device) if nested else None,
    )


class Packed:
    """How layers.py reads and writes the weight of a Linear4bit."""

    def read(layer):
        return dequantize_4bit(layer.quantized)

    def write(layer, weight):  # new tensors, so that the old ones can be put back
        layer.store(weight.to(layer.weight.device, layer.dtype))


weights.STORAGE["minipeft.quant.linear4bit.Linear4bit"] = Packed


# Models


@dataclass
class BitsAndBytesConfig:
    """How to quantise a model's linear layers. The first fields are those of
    transformers' class of this name."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: str = "fp4"  # as there; nearly always "nf4" is wanted
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    llm_int8_skip_modules: list[str] | None = None  # left as they are; None: lm_head
    block_size: int = 64
    backend: str = "torch"  # or "bitsandbytes"

    @classmethod
    def make(cls, given):
        """From "nf4" (with double quantisation), a dict of the fields, or an object
        that has them."""
        if isinstance(given, str):
            return cls(bnb_4bit_quant_type=given, bnb_4bit_use_double_quant=True)
        if not isinstance(given, dict):
            given = {
                name: getattr(given, name)
                for name in cls.__dataclass_fields__
                if hasattr(given, name)
            }
        wrong = given.keys() - cls.__dataclass_fields__.keys() - IGNORED_BNB_FIELDS
        if wrong or given.get("load_in_8bit") or not given.get("load_in_4bit", True):
            raise ValueError(
                "quantization: only 4 bits are supported, with the fields "
                + ", ".join(cls.__dataclass_fields__)
            )
        return cls(
            **{
                name: value
                for name, value in given.items()
                if name in cls.__dataclass_fields__
            }
        )

    def options(self):
        """The arguments of quantize_model."""
        dtype = self.bnb_4bit_compute_dtype
        return dict(
            backend=self.backend,
            skip=tuple(self.llm_int8_skip_modules or ("lm_head",)),
            quant_type=self.bnb_4bit_quant_type,
            double_quant=self.bnb_4bit_use_double_quant,
            compute_dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
            block_size=self.block_size,
        )

    def to_dict(self):
        """What transformers reads in config.json as quantization_config."""
        dtype = str(self.bnb_4bit_compute_dtype or torch.float32).removeprefix("torch.")
        ours = {} if self.block_size == 64 else {"block_size": self.block_size}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "llm_int8_skip_modules": self.llm_int8_skip_modules,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_quant_storage": "uint8",
        } | ours


# What else transformers writes into a quantization_config: it does not change 4-bit
# layers.
IGNORED_BNB_FIELDS = {
    "quant_method",
    "load_in_8bit",
    "_load_in_4bit",
    "_load_in_8bit",
    "bnb_4bit_quant_storage",
    "llm_int8_threshold",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
}


def bitsandbytes_layer(
    layer, quant_type="nf4", block_size=64, double_quant=True, compute_dtype=None
):
    """A bitsandbytes Linear4bit with this layer's weight, quantised here and now."""
    import bitsandbytes

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
    new = bitsandbytes.nn.Linear4bit(
        d_in,
        d_out,
        bias=False,
        compute_dtype=compute_dtype,
        quant_type=quant_type,
        compress_statistics=double_quant,
        device="meta",
    )
    new.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        q.packed, to_bitsandbytes(q), device=weight.device, module=new
    )
    # see weights.undo_bnb_cpu_repacking
    new.bias, new.support_avx512bf16_for_cpu = getattr(layer, "bias", None), False
    return new.train(layer.training)


BACKENDS = {"torch": Linear4bit.of, "bitsandbytes": bitsandbytes_layer}


def sites(model):
    """[(path, layer, the function that puts another in its place)] of all linear
    layers, slots seen through."""
    found = []
    for path, parent, name, module in walk(model):
        layer = unwrap_slot(module)
        if weights.is_linear(layer):
            holder, attribute = (
                (parent, name) if layer is module else (module, "base_layer")
            )
            found.append(
                (
                    path,
                    layer,
                    lambda new, holder=holder, attribute=attribute: setattr(
                        holder, attribute, new
                    ),
                )
            )
    return found


def linear_layers(model, skip=("lm_head",)):
    """{path: (layer, put)} of the linear layers that quantize_model changes."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        path: (layer, put)
        for path, layer, put in sites(model)
        if weights.is_dense(layer)
        and id(layer.weight) not in tied
        and not any(matches_suffix(name, path) for name in skip)
    }


def quantize_model(model, backend="torch", skip=("lm_head",), **options):
    """Put every linear layer's weight into 4 bits, in place and one by one; returns the
    model.

    skip      names of layers to leave (the ends of their paths). Weights that are also
    an embedding's are left anyway options   quant_type="nf4" | "fp4" | "int4",
    block_size=64, double_quant=True, compute_dtype=None
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    found = linear_layers(model, skip)
    while found:  # layer by layer, keeping none
        _, (layer, put) = found.popitem()
        put(BACKENDS[backend](layer, **options))
    return weights.undo_bnb_cpu_repacking(model)


def dequantize_model(model, dtype=None):
    """Every 4-bit layer becomes an nn.Linear again, in place; returns the model. The
    rounding, of course, remains."""
    for _, layer, put in sites(model):
        if not weights.is_dense(layer):
            put(dense(layer, dtype))
    return model


def dense(layer, dtype=None):
    """An nn.Linear with the weight that a 4-bit layer stands for."""
    weight = weights.read_weight(layer)
    new = nn.Linear(*weights.features(layer), bias=False, device="meta")
    new.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
    new.bias = layer.bias
    return new.train(layer.training)
