"""A check names a mistake only where it explains every answer: each mistake that is
listed gets its own message, and an answer that none of them explains gets none."""

import ast
import functools
import json
import random

import mutants
import pytest
import torch

from minipeft.course import check
from minipeft.course.check import sandbox
from minipeft.course.check.kinds import Choices
from minipeft.course.check.sandbox import Wrong

SOLUTIONS = mutants.solutions()
WORDS = ["ahead", "behind", "not told apart"]


def cells(role):
    """{exercise: (chapter, metadata, source)} of all chapters."""
    found = {}
    for path in sorted((mutants.ROOT / "chapters").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            marks = cell["metadata"].get("minipeft", {})
            if marks.get("role") == role:
                source = "".join(cell["source"])
                found[marks["exercise"]] = path.name[:2], marks, source
    return found


# ----------------------------------------------------------------- the mechanism itself


def named(answers, *mistakes):
    """What is said of these answers where 0 is right and mistakes are {message: what it
    gives in each draw}."""
    choices = Choices()
    for at, got in enumerate(answers):
        here = {m: given[at] for m, given in mistakes}
        choices.add(got, 0, here, f"draw {at}")
    try:
        choices.judge()
    except Wrong as wrong:
        return str(wrong)
    return ""


TWO = ("largest", [0, 2, 0, 4]), ("first", [0, 2, 3, 0])


@pytest.mark.parametrize(
    "answers, says",
    [
        ([0, 0, 0, 0], ""),
        ([0, 2, 0, 4], "largest"),
        ([0, 2, 3, 0], "first"),
        ([0, 2, 0, 0], "draw 1"),  # both give 2 there, and neither all of it
        ([0, 0, 3, 4], "draw 2"),  # now one, now the other
        ([1, 2, 0, 4], "draw 0"),
    ],
)
def test_a_mistake_explains_every_answer(answers, says):
    assert named(answers, *TWO) == says


def test_two_mistakes_that_give_the_same_are_not_told_apart():
    assert named([0, 2], ("one", [0, 2]), ("other", [0, 2])) == "draw 1"


def test_a_mistake_has_forms_and_one_of_them_explains_all():
    forms = [[0, 1], [2, 0], [0, 3]]  # of the draws: two forms each
    assert named([0, 2, 0], ("it", forms)) == "it"
    assert named([1, 0, 3], ("it", forms)) == "it"
    assert named([1, 2, 0], ("it", forms)) == "draw 0"


# ---------------------------------------------------------------- each listed mistake


def draws_of(name, monkeypatch, answers=None, settings=None):
    """(verdict, [Choices]) of a check, for the solution or other answers."""
    made = []
    add = Choices.add

    def noting(self, *given):
        if self not in made:
            made.append(self)
        return add(self, *given)

    _, source, names, own = SOLUTIONS[name]
    answers = answers or mutants.built(ast.parse(source), names)
    with monkeypatch.context() as patched:
        patched.setattr(Choices, "add", noting)
        verdict = getattr(check, name)(
            *answers, **(own if settings is None else settings)
        )
    return verdict, made


TABLES = [
    *("choose_base", "choose_method", "choose_d", "choose_rank", "judge_sweep"),
    *("fair_gap", "when_it_pays", "choose_within", "choose_format", "choose_setup"),
    *("choose_placement", "search_on", "without_trials", "fewest_experts"),
    *("choose_merge", "choose_adapter", "card_count", "step_cost", "rank_at_budget"),
    *("who_is_in_it", "leaked", "items_needed"),
]


@pytest.mark.parametrize("variant", [0, 1, 2])
@pytest.mark.parametrize("name", TABLES)
def test_each_listed_mistake_has_its_own_message(name, variant, monkeypatch):
    monkeypatch.setattr(sandbox, "variant", variant)
    verdict, tables = draws_of(name, monkeypatch)
    assert verdict, verdict.message
    for table in tables:
        for message, forms in table.draws[0][2].items():
            for form in range(len(forms)):
                again = Choices(table.same)
                for _, right, mistakes, otherwise in table.draws:
                    again.add(mistakes[message][form], right, mistakes, otherwise)
                with pytest.raises(Wrong) as said:
                    again.judge()
                assert str(said.value) == message, (name, form)


def test_every_exercise_that_chooses_is_in_the_table():
    """best_split alone has no table: it says how far an answer is from the best."""
    questions = cells("question").items()
    choosing = {name for name, (_, marks, _) in questions if marks["kind"] == "choose"}
    assert choosing - {*TABLES} == {"best_split"}


# ------------------------------------------------------------- what is listed nowhere


def runs_of(*keys):
    return lambda runs, *rest: [tuple(run[key] for key in keys) for run in runs]


def first_argument(given, *rest):
    return list(given)


def words_for(runs):
    return [dict.fromkeys({run["steps"] for run in runs}, word) for word in WORDS]


def formats(weights, codes, sizes, budget):
    return [(name, size) for name in codes for size in sizes]


def plans(runs, one, other):
    ways = [("extend", case, way) for case in (one, other) for way in ("up", "down")]
    return ways + [("verdict", word) for word in WORDS]


def rates_of(cases, budget):
    return [(name, rate) for name, case in cases.items() for rate in case["valid"]]


def sides_of(losses):
    finite = [rate for rate, each in losses.items() if all(x == x for x in each)]
    return [(rate, {"smaller", "larger"}) for rate in finite]


OPTIONS = {  # {check: (what an answer may be, what else belongs to the answer)}
    "choose_base": (first_argument, ("ahead",)),
    "choose_method": (first_argument, None),
    "choose_d": (runs_of("d"), ("ahead",)),
    "choose_rank": (runs_of("r", "lr"), ()),
    "judge_sweep": (plans, ()),
    "fair_gap": (runs_of("test_loss"), (True,)),
    "when_it_pays": (words_for, None),
    "choose_within": (runs_of("method"), ("ahead",)),
    "choose_format": (formats, ("ahead",)),
    "choose_setup": (first_argument, ("ahead",)),
    "choose_placement": (rates_of, ("ahead",)),
    "search_on": (sides_of, ()),
    "without_trials": (lambda losses: [(a, a) for a in losses], ("ahead",)),
    "fewest_experts": (lambda names, losses_of: [[n] for n in names], None),
    "choose_merge": (first_argument, ("ahead",)),
    "choose_adapter": (first_argument, None),
    "card_count": (lambda sharded, whole, card, sizes: sizes, None),
}
PICKS = {
    "first": lambda options: options[0],
    "last": lambda options: options[-1],
    "random": lambda options: random.choice(options),
    "smallest": lambda options: min(options, key=size_of),
    "largest": lambda options: max(options, key=size_of),
}
LISTED = {  # these are mistakes with a name
    ("choose_method", "largest"),  # "prompt" trains least
    ("choose_rank", "first"),
    ("choose_merge", "smallest"),  # "cat" is the plain merge
}


def size_of(option):
    return [
        one if isinstance(one, int | float) else 0 for one in as_tuple(option)
    ], str(option)


def as_tuple(option):
    return option if isinstance(option, tuple) else (option,)


def answering(name, pick):
    options, more = OPTIONS[name]

    def answer(*given):
        chosen = PICKS[pick](options(*given))
        return chosen if more is None else (*as_tuple(chosen), *more)

    return answer


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_answer_without_a_reason_is_given_none(name, pick, monkeypatch):
    """No message tells of a mistake that was not made."""
    verdict, tables = draws_of(name, monkeypatch, [answering(name, pick)])
    assert not verdict
    messages = {message for table in tables for message in table.draws[0][2]}
    assert (verdict.message in messages) == ((name, pick) in LISTED), verdict.message


def test_ranks_by_the_test_loss_in_every_form():
    """The lowest test loss of all runs, and of the means."""

    def small(runs, budget):
        return [run for run in runs if run["parameters"] <= budget]

    def single(runs, budget, key="test_loss"):
        best = min(small(runs, budget), key=lambda run: run[key])
        return best["r"], best["lr"]

    def lowest_mean(runs, budget):
        sums = {}
        for run in small(runs, budget):
            place = run["r"], run["lr"]
            sums[place] = sums.get(place, 0) + run["test_loss"]
        return min(sums, key=sums.get)

    def own_rate(runs, r):
        sums = {}
        for run in runs:
            if run["r"] == r:
                sums[run["lr"]] = sums.get(run["lr"], 0) + run["valid_loss"]
        return r, min(sums, key=sums.get)

    for says, answer in (
        ("choose by the test loss", single),
        ("choose by the test loss", lowest_mean),
        ("of any seed", functools.partial(single, key="valid_loss")),
        ("the smallest rank of all", lambda r, b: own_rate(r, 2)),
        ("no order", lambda r, b: (r[0]["r"], r[0]["lr"])),
        (
            "the largest rank within",
            lambda r, b: own_rate(r, max(run["r"] for run in small(r, b))),
        ),
    ):
        verdict = check.choose_rank(answer)
        assert not verdict and says in verdict.message, verdict.message


# ---------------------------------------------------------- one step of a formula

STEPWISE = [
    *("adamw_step", "next_token_loss", "gram_norms", "dora_output", "dora_backward"),
    *("importance", "merge_error", "prefix_gate", "fuse", "fusion_penalty"),
    *("best_merge", "gguf_lora", "lora_delta", "sequential_adapter"),
    *("fold_linear_adapter", "loha_as_lora"),
]


def disturbed(result):
    """The same with every number off by some per cent, each by others."""
    if isinstance(result, list | tuple):
        return type(result)(map(disturbed, result))
    return result * (1.05 + 0.1 * torch.rand_like(result))


@pytest.mark.parametrize("name", STEPWISE)
def test_a_result_that_no_step_gives_has_no_name(name):
    _, source, names, settings = SOLUTIONS[name]
    (solution,) = mutants.built(ast.parse(source), names)
    judge = functools.partial(getattr(check, name), **settings)
    assert judge(solution)
    verdict = judge(lambda *given: disturbed(solution(*given)))
    assert not verdict and "what the formula gives when" not in verdict.message


# ------------------------------------------------------------------- an untouched stub


@pytest.mark.parametrize("name", cells("stub"))
def test_what_is_said_of_an_untouched_stub_is_true(name):
    """`raise NotImplementedError` is spoken of where the stub has it, and None where it
    has that."""
    _, _, stub = cells("stub")[name]
    _, _, source = cells("check")[name]
    values = mutants.namespace()
    values["test_losses"] = {"a": {0: 1.0, 1: 1.1}, "b": {0: 2.0, 1: 2.2}}
    exec(stub, values)
    exercise, names, settings = mutants.asked(source)
    answers = [eval(one, values) for one in names]
    message = getattr(check, exercise)(*answers, **settings).message
    assert message.startswith("There is nothing here yet"), message
    assert ("raise NotImplementedError" in message) == ("NotImplementedError" in stub)
    assert "place of None" not in message or "None" in stub


# -------------------------------------------------- a case that was not asked about

PREDICTIONS = sorted(
    name
    for name, (_, marks, _) in cells("question").items()
    if marks["kind"] == "predict" and name.startswith("predict_")
)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_prediction_has_no_other_case(name):
    _, source, names, settings = SOLUTIONS[name]
    (predicted,) = mutants.built(ast.parse(source), names[:1])
    numbers = [eval(one) for one in names[1:]]  # of the variant
    for more in ({"no such case": 1}, {17: 0.5}, {next(iter(predicted)) + " ": 1}):
        verdict = getattr(check, name)(predicted | more, *numbers, **settings)
        assert not verdict and "is not one of" in verdict.message
        assert repr(next(iter(more))) in verdict.message
