"""DenseLoRA: nobody else has it, so the oracle is its equation, written as
nn.Sequential; and its paper's counts."""

import pytest
import torch
from bases import BASES, METHODS, WIDTH, adapted, close, differ, inputs, run
from tolerance import tolerance
from torch import nn

import minipeft
from minipeft import (
    ConfigError,
    DenseLoraConfig,
    NotMergeableError,
    TargetError,
    get_peft_model,
)
from minipeft.methods.denselora import DenseLora, SharedFactors
from minipeft.slot import Slot

LLAMA = BASES["llama"]


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone())
    return layer


class TestDenseLora:
    @pytest.mark.parametrize("activation", ["gelu", "linear"])
    def test_its_equation(self, activation):
        model = adapted(
            METHODS["denselora"], LLAMA, activation=activation, lora_alpha=6
        )
        bend = nn.GELU if activation == "gelu" else nn.Identity
        for slot in model.modules():
            if isinstance(slot, Slot) and slot.adapters:
                part, base = slot.adapters["default"], slot.base_layer
                pair = model.shared["default"][part.kind]
                written = nn.Sequential(
                    linear(pair.encoder),
                    bend(),
                    linear(part.lora_M),
                    linear(pair.decoder),
                    bend(),
                )
                x = torch.randn(2, 3, base.in_features)
                close(slot(x).detach(), (base(x) + 6 / 4 * written(x)).detach())
                loss = (slot(x) ** 2).sum()
                own = torch.autograd.grad(
                    loss, [pair.encoder, part.lora_M, pair.decoder]
                )
                other = torch.autograd.grad(
                    ((base(x) + 6 / 4 * written(x)) ** 2).sum(),
                    list(written.parameters()),
                )
                for a, b in zip(own, other):
                    # of five products forth and back
                    close(a, b, tolerance(torch.float32, terms=4 * WIDTH, steps=10))

    def test_layers_of_one_kind_share_and_others_do_not(self):
        # two layers are named c_proj there
        model = adapted(METHODS["denselora"], BASES["hf_gpt2"])
        model = get_peft_model(
            model.unload(), DenseLoraConfig(r=2, target_modules=["c_proj", "c_attn"])
        )
        assert sorted(model.shared["default"]) == [
            "c_attn_16x48",
            "c_proj_16x16",
            "c_proj_64x16",
        ]
        assert [
            sum(isinstance(m, kind) for m in model.modules())
            for kind in (SharedFactors, DenseLora)
        ] == [3, 6]
        expected = 2 * (16 + 48) + 2 * (16 + 16) + 2 * (64 + 16) + 6 * 2 * 2
        assert model.get_nb_trainable_parameters()[0] == expected

    def test_the_decoder_learns_first(self):
        """D is zero, but GELU has a slope there: D gets a gradient at once, E and M
        when it has moved."""
        model = get_peft_model(
            LLAMA.make(), DenseLoraConfig(r=4, target_modules=["q_proj"])
        ).train()
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=1.0
        )
        for step in range(2):
            optimizer.zero_grad()
            model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
            grads = {
                name.rpartition(".")[2]: p.grad.abs().max() > 0
                for name, p in model.named_parameters()
                if p.grad is not None
            }
            assert grads == {"decoder": True, "encoder": step == 1, "lora_M": step == 1}
            optimizer.step()

    def test_with_gelu_it_refuses_to_merge_before_it_touches_a_weight(self):
        model = adapted(METHODS["denselora"], LLAMA)
        model.add_adapter("lora", minipeft.LoraConfig(r=2))
        model.set_adapter(["lora", "default"])
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(
                NotMergeableError, match="'default' cannot be merged.*DenseLora"
            ):
                merge()
        assert model.merged_adapters == [] and all(
            torch.equal(t, before[n]) for n, t in model.state_dict().items()
        )

    def test_the_linear_form_is_a_lora_with_shared_factors(self, tmp_path):
        model = adapted(METHODS["denselora_linear"], LLAMA)
        slot = next(m for m in model.modules() if isinstance(m, Slot) and m.adapters)
        base = minipeft.Base(slot, "default")
        assert torch.linalg.matrix_rank(slot.adapters["default"].delta(base)) == 4
        expected = run(model)
        differ(expected, run(adapted(METHODS["denselora"], LLAMA)))
        close(run(model.merge_and_unload()), expected)

    def test_the_count_of_its_paper_on_llama_3_8b(self):
        """0.01% against LoRA's 0.70% (abstract)."""
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=128256,
                    hidden_size=4096,
                    intermediate_size=14336,
                    num_hidden_layers=32,
                    num_attention_heads=32,
                    num_key_value_heads=8,
                )
            )
        targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
        everything, counts = sum(p.numel() for p in model.parameters()), []
        for config in (
            DenseLoraConfig(r=16, target_modules=targets),
            minipeft.LoraConfig(r=32, target_modules=targets),
        ):
            adapted_model = get_peft_model(model, config)
            counts.append(adapted_model.get_nb_trainable_parameters()[0])
            adapted_model.unload()
        sizes = {
            "q": (4096, 4096),
            "k": (4096, 1024),
            "v": (4096, 1024),
            "up": (4096, 14336),
            "down": (14336, 4096),
        }
        assert (
            counts[0]
            == sum(16 * sum(size) for size in sizes.values()) + 5 * 32 * 16 * 16
        )
        assert counts[1] == 32 * sum(32 * sum(size) for size in sizes.values())
        assert [f"{100 * count / everything:.3f}" for count in counts] == [
            "0.012",
            "0.705",
        ]


class TestConfig:
    @pytest.mark.parametrize(
        "fields, message",
        [
            (dict(r=0), "r = 0"),
            (dict(activation="relu"), "unknown activation 'relu'"),
            (dict(activation=None), "None"),
            (dict(lora_dropout=1.0), "lora_dropout = 1.0"),
        ],
    )
    def test_configurations_that_mean_nothing(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            DenseLoraConfig(**fields)

    def test_embeddings_are_refused(self):
        with pytest.raises(TargetError, match="not for embeddings"):
            get_peft_model(
                LLAMA.make(), DenseLoraConfig(target_modules=["embed_tokens"])
            )
