"""Diaries: what happened, to whom, and the mood that followed. The task `mood` has the
same events, but asks."""

from . import phrases, words

EARLY = (
    "yesterday",
    "this morning",
    "last night",
    "at noon",
    "last week",
    "before breakfast",
    "on {day}",
)
LATE = ("this evening", "just now", "an hour ago", "late tonight", "in the end")
AFTER = (
    "{0} was {1}.",
    "{0} was {1} all day.",
    "After that {0} was {1}.",
    "{0} felt {1} then.",
    "No wonder {0} was {1}.",
    "How {1} {0} was!",
)


def noun(rng):
    """A thing that such events can happen to: no food."""
    return rng.choice(
        [noun for noun, kinds in words.THINGS.items() if kinds[0] != "food"]
    )


def event(rng, mood, who=None, when=None, what=None):
    """One sentence about the writer (who=None) or about `who`, without its full stop,
    and the number of the phrase."""
    number = rng.randrange(len(phrases.read("moods")[mood]))
    she, her, his, _ = (
        words.PRONOUNS[words.GENDER[who]] if who else ("I", "me", "my", "myself")
    )
    other = next(name for name in phrases.names(rng, 2) if name != who)
    what = phrases.thing(rng, what or noun(rng))
    text = phrases.read("moods")[mood][number]
    if who:  # a person is named once, then she or he
        first = min(("{I}", "{my}", "{me}"), key=lambda slot: (text + slot).find(slot))
        text = text.replace(first, f"{who}'s" if first == "{my}" else who, 1)
    text = text.format(
        I=she,
        my=his,
        me=her,
        X=what,
        aX=words.with_article(what),
        P=phrases.place(rng),
        N=other,
    )
    if when is None:
        return words.cap(text), number
    when = rng.choice(when).format(day=rng.choice(words.DAYS))
    return (
        words.cap(
            f"{when} {text}" if rng.random() < 0.6 or ", " in text else f"{text} {when}"
        ),
        number,
    )


def document(rng):
    """A page of a diary, each event followed by the mood of the one it happened to."""
    writer = phrases.names(rng, 1)[0]
    opening = rng.choice(
        (
            "{0}'s diary, {1}.",
            "From the diary of {0}.",
            "{1}. {0} wrote:",
            "{0} wrote on {1}:",
        )
    )
    lines = [opening.format(writer, rng.choice(words.DAYS))]
    for _ in range(rng.randint(2, 3)):
        mood = rng.choice(words.MOODS)
        who = (
            None
            if rng.random() < 0.6
            else next(name for name in phrases.names(rng, 2) if name != writer)
        )
        subject = words.PRONOUNS[words.GENDER[who]][0] if who else "I"
        happened, _ = event(rng, mood, who, rng.choice((EARLY, LATE, None)))
        after = rng.choice(AFTER)
        lines += [f"{happened}.", words.cap(after.format(subject, mood))]
    return " ".join(lines)
