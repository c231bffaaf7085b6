"""Chapter 07, AdaLoRA: its penalty, the importance of a number, the budget, and the
allocation."""

import random

import torch

from .teacher import checks, compare, need

__all__ = ["allocate", "importance", "orthogonality", "rank_budget"]


@checks(
    "Zero for orthonormal factors, and right for others.",
    "A is (r, d_in) and B is (d_out, r): A @ A.T and B.T @ B are both (r, r).",
)
def orthogonality(function) -> None:
    """function(A, B) -> ||A A^T - I|| + ||B^T B - I||"""
    for _ in range(3):
        r = random.choice([2, 3, 4])
        A = torch.randn(r, 9, dtype=torch.float64).requires_grad_()
        B, eye = (
            torch.randn(12, r, dtype=torch.float64).requires_grad_(),
            torch.eye(r, dtype=torch.float64),
        )
        norm = torch.linalg.norm
        one, two = norm(A @ A.T - eye), norm(B.T @ B - eye)
        got = function(A, B)
        compare(
            got,
            one + two,
            {
                "That is the penalty of A alone: B has one too.": one,
                "That is the penalty of B alone: A has one too.": two,
                "The norms are squared: the penalty is not.": one**2 + two**2,
                "You took A for lying on its side: its ROWS are orthonormal, A @"
                " A.T.": (norm(A.T @ A - torch.eye(9, dtype=torch.float64)) + two),
                "You took B for lying on its side: its COLUMNS are orthonormal, B.T @"
                " B.": (one + norm(B @ B.T - torch.eye(12, dtype=torch.float64))),
                "The identity is missing: factors of length zero would be the best.": (
                    norm(A @ A.T) + norm(B.T @ B)
                ),
                "You take the mean of the two: the formula adds them.": (one + two) / 2,
                "You take the root of the sum of squares: each factor has its own"
                " norm, and the two are added.": ((one**2 + two**2).sqrt()),
                "You add absolute values: the norm is Frobenius', the root of the sum"
                " of the squares.": (
                    (A @ A.T - eye).abs().sum() + (B.T @ B - eye).abs().sum()
                ),
                "That is the spectral norm, the largest singular value: the penalty"
                " takes Frobenius'.": (norm(A @ A.T - eye, 2) + norm(B.T @ B - eye, 2)),
                "You take means of squares: the norm is the root of the sum of"
                " squares.": (
                    (A @ A.T - eye).square().mean() + (B.T @ B - eye).square().mean()
                ),
                "You leave out the diagonal: rows that are orthogonal but of any"
                " length would cost nothing.": (
                    norm((A @ A.T) * (1 - eye)) + norm((B.T @ B) * (1 - eye))
                ),
            },
            "Your penalty",
        )


@checks("Smoothed sensitivity times smoothed uncertainty.")
def importance(function) -> None:
    """function(weights, gradients, beta1, beta2) -> the score after the last step"""

    def score(
        weights,
        gradients,
        beta1,
        beta2,
        early=False,
        signed=False,
        gradient=False,
        away=torch.abs,
    ):
        average = spread = torch.zeros_like(weights[0])
        for w, g in zip(weights, gradients):
            now = g.abs() if gradient else w * g if signed else (w * g).abs()
            before, average = average, beta1 * average + (1 - beta1) * now
            spread = beta2 * spread + (1 - beta2) * away(
                now - (before if early else average)
            )
        return average, spread

    def late_start(weights, gradients, beta1, beta2):
        average, spread = (
            (weights[0] * gradients[0]).abs(),
            torch.zeros_like(weights[0]),
        )
        for w, g in zip(weights[1:], gradients[1:]):
            now = (w * g).abs()
            average = beta1 * average + (1 - beta1) * now
            spread = beta2 * spread + (1 - beta2) * (now - average).abs()
        return average, spread

    for _ in range(3):
        steps = random.randint(3, 6)
        weights = [torch.randn(3, 4, dtype=torch.float64) for _ in range(steps)]
        gradients = [torch.randn(3, 4, dtype=torch.float64) for _ in range(steps)]
        betas = random.choice([(0.85, 0.7), (0.6, 0.9)])
        average, spread = score(weights, gradients, *betas)
        last = (weights[-1] * gradients[-1]).abs()

        def times(pair):
            return pair[0] * pair[1]

        sizes = torch.stack([(w * g).abs() for w, g in zip(weights, gradients)])
        mean = sizes.mean(0)
        deviation = (sizes - mean).abs().mean(0)
        compare(
            function(list(weights), list(gradients), *betas),
            average * spread,
            {
                "The uncertainty is missing: the score is the product of the two"
                " averages.": average,
                "That is the uncertainty alone: the sensitivity is missing.": spread,
                "You add the two: the score is their product.": average + spread,
                "You use the last step alone: smooth over all of them.": last,
                "The uncertainty compares with the average from before this step; it"
                " should be the one after.": times(
                    score(weights, gradients, *betas, early=True)
                ),
                "Sensitivity is |w · g|: without the absolute value pluses and"
                " minuses cancel.": times(
                    score(weights, gradients, *betas, signed=True)
                ),
                "That is the size of the gradient: sensitivity is |w · gradient|.": (
                    times(score(weights, gradients, *betas, gradient=True))
                ),
                "The two betas are swapped: β₁ smooths the sensitivity, β₂ the"
                " uncertainty.": times(score(weights, gradients, *betas[::-1])),
                "β and 1 - β are swapped: the old average has β.": times(
                    score(weights, gradients, 1 - betas[0], 1 - betas[1])
                ),
                "The uncertainty lacks its absolute value: deviations up and down"
                " cancel.": times(score(weights, gradients, *betas, away=lambda x: x)),
                "The uncertainty squares the deviation: it takes the absolute value.": (
                    times(score(weights, gradients, *betas, away=torch.square))
                ),
                "Your average starts at the first sensitivity: both averages start at"
                " zero.": times(late_start(weights, gradients, *betas)),
                "You take plain means over the steps: both are smoothed, with β₁ and"
                " β₂.": mean * deviation,
                "You add up the scores of all steps: only the one after the last step"
                " counts.": sum(
                    times(score(weights[:t], gradients[:t], *betas))
                    for t in range(1, steps + 1)
                ),
            },
            "Your score",
        )


@checks("The start's before, the target's after, and a cubic curve between.")
def rank_budget(function) -> None:
    """function(t, b0, bT, tinit, tfinal, total) -> int"""
    for _ in range(3):
        b0, bT = random.randint(80, 120), random.randint(20, 40)
        tinit, tfinal, total = (
            random.randint(5, 12),
            random.randint(15, 25),
            random.randint(90, 120),
        )
        steps = total - tinit - tfinal

        def curve(t, power=3, start=tinit, length=steps):
            rest = min(max(1 - (t - start) / length, 0), 1)
            return int(bT + (b0 - bT) * rest**power)

        middle = tinit + steps // 3
        for t in (0, tinit, middle, tinit + steps // 2, total - tfinal, total):
            got = function(t, b0, bT, tinit, tfinal, total)
            need(
                got is not None, "Your budget is None: is there a `return` at the end?"
            )
            right = curve(t)
            if got == right and isinstance(got, int):
                continue
            need(
                int(got) != right,
                "The value is right, but not an integer: round it down with int().",
            )
            done = min(max((t - tinit) / steps, 0), 1)
            need(
                got not in [int(top * (1 - done) ** 3) for top in (b0 - bT, b0)],
                "The target bT is missing: the curve falls to bT, not to zero.",
            )
            need(
                t > tinit,
                f"Before tinit nothing is pruned: at t = {t} the budget is b0.",
            )
            need(
                t < total - tfinal,
                f"In the last tfinal steps the budget is bT: at t = {t} you have"
                f" {got}.",
            )
            need(
                got != curve(t, 1),
                "Your curve is a straight line: the share that is left is cubed.",
            )
            need(
                got != curve(t, 2),
                "Your curve is a square: the share that is left is cubed.",
            )
            need(
                got != curve(t, 3, 0, total - tfinal),
                "The fall starts at tinit, not at 0.",
            )
            need(
                got != curve(t, 3, tinit, total - tinit),
                "The fall ends tfinal steps before the end: divide by "
                "T - tinit - tfinal.",
            )
            need(
                got != int(b0 - (b0 - bT) * done**3),
                "Your budget falls the other way round: slowly at first. It is "
                "the share that is left that is cubed, not the share done.",
            )
            need(
                got != right + 1,
                "You round up, or to the nearest: round down with int().",
            )
            need(
                False,
                f"At t = {t} (b0 = {b0}, bT = {bT}, tinit = {tinit}, tfinal = {tfinal},"
                f" total = {total}) you have {got}, and it is {right}.",
            )


def check_budget(function, scores, budget: int) -> None:
    """Nothing, one triplet, or all of them."""
    got = function(dict(scores), budget)
    every = torch.cat([torch.as_tensor(got[name]).flatten() for name in scores])
    best = torch.cat(list(scores.values())).argsort(descending=True)[:budget]
    wanted = torch.zeros(len(every), dtype=torch.bool)
    wanted[best] = True
    need(
        torch.equal(every.bool(), wanted),
        f"With a budget of {budget} (of {len(every)} triplets) {budget} are kept, the"
        f" best ones; you keep {int(every.bool().sum())}.",
    )


@checks(
    "The best triplets of all matrices together, and exactly as many as the budget"
    " allows."
)
def allocate(function) -> None:
    """function({name: scores}, budget) -> {name: [bool]}"""
    for _ in range(3):
        sizes = [random.randint(3, 6) for _ in range(4)]
        values = torch.randperm(sum(sizes)).double() + 1
        scores = {
            f"layer {i}": part * (10.0 if i == 0 else 1.0)
            for i, part in enumerate(values.split(sizes))
        }
        scores["layer 0"] += 0.5  # no two scores are equal
        budget = sum(sizes) // 3
        got = function({name: score.clone() for name, score in scores.items()}, budget)
        need(
            isinstance(got, dict) and set(got) == set(scores),
            "Return a dictionary with the same names.",
        )
        need(
            all(one in (False, True) for mask in got.values() for one in mask),
            "Booleans are expected, True for a triplet that is kept: you return other"
            " numbers.",
        )
        kept = {name: [bool(one) for one in got[name]] for name in scores}
        need(
            all(len(kept[name]) == len(scores[name]) for name in scores),
            "One boolean for each triplet is expected.",
        )
        order = torch.cat(list(scores.values())).sort(descending=True).values
        right = {
            name: (score >= order[budget - 1]).tolist()
            for name, score in scores.items()
        }
        if kept == right:
            for some in (0, 1, sum(sizes)):
                check_budget(function, scores, some)
            continue
        count = sum(map(sum, kept.values()))
        need(
            kept != {name: [not one for one in mask] for name, mask in right.items()},
            "The booleans are the wrong way round: True is for what is kept.",
        )
        lowest = {
            name: (score <= order[-budget]).tolist() for name, score in scores.items()
        }
        need(kept != lowest, "You keep the triplets that matter least.")
        need(
            len({sum(mask) for mask in kept.values()}) > 1,
            f"You keep {sum(kept['layer 0'])} in every matrix: the budget is for all of"
            " them together.",
        )
        need(
            count != budget - 1,
            "One too few: the threshold itself belongs to a triplet that is kept.",
        )
        need(
            count != budget + 1,
            "One too many: check whether you count from 0 or from 1.",
        )
        need(count == budget, f"You keep {count} triplets, and the budget is {budget}.")
        shares = {name: score / score.sum() for name, score in scores.items()}
        bar = torch.cat(list(shares.values())).sort(descending=True).values[budget - 1]
        need(
            kept != {name: (share >= bar).tolist() for name, share in shares.items()},
            "You divide each matrix's scores by their sum first: they are compared as"
            " they are, over all matrices.",
        )
        need(
            False,
            "The number is right, but they are not the best ones of all matrices"
            " together.",
        )
