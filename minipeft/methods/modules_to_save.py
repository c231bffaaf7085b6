"""modules_to_save: a trained copy of a whole module, in place of the frozen one. It can
accompany any method."""

import copy

from .. import targets, weights
from ..errors import TargetError
from ..slot import Adapter


class ModuleCopy(Adapter):
    """y = module(x): a trained copy of the layer, which never calls its base."""

    mergeable = True
    replaces_base = True

    def __init__(self, module):
        super().__init__()
        packed = [n for n, p in module.named_parameters() if not p.is_floating_point()]
        if packed:
            raise TargetError(
                f"modules_to_save: {packed[0]} of this {type(module).__name__} is"
                " quantised, so a copy of it cannot be trained. Leave it out of"
                " quantisation, or put a LoRA on it"
            )
        try:
            self.module = copy.deepcopy(module)
        except RuntimeError as error:  # torch's old weight_norm, once it was called
            raise TargetError(
                f"modules_to_save: this {type(module).__name__} cannot be copied"
                f" ({str(error).partition('. ')[0]}). Remove its weight_norm first, or"
                " take torch.nn.utils.parametrizations"
            ) from None

    def forward(self, base, *args, **kwargs):
        return self.module(*args, **kwargs)

    def fold(self, base):
        copy_into(base.module, self.module)

    def to_file(self):  # under the module's own names
        return self.module.state_dict()

    def from_file(self, tensors):
        self.module.load_state_dict(tensors)


def copy_into(module, trained):
    """Give a module the values of its trained copy, as new frozen parameters."""
    modules = map(targets.bare_modules, (trained, module))
    for own, frozen in zip(*modules, strict=True):
        for name, p in own._parameters.items():
            if p is not None:
                value = p.to(frozen._parameters[name].dtype, copy=True)
                frozen._parameters[name] = weights.frozen(value)
        frozen._buffers.update(copy.deepcopy(own._buffers))
