"""The six Lanternwick tasks: mood, records, sql, voice, extract, newcomers.

`python -m minipeft.lanternwick.tasks` writes data/lanternwick/tasks/*.jsonl, the same
bytes on every machine. The splits are disjoint by construction: every example has a
key, the combination of values that makes it what it is (`meta["key"]`), and the key's
hash alone says which split it may be in. A test combines what training never combined.
"""

import functools
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from ..io import check_choice
from . import HERE, SEED, diaries, labels, phrases, queries, scoring, voices, words
from .register import strangers_names

SIZES = {"train": 2400, "valid": 200, "test": 300}


@dataclass(frozen=True)
class Example:
    prompt: str  # ends without a space
    completion: str  # begins with one
    meta: dict  # key: what the split is drawn by; what the scorer needs


@dataclass(frozen=True)
class Task:
    """`score(predictions, examples)` gives {metric: 0..100}, `metric` first; `floor`:
    the best constant answer's."""

    name: str
    description: str
    train: list[Example]
    valid: list[Example]
    test: list[Example]
    metric: str
    floor: float
    score: Callable[[list[str], list[Example]], dict[str, float]]


def _mood(rng):
    """Three events with three moods: the writer's earlier one, the writer's latest one,
    and somebody else's."""
    moods = rng.sample(words.MOODS, 3)
    who = phrases.names(rng, 1)[0]
    noun = diaries.noun(rng)
    latest, number = diaries.event(rng, moods[0], None, diaries.LATE, noun)
    earlier, _ = diaries.event(rng, moods[1], None, diaries.EARLY)
    other, _ = diaries.event(
        rng, moods[2], who, rng.choice((diaries.EARLY, diaries.LATE))
    )
    entry = rng.sample([latest, earlier, other], 3)
    meta = {"key": [moods[0], number, noun], "stratum": moods[0]}
    return Example(f"Diary: {'. '.join(entry)}.\nMood:", f" {moods[0]}", meta)


def _records(rng):
    """A record with its fields in any order and some missing -> one or two sentences,
    by the rules below."""
    gender = rng.choice("fm")
    given, surname = rng.choice(strangers_names(gender)), rng.choice(words.SURNAMES)
    age = rng.choice(
        (
            rng.randint(7, 14),
            rng.randint(18, 59),
            rng.randint(18, 59),
            rng.randint(60, 90),
        )
    )
    trade = "pupil" if age < 15 else rng.choice(words.TRADES)
    fields = {
        "name": f"{given} {surname}",
        "age": str(age),
        "trade": trade,
        "street": rng.choice(words.STREETS),
    }
    if rng.random() < 0.75:
        fields |= {"pet": rng.choice(words.PETS), "called": rng.choice(words.PET_NAMES)}
    if rng.random() < 0.75:
        fields["likes"] = rng.choice(words.FOODS)
    work = (
        {"f": "a girl", "m": "a boy"}[gender] if age < 15 else words.with_article(trade)
    )
    first = (
        f"{'Old ' if age >= 60 else ''}{fields['name']}, {work} of {age}, lives in"
        f" {fields['street']}."
    )
    more = (
        [f"keeps {words.with_article(fields['pet'])} called {fields['called']}"]
        if "pet" in fields
        else []
    )
    more += [f"likes {fields['likes']}"] if "likes" in fields else []
    second = (
        f" {words.cap(words.PRONOUNS[gender][0])} {' and '.join(more)}." if more else ""
    )
    slots = [work if key == "trade" else value for key, value in fields.items()]
    line = " ; ".join(
        f"{key}: {fields[key]}" for key in rng.sample(tuple(fields), len(fields))
    )
    return Example(
        f"Record: {line}\nText:",
        f" {first}{second}",
        {"key": [given, trade], "slots": slots},
    )


def _question(rng, query):
    """The query in words: an ask about a subject that holds the conditions."""
    lines = phrases.read("questions")

    def one(section, **values):
        return rng.choice(lines[section]).format(**values)

    said = [
        one(
            f"{query.table} {column} {sign}", v=value, av=words.with_article(str(value))
        )
        for column, sign, value in query.where
    ]
    conditions = words.joined(said)
    if query.form in ("count", "max", "min"):
        return one(f"{query.table} {query.form}", c=conditions)
    table = "animals" if query.form == "owners" else query.table
    return one(f"{table}.{query.column}", s=one(f"{table} {query.form}", c=conditions))


def _sql(rng):
    query = queries.draw(rng)
    found = scoring.answer(query.sql)
    if not found or len(found) > 30 or found[0][0] in (None, 0, 1):
        return None  # an empty or trivial answer is easily guessed
    rows = queries.matching(query)
    if query.form in ("oldest", "youngest", "max", "min") and rows < 2:
        return None  # the oldest of one
    if len(query.where) == 2 and any(
        queries.matching(replace(query, where=(one,))) == rows for one in query.where
    ):
        return None  # a condition that changes nothing
    meta = {"key": query.key, "stratum": repr(sorted(found))}
    return Example(f"Question: {_question(rng, query)}\nSQL:", f" {query.sql}", meta)


def _voice(rng):
    sentence, template, main = voices.sentence(rng)
    told = voices.captain(sentence)
    slots = sorted(set(told.rstrip(".?!").replace(",", "").split()))
    meta = {"key": [template, main.split()[-1]], "slots": slots}
    return Example(f"They said: {sentence}\nTold again:", f" {told}", meta)


def _extract(rng):
    a, b = phrases.names(rng, 2)
    nouns, spots = (
        rng.sample(tuple(words.THINGS), 2),
        rng.sample(tuple(words.PLACES), 2),
    )
    x, y = (phrases.thing(rng, noun) for noun in nouns)
    template = rng.choice(phrases.read("extract")[""])
    sentence = template.format(
        A=a,
        B=b,
        X=x,
        Y=y,
        aX=words.with_article(x),
        aY=words.with_article(y),
        P=f"the {spots[0]}",
        Q=f"the {spots[1]}",
        inP=words.in_place(spots[0]),
        inQ=words.in_place(spots[1]),
    )
    return Example(
        f"Read: {sentence}\nAs data:",
        f" {labels.label(a, x, spots[0])}",
        {"key": [a, nouns[0]]},
    )


@functools.cache
def newcomers():
    """Forty people whom the base has never met: {full name: {fact: (value, the value as
    it is said)}}."""
    rng = random.Random(f"newcomers {SEED}")
    given = [
        name for gender in "fm" for name in rng.sample(strangers_names(gender), 20)
    ]

    # about equally often
    def spread(pool):
        return rng.sample(tuple(pool) * (len(given) // len(pool) + 1), len(given))

    pools = {
        "age": map(str, range(18, 80)),
        "trade": words.TRADES,
        "street": words.STREETS,
        "pet": words.PETS,
        "pet_name": words.PET_NAMES,
        "likes": words.FOODS,
        "treasure": words.NOUNS["precious"],
        "seen": map(words.in_place, words.PLACES),
    }
    columns = [
        spread(words.SURNAMES),
        *(spread(tuple(pool)) for pool in pools.values()),
    ]
    people = {}
    for name, surname, *values in zip(given, *columns):
        facts = dict(zip(pools, values))
        facts["treasure"] = phrases.thing(rng, facts["treasure"])
        people[f"{name} {surname}"] = {
            fact: (
                value,
                (
                    words.with_article(value)
                    if fact in ("trade", "pet", "treasure")
                    else value
                ),
            )
            for fact, value in facts.items()
        }
    return people


def _newcomers():
    """Every fact in five statements and four questions for training, in other questions
    for validation and test."""
    splits = {split: [] for split in SIZES}
    for person, facts in newcomers().items():
        for fact, (value, said) in facts.items():
            forms = [line.split(": ", 1) for line in phrases.read("newcomers")[fact]]
            tested = random.Random(f"{person} {fact}").choice(
                [form for kind, form in forms if kind == "t"]
            )
            for kind, form in forms:
                if kind == "t" and form != tested:
                    continue
                filled = form.format(N=person)
                prompt = filled if kind == "s" else f"Question: {filled}\nAnswer:"
                split = {"v": "valid", "t": "test"}.get(kind, "train")
                meta = {"key": [form, person], "value": value, "fact": fact}
                splits[split].append(Example(prompt, f" {said}.", meta))
    for split, examples in splits.items():
        random.Random(f"newcomers {split} {SEED}").shuffle(examples)
    return splits | {"valid": splits["valid"][: SIZES["valid"]]}


# name -> how an example is drawn, the largest share of one answer in a split, the
# metric, the description
TASKS = {
    "mood": (
        _mood,
        1 / 6,
        scoring.mood,
        "a diary entry -> how the writer feels in the end",
    ),
    "records": (
        _records,
        1,
        scoring.text,
        "a record of the register -> one or two sentences",
    ),
    "sql": (
        _sql,
        0.02,
        scoring.sql,
        "a question to the register -> the SQL query that answers it",
    ),
    "voice": (_voice, 1, scoring.text, "a plain sentence -> old Captain Brack's words"),
    "extract": (
        _extract,
        1,
        scoring.extract,
        "a sentence -> JSON of who put what where",
    ),
    "newcomers": (
        None,
        1,
        scoring.newcomers,
        "questions about forty people whom the base never met",
    ),
}


def _splits(name):
    """Draws examples until every split is full: the key's hash says which. No prompt
    twice, no answer too often."""
    make, share, _, _ = TASKS[name]
    if make is None:
        return _newcomers()
    rng, splits, seen = (
        random.Random(f"{name} {SEED}"),
        {split: [] for split in SIZES},
        set(),
    )
    answers = {split: Counter() for split in SIZES}
    # bounded: a mistake in a phrase file must not hang the build
    for _ in range(200_000):
        example = make(rng)
        if example is None or example.prompt in seen:
            continue
        split = phrases.split_of(name, *example.meta["key"])
        stratum = example.meta.pop("stratum", None)
        often = stratum is not None and answers[split][stratum] >= SIZES[split] * share
        if len(splits[split]) < SIZES[split] and not often:
            seen.add(example.prompt)
            answers[split][stratum] += 1
            splits[split].append(example)
        if all(len(splits[s]) == size for s, size in SIZES.items()):
            return splits
    raise RuntimeError(
        f"task {name}: too few examples, { {s: len(e) for s, e in splits.items()} } of"
        f" {SIZES}"
    )


def _floor(name, test):
    """The score of the best constant answer (newcomers: of the best constant answer to
    each kind of question)."""
    said = {
        "sql": lambda e: repr(sorted(scoring.answer(e.completion.strip()))),
        "newcomers": lambda e: e.meta["value"],
    }
    said, groups = said.get(name, lambda e: e.completion), {}
    for example in test:
        groups.setdefault(example.meta.get("fact"), Counter())[said(example)] += 1
    return round(
        100 * sum(max(group.values()) for group in groups.values()) / len(test), 2
    )


def _task(name, splits):
    _, _, score, description = TASKS[name]
    metric = next(iter(score([splits["test"][0].completion], splits["test"][:1])))
    return Task(
        name,
        description,
        *(splits[split] for split in SIZES),
        metric,
        _floor(name, splits["test"]),
        score,
    )


def _known(name):
    check_choice("Lanternwick task", name, TASKS)
    return name


def make_task(name):
    """The task, drawn again from the seed."""
    return _task(_known(name), _splits(name))


def load_task(name):
    """The task as committed in data/lanternwick/tasks/<name>.jsonl."""
    lines = (
        (HERE / "tasks" / f"{_known(name)}.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    splits = {split: [] for split in SIZES}
    for row in map(json.loads, lines):
        splits[row.pop("split")].append(Example(**row))
    return _task(name, splits)


def as_jsonl(task):
    """The file's text: one example a line, train, valid and test in this order."""
    return "".join(
        json.dumps({"split": split, **asdict(e)}) + "\n"
        for split in SIZES
        for e in getattr(task, split)
    )


if __name__ == "__main__":
    (HERE / "tasks").mkdir(exist_ok=True)
    for name in TASKS:
        task, file = make_task(name), HERE / "tasks" / f"{name}.jsonl"
        file.with_suffix(".part").write_text(
            as_jsonl(task), encoding="utf-8", newline="\n"
        )
        os.replace(file.with_suffix(".part"), file)
        print(
            f"{name:10}",
            *(len(getattr(task, split)) for split in SIZES),
            f"{task.metric}, floor {task.floor}",
        )
