"""A linear layer whose frozen weight is kept in 4 bits, and models made of such layers.

    y = x dequantise(W)^T + b,    dx = dy dequantise(W)

Dettmers et al. 2023, arXiv 2305.14314, equation 5. The dense weight exists only while a
product is computed: once in the forward pass, once more in the backward pass. The
weight itself gets no gradient; x does, for the adapters below.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .. import weights
from ..errors import FileError, NotMergeableError
from ..io import brief, check_choice, did_you_mean, with_prefix
from ..targets import (
    check_one_place,
    find_targets,
    is_found,
    matches_suffix,
    parents_of,
    unwrap_slot,
    walk,
)
from .bitsandbytes import (
    as_float,
    bitsandbytes_layer,
    from_bitsandbytes,
    to_bitsandbytes,
)
from .nf4 import QTensor, dequantize_4bit, quantize_4bit


class Params4bit(nn.Parameter):
    """Packed codes, two a byte. By this name bitsandbytes and PEFT know that each byte
    counts as two weights."""


class MatMul4bit(torch.autograd.Function):
    """x (..., d_in), QTensor (d_out, d_in), bias (d_out,) or None -> (..., d_out), in
    x's dtype."""

    @staticmethod
    def forward(ctx, x, q, bias):
        ctx.q = q
        return F.linear(x, dequantize_4bit(q, x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        needs_x, _, needs_bias = ctx.needs_input_grad
        dx = dy @ dequantize_4bit(ctx.q, dy.dtype) if needs_x else None
        dbias = dy.sum_to_size(dy.shape[-1:]) if needs_bias else None
        return dx, None, dbias


class Linear4bit(nn.Linear):
    """nn.Linear's shape, a bias in full precision, a weight in 4 bits.
    `Linear4bit.from_linear(linear)` makes one.

    compute_dtype: what the product is computed in (or its name); None: x's dtype. The
    result has x's dtype. Its state_dict has bitsandbytes' names, and loads there; a
    dense weight that is loaded into it is quantised.
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
        self.compute_dtype = as_float("compute_dtype", compute_dtype)
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        for name in ("absmax", "absmax2", "offset"):
            # _save_to_state_dict saves them
            self.register_buffer(name, None, persistent=False)
        self.set_weight(self.weight)

    @classmethod
    def from_linear(cls, layer, **options):
        """A 4-bit copy of any linear layer. Its bias is the same Parameter."""
        d_in, d_out = weights.features(layer)
        new = cls(d_in, d_out, bias=False, device="meta", **options)
        new.set_weight(weights.read_weight(layer))
        new.bias = getattr(layer, "bias", None)
        return new.train(layer.training)

    def set_weight(self, weight):
        """Quantise a dense weight (d_out, d_in), or take over a QTensor."""
        q = weight
        if not isinstance(weight, QTensor):
            q = quantize_4bit(
                weight, self.block_size, self.double_quant, self.quant_type
            )
        self.weight = Params4bit(q.packed, requires_grad=False)
        self.absmax = q.absmax
        self.absmax2 = q.absmax2
        self.offset = q.offset
        self.dtype = q.dtype
        self.block_size = q.block_size
        self.double_quant = q.absmax2 is not None
        self.quant_type = q.quant_type

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

    def dense_weight(self):
        """The weight as it is used, (d_out, d_in)."""
        return dequantize_4bit(self.quantized)

    def forward(self, x):
        if not x.is_floating_point():
            raise TypeError(f"x is {x.dtype}: expected floating-point numbers")
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = self.compute_dtype or x.dtype
        if autocast:
            dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = MatMul4bit.apply(x.to(dtype), self.quantized, bias)
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

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        name = f"{prefix}weight"
        weight = state_dict.get(name)
        if weight is not None:
            shape = (self.out_features, self.in_features)
            if not weight.is_floating_point():
                weight = self._unpack(name, state_dict, shape)
            if weight.shape == shape:
                meta = self.weight.is_meta
                self.set_weight(weight if meta else weight.to(self.weight.device))
            else:
                errors = rest[-1]
                errors.append(
                    f"size mismatch for {name}: {tuple(weight.shape)} in the state"
                    f" dict, expected {shape}"
                )
            state_dict[name] = self.weight.data
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _unpack(self, name, state_dict, shape):
        """The QTensor of a packed weight. What stands beside it leaves state_dict:
        torch reports all else as unexpected."""
        starts = tuple(f"{name}.{part}" for part in BESIDE)
        keys = [key for key in state_dict if key.startswith(starts)]
        beside = with_prefix({key: state_dict.pop(key) for key in keys}, f"{name}.")
        try:
            return from_bitsandbytes(state_dict[name], beside, shape)
        except FileError as problem:
            raise FileError(f"{name}: {problem}") from None


def is_4bit(module):
    """True for a linear layer whose weight is in 4 bits, ours or bitsandbytes'."""
    return weights.is_linear(module) and not weights.is_dense(module)


def quantized_tensors(layer):
    """(the format, such as "nf4"; the tensors that a 4-bit layer's weight consists of),
    of our layers and of bitsandbytes'."""
    if isinstance(layer, Linear4bit):
        tensors = [layer.weight, layer.absmax, layer.absmax2, layer.offset]
        return layer.quant_type, [t for t in tensors if t is not None]
    state = layer.weight.quant_state
    tensors = [layer.weight, state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return state.quant_type, tensors


# what stands beside a packed weight, in bitsandbytes' names
BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.")


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

    def __post_init__(self):
        dtype = as_float("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype)
        self.bnb_4bit_compute_dtype = dtype
        for name in ("load_in_4bit", "bnb_4bit_use_double_quant"):
            check_choice(name, getattr(self, name), (True, False))

    @classmethod
    def make(cls, given):
        """From "nf4" (with double quantisation), a dict of the fields, or an object
        that has them."""
        if isinstance(given, str):
            return cls(bnb_4bit_quant_type=given, bnb_4bit_use_double_quant=True)
        known = cls.__dataclass_fields__
        if not isinstance(given, dict):
            found = {
                name: getattr(given, name) for name in known if hasattr(given, name)
            }
            if not found:
                raise ValueError(
                    f"quantization = {brief(given)}: expected 'nf4', 'fp4', 'int4', a"
                    " dict or a BitsAndBytesConfig"
                )
            given = found
        wrong = sorted(given.keys() - known.keys() - IGNORED_BNB_FIELDS)
        if wrong:
            hint = did_you_mean(wrong[0], known)
            raise ValueError(
                f"quantization: unknown field {wrong[0]!r}{hint}; expected"
                f" {', '.join(known)}"
            )
        if given.get("load_in_8bit") or not given.get("load_in_4bit", True):
            raise ValueError(
                "quantization: only 4 bits are supported (load_in_4bit=True and the"
                " fields of bnb_4bit_quant_type and so on)"
            )
        return cls(**{name: given[name] for name in known if name in given})

    def options(self):
        """The arguments of quantize_model."""
        skip = self.llm_int8_skip_modules
        return dict(
            backend=self.backend,
            skip=("lm_head",) if skip is None else skip,
            quant_type=self.bnb_4bit_quant_type,
            double_quant=self.bnb_4bit_use_double_quant,
            compute_dtype=self.bnb_4bit_compute_dtype,
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


# transformers writes these into a quantization_config too; they do not change 4-bit
# layers
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


BACKENDS = {"torch": Linear4bit.from_linear, "bitsandbytes": bitsandbytes_layer}


def linear_layers(model):
    """[(path, layer, the function that puts another in its place)] of all linear
    layers, slots seen through."""
    found = []
    for path, parent, name, module in walk(model):
        layer = unwrap_slot(module)
        if weights.is_linear(layer):
            place = (parent, name) if layer is module else (module, "base_layer")
            found.append((path, layer, partial(setattr, *place)))
    return found


def is_skipped(name, path):
    """True for the end of a layer's path, and for the path of a module around it."""
    return matches_suffix(name, path) or path.startswith(f"{name}.")


def quantizable_layers(model, skip=("lm_head",), strict=True):
    """{path: (layer, put)} of the linear layers that quantize_model changes. skip: as
    there. strict: a name in it that no linear layer has is a ValueError."""
    layers = linear_layers(model)
    skip = (skip,) if isinstance(skip, str) else skip
    paths = [path for path, *_ in layers]
    # lm_head is the default, also for a model without a head
    absent = [n for n in skip if n != "lm_head" and not is_found(n, paths, is_skipped)]
    if absent and strict:
        names = {path.split(".")[-1] for path in paths}
        raise ValueError(
            f"skip: no linear layer is called {absent[0]!r}"
            f"{did_you_mean(absent[0], names)}"
        )
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        path: (layer, put)
        for path, layer, put in layers
        if weights.is_dense(layer)
        and id(layer.weight) not in tied
        and not find_targets([path], skip, is_skipped)
    }


def check_unmerged(model):
    """Raise NotMergeableError where adapters are written into weights: what stood there
    before could not be put back into new layers."""
    for path, _, _, module in walk(model):
        if getattr(module, "is_slot", False) and module.merged:
            raise NotMergeableError(
                f"{path}: {module.merged} are merged: call unmerge_adapter() first"
            )


def quantize_model(model, backend="torch", skip=("lm_head",), **options):
    """Put every linear layer's weight into 4 bits, in place and one by one; returns the
    model.

    skip      names of layers to leave (the ends of their paths), or paths of modules
              around them. Weights that are also an embedding's are left anyway
    options   quant_type="nf4" | "fp4" | "int4", block_size=64, double_quant=True,
              compute_dtype=None

    Raises ValueError for a model that is a linear layer itself, TargetError for a layer
    that stands at several places.
    """
    check_choice("backend", backend, BACKENDS)
    if weights.is_linear(model):
        raise ValueError(
            f"expected a model with linear layers in it, found a {type(model).__name__}"
            " itself: Linear4bit.from_linear(layer) makes a layer of one"
        )
    check_unmerged(model)
    found = quantizable_layers(model, skip)
    parents = parents_of(model)
    for path, (layer, _) in found.items():
        check_one_place(path, layer, parents[id(layer)], "would be quantised")
    while found:  # layer by layer, keeping none
        _, (layer, put) = found.popitem()
        put(BACKENDS[backend](layer, **options))
    return weights.undo_bnb_cpu_repacking(model)


def dequantize_model(model, dtype=None):
    """Every 4-bit layer becomes an nn.Linear again, in place; returns the model. The
    rounding remains."""
    check_unmerged(model)
    dtype = as_float("dtype", dtype)
    for _, layer, put in linear_layers(model):
        if not weights.is_dense(layer):
            put(to_linear(layer, dtype))
    return model


def to_linear(layer, dtype=None):
    """An nn.Linear with the weight that a 4-bit layer stands for."""
    weight = weights.read_weight(layer)
    new = nn.Linear(*weights.features(layer), bias=False, device="meta")
    new.weight = weights.frozen(weight.to(dtype or weight.dtype))
    new.bias = layer.bias
    return new.train(layer.training)
