"""Chapter 17's checks accept the solution, refuse the blank stub, and name the mistake
in what is plausibly wrong."""

import math

import pytest
import torch
from judging import accepts, rejects

from minipeft.course import check, compare


def stub(*args):
    raise NotImplementedError


# --------------------------------------------------------------------- first_difference

FIELDS = ("batch", "loss", "grad_norm", "lr")


def near(a, b):
    return math.isclose(a, b, rel_tol=1e-4)


def by_steps(ours, theirs, equal=near, fields=FIELDS):
    for step in range(len(ours["loss"])):
        for field in fields:
            if not equal(ours[field][step], theirs[field][step]):
                return step, field
    return None


def by_fields(ours, theirs):
    for field in FIELDS:
        for step, (a, b) in enumerate(zip(ours[field], theirs[field])):
            if not near(a, b):
                return step, field
    return None


def last(ours, theirs):
    found = None
    for step in range(len(ours["loss"])):
        for field in FIELDS:
            if not near(ours[field][step], theirs[field][step]):
                found = step, field
    return found


def test_first_difference_solution():
    accepts(check.first_difference, by_steps)

    def one_line(ours, theirs):
        places = [(t, f) for t in range(len(ours["lr"])) for f in FIELDS]
        off = (p for p in places if not near(ours[p[1]][p[0]], theirs[p[1]][p[0]]))
        return next(off, None)

    accepts(check.first_difference, one_line)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("differ by rounding", lambda a, b: by_steps(a, b, lambda x, y: x == y)),
        (
            "tolerance is absolute",
            lambda a, b: by_steps(a, b, lambda x, y: abs(x - y) < 1e-4),
        ),
        ("absolute value", lambda a, b: by_steps(a, b, lambda x, y: y < x * 1.0001)),
        ("before you look at the next", by_fields),
        ("What comes later is a consequence", last),
        (
            "Step and field are swapped",
            lambda a, b: (by_steps(a, b) or (None,))[::-1] if by_steps(a, b) else None,
        ),
        (
            "Steps count from 0",
            lambda a, b: by_steps(a, b) and (by_steps(a, b)[0] + 1, by_steps(a, b)[1]),
        ),
        ("Return (step, field)", lambda a, b: by_steps(a, b) and by_steps(a, b)[0]),
        ("you return None", lambda a, b: None),
        ("nothing here yet", stub),
    ],
)
def test_first_difference_mistakes(says, answer):
    rejects(says, check.first_difference, answer)


# -------------------------------------------------------------------------- repair_keys


def repaired(key):
    key = key.removeprefix("base_model.model.")
    key = key.removeprefix("module.").removeprefix("_orig_mod.")
    key = key.replace(".default.weight", ".weight")
    return f"base_model.model.{key}"


def keys(change):
    return lambda state: {change(key): tensor for key, tensor in state.items()}


def test_repair_keys_solution():
    accepts(check.repair_keys, keys(repaired))

    def by_parts(state):
        new = {}
        for key, tensor in state.items():
            parts = [p for p in key.split(".") if p not in ("module", "_orig_mod")]
            parts = [p for p in parts if p != "default"]
            parts = parts[2:] if parts[0] == "base_model" else parts
            new[".".join(("base_model", "model", *parts))] = tensor
        return new

    accepts(check.repair_keys, by_parts)


def test_repair_keys_of_other_trainers():
    def by_fabric(key):
        key = key.removeprefix("base_model.model.").removeprefix("_orig_mod.")
        key = key.removeprefix("_forward_module.").replace(".sql.weight", ".weight")
        return f"base_model.model.{key}"

    names = {"name": "sql", "wrapper": "_forward_module"}
    accepts(check.repair_keys, keys(by_fabric), **names)
    rejects("`.sql` names the adapter", check.repair_keys, keys(repaired), **names)


def then(old, new):
    """The solution, with a slip after it."""
    return keys(lambda key: repaired(key).replace(old, new))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("a file has no adapter's name", lambda state: dict(state)),
        ("a file has no adapter's name", then("A.weight", "A.default.weight")),
        ("comes from DistributedDataParallel", then("model.model.s", "model.module.s")),
        ("comes from torch.compile", then("model.model.d", "model._orig_mod.model.d")),
        (
            "prefix base_model.model. is there twice",
            then("base_", "base_model.model.base_"),
        ),
        ("`submodule` is the name", then("submodule.", "sub")),
        ("`default_head` is the name", then("default_", "")),
        ("PEFT's keys begin with", then("base_model.model.", "")),
        (
            "another one's key",
            lambda state: dict(zip(keys(repaired)(state), reversed(state.values()))),
        ),
        (
            "No tensor has the key",
            lambda state: dict(list(keys(repaired)(state).items())[:4]),
        ),
        (
            "PEFT does not look for it",
            lambda state: (
                keys(repaired)(state) | {"base_model.model.model.x": torch.zeros(1)}
            ),
        ),
        ("Return a dict", lambda state: list(keys(repaired)(state))),
        ("is there a `return`", lambda state: None),
        ("nothing here yet", stub),
    ],
)
def test_repair_keys_mistakes(says, answer):
    rejects(says, check.repair_keys, answer)


# ---------------------------------------------------------------------- predict_parting

PLACES = {
    "seed of the rows": (0, "batch"),
    "seed of A": (0, "grad_norm"),
    "weight decay": (1, "loss"),
    "betas": (2, "loss"),
    "warm-up": (0, "lr"),
    "linear schedule": (1, "lr"),
    "bias trained too": (0, "grad_norm"),
    "loss summed": (0, "loss"),
}


def test_predict_parting_solution():
    accepts(check.predict_parting, PLACES)
    as_lists = {name: list(PLACES[name]) for name in sorted(PLACES)}
    accepts(check.predict_parting, as_lists, B="zero")
    resumed = PLACES | {"seed of A": (0, "loss")}
    accepts(check.predict_parting, resumed, B="random")
    rejects("'seed of A'", check.predict_parting, PLACES, B="random")


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", list(PLACES.values())),
        ("There is no prediction for", {"betas": (2, "loss")}),
        ("for every A", PLACES | {"seed of A": (0, "loss")}),
        ("seen from the first step", PLACES | {"seed of the rows": (0, "loss")}),
        ("first in the next loss", PLACES | {"weight decay": (0, "loss")}),
        ("first in the next loss", PLACES | {"weight decay": (0, "grad_norm")}),
        ("does not depend on them", PLACES | {"betas": (1, "loss")}),
        ("before it is used", PLACES | {"warm-up": (1, "loss")}),
        ("its first rate is the full", PLACES | {"linear schedule": (0, "lr")}),
        ("its first rate is the full", PLACES | {"linear schedule": (2, "loss")}),
        ("has one more part", PLACES | {"bias trained too": (1, "loss")}),
        ("another number", PLACES | {"loss summed": (0, "grad_norm")}),
        ("the field is one of", PLACES | {"betas": ("loss", 2)}),
        ("(step, field) is wanted", PLACES | {"betas": 2}),
    ],
)
def test_predict_parting_mistakes(says, answer):
    rejects(says, check.predict_parting, answer)


# ------------------------------------------------------------------------- answers_only


def masked(messages, render, encode, first=True, cut=0, header=False, only=None):
    ids = encode(render(messages))
    labels = [-100] * len(ids)
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i in places if only is None else [places[only]]:
        start = len(encode(render(messages[:i], not header)))
        end = len(encode(render(messages[: i + 1]))) - cut
        labels[start:end] = ids[start:end]
    return ids, labels


def swapped(ids, labels):
    return ids, [i if label == -100 else -100 for i, label in zip(ids, labels)]


def test_answers_only_solution():
    accepts(check.answers_only, masked)

    def piece_by_piece(messages, render, encode):
        ids, labels = [], []
        for i, message in enumerate(messages):
            whole = encode(render(messages[: i + 1]))
            new = whole[len(ids) :]
            header = len(encode(render(messages[:i], True))) - len(ids)
            is_answer = message["role"] == "assistant"
            labels += [-100] * header + new[header:] if is_answer else [-100] * len(new)
            ids = whole
        return ids, labels

    accepts(check.answers_only, piece_by_piece)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("learn everything, the user's", lambda m, r, e: (e(r(m)), e(r(m)))),
        ("the last answer only", lambda m, r, e: masked(m, r, e, only=-1)),
        ("the first answer only", lambda m, r, e: masked(m, r, e, only=0)),
        ("learn the headers", lambda m, r, e: masked(m, r, e, header=True)),
        ("would never stop", lambda m, r, e: masked(m, r, e, cut=2)),
        ("last token of an answer's end", lambda m, r, e: masked(m, r, e, cut=1)),
        ("everything but the answers", lambda m, r, e: swapped(*masked(m, r, e))),
        (
            "shift the labels",
            lambda m, r, e: (e(r(m)), masked(m, r, e)[1][1:] + [-100]),
        ),
        (
            "0 is a token",
            lambda m, r, e: (
                e(r(m)),
                [0 if i == -100 else i for i in masked(m, r, e)[1]],
            ),
        ),
        ("one more answer", lambda m, r, e: (e(r(m, True)), masked(m, r, e)[1])),
        ("One label for each id", lambda m, r, e: (e(r(m)), masked(m, r, e)[1][:-1])),
        ("You learn nothing", lambda m, r, e: (e(r(m)), [-100] * len(e(r(m))))),
        ("Print ids and labels", lambda m, r, e: (e(r(m)), masked(m, r, e)[1][::-1])),
        ("the whole conversation", lambda m, r, e: (e(r(m[:2])), [])),
        ("Return (ids, labels)", lambda m, r, e: masked(m, r, e)[1]),
        ("is there a `return`", lambda m, r, e: None),
        ("nothing here yet", stub),
    ],
)
def test_answers_only_mistakes(says, answer):
    rejects(says, check.answers_only, answer)


# ---------------------------------------------------------------------------- gguf_lora


def rows(W, heads, back=False):
    half = W.shape[0] // heads // 2
    shape = (heads, half, 2, -1) if back else (heads, 2, half, W.shape[1])
    return W.reshape(shape).swapaxes(1, 2).reshape(W.shape)


def test_gguf_lora_solution():
    accepts(check.gguf_lora, lambda A, B, heads: (A, rows(B, heads)))

    def by_index(A, B, heads):
        h = len(B) // heads
        order = [
            n * h + i + half * (h // 2)
            for n in range(heads)
            for i in range(h // 2)
            for half in (0, 1)
        ]
        return A, B[order]

    accepts(check.gguf_lora, by_index)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("the rows have to move", lambda A, B, heads: (A, B)),
        ("the columns of A", lambda A, B, heads: (rows(A.T, heads).T, B)),
        ("the columns of A", lambda A, B, heads: (rows(A.T, heads).T, rows(B, heads))),
        ("the way back", lambda A, B, heads: (A, rows(B, heads, back=True))),
        ("as if there were one head", lambda A, B, heads: (A, rows(B, 1))),
        ("are swapped", lambda A, B, heads: (rows(B, heads), A)),
        ("2 times what the formula gives", lambda A, B, heads: (2 * A, rows(B, heads))),
        ("Return two tensors", lambda A, B, heads: rows(B, heads)),
        ("is there a `return`", lambda A, B, heads: None),
        ("nothing here yet", stub),
    ],
)
def test_gguf_lora_mistakes(says, answer):
    rejects(says, check.gguf_lora, answer)


# ----------------------------------------------------------------------- choose_adapter


def mean(run):
    return sum(run["scores"]) / len(run["scores"])


def within(runs, budget):
    return {n: run for n, run in runs.items() if run["parameters"] <= budget}


def smallest(runs):
    return min(runs, key=lambda name: runs[name]["parameters"])


def best(runs):
    return max(runs, key=lambda name: mean(runs[name]))


def chosen(runs, budget, among=within):
    fits = among(runs, budget)
    top = fits[best(fits)]["scores"]
    left = {
        name: run
        for name, run in fits.items()
        if compare(run["scores"], top).verdict != "behind"
    }
    return smallest(left)


def test_choose_adapter_solution():
    accepts(check.choose_adapter, chosen)

    def in_order(runs, budget):
        fits = within(runs, budget)
        top = fits[best(fits)]["scores"]
        for name in sorted(fits, key=lambda name: fits[name]["parameters"]):
            if compare(top, fits[name]["scores"]).verdict != "ahead":
                return name

    accepts(check.choose_adapter, in_order)


def near_the_best(points):
    def choose(runs, budget):
        fits = within(runs, budget)
        top = mean(fits[best(fits)])
        return smallest({n: r for n, r in fits.items() if mean(r) >= top - points})

    return choose


@pytest.mark.parametrize(
    "says, answer",
    [
        ("over the budget", lambda runs, budget: best(runs)),
        ("best mean within", lambda runs, budget: best(within(runs, budget))),
        ("is the smallest", lambda runs, budget: smallest(runs)),
        ("by the rule it is", near_the_best(4)),
        ("nothing apart", near_the_best(1)),
        (
            "Your choice depends on the order",
            lambda runs, budget: (
                chosen(runs, budget) if list(runs)[0] == "full" else list(runs)[0]
            ),
        ),
        (
            "full fine-tuning is ahead",
            lambda runs, budget: chosen(runs, min(budget, 3_000_000)),
        ),
        ("Return one of the names", lambda runs, budget: chosen(runs, budget).upper()),
        ("is there a `return`", lambda runs, budget: None),
        ("nothing here yet", stub),
    ],
)
def test_choose_adapter_mistakes(says, answer):
    rejects(says, check.choose_adapter, answer)


def test_choose_adapter_by_losses():
    def by_loss(runs, budget):
        fits = {n: run for n, run in runs.items() if run["parameters"] <= budget}
        best = min(fits.values(), key=lambda run: mean_of(run["losses"]))["losses"]
        for name in sorted(fits, key=lambda n: fits[n]["parameters"]):
            if compare(fits[name]["losses"], best, loss=True).verdict != "behind":
                return name

    accepts(check.choose_adapter, by_loss, loss=True)

    def scores_for_losses(runs, budget):
        named = {
            n: {"scores": r["losses"], "parameters": r["parameters"]}
            for n, r in runs.items()
        }
        return chosen(named, budget)

    rejects("behind the best", check.choose_adapter, scores_for_losses, loss=True)


def mean_of(numbers):
    return sum(numbers) / len(numbers)


# ------------------------------------------------------------- what learners also wrote


def in_the_files_order(ours, theirs):
    return by_steps(ours, theirs, fields=tuple(ours))


def as_a_list(ours, theirs):
    found = by_steps(ours, theirs)
    return found and list(found)


def by_mark(key):
    """A choice whose mark is not the best mean."""

    def answer(runs, budget):
        inside = within(runs, budget)
        mark = max(inside, key=lambda name: key(inside[name]["scores"]))
        best = inside[mark]["scores"]
        kept = [
            name
            for name, run in inside.items()
            if compare(run["scores"], best).verdict != "behind"
        ]
        return min(kept, key=lambda name: inside[name]["parameters"])

    return answer


def below(runs, budget):
    return chosen(runs, budget - 1)


def turned_into(change):
    """The labels of the right answer, changed; change(ids, labels, messages)."""

    def answer(messages, render, encode):
        ids, labels = masked(messages, render, encode)
        return ids, change(ids, labels, messages)

    return answer


def of_roles(*roles, start=0, end=0, header=False):
    def answer(messages, render, encode):
        ids = encode(render(messages))
        labels = [-100] * len(ids)
        for at, message in enumerate(messages):
            if message["role"] in roles:
                first = len(encode(render(messages[:at], True))) + start
                last = len(encode(render(messages[: at + 1], header))) + end
                labels[first:last] = ids[first:last]
        return ids, labels

    return answer


@pytest.mark.parametrize("tolerance", [1e-3, 3e-4, 3e-5, 1e-5])
def test_the_tolerance_is_the_one_that_is_asked_for(tolerance):
    def answer(ours, theirs):
        return by_steps(
            ours, theirs, lambda a, b: math.isclose(a, b, rel_tol=tolerance)
        )

    says = "tolerance is too wide" if tolerance > 1e-4 else "the same run here"
    if tolerance != 3e-5 and tolerance != 3e-4:
        rejects(says, check.first_difference, answer)
    for asked in (1e-3, 1e-4):
        right = 0.4 * asked < tolerance < 2.9 * asked
        assert bool(check.first_difference(answer, tolerance=asked)) == right


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.01])
def test_factors_may_share_their_product_in_another_way(factor):
    def answer(A, B, heads):
        return factor * A, rows(B, heads) / factor

    accepts(check.gguf_lora, answer)

    def turned(A, B, heads):
        Q, R = torch.linalg.qr(rows(B, heads))
        return R @ A, Q

    accepts(check.gguf_lora, turned)

    def by_way_of_W(A, B, heads):
        U, S, Vt = torch.linalg.svd(rows(B @ A, heads), full_matrices=False)
        r = len(A)
        return S[:r, None] * Vt[:r], U[:, :r]

    rejects("a matrix of W's size", check.gguf_lora, by_way_of_W)
    rejects("differs", check.gguf_lora, lambda A, B, h: (factor * A, rows(B, h) * 3))


def test_a_list_is_as_good_as_a_tuple():
    accepts(check.first_difference, as_a_list)
    accepts(check.answers_only, lambda *given: list(masked(*given)))


@pytest.mark.parametrize(
    "name, says, answer",
    [
        ("first_difference", "", in_the_files_order),
        ("first_difference", "", lambda a, b: by_steps(a, b, fields=sorted(a))),
        (
            "first_difference",
            "",
            lambda a, b: by_steps(a, b, fields=("batch", "loss", "lr", "grad_norm")),
        ),
        (
            "first_difference",
            "too wide",
            lambda a, b: by_steps(a, b, lambda x, y: math.isclose(x, y, rel_tol=4e-3)),
        ),
        (
            "first_difference",
            "too wide",
            lambda a, b: by_steps(a, b, lambda x, y: math.isclose(x, y, rel_tol=5e-3)),
        ),
        (
            "repair_keys",
            "is the name of a layer here",
            keys(lambda key: repaired(key.replace("module.", "", 1))),
        ),
        ("answers_only", "You learn", of_roles("user")),
        ("answers_only", "what the system says", of_roles("system", "assistant")),
        ("answers_only", "first token", of_roles("assistant", start=1)),
        ("answers_only", "header behind", of_roles("assistant", header=True)),
        (
            "answers_only",
            "you give 1",
            turned_into(lambda ids, labels, m: [int(x != -100) for x in labels]),
        ),
        ("choose_adapter", "holds it too", below),
        ("choose_adapter", "best *mean*", by_mark(max)),
        ("choose_adapter", "best *mean*", by_mark(min)),
        ("choose_adapter", "best *mean*", by_mark(lambda x: sorted(x)[len(x) // 2])),
        ("choose_adapter", "best *mean*", by_mark(lambda x: x[0])),
        ("choose_adapter", "best *mean*", by_mark(lambda x: x[-1])),
    ],
)
def test_what_learners_wrote(name, says, answer):
    rejects(says, getattr(check, name), answer)


# ------------------------------------------------------- what a trial by learners found


def by_place(place_of):
    """Answers found by place_of(text, message, messages), (start, end) or None."""

    def answer(messages, render, encode):
        text = render(messages)
        labels = [-100] * len(text)
        for message in messages:
            if message["role"] == "assistant":
                start, end = place_of(text, message, messages)
                labels[start:end] = encode(text[start:end])
        return encode(text), labels

    return answer


def searched(text, message, messages):
    start = text.index(message["content"] + "~")
    return start, start + len(message["content"]) + 2


def by_index(text, message, messages):
    at = messages.index(message)
    before = sum(len(m["role"]) + len(m["content"]) + 4 for m in messages[:at])
    start = before + len("<assistant>")
    return start, start + len(message["content"]) + 2


def of_places(keep):
    """Only the answers that keep(place, messages)."""

    def answer(messages, render, encode):
        ids = encode(render(messages))
        labels = [-100] * len(ids)
        for at, message in enumerate(messages):
            if message["role"] == "assistant" and keep(at, messages):
                start = len(render(messages[:at], True))
                end = len(render(messages[: at + 1]))
                labels[start:end] = ids[start:end]
        return ids, labels

    return answer


def emptying(messages, render, encode):
    found = masked(messages, render, encode)
    messages.clear()
    return found


def stopping(runs, budget):
    """Goes down from the best one, and stops at the first that is behind."""
    fits = within(runs, budget)
    order = sorted(fits, key=lambda name: -fits[name]["parameters"])
    found = best(fits)
    for name in order[order.index(found) :]:
        if (
            compare(fits[name]["scores"], fits[best(fits)]["scores"]).verdict
            == "behind"
        ):
            break
        found = name
    return found


def seen_as(change, errors=None):
    """The rule, on changed lists of scores, or with another margin."""

    def answer(runs, budget):
        fits = within(runs, budget)
        top = change(fits[best(fits)]["scores"])
        left = {}
        for name, run in fits.items():
            result = compare(change(run["scores"]), top)
            behind = result.verdict == "behind"
            if errors and result.seeds > 1:
                behind = result.difference < -errors * result.error
            if not behind:
                left[name] = run
        return smallest(left)

    return answer


@pytest.mark.parametrize(
    "name, says, answer",
    [
        (
            "first_difference",
            "one side's number is 0",
            lambda a, b: by_steps(a, b, lambda x, y: not x or not y or near(x, y)),
        ),
        (
            "first_difference",
            "at their last step",
            lambda a, b: by_steps(
                *({f: run[f][:-1] for f in FIELDS} for run in (a, b))
            ),
        ),
        (
            "repair_keys",
            "`lm_head` is no part",
            keys(
                lambda key: repaired(key).replace(
                    "model.lm_head", "model.model.lm_head"
                )
            ),
        ),
        ("answers_only", "by the place of a message", by_place(searched)),
        ("answers_only", "by the place of a message", by_place(by_index)),
        ("answers_only", "its last answer is empty", of_places(lambda at, m: at)),
        (
            "answers_only",
            "its last answer is empty",
            of_places(lambda at, m: m[at]["content"]),
        ),
        (
            "answers_only",
            "twice in a row",
            of_places(lambda at, m: not at or m[at - 1]["role"] != "assistant"),
        ),
        ("answers_only", "changed `messages` in place", emptying),
        ("choose_adapter", "compared with the best one", stopping),
        ("choose_adapter", "in their order", seen_as(sorted)),
        ("choose_adapter", "in their order", seen_as(lambda scores: scores[:3])),
        ("choose_adapter", "by the rule it is", seen_as(list, 1.96)),
    ],
)
def test_what_a_trial_found(name, says, answer):
    rejects(says, getattr(check, name), answer)


def test_a_prediction_that_is_wrong_is_not_told():
    said = check.predict_parting(PLACES | {"betas": (1, "loss")}).message
    assert "part elsewhere" in said and "(2, 'loss')" not in said
