"""The language model: its network, tokenizer, files, text generation, training and evaluation."""
import importlib

_HOME = {"GPT": "gpt", "GPTConfig": "gpt", "load_pretrained": "hub", "save_pretrained": "hub",
         "load_tokenizer": "tokenizer", "Tokenizer": "tokenizer", "generate": "generate", "train": "train",
         "evaluate": "evaluate", "memory_ledger": "ledger", "load_data": "data"}
__all__ = sorted(_HOME)


def __getattr__(name):          # a file is imported when one of its names is first asked for: `import minipeft` stays light
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value     # over a submodule of the same name, as `generate` is
    return value


def __dir__():
    return __all__
