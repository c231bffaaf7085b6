"""The language model: its network, tokenizer, files, text generation, training and evaluation."""
import importlib
import sys
from types import ModuleType

_HOME = {"GPT": "gpt", "GPTConfig": "gpt", "load_pretrained": "hub", "save_pretrained": "hub",
         "load_tokenizer": "tokenizer", "Tokenizer": "tokenizer", "generate": "generate", "train": "train",
         "evaluate": "evaluate", "memory_ledger": "ledger", "load_data": "data"}
__all__ = sorted(_HOME)


def __getattr__(name):          # a file is imported when one of its names is first asked for: `import minipeft` stays light
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__


class _Package(ModuleType):
    """Importing a file makes it an attribute of its package. Where a function bears its file's name, the function stays."""
    def __setattr__(self, name, value):
        super().__setattr__(name, getattr(value, name) if name in _HOME and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
