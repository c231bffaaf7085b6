"""Chapter 07, AdaLoRA: the faults of an allocator, the importance of a number, numbers
predicted, when the search pays, triplets made orthonormal, and an adapter that prunes
itself."""

import copy
import random
from itertools import combinations
from statistics import fmean

import torch

from ...methods.adalora import AdaLora
from ..comparison import compare as told_apart
from .chapter06 import Largest
from .kinds import (
    LOOKS,
    TRAPS,
    TURNED,
    Built,
    Choices,
    alike_answers,
    judge_numbers,
    trap,
)
from .practice import python_bytes
from .sandbox import unwatched
from .slips import Formula
from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "allocate",
    "importance",
    "orthonormal_triplets",
    "predict_adalora",
    "self_pruning",
    "when_it_pays",
]


def sensitivity_and_uncertainty(weights, gradients, beta1, beta2):
    I = U = torch.zeros_like(weights[0])
    for w, g in zip(weights, gradients):
        now = (w * g).abs()
        I = beta1 * I + (1 - beta1) * now
        U = beta2 * U + (1 - beta2) * (now - I).abs()
    return I * U


def averages(
    weights,
    gradients,
    betas,
    size=lambda w, g: (w * g).abs(),
    away=torch.abs,
    early=False,
    start=None,
) -> tuple:
    """Smoothed sensitivity and smoothed uncertainty. What comes after betas does a step
    as a slip does it; early: the uncertainty compares with the average from before the
    step; start: where the sensitivity's average starts."""
    beta1, beta2 = betas
    spread = torch.zeros_like(weights[0])
    average = spread if start is None else start
    for w, g in zip(weights, gradients):
        now = size(w, g)
        before, average = average, beta1 * average + (1 - beta1) * now
        off = now - (before if early else average)
        spread = beta2 * spread + (1 - beta2) * away(off)
    return average, spread


def slips_of_importance(weights, gradients, betas) -> dict:
    average, spread = averages(weights, gradients, betas)
    products = [w * g for w, g in zip(weights, gradients)]
    sizes = torch.stack(products).abs()
    mean = sizes.mean(0)

    def score(weights=weights, gradients=gradients, betas=betas, **slip):
        average, spread = averages(weights, gradients, betas, **slip)
        return average * spread

    return {
        "The uncertainty is missing: the score is the product of the two averages.": (
            average
        ),
        "That is the uncertainty alone: the sensitivity is missing.": spread,
        "You add the two: the score is their product.": average + spread,
        "You use the last step alone: smooth over all of them.": sizes[-1],
        "The uncertainty compares with the average from before this step; it should be"
        " the one after.": score(early=True),
        "Sensitivity is |w · g|: without the absolute value pluses and minuses"
        " cancel.": score(size=torch.mul),
        "That is the size of the gradient: sensitivity is |w · gradient|.": score(
            size=lambda w, g: g.abs()
        ),
        "β₁ smooths both: the uncertainty has β₂.": score(betas=(betas[0], betas[0])),
        "β₂ smooths both: the sensitivity has β₁.": score(betas=(betas[1], betas[1])),
        "You leave the first step out.": score(weights[1:], gradients[1:]),
        "You square w · g: sensitivity is its absolute value.": score(
            products, products
        ),
        "The two betas are swapped: β₁ smooths the sensitivity, β₂ the uncertainty.": (
            score(betas=betas[::-1])
        ),
        "β and 1 - β are swapped: the old average has β.": score(
            betas=(1 - betas[0], 1 - betas[1])
        ),
        "The uncertainty lacks its absolute value: deviations up and down cancel.": (
            score(away=lambda off: off)
        ),
        "The uncertainty squares the deviation: it takes the absolute value.": score(
            away=torch.square
        ),
        "Your average starts at the first sensitivity: both averages start at zero.": (
            score(weights[1:], gradients[1:], start=sizes[0])
        ),
        "You take plain means over the steps: both are smoothed, with β₁ and β₂.": (
            mean * (sizes - mean).abs().mean(0)
        ),
        "You add up the scores of all steps: only the one after the last step"
        " counts.": sum(
            score(weights[:t], gradients[:t]) for t in range(1, len(weights) + 1)
        ),
    }


@checks("Smoothed sensitivity times smoothed uncertainty.")
def importance(function) -> None:
    """function(weights, gradients, beta1, beta2) -> the score after the last step"""
    for _ in range(3):
        steps = random.randint(3, 6)
        weights = [torch.randn(3, 4, dtype=torch.float64) for _ in range(steps)]
        gradients = [torch.randn(3, 4, dtype=torch.float64) for _ in range(steps)]
        betas = random.choice([(0.85, 0.7), (0.6, 0.9)])
        average, spread = averages(weights, gradients, betas)
        compare(
            function(list(weights), list(gradients), *betas),
            average * spread,
            slips_of_importance(weights, gradients, betas),
            "Your score",
            formula=Formula(sensitivity_and_uncertainty, weights, gradients, *betas),
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


def check_ties(function) -> None:
    """Where scores are equal, any of the equal ones may stay, and not one too many."""
    for values, budget in (((0, 0, 0, 0, 0), 2), ((3, 1, 1, 1, 0), 2)):
        scores = {
            "a": torch.tensor(values[:2]).double(),
            "b": torch.tensor(values[2:]).double(),
        }
        got = function(copy.deepcopy(scores), budget)
        kept = [bool(one) for name in scores for one in got[name]]
        need(
            sum(kept) == budget,
            f"With equal scores, {values}, and a budget of {budget} you keep"
            f" {sum(kept)}. A threshold keeps all that are equal to it: take exactly as"
            " many as the budget allows, whichever of the equal ones.",
        )
        lost = [v for v, one in zip(values, kept) if not one]
        least = min(v for v, one in zip(values, kept) if one)
        need(least >= max(lost), "With equal scores a better triplet is pruned.")


def check_close_scores(function) -> None:
    """Scores that differ by some hundred thousandths are not equal."""
    values = 1e-9 * (1 + 1e-5 * torch.randperm(12).double())
    scores = {"a": values[:5], "b": values[5:]}
    got = function(copy.deepcopy(scores), 4)
    kept = torch.tensor([bool(one) for name in scores for one in got[name]])
    best = torch.zeros_like(kept)
    best[values.argsort(descending=True)[:4]] = True
    need(
        torch.equal(kept, best),
        "Where scores differ by some hundred thousandths of their size, a better"
        " triplet is pruned: do you round, or compute in 16 bits?",
    )


def drawn_scores() -> dict:
    """{name: scores}, small and all different, of four matrices in no order."""
    sizes = [random.randint(3, 6) for _ in range(4)]
    values = torch.randperm(sum(sizes)).double() + 1
    scores = {
        f"layer {i}": part * (10.0 if i == 0 else 1.0)
        for i, part in zip((2, 0, 3, 1), values.split(sizes))
    }
    scores["layer 0"] += 0.5  # no two scores are equal
    return {name: 1e-9 * score for name, score in scores.items()}


def best_of_all(scores: dict, budget: int) -> dict:
    """{name: [bool]}, True for the `budget` largest scores of all matrices."""
    order = torch.cat(list(scores.values())).sort(descending=True).values
    return {
        name: (score >= order[budget - 1]).tolist() for name, score in scores.items()
    }


def booleans(got, scores) -> dict:
    """What the learner keeps, {name: [bool]}, in the order of scores."""
    need(
        isinstance(got, dict) and set(got) == set(scores),
        "Return a dictionary with the same names.",
    )
    single = [name for name, mask in got.items() if isinstance(mask, bool)]
    need(
        not single,
        f"{single[:1]}: one boolean, where each triplet of the matrix has its own: give"
        " a list.",
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
    return kept


def name_the_slip(kept, scores, budget: int) -> None:
    """Raise what is wrong with a choice of triplets that are not the best ones."""
    right = best_of_all(scores, budget)
    need(
        kept != {name: [not one for one in mask] for name, mask in right.items()},
        "The booleans are the wrong way round: True is for what is kept.",
    )
    lowest = best_of_all({name: -score for name, score in scores.items()}, budget)
    need(kept != lowest, "You keep the triplets that matter least.")
    need(
        len({sum(mask) for mask in kept.values()}) > 1,
        f"You keep {sum(kept['layer 0'])} in every matrix: the budget is for all of"
        " them together.",
    )
    count = sum(map(sum, kept.values()))
    need(
        count != budget - 1,
        "One too few: the threshold itself belongs to a triplet that is kept.",
    )
    need(count != budget + 1, "One too many: check whether you count from 0 or from 1.")
    need(count == budget, f"You keep {count} triplets, and the budget is {budget}.")
    shares = {name: score / score.sum() for name, score in scores.items()}
    need(
        kept != best_of_all(shares, budget),
        "You divide each matrix's scores by their sum first: they are compared as they"
        " are, over all matrices.",
    )
    raise Wrong(
        "The number is right, but they are not the best ones of all matrices together."
    )


@checks(
    "The best triplets of all matrices together, and exactly as many as the budget"
    " allows, with ties and without."
)
def allocate(function) -> None:
    """function({name: scores}, budget) -> {name: [bool]}"""
    for _ in range(3):
        scores = drawn_scores()
        total = sum(map(len, scores.values()))
        budget = total // 3
        got = function({name: score.clone() for name, score in scores.items()}, budget)
        kept = booleans(got, scores)
        if kept != best_of_all(scores, budget):
            name_the_slip(kept, scores, budget)
        for some in (0, 1, total):
            check_budget(function, scores, some)
        check_ties(function)
        check_close_scores(function)


# ---- predictions ---------------------------------------------------------------------


@checks(
    "All of them: a cube leaves an eighth at half way, the score is a product of two"
    " smoothed sizes, and zeros cost memory."
)
def predict_adalora(predicted, first=200, last=100, c=2) -> None:
    """predicted: {case: number}; first and last are budgets, c is a factor."""
    judge_numbers(predicted, adalora_cases(first, last, c), near=0.015)


def smoothed(sensitivities, beta=0.85) -> float:
    average = spread = 0.0
    for now in sensitivities:
        average = beta * average + (1 - beta) * now
        spread = beta * spread + (1 - beta) * abs(now - average)
    return average * spread


def numbers_after_pruning() -> float:
    """Trained parameters of an AdaLora with half of its triplets pruned, as a share of
    those before."""
    adapter = AdaLora(9, 7, [True] * 6, 1.0)
    before = sum(p.numel() for p in adapter.parameters())
    with torch.no_grad():
        adapter.lora_E[3:] = 0
    adapter.kept[3:] = [False] * 3
    return sum(p.numel() for p in adapter.parameters()) / before


def adalora_cases(first: int, last: int, c: float) -> dict:
    """{case: (number, what to think of)}, by running the schedule and the scores."""
    steps = 1000

    def budget(t, total=steps):
        return last + (first - last) * max(1 - t / total, 0) ** 3

    gone = next(t for t in range(steps) if budget(t) <= last + (first - last) / 4)
    noise = [abs(random.gauss(0, 1)) for _ in range(200)]
    B, A = (torch.linalg.qr(torch.randn(9, 3).double()).Q for _ in range(2))
    E = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    without = E * torch.tensor([1, 0, 1])
    size, less = ((c * (B * e) @ A.T).square().sum().item() for e in (E, without))
    return {
        "half way": (
            budget(steps / 2),
            "Half of the time is left, and the share that is left is cubed.",
        ),
        "three quarters gone": (gone / steps, "Solve (1 - x)³ = 1/4 for x."),
        "total too large": (
            budget(steps, 2 * steps),
            "At the end of the training the schedule is half way.",
        ),
        "steady": (
            smoothed([1.0] * 300),
            "The uncertainty is the smoothed distance from the average, and that"
            " becomes zero; the score is a product.",
        ),
        "alternating": (
            smoothed([0.0, 2.0] * 150, beta=0.5),
            "After a 2 the average is above 1, so the 2 is less than 1 away from it:"
            " a = (b + 2) / 2 and b = a / 2, a after a 2 and b after a 0.",
        ),
        "larger gradients": (
            smoothed([c * one for one in noise]) / smoothed(noise),
            "Both factors of the score grow with the gradient.",
        ),
        "what is lost": (
            size - less,
            "With orthonormal factors ‖ΔW‖² is s² times the sum of E_i².",
        ),
        "memory": (
            numbers_after_pruning(),
            "Pruning writes zeros into E: rows, columns, gradients and the optimizer's"
            " states stay, until the triplets are dropped.",
        ),
    }


# ---- when the search pays ------------------------------------------------------------

PAYS = ("AdaLoRA", "LoRA")
LADDER = (5e-3, 1e-2, 2e-2, 5e-2)


@checks(
    "Each method at its own best rate for each length of training, chosen on"
    " validation, and judged by all answers of all seeds."
)
def when_it_pays(function, one="AdaLoRA", other="LoRA") -> None:
    """function(runs) -> {steps: verdict of one against other}."""
    choices = Choices()
    for runs in runs_drawn(one, other):
        got = function([dict(run) for run in runs])
        some_lengths(got, runs, one, other, choices)
    choices.judge()


def runs_drawn(one: str, other: str) -> list:
    """Three lists of runs, for which each slip gives other verdicts than the right
    way, and than the other slips."""
    for _ in range(1000):
        found = [some_runs(one, other) for _ in range(3)]
        ways = [list(zip(*w)) for w in zip(*(all_ways(r, one, other) for r in found))]
        if all(not {*map(str, a)} & {*map(str, b)} for a, b in combinations(ways, 2)):
            return found
    raise RuntimeError("no such runs were found")


def all_ways(runs, one: str, other: str) -> list:
    """The right verdicts, and those of each form of each slip."""
    ways = [[right_way(grouped(runs), one, other)]]
    for wrong in wrong_ways(runs, one, other).values():
        ways.append(wrong if isinstance(wrong, list) else [wrong])
    return [[dict(sorted(form.items())) for form in forms] for forms in ways]


def some_runs(one: str, other: str) -> list:
    """Each method with four lengths at four rates with three seeds. Which rate is best
    in validation is drawn, which one only seems so, and how well they do on the
    test. At one length, `None`, a seed is good for both methods, or for neither."""
    shares = random.sample([(0.3, 0.75), (0.6, 0.52), (0.85, 0.45), None], 4)
    runs = []
    for length, pair in zip((50, 100, 300, 1000), shares):
        places = random.sample(range(80), 80)
        for method, share, lead in zip((one, other), pair or (0.5, 0.5), (10, 0)):
            own = random.sample(LADDER, 4)
            valid = dict(zip(own, trap(random.choice(list(TRAPS)), 0.2, 0.02)))
            for lr in LADDER:
                rights = share if lr == own[0] else random.choice((0.15, 0.5, 0.95))
                losses = valid.get(lr) or [random.uniform(0.32, 0.5) for _ in range(3)]
                answers = alike_answers(rights, 80)
                if pair is None and lr == own[0]:
                    answers = leading_answers(places, lead)
                for seed, (loss, right) in enumerate(zip(losses, answers)):
                    found = dict(method=method, steps=length, lr=lr, seed=seed)
                    runs.append(found | {"valid_loss": loss, "right": right})
    random.shuffle(runs)
    return runs


def leading_answers(places, lead: int) -> list:
    """For three seeds, a bad one, a middling one and a good one, which questions are
    right: the first ones in `places`, and `lead` more."""
    return [
        "".join("1" if place < right + lead else "0" for place in places)
        for right in (14, 35, 58)
    ]


def grouped(runs, by_seed=True) -> dict:
    """{(method, steps): {rate: its runs, by seed or as they come}}"""
    groups = {}
    for run in sorted(runs, key=lambda run: by_seed and run["seed"]):
        rates = groups.setdefault((run["method"], run["steps"]), {})
        rates.setdefault(run["lr"], []).append(run)
    return groups


def verdicts(groups, one, other, rate, score=str, **settings) -> dict:
    """rate(method, steps) -> the rate that is chosen; score: what a string of answers
    becomes; settings: `compare`'s."""
    found = {}
    for steps in {steps for _, steps in groups}:
        answers = [
            [score(run["right"]) for run in groups[method, steps][rate(method, steps)]]
            for method in (one, other)
        ]
        found[steps] = told_apart(*answers, **settings).verdict
    return found


def best_rate(rates: dict, look=fmean, choose=min) -> float:
    """The rate that is best by look(the validation losses of its seeds)."""
    return choose(rates, key=lambda lr: look([run["valid_loss"] for run in rates[lr]]))


def best_on_test(rates: dict) -> float:
    return max(rates, key=lambda lr: sum(r["right"].count("1") for r in rates[lr]))


def all_lengths(groups, method) -> dict:
    """{rate: its runs of all lengths}"""
    found = {}
    for (name, _), rates in groups.items():
        for lr, runs in rates.items() if name == method else ():
            found.setdefault(lr, []).extend(runs)
    return found


def percent(answers: str) -> float:
    return 100 * answers.count("1") / len(answers)


def right_way(groups, one, other, score=str, **settings) -> dict:
    def rate(method, steps):
        return best_rate(groups[method, steps])

    return verdicts(groups, one, other, rate, score, **settings)


def wrong_ways(runs, one, other) -> dict:
    """{message: the verdicts that a slip gives}"""
    groups = grouped(runs)
    right = right_way(groups, one, other)
    questions = len(runs[0]["right"])
    rates = {
        "You choose the rates on the test answers: then they cannot judge any more."
        " Choose by the validation loss.": lambda *case: best_on_test(groups[case]),
        "You give both methods one rate: each has its own best.": (
            lambda method, steps: best_rate(groups[one, steps])
        ),
        "You choose one rate for all lengths of training: each length has its own"
        " best.": lambda method, steps: best_rate(all_lengths(groups, method)),
        "You take the rate with the highest validation loss: lower is better.": (
            lambda *case: best_rate(groups[case], choose=max)
        ),
    }
    found = {text: verdicts(groups, one, other, rate) for text, rate in rates.items()}
    for text, looks in LOOKS.items():
        found[text] = [
            verdicts(groups, one, other, lambda *case: best_rate(groups[case], look))
            for look in looks
        ]
    found[
        "You compare percentages, and the rule no longer knows how many answers they"
        " stand for: give `compare` the strings themselves."
    ] = right_way(groups, one, other, percent)
    found[
        "You lose which answers belong together: the rule compares seed by seed and"
        " question by question. The runs come in any order: give `compare` the strings"
        " by seed."
    ] = [
        right_way(grouped(runs, by_seed=False), one, other),
        right_way(groups, one, other, paired=False),
        right_way(groups, one, other, percent, answers=questions),
    ]
    found[
        "Your verdicts are turned round: compare(a, b) says whether *a* is ahead, and"
        " right answers are not a loss."
    ] = {steps: TURNED[word] for steps, word in right.items()}
    return found


def some_lengths(got, runs, one, other, choices) -> None:
    lengths = {run["steps"] for run in runs}
    need(
        isinstance(got, dict) and set(got) == lengths,
        f"Return a verdict for each number of steps, {{{min(lengths)}: …}}; you return"
        f" {got!r}.",
    )
    groups = grouped(runs)
    right = right_way(groups, one, other)
    steps = next((steps for steps in right if got[steps] != right[steps]), None)
    choices.add(
        got,
        right,
        wrong_ways(runs, one, other),
        f"At {steps} steps you say {got.get(steps)!r}, and the course's rule says"
        f" {right.get(steps)!r}: each method at the rate with the lowest mean"
        " validation loss, and then `compare` on the answers of all seeds.",
    )


# ---- orthonormal triplets ------------------------------------------------------------


@checks(
    "The same update with orthonormal factors, largest first, and no matrix of W's size"
    " on the way: now each triplet can be pruned alone.",
    "B is (d_out, r), E is (r,), A is (r, d_in): B diag(E) A is B * E @ A.",
)
def orthonormal_triplets(function) -> None:
    """function(B, E, A) -> (B, E, A) with the same product."""
    wide = [torch.randn(*shape) for shape in ((400, 3), (3,), (3, 300))]
    for d_out, d_in, r, kind in (
        (30, 20, 4, "any"),
        (20, 30, 1, "any"),
        (25, 25, 5, "pruned"),
        (24, 32, 3, "float32"),
    ):
        B = torch.randn(d_out, r) + 0.8 * torch.randn(d_out, 1)  # they overlap
        A = torch.randn(r, d_in) + 0.8 * torch.randn(1, d_in)
        E = torch.randn(r)
        if kind == "pruned":
            E[1] = 0
        given = [B, E, A] if kind == "float32" else [B.double(), E.double(), A.double()]
        got = function(*[part.clone() for part in given])
        with Largest(torch.empty(d_out, d_in).shape) as largest:
            unwatched(function)(*[part.clone() for part in given])
        one_decomposition(got, *given)
        numpys = python_bytes(unwatched(function), *[part.clone() for part in wide])
        need(
            not largest.made and numpys < 4 * 400 * 300,
            "Right, but you form a matrix as large as W. Take each thin factor apart by"
            " itself: what is left between the two is small.",
        )


def one_decomposition(got, B, E, A) -> None:
    need(
        isinstance(got, tuple | list)
        and len(got) == 3
        and all(isinstance(part, torch.Tensor) for part in got),
        "Return three tensors: B (d_out, r), E (r,), A (r, d_in).",
    )
    for name, part, wanted in zip("BEA", got, (B, E, A)):
        need(
            part.shape == wanted.shape,
            f"{name} should have the shape {tuple(wanted.shape)}; yours has"
            f" {tuple(part.shape)}.",
        )
    Q, S, V = (part.double() for part in got)
    whole, eye = ((B * E) @ A).double(), torch.eye(len(E), dtype=torch.float64)
    made = Q * S @ V
    if not same(made, whole):
        need(
            not same(made, (B @ A).double()),
            "E is lost on the way: it weighs the triplets.",
        )
        need(
            not same(Q @ V, whole),
            "The singular values stand in a factor and in E: once is enough.",
        )
    need(
        same(made, whole),
        "B diag(E) A is another update than before: it has to stay what it was.",
    )
    need(
        same(V @ V.T, eye) and same(Q.T @ Q, eye),
        "The update is right, but the factors are not orthonormal: "
        + (
            "their columns and rows have the length 1 and still overlap."
            if same((V @ V.T).diagonal(), eye.diagonal())
            and same((Q.T @ Q).diagonal(), eye.diagonal())
            else "B^T B and A A^T are the identity."
        ),
    )
    need(
        bool((S >= -1e-9).all()),
        "The update is right, but some entries of E are negative: give the sign to the"
        " row or to the column.",
    )
    need(
        bool((S[:-1] >= S[1:] - 1e-6 * S.abs().max()).all()),
        "The update is right, but E is not sorted, largest first.",
    )


# ---- an adapter that prunes itself ---------------------------------------------------


def triplets(A, B, E, alpha, r):
    return alpha / r * B * E @ A


@checks(
    "Triplets that start silent, and a pruning that keeps the largest and leaves the"
    " parameters themselves in place.",
    "A is (r, d_in), E is (r,), B is (d_out, r).",
)
def self_pruning(config_class) -> None:
    """config_class(target_modules=..., r=..., lora_alpha=...), a LayerConfig."""
    orders = Choices()
    for d_in, d_out, r, alpha in ((9, 7, 4, 6), (6, 8, 3, 3), (7, 7, 5, 2)):
        built = Built(config_class, d_in, d_out, r=r, lora_alpha=alpha)
        built.model.train(r != 3)  # pruning does not ask whether one trains
        built.check_parameters({"A": (r, d_in), "B": (d_out, r), "E": (r,)})
        built.check_start()
        A, B, E = (getattr(built.adapter, name) for name in "ABE")
        need(
            bool((E == 0).all()) and bool((A != 0).all()) and bool((B != 0).all()),
            "E starts at zero, and A and B with random numbers: else either the model"
            " changes at the start, or nothing gets a gradient.",
        )
        need(
            bool((A != A[:1]).any()) and bool((B != B[:, :1]).any()),
            "All rows of A, or all columns of B, are the same: make them random.",
        )
        built.fill()
        s = alpha / r
        mistakes = {
            "The scale α/r is missing.": B * E @ A,
            "You multiply by α: divide by r.": alpha * B * E @ A,
            "The scale is upside down: it is α/r.": r / alpha * B * E @ A,
            "E has lost its sign.": s * B * E.abs() @ A,
            "E has no effect.": s * B @ A,
            "E is in it twice.": s * B * E**2 @ A,
            "delta is the new weight itself: return what is added to W.": built.W
            + s * B * E @ A,
        }
        formula = Formula(triplets, A, B, E, alpha, r)
        built.compare(s * B * E @ A, mistakes, formula=formula)
        check_pruning(built, s, orders)
        more = [name for name in built.adapter.state_dict() if name not in "ABE"]
        need(not more, f"It saves more than A, E and B: {', '.join(more)}.")
    orders.judge()
    Built(config_class, 8, 10, r=3, lora_alpha=6).check_learning(steps=60)


def check_pruning(built, s, orders) -> None:
    """prune(keep) in steps: fewer and fewer are left, and the scale s is what it was.
    orders: which ones stay, judged when all layers have been seen."""
    adapter = built.adapter
    A, B, E = adapter.A, adapter.B, adapter.E
    need(callable(getattr(adapter, "prune", None)), "I look for a method prune(keep).")
    with torch.no_grad():  # an E that is large with a short row and column
        E[0] = 9.0
        A[0] *= 1e-4
        spread(A[1:], B[:, 1:].T, E[1:])
    built.slot(built.x).square().sum().backward()  # as a step of training leaves it
    for keep in range(len(E), -1, -1):
        one_pruning(built, (A, B, E), s, keep, orders)
    E.grad = None
    built.slot(built.x).square().sum().backward()
    need(
        E.grad is not None and bool((E.grad != 0).all()),
        "After pruning some E_i get no gradient any more (a mask or a hook?): a triplet"
        " may come back.",
    )


def one_pruning(built, parts, s, keep: int, orders) -> None:
    """prune(keep) changes E alone, in place; parts: the parameters A, B and E."""
    (A, B, E), adapter = parts, built.adapter
    before = E.detach().clone()
    factors = A.detach().clone(), B.detach().clone()
    adapter.prune(keep)
    need(
        adapter.E is E and adapter.A is A and adapter.B is B,
        "prune makes new parameters: the optimizer still has the old ones, and trains"
        " nothing any more. Write zeros into E in place.",
    )
    need(E.requires_grad, "After pruning E is frozen: a triplet may come back.")
    need(
        torch.equal(A, factors[0]) and torch.equal(B, factors[1]),
        "prune changes A or B: a triplet whose E_i is zero keeps its row and its"
        " column, and may come back.",
    )
    kept = set((E.detach() != 0).nonzero().flatten().tolist())
    need(len(kept) == keep, f"prune({keep}) leaves {len(kept)} of {len(E)} triplets.")
    add_order(orders, kept, before, *factors)
    need(
        torch.equal(E.detach()[sorted(kept)], before[sorted(kept)]),
        "prune changes the E of triplets that stay.",
    )
    need(
        same(built.delta(), s * (B * E @ A).detach()),
        "After pruning the update has another scale: α/r stays what it was, as the"
        " triplets that are left were trained with it.",
    )


def add_order(orders, kept: set, E, A, B) -> None:
    """Note which triplets are kept; E, A and B: what they were before the pruning."""
    long, wide = A.norm(dim=1), B.norm(dim=0)
    sizes = {
        "You rank by |E|. Without orthonormal factors that is not the size of a"
        " triplet: ‖B_i‖ and ‖A_i‖ belong to it (section 2.1).": E.abs(),
        "You rank by E with its sign.": E,
        "You rank by E with its sign, times the two norms: a size has none.": (
            E * long * wide
        ),
        "‖B_i‖ is missing from the size by which you rank.": E.abs() * long,
        "‖A_i‖ is missing from the size by which you rank.": E.abs() * wide,
        "E_i is missing from the size by which you rank.": long * wide,
        "You keep the smallest: the largest stay.": -E.abs() * long * wide,
    }
    orders.add(
        kept,
        first_of(E.abs() * long * wide, len(kept)),
        {message: first_of(size, len(kept)) for message, size in sizes.items()},
        "prune keeps other triplets than the largest, by |E_i| ‖B_i‖ ‖A_i‖.",
    )


def first_of(sizes, keep: int) -> set:
    return set(sizes.argsort(descending=True)[:keep].tolist())


def spread(A, B, E) -> None:
    """One triplet is the largest, and nothing but the three norms says so: rows of A
    and of B are long in one entry or in all; the largest has a longer row or column,
    another one has a longer column or row; and its E_i is negative."""
    for rows in (A, B):
        rows[:] = 1 / rows.shape[1] ** 0.5
        rows[::2] = 0
        rows[::2, 0] = 1
    E[:] = torch.linspace(1, 1.01, len(E))
    if len(E) > 2:  # a long row whose E_i is small
        E[2], A[2] = 0.3, 2 * A[2]
    top, other = (0, 1) if len(E) % 2 else (1, 0)
    one, two = (B, A) if len(E) % 2 else (A, B)
    E[top] = -1.2
    one[top] *= 1.3
    two[other] *= 1.27
