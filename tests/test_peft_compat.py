"""Scripts that were written for Hugging Face PEFT: imports, arguments, objects,
files."""

import copy
import inspect
import json
import re
from functools import partial

import accelerate
import huggingface_hub
import peft
import pytest
import torch
import transformers
from bases import BASES, METHODS, adapted, close, differ, inputs, run
from bases import transformers as tiny
from safetensors.torch import load_file

import minipeft
from minipeft import (
    AdapterFileError,
    ConfigError,
    LoraConfig,
    PeftModel,
    TargetError,
    get_peft_model,
)
from minipeft.hf_methods import CHANGES_OF_EMBEDDINGS
from minipeft.model import REFUSED

BASE, LORA = BASES["hf_llama"], METHODS["lora"]
FILE = "adapter_model.safetensors"
FIELDS = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
            "load_peft_weights",
            "LoftQConfig",
            "PeftType",
            "PromptTuningInit",
            "TaskType",
            "get_layer_status",
            "get_model_status",
            "get_peft_config",
            "get_peft_model",
            "get_peft_model_state_dict",
            "inject_adapter_in_model",
            "prepare_model_for_kbit_training",
            "set_peft_model_state_dict",
        ],
    )
    def test_imports(self, name):
        assert hasattr(peft, name) and name in minipeft.__all__

    @pytest.mark.parametrize("name", ["TaskType", "PeftType", "PromptTuningInit"])
    def test_enumerations(self, name):
        ours, theirs = getattr(minipeft, name), getattr(peft, name)
        both = ours.__members__.keys() & theirs.__members__.keys()
        assert len(both) >= 3 and all(ours[key] == theirs[key] for key in both)
        assert json.dumps(ours[min(both)]) == json.dumps(theirs[min(both)])

    def test_members_of_enumerations_are_values(self):
        config = LoraConfig(task_type=minipeft.TaskType.CAUSAL_LM)
        assert config.task_type == "CAUSAL_LM" and type(config.task_type) is str
        for package in (minipeft, peft):
            prompt = minipeft.PromptTuningConfig(
                num_virtual_tokens=2,
                prompt_tuning_init=package.PromptTuningInit.SAMPLE_VOCAB,
            )
            assert prompt.prompt_tuning_init == "SAMPLE_VOCAB"

    @pytest.mark.parametrize(
        "function", ["get_peft_model", "PeftModel.add_adapter"], ids=str
    )
    def test_arguments_stand_in_the_same_order(self, function):
        ours, theirs = (
            list(inspect.signature(eval(f"{package}.{function}")).parameters)
            for package in ("minipeft", "peft")
        )
        assert ours == [name for name in theirs if name in ours]

    @pytest.mark.parametrize("method", ["save_pretrained", "from_pretrained"])
    def test_arguments_of_files(self, method):
        ours, theirs = (
            list(inspect.signature(getattr(package.PeftModel, method)).parameters)
            for package in (minipeft, peft)
        )
        named = [name for name in theirs if name in ours]
        assert [name for name in ours if name in named] == named


class TestConfigurations:
    @pytest.mark.parametrize("method", ["lora", "ia3", "vera", "loha", "prompt"])
    def test_one_of_peft_is_taken(self, method):
        method = METHODS[method]
        theirs = method.theirs(BASE)
        ours = get_peft_model(BASE.make(), theirs)
        assert type(ours.peft_config["default"]).__name__ == method.config
        assert (
            ours.get_nb_trainable_parameters()
            == (
                peft.get_peft_model(BASE.make(), method.theirs(BASE))
            ).get_nb_trainable_parameters()
        )

    def test_a_dict_is_taken(self):
        data = {"peft_type": "LORA", **FIELDS}
        assert minipeft.get_peft_config(data) == LoraConfig(**FIELDS)
        model = get_peft_model(BASE.make(), data)
        assert model.peft_config["default"].r == 4
        model.add_adapter("b", peft.LoraConfig(**FIELDS))
        assert model.peft_config["b"].r == 4

    @pytest.mark.parametrize("wrong", ["lora", None, LoraConfig, ["LORA"]])
    def test_what_is_no_configuration(self, wrong):
        with pytest.raises(ConfigError, match="expected a configuration such as"):
            get_peft_model(BASE.make(), wrong)

    @pytest.mark.parametrize(
        "config",
        [
            peft.LoraConfig(target_parameters=["q_proj.weight"]),
            peft.LoraConfig(init_lora_weights="eva"),
            {"peft_type": "LORA", "layer_replication": [[0, 1]]},
            {"peft_type": "OFT"},
        ],
        ids=str,
    )
    def test_requests_for_what_is_not_built(self, config):
        with pytest.raises(ConfigError):
            get_peft_model(BASE.make(), config)

    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(),
            LoraConfig(target_modules="all-linear"),
            LoraConfig(task_type="SEQ_CLS"),
            minipeft.IA3Config(),
            minipeft.LNTuningConfig(),
            minipeft.PromptTuningConfig(num_virtual_tokens=2),
            minipeft.BottleneckConfig(train_layernorm=True),
            minipeft.SubspaceConfig(d=20),
        ],
        ids=lambda config: type(config).__name__,
    )
    def test_the_users_own_object_stays_as_it_is(self, config):
        before = copy.deepcopy(config)
        model = get_peft_model(BASE.make(), config)
        assert config == before
        resolved = model.peft_config["default"]
        assert resolved is not config
        if hasattr(config, "target_modules"):
            assert isinstance(resolved.target_modules, list)

    def test_loftq_config_as_an_object(self):
        for package in (minipeft, peft):
            config = LoraConfig(
                init_lora_weights="loftq",
                loftq_config=package.LoftQConfig(loftq_bits=8),
            )
            assert config.loftq_config == {"loftq_bits": 8, "loftq_iter": 1}

    @pytest.mark.parametrize("init", [True, "gaussian", "pissa"])
    def test_loftq_config_without_loftq_is_said(self, init):
        config = dict(init_lora_weights=init, loftq_config={"loftq_bits": 4})
        for package in (peft, minipeft):
            with pytest.warns(UserWarning, match="loftq_config.*ignored"):
                assert package.LoraConfig(**config).loftq_config == {}

    @pytest.mark.parametrize("pattern", ["layers", ["layers", "h"], r"layers|h"])
    def test_layers_pattern_without_layers_to_transform(self, pattern):
        for package in (peft, minipeft):
            with pytest.raises(ValueError, match="layers_to_transform"):
                package.LoraConfig(layers_pattern=pattern)

    @pytest.mark.parametrize("empty", [[], None])
    def test_empty_layers_to_transform_means_all(self, empty):
        ours = get_peft_model(
            BASE.make(), LoraConfig(**FIELDS, layers_to_transform=empty)
        )
        theirs = peft.get_peft_model(
            BASE.make(), peft.LoraConfig(**FIELDS, layers_to_transform=empty)
        )
        assert (
            ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        )

    @pytest.mark.parametrize(
        "names, layers",
        [
            (["q_proj", "lm_head"], [1]),
            (["model.layers.0.self_attn.q_proj", "v_proj"], [1]),
            (["lm_head", "up_proj", "model.layers.0.mlp.down_proj"], 0),
            (["lm_head"], [1]),
        ],
    )
    @pytest.mark.parametrize("pattern", [None, "layers"])
    def test_whole_paths_are_of_no_layer(self, names, layers, pattern, tmp_path):
        fields = dict(r=2, target_modules=names, layers_to_transform=layers)
        fields["layers_pattern"] = pattern
        theirs = peft.get_peft_model(BASE.make(), peft.LoraConfig(**fields))
        theirs.save_pretrained(tmp_path)
        ours = get_peft_model(BASE.make(), LoraConfig(**fields))
        found = minipeft.get_peft_model_state_dict(ours)
        expected = {key for key in load_file(tmp_path / FILE) if "lora_" in key}
        assert found.keys() == expected
        PeftModel.from_pretrained(BASE.make(), tmp_path)

    @pytest.mark.parametrize("layers", [7, [7], [1, 7]])
    def test_a_layer_that_is_not_there_beside_a_whole_path(self, layers):
        names = dict(target_modules=["lm_head", "q_proj"], layers_to_transform=layers)
        with pytest.raises(TargetError, match="no target is in layer 7; there are"):
            get_peft_model(BASE.make(), LoraConfig(**names))

    @pytest.mark.parametrize(
        "fields",
        [
            dict(rank_pattern={"q_prj": 2}),
            dict(alpha_pattern={"down_proj": 2}),
            dict(rank_pattern={"q_proj": 2, r"layers\.7\..*": 2}),
        ],
    )
    def test_patterns_that_match_no_target(self, fields):
        with pytest.raises(TargetError, match="pattern finds no module for"):
            get_peft_model(BASE.make(), LoraConfig(**FIELDS, **fields))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("field", ["lora_alpha", "lora_dropout"])
    def test_numbers_are_finite(self, field, value):
        with pytest.raises(ConfigError, match=f"{field} = "):
            LoraConfig(**{field: value})

    @pytest.mark.parametrize("r", [4, 16])
    def test_a_rank_that_adalora_does_not_use_is_said(self, r):
        for package in (peft, minipeft):
            with pytest.warns(UserWarning, match="init_r"):
                package.AdaLoraConfig(r=r, total_step=10)

    @pytest.mark.parametrize(
        "config, fields, message",
        [
            ("PromptTuning", dict(prompt_tuning_init_text="Hello"), "_init_text is ig"),
            (
                "PromptTuning",
                dict(prompt_tuning_init="SAMPLE_VOCAB", tokenizer_name_or_path="gpt2"),
                "tokenizer_name_or_path is ignored",
            ),
            ("PrefixTuning", dict(encoder_hidden_size=8), "prefix_projection=True"),
            ("PromptEncoder", dict(encoder_dropout=0.1), "encoder_dropout is ignored"),
            ("PromptEncoder", dict(encoder_num_layers=3), "_type='LSTM'"),
        ],
    )
    def test_what_another_field_would_have_to_ask_for_is_said(
        self, config, fields, message
    ):
        config = getattr(minipeft, f"{config}Config")
        with pytest.warns(UserWarning, match=message):
            config(num_virtual_tokens=2, **fields)

    @pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig"])
    def test_convolutions_are_refused(self, name):
        with pytest.raises(ConfigError, match="use_effective_conv2d=True is for conv"):
            getattr(minipeft, name)(use_effective_conv2d=True)

    @pytest.mark.parametrize(
        "excluded", [["layers"], ["mlp", "self_attn"], ["down_proj"], r".*\.mlp"]
    )
    def test_an_exclusion_that_excludes_nothing_is_said(self, excluded):
        fields = dict(FIELDS, exclude_modules=excluded)
        with pytest.warns(UserWarning, match="exclude_modules = .*excludes nothing"):
            ours = get_peft_model(BASE.make(), LoraConfig(**fields))
        theirs = peft.get_peft_model(BASE.make(), peft.LoraConfig(**fields))
        counts = (model.get_nb_trainable_parameters() for model in (ours, theirs))
        assert len(set(counts)) == 1  # PEFT says nothing

    def test_alpha_zero_would_train_nothing(self):
        with pytest.raises(ConfigError, match="lora_alpha = 0"):
            LoraConfig(lora_alpha=0)


class TestTasks:
    @pytest.mark.parametrize(
        "task, name, head",
        [
            ("QUESTION_ANS", "LlamaForQuestionAnswering", "qa_outputs"),
            ("QUESTION_ANS", "Qwen2ForQuestionAnswering", "qa_outputs"),
            ("SEQ_CLS", "LlamaForSequenceClassification", "score"),
            ("TOKEN_CLS", "LlamaForTokenClassification", "score"),
        ],
    )
    def test_new_heads_are_trained_and_saved(self, task, name, head, tmp_path):
        def base():
            torch.manual_seed(0)
            sizes = dict(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                pad_token_id=0,
            )
            kind = getattr(transformers, name)
            return kind(kind.config_class(**sizes)).eval()

        states = []
        for package in (minipeft, peft):
            model = package.get_peft_model(
                base(), package.LoraConfig(**FIELDS, task_type=task)
            )
            trained = [n for n, p in model.named_parameters() if p.requires_grad]
            assert any(head in name for name in trained)
            model.save_pretrained(str(tmp_path / package.__name__))
            states.append(
                load_file(tmp_path / package.__name__ / "adapter_model.safetensors")
            )
        assert states[0].keys() == states[1].keys()
        loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "minipeft"))
        again = PeftModel.from_pretrained(base(), tmp_path / "peft")
        for model in (loaded, again):
            assert any(head in key for key in model.state_dict() if "default" in key)

    @staticmethod
    def both(task, name):
        """A model of either package with one adapter, and a batch."""
        sizes = dict(vocab_size=40, pad_token_id=0, num_labels=2)
        sizes |= dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
        if name.startswith("T5"):
            sizes |= dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
            sizes |= dict(decoder_start_token_id=0)
        kind = getattr(transformers, name)
        models = []
        for package in (minipeft, peft):
            torch.manual_seed(0)
            base = kind(kind.config_class(**sizes))
            config = package.LoraConfig(task_type=task, init_lora_weights=False)
            models.append(package.get_peft_model(base, config).eval())
        ids = inputs()["input_ids"]
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        return (*models, ids, mask)

    @pytest.mark.parametrize(
        "task, name, more",
        [
            ("TOKEN_CLS", "BertForTokenClassification", [None, "each"]),
            ("SEQ_CLS", "BertForSequenceClassification", [None, "row"]),
            ("CAUSAL_LM", "GPT2LMHeadModel", [None, "each"]),
            ("CAUSAL_LM", "OPTForCausalLM", [None, "each"]),
            ("SEQ_2_SEQ_LM", "T5ForConditionalGeneration", [None] * 4 + ["each"]),
            ("SEQ_2_SEQ_LM", "T5ForConditionalGeneration", [None, "each"]),
            ("QUESTION_ANS", "BertForQuestionAnswering", [None] * 3 + ["row", "row"]),
            ("FEATURE_EXTRACTION", "BertModel", [None]),
            ("FEATURE_EXTRACTION", "GPT2Model", []),
        ],
    )
    def test_arguments_by_position(self, task, name, more):
        """In PEFT's order, not in that of the base."""
        ours, theirs, ids, mask = self.both(task, name)
        given = {None: None, "each": ids % 2, "row": ids[:, 0] % 2}
        args = [ids, mask, *(given[kind] for kind in more)]
        with torch.no_grad():
            first, second = ours(*args), theirs(*args)
        assert first.keys() == second.keys()
        close(first[0], second[0])  # the loss, where there is one

    def test_arguments_twice_or_too_many(self):
        ours, _, ids, mask = self.both("TOKEN_CLS", "BertForTokenClassification")
        with pytest.raises(TypeError, match="labels: given by position and by name"):
            ours(ids, mask, None, ids % 2, labels=ids % 2)
        with pytest.raises(TypeError, match="5 arguments by position.*labels"):
            ours(ids, mask, None, ids % 2, None)

    def test_arguments_by_position_without_a_task(self):
        """In the base's order, as in PEFT."""
        ours, theirs, ids, mask = self.both(None, "BertForTokenClassification")
        args = [ids, mask, ids % 2, None, None, ids % 2]
        close(ours(*args).loss.detach(), theirs(*args).loss.detach())

    def test_a_base_without_input_ids_keeps_its_order(self):
        class Pair(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = torch.nn.Linear(4, 4)

            def forward(self, x, scale, shift):
                return self.linear(x) * scale + shift

        x = torch.ones(2, 4)
        config = LoraConfig(target_modules=["linear"], task_type="SEQ_CLS")
        base = Pair()
        wanted = base(x, 2 * x, 3 * x)
        assert torch.equal(get_peft_model(base, config)(x, 2 * x, 3 * x), wanted)


class TestObjects:
    def test_layers(self):
        model = adapted(LORA, BASE)
        theirs = peft.get_peft_model(BASE.make(), LORA.theirs(BASE))
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        wanted = theirs.base_model.model.model.layers[0].self_attn.q_proj
        for name in ("lora_A", "lora_B"):
            shape = getattr(wanted, name)["default"].weight.shape
            assert getattr(layer, name)["default"].weight.shape == shape
        assert layer.scaling["default"] == wanted.scaling["default"]
        assert torch.equal(
            layer.get_base_layer().weight, wanted.get_base_layer().weight
        )
        assert model.active_peft_config is model.peft_config["default"]
        with pytest.raises(AttributeError):
            layer.lora_C  # noqa: B018

    @pytest.mark.parametrize(
        "method, name",
        [("ia3", "ia3_l"), ("loha", "hada_w1_a"), ("vera", "vera_lambda_d")],
    )
    def test_layers_of_other_methods(self, method, name):
        ours = get_peft_model(BASE.make(), METHODS[method].ours(BASE))
        theirs = peft.get_peft_model(BASE.make(), METHODS[method].theirs(BASE))
        path = "model.layers.1.mlp.down_proj"
        ours, theirs = (m.get_base_model().get_submodule(path) for m in (ours, theirs))
        assert getattr(ours, name)["default"].shape == (
            getattr(theirs, name)["default"].shape
        )

    def test_status(self):
        def two(package, config):
            model = package.get_peft_model(BASE.make(), config(**FIELDS))
            model.add_adapter("b", config(r=2, target_modules=["q_proj"]))
            return model

        ours = two(minipeft, LoraConfig)
        theirs = two(peft, peft.LoraConfig)
        for change in ("start", "merge", "switch"):
            for model in (ours, theirs):
                if change == "merge":
                    model.merge_adapter()
                if change == "switch":
                    model.unmerge_adapter()
                    model.set_adapter("b")
            mine, wanted = ours.get_model_status(), theirs.get_model_status()
            for field in (
                "base_model_type",
                "peft_types",
                "trainable_params",
                "total_params",
                "num_adapter_layers",
                "enabled",
                "active_adapters",
                "available_adapters",
                "merged_adapters",
                "requires_grad",
                "devices",
                "quantization_backend",
            ):
                assert getattr(mine, field) == getattr(wanted, field), (change, field)
            layers = zip(
                ours.get_layer_status(), theirs.get_layer_status(), strict=True
            )
            for mine, wanted in layers:
                assert mine.name == wanted.name
                assert mine.available_adapters == wanted.available_adapters
                assert mine.merged_adapters == wanted.merged_adapters
                assert mine.requires_grad == wanted.requires_grad

    def test_the_budget_of_adalora(self):
        model = get_peft_model(BASE.make(), METHODS["adalora"].ours(BASE)).train()
        other = copy.deepcopy(model)
        assert other.base_model.update_and_allocate.__self__ is other
        from minipeft.methods.rank_allocator import RankAllocator

        allocator = RankAllocator(other)
        for step in range(1, 11):
            for each in (model, other):
                each.zero_grad()
                each(**inputs(), labels=inputs()["input_ids"]).loss.backward()
            model.base_model.update_and_allocate(step)
            allocator.step()
        ours, wanted = (m.peft_config["default"].rank_pattern for m in (model, other))
        assert ours == wanted and sum(map(sum, ours.values())) == 3 * len(ours)

    def test_freezing_adapters(self):
        for package, config in ((minipeft, LoraConfig), (peft, peft.LoraConfig)):
            model = package.get_peft_model(BASE.make(), config(**FIELDS))
            model.add_adapter("b", config(r=2, target_modules=["q_proj"]))
            counts = []
            for names, trained in (("default", False), ("b", True), (["b"], False)):
                model.set_requires_grad(names, trained)
                counts.append(model.get_nb_trainable_parameters()[0])
            assert counts == [0, 2 * 2 * (16 + 16), 0]

    def test_state_dicts(self):
        ours = adapted(LORA, BASE)
        theirs = peft.get_peft_model(BASE.make(), LORA.theirs(BASE))
        state = minipeft.get_peft_model_state_dict(ours)
        assert state.keys() == peft.get_peft_model_state_dict(theirs).keys()
        peft.set_peft_model_state_dict(theirs, state)
        close(run(ours), run(theirs))
        fresh = get_peft_model(BASE.make(), LORA.ours(BASE))
        minipeft.set_peft_model_state_dict(fresh, state)
        assert torch.equal(run(fresh), run(ours))
        whole = ours.state_dict()
        again = minipeft.get_peft_model_state_dict(fresh, state_dict=whole)
        assert all(torch.equal(again[key], state[key]) for key in state)

    def test_injection(self):
        model = BASE.make()
        before = run(model)
        config = LoraConfig(**FIELDS, init_lora_weights=False)
        assert minipeft.inject_adapter_in_model(config, model, "b") is model
        differ(run(model), before)
        assert minipeft.get_layer_status(model)[0].available_adapters == ["b"]
        for method in ("vera", "prompt", "subspace"):
            base = BASE.make()
            with pytest.raises(ConfigError, match="use get_peft_model"):
                minipeft.inject_adapter_in_model(METHODS[method].ours(BASE), base)
            assert torch.equal(run(base), before)

    SECOND = {
        "lora": ("LoraConfig", dict(r=2, init_lora_weights=False)),
        "loha": ("LoHaConfig", dict(r=2, init_weights=False)),
        "ia3": (
            "IA3Config",
            dict(init_ia3_weights=False, feedforward_modules=[]),
        ),
    }

    @pytest.mark.parametrize("method", SECOND)
    def test_injections_beside_peft(self, method):
        """One after another, their tensors, and loading these."""
        name, fields = self.SECOND[method]
        fields = fields | dict(target_modules=["q_proj"])
        outputs, states = [], []
        for package in (peft, minipeft):
            model = BASE.make()
            torch.manual_seed(0)
            first = package.LoraConfig(**FIELDS, init_lora_weights=False)
            package.inject_adapter_in_model(first, model)
            second = getattr(package, name)(**fields)
            assert package.inject_adapter_in_model(second, model, "b") is model
            get = partial(package.get_peft_model_state_dict, model)
            states.append((get(), get(adapter_name="b")))
            for state, adapter_name in zip(states[0], ("default", "b")):
                doubled = {key: 2 * tensor for key, tensor in state.items()}
                package.set_peft_model_state_dict(model, doubled, adapter_name)
            for key, tensor in get().items():
                assert torch.equal(tensor, 2 * states[0][0][key])
            outputs.append(run(model))
        for theirs, ours in zip(*states):
            assert theirs.keys() == ours.keys()
        close(outputs[1], outputs[0])
        again = copy.deepcopy(model)
        minipeft.set_peft_model_state_dict(again, states[0][1], "b")
        differ(run(again), outputs[1])
        assert torch.equal(run(model), outputs[1])
        whole = minipeft.get_peft_model_state_dict(again, model.state_dict(), "b")
        assert all(torch.equal(whole[key], get(adapter_name="b")[key]) for key in whole)

    def test_files_are_loaded_into_an_injected_adapter(self, tmp_path):
        wanted = adapted(LORA, BASE)
        wanted.save_pretrained(tmp_path)
        model = minipeft.inject_adapter_in_model(LORA.ours(BASE), BASE.make())
        state = minipeft.load_peft_weights(tmp_path)
        minipeft.set_peft_model_state_dict(model, state)
        assert torch.equal(run(model), run(wanted))

    def test_an_injection_that_is_refused_leaves_the_first(self):
        model = minipeft.inject_adapter_in_model(LORA.ours(BASE), BASE.make())
        before = model.state_dict()
        for method in ("vera", "prompt"):
            with pytest.raises(ConfigError, match="use get_peft_model"):
                config = METHODS[method].ours(BASE)
                minipeft.inject_adapter_in_model(config, model, "b")
        with pytest.raises(minipeft.AdapterNameError, match="already"):
            minipeft.inject_adapter_in_model(LORA.ours(BASE), model)
        with pytest.raises(TargetError, match="inject_adapter_in_model"):
            get_peft_model(model, LORA.ours(BASE))
        assert model.state_dict().keys() == before.keys()

    @pytest.mark.parametrize("kind", ["a base", "within a PeftModel", "PEFT's"])
    def test_tensors_of_a_model_without_adapters(self, kind):
        model = BASE.make()
        if kind == "within a PeftModel":
            model = adapted(LORA, BASE).get_base_model()
        if kind == "PEFT's":
            model = peft.get_peft_model(model, LORA.theirs(BASE))
        for call in (
            minipeft.get_peft_model_state_dict,
            partial(minipeft.set_peft_model_state_dict, peft_model_state_dict={}),
        ):
            with pytest.raises(TargetError, match="expected a PeftModel, or a model"):
                call(model)


class TestWhatFallsThrough:
    def test_nothing_saves_or_resizes_behind_the_adapters(self):
        """Every public method of a Hugging Face model whose name says that it saves,
        uploads, resizes or ties is PeftModel's own, or known to be harmless."""
        words = (
            "save",
            "push",
            "upload",
            "resize",
            "tie_",
            "tied",
            "adapter",
            "pretrained",
        )
        harmless = {  # of no effect on weights or files
            "all_tied_weights_keys",
            "barrier_after_gathered_checkpoint_save",
            "gather_sharded_state_dict_for_save",
            "get_expanded_tied_weights_keys",
            "mark_tied_weights_as_initialized",
            "recompute_tied_weights",
            "should_save_on_this_rank",
            # transformers' own adapters: it says itself that there are none
            "disable_adapters",
            "enable_adapters",
            "get_adapter_state_dict",
            "hotswap_adapter",
            "resize_position_embeddings",  # decoders say that they have none
        }
        words += ("set_input", "set_output", "init_w", "initialize")
        ours = [c for c in PeftModel.__mro__ if c.__module__.startswith("minipeft")]
        others = (  # of other families, with an encoder, of images and of speech
            "GPT2LMHeadModel",
            "BertForMaskedLM",
            "T5ForConditionalGeneration",
            "BartForConditionalGeneration",
            "ViTForImageClassification",
            "CLIPModel",
            "WhisperForConditionalGeneration",
        )
        kinds = [type(BASE.make()), *(getattr(transformers, name) for name in others)]
        kinds.append(type(BASES["llama"].make()))
        for name in {*dir(BASE.make()), *(n for kind in kinds for n in dir(kind))}:
            if name.startswith("_") or not any(word in name for word in words):
                continue
            own = any(name in vars(c) for c in ours) or name in CHANGES_OF_EMBEDDINGS
            assert own or name in harmless or name in REFUSED, (
                f"{name} falls through to the base"
            )
        model = adapted(LORA, BASE)
        before = run(model)
        for name in REFUSED:
            with pytest.raises(AttributeError, match=f"{name} would"):
                getattr(model, name)()
        assert torch.equal(run(model), before)

    @pytest.mark.parametrize("wrong", ["get_layer_statuss", "merge_and_unlod", "sav"])
    def test_an_unknown_attribute_names_the_peft_model(self, wrong):
        with pytest.raises(AttributeError, match=f"neither PeftModel.*{wrong}"):
            getattr(adapted(LORA, BASE), wrong)
        with pytest.raises(AttributeError, match="did you mean 'get_layer_status'"):
            adapted(LORA, BASE).get_layer_statuss  # noqa: B018

    @pytest.mark.parametrize(
        "name", ["set_adapter", "merge_adapter", "unload", "peft_config"]
    )
    @pytest.mark.parametrize("base", [BASE, BASES["mlp"]])
    def test_what_peft_has_on_base_model(self, name, base):
        """transformers' models have a set_adapter, too, of adapters of their own."""
        theirs = peft.get_peft_model(base.make(), LORA.theirs(base))
        assert hasattr(theirs.base_model, name)
        with pytest.raises(AttributeError, match=f"call {name} on the PeftModel"):
            getattr(adapted(LORA, base).base_model, name)

    def test_resizing(self):
        models = [
            adapted(LORA, BASE),
            peft.get_peft_model(BASE.make(), LORA.theirs(BASE)),
        ]
        for model in models:
            model.resize_token_embeddings(44)
            assert run(model).shape[-1] == 44
        for targets in (["embed_tokens"], ["q_proj", "lm_head"]):
            model = get_peft_model(BASE.make(), LoraConfig(target_modules=targets))
            before = run(model)
            for method in (
                model.resize_token_embeddings,
                model.tie_weights,
                model.set_input_embeddings,
                model.set_output_embeddings,
            ):
                with pytest.raises(TargetError, match="carries an adapter"):
                    method()
            assert torch.equal(run(model), before)
        model = get_peft_model(
            BASE.make(), LoraConfig(**FIELDS, modules_to_save=["lm_head"])
        )
        with pytest.raises(TargetError, match="lm_head carries an adapter"):
            model.resize_token_embeddings(44)
        model = get_peft_model(BASE.make(), minipeft.SubspaceConfig(d=50))
        with pytest.raises(TargetError, match="changes every weight"):
            model.resize_token_embeddings(44)


class Hub:
    """A stand-in for the Hugging Face hub: a folder for each repository."""

    def __init__(self, root):
        self.root = root
        self.calls = []

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append((repo_id, private, exist_ok))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, **more):
        import shutil

        self.calls.append((commit_message, more))
        shutil.copytree(folder_path, self.root / repo_id)
        return "commit"


class TestHub:
    def test_uploading(self, tmp_path, monkeypatch):
        hub = Hub(tmp_path)
        monkeypatch.setattr(huggingface_hub, "HfApi", hub)
        model = adapted(LORA, BASE)
        model.add_adapter("b", LORA.ours(BASE))
        done = model.push_to_hub("me/adapter", private=True, token="t", revision="v1")
        assert done == "commit" and hub.token == "t"
        assert hub.calls == [
            ("me/adapter", True, True),
            ("Upload adapter", {"revision": "v1"}),
        ]
        files = {p.name for p in (tmp_path / "me/adapter").iterdir()}
        assert files == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "b",
        }
        again = PeftModel.from_pretrained(BASE.make(), tmp_path / "me/adapter")
        assert torch.equal(run(again), run(model))
        model.push_to_hub("me/other", selected_adapters=["b"])
        assert {p.name for p in (tmp_path / "me/other").iterdir()} == {"b"}

    def test_loading_with_a_subfolder_and_a_revision(self, tmp_path, monkeypatch):
        model = adapted(LORA, BASE, "b")
        model.save_pretrained(tmp_path)
        asked = []

        def download(name, **kwargs):
            asked.append((name, kwargs))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        options = dict(subfolder="b", revision="v1", token="t")
        again = PeftModel.from_pretrained(BASE.make(), "me/adapter", **options)
        assert torch.equal(run(again), run(model))
        again.load_adapter("me/adapter", "c", **options)
        wanted = ["b/adapter_config.json", "b/adapter_model.safetensors"]
        call = ("me/adapter", dict(allow_patterns=wanted, revision="v1", token="t"))
        assert asked == [call, call]
        config = minipeft.PeftConfig.from_pretrained(tmp_path, subfolder="b")
        assert config.r == 4


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path):
        adapted(LORA, BASE).save_pretrained(tmp_path)
        return tmp_path

    def test_arguments_without_effect(self, folder):
        wanted = run(PeftModel.from_pretrained(BASE.make(), folder))
        for options in (
            dict(torch_device="cpu"),
            dict(low_cpu_mem_usage=True),
            dict(device_map="auto", token=None, revision=None),
            dict(ephemeral_gpu_offload=False, key_mapping=None),
            dict(use_safetensors=True, force_download=True),
        ):
            model = PeftModel.from_pretrained(BASE.make(), folder, **options)
            assert torch.equal(run(model), wanted)
            theirs = peft.PeftModel.from_pretrained(BASE.make(), str(folder), **options)
            close(run(theirs), wanted)

    def test_arguments_that_are_refused(self, folder):
        for options in (
            dict(ephemeral_gpu_offload=True),
            dict(key_mapping={"a": "b"}),
            dict(ignore_mismatched_sizes=True),
        ):
            with pytest.raises(ConfigError, match="not built"):
                PeftModel.from_pretrained(BASE.make(), folder, **options)
        with pytest.raises(ConfigError, match="would read a pickle"):
            PeftModel.from_pretrained(BASE.make(), folder, use_safetensors=False)
        with pytest.raises(TypeError, match="'revison' .did you mean 'revision'"):
            PeftModel.from_pretrained(BASE.make(), folder, revison="v1")

    def test_a_configuration_in_place_of_the_files(self, folder):
        config = LORA.ours(BASE, lora_alpha=16)
        before = copy.deepcopy(config)
        ours = PeftModel.from_pretrained(BASE.make(), folder, config=config)
        theirs = peft.PeftModel.from_pretrained(
            BASE.make(), str(folder), config=LORA.theirs(BASE, lora_alpha=16)
        )
        close(run(ours), run(theirs))
        differ(run(ours), run(PeftModel.from_pretrained(BASE.make(), folder)))
        assert config == before

    def test_base_and_adapter_together(self, tmp_path):
        base = BASE.make()
        base.save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = get_peft_model(
            base, LoraConfig(**FIELDS, init_lora_weights=False, task_type="CAUSAL_LM")
        )
        model.save_pretrained(tmp_path / "adapter")
        for package in (minipeft, peft):
            again = package.AutoPeftModelForCausalLM.from_pretrained(
                str(tmp_path / "adapter")
            )
            close(run(again), run(model))
        adapted(LORA, BASE).save_pretrained(tmp_path / "nameless")
        with pytest.raises(TargetError, match="which base"):
            minipeft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nameless")


class TestBaseAndAdapterOfATask:
    """AutoPeftModelFor…, against PEFT's."""

    KINDS = [
        ("SequenceClassification", "SEQ_CLS", "LlamaForSequenceClassification"),
        ("TokenClassification", "TOKEN_CLS", "LlamaForTokenClassification"),
        ("QuestionAnswering", "QUESTION_ANS", "LlamaForQuestionAnswering"),
        ("FeatureExtraction", "FEATURE_EXTRACTION", "LlamaModel"),
    ]

    @pytest.mark.parametrize("name, task, base", KINDS)
    def test_both_load_the_same(self, tmp_path, name, task, base):
        torch.manual_seed(0)
        config = copy.deepcopy(BASE.make().config)
        getattr(transformers, base)(config).save_pretrained(tmp_path / "base")
        base = getattr(transformers, base).from_pretrained(tmp_path / "base")
        fields = dict(**FIELDS, init_lora_weights=False, task_type=task)
        model = get_peft_model(base, LoraConfig(**fields)).eval()
        model.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            wanted = model(**inputs())[0]
            for package in (minipeft, peft):
                auto = getattr(package, f"AutoPeftModelFor{name}")
                again = auto.from_pretrained(str(tmp_path / "adapter")).eval()
                close(again(**inputs())[0], wanted)
        with pytest.raises(ConfigError, match=f"for {task}, AutoPeftModelForCausalLM"):
            minipeft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError):
            peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))

    @pytest.mark.parametrize("name", ["lora", "ia3", "vera", "prompt"])
    def test_tensors_alone(self, tmp_path, name):
        adapted(METHODS[name], BASE).save_pretrained(tmp_path)
        ours = minipeft.load_peft_weights(tmp_path)
        theirs = peft.load_peft_weights(str(tmp_path), device="cpu")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


class TestFilesOfPeft:
    """What PEFT loads is loaded here, or refused with what to do."""

    def saved(self, folder, change=None, **fields):
        model = peft.get_peft_model(
            BASE.make(), peft.LoraConfig(**FIELDS | fields, init_lora_weights=False)
        )
        model.save_pretrained(str(folder))
        if change:
            file = folder / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | change))
        return run(model)

    @pytest.mark.parametrize(
        "change",
        [
            dict(target_modules=["q_proj", "v_proj", "proj"]),
            dict(target_modules=["v_proj", "q_proj", "attn.q_proj", "_proj", "xyz"]),
            dict(exclude_modules=["nothing"]),
            dict(exclude_modules=r"no\..*thing"),
            dict(exclude_modules=["lm_head", "nothing", "proj"]),
            dict(modules_to_save=["classifier"]),
            dict(rank_pattern={"nothing": 3}, alpha_pattern={"none": 2}),
            dict(ensure_weight_tying=True),
            dict(init_lora_weights="eva"),
            dict(init_lora_weights="orthogonal"),
            dict(init_lora_weights="mica"),
            dict(init_lora_weights="gaussian"),
            dict(exclude_modules=["mlp"]),
            dict(loftq_config={"loftq_bits": 4}, eva_config={"rho": 2.0}),
            dict(a_field_of_next_year=None, runtime_config={"x": False}),
            dict(enable_lora=None, merge_weights=False, layers_pattern=""),  # 2023
            dict(use_dora=None, use_rslora=None, fan_in_fan_out=None),
            dict(inference_mode=None, lora_bias=None),
            dict(init_lora_weights=None, ensure_weight_tying=None),
        ],
        ids=str,
    )
    def test_is_loaded(self, tmp_path, change):
        wanted = self.saved(tmp_path, change)
        close(run(PeftModel.from_pretrained(BASE.make(), tmp_path)), wanted)

    @pytest.mark.parametrize(
        "init, remedy",
        [
            ("corda", "path_initial_model_for_weight"),
            ("lora_ga", "path_initial_model_for_weight"),
            ("pissa_niter_4", "save the adapter as a plain LoRA"),
            ("pissa_niter_16", 'write "init_lora_weights": true'),
            ("PISSA", "did you mean 'pissa'"),
            ("next_year", "expected one of True"),
        ],
    )
    def test_changed_bases_are_said(self, tmp_path, init, remedy):
        self.saved(tmp_path, dict(init_lora_weights=init))
        with pytest.raises(ConfigError, match=remedy):
            PeftModel.from_pretrained(BASE.make(), tmp_path)

    @pytest.mark.parametrize(
        "name, fields",
        [
            (
                "PromptTuningConfig",
                dict(prompt_tuning_init_text="a", tokenizer_name_or_path="x"),
            ),
            ("PrefixTuningConfig", dict(encoder_hidden_size=8)),
            ("LoHaConfig", dict(use_effective_conv2d=True)),
            ("LoKrConfig", dict(use_effective_conv2d=True, decompose_both=True)),
        ],
    )
    def test_fields_that_did_nothing(self, tmp_path, name, fields):
        """PEFT takes them, and notes them; they do not change what is computed."""
        if name.startswith("Lo"):
            fields = dict(fields, r=2, target_modules=["q_proj"], init_weights=False)
        else:
            fields = dict(fields, num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = peft.get_peft_model(BASE.make(), getattr(peft, name)(**fields)).eval()
        model.save_pretrained(str(tmp_path))
        close(run(PeftModel.from_pretrained(BASE.make(), tmp_path)), run(model))

    def test_ties_are_not_ignored(self, tmp_path):
        tied = BASES["hf_qwen2"]
        for fields in (
            dict(target_modules=["embed_tokens"]),
            dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
            dict(target_modules=["q_proj", "lm_head"]),
        ):
            with pytest.raises(ConfigError, match="ensure_weight_tying"):
                get_peft_model(
                    tied.make(), LoraConfig(**fields, ensure_weight_tying=True)
                )
        get_peft_model(
            tied.make(), LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True)
        )

    def test_whole_embeddings_after_resizing(self, tmp_path):
        def base(size):
            torch.manual_seed(5)
            model = BASE.make()
            model.resize_token_embeddings(size)
            return model

        model = peft.get_peft_model(
            base(44), peft.LoraConfig(**FIELDS, init_lora_weights=False)
        )
        with torch.no_grad():  # trained after resizing
            model.get_input_embeddings().weight[40:] += 1.0
            model.get_output_embeddings().weight[41:] -= 1.0
        model.save_pretrained(str(tmp_path), save_embedding_layers=True)
        ours = PeftModel.from_pretrained(base(44), tmp_path)
        ids = torch.tensor([[3, 41, 43]])
        close(ours(input_ids=ids).logits, model(input_ids=ids).logits)
        ours.save_pretrained(tmp_path / "again")
        theirs = peft.PeftModel.from_pretrained(base(44), str(tmp_path / "again"))
        close(theirs(input_ids=ids).logits, model(input_ids=ids).logits)
        for size in (40, 45):
            with pytest.raises(AdapterFileError, match=r"resize_token_embeddings\(44"):
                PeftModel.from_pretrained(base(size), tmp_path)

    @pytest.mark.parametrize(
        "name, size, fields",
        [
            ("hf_qwen2", 44, {}),  # tied
            ("hf_llama", 38, {}),  # smaller
            ("hf_llama", 44, dict(modules_to_save=["norm"])),
            ("hf_llama", 44, dict(modules_to_save=["lm_head"])),
            ("hf_llama", 44, dict(modules_to_save=["embed_tokens", "lm_head"])),
            ("hf_llama", 44, dict(target_modules=["q_proj", "embed_tokens"])),
            ("hf_qwen2", 43, dict(target_modules=["q_proj", "embed_tokens"])),
        ],
    )
    def test_new_tokens_of_other_models(self, tmp_path, name, size, fields):
        """Their rows were drawn at random, and are trained: only the file has them."""

        def base():
            torch.manual_seed(5)
            model = BASES[name].make()
            model.resize_token_embeddings(size)
            return model

        config = peft.LoraConfig(**FIELDS | fields, init_lora_weights=False)
        theirs = peft.get_peft_model(base(), config)
        with torch.no_grad():
            theirs.get_input_embeddings().weight[size - 2 :] += 1.0
        theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
        ids = torch.tensor([[3, size - 1, size - 2]])
        wanted = theirs(input_ids=ids).logits
        differ(base()(input_ids=ids).logits, wanted)
        ours = PeftModel.from_pretrained(base(), tmp_path)
        close(ours(input_ids=ids).logits, wanted)
        one_more = get_peft_model(base(), LoraConfig(**FIELDS), "other")
        one_more.merge_adapter()
        one_more.load_adapter(tmp_path, "new")
        with pytest.warns(UserWarning, match="Unmerging"):
            one_more.set_adapter("new")
        close(one_more(input_ids=ids).logits, wanted)

    @pytest.mark.parametrize("size", [40, 44])
    @pytest.mark.parametrize("name", ["LoraConfig", "VeraConfig", "LoKrConfig"])
    def test_an_adapter_on_a_head_with_a_bias(self, tmp_path, name, size):
        """Whole heads stand beside it in the file; new rows have new biases, too."""

        def base():
            torch.manual_seed(5)
            model = tiny("Phi", tie_word_embeddings=False)
            model.resize_token_embeddings(size)
            return model

        config = getattr(peft, name)(r=2, target_modules=["lm_head", "q_proj"])
        theirs = peft.get_peft_model(base(), config).eval()
        head = theirs.base_model.model.lm_head.base_layer
        with torch.no_grad():
            head.bias[40:] += 1.0
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
        theirs.save_pretrained(str(tmp_path))
        file = load_file(tmp_path / "adapter_model.safetensors")
        assert any(key.endswith("lm_head.base_layer.bias") for key in file)
        close(run(PeftModel.from_pretrained(base(), tmp_path)), run(theirs))
        other = base()
        with torch.no_grad():
            other.lm_head.bias[0] += 1.0
        with pytest.raises(AdapterFileError, match="bias.*another base weight"):
            PeftModel.from_pretrained(other, tmp_path)

    @pytest.mark.parametrize("change", ["shape", "first row"])
    def test_an_adapter_on_embeddings_of_another_base(self, tmp_path, change):
        config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
        theirs = peft.get_peft_model(BASE.make(), config)
        theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
        base = BASE.make()
        if change == "shape":
            base.resize_token_embeddings(44)
        else:
            with torch.no_grad():
                base.get_input_embeddings().weight[0] += 1
        before = run(base)
        message = {"shape": r"resize_token_embeddings\(40", "first row": "another base"}
        with pytest.raises(AdapterFileError, match=message[change]):
            PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(run(base), before)


class TestSaving:
    def test_a_resized_vocabulary_is_saved(self, tmp_path):
        BASE.make().save_pretrained(tmp_path / "base")
        keys = {}
        for package in (minipeft, peft):
            base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            model = package.get_peft_model(base, package.LoraConfig(**FIELDS))
            for name, size in (("same", None), ("resized", 44)):
                if size:
                    model.resize_token_embeddings(size)
                folder = tmp_path / package.__name__ / name
                model.save_pretrained(str(folder))
                state = load_file(folder / "adapter_model.safetensors")
                keys[package.__name__, name] = set(state)
        for name in ("same", "resized"):
            assert keys["minipeft", name] == keys["peft", name]
        assert keys["peft", "resized"] > keys["peft", "same"]

    @pytest.mark.parametrize("choice", [True, False, "auto"])
    def test_embeddings_on_request(self, tmp_path, choice):
        states = []
        for package in (minipeft, peft):
            model = package.get_peft_model(BASE.make(), package.LoraConfig(**FIELDS))
            folder = tmp_path / package.__name__
            model.save_pretrained(str(folder), save_embedding_layers=choice)
            states.append(load_file(folder / "adapter_model.safetensors"))
        assert states[0].keys() == states[1].keys()
        with pytest.raises(ConfigError, match="save_embedding_layers"):
            adapted(LORA, BASE).save_pretrained(tmp_path, save_embedding_layers="all")

    @pytest.mark.parametrize("function", [None, torch.save, accelerate.utils.save])
    def test_a_function_that_saves(self, tmp_path, function):
        """It writes nothing, as in PEFT: it would be a pickle."""
        models = (
            adapted(LORA, BASE),
            peft.get_peft_model(BASE.make(), LORA.theirs(BASE)),
        )
        for model, name in zip(models, ("ours", "theirs")):
            model.save_pretrained(tmp_path / name, save_function=function)
            state = load_file(tmp_path / name / "adapter_model.safetensors")
            assert state.keys() == peft.get_peft_model_state_dict(models[1]).keys()
        with pytest.raises(TypeError, match="save_funktion"):
            models[0].save_pretrained(tmp_path, save_funktion=function)

    def test_who_writes_and_what(self, tmp_path):
        model = adapted(LORA, BASE)
        model.save_pretrained(tmp_path / "none", is_main_process=False)
        assert not (tmp_path / "none").exists()
        with pytest.raises(ConfigError, match="pickle"):
            model.save_pretrained(tmp_path / "none", safe_serialization=False)
        assert not (tmp_path / "none").exists()

    @pytest.mark.parametrize(
        "method", ["lora", "vera", "adalora", "prompt", "p_tuning"]
    )
    def test_a_state_dict_in_place_of_the_models_own(self, tmp_path, method):
        method = METHODS[method]
        first, second = (adapted(method, BASE) for _ in range(2))
        with torch.no_grad():
            for parameter in second.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        first.save_pretrained(tmp_path / "a", state_dict=second.state_dict())
        second.save_pretrained(tmp_path / "b")
        a, b = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"
        )
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        with pytest.raises(AdapterFileError, match="state_dict has no"):
            first.save_pretrained(tmp_path / "c", state_dict={"x": torch.ones(1)})
        assert not (tmp_path / "c").exists()

    @pytest.mark.parametrize("card", [b"---\na: [\n---\n", b"---\n- 1\n---\n", b"\xff"])
    def test_a_card_that_cannot_be_updated(self, tmp_path, card):
        (tmp_path / "README.md").write_bytes(card)
        with pytest.raises(AdapterFileError, match="README.md"):
            adapted(LORA, BASE).create_or_update_model_card(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == card

    @pytest.mark.parametrize("targets", [r".*\.(q|v)_proj", r"(?x) .*\. (q | v) _proj"])
    @pytest.mark.parametrize("base", ["a: b", "#x", "- y", "o'neill", '"', "é"])
    def test_a_card_is_valid_whatever_stands_in_it(self, tmp_path, targets, base):
        model = adapted(LORA, BASE, target_modules=targets)
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(tmp_path)
        card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
        assert card.data.base_model == base
        (row,) = [r for r in card.text.splitlines() if "| target_modules" in r]
        assert len(re.findall(r"(?<!\\)\|", row)) == 3

    def test_the_card_says_base_method_parameters_and_how_to_load(self, tmp_path):
        model = adapted(LORA, BASE)
        model.save_pretrained(tmp_path)
        card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
        assert card.data.library_name == "peft" and "lora" in card.data.tags
        count = model.get_nb_trainable_parameters()[0]
        for text in ("Lora", f"{count:,}", "PeftModel.from_pretrained", "`8`"):
            assert text in card.text
        model.create_or_update_model_card(tmp_path / "card")
        written = (tmp_path / "card" / "README.md").read_text()
        assert written == (tmp_path / "README.md").read_text()
        model.save_pretrained(tmp_path)  # its own card is written again
        (tmp_path / "README.md").write_text("My own words.")
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "My own words."
        model.create_or_update_model_card(tmp_path)
        written = (tmp_path / "README.md").read_text()
        assert "My own words." in written and "library_name: peft" in written
        BASE.make().save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        get_peft_model(base, LoraConfig(**FIELDS)).save_pretrained(tmp_path / "b")
        card = huggingface_hub.ModelCard.load(tmp_path / "b" / "README.md")
        assert card.data.base_model == str(tmp_path / "base")
