"""The word lists behind every Lanternwick text, and the little grammar that belongs to
single words."""

import json

from . import HERE

_raw = json.loads((HERE / "words.json").read_text(encoding="utf-8"))
WOMEN, MEN, SURNAMES, PETS, PET_NAMES, COLOURS, FOODS, DAYS, MOODS = (
    tuple(_raw[key].split())
    for key in (
        "women",
        "men",
        "surnames",
        "pets",
        "pet_names",
        "colours",
        "foods",
        "days",
        "moods",
    )
)
STREETS = tuple(_raw["streets"])
# given name -> gender
GENDER = {name: "f" for name in WOMEN} | {name: "m" for name in MEN}
WORK = _raw["trades"]  # trade -> what such a person does
TRADES = tuple(WORK)  # grown-ups; children are pupils
# place -> (preposition, kind)
PLACES = {place: tuple(rule.split()) for place, rule in _raw["places"].items()}
# noun -> its categories
THINGS = {noun: tuple(kinds.split()) for noun, kinds in _raw["things"].items()}
THING_KINDS = tuple(_raw["adjectives"])
# category -> nouns
NOUNS = {
    kind: tuple(noun for noun in THINGS if kind in THINGS[noun]) for kind in THING_KINDS
}
# a noun takes adjectives of its first category only, so nobody meets a burnt hammer or
# a crusty hat
ADJECTIVES = {
    noun: tuple(_raw["adjectives"][kinds[0]].split()) for noun, kinds in THINGS.items()
}
# he, him, his, himself
PRONOUNS = {"f": ("she", "her", "her", "herself"), "m": ("he", "him", "his", "himself")}


def with_article(phrase):
    """'grey lantern' -> 'a grey lantern', 'old map' -> 'an old map'."""
    return (
        "an " if phrase[0] in "aeiouAEIOU8" or phrase[:2] in ("11", "18") else "a "
    ) + phrase


def in_place(place):
    """'quay' -> 'on the quay'."""
    return f"{PLACES[place][0]} the {place}"


def cap(text):
    return text[:1].upper() + text[1:]


def joined(items, last="and"):
    """['a', 'b', 'c'] -> 'a, b and c'."""
    items = list(items)
    return (
        items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"
    )
