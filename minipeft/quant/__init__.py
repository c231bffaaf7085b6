"""Quantisation: 4-bit weights, 8-bit optimizer states. It works on any nn.Module."""

from .blockwise import dequantize_blockwise, dynamic_map, linear_map, quantize_blockwise
from .linear4bit import BitsAndBytesConfig, Linear4bit, dequantize_model, quantize_model
from .nf4 import (
    FP4_CODE,
    INT4_CODE,
    NF4_CODE,
    QTensor,
    dequantize_4bit,
    dequantize_fp4,
    dequantize_int4,
    dequantize_nf4,
    normal_float,
    quantize_4bit,
    quantize_blocks,
    quantize_fp4,
    quantize_int4,
    quantize_nf4,
)
from .optimizers import AdamW8bit, PagedAdamW
