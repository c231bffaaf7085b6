"""What transformers and its Trainer ask of a model besides running it: gradient
checkpointing, changes of the embeddings, and a task's arguments by position."""

import inspect
from functools import partial

from torch import nn

from . import saving, targets
from .errors import TargetError
from .peft_tables import TASK_ARGUMENTS

# the base's own; TargetError where an embedding carries an adapter, which would no
# longer fit, or be lost
CHANGES_OF_EMBEDDINGS = (
    "resize_token_embeddings",
    "tie_weights",
    "set_input_embeddings",
    "set_output_embeddings",
)


class HFMethods(nn.Module):
    """A PeftModel's methods of this kind."""

    def gradient_checkpointing_enable(self, *args, **kwargs):
        self.get_base_model().gradient_checkpointing_enable(*args, **kwargs)
        self.enable_input_require_grads()

    def activation_checkpointing_enable(self, *args, **kwargs):
        """gradient_checkpointing_enable, as transformers calls it since 5.24."""
        self.get_base_model().activation_checkpointing_enable(*args, **kwargs)
        self.enable_input_require_grads()

    def enable_input_require_grads(self):
        """Reentrant checkpointing gives no gradients where no input asks for one, as
        behind a frozen embedding."""
        embeddings = self._embeddings()
        disable = getattr(self.get_base_model(), "disable_input_require_grads", None)
        if disable and embeddings is not self.get_base_model().get_input_embeddings():
            disable()  # transformers' hook is on the slot, and would go with it
        if (
            embeddings is not None
            and _require_grad not in embeddings._forward_hooks.values()
        ):
            embeddings.register_forward_hook(_require_grad)

    def _remove_grad_hook(self):
        hooks = getattr(self._embeddings(), "_forward_hooks", {})
        for key in [key for key, hook in hooks.items() if hook is _require_grad]:
            del hooks[key]

    def _embeddings(self):
        return targets.embeddings(self.get_base_model())[0]

    def _change_embeddings(self, what, *args, **kwargs):
        """Call the base's method `what`, one of CHANGES_OF_EMBEDDINGS."""
        self._check_embeddings_are_bare(what)
        return getattr(self.get_base_model(), what)(*args, **kwargs)

    def _check_embeddings_are_bare(self, what):
        for name, adapter in self.base_model.adapters.items():
            if adapter.mergeable:
                raise TargetError(
                    f"{what}: {name!r} changes every weight, the embeddings among them."
                    " Do it on the base, before adapters are added"
                )
        for path in saving.embedding_paths(self.get_base_model()):
            if saving.is_slotted(self, path):
                raise TargetError(
                    f"{what}: {path} carries an adapter. Do it on the base, before"
                    " adapters are added"
                )

    def __getattr__(self, name):
        if name in CHANGES_OF_EMBEDDINGS and hasattr(self.get_base_model(), name):
            return partial(self._change_embeddings, name)
        # not super(): PEFT's own class, which may follow, would ask the base
        return nn.Module.__getattr__(self, name)


def task_arguments(task, forward, args, kwargs):
    """(args, kwargs) of a call with a task's arguments by position: in PEFT's order,
    which is not that of each base. All but the first are then given by name."""
    names = TASK_ARGUMENTS.get(task)
    if names is None or len(args) < 2:
        return args, kwargs
    if "input_ids" not in inspect.signature(forward).parameters:
        return args, kwargs
    if len(args) > len(names):
        raise TypeError(
            f"{len(args)} arguments by position: with task_type={task!r} these are"
            f" {', '.join(names)}. Give others by name"
        )
    given = {n: x for n, x in zip(names[1:], args[1:]) if x is not None}
    if twice := given.keys() & kwargs.keys():
        raise TypeError(f"{min(twice)}: given by position and by name")
    return args[:1], given | kwargs


def _require_grad(module, args, output):
    output.requires_grad_(True)
