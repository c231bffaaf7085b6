"""Floor 5: the book of adapters. A PeftModel puts slots into a model, and knows which
adapters there are and who plays.

All that touches several layers at once is here, and is done for all of them or for
none.
"""

import copy
import difflib
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from . import merging, saving, targets, weighted
from .config import ConfigError
from .errors import TargetError
from .methods import lora_init
from .methods.modules_to_save import ModuleCopy
from .slot import ActiveAdapters, AdapterNameError, Base, ModelSlot, RowAdapters, Slot
from .weights import device_and_dtype, logical_numel, undo_bnb_cpu_repacking


def get_peft_model(
    model, peft_config, adapter_name="default", autocast_adapter_dtype=True
):
    """`model`, frozen, with a new adapter. Layers get their slots in place; `unload`
    takes them out again.

    Adapters of a 16-bit model are kept in 32 bits, unless autocast_adapter_dtype is
    False. Raises ConfigError, TargetError or AdapterNameError, and then leaves the
    model as it was.
    """
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)


class PeftModel(nn.Module):
    """A frozen model with named adapters. The names of its methods, and what they do,
    are Hugging Face PEFT's."""

    def __init__(
        self,
        model,
        peft_config,
        adapter_name="default",
        autocast_adapter_dtype=True,
        fill=None,
    ):
        super().__init__()
        if any(isinstance(module, (Slot, PeftModel)) for module in model.modules()):
            raise TargetError(
                "this model has adapters already: use add_adapter on its PeftModel, or"
                " unload it first"
            )
        self.base_model = ModelSlot(model, ActiveAdapters())
        # what an adapter shares over its slots is owned here, and lent to them
        self.shared = nn.ModuleDict()
        self.peft_config = {}
        self._add(adapter_name, peft_config, autocast_adapter_dtype, fill)
        undo_bnb_cpu_repacking(model).requires_grad_(False)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        self.training = model.training
        if targets.uses_grad_checkpointing(model):
            self.enable_input_require_grads()

    def forward(self, *args, adapter_names=None, **kwargs):
        """adapter_names: one name for each row of the batch, "__base__" for none.
        Without it, the active adapters."""
        size = next(
            (
                value.shape[0]
                for value in (*args, *kwargs.values())
                if torch.is_tensor(value)
            ),
            None,
        )
        # Rows stay set until the next call: gradient checkpointing runs the layers
        # again in the backward pass.
        self.base_model.active.rows = self._rows(adapter_names, size)
        output = self.base_model(*args, **kwargs)
        if (
            self.training
            and self.base_model.active.enabled
            and getattr(output, "loss", None) is not None
        ):
            for name in self.active_adapters:
                if self.peft_config[name].regularized:
                    output.loss = output.loss + sum(
                        part.regularization_loss()
                        for part in self._adapters_by_path(name).values()
                        if hasattr(part, "regularization_loss")
                    )
        return output

    def generate(self, *args, adapter_names=None, **kwargs):
        self.base_model.active.rows = self._rows(adapter_names)
        try:
            return self.base_model.generate(*args, **kwargs)
        finally:
            self.base_model.active.rows = None

    def _rows(self, names, size=None):
        if names is None:
            return None
        self._check_names(name for name in names if name != "__base__")
        if not names or size not in (None, len(names)):
            raise ValueError(
                f"{len(names)} adapter_names for a batch of {size} rows: one name a row"
                " is expected"
            )
        if self.merged_adapters:
            raise ValueError(
                f"{self.merged_adapters} are merged, so all rows have them: call"
                " unmerge_adapter() first"
            )
        return RowAdapters(names)

    # The book.

    def get_base_model(self):
        return self.base_model.base_layer

    @property
    def active_adapters(self):
        return list(self.base_model.active.names)

    @property
    def active_adapter(self):
        return (
            self.active_adapters[0]
            if len(self.active_adapters) == 1
            else self.active_adapters
        )

    @property
    def merged_adapters(self):
        active = self.base_model.active
        return list(active.merged) if active.enabled else []

    def _sites(self):
        """{path: (the module or slot there, the function that puts something else
        there)}"""
        return {"": (self.base_model, None)} | {
            path: (module, partial(setattr, parent, name))
            for path, parent, name, module in targets.walk(self.base_model)
        }

    def _slots(self):
        return [
            (path, module, put)
            for path, (module, put) in self._sites().items()
            if isinstance(module, Slot)
        ]

    def _adapters_by_path(self, name):
        """{path: the adapter of that name there}; what they share has the path None."""
        parts = {None: self.shared[name]} if name in self.shared else {}
        return parts | {
            path: slot.adapters[name]
            for path, slot, _ in self._slots()
            if name in slot.adapters
        }

    def _check_names(self, names):
        """A list of adapter names, given one or several."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.peft_config:
                near = difflib.get_close_matches(str(name), self.peft_config, n=1)
                raise AdapterNameError(
                    f"there is no adapter {name!r}"
                    + (f" (nearest: {near[0]!r})" if near else "")
                    + f"; there are: {', '.join(map(repr, self.peft_config)) or 'none'}"
                )
        return names

    def _add(self, name, config, autocast_adapter_dtype=True, fill=None):
        """Make adapter `name`, let `fill` give {path: adapter} its values, and put it
        in, frozen and inactive. The model is touched only when all of that has
        succeeded."""
        if (
            not isinstance(name, str)
            or not name
            or "." in name
            or name == "__base__"
            or hasattr(nn.ModuleDict, name)
        ):
            raise AdapterNameError(
                f"{name!r} cannot name an adapter: expected is a string without dots,"
                " which is neither '__base__' nor the name of a method of torch's"
                " ModuleDict"
            )
        if name in self.peft_config:
            raise AdapterNameError(
                f"there is an adapter {name!r} already; delete it first, or take"
                " another name"
            )
        model, config, places = (
            self.get_base_model(),
            copy.deepcopy(config),
            self._sites(),
        )
        config.base_model_name_or_path = (
            config.base_model_name_or_path
            or getattr(model, "name_or_path", None)
            or None
        )
        if self.peft_config and lora_init.changes_base(config):
            raise ConfigError(
                f"{config.init_lora_weights!r} changes the base, on which"
                f" {', '.join(self.peft_config)} stand: make it on a model without"
                " adapters, or load it converted to a plain LoRA"
            )
        chosen = config.select(model)
        copied = targets.resolve_targets(
            places,
            getattr(config, "modules_to_save", None) or (),
            "modules_to_save",
            targets.ends_with,
        )
        slots = {path: places[path][0] for path in [*chosen, *copied]}
        slots = {
            path: (
                module
                if isinstance(module, Slot)
                else Slot(module, self.base_model.active)
            )
            for path, module in slots.items()
        }
        bases = {path: Base(slots[path], name, lossy=True) for path in chosen}
        before = [
            (base.module, dict(base.module._parameters)) for base in bases.values()
        ]
        try:
            shared = config.create_shared(bases)
            like = device_and_dtype(bases[chosen[0]].module, autocast_adapter_dtype)
            parts = {} if shared is None else {None: shared.to(*like)}
            for path, base in targets.progress(list(bases.items()), "making adapters"):
                try:
                    parts[path] = config.create(base, path).to(
                        *device_and_dtype(base.module, autocast_adapter_dtype)
                    )
                except TargetError as error:
                    raise TargetError(f"{path}: {error}") from None
            for path in copied:
                if any(
                    isinstance(module, Slot)
                    for module in slots[path].base_layer.modules()
                ):
                    raise TargetError(f"modules_to_save: {path} holds adapters")
                parts[path] = ModuleCopy(slots[path].base_layer)
            if fill is not None:
                fill(parts)
        except BaseException:  # an initialisation may have changed weights
            for module, parameters in before:
                module._parameters.update(parameters)
            raise
        for path, slot in slots.items():
            slot.training = slot.base_layer.training
            slot.adapters[name] = parts[path].train(slot.training)
            if shared is not None:
                slot.shared[name] = self.shared[name] = shared
            if slot is not places[path][0]:
                places[path][1](slot)
        for part in parts.values():
            part.requires_grad_(False)
        self.peft_config[name] = config

    def add_adapter(self, adapter_name, peft_config, autocast_adapter_dtype=True):
        """One more adapter, inactive until `set_adapter`. Any method can stand beside
        any other."""
        self._add(adapter_name, peft_config, autocast_adapter_dtype)
        if not self.active_adapters:
            self.set_adapter(adapter_name)

    def set_adapter(self, adapter_name, inference_mode=False):
        """Activate one adapter, or a list: each is given those before it as its base.
        Only they are trained."""
        names = self._check_names(adapter_name)
        for path, slot, _ in self._slots():
            copies = [
                name
                for name in names
                if name in slot.adapters and isinstance(slot.adapters[name], ModuleCopy)
            ]
            if len(copies) > 1:
                raise AdapterNameError(
                    f"{copies} each have their own copy of {path} (modules_to_save):"
                    " one at a time"
                )
        self.base_model.active.names = names
        for name in self.peft_config:
            for part in self._adapters_by_path(name).values():
                part.requires_grad_(name in names and not inference_mode)

    def delete_adapter(self, adapter_name):
        self._check_names(adapter_name)
        active = self.base_model.active
        with merging.unmerged(self):
            for _, slot, put in self._slots():
                if adapter_name in slot.adapters:
                    del slot.adapters[adapter_name]
                    slot.shared.pop(adapter_name, None)
                    if put and not slot.adapters:
                        put(slot.base_layer)
            if adapter_name in self.shared:
                del self.shared[adapter_name]
            del self.peft_config[adapter_name]
            active.merged = [name for name in active.merged if name != adapter_name]
        rest = self.base_model.active.names = [
            name for name in self.active_adapters if name != adapter_name
        ]
        if not rest and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))
            warnings.warn(
                f"{adapter_name!r} was active; {self.active_adapter!r} is active now",
                stacklevel=2,
            )

    @contextmanager
    def disable_adapter(self):
        """Within it the model is the base, bit for bit."""
        active = self.base_model.active
        with merging.unmerged(self):
            before = active.enabled
            active.enabled = False
            try:
                yield
            finally:
                active.enabled = before

    # Merging.

    def merge_adapter(self, adapter_names=None, safe_merge=False, lossy=False):
        """Write adapters (the active ones) into the weights, all or nothing. A layer
        with a merged adapter ignores adapters that are only active, as in Hugging Face
        PEFT. `unmerge_adapter` puts back the old weights.

        safe_merge refuses results that are not finite. lossy allows 4-bit layers, whose
        weights are rounded once more: a warning says how much of the adapters' change
        that costs. Raises NotMergeableError.
        """
        names = self._to_merge(adapter_names)
        if names and all(name in self.merged_adapters for name in names):
            warnings.warn(
                f"already merged: {', '.join(names)}. Nothing to do", stacklevel=2
            )
        merging.merge(self, names, safe_merge, lossy)
        merging.warn_of_quant_error(self, stacklevel=3)

    def unmerge_adapter(self):
        """Put back the weights from before merging, bit for bit."""
        merging.unmerge(self)

    def merge_and_unload(
        self,
        progressbar=False,
        safe_merge=False,
        adapter_names=None,
        lossy=False,
        dequantize=False,
    ):
        """The plain model with adapters (the active ones) written into it. This
        PeftModel is empty afterwards.

        4-bit layers refuse, unless `dequantize` makes the whole model dense first, or
        `lossy` rounds the result again. Raises NotMergeableError.
        """
        names = self._to_merge(adapter_names)
        return merging.merge_and_unload(self, names, safe_merge, lossy, dequantize)

    def _to_merge(self, names):
        return self.active_adapters if names is None else self._check_names(names)

    def unload(self):
        """The plain model as it was before (after PiSSA or OLoRA: less what they took
        out of its weights). This PeftModel is empty afterwards."""
        merging.unmerge(self)
        return self._remove_slots()

    def _remove_slots(self):
        for _, slot, put in self._slots():
            slot.adapters.clear()
            if put:
                put(slot.base_layer)
        self.shared.clear()
        self.peft_config.clear()
        self.base_model.active.names = []
        self.base_model.active.merged = []
        hooks = getattr(self._embeddings(), "_forward_hooks", {})
        for key in [key for key, hook in hooks.items() if hook is _require_grad]:
            del hooks[key]
        return self.get_base_model()

    # Files and combinations.

    def save_pretrained(
        self,
        save_directory,
        selected_adapters=None,
        path_initial_model_for_weight_conversion=None,
    ):
        """Hugging Face PEFT's files: the adapter "default" in the folder itself, others
        in folders of their names.

        path_initial_model_for_weight_conversion: where a PiSSA or OLoRA was saved
        before training. It is then saved as a plain LoRA of twice the rank, for the
        base as it was before the initialisation changed it.
        """
        for name in (
            self.peft_config
            if selected_adapters is None
            else self._check_names(selected_adapters)
        ):
            config = copy.copy(self.peft_config[name])
            config.inference_mode = True
            folder = Path(save_directory) / ("" if name == "default" else name)
            tensors = saving.tensors(self._adapters_by_path(name))
            if path_initial_model_for_weight_conversion is not None:
                start = saving.load(path_initial_model_for_weight_conversion)[1]
                config, tensors = lora_init.as_lora(config, tensors, start)
            elif lora_init.changes_base(config):
                warnings.warn(
                    f"{name!r} began as {config.init_lora_weights!r}, which changed the"
                    " base: what is saved fits only a base that was changed likewise."
                    " For a plain LoRA, which fits the base from before, give"
                    " path_initial_model_for_weight_conversion",
                    stacklevel=2,
                )
            saving.save(folder, config, tensors)

    @classmethod
    def from_pretrained(
        cls,
        model,
        model_id,
        adapter_name="default",
        is_trainable=False,
        autocast_adapter_dtype=True,
    ):
        """`model` with the adapter in folder `model_id`, frozen and in eval mode unless
        is_trainable.

        Raises AdapterFileError, ConfigError or TargetError, and then leaves the model
        as it was.
        """
        config, fill = saving.adapter(model_id, model, is_trainable)
        return cls(model, config, adapter_name, autocast_adapter_dtype, fill).train(
            is_trainable and model.training
        )

    def load_adapter(
        self, model_id, adapter_name, is_trainable=False, autocast_adapter_dtype=True
    ):
        """One more adapter, from a folder; inactive until `set_adapter`, if another is
        active."""
        config, fill = saving.adapter(model_id, self.get_base_model(), is_trainable)
        self._add(adapter_name, config, autocast_adapter_dtype, fill)
        if not self.active_adapters:
            self.set_adapter(adapter_name, inference_mode=not is_trainable)
        if not is_trainable:
            self.eval()

    def add_weighted_adapter(
        self,
        adapters,
        weights,
        adapter_name,
        combination_type="svd",
        svd_rank=None,
        svd_clamp=None,
        svd_full_matrices=True,
        svd_driver=None,
        density=None,
        majority_sign_method="total",
    ):
        """A new LoRA from others, inactive until `set_adapter`. The ways are told in
        minipeft/weighted.py."""
        parts = [self._adapters_by_path(name) for name in self._check_names(adapters)]
        paths = [
            path for path, _, _ in self._slots() if any(path in part for part in parts)
        ]
        configs, svd = (
            [self.peft_config[name] for name in adapters],
            (svd_clamp, svd_full_matrices, svd_driver),
        )
        config, fill = weighted.plan(
            configs,
            parts,
            weights,
            paths,
            combination_type,
            svd_rank,
            svd,
            density,
            majority_sign_method,
        )
        self._add(adapter_name, config, fill=fill)

    # Counting, and what a trainer asks of a model.

    def get_nb_trainable_parameters(self):
        """(trainable, all). A packed 4-bit weight counts as the weights that it holds."""
        parameters = list(self.parameters())
        return sum(logical_numel(p) for p in parameters if p.requires_grad), sum(
            map(logical_numel, parameters)
        )

    def print_trainable_parameters(self):
        trainable, everything = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {everything:,d} || "
            f"trainable%: {100 * trainable / everything:.4f}"
        )

    def gradient_checkpointing_enable(self, *args, **kwargs):
        self.get_base_model().gradient_checkpointing_enable(*args, **kwargs)
        self.enable_input_require_grads()

    def enable_input_require_grads(self):
        """Reentrant checkpointing gives no gradients where no input asks for one, as
        behind a frozen embedding."""
        embeddings = self._embeddings()
        if (
            embeddings is not None
            and _require_grad not in embeddings._forward_hooks.values()
        ):
            embeddings.register_forward_hook(_require_grad)

    def _embeddings(self):
        try:
            return self.get_base_model().get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None

    # whatever else is asked of a model (config, device), the model answers
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _require_grad(module, args, output):
    output.requires_grad_(True)


def prepare_model_for_kbit_training(
    model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None
):
    """Ready a quantised model for training adapters, in place; returns it. Line by
    line:

    all is frozen; what is not quantised (norms, embeddings, the head) is held in 32
    bits from now on; activations are computed again in the backward pass rather than
    kept, for which a reentrant checkpoint needs an input with a gradient.
    """
    undo_bnb_cpu_repacking(model).requires_grad_(False)
    quantised = any(
        type(parameter).__name__ == "Params4bit" for parameter in model.parameters()
    )
    for parameter in model.parameters():
        if (
            parameter.dtype in (torch.float16, torch.bfloat16)
            and type(parameter).__name__ != "Params4bit"
        ):
            parameter.data = parameter.data.float()
    if quantised and use_gradient_checkpointing:
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
        )
    return model
