"""Claims that go round, quoted, computed and judged."""

from IPython.display import Markdown

VERDICTS = ("RIGHT", "WRONG", "DEPENDS")


def claim(
    quote: str, source: str, computed: str, verdict: bool | str, why: str = ""
) -> Markdown:
    """One claim as a small card.

    verdict: True or False where the cell computed it (RIGHT or WRONG), or "DEPENDS"
    (then `why` names the conditions).
    """
    if isinstance(verdict, bool):
        verdict = "RIGHT" if verdict else "WRONG"
    if verdict not in VERDICTS:
        raise ValueError(
            f"verdict {verdict!r}: expected True, False or one of {', '.join(VERDICTS)}"
        )
    if verdict == "DEPENDS" and not why:
        raise ValueError("a claim that depends must say on what: give `why`")
    lines = [
        f"> “{quote}”  \n> *{source}*",
        f"Computed: {computed}",
        f"**{verdict}.** {why}".rstrip(),
    ]
    return Markdown("\n\n".join(lines))
