"""Parameter-efficient fine-tuning, built by hand. The names are Hugging Face PEFT's."""

import importlib

from .compat import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoftQConfig,
    PeftType,
    PromptTuningInit,
    TaskType,
    get_peft_config,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from .config import LayerConfig, PeftConfig
from .errors import AdapterFileError, ConfigError, NotMergeableError, TargetError
from .methods import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    DenseLoraConfig,
    DoraConfig,
    FusionConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SubspaceConfig,
    VeraConfig,
)
from .methods.prefix import initialize_kv_prefix_from_text
from .model import PeftModel, get_peft_model
from .quant.kbit import prepare_model_for_kbit_training
from .slot import Adapter, AdapterNameError, Base, LinearDelta, Slot
from .status import get_layer_status, get_model_status

__version__ = "0.1.0"
__all__ = [
    "AdaLoraConfig",
    "Adapter",
    "AdapterFileError",
    "AdapterNameError",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "Base",
    "BitFitConfig",
    "BottleneckConfig",
    "ConfigError",
    "DenseLoraConfig",
    "DoraConfig",
    "FusionConfig",
    "IA3Config",
    "LNTuningConfig",
    "LayerConfig",
    "LinearDelta",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "NotMergeableError",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "Slot",
    "SubspaceConfig",
    "TargetError",
    "TaskType",
    "VeraConfig",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_text",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]


def __getattr__(name):  # the other towers: imported when asked for
    if name in ("lm", "quant", "optim", "course", "lanternwick"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
