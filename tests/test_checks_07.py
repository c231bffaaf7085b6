"""Chapter 07's checks accept the solution, and name the mistake in what is plausibly
wrong."""

import numpy as np
import pytest
import torch
from judging import accepts, configured, judge, rejects
from torch import nn

from minipeft import LinearDelta
from minipeft.course import check, compare


def blank(*_):
    raise NotImplementedError


def score(
    weights,
    gradients,
    beta1,
    beta2,
    size=lambda w, g: (w * g).abs(),
    early=False,
    combine=torch.mul,
    away=torch.abs,
):
    average = spread = torch.zeros_like(weights[0])
    for w, g in zip(weights, gradients):
        now, before = size(w, g), average
        average = beta1 * average + (1 - beta1) * now
        spread = beta2 * spread + (1 - beta2) * away(
            now - (before if early else average)
        )
    return combine(average, spread)


def started(weights, gradients, beta1, beta2):
    average, spread = (weights[0] * gradients[0]).abs(), torch.zeros_like(weights[0])
    for now in [(w * g).abs() for w, g in zip(weights, gradients)][1:]:
        average = beta1 * average + (1 - beta1) * now
        spread = beta2 * spread + (1 - beta2) * (now - average).abs()
    return average * spread


def plain(sizes):
    return sizes.mean(0) * (sizes - sizes.mean(0)).abs().mean(0)


def lerped(weights, gradients, beta1, beta2):
    average, spread = torch.zeros_like(weights[0]), torch.zeros_like(weights[0])
    for w, g in zip(weights, gradients):
        average.lerp_((w * g).abs(), 1 - beta1)
        spread.lerp_(((w * g).abs() - average).abs(), 1 - beta2)
    return average * spread


def test_importance_solution():
    accepts(check.importance, score)
    accepts(check.importance, lerped)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        (
            "uncertainty is missing",
            lambda *a: score(*a, combine=lambda average, spread: average),
        ),
        (
            "sensitivity is missing",
            lambda *a: score(*a, combine=lambda average, spread: spread),
        ),
        ("their product", lambda *a: score(*a, combine=torch.add)),
        ("from before this step", lambda *a: score(*a, early=True)),
        ("pluses and minuses cancel", lambda *a: score(*a, size=torch.mul)),
        ("size of the gradient", lambda *a: score(*a, size=lambda w, g: g.abs())),
        ("betas are swapped", lambda w, g, one, two: score(w, g, two, one)),
        ("the old average has β", lambda w, g, one, two: score(w, g, 1 - one, 1 - two)),
        ("last step alone", lambda w, g, one, two: (w[-1] * g[-1]).abs()),
        ("up and down cancel", lambda *a: score(*a, away=lambda x: x)),
        ("squares the deviation", lambda *a: score(*a, away=torch.square)),
        ("starts at the first", started),
        (
            "plain means",
            lambda w, g, one, two: plain(
                torch.stack([(x * y).abs() for x, y in zip(w, g)])
            ),
        ),
        (
            "add up the scores",
            lambda w, g, one, two: sum(
                score(w[:t], g[:t], one, two) for t in range(1, len(w) + 1)
            ),
        ),
        (
            "a tuple",
            lambda *a: score(*a, combine=lambda average, spread: (average, spread)),
        ),
    ],
)
def test_importance_mistakes(says, answer):
    rejects(says, check.importance, answer)


def allocate(scores, budget, off=0):
    every = torch.cat(list(scores.values()))
    kept = torch.zeros(len(every), dtype=torch.bool)
    kept[every.topk(budget + off).indices] = True
    parts = kept.split([len(score) for score in scores.values()])
    return {name: part.tolist() for name, part in zip(scores, parts)}


def by_threshold(scores, budget):
    order = torch.cat(list(scores.values())).sort(descending=True).values
    threshold = order[budget - 1] if budget else torch.inf
    return {name: (score >= threshold).tolist() for name, score in scores.items()}


def the_planted(scores, budget):
    each = budget // len(scores)
    return {n: (v >= v.sort().values[-each]).tolist() for n, v in scores.items()}


def the_other_planted(scores, budget):
    shares = {n: v / v.sum() for n, v in scores.items()}
    threshold = torch.cat(list(shares.values())).sort().values[-budget]
    return {n: (share >= threshold).tolist() for n, share in shares.items()}


def chosen(scores, budget):
    order = sorted(
        (
            (v, n, i)
            for n, score in scores.items()
            for i, v in enumerate(score.tolist())
        ),
        reverse=True,
    )
    best = {(n, i) for _, n, i in order[:budget]}
    return {
        n: [(n, i) in best for i in range(len(score))] for n, score in scores.items()
    }


def test_allocate_solution():
    accepts(check.allocate, allocate)
    accepts(
        check.allocate,
        lambda s, b: {n: torch.tensor(mask) for n, mask in allocate(s, b).items()},
    )
    accepts(check.allocate, chosen)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("With equal scores", by_threshold),
        ("for all of them together", the_planted),
        ("divide each matrix's scores", the_other_planted),
        (
            "True is for what is kept",
            lambda s, b: {
                n: [not one for one in mask] for n, mask in allocate(s, b).items()
            },
        ),
        ("One too few", lambda s, b: allocate(s, b, -1)),
        ("One too many", lambda s, b: allocate(s, b, 1)),
        ("same names", lambda s, b: list(allocate(s, b).values())),
        (
            "for all of them together",
            lambda s, b: {n: [True] + [False] * (len(v) - 1) for n, v in s.items()},
        ),
        (
            "matter least",
            lambda s, b: {
                n: [not one for one in m]
                for n, m in allocate(s, sum(map(len, s.values())) - b).items()
            },
        ),
        (
            "you return other numbers",
            lambda s, b: {
                n: [v * k for v, k in zip(s[n].tolist(), m)]
                for n, m in allocate(s, b).items()
            },
        ),
        (
            "One boolean for each",
            lambda s, b: {n: [k for k in m if k] for n, m in allocate(s, b).items()},
        ),
        (
            "divide each matrix's scores",
            lambda s, b: allocate({n: v / v.sum() for n, v in s.items()}, b),
        ),
        (
            "triplets, and the budget is",
            lambda s, b: {
                n: (v > torch.cat(list(s.values())).median()).tolist()
                for n, v in s.items()
            },
        ),
    ],
)
def test_allocate_mistakes(says, answer):
    rejects(says, check.allocate, answer)


# ---------------------------------------------------------------------- predict_adalora


def numbers(first=200, last=100, c=2):
    return {
        "half way": last + (first - last) / 8,
        "three quarters gone": 1 - 0.25 ** (1 / 3),
        "total too large": last + (first - last) / 8,
        "steady": 0,
        "alternating": 8 / 9,
        "larger gradients": c**2,
        "what is lost": 4 * c**2,
        "memory": 1,
    }


def test_predict_adalora_right_answers():
    accepts(check.predict_adalora, numbers())
    accepts(
        check.predict_adalora,
        numbers() | {"half way": 112, "three quarters gone": 0.37},
    )
    accepts(check.predict_adalora, {k: torch.tensor(v) for k, v in numbers().items()})
    assert check.predict_adalora(numbers(300, 60, 3), first=300, last=60, c=3)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", [112]),
        ("share that is left is cubed", numbers() | {"half way": 150}),
        ("(1 - x)³", numbers() | {"three quarters gone": 0.75}),
        ("schedule is half way", numbers() | {"total too large": 100}),
        ("score is a product", numbers() | {"steady": 1}),
        ("less than 1 away", numbers() | {"alternating": 0}),
        ("Both factors", numbers() | {"larger gradients": 2}),
        ("sum of E_i²", numbers() | {"what is lost": 4}),
        ("until the triplets are dropped", numbers() | {"memory": 0.5}),
        ("expected a number", numbers() | {"memory": "1"}),
    ],
)
def test_predict_adalora_mistakes(says, answer):
    rejects(says, check.predict_adalora, answer)


# ------------------------------------------------------------------------- when_it_pays


def paying(runs, choose=min, key="valid_loss", rates="own", turned=False):
    def mean(chosen):
        if key == "right":
            return -sum(run["right"].count("1") for run in chosen) / len(chosen)
        return sum(run[key] for run in chosen) / len(chosen)

    def best(method, steps):
        method = "AdaLoRA" if rates == "one" else method
        own = [run for run in runs if run["method"] == method]
        if rates != "all lengths":
            own = [run for run in own if run["steps"] == steps]
        tried = {run["lr"] for run in own}
        return choose(tried, key=lambda lr: mean([r for r in own if r["lr"] == lr]))

    found = {}
    for steps in {run["steps"] for run in runs}:
        sides = []
        for method in ("AdaLoRA", "LoRA"):
            wanted = method, steps, best(method, steps)
            sides.append(
                {
                    r["seed"]: r["right"]
                    for r in runs
                    if (r["method"], r["steps"], r["lr"]) == wanted
                }
            )
        found[steps] = compare(*(sides[::-1] if turned else sides)).verdict
    return found


def test_when_it_pays_right_answers():
    accepts(check.when_it_pays, paying)
    accepts(check.when_it_pays, lambda runs: dict(sorted(paying(runs).items())))

    def other(runs):
        names = {"DoRA": "AdaLoRA", "LoRA": "LoRA"}
        return paying([run | {"method": names[run["method"]]} for run in runs])

    assert check.when_it_pays(other, one="DoRA", other="LoRA")


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("turned round", lambda runs: paying(runs, turned=True)),
        ("on the test answers", lambda runs: paying(runs, key="right")),
        ("give both methods one rate", lambda runs: paying(runs, rates="one")),
        ("one rate for all lengths", lambda runs: paying(runs, rates="all lengths")),
        ("highest validation loss", lambda runs: paying(runs, choose=max)),
        ("the course's rule says", lambda runs: dict.fromkeys(paying(runs), "tie")),
        ("Return a verdict for each", lambda runs: list(paying(runs).values())),
        ("Return a verdict for each", lambda runs: None),
    ],
)
def test_when_it_pays_mistakes(says, answer):
    rejects(says, check.when_it_pays, answer)


# ----------------------------------------------------------------- orthonormal_triplets


def thin(B, E, A):
    Q_B, R_B = torch.linalg.qr(B * E)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    return Q_B @ U, S, Vh @ Q_A.T


def middle(B, E, A):
    """The E in the middle, and one sign turned in both factors."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ E.diag() @ R_A.mT)
    sign = torch.ones_like(S)
    sign[0] = -1
    return [Q_B @ U * sign, S, sign[:, None] * (Vh @ Q_A.mT)]


def dense(B, E, A):
    U, S, Vh = torch.linalg.svd(B * E @ A, full_matrices=False)
    r = len(E)
    return U[:, :r], S[:r], Vh[:r]


def after(change):
    return lambda *given: change(*thin(*given))


def unit(B, E, A):
    b, a = B.norm(dim=0), A.norm(dim=1)
    return B / b, E * b * a, A / a[:, None]


def test_orthonormal_triplets_right_answers():
    accepts(check.orthonormal_triplets, thin)
    accepts(check.orthonormal_triplets, middle)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("as large as W", dense),
        ("still overlap", unit),
        ("not orthonormal", lambda B, E, A: (B, E, A)),
        ("E is lost", lambda B, E, A: thin(B, torch.ones_like(E), A)),
        ("once is enough", after(lambda Q, S, V: (Q * S, S, V))),
        ("B should have the shape", after(lambda Q, S, V: (V, S, Q))),
        ("E should have the shape", after(lambda Q, S, V: (Q, S[:, None], V))),
        ("another update than before", after(lambda Q, S, V: (Q, S, -V))),
        ("another update than before", after(lambda Q, S, V: (Q, S.sqrt(), V))),
        ("are negative", after(lambda Q, S, V: (-Q, -S, V))),
        ("Return three tensors", after(lambda Q, S, V: (Q * S, V))),
    ],
)
def test_orthonormal_triplets_mistakes(says, answer):
    rejects(says, check.orthonormal_triplets, answer)


def test_triplets_are_sorted():
    answer = after(lambda Q, S, V: (Q.flip(1), S.flip(0), V.flip(0)))
    rejects("not sorted", check.orthonormal_triplets, answer)


# ------------------------------------------------------------------------- self_pruning


class Triplets(LinearDelta):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, W, r, alpha):
        super().__init__()
        d_out, d_in = W.shape
        self.s = alpha / r
        self.A = nn.Parameter(torch.randn(r, d_in) / d_in**0.5)
        self.E = nn.Parameter(torch.zeros(r))
        self.B = nn.Parameter(torch.randn(d_out, r) / r**0.5)

    def delta(self, base):
        return self.s * self.B * self.E @ self.A

    def update(self, base, x):
        return self.s * (self.E * (x @ self.A.T)) @ self.B.T

    def sizes(self):
        return self.E.abs() * self.A.norm(dim=1) * self.B.norm(dim=0)

    @torch.no_grad()
    def prune(self, keep):
        order = self.sizes().argsort(descending=True)
        self.E[order[keep:]] = 0


class Masked(Triplets):
    """In another style."""

    update = LinearDelta.update

    def prune(self, keep):
        mask = torch.zeros(len(self.E))
        for i in sorted(range(len(mask)), key=lambda i: -self.sizes()[i])[:keep]:
            mask[i] = 1
        self.E.data *= mask


def changed(**methods):
    return configured(type("Changed", (Triplets,), methods))


def both(change):
    """delta and update are changed alike."""
    return changed(delta=change, update=LinearDelta.update)


def starting(change):
    class Changed(Triplets):
        def __init__(self, W, r, alpha):
            super().__init__(W, r, alpha)
            change(self)

    return configured(Changed)


def pruned_by(sizes):
    def prune(self, keep):
        self.E.data[sizes(self).argsort(descending=True)[keep:]] = 0

    return changed(prune=prune)


def renewed(self, keep):
    Triplets.prune(self, keep)
    self.E = nn.Parameter(self.E.detach().clone())


def rescaled(self, keep):
    Triplets.prune(self, keep)
    self.E.data *= 1.5


class Unwritten(LinearDelta):
    def __init__(self, W, r, alpha):
        super().__init__()
        raise NotImplementedError


def test_self_pruning_right_answers():
    accepts(check.self_pruning, configured(Triplets))
    accepts(check.self_pruning, configured(Masked))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", configured(Unwritten)),
        ("configuration's class itself", Triplets),
        ("α/r is missing", both(lambda t, b: t.B * t.E @ t.A)),
        ("E is in it twice", both(lambda t, b: t.s * t.B * t.E**2 @ t.A)),
        ("has to be zero at the start", starting(lambda t: t.E.data.fill_(1.0))),
        ("E starts at zero", starting(lambda t: t.B.data.zero_())),
        ("no gradient reaches E", both(lambda t, b: t.s * t.B * t.E.detach() @ t.A)),
        ("delta(base)", changed(delta=lambda t, b: t.B * t.E @ t.A * t.s**2)),
        ("You rank by |E|", pruned_by(lambda t: t.E.abs())),
        ("prune makes new parameters", changed(prune=renewed)),
        ("changes the E of triplets that stay", changed(prune=rescaled)),
        ("method prune", changed(prune=None)),
        ("leaves", changed(prune=lambda t, keep: Triplets.prune(t, keep + 1))),
        (
            "self.E should have the shape",
            starting(lambda t: setattr(t, "E", nn.Parameter(torch.zeros(len(t.E), 1)))),
        ),
    ],
)
def test_self_pruning_mistakes(says, answer):
    rejects(says, check.self_pruning, answer)


def test_other_orders_of_the_triplets():
    for sizes in (lambda t: -t.sizes(), lambda t: t.E):
        for verdict in judge(check.self_pruning, pruned_by(sizes)):
            assert not verdict


# ------------------------------------------------------- what a trial by learners found


def by_sorted_names(scores, budget):
    return dict(zip(scores, allocate(dict(sorted(scores.items())), budget).values()))


def rounded(scores, budget):
    return allocate({name: s.half().float() for name, s in scores.items()}, budget)


def jittered(scores, budget):
    noisy = {name: s + 1e-6 * torch.rand(len(s)) for name, s in scores.items()}
    return allocate(noisy, budget)


@pytest.mark.parametrize("answer", [by_sorted_names, rounded, jittered])
def test_scores_are_small_and_names_in_no_order(answer):
    for verdict in judge(check.allocate, answer):
        assert not verdict


@pytest.mark.parametrize(
    "case, said",
    [
        ("half way", 115),
        ("three quarters gone", 1 / 3),
        ("alternating", 1),
        ("alternating", 0.92),
        ("steady", 0.02),
        ("memory", 0.9),
    ],
)
def test_a_rough_guess_is_no_prediction(case, said):
    for verdict in judge(check.predict_adalora, numbers() | {case: said}):
        assert not verdict and case in verdict.message


def seeming(look):
    """The rate that is best by one look at the seeds' losses."""

    def answer(runs):
        found = {}
        for run in sorted(runs, key=lambda run: run["seed"]):
            key = run["method"], run["steps"]
            rates = found.setdefault(key, {})
            rates.setdefault(run["lr"], []).append(run)
        best = {
            key: min(rates.values(), key=lambda r: look([x["valid_loss"] for x in r]))
            for key, rates in found.items()
        }
        return {
            steps: compare(
                *[
                    [run["right"] for run in best[method, steps]]
                    for method in ("AdaLoRA", "LoRA")
                ]
            ).verdict
            for _, steps in best
        }

    return answer


@pytest.mark.parametrize(
    "says, look",
    [
        ("One lucky seed", min),
        ("worst seed", max),
        ("median", lambda losses: sorted(losses)[1]),
        ("the first or the last seed alone", lambda losses: losses[0]),
    ],
)
def test_when_it_pays_takes_the_mean_of_the_seeds(says, look):
    accepts(check.when_it_pays, seeming(sum))
    rejects(says, check.when_it_pays, seeming(look))


def test_percentages_are_not_answers():
    def answer(runs):
        return paying([run | {"right": percent(run["right"])} for run in runs])

    def percent(text):
        return 100 * text.count("1") / len(text)

    rejects("give `compare` the strings", check.when_it_pays, answer)


def test_numpy_forms_the_matrix_too():
    def by_numpy(B, E, A):
        M = (B * E).numpy() @ A.numpy()
        U, S, V = (torch.from_numpy(part) for part in np.linalg.svd(M))
        r = len(E)
        return U[:, :r], S[:r], V[:r]

    rejects("as large as W", check.orthonormal_triplets, by_numpy)


@pytest.mark.parametrize(
    "sizes",
    [
        lambda t: t.E.abs() * t.A.abs().sum(1) * t.B.abs().sum(0),
        lambda t: t.E.abs() * t.A.abs().amax(1) * t.B.abs().amax(0),
        lambda t: t.E.abs() * t.A.norm(dim=1) * t.B.norm(dim=0) ** 2,
        lambda t: t.E.abs() * t.A.norm(dim=1) ** 2 * t.B.norm(dim=0),
        lambda t: t.E.abs() * t.A.norm(dim=1),
        lambda t: t.A.norm(dim=1) * t.B.norm(dim=0),
        lambda t: t.E * t.A.norm(dim=1) * t.B.norm(dim=0),
    ],
)
def test_other_sizes_of_a_triplet(sizes):
    for verdict in judge(check.self_pruning, pruned_by(sizes)):
        assert not verdict


def cleared(self, keep):
    Triplets.prune(self, keep)
    self.A.data[self.E == 0] = 0


def hooked(self, keep):
    Triplets.prune(self, keep)
    mask = (self.E != 0).float()
    self.E.register_hook(lambda gradient: gradient * mask)


def test_a_pruned_triplet_may_come_back():
    rejects("prune changes A or B", check.self_pruning, changed(prune=cleared))
    rejects("get no gradient any more", check.self_pruning, changed(prune=hooked))
    flat = starting(lambda t: t.A.data.fill_(0.1))
    rejects("make them random", check.self_pruning, flat)


# -------------------------------------------------- what a second trial got through


def halved(scores, budget):
    return allocate({name: s.bfloat16().float() for name, s in scores.items()}, budget)


def as_they_come(runs):
    """Lists of answers, in the order of the runs."""
    found, count = [], {}
    for run in runs:
        key = run["method"], run["steps"], run["lr"]
        count[key] = count.get(key, -1) + 1
        found.append(run | {"seed": count[key]})
    return paying(found)


def test_close_scores_are_not_equal():
    rejects("hundred thousandths", check.allocate, halved)


def test_answers_belong_together():
    rejects("belong together", check.when_it_pays, as_they_come)


def scale_follows(self, keep):
    Triplets.prune(self, keep)
    self.s = self.s * len(self.E) / max(keep, 1)


def while_training(self, keep):
    if self.training:
        Triplets.prune(self, keep)


def by_gradient(t):
    return (t.E * (1 if t.E.grad is None else t.E.grad)).abs()


@pytest.mark.parametrize(
    "says, answer",
    [
        ("another scale", changed(prune=scale_follows)),
        ("leaves", changed(prune=while_training)),
        ("prune keeps other triplets", pruned_by(by_gradient)),
        ("‖B_i‖ is missing", pruned_by(lambda t: t.E.abs() * t.A.norm(dim=1))),
        ("‖A_i‖ is missing", pruned_by(lambda t: t.E.abs() * t.B.norm(dim=0))),
        ("E_i is missing", pruned_by(lambda t: t.A.norm(dim=1) * t.B.norm(dim=0))),
        ("by E with its sign.", pruned_by(lambda t: t.E)),
        (
            "prune keeps other triplets",
            pruned_by(
                lambda t: t.E.abs() * (t.A.norm(dim=1) * t.B.norm(dim=0)).square()
            ),
        ),
        (
            "saves more than A, E and B: W",
            starting(lambda t: t.register_buffer("W", torch.ones(3))),
        ),
    ],
)
def test_other_ways_to_prune(says, answer):
    rejects(says, check.self_pruning, answer)


def test_a_prediction_of_what_is_zero():
    verdict = check.predict_adalora(numbers() | {"steady": 1})
    assert "'steady': you say 1, which is far too large" in verdict.message
