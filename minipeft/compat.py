"""Further names of Hugging Face PEFT, for scripts that were written for it. Each does
what PEFT's does; tests/test_peft_compat.py compares them."""

import enum
from dataclasses import dataclass

from . import saving
from .config import METHODS, PeftConfig, as_config
from .errors import ConfigError, TargetError
from .methods.prompt import INITS as PROMPT_INITS
from .model import PeftModel
from .peft_tables import TASK_HEADS

__all__ = [
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoftQConfig",
    "PeftType",
    "PromptTuningInit",
    "TaskType",
    "get_peft_config",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "set_peft_model_state_dict",
]
TaskType = enum.Enum("TaskType", {name: name for name in TASK_HEADS}, type=str)
PeftType = enum.Enum("PeftType", {name: name for name in METHODS}, type=str)
PromptTuningInit = enum.Enum(
    "PromptTuningInit", {name: name for name in PROMPT_INITS}, type=str
)
TaskType.__doc__ = "What a model is for; a configuration's task_type."
PeftType.__doc__ = "The methods; a configuration's peft_type."
PromptTuningInit.__doc__ = "Where the vectors of a prompt begin."


@dataclass
class LoftQConfig:
    """The settings of init_lora_weights="loftq", as an object in place of a dict."""

    loftq_bits: int = 4
    loftq_iter: int = 1


def get_peft_config(config_dict):
    """The configuration of a dict with peft_type. Raises ConfigError, or TypeError for
    fields that its method has not."""
    return as_config(dict(config_dict))


def adapted_model(model):
    """The PeftModel that has the adapters of `model`: itself, or the one that
    inject_adapter_in_model notes. Raises TargetError."""
    found = model if isinstance(model, PeftModel) else vars(model).get(INJECTED)
    if found is None:
        raise TargetError(
            f"{type(model).__name__}: expected a PeftModel, or a model with adapters by"
            " inject_adapter_in_model"
        )
    return found


# where a model notes the PeftModel of its injected adapters; not as a module, which
# would stand in its state_dict
INJECTED = "_injected_adapters"
PREFIX = "base_model.model."  # of keys; those of injected adapters have none


def get_peft_model_state_dict(model, state_dict=None, adapter_name="default"):
    """{key: tensor} of an adapter, with the keys that its file has. Those of an
    injected one begin with the model's own paths, as in PEFT."""
    adapted = adapted_model(model)
    adapters = adapted._adapters_by_path(*adapted._check_names(adapter_name))
    if state_dict is not None:
        adapters = saving.filled_copies(model, adapters, state_dict)
    state = saving.adapter_state_dict(adapters)
    if adapted is not model:
        state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    return state


def set_peft_model_state_dict(model, peft_model_state_dict, adapter_name="default"):
    """Give an adapter the values of {key: tensor}: all of them, or AdapterFileError and
    none. (PEFT reports missing and unexpected keys instead.)"""
    adapted = adapted_model(model)
    (name,) = adapted._check_names(adapter_name)
    adapted._check_not_merged(name)
    state = peft_model_state_dict
    if adapted is not model:
        state = {PREFIX + key.removeprefix(PREFIX): state[key] for key in state}
    saving.load_tensors(adapted._adapters_by_path(name), state)


def inject_adapter_in_model(peft_config, model, adapter_name="default"):
    """Put an adapter into `model`, in place, and return the model itself. One more, by
    another call, is active in place of those of the same method, as in PEFT. Raises
    ConfigError for methods that stand around the model or share parts over layers."""
    config = as_config(peft_config)
    before = vars(model).get(INJECTED)
    adapted = before or PeftModel(model, config, adapter_name)
    if before:
        adapted.add_adapter(adapter_name, config)
    if adapter_name in {**adapted.shared, **adapted.base_model.adapters}:
        adapted.delete_adapter(adapter_name) if before else adapted.unload()
        raise ConfigError(
            f"a {type(config).__name__} does not live in layers alone: use"
            " get_peft_model"
        )
    others = [
        name
        for name in adapted.active_adapters
        if adapted.peft_config[name].peft_type != config.peft_type
    ]
    adapted.set_adapter([*others, adapter_name], config.inference_mode)
    vars(model)[INJECTED] = adapted
    return model


def load_peft_weights(model_id, device="cpu", **more):
    """{key: tensor} of the adapter in folder `model_id`, or of that name on the hub."""
    tensors = saving.load(model_id, **more)[1]
    return {key: tensor.to(device) for key, tensor in tensors.items()}


class BaseAutoPeftModel:
    """Loads an adapter together with its base, by transformers."""

    task_type = None
    base_class = None  # the name of transformers' class

    @classmethod
    def from_pretrained(
        cls, model_id, adapter_name="default", is_trainable=False, config=None, **more
    ):
        """The PeftModel of the adapter in folder `model_id`, or of that name on the
        hub, on the base that its configuration names. more: arguments of the
        from_pretrained of transformers' class, such as dtype, and of
        PeftModel.from_pretrained, such as subfolder or revision of the adapter. Raises
        ConfigError for an adapter of another task."""
        import transformers

        hub = {name: more.pop(name) for name in saving.HUB if name in more}
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub)
        config = as_config(config)
        if config.task_type not in (None, cls.task_type):
            raise ConfigError(
                f"{model_id} is an adapter for {config.task_type}, {cls.__name__} for"
                f" {cls.task_type}"
            )
        if not config.base_model_name_or_path:
            raise TargetError(
                f"{model_id} does not say which base it is for: load that, and call"
                " PeftModel.from_pretrained(base, ...)"
            )
        if "token" in hub:
            more["token"] = hub["token"]
        base = getattr(transformers, cls.base_class).from_pretrained(
            config.base_model_name_or_path, revision=config.revision, **more
        )
        return PeftModel.from_pretrained(
            base, model_id, adapter_name, is_trainable, config, **hub
        )


class AutoPeftModelForCausalLM(BaseAutoPeftModel):
    """An adapter on a transformers.AutoModelForCausalLM."""

    task_type = "CAUSAL_LM"
    base_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(BaseAutoPeftModel):
    """An adapter on a transformers.AutoModelForSeq2SeqLM."""

    task_type = "SEQ_2_SEQ_LM"
    base_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(BaseAutoPeftModel):
    """An adapter on a transformers.AutoModelForSequenceClassification."""

    task_type = "SEQ_CLS"
    base_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(BaseAutoPeftModel):
    """An adapter on a transformers.AutoModelForTokenClassification."""

    task_type = "TOKEN_CLS"
    base_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(BaseAutoPeftModel):
    """An adapter on a transformers.AutoModelForQuestionAnswering."""

    task_type = "QUESTION_ANS"
    base_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(BaseAutoPeftModel):
    """An adapter on a transformers.AutoModel."""

    task_type = "FEATURE_EXTRACTION"
    base_class = "AutoModel"
