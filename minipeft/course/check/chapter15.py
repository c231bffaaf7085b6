"""Chapter 15, many adapters on one base: a batch served, the factor trap predicted, a
merge chosen, the best merge without a dense matrix, a learnt merge, and what somebody
merged into a weight."""

import copy
import math
import random

import torch
from torch import nn

from ... import Base, LayerConfig, LinearDelta, LoraConfig, get_peft_model
from ..comparison import compare as told_apart
from .kinds import Choices, by_one_look, configured, judge_numbers, told_by_the_mean
from .practice import LargestTensor, copy_stands_alone, python_bytes
from .sandbox import unwatched
from .slips import Formula
from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "best_merge",
    "choose_merge",
    "learnt_merge",
    "predict_factors",
    "serve",
    "who_is_in_it",
]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def no_return(got):
    need(got is not None, "Your function gives None: is there a `return` at its end?")


# ---- 1. serve a batch ----------------------------------------------------------------


@checks(
    "Every row gets its own adapter, once, and comes back in its own place; gradients"
    " find their way.",
    "x is (n, T, d_in), base(x) is (n, T, d_out), and so is updates[name](x).",
)
def serve(function) -> None:
    """function(base, updates, names, x) -> (n, T, d_out); updates: {name: function}."""
    W = draw(5, 4)
    deltas = {name: draw(5, 4).requires_grad_() for name in ("mia", "ben", "zoe")}
    updates = {
        name: lambda x, delta=delta: x @ delta.T for name, delta in deltas.items()
    }
    for names in (
        ["ben", "zoe", "mia", "ben"],
        ["mia", "mia"],
        ["zoe"],
        ["ben", "none", "zoe", "mia", "none"],
        ["zoe", "mia", "ben", "none", "mia", "zoe", "ben"],
        ["none", "none"],
    ):
        x = draw(len(names), 3, 4).requires_grad_()
        one_batch(function, W, deltas, updates, names, x)


def one_batch(function, W, deltas, updates, names, x):
    seen = []

    def base(rows):
        seen.append(len(rows))
        return rows @ W.T

    before = x.detach().clone()
    got = function(base, dict(updates), list(names), x)
    with torch.no_grad():
        every = {name: before @ delta.T for name, delta in deltas.items()}
        every["none"] = torch.zeros_like(every["mia"])
        own = torch.stack([every[name][i] for i, name in enumerate(names)])
        y = before @ W.T
        last = [every["none" if name == "none" else "zoe"] for name in names]
        groups = sorted(set(names)), list(dict.fromkeys(names))
        orders = [
            torch.tensor([i for g in group for i, n in enumerate(names) if n == g])
            for group in groups
        ]
        mistakes = {
            "Your rows come back sorted by adapter: put them into the order in which"
            " they came.": [(y + own)[order] for order in orders],
            "You reorder, but the wrong way round: the list of places says where each"
            " row came *from*; you need where it goes *to* (argsort, or write into an"
            " empty tensor at these places).": [
                (y + own)[order][order] for order in orders
            ],
            "Every row gets the last adapter of the dictionary. A function made in a"
            " loop looks its variable up when it is *called*, and then the loop has"
            " ended (late binding).": [
                y + torch.stack([rows[i] for i, rows in enumerate(last)]),
                y + every["zoe"],
            ],
            "Every row gets the first row's adapter.": [y + every[names[0]]],
            "You add up all adapters for every row: a row has one of its own.": [
                y + sum(every[name] for name in deltas),
                y + sum(every[name] for name in set(names)),
            ],
            "The base's own output is missing: an adapter adds to it.": [own],
            "The base's output is in it twice.": [2 * y + own],
            "The update is in it twice.": [y + 2 * own],
            "The adapters are missing: that is the base alone.": [y],
        }
    need(got is not None, "Your output is None: is there a `return` at the end?")
    trouble = "none" in names and isinstance(got, torch.Tensor) and len(got) < len(x)
    need(not trouble, 'Rows whose name is "none" are lost: they get the base alone.')
    flat = {
        message + " " * i: wrong
        for message, wrongs in mistakes.items()
        for i, wrong in enumerate(wrongs)
        if not same(wrong, y + own)
    }
    compare(got, y + own, flat, "Your output")
    need(torch.equal(x.detach(), before), "You write into x: its owner still needs it.")
    need(
        sum(seen) == len(names),
        f"The base ran for {sum(seen)} rows in a batch of {len(names)}. It is by far"
        " the dearest part: let it run once for each row.",
    )
    gradients_of_batch(got, y.shape, W, deltas, names, x)


def gradients_of_batch(got, shape, W, deltas, names, x):
    upstream = draw(*shape)
    used = {name: delta for name, delta in deltas.items() if name in names}
    lost = (
        "The output is right, but it has lost touch with {}: without gradients no"
        " adapter can be trained in such a batch. Use no detach(), no_grad() or .data."
    )
    need(got.requires_grad, lost.format("x and the adapters"))
    asked = {"x": x, **used}
    found = torch.autograd.grad(
        (got * upstream).sum(), asked.values(), allow_unused=True
    )
    right = {"x": torch.zeros_like(x)}
    right |= {name: torch.zeros_like(delta) for name, delta in used.items()}
    with torch.no_grad():
        for i, name in enumerate(names):
            W_row = W + (deltas[name] if name in deltas else 0)
            right["x"][i] = upstream[i] @ W_row
            if name in deltas:
                right[name] += upstream[i].T @ x[i]
    whom = {name: f"the adapter {name!r}" for name in used} | {"x": "x"}
    for name, gradient in zip(right, found):
        need(gradient is not None, lost.format(whom[name]))
    for (name, expected), gradient in zip(right.items(), found):
        need(
            same(gradient, expected),
            f"The output is right, but the gradient of {whom[name]} is not: a part of"
            " the way to it is cut (detach, no_grad).",
        )


# ---- 2. the factor trap, predicted ---------------------------------------------------

CASES = {
    "sum of 2": "the cross terms B_i A_j with i ≠ j: 2 of them beside 2 right ones,"
    " all of the same size and at right angles",
    "sum of 5": "count the cross terms: {many} · {less} of them beside {many} right"
    " ones; lengths of things at right angles add up as squares do",
    "mean of 2": "(B₁+B₂)(A₁+A₂)/4 against (B₁A₁+B₂A₂)/2: half of the right terms is"
    " missing *and* the cross terms come in, and the two errors are at right angles",
    "sum of 2 equal": "2B · 2A is 4 BA, and 2 BA was wanted",
    "sum of 2, same A": "(B₁+B₂)(2A) is 2 (B₁A + B₂A): twice what was wanted",
    "mean of 2, same A": "(B₁+B₂)/2 · A is the mean itself",
}


def factor_error(case, n):
    """||what the factors give - what is wanted|| / ||what is wanted||, by simulation
    with n adapters."""
    d, r = 400, 4
    As = [draw(r, d) for _ in range(n)]
    Bs = [draw(d, r) for _ in range(n)]
    if "equal" in case:
        As[1], Bs[1] = As[0], Bs[0]
    if "same A" in case:
        As = [As[0]] * n
    share = 1 / n if case.startswith("mean") else 1.0
    wanted = share * sum(B @ A for A, B in zip(As, Bs))
    made = share * sum(Bs) @ (share * sum(As))
    return ((made - wanted).norm() / wanted.norm()).item()


@checks(
    "All six, within a tenth. What decides is whether the factors point in the same"
    " direction: unrelated ones bring cross terms, equal ones a wrong scale."
)
def predict_factors(predicted, many=5) -> None:
    """predicted: {case: relative error}; many: adapters in the largest sum."""
    computed = {}
    for name, why in CASES.items():
        case = name.replace("5", str(many))
        true = factor_error(case, many if case == f"sum of {many}" else 2)
        why = why.format(many=many, less=many - 1)
        computed[case] = (true, f"Think of {why}.")
    judge_numbers(predicted, computed, near=0.1)


# ---- 3. choose a merge ---------------------------------------------------------------


MERGES = (
    "clear",
    "trap",
    "tie",
    "behind",
    "one seed better",
    "told by the mean",
    "the plain one",
    "equal leads",
    "one seed leads",
    "last seed better",
    "paired",
    "nearly alike",
)


@checks(
    "Chosen on validation, judged once on the test, and by all seeds: an honest choice."
)
def choose_merge(function, of="chosen") -> None:
    """function(valid_loss, right, plain) -> (name, verdict), the verdict of the chosen
    merge against `plain`, or the other way round with of="plain"."""
    choices, verdicts = Choices(), Choices()
    for seed, kind in enumerate(MERGES):
        valid, right = merges_drawn(random.Random(seed), kind)
        got = function(copy.deepcopy(valid), copy.deepcopy(right), "cat")
        no_return(got)
        need(
            isinstance(got, (tuple, list)) and len(got) == 2,
            f"Return two things, the name and the verdict; you return {got!r}.",
        )
        a_merge(got[0], valid, right, "cat", choices)
        of_the_answers(got[1], valid, right, "cat", of, verdicts)
    choices.judge()
    verdicts.judge()


def merges_drawn(rng, kind):
    """{merge: [a loss a seed]}, {merge: [a string of 0 and 1 a seed]}."""
    names = ["cat", "linear", "svd", "ties"]
    rng.shuffle(names)
    share = dict.fromkeys(names, 0.5)
    valid = {name: [0.5 + 0.01 * rng.random() for _ in range(3)] for name in names}
    chosen = rng.choice([name for name in names if name != "cat"])
    other = next(n for n in names if n not in ("cat", chosen))
    if kind == "the plain one":
        chosen = "cat"
    valid[chosen] = [loss - 0.2 for loss in valid[chosen]]
    share[chosen] = {"clear": 0.95, "behind": 0.1}.get(kind, 0.5)
    if kind == "trap":  # the best on the test is not the best in validation
        share[other], share[chosen] = 0.95, 0.4
    if kind == "one seed better":  # lowest once, and bad twice
        valid[other] = [0.9, 0.05, 0.9]
        share[chosen] = 0.9
    if kind == "last seed better":
        valid[other] = [0.9, 0.9, 0.05]
    if kind == "tie":
        valid[other] = [0.9, 0.9, 0.9]
    if kind == "told by the mean":
        order = [chosen, *(name for name in names if name != chosen)]
        valid = dict(zip(order, told_by_the_mean()))
        share[chosen] = 0.95
    right = {
        name: [
            "".join("1" if rng.random() < share[name] else "0" for _ in range(60))
            for _ in range(3)
        ]
        for name in names
    }
    if kind == "equal leads":  # three answers in each seed: too few of 60 to count
        for name, count in ((chosen, 33), ("cat", 30)):
            row = ["1"] * count + ["0"] * (60 - count)
            right[name] = ["".join(rng.sample(row, 60)) for _ in range(3)]
    if kind == "nearly alike":  # by less than a hundredth
        valid[other] = [loss + 0.004 for loss in valid[chosen]]
        share[other] = 0.9
        valid = {name: valid[name] for name in [other, *names]}
    if kind == "paired":  # the seeds differ by much, and in each some answers more
        for name, more, first in ((chosen, 5, "010"), ("cat", 0, "100")):
            right[name] = [
                at + "1" * (n + more) + "0" * (59 - n - more)
                for at, n in zip(first, (50, 10, 30))
            ]
    if kind == "one seed leads":  # by many answers, and the other two by none
        right["cat"] = ["01" * 30] * 3
        right[chosen] = ["1" * 60, "01" * 30, "10" * 30]
    return valid, right


def best_merge_of(valid) -> str:
    return min(valid, key=lambda name: sum(valid[name]) / len(valid[name]))


def a_merge(name, valid, right, plain, choices) -> None:
    wanted = best_merge_of(valid)
    score = {key: sum(s.count("1") for s in strings) for key, strings in right.items()}
    others = {key: losses for key, losses in valid.items() if key != plain}
    slips = by_one_look(valid) | {
        "You choose on the test. Then its score is too good: it was the best of four"
        " because it had luck too. Choose by the validation loss, and look at the test"
        " once.": max(score, key=score.get),
        "You take the largest loss: lower is better.": max(
            valid, key=lambda key: sum(valid[key])
        ),
        "You return the plain merge: the question is what you choose.": plain,
        "The plain merge is one of those to choose from, too.": best_merge_of(others),
    }
    choices.add(
        name,
        wanted,
        slips,
        f"You choose {name!r}; by the mean validation loss it is {wanted!r}.",
    )


def of_the_answers(verdict, valid, right, plain, of, verdicts) -> None:
    chosen = best_merge_of(valid)
    a, b = (chosen, plain) if of == "chosen" else (plain, chosen)

    def pooled(name):
        return [int(answer) for answer in "".join(right[name])]

    def each_question(name):
        return [row.count("1") for row in map("".join, zip(*right[name]))]

    def percent(name):
        return [100 * s.count("1") / len(s) for s in right[name]]

    wanted = told_apart(right[a], right[b]).verdict
    verdicts.add_verdict(
        verdict,
        wanted,
        "compare(a, b) says whether *a* is ahead of b, and right answers are not a"
        " loss.",
        f"You say {verdict!r}; the course's rule says {wanted!r} of {a!r} against"
        f" {b!r}. Give `compare` the strings of all seeds, so that it sees every"
        " answer.",
        {
            "You pool the answers of all seeds: then nothing is left that says how much"
            " the seeds differ. Give `compare` one string a seed, so that it sees every"
            " answer and every seed.": [
                told_apart(way(a), way(b)).verdict for way in (pooled, each_question)
            ],
            "You do not pair the seeds, or not with their own: entry i of one merge"
            " and of the other come from the same seed and the same questions.": [
                told_apart(right[a], right[b], paired=False).verdict,
                told_apart(sorted(right[a]), sorted(right[b])).verdict,
                told_apart(percent(a), percent(b), answers=60).verdict,
            ],
            "You compare one number a seed, and the rule no longer knows how many"
            " answers it stands for: give `compare` the strings, so that it sees every"
            " answer.": told_apart(percent(a), percent(b)).verdict,
        },
    )


# ---- 4. the best merge, without the dense matrix -------------------------------------


@checks(
    "The nearest matrix of that rank to the weighted sum, and nothing of W's size was"
    " ever formed.",
    "A is (r_i, d_in), B (d_out, r_i): the ranks differ.",
)
def best_merge(function) -> None:
    """function(adapters, weights, r) -> (A, B); adapters: [(A, B, scaling)]."""
    for d_in, d_out, ranks, r in (
        (40, 56, (2, 3), 3),
        (64, 48, (1, 4, 2), 2),
        (50, 50, (3, 3), 6),
        (48, 60, (4,), 1),
    ):
        adapters = [
            (draw(n, d_in), draw(d_out, n), (2.0, 0.5, 3.0)[i])
            for i, n in enumerate(ranks)
        ]
        weights = [(-0.5, 0.7, 1.3)[i] for i in range(len(ranks))]
        one_merge(function, adapters, weights, r, d_out * d_in)
    in_python(function)


def in_python(function) -> None:
    """What numpy holds on the way, beside what the factors take."""
    d = 600
    adapters = [(torch.randn(2, d), torch.randn(d, 2), 1.0) for _ in range(2)]
    taken = python_bytes(unwatched(function), adapters, [0.5, 0.7], 2)
    need(
        taken < 4 * d * d / 2,
        f"Right, but numpy (or a list) held {taken / 1e6:.1f} MB on the way for d ="
        f" {d}, and W has {4 * d * d / 1e6:.1f} MB: you form it there.",
    )


def nearest(M, r):
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    return U[:, :r] * S[:r] @ V[:r]


def merged_from_factors(adapters, weights, r):
    A = torch.cat([a for a, b, s in adapters])
    B = torch.cat([w * s * b for (a, b, s), w in zip(adapters, weights)], 1)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, V = torch.linalg.svd(R_B @ R_A.T)
    return (Q_B @ (U[:, :r] * S[:r])) @ (V[:r] @ Q_A.T)


def one_merge(function, adapters, weights, r, dense):
    kept = copy.deepcopy(adapters)
    with LargestTensor() as watched:
        got = function(adapters, weights, r)
    no_return(got)
    need(
        isinstance(got, (tuple, list))
        and len(got) == 2
        and all(isinstance(part, torch.Tensor) for part in got),
        "Return two tensors: A (r, d_in) and B (d_out, r).",
    )
    A, B = got
    d_in, d_out = adapters[0][0].shape[1], len(adapters[0][1])
    if A.shape == (d_out, r) and B.shape == (r, d_in):
        raise Wrong("You return (B, A): A comes first.")
    need(
        A.shape == (r, d_in) and B.shape == (d_out, r),
        f"A should be {(r, d_in)} and B {(d_out, r)}; yours are {tuple(A.shape)} and"
        f" {tuple(B.shape)}. Keep the r largest singular values.",
    )
    right = nearest(weighted_sum(kept, weights), r)
    mistakes = {
        message: wrong
        for message, wrong in slips_of_merge(kept, weights, r).items()
        if not same(wrong, right)
    }
    formula = Formula(merged_from_factors, kept, weights, r)
    compare(B @ A, right, mistakes, "B A", formula=formula)
    need(
        all(
            torch.equal(p, q)
            for one, other in zip(adapters, kept)
            for p, q in zip(one[:2], other[:2])
        ),
        "You change the adapters that you were given.",
    )
    need(
        watched.entries < dense,
        f"Right, but a tensor of {watched.entries:,} entries was formed, and W has"
        f" {dense:,}. With 4096 × 4096 and a rank of 16 that is a hundred times what"
        " is needed. The sum is (one tall matrix) · (one wide matrix): the QR of each"
        " leaves a small matrix in the middle, and its SVD is cheap.",
    )


def weighted_sum(adapters, weights):
    return sum(w * s * b @ a for (a, b, s), w in zip(adapters, weights))


def slips_of_merge(adapters, weights, r) -> dict:
    whole = weighted_sum(adapters, weights)
    U, S, V = torch.linalg.svd(whole, full_matrices=False)
    unscaled = [(a, b, 1.0) for a, b, s in adapters]
    A_all = torch.cat([a for a, b, s in adapters])
    B_all = torch.cat([w * s * b for (a, b, s), w in zip(adapters, weights)], 1)
    n = len(A_all)  # the other singular values are zero
    return {
        "The scaling s_i of each adapter is missing.": (
            nearest(weighted_sum(unscaled, weights), r)
        ),
        "The weights are missing.": nearest(sum(s * b @ a for a, b, s in adapters), r),
        "A negative weight has lost its sign.": (
            nearest(weighted_sum(adapters, map(abs, weights)), r)
        ),
        "The singular values are missing: U and V alone have the right directions and"
        " the wrong lengths.": U[:, :r] @ V[:r],
        "The singular values are in it twice (in A and in B): put them into one, or"
        " their root into each.": U[:, :r] * S[:r] ** 2 @ V[:r],
        "Only the root of the singular values is in it.": (
            U[:, :r] * S[:r] ** 0.5 @ V[:r]
        ),
        "You compress each adapter and then add: that has a larger rank, or forgets"
        " what they have in common.": sum(
            w * s * nearest(b @ a, r) for (a, b, s), w in zip(adapters, weights)
        ),
        "You keep the *smallest* singular values.": (
            U[:, n - r : n] * S[n - r : n] @ V[n - r : n]
        ),
        "You keep the last r singular values, and those are the smallest: keep the"
        " first r.": U[:, -r:] * S[-r:] @ V[-r:],
        "You keep the first r of the factors put together: which r are the best, the"
        " SVD says.": B_all[:, :r] @ A_all[:r],
        "You divide by the sum of the weights: the sum is wanted as it is.": (
            nearest(whole, r) / sum(weights)
        ),
        "The weights are in it twice (in A and in B).": (
            nearest(weighted_sum(adapters, [w * w for w in weights]), r)
        ),
    }


# ---- 5. a merge that learns its weights ----------------------------------------------


EXPERTS = ["two", "one", "three"]  # in no alphabetical order


def experts_on(d_in, d_out):
    """A linear layer with trained LoRAs of different ranks, called EXPERTS."""
    model = nn.Sequential(nn.Linear(d_in, d_out))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]), EXPERTS[0])
    for r, name in zip((3, 1), EXPERTS[1:]):
        config = LoraConfig(r=r, lora_alpha=9, target_modules=["0"])
        model.add_adapter(name, config)
    model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in name:
                p.copy_(torch.randn_like(p))
    return model


@checks(
    "N numbers a layer, started at the mean, with the experts frozen and not saved"
    " again; and it merges, because it says what its delta is.",
    "delta(base) is (d_out, d_in), update(base, x) is (..., d_out).",
)
def learnt_merge(adapter_class) -> None:
    """adapter_class(names), a LinearDelta with the Parameter `weights` (N,)."""
    need(
        isinstance(adapter_class, type) and issubclass(adapter_class, LinearDelta),
        "Give me the class itself, a subclass of LinearDelta.",
    )
    for names in (EXPERTS[:2], EXPERTS):
        look_at_weights(adapter_class(list(names)), len(names))
    d_in, d_out = random.choice([6, 8]), 7
    model = experts_on(d_in, d_out)
    model.add_adapter("mixture", one_layer_config(adapter_class))
    model.double()
    model.set_adapter("mixture")
    x = draw(5, 3, d_in)
    compare_mixture(model, x)
    slot = model.get_base_model()[0]
    saves_only_weights(slot.adapters["mixture"])
    copy_stands_alone(slot, lambda slot: slot(x), slot.adapters)
    two_layers(adapter_class)
    other_experts(adapter_class)


def two_layers(adapter_class) -> None:
    """The weights of one layer are not those of another."""
    one, other = (adapter_class(list(EXPERTS)) for _ in range(2))
    with torch.no_grad():
        one.weights.fill_(5.0)
    need(
        not same(other.weights, one.weights),
        "Two layers share one tensor of weights: make a Parameter for each adapter"
        " that is created, in __init__.",
    )


class ShareOfWeight(LinearDelta):
    """An expert of another kind: its change depends on the layer below."""

    def __init__(self, share):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))

    def delta(self, base):
        return self.share * base.weight


def other_experts(adapter_class) -> None:
    """Experts that are no LoRAs, in training and in eval mode."""
    shares = dict(zip(EXPERTS, (0.3, -0.7, 1.1)))
    model = nn.Sequential(nn.Linear(5, 4))
    for name, share in shares.items():
        config = configured(lambda base, share=share: ShareOfWeight(share))
        config = config(target_modules=["0"])
        if name == EXPERTS[0]:
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    model.add_adapter("mixture", one_layer_config(adapter_class))
    model.double().set_adapter("mixture")
    slot, x = model.get_base_model()[0], draw(3, 5)
    w = torch.tensor([0.37, -1.21, 0.64], dtype=torch.float64)
    with torch.no_grad():
        slot.adapters["mixture"].weights.copy_(w)
        total = sum(w * torch.tensor(list(shares.values())).double())
        right = slot.base_layer(x) + total * x @ slot.base_layer.weight.T
        for mode in (True, False):
            got = model.train(mode)(x)
            need(
                same(got, right),
                "With experts of another kind, whose change depends on the layer below,"
                f" the output is another one{'' if mode else ' in eval mode'}: ask"
                " each for its delta(base), and keep nothing of a LoRA's.",
            )


def look_at_weights(mixture, N):
    p = getattr(mixture, "weights", None)
    need(
        isinstance(p, nn.Parameter),
        "I look for an nn.Parameter as self.weights: a plain tensor is neither trained"
        " nor saved.",
    )
    need(p.shape == (N,), f"weights should have the shape ({N},), not {(*p.shape,)}.")
    need(p.requires_grad, "The weights are frozen: they are all that learns.")
    saves_only_weights(mixture)
    need(
        bool((p.detach() - 1 / N).abs().max() < 1e-3),
        "The weights should start at the mean, 1/N each: at 0 the experts are silent"
        " at first, and at 1 each they shout all at once.",
    )


def saves_only_weights(mixture):
    extra = [name for name in mixture.state_dict() if name != "weights"]
    need(not extra, f"It would save more than its weights: {', '.join(extra)}.")


def one_layer_config(adapter_class):
    """A configuration that creates the learner's adapter on the layer "0"."""

    class Configured(LayerConfig):
        def create(self, base, path):
            return adapter_class(list(EXPERTS))

    return Configured(target_modules=["0"])


def mixed(weights, experts):
    return sum(w * expert for w, expert in zip(weights, experts))


def compare_mixture(model, x):
    slot = model.get_base_model()[0]
    mixture = slot.adapters["mixture"]
    parts = [slot.adapters[name] for name in EXPERTS]
    with torch.no_grad():
        mixture.weights.copy_(torch.tensor([0.8, -0.3, 0.4]))
    for trial in range(2):
        w = mixture.weights.detach().clone()
        deltas = [
            part.scaling * (part.lora_B.weight @ part.lora_A.weight).detach()
            for part in parts
        ]
        y = slot.base_layer(x).detach()
        updates = [x @ delta.T for delta in deltas]
        right = y + mixed(w, updates)
        plain = [delta / part.scaling for delta, part in zip(deltas, parts)]
        mistakes = slips_of_mixture(w, [part.scaling for part in parts], deltas, x, y)
        formula = Formula(mixed, w, updates, after=lambda total, y=y: y + total)
        compare(slot(x), right, mistakes, "The layer's output", formula=formula)
        base = Base(slot, "mixture")
        compare(
            mixture.delta(base),
            sum(w_i * delta for w_i, delta in zip(w, deltas)),
            {"delta misses the scaling α/r.": sum(map(torch.mul, w, plain))},
            "delta(base)",
            formula=Formula(mixed, w, deltas),
        )
        gradients_of_mixture(slot, mixture, deltas, x)
        with torch.no_grad():
            mixture.weights.copy_(torch.tensor([-0.4, 1.7, 0.3]))
            parts[0].lora_B.weight.mul_(1.5)
    model.merge_adapter()
    merged = slot(x)
    model.unmerge_adapter()
    need(same(merged, slot(x)), "Merged, the layer gives something else.")


def slips_of_mixture(w, scalings, deltas, x, y) -> dict:
    """{message: the layer's output}; y: the base's, deltas: the experts' changes."""
    by_name = [EXPERTS.index(name) for name in sorted(EXPERTS)]
    updates = [x @ delta.T for delta in deltas]
    right = y + mixed(w, updates)
    return {
        "The experts' scaling α/r is missing: a peer knows its own delta and update, so"
        " ask it.": y + mixed(w, [x @ (d / s).T for d, s in zip(deltas, scalings)]),
        "The weights have no effect.": y + sum(updates),
        "You take the mean, whatever the weights are.": y + sum(updates) / 3,
        "You normalise the weights with a softmax: then they can neither be negative"
        " nor sum to more than one.": y + mixed(w.softmax(0), updates),
        "The base is in it twice: `update` is only what is added.": right + y,
        "Only the first expert is heard.": y + w[0] * updates[0],
        "The experts have changed places: weights[i] belongs to names[i].": (
            y + mixed(w, [updates[at] for at in by_name])
        ),
        "The experts have changed places: they stand in reverse.": (
            y + mixed(w, updates[::-1])
        ),
        "You divide the weights by their sum, or by N: w_i is the factor itself.": (
            y + (right - y) / w.sum()
        ),
        "You divide by N beside the weights: w_i is the factor itself.": (
            y + (right - y) / 3
        ),
        "A negative weight loses its sign.": y + mixed(w.abs(), updates),
        "Negative weights are cut off.": y + mixed(w.clamp(min=0), updates),
        "The experts' scaling is in it twice: delta has it already.": (
            y + mixed(w, [s * update for s, update in zip(scalings, updates)])
        ),
        "Only the first two experts are heard.": y + mixed(w[:2], updates[:2]),
    }


def gradients_of_mixture(slot, mixture, deltas, x):
    x = x.clone().requires_grad_()
    out = slot(x)
    need(out.requires_grad, "The output has lost touch with the weights.")
    upstream = draw(*out.shape)
    wanted = torch.stack([(upstream * (x @ d.T)).sum() for d in deltas]).detach()
    w, at_x = torch.autograd.grad(
        (out * upstream).sum(), (mixture.weights, x), allow_unused=True
    )
    need(
        w is not None and same(w, wanted),
        "The output is right, but not the gradient of the weights: they are detached,"
        " or read with .item() or .data, so nothing would be learnt.",
    )
    total = slot.base_layer.weight + sum(map(torch.mul, mixture.weights, deltas))
    need(
        at_x is not None and same(at_x, (upstream @ total).detach()),
        "The gradient that goes down to x is not right: freeze the experts, but let"
        " the gradient pass through them to the layers below (no detach, no_grad).",
    )


# ---- 6. what is in the weights -------------------------------------------------------


@checks(
    "Every adapter counted, also those that overlap, and those taken out too often."
)
def who_is_in_it(function, b_first=False) -> None:
    """function(W_now, W_base, adapters) -> {name: whole number}; an adapter is (A, B,
    s), or (B, A, s) with b_first."""
    choices = Choices()
    for counts, alike in (
        ((4, 0, 1), True),  # first what tells most slips apart
        ((1, 2, 0), False),
        ((0, 1, -1), False),
        ((0, 0, 0), True),
        ((-1, 1, 2), True),
        ((2, 1, -1), "hidden"),
        ((1, -1, 1), "close"),
    ):
        adapters = {}
        shared = draw(2, 9)
        for number, name in enumerate(("voice", "records", "extract")):
            A = shared + 0.3 * draw(2, 9) if alike else draw(2, 9)
            B = draw(12, 2) if not alike else torch.ones(12, 2).double() + draw(12, 2)
            if alike == "hidden":  # on the diagonal and in the first rows
                A, B = draw(2, 9), draw(12, 2)
                B[:9], A[:, 3:] = 0.0, 0.0
                B[9:] += 2.0
            if alike == "close":  # nearly the same change in all of them
                A, B = (shared + 0.01 * draw(2, 9), torch.ones(12, 2).double())
            adapters[name] = (A, B, (0.5, 2.0, 1.0)[number])
        deltas = {name: s * B @ A for name, (A, B, s) in adapters.items()}
        W = 4000 * draw(12, 9)
        now = W + sum(n * deltas[name] for n, name in zip(counts, deltas))
        now = now + 1e-6 * draw(12, 9)  # what rounding leaves
        right = dict(zip(adapters, counts))
        given = {
            name: (B.clone(), A.clone(), s) if b_first else (A.clone(), B.clone(), s)
            for name, (A, B, s) in adapters.items()
        }
        got = function(now.clone(), W.clone(), given)
        some_counts(got, right, now - W, now, adapters, choices)
    choices.judge()


def some_counts(got, right, change, now, adapters, choices) -> None:
    no_return(got)
    need(
        isinstance(got, dict) and got.keys() == right.keys(),
        "Return a dictionary with each adapter's name and how often it is in the"
        f" weight; yours is {got!r}.",
    )
    deltas = {name: s * B @ A for name, (A, B, s) in adapters.items()}

    def alone(change):
        return {
            name: round(((change * d).sum() / d.square().sum()).item())
            for name, d in deltas.items()
        }

    def together(parts, change):
        M = torch.stack([d.flatten() for d in parts.values()], 1)
        found = torch.linalg.lstsq(M, change.flatten()[:, None]).solution.flatten()
        return dict(zip(parts, found.tolist()))

    unscaled = {name: B @ A for name, (A, B, s) in adapters.items()}
    found = together(deltas, change)
    slips = {
        "The scaling of the adapters is missing.": {
            n: round(v) for n, v in together(unscaled, change).items()
        },
        "You look at W_now itself: what counts is its difference from the base.": {
            n: round(v) for n, v in together(deltas, now).items()
        },
        "The signs are turned round: W_now less W_base.": {
            name: -n for name, n in right.items()
        },
        "An adapter that was taken out once too often counts -1: you lose the sign.": {
            name: abs(n) for name, n in right.items()
        },
        "You count whether it is there, not how often: merged twice is a fault of its"
        " own.": {name: int(n != 0) for name, n in right.items()},
        "An adapter that was taken out once too often counts -1; you say 0.": {
            name: max(n, 0) for name, n in right.items()
        },
        "You look at each adapter alone. Adapters of one base overlap, and one then"
        " shows in the other's place: ask for all together (least squares).": (
            alone(change)
        ),
        "Round to the nearest whole number: int and math.floor cut 2.999 to 2, and"
        " math.ceil makes 3 of 2.001.": [
            {name: cut(value) for name, value in found.items()}
            for cut in (int, math.floor, math.ceil)
        ],
    }
    strange = f"Counts are whole numbers; you have {got!r}."
    need(not any(isinstance(n, str) for n in got.values()), strange)
    try:
        values = {name: float(n) for name, n in got.items()}
    except (TypeError, ValueError) as error:
        raise Wrong(strange) from error
    if values != right and all(
        math.isclose(values[n], right[n], abs_tol=1e-3) for n in right
    ):
        raise Wrong("Nearly: round to whole numbers, and to the nearest (int cuts).")
    said = f"You find {got}; it is {right}. Small remainders are rounding."
    choices.add(values, right, slips, said)
