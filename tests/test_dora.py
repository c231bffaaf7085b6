"""DoRA: what is particular to it, against its equation, autograd, PEFT's draws and
torchtune's number."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from bases import BASES, METHODS, adapted, close, differ, run, shake
from tolerance import printed
from torch import nn

from minipeft import (
    BitFitConfig,
    ConfigError,
    DoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TargetError,
    get_peft_model,
)
from minipeft.methods.dora import Dora
from minipeft.slot import ActiveAdapters, Base, Slot

LLAMA, HF = BASES["llama"], BASES["hf_llama"]


def layer(bias=True, dropout=0.0, dtype=torch.float32, r=3, scale=0.3):
    """(a DoRA that does something, its base)"""
    slot = Slot(nn.Linear(6, 8, bias=bias).to(dtype), ActiveAdapters())
    base, adapter = Base(slot, "default"), Dora(6, 8, r=r, scaling=0.7, dropout=dropout)
    adapter.reset_parameters(base, LoraConfig(init_lora_weights=False))
    with torch.no_grad():
        adapter.lora_magnitude_vector *= 1 + scale * torch.randn(8)
    return adapter, base


def whole(adapter, base):
    """W + s B A, (8, 6)"""
    return (
        base.module.weight
        + adapter.scaling * adapter.lora_B.weight @ adapter.lora_A.weight
    )


class TestConfig:
    def test_dora_config_is_lora_config_with_use_dora(self, tmp_path):
        for config in (
            DoraConfig(target_modules=["q_proj"]),
            LoraConfig(use_dora=True, target_modules=["q_proj"]),
        ):
            model = get_peft_model(LLAMA.make(), config)
            assert any(isinstance(module, Dora) for module in model.modules())
            model.save_pretrained(tmp_path)
            said = json.loads((tmp_path / "adapter_config.json").read_text())
            assert (said["peft_type"], said["use_dora"]) == ("LORA", True)
            assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
            assert peft.PeftConfig.from_pretrained(str(tmp_path)).use_dora

    def test_the_fields_of_lora_work_too(self, tmp_path):
        fields = dict(
            r=4,
            use_rslora=True,
            rank_pattern={"v_proj": 2},
            alpha_pattern={"q_proj": 32},
            use_dora=True,
            target_modules=list(HF.targets),
        )
        model = shake(get_peft_model(HF.make(), LoraConfig(**fields)))
        model.save_pretrained(tmp_path)
        close(run(peft.PeftModel.from_pretrained(HF.make(), str(tmp_path))), run(model))
        # W + s B A is not W, but its norms are m
        random = LoraConfig(**fields, init_lora_weights=False)
        differ(run(get_peft_model(HF.make(), random)), run(HF.make()))

    def test_what_it_does_not_adapt(self):
        with pytest.raises(
            TargetError, match="embed_tokens: use_dora is for linear layers"
        ):
            get_peft_model(LLAMA.make(), DoraConfig(target_modules=["embed_tokens"]))
        with pytest.raises(TargetError, match="Conv1d is not a linear layer"):
            get_peft_model(
                nn.Sequential(nn.Conv1d(3, 4, 2)), DoraConfig(target_modules=["0"])
            )
        with pytest.raises(ConfigError, match="no lora_bias"):
            DoraConfig(lora_bias=True)
        model = get_peft_model(LLAMA.make(), DoraConfig())
        with pytest.raises(ConfigError, match="only plain LoRAs"):
            model.add_weighted_adapter(["default"], [1.0], "sum")


class TestWithOthers:
    @pytest.mark.parametrize("name", ["hf_llama", "hf_gpt2"])
    def test_dropout_draws_what_peft_draws(self, name, tmp_path):
        base, outputs = BASES[name], []
        model = adapted(METHODS["dora"], base, lora_dropout=0.3)
        model.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(base.make(), str(tmp_path))
        for each in (model.train(), theirs.train()):
            torch.manual_seed(4)
            outputs.append(run(each))
        close(*outputs)
        differ(outputs[0], run(model.eval()))

    @pytest.mark.parametrize(
        "below",
        [LoraConfig(r=2), DoraConfig(r=2), BitFitConfig(target_modules=["q_proj"])],
        ids=repr,
    )
    def test_on_top_of_another_adapter_merged_or_not(self, below):
        model = shake(get_peft_model(LLAMA.make(), below, "below"), "below")
        model.add_adapter("dora", DoraConfig(r=4, target_modules=["q_proj"]))
        shake(model, "dora")
        model.set_adapter(["below", "dora"])
        apart = run(model)
        model.set_adapter("below")
        alone = run(model)
        model.set_adapter(["below", "dora"])
        model.merge_adapter(["below"])
        close(run(model), alone)
        model.merge_adapter(["dora"])  # its norm is still that of W + s B A
        close(run(model), apart)
        model.unmerge_adapter()
        assert torch.equal(run(model), apart)

    def test_two_doras_as_in_peft(self):
        models = []
        for package, config in (
            (get_peft_model, LoraConfig),
            (peft.get_peft_model, peft.LoraConfig),
        ):
            torch.manual_seed(1)
            model = package(
                HF.make(),
                config(
                    use_dora=True, target_modules=["q_proj"], init_lora_weights=False
                ),
            ).eval()
            model.add_adapter(
                "second",
                config(
                    use_dora=True, target_modules=["q_proj"], init_lora_weights=False
                ),
            )
            (model if package is get_peft_model else model.base_model).set_adapter(
                ["default", "second"]
            )
            models.append(model)
        close(run(models[0]), run(models[1]))
        close(run(models[0].merge_and_unload()), run(models[1].merge_and_unload()))


class TestNormAndGradients:
    @pytest.mark.parametrize(
        "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)]
    )
    def test_the_norms_are_those_of_the_rows(self, dtype, tolerance):
        adapter, base = layer(dtype=dtype)
        adapter.to(dtype)
        close(
            adapter.norm(base),
            torch.linalg.norm(whole(adapter, base).detach(), dim=1),
            tolerance,
        )
        assert (
            len(adapter.norm(base)) == 8 != 6 and not adapter.norm(base).requires_grad
        )
        with torch.no_grad():  # where W and s B A all but cancel, it is no nan
            base.module.weight.copy_(
                -adapter.scaling * adapter.lora_B.weight @ adapter.lora_A.weight
            )
        assert adapter(base, torch.randn(2, 6).to(dtype)).isfinite().all()

    @pytest.mark.parametrize("bias", [False, True])
    def test_the_norm_is_a_constant_for_the_gradients(self, bias):
        adapter, base = layer(bias)
        x, weights = torch.randn(5, 6), torch.randn(5, 8)
        mine, grads = adapter(base, x), {}
        (weights * mine).sum().backward()
        for detached in (True, False):
            V = whole(adapter, base)
            norm = torch.linalg.norm(V, dim=1)
            W = (adapter.lora_magnitude_vector / (norm.detach() if detached else norm))[
                :, None
            ] * V
            y = F.linear(x, W, base.module.bias)
            close(mine.detach(), y.detach())
            grads[detached] = torch.autograd.grad(
                (weights * y).sum(), list(adapter.parameters())
            )
        for own, constant in zip(adapter.parameters(), grads[True]):
            close(own.grad, constant)
        differ(grads[True][1], grads[False][1])  # lora_A: another gradient altogether

    def test_the_number_that_torchtune_tests_its_dora_with(self):
        torch.manual_seed(16)
        x = torch.randn(2, 32, 64)
        slot = Slot(nn.Linear(64, 128, bias=False), ActiveAdapters())
        slot.adapters["default"] = Dora(64, 128, r=4, scaling=1 / 4)
        for parameter in slot.parameters():
            n = parameter.numel()
            parameter.data = torch.arange(0, 1, 1 / n)[:n].view(parameter.shape)
        slot.active.names = ["default"]
        # cut after five decimals, not rounded
        assert abs(slot(x).mean().item() - 0.05201) < 2 * printed(5)

    def test_weights_loaded_afterwards_are_the_ones_measured(self, tmp_path):
        """A norm kept from before they were loaded would be that of other weights."""
        model = adapted(METHODS["dora"], LLAMA)
        with torch.no_grad():
            for slot in model.modules():
                if isinstance(slot, Slot) and slot.adapters:
                    slot.base_layer.weight.mul_(2)
        model.save_pretrained(tmp_path)
        fresh = LLAMA.make()
        with torch.no_grad():
            for name, parameter in fresh.named_parameters():
                if name.endswith(tuple(f"{target}.weight" for target in LLAMA.targets)):
                    parameter.mul_(2)
        close(run(PeftModel.from_pretrained(fresh, tmp_path)), run(model))
