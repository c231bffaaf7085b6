"""What every adapter must do, whatever its method and its base: Hugging Face PEFT's
common tests, tightened.

Each equality is paired with a difference: an adapter that does nothing would pass all
equalities.
"""

import copy
import warnings

import peft
import pytest
import torch
from bases import (
    APART,
    BASES,
    CASES,
    METHODS,
    adapted,
    close,
    differ,
    inputs,
    logits,
    loss_of,
    rounding,
    run,
    shake,
)
from safetensors.torch import load_file, load_model, save_model

import minipeft
from minipeft import PeftModel, Slot, get_peft_model

crossed = pytest.mark.parametrize(
    "method, base", CASES, ids=[f"{m}-{b}" for m, b in CASES]
)


def only(condition):
    """The cases for which the condition on (method, base) holds."""
    cases = [(m, b) for m, b in CASES if condition(m, b)]
    return pytest.mark.parametrize(
        "method, base", cases, ids=[f"{m}-{b}" for m, b in cases]
    )


# its prompts need those
with_oracle = only(
    lambda m, b: m.peft and b.dense and (m.where or b.name.startswith("hf"))
)
merging = only(lambda m, b: m.mergeable and b.dense)
layer_methods = only(lambda m, b: m.where)


def theirs(method, base, **more):
    """PEFT's model with the same adapter, shaken."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base.make(), method.theirs(base, **more)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += method.step * torch.randn(
                    parameter.shape, generator=generator
                )
    return model


def file_of(model, folder):
    model.save_pretrained(str(folder))
    return load_file(folder / "adapter_model.safetensors")


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


exact = dict(dtype=torch.float64)


def two(method, base, dtype=torch.float32):
    """Adapters a and b, and the outputs with each."""
    model = adapted(method, base, "a", dtype)
    with_a = run(model)
    torch.manual_seed(5)
    model.add_adapter("b", method.ours(base))
    assert torch.equal(run(model), with_a)  # a new adapter waits to be asked
    shake(model, "b", seed=6, step=method.step)
    model.set_adapter("b")
    return model, with_a, run(model)


# rounding in 64 bits, twenty times enlarged
EXACT = 20 * rounding(dtype=torch.float64)


class TestMerging:
    """Merging is a law of whole models in 64 bits. In 32 bits it is one of single
    layers: a whole model amplifies the rounding of its first layers, the more the
    larger the adapter (to twenty times the rounding of one sum), merged or not."""

    @merging
    def test_merging_and_unmerging(self, method, base):
        model = adapted(method, base, **exact)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        apart = run(model)
        model.merge_adapter()
        close(run(model), apart, EXACT)
        assert model.merged_adapters == ["default"]
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        close(run(model), apart, EXACT)
        with model.disable_adapter():
            assert torch.equal(run(model), run(base.make().double()))
        close(run(model), apart, EXACT)
        model.unmerge_adapter()
        same_tensors(model.state_dict(), state)
        assert torch.equal(run(model), apart)

    @only(lambda m, b: m.mergeable and b.dense and m.where)
    def test_in_32_bits_layer_by_layer(self, method, base):
        model = adapted(method, base)
        slots = [
            slot for slot in model.modules() if isinstance(slot, Slot) and slot.adapters
        ]
        generator = torch.Generator().manual_seed(4)
        given = [
            torch.randn(
                7,
                (
                    slot.weight.shape[-1]
                    if method.config == "LNTuningConfig"
                    else minipeft.weights.features(slot.base_layer)[0]
                ),
                generator=generator,
            )
            for slot in slots
        ]
        with torch.no_grad():
            apart = [slot(x) for slot, x in zip(slots, given)]
            for slot, x, y in zip(slots, given, apart):
                differ(y, slot.base_layer(x))
            model.merge_adapter()
            for slot, x, y in zip(slots, given, apart):
                close(slot(x), y)

    @only(lambda m, b: not m.mergeable)
    def test_what_cannot_be_merged_says_so(self, method, base):
        model = adapted(method, base)
        before = run(model)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(minipeft.NotMergeableError, match="default"):
                merge()
        assert torch.equal(run(model), before)

    @merging
    def test_safe_merge_refuses_nan_and_leaves_the_base(self, method, base):
        model = adapted(method, base)
        with torch.no_grad():
            next(p for p in reversed(list(model.parameters())) if p.requires_grad).view(
                -1
            )[0] = torch.nan
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(minipeft.NotMergeableError, match="not finite"):
                merge(safe_merge=True)
            assert model.merged_adapters == []
        same_tensors(model.unload().state_dict(), base.make().state_dict())

    @merging
    @pytest.mark.parametrize("safe", [False, True])
    def test_merge_and_unload_gives_a_plain_model(self, method, base, safe, tmp_path):
        model = adapted(method, base, **exact)
        apart = run(model)
        plain = model.merge_and_unload(safe_merge=safe)
        close(run(plain), apart, EXACT)
        assert type(plain) is type(base.make())
        assert [(n, type(m)) for n, m in plain.named_modules()] == [
            (n, type(m)) for n, m in base.make().named_modules()
        ]
        assert all(tensor.is_contiguous() for tensor in plain.state_dict().values())
        save_model(plain, tmp_path / "model.safetensors")
        again = base.make().double()
        load_model(again, tmp_path / "model.safetensors")
        assert torch.equal(run(again), run(plain))

    @crossed
    def test_unload_gives_back_the_very_base(self, method, base):
        plain = base.make()
        before, modules = dict(plain.named_parameters()), dict(plain.named_modules())
        hooks = sum(len(m._forward_hooks) for m in modules.values())
        again = shake(
            get_peft_model(plain, method.ours(base)), step=method.step
        ).unload()
        assert again is plain
        assert {k: id(v) for k, v in again.named_parameters()} == {
            k: id(v) for k, v in before.items()
        }
        assert {k: id(v) for k, v in again.named_modules()} == {
            k: id(v) for k, v in modules.items()
        }
        assert sum(len(m._forward_hooks) for m in again.modules()) == hooks
        same_tensors(again.state_dict(), base.make().state_dict())

    @merging
    def test_one_of_two(self, method, base):
        model, with_a, with_b = two(method, base, **exact)
        model.set_adapter("a")
        close(run(model.merge_and_unload(adapter_names=["b"])), with_b, EXACT)

    @only(lambda m, b: m.mergeable and m.additive and b.dense)
    def test_both_are_the_sum_of_their_changes(self, method, base):
        weights = []
        for names in (["a"], ["b"], ["a", "b"]):
            model, *_ = two(method, base, **exact)
            model.set_adapter(names)
            together = run(model)
            plain = model.merge_and_unload()
            close(run(plain), together, EXACT)
            weights.append(plain.state_dict())
        start = base.make().double().state_dict()
        for key in start:
            close(
                weights[2][key], weights[0][key] + weights[1][key] - start[key], EXACT
            )


class TestMixedBatches:
    @crossed
    def test_each_row_has_its_adapter(self, method, base):
        model, with_a, with_b = two(method, base)
        model.set_adapter("a")
        mixed = run(model, adapter_names=["b", "__base__", "a"])
        length = mixed.shape[1]  # prompts may have added positions before
        for row, expected in enumerate((with_b, run(base.make()), with_a)):
            close(mixed[row], expected[row, -length:])
        assert torch.equal(run(model), with_a)  # and the next batch is as ever

    @crossed
    def test_each_row_trains_its_adapter(self, method, base):
        model, *_ = two(method, base, **exact if base.dense else {})
        model.set_adapter(["a", "b"])
        gradients = {}
        for names in (["a", "__base__", "b"], None):
            model.zero_grad()
            if names is None:  # the same, row by row
                for row, name in ((0, "a"), (2, "b")):
                    model.set_adapter(name)
                    rows = logits(model(input_ids=inputs()["input_ids"][row : row + 1]))
                    rows[:, -6:].square().sum().backward()
            else:
                logits(model(**inputs(), adapter_names=names))[
                    :, -6:
                ].square().sum().backward()
            gradients[names is None] = {
                n: p.grad.clone()
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            model.set_adapter(["a", "b"])
        assert gradients[False].keys() >= gradients[True].keys() != set()
        allowed = EXACT if base.dense else rounding(2)
        for name in gradients[True]:
            close(gradients[False][name], gradients[True][name], allowed)

    @crossed
    def test_unknown_names_and_wrong_lengths(self, method, base):
        model, *_ = two(method, base)
        with pytest.raises(minipeft.AdapterNameError, match="'c'"):
            model(**inputs(), adapter_names=["a", "b", "c"])
        for names in (["a", "b"], ["a"], ["a"] * 6, []):
            with pytest.raises(ValueError, match="batch of 3 rows"):
                model(**inputs(), adapter_names=names)


class TestTargets:
    @only(lambda m, b: m.where and b.layered)
    def test_some_layers_only(self, method, base, tmp_path):
        if "layers_to_transform" not in {
            f.name for f in method.ours(base).__dataclass_fields__.values()
        }:
            pytest.skip(f"{method} has no layers_to_transform")
        every = get_peft_model(
            base.make(), method.ours(base)
        ).get_nb_trainable_parameters()[0]
        model = adapted(method, base, layers_to_transform=[0])
        assert 0 < model.get_nb_trainable_parameters()[0] < every
        model.save_pretrained(tmp_path)
        assert torch.equal(
            run(PeftModel.from_pretrained(base.make(), tmp_path)), run(model)
        )

    @layer_methods
    def test_wrong_names(self, method, base):
        plain = base.make()
        before = (
            list(plain.named_modules()),
            [p.requires_grad for p in plain.parameters()],
        )
        right = list(method.where(base))
        wrong = right[0][:-1] + "z"  # q_proj -> q_proz
        for names in ([wrong], [*right, wrong]):
            with pytest.raises(
                minipeft.TargetError, match=f"{wrong}.*nearest: .*{right[0]}"
            ):
                get_peft_model(plain, method.ours(base, target_modules=names))
        assert (
            list(plain.named_modules()),
            [p.requires_grad for p in plain.parameters()],
        ) == before


class TestSaving:
    @with_oracle
    def test_an_adapter_saved_by_peft_loads_here(self, method, base, tmp_path):
        oracle = theirs(method, base)
        saved = file_of(oracle, tmp_path)
        model = PeftModel.from_pretrained(base.make(), tmp_path)
        close(run(model), run(oracle))
        differ(run(model), run(base.make()))
        ours = file_of(model, tmp_path / "ours")
        same_tensors(ours, saved)  # 6: keys and shapes, and 5: every bit

    @with_oracle
    def test_an_adapter_saved_here_loads_in_peft(self, method, base, tmp_path):
        model = adapted(method, base)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings(
                "ignore", "fan_in_fan_out|Unsupported layer type.*LayerNorm"
            )
            oracle = peft.PeftModel.from_pretrained(base.make(), str(tmp_path))
        close(run(oracle), run(model))

    @crossed
    def test_saving_and_loading_keeps_every_bit(self, method, base, tmp_path):
        model = adapted(method, base)
        model.save_pretrained(tmp_path / "a")
        again = PeftModel.from_pretrained(base.make(), tmp_path / "a")
        again.save_pretrained(tmp_path / "b")
        same_tensors(
            *(load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
        )
        assert torch.equal(run(model), run(again))

    @crossed
    def test_names_within_names_are_saved_apart(self, method, base, tmp_path):
        model, with_a, _ = two(method, base)
        model.add_adapter("ab", method.ours(base))
        shake(model, "ab", seed=7, step=method.step)
        model.set_adapter("ab")
        with_ab = run(model)
        model.save_pretrained(tmp_path, selected_adapters=["a", "ab"])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "ab"]
        for name, expected in (("a", with_a), ("ab", with_ab)):
            assert torch.equal(
                run(PeftModel.from_pretrained(base.make(), tmp_path / name)), expected
            )
        with pytest.raises(minipeft.AdapterNameError, match="'c'"):
            model.save_pretrained(tmp_path, selected_adapters=["c"])
        again = PeftModel.from_pretrained(
            base.make(), tmp_path / "a", adapter_name="first"
        )
        again.load_adapter(tmp_path / "ab", "second")
        assert torch.equal(run(again), with_a)
        again.set_adapter("second")
        assert torch.equal(run(again), with_ab)

    @layer_methods
    def test_modules_to_save(self, method, base, tmp_path):
        model = adapted(method, base, modules_to_save=[base.norm])
        loss_of(model).backward()
        trained = {n for n, p in model.named_parameters() if p.grad is not None}
        assert any(f"{base.norm}.adapters.default.module" in n for n in trained)
        assert not any("base_layer" in n for n in trained)
        model.save_pretrained(tmp_path)
        keys = load_file(tmp_path / "adapter_model.safetensors").keys()
        assert any(key.endswith(f"{base.norm}.weight") for key in keys) and not any(
            "module" in key for key in keys
        )
        again = PeftModel.from_pretrained(base.make(), tmp_path)
        assert torch.equal(run(again), run(model))
        without = adapted(method, base)
        differ(run(model), run(without))
        # each adapter has a copy of its own
        model.add_adapter("other", method.ours(base, modules_to_save=[base.norm]))
        model.set_adapter("other")
        if method.where:
            close(run(model), run(base.make()))
        with pytest.raises(minipeft.AdapterNameError, match="one at a time"):
            model.set_adapter(["default", "other"])
        if method.mergeable and base.dense:
            expected = run(again)
            plain = again.merge_and_unload()
            close(run(plain), expected)
            assert not any(isinstance(m, Slot) for m in plain.modules())
        if method.peft and base.dense:
            oracle = peft.PeftModel.from_pretrained(base.make(), str(tmp_path))
            close(run(oracle), run(PeftModel.from_pretrained(base.make(), tmp_path)))


class TestSeveralAdapters:
    @crossed
    def test_disabling(self, method, base):
        model, before = adapted(method, base), run(base.make())
        with_it = run(model)
        with model.disable_adapter():
            assert torch.equal(run(model), before)
            with model.disable_adapter():
                assert torch.equal(run(model), before)
            assert torch.equal(run(model), before)
        assert torch.equal(run(model), with_it)
        differ(with_it, before)

    @crossed
    def test_switching(self, method, base):
        model, with_a, with_b = two(method, base)
        differ(with_a, with_b)
        assert model.active_adapters == ["b"] and list(model.peft_config) == ["a", "b"]
        for name, expected in (("a", with_a), ("b", with_b), ("a", with_a)):
            model.set_adapter(name)
            assert torch.equal(run(model), expected)
            trainable = {n for n, p in model.named_parameters() if p.requires_grad}
            assert trainable and all(
                f"adapters.{name}." in n or n.startswith(f"shared.{name}.")
                for n in trainable
            )
        model.set_adapter("b", inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())

    @crossed
    def test_deleting(self, method, base):
        model, with_a, with_b = two(method, base)
        with pytest.raises(minipeft.AdapterNameError, match="'c'.*'a', 'b'"):
            model.delete_adapter("c")
        model.set_adapter("a")
        model.delete_adapter("b")  # not active
        assert torch.equal(run(model), with_a)
        assert not [n for n, _ in model.named_modules() if n.endswith(".b")] and list(
            model.peft_config
        ) == ["a"]
        model.delete_adapter("a")  # the last one
        assert model.active_adapters == []
        assert torch.equal(run(model), run(base.make()))
        assert [n for n, _ in model.get_base_model().named_modules()] == [
            n for n, _ in base.make().named_modules()
        ]
        model, with_a, with_b = two(method, base)
        with pytest.warns(UserWarning, match="'a' is active now"):
            model.delete_adapter("b")  # active
        assert torch.equal(run(model), with_a)

    @crossed
    def test_a_deep_copy_is_a_model_of_its_own(self, method, base):
        model, *_ = two(method, base)
        model.set_adapter("a")
        twin = copy.deepcopy(model)
        expected = run(model)
        assert torch.equal(run(twin), expected)
        twin.set_adapter("b")
        shake(twin, "b", seed=9, step=method.step)
        assert torch.equal(run(model), expected)
        differ(run(twin), expected)


class TestTraining:
    # PEFT trains no loaded prompts: see test_virtual.py
    @only(lambda m, b: m.peft and m.where and b.dense)
    def test_gradients_and_one_step_are_those_of_peft(self, method, base, tmp_path):
        theirs(method, base).save_pretrained(str(tmp_path))
        oracle = peft.PeftModel.from_pretrained(
            base.make(), str(tmp_path), is_trainable=True
        )
        model = PeftModel.from_pretrained(base.make(), tmp_path, is_trainable=True)
        for each in (oracle, model):
            loss_of(each).backward()
        gradients = {n: p.grad for n, p in oracle.named_parameters() if p.requires_grad}
        # VeRA keeps its projections there
        buffers = dict(oracle.named_buffers(remove_duplicate=False))
        gradients = peft.get_peft_model_state_dict(
            oracle, state_dict=gradients | buffers
        )
        gradients = {
            key: g
            for key, g in gradients.items()
            if not any(g is b for b in buffers.values())
        }
        parts = model._adapters_by_path("default")
        own = {
            minipeft.saving.tensor_key(path, name): p.grad
            for path, part in parts.items()
            for name, p in part.named_parameters()
            if p.requires_grad
        }
        assert own.keys() == gradients.keys()
        for key in own:
            close(own[key], gradients[key])
        assert any(g.abs().max() > 1e-6 for g in own.values())
        for each in (oracle, model):
            torch.optim.SGD(
                [p for p in each.parameters() if p.requires_grad], lr=0.5
            ).step()
        after, expected = (
            file_of(model, tmp_path / "ours"),
            file_of(oracle, tmp_path / "theirs"),
        )
        for key in expected:
            close(after[key], expected[key])

    @crossed
    def test_only_the_adapter_gets_gradients(self, method, base):
        model = adapted(method, base)
        loss_of(model).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (
                ".adapters." in name or name.startswith("shared.")
            ), name

    @only(lambda m, b: b.layered)
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("rows", [None, ["default", "__base__", "default"]])
    def test_checkpointing_gives_the_same_gradients(
        self, method, base, reentrant, rows
    ):
        if method.name == "prefix" and base.name.startswith("hf"):
            pytest.skip("refused: see test_prefix.py")
        if method.config == "SubspaceConfig":
            pytest.skip("refused: see test_subspace.py")
        gradients = []
        for checkpointing in (False, True):
            model = adapted(method, base).train()
            if checkpointing:
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": reentrant}
                )
            loss_of(model, **({"adapter_names": rows} if rows else {})).backward()
            gradients.append(
                {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            )
        for name, gradient in gradients[0].items():
            close(gradients[1][name], gradient)
        assert any(g.abs().max() > 1e-6 for g in gradients[1].values())
        hooks = [
            hook
            for module in model.unload().modules()
            for hook in module._forward_hooks.values()
        ]
        assert not any(hook.__module__.startswith("minipeft.model") for hook in hooks)

    @only(lambda m, b: m.dropout)
    def test_dropout_acts_in_training_only(self, method, base):
        model = adapted(method, base, **{method.dropout: 0.5})
        assert torch.equal(run(model), run(model))
        still = run(model)
        model.train()
        differ(run(model), run(model))
        close(run(model.eval()), still)

    @crossed
    def test_training_mode_never_merges(self, method, base):
        model = adapted(method, base)
        for _ in range(2):
            model.train()
            assert model.training and model.merged_adapters == []
            model.eval()
            assert model.merged_adapters == []

    @pytest.mark.parametrize("name", METHODS)
    def test_torch_compile(self, name):
        method, base = METHODS[name], BASES[METHODS[name].bases[0]]
        model, with_a, with_b = two(method, base)
        compiled = torch.compile(model, backend="eager")
        close(run(compiled), with_b)
        model.set_adapter("a")
        close(run(compiled), with_a)
        with model.disable_adapter():
            close(run(compiled), run(base.make()))
        if method.where:
            close(run(compiled, adapter_names=["a", "b", "a"])[1], with_b[1])


class TestPrecision:
    @crossed
    @pytest.mark.parametrize("kept", [torch.float64, torch.bfloat16, torch.float16])
    def test_trained_numbers_in_another_precision_than_the_base(
        self, method, base, kept
    ):
        """As after `for p in model.parameters(): if p.requires_grad: p.data = …`, with
        which PEFT's users move them."""
        model = adapted(method, base)
        with_adapter = run(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.to(kept).to(parameter.dtype)
        rounded = run(model)  # what the rounding of the numbers themselves changes
        for parameter in trained:
            parameter.data = parameter.data.to(kept)
        wide = kept if kept.itemsize == 2 else torch.float32
        close(run(model), rounded, rounding(2, wide))
        differ(run(model), run(base.make()))
        if method.mergeable and base.dense:
            model.merge_adapter()
            close(run(model), with_adapter, rounding(2, wide))
            model.unmerge_adapter()
        loss_of(model).backward()
        assert {p.grad.dtype for p in trained if p.grad is not None} == {kept}


class TestStartAndCount:
    @crossed
    def test_a_new_adapter_changes_nothing_and_a_shaken_one_does(self, method, base):
        before = run(base.make())
        model = get_peft_model(base.make(), method.ours(base))
        if method.where:  # prompts and prefixes have no such start
            close(run(model), before)
        differ(run(shake(model, step=method.step)), before)

    @with_oracle
    def test_the_trainable_count_is_that_of_peft(self, method, base):
        model = get_peft_model(base.make(), method.ours(base))
        oracle = theirs(method, base)
        # AdaLoRA's, a constant
        ranknum = sum(
            p.numel() for name, p in oracle.named_parameters() if "ranknum" in name
        )
        trainable, everything = oracle.get_nb_trainable_parameters()
        assert model.get_nb_trainable_parameters() == (trainable, everything - ranknum)

    @only(lambda m, b: m.count)
    def test_the_trainable_count_is_the_formula(self, method, base):
        model = get_peft_model(base.make(), method.ours(base))
        expected = sum(
            method.count(*minipeft.weights.features(slot.base_layer))
            for slot in model.modules()
            if isinstance(slot, Slot) and slot.adapters
        )
        assert model.get_nb_trainable_parameters()[0] == expected > 0

    @crossed
    def test_a_16_bit_base_has_32_bit_adapters(self, method, base):
        model = get_peft_model(base.make().bfloat16(), method.ours(base))
        shake(model, step=method.step / 3)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {
            torch.float32
        }
        output = run(model)
        assert output.dtype == torch.bfloat16
        if method.mergeable and base.dense:
            plain = model.merge_and_unload()
            assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
            # base and merged weights are rounded, then each result of both
            close(run(plain), output, rounding(2, torch.bfloat16))
            differ(run(plain), run(base.make().bfloat16()), 1e-1)

    def test_every_method_of_the_package_is_in_the_table(self):
        assert {method.config for method in METHODS.values()} | APART == set(
            minipeft.methods.__all__
        )
