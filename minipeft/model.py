"""PeftModel: adds, activates, merges and saves named adapters.

What touches several layers at once is done for all of them or for none.
"""

import dataclasses
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from . import io, merging, saving, status, targets, weighted
from .adding import adding
from .config import as_config
from .errors import ConfigError, TargetError
from .hf_methods import HFMethods, task_arguments
from .io import brief, did_you_mean
from .methods.adalora import AdaLoraConfig
from .methods.modules_to_save import ModuleCopy
from .methods.rank_allocator import RankAllocator
from .recognized import recognize
from .slot import (
    ActiveAdapters,
    AdapterNameError,
    ModelSlot,
    RowAdapters,
    Slot,
    find_slots,
)
from .weights import logical_numel, undo_bnb_cpu_repacking

# what the base has and a PeftModel must not: it would work on slots and adapters
REFUSED = {
    "save_distributed_checkpoint": "save the base with its slots: call save_pretrained,"
    " which saves the adapters, or merge_and_unload first",
    **dict.fromkeys(
        ("init_weights", "initialize_weights"),
        "overwrite the adapters: call it on the base, before adapters are added",
    ),
}
# the arguments of `generate` that have one row for each text
GENERATED_FROM = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "input_features",
    "attention_mask",
)


def get_peft_model(
    model,
    peft_config,
    adapter_name="default",
    mixed=False,
    autocast_adapter_dtype=True,
    revision=None,
    low_cpu_mem_usage=False,
):
    """`model`, frozen, with a new adapter. Layers get their slots in place; `unload`
    takes them out again.

    peft_config: of this package, of Hugging Face PEFT, or a dict with peft_type.
    Adapters of a 16-bit model are kept in 32 bits, unless autocast_adapter_dtype is
    False. revision: of the base, noted in files. mixed and low_cpu_mem_usage have no
    effect: methods can always be mixed. Raises ConfigError, TargetError or
    AdapterNameError, and then leaves the model as it was.
    """
    if revision is not None:
        peft_config = dataclasses.replace(as_config(peft_config), revision=revision)
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)


WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel")


def check_model(model):
    """Raise TargetError for what is not a model, or has one inside: its own name would
    stand in the paths of files."""
    if not isinstance(model, nn.Module):
        raise TargetError(f"expected a model (an nn.Module), found {brief(model)}")
    kind = type(model).__name__
    if kind in WRAPPERS or isinstance(model, torch.jit.ScriptModule):
        raise TargetError(
            f"a {kind} holds the model: put adapters into the model itself, and then"
            " compile or wrap the PeftModel"
        )


class PeftModel(HFMethods):
    """A frozen model with named adapters. The names of its methods, and what they do,
    are Hugging Face PEFT's."""

    def __init__(
        self,
        model,
        peft_config,
        adapter_name="default",
        autocast_adapter_dtype=True,
        low_cpu_mem_usage=False,
        *,
        tensors=None,
    ):
        """tensors: {key: tensor} of the adapter's file, where it comes from one.
        low_cpu_mem_usage has no effect."""
        super().__init__()
        check_model(model)
        for module in model.modules():
            if isinstance(module, (Slot, PeftModel)):
                raise TargetError(
                    "this model has adapters already: use add_adapter on its PeftModel,"
                    " or unload it first; beside injected ones, inject_adapter_in_model"
                )
            if type(module).__module__.startswith("peft."):
                raise TargetError(
                    "this model has adapters of Hugging Face PEFT already: unload them"
                    f" first (found a {type(module).__name__})"
                )
        self.base_model = ModelSlot(model, ActiveAdapters())
        # what an adapter shares over its slots is owned here, and lent to them
        self.shared = nn.ModuleDict()
        self.peft_config = {}
        self._allocators = {}  # {name of an AdaLoRA: its RankAllocator}
        with adding(self, adapter_name, peft_config, autocast_adapter_dtype) as new:
            if tensors is not None:
                saving.load_tensors(new, tensors)
        undo_bnb_cpu_repacking(model).requires_grad_(False)
        self._task = self.peft_config[adapter_name].task_type
        frozen = self.peft_config[adapter_name].inference_mode
        self.set_adapter(adapter_name, inference_mode=frozen)
        self.training = model.training
        if targets.uses_grad_checkpointing(model):
            self.enable_input_require_grads()
        recognize(self, model)

    def _apply(self, fn, recurse=True):  # .to(), .half() ...
        with merging.unmerged(self):  # so that they reach the unmerged weights too
            return nn.Module._apply(self, fn, recurse)

    def forward(self, *args, adapter_names=None, **kwargs):
        """adapter_names: one name for each row of the batch, "__base__" for none.
        Without it, the active adapters. Calls from several threads run one after the
        other. Arguments by position stand in PEFT's order where the first adapter has a
        task_type."""
        base = self.get_base_model()
        args, kwargs = task_arguments(self._task, base.forward, args, kwargs)
        rows = self._rows(adapter_names, [*args, *kwargs.values()])
        with self.base_model.active.call(rows, self.base_model):
            output = self.base_model(*args, **kwargs)
        output = merging.guard_backward(self, output)
        has_loss = getattr(output, "loss", None) is not None
        if has_loss and self.training and self.base_model.active.enabled:
            for name in self.active_adapters:
                config = self.peft_config[name]
                if config.regularized:
                    adapters = self._adapters_by_path(name).values()
                    output.loss = output.loss + config.regularization_loss(adapters)
        return output

    def generate(self, *args, adapter_names=None, **kwargs):
        given = [kwargs[name] for name in GENERATED_FROM if name in kwargs]
        rows = self._rows(adapter_names, [*args[:1], *given])
        with self.base_model.active.call(rows, self.base_model):
            return self.base_model.generate(*args, **kwargs)

    def _rows(self, names, given):
        """RowAdapters, where there are names; the first tensor of `given` is the batch,
        which beam search repeats later."""
        if names is None:
            return None
        self._check_names(name for name in names if name != "__base__")
        sizes = (len(x) for x in given if torch.is_tensor(x) and x.dim())
        size = next(sizes, None)
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

    # ---- names ----

    def get_base_model(self):
        return self.base_model.base_layer

    @property
    def active_adapters(self):
        return list(self.base_model.active.names)

    @property
    def active_adapter(self):
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self):
        """The configuration of the active adapter, the first of several."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def merged_adapters(self):
        active = self.base_model.active
        return list(active.merged) if active.enabled else []

    def _slots(self):
        return find_slots(self.base_model)

    def _adapters_by_path(self, name):
        """{path: the adapter of that name there}; what they share has the path None."""
        parts = {None: self.shared[name]} if name in self.shared else {}
        return parts | {
            path: slot.adapters[name]
            for path, slot in self._slots().items()
            if name in slot.adapters
        }

    def _check_names(self, names):
        """A list of adapter names, given one or several."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.peft_config:
                known = ", ".join(map(repr, self.peft_config)) or "none"
                raise AdapterNameError(
                    f"there is no adapter {brief(name)}"
                    f"{did_you_mean(name, self.peft_config)}; there are: {known}"
                )
        return names

    def add_adapter(
        self,
        adapter_name,
        peft_config,
        low_cpu_mem_usage=False,
        autocast_adapter_dtype=True,
    ):
        """One more adapter, inactive until `set_adapter`. Any method can stand beside
        any other. low_cpu_mem_usage has no effect."""
        with adding(self, adapter_name, peft_config, autocast_adapter_dtype):
            pass
        if not self.active_adapters:
            self.set_adapter(adapter_name)

    def set_adapter(self, adapter_name, inference_mode=False):
        """Activate one adapter, or a list: each is given those before it as its base.
        Only they are trained."""
        names = self._check_names(adapter_name)
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise AdapterNameError(
                f"{twice[0]!r} is named twice in {brief(names)}: each adapter can be"
                " active once"
            )
        for path, slot in self._slots().items():
            copied = [n for n, a in slot.adapters.items() if isinstance(a, ModuleCopy)]
            copies = [name for name in names if name in copied]
            if len(copies) > 1:
                raise AdapterNameError(
                    f"{copies} each have their own copy of {path} (modules_to_save):"
                    " one at a time"
                )
        if self.merged_adapters:  # as in PEFT, which says the same
            warnings.warn(
                "Adapter cannot be set when the model is merged. Unmerging the model"
                " first.",
                stacklevel=2,
            )
            merging.unmerge(self)
        self._activate(names, inference_mode)

    def _activate(self, names, inference_mode=False):
        self.base_model.active.names = names
        slots = self._slots().values()
        for adapters in (self.shared, *(slot.adapters for slot in slots)):
            for name, adapter in adapters.items():
                adapter.requires_grad_(name in names and not inference_mode)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Train these adapters, or freeze them, whichever are active."""
        for name in self._check_names(adapter_names):
            for adapter in self._adapters_by_path(name).values():
                adapter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name):
        self._check_names(adapter_name)
        self._check_not_needed(adapter_name)
        active = self.base_model.active
        with merging.unmerged(self):
            for slot in self._slots().values():
                if adapter_name in slot.adapters:
                    del slot.adapters[adapter_name]
                slot.shared.pop(adapter_name, None)
            self._remove_empty_slots()
            if adapter_name in self.shared:
                del self.shared[adapter_name]
            del self.peft_config[adapter_name]
            self._allocators.pop(adapter_name, None)
            active.merged = [name for name in active.merged if name != adapter_name]
            active.names = [name for name in active.names if name != adapter_name]
            if not active.names and self.peft_config:
                self._activate([next(iter(self.peft_config))])
                warnings.warn(
                    f"{adapter_name!r} was active; {self.active_adapter!r} is active"
                    " now",
                    stacklevel=2,
                )

    def _check_not_needed(self, adapter_name):
        for name, config in self.peft_config.items():
            if adapter_name in config.needed_adapters():
                raise AdapterNameError(
                    f"{name!r} needs {adapter_name!r}: delete {name!r} first"
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

    # ---- merging ----

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

    def _remove_empty_slots(self):
        """Put the layers of slots without adapters back where these stand."""
        for _, parent, name, module in list(targets.walk(self.base_model)):
            if isinstance(module, Slot) and not module.adapters:
                setattr(parent, name, module.base_layer)

    def _remove_slots(self):
        for slot in self._slots().values():
            slot.adapters.clear()
        self._remove_empty_slots()
        self.shared.clear()
        self.peft_config.clear()
        self.base_model.active.names = []
        self.base_model.active.merged = []
        self._remove_grad_hook()
        return self.get_base_model()

    # ---- files and combinations ----

    def save_pretrained(
        self,
        save_directory,
        safe_serialization=True,
        selected_adapters=None,
        save_embedding_layers="auto",
        is_main_process=None,
        path_initial_model_for_weight_conversion=None,
        state_dict=None,
        save_function=None,
    ):
        """Hugging Face PEFT's files and a model card: the adapter "default" in the
        folder itself, others in folders of their names.

        save_embedding_layers: whether the base's embeddings are saved too; "auto": only
        where the vocabulary was resized. is_main_process: False writes nothing; None:
        the first of several processes writes. Call it in all of them where FSDP has
        sharded the model. state_dict: the whole model's, to be saved in place of the
        model's own values. save_function, such as accelerator.save, has no effect, as
        in PEFT: it would write a pickle, where safetensors are written.
        path_initial_model_for_weight_conversion: where a PiSSA or OLoRA was saved
        before training. It is then saved as a plain LoRA of twice the rank, for the
        base as it was before the initialisation changed it.
        Raises AdapterFileError, and then writes nothing of that adapter.
        """
        if not safe_serialization:
            raise ConfigError(
                "safe_serialization=False would write a pickle: adapters are saved as"
                " safetensors only"
            )
        if is_main_process is None:
            is_main_process = io.is_first_process()
        initial = path_initial_model_for_weight_conversion
        names = self.peft_config if selected_adapters is None else selected_adapters
        for name in self._check_names(names):
            if initial is None:
                saving.warn_of_changed_base(name, self.peft_config[name])
            content = saving.file_content(
                self, name, initial, state_dict, save_embedding_layers
            )
            if is_main_process:
                folder = Path(save_directory) / ("" if name == "default" else name)
                saving.save(folder, *content)

    def create_or_update_model_card(self, output_dir):
        """Write the first active adapter's model card. Where there is another's, say
        Trainer's, its metadata alone is updated."""
        config, tensors = saving.file_content(self, self.active_adapters[0])
        saving.write_card(output_dir, config, tensors)

    def push_to_hub(
        self, repo_id, commit_message=None, private=None, token=None, **more
    ):
        """Upload the adapters, as `save_pretrained` writes them, to a repository of the
        Hugging Face hub. more: arguments of HfApi.upload_folder (revision, create_pr),
        or of save_pretrained (selected_adapters). Returns the hub's CommitInfo."""
        return saving.push_to_hub(self, repo_id, commit_message, private, token, **more)

    @classmethod
    def from_pretrained(
        cls,
        model,
        model_id,
        adapter_name="default",
        is_trainable=False,
        config=None,
        autocast_adapter_dtype=True,
        **more,
    ):
        """`model` with the adapter in folder `model_id`, or of that name on the Hugging
        Face hub, frozen and in eval mode unless is_trainable.

        config: used in place of the folder's. more: revision, subfolder, token,
        cache_dir ...; torch_device, device_map and low_cpu_mem_usage have no effect:
        adapters are created beside the layers that they adapt.
        Raises AdapterFileError, ConfigError or TargetError, and then leaves the model
        as it was.
        """
        config, tensors, rows = saving.prepare_load(
            model_id, model, is_trainable, config, **more
        )
        loaded = cls(
            model, config, adapter_name, autocast_adapter_dtype, tensors=tensors
        )
        saving.write_rows(rows)
        return loaded.train(is_trainable and model.training)

    def load_adapter(
        self,
        model_id,
        adapter_name,
        is_trainable=False,
        torch_device=None,
        autocast_adapter_dtype=True,
        **more,
    ):
        """One more adapter, from a folder or the hub; inactive until `set_adapter`, if
        another is active. Arguments: see from_pretrained.

        An adapter of that name, if there is one with an equal configuration, takes the
        values of the file: its parameters stay those that an optimizer knows. Raises
        AdapterFileError where is_trainable asks for an encoder, which no file holds.
        """
        with merging.unmerged(self):
            config, tensors, rows = saving.prepare_load(
                model_id, self.get_base_model(), is_trainable, **more
            )
        if adapter_name in self.peft_config:
            self._reload(adapter_name, config, tensors, is_trainable)
        else:
            with adding(self, adapter_name, config, autocast_adapter_dtype) as new:
                saving.load_tensors(new, tensors)
        if rows:
            with merging.unmerged(self):
                saving.write_rows(rows)
        if not self.active_adapters:
            self.set_adapter(adapter_name, inference_mode=not is_trainable)
        if not is_trainable:
            self.eval()

    def _reload(self, name, config, tensors, is_trainable):
        """Load tensors into an adapter that is there."""
        self._check_not_merged(name)
        found = config.resolve(self.get_base_model())
        saving.check_same_config(name, self.peft_config[name], found)
        adapters = self._adapters_by_path(name)
        if is_trainable:
            saving.check_no_encoder(name, adapters)
        saving.load_tensors(adapters, tensors)

    def _check_not_merged(self, name):
        if name in self.merged_adapters:
            raise AdapterNameError(
                f"{name!r} is merged: call unmerge_adapter() before loading into it"
            )

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
        """A new LoRA from LoRAs, or IA3 from IA3s, inactive until `set_adapter`. See
        minipeft/weighted.py for the combination types."""
        names = self._check_names(adapters)
        by_path = [self._adapters_by_path(name) for name in names]
        combination = weighted.Combination(
            [self.peft_config[name] for name in names],
            by_path,
            weights,
            [path for path in self._slots() if any(path in a for a in by_path)],
            combination_type=combination_type,
            svd_rank=svd_rank,
            svd=(svd_clamp, svd_full_matrices, svd_driver),
            density=density,
            majority=majority_sign_method,
        )
        with adding(self, adapter_name, combination.config) as new:
            saving.load_tensors(new, combination.tensors())

    # ---- counting, and what a trainer asks of a model ----

    def get_nb_trainable_parameters(self):
        """(trainable, all). A packed 4-bit weight counts as the weights it holds."""
        counts = [(logical_numel(p), p.requires_grad) for p in self.parameters()]
        trainable = sum(count for count, is_trained in counts if is_trained)
        return trainable, sum(count for count, _ in counts)

    def print_trainable_parameters(self):
        """Print these two and the share in percent, in PEFT's words."""
        trainable, everything = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {everything:,d} || "
            f"trainable%: {100 * trainable / everything:.4f}"
        )

    def get_layer_status(self):
        """[LayerStatus] of each layer with adapters."""
        return status.get_layer_status(self)

    def get_model_status(self):
        """ModelStatus: counts, and what is active, merged and trained."""
        return status.get_model_status(self)

    def update_and_allocate(self, global_step):
        """AdaLoRA's budget after `global_step` steps, of each active AdaLoRA. Call it
        after optimizer.step() and before zero_grad(), for it reads the gradients."""
        for name in self.active_adapters:
            if isinstance(self.peft_config[name], AdaLoraConfig):
                if name not in self._allocators:
                    self._allocators[name] = RankAllocator(self, name)
                self._allocators[name].steps = global_step - 1
                self._allocators[name].step()

    def __getattr__(self, name):  # config, device ...: the base's
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        if name in REFUSED:
            raise AttributeError(f"{name} would {REFUSED[name]}")
        try:
            return getattr(self.base_model, name)
        except AttributeError:
            hint = "" if name.startswith("_") else did_you_mean(name, dir(self))
            raise AttributeError(
                f"neither {type(self).__name__} nor its base has an attribute"
                f" {name!r}{hint}"
            ) from None
