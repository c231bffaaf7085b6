"""Merging across the whole model: nested slots in any order, refusals and deletions in
between, and what PEFT does with one merged and another active adapter."""

import copy
import threading
import warnings
from collections import OrderedDict

import pytest
import torch
from bases import BASES, CASES, adapted, close, differ, inputs, rounding, run, shake
from tolerance import tolerance
from torch import nn
from torch.nn.utils import prune

import minipeft
from minipeft import (
    AdapterNameError,
    BitFitConfig,
    BottleneckConfig,
    ConfigError,
    DoraConfig,
    FusionConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    NotMergeableError,
    SubspaceConfig,
    TargetError,
    get_peft_model,
    targets,
)
from minipeft.quant import dequantize_model, quantize_model

LLAMA = BASES["llama"]
# Pairs of adapters whose slots nest, or are the same: (of "a", of "b")
NESTED = {
    "subspace around lora": (
        SubspaceConfig(d=50),
        LoraConfig(target_modules=["q_proj"]),
    ),
    "subspace around dora": (
        SubspaceConfig(d=50),
        DoraConfig(target_modules=["v_proj"]),
    ),
    "subspace around norms": (SubspaceConfig(d=50), LNTuningConfig()),
    "subspace around ia3": (
        SubspaceConfig(d=50),
        IA3Config(target_modules=["v_proj", "up_proj"], feedforward_modules=[]),
    ),
    "subspace around a copy": (
        SubspaceConfig(d=50),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.0.mlp"]),
    ),
    "copied mlp around lora": (
        LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.0.mlp"]),
        LoraConfig(target_modules=["down_proj", "q_proj"]),
    ),
    "copied attention around ia3": (
        LoraConfig(target_modules=["up_proj"], modules_to_save=["layers.1.self_attn"]),
        IA3Config(target_modules=["v_proj", "up_proj"], feedforward_modules=[]),
    ),
    "biases of blocks and layers": (
        BitFitConfig(target_modules=["down_proj"]),
        DoraConfig(target_modules=["down_proj"]),
    ),
    "two on one layer": (
        DoraConfig(target_modules=["down_proj"]),
        LoraConfig(target_modules=["down_proj"]),
    ),
}


# of the models made here: up to four layers of width 8 and two norms, and an adapter's
# two products beside each
SMALL = tolerance(torch.float32, terms=8, steps=6 + 2 * 4)


def pair(name, base=LLAMA):
    a, b = NESTED[name]
    model = get_peft_model(base.make(), copy.deepcopy(a), "a")
    model.add_adapter("b", copy.deepcopy(b))
    return shake(shake(model, "a", seed=4, step=0.1), "b", seed=5, step=0.1)


def parameters(model):
    """{(number of the module, name): parameter} of the bare model inside."""
    bare = model.get_base_model() if isinstance(model, minipeft.PeftModel) else model
    return {
        (i, name): p
        for i, module in enumerate(targets.bare_modules(bare))
        for name, p in module._parameters.items()
        if p is not None
    }


def assert_base_is_back(model, start, base=LLAMA):
    plain = model.unload()
    now = parameters(plain)
    assert now.keys() == start.keys()
    assert all(now[key] is start[key] for key in start)  # the very parameters
    expected = base.make().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("name", NESTED)
class TestNestedSlots:
    @pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
    def test_one_by_one_and_unmerged(self, name, order):
        model = pair(name)
        start = parameters(model)
        model.set_adapter(list(order))
        apart = run(model)
        for adapter in order:
            model.merge_adapter([adapter])
        close(run(model), apart, rounding(2))
        model.unmerge_adapter()
        assert torch.equal(run(model), apart)
        assert_base_is_back(model, start)

    @pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
    def test_unloaded_while_merged(self, name, order):
        model = pair(name)
        start = parameters(model)
        for adapter in order:
            model.merge_adapter([adapter])
        assert_base_is_back(model, start)

    @pytest.mark.parametrize("first, second", [("a", "b"), ("b", "a")])
    def test_deleted_while_both_are_merged(self, name, first, second):
        model = pair(name)
        start = parameters(model)
        model.merge_adapter(["b"])
        model.merge_adapter(["a"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.delete_adapter(first)
        assert model.merged_adapters == [second]
        model.unmerge_adapter()
        model.merge_adapter([second])
        with_second = run(model)
        model.unmerge_adapter()
        model.set_adapter(second)
        close(with_second, run(model), rounding(2))
        model.delete_adapter(second)
        assert_base_is_back(model, start)

    @pytest.mark.parametrize("first, broken", [("a", "b"), ("b", "a")])
    def test_a_refused_merge_in_between(self, name, first, broken):
        model = pair(name)
        start = parameters(model)
        model.set_adapter(first)
        model.merge_adapter()
        merged = run(model)
        parameter = next(
            p for n, p in model.named_parameters() if f".adapters.{broken}." in n
        )
        with torch.no_grad():
            value = parameter.flatten()[0].clone()
            parameter.view(-1)[0] = torch.nan
        with pytest.raises(NotMergeableError, match="not finite"):
            model.merge_adapter([broken], safe_merge=True)
        assert model.merged_adapters == [first] and torch.equal(run(model), merged)
        with torch.no_grad():
            parameter.view(-1)[0] = value
        model.merge_adapter([broken])
        model.unmerge_adapter()
        assert_base_is_back(model, start)

    def test_within_disable_adapter_it_is_the_base(self, name):
        model = pair(name)
        expected = run(LLAMA.make())
        for merged in ([], ["b"], ["b", "a"]):
            if merged:
                model.merge_adapter(merged[-1:])
            before = run(model)
            with model.disable_adapter():
                assert torch.equal(run(model), expected)
            assert torch.equal(run(model), before) and model.merged_adapters == merged


def in_threads(serve, threads=4):
    """serve(i) in each of as many threads, at once."""
    started = [threading.Thread(target=serve, args=(i,)) for i in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


class TestDisabled:
    def test_merging_is_refused(self):
        model = pair("two on one layer")
        start = parameters(model)
        model.merge_adapter(["b"])
        merged = run(model)
        with model.disable_adapter():
            for merge in (model.merge_adapter, model.merge_and_unload):
                with pytest.raises(NotMergeableError, match="disable_adapter"):
                    merge(adapter_names=["a"])
            assert torch.equal(run(model), run(LLAMA.make()))
        assert model.merged_adapters == ["b"] and torch.equal(run(model), merged)
        assert_base_is_back(model, start)

    def test_deleting_and_unmerging_within_it(self):
        model = pair("subspace around lora")
        start = parameters(model)
        model.merge_adapter(["b"])
        model.merge_adapter(["a"])
        with model.disable_adapter():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.delete_adapter("a")
            assert torch.equal(run(model), run(LLAMA.make()))
        assert model.merged_adapters == ["b"]
        with model.disable_adapter():
            model.unmerge_adapter()
        assert model.merged_adapters == []
        assert_base_is_back(model, start)

    def test_one_within_another(self):
        model = pair("two on one layer")
        model.merge_adapter(["b"])
        merged, expected = run(model), run(LLAMA.make())
        with model.disable_adapter():
            with model.disable_adapter():
                assert torch.equal(run(model), expected)
            assert torch.equal(run(model), expected)
        assert torch.equal(run(model), merged)


class TestMergedAndActive:
    @pytest.mark.parametrize(
        "config", ["LoraConfig", "IA3Config", "LoHaConfig", "LoKrConfig", "VeraConfig"]
    )
    def test_as_in_peft(self, config, tmp_path):
        """Merging "b" while "a" is active gives base + b on the layers of "b"."""
        import peft

        fields = dict(target_modules=["q_proj", "v_proj"])
        if config == "IA3Config":
            fields |= dict(feedforward_modules=[])
        make = BASES["hf_llama"].make
        ours = get_peft_model(make(), getattr(minipeft, config)(**fields), "a")
        fields["target_modules"] = ["q_proj"]
        ours.add_adapter("b", getattr(minipeft, config)(**fields))
        shake(shake(ours, "a", seed=4), "b", seed=5)
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "a", "a")
        theirs.load_adapter(tmp_path / "b", "b")
        for model in (ours, theirs):
            model.set_adapter("a")
        close(run(ours), run(theirs))
        apart = run(ours)
        ours.merge_adapter(["b"])
        theirs.base_model.merge_adapter(["b"])
        close(run(ours), run(theirs), rounding(2))
        differ(run(ours), apart)
        for model in (ours, theirs):
            with pytest.warns(UserWarning, match="cannot be set when the model is mer"):
                model.set_adapter("b")
        close(run(ours), run(theirs), rounding(2))
        assert ours.merged_adapters == []

    def test_an_adapter_added_to_a_merged_model_starts_from_the_base(self):
        model = get_peft_model(LLAMA.make(), LNTuningConfig(), "a")
        shake(model, "a").merge_adapter()
        model.add_adapter("b", LNTuningConfig())
        assert model.merged_adapters == ["a"]
        model.unmerge_adapter()
        model.set_adapter("b")
        assert torch.equal(run(model), run(LLAMA.make()))

    def test_a_refused_choice_leaves_it_merged(self):
        config = LoraConfig(modules_to_save=["norm"], init_lora_weights=False)
        model = get_peft_model(LLAMA.make(), config, "a")
        model.add_adapter("b", config)
        model.merge_adapter(["a"])
        before = run(model)
        for names in (["a", "b"], ["b", "a"], ["a", "c"], "c"):
            with pytest.raises(AdapterNameError):
                model.set_adapter(names)
            assert model.merged_adapters == ["a"] and torch.equal(run(model), before)

    @pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.bfloat16()])
    def test_a_merged_model_that_is_moved(self, move):
        model, plain = pair("subspace around lora"), move(LLAMA.make())
        model.merge_adapter(["b"])
        move(model)
        model.merge_adapter(["a"])
        model.unmerge_adapter()
        expected = plain.state_dict()
        for key, value in model.unload().state_dict().items():
            assert value.dtype == expected[key].dtype
            assert torch.equal(value, expected[key])

    @pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.bfloat16()])
    @pytest.mark.parametrize("part", ["base_model", "get_base_model"])
    @pytest.mark.parametrize(
        "method, base", [case for case in CASES if case[0].mergeable]
    )
    @pytest.mark.filterwarnings("ignore:rounding")
    def test_a_part_of_a_model_that_is_moved(self, method, base, part, move):
        """What adapters share, and the old weights of merged layers, are moved too."""
        models = [adapted(method, base) for _ in range(2)]
        models[0].merge_adapter(lossy=True)
        for model in models:
            move(model.base_model if part == "base_model" else model.get_base_model())
        models[0].unmerge_adapter()
        found, expected = (model.state_dict() for model in models)
        assert {key: value.dtype for key, value in found.items()} == {
            key: value.dtype for key, value in expected.items()
        }
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
        assert torch.equal(run(models[0]), run(models[1]))

    def test_a_deep_copy_of_a_merged_model(self):
        model = pair("subspace around lora")
        model.merge_adapter(["b"])
        model.merge_adapter(["a"])
        other = copy.deepcopy(model)
        merged = run(model)
        model.unmerge_adapter()
        assert torch.equal(run(other), merged)
        start = run(LLAMA.make())
        assert torch.equal(run(other.unload()), start) and not torch.equal(
            merged, start
        )


@pytest.mark.parametrize(
    "name", [name for name in NESTED if name.startswith("subspace")]
)
class TestMergedWithinASubspace:
    """Adapter b is merged; a, which is only active, moves the weights beneath it."""

    def test_they_compute_as_unmerged(self, name):
        model = pair(name)
        start = parameters(model)
        model.set_adapter(["a", "b"])
        apart = run(model)
        model.set_adapter("a")
        assert not torch.equal(run(model), apart)
        model.merge_adapter(["b"])
        merged = parameters(model)
        assert torch.equal(run(model), apart)
        now = parameters(model)
        assert all(now[key] is merged[key] for key in merged)
        with model.disable_adapter():
            assert torch.equal(run(model), run(LLAMA.make()))
        assert torch.equal(run(model), apart)
        assert_base_is_back(model, start)

    def test_an_error_in_between(self, name):
        model = pair(name)
        model.set_adapter("a")
        model.merge_adapter(["b"])
        expected = run(model)
        layer = model.get_base_model().model.layers[1]
        broken = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model)
        broken.remove()
        assert torch.equal(run(model), expected)

    def test_the_same_gradients(self, name):
        model = pair(name)
        (theta,) = [p for n, p in model.named_parameters() if n.endswith("theta")]
        grads = []
        for active, merged in (["a", "b"], []), (["a"], ["b"]):
            model.set_adapter(active)
            model.merge_adapter(merged)
            theta.grad = None
            model(**inputs()).logits.logsumexp(-1).mean().backward()
            grads.append(theta.grad)
        assert torch.equal(*grads) and grads[0].any()


class TestTrainingAMergedModel:
    @pytest.mark.parametrize("base", ["llama", "hf_llama", "mlp"])
    def test_it_says_what_to_do(self, base):
        base = BASES[base]
        config = LoraConfig(target_modules=list(base.targets))
        model = get_peft_model(base.make(), config).train()
        model.merge_adapter()
        ids = inputs()["input_ids"]
        outputs = model(ids) if base.name == "mlp" else model(ids, labels=ids)
        values = [outputs] if base.name == "mlp" else [outputs.loss, outputs.logits]
        for value in values:
            with pytest.raises(NotMergeableError, match=r"unmerge_adapter\(\)"):
                value.float().mean().backward()
        model.unmerge_adapter()
        loss = model(ids).mean() if base.name == "mlp" else model(ids, labels=ids).loss
        loss.backward()

    def test_the_outputs_are_the_same_numbers(self):
        model = pair("two on one layer").train()
        model.merge_adapter(["b"])
        ids = inputs()["input_ids"]
        with torch.no_grad():
            expected = model(ids).logits
        assert torch.equal(model(ids).logits.detach(), expected)
        assert not model.eval()(ids).logits.requires_grad


class TestUnload:
    @pytest.mark.parametrize(
        "name, targets",
        [
            ("BertModel", ["query", "word_embeddings"]),
            ("BertForSequenceClassification", ["query", "word_embeddings"]),
            ("GPT2Model", ["c_attn"]),
            ("GPT2ForSequenceClassification", ["c_attn", "wte"]),
            ("T5EncoderModel", ["q", "v"]),
            ("LlamaForSequenceClassification", ["q_proj", "embed_tokens"]),
            ("LlamaForTokenClassification", ["q_proj", "embed_tokens"]),
            ("Qwen2ForQuestionAnswering", ["q_proj", "embed_tokens"]),
            ("RobertaModel", ["query", "word_embeddings"]),
            ("OPTModel", ["q_proj", "embed_tokens"]),
            ("BloomModel", ["query_key_value", "word_embeddings"]),
            ("MT5EncoderModel", ["q", "v", "shared"]),
        ],
    )
    def test_tied_embeddings_without_a_head(self, name, targets, tmp_path):
        import transformers

        kind = getattr(transformers, name)
        if "T5" in name:
            sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        elif name.startswith("GPT2"):
            sizes = dict(n_embd=16, n_layer=1, n_head=2)
        else:
            sizes = dict(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
            )
        if name.startswith("Qwen2"):
            sizes |= dict(num_key_value_heads=2)
        if name == "OPTModel":
            sizes |= dict(ffn_dim=24, word_embed_proj_dim=16)
        sizes |= dict(vocab_size=40, pad_token_id=0, tie_word_embeddings=True)
        torch.manual_seed(0)
        base = kind(kind.config_class(**sizes)).eval()
        model = shake(get_peft_model(base, LoraConfig(target_modules=targets)))
        ids = inputs()["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=ids)[0]
            plain = model.merge_and_unload()
            close(plain(input_ids=ids)[0], expected)
            plain.save_pretrained(tmp_path)
            again = kind.from_pretrained(tmp_path).eval()
            close(again(input_ids=ids)[0], expected)
        assert not any(isinstance(m, minipeft.Slot) for m in plain.modules())

    def test_a_refused_merge_keeps_what_was_merged(self):
        base = minipeft.quant.quantize_model(LLAMA.make())
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), "a")
        model.add_adapter("b", LoraConfig(target_modules=["v_proj"]))
        shake(shake(model, "a"), "b")
        with pytest.warns(UserWarning, match="rounding"):
            model.merge_adapter(["a"], lossy=True)
        merged = run(model)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if ".b." in n)[0] = torch.inf
        with pytest.raises(NotMergeableError, match="not finite"):
            model.merge_and_unload(
                adapter_names=["b"], safe_merge=True, dequantize=True
            )
        assert model.merged_adapters == ["a"] and torch.equal(run(model), merged)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def computed_bias(layer):
    return torch.nn.utils.parametrize.register_parametrization(
        layer, "bias", nn.Identity()
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestComputedWeights:
    """Layers whose weight is no parameter can be adapted, but not merged."""

    @pytest.mark.parametrize(
        "wrap, method",
        [
            (torch.nn.utils.parametrizations.weight_norm, "Lora"),
            (torch.nn.utils.parametrizations.spectral_norm, "Lora"),
            (torch.nn.utils.parametrizations.orthogonal, "LoHa"),
            (torch.nn.utils.parametrizations.weight_norm, "Dora"),
            (torch.nn.utils.parametrizations.orthogonal, "Dora"),
            (torch.nn.utils.parametrizations.weight_norm, "IA3"),
            (torch.nn.utils.weight_norm, "Lora"),
            (torch.nn.utils.weight_norm, "Dora"),
            (torch.nn.utils.spectral_norm, "Lora"),
            (pruned, "Lora"),
            (pruned, "Dora"),
            (computed_bias, "IA3"),
            (computed_bias, "BitFit"),
        ],
    )
    def test_merging_says_so(self, wrap, method):
        torch.manual_seed(0)
        layers = OrderedDict(one=wrap(nn.Linear(8, 8)), two=nn.Linear(8, 8))
        base = nn.Sequential(layers).eval()
        x = torch.randn(3, 8)
        start = base(x).detach()
        fields = dict(feedforward_modules=[]) if method == "IA3" else {}
        config = getattr(minipeft, f"{method}Config")
        model = get_peft_model(base, config(target_modules=["one", "two"], **fields))
        shake(model)
        apart = model(x).detach()
        differ(apart, start)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(NotMergeableError, match="parametrization"):
                merge()
            assert torch.equal(model(x), apart) and model.merged_adapters == []
        assert torch.equal(model.unload()(x), start)

    @pytest.mark.parametrize("method", ["Lora", "Dora", "LoHa"])
    def test_beside_a_computed_bias_the_weight_is_merged(self, method):
        torch.manual_seed(0)
        base = nn.Sequential(OrderedDict(one=computed_bias(nn.Linear(8, 8)))).eval()
        x = torch.randn(3, 8)
        config = getattr(minipeft, f"{method}Config")
        model = shake(get_peft_model(base, config(target_modules=["one"])))
        apart = model(x).detach()
        model.merge_adapter()
        close(model(x), apart)

    @pytest.mark.parametrize("target", ["two", "three"])
    def test_a_copy_that_torch_refuses(self, target):
        layers = {name: nn.Linear(8, 8) for name in ("one", "two", "three")}
        base = nn.Sequential(OrderedDict(layers))
        torch.nn.utils.weight_norm(base.one)
        before = base(torch.ones(1, 8))  # from now on its weight has a history
        config = LoraConfig(target_modules=[target], modules_to_save=["one"])
        with pytest.raises(TargetError, match="cannot be copied.*Remove its weight"):
            get_peft_model(base, config)
        assert torch.equal(base(torch.ones(1, 8)), before)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class ByHand(nn.Linear):  # as transformers' FalconLinear
    def forward(self, x):
        return x @ self.weight.T + self.bias


class TwoInputs(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Doubling(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class Shifted(nn.Embedding):  # as OPT's positions
    def forward(self, ids):
        return super().forward(ids + 2)


class TestForwardsOfTheirOwn:
    """Subclasses of nn.Linear and nn.Embedding: right, or refused."""

    @pytest.mark.parametrize(
        "layer",
        [Doubled(8, 8), TwoInputs(8, 8), Doubling(9, 8), Shifted(9, 8)],
        ids=lambda layer: type(layer).__name__,
    )
    @pytest.mark.parametrize(
        "method", ["Lora", "Dora", "LoHa", "Vera", "IA3", "BitFit"]
    )
    def test_refused_in_words(self, layer, method):
        base = nn.Sequential(layer)
        fields = {"IA3": dict(feedforward_modules=[]), "Vera": dict(r=4)}
        config = getattr(minipeft, f"{method}Config")
        config = config(target_modules=["0"], **fields.get(method, {}))
        with pytest.raises(TargetError, match="forward of its own|embeddings|no bias"):
            get_peft_model(base, config)
        assert base[0] is layer

    @pytest.mark.parametrize("factor", [0.5, -1.0, 1.01])
    @pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: ByHand(8, 8)])
    def test_a_forward_of_one_object(self, make, factor):
        layer = make()
        layer.forward = lambda x: factor * type(layer).forward(layer, x)
        base = nn.Sequential(layer)
        with pytest.raises(TargetError, match="forward of its own"):
            get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        assert base[0] is layer

    def test_hooks_of_accelerate(self):
        """They give a forward to the object, which computes the same."""
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        torch.manual_seed(0)
        base = nn.Sequential(
            add_hook_to_module(nn.Linear(8, 6), AlignDevicesHook("cpu"))
        )
        x = torch.randn(3, 8)
        model = shake(get_peft_model(base, LoraConfig(r=2, target_modules=["0"])))
        apart = model(x).detach()
        differ(apart, base[0].base_layer(x))
        model.merge_adapter()
        close(model(x), apart, SMALL)
        close(model.merge_and_unload()(x), apart, SMALL)

    @pytest.mark.parametrize("scale", [1.0, 3.0])
    def test_a_transposed_layer_with_a_forward_of_its_own(self, scale):
        from transformers.pytorch_utils import Conv1D

        class Scaled(Conv1D):
            def forward(self, x):
                return scale * super().forward(x)

        torch.manual_seed(0)
        base = nn.Sequential(Scaled(6, 8))
        config = LoraConfig(r=2, target_modules=["0"])
        if scale != 1:
            with pytest.raises(TargetError, match="forward of its own"):
                get_peft_model(base, config)
            return
        model, x = shake(get_peft_model(base, config)), torch.randn(3, 8)
        apart = model(x).detach()
        close(model.merge_and_unload()(x), apart, SMALL)

    @pytest.mark.parametrize("max_norm", [1.0, 0.1])
    @pytest.mark.parametrize("padding", [None, 0])
    def test_an_embedding_that_changes_its_own_weight(self, max_norm, padding):
        layer = nn.Embedding(9, 8, padding_idx=padding, max_norm=max_norm)
        base = nn.Sequential(layer)
        with pytest.raises(TargetError, match=f"max_norm = {max_norm}"):
            get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        assert base[0] is layer

    def test_one_that_computes_the_same_is_adapted(self):
        torch.manual_seed(0)
        x = torch.randn(3, 8)
        model = get_peft_model(
            nn.Sequential(ByHand(8, 6)), LoraConfig(r=2, target_modules=["0"])
        )
        apart = shake(model)(x).detach()
        close(model.merge_and_unload()(x), apart, SMALL)

    @pytest.mark.parametrize("kind", ["gemma3", "bart"])
    def test_scaled_embeddings_are_those_of_peft(self, kind, tmp_path):
        import peft
        import transformers

        torch.manual_seed(0)
        if kind == "gemma3":
            config = transformers.Gemma3TextConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                pad_token_id=0,
                tie_word_embeddings=False,
            )
            base = transformers.Gemma3ForCausalLM(config)
            name = "embed_tokens"
        else:
            config = transformers.BartConfig(
                vocab_size=40,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                scale_embedding=True,
                pad_token_id=0,
                tie_word_embeddings=False,
            )
            base = transformers.BartModel(config)
            name = "encoder.embed_tokens"
        base = base.eval()
        ids = inputs()["input_ids"]
        ours = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=[name]))
        shake(ours).save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        with torch.no_grad():
            apart = ours(input_ids=ids)[0]
            differ(apart, base(input_ids=ids)[0])
            close(apart, theirs(input_ids=ids)[0])
            ours.merge_adapter()
            close(ours(input_ids=ids)[0], apart, rounding(2))
            close(ours.merge_and_unload()(input_ids=ids)[0], apart, rounding(2))


class Twice(nn.Module):
    """One layer under two names, and a block that stands twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))])
        self.blocks.append(self.blocks[0])

    def forward(self, x):
        for layer in (self.a, self.b, *self.blocks):
            x = layer(x)
        return x


class TestPlaces:
    """Where a slot in a layer's place would not be called, or not always."""

    @staticmethod
    def changes_alike_when_merged(base, config, x):
        """The model, merged: what it gives differs from the base's, and is the same
        as before merging."""
        plain = base(x)
        model = shake(get_peft_model(base, config)).eval()
        apart = model(x).detach()
        differ(apart, plain)
        model.merge_adapter()
        close(model(x), apart, SMALL)
        return model

    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=2, target_modules=["a"]),
            LoraConfig(r=2, target_modules=["blocks.0.0"], modules_to_save=["a"]),
            BottleneckConfig(target_modules=["blocks.0"]),
        ],
        ids=lambda config: type(config).__name__,
    )
    def test_a_layer_at_two_places_is_refused(self, config):
        base = Twice()
        with pytest.raises(TargetError, match="stands at 2 places of the model"):
            get_peft_model(base, config)
        assert base.a is base.b and base.blocks[0] is base.blocks[1]

    @pytest.mark.parametrize("kind", ["Lora", "LNTuning"])
    def test_a_layer_in_a_block_at_two_places(self, kind):
        """Both places run the one slot."""
        torch.manual_seed(0)
        name = {"Lora": "blocks.0.0", "LNTuning": "blocks.0.1"}[kind]
        config = getattr(minipeft, f"{kind}Config")(target_modules=[name])
        base, x = Twice().eval(), torch.randn(3, 8)
        plain = base(x)
        model = self.changes_alike_when_merged(base, config, x)
        assert torch.equal(model.unload()(x), plain)

    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=2, target_modules=["linear1", "linear2"]),
            LNTuningConfig(target_modules=["norm2"]),
            IA3Config(target_modules=["linear2"], feedforward_modules=["linear2"]),
        ],
        ids=lambda config: type(config).__name__,
    )
    def test_torch_s_encoder_layer(self, config):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        base, x = nn.Sequential(layer).eval(), torch.randn(2, 3, 8)
        with pytest.raises(TargetError, match="reads the weight of this"):
            get_peft_model(base, config)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            self.changes_alike_when_merged(base, config, x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    @pytest.mark.parametrize("name", ["dt_proj", "out_proj"])
    def test_what_mamba_reads(self, name):
        """It multiplies by the weight of dt_proj, and its fused kernels by that of
        out_proj: an adapter would change nothing until it is merged."""
        base, ids = mamba(), torch.arange(5)[None]
        with pytest.raises(TargetError, match=f"mixer.{name}: Mamba reads the weight"):
            get_peft_model(base, LoraConfig(target_modules=[name]))
        plain = base(ids).logits
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, config).eval()
        assert {
            path.rpartition(".")[2] for path in model._adapters_by_path("default")
        } == {"in_proj", "x_proj"}
        apart = model(ids).logits
        apart.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        differ(apart, plain)
        close(model.merge_and_unload()(ids).logits, apart, SMALL)


def mamba():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(config).eval()


class TestReplacedWhileMerged:
    """What stood there before cannot be put back into another layer."""

    @pytest.mark.parametrize("name", ["subspace around lora", "two on one layer"])
    def test_quantising_is_refused(self, name):
        model = pair(name)
        before = run(model)
        model.merge_adapter(["b"])
        for change in (quantize_model, dequantize_model):
            for part in (model, model.get_base_model()):
                with pytest.raises(NotMergeableError, match="unmerge_adapter.. first"):
                    change(part)
        model.unmerge_adapter()
        assert torch.equal(run(model), before)

    def test_of_a_4_bit_base(self):
        base = quantize_model(BASES["hf_llama"].make())
        model = shake(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
        before = run(model)
        model.merge_adapter(lossy=True)
        with pytest.raises(NotMergeableError, match="unmerge_adapter.. first"):
            dequantize_model(model)
        model.unmerge_adapter()
        assert torch.equal(run(model), before)

    @pytest.mark.parametrize("act", ["unmerge_adapter", "unload", "half", "merge b"])
    def test_another_layer_is_said(self, act):
        model = pair("two on one layer")
        before = run(model)
        model.merge_adapter(["a"])
        slot = model.base_model.model.model.layers[1].mlp.down_proj
        own, slot.base_layer = slot.base_layer, copy.deepcopy(slot.base_layer)
        merged = run(model)
        calls = {"merge b": lambda: model.merge_adapter(["b"])}
        with pytest.raises(NotMergeableError, match="layers.1.mlp.down_proj: a Linear"):
            calls.get(act, getattr(model, act, None))()
        assert torch.equal(run(model), merged)
        slot.base_layer = own
        model.unmerge_adapter()
        assert torch.equal(run(model), before)


class TestNeededAdapters:
    def fused(self):
        model = get_peft_model(LLAMA.make(), BottleneckConfig(r=2), "a")
        model.add_adapter("b", BottleneckConfig(r=2))
        model.add_adapter("c", BottleneckConfig(r=2))
        model.add_adapter("fusion", FusionConfig(adapters=["a", "b"]))
        model.set_adapter("fusion")
        return model

    @pytest.mark.parametrize("name", ["a", "b"])
    @pytest.mark.parametrize("state", ["active", "inactive", "a copy", "second fusion"])
    def test_an_expert_cannot_be_deleted(self, name, state):
        model = self.fused()
        if state == "inactive":
            model.set_adapter("c")
        elif state == "a copy":
            model = copy.deepcopy(model)
        elif state == "second fusion":
            model.add_adapter("other", FusionConfig(adapters=["c", "a"]))
            model.set_adapter("other")
        before = run(model)
        with pytest.raises(AdapterNameError, match=f"'fusion' needs '{name}'"):
            model.delete_adapter(name)
        assert torch.equal(run(model), before)

    def test_others_can_and_after_the_fusion_the_experts_too(self):
        model = self.fused()
        model.delete_adapter("c")
        with pytest.warns(UserWarning, match="is active now"):
            model.delete_adapter("fusion")
        model.delete_adapter("b")
        assert list(model.peft_config) == ["a"]

    def test_an_expert_that_one_of_two_fusions_needs(self):
        model = self.fused()
        model.add_adapter("other", FusionConfig(adapters=["c", "a"]))
        model.set_adapter("other")
        model.delete_adapter("fusion")
        model.delete_adapter("b")
        for name in ("a", "c"):
            with pytest.raises(AdapterNameError, match=f"'other' needs '{name}'"):
                model.delete_adapter(name)


class TestThreads:
    def test_each_thread_gets_its_own_rows(self):
        model = pair("two on one layer")
        ids = inputs()["input_ids"]
        wanted = [["a", "b", "__base__"], ["b", "a", "a"], None, ["__base__"] * 3]
        with torch.no_grad():
            expected = [model(ids, adapter_names=names).logits for names in wanted]
        wrong = []

        def serve(i):
            for _ in range(15):
                with torch.no_grad():
                    y = model(ids, adapter_names=wanted[i]).logits
                if not torch.equal(y, expected[i]):
                    wrong.append(i)

        in_threads(serve)
        assert wrong == []

    @pytest.mark.parametrize("name", ["hf_llama", "llama"])
    def test_prompts_and_generation_in_threads(self, name):
        """Adapters around the model and inside it, asked for in turn."""
        base = BASES[name]
        model = get_peft_model(base.make(), LoraConfig(r=2), "a")
        prompt = minipeft.PromptTuningConfig(num_virtual_tokens=3)
        model.add_adapter("p", prompt)
        shake(shake(model, "a"), "p")
        ids = inputs()["input_ids"]
        options = dict(max_new_tokens=4, do_sample=False)

        def ask(i):
            if i % 2:
                return model.generate(input_ids=ids, adapter_names=["a"] * 3, **options)
            rows = ["p"] * 3 if i % 4 else ["__base__", "a", "a"]
            return model(input_ids=ids, adapter_names=rows).logits

        def serve(i):
            for _ in range(5):
                with torch.no_grad():
                    if not torch.equal(ask(i), expected[i]):
                        wrong.append(i)

        with torch.no_grad():
            expected = [ask(i) for i in range(4)]
        wrong = []
        in_threads(serve)
        assert wrong == []

    def test_a_call_that_fails_lets_the_next_thread_in(self):
        model = pair("two on one layer")
        ids = inputs()["input_ids"]
        for wrong in (["a"], ["x", "a", "b"]):
            with pytest.raises(ValueError):
                model(ids, adapter_names=wrong)
        with pytest.raises(Exception):  # noqa: B017
            model(ids, no_such_argument=1)
        done = []
        thread = threading.Thread(
            target=lambda: done.append(model(ids, adapter_names=["a", "b", "a"]))
        )
        thread.start()
        thread.join(timeout=60)
        assert len(done) == 1

    def test_a_mixed_batch_does_not_walk_the_model(self, monkeypatch):
        model = pair("two on one layer")
        walks = []
        walk = targets.walk
        monkeypatch.setattr(targets, "walk", lambda m: walks.append(m) or walk(m))
        run(model, adapter_names=["a", "b", "__base__"])
        assert walks == []


class TestScalings:
    @pytest.mark.parametrize("alpha", [0, 0.0, float("inf"), float("nan")])
    @pytest.mark.parametrize(
        "config, field",
        [
            ("LoraConfig", "lora_alpha"),
            ("LoHaConfig", "alpha"),
            ("LoKrConfig", "alpha"),
            ("DenseLoraConfig", "lora_alpha"),
        ],
    )
    def test_what_switches_an_adapter_off_is_refused(self, config, field, alpha):
        with pytest.raises(ConfigError, match=field):
            getattr(minipeft, config)(**{field: alpha})

    @pytest.mark.parametrize("config", ["LoraConfig", "LoHaConfig"])
    def test_in_a_pattern_too(self, config):
        with pytest.raises(ConfigError, match="q_proj"):
            getattr(minipeft, config)(alpha_pattern={"q_proj": 0})

    @pytest.mark.parametrize("fields", [dict(r=17), dict(rank_pattern={"q_proj": 20})])
    def test_a_rank_above_the_smaller_side_warns(self, fields):
        config = LoraConfig(target_modules=["q_proj"], **fields)
        with pytest.warns(UserWarning, match="above 16, the smaller side"):
            get_peft_model(LLAMA.make(), config)

    @pytest.mark.parametrize(
        "config",
        ["LoraConfig", "LoHaConfig", "LoKrConfig", "VeraConfig", "DenseLoraConfig"],
    )
    def test_a_rank_that_fits_no_memory_is_refused(self, config):
        config = getattr(minipeft, config)(r=10**12, target_modules=["q_proj"])
        with pytest.raises(ConfigError, match="r = 1,000,000,000,000 would take"):
            get_peft_model(LLAMA.make(), config)


class TestHooksForCheckpointing:
    """A hook on the embeddings makes reentrant checkpointing give gradients. It must
    not go with a slot that is taken out."""

    @pytest.mark.parametrize("name", ["llama", "hf_llama", "hf_gpt2", "hf_qwen2"])
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("copied", [True, False])
    def test_deleting_an_adapter_of_the_embeddings(self, name, reentrant, copied):
        base = BASES[name]
        if copied:
            config = LoraConfig(modules_to_save=[base.embedding])
        else:
            config = LoraConfig(target_modules=[base.embedding])
        model = get_peft_model(base.make(), config, "a")
        model.add_adapter("b", LoraConfig())
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        model.set_adapter("b")
        model.delete_adapter("a")
        model.train()(**inputs()).logits.sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)

    @pytest.mark.parametrize("name", ["llama", "hf_llama", "hf_gpt2"])
    def test_an_unloaded_model_is_as_before(self, name):
        base = BASES[name]
        config = LoraConfig(target_modules=[base.embedding])
        model = get_peft_model(base.make(), config)
        model.gradient_checkpointing_enable()
        plain = copy.deepcopy(model).unload()
        assert not plain.get_input_embeddings()._forward_hooks
        assert torch.equal(run(copy.deepcopy(plain)), run(base.make()))
