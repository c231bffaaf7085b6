"""The tables of PEFT's default targets and fields are those of the installed PEFT."""

import dataclasses
import inspect

import peft
import peft.utils.constants as theirs
import pytest
import torch
import transformers

import minipeft
from minipeft import ConfigError, TargetError, get_peft_model, peft_tables

SHARED = {  # classes that both packages have: fields without a default
    "LoraConfig": {},
    "AdaLoraConfig": {"total_step": 10},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "VeraConfig": {},
    "IA3Config": {},
    "LNTuningConfig": {},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
}
TINY = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
OTHER_SIZES = {
    "OPT": dict(ffn_dim=24, word_embed_proj_dim=16),
    "GPT2": dict(n_embd=16, n_layer=2, n_head=4, n_positions=32),
    "Bloom": dict(n_layer=2, n_head=4),
    "Falcon": dict(new_decoder_architecture=False, multi_query=False),
}
FAMILIES = (
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Gemma2",
    "Phi",
    "OPT",
    "GPT2",
    "GPTNeoX",
    "Bloom",
    "Falcon",
)


def tiny(family):
    torch.manual_seed(0)
    sizes = TINY | OTHER_SIZES.get(family, {})
    if family == "Falcon":
        del sizes["head_dim"]
    config = getattr(transformers, f"{family}Config")(**sizes)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return getattr(transformers, name)(config)


class TestDefaultTargets:
    @pytest.mark.parametrize(
        "ours, method",
        [
            ("LORA_TARGETS", "LORA_TARGET"),
            ("LORA_TARGETS", "LOHA_TARGET"),
            ("LORA_TARGETS", "LOKR_TARGET"),
            ("VERA_TARGETS", "VERA_TARGET"),
            ("ADALORA_TARGETS", "ADALORA_TARGET"),
            ("IA3_TARGETS", "IA3_TARGET"),
            ("IA3_FEEDFORWARD", "IA3_FEEDFORWARD"),
            ("LN_TUNING_TARGETS", "LNTUNING_TARGET"),
        ],
    )
    def test_tables_are_those_of_peft(self, ours, method):
        table = f"TRANSFORMERS_MODELS_TO_{method}_MODULES_MAPPING"
        assert getattr(peft_tables, ours) == getattr(theirs, table)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize(
        "name", ["LoraConfig", "AdaLoraConfig", "VeraConfig", "IA3Config"]
    )
    def test_the_same_layers_are_adapted(self, name, family):
        self.compare(name, family)

    @pytest.mark.parametrize("family", ["Phi", "Qwen2", "Bloom", "Gemma2", "OPT"])
    @pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig", "LNTuningConfig"])
    def test_the_same_layers_for_further_methods(self, name, family):
        self.compare(name, family)

    def compare(self, name, family):
        extra = SHARED[name]
        try:
            model = peft.get_peft_model(tiny(family), getattr(peft, name)(**extra))
        except ValueError:
            if name == "LNTuningConfig":  # ours: every norm, where PEFT has no default
                return
            with pytest.raises((TargetError, ConfigError)):
                get_peft_model(tiny(family), getattr(minipeft, name)(**extra))
            return
        layer = peft.tuners.tuners_utils.BaseTunerLayer
        wanted = {
            path.removeprefix("base_model.model.")
            for path, module in model.named_modules()
            if isinstance(module, layer)
        }
        ours = get_peft_model(tiny(family), getattr(minipeft, name)(**extra))
        assert {path for path in ours._slots() if path} == wanted
        if name == "IA3Config":
            scaled = [m for m in model.modules() if getattr(m, "is_feedforward", False)]
            adapters = ours._adapters_by_path("default").values()
            assert sum(a.feedforward for a in adapters) == len(scaled)

    def test_an_unknown_architecture_is_refused(self):
        for family in ("Olmo", "Cohere", "Starcoder2"):
            with pytest.raises(TargetError, match=f"no default for {family.lower()}"):
                get_peft_model(tiny(family), minipeft.LoraConfig())


SMALL = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    pad_token_id=0,
)
T5 = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
BART = dict(
    vocab_size=40,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
)


class TestEncoders:
    @pytest.mark.parametrize("name", ["LoraConfig", "IA3Config", "AdaLoraConfig"])
    @pytest.mark.parametrize(
        "kind, sizes, task",
        [
            ("BertForSequenceClassification", SMALL, "SEQ_CLS"),
            ("BertForQuestionAnswering", SMALL, "QUESTION_ANS"),
            ("RobertaForSequenceClassification", SMALL, "SEQ_CLS"),
            ("RobertaForTokenClassification", SMALL, "TOKEN_CLS"),
            ("DebertaV2ForSequenceClassification", SMALL, "SEQ_CLS"),
            ("T5ForConditionalGeneration", T5, "SEQ_2_SEQ_LM"),
            ("BartForConditionalGeneration", BART, "SEQ_2_SEQ_LM"),
        ],
    )
    def test_layers_and_heads_are_those_of_peft(self, kind, sizes, task, name):
        kind = getattr(transformers, kind)
        fields = SHARED[name] | {"task_type": task}
        counts = []
        for package in (peft, minipeft):
            config = getattr(package, name)(**fields)
            model = package.get_peft_model(kind(kind.config_class(**sizes)), config)
            counts.append(model.get_nb_trainable_parameters()[0])
        assert counts[0] == counts[1]


class TestFields:
    @pytest.mark.parametrize("name", SHARED)
    def test_every_default_of_peft_is_accepted(self, name):
        fields = {}
        for field in dataclasses.fields(getattr(peft, name)):
            if field.default is not dataclasses.MISSING:
                fields[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                fields[field.name] = field.default_factory()
        for field, value in fields.items():  # one at a time, and all together
            getattr(minipeft, name)(**{field: value} | SHARED[name])
        getattr(minipeft, name)(**fields | SHARED[name])

    @pytest.mark.parametrize("name", SHARED)
    def test_every_field_of_peft_is_known_or_refused_by_name(self, name):
        theirs = {field.name for field in dataclasses.fields(getattr(peft, name))}
        ours = {field.name for field in dataclasses.fields(getattr(minipeft, name))}
        for field in theirs - ours - {"peft_type", "peft_version"}:
            with pytest.raises(ConfigError, match=f"{name} has no {field}="):
                getattr(minipeft, name)(**{field: {"a": 1}} | SHARED[name])

    @pytest.mark.parametrize(
        "field, value, remedy",
        [
            ("target_parameters", ["mlp.weight"], "target_modules"),
            ("trainable_token_indices", [1, 2], "modules_to_save"),
            ("layer_replication", [(0, 2), (1, 2)], "deeper model"),
            ("use_qalora", True, "not built"),
            ("alora_invocation_tokens", [1], "not built"),
        ],
    )
    def test_what_is_not_built_is_refused_with_a_sentence(self, field, value, remedy):
        with pytest.raises(ConfigError, match=f"has no {field}=.*{remedy}"):
            minipeft.LoraConfig(**{field: value})

    @pytest.mark.parametrize("wrong", ["lora_dropuot", "targets", "rank"])
    def test_a_field_that_nobody_has(self, wrong):
        with pytest.raises(TypeError, match=f"no field '{wrong}'"):
            minipeft.LoraConfig(**{wrong: None})

    @pytest.mark.parametrize(
        "task, near", [("SEQ_CLASS", "SEQ_CLS"), ("causal_lm", "CAUSAL_LM"), ("QA", "")]
    )
    def test_task_types(self, task, near):
        with pytest.raises(ConfigError, match=f"unknown task_type.*{near}"):
            minipeft.LoraConfig(task_type=task)
        with pytest.raises(ValueError):
            peft.LoraConfig(task_type=task)
        assert set(peft_tables.TASK_HEADS) == set(peft.TaskType.__members__)

    @pytest.mark.parametrize("task", peft_tables.TASK_HEADS)
    def test_arguments_of_a_task(self, task):
        kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
        theirs = list(inspect.signature(kind.forward).parameters)
        ours = peft_tables.TASK_ARGUMENTS[task]
        assert theirs[1 : len(ours) + 2] == [*ours, "output_attentions"]
