"""Is one method better than another, or were its seeds lucky? One rule for the whole
course."""

import math
from dataclasses import dataclass

import numpy as np

# The 97.5 % quantiles of Student's t, by degrees of freedom; beyond them the normal's.
T = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    12: 2.179,
    15: 2.131,
    20: 2.086,
    30: 2.042,
    60: 2.000,
    120: 1.980,
}
NORMAL = 1.960


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds. `difference` is a minus b; str() gives the verdict in
    words."""

    difference: float
    margin: float  # half of the 95 % interval around the difference
    error: float  # the standard error: both of the next two together
    error_of_seeds: float
    error_of_answers: float
    seeds: int
    loss: bool = False

    @property
    def verdict(self) -> str:
        """ "ahead", "behind" or "not told apart": a, as against b."""
        if not abs(self.difference) > self.margin:
            return "not told apart"
        better = self.difference < 0 if self.loss else self.difference > 0
        return "ahead" if better else "behind"

    def __str__(self):
        unit = "" if self.loss else " points"
        if self.seeds < 2:
            return f"not told apart: one seed ({self.difference:+.3g}{unit})"
        digits = decimals(self.margin, self.difference)
        difference, margin = self.difference, f"± {self.margin:.{digits}f}{unit}"
        if self.verdict == "not told apart":
            return f"not told apart ({difference:+.{digits}f} {margin})"
        return f"{self.verdict} by {abs(difference):.{digits}f} {margin}"


def decimals(margin: float, difference: float) -> int:
    """So many that the margin has a digit that counts, and that a verdict can be seen
    from the two numbers."""
    size = margin or abs(difference)
    if not size or not math.isfinite(size):
        return 0
    digits = max(0, -math.floor(math.log10(size)))
    while digits < 6 and round(abs(difference), digits) == round(margin, digits):
        digits += 1
    if margin < 1 and 0 < abs(difference) and round(difference, digits) == 0:
        digits += 1
    return digits


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, of the next lower entry in the table."""
    return T[max(df for df in T if df <= max(freedom, 1))]


def rights(score) -> np.ndarray:
    """One seed's score as an array: a string of 0 and 1, one for each answer, becomes
    zeros and hundreds; a number stays one number."""
    if isinstance(score, str):
        return 100.0 * (np.frombuffer(score.encode("ascii"), np.uint8) == ord("1"))
    return np.asarray(score, float)


def compare(a, b, *, answers=None, paired=True, loss=False) -> Comparison:
    """Tell whether `a` is better than `b`: print the result for the verdict in words.

    Two trainings of the same method differ by their seed, and a score changes with the
    questions that happen to be asked. A difference counts only when it exceeds what
    both kinds of chance explain:

        error² = (spread of the seeds' differences)² / seeds
               + (spread of the answers' differences)² / answers

    With 3 seeds the spread itself is a guess from three numbers. Student's t allows for
    that: the margin is 4.3 errors instead of 2. A difference is told apart only if it
    exceeds the margin. Of two equal methods, at most one pair in twenty is called
    different by accident; among twenty comparisons expect one such accident.

    a, b     one entry a seed, or {seed: entry}. An entry is a score in per cent; or one
             value for each answer (the string "0110…" of a record's "right", or an
             array), which tells apart far smaller differences; or, with loss=True, a
             loss in nats
    answers  how many test answers a score in per cent stands for. Losses, and scores
             without it, are judged by the seeds alone: for these questions only
    paired   the entries of a and b belong together (same seed, same batches)
    loss     lower is better

    The margin joins the two parts as sqrt((t · seeds)² + (1.96 · answers)²); this is
    exact where one of them dominates. Error rates and power, by simulation:
    benchmarks/results/compare_power.md. Where all answers are known, seeds and
    questions are what readers and cases are to Obuchowski and Rockette (1995).
    """
    first, second = entries(a, b, paired)
    if paired and len(first) != len(second):
        raise ValueError(
            f"paired=True needs as many seeds on either side, found {len(first)} and"
            f" {len(second)}; leave the odd ones out, or pass paired=False"
        )
    if first[0].shape != second[0].shape:
        raise ValueError(
            f"the entries must be alike, found {first[0].shape} and {second[0].shape}"
            " (answers a seed)"
        )
    seed_means = [
        np.array([entry.mean() for entry in side]) for side in (first, second)
    ]
    difference = seed_means[0].mean() - seed_means[1].mean()
    seeds = min(len(first), len(second))
    from_answers = error_of_answers(first, second, answers, loss)
    if seeds < 2:
        inf = math.inf
        return Comparison(difference, inf, inf, inf, from_answers, seeds, loss)
    from_seeds, freedom = error_of_seeds(*seed_means, paired)
    margin = math.hypot(t_quantile(freedom) * from_seeds, NORMAL * from_answers)
    error = math.hypot(from_seeds, from_answers)
    return Comparison(
        float(difference), margin, error, from_seeds, from_answers, seeds, loss
    )


def entries(a, b, paired):
    """Both sides as lists of arrays, one a seed. Of dicts, paired: the seeds that both
    have."""
    if isinstance(a, dict) and isinstance(b, dict):
        common = [seed for seed in a if seed in b] if paired else None
        a = [a[seed] for seed in (common if paired else a)]
        b = [b[seed] for seed in (common if paired else b)]
    first = [rights(entry) for entry in a]
    second = [rights(entry) for entry in b]
    if not first or not second:
        raise ValueError("nothing to compare: no seed on one of the sides")
    shapes = {entry.shape for entry in first}
    if len(shapes) > 1:
        raise ValueError(f"the seeds' entries differ in length: {sorted(shapes)}")
    return first, second


def error_of_seeds(a, b, paired):
    """The standard error that the seeds give, and its degrees of freedom (Welch's if
    the runs are not paired)."""
    if paired:
        return float(np.std(a - b, ddof=1) / math.sqrt(len(a))), len(a) - 1
    one, two = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    parts = one**2 / (len(a) - 1) + two**2 / (len(b) - 1)
    freedom = (one + two) ** 2 / parts if parts else len(a) + len(b) - 2
    return math.sqrt(one + two), freedom


def error_of_answers(first, second, answers, loss):
    """The standard error that the choice of the test questions gives, in the score's
    unit. It does not shrink with more seeds: all of them answer the same questions."""
    if first[0].ndim:  # every answer is known: the same question on both sides
        by_question = np.mean(first, axis=0) - np.mean(second, axis=0)
        return float(np.std(by_question, ddof=1) / math.sqrt(len(by_question)))
    if loss or not answers:
        return 0.0
    # Only the percentages are known: two independent binomials. One success and one
    # failure are added, so that 100 % of 96 is not taken for certain.
    shares = [
        (np.mean(side) / 100 * answers + 1) / (answers + 2) for side in (first, second)
    ]
    return 100 * math.sqrt(sum(p * (1 - p) / answers for p in shares))
