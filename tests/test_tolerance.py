"""The tolerance by simulation: sums in every order stay within it, mistakes do not. And
no test has a tolerance beside it."""

import ast
from pathlib import Path

import pytest
import torch
from tolerance import assert_within, chance, printed, size, tolerance


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


def test_half_of_the_last_decimal():
    for value in (0.12345, 0.125, 2.675, 1.005):  # the last two lie in the middle
        for decimals in (2, 3):
            assert abs(round(value, decimals) - value) < printed(decimals)
    assert round(printed(2), 5) == 0.005


def test_chance_covers_the_mean_of_draws_and_not_another():
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(1000, 400, generator=generator, dtype=torch.float64).mean(1)
    off = (means - 0.5).abs().max()
    spread = (1 / 12) ** 0.5
    assert chance(spread, 400, errors=2) < off < chance(spread, 400)


# ---- no test has a tolerance of its own ----------------------------------------------

# of right and wrong answers that a learner might give: the tolerance is part of them
ANSWERS = {f"test_checks_{name}.py" for name in ("05", "13", "17", "kinds")}
FILES = sorted(Path(__file__).parent.glob("*.py"))
NAMES = {"atol", "rtol", "abs", "rel", "abs_tol", "rel_tol", "tolerance", "allowed"}
# functions that compare: how many arguments come before a tolerance
COMPARING = {"approx": 1, "close": 2, "allclose": 2, "isclose": 2, "assert_close": 2}
HELPERS = {"tolerance", "rounding", "printed", "chance"}
SMALL = 0.01  # an upper bound below it is a tolerance; above it, a statement


def own_numbers(node):
    """The numbers below 1 in an expression, outside calls of the helpers."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in HELPERS:
        return []
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, float) and node.value < 1 else []
    return [n for child in ast.iter_child_nodes(node) for n in own_numbers(child)]


def tolerances(node):
    """The expressions in one node that say how far two numbers may lie apart."""
    if isinstance(node, ast.Call):
        yield from (k.value for k in node.keywords if k.arg in NAMES)
        before = COMPARING.get(ast.unparse(node.func).rpartition(".")[2])
        yield from node.args[before:] if before else []
    if isinstance(node, ast.arguments):
        with_default = [*node.posonlyargs, *node.args][-len(node.defaults) :]
        pairs = [*zip(with_default, node.defaults)]
        pairs += zip(node.kwonlyargs, node.kw_defaults)
        yield from (value for name, value in pairs if value and name.arg in NAMES)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        for left, op, right in zip(sides, node.ops, sides[1:]):
            upper = right if isinstance(op, ast.Lt | ast.LtE) else None
            upper = left if isinstance(op, ast.Gt | ast.GtE) else upper
            if upper and all(number <= SMALL for number in own_numbers(upper)):
                yield upper


def own_tolerances(source):
    """Where a test's source writes a tolerance as a number: ["line 3: 1e-05"]."""
    return [
        f"line {found.lineno}: {ast.unparse(found)}"
        for node in ast.walk(ast.parse(source))
        for found in tolerances(node)
        if any(own_numbers(found))
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_none_has_a_tolerance_of_its_own(path):
    if path.name not in ANSWERS | {"tolerance.py"}:
        found = own_tolerances(path.read_text(encoding="utf-8"))
        assert not found, "tests/tolerance.py makes it from what it follows from"


@pytest.mark.parametrize(
    "line",
    [
        "torch.testing.assert_close(a, b, atol=1e-5, rtol=0)",
        "close(a, b, 1e-5)",
        "assert a == pytest.approx(b, 2e-3)",
        "assert a == approx(b, rel=2 * 1e-3)",
        "assert (a - b).abs().max() < 1e-6",
        "assert 1e-6 * size(b) >= (a - b).norm()",
        "def close(a, b, tolerance=1e-5): ...",
    ],
)
def test_a_number_is_found(line):
    assert len(own_tolerances(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.testing.assert_close(a, b, atol=0, rtol=0)",
        "close(a, b, rounding(2))",
        "assert a == pytest.approx(b, abs=printed(2))",
        "assert off < chance(0.005, 100)",
        "assert loss < 0.1",
        "assert (a - b).norm() > 1e-3",
        "assert apart.mean() < TURNED",
    ],
)
def test_what_says_where_it_comes_from_is_none(line):
    assert own_tolerances(line) == []
