"""What exercises of one kind have in common: predictions are compared with numbers that
the check computes, a choice is judged by the course's rule, and a method that is built
is put on a layer, compared with its equation, merged, and trained."""

import math
import random
from collections import OrderedDict
from statistics import median

import torch
from torch import nn

from ... import Base, LayerConfig, get_peft_model
from ..comparison import compare as told_apart
from .practice import fit, numbers
from .teacher import Wrong, compare, need, same

# ---- predictions ---------------------------------------------------------------------


def judge_numbers(predicted, cases: dict, near: float = 0.05) -> None:
    """predicted: {case: number}; cases: {case: (the computed number, what to think
    of)}. near: the error that is allowed, relative to the number or to a half."""
    said = numbers(predicted, cases)
    for case, (true, why) in cases.items():
        got = said[case]
        if not abs(got - true) <= near * max(abs(true), 0.5):
            raise Wrong(f"{case!r}: you say {got:.4g}, and it is {true:.4g}. {why}")


# ---- choices -------------------------------------------------------------------------


def told_by_the_mean() -> list:
    """Four lists of a loss a seed, of which the first has the lowest mean. The second
    has the lowest loss of all, and of the first seed; the third has the lowest median,
    and the lowest loss of the last seed; the fourth has the lowest largest loss."""
    return [
        [0.22, 0.41, 0.24],
        [0.05, 0.60, 0.55],
        [0.60, 0.20, 0.20],
        [0.33, 0.34, 0.33],
    ]


def right_answers(share: float, questions: int, seeds: int = 3) -> list:
    """For each seed a string of 0 and 1: each question is answered right with this
    probability."""
    return [
        "".join("1" if random.random() < share else "0" for _ in range(questions))
        for _ in range(seeds)
    ]


def judge_verdict(said, right, other, what: str) -> None:
    """`said` is the course's verdict on the answers `right` against `other`: {seed:
    string}."""
    verdict = told_apart(right, other).verdict
    if isinstance(said, str) and said == verdict:
        return
    need(
        isinstance(said, str),
        f"{what}: the verdict is a word, `compare(…).verdict`; you return a"
        f" {type(said).__name__}.",
    )
    turned = {"ahead": "behind", "behind": "ahead"}
    raise Wrong(
        f"{what}: your verdict is turned round. compare(a, b) says whether *a* is ahead"
        " of b, and right answers are not a loss."
        if turned.get(verdict) == said
        else f"{what}: you say {said!r}; the course's rule says {verdict!r}. Give"
        " `compare` the answers of all seeds, {seed: string}, so that it sees every"
        " answer."
    )


# how far from a mean, in steps, three seeds' losses lie: of the right choice, and of
# another one, whose mean is a step higher
TRAPS = {
    "lucky": ((0, 0, 0), (-4, 4, 3)),
    "worst": ((-2, -2, 4), (1, 1, 1)),
    "median": ((-6, 2, 4), (-3, 1, 5)),
    "first": ((2, -1, -1), (1, -0.5, 2.5)),
}
LOOKS = {
    "You take the lowest loss of any seed. One lucky seed is no reason: take the mean"
    " over the seeds.": min,
    "You look at the worst seed: take the mean over the seeds.": max,
    "You take the median of the seeds: the mean is asked for.": median,
    "You look at the first seed alone: take the mean over all seeds.": lambda losses: (
        losses[0]
    ),
}


def trap(kind: str, mean: float, step: float) -> tuple:
    """Losses, one a seed, of the right choice and of another one that is better by one
    look at the seeds: in the lucky seed, the worst, the median, or the first."""
    own, other = TRAPS[kind]
    if kind != "first":
        own, other = random.sample(own, 3), random.sample(other, 3)
    return [mean + step * at for at in own], [mean + step * at for at in other]


def only_one_seed(losses: dict, chosen) -> str:
    """The slip by which `chosen` is the best of {choice: [a loss a seed]}, or "". A
    choice may be a tuple that begins with what is chosen."""
    for message, look in LOOKS.items():
        best = min(losses, key=lambda choice: look(losses[choice]))
        if chosen in (best, best[0]):
            return message
    return ""


def alike_answers(share: float, questions: int, seeds: int = 3) -> list:
    """For each seed the same string, with this share of ones: percentages alone would
    show no spread."""
    return right_answers(share, questions, 1) * seeds


# ---- methods that are built ----------------------------------------------------------


def configured(make):
    """A configuration whose adapter of a layer is make(base)."""

    class Configured(LayerConfig):
        def create(self, base, path):
            return make(base)

    return Configured


class Built:
    """A learner's method on one linear layer: `layer` is frozen, `adapter` is the
    learner's, `model` the PeftModel around both."""

    def __init__(self, config_class, d_in: int, d_out: int, bias=True, **settings):
        need(
            isinstance(config_class, type) and issubclass(config_class, LayerConfig),
            "Give me the configuration's class itself, a subclass of LayerConfig.",
        )
        layers = OrderedDict(proj=nn.Linear(d_in, d_out, bias=bias))
        self.layer = layers["proj"]
        self.W = self.layer.weight.detach().clone()
        config = config_class(target_modules=["proj"], **settings)
        self.model = get_peft_model(nn.Sequential(layers), config)
        self.slot = self.model.get_base_model().proj
        self.adapter = self.slot.adapters["default"]
        self.x = torch.randn(3, 4, d_in)

    def check_parameters(self, shapes: dict) -> None:
        """The adapter's parameters have these names and shapes."""
        own = dict(self.adapter.named_parameters())
        for name, shape in shapes.items():
            need(
                name in own,
                f"I look for an nn.Parameter as self.{name}: a plain tensor is neither"
                " trained nor saved.",
            )
            need(
                own[name].shape == shape,
                f"self.{name} should have the shape {shape}; yours has"
                f" {tuple(own[name].shape)}.",
            )
        more = sorted(own.keys() - shapes.keys())
        need(not more, f"You train more than is asked for: {', '.join(more)}.")
        for name, p in self.model.named_parameters():
            if not name.rpartition(".")[0].endswith("adapters.default"):
                need(not p.requires_grad, f"The base is trained too: {name}.")

    def check_start(self) -> None:
        """At first the model is the base, bit for bit in its weights."""
        need(
            torch.equal(self.layer.weight, self.W),
            "You change the base's weight: what you learn belongs into the adapter.",
        )
        with torch.no_grad():
            y = nn.functional.linear(self.x, self.W, self.layer.bias)
            need(
                same(self.slot(self.x), y),
                "Before the first step the layer does not give what the base gives:"
                " the change has to be zero at the start.",
            )

    def fill(self, size: float = 0.5) -> None:
        """Random numbers in the place of all parameters."""
        with torch.no_grad():
            for p in self.adapter.parameters():
                p.copy_(size * torch.randn_like(p))

    def compare(self, delta, mistakes: dict, same_values: dict | None = None) -> None:
        """The output, its gradients, `delta` and the merged layer are those of W +
        delta. mistakes, same_values: {message: another delta}."""
        x = self.x.clone().requires_grad_()
        learnt = dict(self.adapter.named_parameters()) | {"x": x}

        def output(change):
            return nn.functional.linear(x, self.W + change, self.layer.bias)

        compare(
            self.slot(x),
            output(delta),
            {message: output(wrong) for message, wrong in mistakes.items()},
            "The layer's output",
            learnt=learnt,
            same_values={m: output(wrong) for m, wrong in (same_values or {}).items()},
        )
        compare(self.delta(), delta.detach(), mistakes, "delta(base)", learnt={})
        self.check_merging()

    def delta(self):
        with torch.no_grad():
            return self.adapter.delta(Base(self.slot, "default"))

    def check_merging(self) -> None:
        with torch.no_grad():
            before = self.slot(self.x)
            self.model.merge_adapter()
            merged = self.slot(self.x)
            self.model.unmerge_adapter()
        need(same(merged, before), "Merged, the layer gives something else.")
        need(torch.equal(self.layer.weight, self.W), "Unmerging gives another base.")

    def check_learning(self, steps: int = 40, lr: float = 0.05) -> None:
        """Adam makes the layer come nearer to another one that is not far away."""
        size = 0.3 * self.W.norm() / math.sqrt(self.W.numel())
        target = self.W + size * torch.randn_like(self.W)
        x = torch.randn(64, self.W.shape[1])
        y = nn.functional.linear(x, target, self.layer.bias).detach()
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        losses = []

        def loss():
            distance = (self.slot(x) - y).square().mean()
            losses.append(distance.item())
            return distance

        fit(loss, learnt, steps, lr)
        need(
            losses[-1] < 0.9 * losses[0],
            f"It does not learn: a loss of {losses[0]:.3g} is {losses[-1]:.3g} after"
            f" {steps} steps of Adam.",
        )
