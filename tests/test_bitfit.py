"""BitFit and LayerNorm tuning, against the base's own biases and norms trained in
place."""

import peft
import pytest
import torch
from bases import BASES, ROUNDING, close, differ, loss_of, rounding, run, shake
from tolerance import size
from torch import nn

import minipeft
from minipeft import BitFitConfig, LNTuningConfig, TargetError, get_peft_model


class TestBiases:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "hf_qwen2", "hf_gpt2", "mlp"])
    def test_a_step_is_the_step_of_the_biases_trained_in_place(self, name):
        base = BASES[name]
        model, plain = get_peft_model(base.make(), BitFitConfig()), base.make()
        biases = {n: p for n, p in plain.named_parameters() if n.endswith("bias")}
        assert (
            model.get_nb_trainable_parameters()[0]
            == sum(p.numel() for p in biases.values())
            > 0
        )
        for p in plain.parameters():
            p.requires_grad_(False)
        for p in biases.values():
            p.requires_grad_(True)
        for each in (model, plain):
            loss_of(each).backward()
        for path, part in model._adapters_by_path("default").items():
            close(part.bias_delta.grad, biases[f"{path}.bias"].grad)
        for each in (model, plain):
            torch.optim.SGD(
                [p for p in each.parameters() if p.requires_grad], lr=0.5
            ).step()
        close(run(model), run(plain))
        differ(run(model), run(base.make()))
        close(run(model.merge_and_unload()), run(plain))

    def test_a_model_without_biases_says_so(self):
        base = BASES["hf_llama"]
        with pytest.raises(TargetError, match="no biases to train.*add_bias=True"):
            get_peft_model(base.make(), BitFitConfig())
        with pytest.raises(
            TargetError, match="q_proj: this Linear has no bias; add_bias"
        ):
            get_peft_model(base.make(), BitFitConfig(target_modules=["q_proj"]))
        with pytest.raises(TargetError, match="LlamaRMSNorm is not a linear layer"):
            get_peft_model(
                base.make(), BitFitConfig(target_modules=["norm"], add_bias=True)
            )
        model = get_peft_model(base.make(), BitFitConfig(add_bias=True))
        d, kv, wide = 16, 8, 24
        # all but the head
        assert model.get_nb_trainable_parameters()[0] == 2 * (
            2 * d + 2 * kv + 2 * wide + d
        )
        assert torch.equal(run(model), run(base.make()))

    def test_the_key_bias_changes_nothing(self):
        """q (k + b) = q k + q b: the same is added to all scores of a query, and
        softmax does not see it. So is it, at least, without rotary positions; with them
        the bias is turned by another angle at each position."""
        for name, same in (("gpt2", True), ("llama", False)):
            base = BASES[name]
            model = shake(
                get_peft_model(base.make(), BitFitConfig(target_modules=["k_proj"]))
            )
            plain = run(base.make())
            change = (run(model) - plain).abs().max()
            assert (change < rounding(size=size(plain))) == same
            loss_of(model).backward()
            gradient = max(
                p.grad.abs().max() for p in model.parameters() if p.requires_grad
            )
            assert (gradient < ROUNDING) == same

    @pytest.mark.parametrize(
        "layer, x",
        [
            (nn.Conv1d(4, 4, 1), (2, 4, 4)),
            (nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
            (nn.BatchNorm1d(4), (2, 4)),
            (nn.GroupNorm(2, 4), (2, 4, 4)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_a_bias_a_channel_is_left(self, layer, x):
        """Added to the last dimension it would be another function, or not fit."""
        model = nn.Sequential(layer.eval(), nn.Flatten(), nn.LazyLinear(3))
        model(torch.ones(x))
        with pytest.raises(TargetError, match="does not end by adding its bias to"):
            get_peft_model(model, BitFitConfig(target_modules=["0"]))
        model = shake(get_peft_model(model, BitFitConfig()))
        assert list(model._adapters_by_path("default")) == ["2"]
        apart = model(torch.ones(x))
        close(model.merge_and_unload()(torch.ones(x)), apart)

    @pytest.mark.parametrize("kind", ["BertForMaskedLM", "GptOssForCausalLM"])
    def test_a_bias_that_another_layer_adds_is_left(self, kind):
        """BERT's head holds the bias that its decoder adds; an expert router's output
        is a tuple."""
        transformers = pytest.importorskip("transformers")
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
        sizes |= dict(num_attention_heads=4, vocab_size=40, num_key_value_heads=2)
        sizes |= dict(head_dim=4, num_local_experts=4, num_experts_per_tok=2)
        name = kind.partition("For")[0]
        config = getattr(transformers, f"{name}Config")(**sizes)
        base = getattr(transformers, kind)(config).eval()
        ids = torch.arange(5)[None]
        model = shake(get_peft_model(base, BitFitConfig()))
        apart = model(ids).logits
        close(model.merge_and_unload()(ids).logits, apart)


class TestNorms:
    @pytest.mark.parametrize("name", ["hf_llama", "hf_mistral", "hf_gpt2"])
    def test_they_are_found_as_peft_finds_them(self, name, tmp_path):
        base = BASES[name]
        ours = shake(get_peft_model(base.make(), LNTuningConfig()))
        theirs = peft.get_peft_model(base.make(), peft.LNTuningConfig())
        assert (
            ours.get_nb_trainable_parameters()[0]
            == theirs.get_nb_trainable_parameters()[0]
            > 0
        )
        ours.save_pretrained(tmp_path)
        close(
            run(peft.PeftModel.from_pretrained(base.make(), str(tmp_path))), run(ours)
        )
        expected = run(ours)
        close(run(ours.merge_and_unload()), expected)
        differ(expected, run(base.make()))

    @pytest.mark.parametrize("name", ["llama", "hf_llama"])
    def test_training_is_that_of_peft(self, name):
        base, losses = BASES[name], []
        for package in (minipeft, peft):
            model = package.get_peft_model(
                base.make(),
                package.LNTuningConfig(
                    target_modules=[
                        "input_layernorm",
                        "post_attention_layernorm",
                        "norm",
                    ]
                ),
            )
            optimizer = torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad], lr=0.3
            )
            for _ in range(3):
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss_of(model))
        close(*losses)
        assert loss_of(base.make()) - losses[0] > 1e-3

    def test_other_layers_are_refused(self):
        with pytest.raises(TargetError, match="q_proj: Linear is not a norm"):
            get_peft_model(
                BASES["llama"].make(), LNTuningConfig(target_modules=["q_proj"])
            )
