"""The pretraining text: an endless stream of short documents, made on the fly from one
seed and never repeated.

Half of them demand copying: people, things and places that the register does not know,
told and then asked for. `python -m minipeft.lanternwick.documents [kind]` prints
twelve, with the answers marked.
"""

import functools
import random
import re
import sys
import zlib
from dataclasses import dataclass, field

from . import HERE, SEED, words
from .grammar import Env, filled, parse, pick, plain, stranger
from .register import register

# what the base must recall of every resident
ATTRIBUTES = ("trade", "street", "pet", "age")
TOLD = (
    "trade",
    "street",
    "pet",
    "age",
    "likes",
    "surname",
    "pet_name",
    "thing",
    "place",
)


@dataclass
class Document:
    kind: str
    text: str
    # answers: [(start, answer)], and what the kind adds
    meta: dict = field(default_factory=dict)


@functools.cache
def sections(name):
    """phrases/<name>.txt, or for "stories" all files of that folder."""
    if name != "stories":
        return parse(HERE / "phrases" / f"{name}.txt")
    return {
        key: skeleton
        for path in sorted((HERE / "stories").glob("*.txt"))
        for key, skeleton in parse(path).items()
    }


def say(rng, file, section, /, few=None, **given):
    """One of a section's phrases (of the first `few`, its plainest), filled."""
    return filled(pick(rng, sections(file)[section].lines[:few]), Env(given), rng)


def joined(rng, pieces, kind, **meta):
    """A Document of pieces: a text, or a (question, answer) that is put into one of the
    ways to ask."""
    text, answers, ask = "", [], None
    for piece in pieces:
        if isinstance(piece, tuple):
            # a document mostly stays with one way to ask
            if ask is None or rng.random() < 0.3:
                ask = pick(rng, sections("town")["asked"].lines)
            question, answer = piece
            before, mark, after = plain(
                ask, {"q": question, "a": "\0", "a.cap": "\1"}, rng
            ).partition("\0")
            if not mark:
                before, _, after = before.partition("\1")
                answer = words.cap(answer)
            answers.append((len(text) + len(before), answer))
            piece = before + answer + after
        text += piece + " "
    return Document(kind, text[:-1], {"answers": answers, **meta})


# ---- stories


def story(rng, asked=False):
    skeletons = sections("stories")
    told = skeletons[pick(rng, tuple(skeletons))].render(
        rng, residents=rng.random() < 1 / 5
    )
    most = 3 if len(told.text.split()) < 90 else 1  # rows are short
    questions = (
        rng.sample(told.qa, min(len(told.qa), rng.randint(1, most))) if asked else []
    )
    return joined(
        rng, [told.text, *questions], "questions" if asked else "story", story=told
    )


def skeleton_of(rng, kind):
    """A notice or a talk, perhaps copied, then asked about."""
    told = pick(rng, tuple(sections(kind).values())).render(rng)
    pieces = [told.text]
    if len(told.text.split()) < 60 and rng.random() < 0.4:
        pieces.append(say(rng, "town", "told-again", s=told.text))
    return joined(
        rng,
        pieces + rng.sample(told.qa, min(len(told.qa), rng.randint(1, 4))),
        kind,
        story=told,
    )


# ---- people: facts of the register, and strangers


def held_out(person, attribute):
    """The one phrasing of this question that the text never puts to this resident (the
    gate does)."""
    return zlib.crc32(f"{person.name} {attribute}".encode()) % len(
        sections("facts")[attribute].questions
    )


def question(rng, person, attribute, extra=(), reverse=False, number=None, few=None):
    """(question, answer) about somebody, in one of the first `few` phrasings; never in
    the one that is held out for a resident."""
    asked = sections("facts")[f"who {attribute}" if reverse else attribute].questions
    if (
        number is None
        and not reverse
        and attribute in ATTRIBUTES
        and person.name in register().by_name
    ):
        number = int(rng.random() * (len(asked) - 1))
        number += number >= held_out(person, attribute)  # steps over the one held out
    elif number is None:
        number = int(rng.random() * len(asked[:few]))
    env = Env({"A": person, **dict(extra)})
    return filled(asked[number][0], env, rng), plain(asked[number][1], env, rng)


def heldout_questions():
    """Each resident's trade, street, pet and age, in the phrasing never used for that
    one: a list of dicts."""
    rows = [
        (
            *question(
                random.Random(0), person, attribute, number=held_out(person, attribute)
            ),
            person.name,
            attribute,
        )
        for person in register().residents
        for attribute in ATTRIBUTES
    ]
    return [dict(zip(("question", "answer", "name", "attribute"), row)) for row in rows]


def told(rng, person, attributes, extra=(), few=None):
    """Sentences about one person; two attributes in one where a phrase has both."""
    out, left, facts = [], list(attributes), sections("facts")
    while left:
        first = left.pop(0)
        section = "pupil" if first == "trade" and person.trade == "pupil" else first
        pair = next(
            (
                f"{a} {b}"
                for x in left
                for a, b in ((first, x), (x, first))
                if f"{a} {b}" in facts
            ),
            None,
        )
        if (
            pair
            and section != "pupil"
            and "pupil" not in (person.trade,)
            and rng.random() < 0.4
        ):
            section = pair
            left = [x for x in left if x not in pair.split()]
        who = (
            words.PRONOUNS[person.gender][0]
            if out and rng.random() < 0.5
            else person.name
        )
        for _ in range(20):  # the first sentence says who it is about
            text = say(rng, "facts", section, few, A=person, who=who, **dict(extra))
            if out or person.name in text:
                break
        out.append(text)
    return out


def facts(rng):
    """One or two residents described, with or without questions."""
    town, pieces = register().residents, []
    for person in rng.sample(town, rng.choice((1, 1, 2))):
        pieces += told(rng, person, rng.sample(TOLD[:7], rng.randint(3, 5)))
        pieces += [
            question(rng, person, pick(rng, TOLD[:7])) for _ in range(rng.randint(0, 2))
        ]
    return joined(rng, pieces, "facts")


def quiz(rng):
    """Questions about residents that nothing in the document answers, and more of the
    register."""
    pieces = [say(rng, "town", "quiz")] if rng.random() < 0.6 else []
    for _ in range(rng.randint(3, 6)):
        pieces.append(
            question(
                rng, pick(rng, register().residents), pick(rng, ATTRIBUTES + TOLD[:7])
            )
        )
    return joined(rng, pieces, "quiz")


def town(rng):
    """Places, animals, events and prices, stated and asked for."""
    pieces = []
    for _ in range(rng.randint(2, 4)):
        table, rows = pick(rng, tuple(register().tables().items())[1:])
        row = pick(rng, rows)
        if table == "places" and row.built and rng.random() < 0.5:
            table = "built"
        env, section = (
            Env({key: str(value) for key, value in vars(row).items()}),
            sections("town")[table],
        )
        pieces += [
            filled(line, env, rng)
            for line in rng.sample(section.lines, rng.randint(0, 2))
        ]
        q, a = pick(rng, section.questions)
        pieces.append((filled(q, env, rng), plain(a, env, rng)))
    return joined(rng, pieces, "town")


def things_and_places(rng, count):
    """[(extra references of one person)]: a thing and a place each, all different."""
    nouns, colours = rng.sample(tuple(words.THINGS), count), []
    for noun in nouns:
        colours.append(
            pick(rng, [a for a in words.ADJECTIVES[noun] if a not in colours])
        )
    places = rng.sample(tuple(words.PLACES), count)
    return [
        {"X": thing, "P": place} for thing, place in zip(zip(colours, nouns), places)
    ]


def crowd(rng, count):
    people = []
    for _ in range(count):
        people.append(stranger(rng, "any", people))
    return people


def facts_in_turn(rng, people, known, extras, few):
    """The sentences about several people: one person after the other, or fact by
    fact, at times twice."""
    blocks = [told(rng, *row, few) for row in zip(people, known, extras)]
    if rng.random() < 0.5:
        return [sentence for block in blocks for sentence in block]
    blocks = [
        told(rng, person, [a], extra, few)
        for person, attributes, extra in zip(people, known, extras)
        for a in attributes
    ]
    rng.shuffle(blocks)
    pieces = [sentence for block in blocks for sentence in block]
    if len(blocks) <= 6 and rng.random() < 0.5:  # once more, in another order
        rng.shuffle(blocks)
        pieces += [sentence for block in blocks for sentence in block]
    return pieces


def strangers(rng, count=None, asked=None):
    """One to four people never heard of, then questions that can only be answered by
    looking back."""
    count = count or rng.choices((1, 2, 3, 4), (32, 42, 18, 8))[0]
    # plain words mostly: it is about who is who, not about wording
    few = 3 if rng.random() < 0.6 else None
    people, extras = crowd(rng, count), things_and_places(rng, count)
    common = rng.sample(TOLD, {1: 5, 2: 3, 3: 2, 4: 2}[count])
    known = [
        common if rng.random() < 0.7 else rng.sample(TOLD, len(common)) for _ in people
    ]
    pieces = [say(rng, "town", "welcome")] if rng.random() < 0.4 else []
    if (
        count == 2
        and rng.random() < 0.35
        and "pupil" not in (people[0].trade, people[1].trade)
    ):
        # told side by side
        known = [
            [a for a in common if f"two {a}" in sections("facts")] or ["thing"]
        ] * 2
        both = {
            "X": extras[0]["X"],
            "Y": extras[1]["X"],
            "P": extras[0]["P"],
            "Q": extras[1]["P"],
        }
        pieces += [
            say(rng, "facts", f"two {a}", A=people[0], B=people[1], **both)
            for a in known[0]
        ]
    else:
        pieces += facts_in_turn(rng, people, known, extras, few)
    if rng.random() < 0.2:
        pieces.append(say(rng, "town", "now-ask"))
    possible = [(i, a) for i, attributes in enumerate(known) for a in attributes]
    for i, a in rng.sample(possible, min(len(possible), asked or rng.randint(2, 5))):
        # two pupils: not 'Who is the pupil?'
        shared = len({getattr(p, a, p.name) for p in people}) < count
        pieces.append(
            question(
                rng,
                people[i],
                a,
                extras[i],
                reverse=not shared and rng.random() < 0.4,
                few=few,
            )
        )
    return joined(rng, pieces, "strangers", people=people)


def muster(rng):
    """Three to six people, told and asked for in the same words, so that nothing but
    the name says which answer is right, or nothing but the answer which name."""
    people, attribute = crowd(rng, rng.randint(3, 6)), pick(rng, TOLD)
    extras, wording = things_and_places(rng, len(people)), rng.random()
    if attribute == "trade" and "pupil" in [person.trade for person in people]:
        attribute = "street"  # pupils are told in words of their own
    pieces = [say(rng, "town", "welcome")] if rng.random() < 0.2 else []
    pieces += [
        told(random.Random(wording), person, [attribute], extra, 3)[0]
        for person, extra in zip(people, extras)
    ]
    # 'Who likes plums?' may have two answers
    distinct = attribute not in ("likes", "pet_name")
    order = list(range(len(people)))
    for _ in range(rng.randint(1, 2)):
        reverse = distinct and rng.random() < 0.4
        number = rng.randrange(2 if reverse else 3)
        rng.shuffle(order)
        pieces += [
            question(
                random.Random(wording), people[i], attribute, extras[i], reverse, number
            )
            for i in order
        ]
    return joined(rng, pieces, "muster", people=people)


# ---- lists, records and the parrot


def record(rng, person, style):
    """One line of the clerk's book."""
    columns = [
        person.full,
        words.with_article(person.trade),
        f"aged {person.age}",
        person.street,
        words.with_article(person.pet),
    ]
    short = [person.name, person.trade, str(person.age), person.street, person.pet]
    return (
        ", ".join(columns) + ".",
        " / ".join(short) + ".",
        ", ".join(short) + ".",
        f"No. {person.age + 7}: {person.full}, {person.street}, {person.trade}.",
        f"{person.full} ({person.age}), {person.trade}, {person.pet}.",
    )[style]


def records(rng):
    """Lines of the clerk's book, copied, put into words, and asked about."""
    people, style = crowd(rng, rng.randint(1, 3)), rng.randrange(5)
    lines = " ".join(record(rng, person, style) for person in people)
    pieces, one = [lines], pick(rng, people)
    shown = (
        TOLD[:4],
        TOLD[:4],
        TOLD[:4],
        ("street", "trade"),
        ("age", "trade", "pet"),
    )[style]
    if rng.random() < 0.6:
        pieces.append(say(rng, "town", "told-again", s=lines))
    if rng.random() < 0.6:
        pieces += told(rng, one, rng.sample(shown, len(shown)))
    for _ in range(rng.randint(1, 3)):
        pieces.append(
            question(
                rng, pick(rng, people), pick(rng, shown), reverse=rng.random() < 0.4
            )
        )
    return joined(rng, pieces, "records", people=people)


def roll(rng):
    """A list of names, things or places, said again; it asks for the next one."""
    count = rng.randint(4, 9)
    few = min(count, 6)
    items, noun = rng.choice(
        (
            ([person.name for person in crowd(rng, count)], "name"),
            ([person.full for person in crowd(rng, few)], "name"),
            ([" ".join(e["X"]) for e in things_and_places(rng, few)], "thing"),
            (rng.sample(words.TRADES, count), "trade"),
            (rng.sample(words.STREETS, few), "street"),
        )
    )
    listed = ", ".join(items)
    starts = ("The roll", "The list", "On the list", "The order", "The clerk read")
    pieces = [f"{pick(rng, starts)}: {listed}."]
    pieces.append(say(rng, "town", "told-again", s=f"{listed}."))
    for i in rng.sample(range(len(items) - 1), min(3, len(items) - 1)):
        word, start, end = (
            ("after", *items[i : i + 2])
            if rng.random() < 0.7
            else ("before", *items[i : i + 2][::-1])
        )
        ways = (
            f"Which {noun} comes {word} {start}?",
            f"What stands {word} {start}?",
            f"And {word} {start}?",
        )
        pieces.append((pick(rng, ways), end))
    return joined(rng, pieces[rng.random() < 0.2 :], "roll")


EVERY_WORD = (
    words.TRADES
    + words.PETS
    + words.FOODS
    + words.SURNAMES
    + words.DAYS
    + tuple(words.PLACES)
    + words.PET_NAMES
)


def parrot(rng):
    """A line, and Admiral who says it again word by word."""
    choice = rng.random()
    if choice < 0.4:
        person, extra = crowd(rng, 1)[0], things_and_places(rng, 1)[0]
        line = " ".join(told(rng, person, rng.sample(TOLD, rng.randint(1, 2)), extra))
    elif choice < 0.7:  # no sense at all, so only copying helps
        line = words.cap(" ".join(rng.sample(EVERY_WORD, rng.randint(4, 10)))) + "."
    else:
        line = pick(
            rng,
            re.findall(r'[A-Z][^".!?]{15,90}[.!?](?= |$)', story(rng).text)
            or ["All hands on deck!"],
        )
    return joined(
        rng,
        [say(rng, "town", "parrot", s=line) for _ in range(rng.randint(1, 2))],
        "parrot",
    )


# ---- the stream

KINDS = {
    "story": story,
    "questions": lambda rng: story(rng, asked=True),
    "facts": facts,
    "quiz": quiz,
    "town": town,
    "strangers": strangers,
    "muster": muster,
    "notices": lambda rng: skeleton_of(rng, "notices"),
    "dialogues": lambda rng: skeleton_of(rng, "dialogues"),
    "records": records,
    "roll": roll,
    "parrot": parrot,
}
COPYING = ("strangers", "muster", "notices", "dialogues", "records", "roll", "parrot")
# shares of documents, in percent: who is who; what else demands copying; then the mix;
# then a little less copying
PHASES = {
    "listening": dict(muster=50, strangers=35, story=15),
    "copying": dict(
        strangers=30,
        muster=20,
        notices=12,
        dialogues=8,
        records=10,
        roll=7,
        parrot=8,
        story=2,
        questions=3,
    ),
    "main": dict(
        strangers=18,
        muster=6,
        notices=6,
        dialogues=4,
        records=4,
        roll=3,
        parrot=2,
        story=20,
        questions=16,
        facts=14,
        quiz=6,
        town=4,
    ),
    "late": dict(
        strangers=16,
        muster=4,
        notices=4,
        dialogues=3,
        records=3,
        roll=2,
        parrot=2,
        story=30,
        questions=19,
        facts=13,
        quiz=6,
        town=4,
    ),
}
try:  # the captain's tales, the clerk's log, labels and diaries, where they exist
    from . import diaries, labels, queries, voices

    for _name, _module in {
        "tales": voices,
        "log": queries,
        "labels": labels,
        "diaries": diaries,
    }.items():
        KINDS[_name] = functools.partial(
            lambda module, name, rng: Document(name, module.document(rng)),
            _module,
            _name,
        )
        for _phase, _share in ("copying", 1), ("main", 4), ("late", 4):
            PHASES[_phase][_name] = _share
except ImportError:
    pass


@functools.cache
def _held_out_by_name():
    rows = heldout_questions()
    return {
        name: tuple(row["question"] for row in rows if row["name"] == name)
        for name in register().by_name
    }


def leaks(text):
    """Whether a text puts a held-out question to its resident."""
    return "?" in text and any(
        q in text
        for name in set(re.findall(r"[A-Z]\w+", text)) & _held_out_by_name().keys()
        for q in _held_out_by_name()[name]
    )


def stream(seed=SEED, weights="main"):
    """Documents without end; weights is a phase's name or {kind: share}."""
    rng = random.Random(f"stream {seed}")
    weights = PHASES[weights] if isinstance(weights, str) else weights or PHASES["main"]
    kinds, shares = tuple(weights), tuple(weights.values())
    while True:
        document = KINDS[rng.choices(kinds, shares)[0]](rng)
        if not leaks(document.text):
            yield document


if __name__ == "__main__":
    mix = {sys.argv[1]: 1} if sys.argv[1:] else "main"
    for _, document in zip(range(12), stream(random.random(), mix)):
        text = document.text
        for start, answer in reversed(document.meta.get("answers", [])):
            text = f"{text[:start]}<{answer}>{text[start + len(answer) :]}"
        print(f"[{document.kind}] {text}\n")
