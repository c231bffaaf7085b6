"""modules_to_save: a trained copy of a whole module, in place of the frozen one. It
comes with any method."""

import copy

from torch import nn

from ..slot import Adapter


class Copy(Adapter):
    """y = module(x): the simplest adapter of all, for it does not ask its base."""

    mergeable = True

    def __init__(self, module):
        super().__init__()
        self.module = copy.deepcopy(module)

    def forward(self, base, *args, **kwargs):
        return self.module(*args, **kwargs)

    def fold(self, base):
        for trained, frozen in zip(self.module.modules(), base.module.modules()):
            frozen._parameters.update(
                {
                    name: (
                        p
                        if p is None
                        else nn.Parameter(p.detach().clone(), requires_grad=False)
                    )
                    for name, p in trained._parameters.items()
                }
            )
            frozen._buffers.update(copy.deepcopy(trained._buffers))

    def to_file(self):  # in files it bears the module's own names
        return self.module.state_dict()

    def from_file(self, tensors):
        self.module.load_state_dict(tensors)
