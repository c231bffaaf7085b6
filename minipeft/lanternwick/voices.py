"""Three who tell a sentence again: old Captain Brack in his words, the clerk in notes,
the parrot Admiral word by word.

In the pretraining text it is always said who is telling. So the base can do all three;
the task `voice` asks it to choose one.
"""

import re

from . import phrases, words

LEXICON = dict(
    pair.split(":")
    for pair in """
    the:th' my:me your:yer you:ye is:be are:be and:an' of:o' yes:aye before:afore
    friend:matey boat:vessel sea:briny money:doubloons food:grub girl:lass boy:lad
    kitchen:galley bed:bunk floor:deck
""".split()
)
# the captain's first word depends on the sentence's last mark
OPENERS = {".": "Arr,", "?": "Ahoy,", "!": "Blimey,"}
# what a busy clerk leaves out
SKIPPED = set("the my your you is are and of a yes we they".split())


def _words(sentence):
    """'My boat, Mara!' -> ['my', 'boat', ',', 'Mara', '!']: names keep their capital,
    other first words lose it."""
    pieces = re.findall(r"[\w']+|[^\w\s]", sentence)
    if pieces and pieces[0] not in words.GENDER:
        pieces[0] = pieces[0].lower()
    return pieces


def _text(pieces):
    return re.sub(r" ([,.?!])", r"\1", " ".join(pieces))


def captain(sentence):
    """'The boat is on the quay.' -> "Arr, th' vessel be on th' quay." """
    pieces = _words(sentence)
    return _text(
        [OPENERS[pieces[-1]], *(LEXICON.get(piece, piece) for piece in pieces)]
    )


def clerk(sentence):
    """'The boat is on the quay.' -> 'Noted: boat on quay.'"""
    pieces = [
        piece
        for piece in _words(sentence)[:-1]
        if piece not in SKIPPED and piece != ","
    ]
    return _text(["Noted:", *pieces, "."])


def parrot(sentence):
    """'The boat is on the quay.' -> 'Awk! The boat is on the quay.'"""
    return f"Awk! {sentence}"


TELLERS = {"the captain": captain, "the clerk": clerk, "the parrot": parrot}
CUES = (
    "Told again by {who}: ",
    "In the words of {who}: ",
    "{Who} told it again: ",
    "This is how {who} said it: ",
    "{Who} says: ",
)
TALES = (
    "Captain Brack told a tale",
    "Old Captain Brack sat down {P} and spoke",
    "The captain raised his mug",
    "The captain looked out over the harbour",
    "Captain Brack waved from {P}",
    "Nobody stopped old Captain Brack now",
)


def sentence(rng):
    """A plain sentence of at most ten words and what it is made of: (text, template,
    thing or place or name)."""
    for _ in range(100):  # nearly always the first will do
        template = rng.choice(phrases.read("voice")[""])
        name, other = phrases.names(rng, 2)
        values = {
            "X": phrases.thing(rng),
            "P": phrases.place(rng),
            "N": name,
            "M": other,
        }
        text = phrases.choose(rng, template).format(**values)
        if len(text.split()) <= 10:
            break
    return (
        text,
        template,
        next(values[slot] for slot in "XPN" if f"{{{slot}}}" in template),
    )


def document(rng):
    """A sentence told again by one to four tellers, or one of the captain's tales."""
    if rng.random() < 0.25:
        opening = rng.choice(TALES).format(P=phrases.place(rng))
        return " ".join(
            [
                f"{opening}:",
                *(captain(sentence(rng)[0]) for _ in range(rng.randint(2, 4))),
            ]
        )
    plain = sentence(rng)[0]
    opening = rng.choice(
        ("They said: ", "{0} said: ", "Somebody said: ", "Heard {1}: ", "")
    )
    lines = []
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        who = rng.choice(tuple(TELLERS))
        lines.append(
            rng.choice(CUES).format(who=who, Who=words.cap(who)) + TELLERS[who](plain)
        )
    return "\n".join(
        [opening.format(phrases.names(rng, 1)[0], phrases.place(rng)) + plain, *lines]
    )
