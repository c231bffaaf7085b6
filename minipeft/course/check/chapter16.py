"""Chapter 16, the bake-off: a fair search, leaked questions, how many questions, seeds
against questions, verdicts said beforehand, and a method of one's own."""

import math
import random
import re
import string
import unicodedata
from collections.abc import Iterator

import torch

from ...config import LayerConfig
from ...lm import GPT, GPTConfig
from ...model import get_peft_model
from ...slot import Base
from ..comparison import compare as told_apart
from .kinds import Choices
from .practice import copy_stands_alone
from .teacher import Wrong, checks, need, same

__all__ = [
    "best_split",
    "fair_search",
    "items_needed",
    "leaked",
    "own_entry",
    "said_beforehand",
]

VERDICTS = ("ahead", "behind", "not told apart")


def no_return(got):
    need(got is not None, "Your function gives None: is there a `return` at its end?")


def is_whole(number):
    """Whether it is a whole number, or one written as 118.0 (np.ceil gives that)."""
    if isinstance(number, float):
        return number.is_integer()
    return hasattr(number, "__index__") and not isinstance(number, bool)


def as_list(got):
    """An array or an iterator as a list."""
    if isinstance(got, torch.Tensor):
        return got.tolist()
    return list(got) if isinstance(got, Iterator) else got


# ---- 1. a search that is fair --------------------------------------------------------


class Runs:
    """A run(method, lr, seed) whose results are drawn once, and who was asked what."""

    def __init__(self, methods, rates, seeds):
        self.asked = []
        self.results = {}
        for method in methods:
            order = random.sample(rates, len(rates))
            for place, lr in enumerate(order):  # from the best on validation on
                # the best on test is the second best there
                score = (70, 80, 60)[place] + random.random()
                for seed in seeds:
                    self.results[method, lr, seed] = {
                        "valid_loss": 0.1 + 0.1 * place + seed / 1000,
                        "test_score": score - seed,
                    }
                # two seeds alike, and one whose test score is none
                self.results[method, lr, seeds[2]]["test_score"] = score - seeds[1]
                if method == methods[-1]:
                    self.results[method, lr, seeds[1]]["test_score"] = math.nan

    def __call__(self, method, lr, seed):
        need(
            (method, lr, seed) in self.results,
            f"run({method!r}, {lr!r}, {seed!r}): it was never asked for such a run."
            " Take methods, rates and seeds from the lists that you are given.",
        )
        self.asked.append((method, lr, seed))
        return dict(self.results[method, lr, seed])

    def best(self, method, rates, seed, key, pick):
        return pick(rates, key=lambda lr: self.results[method, lr, seed][key])


def searched(runs, methods, chosen, seeds):
    """What a search returns that chose these rates."""
    return {
        method: {
            "lr": chosen[method],
            "scores": [
                runs.results[method, chosen[method], seed]["test_score"]
                for seed in seeds
            ],
        }
        for method in methods
    }


@checks(
    "The same trials for each method, the rate by validation loss, and a test score"
    " for each seed, looked at once."
)
def fair_search(function) -> None:
    """function(run, methods, rates, seeds) -> {method: {"lr", "scores"}}."""
    methods, rates, seeds = ["LoRA", "prefix", "full"], [1e-3, 3e-3, 1e-2], [5, 7, 3]
    random.shuffle(rates)
    for diverges in (False, True):
        runs = Runs(methods, rates, seeds)
        if diverges:  # min() keeps a nan that comes first
            runs.results["LoRA", rates[0], seeds[0]]["valid_loss"] = math.nan
            runs.results["full", rates[0], seeds[0]]["valid_loss"] = 0.05
        got = function(runs, list(methods), list(rates), list(seeds))
        no_return(got)
        need(
            isinstance(got, dict) and sorted(got) == sorted(methods),
            "Give a dictionary with an entry for each method.",
        )
        for method, entry in got.items():
            need(
                isinstance(entry, dict) and {"lr", "scores"} <= set(entry),
                f'The entry of {method} needs "lr" and "scores".',
            )
        right = look_at_rates(got, runs, methods, rates, seeds[0], diverges)
        look_at_scores(got, runs, right, rates, seeds)


def look_at_rates(got, runs, methods, rates, first, diverges) -> dict:
    """The rates of `got` are the best ones: {method: rate}, which is returned. first:
    the seed with which each rate is tried."""
    usable = {
        method: [
            lr
            for lr in rates
            if not math.isnan(runs.results[method, lr, first]["valid_loss"])
        ]
        for method in methods
    }

    def chosen(key, pick, among=usable):
        return {m: runs.best(m, among[m], first, key, pick) for m in methods}

    right = chosen("valid_loss", min)
    rate = {method: entry["lr"] for method, entry in got.items()}
    if diverges:
        need(
            rate["LoRA"] in usable["LoRA"],
            "A run that diverged has the validation loss nan. Every comparison with nan"
            " is false, so min() may keep it: leave such rates out.",
        )
    shared = {
        m: [lr for lr in usable[m] if all(lr in own for own in usable.values())]
        for m in methods
    }
    need(
        rate == right or rate != chosen("valid_loss", min, among=shared),
        "A rate at which one method diverged is left out for the other methods too:"
        " each has its own rates.",
    )
    need(
        rate == right or rate != chosen("test_score", max),
        "You choose the rate by the test score. Then the test has been fitted to, and"
        " its score says too much: choose by validation loss.",
    )
    need(
        rate != chosen("valid_loss", max),
        "You take the rate with the largest validation loss: less is better.",
    )
    need(
        len(set(rate.values())) > 1 or len(set(right.values())) == 1,
        "All methods get the same rate. Each has its own best one.",
    )
    for method in methods:
        need(
            rate[method] == right[method],
            f"For {method} you take the rate {rate[method]}, which is not the one with"
            " the lowest validation loss.",
        )
    return right


def look_at_scores(got, runs, right, rates, seeds) -> None:
    """A test score for each seed, at the right rates, and no more runs than it takes
    to have them."""
    for method, entry in got.items():
        asked = [lr for name, lr, seed in runs.asked if name == method]
        entry["scores"] = scores = as_list(entry["scores"])
        need(
            isinstance(scores, (list, tuple)) and len(scores) == len(seeds),
            f'"scores" of {method} should have {len(seeds)} numbers, one for each'
            " seed, at the chosen rate, also where two are alike or one is nan.",
        )
        need(
            len(asked) <= len(rates) + len(seeds),
            f"You make {len(asked)} runs for {method}: with the first seed try each"
            " rate, and with the other seeds only the best one.",
        )
    wanted = searched(runs, list(right), right, seeds)
    losses = {
        m: [runs.results[m, lr, s]["valid_loss"] for s in seeds]
        for m, lr in right.items()
    }
    need(
        {m: list(entry["scores"]) for m, entry in got.items()} != losses,
        "You report validation losses. Choose by them, and report the test scores.",
    )
    for method in right:
        need(
            [*map(str, got[method]["scores"])] == [*map(str, wanted[method]["scores"])],
            f"The scores of {method} are not the test scores of seeds {seeds} at the"
            " chosen rate, in this order.",
        )


# ---- 2. leaked questions -------------------------------------------------------------


def plain(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def a_question():
    return " ".join(
        "".join(random.choices(string.ascii_lowercase, k=random.randint(3, 7)))
        for _ in range(random.randint(6, 8))
    )


def disguised(test):
    """{index in test: the same words, written in another way}."""
    return {
        1: test[1],
        4: test[4].upper(),
        5: test[5].replace(" ", "  ", 2) + "\n",
        7: test[7].rstrip("?").replace(" ", ", ", 1),
        8: test[8].replace(" ", "-", 1),
    }


def other_questions(test):
    """What resembles a question of the test, and is another one."""
    words = plain(test[3]).split()
    return [
        f"{test[2].rstrip('?')} and {a_question()}?",  # holds a test question
        " ".join(plain(test[0]).split()[:4]) + "?",  # is held by one
        " ".join(words[1:] + words[:1]) + "?",
        plain(test[6]).replace(" ", "", 1) + "?",
        f"{plain(test[9]).split()[0]} {test[9]}",
        "the " + plain(test[10]) + "?",
        test[11].replace("ü", "ä"),
        test[12].replace("7", "8"),
        test[16].replace("é", "e"),
        test[15].replace("b", "c"),
        test[17].replace("noon", "night"),  # another last word
    ]


def matches(train, test, key):
    """The indices of the test prompts whose key is that of a prompt in train."""
    seen = {key(text) for text in train}
    return [i for i, text in enumerate(test) if key(text) in seen]


LEAK_SLIPS = {  # {message: what is compared in the place of the words}
    "You find only what is equal letter by letter. Small and capital letters, spaces"
    " and punctuation make no other question.": str,
    "Capital letters still hide a question.": lambda t: tuple(re.findall(r"\w+", t)),
    "Spaces, line ends or punctuation still hide a question: compare the words"
    " alone.": str.lower,
    "Punctuation still hides a question.": lambda t: tuple(t.lower().split()),
    "Spaces and line ends still hide a question.": lambda t: re.sub(
        r"[^\w\s]", "", t.lower()
    ),
    "You take punctuation out and leave no space: “light-house” is two words.": (
        lambda t: tuple(re.sub(r"[^\w\s]", "", t.lower()).split())
    ),
    "You forget where words end: “sea bird” and “seabird” are other words.": (
        lambda t: re.sub(r"\W", "", t.lower())
    ),
    "You forget the order of the words.": lambda t: tuple(sorted(plain(t).split())),
    "You compare sets of words: order and repetition count.": (
        lambda t: frozenset(plain(t).split())
    ),
    "You drop words that stand twice.": lambda t: tuple(
        dict.fromkeys(plain(t).split())
    ),
    "You leave short words out: they are words too.": lambda t: tuple(
        w for w in plain(t).split() if w not in ("the", "a", "an")
    ),
    "Only a to z are letters to you: so ü is none, and a number is no word.": (
        lambda t: tuple(re.findall(r"[a-z]+", t.lower()))
    ),
    "Only a to z and digits are letters to you: ü is one too.": (
        lambda t: tuple(re.findall(r"[a-z0-9]+", t.lower()))
    ),
    "You leave numbers out: they are words too.": lambda t: tuple(
        re.findall(r"[^\W\d]+", t.lower())
    ),
    "You leave words of one letter or figure out: they are words too.": (
        lambda t: tuple(re.findall(r"\w\w+", t.lower()))
    ),
    "You take é for e: they are other letters.": lambda t: plain(
        "".join(c for c in unicodedata.normalize("NFKD", t) if c.isascii())
    ),
}


@checks("You find what leaked, though it was written a little differently.")
def leaked(function) -> None:
    """function(train, test) -> the indices of the test prompts that stand in train."""
    test = [f"{a_question().capitalize()}?" for _ in range(11)]
    test += ["Wo ist die grüne Brücke?", "Who lives at number 7 on the quay?"]
    test.append(test[4])  # asked twice, and leaked twice
    test += [test[0], "Is pier b free tonight?"]  # asked twice, and not leaked
    test.append("Is the café on the quay open?")
    test.append("Who has the key to the old customs house at noon?")
    train = [a_question() + "?" for _ in range(8)]
    train += [*disguised(test).values(), *other_questions(test)]
    random.shuffle(train)
    got = as_list(function(list(train), list(test)))
    no_return(got)
    need(
        isinstance(got, (list, tuple, set)),
        f"Give a list of indices into test; yours is a {type(got).__name__}.",
    )
    need(
        all(is_whole(index) for index in got),
        "Give indices into test (whole numbers), not the questions themselves.",
    )
    hidden = matches(train, test, plain)
    once = [i for i in hidden if test[i] not in test[:i]]
    last = [i for i in hidden if test[i] not in test[i + 1 :]]
    twice = sorted([*once, *(i for i in hidden if i in once and i not in last)])
    within = [
        i for i, t in enumerate(test) if plain(t) in " | ".join(map(plain, train))
    ]
    around = [
        i for i, t in enumerate(test) if any(plain(one) in plain(t) for one in train)
    ]
    found = sorted(int(index) for index in got)
    choices = Choices()
    slips = {
        "A question that stands *within* a longer one is another question.": within,
        "A question that holds a shorter one is another question.": around,
        "A question may stand twice in test: each place counts, so go through the"
        " places (enumerate) and not through the texts (index).": twice,
        "You name a question that stands twice in test once: each place counts.": once,
        "Of a question that stands twice in test you name the last place: each"
        " counts.": last,
        "You give the indices in train: what is thrown out are test questions.": (
            matches(test, train, plain)
        ),
        "You give those that did not leak.": [
            i for i in range(len(test)) if i not in hidden
        ],
        "You count a question that stands twice in test as leaked: only train tells.": (
            sorted({*hidden, *(i for i, t in enumerate(test) if t in test[:i])})
        ),
        "You count from 1: the first index is 0.": [i + 1 for i in hidden],
    } | {message: matches(train, test, key) for message, key in LEAK_SLIPS.items()}
    choices.add(
        tuple(found),
        tuple(hidden),
        {message: tuple(wrong) for message, wrong in slips.items()},
        f"You get {found}; I get {hidden}.",
    )
    choices.judge()


# ---- 3. how many questions -----------------------------------------------------------


@checks("So many questions, and four times as many for half of the difference.")
def items_needed(function) -> None:
    """function(share, difference) -> the smallest n with 1.96 sqrt(2 p(1-p)/n) <=
    difference."""
    cases = [
        (random.randint(12, 44) / 100, random.randint(23, 97) / 1000) for _ in range(3)
    ]
    cases += [(0.2, 0.1), (0.5, 0.1)]  # 122.93 and 192.08
    cases.append((0.5, 0.1225))  # 128, without a rest
    choices = Choices()
    for p, gap in cases:
        got = function(p, gap)
        no_return(got)
        need(
            is_whole(got),
            f"A number of questions is a whole number: yours is {got!r}. Round up.",
        )
        exact = 2 * 1.96**2 * p * (1 - p) / gap**2
        choices.add(
            int(got),
            math.ceil(exact),
            slips_of_items(p, gap),
            f"For a share of {p:g} and a difference of {gap:g} you get {got}: the"
            f" margin would be {margin(p, int(got))}.",
        )
    choices.judge()


def slips_of_items(p, gap) -> dict:
    exact = 2 * 1.96**2 * p * (1 - p) / gap**2
    return {
        "You round down: then the margin is still a little too wide.": (
            math.floor(exact)
        ),
        "You round to the nearest: with fewer than it takes the margin is too"
        " wide. Round up.": round(exact),
        "That is how many both methods take together: each has as many.": (
            2 * math.ceil(exact)
        ),
        "The margin is the distance to one side of the difference: you halve"
        " it.": math.ceil(4 * exact),
        "You add one to what is whole already (int(x) + 1): round up with"
        " math.ceil.": math.floor(exact) + 1,
        "95 % of the draws lie within 1.96 standard errors, not 2.": (
            math.ceil(exact * 4 / 1.96**2)
        ),
        "The difference is a share already, as p is: do not divide by 100.": (
            math.ceil(exact * 100**2)
        ),
        "That is the number for the *same* questions; here each method has"
        " questions of its own.": math.ceil(1.96**2 * p / gap**2),
        "You take p = 1/2 always: the variance of an answer is p (1 - p).": (
            math.ceil(2 * 1.96**2 / 4 / gap**2)
        ),
        "You divide by the 2: the variances of both methods add up.": (
            math.ceil(exact / 4)
        ),
        "That is for one method alone. Of a difference the variances of both"
        " add up: 2 p (1 - p) / n.": math.ceil(exact / 2),
        "The 1.96 is missing: 95 % of the draws lie within 1.96 standard errors.": (
            math.ceil(exact / 1.96**2)
        ),
        "1.96 is squared too, for n stands below a root.": math.ceil(exact / 1.96),
        "The difference is squared: half of it needs four times as many.": (
            math.ceil(exact * gap)
        ),
        "1.645 leaves 5 % on one side; both sides count here, so 1.96.": (
            math.ceil(exact * 1.645**2 / 1.96**2)
        ),
        "The variance of an answer is p (1 - p), not p.": math.ceil(exact / (1 - p)),
        "The 2 is squared too: 2 · 1.96² p (1 - p).": math.ceil(2 * exact),
        "That is the root of it: n is where the margin, squared, meets the"
        " difference, squared.": math.ceil(math.sqrt(exact)),
    }


def margin(p, items) -> str:
    """Of the difference, at so many questions."""
    return (
        f"{1.96 * math.sqrt(2 * p * (1 - p) / items):.4f}" if items > 0 else "endless"
    )


# ---- 4. seeds or questions -----------------------------------------------------------


def error_of(seeds, items, spread_seed, spread_item):
    return math.sqrt(spread_seed**2 / seeds + spread_item**2 / items)


def splits(budget, train, item, most, fewest):
    """All (seeds, items) that the budget allows, with as many items as fit."""
    for seeds in range(fewest, int(budget / train) + 1):
        items = min(most, int((budget / seeds - train) / item + 1e-9))
        if items >= 1:
            yield seeds, items


@checks("The least error that the budget buys.")
def best_split(function, fewest=2) -> None:
    """function(budget, train, item, spread_seed, spread_item, most) -> (seeds, items),
    with at least `fewest` seeds."""
    cases = [  # where no number of questions hangs on rounding
        (600, 30, 0.26, 6.0, 48.0, 300),
        (600, 30, 0.26, 0.5, 48.0, 2000),
        (900, 40, 0.47, 12.0, 40.0, 300),
        (600, 10, 0.11, 12.0, 10.0, 300),  # dozens of seeds
        (600, 2, 0.047, 20.0, 5.0, 50),  # nearly two hundred
        (1000, 10, 59.0, 10.0, 5.0, 300),  # 6 seeds are worse than 5, and 7 are best
    ]
    for case in cases:
        budget, train, item, spread_seed, spread_item, most = case
        got = as_list(function(*case))
        no_return(got)
        need(
            isinstance(got, (tuple, list))
            and len(got) == 2
            and all(map(is_whole, got)),
            f"Give two whole numbers, (seeds, items); yours is {got!r}.",
        )
        seeds, items = int(got[0]), int(got[1])
        need(
            seeds >= 2,
            "With one seed nothing is known of how seeds differ, and `compare` tells"
            " nothing apart: two at the least.",
        )
        need(seeds >= fewest, f"{fewest} seeds are asked for; you take {seeds}.")
        need(1 <= items <= most, f"There are {most} questions: you ask {items}.")
        spent = seeds * (train + items * item)
        need(
            spent <= budget + 1e-6,
            f"{seeds} seeds and {items} questions take {spent:g} s of {budget} s: each"
            " seed is trained *and* answers all questions.",
        )
        best = min(
            splits(budget, train, item, most, fewest),
            key=lambda s: error_of(*s, *case[3:5]),
        )
        mine, least = error_of(seeds, items, *case[3:5]), error_of(*best, *case[3:5])
        if mine > least * (1 + 1e-9):
            hint = (
                "More seeds and fewer questions would be better."
                if seeds < best[0]
                else "Fewer seeds and more questions would be better."
                if seeds > best[0]
                else "There is money left for more questions."
            )
            raise Wrong(
                f"Your error is {mine:.4g} points, and {least:.4g} can be had. {hint}"
                " Try all numbers of seeds, each with as many questions as then fit."
            )


# ---- 5. verdicts said beforehand -----------------------------------------------------


@checks("You have seen before the verdict what three seeds can tell apart.")
def said_beforehand(answer, runs, least="four") -> None:
    """answer: {(a, b): verdict}, for at least so many pairs; runs: {method: {seed:
    loss}}."""
    need(answer is not None, "There is nothing here yet: write down your verdicts.")
    need(isinstance(answer, dict) and answer, "Give a dictionary {(a, b): verdict}.")
    need(
        len(answer) >= {"four": 4, "five": 5}[least],
        f"Judge at least {least} pairs; yours are {len(answer)}.",
    )
    for pair, said in answer.items():
        need(
            isinstance(pair, tuple) and len(pair) == 2 and set(pair) <= set(runs),
            f"{pair!r} is not a pair of methods; there are {', '.join(runs)}.",
        )
        need(pair[0] != pair[1], f"{pair!r} is one method, against itself.")
        words = str(said).strip().rstrip(".").lower()
        need(words in VERDICTS, f"{said!r} is not one of {', '.join(VERDICTS)}.")
        answer = answer | {pair: words}
    found = {pair: told_apart(*map(runs.get, pair), loss=True) for pair in answer}
    for pair, said in answer.items():
        judge_prediction(pair, said, found[pair], runs)
    need(
        len({result.verdict for result in found.values()}) > 1,
        "All your pairs have the same verdict: take at least one that is told apart,"
        " and one that is not.",
    )
    need(
        "not told apart" in {result.verdict for result in found.values()},
        "All your pairs are told apart: take at least one that is not.",
    )
    need(
        len({*map(frozenset, answer)}) >= {"four": 4, "five": 5}[least],
        f"Judge at least {least} pairs; (a, b) and (b, a) are one.",
    )


def judge_prediction(pair, said, result, runs):
    if said == result.verdict:
        return
    a, b = pair
    means = " and ".join(
        f"{sum(runs[name].values()) / len(runs[name]):.4f}" for name in pair
    )
    begin = f"{a} against {b}, mean losses {means}: `compare` says {result}."
    if result.verdict == "not told apart":
        raise Wrong(
            f"{begin} A difference of means alone is no verdict: look at how much the"
            " seeds of each differ."
        )
    if said == "not told apart":
        raise Wrong(
            f"{begin} The difference is larger than the seeds explain: look at whether"
            " it has the same sign, and about the same size, with each seed."
        )
    raise Wrong(f"{begin} These are losses: less is better.")


# ---- 6. a method of one's own --------------------------------------------------------


def small_model():
    torch.manual_seed(random.randrange(10**6))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    model = GPT(GPTConfig(vocab_size=64, **shape, **heads))
    for layer in model.model.layers:
        up = layer.mlp.up_proj
        up.bias = torch.nn.Parameter(torch.randn(up.out_features))
    return model


@checks("One class for the configuration, one for the equation: it trains, as any.")
def own_entry(config_class) -> None:
    """config_class(target_modules=...): y = scale * base(x) + shift, per output."""
    need(
        isinstance(config_class, type) and issubclass(config_class, LayerConfig),
        "Give me the configuration's class itself, a subclass of LayerConfig.",
    )
    need(
        config_class.peft_type,
        "The configuration has no peft_type: under that name it is found again when it"
        " is loaded.",
    )
    base = small_model()
    ids = torch.randint(64, (2, 7))
    layer = base.model.layers[0].mlp.up_proj
    inputs, outputs = layer.in_features, layer.out_features
    # create is called here: what is not written yet says so
    model = get_peft_model(base, config_class(target_modules=["up_proj"]))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    need(trained, "Nothing is trained: scale and shift must be nn.Parameters.")
    need(
        not any(p.numel() == inputs for p in trained.values()),
        f"You train a number for each of the layer's {inputs} inputs: scale and shift"
        f" belong to its {outputs} outputs. linear_features(...) gives (d_in, d_out).",
    )
    look_at_count(sum(p.numel() for p in trained.values()), outputs)
    look_at_equation(model, outputs, config_class(target_modules=["up_proj"]))
    model = get_peft_model(small_model(), config_class(target_modules=["up_proj"]))
    look_at_training(model, ids)


def look_at_count(count, outputs):
    layers = 2
    right = layers * 2 * outputs
    need(
        count != layers * outputs,
        "Only one number per output is trained: scale and shift are two.",
    )
    need(
        count != layers * 2,
        "One scale and one shift for the whole layer: each output has its own.",
    )
    need(
        count == right,
        f"On two layers of {outputs} outputs each you train {count} parameters:"
        f" {right} are scale and shift of each output. (The inputs have none.)",
    )


def fillings(parameters):
    """Functions (of the scales, of the shifts) -> what each parameter holds: first
    what is likely. A learner has two parameters, or one of two rows or columns."""
    if len(parameters) == 1:
        (p,) = parameters
        ways = [
            lambda scale, shift: [torch.stack([scale, shift])],
            lambda scale, shift: [torch.stack([shift, scale])],
            lambda scale, shift: [torch.stack([scale, shift], -1)],
            lambda scale, shift: [torch.stack([shift, scale], -1)],
        ]
    else:
        first = parameters[0].detach().mean() >= parameters[1].detach().mean()
        ways = [lambda scale, shift: [scale, shift]]
        ways.insert(int(first), lambda scale, shift: [shift, scale])

    def shaped(way):
        return lambda *numbers: [
            part.reshape(p.shape) for p, part in zip(parameters, way(*numbers))
        ]

    return [shaped(way) for way in ways]


def look_at_equation(model, outputs, config):
    """The layer with other scales and shifts: both are what they were at the start,
    and a change, so that 1 + s is as good as s."""
    slots = [m for m in model.modules() if getattr(m, "adapters", None)]
    slot, layer = slots[0], slots[0].base_layer
    adapter, x = slot.adapters["default"], torch.randn(1, 4, 16)
    plain_y = torch.nn.functional.linear(x, layer.weight, layer.bias).detach()
    for one in slots:
        rows = torch.randn(3, 4, 16)
        need(
            same(one(rows), one.base_layer(rows)),
            "At the start the model is no longer the base: scale begins at one, shift"
            " at zero.",
        )
    learnt = [p for p in adapter.parameters() if p.requires_grad]
    begin = [p.detach().clone() for p in learnt]
    change, shift = torch.randn(2, outputs)
    scale = 1 + change
    right = scale * plain_y + shift
    ways = fillings(learnt)
    for way in [*ways, ways[0]]:
        with torch.no_grad():
            for p, start, part in zip(learnt, begin, way(change, shift)):
                p.copy_(start + part)
            got = slot(x)
        if same(got, right):
            break
    look_at_output(got, right, plain_y, layer.bias, scale, shift)
    model.eval()
    need(
        same(slot(x), got),
        "When the model is not being trained (model.eval()), your method gives another"
        " output.",
    )
    weights = torch.randn(right.shape)
    own = torch.autograd.grad(
        (weights * slot(x)).sum(), learnt, allow_unused=True, materialize_grads=True
    )
    wanted = way((weights * plain_y).sum((0, 1)), weights.sum((0, 1)))
    need(
        all(map(same, own, wanted)),
        "The output is right, and the gradient of scale or shift is not: something is"
        " detached, or used under no_grad().",
    )
    copy_stands_alone(adapter, lambda one: one(Base(slot, "default"), x))
    if adapter.mergeable:
        model.merge_adapter()
        need(same(slot(x), got), "Merged (fold), the layer gives something else.")
        model.unmerge_adapter()
    model.add_adapter("second", config)
    model.set_adapter(["default", "second"])
    need(
        same(slot(x), got),
        "With two adapters on one layer yours forgets the one below it: call base(x),"
        " not base.module, and do not read its weight.",
    )


def look_at_output(got, right, plain_y, bias, scale, shift):
    for message, wrong in {
        "You shift before you scale: y = scale * base(x) + shift.": scale
        * (plain_y + shift),
        "The layer's bias is not scaled: all of base(x) is.": scale * (plain_y - bias)
        + bias
        + shift,
        "A negative scale loses its sign.": scale.abs() * plain_y + shift,
        "The shift is taken away instead of added.": scale * plain_y - shift,
        "The shift has no effect.": scale * plain_y,
        "The scale has no effect.": plain_y + shift,
    }.items():
        need(not same(got, wrong), message)
    need(
        not isinstance(got, torch.Tensor) or got.shape == right.shape,
        "For x of one row your layer gives the shape"
        f" {tuple(getattr(got, 'shape', ()))} instead of {tuple(right.shape)}.",
    )
    need(
        same(got, right),
        "With other scales and shifts the layer does not give scale * base(x) + shift.",
    )


def look_at_training(model, ids):
    trained = [p for p in model.parameters() if p.requires_grad]
    model(input_ids=ids, labels=ids).loss.backward()
    for p in trained:
        need(
            p.grad is not None and bool(p.grad.abs().sum() > 0),
            "A parameter gets no gradient: is it detached, or used under no_grad()?",
        )
    embedding = model.get_base_model().get_input_embeddings().weight
    embedding.requires_grad_(True)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    with_adapter = embedding.grad.clone()
    with model.disable_adapter():
        embedding.grad = None
        model(input_ids=ids, labels=ids).loss.backward()
    need(
        torch.allclose(with_adapter, embedding.grad, atol=1e-5),
        "The way down is cut: at the start the gradient of the layers below must be the"
        " base's. Do not run base(x) under no_grad(), and detach nothing.",
    )
