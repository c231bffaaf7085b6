"""How a linear layer stores its weight, and how to read and write it.

To an adapter every linear layer looks alike: it maps d_in features to d_out features
and has a dense weight of shape (d_out, d_in). The classes differ in how they store it.
An embedding is one of them: a linear map of one-hot vectors.
"""

import torch
from torch import nn

from .errors import NotMergeableError, TargetError


def frozen(tensor):
    """A new Parameter with these values, which is not trained."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def check_not_computed(layer, name):
    """Raise NotMergeableError where the layer's weight or bias is no parameter."""
    if name not in layer._parameters:
        raise NotMergeableError(
            f"the {name} of this {type(layer).__name__} is computed from other"
            " parameters (weight_norm or another parametrization), so nothing can be"
            " written into it. Remove the parametrization first"
        )


class DenseStorage:  # stored as (d_out, d_in): nn.Linear
    @staticmethod
    def read(layer):
        return layer.weight

    @staticmethod
    def write(layer, weight):
        check_not_computed(layer, "weight")
        # a new Parameter, never written in place: ties to other layers end here
        old = layer.weight
        layer.weight = frozen(weight.to(old.device, old.dtype).contiguous())


class TransposedStorage:  # stored as (d_in, d_out): Hugging Face's Conv1D, nn.Embedding
    @staticmethod
    def read(layer):
        return layer.weight.T

    @staticmethod
    def write(layer, weight):
        DenseStorage.write(layer, weight.T)


class Bitsandbytes4bitStorage:  # packed: two weights to a byte
    @staticmethod
    def read(layer):
        from bitsandbytes.functional import dequantize_4bit

        Bitsandbytes4bitStorage.undo_repacking(layer)
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    @staticmethod
    def write(layer, weight):  # rounds the weight to 4 bits again
        old = layer.weight
        layer.weight = type(old)(
            weight.to("cpu"),
            requires_grad=False,
            quant_type=old.quant_type,
            module=layer,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
        ).to(old.device)

    @staticmethod
    def undo_repacking(layer):
        """bitsandbytes repacks on CPUs with AVX512-BF16, at the first call in eval
        mode, and loses backward; undo it and disable it."""
        state, layer.support_avx512bf16_for_cpu = layer.weight.quant_state, False
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import (
                _convert_weight_packed_for_cpu_inverse as unpack,
            )

            if not state.original_nested:
                state.absmax = state.absmax.T.reshape(-1).float()
            layer.weight.data, layer.weight.quant_state = unpack(
                layer.weight.data, state
            )
            layer.quant_state = layer.weight.quant_state


class Linear4bitStorage:  # packed, by quant/linear4bit.py
    @staticmethod
    def read(layer):
        return layer.dense_weight()

    @staticmethod
    def write(layer, weight):  # new tensors, so that the old ones can be put back
        layer.set_weight(weight.to(layer.weight.device, layer.dtype))


# {class: its storage}, by name, so that nothing is imported for it. None: not
# adaptable.
STORAGE = {
    "torch.nn.modules.linear.Linear": DenseStorage,
    "torch.nn.modules.sparse.Embedding": TransposedStorage,
    "transformers.pytorch_utils.Conv1D": TransposedStorage,
    "minipeft.quant.linear4bit.Linear4bit": Linear4bitStorage,
    "bitsandbytes.nn.modules.Linear4bit": Bitsandbytes4bitStorage,
    # attention reads its weight, never calls it
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": None,
}


def storage(layer):
    """How `layer` stores its weight, by the most specific of its known classes, or
    None."""
    return STORAGE.get(class_name(known_class(layer)))


def known_class(layer):
    """The most specific of a layer's classes that STORAGE knows, or None."""
    return next((c for c in type(layer).__mro__ if class_name(c) in STORAGE), None)


def class_name(cls):
    return f"{cls.__module__}.{cls.__qualname__}" if cls is not None else None


def is_linear(layer):
    return storage(layer) is not None and not isinstance(layer, nn.Embedding)


def is_norm(module):
    """True for LayerNorm, RMSNorm and other norms, of any class: a module without
    children whose weight has one dimension."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and not any(True for _ in module.children())
    )


def features(layer):
    """(d_in, d_out)"""
    if storage(layer) is None:
        raise TargetError(f"{type(layer).__name__} is not a linear layer")
    if hasattr(layer, "in_features"):  # packed weights do not show their shape
        return layer.in_features, layer.out_features
    return tuple(layer.weight.shape)  # transposed


def linear_features(layer):
    """(d_in, d_out) of a layer that computes x W^T + bias. Raises TargetError for
    embeddings, and for classes whose forward does something else."""
    if isinstance(layer, nn.Embedding):
        raise TargetError(
            "this method is for linear layers, not for embeddings (LoRA adapts both)"
        )
    check_forward(layer)
    return features(layer)


def output_scale(layer):
    """What an embedding multiplies its vectors by, such as Gemma 3's embed_scale."""
    own_forward = type(layer).forward is not nn.Embedding.forward
    return getattr(layer, "embed_scale", 1.0) if own_forward else 1.0


def has_numbers(layer):
    return layer.weight.is_floating_point() and not layer.weight.is_meta


@torch.no_grad()
def check_forward(layer):
    """Raise TargetError where a known layer, or a subclass, with a forward of its own
    does not compute what that layer would: then a change of its weight is not the
    change of its output that an adapter computes. Tried out on a small input."""
    known = known_class(layer)
    if getattr(layer, "max_norm", None) is not None:
        raise TargetError(
            f"this {type(layer).__name__} shortens its vectors to max_norm ="
            f" {layer.max_norm} in its own weight, which an adapter would not follow"
        )
    # a forward may also be given to the one object, as accelerate's hooks do
    own = "forward" in vars(layer) or type(layer).forward is not getattr(
        known, "forward", None
    )
    if known is None or not own or not has_numbers(layer):
        return
    if isinstance(layer, nn.Embedding):
        x = torch.arange(min(4, layer.num_embeddings), device=layer.weight.device)
    else:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(4, features(layer)[0], generator=random).to(layer.weight)
    try:
        y = layer(x)
        expected = known.forward(layer, x) * output_scale(layer)
        error = (y - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        same = error <= 16 * torch.finfo(expected.dtype).eps
    except Exception:  # it takes other arguments, or returns something else
        same = False
    if not same:
        raise TargetError(
            f"{type(layer).__name__} is a {known.__name__} with a forward of its own,"
            " which an adapter of its weight would not follow"
        )


def read_weight(layer):
    """The dense weight (d_out, d_in)."""
    d_in, d_out = features(layer)
    weight = storage(layer).read(layer)
    if not weight.is_floating_point() or weight.shape != (d_out, d_in):
        raise TypeError(
            f"the weight of this {type(layer).__name__} reads as {tuple(weight.shape)}"
            f" {weight.dtype}: expected ({d_out}, {d_in}) floating-point numbers"
        )
    return weight


def write_weight(layer, weight, lossy=False):
    """Store a dense weight (d_out, d_in). A quantised layer would round it: refused,
    unless `lossy`.

    Returns the norms of the rounding error and of the change, or None where nothing is
    rounded."""
    weight = weight.detach()
    if is_dense(layer):
        storage(layer).write(layer, weight)
        return None
    if not lossy:
        raise NotMergeableError(
            f"merging into a 4-bit {type(layer).__name__} rounds the result to 4 bits"
            " again. Pass dequantize=True to merge_and_unload for a dense model, merge"
            " into the base loaded in 16 or 32 bits, or pass lossy=True to accept the"
            " loss"
        )
    before = read_weight(layer)
    storage(layer).write(layer, weight)
    error = read_weight(layer) - weight
    return float(error.norm()), float((weight - before).norm())


def is_dense(layer):
    """True where the weight is stored as the numbers themselves, not quantised."""
    return storage(layer) in (DenseStorage, TransposedStorage)


def undo_bnb_cpu_repacking(model):
    """Keep bitsandbytes' layers in the one form that gives gradients; returns the
    model."""
    for module in model.modules():
        if storage(module) is Bitsandbytes4bitStorage:
            Bitsandbytes4bitStorage.undo_repacking(module)
    return model


def write_bias(layer, bias):
    if getattr(layer, "bias", None) is None:
        raise NotMergeableError(
            f"this {type(layer).__name__} has no bias to merge a bias into"
        )
    check_not_computed(layer, "bias")
    layer.bias = frozen(bias.to(layer.bias.device, layer.bias.dtype))


def is_packed(parameter):
    """True for a parameter in 4 bits, ours or bitsandbytes'."""
    return type(parameter).__name__ == "Params4bit"


def logical_numel(parameter):
    """How many weights a parameter holds: a packed 4-bit one holds two in each byte."""
    per_number = 2 * parameter.element_size() if is_packed(parameter) else 1
    return parameter.numel() * per_number


def device_and_dtype(layer, at_least_32_bits=True):
    """(device, dtype) for new parameters beside `layer`."""
    parameter = next(layer.parameters(), torch.empty(0))
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    return parameter.device, (
        torch.promote_types(dtype, torch.float32) if at_least_32_bits else dtype
    )
