"""The memory ledger: its arithmetic against what autograd really saves, and what the optimizer really holds."""
import pytest
import torch

from minipeft import LoraConfig, get_peft_model
from minipeft.lm.gpt import GPT, GPTConfig
from minipeft.lm.ledger import Ledger, memory_ledger


def model(kind="llama", tied=True, layers=2, **fields):
    return GPT(GPTConfig(vocab_size=101, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=4 if kind == "gpt2" else 2, max_position_embeddings=32, attention_bias=True,
                         mlp_bias=kind != "qwen3", model_type=kind, tie_word_embeddings=tied, **fields))


def only(part):
    def freeze(m):
        for name, p in m.named_parameters():
            p.requires_grad_(part in name)
        return m
    return freeze


def lora(targets, dropout=0.0):
    return lambda m: get_peft_model(m, LoraConfig(r=5, target_modules=targets, lora_dropout=dropout)).train()


WAYS = {"full": lambda m: m, "biases": only("bias"), "norms": only("norm"), "last layer": only("layers.1."), "head": only("lm_head"),
        "q, v": lora(["q_proj", "v_proj"]), "o": lora(["o_proj"]), "down": lora(["down_proj"]), "gate": lora(["gate_proj"]),
        "all": lora("all-linear"), "dropout": lora("all-linear", 0.1)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_predicted_is_measured_to_the_byte(kind, way):
    if (kind, way) == ("gpt2", "gate"):
        return  # GPT-2 has none
    ledger = memory_ledger(WAYS[way](model(kind, tied=way != "head" and kind != "qwen3")), 3, 10, measure=True)
    assert ledger.predicted == ledger.measured


def test_measuring_changes_nothing():
    m = WAYS["full"](model())
    m(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    weights, grads = [p.clone() for p in m.parameters()], [p.grad for p in m.parameters()]
    torch.manual_seed(3)
    memory_ledger(m, 2, 8, measure=True)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(p, w) and p.grad is g for p, w, g in zip(m.parameters(), weights, grads))


def test_the_rules_of_thumb():
    full, adapted = (memory_ledger(WAYS[way](model()), 16, 30).predicted for way in ("full", "q, v"))
    trained = 2 * 5 * (24 + 24 + 24 + 12)  # r (d_in + d_out) for q and v in two layers
    assert full["gradients"] == full["weights"] and full["optimizer"] == pytest.approx(2 * full["weights"], rel=0.01)
    assert adapted["gradients"] == 4 * trained and adapted["weights"] == full["weights"] + 4 * trained
    assert full["activations"] / 2 < adapted["activations"] < full["activations"]


def test_eight_billion_parameters_without_memory():
    with torch.device("meta"):
        big = GPT(GPTConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                            num_key_value_heads=8, tie_word_embeddings=False)).to(torch.bfloat16)
    full = memory_ledger(big, 1, 2048)
    assert full.predicted["weights"] == 2 * 8_030_261_248 == full.predicted["gradients"]
    adapted = memory_ledger(get_peft_model(big, LoraConfig(r=16, target_modules=["q_proj", "v_proj"])), 1, 2048)
    assert adapted.predicted["gradients"] == 6_815_744 * 4  # PEFT keeps the adapter of a 16-bit model in 32 bits
    assert adapted.total() < 0.6 * full.total()


def test_checkpointing_keeps_one_input_a_layer_and_one_layer():
    m = model(layers=12)
    before = memory_ledger(m, 3, 10).predicted["activations"]
    one = memory_ledger(model(layers=2), 3, 10).predicted["activations"] - memory_ledger(model(layers=1), 3, 10).predicted["activations"]
    m.gradient_checkpointing_enable()
    ledger = memory_ledger(m, 3, 10, measure=True)
    assert ledger.predicted["activations"] == before - 11 * one + 12 * 3 * 10 * 24 * 4
    assert ledger.measured["activations"] is None


def test_other_models_and_optimizers_are_measured_only():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                                                    num_attention_heads=2, num_key_value_heads=2))
    ledger = memory_ledger(theirs, 2, 8, optimizer=torch.optim.Adagrad, measure=True)
    assert ledger.predicted["activations"] is ledger.predicted["optimizer"] is None
    assert ledger.measured["activations"] > 0 and ledger.measured["gradients"] <= ledger.measured["optimizer"]


def test_the_table():
    text = repr(Ledger({"weights": 5_430_000, "activations": None}, {"weights": 12, "activations": 1200}, 16, 64))
    assert text.splitlines() == ["16 x 64 tokens             predicted    measured", "weights                      5.43 MB        12 B",
                                 "activations                        -     1.20 kB", "total                        5.43 MB     1.21 kB"]


def test_nothing_trained():
    assert memory_ledger(model().requires_grad_(False), 2, 8).total() == memory_ledger(model(), 2, 8).predicted["weights"]
