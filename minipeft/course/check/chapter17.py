"""Chapter 17, in the ecosystem: two runs compared, keys repaired, where runs part said
beforehand, answers only, llama.cpp's rows, a choice among adapters."""

import copy
import math
import random
from statistics import fmean, median

import torch

from ..comparison import compare as told_apart
from .chapter06 import Largest
from .kinds import Choices, told_by_the_mean
from .practice import written
from .slips import Formula
from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "answers_only",
    "choose_adapter",
    "first_difference",
    "gguf_lora",
    "predict_parting",
    "repair_keys",
]

FIELDS = ("batch", "loss", "grad_norm", "lr")


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def no_return(got):
    need(got is not None, "Your function gives None: is there a `return` at its end?")


# ---- 1. where two runs part ----------------------------------------------------------


def trace(steps):
    return {
        "batch": [float(random.randrange(10**6)) for _ in range(steps)],
        "loss": [3 * 0.9**t + random.random() / 10 for t in range(steps)],
        "grad_norm": [2 + random.random() for _ in range(steps)],
        "lr": [1e-3 * (1 - t / steps) for t in range(steps)],
    }


def changed(run, step, field, factor=1.01):
    """`run` with everything from (step, field) on a little different."""
    new = {name: list(values) for name, values in run.items()}
    first = FIELDS.index(field)
    for t in range(step, len(run["loss"])):
        for place, name in enumerate(FIELDS):
            late = t > step and name not in ("batch", "lr")
            late |= t == step and place > first and name == "grad_norm"
            if late or (t, place) == (step, first):
                new[name][t] *= factor
    return new


@checks(
    "The first difference, in the order in which a step computes: that is the place."
)
def first_difference(function, tolerance=1e-4) -> None:
    """function(ours, theirs) -> (step, field), or None; each is {field: one number a
    step}. Numbers that differ by more than `tolerance`, relative, are different."""
    steps = random.randint(12, 15)
    run = trace(steps)
    rounded = {n: [v * (1 + 1e-7) for v in values] for n, values in run.items()}
    rounded["batch"] = run["batch"]  # a checksum is exact
    got = function(run, rounded)
    need(
        got is None,
        "Two runs whose numbers differ by rounding (one part in ten million) are the"
        " same run: compare with a relative tolerance, and return None.",
    )
    less = 1 + tolerance / 3
    need(
        all(function(run, changed(run, 2, name, less)) is None for name in FIELDS[1:]),
        f"Two runs whose numbers differ by {tolerance / 3:.1g} of their size are the"
        f" same run here: only what differs by more than {tolerance:g} counts.",
    )
    for factor, message in (
        (2.0, "One side's loss is twice the other's from step 2 on: you return None."),
        (
            0.5,
            "You find a difference only where one side is larger: take the absolute"
            " value of the difference.",
        ),
    ):
        need(function(run, changed(run, 2, "loss", factor)) is not None, message)
    tiny = {n: [v * 1e-6 for v in values] for n, values in run.items()}
    need(
        function(tiny, changed(tiny, 2, "loss")) is not None,
        "Small numbers that differ by a hundredth are different: your tolerance is"
        " absolute, and learning rates are small. Take a relative one.",
    )
    early = changed(run, 1, "loss")  # the rows differ too, but later
    early["batch"][4] *= 2
    need(
        function(run, early) != (4, "batch"),
        "You go through all steps of one field before you look at the next. A batch"
        " that differs at step 4 cannot explain a loss that differs at step 1: go"
        " through the steps, and within a step through the fields.",
    )
    judge_place(function(run, early), 1, "loss")
    both = changed(run, 3, "grad_norm")  # and the rate in the same step
    both["lr"][3] *= 2
    judge_place(function(run, both), 3, "grad_norm")
    none = changed(run, 4, "lr", 0.0)
    need(
        function(none, copy.deepcopy(none)) is None,
        "Both rates are 0 at one step, as at the end of a schedule: 0 and 0 are the"
        " same number.",
    )
    judge_place(function(none, run), 4, "lr", math.inf)
    judge_place(function(run, none), 4, "lr", math.inf)
    end = (steps - 1, "loss"), (steps - 1, "grad_norm")
    for step, field in ((2, "loss"), (1, "lr"), (0, "grad_norm"), (3, "batch"), *end):
        for factor in (1.01, 0.99, 1 + 3 * tolerance):
            other = changed(run, step, field, factor)
            order = random.sample(FIELDS, len(FIELDS))  # that of a file may be any
            other = {name: other[name] for name in order}
            ours = {name: run[name] for name in order}
            judge_place(function(ours, other), step, field, factor, tolerance)


def judge_place(got, step, field, factor=1.01, tolerance=1e-4):
    need(
        not math.isinf(factor) or (got and tuple(got) == (step, field)),
        f"From (step {step}, {field}) on one side's number is 0, and the other's is"
        " not: they differ.",
    )
    need(
        got is not None or step < 11,
        f"The runs differ at their last step, {step}: you return None.",
    )
    need(
        got is not None or abs(factor - 1) > 5e-3,
        f"Two numbers that differ by {3 * tolerance:g} of their size are not the same:"
        " your tolerance is too wide.",
    )
    need(
        isinstance(got, tuple | list) and len(got) == 2,
        f"Return (step, field), for example (0, 'lr'); yours is {got!r}.",
    )
    got = tuple(got)
    need(got != (field, step), "Step and field are swapped: return (step, field).")
    need(got != (step + 1, field), "Steps count from 0.")
    need(
        got[0] == step,
        f"You return {got!r}; the runs differ from (step {step}, {field}) on. What"
        " comes later is a consequence: return the first.",
    )
    need(
        got == (step, field),
        f"The first difference is ({step}, {field!r}); yours is {got!r}. Within a step"
        f" the order is {', '.join(FIELDS)}.",
    )


# ---- 2. keys -------------------------------------------------------------------------


@checks("Every tensor has the key under which PEFT looks for it.")
def repair_keys(function, name="default", wrapper="module") -> None:
    """function(state) -> state with PEFT's keys."""
    right, state = {}, {}
    layers = (
        "model.layers.0.self_attn.q_proj",
        f"model.sub{wrapper}.up_proj",
        f"model.{name}_head.v_proj",
        f"model.sub{wrapper}.down_proj",
        "lm_head",
    )
    for at, layer in enumerate(layers):
        for part in ("lora_A", "lora_B"):
            value = draw(2, 3)
            key = f"base_model.model.{layer}.{part}.weight"
            right[key] = value
            state[spoilt(key, at, name, wrapper)] = value
    before = dict(state)
    got = function(state)
    no_return(got)
    need(isinstance(got, dict), f"Return a dict; yours is a {type(got).__name__}.")
    need(
        state == before or got is not state,
        "You change the dictionary that you were given: return a new one.",
    )
    for key in got:
        name_fault(key, name, wrapper)
    missing = [key for key in right if key not in got]
    need(not missing, f"No tensor has the key {missing[0] if missing else ''}.")
    extra = [key for key in got if key not in right]
    need(not extra, f"What is {extra[0] if extra else ''}? PEFT does not look for it.")
    moved = [key for key in right if not same(got[key], right[key])]
    need(not moved, "The keys are right, but a tensor stands under another one's key.")


def spoilt(key, at, name, wrapper):
    """The key as somebody else's trainer writes it."""
    bare = key.removeprefix("base_model.model.")
    named = f".{name}.weight"
    return (
        key.replace(".weight", named),
        f"{wrapper}." + bare,
        "base_model.model._orig_mod." + bare.replace(".weight", named),
    )[at % 3]


def name_fault(key, name, wrapper):
    makers = {
        "module": "DistributedDataParallel",
        "_forward_module": "Lightning Fabric",
    }
    maker = makers.get(wrapper, "a wrapper")
    faults = {
        f"`.{name}` names the adapter in memory; a file has no adapter's name.": (
            f".{name}.weight" in key
        ),
        "`_orig_mod.` comes from torch.compile; it is no part of the model.": (
            "_orig_mod" in key
        ),
        f"`{wrapper}.` at the start comes from {maker}.": (
            f"model.{wrapper}." in key or key.startswith(f"{wrapper}.")
        ),
        "The prefix base_model.model. is there twice.": (
            key.startswith("base_model.model.base_model")
        ),
        "`lm_head` is no part of what is called `model`: put PEFT's prefix before the"
        " layer's path as it is.": "base_model.model.model.lm_head" in key,
        f"`sub{wrapper}` is the name of a layer here: remove `{wrapper}.` only where it"
        " is a whole part of the path, at its start.": "model.sub" in key
        and f"sub{wrapper}" not in key,
        f"`{name}_head` is the name of a layer here: remove `.{name}` only behind"
        " lora_A and lora_B.": ".v_proj" in key and f"{name}_head" not in key,
    }
    for message, present in faults.items():
        need(not present, f"{message} Yours: {key}")
    need(
        key.startswith(("base_model.model.model.", "base_model.model.lm_head.")),
        f"PEFT's keys begin with base_model.model., then comes the layer's path in the"
        f" model. Yours: {key}",
    )


# ---- 3. where runs part, said beforehand ---------------------------------------------

SETTINGS = {  # what the second run does differently, and why they part there
    "seed of the rows": "other rows are seen from the first step on, and the batch is"
    " what a step begins with",
    "seed of A": "with B zero, B A is zero for every A, and so the first loss is the"
    " same; but B's gradient contains A. (With a B that is not zero, the first loss"
    " contains A.)",
    "weight decay": "it acts in the optimizer's step, after the first loss and its"
    " gradient, and shows first in the next loss",
    "betas": "Adam's first step does not depend on them: with the bias corrections both"
    " means are those of one gradient. The second step does; step 2's loss shows it",
    "warm-up": "the first step's rate is a smaller one; loss and gradient are computed"
    " before it is used",
    "linear schedule": "its first rate is the full one. The second is smaller, and the"
    " loss before it is still the same",
    "bias trained too": "the loss is the same at the start, and the norm of the"
    " gradient has one more part",
    "loss summed": "the loss itself is another number, from the first step on",
}


class Setup:
    """A layer with a frozen weight, a LoRA and a bias, and rows to train it on."""

    def __init__(self, B, seed, change):
        start = torch.Generator().manual_seed(seed)
        self.W = normal(start, 5, 6)
        rows = [(normal(start, 8, 6), normal(start, 8, 5)) for _ in range(5)]
        self.rows = rows[::-1] if change == "seed of the rows" else rows
        own = torch.Generator().manual_seed(seed + 1 + (change == "seed of A"))
        self.A = normal(own, 2, 6).requires_grad_()
        zero = torch.zeros(5, 2, dtype=torch.float64)
        self.B = (zero if B == "zero" else normal(start, 5, 2)).requires_grad_()
        self.bias = torch.zeros(5, dtype=torch.float64)
        self.bias.requires_grad_(change == "bias trained too")
        self.change = change

    def loss(self, x, y):
        error = x @ (self.W + self.B @ self.A).T + self.bias - y
        return error.square().sum() / (1 if self.change == "loss summed" else 40)

    def rate(self, step):
        factor = {
            "warm-up": min(1, (step + 1) / 3),
            "linear schedule": 1 - step / 5,
        }.get(self.change, 1)
        return 0.05 * factor


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def run_of(B, seed, change="") -> dict:
    """{field: one number a step} of a training with one thing changed."""
    setup = Setup(B, seed, change)
    trained = [p for p in (setup.A, setup.B, setup.bias) if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=0.05,
        weight_decay=0.1 if change == "weight decay" else 0.0,
        betas=(0.5, 0.999) if change == "betas" else (0.9, 0.999),
    )
    found = {field: [] for field in FIELDS}
    for step, (x, y) in enumerate(setup.rows):
        loss = setup.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in trained).sqrt()
        optimizer.param_groups[0]["lr"] = setup.rate(step)
        values = x.sum().item(), loss.item(), norm.item(), setup.rate(step)
        for field, value in zip(FIELDS, values):
            found[field].append(value)
        optimizer.step()
    return found


def parting(one, other):
    """The first (step, field) at which two runs differ by more than rounding."""
    for step in range(len(one["loss"])):
        for field in FIELDS:
            if not math.isclose(one[field][step], other[field][step], rel_tol=1e-8):
                return step, field
    return None


@checks(
    "All eight. Each setting acts at one place of a step: rows, loss, gradient, rate,"
    " optimizer. What comes before that place is the same."
)
def predict_parting(predicted, B="zero") -> None:
    """predicted: {setting: (step, field)}."""
    predicted = written(
        predicted, SETTINGS, "put your eight places", "{setting: (step, field)}"
    )
    seed = random.randrange(10**6)
    plain = run_of(B, seed)
    for setting, why in SETTINGS.items():
        said = predicted[setting]
        need(
            isinstance(said, tuple | list) and len(said) == 2,
            f"{setting!r}: (step, field) is wanted, for example (0, 'lr'); you have"
            f" {said!r}.",
        )
        need(
            said[1] in FIELDS,
            f"{setting!r}: the field is one of {', '.join(FIELDS)}, and comes second;"
            f" you have {said!r}.",
        )
        place = parting(plain, run_of(B, seed, setting))
        need(
            tuple(said) == place,
            f"{setting!r}: you say {tuple(said)}, and two such runs part elsewhere."
            f" Think again: {why}.",
        )


# ---- 4. only the answers -------------------------------------------------------------


def render(messages, add_generation_prompt=False):
    text = "".join(f"<{m['role']}>{m['content']}~\n" for m in messages)
    return text + ("<assistant>" if add_generation_prompt else "")


def encode(text):
    return [ord(letter) for letter in text]


def words():
    return "".join(random.choice("abcdefgh ") for _ in range(random.randint(3, 7)))


def conversation(*spoken):
    """spoken: (role, content) in their order; without them an ordinary one."""
    roles = ("system", "user", "assistant", "user", "assistant")
    spoken = spoken or [(role, words()) for role in roles]
    return [{"role": role, "content": content} for role, content in spoken]


def conversations() -> list:
    """[(messages, what to say of labels that are wrong by no known slip)]"""
    one, two = "o" + words(), "t" + words()
    return [
        (conversation(), ANSWERS),
        (
            conversation(
                ("user", one), ("assistant", two), ("user", two), ("assistant", two)
            ),
            "In this conversation the same words are said three times, twice by the"
            " assistant. Go by the place of a message, not by its words: neither a"
            " search for the text nor messages.index finds the right one.",
        ),
        (
            conversation(("user", two + one), ("assistant", two), ("user", one)),
            "In this conversation the user has said the answer's words before: go by"
            " places, and do not search for the text.",
        ),
        (
            conversation(("assistant", one), ("user", two), ("assistant", "")),
            "In this conversation the assistant begins, and its last answer is empty:"
            " that begins with the end of an answer, and its end is learnt as well.",
        ),
        (
            conversation(("user", one), ("assistant", two), ("assistant", one)),
            "In this conversation the assistant speaks twice in a row: both are"
            " answers. Go by the roles.",
        ),
    ]


ANSWERS = (
    "The labels are not those of the answers. Print ids and labels side by side: an"
    " answer begins where the prompt before it ends, with its header, and ends where"
    " the text with it ends."
)


def turns(messages, roles):
    """The spans of these roles' words, found as the assistant's are."""
    return [
        (
            len(encode(render(messages[:at], True))),
            len(encode(render(messages[: at + 1]))),
        )
        for at, message in enumerate(messages)
        if message["role"] in roles
    ]


def masked(spans, ids):
    labels = [-100] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


@checks("Only what the assistant says is learnt, its ends included.")
def answers_only(function) -> None:
    """function(messages, render, encode) -> (ids, labels), two lists."""
    for messages, otherwise in conversations():
        ids = encode(render(messages))
        got = function(messages, render, encode)
        no_return(got)
        need(
            isinstance(got, tuple | list) and len(got) == 2,
            "Return (ids, labels), two lists of equal length.",
        )
        need(
            all(hasattr(part, "__len__") for part in got),
            "Return (ids, labels), two lists of equal length.",
        )
        given, labels = list(got[0]), list(got[1])
        need(
            given != encode(render(messages, True)),
            "Your text ends with the header of one more answer: add_generation_prompt"
            " is for writing; the text that is learnt has all its answers.",
        )
        need(given == ids, "The ids should be those of the whole conversation.")
        need(len(labels) == len(ids), "One label for each id.")
        if labels == masked(turns(messages, ("assistant",)), ids):
            continue
        if otherwise is ANSWERS:
            for message, slip in slips_of_labels(messages, ids).items():
                need(labels != slip, message)
        raise Wrong(otherwise)


def slips_of_labels(messages, ids) -> dict:
    spans = turns(messages, ("assistant",))
    right = masked(spans, ids)
    headers = [
        len(encode(render(messages[:at])))
        for at, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    header = len("<assistant>")
    return {
        "You learn everything, the user's words too.": masked([(0, len(ids))], ids),
        "You learn the last answer only: there are two.": masked(spans[-1:], ids),
        "You learn the first answer only: there are two.": masked(spans[:1], ids),
        "You learn the headers <assistant> too, which the template writes: an answer"
        " begins behind them.": masked(
            [(h, end) for h, (_, end) in zip(headers, spans)], ids
        ),
        "The end of an answer is not learnt: the model would never stop.": masked(
            [(start, end - len("~\n")) for start, end in spans], ids
        ),
        "The last token of an answer's end is not learnt: its end is where the text"
        " with it ends.": masked([(start, end - 1) for start, end in spans], ids),
        "You learn everything but the answers.": [
            i if label == -100 else -100 for i, label in zip(ids, right)
        ],
        "You shift the labels: the model does that itself.": right[1:] + [-100],
        'You learn nothing: every label is -100. Answers have the role "assistant".': [
            -100
        ]
        * len(ids),
        "You learn the user's words and not the assistant's.": masked(
            turns(messages, ("user",)), ids
        ),
        "You learn what the system says, too: only the assistant's words count.": (
            masked(turns(messages, ("system", "assistant")), ids)
        ),
        "Labels are ids: you give 1 where something is learnt.": [
            int(label != -100) for label in right
        ],
        "You learn the header behind an answer, too: its end is where the text with it"
        " ends, without add_generation_prompt.": masked(
            [(start, end + header) for start, end in spans], ids
        ),
        "You leave the first token of each answer out.": masked(
            [(start + 1, end) for start, end in spans], ids
        ),
        "You learn everything from the first answer on, the user's words too.": (
            masked([(spans[0][0], len(ids))], ids)
        ),
        "What is not learnt has the label -100; 0 is a token.": [
            0 if label == -100 else label for label in right
        ],
    }


# ---- 5. llama.cpp's rows -------------------------------------------------------------


def permuted(W, heads, back=False):
    """llama.cpp's order of the rows of q_proj and k_proj (or back from it)."""
    out, k = W.shape
    half = out // heads // 2
    shape = (heads, half, 2, k) if back else (heads, 2, half, k)
    return W.reshape(shape).transpose(1, 2).reshape(out, k)


def in_halves(A, B, heads):
    half = len(B) // heads // 2
    moved = B.reshape(heads, 2, half, -1).transpose(1, 2).reshape(B.shape)
    return moved @ A


@checks(
    "The rows of B move, and A can stay: (PB)A is P(BA).",
    "A is (r, k), B (heads · head_dim, r). Return (A, B) in llama.cpp's order.",
)
def gguf_lora(function) -> None:
    """function(A, B, heads) -> (A, B), the factors of q_proj in llama.cpp's order."""
    for heads in (2, 3):
        h = random.choice([6, 10])
        r = random.choice([2, 4])
        out, k = heads * h, 2 * heads * h
        A, B = draw(r, k), draw(out, r)
        with Largest(torch.Size((out, k))) as largest:
            got = function(A.clone(), B.clone(), heads)
        no_return(got)
        need(
            isinstance(got, (tuple, list)) and len(got) == 2,
            "Return two tensors, (A, B).",
        )
        need(
            all(isinstance(part, torch.Tensor) for part in got),
            "Return two tensors, (A, B).",
        )
        need(
            not (got[0].shape == B.shape and got[1].shape == A.shape),
            "A and B are swapped: return (A, B).",
        )
        need(
            got[0].shape == A.shape and got[1].shape == B.shape,
            f"A should be {tuple(A.shape)} and B {tuple(B.shape)}; yours are"
            f" {tuple(got[0].shape)} and {tuple(got[1].shape)}.",
        )
        need(
            not largest.made,
            "You form B A, a matrix of W's size: only the rows of B have to move.",
        )
        compare(
            got[1] @ got[0],
            permuted(B, heads) @ A,
            {
                "You move the columns of A. They belong to the layer's input, which"
                " llama.cpp leaves alone: only the output's rows move.": (
                    B @ permuted(A.T, heads).T
                ),
                "You move the columns of A, too. They belong to the layer's input,"
                " which llama.cpp leaves alone: only the output's rows move.": (
                    permuted(B, heads) @ permuted(A.T, heads).T
                ),
                "B is as it was. llama.cpp turns neighbouring pairs, (0, 1), (2, 3)"
                " …, where transformers turns (0, h/2), (1, h/2 + 1) …: the rows have"
                " to move.": B @ A,
                "That is the way back, from llama.cpp's order to transformers'.": (
                    permuted(B, heads, back=True) @ A
                ),
                "You permute as if there were one head: each head's rows move within"
                " the head.": permuted(B, 1) @ A,
            },
            "Your B A",
            formula=Formula(in_halves, A, B, heads),
        )


# ---- 6. which adapter ----------------------------------------------------------------


def recorded(scores, seeds, loss):
    """What a record holds of {name: (a score a seed, parameters)}."""
    key = "losses" if loss else "scores"
    sign = -1 if loss else 1  # a loss of 70 less the score: lower is better
    return {
        name: {
            key: [70 * loss + sign * score for score in found[:seeds]],
            "parameters": parameters,
        }
        for name, (found, parameters) in scores.items()
    }


def told_apart_by_the_mark():
    """Scores of which the smallest adapter's are behind the best mean, by the same two
    points with each seed, and behind no other's."""
    names = "LoRA r 1", "LoRA r 8", "prefix", "DoRA"
    given = {
        name: ([70 - 50 * loss for loss in losses], (at + 1) * 305_280)
        for at, (name, losses) in enumerate(zip(names, told_by_the_mean()))
    }
    best, _ = given["LoRA r 1"]
    return {"(IA)³": ([score - 2 for score in best], 57_600)} | given


# one in the middle is behind the best, and a smaller one, whose seeds vary, is not
GAP = {
    "LoRA r 8": ([64.0, 64.4, 64.1], 2_442_240),
    "LoRA r 1": ([62.0, 62.3, 62.2], 305_280),
    "(IA)³": ([61.0, 64.9, 63.0], 57_600),
    "prompt": ([55.0, 55.6, 55.2], 11_520),
}


def told_by_seeds():
    """Scores of five seeds. The first three put the smallest behind the best; so do
    all five, sorted."""
    best = [64.0, 65.0, 66.0, 67.0, 68.0]
    return {
        "LoRA r 8": (best, 2_442_240),
        "LoRA r 1": ([score - 4 for score in best], 305_280),
        "(IA)³": ([63.0, 64.0, 65.1, 66.9, 65.0], 57_600),
    }


@checks(
    "The smallest one within the budget that the rule does not put behind the best."
)
def choose_adapter(function, loss=False) -> None:
    """function(runs, budget) -> name; runs {name: {"scores": [one a seed],
    "parameters": int}}, or "losses" in the place of "scores"."""
    scores = {
        "full": ([66.0, 66.3, 66.1], 134_515_008),
        "LoRA r 8": ([64.0, 64.4, 64.1], 2_442_240),
        "LoRA r 1": ([63.1, 64.9, 63.6], 305_280),
        "prompt": ([55.0, 55.6, 55.2], 11_520),
        "(IA)³": ([61.0, 61.3, 61.2], 57_600),
    }
    runs, one_seed = recorded(scores, 3, loss), recorded(scores, 1, loss)
    turned = dict(reversed(runs.items()))
    by_the_mean = recorded(told_apart_by_the_mark(), 3, loss)
    by_the_seeds = recorded(told_by_seeds(), 5, loss)
    with_gap = recorded(GAP, 3, loss)
    better = "lower" if loss else "higher"
    draws = (  # what to say of a wrong name that no slip explains
        (runs, 3_000_000, "Is one that is smaller really behind the best?"),
        (
            one_seed,
            3_000_000,
            "With one seed each, `compare` tells nothing apart: no adapter is behind,"
            " so the smallest is left.",
        ),
        (turned, 3_000_000, "Your choice depends on the order."),
        (runs, 305_280, "LoRA r 1 has exactly 305,280 parameters."),
        (
            by_the_mean,
            3_000_000,
            f"The mark is the one whose mean is the best; {better} is better.",
        ),
        (
            with_gap,
            3_000_000,
            "Each is compared with the best one. A smaller one may be not behind it"
            " where a larger one is.",
        ),
        (
            by_the_seeds,
            3_000_000,
            "Give `compare` the numbers of all seeds, in their order: it pairs them.",
        ),
        (
            runs,
            200_000_000,
            "With a budget for all of them, full fine-tuning is ahead of every other"
            " one: nothing smaller equals it.",
        ),
    )
    choices = Choices()
    for given, budget, words in draws:
        got = function(copy.deepcopy(given), budget)
        no_return(got)
        need(
            isinstance(got, str) and got in given,
            f"Return one of the names, {', '.join(given)}; yours is {got!r}.",
        )
        an_adapter(got, given, budget, loss, words, choices)
    choices.judge()


def not_behind(a, b, loss: bool) -> bool:
    return told_apart(a, b, loss=loss).verdict != "behind"


def adapter_by_rule(runs, budget, loss, look=fmean, alike=not_behind) -> str:
    """The smallest within the budget that is not behind the mark."""
    key = "losses" if loss else "scores"
    fits = {n: run[key] for n, run in runs.items() if run["parameters"] <= budget}
    mark = (min if loss else max)(fits, key=lambda name: look(fits[name]))
    left = [name for name in fits if alike(fits[name], fits[mark], loss)]
    return min(left, key=lambda name: runs[name]["parameters"])


def an_adapter(got, runs, budget, loss, words, choices) -> None:
    def chosen(budget=budget, **changed):
        return adapter_by_rule(runs, budget, loss, **changed)

    looks = min, max, median, lambda seeds: seeds[0], lambda seeds: seeds[-1]
    slips = {
        "You take the one with the best mean within the budget. Is a smaller one"
        " really behind it? Ask `compare`.": chosen(alike=lambda a, b, loss: a is b),
        "You take the one that is the smallest, though it may be behind the best. If"
        " you ask `compare`, you ask the wrong way round.": chosen(
            alike=lambda a, b, loss: True
        ),
        "The mark is the one with the best *mean*, and not with the best seed, median"
        " or worst seed. Against another mark a smaller adapter is not behind.": [
            chosen(look=look) for look in looks
        ],
        "You choose among all, also those over the budget of parameters.": [
            chosen(budget=math.inf),
            chosen(budget=math.inf, alike=lambda a, b, loss: a is b),
        ],
        "One that has exactly as many parameters as the budget allows is allowed: “at"
        " most” holds it too.": chosen(budget=budget - 1),
    }
    said = f"You choose {got!r}; by the rule it is {chosen()!r}. {words}"
    if runs[got]["parameters"] > budget:
        said = f"{got!r} is over the budget of {budget:,} parameters."
    choices.add(got, chosen(), slips, said)
