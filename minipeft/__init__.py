"""Parameter-efficient fine-tuning, built by hand. The names are Hugging Face PEFT's."""

import importlib

from .interrupts import until_main

until_main()  # before torch is imported

# ruff: noqa: E402
from . import compat, methods
from .compat import *
from .config import LayerConfig, PeftConfig
from .errors import AdapterFileError, ConfigError, NotMergeableError, TargetError
from .methods import *
from .methods.prefix import initialize_kv_prefix_from_text
from .model import PeftModel, get_peft_model
from .quant.kbit import prepare_model_for_kbit_training
from .slot import Adapter, AdapterNameError, Base, LinearDelta, Slot
from .status import get_layer_status, get_model_status

__version__ = "0.1.0"
__all__ = [
    *compat.__all__,
    *methods.__all__,
    "Adapter",
    "AdapterFileError",
    "AdapterNameError",
    "Base",
    "ConfigError",
    "LayerConfig",
    "LinearDelta",
    "NotMergeableError",
    "PeftConfig",
    "PeftModel",
    "Slot",
    "TargetError",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "initialize_kv_prefix_from_text",
    "prepare_model_for_kbit_training",
]


def __getattr__(name):  # the other towers: imported when asked for
    if name in ("lm", "quant", "optim", "course", "lanternwick"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
