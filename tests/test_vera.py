"""VeRA: one pair of matrices for all layers, owned once, saved or drawn again."""

import json
import math

import peft
import pytest
import torch
from bases import BASES, METHODS, adapted, close, differ, run, shake
from safetensors.torch import load_file
from tolerance import chance, tolerance

import minipeft
from minipeft import (
    AdapterFileError,
    ConfigError,
    PeftModel,
    TargetError,
    VeraConfig,
    get_peft_model,
)
from minipeft.methods.vera import Projection, Vera
from minipeft.slot import ActiveAdapters, Base, Slot

HF, LLAMA, METHOD = BASES["hf_llama"], BASES["llama"], METHODS["vera"]


class TestFiles:
    @pytest.mark.filterwarnings("ignore:Specified to not")
    @pytest.mark.parametrize("saved", [True, False])
    def test_both_ways_of_saving(self, saved, tmp_path):
        model = adapted(METHOD, HF, save_projection=saved, projection_prng_key=7)
        model.save_pretrained(tmp_path / "ours")
        tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
        assert (
            ("base_model.vera_A" in tensors)
            == ("base_model.vera_B" in tensors)
            == saved
        )
        assert (
            json.loads((tmp_path / "ours" / "adapter_config.json").read_text())[
                "projection_prng_key"
            ]
            == 7
        )
        assert torch.equal(
            run(PeftModel.from_pretrained(HF.make(), tmp_path / "ours")), run(model)
        )
        oracle = peft.PeftModel.from_pretrained(HF.make(), str(tmp_path / "ours"))
        close(run(oracle), run(model))  # the same seed draws the same numbers there
        oracle.save_pretrained(str(tmp_path / "theirs"))
        close(
            run(PeftModel.from_pretrained(HF.make(), tmp_path / "theirs")), run(model)
        )

    def test_the_same_seed_draws_what_peft_draws(self, tmp_path):
        for key in (0, 3):
            for package, config in ((minipeft, VeraConfig), (peft, peft.VeraConfig)):
                model = package.get_peft_model(
                    HF.make(),
                    config(
                        r=6,
                        target_modules=["q_proj", "down_proj"],
                        projection_prng_key=key,
                    ),
                )
                model.save_pretrained(str(tmp_path / package.__name__))
            own, other = (
                load_file(tmp_path / who / "adapter_model.safetensors")
                for who in ("minipeft", "peft")
            )
            assert own.keys() == other.keys()
            assert all(torch.equal(own[name], other[name]) for name in own)
        assert own["base_model.vera_A"].shape == (6, 24) and own[
            "base_model.vera_B"
        ].shape == (16, 6)

    def test_a_file_without_its_projection_is_not_read_as_another(self, tmp_path):
        from safetensors.torch import save_file

        model = adapted(METHOD, LLAMA)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        del tensors["base_model.vera_A"]
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterFileError, match="missing .*vera_A"):
            PeftModel.from_pretrained(LLAMA.make(), tmp_path)


class TestProjection:
    def test_the_pair_is_owned_once_and_never_trained(self):
        model = adapted(METHOD, LLAMA)
        assert [
            name for name, m in model.named_modules() if isinstance(m, Projection)
        ] == ["shared.default"]
        assert sum(isinstance(m, Vera) for m in model.modules()) == 6
        assert not any(
            "vera_A" in name or "vera_B" in name for name, _ in model.named_parameters()
        )
        before = {name: buffer.clone() for name, buffer in model.shared.named_buffers()}
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.1
        )
        loss = model(input_ids=torch.arange(6)[None]).logits.square().mean()
        loss.backward()
        optimizer.step()
        assert before.keys() and all(
            torch.equal(b, before[name]) for name, b in model.shared.named_buffers()
        )

    def test_adapters_with_seeds_of_their_own(self):
        """PEFT allows one seed for all adapters of a model; here each has its own
        pair."""
        model = adapted(METHOD, LLAMA, "a")
        with_a = run(model)
        model.add_adapter("b", METHOD.ours(LLAMA, projection_prng_key=5, r=12))
        shake(model, "b")
        model.set_adapter("b")
        alone = run(
            shake(
                get_peft_model(
                    LLAMA.make(), METHOD.ours(LLAMA, projection_prng_key=5, r=12), "b"
                ),
                "b",
            )
        )
        close(run(model), alone)
        differ(with_a, alone)
        model.delete_adapter("b")
        assert list(model.shared) == ["a"] and torch.equal(run(model), with_a)

    def test_the_bounds_of_the_draw(self):
        pair = Projection(600, 400, VeraConfig(r=300))
        for tensor, columns in ((pair.vera_A, 600), (pair.vera_B, 300)):
            n, bound = tensor.numel(), math.sqrt(6 / columns)
            # of n draws from [-bound, bound] the largest falls short by bound / n
            assert bound * (1 - 16 / n) < tensor.abs().max() < bound
            # squares of uniform draws have 2 / sqrt(5) times their mean as spread
            share = tensor.var() / (2 / columns)
            close(share, torch.tensor(1.0), chance(2 / math.sqrt(5), n))


class TestConfig:
    @pytest.mark.parametrize(
        "fields, message",
        [
            (dict(r=0), "r = 0"),
            (dict(r="8"), "r = '8'"),
            (dict(vera_dropout=1.0), "vera_dropout = 1.0"),
            (dict(bias="all"), "bias='all' is not supported"),
        ],
    )
    def test_configurations_that_mean_nothing(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            VeraConfig(**fields)

    def test_embeddings_are_refused(self):
        with pytest.raises(TargetError, match="not for embeddings"):
            get_peft_model(LLAMA.make(), VeraConfig(target_modules=["embed_tokens"]))


class TestEquation:
    @pytest.mark.parametrize("rows, r", [(2, 3), (2, 40), (90, 3), (90, 40)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_with_w_in_one_product_or_apart(self, rows, r, bias):
        """The equation and its gradients, whichever way is the cheaper."""
        torch.manual_seed(0)
        slot = Slot(
            torch.nn.Linear(24, 32, bias).double().requires_grad_(False),
            ActiveAdapters(),
        )
        slot.shared["default"] = Projection(30, 40, VeraConfig(r=r)).double()
        adapter, base = (
            Vera(24, 32, VeraConfig(r=r, init_weights=False)).double(),
            Base(slot, "default"),
        )
        x, outputs, gradients = (
            torch.randn(rows, 1, 24).double().requires_grad_(),
            [],
            [],
        )
        b, d, A, B = (
            *adapter.parameters(),
            slot.shared["default"].vera_A[:, :24],
            slot.shared["default"].vera_B[:32],
        )
        for y in (adapter(base, x), slot.base_layer(x) + b * ((x @ A.T * d) @ B.T)):
            outputs.append(y.detach())
            gradients.append(torch.autograd.grad(y.square().sum(), [x, b, d]))
        for own, right in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1])):
            # as written, three products; and back
            close(own, right, tolerance(torch.float64, terms=90, steps=6))

    def test_random_start_and_dropout_as_in_peft(self, tmp_path):
        model, outputs = adapted(METHOD, HF, init_weights=False, vera_dropout=0.4), []
        model.save_pretrained(tmp_path)
        for each in (model, peft.PeftModel.from_pretrained(HF.make(), str(tmp_path))):
            torch.manual_seed(5)
            outputs.append(run(each.train()))
        close(*outputs)
        b = next(
            m
            for m in get_peft_model(HF.make(), VeraConfig(init_weights=False)).modules()
            if isinstance(m, Vera)
        )
        assert (b.vera_lambda_b == 1).all() and b.vera_lambda_d.std() > 0.5
