"""The methods, one file each."""

from .adalora import AdaLoraConfig
from .bitfit import BitFitConfig
from .bottleneck import BottleneckConfig
from .denselora import DenseLoraConfig
from .fusion import FusionConfig
from .ia3 import IA3Config
from .layernorm import LNTuningConfig
from .loha import LoHaConfig
from .lokr import LoKrConfig
from .lora_config import DoraConfig, LoraConfig
from .p_tuning import PromptEncoderConfig
from .prefix import PrefixTuningConfig
from .prompt import PromptTuningConfig
from .subspace import SubspaceConfig
from .vera import VeraConfig

__all__ = [
    "AdaLoraConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "DenseLoraConfig",
    "DoraConfig",
    "FusionConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "SubspaceConfig",
    "VeraConfig",
]
