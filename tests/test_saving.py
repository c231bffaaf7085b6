"""Files: Hugging Face's layout, whole or not at all."""

import json
import os

import pytest
import torch
from bases import BASES, METHODS, adapted, close, run, shake
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import minipeft
from minipeft import (
    AdapterFileError,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    saving,
)

BASE, LORA = BASES["llama"], METHODS["lora"]


class TestConfigurations:
    def test_a_configuration_survives_its_file(self, tmp_path):
        config = LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules={"v_proj", "q_proj"},
            rank_pattern={"v_proj": 2},
            modules_to_save=["norm"],
            layers_to_transform=[1],
            use_rslora=True,
            init_lora_weights="gaussian",
            task_type="CAUSAL_LM",
        )
        config.save_pretrained(tmp_path)
        again = PeftConfig.from_pretrained(tmp_path)
        assert type(again) is LoraConfig and again.target_modules == [
            "q_proj",
            "v_proj",
        ]
        config.target_modules = ["q_proj", "v_proj"]
        assert again == config

    def test_all_that_peft_writes_is_understood(self, tmp_path):
        import peft

        peft.LoraConfig(
            r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"
        ).save_pretrained(str(tmp_path))
        assert PeftConfig.from_pretrained(tmp_path) == LoraConfig(
            r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
        (tmp_path / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}'
        )
        assert PeftConfig.from_pretrained(tmp_path).r == 4

    def test_what_would_compute_something_else_is_refused(self, tmp_path):
        import peft

        peft.LoraConfig(
            r=4, target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)]
        ).save_pretrained(str(tmp_path))
        with pytest.raises(minipeft.ConfigError, match="layer_replication"):
            PeftConfig.from_pretrained(tmp_path)

    def test_a_target_of_another_architecture_does_no_harm_in_a_file(self, tmp_path):
        import peft

        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "c_attn"], init_lora_weights=False
        )
        model = peft.get_peft_model(BASE.make(), config)
        model.save_pretrained(str(tmp_path))
        ours = PeftModel.from_pretrained(BASE.make(), tmp_path)
        assert ours.peft_config["default"].target_modules == ["q_proj"]
        close(run(ours), run(model))


class TestFolder:
    def test_the_layout_of_a_folder(self, tmp_path):
        model = adapted(LORA, BASE)
        model.add_adapter("b", LORA.ours(BASE))
        model.save_pretrained(tmp_path)
        assert sorted(
            str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()
        ) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "b/README.md",
            "b/adapter_config.json",
            "b/adapter_model.safetensors",
        ]
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
                in file.keys()
            )
        data = json.loads((tmp_path / "adapter_config.json").read_text())
        assert data["peft_type"] == "LORA" and data["inference_mode"] is True
        assert data["target_modules"] == list(BASE.targets)
        assert model.peft_config["default"].inference_mode is False

    def test_an_interrupted_save_leaves_the_old_files(self, tmp_path, monkeypatch):
        model = adapted(LORA, BASE)
        model.save_pretrained(tmp_path)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapted(LORA, BASE, r=2).save_pretrained(tmp_path)
        assert {
            p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before
        } == before
        monkeypatch.undo()
        assert torch.equal(
            run(PeftModel.from_pretrained(BASE.make(), tmp_path)), run(model)
        )
        model.save_pretrained(tmp_path)  # and nothing is left over after the next
        assert {p.name for p in tmp_path.iterdir()} == before.keys()

    def test_a_name_on_the_hub(self, tmp_path, monkeypatch):
        adapted(LORA, BASE).save_pretrained(tmp_path)
        import huggingface_hub

        asked = []

        def download(name, **kwargs):
            asked.append((name, kwargs))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        PeftModel.from_pretrained(BASE.make(), "somebody/adapter")
        assert asked == [
            ("somebody/adapter", {"allow_patterns": [saving.CONFIG, saving.TENSORS]})
        ]


class TestLoading:
    def test_loading_freezes_unless_asked(self, tmp_path):
        adapted(LORA, BASE).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(BASE.make().train(), tmp_path)
        assert not any(p.requires_grad for p in model.parameters()) and not any(
            m.training for m in model.modules()
        )
        model = PeftModel.from_pretrained(
            BASE.make().train(), tmp_path, is_trainable=True
        )
        assert sum(p.requires_grad for p in model.parameters()) == 12 and all(
            m.training for m in model.modules()
        )
        model.load_adapter(tmp_path, "frozen")
        assert (
            model.active_adapters == ["default"]
            and sum(p.requires_grad for p in model.parameters()) == 12
        )

    def test_loading_does_not_care_where_it_was_saved_in_16_bits(self, tmp_path):
        model = get_peft_model(
            BASE.make().bfloat16(), LORA.ours(BASE), autocast_adapter_dtype=False
        )
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(BASE.make(), tmp_path)
        assert {p.dtype for p in again.parameters()} == {torch.float32}

    @pytest.mark.parametrize("method", ["copy", "norm"])
    def test_a_batch_norm_counts_in_whole_numbers(self, tmp_path, method):
        def base():
            torch.manual_seed(0)
            norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
            return nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3))

        config = LNTuningConfig(target_modules=["1.1"])
        if method == "copy":
            config = LoraConfig(target_modules=["0"], modules_to_save=["1"])
        x = torch.randn(4, 3)
        model = get_peft_model(base(), config)
        model(x)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base(), tmp_path)
        assert torch.equal(again(x), model.eval()(x))
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(key for key in tensors if "num_batches_tracked" in key)
        save_file(tensors | {key: tensors[key].float()}, file)
        with pytest.raises(AdapterFileError, match="float32, expected torch.int64"):
            PeftModel.from_pretrained(base(), tmp_path)

    @pytest.mark.parametrize("names", [["1"], ["1", "1.0"]])
    def test_a_module_within_one_that_is_saved(self, tmp_path, names):
        """It is trained and saved with that one: a copy of its own, which is never
        called, would take its place in the file. "1" matches "1.1", too."""

        def base():
            torch.manual_seed(0)
            block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
            return nn.Sequential(nn.Linear(3, 3), block)

        config = LoraConfig(target_modules=["0"], modules_to_save=names)
        x = torch.randn(4, 3)
        model = shake(get_peft_model(base(), config))
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base(), tmp_path)
        assert torch.equal(again(x), model(x))

    def test_a_frozen_adapter_stays_frozen_beside_a_new_one(self, tmp_path):
        adapted(LORA, BASE).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(BASE.make(), tmp_path)
        model.add_adapter("b", LORA.ours(BASE))
        assert model.active_adapters == ["default"] and not any(
            p.requires_grad for p in model.parameters()
        )
        model.set_adapter("b")
        assert sum(p.requires_grad for p in model.parameters()) == 12
