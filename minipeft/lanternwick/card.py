"""What the dataset's card records: hashes, shares and diversity of the world, measured
again.

`python -m minipeft.lanternwick.card` writes the measured part of
data/lanternwick/README.md; tests hold it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections import Counter

from . import HERE, register, words
from .documents import sections, stream

MARK = "<!-- measured: python -m minipeft.lanternwick.card -->"
NAMES = set(words.WOMEN + words.MEN + words.SURNAMES + words.PET_NAMES)
VALUES = sorted(
    {
        *words.STREETS,
        *words.PLACES,
        *words.THINGS,
        *words.TRADES,
        "pupil",
        *words.PETS,
        *words.FOODS,
        *words.DAYS,
        *words.COLOURS,
        *register.EVENTS,
        *register.WARES,
        *sum(words.ADJECTIVES.values(), ()),
    },
    key=lambda value: (-len(value), value),
)
VALUE = re.compile(rf"\b(?:(?:an?|the) )?(?:{'|'.join(VALUES)})\b", re.I)


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def frames(text):
    """Sentences with names, things, places, trades and numbers taken out; a question
    and its answer are one."""
    text = re.sub(
        r"\b[A-Z]\w+",
        lambda word: "N" if word[0] in NAMES else word[0],
        text.replace("\n", ". "),
    )
    text = re.sub(r"\d+", "0", VALUE.sub("V", text))
    text = re.sub(r"\b([NV])(?: \1)+\b", r"\1", text)
    return [frame.strip() for frame in re.findall(r"[^.!]+[.!]+[\"']*", text)]


def dump(connection):
    """Every table of the register with its rows, as one text."""
    tables = connection.execute(
        "SELECT name, sql FROM sqlite_master ORDER BY name"
    ).fetchall()
    return "\n".join(
        json.dumps([sql, connection.execute(f"SELECT * FROM {name}").fetchall()])
        for name, sql in tables
    )


def hashes():
    first = "\n\n".join(document.text for document in itertools.islice(stream(), 500))
    with contextlib.closing(register.register().sqlite()) as connection:
        tables = sha(dump(connection))
    return {
        "register.json": sha((HERE / "register.json").read_text(encoding="utf-8")),
        "register.sqlite, its tables": tables,
        "the first 500 documents": sha(first),
    }


def diversity(count):
    """Counted over the first documents of the stream."""
    documents = list(itertools.islice(stream(), count))
    every = Counter(frame for document in documents for frame in frames(document.text))
    tokens = [re.findall(r"\w+|[^\w\s]", document.text) for document in documents]
    trigrams = [trigram for row in tokens for trigram in zip(row, row[1:], row[2:])]
    size = Counter()
    for document in documents:
        size[document.kind] += len(document.text.split())
    return {
        "story skeletons": len(sections("stories")),
        "documents counted": count,
        "words": sum(size.values()),
        "word types (names left out)": len(
            {w.lower() for w in set().union(*tokens) - NAMES if w.isalpha()}
        ),
        "distinct trigrams / trigrams": round(len(set(trigrams)) / len(trigrams), 3),
        "commonest sentence frame, % of sentences": round(
            100 * max(every.values()) / sum(every.values()), 2
        ),
        "shares of words, %": {
            kind: round(100 * n / sum(size.values()), 1)
            for kind, n in size.most_common()
        },
    }


def recorded():
    """The measured part of the card, as it stands."""
    after = (HERE / "README.md").read_text(encoding="utf-8").split(MARK)[1]
    return json.loads(after.strip().strip("`").removeprefix("json"))


def main():
    text = (HERE / "README.md").read_text(encoding="utf-8").split(MARK)[0]
    measured = json.dumps(
        {"sha256": hashes(), "diversity": diversity(20_000)}, indent=1
    )
    part = HERE / "README.md.part"
    part.write_text(f"{text}{MARK}\n```json\n{measured}\n```\n", encoding="utf-8")
    os.replace(part, HERE / "README.md")
    print(measured)


if __name__ == "__main__":
    main()
