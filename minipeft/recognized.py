"""How transformers.Trainer recognizes a PeftModel.

Trainer, accelerate and TRL ask isinstance(model, peft.PeftModel) before they save only
adapters, read the base's signature or train a quantized base. So, where Hugging Face
PEFT is installed, the class of a PeftModel around a transformers model also inherits
from PEFT's. In name only: every attribute that PEFT's class would add is hidden.
"""

import functools
import importlib.util
import inspect
import sys

from torch import nn


def is_transformers_model(model):
    """True for a model of the transformers library, which is not imported for that."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def recognize(model, base):
    """Let isinstance(model, peft.PeftModel) be true where `base` is a transformers
    model."""
    if is_transformers_model(base) and importlib.util.find_spec("peft"):
        model.__class__ = recognized_class(type(model))


@functools.cache
def recognized_class(cls):
    """`cls`, which inherits from peft.PeftModel too."""
    from peft import PeftModel

    hidden = {}
    for name in set(dir(PeftModel)) - vars(cls).keys() - set(dir(type)):
        plain = inspect.getattr_static(nn.Module, name, None)
        if inspect.getattr_static(PeftModel, name) is not plain:
            hidden[name] = Hidden() if plain is None else plain
    return type(cls.__name__, (cls, PeftModel), hidden | own_attributes(cls, hidden))


class Hidden:
    """An attribute of PEFT's class that is not there: __getattr__ is asked for it."""

    def __get__(self, model, owner=None):
        raise AttributeError


def own_attributes(cls, hidden):
    """What names, lists and pickles an object of the recognized class as one of
    `cls`."""

    def __dir__(self):
        return [name for name in cls.__dir__(self) if name not in hidden]

    def __reduce_ex__(self, protocol):
        return empty_model, (cls,), *cls.__reduce_ex__(self, protocol)[2:]

    named = ("__doc__", "__module__", "__qualname__")
    own = {name: getattr(cls, name) for name in named}
    return own | {"__dir__": __dir__, "__reduce_ex__": __reduce_ex__}


def empty_model(cls):
    """A new object of the recognized class, for copy and pickle to fill."""
    recognized = recognized_class(cls)
    return recognized.__new__(recognized)
