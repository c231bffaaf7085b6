"""The one idea, on adapters made up for the purpose: y = adapter(base, x)."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from bases import BASES, close, inputs, run
from torch import nn

import minipeft
from minipeft import (
    Adapter,
    AdapterNameError,
    LinearDelta,
    NotMergeableError,
    Slot,
    get_peft_model,
)
from minipeft.config import METHODS, LayerConfig, PeftConfig
from minipeft.methods.modules_to_save import ModuleCopy
from minipeft.slot import ActiveAdapters, Base, RowAdapters


class Times(Adapter):
    """y = factor * base(x)"""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, base, x):
        return self.factor * base(x)


class Plus(Times):
    """y = base(x) + factor"""

    def forward(self, base, x):
        return base(x) + self.factor


class Shift(LinearDelta):
    """W' = W + factor everywhere"""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def delta(self, base):
        return self.factor.expand(base.weight.shape)


class Average(Adapter):
    """The mean of two other adapters' outputs, as fusion has it: they are peers, not
    children."""

    def forward(self, base, x):
        y = base(x)
        return (
            base.peer("times")(lambda x: y, x) + base.peer("plus")(lambda x: y, x)
        ) / 2


def slot_with(**adapters):
    slot = Slot(nn.Linear(3, 2), ActiveAdapters())
    for name, adapter in adapters.items():
        slot.adapters[name] = adapter
    return slot, torch.randn(4, 3)


# Whole methods, made up: a shared part, a slot around a block, and one around the whole
# model.


@pytest.fixture
def methods():
    """Methods that are forgotten after the test."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


class Scaled(Adapter):
    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.ones(()))

    def forward(self, base, *args, **kwargs):
        return base(*args, **kwargs) * self.own * base.shared.scale


def shared_method():
    @dataclass(kw_only=True)
    class SharedConfig(LayerConfig):
        peft_type: ClassVar[str] = "SHARED_FOR_TESTS"

        def create_shared(self, bases):
            part = nn.Module()
            part.scale = nn.Parameter(torch.full((), float(len(bases))))
            return part

        def create(self, base, path):
            return Scaled()

    return SharedConfig


def whole_model_method():
    class Lead(Adapter):
        """One learned vector before every text: the smallest prompt."""

        def __init__(self, width):
            super().__init__()
            self.prompt = nn.Parameter(torch.ones(1, 1, width))

        def forward(self, base, input_ids, labels=None, **kwargs):
            x = base.module.get_input_embeddings()(input_ids)
            x = torch.cat([self.prompt.expand(len(x), -1, -1), x], 1)
            if labels is not None:
                labels = nn.functional.pad(labels, (1, 0), value=-100)
            return base(inputs_embeds=x, labels=labels, **kwargs)

        def generate(self, base, input_ids, **kwargs):
            return "generated around", base(input_ids, **kwargs)

    @dataclass(kw_only=True)
    class LeadConfig(PeftConfig):
        peft_type: ClassVar[str] = "LEAD_FOR_TESTS"

        def create(self, base, path):
            return Lead(base.module.config.hidden_size)

    return LeadConfig()


class TestWholeMethods:
    def test_a_shared_part_is_owned_once(self, methods, tmp_path):
        base, config = BASES["llama"], shared_method()(target_modules=["mlp"])
        # slots around blocks, not only around linear layers
        model = get_peft_model(base.make(), config)
        assert model.get_nb_trainable_parameters()[0] == 3
        owned = [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and name.startswith("shared")
        ]
        assert owned == ["shared.default.scale"]
        run_before = run(model)
        model(**inputs()).logits.sum().backward()
        assert model.shared["default"].scale.grad.abs() > 0
        model.save_pretrained(tmp_path)
        again = minipeft.PeftModel.from_pretrained(base.make(), tmp_path)
        assert torch.equal(run(again), run_before)
        model.add_adapter("b", config)
        within = minipeft.LoraConfig(
            target_modules=["down_proj"], init_lora_weights=False
        )
        model.add_adapter("inner", within)  # slots in slots
        model.set_adapter(["default", "inner"])
        assert not torch.equal(run(model), run_before)
        close(run(model, adapter_names=["inner", "default", "b"])[1:], run_before[1:])
        for name in ("default", "b", "inner"):
            model.set_adapter(name)
            model.delete_adapter(name) if name == "inner" else None
        model.set_adapter("default")
        assert torch.equal(run(model), run_before)
        assert not model.shared.keys() & {"inner"} and list(model.shared) == [
            "default",
            "b",
        ]
        plain = model.unload()
        assert not any(
            isinstance(module, Slot) for module in plain.modules()
        ) and torch.equal(run(plain), run(base.make()))

    @pytest.mark.parametrize("name", ["llama", "hf_llama"])
    def test_an_adapter_around_the_whole_model(self, methods, tmp_path, name):
        base, config = BASES[name], whole_model_method()
        model = get_peft_model(base.make(), config)
        width, ids = 16, inputs()["input_ids"]
        with_prompt = run(model)
        embedded = torch.cat(
            [torch.ones(3, 1, width), base.make().get_input_embeddings()(ids)], 1
        )
        close(with_prompt, base.make()(inputs_embeds=embedded).logits[:, 1:])
        model.save_pretrained(tmp_path)
        # as PEFT's prompts: no path, no prefix
        assert set(minipeft.saving.load(tmp_path)[1]) == {"prompt"}
        assert torch.equal(
            run(minipeft.PeftModel.from_pretrained(base.make(), tmp_path)), with_prompt
        )
        with model.disable_adapter():
            assert torch.equal(run(model), run(base.make()))
        model.add_adapter("lora", minipeft.LoraConfig(init_lora_weights=False))
        model.set_adapter("lora")
        with_lora = run(model)
        mixed = run(model, adapter_names=["lora", "default", "__base__"])
        close(mixed, torch.stack([with_lora[0], with_prompt[1], run(base.make())[2]]))
        labels = ids.clone()
        labels[1, 3:] = -100
        loss = model(
            **inputs(), labels=labels, adapter_names=["lora", "default", "__base__"]
        ).loss
        # the mean over the labels that each row learns alone: behind a prompt the first
        # one too
        counts, sums = (labels[:, 1:] != -100).sum(1), []
        counts[1] += 1
        for row, active in enumerate(["lora", "default", None]):
            own = {k: v[row : row + 1] for k, v in inputs().items()}
            one = dict(own, labels=labels[row : row + 1])
            if active is None:
                with model.disable_adapter():
                    alone = model(**one).loss
            else:
                model.set_adapter(active)
                alone = model(**one).loss
            sums.append(alone * counts[row])
        model.set_adapter("lora")
        close(loss, torch.stack(sums).sum() / counts.sum())
        assert model.active_adapters == ["lora"] and torch.equal(run(model), with_lora)
        with pytest.raises(ValueError, match="one at a time"):
            run(model, adapter_names=["lora", "default", "__base__"], use_cache=True)
        assert torch.equal(run(model), with_lora)
        if name == "hf_llama":
            model.set_adapter("default")
            assert (
                model.generate(ids, max_new_tokens=1, do_sample=False)[0]
                == "generated around"
            )
        model.delete_adapter("default")
        assert list(model.base_model.adapters) == []


class TestSlot:
    def test_stacking_is_composition(self):
        slot, x = slot_with(times=Times(3), plus=Plus(5), shift=Shift(0.5))
        y = slot.base_layer(x)
        for names, expected in {
            (): y,
            ("times",): 3 * y,
            ("times", "plus"): 3 * y + 5,
            ("plus", "times"): 3 * (y + 5),
            ("shift", "times"): 3 * (y + 0.5 * x.sum(-1, keepdim=True)),
            ("elsewhere",): y,
        }.items():
            slot.active.names = list(names)
            close(slot(x), expected)
        slot.active.enabled = False
        assert torch.equal(slot(x), y)

    def test_rows_are_sent_their_own_ways(self):
        slot, x = slot_with(times=Times(3), plus=Plus(5))
        y = slot.base_layer(x)
        slot.active.rows = RowAdapters(["plus", "__base__", "times", "plus"])
        close(slot(x), torch.stack([y[0] + 5, y[1], 3 * y[2], y[3] + 5]))
        # each row twice, as in beam search, or two tokens long
        slot.active.rows = RowAdapters(["plus", "times"])
        close(slot(x), torch.stack([y[0] + 5, y[1] + 5, 3 * y[2], 3 * y[3]]))
        slot.active.rows = RowAdapters(["plus", "times", "times"])
        with pytest.raises(ValueError, match="3 adapter_names for a batch of 4 rows"):
            slot(x)
        slot.active.rows = RowAdapters(
            ["elsewhere"] * 3
        )  # none of ours: not our business
        assert torch.equal(slot(x), y)

    @pytest.mark.parametrize("value", [0.0, 3, -2.5])
    @pytest.mark.parametrize("name", ["lora", "ours"])
    def test_a_scaling_that_is_set_goes_to_its_adapter(self, name, value):
        torch.manual_seed(0)
        lora = minipeft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), lora, "lora")
        model.add_adapter("ours", lora)
        model.set_adapter(name)
        slot, x = model.get_base_model()[0], torch.randn(3, 5)
        plain, change = slot.base_layer(x), model(x) - slot.base_layer(x)
        slot.scaling[name] = value
        close(model(x), plain + value * change / lora.lora_alpha * lora.r)
        assert slot.adapters[name].scaling == slot.scaling[name] == value
        slot.scaling.update({name: 2 * value})
        assert slot.scaling == {"lora": 4.0, "ours": 4.0} | {name: 2 * value}

    def test_what_is_set_for_an_adapter_that_is_not_there(self):
        lora = minipeft.LoraConfig(r=2, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), lora, "lora")
        slot = model.get_base_model()[0]
        for view in (slot.scaling, slot.lora_A):
            assert list(view) == ["lora"] and len(view) == 1 and "lara" not in view
            with pytest.raises(AdapterNameError, match="'lara'.*there are: lora"):
                view["lara"] = 1.0
            with pytest.raises(TypeError, match="delete_adapter"):
                del view["lora"]
            with pytest.raises(KeyError):
                view["lara"]

    @pytest.mark.parametrize("rank", [1, 2, 4])
    def test_a_matrix_that_is_set_goes_to_its_adapter(self, rank):
        lora = minipeft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), lora, "lora")
        slot, x = model.get_base_model()[0], torch.randn(3, 5)
        A, B = nn.Linear(5, rank, bias=False), nn.Linear(rank, 4, bias=False)
        slot.lora_A["lora"], slot.lora_B["lora"] = A, B
        close(model(x), slot.base_layer(x) + slot.scaling["lora"] * B(A(x)))
        assert slot.adapters["lora"].lora_A is A

    def test_merging_writes_weights_and_unmerging_restores_them(self):
        slot, x = slot_with(a=Shift(0.5), b=Shift(0.25))
        weight = slot.weight
        slot.merge(["a", "b", "elsewhere"])
        assert slot.merged == ["a", "b"]
        close(slot.weight, weight + 0.75)
        slot.active.names = ["a", "b"]
        close(
            slot(x), nn.functional.linear(x, weight + 0.75, slot.bias)
        )  # once, not twice
        slot.unmerge()
        assert slot.weight is weight and slot.merged == []

    def test_a_linear_delta_needs_only_its_delta(self):
        slot, x = slot_with(shift=Shift(0.5))
        slot.active.names = ["shift"]
        close(slot(x), nn.functional.linear(x, slot.weight + 0.5, slot.bias))

    def test_peers_are_not_children(self):
        slot, x = slot_with(times=Times(3), plus=Plus(5), average=Average())
        slot.active.names = ["average"]
        y = slot.base_layer(x)
        close(slot(x), (3 * y + y + 5) / 2)
        assert list(slot.adapters["average"].parameters()) == []
        del slot.adapters["plus"]
        with pytest.raises(AdapterNameError, match="'plus'.*times, average"):
            slot(x)

    def test_a_copy_takes_the_place_of_the_layer(self):
        slot, x = slot_with()
        slot.adapters["copy"] = ModuleCopy(slot.base_layer)
        nn.init.normal_(slot.adapters["copy"].module.weight)
        before = slot(x)
        slot.active.names = ["copy"]
        expected = slot(x)
        assert torch.equal(
            expected, slot.adapters["copy"].module(x)
        ) and not torch.equal(expected, before)
        slot.merge(["copy"])
        slot.active.names = []
        assert torch.equal(slot(x), expected)
        assert (
            slot.weight is not slot.adapters["copy"].module.weight
            and not slot.weight.requires_grad
        )
        slot.unmerge()
        assert torch.equal(slot(x), before)

    def test_a_slot_answers_for_its_layer(self):
        slot, _ = slot_with()
        assert slot.in_features == 3 and slot.weight is slot.base_layer.weight
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = slot.no_such_thing

    def test_what_does_not_modify_a_weight_cannot_be_merged(self):
        slot, _ = slot_with(times=Times(3))
        with pytest.raises(NotMergeableError, match="Times"):
            slot.merge(["times"])

    def test_a_base_gives_shape_and_storage_but_no_names(self):
        slot, _ = slot_with()
        base = Base(slot, "a")
        assert (
            base.module is slot.base_layer
            and base.weight.shape == (2, 3)
            and base.bias.shape == (2,)
        )
        assert base(torch.zeros(1, 3)).shape == (1, 2)
