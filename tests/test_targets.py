"""Layers of all classes look alike; models are walked through their slots; names find
what PEFT's find."""

import re

import pytest
import torch
import transformers
from bases import BASES, close
from tolerance import tolerance
from torch import nn

from minipeft import (
    LoraConfig,
    NotMergeableError,
    Slot,
    TargetError,
    get_peft_model,
    targets,
    weights,
)
from minipeft.slot import ActiveAdapters, Base


def conv1d(d_in, d_out):
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(d_out, d_in)
    nn.init.normal_(layer.bias)
    return layer


def four_bit(d_in, d_out):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        d_in,
        d_out,
        quant_type="nf4",
        compute_dtype=torch.float32,
        compress_statistics=False,
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(d_out, d_in),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
    )
    return layer.to("cpu").train()  # in training mode this machine's forward is exact


DENSE = {"linear": nn.Linear, "conv1d": conv1d, "embedding": nn.Embedding}


class TestNames:
    def test_walking_sees_through_slots(self):
        base = BASES["llama"].make()
        plain = [(path, module) for path, _, _, module in targets.walk(base)]
        assert plain == list(base.named_modules())[1:]
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj"]))
        walked = list(targets.walk(model.base_model))
        assert [path for path, *_ in walked] == [path for path, _ in plain]
        for path, parent, name, module in walked:
            assert getattr(parent, name) is module and isinstance(
                module, Slot
            ) == path.endswith("down_proj")
            assert targets.unwrap_slot(module) is dict(plain)[path]

    @pytest.mark.parametrize(
        "path, pattern, expected",
        [
            ("model.layers.1.mlp.up_proj", None, 1),
            ("model.layers.1.experts.0.up_proj", None, 1),
            ("model.layers.1.experts.0.up_proj", "experts", 0),
            ("transformer.h.11.attn.c_attn", ["layers", "h"], 11),
            ("layers.0.up", "layers", 0),
            ("model.layers.1.mlp.up_proj", "h", None),
            ("lm_head", None, None),
        ],
    )
    def test_layer_numbers(self, path, pattern, expected):
        assert targets.layer_index(path, pattern) == expected

    def test_names(self):
        paths = ["a.q_proj", "a.qq_proj", "q_proj", "b.q_proj.x"]
        assert targets.resolve_targets(paths, ["q_proj"]) == ["a.q_proj", "q_proj"]
        assert targets.resolve_targets(paths, ["a.q_proj"]) == ["a.q_proj"]
        assert targets.resolve_targets(paths, r".*\.qq?_proj") == [
            "a.q_proj",
            "a.qq_proj",
        ]
        assert targets.match_pattern({"q_proj": 1, r"a\..*": 2}, "a.q_proj", 3) == 1
        assert targets.match_pattern({r"a\..*": 2}, "a.qq_proj", 3) == 2
        # whole parts of a path, as in PEFT
        assert targets.match_pattern({"proj": 1}, "a.q_proj", 3) == 3


class TestWeights:
    @pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
    def test_every_layer_is_a_dense_weight(self, make):
        layer = make(12, 7)
        assert weights.features(layer) == (12, 7)
        weight = weights.read_weight(layer)
        assert weight.shape == (7, 12)
        one_hot = torch.eye(12)
        y = (
            layer(torch.arange(12))
            if make is nn.Embedding
            else layer(one_hot) - layer.bias
        )
        close(y, one_hot @ weight.T)  # the weight says what the layer computes
        new = torch.randn(7, 12)
        old = layer.weight
        weights.write_weight(layer, new)
        assert (
            torch.equal(weights.read_weight(layer), new)
            and layer.weight.is_contiguous()
        )
        assert (
            layer.weight is not old
            and layer.weight.shape == old.shape
            and not layer.weight.requires_grad
        )

    def test_a_4_bit_layer_is_read_dense_and_written_only_on_request(self):
        layer = four_bit(64, 32)
        assert weights.features(layer) == (64, 32)
        weight = weights.read_weight(layer)
        x = torch.randn(5, 64)
        close(layer(x), x @ weight.T + layer.bias)
        assert weights.logical_numel(layer.weight) == 64 * 32
        before = layer.weight
        with pytest.raises(NotMergeableError, match="4 bits.*lossy=True"):
            weights.write_weight(layer, weight)
        assert layer.weight is before
        weights.write_weight(layer, weight, lossy=True)
        close(
            weights.read_weight(layer), weight
        )  # what is of 4 bits already stays as it is

    def test_lora_beside_a_4_bit_layer(self):
        model = nn.Sequential(four_bit(64, 32), nn.ReLU(), four_bit(32, 64))
        x = torch.randn(5, 64)
        before = model(x)
        first, second = (weights.read_weight(model[i]) for i in (0, 2))
        peft_model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
        )
        assert peft_model.get_nb_trainable_parameters() == (
            4 * 2 * 96,
            4 * 2 * 96 + 2 * 64 * 32 + 96,
        )
        y = peft_model(x)
        parts = peft_model._adapters_by_path("default")
        h = torch.relu(x @ (first + parts["0"].delta(None)).T + model[0].bias)
        # two layers, and an adapter's two products beside each
        rounded = tolerance(torch.float32, terms=64, steps=2 * 3)
        close(y, h @ (second + parts["2"].delta(None)).T + model[2].bias, rounded)
        y.square().mean().backward()
        assert all(
            p.grad.abs().max() > 0 for p in peft_model.parameters() if p.requires_grad
        )
        with pytest.raises(NotMergeableError, match="lossy"):
            peft_model.merge_adapter()
        assert torch.equal(peft_model(x), y)
        peft_model.merge_adapter(lossy=True)  # near, not equal
        assert 1e-4 < (peft_model(x) - y).abs().mean() < (before - y).abs().mean()
        peft_model.unmerge_adapter()
        assert torch.equal(peft_model(x), y)

    def test_layers_whose_weight_is_not_dense_are_refused(self):
        class Packed(nn.Linear):  # a subclass that stores something else, unknown here
            pass

        layer = Packed(4, 4)
        layer.weight = nn.Parameter(
            torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False
        )
        with pytest.raises(TypeError, match="Packed.*uint8"):
            weights.read_weight(layer)
        # reads out_proj.weight and never calls out_proj
        attention = nn.MultiheadAttention(8, 2)
        with pytest.raises(TargetError, match="out_proj.*not a linear layer"):
            get_peft_model(
                nn.Sequential(attention), LoraConfig(target_modules=["out_proj"])
            )

    def test_an_assigned_bias_keeps_its_type(self):
        slot = Slot(nn.Linear(3, 2).bfloat16(), ActiveAdapters())
        Base(slot, "a").bias = torch.ones(2)
        assert (
            slot.base_layer.bias.dtype == torch.bfloat16
            and slot.bias is slot.base_layer.bias
        )
        with pytest.raises(NotMergeableError, match="no bias"):
            Base(
                Slot(nn.Linear(3, 2, bias=False), ActiveAdapters()), "a"
            ).bias = torch.ones(2)


class TestRegularExpressions:
    PATHS = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]

    @pytest.mark.parametrize(
        "text",
        [
            r".*\.(q_proj|v_proj)",
            r"(.*\.)?layers\.(\d+)\..*q_proj",
            r"(?:[^.]+\.)*q_proj",
            r".*layers\.[0-3]{1}\.self_attn\.(q|v)_.+",
        ],
    )
    def test_repeats_are_matched_as_by_re(self, text):
        wanted = [path for path in self.PATHS if re.fullmatch(text, path)]
        assert targets.fullmatch_all(text, self.PATHS) == wanted == self.PATHS

    @pytest.mark.parametrize(
        "text",
        [
            r"([a-z0-9_.]+)+!",
            r"(.*.){25}!",
            r"(\w+\.?)*=",
            r".*.*.*.*.*.*.*.*.*.*.*x!",
            r"(\w\w?|\.)+!",
        ],
    )
    def test_endless_matching_is_refused(self, text, monkeypatch):
        monkeypatch.setattr(targets, "REGEX_SECONDS", 0.5)
        path = "model.layers.0.self_attn.q_proj" * 3
        with pytest.raises(TargetError, match="takes more than 0.5 seconds"):
            targets.fullmatch_all(text, [path])

    @pytest.mark.parametrize(
        "fields",
        [
            dict(target_modules=r"([a-z0-9_.]+)+!"),
            dict(target_modules=["q_proj"], exclude_modules=r"(([a-z0-9_.])+)+!"),
            dict(target_modules=["q_proj"], rank_pattern={r"([a-z0-9_.]+)+!": 2}),
        ],
    )
    def test_wherever_they_are_given(self, fields, monkeypatch):
        monkeypatch.setattr(targets, "REGEX_SECONDS", 0.5)
        with pytest.raises(TargetError, match="takes more than"):
            get_peft_model(BASES["llama"].make(), LoraConfig(**fields))

    def test_a_long_value_is_abbreviated(self):
        for wrong in ("q" * 10**7, ["q" * 10**6], "(" * 10**5, "q|" * 10**6):
            with pytest.raises(TargetError) as caught:
                get_peft_model(BASES["llama"].make(), LoraConfig(target_modules=wrong))
            assert len(str(caught.value)) < 1000


def tiny(kind, **fields):
    """A small random model of the transformers library."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, vocab_size=40)
    config = transformers.AutoConfig.for_model(kind, **sizes, **fields)
    return transformers.AutoModelForCausalLM.from_config(config)


class TestExpertsThatAreBareParameters:
    @pytest.mark.parametrize(
        "kind, fields",
        [
            ("mixtral", dict(num_local_experts=4, num_key_value_heads=2)),
            ("qwen2_moe", dict(num_experts=4, num_key_value_heads=2)),
            ("olmoe", dict(num_experts=4)),
        ],
    )
    def test_all_linear_says_that_they_get_no_adapters(self, kind, fields):
        with pytest.warns(UserWarning, match="no adapter for experts, .*parameters"):
            get_peft_model(
                tiny(kind, **fields), LoraConfig(target_modules="all-linear")
            )

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "hf_llama", "hf_gpt2", "mlp"])
    @pytest.mark.filterwarnings("error:all-linear")
    def test_models_without_experts(self, kind):
        get_peft_model(BASES[kind].make(), LoraConfig(target_modules="all-linear"))

    @pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d])
    @pytest.mark.filterwarnings("error:all-linear")
    def test_convolutions_are_no_experts(self, kind):
        model = nn.Sequential(nn.Linear(3, 3), kind(3, 4, 2))
        get_peft_model(model, LoraConfig(target_modules="all-linear"))
