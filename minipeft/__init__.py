"""Parameter-efficient fine-tuning, built by hand. The names are Hugging Face PEFT's."""

import importlib

from .config import ConfigError, PeftConfig
from .errors import NotMergeableError, TargetError
from .methods import *  # noqa: F403
from .methods import __all__ as _methods
from .methods.prefix import initialize_kv_prefix_from_text
from .model import PeftModel, get_peft_model, prepare_model_for_kbit_training
from .saving import AdapterFileError
from .slot import Adapter, AdapterNameError, Base, LinearDelta, Slot

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterFileError",
    "AdapterNameError",
    "Base",
    "ConfigError",
    "LinearDelta",
    "NotMergeableError",
    "PeftConfig",
    "PeftModel",
    "Slot",
    "TargetError",
    "get_peft_model",
    "initialize_kv_prefix_from_text",
    "prepare_model_for_kbit_training",
    *_methods,
]


# minipeft.lm and the rest of the course: imported when asked for
def __getattr__(name):
    if name in ("lm", "quant", "optim", "course", "lanternwick"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
