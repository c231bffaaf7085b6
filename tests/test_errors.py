"""Wrong input: an error of its own type that says what to do, and a model that is left
as it was."""

from dataclasses import dataclass

import pytest
import torch
from bases import BASES, METHODS, adapted, run, shake
from safetensors.torch import load_file, save_file

import minipeft
from minipeft import (
    AdapterFileError,
    AdapterNameError,
    ConfigError,
    LoraConfig,
    PeftModel,
    TargetError,
    get_peft_model,
)

BASE, LORA = BASES["llama"], METHODS["lora"]


@pytest.fixture
def plain():
    """A base that must come out of the test as it went in."""
    model = BASE.make()
    before = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [
        (name, id(p), p.requires_grad, p.clone())
        for name, p in model.named_parameters()
    ]
    yield model
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    for (name, p), (other, known, grad, value) in zip(
        model.named_parameters(), parameters, strict=True
    ):
        assert (name, id(p), p.requires_grad) == (other, known, grad) and torch.equal(
            p, value
        )
    assert not any(module._forward_hooks for module in model.modules())


class TestNamesOfModules:
    @pytest.mark.parametrize(
        "targets, message",
        [
            (["q_prj"], r"'q_prj' \(nearest: q_proj"),
            (["q_proj", "gate"], r"'gate' \(nearest: gate_proj"),
            (["q_proj", "q_prj", "xyzzy"], r"'q_prj' \(nearest.*'xyzzy'"),
            (r".*\.query", r"'\.\*.*query'"),
            (["proj"], "'proj'"),
            (["mlp"], "layers.0.mlp: MLP is not a linear layer"),
            (["norm"], "RMSNorm is not a linear layer"),
            ([], "nothing is left"),
            (r"(.*q_proj", "is not a regular expression"),
            ("q_proj,v_proj", "names stand in a list"),
            ("q_proj", "names stand in a list"),
        ],
    )
    def test_targets(self, plain, targets, message):
        with pytest.raises(TargetError, match=message):
            get_peft_model(plain, LoraConfig(target_modules=targets))

    @pytest.mark.parametrize(
        "fields, message",
        [
            (dict(exclude_modules=["qq"]), "exclude_modules finds no"),
            (dict(exclude_modules=["q_proj"]), "nothing is left"),
            (dict(modules_to_save=["heads"]), "modules_to_save finds no.*lm_head"),
            (dict(layers_to_transform=[7]), "nothing is left"),
        ],
    )
    def test_other_names_of_modules(self, plain, fields, message):
        with pytest.raises(TargetError, match=message):
            get_peft_model(plain, LoraConfig(target_modules=["q_proj"], **fields))

    def test_no_targets_and_no_usual_names(self):
        with pytest.raises(TargetError, match="say target_modules.*up"):
            get_peft_model(BASES["mlp"].make(), LoraConfig())

    def test_a_model_without_linear_layers(self):
        with pytest.raises(
            TargetError, match="all-linear: this Sequential has no linear layers"
        ):
            get_peft_model(
                torch.nn.Sequential(torch.nn.ReLU()),
                LoraConfig(target_modules="all-linear"),
            )


class TestConfigurations:
    @pytest.mark.parametrize(
        "fields, message",
        [
            (dict(r=0), "r = 0"),
            (dict(r=-4), "r = -4"),
            (dict(r=2.0), "r = 2.0"),
            (dict(r="8"), "r = '8'"),
            (dict(r=True), "r = True"),
            (dict(r=None), "r = None"),
            (dict(rank_pattern={"q_proj": 0}), r"q_proj'\] = 0"),
            (dict(lora_dropout=1.5), "lora_dropout = 1.5"),
            (dict(lora_dropout="0.1"), "lora_dropout = '0.1': expected float"),
            (dict(lora_alpha=None), "lora_alpha = None"),
            (dict(lora_alpha=1e300), "lora_alpha = 1e.300: expected .*32 bits hold"),
            (dict(lora_alpha=-1e39), "lora_alpha = -1e.39"),
            (dict(lora_alpha=1e-60), "lora_alpha = 1e-60"),
            (dict(alpha_pattern={"q_proj": 1e39}), "= 1e.39"),
            (dict(use_dora="yes"), "use_dora = 'yes': expected bool"),
            (dict(target_modules=5), r"target_modules = 5: expected list\[str\] | str"),
            (dict(target_modules=[1]), r"= \[1\]"),
            (dict(modules_to_save="norm"), "modules_to_save = 'norm'"),
            (dict(rank_pattern=None), "rank_pattern = None"),
            (dict(alpha_pattern={"q_proj": "8"}), "alpha_pattern = "),
            (dict(layers_to_transform="0"), "layers_to_transform = '0'"),
            (dict(init_lora_weights="gausian"), "'gausian'.*'gaussian'"),
            (dict(bias="all"), "BitFitConfig"),
            (
                dict(target_modules="all-linear", layers_to_transform=0),
                "layers_to_transform",
            ),
        ],
    )
    def test_configurations(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            LoraConfig(**fields)


class TestNamesOfAdapters:
    @pytest.mark.parametrize(
        "name",
        [
            "a.b",
            "",
            "pop",
            "keys",
            "forward",
            "training",
            "_modules",
            "_parameters",
            "__base__",
            3,
            None,
            "/abs/x",
            "../x",
            "a/b",
            "a\\b",
            "..",
            "a\0b",
        ],
    )
    def test_impossible_names(self, plain, name):
        with pytest.raises(AdapterNameError, match="cannot name an adapter"):
            get_peft_model(plain, LoraConfig(), adapter_name=name)

    def test_names_that_are_taken_or_unknown(self):
        model = adapted(LORA, BASE, "known")
        before, tensors = run(model), list(model.state_dict())
        with pytest.raises(AdapterNameError, match="'known' already"):
            model.add_adapter("known", LoraConfig())
        for wrong in (
            lambda: model.set_adapter("knwn"),
            lambda: model.set_adapter(["known", "knwn"]),
            lambda: model.delete_adapter("knwn"),
            lambda: model.merge_adapter("knwn"),
            lambda: model.merge_and_unload(adapter_names=["knwn"]),
        ):
            with pytest.raises(
                AdapterNameError, match="no adapter 'knwn'.*did you mean 'known'"
            ):
                wrong()
        for twice in (["known", "known"], ("known", "known", "known")):
            with pytest.raises(AdapterNameError, match="'known' is named twice"):
                model.set_adapter(twice)
        assert torch.equal(run(model), before) and list(model.state_dict()) == tensors
        assert model.active_adapters == ["known"]

    def test_adapting_twice(self):
        model = adapted(LORA, BASE)
        for again in (model, model.get_base_model()):
            with pytest.raises(TargetError, match="add_adapter"):
                get_peft_model(again, LoraConfig())

    @pytest.mark.parametrize("wrong", [None, "gpt2", {"a": torch.ones(1)}, LoraConfig])
    def test_what_is_not_a_model(self, wrong):
        with pytest.raises(TargetError, match="expected a model .*, found"):
            get_peft_model(wrong, LoraConfig(target_modules=["q_proj"]))

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda model: torch.compile(model, backend="eager"),
            torch.nn.DataParallel,
            lambda model: torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2))),
        ],
        ids=["compiled", "data parallel", "scripted"],
    )
    def test_a_model_within_a_wrapper(self, wrap):
        model = wrap(BASE.make())
        with pytest.raises(TargetError, match="put adapters into the model itself"):
            get_peft_model(model, LoraConfig(target_modules=["q_proj"]))

    @pytest.mark.parametrize("kind", ["PeftConfig", "LayerConfig", "LoraConfig"])
    def test_a_method_of_ones_own_needs_no_name(self, kind):
        """As the checks of chapters 11, 12, 13 and 15 put a learner's adapter around a
        model: with `create`, and without `peft_type`."""
        made = []

        class Silent(minipeft.Adapter):
            def forward(self, base, *args, **kwargs):
                return base(*args, **kwargs)

        class Own(getattr(minipeft, kind, None) or getattr(minipeft.config, kind)):
            def create(self, base, path):
                made.append(path)
                return Silent()

        fields = {} if kind == "PeftConfig" else {"target_modules": ["q_proj"]}
        get_peft_model(BASE.make(), Own(**fields))
        assert made

    @pytest.mark.parametrize("kind", ["PeftConfig", "LayerConfig"])
    def test_a_configuration_of_no_method(self, kind):
        base = BASE.make()
        with pytest.raises(ConfigError, match=f"{kind} is not a method.*LoraConfig"):
            get_peft_model(base, getattr(minipeft.config, kind)())

    @pytest.mark.parametrize(
        "kind, fields, message",
        [
            ("Lora", dict(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\] = 0"),
            ("LoHa", dict(rank_pattern={"self": -1}), r"rank_pattern\['self'\] = -1"),
            ("LoKr", dict(rank_pattern={3: 2.5}), r"rank_pattern\[3\] = 2.5"),
            (
                "Lora",
                dict(alpha_pattern={"lora_alpha": 0}),
                r"alpha_pattern\['lora_alpha'\] = 0",
            ),
            ("LoHa", dict(alpha_pattern={"alpha": 0}), r"alpha_pattern\['alpha'\] = 0"),
            (
                "AdaLora",
                dict(rank_pattern={"q_proj": 3}),
                "rank_pattern = {'q_proj': 3}",
            ),
        ],
    )
    def test_patterns_name_their_field(self, kind, fields, message):
        more = {"total_step": 9} if kind == "AdaLora" else {}
        with pytest.raises(ConfigError, match=message):
            getattr(minipeft, f"{kind}Config")(**fields, **more)

    @pytest.mark.parametrize("key", ["q_proj", "layers.0.self_attn.q_proj.lora_E", "x"])
    def test_a_pattern_of_adalora_that_no_layer_has(self, key):
        config = minipeft.AdaLoraConfig(
            total_step=9, target_modules=["q_proj"], rank_pattern={key: [True] * 12}
        )
        with pytest.raises(TargetError, match="rank_pattern finds no module for"):
            get_peft_model(BASE.make(), config)

    @pytest.mark.parametrize("where", ["around", "within", "injected"])
    def test_adapters_of_peft_in_the_base(self, where):
        import peft

        model = BASE.make()
        config = peft.LoraConfig(target_modules=["q_proj"], r=2)
        if where == "around":
            model = peft.get_peft_model(model, config)
        elif where == "within":
            peft.get_peft_model(model, config)
        else:
            peft.inject_adapter_in_model(
                peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]), model
            )
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(TargetError, match="PEFT already: unload them first"):
            get_peft_model(model, LoraConfig(target_modules=["v_proj"]))
        still = [name for name, p in model.named_parameters() if p.requires_grad]
        assert still == trained

    def test_new_values_for_a_merged_adapter(self):
        """The weights would hold the old ones."""
        model = adapted(LORA, BASE)
        values = minipeft.get_peft_model_state_dict(model)
        doubled = {key: 2 * tensor for key, tensor in values.items()}
        model.merge_adapter()
        with pytest.raises(AdapterNameError, match="call unmerge_adapter.. before"):
            minipeft.set_peft_model_state_dict(model, doubled)
        model.unmerge_adapter()
        minipeft.set_peft_model_state_dict(model, doubled)
        again = minipeft.get_peft_model_state_dict(model)
        assert all(torch.equal(again[key], doubled[key]) for key in doubled)

    def test_rows_of_merged_adapters(self):
        model = adapted(LORA, BASE)
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            run(model, adapter_names=["default"] * 3)


class Keeps(minipeft.LinearDelta):
    """delta = v, and something that its configuration hands it"""

    def __init__(self, base, keep):
        super().__init__()
        self.v = torch.nn.Parameter(torch.zeros_like(base.weight))
        keep(self, base)

    def delta(self, base):
        return self.v


def own_config(create, **fields):
    """A configuration whose `create` is create(base), for q_proj."""

    class Own(minipeft.config.LayerConfig):
        def create(self, base, path):
            return create(base)

    return Own(target_modules=["q_proj"], **fields)


def as_module(adapter, base):
    adapter.linear = base.module


def as_parameter(adapter, base):
    adapter.weight = base.module.weight


def as_alias(adapter, base):
    adapter.weight = torch.nn.Parameter(base.module.weight.data[:2].T)


def as_buffer(adapter, base):
    adapter.register_buffer("before", base.module.weight.detach())


def as_grandchild(adapter, base):
    adapter.inner = torch.nn.ModuleDict({"one": torch.nn.Sequential(base.module)})


class Scale(minipeft.Adapter):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, base, *args, **kwargs):
        return base(*args, **kwargs)


def in_a_list(adapter, base):
    adapter.kept = [base.module]


def as_a_copy(adapter, base):
    adapter.register_buffer("before", base.module.weight.detach().clone())


class TestMethodsOfOnesOwn:
    @pytest.mark.parametrize(
        "keep, name",
        [
            (as_module, "linear.weight"),
            (as_parameter, "weight"),
            (as_alias, "weight"),
            (as_buffer, "before"),
            (as_grandchild, "inner.one.0.weight"),
        ],
    )
    def test_an_adapter_that_holds_the_base(self, plain, keep, name):
        """It would be trained, and saved as the adapter's."""
        config = own_config(lambda base: Keeps(base, keep))
        with pytest.raises(
            ConfigError,
            match=rf"layers.0.*: {name} of this Keeps is the base's.*\(base",
        ):
            get_peft_model(plain, config)

    @pytest.mark.parametrize("part", ["lm_head", "model.norm", "model.layers.1"])
    def test_one_that_holds_another_part_of_the_model(self, plain, part):
        def keep(adapter, base):
            adapter.other = plain.get_submodule(part)

        with pytest.raises(ConfigError, match=r"other\..*weight of this Keeps is the"):
            get_peft_model(plain, own_config(lambda base: Keeps(base, keep)))

    def test_a_shared_part_that_holds_the_base(self, plain):
        config = own_config(lambda base: Keeps(base, in_a_list))
        type(config).create_shared = lambda self, bases: plain.model.embed_tokens
        with pytest.raises(ConfigError, match="weight of this Embedding is the base's"):
            get_peft_model(plain, config)

    @pytest.mark.parametrize("keep", [in_a_list, as_a_copy])
    def test_what_only_looks_at_the_base(self, keep):
        model = BASE.make()
        model.register_buffer("graph", torch.eye(3).to_sparse())
        before = run(model)
        model = get_peft_model(model, own_config(lambda base: Keeps(base, keep)))
        assert torch.equal(run(model), before)
        model.add_adapter("two", own_config(lambda base: Keeps(base, keep)))
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained and all(name.endswith("default.v") for name in trained)

    @pytest.mark.parametrize("kind", ["LORA", "IA3", "FUSION"])
    def test_the_name_of_a_built_in_method(self, kind):
        """It would replace that method for every loader of the process."""
        built_in = minipeft.config.METHODS[kind]
        message = f"peft_type '{kind}' is that of {built_in.__name__}.*'MY_{kind}'"
        for parent in (minipeft.config.LayerConfig, built_in):
            with pytest.raises(ConfigError, match=message):
                type("Own", (parent,), {"peft_type": kind, "__module__": __name__})
        assert minipeft.config.METHODS[kind] is built_in

    @pytest.mark.parametrize("module", ["__main__", "minipeft_own", __name__])
    def test_a_class_defined_again(self, monkeypatch, module):
        """As when a notebook's cell is run twice."""
        monkeypatch.setattr(minipeft.config, "METHODS", dict(minipeft.config.METHODS))
        for _ in range(2):
            fields = {"peft_type": "OWN", "__module__": module}
            again = type("Own", (minipeft.config.LayerConfig,), fields)
            assert minipeft.config.METHODS["OWN"] is again

    @pytest.mark.parametrize(
        "create, found",
        [
            (lambda base: None, "None.*does it end without a return"),
            (lambda base: Keeps, "<class '.*Keeps'>"),
            (lambda base: torch.nn.Linear(16, 16), "Linear"),
            (lambda base: base.weight, "tensor|Parameter"),
        ],
    )
    def test_what_is_no_adapter(self, plain, create, found):
        with pytest.raises(
            ConfigError, match=rf"q_proj: Own.create returns ({found})(?s:.*)an Adapter"
        ):
            get_peft_model(plain, own_config(create))

    @pytest.mark.parametrize(
        "value",
        [
            len,
            torch.ones(2),
            {"inner": [object()]},
            {1: "a", "b": 2},
            (c for c in "ab"),
        ],
        ids=["function", "tensor", "object", "mixed keys", "generator"],
    )
    def test_a_field_that_no_file_can_hold(self, plain, value):
        """Found out before the training, not when it is saved."""

        @dataclass(kw_only=True)
        class Fielded(minipeft.config.LayerConfig):
            what: object = None

            def create(self, base, path):
                return Keeps(base, in_a_list)

        config = Fielded(target_modules=["q_proj"], what=value)
        message = r"Fielded.what = (?s:.*): expected what JSON holds"
        with pytest.raises(ConfigError, match=message):
            get_peft_model(plain, config)
        model = get_peft_model(BASE.make(), LoraConfig())
        with pytest.raises(ConfigError, match=message):
            model.add_adapter("two", config)
        fine = Fielded(target_modules=["q_proj"], what={"a": [1, None, "b", (2.5,)]})
        model.add_adapter("two", fine)

    @pytest.mark.parametrize("parent", ["PeftConfig", "LayerConfig"])
    def test_saving_without_a_peft_type(self, tmp_path, parent):
        class Nameless(getattr(minipeft.config, parent)):
            def create(self, base, path):
                return Scale()

        fields = {"target_modules": ["q_proj"]} if parent == "LayerConfig" else {}
        model = get_peft_model(BASE.make(), Nameless(**fields))
        with pytest.raises(AdapterFileError, match="Nameless has no peft_type.*'MY_"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out" / "adapter_config.json").exists()
        Nameless.peft_type = "MY_OWN"  # as the message says
        model.save_pretrained(tmp_path / "out")
        assert (
            '"peft_type": "MY_OWN"'
            in (tmp_path / "out" / "adapter_config.json").read_text()
        )


def break_fourth_fold(monkeypatch):
    """Merging goes well three times, and runs out of memory at the fourth layer."""
    fold, calls = minipeft.LinearDelta.fold, []

    def broken(self, base):
        calls.append(base)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        fold(self, base)

    monkeypatch.setattr(minipeft.LinearDelta, "fold", broken)


class TestInterruptions:
    def test_an_initialisation_that_fails_midway_leaves_the_weights(
        self, plain, monkeypatch
    ):
        from minipeft.methods import lora_init

        done = []

        def broken(adapter, base, config):
            base.weight = base.weight * 2
            done.append(base)
            if len(done) == 3:
                raise RuntimeError("no convergence")

        monkeypatch.setitem(lora_init.INITS, "broken", broken)
        with pytest.raises(RuntimeError, match="no convergence"):
            get_peft_model(plain, LoraConfig(init_lora_weights="broken"))

    def test_merging_that_fails_midway_leaves_the_weights(self, monkeypatch):
        model = adapted(LORA, BASE)
        model.add_adapter("b", LORA.ours(BASE))
        model.merge_adapter(["b"])
        before = run(model)
        break_fourth_fold(monkeypatch)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.merge_adapter(["default"])
        assert torch.equal(run(model), before) and model.merged_adapters == ["b"]

    def test_merging_slots_within_slots_that_fails_midway_leaves_the_weights(
        self, monkeypatch
    ):
        model = shake(
            get_peft_model(BASE.make(), minipeft.SubspaceConfig(d=50), "whole"), "whole"
        )
        # the outer slot is merged first, and undone last
        model.add_adapter("inner", LORA.ours(BASE))
        shake(model, "inner").set_adapter(["whole", "inner"])
        before, state = (
            run(model),
            {k: t.clone() for k, t in model.state_dict().items()},
        )
        break_fourth_fold(monkeypatch)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.merge_adapter()
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
        assert torch.equal(run(model), before) and model.merged_adapters == []

    def test_deleting_an_adapter_leaves_another_merged(self):
        model = adapted(LORA, BASE, "a")
        model.add_adapter("b", LORA.ours(BASE))
        shake(model, "b", seed=6)
        model.merge_adapter(["a"])
        weights = [
            slot.weight.clone()
            for slot in model.modules()
            if isinstance(slot, minipeft.Slot) and "a" in slot.adapters
        ]
        model.delete_adapter("b")
        after = [
            slot.weight
            for slot in model.modules()
            if isinstance(slot, minipeft.Slot) and "a" in slot.adapters
        ]
        assert model.merged_adapters == ["a"] and all(map(torch.equal, after, weights))
        model.unmerge_adapter()
        assert torch.equal(run(model), run(adapted(LORA, BASE, "a")))


@pytest.fixture
def folder(tmp_path):
    adapted(LORA, BASE).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def refused(plain, folder, kind=AdapterFileError):
    with pytest.raises(kind) as caught:
        PeftModel.from_pretrained(plain, folder)
    other = adapted(LORA, BASE, "other")
    before, tensors = run(other), list(other.state_dict())
    with pytest.raises(kind):
        other.load_adapter(folder, "new")
    assert torch.equal(run(other), before) and list(other.state_dict()) == tensors
    assert list(other.peft_config) == ["other"]
    return str(caught.value)


class TestTensorsInFiles:
    def test_a_file_from_another_size(self, plain, folder):
        from minipeft.lm.gpt import GPT, GPTConfig

        wide = GPT(
            GPTConfig(
                vocab_size=40,
                hidden_size=32,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=4,
            )
        )
        get_peft_model(wide, LORA.ours(BASE)).save_pretrained(folder)
        message = refused(plain, folder)
        for layer in range(2):
            assert (
                f"model.layers.{layer}.self_attn.q_proj.lora_A.weight  (4, 32), the"
                " model has (4, 16)" in message
            )
            assert (
                f"model.layers.{layer}.mlp.down_proj.lora_B.weight  (32, 4), the"
                " model has (16, 4)" in message
            )
        assert message.count("unexpected") == 6
        assert (
            "unexpected  base_model.model.model.layers.2.mlp.down_proj.lora_A.weight "
            " (4, 24)" in message
        )

    def test_a_file_from_another_architecture(self, plain, tmp_path):
        adapted(LORA, BASES["hf_gpt2"]).save_pretrained(tmp_path)
        assert "c_attn" in refused(plain, tmp_path, TargetError)

    def test_missing_tensors(self, plain, folder):
        rewrite(
            folder,
            lambda tensors: {
                key: value for key, value in tensors.items() if "lora_B" not in key
            },
        )
        assert refused(plain, folder).count("missing") == 6

    def test_a_wrong_prefix(self, plain, folder):
        rewrite(
            folder,
            lambda tensors: {
                key.removeprefix("base_model.model."): value
                for key, value in tensors.items()
            },
        )
        message = refused(plain, folder)
        assert (
            "No key fits" in message
            and "'model.layers.0" in message
            and "'base_model.model.model.layers.0" in message
        )

    def test_another_base_weight(self, plain, folder):
        key = "base_model.model.model.embed_tokens.base_layer.weight"
        rewrite(folder, lambda tensors: tensors | {key: torch.ones(40, 16)})
        assert "another base weight" in refused(plain, folder)

    @pytest.mark.parametrize("name", ["forward", "training", "in_features"])
    def test_a_base_weight_that_is_no_weight(self, plain, folder, name):
        key = f"base_model.model.model.layers.0.mlp.up_proj.base_layer.{name}"
        rewrite(folder, lambda tensors: tensors | {key: torch.ones(40, 16)})
        assert f"{name}: this adapter belongs" in refused(plain, folder)

    @pytest.mark.parametrize("shape", [(), (40,), (40, 3)])
    @pytest.mark.parametrize("part", ["", "base_layer."])
    def test_an_embedding_of_another_shape(self, plain, folder, part, shape):
        key = f"base_model.model.model.embed_tokens.{part}weight"
        rewrite(folder, lambda tensors: tensors | {key: torch.ones(shape)})
        message = f"{key} {shape}, expected the shape of the model's embedding, ("
        assert message in refused(plain, folder)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda t: t.fill_(float("nan")), "not finite"),
            (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn, expected floats"),
            (lambda t: t.to(torch.complex64), "complex64, expected floats"),
            (lambda t: t.index_fill_(0, torch.tensor([0]), float("inf")), "not finite"),
            (lambda t: t.mul_(0).sub_(float("inf")), "not finite"),
            (lambda t: t.double().fill_(1e300), "not finite"),
            (lambda t: t.double().index_fill_(0, torch.tensor([0]), -1e39), "float32"),
            (lambda t: t.to(torch.int64), "torch.int64, expected floats"),
            (lambda t: t.to(torch.uint8), "torch.uint8, expected floats"),
            (lambda t: t > 0, "torch.bool, expected floats"),
        ],
    )
    @pytest.mark.parametrize("name", ["lora_A", "lora_B"])
    def test_tensors_that_are_no_finite_floats(
        self, plain, folder, change, message, name
    ):
        def one(tensors):
            key = next(key for key in tensors if name in key)
            return tensors | {key: change(tensors[key].clone())}

        rewrite(folder, one)
        found = refused(plain, folder)
        assert message in found and name in found and found.count("model.layers") == 1

    @pytest.mark.parametrize("bad", ["nan", "-inf", "int"])
    @pytest.mark.parametrize(
        "method", ["ia3", "prompt", "prefix", "vera", "bottleneck", "subspace", "copy"]
    )
    def test_of_other_methods(self, plain, tmp_path, method, bad):
        fields = dict(modules_to_save=["norm"]) if method == "copy" else {}
        model = adapted(METHODS.get(method, LORA), BASE, **fields)
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        last = sorted(tensors)[-1]
        values = tensors[last].clone()
        tensors[last] = values.int() if bad == "int" else values.fill_(float(bad))
        save_file(tensors, file)
        found = refused(plain, tmp_path)
        assert last in found and {"int": "torch.int32"}.get(bad, "not finite") in found

    @pytest.mark.parametrize("bad", ["nan", "inf", "int"])
    def test_tensors_that_a_script_gives(self, bad):
        model = adapted(LORA, BASE)
        values = minipeft.get_peft_model_state_dict(model)
        first = min(values)
        one = values[first].clone()
        values[first] = one.int() if bad == "int" else one.fill_(float(bad))
        before = run(model)
        with pytest.raises(AdapterFileError, match="torch.int32|not finite"):
            minipeft.set_peft_model_state_dict(model, values)
        assert torch.equal(run(model), before)


class TestFiles:
    @pytest.mark.parametrize("size", [0, 4, 100, -1])
    def test_a_truncated_file(self, plain, folder, size):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        assert "cut short or damaged" in refused(plain, folder)

    @pytest.mark.parametrize(
        "content, kind, message",
        [
            ("{}", ConfigError, "no peft_type"),
            ('{"peft_type": null}', ConfigError, "no peft_type"),
            ('{"peft_type": "LORRA"}', ConfigError, "'LORRA'.*did you mean 'LORA'"),
            ('{"peft_type": "HRA"}', ConfigError, "'HRA'.*expected one of "),
            ("{", AdapterFileError, "not JSON"),
            ('{"peft_type": ["LORA"]}', ConfigError, "unknown peft_type"),
            ("[]", AdapterFileError, "list"),
            ("", AdapterFileError, "not JSON"),
            ('{"peft_type": "LORA", "r": 0}', ConfigError, "r = 0"),
            ('{"peft_type": "LORA", "bias": "all"}', ConfigError, "bias"),
        ],
    )
    def test_configuration_files(self, plain, folder, content, kind, message):
        import re

        (folder / "adapter_config.json").write_text(content)
        found = refused(plain, folder, kind)
        assert re.search(message, found) and "adapter_config.json" in found

    def test_folders(self, plain, folder, tmp_path, monkeypatch):
        assert "no folder" in refused(plain, tmp_path / "nowhere")
        (folder / "adapter_model.safetensors").unlink()
        assert "has no adapter_model.safetensors" in refused(plain, folder)
        (folder / "adapter_model.bin").write_bytes(b"")
        assert "pickle" in refused(plain, folder)
        parent = tmp_path / "parent"
        adapted(LORA, BASE, "inner").save_pretrained(parent)
        assert "inner" in refused(plain, parent)
        model = adapted(LORA, BASE)
        with pytest.raises(AdapterFileError, match="is a file"):
            model.save_pretrained(folder / "adapter_config.json")
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        for saved in (model, model.peft_config["default"], plain):
            with pytest.raises(ValueError, match="an empty name"):
                saved.save_pretrained("")
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
    @pytest.mark.parametrize("field", ["lora_alpha", "lora_dropout"])
    def test_numbers_in_files_are_finite(self, plain, folder, field, value):
        file = folder / "adapter_config.json"
        text = file.read_text()
        import re

        file.write_text(re.sub(rf'"{field}": [\d.]+', f'"{field}": {value}', text))
        assert f"{field} = " in refused(plain, folder, ConfigError)

    @pytest.mark.parametrize(
        "content",
        [
            "[" * 100_000,
            '{"peft_type": ' * 50_000,
            '{"peft_type": "LORA", "target_modules": '
            + "[" * 30_000
            + "]" * 30_000
            + "}",
        ],
        ids=["lists", "objects", "inside"],
    )
    def test_deeply_nested_json(self, plain, folder, content):
        (folder / "adapter_config.json").write_text(content)
        assert "adapter_config.json" in refused(plain, folder)

    @pytest.mark.parametrize(
        "data",
        [
            {"peft_type": "x" * 10**6},
            {"peft_type": "LORA", "r": "8" * 10**6},
            {"peft_type": "LORA", "unheard_of": ["x" * 10**6]},
            {"peft_type": "LORA", "task_type": "x" * 10**6},
        ],
    )
    def test_huge_values_are_abbreviated(self, plain, folder, data):
        import json

        (folder / "adapter_config.json").write_text(json.dumps(data))
        assert len(refused(plain, folder, ConfigError)) < 1000

    @pytest.mark.parametrize(
        "file", ["adapter_config.json", "adapter_model.safetensors"]
    )
    @pytest.mark.parametrize(
        "content", [b"", b"\x00\xff\xfe", b"{}junk", b"\x80" * 1000]
    )
    def test_damaged_files(self, plain, folder, file, content):
        (folder / file).write_bytes(content)
        assert file in refused(plain, folder)

    @pytest.mark.parametrize(
        "file", ["adapter_config.json", "adapter_model.safetensors"]
    )
    def test_a_folder_in_the_place_of_a_file(self, plain, folder, file):
        (folder / file).unlink()
        (folder / file).mkdir()
        assert f"{file} is a folder" in refused(plain, folder)
        with pytest.raises(AdapterFileError, match="cannot write into"):
            adapted(LORA, BASE).save_pretrained(folder)
        assert not list(folder.glob(".*"))  # nothing half-written

    @pytest.mark.parametrize("where", ["write", "replace"])
    def test_a_full_disk(self, folder, monkeypatch, where):
        import os

        import safetensors.torch

        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def full(*args, **kwargs):
            if where == "write":
                raise safetensors.SafetensorError("I/O error: No space left on device")
            raise OSError(28, "No space left on device")

        if where == "write":
            monkeypatch.setattr(safetensors.torch, "save_file", full)
        else:
            monkeypatch.setattr(os, "replace", full)
        with pytest.raises(AdapterFileError, match="cannot write into.*No space left"):
            adapted(LORA, BASE, r=2).save_pretrained(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_no_permission(self, folder, monkeypatch):
        from pathlib import Path

        def denied(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "touch", denied)
        monkeypatch.setattr(Path, "mkdir", denied)
        with pytest.raises(AdapterFileError, match="cannot write.*Permission denied"):
            adapted(LORA, BASE).save_pretrained(folder / "new")
