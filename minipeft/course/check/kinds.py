"""What exercises of one kind have in common: predictions are compared with numbers that
the check computes, a choice is judged by the course's rule, and a method that is built
is put on a layer, compared with its equation, merged, and trained."""

import copy
import math
import operator
import random
from collections import OrderedDict
from statistics import median

import torch
from torch import nn

from ... import Base, LayerConfig, LinearDelta, get_peft_model
from .practice import copy_stands_alone, fit, missed, numbers
from .teacher import Wrong, compare, need, same

# ---- predictions ---------------------------------------------------------------------


def judge_numbers(predicted, cases: dict, near: float = 0.05) -> None:
    """predicted: {case: number}; cases: {case: (the computed number, what to think
    of)}. near: the error that is allowed, relative to the number or to a half."""
    said = numbers(predicted, cases)
    for case, (true, why) in cases.items():
        got = said[case]
        if not abs(got - true) <= near * max(abs(true), 0.5):
            raise Wrong(f"{case!r}: you say {missed(got, true)}. {why}")


# ---- choices -------------------------------------------------------------------------


TURNED = {"ahead": "behind", "behind": "ahead", "not told apart": "not told apart"}


class Choices:
    """What a learner chooses in each draw, judged together. In one draw two mistakes
    may choose alike: one is named only if it explains every choice, and no other one
    does."""

    def __init__(self, same=operator.eq):
        self.same, self.draws = same, []

    def add(self, got, right, mistakes: dict, otherwise: str) -> None:
        """mistakes: {message: what this mistake chooses here, or a list of what its
        forms choose}, in each draw the same messages; otherwise: what to say of a wrong
        choice that has no name."""
        forms = {
            message: wrong if isinstance(wrong, list) else [wrong]
            for message, wrong in mistakes.items()
        }
        self.draws.append((got, right, forms, otherwise))

    def add_verdict(self, said, wanted, turned, otherwise, mistakes=None) -> None:
        """`said` should be the verdict of the course's rule, a word. turned: what to
        say of verdicts that are turned round."""
        need(
            isinstance(said, str),
            "The verdict is a word: `compare(…).verdict`. You return a"
            f" {type(said).__name__}.",
        )
        said = said.strip().rstrip(".").lower()
        mistakes = {f"Your verdict is turned round: {turned}": TURNED[wanted]} | (
            mistakes or {}
        )
        self.add(said, wanted, mistakes, otherwise + agreeing(said, wanted))

    def judge(self) -> None:
        fits = [self.same(got, right) for got, right, *_ in self.draws]
        if all(fits):
            return
        messages = [text for text in self.draws[0][2] if self.explained(text)]
        first = self.draws[fits.index(False)]
        raise Wrong(messages[0] if len(messages) == 1 else first[-1])

    def explained(self, message: str) -> bool:
        """Whether one form of this mistake gives every choice."""
        made = [got for got, *_ in self.draws]
        forms = zip(*(mistakes[message] for *_, mistakes, _ in self.draws))
        return any(all(map(self.same, made, form)) for form in forms)


def agreeing(said: str, wanted: str) -> str:
    """A word on seeds that agree, where the rule does not tell the two apart."""
    if said not in ("ahead", "behind") or wanted != "not told apart":
        return ""
    return (
        " That all seeds agree, or that their ranges do not overlap, is not enough:"
        " the rule asks how much their differences vary."
    )


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


# how far from a mean, in steps, three seeds' losses lie: of the right choice, and of
# another one, whose mean is a step higher
TRAPS = {
    "lucky": ((0, 0, 0), (-4, 4, 3)),
    "worst": ((-2, -2, 4), (1, 1, 1)),
    "median": ((-6, 2, 4), (-3, 1, 5)),
    "first": ((2, -1, -1), (1, -0.5, 2.5)),
    "last": ((-1, -1, 2), (2.5, -0.5, 1)),
}
LOOKS = {  # {message: the looks at the seeds that it tells of}
    "You take the lowest loss of any seed. One lucky seed is no reason: take the mean"
    " over the seeds.": [min],
    "You look at the worst seed: take the mean over the seeds.": [max],
    "You take the median of the seeds: the mean is asked for.": [median],
    "You look at the first or the last seed alone: take the mean over all seeds.": [
        lambda losses: losses[0],
        lambda losses: losses[-1],
    ],
}


def trap(kind: str, mean: float, step: float) -> tuple:
    """Losses, one a seed, of the right choice and of another one that is better by one
    look at the seeds: in the lucky seed, the worst, the median, the first, or the
    last."""
    own, other = TRAPS[kind]
    if kind not in ("first", "last"):
        own, other = random.sample(own, 3), random.sample(other, 3)
    return [mean + step * at for at in own], [mean + step * at for at in other]


def by_one_look(losses: dict) -> dict:
    """{message: the best ones of {choice: [a loss a seed]} by its looks}"""
    return {
        message: [
            min(losses, key=lambda choice: look(losses[choice])) for look in looks
        ]
        for message, looks in LOOKS.items()
    }


def alike_answers(share: float, questions: int, seeds: int = 3) -> list:
    """For each seed the same string, with exactly this share of ones, so that no two
    scores are equal by chance: percentages alone would show no spread."""
    right = round(share * questions)
    answers = random.sample("1" * right + "0" * (questions - right), questions)
    return ["".join(answers)] * seeds


# ---- methods that are built ----------------------------------------------------------


def check_life(layer, adapter_of, another, x) -> None:
    """What a model does to an adapter besides training it. layer(x) is computed with
    adapter_of(layer), whose parameters are no longer those of the start; another() is
    the same frozen layer with a new adapter, and another(more=True) one whose settings
    differ."""
    with torch.no_grad():
        before = layer(x)
        another(more=True)
        need(
            same(layer(x), before),
            "A second adapter, of another layer, changes what the first one computes:"
            " what belongs to one of them is kept on `self`, not on the class.",
        )
        layer.eval()
        need(
            same(layer(x), before),
            "In evaluation, after .eval(), your layer gives something else: the adapter"
            " speaks there, too.",
        )
        layer.train()
        copy_stands_alone(layer, lambda layer: layer(x), adapter_of(layer))
        loaded = another()
        adapter_of(loaded).from_file(adapter_of(layer).to_file())
        need(
            same(loaded(x), before),
            "Saved, and loaded into a new adapter, it gives something else: what is"
            " done at the first call in training is too late there. How it starts"
            " belongs in __init__.",
        )


def configured(make):
    """A configuration whose adapter of a layer is make(base)."""

    class Configured(LayerConfig):
        def create(self, base, path):
            return make(base)

    return Configured


@torch.no_grad()
def update_fits(slot, x, name: str = "default") -> None:
    """A LinearDelta's two answers have the shapes of what they are added to."""
    adapter, base = slot.adapters[name], Base(slot, name)
    delta = adapter.delta(base)
    need(
        isinstance(delta, torch.Tensor),
        f"delta(base) should be a tensor; yours is a {type(delta).__name__}.",
    )
    answers = {
        "delta(base)": (delta, slot.base_layer.weight),
        "update(base, x)": (adapter.update(base, x), slot.base_layer(x)),
    }
    for what, (mine, there) in answers.items():
        need(
            not isinstance(mine, torch.Tensor) or mine.shape == there.shape,
            f"{what} has the shape {tuple(getattr(mine, 'shape', ()))}, and what it is"
            f" added to has {tuple(there.shape)}.",
        )


class Built:
    """A learner's method on one linear layer: `layer` is frozen, `adapter` is the
    learner's, `model` the PeftModel around both."""

    def __init__(
        self, config_class, d_in: int, d_out: int, bias=True, layer=None, **settings
    ):
        need(
            isinstance(config_class, type) and issubclass(config_class, LayerConfig),
            "Give me the configuration's class itself, a subclass of LayerConfig.",
        )
        self.config_class, self.settings = config_class, settings
        layers = OrderedDict(proj=layer or nn.Linear(d_in, d_out, bias=bias))
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
        if isinstance(self.adapter, LinearDelta):
            update_fits(self.slot, self.x)
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

    def compare(
        self,
        delta,
        mistakes: dict,
        same_values: dict | None = None,
        formula=None,
        update=None,
    ) -> None:
        """The output, its gradients, `delta` and the merged layer are those of W +
        delta. mistakes, same_values: {message: another delta}; formula, update: a
        slips.Formula of delta, and one of what `update` gives, if it is another."""
        x = self.x.clone().requires_grad_()
        learnt = dict(self.adapter.named_parameters()) | {"x": x}

        def output(change):
            return nn.functional.linear(x, self.W + change, self.layer.bias)

        formula_of_output = formula and formula.then(output)
        if update is not None:
            formula_of_output = update.then(output(0 * self.W).detach().add)
        compare(
            self.slot(x),
            output(delta),
            {message: output(wrong) for message, wrong in mistakes.items()},
            "The layer's output",
            learnt=learnt,
            same_values={m: output(wrong) for m, wrong in (same_values or {}).items()},
            formula=formula_of_output,
        )
        compare(
            self.delta(),
            delta.detach(),
            mistakes,
            "delta(base)",
            learnt={},
            formula=formula,
        )
        self.check_merging()

    def check_life(self, **others) -> None:
        """What a model does to an adapter besides training it, filled as it is now.
        others: settings of a second one, on a layer of another shape."""
        d_out, d_in = self.W.shape

        def another(more=False):
            if more:
                size, changed = (d_in + 1, d_out + 2), others
            else:
                size, changed = (d_in, d_out), {"layer": copy.deepcopy(self.layer)}
            return Built(self.config_class, *size, **self.settings | changed).slot

        check_life(self.slot, lambda slot: slot.adapters["default"], another, self.x)

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

    @torch.no_grad()
    def check_modes(self) -> None:
        """In evaluation the layer is what it is in training (for a method without
        dropout), and it follows its parameters, merged too."""
        trained = self.model.train() and self.slot(self.x)
        need(
            same(self.model.eval() and self.slot(self.x), trained),
            "After model.eval() the layer gives something else, and nothing in this"
            " method depends on the mode.",
        )
        for name, p in self.adapter.named_parameters():
            before = self.slot(self.x)
            p.add_(0.5 * torch.randn_like(p))
            need(
                not same(self.slot(self.x), before),
                f"After model.eval() the layer does not follow a change of {name}:"
                " something is kept from an earlier call.",
            )
            merged = self.slot(self.x)
            self.model.merge_adapter()
            fits = same(self.slot(self.x), merged)
            self.model.unmerge_adapter()
            need(fits, "Merged once more, the layer gives something of before.")
        self.model.train()

    @torch.no_grad()
    def check_copies(self, other) -> None:
        """A deep copy is a layer of its own; the parameters are all that is learnt,
        and another layer of this kind, `other`, takes them over; nothing as large as
        the weight is saved."""
        copy_stands_alone(self.slot, lambda slot: slot(self.x), self.adapter)
        saved = self.adapter.state_dict()
        large = [
            name
            for name, kept in saved.items()
            if name not in dict(self.adapter.named_parameters())
            and kept.numel() >= self.W.numel()
        ]
        need(
            not large,
            f"{', '.join(large)} is as large as the weight, and would be saved with"
            " each adapter.",
        )
        other.layer.load_state_dict(self.layer.state_dict())
        other.adapter.load_state_dict(saved)
        need(
            same(other.slot(self.x), self.slot(self.x)),
            "Loaded into another layer, the same parameters give something else:"
            " something is set at the first call, or kept beside them.",
        )

    def check_learning(self, steps: int = 40, lr: float = 0.05) -> None:
        """Adam makes the layer come nearer to another one that is not far away."""
        size = 0.3 * self.W.norm() / math.sqrt(self.W.numel())
        target = self.W + size * torch.randn_like(self.W)
        x = torch.randn(64, self.W.shape[1])
        y = nn.functional.linear(x, target, self.layer.bias).detach()
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        losses = []
        if isinstance(self.adapter, LinearDelta):
            update_fits(self.slot, x)

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
