"""The tolerance by simulation: sums in every order stay within it, mistakes do not."""

import pytest
import torch
from tolerance import assert_within, size, tolerance


def in_turn(products):
    """(B, n) -> (B,): one after the other, as a plain loop adds."""
    total = torch.zeros_like(products[:, 0])
    for term in products.T:
        total = total + term
    return total


def in_lanes(products, lanes=8):
    """(B, n) -> (B,): as vector instructions add, in partial sums."""
    return in_turn(in_turn(products.reshape(-1, lanes)).reshape(len(products), -1))


def in_lanes_interleaved(products, lanes=8):
    parts = products.reshape(len(products), -1, lanes).transpose(1, 2)
    return in_turn(in_turn(parts.reshape(-1, parts.shape[-1])).reshape(-1, lanes))


def backwards(products):
    return in_turn(products.flip(1))


def by_halves(products):
    while products.shape[1] > 1:
        products = products[:, ::2] + products[:, 1::2]
    return products[:, 0]


ORDERS = [in_turn, in_lanes, in_lanes_interleaved, backwards, by_halves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [16, 256, 2048])
@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["signs mixed", "one sign"])
def test_no_order_of_a_sum_breaks_it(dtype, n, shift):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2000, n, generator=generator, dtype=torch.float64) + shift
    products = (x * torch.randn(n, generator=generator, dtype=torch.float64).abs()).to(
        dtype
    )
    sums = [order(products) for order in ORDERS]
    for one in sums[1:]:
        assert_within(one, sums[0], terms=n)


def test_bfloat16_is_added_up_in_float32_and_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 2048, generator=generator).bfloat16().float() + 1
    sums = [order(x).bfloat16() for order in ORDERS]
    for one in sums[1:]:
        assert_within(one, sums[0])


def test_no_order_breaks_it_over_many_layers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator)
    layers = torch.randn(16, 64, 64, generator=generator) / 8
    outputs = []
    for order in ORDERS:
        h = x
        for W in layers:
            products = h[:, None] * W  # (50, 64, 64)
            h = order(products.flatten(0, 1)).reshape(50, 64)
            h = torch.nn.functional.layer_norm(h, (64,))
        outputs.append(h)
    for output in outputs[1:]:
        assert_within(output, outputs[0], terms=64, steps=len(layers))


@pytest.mark.parametrize("n", [16, 256, 2048])
def test_it_is_not_generous(n):
    """The worst of the orders uses a good part of it, and one wrong term of a sum shows
    even if it is wrong by one part in a thousand."""
    generator = torch.Generator().manual_seed(n)
    products = torch.randn(2000, n, generator=generator)
    sums = torch.stack([order(products) for order in ORDERS]).double()
    worst = (sums - products.double().sum(1)).abs().max()
    assert worst > tolerance(torch.float32, size(sums), terms=n) / 60
    wrong = products.clone()
    wrong[:, 3] *= 1 + 1e-3
    with pytest.raises(AssertionError, match="where rounding makes"):
        assert_within(in_turn(wrong), in_turn(products), terms=n)


def test_the_coarsest_format_counts():
    x = torch.linspace(1, 2, 100)
    assert_within(x.bfloat16().float(), x, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_within(x.bfloat16().float(), x)


def test_what_cancels_out_has_the_size_of_its_terms():
    x = torch.full((1,), 1000.0)
    left = (x + 0.1) - x  # 0.1, with the rounding of 1,000
    with pytest.raises(AssertionError):
        assert_within(left, torch.tensor([0.1]))
    assert_within(left, torch.tensor([0.1]), least=1000.0)
