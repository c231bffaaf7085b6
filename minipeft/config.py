"""Configurations: one dataclass per method, found by its peft_type, to and from Hugging
Face's JSON."""

import copy
import dataclasses
import enum
import json
import types
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from . import io, targets, weights
from .errors import AdapterFileError, ConfigError, TargetError
from .peft_tables import LORA_TARGETS, NOTES, NOTHING, TASK_HEADS, UNSUPPORTED

CONFIG = "adapter_config.json"
METHODS = {}  # peft_type: its dataclass; PeftConfig.__init_subclass__ fills it


class ConfigType(type):
    """Lets configurations be called with all of Hugging Face PEFT's arguments: those
    that are not built here are dropped where they ask for nothing, and those without
    effect with a warning."""

    def __call__(cls, *args, **kwargs):
        config = super().__call__(*args, **cls.known_fields(kwargs))
        for name, default in cls.without_effect(vars(config)).items():
            owner, value = cls.belongs_to[name]
            warnings.warn(
                f"{name} is ignored: it belongs to {owner}={value!r}", stacklevel=2
            )
            setattr(config, name, default)
        return config


@dataclass(kw_only=True)
class PeftConfig(metaclass=ConfigType):
    """The fields of every method. A method's own dataclass adds its fields, and creates
    its adapters.

    A subclass that sets `peft_type` is known from then on to
    `PeftConfig.from_pretrained`, and so to every loader.
    """

    peft_type: ClassVar[str] = ""
    # True: in training, `regularization_loss(adapters)` is added to the model's loss
    regularized: ClassVar[bool] = False
    # True for an adapter that is loaded: what a start needs is not looked up
    from_checkpoint: ClassVar[bool] = False
    is_prompt_learning: ClassVar[bool] = False  # PEFT's word for virtual tokens
    # {field: (another, the value of that without which the field has no effect)}
    belongs_to: ClassVar[dict] = {}
    # one of TASK_HEADS; the new head of a classifier is trained and saved whole
    task_type: str | None = None
    base_model_name_or_path: str | None = None  # noted in files
    revision: str | None = None  # noted in files
    inference_mode: bool = False  # loaded to be used, not trained

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "peft_type" not in vars(cls):
            return
        known = METHODS.get(cls.peft_type)
        if is_built_in(known) and not is_built_in(cls):
            raise ConfigError(
                f"peft_type {cls.peft_type!r} is that of {known.__name__}, which every"
                f" loader knows by it. Take another name, such as 'MY_{cls.peft_type}'"
            )
        METHODS[cls.peft_type] = cls

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, enum.Enum):  # such as TaskType.CAUSAL_LM
                value = value.value
            if dataclasses.is_dataclass(value):  # such as LoftQConfig
                value = dataclasses.asdict(value)
            setattr(self, field.name, value)
            if not matches_type(value, field.type):
                is_plain = typing.get_origin(field.type) is None
                expected = field.type.__name__ if is_plain else field.type
                if isinstance(value, (int, float)) and not io.is_finite(value):
                    expected = f"{expected}, finite and below 1e308"
                raise ConfigError(
                    f"{field.name} = {io.brief(value)}: expected {expected}"
                )
        self.check_choice("task_type", (None, *TASK_HEADS))

    # ---- checks of fields: ConfigError names the field, its value, what is valid ----

    def check_choice(self, field, valid):
        io.check_choice(field, getattr(self, field), valid, ConfigError)

    def check_number(self, field, **bounds):
        """bounds: as in io.check_number."""
        io.check_number(field, getattr(self, field), **bounds, error=ConfigError)

    def check_positive(self, *fields, **values):
        """ConfigError unless these fields, or values given by name, are positive
        integers."""
        values = {field: getattr(self, field) for field in fields} | values
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ConfigError(
                    f"{name} = {io.brief(value)}: expected a positive integer"
                )

    def pattern(self, field):
        """{"rank_pattern['q_proj']": 4, ...}: a pattern's values, as errors name
        them."""
        return {f"{field}[{k!r}]": v for k, v in getattr(self, field).items()}

    def check_probability(self, *fields):
        for field in fields:
            value = getattr(self, field)
            if not 0 <= value < 1:
                raise ConfigError(f"{field} = {value!r}: expected a number in [0, 1)")

    # ---- what a method fills in ----

    def resolve(self, model):
        """A copy for `model`, with the fields that were left open filled in."""
        return copy.deepcopy(self)

    def select(self, model):
        """The paths of the modules that get an adapter, for a resolved configuration.
        "" is the whole model."""
        return [""]

    def copied_modules(self, paths):
        """Those of `paths` that modules_to_save means: trained and saved whole, with
        all that is inside them."""
        names = getattr(self, "modules_to_save", None) or ()
        found = targets.resolve_targets(
            paths, names, "modules_to_save", targets.ends_with
        )
        inside = tuple(f"{path}." for path in found)
        return [path for path in found if not path.startswith(inside)]

    def needed_adapters(self):
        """The names of other adapters without which this one cannot run."""
        return []

    def create(self, base, path):
        """A new Adapter for the layer at `path`."""
        raise NotImplementedError

    def create_shared(self, bases):
        """An nn.Module that all adapters of this name share, from {path: Base}, or
        None."""

    def noted(self, adapters):
        """This configuration, or a copy that notes what a file has to say about the
        adapters just created."""
        return self

    def regularization_loss(self, adapters):
        """From all adapters of this name."""
        raise NotImplementedError

    def on_load(self):
        """Called on a configuration from a file. Raises ConfigError where the adapter
        cannot be created again as it was."""

    def drop_missing_targets(self, model):
        """Called on a configuration from a file: forget names that this model does not
        have, as PEFT does."""

    # ---- files ----

    def to_dict(self):
        """Hugging Face's JSON, without the fields that are None."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data = {"peft_type": self.peft_type}
        for name, value in fields.items():
            if value is not None:
                data[name] = sorted(value) if isinstance(value, set) else value
        return data

    @classmethod
    def from_dict(cls, data):
        """The configuration that Hugging Face's JSON describes. Raises ConfigError
        where it asks for what is not built here."""
        data = dict(data)
        method = method_of(data.pop("peft_type", None))
        names = {field.name for field in dataclasses.fields(method)}
        data = {k: v for k, v in data.items() if k in names or k not in NOTES}
        return method(**method.from_file_fields(data))

    @classmethod
    def from_file_fields(cls, data):
        """The fields of a file, as this class takes them. Fields that this package has
        never heard of are dropped where they are empty."""
        for field in dataclasses.fields(cls):
            is_switch = matches_type(False, field.type)
            if is_switch and data.get(field.name, True) is None:  # as PEFT reads it
                data = data | {field.name: False}
        ignored = cls.without_effect(data)  # PEFT notes them all the same
        data = {k: v for k, v in data.items() if k not in ignored}
        names = {field.name for field in dataclasses.fields(cls)} | UNSUPPORTED.keys()
        asked = {k: v for k, v in data.items() if k not in names and v}
        if asked:
            asked = ", ".join(f"{name}={io.brief(v)}" for name, v in asked.items())
            raise ConfigError(
                f"{cls.__name__} has no {asked}: without it the adapter would compute"
                " something else"
            )
        return {name: value for name, value in data.items() if name in names}

    @classmethod
    def known_fields(cls, given):
        """`given` without PEFT's fields that ask for nothing. Raises ConfigError for
        those that ask for what is not built, TypeError for names that PEFT has not."""
        names = {field.name for field in dataclasses.fields(cls)}
        own_type = [("peft_type", None), ("peft_type", cls.peft_type)]
        known = {}
        for name, value in given.items():
            if name in names:
                known[name] = value
            elif name in UNSUPPORTED:
                if not asks_for_nothing(value, NOTHING.get(name)):
                    raise ConfigError(
                        f"{cls.__name__} has no {name}={io.brief(value)}:"
                        f" {UNSUPPORTED[name]}"
                    )
            elif name != "peft_version" and (name, value) not in own_type:
                raise TypeError(
                    f"{cls.__name__} has no field {name!r}"
                    f"{io.did_you_mean(name, names)}; its fields are"
                    f" {', '.join(sorted(names))}"
                )
        return known

    @classmethod
    def without_effect(cls, given):
        """{field: its default} of those fields that are given, but belong to a value
        that another field does not have."""
        defaults = {field.name: default_of(field) for field in dataclasses.fields(cls)}
        return {
            name: defaults[name]
            for name, (owner, value) in cls.belongs_to.items()
            if given.get(name, defaults[name]) != defaults[name]
            and given.get(owner, defaults[owner]) != value
        }

    def save_pretrained(self, folder):
        folder = io.make_folder(folder, AdapterFileError)
        io.write_json(folder / CONFIG, self.to_dict(), sort_keys=True)

    @classmethod
    def from_pretrained(cls, folder, subfolder=None, **hub):
        """From the adapter_config.json of a folder, or of an adapter on the Hugging
        Face hub (hub: revision, token, cache_dir ...). Raises AdapterFileError where it
        is not one, ConfigError where it asks for what is not built here."""
        file = resolve_folder(folder, [CONFIG], subfolder, **hub) / CONFIG
        data = io.read_json(file, object, AdapterFileError)
        if not isinstance(data, dict):
            raise AdapterFileError(
                f"{file} holds a {type(data).__name__}; expected an object with a"
                " peft_type"
            )
        try:
            return cls.from_dict(data)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{file}: {error}") from None


def is_built_in(method):
    return getattr(method, "__module__", "").startswith(f"{__package__}.")


def check_for_json(config):
    """Raise ConfigError for a field that adapter_config.json could not hold."""
    for name, value in config.to_dict().items():
        try:
            json.dumps(value, sort_keys=True)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{type(config).__name__}.{name} = {io.brief(value)}: expected what"
                " JSON holds (numbers, text, lists and dicts of them), or the adapter"
                " could not be saved"
            ) from None


def default_of(field):
    """The value that a dataclass gives to a field of its own accord."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def matches_type(value, kind):
    """True where `value` is what an annotation such as `list[str] | None` allows: any
    collection for a list, a finite int for a float."""
    origin = typing.get_origin(kind) or kind
    inside = typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(matches_type(value, one) for one in inside)
    if origin is list:
        is_list = isinstance(value, (list, tuple, set))
        return is_list and all(matches_type(one, inside[0]) for one in value)
    if origin is dict and inside:
        return isinstance(value, dict) and all(
            matches_type(k, inside[0]) and matches_type(v, inside[1])
            for k, v in value.items()
        )
    if origin in (int, float):
        number = isinstance(value, (int, origin)) and not isinstance(value, bool)
        return number and io.is_finite(value)
    return isinstance(value, origin) if isinstance(origin, type) else True


def asks_for_nothing(value, nothing):
    """True for a default value, an empty one, or a record of such values."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return not any(value.values())
    return not value or value == nothing


def method_of(peft_type):
    """The dataclass of a peft_type. Raises ConfigError where there is none."""
    if isinstance(peft_type, str) and peft_type in METHODS:
        return METHODS[peft_type]
    problem = f"unknown peft_type {io.brief(peft_type)}"
    if peft_type is None:
        problem = "no peft_type"
    raise ConfigError(
        f"{problem}{io.did_you_mean(peft_type, METHODS)}; expected one of"
        f" {', '.join(METHODS)}"
    )


def as_config(config):
    """A configuration of this package, from one of Hugging Face PEFT's or its dict."""
    if isinstance(config, PeftConfig):
        if type(config).create is PeftConfig.create:
            raise ConfigError(
                f"{type(config).__name__} is not a method: expected one of"
                f" {', '.join(cls.__name__ for cls in METHODS.values())}"
            )
        return config
    is_object = not isinstance(config, type)
    if is_object and hasattr(config, "peft_type") and hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, dict):
        fields = dict(config)
        return method_of(fields.pop("peft_type", None))(**fields)
    raise ConfigError(
        f"expected a configuration such as LoraConfig(), found {io.brief(config)}"
    )


def resolve_folder(folder, files, subfolder=None, **hub):
    """The folder itself, or a local copy of `files` of the adapter of that name on the
    Hugging Face hub."""
    path = Path(folder) / (subfolder or "")
    if (path / CONFIG).exists():
        return path
    if path.is_dir():
        inside = ", ".join(sorted(p.parent.name for p in path.glob(f"*/{CONFIG}")))
        raise AdapterFileError(
            f"{path} has no {CONFIG}"
            + (f"; folders in it that do: {inside}" if inside else "")
        )
    if str(folder).count("/") != 1 or Path(folder).is_absolute():
        raise AdapterFileError(f"there is no folder {path}")
    from huggingface_hub import snapshot_download

    within = f"{subfolder}/" if subfolder else ""
    try:
        copied = snapshot_download(
            str(folder), allow_patterns=[within + file for file in files], **hub
        )
    except Exception as error:
        raise AdapterFileError(
            f"there is no folder {path}, and the hub gave none of that name: {error}"
        ) from None
    return Path(copied) / (subfolder or "")


@dataclass(kw_only=True)
class LayerConfig(PeftConfig):
    """For methods whose adapters stand at layers inside the model.

    target_modules: names of modules ("q_proj"; the last parts of their paths), or one
    regular expression for whole paths, or "all-linear" (all but the output head). Every
    name must be found. None: Hugging Face PEFT's default for this kind of model.
    exclude_modules: likewise, to leave out. modules_to_save: modules that are trained
    and saved whole. layers_to_transform, layers_pattern: only within the layers of
    these numbers, in the list of that name.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    # {config.model_type: target_modules}
    default_targets: ClassVar[dict] = LORA_TARGETS

    def __post_init__(self):
        super().__post_init__()
        for field in ("layers_to_transform", "layers_pattern"):
            given = getattr(self, field)
            if isinstance(self.target_modules, str) and given not in (None, []):
                raise ConfigError(
                    f"{field} needs a list of target_modules; a regular expression can"
                    " name layers itself"
                )
        if self.layers_pattern and self.layers_to_transform in (None, []):
            raise ConfigError(
                f"layers_pattern = {io.brief(self.layers_pattern)} has no effect"
                " without layers_to_transform, the numbers of the layers"
            )

    def resolve(self, model):
        config = copy.deepcopy(self)
        modules = targets.modules_by_path(model)
        heads = TASK_HEADS.get(self.task_type, ())
        heads = {n for n in heads if targets.is_found(n, modules, targets.ends_with)}
        if heads:
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads})
        if config.target_modules is None:
            config.target_modules = config.usual_targets(model, modules)
        if config.target_modules == "all-linear":
            config.target_modules = all_linear(model, modules)
        return config

    def usual_targets(self, model, modules):
        """target_modules where none are given: PEFT's own for this kind of model."""
        kind = known_kind(self.default_targets, model, modules)
        if kind is None:
            linear = targets.paths_of(modules, weights.is_linear)
            linear = {path.rpartition(".")[2] for path in linear}
            raise TargetError(
                f"say target_modules: there is no default for {model_type(model)}. Its"
                f" linear layers are named: {', '.join(sorted(linear))}"
            )
        names = self.default_targets[kind]
        if isinstance(names, str):
            return names
        return [name for name in names if targets.is_found(name, modules)]

    def select(self, model):
        modules = targets.modules_by_path(model)
        found = targets.resolve_targets(modules, self.target_modules)
        for field in ("rank_pattern", "alpha_pattern"):
            if unused := self.unused_patterns(field, found):
                raise TargetError(targets.missing_message(found, unused, field))
        excluded = []
        if self.exclude_modules:
            excluded = targets.resolve_targets(
                modules, self.exclude_modules, "exclude_modules"
            )
            if not set(excluded) & set(found) and not self.from_checkpoint:
                warnings.warn(
                    f"exclude_modules = {io.brief(self.exclude_modules)} excludes"
                    " nothing: no target is called so (a name does not stand for what"
                    " is inside that module)",
                    stacklevel=7,
                )
        inside = tuple(f"{path}." for path in self.copied_modules(modules))
        found = [
            path
            for path in found
            if path not in excluded and not f"{path}.".startswith(inside)
        ]
        if self.layers_to_transform not in (None, []):
            found = self.in_chosen_layers(found)
        if not found:
            raise TargetError(
                f"nothing is left of target_modules={io.brief(self.target_modules)}"
                " after exclude_modules, modules_to_save and layers_to_transform"
            )
        return found

    def in_chosen_layers(self, found):
        """Those of layers_to_transform, and those that are named by whole paths."""
        names = self.layers_pattern or ()
        for name in [names] if isinstance(names, str) else names:
            targets.fullmatch_all(rf"(?:^|.*?\.){name}\.\d+\..*", found)  # or it hangs
        whole = [path for path in found if path in self.target_modules]
        number = {p: targets.layer_index(p, names) for p in found if p not in whole}
        wanted = self.layers_to_transform
        wanted = [wanted] if isinstance(wanted, int) else wanted
        there = sorted({index for index in number.values() if index is not None})
        missing = [index for index in wanted if index not in there]
        if missing and there and (whole or not set(missing) >= set(wanted)):
            raise TargetError(
                f"layers_to_transform: no target is in layer"
                f" {', '.join(map(str, missing))}; there are targets in"
                f" {', '.join(map(str, there))}"
            )
        return [path for path in found if path in whole or number[path] in wanted]

    def unused_patterns(self, field, found):
        """The keys of rank_pattern or alpha_pattern that match no target."""
        pattern = getattr(self, field, None) or {}
        # AdaLoRA notes lists there, not numbers
        keys = [k for k, v in pattern.items() if isinstance(v, (int, float))]
        return [
            key
            for key in keys
            if not targets.fullmatch_all(targets.suffix_regex(key), found)
        ]

    def drop_missing_targets(self, model):
        paths = list(targets.modules_by_path(model))
        for field, matches in (
            ("target_modules", targets.matches_suffix),
            ("exclude_modules", targets.matches_suffix),
            ("feedforward_modules", targets.ends_with),
            ("modules_to_save", targets.ends_with),
        ):
            names = getattr(self, field, None)
            if isinstance(names, (list, tuple, set)):
                there = [n for n in names if targets.is_found(n, paths, matches)]
                optional = field in ("exclude_modules", "modules_to_save")
                setattr(self, field, there or (None if optional else names))
        excluded = self.exclude_modules
        if isinstance(excluded, str) and not targets.fullmatch_all(excluded, paths):
            self.exclude_modules = None
        if self.target_modules not in (None, "all-linear"):
            found = targets.find_targets(paths, self.target_modules)
            for field in ("rank_pattern", "alpha_pattern"):
                for key in self.unused_patterns(field, found):
                    del getattr(self, field)[key]


def model_type(model):
    """A model's config.model_type, or its class's name."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) or type(model).__name__


def known_kind(table, model, modules):
    """The key of `table` for a model: its model_type, or "llama", whose names our own
    GPT has whatever its model_type. None where `table` knows neither."""
    kind = model_type(model)
    for key in (kind, "llama") if kind in table else ():
        names = table[key]
        if isinstance(names, str):
            return key
        if any(targets.is_found(name, modules) for name in names):
            return key
    return None


def paths_of_experts(modules):
    """The last parts of the paths of modules with bare parameters (experts, d_out,
    d_in)."""
    found = {}
    for path, module in modules.items():
        own = module.parameters(recurse=False)
        stacked = any(p.dim() == 3 and len(p) > 1 for p in own)
        if stacked and not hasattr(module, "kernel_size"):  # not a convolution
            found[path.rpartition(".")[2]] = None
    return list(found)


def all_linear(model, modules):
    """Names for all linear layers but the output head, and what Mamba only reads."""
    _, head = targets.embeddings(model)
    linear = targets.paths_of(modules, weights.is_linear)
    read = targets.only_read(modules)
    found = [p for p in linear if modules[p] is not head and p not in read]
    if not found:
        raise TargetError(
            f"all-linear: this {type(model).__name__} has no linear layers"
        )
    if experts := paths_of_experts(modules):
        warnings.warn(
            f"all-linear: no adapter for {', '.join(experts)}, whose weights are bare"
            " parameters, not linear layers, nor for a router of that kind. Hugging"
            " Face PEFT adapts them, with target_parameters",
            stacklevel=7,
        )
    return targets.shortest_names(modules, found)
