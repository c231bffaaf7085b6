"""Parcel slips and market labels: the carriers' JSON, with the keys and marks that the
task `extract` asks for."""

import json

from . import phrases, words


def label(who, what, where):
    """'{"who": "Mara", "what": "grey lantern", "where": "quay"}'"""
    return json.dumps({"who": who, "what": what, "where": where})


def draw(rng):
    """The values of one label, drawn: {key: value}."""
    return {
        "who": phrases.names(rng, 1)[0],
        "what": phrases.thing(rng),
        "where": rng.choice(tuple(words.PLACES)),
    }


LISTS = (
    "Labels of the day:",
    "On the parcels stood:",
    "Slips in the box:",
    "Market labels:",
)
PILE_ENDS = (
    "Then the box was full.",
    "That was the last slip.",
    "The carrier tied them up.",
)
STARTS = (
    "The label said",
    "On the parcel stood",
    "The slip read",
    "The carrier found this label",
)
COPIES = (
    "The clerk copied it:",
    "The carrier read it again:",
    "And once more for the book:",
    "The second slip was the same:",
)
REASONS = (
    "It was wrong. The new label said",
    "Somebody changed it. Now it read",
    "Rain had spoilt it. The next one said",
)


def document(rng):
    """A list of labels, or one read and copied, at times with one value changed. Never
    a sentence beside its JSON."""
    drawn = [draw(rng) for _ in range(rng.randint(1, 3))]
    slips = [label(**values) for values in drawn]
    kind = rng.choice(("list", "copy", "change", "pile"))
    if kind == "list":
        start = rng.choice(LISTS)
        return "\n".join([start, *slips, label(**draw(rng))])
    if kind == "pile":
        end = rng.choice(PILE_ENDS)
        first = rng.randint(1, 60)
        lines = [f"Slip {number}: {slip}" for number, slip in enumerate(slips, first)]
        return "\n".join([*lines, end])
    start = rng.choice(STARTS)
    if kind == "copy":
        again = rng.choice(COPIES)
        return f"{start} {slips[0]}\n{again} {slips[0]}"
    key = rng.choice(tuple(drawn[0]))
    fresh = draw(rng)
    reason = rng.choice(REASONS)
    changed = label(**drawn[0] | {key: fresh[key]})
    return (
        f"{start} {slips[0]}\n{reason} {changed}\nOnly the {key} was new: {fresh[key]}."
    )
