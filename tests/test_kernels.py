"""Every fused form of kernels.py computes what its method's equation says: outputs and
all gradients, and LinearDelta.forward really chooses it."""

import pytest
import torch
from bases import close
from tolerance import tolerance
from torch import nn

from minipeft import (
    AdaLoraConfig,
    DoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    VeraConfig,
    get_peft_model,
)
from minipeft.methods.dora import Dora
from minipeft.methods.lora import Lora
from minipeft.slot import LinearDelta

D_IN, D_OUT, ROWS = 24, 32, 60
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=12),
    "dora": DoraConfig(r=4, lora_alpha=12),
    "adalora": AdaLoraConfig(init_r=5, target_r=3, total_step=10, lora_alpha=7),
    "loha": LoHaConfig(r=3, alpha=6),
    "lokr": LoKrConfig(r=2, alpha=6),
    "lokr_factored": LoKrConfig(r=1, alpha=3, decompose_both=True),
    "vera": VeraConfig(r=20),
}
# (dtype of the layer, dtype of x, autocast, bias)
SETTINGS = {
    "fp32": (torch.float32, torch.float32, False, True),
    "fp64, no bias": (torch.float64, torch.float64, False, False),
    "bf16 layer, fp32 adapter": (torch.bfloat16, torch.bfloat16, False, True),
    "autocast": (torch.float32, torch.float32, True, True),
}


def make(method, dtype, bias):
    """(slot, all leaves that get gradients), every number of the adapter moved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=bias).to(dtype))
    config = CONFIGS[method]
    config.target_modules = ["0"]
    model = get_peft_model(model, config)
    if dtype == torch.float64:
        model.double()
    slot = model.get_base_model()[0]
    leaves = dict(slot.adapters["default"].named_parameters())
    with torch.no_grad():
        for leaf in leaves.values():
            leaf += 0.3 * torch.randn_like(leaf)
    return slot, leaves


def run(slot, leaves, dtype, autocast):
    """(output, {name: gradient}), x's gradient among them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, ROWS // 3, D_IN, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(3, ROWS // 3, D_OUT, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = slot(x)
    every = {"x": x, **leaves}
    gradients = torch.autograd.grad((y.float() * upstream).sum(), every.values())
    return y, dict(zip(every, gradients))


def rounding(layer, dtype, autocast, bias):
    """A chain of four sums of up to `ROWS` products, and its backward, in either form.
    bf16 numbers are rounded at every step, factors and results."""
    coarse = autocast or layer == torch.bfloat16
    if coarse:
        return tolerance(torch.bfloat16, steps=2 * 4 * 2)
    return tolerance(layer, terms=ROWS, steps=2 * 4)


class Count:
    """A kernel, and how often it gave a result."""

    def __init__(self, kernel):
        self.kernel, self.used = kernel, 0

    def __call__(self, adapter, base, x):
        y = self.kernel(adapter, base, x)
        self.used += y is not None
        return y


@pytest.fixture
def plain(monkeypatch):
    """Switches a class's kernel off, or counts its use."""

    def switch(cls, counted=False):
        kernel = vars(cls)["kernel"]
        count = Count(kernel)

        def fused(adapter, base, x):
            return count(adapter, base, x) if counted else None

        monkeypatch.setattr(cls, "kernel", fused)
        return count

    yield switch
    monkeypatch.undo()


class TestFusedEqualsPlain:
    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("method", CONFIGS)
    def test_outputs_and_gradients(self, method, setting, plain):
        layer, dtype, autocast, bias = SETTINGS[setting]
        slot, leaves = make(method, layer, bias)
        fused, fused_gradients = run(slot, leaves, dtype, autocast)
        plain(type(slot.adapters["default"]))
        y, gradients = run(slot, leaves, dtype, autocast)
        assert fused.dtype == y.dtype
        allowed = rounding(*SETTINGS[setting])
        close(fused, y, allowed)
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            close(fused_gradients[name], gradient, allowed)

    @pytest.mark.parametrize("method", CONFIGS)
    def test_the_kernel_is_chosen(self, method, plain):
        slot, leaves = make(method, torch.float32, True)
        count = plain(type(slot.adapters["default"]), counted=True)
        run(slot, leaves, torch.float32, autocast=False)
        assert count.used == 1

    def test_vera_is_fused_only_where_that_is_cheaper(self, plain):
        slot, leaves = make("vera", torch.float32, True)
        count = plain(type(slot.adapters["default"]), counted=True)
        for rows in (2, 8, 200):
            used = count.used
            slot(torch.randn(rows, D_IN))
            fused = (rows + 2 * 20) * D_IN * D_OUT
            separate = 2 * rows * 20 * (D_IN + D_OUT)
            assert (count.used > used) == (fused < separate), rows
        assert 0 < count.used < 3


class TestWhereItIsNotChosen:
    def test_a_bias_on_B_is_left_to_the_equation(self, plain):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_bias=True, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(D_IN, D_OUT)), config)
        adapter = model.get_base_model()[0].adapters["default"]
        nn.init.ones_(adapter.lora_B.bias)
        x = torch.randn(5, D_IN)
        with model.disable_adapter():
            base = model(x)
        close(model(x), base + adapter.scaling)

    def test_a_subclass_has_its_own_equation(self):
        class Doubled(Lora):
            def update(self, base, x):
                return 2 * super().update(base, x)

        assert Lora.kernel is not None and Doubled.kernel is None
        assert LinearDelta.kernel is None

    def test_doras_dropout_is_left_to_the_equation(self, plain):
        config = DoraConfig(r=2, lora_dropout=0.5, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(D_IN, D_OUT)), config)
        count = plain(Dora, counted=True)
        x = torch.randn(5, D_IN)
        for training in (True, False):
            model.train(training)(x)
            assert count.used == (not training)

    @pytest.mark.parametrize("method", ["loha", "vera", "dora"])
    def test_a_hooked_layer_is_called(self, method):
        """W + delta may not stand in for a layer whose output somebody wants to see."""
        slot, leaves = make(method, torch.float32, True)
        seen = []
        slot.base_layer.register_forward_hook(lambda *given: seen.append(given))
        run(slot, leaves, torch.float32, autocast=False)
        assert len(seen) == 1
