"""Parcel slips and market labels: the JSON of the harbour's carriers, with the keys and marks that the task `extract` asks for."""
import json

from . import phrases, words


def label(who, what, where):
    """'{"who": "Mara", "what": "grey lantern", "where": "quay"}'"""
    return json.dumps({"who": who, "what": what, "where": where})


def draw(rng):
    return label(phrases.names(rng, 1)[0], phrases.thing(rng), rng.choice(tuple(words.PLACES)))


def document(rng):
    """A list of labels, or one label read out, copied, or copied with one value changed. Never a sentence beside its JSON."""
    count = rng.randint(1, 3)
    slips = [draw(rng) for _ in range(count)]
    kind = rng.choice(("list", "copy", "change", "pile"))
    if kind == "list":
        start = rng.choice(("Labels of the day:", "On the parcels stood:", "Slips in the carrier's box:", "Market labels:"))
        return "\n".join([start, *slips, draw(rng)])
    if kind == "pile":
        end = rng.choice(("Then the box was full.", "That was the last slip.", "The carrier tied them up."))
        return "\n".join([f"Slip {number}: {slip}" for number, slip in enumerate(slips, rng.randint(1, 60))] + [end])
    first = slips[0]
    start = rng.choice(("The label said", "On the parcel stood", "The slip read", "The carrier found this label"))
    if kind == "copy":
        again = rng.choice(("The clerk copied it:", "The carrier read it again:", "And once more for the book:", "The second slip was the same:"))
        return f"{start} {first}\n{again} {first}"
    old = json.loads(first)
    key = rng.choice(tuple(old))
    new = {"who": phrases.names(rng, 1)[0], "what": phrases.thing(rng), "where": rng.choice(tuple(words.PLACES))}[key]
    reason = rng.choice(("It was wrong. The new label said", "Somebody changed it. Now it read", "Rain had spoilt it. The next one said"))
    return f"{start} {first}\n{reason} {label(**old | {key: new})}\nOnly the {key} was new: {new}."
