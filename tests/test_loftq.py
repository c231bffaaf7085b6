"""LoftQ: by its properties, since PEFT's own needs a GPU: the error falls, the start is
the nearest there is."""

import pytest
import torch
from bases import BASES, WIDTH, close, differ, run, shake
from tolerance import tolerance
from torch import nn

import minipeft
from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.methods.loftq import fake_quantize, loftq_factors
from minipeft.quant import Linear4bit, dequantize_nf4, quantize_model, quantize_nf4
from minipeft.weights import read_weight


def weight(d_out=96, d_in=128):
    """With singular values that fall, as those of trained weights do."""
    U, V = (
        torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[
            0
        ]
        for n in (d_out, d_in)
    )
    return U @ torch.diag(1 / torch.arange(1.0, d_out + 1)) @ V[:d_out]


class TestLoftq:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_the_error_falls(self, bits):
        W = weight()
        plain = (W - fake_quantize(W, bits)).norm()
        errors = [
            (W - Q - L @ R).norm()
            for Q, L, R in (loftq_factors(W, 16, bits, n) for n in (1, 2, 5))
        ]
        assert errors[0] < plain and max(errors[1:]) < errors[0] * (
            1.1 if bits == 2 else 1
        )
        S = torch.linalg.svdvals(W - fake_quantize(W, bits))
        close(errors[0], S[16:].norm())  # Eckart and Young: no 16 directions leave less

    @pytest.mark.parametrize("alpha, rslora", [(8, False), (32, False), (3, True)])
    def test_the_start_is_nearer_to_the_dense_model_whatever_the_scale(
        self, alpha, rslora
    ):
        base = BASES["llama"]
        dense, plain = (
            run(base.make()),
            run(quantize_model(base.make(), double_quant=False, skip=("lm_head",))),
        )
        config = LoraConfig(
            r=8,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules="all-linear",
            init_lora_weights="loftq",
            loftq_config={"loftq_iter": 3},
        )
        start = run(get_peft_model(base.make(), config))
        assert (start - dense).norm() < 0.8 * (plain - dense).norm()
        for slot in get_peft_model(base.make(), config).modules():
            if isinstance(slot, minipeft.Slot) and slot.adapters:
                A, B = slot.adapters["default"].factors
                # the singular values are shared evenly
                evenly = tolerance(torch.float32, terms=4 * WIDTH, steps=2)
                close((A * A).sum(1), (B * B).sum(0), evenly)

    def test_storing_the_base_in_4_bits_afterwards_changes_nothing(self):
        base = BASES["llama"]
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq")
        model = get_peft_model(base.make(), config)
        before = run(model)
        quantize_model(model, double_quant=False)
        assert [m for m in model.modules() if isinstance(m, Linear4bit)]
        close(run(model), before)
        # one iteration: the base is what plain quantisation makes
        for name, module in base.make().named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                got = read_weight(model.get_base_model().get_submodule(name).base_layer)
                assert torch.equal(
                    got, dequantize_nf4(quantize_nf4(module.weight, double_quant=False))
                )

    def test_files(self, tmp_path):
        base = BASES["llama"]
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights="loftq",
            loftq_config={"loftq_iter": 2},
        )
        model = shake(get_peft_model(base.make(), config))
        with pytest.warns(UserWarning, match="changed likewise"):
            model.save_pretrained(tmp_path)
        assert torch.equal(
            run(PeftModel.from_pretrained(base.make(), tmp_path)), run(model)
        )
        one = shake(
            get_peft_model(
                base.make(),
                LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="loftq"),
            )
        )
        with pytest.warns(UserWarning):
            one.save_pretrained(tmp_path / "one")
        four = PeftModel.from_pretrained(
            quantize_model(base.make(), double_quant=False), tmp_path / "one"
        )
        # all layers are in 4 bits there, only the adapted ones here
        differ(run(four), run(one))
        with pytest.raises(minipeft.ConfigError, match="PiSSA or OLoRA"):
            model.save_pretrained(
                tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path
            )

    def test_a_base_in_4_bits_is_too_late(self):
        with pytest.warns(UserWarning, match="a plain start"):
            model = get_peft_model(
                quantize_model(BASES["llama"].make()),
                LoraConfig(target_modules=["q_proj"], init_lora_weights="loftq"),
            )
        close(run(model), run(quantize_model(BASES["llama"].make())))

    @pytest.mark.parametrize(
        "wrong, message",
        [
            ({"loftq_bits": 5}, "unknown loftq_bits 5; expected one of 2, 3, 4, 8"),
            ({"loftq_iter": 0}, "loftq_iter = 0: expected a whole number at least 1"),
            ({"bits": 4}, "field of loftq_config 'bits'; expected one of loftq_bits"),
        ],
    )
    def test_wrong_settings(self, wrong, message):
        with pytest.raises(minipeft.ConfigError, match=message):
            get_peft_model(
                BASES["llama"].make(),
                LoraConfig(
                    target_modules=["q_proj"],
                    init_lora_weights="loftq",
                    loftq_config=wrong,
                ),
            )
