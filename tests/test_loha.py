"""LoHa: its product and its gradients against autograd's, its ranks, its dropouts, its
configurations."""

import peft
import pytest
import torch
import torch.nn.functional as F
from bases import BASES, METHODS, adapted, close, differ, run
from safetensors.torch import load_file
from tolerance import chance, size
from torch import nn

import minipeft
from minipeft import ConfigError, LoHaConfig, TargetError, get_peft_model
from minipeft.kernels import Hadamard
from minipeft.methods.loha import LoHa
from minipeft.slot import ActiveAdapters, Base, Slot

HF, LLAMA = BASES["hf_llama"], BASES["llama"]


def layer(d_in=6, d_out=8, bias=True, r=2, **fields):
    base = Base(Slot(nn.Linear(d_in, d_out, bias=bias), ActiveAdapters()), "default")
    adapter = LoHa(d_in, d_out, r, 0.7, LoHaConfig(**fields))
    adapter.reset_parameters(LoHaConfig(init_weights=False))
    return adapter, base


class TestEquation:
    def test_hand_written_gradients(self):
        tensors = [
            torch.randn(*shape, dtype=torch.float64, requires_grad=True)
            for shape in ((5, 2), (2, 4)) * 2
        ]
        W = torch.randn(5, 4, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda *factors: Hadamard.apply(W, *factors, 0.7), tensors
        )
        assert torch.autograd.gradgradcheck(
            lambda *factors: Hadamard.apply(None, *factors, 0.7), tensors
        )

    @pytest.mark.parametrize("bias", [False, True])
    def test_one_product_for_both_is_the_two_products(self, bias):
        adapter, base = layer(bias=bias)
        x = torch.randn(3, 5, 6, requires_grad=True)
        close(
            adapter(base, x).detach(),
            (base(x) + F.linear(x, adapter.delta(base))).detach(),
        )
        calls = []
        # who is hooked is called
        handle = base.module.register_forward_hook(lambda *_: calls.append(1))
        close(
            adapter(base, x).detach(),
            (F.linear(x, base.weight + adapter.delta(base), base.bias)).detach(),
        )
        assert calls
        handle.remove()
        # W + delta in 16 bits would lose most of delta
        with torch.autocast("cpu", torch.bfloat16):
            assert adapter(base, x).dtype == torch.bfloat16

    def test_ranks_multiply(self):
        adapter, base = layer(64, 64, r=4)
        assert torch.linalg.matrix_rank(adapter.delta(base)) == 16
        assert sum(p.numel() for p in adapter.parameters()) == 2 * 4 * (64 + 64)


class TestDropout:
    @pytest.mark.parametrize("method", ["loha", "lokr"])
    @pytest.mark.parametrize(
        "fields",
        [
            dict(rank_dropout=0.4),
            dict(module_dropout=0.5),
            dict(rank_dropout=0.3, module_dropout=0.3),
        ],
    )
    def test_dropouts_draw_what_peft_draws(self, method, fields, tmp_path):
        fields = dict(module_dropout=1e-9) | fields  # PEFT draws for it in any case
        model, outputs = adapted(METHODS[method], HF, **fields), []
        model.save_pretrained(tmp_path)
        for each in (model, peft.PeftModel.from_pretrained(HF.make(), str(tmp_path))):
            torch.manual_seed(5)
            outputs.append(run(each.train()))
        close(*outputs)
        differ(outputs[0], run(model.eval()))
        assert torch.equal(run(model), run(model))

    def test_rank_dropout_keeps_the_mean(self):
        torch.manual_seed(0)
        adapter, base = layer(rank_dropout=0.5)
        x, y = torch.randn(4, 6), []
        adapter.train()
        for _ in range(4000):
            y.append((adapter(base, x) - base(x)).detach())
        whole, counts = F.linear(x, adapter.delta(base)).detach(), set()
        # each output is zero, or twice what it is without dropout
        close(torch.stack(y).mean(0), whole, chance(size(whole), len(y)))
        for some in y:  # whole outputs are missing, the others are made up for
            stay = (some != 0).any(0)
            counts.add(int(stay.sum()))
            close(some, whole * stay * (len(stay) / stay.sum().clamp(min=1)))
        assert counts == set(range(len(stay) + 1))  # from none to all of them


class TestConfig:
    def test_the_same_seed_gives_the_same_adapter(self, tmp_path):
        for init in (True, False):
            for package, config in ((minipeft, LoHaConfig), (peft, peft.LoHaConfig)):
                torch.manual_seed(4)
                model = package.get_peft_model(
                    HF.make(), config(r=3, target_modules=["q_proj"], init_weights=init)
                )
                model.save_pretrained(str(tmp_path / package.__name__))
            own, other = (
                load_file(tmp_path / who / "adapter_model.safetensors")
                for who in ("minipeft", "peft")
            )
            assert own.keys() == other.keys()
            for key in own:
                assert (own[key].abs().max() == 0) == ("w2_b" in key and init)
                # (True: PEFT draws no numbers for the zeros)
                assert init or torch.equal(own[key], other[key])

    def test_patterns(self, tmp_path):
        fields = dict(
            r=2,
            rank_pattern={"v_proj": 3},
            alpha_pattern={"down_proj": 9},
            target_modules=list(HF.targets),
        )
        model = adapted(METHODS["loha"], HF, **fields)
        model.save_pretrained(tmp_path)
        close(run(peft.PeftModel.from_pretrained(HF.make(), str(tmp_path))), run(model))

    @pytest.mark.parametrize(
        "fields, message",
        [
            (dict(r=0), "r = 0"),
            (dict(r=1.5), "r = 1.5"),
            (dict(rank_pattern={"q_proj": -1}), r"q_proj'\] = -1"),
            (dict(rank_dropout=1.0), "rank_dropout = 1.0"),
            (dict(module_dropout=-0.1), "module_dropout = -0.1"),
        ],
    )
    def test_configurations_that_mean_nothing(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            LoHaConfig(**fields)

    def test_embeddings_are_refused(self):
        with pytest.raises(TargetError, match="embed_tokens: .*not for embeddings"):
            get_peft_model(LLAMA.make(), LoHaConfig(target_modules=["embed_tokens"]))
