"""IA3 against Hugging Face PEFT, where the table of methods does not reach."""

import copy

import peft
import pytest
import torch
import transformers
from bases import BASES, close, differ, run, shake
from safetensors.torch import load_file

import minipeft
from minipeft import IA3Config, PeftModel, TargetError, get_peft_model
from minipeft.methods.ia3 import IA3


class TestScaling:
    def test_the_count_is_the_papers(self):
        """A decoder-only model: L (d_k + d_v + d_ff)"""
        model = get_peft_model(BASES["hf_llama"].make(), IA3Config())
        assert model.get_nb_trainable_parameters()[0] == 2 * (8 + 8 + 24)

    def test_unmerging_is_exact_even_where_a_channel_was_silenced(self):
        """PEFT divides by l + 1e-8: what was multiplied by zero does not come back."""
        base = BASES["llama"]
        model = get_peft_model(base.make(), IA3Config())
        for part in model._adapters_by_path("default").values():
            part.ia3_l.data[0] = 0.0
        model.merge_adapter()
        differ(run(model), run(base.make()))
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(run(model), run(base.make()))

    def test_two_at_once_multiply(self):
        base = BASES["llama"]
        model = shake(get_peft_model(base.make(), IA3Config(), "a"), "a")
        model.add_adapter("b", IA3Config())
        shake(model, "b", seed=8)
        model.set_adapter(["a", "b"])
        product = get_peft_model(base.make(), IA3Config())
        for path, part in product._adapters_by_path("default").items():
            part.ia3_l.data = (
                model._adapters_by_path("a")[path].ia3_l
                * model._adapters_by_path("b")[path].ia3_l
            )
        close(run(model), run(product))
        together = run(model)
        close(run(model.merge_and_unload()), together)

    @pytest.mark.parametrize(
        "shape, bias", [((6, 1), True), ((6, 1), False), ((1, 8), True)]
    )
    def test_merging_folds_weight_and_bias(self, shape, bias):
        torch.manual_seed(0)
        layer, x, part = (
            torch.nn.Linear(8, 6, bias=bias),
            torch.randn(3, 8),
            IA3(shape, ones=False),
        )
        expected = part(layer, x).detach()
        slot = minipeft.Slot(layer, minipeft.slot.ActiveAdapters())
        slot.adapters["a"] = part
        slot.merge(["a"])
        close(slot(x).detach(), expected)


class TestTargets:
    @pytest.mark.parametrize("name", ["llama", "hf_llama", "hf_mistral", "hf_gpt2"])
    def test_the_usual_targets_are_those_of_peft(self, name, tmp_path):
        base = BASES[name]
        ours = shake(get_peft_model(base.make(), IA3Config()))
        theirs = peft.get_peft_model(
            base.make(),
            peft.IA3Config(
                **(
                    {}
                    if name != "llama"
                    else dict(
                        target_modules=["k_proj", "v_proj", "down_proj"],
                        feedforward_modules=["down_proj"],
                    )
                )
            ),
        )
        assert (
            ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        )
        ours.save_pretrained(tmp_path)
        close(
            run(peft.PeftModel.from_pretrained(base.make(), str(tmp_path))), run(ours)
        )

    @pytest.mark.parametrize(
        "fields",
        [
            dict(target_modules="all-linear", feedforward_modules=["down_proj"]),
            dict(
                target_modules=r".*\.(q_proj|up_proj)",
                feedforward_modules=r".*\.up_proj",
            ),
            dict(
                target_modules=["k_proj", "mlp.down_proj"],
                feedforward_modules=["mlp.down_proj"],
                exclude_modules=r".*\.0\..*",
            ),
            dict(target_modules=["q_proj", "o_proj"], feedforward_modules=[]),
            dict(target_modules=["q_proj", "down_proj"]),
        ],
    )
    def test_fields_do_what_they_do_in_peft(self, fields, tmp_path):
        base, models = BASES["hf_llama"], []
        for package in (minipeft, peft):
            torch.manual_seed(0)
            models.append(
                package.get_peft_model(
                    base.make(), package.IA3Config(init_ia3_weights=False, **fields)
                ).eval()
            )
        ours, theirs = models
        assert (
            ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        )
        close(run(ours), run(theirs))
        differ(run(ours), run(base.make()))
        theirs.save_pretrained(str(tmp_path))
        close(run(PeftModel.from_pretrained(base.make(), tmp_path)), run(theirs))

    @pytest.mark.parametrize(
        "fields, message",
        [
            (
                dict(target_modules=["k_proj"], feedforward_modules=["down_proj"]),
                (
                    "feedforward_modules, among the targets, finds no module for"
                    " 'down_proj'.*k_proj"
                ),
            ),
            (
                dict(
                    target_modules=["q_proj", "down_proj"],
                    feedforward_modules=["down_proi"],
                ),
                "'down_proi'.*: down_proj",
            ),
            (
                dict(target_modules=["q_proj"], feedforward_modules=r".*fc"),
                "among the targets",
            ),
            (
                dict(target_modules=["embed_tokens"], feedforward_modules=[]),
                "not embeddings",
            ),
            (
                dict(target_modules=["mlp"], feedforward_modules=[]),
                "MLP is not a linear layer",
            ),
        ],
    )
    def test_wrong_targets(self, fields, message):
        with pytest.raises(TargetError, match=message):
            get_peft_model(BASES["llama"].make(), IA3Config(**fields))

    def test_a_model_without_the_usual_names(self):
        with pytest.raises(TargetError, match="say feedforward_modules"):
            get_peft_model(BASES["mlp"].make(), IA3Config(target_modules=["up"]))
        model = get_peft_model(
            BASES["mlp"].make(),
            IA3Config(target_modules=["up"], feedforward_modules=[]),
        )
        assert torch.equal(run(model), run(BASES["mlp"].make()))


def tiny(kind, **fields):
    """A small random model of the transformers library."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=2, vocab_size=40)
    config = transformers.AutoConfig.for_model(kind, **sizes, **fields)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


class TestFeedForwardByDefault:
    """PEFT's default names may be of no target that is left."""

    @pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
    @pytest.mark.parametrize(
        "fields",
        [
            dict(exclude_modules=["down_proj"]),
            dict(modules_to_save=["down_proj"]),
            dict(exclude_modules=r".*mlp.*"),
        ],
        ids=str,
    )
    def test_none_is_left(self, kind, fields, tmp_path):
        theirs = peft.get_peft_model(tiny(kind), peft.IA3Config(**fields))
        theirs.save_pretrained(tmp_path)
        ours = get_peft_model(tiny(kind), IA3Config(**fields))
        assert ours.peft_config["default"].feedforward_modules == []
        found = minipeft.get_peft_model_state_dict(ours)
        assert found.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
        PeftModel.from_pretrained(tiny(kind), tmp_path)
        named = IA3Config(feedforward_modules=["down_proj"], **fields)
        with pytest.raises(TargetError, match="among the targets"):
            get_peft_model(tiny(kind), named)

    @pytest.mark.parametrize("experts", [2, 3, 4])
    def test_pefts_folder_for_a_mixture_of_experts(self, experts, tmp_path):
        base = tiny("mixtral", num_local_experts=experts)
        fields = dict(task_type="CAUSAL_LM", init_ia3_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.IA3Config(**fields))
        theirs.save_pretrained(tmp_path)
        ours = PeftModel.from_pretrained(base, tmp_path)
        ids = torch.arange(12).view(2, 6)
        close(ours(ids).logits, theirs.eval()(ids).logits)
