"""The memory ledger: its arithmetic against what autograd really saves, and what the
optimizer really holds."""

import pytest
import torch
from tolerance import printed

from minipeft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from minipeft.course.measuring import measured_ledger, peak_bytes
from minipeft.lm import on_paper
from minipeft.lm.gpt import GPT, GPTConfig
from minipeft.lm.memory import Ledger, memory_ledger
from minipeft.quant import quantize_model


def model(
    kind="llama", tied=True, layers=2, hidden_size=24, intermediate_size=40, **fields
):
    return GPT(
        GPTConfig(
            vocab_size=101,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4 if kind == "gpt2" else 2,
            max_position_embeddings=32,
            attention_bias=True,
            mlp_bias=kind != "qwen3",
            model_type=kind,
            tie_word_embeddings=tied,
            **fields,
        )
    )


def only(part):
    def freeze(m):
        for name, p in m.named_parameters():
            p.requires_grad_(part in name)
        return m

    return freeze


def lora(targets, dropout=0.0):
    return lambda m: get_peft_model(
        m, LoraConfig(r=5, target_modules=targets, lora_dropout=dropout)
    ).train()


WAYS = {
    "full": lambda m: m,
    "biases": only("bias"),
    "norms": only("norm"),
    "last layer": only("layers.1."),
    "head": only("lm_head"),
    "q, v": lora(["q_proj", "v_proj"]),
    "o": lora(["o_proj"]),
    "down": lora(["down_proj"]),
    "gate": lora(["gate_proj"]),
    "all": lora("all-linear"),
    "dropout": lora("all-linear", 0.1),
}


def near(a, b, share=0.1):
    assert abs(a - b) <= share * b, f"{a:,} predicted, {b:,} measured"


class TestArithmetic:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
    def test_predicted_is_measured_to_the_byte(self, kind, way):
        if (kind, way) == ("gpt2", "gate"):
            return  # GPT-2 has none
        ledger = measured_ledger(
            WAYS[way](model(kind, tied=way != "head" and kind != "qwen3")), 3, 10
        )
        assert ledger.predicted == ledger.measured

    def test_measuring_changes_nothing(self):
        m = WAYS["full"](model())
        m(
            input_ids=torch.ones(1, 4, dtype=torch.long),
            labels=torch.ones(1, 4, dtype=torch.long),
        ).loss.backward()
        weights, grads = (
            [p.clone() for p in m.parameters()],
            [p.grad for p in m.parameters()],
        )
        torch.manual_seed(3)
        measured_ledger(m, 2, 8)
        drawn = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(1))
        assert all(
            torch.equal(p, w) and p.grad is g
            for p, w, g in zip(m.parameters(), weights, grads)
        )

    def test_the_rules_of_thumb(self):
        full, adapted = (
            memory_ledger(WAYS[way](model()), 16, 30).predicted
            for way in ("full", "q, v")
        )
        trained = (
            2 * 5 * (24 + 24 + 24 + 12)
        )  # r (d_in + d_out) for q and v in two layers
        assert full["gradients"] == full["weights"]
        counts = 4 * len(list(model().parameters()))  # of steps, one a tensor
        assert full["optimizer"] == 2 * full["weights"] + counts
        assert (
            adapted["gradients"] == 4 * trained
            and adapted["weights"] == full["weights"] + 4 * trained
        )
        assert full["activations"] / 2 < adapted["activations"] < full["activations"]

    def test_eight_billion_parameters_without_memory(self):
        with torch.device("meta"):
            big = GPT(
                GPTConfig(
                    vocab_size=128256,
                    hidden_size=4096,
                    intermediate_size=14336,
                    num_hidden_layers=32,
                    num_attention_heads=32,
                    num_key_value_heads=8,
                    tie_word_embeddings=False,
                )
            ).to(torch.bfloat16)
        full = memory_ledger(big, 1, 2048)
        assert (
            full.predicted["weights"]
            == 2 * 8_030_261_248
            == full.predicted["gradients"]
        )
        adapted = memory_ledger(
            get_peft_model(big, LoraConfig(r=16, target_modules=["q_proj", "v_proj"])),
            1,
            2048,
        )
        # PEFT keeps the adapter of a 16-bit model in 32 bits
        assert adapted.predicted["gradients"] == 6_815_744 * 4
        assert adapted.total() < 0.6 * full.total()

    def test_checkpointing_keeps_one_input_a_layer_and_one_layer(self):
        m = model(layers=12)
        before = memory_ledger(m, 3, 10).predicted["activations"]
        one = (
            memory_ledger(model(layers=2), 3, 10).predicted["activations"]
            - memory_ledger(model(layers=1), 3, 10).predicted["activations"]
        )
        m.gradient_checkpointing_enable()
        ledger = measured_ledger(m, 3, 10)
        assert (
            ledger.predicted["activations"] == before - 11 * one + 12 * 3 * 10 * 24 * 4
        )

    def test_other_models_and_optimizers_are_measured_only(self):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=50,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        )
        ledger = measured_ledger(theirs, 2, 8, optimizer=torch.optim.Adagrad)
        assert ledger.predicted["activations"] is ledger.predicted["optimizer"] is None
        assert (
            ledger.measured["activations"] > 0
            and ledger.measured["gradients"] <= ledger.measured["optimizer"]
        )

    def test_the_table(self):
        text = repr(
            Ledger(
                {"weights": 5_430_000, "activations": None},
                {"weights": 12, "activations": 1200},
                16,
                64,
            )
        )
        assert text.splitlines() == [
            "16 x 64 tokens             predicted    measured",
            "weights                      5.43 MB        12 B",
            "activations                        -     1.20 kB",
            "total                        5.43 MB     1.21 kB",
        ]

    def test_nothing_trained(self):
        assert (
            memory_ledger(model().requires_grad_(False), 2, 8).total()
            == memory_ledger(model(), 2, 8).predicted["weights"]
        )


COUNTS = {
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
}  # as their safetensors files count them


class TestFormats:
    @pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
    def test_weights_by_format(self, backend):
        m = model(tied=False, hidden_size=64, intermediate_size=128)
        before = memory_ledger(m, 2, 8)
        assert before.formats == {"float32": before.predicted["weights"]}
        inside = [
            layer
            for layer in m.model.layers.modules()
            if isinstance(layer, torch.nn.Linear)
        ]
        n = sum(layer.weight.numel() for layer in inside)
        ledger = measured_ledger(
            get_peft_model(
                quantize_model(m, backend), LoraConfig(r=4, target_modules=["q_proj"])
            ),
            2,
            8,
        )
        # its layers each keep their codebooks
        tables = len(inside) * 4 * (16 + 256) if backend == "bitsandbytes" else 0
        assert (
            ledger.formats["nf4"]
            == n // 2
            + n // 64
            + sum(4 * -(-layer.weight.numel() // 64 // 256) for layer in inside)
            + 4 * len(inside)
            + tables
        )
        assert (
            ledger.formats["float32"]
            == before.predicted["weights"] - 4 * n + 4 * 2 * 4 * 128
        )
        assert (
            ledger.predicted["weights"]
            == ledger.measured["weights"]
            == sum(ledger.formats.values())
        )
        assert ledger.predicted["activations"] == ledger.measured["activations"]
        assert ledger.predicted["a dense weight"] == 64 * 128 * 4
        assert "of it nf4" in repr(ledger)

    @pytest.mark.parametrize(
        "optimizer", ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "sgd"]
    )
    @pytest.mark.filterwarnings("ignore:paging")
    def test_optimizers_by_kind(self, optimizer):
        # tensors above and below 4,096 numbers
        m = model(hidden_size=80, intermediate_size=100)
        ledger = measured_ledger(m, 2, 8, optimizer=optimizer)
        assert ledger.predicted["optimizer"] == ledger.measured["optimizer"]
        assert (optimizer == "sgd") == (ledger.predicted["optimizer"] == 0)

    @pytest.mark.parametrize("quantised", [False, True])
    @pytest.mark.parametrize("way", ["full", "all", "q, v"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activations_with_checkpointing(self, way, quantised, reentrant):
        m = model("llama", layers=6, hidden_size=64, intermediate_size=160)
        if quantised:
            m = quantize_model(m) if way != "full" else m
        m = WAYS[way](m).train()
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if way == "full":
            m.enable_input_require_grads()
        ledger = measured_ledger(m, 4, 24)
        near(ledger.predicted["activations"], ledger.measured["activations"])

    @pytest.mark.parametrize("way", ["full", "norms", "head", "o", "all", "dropout"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
    def test_16_bits_to_the_byte(self, kind, dtype, way):
        m = WAYS[way](
            model(kind, tied=way != "head" and kind != "qwen3", hidden_size=64).to(
                dtype
            )
        ).train()
        ledger = measured_ledger(m, 6, 16)
        assert ledger.predicted == ledger.measured

    @pytest.mark.parametrize("way", ["biases", "head", "q, v", "all", "dropout"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_4_bits_with_checkpointing_to_the_byte(self, dtype, way):
        m = WAYS[way](
            quantize_model(
                model(tied=False, layers=4, hidden_size=64, intermediate_size=128).to(
                    dtype
                )
            )
        ).train()
        m.gradient_checkpointing_enable()
        ledger = measured_ledger(m, 6, 16)
        assert ledger.predicted["activations"] == ledger.measured["activations"]

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("way", ["full", "all", "q, v"])
    def test_the_peak_is_the_ledger_and_the_logits_gradients(self, way, checkpointing):
        m = WAYS[way](model(layers=6, hidden_size=64, intermediate_size=160)).train()
        if checkpointing:
            m.gradient_checkpointing_enable()
        weights = [p.clone() for p in m.parameters()]
        # of two tensors as large as the logits
        bound = memory_ledger(m, 4, 24).total() + 2 * 4 * 23 * 101 * 4
        peak = peak_bytes(m, 4, 24)
        assert 0.75 * bound < peak < 1.05 * bound
        assert all(
            torch.equal(p, w) and p.grad is None
            for p, w in zip(m.parameters(), weights)
        )


class TestRealShapes:
    @pytest.mark.parametrize("name", COUNTS)
    def test_real_shapes_have_the_published_counts(self, name):
        m = on_paper(name)
        assert sum(p.numel() for p in m.parameters()) == COUNTS[name]
        assert memory_ledger(m, 1, 16).predicted["weights"] == 2 * COUNTS[name]

    def test_qlora_on_paper(self):
        m = quantize_model(on_paper("llama-3-8b"))
        # less embedding, head and norms
        inside = 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
        assert memory_ledger(m, 1, 16).formats["nf4"] == pytest.approx(
            inside * 4.127 / 8, rel=printed(3) / 4.127
        )
        m = get_peft_model(
            prepare_model_for_kbit_training(m),
            LoraConfig(r=16, target_modules="all-linear"),
        ).train()
        ledger = memory_ledger(m, 1, 512, optimizer="paged_adamw")
        assert ledger.predicted["gradients"] == 4 * 41_943_040
        assert 7e9 < ledger.total() < 12e9
        with pytest.raises(ValueError, match="did you mean 'llama-3-8b'"):
            on_paper("llama-3-8")
