"""Floor 2: what a method is told. One dataclass a method, found by its peft_type, to
and from Hugging Face's JSON."""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from . import targets, weights
from .errors import TargetError

CONFIG = "adapter_config.json"
METHODS = {}  # peft_type -> its dataclass
# What Hugging Face's files may say without changing what an adapter computes, whatever
# the value.
IGNORED_FIELDS = {
    "peft_version",
    "auto_mapping",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "fan_in_fan_out",
}


class ConfigError(ValueError):
    """A configuration that means nothing, or something that this package does not have."""


class AdapterFileError(ValueError):
    """A file that is not an adapter, not a whole one, or not one for this model."""


def fits(value, kind):
    """Is `value` what an annotation such as `list[str] | None` says? Any collection
    does for a list, int for float."""
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inside)
    if origin is list:
        return isinstance(value, (list, tuple, set)) and all(
            fits(one, inside[0]) for one in value
        )
    if origin is dict and inside:
        return isinstance(value, dict) and all(
            fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items()
        )
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    return isinstance(value, origin) if isinstance(origin, type) else True


@dataclass(kw_only=True)
class PeftConfig:
    """The fields that every method has. A method's own dataclass adds its own, and says
    how to make its adapters.

    A subclass that sets `peft_type` is known from then on to
    `PeftConfig.from_pretrained`, and so to every loader.
    """

    peft_type: ClassVar[str] = ""
    # in training, each of its adapters adds its `penalty()` to the loss
    regularized: ClassVar[bool] = False
    # noted in files; nothing here depends on it, except SEQ_CLS's head
    task_type: str | None = None
    base_model_name_or_path: str | None = None  # noted in files
    revision: str | None = None  # noted in files
    inference_mode: bool = False  # loaded to be used, not trained

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "peft_type" in vars(cls):
            METHODS[cls.peft_type] = cls

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not fits(getattr(self, field.name), field.type):
                said = (
                    field.type.__name__ if isinstance(field.type, type) else field.type
                )
                raise ConfigError(
                    f"{field.name} = {getattr(self, field.name)!r}: expected is {said}"
                )

    def check_positive(self, *fields, **values):
        """ConfigError unless these fields, or values given by name, are positive
        integers."""
        for name, value in {
            **{field: getattr(self, field) for field in fields},
            **values,
        }.items():
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ConfigError(f"{name} = {value!r}: a positive integer is expected")

    def check_probability(self, *fields):
        for field in fields:
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(
                    f"{field} = {getattr(self, field)!r}: a probability in [0, 1) is"
                    " expected"
                )

    # What a method file fills in.

    def select(self, model):
        """The paths of the modules that get an adapter. "" is the whole model."""
        return [""]

    def create(self, base, path):
        """A new Adapter for the layer at `path`."""
        raise NotImplementedError

    def create_shared(self, bases):
        """An nn.Module that all adapters of this name share, from {path: Base}, or
        None."""

    def on_load(self):
        """This comes from a file: raise ConfigError where the adapter cannot be made
        again as it was."""

    def drop_missing_targets(self, model):
        """Forget targets that this model does not have: in a file meant for several
        architectures they do no harm."""

    # Files.

    def to_dict(self):
        """Hugging Face's JSON, without the fields that say nothing."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields = {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in fields.items()
        }
        return {"peft_type": self.peft_type} | {
            name: value for name, value in fields.items() if value is not None
        }

    @classmethod
    def from_dict(cls, data):
        """The configuration that Hugging Face's JSON describes. ConfigError where it
        asks for what we do not have."""
        data = dict(data)
        peft_type = data.pop("peft_type", None)
        if not isinstance(peft_type, str) or peft_type not in METHODS:
            near = difflib.get_close_matches(str(peft_type), METHODS, n=1)
            raise ConfigError(
                (
                    "no peft_type is given"
                    if peft_type is None
                    else f"unknown peft_type {peft_type!r}"
                )
                + (f" (nearest: {near[0]})" if near else "")
                + f"; known: {', '.join(METHODS)}"
            )
        method = METHODS[peft_type]
        known = {f.name for f in dataclasses.fields(method)}
        asked = {
            name: value
            for name, value in data.items()
            if name not in known | IGNORED_FIELDS and value
        }
        if asked:
            asked = ", ".join(f"{name}={value!r}" for name, value in asked.items())
            raise ConfigError(
                f"{method.__name__} has no {asked}: without it the adapter would"
                " compute something else"
            )
        return method(**{name: value for name, value in data.items() if name in known})

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG).write_text(
            json.dumps(self.to_dict(), indent=2, sort_keys=True)
        )

    @classmethod
    def from_pretrained(cls, folder):
        """From a folder's adapter_config.json. AdapterFileError where that is none,
        ConfigError where it asks for what we do not have."""
        file = Path(folder) / CONFIG
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AdapterFileError(f"{file} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise AdapterFileError(
                f"{file} holds a {type(data).__name__}, not an object with a peft_type"
            )
        try:
            return cls.from_dict(data)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{file}: {error}") from None


@dataclass(kw_only=True)
class LayerConfig(PeftConfig):
    """For methods that stand at layers inside the model.

    target_modules: names of modules ("q_proj"; the last parts of their paths), or one
    regular expression for whole paths, or "all-linear" (all but the output head). Every
    name must be found. exclude_modules: likewise, to leave out. modules_to_save:
    modules that are trained and saved whole. layers_to_transform, layers_pattern: only
    within the layers of these numbers, in the list of that name.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    # the first of which all are there
    default_targets: ClassVar[list] = [["q_proj", "v_proj"], ["c_attn"]]

    def __post_init__(self):
        super().__post_init__()
        if (
            isinstance(self.target_modules, str)
            and self.layers_to_transform is not None
        ):
            raise ConfigError(
                "layers_to_transform needs a list of target_modules; an expression can"
                " say it itself"
            )

    def select(self, model):
        # their heads are new: train them too
        if self.task_type in ("SEQ_CLS", "TOKEN_CLS"):
            heads = {path for path, *_ in targets.walk(model)} & {"classifier", "score"}
            self.modules_to_save = (
                sorted({*(self.modules_to_save or ()), *heads}) or None
            )
        modules = {
            path: targets.unwrap_slot(module)
            for path, _, _, module in targets.walk(model)
        }
        if self.target_modules is None:
            self.target_modules = self._usual(modules)
        if self.target_modules == "all-linear":
            head = (
                model.get_output_embeddings()
                if hasattr(model, "get_output_embeddings")
                else None
            )
            found = [
                path
                for path, m in modules.items()
                if weights.is_linear(m) and m is not targets.unwrap_slot(head)
            ]
            if not found:
                raise TargetError(
                    f"all-linear: this {type(model).__name__} has no linear layers"
                )
            self.target_modules = targets.shortest_names(modules, found)
        found = targets.resolve_targets(modules, self.target_modules)
        out = (
            targets.resolve_targets(modules, self.exclude_modules, "exclude_modules")
            if self.exclude_modules
            else []
        )
        saved = targets.resolve_targets(
            modules, self.modules_to_save or (), "modules_to_save", targets.ends_with
        )
        found = [
            path
            for path in found
            if path not in out
            and not any(f"{path}.".startswith(f"{s}.") for s in saved)
        ]
        if self.layers_to_transform is not None:
            found = [
                path
                for path in found
                if targets.in_layers(
                    path, self.layers_to_transform, self.layers_pattern
                )
            ]
        if not found:
            raise TargetError(
                f"nothing is left of target_modules={self.target_modules!r} after"
                " exclude_modules, modules_to_save and layers_to_transform"
            )
        return found

    def _usual(self, modules):
        for names in self.default_targets:
            if all(
                any(targets.matches_suffix(name, path) for path in modules)
                for name in names
            ):
                return list(names)
        linear = sorted(
            {
                path.rpartition(".")[2]
                for path in modules
                if weights.is_linear(modules[path])
            }
        )
        raise TargetError(
            "say target_modules: this model has none of the usual names. Its linear"
            " layers are named: " + ", ".join(linear)
        )

    def drop_missing_targets(self, model):
        paths = [path for path, *_ in targets.walk(model)]
        for field in ("target_modules", "feedforward_modules", "modules_to_save"):
            names = getattr(self, field, None)
            if isinstance(names, list):
                there = [
                    name
                    for name in names
                    if any(targets.ends_with(name, path) for path in paths)
                ]
                setattr(self, field, there or names)
