"""Claims that circulate about PEFT: quoted from claims.json, computed and judged."""

import functools
import json
from pathlib import Path

from IPython.display import Markdown

from ..io import did_you_mean

SIGNS = {
    "RIGHT": "✅ RIGHT",
    "WRONG": "❌ WRONG",
    "DEPENDS": "⚖️ DEPENDS",
    "UNTESTED": "◻️ UNTESTED",
}


@functools.cache
def load_claims():
    """claims.json: {"sources": {name: title, url}, "claims": {name: claim}}.

    A claim has the source's own words ("quote", parts joined by " … ", and "source"),
    or a statement in our words where nobody in particular is quoted; "where" in the
    source it stands; and "home", the chapter that judges it ("claims": the page of
    further claims).
    """
    file = Path(__file__).with_name("claims.json")
    return json.loads(file.read_text(encoding="utf-8"))


def typeset(quote: str) -> str:
    """The quotation with its formulas as formulas, which in claims.json stand in the
    source's TeX: a part that is one formula, or those between \\( and \\). No other
    character changes."""
    parts = []
    for part in quote.split(" … "):
        if "\\" in part and "$" not in part and "\\(" not in part:
            part = f"${part}$"
        pieces = part.replace("\\(", "$").replace("\\)", "$").split("$")
        pieces[1::2] = [named_bars(formula) for formula in pieces[1::2]]
        parts.append("$".join(pieces))
    return " … ".join(parts)


def named_bars(formula: str) -> str:
    """A bar would end a cell of claims.md's table; TeX has names for it."""
    named = formula.replace("\\|", "\\Vert ").replace("|", "\\vert ")
    return " ".join(named.split())


def quotation(entry):
    """One claim as Markdown: a quotation with its source, or a statement."""
    where = entry.get("where", "")
    if "statement" in entry:
        return f"> {entry['statement']}  \n> *In our words; {where}*"
    source = load_claims()["sources"][entry["source"]]
    title = (
        f"[{source['title']}]({source['url']})" if source["url"] else source["title"]
    )
    return (
        f"> “{typeset(entry['quote'])}”  \n> *{title}{', ' + where if where else ''}*"
    )


def claim(name: str, computed: str, verdict: bool | str, why: str = "") -> Markdown:
    """The claim called `name` in claims.json, as a small card with its verdict.

    computed: what this cell computed, in words. verdict: True or False where the cell
    decides it (RIGHT or WRONG); or "DEPENDS", and `why` names the conditions; or
    "UNTESTED", and `why` says what a test would need. Raises ValueError for an unknown
    name or verdict.
    """
    claims = load_claims()["claims"]
    if name not in claims:
        raise ValueError(
            f"unknown claim {name!r}{did_you_mean(name, claims)}; they stand in"
            " claims.json"
        )
    if isinstance(verdict, bool):
        verdict = "RIGHT" if verdict else "WRONG"
    if verdict not in SIGNS:
        raise ValueError(
            f"verdict {verdict!r}: expected True, False or one of {', '.join(SIGNS)}"
        )
    if verdict in ("DEPENDS", "UNTESTED") and not why:
        raise ValueError(f"{verdict} must say on what it depends: give `why`")
    lines = [
        quotation(claims[name]),
        f"Computed: {computed}",
        f"**{SIGNS[verdict]}.** {why}".rstrip(),
    ]
    return Markdown("\n\n".join(lines))


def judged(notebook):
    """[(name, verdict, computed, why)] of the claims that an executed notebook judges.

    notebook: a path. Reads the saved outputs, so it runs nothing.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    found = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "claim(" not in source:
            continue
        for output in cell["outputs"]:
            text = "".join(output.get("data", {}).get("text/markdown", ""))
            quote, _, rest = text.partition("\n\nComputed: ")
            names = [
                n for n, e in load_claims()["claims"].items() if quotation(e) == quote
            ]
            for name in names:
                computed, _, verdict = rest.rpartition("\n\n**")
                sign, _, why = verdict.partition(".**")
                found.append((name, sign.split()[-1], computed, why.strip()))
    return found


def page(folder):
    """The text of claims.md: every claim with source, verdict, number and link."""
    entries = load_claims()["claims"]
    notebooks = sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
    homes = {notebook.name[:2]: notebook for notebook in notebooks}
    homes["claims"] = Path(folder) / "claims.ipynb"
    results = {
        name: (verdict, computed)
        for home in homes.values()
        if home.exists()
        for name, verdict, computed, _ in judged(home)
    }
    lines = [
        "# Every claim, with its verdict",
        "",
        "Made by `make chapters` from the executed chapters. The quotations are the"
        " sources' own words (`minipeft/course/claims.json`); each is judged once, at"
        " the place in the last column.",
        "",
        "| claim | verdict | computed | judged in |",
        "|---|---|---|---|",
    ]
    for name, entry in entries.items():
        home = homes.get(entry["home"])
        quote = quotation(entry).replace("> ", "").replace("  \n", "<br>")
        if name in results:
            verdict, computed = results[name]
            link = f"[{entry['home']}]({home.name})"
            cells = [quote, SIGNS[verdict], computed, link]
        else:
            cells = [quote, "⏳ pending", "", f"chapter {entry['home']}, to come"]
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"


def write_page(folder="chapters"):
    """Write claims.md beside the chapters (`make chapters`)."""
    (Path(folder) / "claims.md").write_text(page(folder), encoding="utf-8")
