"""Different methods side by side: on one layer, in one batch, merged together. And how
many numbers each trains."""

import pytest
import torch
from bases import (
    BASES,
    METHODS,
    WIDTH,
    close,
    differ,
    inputs,
    loss_of,
    rounding,
    run,
    shake,
)
from tolerance import tolerance

import minipeft
from minipeft import NotMergeableError, Slot, get_peft_model

MIX = ["dora", "adalora", "loha", "lokr", "vera", "denselora_linear", "lora"]


def mixed(base, names=MIX):
    """One model with an adapter of each method, all on the same layers."""
    model = None
    for seed, name in enumerate(names):
        config = METHODS[name].ours(base)
        if model is None:
            model = get_peft_model(base.make(), config, name)
        else:
            model.add_adapter(name, config)
        shake(model, name, seed=seed, step=METHODS[name].step / 2)
    return model


class TestMethodsTogether:
    @pytest.mark.parametrize("name", ["llama", "hf_gpt2"])
    def test_a_batch_of_different_methods(self, name):
        base, names = BASES[name], [*MIX, "denselora"]
        torch.manual_seed(0)
        model = mixed(base, names)
        asked = [*names, "__base__"]
        ids = torch.randint(
            3, 40, (len(asked), 6), generator=torch.Generator().manual_seed(1)
        )
        with torch.no_grad():
            together = model(input_ids=ids, adapter_names=asked).logits
            for row, wanted in enumerate(asked):
                if wanted == "__base__":
                    expected = base.make()(input_ids=ids).logits
                else:
                    model.set_adapter(wanted)
                    expected = model(input_ids=ids).logits
                    differ(expected, base.make()(input_ids=ids).logits)
                close(together[row], expected[row])

    @pytest.mark.parametrize("name", ["llama", "hf_gpt2"])
    @pytest.mark.parametrize("order", [MIX, MIX[::-1]], ids=["forth", "back"])
    def test_all_at_once_on_every_layer_merged_or_not(self, name, order):
        base = BASES[name]
        model = mixed(base)
        model.set_adapter(order)
        apart = run(model)
        loss_of(model).backward()
        for path, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (
                ".adapters." in path or path.startswith("shared.")
            ), path
        model.merge_adapter()
        close(run(model), apart, rounding(2))
        model.unmerge_adapter()
        assert torch.equal(run(model), apart)
        close(run(model.merge_and_unload()), apart, rounding(2))

    def test_the_sum_of_additive_methods_is_the_sum_of_their_changes(self):
        base, names = (
            BASES["llama"],
            ["adalora", "loha", "lokr", "vera", "denselora_linear", "lora"],
        )
        model = mixed(base, names)
        model.set_adapter(names)
        slot = next(m for m in model.modules() if isinstance(m, Slot) and m.adapters)
        with torch.no_grad():
            deltas = [
                slot.adapters[name].delta(minipeft.Base(slot, name)) for name in names
            ]
            x = torch.randn(5, slot.base_layer.in_features)
            close(
                slot(x),
                torch.nn.functional.linear(
                    x, slot.base_layer.weight + sum(deltas), slot.base_layer.bias
                ),
                # the layer's sum, and two products of each adapter
                tolerance(torch.float32, terms=4 * WIDTH, steps=1 + 2 * len(names)),
            )

    def test_one_that_cannot_merge_stops_all(self):
        base = BASES["llama"]
        model = mixed(base, ["lora", "dora", "denselora"])
        model.set_adapter(["lora", "dora", "denselora"])
        apart, weights = run(model), {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(NotMergeableError, match="'denselora' cannot be merged"):
            model.merge_adapter()
        assert model.merged_adapters == [] and all(
            torch.equal(p, weights[n]) for n, p in model.named_parameters()
        )
        model.set_adapter(["lora", "dora"])
        others = run(model)
        model.set_adapter(["lora", "dora", "denselora"])
        assert torch.equal(run(model), apart)
        model.merge_adapter(["lora", "dora"])  # these can: then layers have only them
        close(run(model), others, rounding(2))
        differ(others, apart)


# What Hugging Face's committed benchmark counts on Llama-3.2-3B, and the closed
# formulas (d_in, d_out) -> numbers
Q, V = (3072, 3072), (3072, 1024)
COUNTS = {
    "lora": ("LoraConfig", dict(r=32), 9_175_040, lambda i, o: 32 * (i + o)),
    "dora": ("DoraConfig", dict(r=32), 9_289_728, lambda i, o: 32 * (i + o) + o),
    "vera": ("VeraConfig", dict(r=256), 129_024, lambda i, o: 256 + o),
    "loha": ("LoHaConfig", dict(r=32), 18_350_080, lambda i, o: 2 * 32 * (i + o)),
    "lokr": (
        "LoKrConfig",
        dict(r=32, decompose_factor=4),
        2_294_656,
        lambda i, o: 16 + 32 * (i + o) // 4,
    ),
    "adalora": (
        "AdaLoraConfig",
        dict(init_r=64, target_r=32, total_step=5000),
        18_353_664,
        lambda i, o: 64 * (i + o + 1),
    ),
}


@pytest.fixture(scope="module")
def llama_3b():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=3072,
                intermediate_size=8192,
                num_hidden_layers=28,
                num_attention_heads=24,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=True,
            )
        )


class TestCountsAndPrecision:
    @pytest.mark.parametrize("name", COUNTS)
    def test_the_counts_on_llama_3_2_3b(self, llama_3b, name):
        config, fields, committed, formula = COUNTS[name]
        model = get_peft_model(
            llama_3b,
            getattr(minipeft, config)(target_modules=["q_proj", "v_proj"], **fields),
        )
        assert (
            model.get_nb_trainable_parameters()[0]
            == committed
            == 28 * (formula(*Q) + formula(*V))
        )
        model.unload()

    @pytest.mark.parametrize("name", MIX + ["denselora"])
    def test_no_method_returns_another_precision(self, name):
        base = BASES["llama"]
        model = get_peft_model(base.make(), METHODS[name].ours(base))
        shake(model, step=0.1)
        exact = run(model)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**inputs()).logits
        assert exact.dtype == torch.float32 and rough.dtype in (
            torch.bfloat16,
            torch.float32,
        )
        # inputs, weights and results are rounded
        close(rough.detach(), exact, rounding(3, torch.bfloat16))
        model.double()
        assert model(**inputs()).logits.dtype == torch.float64
        close(model(**inputs()).logits.detach(), exact)
