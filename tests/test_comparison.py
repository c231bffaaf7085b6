"""The rule for "different": how often it errs, what it can see, what it says."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from tolerance import printed

from minipeft.course.comparison import T, compare, decimals, t_quantile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from compare_power import answered, false_calls, four_errors  # noqa: E402

ROUNDS = 1000
# 5 % and three standard errors of ROUNDS rounds
ALLOWED = 100 * (0.05 + 3 * math.sqrt(0.05 * 0.95 / ROUNDS))


@pytest.mark.parametrize("seeds, answers", [(3, 96), (5, 300), (10, 500)])
@pytest.mark.parametrize("luck, taste", [(0.0, 0.0), (0.1, 3.0), (1.0, 1.0)])
def test_equal_methods_are_rarely_told_apart(seeds, answers, luck, taste):
    rng = np.random.default_rng(seeds * answers)
    rates = false_calls(rng, ROUNDS, seeds, answers, luck, taste)
    assert all(rate <= ALLOWED for rate in rates.values()), rates


@pytest.mark.parametrize("share", [0.02, 0.98])
def test_nearly_all_right_or_wrong_is_no_exception(share):
    rng = np.random.default_rng(1)
    sides = answered(rng, ROUNDS, 3, 100, 0.3, 1.0, share=share)
    apart = [
        compare(100.0 * a.mean(1), 100.0 * b.mean(1), answers=100).verdict
        != "not told apart"
        for a, b in zip(*sides)
    ]
    assert 100 * np.mean(apart) <= ALLOWED


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("paired", [True, False])
def test_equal_losses_are_rarely_told_apart(seeds, paired):
    rng = np.random.default_rng(seeds)
    batches = rng.normal(0, 3, (ROUNDS, seeds, 1)) * paired  # what paired runs share
    losses = 0.1 + 0.01 * (batches + rng.normal(0, 1, (ROUNDS, seeds, 2)))
    apart = [
        compare(*one.T, loss=True, paired=paired).verdict != "not told apart"
        for one in losses
    ]
    assert 100 * np.mean(apart) <= ALLOWED


def test_unequal_spreads_and_numbers_of_unpaired_seeds():
    rng = np.random.default_rng(2)
    for one, two in itertools.permutations((3, 5, 10), 2):
        first = rng.normal(0, 1, (ROUNDS, one))
        second = rng.normal(0, 4, (ROUNDS, two))
        apart = [
            compare(a, b, loss=True, paired=False).verdict != "not told apart"
            for a, b in zip(first, second)
        ]
        assert 100 * np.mean(apart) <= ALLOWED, (one, two)


@pytest.mark.parametrize("way", ["answers", "percentages", "losses"])
def test_ten_seeds_see_four_standard_errors(way):
    assert four_errors(np.random.default_rng(3), ROUNDS, 10, way) >= 90


def test_pairing_by_seed_removes_what_the_runs_share():
    shared = np.array([0.0, 20.0, 40.0, 60.0])
    better = shared + [5.0, 6.0, 5.0, 6.0]
    assert compare(better, shared).verdict == "ahead"
    assert compare(better, shared, paired=False).verdict == "not told apart"


def test_every_answer_tells_more_than_the_percentages():
    base = np.arange(300) % 10 < 6  # the same questions are right with every seed
    better = base | (np.arange(300) % 25 == 7)
    wins = compare(["".join(map(str, better.astype(int)))] * 3, [100.0 * base] * 3)
    assert wins.verdict == "ahead" and wins.error_of_seeds == 0
    shares = [100 * better.mean()] * 3, [100 * base.mean()] * 3
    assert compare(*shares, answers=300).verdict == "not told apart"


def test_the_margin_is_the_closed_formula():
    a, b = [70.0, 74.0, 75.0], [60.0, 61.0, 68.0]
    found = compare(a, b, answers=100)
    differences = np.subtract(a, b)
    seeds = differences.std(ddof=1) / math.sqrt(3)
    shares = [(73 + 1) / 102, (63 + 1) / 102]
    answers = 100 * math.sqrt(sum(p * (1 - p) / 100 for p in shares))
    assert found.difference == pytest.approx(10)
    assert found.error == pytest.approx(math.hypot(seeds, answers))
    assert found.margin == pytest.approx(math.hypot(4.303 * seeds, 1.96 * answers))


def test_t_quantiles():
    # q where P(|t| < q) = 0.95, for one and two degrees of freedom in closed form
    one, two = math.tan(0.95 * math.pi / 2), 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert [T[1], T[2]] == pytest.approx([one, two], abs=printed(3))
    for freedom in (4, 9, 30):  # Simpson's rule over the density
        x = np.linspace(0, T[freedom], 2001)
        gamma = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        density = gamma / math.sqrt(freedom * math.pi)
        density = density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        weights = np.tile([2.0, 4.0], 1000).tolist()
        area = (density[:-1] @ weights - density[0] + density[-1]) * x[1] / 3
        # q is printed with three decimals, and the tails are thinner than here
        assert 2 * area == pytest.approx(0.95, abs=2 * density[-1] * printed(3))
    assert t_quantile(2.7) == T[2] and t_quantile(1e9) == T[120]


def test_words():
    assert str(compare([70, 72, 71], [60, 61, 62], answers=1000)).startswith("ahead by")
    assert str(compare([0.05, 0.051, 0.052], [0.08, 0.083, 0.082], loss=True)) == (
        "ahead by 0.031 ± 0.003"
    )
    behind = compare([0.08, 0.083, 0.082], [0.05, 0.051, 0.052], loss=True)
    assert behind.verdict == "behind" and "behind by 0.031" in str(behind)
    near = str(compare([70, 80, 72], [69, 75, 78], answers=96))
    assert near.startswith("not told apart (+0 ± ")
    assert str(compare([70], [60], answers=96)) == (
        "not told apart: one seed (+10 points)"
    )
    assert "not told apart" in str(compare([0.5, 0.5], [0.5, 0.5], loss=True))
    assert decimals(3.3, 3.4) == 1 and decimals(0.0042, 0.1) == 3


def test_seeds_in_dicts_pair_by_their_key():
    a, b = {0: 70.0, 1: 80.0, 2: 90.0}, {2: 85.0, 1: 74.0, 0: 65.0, 3: 10.0}
    assert compare(a, b).difference == pytest.approx(16 / 3)
    assert compare(a, b, paired=False).difference == pytest.approx(80 - 58.5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="found 3 and 2"):
        compare([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="no seed"):
        compare({0: 1.0}, {1: 1.0})
    with pytest.raises(ValueError, match="alike"):
        compare(["0101"] * 3, [50.0] * 3)
    with pytest.raises(ValueError, match="differ in length"):
        compare(["0101", "01"], ["0101", "0101"])


def test_bars_draw_every_seed(monkeypatch):
    from minipeft.course import figures

    drawn = []
    monkeypatch.setattr(figures, "finish", lambda ax, **more: drawn.append(ax))
    figures.bars({"one": [60, 62, 70], "two": 50}, "Title", "score (%)")
    (points,) = drawn[0].collections
    assert points.get_offsets()[:, 1].tolist() == [60, 62, 70]
    assert [bar.get_height() for bar in drawn[0].patches] == [64, 50]
