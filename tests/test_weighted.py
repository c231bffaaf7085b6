"""Weighted combinations against their definitions and against PEFT at the same seed."""

import warnings

import peft
import pytest
import torch
from bases import BASES, WIDTH, close, differ, run
from safetensors.torch import load_file
from tolerance import tolerance

import minipeft
from minipeft import LoraConfig, get_peft_model, weighted


def several(base, package=minipeft, config=LoraConfig, ranks=(4, 4), **fields):
    """A model with the adapters a, b ... of these ranks, random and the same for both
    packages."""
    torch.manual_seed(0)
    model = None
    for name, r in zip("abc", ranks):
        adapter = config(
            r=r,
            lora_alpha=2 * r + (name == "b"),
            init_lora_weights=False,
            target_modules=list(base.targets),
            **fields,
        )
        if model is None:
            model = package.get_peft_model(base.make(), adapter, adapter_name=name)
        else:
            model.add_adapter(name, adapter)
    return model.eval()


def deltas(model, name):
    return {
        path: adapter.delta(None).detach()
        for path, adapter in model._adapters_by_path(name).items()
    }


class TestLoRA:
    @pytest.mark.parametrize("way", weighted.COMBINATION_TYPES)
    @pytest.mark.parametrize("name", ["hf_llama", "hf_gpt2", "mlp"])
    def test_every_way_is_that_of_peft(self, way, name, tmp_path):
        if name == "hf_gpt2" and way in ("dare_linear_svd", "dare_ties_svd"):
            pytest.skip(
                "for Conv1D PEFT draws which entries stay for the transposed matrix:"
                " others, by the same law"
            )
        states = []
        for package, config in ((minipeft, LoraConfig), (peft, peft.LoraConfig)):
            model = several(BASES[name], package, config)
            more = (
                {}
                if way in ("svd", "cat", "linear")
                else {"density": 0.6, "majority_sign_method": "frequency"}
            )
            torch.manual_seed(7)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                book = model if package is minipeft else model.base_model
                book.add_weighted_adapter(["a", "b"], [0.7, -0.4], "ab", way, **more)
                model.set_adapter("ab")
            model.save_pretrained(
                str(tmp_path / package.__name__), selected_adapters=["ab"]
            )
            states.append(
                (
                    load_file(
                        tmp_path / package.__name__ / "ab" / "adapter_model.safetensors"
                    ),
                    run(model),
                )
            )
        (ours, our_logits), (theirs, their_logits) = states
        assert ours.keys() == theirs.keys()
        for key in ours:
            close(ours[key], theirs[key])
        close(our_logits, their_logits)
        differ(our_logits, run(BASES[name].make()))

    @pytest.mark.parametrize("name", ["llama", "hf_gpt2", "mlp"])
    def test_cat_is_the_exact_sum_of_changes(self, name):
        model = several(BASES[name], ranks=(2, 4, 3))
        model.add_weighted_adapter(["a", "b", "c"], [0.7, -1.5, 0.3], "sum", "cat")
        for path, delta in deltas(model, "sum").items():
            close(
                delta,
                0.7 * deltas(model, "a")[path]
                - 1.5 * deltas(model, "b")[path]
                + 0.3 * deltas(model, "c")[path],
            )
        assert model.peft_config["sum"].r == 9

    @pytest.mark.parametrize("weight", [0.5, 1.0, -2.0])
    @pytest.mark.parametrize("way", ["linear", "svd"])
    def test_one_adapter_alone_is_scaled(self, weight, way):
        model = several(BASES["llama"], use_rslora=True)
        model.add_weighted_adapter(["a"], [weight], "scaled", way)
        for path, delta in deltas(model, "scaled").items():
            close(delta, weight * deltas(model, "a")[path])

    def test_svd_of_enough_rank_is_exact_and_of_less_the_nearest(self):
        model = several(BASES["llama"])
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "whole", svd_rank=8)
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "nearest", svd_rank=4)
        for path, delta in deltas(model, "whole").items():
            wanted = deltas(model, "a")[path] + deltas(model, "b")[path]
            close(delta, wanted)
            left = torch.linalg.matrix_norm(deltas(model, "nearest")[path] - wanted)
            # Eckart and Young
            values = torch.linalg.svdvals(wanted)
            rounded = tolerance(torch.float32, values[0], terms=4 * WIDTH, steps=2)
            close(left, values[4:].square().sum().sqrt(), rounded)

    def test_linear_is_not_the_sum_of_changes(self):
        model = several(BASES["llama"])
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "linear", "linear")
        for path, delta in deltas(model, "linear").items():
            differ(delta, deltas(model, "a")[path] + deltas(model, "b")[path], 0.1)

    def test_adapters_that_share_only_some_layers(self):
        base = BASES["llama"]
        model = get_peft_model(
            base.make(),
            LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
            "a",
        )
        model.add_adapter(
            "b", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
        )
        model.add_weighted_adapter(["a", "b"], [1.0, 2.0], "sum", "cat")
        for path, delta in deltas(model, "sum").items():
            close(delta, deltas(model, "a").get(path, 0) + 2 * deltas(model, "b")[path])

    @pytest.mark.parametrize(
        "way", ["linear", "ties", "dare_linear", "magnitude_prune"]
    )
    def test_unequal_ranks(self, way):
        model = several(BASES["llama"], ranks=(2, 4))
        names, tensors = list(model.peft_config), list(model.state_dict())
        with pytest.raises(minipeft.ConfigError, match=r"one rank.*\[2, 4\]"):
            model.add_weighted_adapter(
                ["a", "b"], [1, 1], "c", way, density=None if way == "linear" else 0.5
            )
        assert names == list(model.peft_config) and tensors == list(model.state_dict())
        model.add_weighted_adapter(["a", "b"], [1, 1], "svd", "svd")
        model.add_weighted_adapter(["a", "b"], [1, 1], "cat", "cat")
        assert model.peft_config["svd"].r == 4 and model.peft_config["cat"].r == 6

    def test_a_combination_waits_and_is_saved_like_any_other(self, tmp_path):
        base = BASES["hf_llama"]
        model = several(base)
        before = run(model)
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "ab")
        assert torch.equal(run(model), before) and model.active_adapters == ["a"]
        assert not any(
            p.requires_grad
            for p in model._adapters_by_path("ab")[
                "model.layers.0.self_attn.q_proj"
            ].parameters()
        )
        model.set_adapter("ab")
        model.save_pretrained(tmp_path, selected_adapters=["ab"])
        close(
            run(peft.PeftModel.from_pretrained(base.make(), str(tmp_path / "ab"))),
            run(model),
        )


def ia3s(package, *fields, weights=(1.5, -0.5)):
    """A model with the IA3 adapters a, b ..., whose vectors are the same for both
    packages, and their weighted sum."""
    base = BASES["hf_llama"]
    torch.manual_seed(0)
    config = minipeft.IA3Config if package is minipeft else peft.IA3Config
    model = None
    for name, options in zip("abc", fields):
        adapter = config(init_ia3_weights=False, **options)
        if model is None:
            model = package.get_peft_model(base.make(), adapter, adapter_name=name)
        else:
            model.add_adapter(name, adapter)
    names = list("abc")[: len(fields)]
    book = model if package is minipeft else model.base_model
    book.add_weighted_adapter(names, list(weights)[: len(names)], "sum")
    model.set_adapter("sum")
    return model.eval()


KEYS = dict(target_modules=["k_proj"], feedforward_modules=[])
MIDDLE = dict(target_modules=["down_proj"], feedforward_modules=["down_proj"])
BOTH = dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])


class TestIA3:
    @pytest.mark.parametrize(
        "fields", [(BOTH, BOTH), (KEYS, MIDDLE), (MIDDLE, BOTH), (BOTH,)], ids=str
    )
    def test_vectors_are_those_of_peft(self, fields, tmp_path):
        ours, theirs = (ia3s(package, *fields) for package in (minipeft, peft))
        close(run(ours), run(theirs))
        differ(run(ours), run(BASES["hf_llama"].make()))
        ours.save_pretrained(tmp_path, selected_adapters=["sum"])
        for package in (minipeft, peft):
            again = package.PeftModel.from_pretrained(
                BASES["hf_llama"].make(), str(tmp_path / "sum")
            )
            close(run(again), run(ours))

    def test_input_and_output_do_not_mix(self):
        output = dict(target_modules=["down_proj"], feedforward_modules=[])
        with pytest.raises(minipeft.ConfigError, match="scales its input, another"):
            ia3s(minipeft, MIDDLE, output)

    def test_ia3_and_lora_do_not_mix(self):
        model = several(BASES["llama"], ranks=(2,))
        model.add_adapter("b", minipeft.IA3Config())
        with pytest.raises(minipeft.ConfigError, match="only plain LoRAs.*only IA3s"):
            model.add_weighted_adapter(["a", "b"], [1, 1], "c")
        assert list(model.peft_config) == ["a", "b"]


class TestModulesToSave:
    """Copies of whole modules beside the adapters."""

    @pytest.mark.parametrize("way", ["cat", "svd", "linear"])
    def test_one_copy_is_kept(self, way, tmp_path):
        base = BASES["hf_llama"]
        states = []
        for package, config in ((minipeft, LoraConfig), (peft, peft.LoraConfig)):
            model = several(base, package, config, modules_to_save=None)
            names = ["a", "b"]
            model.add_adapter("head", config(r=4, modules_to_save=["lm_head"]))
            book = model if package is minipeft else model.base_model
            book.add_weighted_adapter(["head", *names], [1.0, 0.5, 0.5], "all", way)
            model.set_adapter("all")
            states.append(run(model))
        close(*states)  # nothing is trained yet: PEFT's copy is the base's

    def test_a_trained_copy_is_kept(self, tmp_path):
        """PEFT would start it from the base's again."""
        model = several(BASES["llama"])
        model.add_adapter("head", LoraConfig(r=4, modules_to_save=["lm_head"]))
        copy = model._adapters_by_path("head")["lm_head"]
        torch.nn.init.normal_(copy.module.weight)
        model.add_weighted_adapter(["a", "head"], [1.0, 1.0], "both", "cat")
        kept = model._adapters_by_path("both")["lm_head"]
        assert torch.equal(kept.module.weight, copy.module.weight)
        assert kept.module.weight is not copy.module.weight

    def test_two_copies_are_refused_as_in_peft(self):
        for package, config in ((minipeft, LoraConfig), (peft, peft.LoraConfig)):
            model = several(
                BASES["hf_llama"], package, config, modules_to_save=["lm_head"]
            )
            book = model if package is minipeft else model.base_model
            with pytest.raises(ValueError, match="modules_to_save"):
                book.add_weighted_adapter(["a", "b"], [1, 1], "c", "cat")
            assert "c" not in model.peft_config


class TestRanksOfLayers:
    @pytest.mark.parametrize("way", weighted.SEPARATE)
    @pytest.mark.parametrize(
        "pattern",
        [{"q_proj": 2}, {"layers.1.self_attn.v_proj": 3}, {r"layers\.0\..*_proj": 1}],
    )
    def test_unequal_ranks_in_one_layer_are_refused(self, way, pattern):
        model = several(BASES["llama"], ranks=(4,))
        model.add_adapter(
            "b",
            LoraConfig(r=4, rank_pattern=pattern, target_modules=["q_proj", "v_proj"]),
        )
        density = None if way == "linear" else 0.5
        before = list(model.state_dict())
        with pytest.raises(minipeft.ConfigError, match=r"one rank.*at model\.layers"):
            model.add_weighted_adapter(["a", "b"], [1, 1], "c", way, density=density)
        assert list(model.state_dict()) == before
        for any_rank in ("cat", "svd"):
            model.add_weighted_adapter(["a", "b"], [1, 1], any_rank, any_rank)

    def test_equal_ranks_in_each_layer_are_combined(self):
        pattern = dict(rank_pattern={"q_proj": 2})
        models = [
            several(BASES["hf_llama"], package, config, **pattern)
            for package, config in ((minipeft, LoraConfig), (peft, peft.LoraConfig))
        ]
        models[0].add_weighted_adapter(["a", "b"], [0.7, 0.4], "c", "linear")
        models[1].base_model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "c", "linear")
        for model in models:
            model.set_adapter("c")
        close(*map(run, models))


class TestRequests:
    @pytest.mark.parametrize("way", ["linear", "svd", "cat"])
    def test_a_density_that_nothing_uses_is_said(self, way):
        with pytest.warns(
            UserWarning, match=f"'{way}' keeps every entry: density = 0.5 is not used"
        ):
            several(BASES["llama"]).add_weighted_adapter(
                ["a", "b"], [1, 1], "c", way, density=0.5
            )

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (dict(adapters=["a", "d"]), "'d'"),
            (dict(weights=[1.0]), "one weight for each"),
            (dict(adapter_name="a"), "already"),
            (dict(combination_type="tie"), "did you mean 'ties'"),
            (dict(combination_type="ties"), "density"),
            (dict(combination_type="ties", density=-0.1), "density"),
            (dict(adapters=[], weights=[]), "one weight for each"),
        ],
    )
    def test_wrong_requests(self, arguments, message):
        model = several(BASES["llama"])
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(
                **{
                    **dict(adapters=["a", "b"], weights=[1.0, 1.0], adapter_name="new"),
                    **arguments,
                }
            )
        assert list(model.peft_config) == ["a", "b"]

    def test_a_rank_that_nothing_uses_is_said(self):
        with pytest.warns(UserWarning, match="svd_rank = 3 is not used"):
            several(BASES["llama"]).add_weighted_adapter(
                ["a", "b"], [1, 1], "c", "cat", svd_rank=3
            )

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (dict(combination_type="cat"), "combination_type = 'cat'"),
            (dict(combination_type="tie", density=0.5), "combination_type = 'tie'"),
            (dict(density=0.5), "density = 0.5 has no effect"),
            (dict(combination_type="linear", svd_rank=2), "svd_rank = 2 has no effect"),
        ],
    )
    def test_ia3_has_one_way(self, arguments, message):
        model = minipeft.get_peft_model(
            BASES["llama"].make(), minipeft.IA3Config(), "a"
        )
        model.add_adapter("b", minipeft.IA3Config())
        with pytest.raises(minipeft.ConfigError, match=message):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", **arguments)
        assert list(model.peft_config) == ["a", "b"]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (dict(weights=[float("nan"), 1]), "weight = nan"),
            (dict(weights=["1", 1]), "weight = '1'"),
            (dict(svd_rank=0), "svd_rank = 0"),
            (dict(svd_rank=2.5), "svd_rank = 2.5"),
            (dict(svd_clamp=2.0), "svd_clamp = 2.0"),
            (dict(svd_clamp=float("nan")), "svd_clamp = nan"),
            (dict(svd_driver="gesv"), "svd_driver 'gesv' .did you mean 'gesvd'"),
            (dict(weights=1.0), "weights = 1.0: expected a list"),
            (
                dict(combination_type="ties", density=0.5, majority_sign_method="most"),
                "majority_sign_method",
            ),
        ],
    )
    def test_wrong_numbers(self, arguments, message):
        model = several(BASES["llama"])
        given = dict(adapters=["a", "b"], weights=[1.0, 1.0], adapter_name="new")
        with pytest.raises(minipeft.ConfigError, match=message):
            model.add_weighted_adapter(**given | arguments)
        assert list(model.peft_config) == ["a", "b"]
