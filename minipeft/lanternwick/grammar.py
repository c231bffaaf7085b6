"""The template grammar of Lanternwick's stories and phrases: a parser with clear errors
and a fast renderer.

`python -m minipeft.lanternwick.grammar FILE ...` prints three samples of each skeleton
and what is wrong. A skeleton is a head (people, things, places, picks, what holds at
the end), lines of text and questions with answers.
"""

import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..io import did_you_mean
from . import words
from .register import Person, register, strangers_names
from .words import PRONOUNS, cap, with_article

PERSON = {
    "": lambda p: p.name,
    "full": lambda p: p.full,
    "surname": lambda p: p.surname,
    "he": lambda p: PRONOUNS[p.gender][0],
    "him": lambda p: PRONOUNS[p.gender][1],
    "his": lambda p: PRONOUNS[p.gender][2],
    "himself": lambda p: PRONOUNS[p.gender][3],
    "He": lambda p: cap(PRONOUNS[p.gender][0]),
    "His": lambda p: cap(PRONOUNS[p.gender][2]),
    "trade": lambda p: p.trade,
    "a_trade": lambda p: with_article(p.trade),
    "work": lambda p: words.WORK.get(p.trade, "goes to school"),
    "street": lambda p: p.street,
    "pet": lambda p: p.pet,
    "a_pet": lambda p: with_article(p.pet),
    "pet_name": lambda p: p.pet_name,
    "age": lambda p: str(p.age),
    "likes": lambda p: p.likes,
}
THING = {
    "": " ".join,
    "a": lambda t: with_article(" ".join(t)),
    "A": lambda t: cap(with_article(" ".join(t))),
    "noun": lambda t: t[1],
    "adjective": lambda t: t[0],
}
PLACE = {
    "": lambda p: f"the {p}",
    "The": lambda p: f"The {p}",
    "in": words.in_place,
    "In": lambda p: cap(words.in_place(p)),
    "to": lambda p: f"to the {p}",
    "name": lambda p: p,
}
WORD = {"": lambda w: w, "cap": cap, "a": with_article}
KINDS = [
    (
        "people",
        "ABCD",
        PERSON,
        words.TRADES + ("pupil", "child", "grown", "old", "any"),
    ),
    ("things", "XYZ", THING, words.THING_KINDS),
    ("places", "PQRS", PLACE, ("outdoors", "indoors", "water")),
]
TOKEN = re.compile(r"[\[\]|]|\{[^{}]*\}|[^\[\]|{}]+|[{}]")


class GrammarError(ValueError):
    """A slip in a skeleton file; the message begins with file and line."""


class Ref(str):
    """A reference such as A.he; beside it a line's parts are plain strings and lists of
    alternatives."""


@dataclass
class Skeleton:
    name: str
    where: str  # file:line
    kind: str = ""  # a mark such as "lost": what is lost is found in the end
    people: dict = field(default_factory=dict)  # letter -> constraint or ""
    things: dict = field(default_factory=dict)
    places: dict = field(default_factory=dict)
    picks: dict = field(default_factory=dict)  # name -> choices
    given: tuple = ()  # words that the caller supplies
    # (letter, "with" | "at" | "feels", letter or mood)
    end: list = field(default_factory=list)
    lines: list = field(default_factory=list)
    questions: list = field(default_factory=list)
    # the skeleton's own words: no drawn thing may share one
    literal: set = field(default_factory=set)

    def render(self, rng, residents=False, cast=None):
        """A Story about residents, freshly drawn people or the given cast; the same rng
        state gives the same story."""
        cast = cast or self.draw_people(rng, residents)
        things, places = {}, {}
        for letter in self.things:
            noun = pick(
                rng,
                [
                    n
                    for n in self.pools[letter]
                    if n not in [t[1] for t in things.values()]
                ],
            )
            taken = [t[0] for t in things.values()]
            things[letter] = (
                pick(rng, [a for a in words.ADJECTIVES[noun] if a not in taken]),
                noun,
            )
        for letter in self.places:
            places[letter] = pick(
                rng, [p for p in self.pools[letter] if p not in places.values()]
            )
        env = Env(
            {
                **cast,
                **things,
                **places,
                **{name: pick(rng, choices) for name, choices in self.picks.items()},
            }
        )
        text = " ".join(filled(line, env, rng) for line in self.lines)
        qa = [
            (filled(question, env, rng), plain(answer, env, rng))
            for question, answer in self.questions
        ]
        end = [(env[a], how, env[b] if len(b) == 1 else b) for a, how, b in self.end]
        return Story(self.name, text, cast, things, places, end, qa, self.kind)

    def draw_people(self, rng, residents=False):
        cast, town = {}, register().residents
        for letter, rule in self.people.items():
            used = {p.name for p in cast.values()}
            fits = (
                [
                    p
                    for p in town
                    if p.name not in used
                    and matches(p, rule)
                    and p.pet not in self.literal
                    and (p.trade == rule or p.trade not in self.literal)
                ]
                if residents
                else ()
            )
            cast[letter] = (
                pick(rng, fits)
                if fits
                else stranger(rng, rule, cast.values(), self.literal)
            )
        return cast


@dataclass
class Story:
    name: str
    text: str
    cast: dict  # letter -> Person
    things: dict  # letter -> (adjective, noun)
    places: dict  # letter -> place, without its article
    end: list  # (who or what, "with" | "at" | "feels", whom, where or how)
    qa: list  # (question, answer)
    kind: str = ""  # the skeleton's

    def mentions(self):
        """[(start, name or thing)]: where the text names again somebody or something
        that it named before."""
        phrases = [person.name for person in self.cast.values()] + [
            " ".join(thing) for thing in self.things.values()
        ]
        return sorted(
            (match.start(), phrase)
            for phrase in phrases
            for match in list(re.finditer(rf"\b{phrase}\b", self.text))[1:]
        )


class Env(dict):
    """Letters and picks to what they stand for; 'A.he' is worked out when first asked
    for."""

    def __init__(self, named):
        self.named = named

    def __missing__(self, key):
        name, _, attribute = key.partition(".")
        value = self.named[name]
        table = (
            PERSON
            if isinstance(value, Person)
            else (
                THING if isinstance(value, tuple) else PLACE if name in "PQRS" else WORD
            )
        )
        self[key] = text = table[attribute](value)
        return text


def pick(rng, choices):
    return choices[int(rng.random() * len(choices))]


def matches(person, rule):
    return {
        "any": True,
        "child": person.age < 15,
        "pupil": person.age < 15,
        "old": person.age > 60,
    }.get(rule, person.age > 14 and rule in ("", "grown", person.trade))


def stranger(rng, rule="", others=(), literal=()):
    """Somebody freshly drawn, not in the register, who shares no name, trade, street,
    pet or age with the others."""
    gender = "fm"[int(rng.random() * 2)]
    child = rule in ("child", "pupil") or rule == "any" and rng.random() < 0.2
    low, high = (8, 14) if child else (61, 79) if rule == "old" else (18, 79)

    def new(pool, attribute):
        taken = {getattr(other, attribute) for other in others}.union(literal)
        return pick(rng, [choice for choice in pool if choice not in taken])

    return Person(
        new(strangers_names(gender), "name"),
        new(words.SURNAMES, "surname"),
        gender,
        new(range(low, high + 1), "age"),
        (
            "pupil"
            if child
            else rule
            if rule in words.TRADES
            else new(words.TRADES, "trade")
        ),
        new(words.STREETS, "street"),
        new(words.PETS, "pet"),
        pick(rng, words.PET_NAMES),
        pick(rng, words.FOODS),
    )


def filled(parts, env, rng):
    """One compiled line as text: references looked up, one of each choice taken,
    spacing and capitals set right."""
    text = plain(parts, env, rng)
    return cap(re.sub(r"(?<!\.)(\. )([a-z])", _raise, text))


def plain(parts, env, rng):
    """The same for a few words, such as an answer, which keep their case."""
    out = []
    _fill(parts, env, rng, out.append)
    text = "".join(out).strip()
    return (
        re.sub(r" +(?=[ .,;:!?]|$)", "", text)
        if "  " in text or " ." in text or " ," in text
        else text
    )


def _raise(match):
    return match[1] + match[2].upper()


def _fill(parts, env, rng, put):
    for part in parts:
        if type(part) is str:
            put(part)
        elif type(part) is Ref:
            put(env[part])
        else:
            _fill(part[int(rng.random() * len(part))], env, rng, put)


def compiled(text, known, fail):
    """'[a|b {A}] c' -> [[['a'], ['b ', Ref('A')]], ' c']; known maps a letter or pick
    to its table of attributes."""
    stack = [[[]]]  # open brackets; each holds its alternatives so far
    for token in TOKEN.findall(text):
        if token == "[":
            stack.append([[]])
        elif token == "|" and len(stack) > 1:
            stack[-1].append([])
        elif token == "]" and len(stack) > 1:
            alternatives = stack.pop()
            stack[-1][-1].append(alternatives)
        elif token in "[]|{}":
            fail(f"a stray '{token}' in: {text}")
        elif token[0] == "{":
            name, _, attribute = token[1:-1].partition(".")
            if name not in known:
                fail(
                    f"{token}: '{name}' is not declared; declared:"
                    f" {', '.join(sorted(known)) or 'nothing'}"
                )
            if attribute not in known[name]:
                forms = sorted(filter(None, known[name]))
                fail(
                    f"{token}: no form {attribute!r}{did_you_mean(attribute, forms)};"
                    f" expected one of {', '.join(forms)}"
                )
            stack[-1][-1].append(Ref(token[1:-1]))
        else:
            stack[-1][-1].append(token)
    if len(stack) > 1:
        fail(f"'[' is never closed in: {text}")
    return stack[0][0]


def failing(place):
    def fail(message):
        raise GrammarError(f"{place}: {message}")

    return fail


def add_names(current, head, rest, known, fail):
    """Read "people: A(rule) B", "things: X" or "places: P" into the skeleton."""
    _, letters, table, rules = next(kind for kind in KINDS if kind[0] == head)
    for letter, rule in re.findall(r"(\S+?)(?:\(([^)]*)\))?(?:[\s,]+|$)", rest.strip()):
        if letter not in tuple(letters) or letter in known:
            fail(
                f"{head}: '{letter}' is not one of {' '.join(letters)}, or was"
                " declared before"
            )
        for word in rule.split():
            if word not in rules:
                fail(
                    f"{head}: unknown {word!r}{did_you_mean(word, rules)}; expected"
                    f" one of {', '.join(rules)}"
                )
        getattr(current, head)[letter] = rule
        known[letter] = table


def add_end(current, rest, known, fail):
    """Read "end: X with A; A at P; B glad" into the skeleton."""
    for clause in filter(None, (c.split() for c in rest.split(";"))):
        if (
            len(clause) == 3
            and clause[1] in ("with", "at")
            and clause[0] in known
            and clause[2] in known
        ):
            current.end.append(tuple(clause))
        elif (
            len(clause) == 2
            and clause[0] in current.people
            and clause[1] in words.MOODS
        ):
            current.end.append((clause[0], "feels", clause[1]))
        else:
            fail(
                f"end: cannot read '{' '.join(clause)}'; it is 'X with A', 'X"
                " at P', 'A at P' or 'A glad'"
            )


def parse(path):
    """All skeletons of a file, by name."""
    path, skeletons, current, known = Path(path), {}, None, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fail = failing(f"{path.name}:{number}")
        if not line.strip() or line.startswith("#"):
            continue
        if not line.isascii():
            fail(f"not plain ASCII: {[c for c in line if not c.isascii()]}")
        head, colon, rest = line.partition(":")
        if line.startswith("==="):
            current, known = Skeleton(line[3:].strip(), f"{path.name}:{number}"), {}
            if current.name in skeletons:
                fail(f"a second skeleton named '{current.name}'")
            skeletons[current.name] = current
        elif current is None:
            fail("text before the first '=== name'")
        elif line.startswith("- "):
            current.lines.append(compiled(line[2:].strip(), known, fail))
            current.literal |= literal_words(line)
        elif line.startswith("? "):
            question, equals, answer = line[2:].partition(" = ")
            if not equals:
                fail("a question needs ' = answer'")
            current.questions.append(
                (
                    compiled(question.strip(), known, fail),
                    compiled(answer.strip(), known, fail),
                )
            )
        elif colon and head in ("people", "things", "places"):
            add_names(current, head, rest, known, fail)
        elif colon and head.startswith("pick "):
            name = head[5:].strip()
            current.picks[name], known[name] = (
                tuple(choice.strip() for choice in rest.split("|")),
                WORD,
            )
            current.literal |= literal_words(rest)
        elif colon and head == "kind":
            current.kind = rest.strip()
        elif colon and head == "given":
            current.given = tuple(rest.split())
            known.update(dict.fromkeys(current.given, WORD))
        elif colon and head == "end":
            add_end(current, rest, known, fail)
        else:
            fail(f"cannot read: {line}")
    for skeleton in skeletons.values():
        _finish(skeleton)
    return skeletons


def literal_words(line):
    """The words written out in a line, also without a plural s."""
    found = re.findall(r"[a-z]+", re.sub(r"\{[^}]*\}", " ", line.lower()))
    return {form for word in found for form in (word, word.removesuffix("s"))}


def _finish(skeleton):
    """Pools of nouns and places that fit and are not spelt out in the text."""

    def fresh(name):
        return not skeleton.literal & {name.split()[-1]}

    skeleton.pools = {
        letter: [
            n
            for n, kinds in words.THINGS.items()
            if fresh(n) and set(rule.split()) <= set(kinds)
        ]
        for letter, rule in skeleton.things.items()
    }
    skeleton.pools |= {
        letter: [
            p
            for p, (_, kind) in words.PLACES.items()
            if fresh(p) and rule in ("", kind)
        ]
        for letter, rule in skeleton.places.items()
    }
    for letter, pool in skeleton.pools.items():
        if len(pool) < 4:
            raise GrammarError(
                f"{skeleton.where}: only {len(pool)} choices are left for {letter}:"
                f" {pool}"
            )
    used = set(_names(skeleton.lines or skeleton.questions))
    for letter in [
        *skeleton.people,
        *skeleton.things,
        *skeleton.places,
        *skeleton.picks,
    ]:
        if letter not in used:
            raise GrammarError(
                f"{skeleton.where}: {letter} is declared but not used in the text"
            )
    # a trade that is told must be a grown-up's
    for letter, rule in skeleton.people.items():
        if not rule:
            skeleton.people[letter] = "grown"


def _names(parts):
    """The letters and picks that nested parts refer to."""
    for part in parts:
        if type(part) is Ref:
            yield part.partition(".")[0]
        elif type(part) is not str:
            yield from _names(part)


def complaints(skeleton, story):
    """What reads badly in a rendered story: a list of messages for its writer."""
    text, found = story.text, []
    sentences, count = (
        len(re.findall(r"[.!?][\"')]*(?= [A-Z\"']|$)", text)),
        len(text.split()),
    )
    if not 5 <= sentences <= 14 or count > 150:
        found.append(
            f"too long or short: {sentences} sentences, {count} words (wanted 5 to 9"
            " and about 110)"
        )
    both = text + " " + " ".join(q for q, _ in story.qa)
    wrong_article = (
        r"\ba (?!uni|use|one|eu)[aeiou]\w*|\ban (?![aeiou18]|hour|honest)\w+"
    )
    found += [f"article: '{m}'" for m in re.findall(wrong_article, both, re.I)]
    found += [
        f"doubled word: '{m[0]}'"
        for m in re.finditer(r"\b(\w+) \1\b", both)
        if m[1] not in ("had", "that")
    ]
    found += [
        f"odd: '{m}'"
        for m in re.findall(r" [,.;!?]|[{}\[\]|]|the the|the a |\bthe [A-Z]\w+", text)
        if m[4:] not in ("Captain", "Admiral")
    ]
    found += [f"question without '?': {q}" for q, _ in story.qa if not q.endswith("?")]
    found += [
        f"answer not in the text: {q} = {a}"
        for q, a in story.qa
        if a.lower() not in text.lower() and a not in words.MOODS
    ]
    if len(story.qa) < 2:
        found.append("fewer than two questions")
    if not skeleton.end:
        found.append("no 'end:'")
    choices = sum(str(line).count("[[") for line in skeleton.lines)
    if choices < 6:
        found.append(f"only {choices} inner choices (wanted 6)")
    return found


def main(paths):
    wrong, rng = 0, random.Random(0)
    for path in paths:
        try:
            skeletons = parse(path)
        except GrammarError as error:
            wrong += 1
            print("ERROR", error)
            continue
        for skeleton in skeletons.values():
            stories = [skeleton.render(rng, residents=i == 0) for i in range(30)]
            print(f"\n=== {skeleton.name} ({skeleton.where})")
            for story in stories[:3]:
                print(
                    f"{story.text}\n   "
                    + "\n   ".join(f"? {q} = {a}" for q, a in story.qa)
                )
            # one of a sort
            messages = {
                m[:19]: m for story in stories for m in complaints(skeleton, story)
            }
            for message in messages.values():
                wrong += 1
                print(f"!! {skeleton.where} {skeleton.name}: {message}")
    print(f"\n{wrong} complaints")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
