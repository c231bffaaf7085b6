"""AdamW8bit against bitsandbytes' over 100 steps, and against 32-bit AdamW; PagedAdamW;
both by name in train()."""

import copy
from functools import partial

import bitsandbytes
import pytest
import torch
from bases import BASES
from tolerance import assert_within
from torch import nn

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import train
from minipeft.quant import AdamW8bit, PagedAdamW, linear_map
from minipeft.quant.blockwise import GRID


def descend(make, steps=100, dtype=torch.float32, decades=0):
    """A regression of 96 x 128 weights and a bias: (the losses, the weights, the
    optimizer).

    The inputs' sizes, and so the gradients', lie over so many decades."""
    torch.manual_seed(0)
    model, teacher = nn.Linear(128, 96).to(dtype), nn.Linear(128, 96).to(dtype)
    optimizer, losses = make(model.parameters()), []
    for step in range(steps):
        x = torch.randn(32, 128, generator=torch.Generator().manual_seed(step))
        x = (x * torch.logspace(0, -decades, 128)).to(dtype)
        loss = (model(x) - teacher(x)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.weight.detach().clone(), optimizer


# a weight in so many may have another code for a last bit, and lose a step by it
TURNED = 1 / 2000
SETTINGS = dict(lr=2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


class TestAdamW8bit:
    def test_with_its_table_it_is_bitsandbytes_own_over_100_steps(self):
        ours, mine, _ = descend(lambda p: AdamW8bit(p, **SETTINGS, grid=GRID))
        theirs, weights, _ = descend(
            lambda p: bitsandbytes.optim.AdamW8bit(p, **SETTINGS)
        )
        # A last bit may turn a code: rarely, and it costs that weight a part of one
        # step.
        apart = (mine - weights).abs()
        assert apart.max() < SETTINGS["lr"]
        assert apart.mean() < TURNED * SETTINGS["lr"]
        assert ours == pytest.approx(theirs, rel=TURNED)

    def test_without_it_both_are_as_near_to_32_bits(self):
        exact = descend(lambda p: torch.optim.AdamW(p, **SETTINGS))[1]
        ours = descend(lambda p: AdamW8bit(p, **SETTINGS))[1]
        theirs = descend(lambda p: bitsandbytes.optim.AdamW8bit(p, **SETTINGS))[1]
        start = descend(lambda p: AdamW8bit(p, **SETTINGS), steps=0)[1]
        moved = (exact - start).norm()
        assert (ours - exact).norm() < 0.05 * moved and (ours - exact).norm() < 1.1 * (
            theirs - exact
        ).norm()

    def test_small_tensors_keep_32_bits_and_are_exactly_adamw(self):
        exact = descend(lambda p: torch.optim.AdamW(p, **SETTINGS))[1]
        ours = descend(lambda p: AdamW8bit(p, **SETTINGS, min_8bit_size=10**9))[1]
        assert_within(ours, exact, steps=100)  # each rounds the weights once

    def test_two_bytes_a_weight(self):
        _, weight, optimizer = descend(AdamW8bit, steps=1)
        states = [
            t
            for state in optimizer.state.values()
            for t in state.values()
            if torch.is_tensor(t)
        ]
        n, bias = weight.numel(), weight.shape[0]
        assert (
            sum(t.untyped_storage().nbytes() for t in states)
            == 2 * n + 2 * 4 * (n // 256) + 2 * 4 * bias
        )

    def test_equal_steps_for_the_codes_lose_the_small_numbers(self):
        """The second mean's small numbers round to zero, and the step that is divided
        by its root explodes."""
        losses, *_ = descend(
            lambda p: AdamW8bit(p, **SETTINGS, unsigned=linear_map(8, signed=False)),
            decades=2,
        )
        good, *_ = descend(lambda p: AdamW8bit(p, **SETTINGS), decades=2)
        assert losses[-1] > 10 * good[-1]

    def test_16_bit_weights_and_saving_and_loading(self):
        def make(p):
            return AdamW8bit(p, lr=1e-2)

        losses, weight, optimizer = descend(make, 5, torch.bfloat16)
        assert weight.dtype == torch.bfloat16 and losses[-1] < losses[0]
        other = AdamW8bit(
            [
                nn.Parameter(p.detach().clone())
                for p in optimizer.param_groups[0]["params"]
            ]
        )
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for a, b in zip(optimizer.state.values(), other.state.values()):
            assert a.keys() == b.keys()
            for name in a:
                assert (
                    torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype
                    if torch.is_tensor(a[name])
                    else a[name] == b[name]
                )
        for each in (optimizer, other):
            for p in each.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            each.step()
        assert all(
            map(
                torch.equal,
                optimizer.param_groups[0]["params"],
                other.param_groups[0]["params"],
            )
        )

    @pytest.mark.parametrize("make", [AdamW8bit, partial(PagedAdamW, optim_bits=8)])
    @pytest.mark.parametrize(
        "wrong, message",
        [
            (dict(lr=-1.0), "lr = -1.0: expected a number at least 0"),
            (dict(lr=float("nan")), "lr = nan"),
            (dict(lr=True), "lr = True"),
            (dict(eps=-1e-8), "eps = -1e-08"),
            (dict(eps=float("nan")), "eps = nan"),
            (dict(weight_decay=float("inf")), "weight_decay = inf"),
            (dict(weight_decay="0"), "weight_decay = '0'"),
            (dict(betas=(0.9, 1.0)), "betas = 1.0: expected .* below 1"),
            (dict(betas=(float("nan"), 0.9)), "betas = nan"),
            (dict(betas=0.9), "betas = 0.9: expected two numbers"),
            (dict(betas=(0.9, 0.9, 0.9)), "expected two numbers"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:paging")
    def test_wrong_arguments(self, make, wrong, message):
        with pytest.raises(ValueError, match=message):
            make(nn.Linear(2, 2).parameters(), **wrong)

    @pytest.mark.parametrize("bits", [7, None, "32"])
    def test_pages_of_other_bits(self, bits):
        with pytest.raises(ValueError, match="unknown optim_bits .*one of 8, 32"):
            PagedAdamW(nn.Linear(2, 2).parameters(), optim_bits=bits)

    @pytest.mark.parametrize("make", [AdamW8bit, PagedAdamW])
    @pytest.mark.filterwarnings("ignore:paging")
    def test_nothing_to_optimize(self, make):
        for empty in ([], iter([]), nn.ReLU().parameters()):
            with pytest.raises(ValueError, match="empty parameter list"):
                make(empty)

    @pytest.mark.parametrize("bits", [8, 32])
    @pytest.mark.filterwarnings("ignore:paging")
    def test_groups_of_pages_may_hold_any_iterable(self, bits):
        layer = nn.Linear(2, 2)
        for groups in (
            [{"params": layer.parameters()}],
            [{"params": iter([])}, {"params": layer.parameters()}],
            [{"params": layer.weight}, {"params": [layer.bias]}],
            layer.named_parameters(),
        ):
            optimizer = PagedAdamW(groups, optim_bits=bits)
            found = [p for group in optimizer.param_groups for p in group["params"]]
            assert [id(p) for p in found] == [id(layer.weight), id(layer.bias)]

    def test_sparse_gradients(self):
        layer = nn.Embedding(4, 4, sparse=True)
        layer(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="no sparse gradients.*sparse=True"):
            AdamW8bit(layer.parameters()).step()


class Batches:
    def batch(self, step):
        ids = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "labels": ids}


class TestPaging:
    @pytest.mark.parametrize("bits, kind", [(32, torch.optim.AdamW), (8, AdamW8bit)])
    def test_paging_does_nothing_on_a_cpu_and_says_so(self, bits, kind):
        with pytest.warns(UserWarning, match="on a CPU it does nothing"):
            optimizer = PagedAdamW(
                nn.Linear(4, 4).parameters(), lr=0.5, optim_bits=bits
            )
        assert type(optimizer) is kind and optimizer.param_groups[0]["lr"] == 0.5

    @pytest.mark.parametrize(
        "name", ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
    )
    @pytest.mark.filterwarnings("ignore:paging", "ignore:r = 256 is above")
    def test_by_name_in_training(self, name, tmp_path):
        def run(**more):
            torch.manual_seed(0)
            model = get_peft_model(
                BASES["llama"].make(), LoraConfig(r=256, target_modules="all-linear")
            )
            return (
                train(
                    model,
                    Batches(),
                    steps=6,
                    lr=1e-2,
                    optimizer=name,
                    progress=False,
                    **more,
                ),
                model,
            )

        whole, model = run()
        assert whole.losses[-1] < whole.losses[0]
        if name == "adamw8bit":  # stopped and resumed, it goes on to the same bits

            def stop(step, facts):
                if step == 2:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                run(folder=tmp_path, save_every=1, log=stop)
            resumed, again = run(folder=tmp_path, save_every=1)
            assert resumed.losses == whole.losses
            assert all(map(torch.equal, model.parameters(), again.parameters()))
