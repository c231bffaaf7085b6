"""How often minipeft.course.compare errs, and what it can tell apart: by simulation.

    python benchmarks/compare_power.py     # writes
      benchmarks/results/compare_power.json and compare_power.md

Two methods answer the same questions with 3, 5 or 10 seeds. A question is easy or hard
(for both, and for one of them alone); a seed is lucky or not. "False": two equal
methods, told apart nevertheless. "Power": one method is better by so many points, or by
four of the rule's standard errors, and the rule says so.
"""

import argparse
import itertools

import numpy as np
from common import RESULTS, facts, save

from minipeft.course.comparison import compare

SEEDS, ANSWERS = (3, 5, 10), (96, 300, 500)
LUCK = (0.0, 0.1, 0.3, 1.0)  # the spread of the seeds, in logits
# the spread of the questions' difficulty for one method alone, in logits
TASTE = (0.0, 1.0, 3.0)
SHARE = 0.7  # of the answers are right, about
GAPS = (2, 5, 10, 15)  # points


def answered(rng, rounds, seeds, answers, luck, taste, gap=0.0, share=SHARE):
    """Two arrays of right and wrong answers, each (rounds, seeds, answers); the first
    method is better by `gap` logits."""
    common = rng.normal(0, 1.5 * taste, (rounds, 1, answers))
    for shift in (gap, 0.0):
        alone = rng.normal(0, taste, (rounds, 1, answers))
        lucky = rng.normal(0, luck, (rounds, seeds, 1))
        logits = np.log(share / (1 - share)) + common + alone + lucky + shift
        yield rng.random(logits.shape) < 1 / (1 + np.exp(-logits))


def drawn(rng, rounds, *case):
    """Pairs of such answers, one for each round, a few hundred rounds at a time."""
    for start in range(0, rounds, 250):
        yield from zip(*answered(rng, min(250, rounds - start), *case))


def ways(a, b):
    """The rule for every answer, for percentages, and for the seeds alone (losses)."""
    n = a.shape[1]
    share_a, share_b = 100.0 * a.mean(1), 100.0 * b.mean(1)
    return {
        "answers": compare(100.0 * a, 100.0 * b),
        "percentages": compare(share_a, share_b, answers=n),
    }


def false_calls(rng, rounds, seeds, answers, luck, taste) -> dict:
    """In how many per cent of the rounds two equal methods are told apart."""
    pairs = drawn(rng, rounds, seeds, answers, luck, taste)
    found = [ways(a, b) for a, b in pairs]

    def apart(way):
        return [one[way].verdict != "not told apart" for one in found]

    return {way: round(100 * float(np.mean(apart(way))), 2) for way in found[0]}


def gap_in_logits(points, luck, taste) -> float:
    """The shift that makes a method better by so many points, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        sides = answered(np.random.default_rng(1), 1, 400, 2000, luck, taste, middle)
        a, b = (100 * side.mean() for side in sides)
        low, high = (middle, high) if a - b < points else (low, middle)
    return middle


def power(rng, rounds, seeds, answers, luck, taste, points) -> dict:
    """In how many per cent of the rounds the better one is called ahead."""
    gap = gap_in_logits(points, luck, taste)
    pairs = drawn(rng, rounds, seeds, answers, luck, taste, gap)
    found = [ways(a, b) for a, b in pairs]

    def share(way):
        return np.mean([one[way].verdict == "ahead" for one in found])

    return {way: round(100 * float(share(way)), 1) for way in found[0]}


def four_errors(rng, rounds, seeds, way) -> float:
    """The power for a difference of four true standard errors of the seeds' mean, for
    losses (normal, no answers), and of the rule's own error, for answers."""
    if way == "losses":
        gains = rng.normal(4 / np.sqrt(seeds), 1, (rounds, seeds))
        calls = [compare(one, 0 * one).verdict for one in gains]
        return round(100 * calls.count("ahead") / rounds, 1)
    found = [ways(a, b)[way] for a, b in drawn(rng, rounds, seeds, 300, 0.3, 1.0)]
    error = float(np.sqrt(np.mean([one.error**2 for one in found])))
    moved = [one.difference + 4 * error > one.margin for one in found]
    return round(100 * float(np.mean(moved)), 1)


def table(record) -> str:
    lines = ["# What `minipeft.course.compare` errs in, and what it can see", ""]
    lines += [f"Made by `{record['command']}`, {record['date']}.", ""]
    lines += ["## Two equal methods told apart, in either direction (% of rounds)", ""]
    chance = 3 * 100 * (0.05 * 0.95 / record["rounds"]) ** 0.5
    lines += [
        f"Of {len(LUCK) * len(TASTE)} spreads of seeds and questions the worst. The"
        f" rule allows 5; the simulation's own chance adds up to {chance:.1f}.",
        "",
    ]
    lines += ["| seeds | answers | every answer known | percentages only |"]
    lines += ["|---|---|---|---|"]
    for seeds, answers in itertools.product(SEEDS, ANSWERS):
        rows = [
            row["false"]
            for row in record["false"]
            if (row["seeds"], row["answers"]) == (seeds, answers)
        ]
        worst = {way: max(row[way] for row in rows) for way in rows[0]}
        lines += [
            f"| {seeds} | {answers} | {worst['answers']:.1f} |"
            f" {worst['percentages']:.1f} |"
        ]
    lines += ["", "## The better method called ahead (% of rounds)", ""]
    lines += ["Seeds and questions vary by a typical amount; 300 answers.", ""]
    lines += ["| better by | seeds | every answer known | percentages only |"]
    lines += ["|---|---|---|---|"]
    for row in record["power"]:
        power = row["power"]
        lines += [
            f"| {row['points']} points | {row['seeds']} | {power['answers']:.0f} |"
            f" {power['percentages']:.0f} |"
        ]
    lines += ["", "## A difference of four standard errors (% called ahead)", ""]
    lines += ["| seeds | every answer known | percentages only | losses |"]
    lines += ["|---|---|---|---|"]
    for seeds, row in record["four_errors"].items():
        lines += [
            f"| {seeds} | {row['answers']:.0f} | {row['percentages']:.0f} |"
            f" {row['losses']:.0f} |"
        ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4000)
    given = parser.parse_args()
    rng, rounds = np.random.default_rng(0), given.rounds
    record = facts() | {"rounds": rounds, "share": SHARE}
    record["false"] = [
        {"seeds": seeds, "answers": answers, "luck": luck, "taste": taste}
        | {"false": false_calls(rng, rounds, seeds, answers, luck, taste)}
        for seeds, answers, luck, taste in itertools.product(
            SEEDS, ANSWERS, LUCK, TASTE
        )
    ]
    record["power"] = [
        {"points": points, "seeds": seeds}
        | {"power": power(rng, rounds, seeds, 300, 0.1, 1.0, points)}
        for points, seeds in itertools.product(GAPS, SEEDS)
    ]
    record["four_errors"] = {
        str(seeds): {
            way: four_errors(rng, rounds, seeds, way)
            for way in ("answers", "percentages", "losses")
        }
        for seeds in SEEDS
    }
    save(RESULTS / "compare_power.json", record)
    (RESULTS / "compare_power.md").write_text(table(record), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
