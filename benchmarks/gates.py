"""What the base can do, measured: it tells a story, recalls the register, copies what
it read a moment ago, and cannot do the tasks.

    python benchmarks/gates.py [--base FOLDER] [--quick]       writes
      benchmarks/results/gates.json

`tests/test_base.py` measures the same on fewer examples, on the shipped weights.
"""

import argparse
import json
import random
import re
from collections import Counter

import torch
from common import RESULTS, facts, save

from minipeft.lanternwick import words
from minipeft.lanternwick.documents import (
    ATTRIBUTES,
    heldout_questions,
    sections,
    strangers,
    stream,
)
from minipeft.lanternwick.register import register
from minipeft.lanternwick.tasks import load_task
from minipeft.lm import evaluate, generate, load_pretrained, load_tokenizer

TASKS = ("mood", "records", "sql", "voice", "extract", "newcomers")


def share(hits):
    """Per cent, with one digit."""
    hits = list(hits)
    return round(100 * sum(hits) / len(hits), 1)


def answers(model, tokenizer, prefixes, wanted):
    """Whether the model's greedy continuation of each prefix begins with the wanted
    answer."""
    longest = max(len(tokenizer.encode(answer)) for answer in wanted)
    said = generate(
        model,
        tokenizer,
        [prefix.rstrip(" ") for prefix in prefixes],
        max_new_tokens=longest + 2,
    )

    def plain(text):
        return re.sub(r"^(an?|the) ", "", text.strip(" \"'").lower())

    return [
        bool(re.match(re.escape(plain(answer)) + r"\b", plain(text)))
        for text, answer in zip(said, wanted)
    ]


def copies(model, tokenizer, documents=150, seed=1):
    """Questions about strangers who were introduced just before, told nowhere else: per
    cent answered.

    One stranger with several facts is the gate. Two, three and four at once ask for
    more than copying, for telling people apart; of two, "by name" are the questions
    that name the person and ask for a fact, "for the name" those that ask the other way
    round."""
    rng, result = random.Random(f"gate {seed}"), {}
    for key, count in (("one", 1), ("two", 2), ("three", 3), ("four", 4)):
        rows = [
            (
                doc.text[:start],
                answer,
                answer.split()[0] in {person.name for person in doc.meta["people"]},
            )
            for doc in (strangers(rng, count) for _ in range(documents))
            for start, answer in doc.meta["answers"]
        ]
        prefixes, wanted, named = zip(*rows)
        right = answers(model, tokenizer, prefixes, wanted)
        result[key] = share(right)
        if key == "two":
            result["two, by name"] = share(
                hit for hit, name in zip(right, named) if not name
            )
            result["two, for the name"] = share(
                hit for hit, name in zip(right, named) if name
            )
    return result


def recalls(model, tokenizer):
    """The register, each fact asked for in the one phrasing that the pretraining text
    never put to that resident: per cent right."""
    rows = heldout_questions()
    right = answers(
        model,
        tokenizer,
        [f"Question: {row['question']} Answer:" for row in rows],
        [row["answer"] for row in rows],
    )
    return {
        a: share(r for r, row in zip(right, rows) if row["attribute"] == a)
        for a in ATTRIBUTES
    }


def told_things(text):
    """[(adjective, noun)] of all things that a text names with their adjective."""
    known = {
        (adjective, noun)
        for noun, adjectives in words.ADJECTIVES.items()
        for adjective in adjectives
    }
    tokens = re.findall(r"[a-z-]+", text.lower())
    return [pair for pair in zip(tokens, tokens[1:]) if pair in known]


def tracks(model, tokenizer, stories=100, seed=1):
    """Lost-and-found stories, begun by the grammar and ended by the model: does it keep
    to its people and its thing?

    The beginning is cut where the thing and its owner have been named. `found`: stories
    in which the lost thing is the last thing that is named, and its noun never comes
    with another adjective. `mentions`: of all names and things in the endings, those
    that keep to the story: a thing with the adjective it had, a person named before, or
    one of as many newcomers as the grammar's own ending has. `gate` is the smaller of
    the two; `whole` the stories without any slip. Greedy, so it can be repeated."""
    rng = random.Random(f"gate {seed}")
    lost = [s for s in sections("stories").values() if s.kind == "lost"]
    every_name = set(words.GENDER) | set(register().by_name)

    def names(text):
        return [w for w in re.findall(r"[A-Z][a-z]+", text) if w in every_name]

    rows = []
    while len(rows) < stories:
        told = rng.choice(lost).render(rng)
        thing, owner = told.things["X"], told.cast["A"].name
        sentences = re.split(r'(?<=[.!?"]) (?=["A-Z])', told.text)
        seen, k = "", 0
        while k < len(sentences) and not (
            " ".join(thing) in seen and owner in seen and k >= 2
        ):
            seen, k = " ".join(sentences[: k + 1]), k + 1
        rest = " ".join(sentences[k:])
        # the grammar itself passes
        if told_things(rest) and told_things(rest)[-1] == thing:
            rows.append((seen, rest, thing))
    endings = generate(model, tokenizer, [row[0] for row in rows], max_new_tokens=160)
    found, kept, whole = [], [], []
    for (seen, rest, thing), ending in zip(rows, endings):
        things, known, newcomers = (
            told_things(ending),
            set(names(seen)),
            len(set(names(rest)) - set(names(seen))),
        )
        good = [pair == thing for pair in things if pair[1] == thing[1]]
        found.append(bool(things) and things[-1] == thing and all(good))
        for name in names(ending):
            if name not in known and newcomers:
                newcomers -= 1
                known.add(name)
            good.append(name in known)
        kept += good
        whole.append(found[-1] and all(good))
    found, kept, whole = map(share, (found, kept, whole))
    result = {
        "gate": min(found, kept),
        "found": found,
        "mentions": kept,
        "whole": whole,
        "stories": len(rows),
    }
    return result, [seen + " |" + ending for (seen, *_), ending in zip(rows, endings)]


def unseen_outputs(tokenizer, documents=60_000):
    """Tokens that some task must output and the pretraining text (a sample of it) does
    not hold."""
    texts = stream()
    seen = Counter(
        i
        for ids in tokenizer.encode_batch(next(texts).text for _ in range(documents))
        for i in ids
    )
    needed = {
        i
        for name in TASKS
        for split in ("train", "valid", "test")
        for ids in tokenizer.encode_batch(
            e.completion for e in getattr(load_task(name), split)
        )
        for i in ids
    }
    return sorted(tokenizer.raw.id_to_token(i) for i in needed - seen.keys())


def zero_shot(model, tokenizer, limit=None):
    """Each task's own metric without any training, beside the floor (the best constant
    answer)."""
    out = {}
    for name in TASKS:
        task = load_task(name)
        out[name] = {
            "score": round(
                evaluate(model, tokenizer, task, limit=limit, progress=False)[
                    task.metric
                ],
                1,
            ),
            "floor": task.floor,
        }
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="lanternwick")
    parser.add_argument(
        "--quick", action="store_true", help="fewer examples, nothing written"
    )
    given = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_pretrained(given.base), load_tokenizer(given.base)
    few = given.quick
    tracked, stories = tracks(model, tokenizer, 40 if few else 200)
    result = {
        "copies": copies(model, tokenizer, 40 if few else 200),
        "recalls": recalls(model, tokenizer),
        "tracks": tracked,
        "unseen_outputs": unseen_outputs(tokenizer, 5000 if few else 60_000),
        "zero_shot": zero_shot(model, tokenizer, 64 if few else None),
        "stories": stories[:3],
    }
    print(json.dumps(result, indent=1))
    if not few:
        save(RESULTS / "gates.json", facts() | result)


if __name__ == "__main__":
    main()
