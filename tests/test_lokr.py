"""LoKr: Kronecker products by reshaping, against torch.kron; how sizes are divided,
against PEFT."""

import peft
import pytest
import torch
import torch.nn.functional as F
from bases import BASES, METHODS, adapted, close, run
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lokr.layer import factorization as theirs
from safetensors.torch import load_file
from tolerance import assert_within, size, tolerance
from torch import nn

import minipeft
from minipeft import ConfigError, LoKrConfig, TargetError, get_peft_model
from minipeft.kernels import AddKronecker
from minipeft.methods.lokr import LoKr, factorization
from minipeft.slot import ActiveAdapters, Base, Slot

HF, LLAMA = BASES["hf_llama"], BASES["llama"]


class TestEquation:
    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 40),
        st.integers(1, 40),
        st.integers(1, 12),
        st.booleans(),
        st.sampled_from([-1, 1, 2, 3, 5]),
    )
    def test_reshaping_is_the_kronecker_product(self, d_in, d_out, r, both, factor):
        torch.manual_seed(0)
        config = LoKrConfig(
            init_weights=False, decompose_both=both, decompose_factor=factor
        )
        adapter, base = (
            LoKr(d_in, d_out, r, 0.7, config),
            Base(Slot(nn.Linear(d_in, d_out), ActiveAdapters()), "default"),
        )
        adapter.reset_parameters(config)
        x, (C, D) = torch.randn(2, 3, d_in), adapter.factors
        assert adapter.delta(base).shape == (d_out, d_in)
        close(adapter.delta(base).detach(), 0.7 * torch.kron(C, D).detach())
        plain = (base(x) + F.linear(x, adapter.delta(base))).detach()
        # C and D are products, or not; then come a product with x, and one with W
        sums = dict(terms=40, steps=4, least=size(x) * size(adapter.delta(base)))
        assert_within(adapter(base, x).detach(), plain, **sums)
        own = torch.autograd.grad(
            adapter(base, x).square().sum(), list(adapter.parameters())
        )
        other = torch.autograd.grad(
            (base(x) + F.linear(x, adapter.delta(base))).square().sum(),
            list(adapter.parameters()),
        )
        for a, b in zip(own, other):
            close(a, b, tolerance(torch.float32, terms=6 * 40, steps=8))  # and back

    def test_hand_written_gradients(self):
        tensors = [
            torch.randn(*shape, dtype=torch.float64, requires_grad=True)
            for shape in ((7, 4, 5), (7, 2, 3), (4, 2), (5, 3))
        ]
        Y, X, C, D = tensors
        product = torch.kron(C, D).detach()
        assert_within(
            AddKronecker.apply(*tensors)[1].flatten().detach(),
            Y[1].flatten().detach() + product @ X[1].flatten().detach(),
            terms=2 * 3 + 1,
            steps=2,
            least=size(product * X[1].flatten()),  # a term is larger than their sum
        )
        assert torch.autograd.gradcheck(
            AddKronecker.apply, tensors
        ) and torch.autograd.gradgradcheck(AddKronecker.apply, tensors)

    def test_training_keeps_nothing_but_the_input(self):
        """PEFT keeps the Kronecker product; an intermediate one would be as large as
        the output."""
        adapter, x, kept = (
            LoKr(24, 48, 4, 1.0, LoKrConfig()),
            torch.randn(50, 24, requires_grad=True),
            [],
        )
        base = Base(
            Slot(nn.Linear(24, 48).requires_grad_(False), ActiveAdapters()), "default"
        )
        weights = {p.data_ptr() for p in [*adapter.parameters(), x, base.module.weight]}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t) or t, lambda t: t
        ):
            adapter(base, x)
        # C times s, and D, if it is a product
        assert sum(t.numel() for t in kept if t.data_ptr() not in weights) < 200

    def test_few_numbers_of_full_rank(self):
        """The counts and ranks of a 256 x 256 weight, by the closed formulas."""
        for r, count, rank in (
            (100, 2 * 16 * 16, 256),
            (4, 16 * 16 + 4 * (16 + 16), 16 * 4),
        ):
            adapter = LoKr(256, 256, r, 1.0, LoKrConfig(init_weights=False))
            adapter.reset_parameters(LoKrConfig(init_weights=False))
            assert sum(p.numel() for p in adapter.parameters()) == count
            rounded = tolerance(torch.float32, terms=256)  # of the largest
            delta = adapter.delta(None).double()
            assert torch.linalg.matrix_rank(delta, rtol=rounded) == rank


class TestConfig:
    @given(st.integers(1, 5000), st.one_of(st.just(-1), st.integers(1, 80)))
    def test_sizes_are_divided_as_in_peft(self, dimension, factor):
        assert factorization(dimension, factor) == theirs(dimension, factor)

    def test_a_factor_that_does_not_divide(self, tmp_path):
        assert [factorization(12, f) for f in (-1, 2, 4, 5, 6, 7)] == [
            (3, 4),
            (2, 6),
            (4, 3),
            (3, 4),
            (6, 2),
            (3, 4),
        ]
        assert factorization(13, 4) == (1, 13)  # a prime: C is a single number
        fields = dict(decompose_factor=5, target_modules=["q_proj"], init_weights=False)
        with pytest.raises(
            ConfigError,
            match=r"layers.0.self_attn.q_proj: .* divide its size 16 \(2, 4, 8 would\)",
        ):
            get_peft_model(LLAMA.make(), LoKrConfig(**fields))
        # PEFT takes another, without a word
        oracle = peft.get_peft_model(HF.make(), peft.LoKrConfig(**fields))
        oracle.save_pretrained(str(tmp_path))
        close(run(minipeft.PeftModel.from_pretrained(HF.make(), tmp_path)), run(oracle))

    @pytest.mark.parametrize(
        "fields",
        [
            dict(r=9),
            dict(r=2),
            dict(r=1, decompose_both=True),
            dict(r=2, decompose_factor=2),
            dict(r=2, decompose_factor=8),
            dict(r=3, init_weights="lycoris"),
        ],
        ids=str,
    )
    def test_every_field_as_in_peft(self, fields, tmp_path):
        model = adapted(METHODS["lokr"], HF, **fields)
        model.save_pretrained(tmp_path)
        oracle = peft.PeftModel.from_pretrained(HF.make(), str(tmp_path))
        close(run(oracle), run(model))
        assert (
            sum(p.numel() for n, p in oracle.named_parameters() if "lokr" in n)
            == model.get_nb_trainable_parameters()[0]
        )

    @pytest.mark.parametrize("init", [True, False, "lycoris"])
    def test_which_factor_starts_at_zero(self, init, tmp_path):
        for fields in (dict(r=100), dict(r=1, decompose_both=True)):
            for package, config in ((minipeft, LoKrConfig), (peft, peft.LoKrConfig)):
                model = package.get_peft_model(
                    HF.make(),
                    config(**fields, target_modules=["q_proj"], init_weights=init),
                )
                model.save_pretrained(str(tmp_path / package.__name__))
            own, other = (
                load_file(tmp_path / who / "adapter_model.safetensors")
                for who in ("minipeft", "peft")
            )
            assert own.keys() == other.keys()
            for key in own:
                assert (own[key].abs().max() == 0) == (other[key].abs().max() == 0), key

    @pytest.mark.parametrize(
        "fields, message",
        [
            (dict(r=0), "r = 0"),
            (dict(decompose_factor=0), "decompose_factor = 0"),
            (dict(decompose_factor=2.0), "= 2.0"),
            (dict(decompose_factor=-2), "decompose_factor = -2"),
            (dict(init_weights="lycros"), "init_weights 'lycros'"),
        ],
    )
    def test_configurations_that_mean_nothing(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            LoKrConfig(**fields)

    def test_embeddings_are_refused(self):
        with pytest.raises(TargetError, match="embed_tokens: .*not for embeddings"):
            get_peft_model(LLAMA.make(), LoKrConfig(target_modules=["embed_tokens"]))
