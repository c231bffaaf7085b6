"""Small helpers of the task texts: phrase files, wordings, names and things, and the
split of a combination."""

import functools
import hashlib
import re

from . import HERE, words


@functools.cache
def read(name):
    """phrases/<name>.txt as {section: lines}; a file without sections has the one
    section ""."""
    sections, section = {}, ""
    for line in (
        (HERE / "phrases" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    ):
        if line.startswith("==="):
            section = line[3:].strip()
        elif line.strip() and not line.startswith("#"):
            sections.setdefault(section, []).append(line.strip())
    return sections


def choose(rng, text):
    """Replaces every [a|b|c] by one of its wordings."""
    return re.sub(r"\[([^][]*)\]", lambda found: rng.choice(found[1].split("|")), text)


def names(rng, count):
    """`count` different given names, of residents and of strangers alike."""
    return rng.sample(words.WOMEN + words.MEN, count)


def thing(rng, noun=None):
    """ "grey lantern", with an adjective that suits the noun."""
    noun = noun or rng.choice(tuple(words.THINGS))
    return f"{rng.choice(words.ADJECTIVES[noun])} {noun}"


def place(rng):
    """ "on the quay"."""
    return words.in_place(rng.choice(tuple(words.PLACES)))


def split_of(*key):
    """The split that a combination of values belongs to, now and for ever: 70 % train,
    10 % valid, 20 % test."""
    number = (
        int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") % 100
    )
    return "train" if number < 70 else "valid" if number < 80 else "test"
