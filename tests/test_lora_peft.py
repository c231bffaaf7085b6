"""LoRA against Hugging Face PEFT, field by field; and against what others published."""

import contextlib
import copy
import io
import warnings

import peft
import pytest
import torch
from bases import BASES, close, differ, inputs, rounding, run, shake
from safetensors.torch import load_file
from tolerance import printed, tolerance
from torch import nn

import minipeft
from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.methods.lora import Lora
from minipeft.slot import ActiveAdapters, Slot


def both(base, seed=0, **fields):
    """The same adapter, ours and PEFT's, each made after the same seed."""
    models = []
    for package, config in ((minipeft, LoraConfig), (peft, peft.LoraConfig)):
        adapter = config(**{"target_modules": list(base.targets), **fields})
        torch.manual_seed(seed)
        models.append(package.get_peft_model(base.make(), adapter).eval())
    return models


def state(model, folder):
    model.save_pretrained(str(folder))
    return load_file(folder / "adapter_model.safetensors")


FIELDS = {
    "rslora": dict(r=4, use_rslora=True),
    "rank": dict(r=2, lora_alpha=16),
    "patterns": dict(
        r=4,
        rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 3},
        alpha_pattern={r"layers.\d.self_attn.q_proj": 32},
    ),
    "short patterns": dict(
        r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"self_attn.*": 3}
    ),
    "all linear": dict(target_modules="all-linear"),
    "regular expression": dict(target_modules=r".*self_attn\.[qk]_proj"),
    "exclude": dict(exclude_modules=["layers.0.mlp.down_proj", "v_proj"]),
    "exclude by expression": dict(exclude_modules=r".*\.1\..*"),
    "one layer": dict(layers_to_transform=1),
    "some layers": dict(layers_to_transform=[0], layers_pattern="layers"),
    "usual targets": dict(target_modules=None),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "head": dict(target_modules=["lm_head"]),
    "modules_to_save": dict(modules_to_save=["norm", "lm_head"]),
    "lora_bias": dict(lora_bias=True, target_modules=["q_proj"]),
}


class TestAgainstPeft:
    @pytest.mark.parametrize("base", BASES.values(), ids=str)
    @pytest.mark.parametrize("init", [True, False, "gaussian"])
    def test_the_same_seed_gives_the_same_adapter(self, base, init, tmp_path):
        ours, theirs = both(base, init_lora_weights=init)
        ours, theirs = (
            state(ours, tmp_path / "ours"),
            state(theirs, tmp_path / "theirs"),
        )
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key
            assert (ours[key].abs().max() == 0) == (
                "lora_B" in key and init is not False
            ), key

    @pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
    @pytest.mark.parametrize("name", ["hf_llama", "hf_qwen2"])
    def test_every_field_does_what_it_does_in_peft(self, name, fields, tmp_path):
        base = BASES[name]
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # PEFT has much to say about tied embeddings
            ours, theirs = both(base, init_lora_weights=False, **fields)
            assert (
                ours.get_nb_trainable_parameters()
                == theirs.get_nb_trainable_parameters()
            )
            close(run(ours), run(theirs))
            differ(run(ours), run(base.make()))
            theirs.save_pretrained(str(tmp_path / "theirs"))
            ours.save_pretrained(tmp_path / "ours")
            close(
                run(PeftModel.from_pretrained(base.make(), tmp_path / "theirs")),
                run(theirs),
            )
            close(
                run(
                    peft.PeftModel.from_pretrained(base.make(), str(tmp_path / "ours"))
                ),
                run(ours),
            )
        own, other = (
            load_file(tmp_path / who / "adapter_model.safetensors")
            for who in ("ours", "theirs")
        )
        # adapted embeddings come with their base
        extra = {key for key in other if ".base_layer." in key}
        assert own.keys() == other.keys() - extra
        assert bool(extra) == (
            fields.get("target_modules") in (["embed_tokens", "q_proj"], ["lm_head"])
        )
        for key in own:
            assert torch.equal(own[key], other[key]), key
        # whose layers have no bias to merge it into
        if "lora_bias" in fields and name == "hf_llama":
            before = {k: v.clone() for k, v in ours.state_dict().items()}
            with pytest.raises(minipeft.NotMergeableError, match="no bias"):
                ours.merge_adapter()
            assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        else:
            close(run(copy.deepcopy(ours).merge_and_unload()), run(ours), rounding(2))

    @pytest.mark.parametrize("name", ["llama", "hf_qwen2"])
    def test_a_tied_head_is_merged_without_touching_the_embedding(self, name, tmp_path):
        base = BASES[name]
        model = shake(
            get_peft_model(base.make(), LoraConfig(target_modules=["lm_head"]))
        )
        embedding = model.get_input_embeddings().weight
        before, apart = embedding.clone(), run(model)
        plain = model.merge_and_unload()
        close(run(plain), apart)
        assert plain.get_input_embeddings().weight is embedding and torch.equal(
            embedding, before
        )
        if name == "hf_qwen2":
            plain.save_pretrained(tmp_path)
            close(run(type(plain).from_pretrained(tmp_path)), apart)

    @pytest.mark.parametrize("name", ["hf_llama", "hf_gpt2", "llama"])
    def test_dropout_draws_what_peft_draws(self, name):
        ours, theirs = both(BASES[name], lora_dropout=0.3, init_lora_weights=False)
        outputs = []
        for model in (ours.train(), theirs.train()):
            torch.manual_seed(4)
            outputs.append(run(model))
        close(outputs[0], outputs[1])
        differ(outputs[0], run(ours.eval()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_bases_as_in_peft(self, dtype):
        base = BASES["hf_llama"]
        outputs = []
        for package, config in ((minipeft, LoraConfig), (peft, peft.LoraConfig)):
            for keep in (True, False):
                torch.manual_seed(0)
                model = package.get_peft_model(
                    base.make().to(dtype),
                    config(target_modules=["q_proj"]),
                    autocast_adapter_dtype=keep,
                )
                assert {p.dtype for p in model.parameters() if p.requires_grad} == {
                    torch.float32 if keep else dtype
                }
                outputs.append(run(model))
                assert outputs[-1].dtype == dtype
        for ours, theirs in zip(outputs[:2], outputs[2:]):
            close(ours, theirs, tolerance(dtype))  # a sum with zero, rounded or not

    def test_autocast_as_in_peft(self):
        ours, theirs = both(BASES["hf_llama"], init_lora_weights=False)
        exact = run(ours)
        with torch.autocast("cpu", torch.bfloat16):
            errors = [(run(model) - exact).square().mean() for model in (ours, theirs)]
            assert run(ours).dtype == torch.bfloat16 and 0 < errors[0] < 1.5 * errors[1]

    def test_sums_of_active_adapters_as_in_peft(self):
        ours, theirs = both(BASES["hf_gpt2"], init_lora_weights=False)
        for model, config in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
            torch.manual_seed(1)
            model.add_adapter(
                "second",
                config(r=2, target_modules=["c_attn"], init_lora_weights=False),
            )
        ours.set_adapter(["default", "second"])
        theirs.base_model.set_adapter(["default", "second"])
        close(run(ours), run(theirs))

    def test_rows_as_in_peft(self):
        ours, theirs = both(BASES["hf_llama"], init_lora_weights=False)
        for model, config in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
            torch.manual_seed(1)
            model.add_adapter(
                "second",
                config(r=2, target_modules=["up_proj"], init_lora_weights=False),
            )
        names = ["second", "__base__", "default"]
        close(run(ours, adapter_names=names), run(theirs, adapter_names=names))
        for more in (dict(do_sample=False), dict(num_beams=3, do_sample=False)):
            tokens = [
                model.generate(
                    **inputs(), adapter_names=names, max_new_tokens=5, **more
                )
                for model in (ours, theirs)
            ]
            assert torch.equal(*tokens)
        assert torch.equal(
            *(
                model.generate(**inputs(), max_new_tokens=5, do_sample=False)
                for model in (ours, theirs)
            )
        )

    def test_the_quick_start_with_only_the_import_changed(self, tmp_path):
        """The training part of the second source document, from its imports on; the
        model is small and not quantised."""

        BASES["hf_llama"].make().save_pretrained(tmp_path)
        program = """
from transformers import AutoModelForCausalLM
from minipeft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
import torch

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)

# Prepare model for k-bit training
model = prepare_model_for_kbit_training(model)

# LoRA configuration — only these adapter matrices will be trained
lora_config = LoraConfig(
    r=16,                      # rank of LoRA decomposition — higher = more parameters
    lora_alpha=32,  # scaling factor (lora_alpha/r = effective learning rate scaling)
    # which attention matrices to adapt
    target_modules=["q_proj", "v_proj", "k_proj", "o_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)

model = get_peft_model(model, lora_config)
model.print_trainable_parameters()
"""
        said = []
        for package in ("minipeft", "peft"):
            names, out = {"FOLDER": str(tmp_path)}, io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(program.replace("from minipeft", f"from {package}"), names)
            said.append(out.getvalue())
            model = names["model"]
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            model.train()(**inputs(), labels=inputs()["input_ids"]).loss.backward()
            assert all(
                (p.grad is not None) == ("lora" in name)
                for name, p in model.named_parameters()
            )
        assert said[0] == said[1] and "trainable params: 3,584 ||" in said[0]

    def test_the_new_head_of_a_classifier_is_trained_too(self, tmp_path):
        from transformers import LlamaConfig, LlamaForSequenceClassification

        torch.manual_seed(0)
        base = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_labels=3,
                pad_token_id=0,
            )
        ).eval()
        fields = dict(
            r=4,
            target_modules="all-linear",
            task_type="SEQ_CLS",
            init_lora_weights=False,
        )
        ours = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
        assert (
            ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        )
        shake(ours)
        assert (
            state(ours, tmp_path / "ours").keys()
            == state(theirs, tmp_path / "theirs").keys()
        )
        close(
            run(
                peft.PeftModel.from_pretrained(
                    copy.deepcopy(base), str(tmp_path / "ours")
                )
            ),
            run(ours),
        )
        close(
            run(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")),
            run(theirs.eval()),
        )
        differ(run(ours), run(base))


class TestLora:
    def test_the_counts_of_llama_3_8b(self, capsys):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        lora = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj", "k_proj", "o_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        )
        get_peft_model(model, lora).print_trainable_parameters()
        said = (
            "trainable params: 13,631,488 || all params: 8,043,892,736 || trainable%:"
            " 0.1695\n"
        )
        assert capsys.readouterr().out == said

    def test_the_number_that_torchtune_tests_its_lora_with(self):
        torch.manual_seed(16)
        x = torch.randn(2, 32, 64)
        slot = Slot(nn.Linear(64, 128), ActiveAdapters())
        slot.adapters["default"] = Lora(64, 128, r=4, scaling=1 / 4)
        for parameter in slot.parameters():
            n = parameter.numel()
            parameter.data = torch.arange(0, 1, 1 / n)[:n].view(parameter.shape)
        slot.active.names = ["default"]
        assert abs(slot(x).mean().item() - 1.1252) < printed(4)

    def test_gradients_at_the_start(self):
        """B is zero, so A gets no gradient at first; with A zero too nothing would ever
        move."""
        layer = Lora(8, 6, r=2, scaling=1.0)
        layer.reset_parameters(None, LoraConfig())
        x = torch.randn(5, 8)
        layer(nn.Linear(8, 6), x).square().sum().backward()
        assert (
            layer.lora_A.weight.grad.abs().max()
            == 0
            < layer.lora_B.weight.grad.abs().max()
        )

    def test_one_vector_without_a_batch(self):
        layer, base, x = Lora(8, 6, r=2, scaling=0.5), nn.Linear(8, 6), torch.randn(8)
        close(layer(base, x), base(x) + layer.delta(None) @ x)
