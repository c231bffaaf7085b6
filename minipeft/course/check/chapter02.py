"""Chapter 02, full fine-tuning: accumulated gradients, a step with faults, steps
predicted, a method chosen for a card, what is kept for the way back, and a training
loop of one's own."""

import copy
import functools
import random
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from ..comparison import compare as told_apart
from .kinds import Choices
from .practice import SEEDS, chains, loss_on_new, missed, numbers, small_gpt
from .slips import Formula
from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "accumulated",
    "adamw_step",
    "choose_method",
    "fine_tune",
    "kept_numbers",
    "predict_steps",
]


# --------------------------------------------------------------------------- adamw_step


def adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


class Arguments(NamedTuple):
    """What a learner's function is given for one step."""

    p: torch.Tensor
    g: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    t: int
    lr: float
    b1: float
    b2: float
    eps: float
    decay: float

    def means(self) -> tuple:
        """The new m and v."""
        _, g, m, v, _, _, b1, b2, *_ = self
        return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g

    def step(self, m_hat=None, v_hat=None, bottom=None, shrink=None, sign=-1):
        """The new p, by the formula but for the parts that are given."""
        new_m, new_v = self.means()
        m_hat = new_m / (1 - self.b1**self.t) if m_hat is None else m_hat
        v_hat = new_v / (1 - self.b2**self.t) if v_hat is None else v_hat
        bottom = v_hat.sqrt() + self.eps if bottom is None else bottom
        shrink = 1 - self.lr * self.decay if shrink is None else shrink
        return self.p * shrink + sign * self.lr * m_hat / bottom


def arguments(t: int, shape) -> Arguments:
    p, g, m = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    v = torch.rand(shape, dtype=torch.float64) * (t > 1)
    m *= t > 1
    g[-1] = 0  # it moves and decays all the same
    lr, eps = 0.03, 0.02
    b1, b2 = random.uniform(0.8, 0.9), random.uniform(0.95, 0.99)
    return Arguments(p, g, m, v, t, lr, b1, b2, eps, random.uniform(0.1, 0.4))


def slips_of_m(given: Arguments) -> dict:
    """{message: the wrong m}"""
    p, g, m, _, t, _, b1, b2, _, decay = given
    new_m, new_v = given.means()
    return {
        "m: the weights are swapped: the old mean keeps beta1, the new"
        " gradient comes with 1 - beta1.": (1 - b1) * m + b1 * g,
        "m: the gradient comes in whole; it should come with 1 - beta1.": b1 * m + g,
        "m: you used beta2; the mean of the gradient has beta1.": (
            b2 * m + (1 - b2) * g
        ),
        "m: you give the corrected mean. Keep the plain one; the correction"
        " is for this step only.": new_m / (1 - b1**t),
        "m: the decay has got into the gradient. That is L2 with Adam; in"
        " AdamW the decay goes to p directly.": b1 * m + (1 - b1) * (g + decay * p),
        "m: you use 0.9, the default: beta1 is an argument.": 0.9 * m + 0.1 * g,
        "The second of the three is v: return p, m, v, in this order.": new_v,
        "m has not changed.": m,
    }


def slips_of_v(given: Arguments) -> dict:
    """{message: the wrong v}"""
    _, g, _, v, t, _, b1, b2, *_ = given
    new_m, new_v = given.means()
    return {
        "v: it is the mean of the gradient's *square*.": b2 * v + (1 - b2) * g,
        "v: you used beta1; the mean of the square has beta2.": (
            b1 * v + (1 - b1) * g * g
        ),
        "v: the square comes in whole; it should come with 1 - beta2.": (
            b2 * v + g * g
        ),
        "v: you square the mean m; square the gradient.": (
            b2 * v + (1 - b2) * new_m * new_m
        ),
        "v: you give the corrected mean. Keep the plain one.": new_v / (1 - b2**t),
        "v: you take the gradient's absolute value: it is its square.": (
            b2 * v + (1 - b2) * g.abs()
        ),
        "v: you use 0.999, the default: beta2 is an argument.": (
            0.999 * v + 0.001 * g * g
        ),
        "v has not changed.": v,
    }


def slips_of_decay(given: Arguments) -> dict:
    """{message: the wrong p} where it decays otherwise."""
    p, g, _, _, _, lr, *_, decay = given
    right, without = given.step(), given.step(shrink=1)
    return {
        "p does not decay where the gradient is zero: the decay of AdamW does"
        " not ask for it.": torch.where(g != 0, right, without),
        "p does not decay if it is a vector: which tensors decay is for the"
        " caller to say, who gives `weight_decay`.": without if p.dim() < 2 else right,
        "The decay has the rate twice.": given.step(shrink=1 - lr * lr * decay),
        "The decay is missing: each step also shrinks p itself.": without,
        "The decay is not scaled by the rate: at a rate of zero nothing may"
        " move.": given.step(shrink=1 - decay),
        "You let p shrink after the step: the decay comes first, so that it"
        " does not touch the step itself.": without * (1 - lr * decay),
    }


def slips_of_correction(given: Arguments) -> dict:
    """{message: the wrong p} where the means are corrected otherwise."""
    _, _, _, _, t, _, b1, b2, *_ = given
    m, v = given.means()
    step = given.step
    return {
        "The correction of the means is missing: they start at zero. Without"
        " it the first steps are far too small, or too large.": step(m, v),
        "m is not corrected for its start at zero.": step(m_hat=m),
        "v is not corrected for its start at zero.": step(v_hat=v),
        "t counts from 1, and you count from 0 (or one too far).": step(
            m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        ),
        "You correct with t - 1: t is the number of this step.": step(
            m / (1 - b1 ** max(t - 1, 1)), v / (1 - b2 ** max(t - 1, 1))
        ),
        "You correct by 1 - beta · t: it is the power, 1 - beta^t.": step(
            m / (1 - b1 * t), v / abs(1 - b2 * t)
        ),
        "You divide m by v's correction, and v by m's.": step(
            m / (1 - b2**t), v / (1 - b1**t)
        ),
    }


def slips_of_step(given: Arguments) -> dict:
    """{message: the wrong p} where the step itself is another one."""
    p, g, _, _, t, lr, b1, b2, eps, decay = given
    new_m, new_v = given.means()
    v_hat, step = new_v / (1 - b2**t), given.step
    return {
        "p goes up the gradient: subtract.": step(sign=1),
        "The mean of v over all numbers divides each: every number has its own"
        " v.": step(bottom=v_hat.mean().sqrt() + eps),
        "You step by the sign of m, and v is not used.": p * (1 - lr * decay)
        - lr * new_m.sign(),
        "eps stands under the root: it is added after the root is taken.": step(
            bottom=(v_hat + eps).sqrt()
        ),
        "eps is missing.": step(bottom=v_hat.sqrt()),
        "The root is missing: divide by √v, not by v.": step(bottom=v_hat + eps),
        "eps is added before v is corrected: correct first, then the root,"
        " then eps.": step(bottom=(new_v.sqrt() + eps) / (1 - b2**t) ** 0.5),
        "You step by the plain gradient: the mean m is what Adam follows.": step(g),
        "The rate is missing from the step.": (
            p * (1 - lr * decay) - new_m / (1 - b1**t) / (v_hat.sqrt() + eps)
        ),
    }


@checks(
    "Means, corrections, the place of eps and the decay are right, at the first step"
    " and later.",
    "p, g, m and v have one shape, and so have the results.",
)
def adamw_step(function) -> None:
    """function(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay) -> (p, m, v)."""
    for t, shape in ((7, (4, 5)), (1, (4, 5)), (3, (6,))):
        given = arguments(t, shape)
        got = function(*given)
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        need(
            isinstance(got, (tuple, list)) and len(got) == 3,
            "Give three tensors: the new p, m and v.",
        )
        formula = Formula(adamw, *given, whole=got)
        m, v = given.means()
        compare(got[1], m, slips_of_m(given), "The new m", formula=formula)
        compare(got[2], v, slips_of_v(given), "The new v", formula=formula)
        slips = slips_of_decay(given) | slips_of_correction(given)
        slips |= slips_of_step(given)
        compare(got[0], given.step(), slips, "The new p", formula=formula)


# -------------------------------------------------------------------------- accumulated


@checks(
    "The gradient of the large batch, however unequal the pieces.",
    "All gradients have one shape, and so has the result.",
)
def accumulated(function) -> None:
    """function(grads, labels) -> the gradient of the mean loss over all labels."""
    few = random.sample(range(2, 40), random.choice([3, 4]))
    if few == sorted(few):
        few.reverse()
    many = random.sample((3_000, 9_000, 15_000, 22_000) * 3, 11)
    for labels in (few, many, [7] * 3, [4, 0, 9]):
        a_large_batch(function, labels)


def a_large_batch(function, labels) -> None:
    count = len(labels)
    grads = [torch.randn(3, 4) for _ in range(count)]
    got = function(grads, list(labels))
    stack, n = (
        torch.stack(grads).double(),
        torch.tensor(labels, dtype=torch.float64)[:, None, None],
    )
    compare(
        got,
        (stack * n).sum(0) / sum(labels),
        {
            "You take the mean of the means. A batch with few labels would count as"
            " much as one with many: weigh each by its labels.": stack.mean(0),
            "You add the gradients up: that is a step several times too long. The"
            " mean over all labels is wanted.": stack.sum(0),
            "You give the gradient of the *sum* of all losses: divide by all labels"
            " together.": ((stack * n).sum(0)),
            "You divide by the number of batches; divide by the number of labels.": (
                (stack * n).sum(0) / count
            ),
            "You weigh the wrong way round: many labels, much weight.": (
                (stack / n).sum(0) / (1 / n).sum()
            ),
            "You divide each gradient by its labels: it is a mean already. Multiply,"
            " add, and divide by all.": ((stack / n).sum(0)),
            "You weigh by the labels and divide by their sum: that is all. The number"
            " of batches has no place here.": (
                (stack * n).sum(0) / sum(labels) / count
            ),
            "You add the means and divide by all labels. Each is a mean already:"
            " multiply it by its labels before you add.": stack.sum(0) / sum(labels),
            "Averaged two at a time, the last batch has half of all the weight: weigh"
            " each by its labels.": functools.reduce(lambda a, b: (a + b) / 2, stack),
            "That is the last batch's gradient alone.": stack[-1],
            "That is the first batch's gradient alone: equal counts of labels make the"
            " mean of all.": stack[0],
            "A batch without labels has no weight; you give it that of one.": (
                stack * n.clamp(min=1)
            ).sum(0)
            / n.clamp(min=1).sum(),
            "You divide by the labels of the last batch, not by all.": (
                (stack * n).sum(0) / labels[-1]
            ),
            "The labels are sorted, and the gradients are not: each gradient has its"
            " own count.": (stack * n.sort(0)[0]).sum(0) / sum(labels),
            "Batches with equal counts of labels count once: as keys of a dictionary"
            " they replace each other.": sum(
                g * count for count, g in dict(zip(labels, stack)).items()
            )
            / sum({*labels}),
            "You use the first eight batches alone: `grads` may hold more.": (
                (stack * n)[:8].sum(0) / sum(labels[:8])
            ),
        },
        "Your gradient",
    )


# ------------------------------------------------------------------------- kept_numbers


def patterns_of_trained(layers: int) -> list:
    """For each case which layers are trained."""
    first = 2
    return [
        [True] * layers,
        [i == first for i in range(layers)],
        [i == layers - 1 for i in range(layers)],
        [i in (0, layers - 1) for i in range(layers)],
        [False] * layers,
        [i > 0 for i in range(layers)],
    ]


def gradient_passes(trained) -> list:
    """For each place whether a gradient goes back through it."""
    return [any(trained[:i]) for i in range(len(trained) + 1)]


def places_kept(trained) -> list:
    """For each layer's input whether autograd keeps it."""
    passes = gradient_passes(trained)
    return [passes[i] * (i > 0) or trained[i] for i in range(len(trained))]


def kept_slips(widths, trained) -> dict:
    """{message: the wrong number}"""
    layers, passes, kept = len(trained), gradient_passes(trained), places_kept(trained)
    right = sum(width for width, k in zip(widths, kept) if k)
    return {
        "Places of the same width are counted once: they are different places.": (
            sum({width for width, k in zip(widths, kept) if k})
        ),
        "You count every place between the layers. Below the first trained layer"
        " no gradient goes, and nothing is kept.": sum(widths[:-1]),
        "You count the last output too: nobody needs it for the way back (there"
        " is no ReLU after it).": right + widths[-1],
        "You count only the inputs of trained layers. Above them each ReLU that a"
        " gradient passes keeps its output as well.": sum(
            width for width, k in zip(widths, trained) if k
        ),
        "You count places twice: a ReLU's output *is* the next layer's input, and"
        " it is kept once.": (
            right + sum(widths[i] for i in range(1, layers) if passes[i] and trained[i])
        ),
        "You count only what lies above the first trained layer: that layer keeps"
        " its own input too.": sum(widths[i] for i in range(1, layers) if passes[i]),
        "The way back goes from the loss *down* to the trained layers: what"
        " counts is whether a layer below is trained, not above.": sum(
            widths[i] for i in range(layers) if any(trained[i:])
        ),
        "The input of the chain is kept only if the first layer is trained; no"
        " ReLU stands before it.": right + widths[0] * (not trained[0]),
        "You count outputs in the place of inputs: a linear layer keeps what it"
        " read.": sum(
            widths[i + 1] for i in range(layers) if passes[i] and i > 0 or trained[i]
        ),
        "You count the weights: they are in memory anyway.": (
            right + sum(a * b for a, b, t in zip(widths, widths[1:], trained) if t)
        ),
    }


@checks(
    "What you count is what autograd keeps. The layers below the first trained one cost"
    " nothing."
)
def kept_numbers(function) -> None:
    """function(widths, trained) -> numbers kept for one row by a chain of Linear and
    ReLU."""
    layers = random.choice([4, 5])
    patterns = patterns_of_trained(layers)
    for number, trained in enumerate(patterns):
        # any two together are larger than a third, so that no two slips agree
        widths = random.sample(range(50, 95), layers + 1)
        if number == len(patterns) - 1:
            widths = [widths[0]] * (layers + 1)
        got = function(list(widths), list(trained))
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        right = sum(width for width, k in zip(widths, places_kept(trained)) if k)
        if got == right:
            continue
        for message, wrong in kept_slips(widths, trained).items():
            need(got != wrong or wrong == right, message)
        raise Wrong(
            f"For widths {widths} with trained = {trained} you get {got};"
            f" autograd keeps {right} numbers a row."
        )


# ------------------------------------------------------------------------ predict_steps


def walk(rule, steps, g, p=0.0, decay=0.0) -> float:
    """How far one number goes, in units of the rate."""
    lr, start = 1e-3, p
    m = v = 0.0
    for t in range(1, steps + 1):
        if rule == "SGD":
            p -= lr * g
        elif rule == "momentum":
            m = 0.9 * m + g
            p -= lr * m
        else:
            used = g + decay * p if rule == "Adam with L2" else g
            p -= lr * decay * p if rule == "AdamW" else 0.0
            m = 0.9 * m + 0.1 * used
            v = 0.999 * v + 0.001 * used * used
            p -= lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-12)
    return abs(p - start) / lr


def walks(n) -> dict:
    """{case: (how far, why)}"""
    return {
        "Adam, 1 step, g = 1000": (
            walk("Adam", 1, 1000.0),
            "in the first step m̂ is g and √v̂ is |g|: the quotient is one",
        ),
        f"Adam, {n} steps, g = 0.001": (
            walk("Adam", n, 0.001),
            "with the same gradient each time every step has the length of the rate",
        ),
        "AdamW, 1 step, g = 0": (
            walk("AdamW", 1, 0.0, 2.0, 0.1),
            "the decay goes to p directly: lr · 0.1 · 2",
        ),
        "Adam with L2, 1 step, g = 0": (
            walk("Adam with L2", 1, 0.0, 2.0, 0.1),
            "λp is a gradient like any other here, and Adam divides it by its size",
        ),
        "SGD, 1 step, g = 1000": (walk("SGD", 1, 1000.0), "a step is lr · g"),
        f"SGD, {n} steps, g = 0.001": (
            walk("SGD", n, 0.001),
            "each step is lr · g, and they add up",
        ),
        f"momentum, {n} steps, g = 1": (
            walk("momentum", n, 1.0),
            "m grows towards 1 / (1 - 0.9) = 10, and needs some ten steps for it: add"
            " up 10 (1 - 0.9^t)",
        ),
    }


@checks(
    "All seven. Adam walks by its rate, whatever the size of the gradient; gradient"
    " descent by rate times gradient."
)
def predict_steps(predicted, n=50) -> None:
    """predicted: {case: how far p has gone, in units of the rate}."""
    cases = walks(n)
    said = numbers(predicted, cases)
    for case, (true, why) in cases.items():
        need(
            abs(said[case] - true) <= 0.05 * true,
            f"{case!r}: you say {missed(said[case], true)}. Think of this: {why}.",
        )


# ------------------------------------------------------------------------ choose_method

GB = 10**9
# "last blocks" is the best by one look at the seeds, and not by their mean
ONE_LOOK = {"lucky": (0.3, 1.0, 1.0), "last": (1.0, 1.0, 0.3)}
ONE_LOOK["median"] = (1.7, 0.55, 0.56)
# seeds that weigh more than the method: by the same seed LoRA r 8 is behind in one, and
# by chance alone in the other
PAIRED = {
    "same seeds": {"LoRA r 64": (0.4, 0.6, 0.8), "LoRA r 8": (0.42, 0.62, 0.82)},
    "crossed": {"LoRA r 64": (0.4, 0.6, 0.8), "LoRA r 8": (0.82, 0.42, 0.62)},
}
for found in PAIRED.values():
    found["prompt"] = 1.4, 1.6, 1.8


def methods_drawn(rng, kind):
    """Ways to train a model of 7 billion parameters. "LoRA r 8" is not behind "LoRA r
    64"; "prompt" is, and trains least; "full" is best, and does not fit. kind: what is
    otherwise."""
    total = rng.randint(6600, 6800) * 10**6
    trained = {"full": total, "last blocks": 1600 * 10**6}
    trained |= {"LoRA r 64": 160 * 10**6, "LoRA r 8": 20 * 10**6, "prompt": 80_000}
    loss = {"full": 0.5, "last blocks": 0.9, "LoRA r 64": 0.6, "LoRA r 8": 0.603}
    loss["prompt"] = 0.8
    activations = dict.fromkeys(trained, 2 * GB)
    if kind == "long rows":  # what fits without the activations does not with them
        activations["LoRA r 64"] = activations["LoRA r 8"] = 40 * GB
    if kind == "rank counts":
        loss["LoRA r 8"] = 0.7
    if kind == "blocks":
        loss["last blocks"] = 0.55
    if kind == "heavy":  # the fewest trained parameters, and a larger bill
        activations["LoRA r 8"] = 6 * GB
    if kind == "gap":  # one is behind the best, and one that trains fewer is not
        loss |= {"last blocks": 0.602, "LoRA r 64": 0.65}
    found = {}
    for name, count in trained.items():
        losses = {
            seed: loss[name] + 0.004 * seed + rng.uniform(-0.003, 0.003)
            for seed in SEEDS
        }
        if kind in ONE_LOOK and name == "last blocks":
            losses = dict(zip(SEEDS, ONE_LOOK[kind]))
        if kind in PAIRED and name in PAIRED[kind]:
            losses = dict(zip(SEEDS, PAIRED[kind][name]))
        if kind in PAIRED and name == "LoRA r 8":  # in another order
            losses = {seed: losses[seed] for seed in (1, 2, 0)}
        found[name] = {"total": total, "trained": count}
        found[name] |= {"activations": activations[name], "loss": losses}
    names = list(found)
    rng.shuffle(names)
    return {name: found[name] for name in names}


def bytes_of(way, frozen, trained=16, activations=True):
    still = way["total"] - way["trained"]
    return frozen * still + trained * way["trained"] + activations * way["activations"]


def mean(losses) -> float:
    return sum(losses.values()) / len(losses)


def not_behind(a, b) -> bool:
    """Of losses, a list or {seed: loss}."""
    as_keys = [tuple(x.items()) if isinstance(x, dict) else tuple(x) for x in (a, b)]
    return is_not_behind(*as_keys)


@functools.cache
def is_not_behind(a, b) -> bool:
    pairs = isinstance(a[0], tuple)
    sides = (dict(a), dict(b)) if pairs else (list(a), list(b))
    return told_apart(*sides, loss=True).verdict != "behind"


def method_by_rule(methods, fits, alike=None, join=mean, least=None):
    """Of those that fit and are not behind the best of them, the one that trains
    least."""
    alike = alike or not_behind
    losses = {name: way["loss"] for name, way in methods.items() if fits(way)}
    if not losses:  # by a bill that is too large
        return min(methods, key=lambda name: methods[name]["trained"])
    best = min(losses, key=lambda name: join(losses[name]))
    good = [name for name in losses if alike(losses[name], losses[best])]
    return min(good, key=least or (lambda name: methods[name]["trained"]))


def until_one_is_behind(methods, fits) -> str:
    """From the best downwards, and no further than the first that is behind."""
    losses = {name: way["loss"] for name, way in methods.items() if fits(way)}
    if not losses:
        return min(methods, key=lambda name: methods[name]["trained"])
    found = best = min(losses, key=lambda name: mean(losses[name]))
    size = {name: methods[name]["trained"] for name in losses}
    for name in sorted(losses, key=size.get, reverse=True):
        if size[name] < size[best]:
            if not not_behind(losses[name], losses[best]):
                break
            found = name
    return found


@checks(
    "The whole bill, activations too; the best that fits; and no more trained"
    " parameters than the seeds can tell apart."
)
def choose_method(function, frozen=2) -> None:
    """function(methods, card) -> the name of a method."""
    kinds = "plain", "blocks", "rank counts", "long rows", "heavy", "gap"
    kinds += *ONE_LOOK, *PAIRED
    drawn = [methods_drawn(random.Random(n), kind) for n, kind in enumerate(kinds)]
    choices = Choices()
    for methods in drawn:
        cards = 24 * GB, 34 * GB, 48 * GB, 160 * GB
        for card in (*cards, *tight_cards(methods, frozen)):
            got = function(copy.deepcopy(methods), card)
            a_method(got, methods, card, frozen, choices)
    choices.judge()


def tight_cards(methods, frozen) -> list:
    """For each method one that is just large enough and one that is just too small."""
    bills = sorted(bytes_of(way, frozen) for way in methods.values())
    return [bill + 1000 for bill in bills] + [bill - 1000 for bill in bills[1:]]


def slips_of_bill(methods, frozen, fits) -> dict:
    """{message: what is chosen by a wrong bill}"""
    bills = {
        f"You count {frozen:g} bytes for the trained parameters as well: those are for"
        " the frozen ones, and a trained one takes 4 + 4 + 8.": {
            "trained": 16 + frozen
        },
        f"You count 4 bytes for a frozen parameter: it takes {frozen:g}.": {
            "frozen": 4
        },
        "You leave the activations out of the bill.": {"activations": False},
        "You leave the frozen parameters out of the bill: they are not trained, but"
        " they are there.": {"frozen": 0},
    }
    return {
        message: method_by_rule(
            methods, lambda way, changed=changed: fits(way, **changed)
        )
        for message, changed in bills.items()
    }


ONE_SEED = (  # looks at the seeds that a lucky one decides
    lambda losses: min(losses.values()),
    lambda losses: losses[0],
    lambda losses: losses[2],
    lambda losses: next(iter(losses.values())),
    lambda losses: next(reversed(losses.values())),
)


def slips_of_rule(methods, frozen, fits) -> dict:
    """{message: what is chosen by another rule, the bills being right}"""
    return {
        "You take the one with the lowest mean. Another that trains fewer parameters is"
        " not told apart from it by `compare`.": method_by_rule(
            methods, fits, alike=lambda a, b: a == b
        ),
        "You take the lowest of any seed, or one seed alone: one lucky seed is no"
        " reason. Take the mean over the seeds.": [
            method_by_rule(methods, fits, join=look) for look in ONE_SEED
        ],
        "You take the median of the seeds: the mean is asked for.": method_by_rule(
            methods, fits, join=lambda losses: median(losses.values())
        ),
        "You compare losses that do not belong together, in the order in which they"
        " stand or sorted: `compare` pairs two dictionaries by their seeds.": [
            method_by_rule(
                methods,
                fits,
                alike=lambda a, b, order=order: not_behind(
                    order(a.values()), order(b.values())
                ),
            )
            for order in (list, sorted)
        ],
        "You take the smallest bill: of those that are left the one that *trains* the"
        " fewest parameters is asked for.": method_by_rule(
            methods, fits, least=lambda name: bytes_of(methods[name], frozen)
        ),
        "You stop at the first method that is behind: one that trains still fewer"
        " parameters need not be.": until_one_is_behind(methods, fits),
        "You take the one that trains least: it may be behind the best that fits."
        " (These are losses: `compare(..., loss=True)`.)": method_by_rule(
            methods, fits, alike=lambda a, b: True
        ),
        "You take the best of all methods, whether it fits or not.": method_by_rule(
            methods, lambda way: True
        ),
    }


def a_method(name, methods, card, frozen, choices) -> None:
    need(name is not None, "Your function gives None: is there a `return` at its end?")
    need(
        isinstance(name, str) and name in methods,
        f"{name!r} is not one of {', '.join(methods)}: return the name.",
    )

    def fits(way, **changed):
        return bytes_of(way, **{"frozen": frozen} | changed) <= card

    right = method_by_rule(methods, fits)
    slips = slips_of_bill(methods, frozen, fits) | slips_of_rule(methods, frozen, fits)
    choices.add(name, right, slips, no_method(name, right, methods, card, frozen))


def no_method(name, right, methods, card, frozen) -> str:
    """What to say of a wrong choice that has no name."""
    needed = bytes_of(methods[name], frozen)
    if needed > card:
        return f"{name!r} needs {needed:,} bytes, and the card has {card:,}."
    return f"You choose {name!r}; by the rule it is {right!r}."


# ---------------------------------------------------------------------------- fine_tune


class WithFilter(nn.Module):
    """A model, and parameters of three, two and no dimensions that its loss depends on:
    a size does not tell which of them decay."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.filter = nn.Parameter(torch.randn(2, 3, 4))
        self.row = nn.Parameter(torch.randn(1, 5))
        self.norm_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, **batch):
        more = self.filter, self.row, self.norm_scale
        loss = self.model(**batch).loss + 0.1 * sum(one.sin().mean() for one in more)
        return SimpleNamespace(loss=loss)


LEFT_OVER = 0.1  # each number of the gradients that the model comes with


def reference_run(model, batches, lr, warmup, clip, decay, slip=None):
    """The losses of AdamW with warm-up, clipping and decay of matrices only; slip: what
    is done wrongly."""
    params = [p for p in model.parameters() if p.requires_grad]
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    sums = [torch.full_like(p, LEFT_OVER) for p in params]
    still = [p for p in model.parameters() if not p.requires_grad]
    still = [torch.full_like(p, LEFT_OVER) for p in still]
    losses = []
    for t, batch in enumerate(batches, 1):
        loss = model(**(batches[0] if slip == "one batch" else batch)).loss
        losses.append(loss.item())
        grads = list(torch.autograd.grad(loss, params, allow_unused=True))
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
        if slip == "never zeroed" or (slip == "zeroed late" and t == 1):
            grads = [a + g for a, g in zip(sums, grads)]
        also = still if slip == "frozen clipped" else []
        grads = clipped(grads + also, clip, slip)
        sums, still = grads[: len(params)], grads[len(params) :]
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(params, grads)):
                rate = (slip == "no rate" or lr) * warmed_up(t, warmup, p, slip)
                if slip in ("L2", "SGD"):
                    g = g + decay * decays(p, slip) * p
                else:
                    p.mul_(1 - rate * decay * decays(p, slip))
                if slip == "SGD":
                    p -= rate * g
                    continue
                fresh = slip == "new optimizer"
                steps = 1 if fresh else t
                m[i] = 0.9 * m[i] * (not fresh) + 0.1 * g
                v[i] = 0.999 * v[i] * (not fresh) + 0.001 * g * g
                root = (v[i] / (1 - 0.999**steps)).sqrt() + 1e-8
                p -= rate * m[i] / (1 - 0.9**steps) / root
    return losses


def warmed_up(t, warmup, p, slip) -> float:
    """The share of the rate at step t."""
    if slip == "no warm-up" or (slip == "one group" and p.dim() < 2):
        return 1.0
    if slip == "late":  # the rate is set behind the step
        return 1.0 if t == 1 else min(1.0, (t - 1) / warmup)
    t += {"from 0": -1, "one ahead": 1}.get(slip, 0)
    return t / warmup if slip == "no end" else min(1.0, t / warmup)


def decays(p, slip) -> bool:
    if slip == "one dimension":
        return p.dim() != 1
    if slip == "by size":
        return p.numel() > max(p.shape, default=1)
    if slip in ("all decay", "no decay"):
        return slip == "all decay"
    if slip == "two dimensions":
        return p.dim() == 2
    return (p.dim() > 1) != (slip == "turned groups")


def clipped(grads, clip, slip):
    if slip == "no clipping":
        return grads
    if slip == "values clipped":
        return [g.clamp(-clip, clip) for g in grads]
    found = []
    lengths = torch.stack([g.norm() for g in grads])
    matrices = torch.tensor([g.dim() > 1 for g in grads])
    for g, own in zip(grads, lengths):
        together = lengths
        if slip == "each clipped":
            together = own
        if slip == "groups clipped":
            together = lengths[matrices == (g.dim() > 1)]
        length = together.norm().item()
        factor = clip / (length + 1e-6)
        found.append(g * (factor if slip == "always scaled" else min(1.0, factor)))
    return found


SLIPS = {
    "never zeroed": "The gradients of earlier batches are still in .grad: set them to"
    " zero before each backward pass.",
    "zeroed late": "The first step has more than its own gradient: what an earlier run"
    " left in .grad is still there.",
    "frozen clipped": "Gradients that were left over in frozen parameters count in your"
    " norm: it is that of what is trained.",
    "no warm-up": "The rate does not rise: at step t of the warm-up it is lr · t /"
    " warmup.",
    "from 0": "Your first step has the rate 0: it is step 1 of `warmup`.",
    "no end": "The rate rises on and on: after the warm-up it stays at lr, so"
    " min(1, t / warmup).",
    "no rate": "The rate is lr times the share of the warm-up: lr is missing.",
    "late": "The rate is set behind the step, so each step has the one before: set it"
    " first.",
    "one ahead": "The rate is one step ahead: step 1 has lr / warmup.",
    "one group": "Biases and norms do not warm up: the rate goes into every parameter"
    " group.",
    "one batch": "You train on the first batch again and again.",
    "new optimizer": "Adam's means begin from zero in each step: make the optimizer"
    " once, before the loop.",
    "SGD": "That is plain gradient descent: `torch.optim.AdamW`, or its formula.",
    "no clipping": "The gradients are not clipped.",
    "groups clipped": "You clip each parameter group by itself: the norm is that of all"
    " gradients together.",
    "each clipped": "You clip each tensor by itself: the norm is that of all gradients"
    " together.",
    "values clipped": "You clip the values: `clip` is the largest norm of all gradients"
    " together.",
    "always scaled": "You scale every gradient to the norm `clip`: only longer ones are"
    " made shorter.",
    "all decay": "Biases and norms decay too: only matrices (two dimensions and more)"
    " do.",
    "no decay": "Nothing decays.",
    "turned groups": "The groups are turned round: matrices decay, biases and norms do"
    " not.",
    "two dimensions": "A parameter of three dimensions does not decay: matrices are"
    " those of two dimensions *and more*.",
    "one dimension": "A parameter without dimensions, one number, decays: matrices are"
    " those of two dimensions and more.",
    "by size": "A matrix with a single row does not decay: what counts is the number of"
    " its dimensions.",
    "L2": "The decay has got into the gradient (L2, `torch.optim.Adam`): AdamW shrinks"
    " the weights directly.",
}


@checks(
    "Weights and losses are those of the formula: warm-up, clipping over all gradients,"
    " decay of matrices only, frozen parameters left alone. And with three seeds it is"
    " ahead of the untouched model by the course's rule."
)
def fine_tune(function) -> None:
    """function(model, batches, lr, warmup, clip, weight_decay) -> [a loss a batch]."""
    for clip in (0.05, 3.0):
        settings = 0.01, 4, clip, 0.3
        start = WithFilter(small_gpt(random.randrange(10**6))).double()
        start.model.get_input_embeddings().weight.requires_grad_(False)
        batches = [batch_of(8, random.randrange(10**6)) for _ in range(7)]
        model = copy.deepcopy(start)
        for p in model.parameters():  # of an earlier run: the text says so
            p.grad = torch.full_like(p, LEFT_OVER)
        got = function(model, copy.deepcopy(batches), *settings)
        judge_run(got, model, start, batches, settings)
    tuned, untouched = {}, {}
    for seed in SEEDS:
        model = small_gpt(seed)
        untouched[seed] = loss_on_new(model)
        batches = [batch_of(16, 100 * seed + i) for i in range(25)]
        function(model.train(), batches, 1e-2, 3, 1.0, 0.0)
        tuned[seed] = loss_on_new(model)
    result = told_apart(tuned, untouched, loss=True)
    need(
        result.verdict == "ahead",
        f"With three seeds the tuned model is {result} of the untouched one in loss.",
    )


def batch_of(rows, seed) -> dict:
    ids = chains(rows, seed)
    return {"input_ids": ids, "labels": ids}


def weights_of(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def look_at_still_ones(model, start, right) -> None:
    """Parameters that have not moved, and should have."""
    before, wanted = (dict(one.named_parameters()) for one in (start, right))
    still = [
        name
        for name, p in model.named_parameters()
        if torch.equal(p, before[name]) and not torch.equal(p, wanted[name])
    ]
    need(
        not still,
        f"{', '.join(still[:3])}{' …' * (len(still) > 3)}: not trained, for no"
        " parameter group has the parameter itself.",
    )


def judge_run(got, model, start, batches, settings):
    table = model.model.get_input_embeddings().weight
    need(
        torch.equal(table, start.model.get_input_embeddings().weight),
        "A frozen parameter has changed (requires_grad was False): give the optimizer"
        " only what is trained.",
    )
    mine = weights_of(model)
    need(
        not torch.equal(mine, weights_of(start)),
        "The model has not changed: train the one that was given, in place.",
    )

    def by(slip=None):
        other = copy.deepcopy(start)
        losses = reference_run(other, batches, *settings, slip)
        return weights_of(other), losses

    right, losses = by()
    if not same(mine, right):
        for slip, message in SLIPS.items():
            need(not same(mine, by(slip)[0]), message)
        other = copy.deepcopy(start)
        reference_run(other, batches, *settings)
        look_at_still_ones(model, start, other)
        raise Wrong(
            "After 7 batches your weights are not those of the formula, and it is none"
            " of the usual slips. Compare one step: the gradient's norm, the rate, and"
            " which parameters decay."
        )
    flags = [[p.requires_grad for p in one.parameters()] for one in (model, start)]
    need(
        flags[0] == flags[1],
        "After your function other parameters require gradients than before: leave"
        " requires_grad as it was.",
    )
    need(got is not None, "Your function gives None: return the list of losses.")
    need(
        isinstance(got, (list, tuple)) and len(got) == len(batches),
        f"Return a list of {len(batches)} losses, one a batch.",
    )
    need(
        not any(getattr(loss, "requires_grad", False) for loss in got),
        "Each loss in your list still holds the graph of its step, with all its"
        " activations: `loss.item()` keeps the number alone.",
    )
    need(
        same(torch.tensor([float(loss) for loss in got]), torch.tensor(losses)),
        "The weights are right, and the losses are not: give each batch's loss as it"
        " was before its step.",
    )
