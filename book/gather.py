"""Gathers the book's pages: README, chapters, claims, guides and an API reference, as
they lie in the repository, in the form that Sphinx reads.

python book/gather.py book/_build/source

Nothing is executed: outputs are those that are committed. The pages keep their places
in the repository, so that their links to each other hold. Links to other files lead to
the repository's public address, or are left out while it has none.
"""

import importlib
import inspect
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat

from minipeft.course.layout import address, is_imports, lay_out, linked, role

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "data/base/README.md"]
PAGES += ["chapters/README.md", "chapters/instructor.md", "chapters/claims.md"]
PAGES += ["chapters/claims.ipynb", "chapters/which_one.md"]
# Names in the book: its first page; and two pages that differ in their suffix alone
RENAMED = {
    "README.md": "index.md",
    "chapters/claims.ipynb": "chapters/further_claims.ipynb",
}
API = [
    ("minipeft", "models, configurations, adapters"),
    ("minipeft.lm", "the language model, its data and training"),
    ("minipeft.quant", "four bits"),
    ("minipeft.optim", "LoRA+"),
    ("minipeft.course", "what notebooks use"),
    ("minipeft.course.figures", "figures"),
    ("minipeft.lanternwick.register", "who lives in the town"),
    ("minipeft.lanternwick.tasks", "the town's tasks"),
]
LINK = re.compile(r"(?<!\!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.S)
# code, formulas, and headings, which links name by their words
NOT_PROSE = re.compile(rf"{CODE.pattern}|\$[^$]*\$|^#.*?$", re.S | re.M)
TOGETHER = re.compile(
    r"(?<=≈) (?=[\d−+-])"  # ≈ 5
    r"|(?<=\d) (?=± \d)|(?<=\d ±) (?=\d)"  # 4 ± 1
    r"|(?<=\d) (?=(?:%|[kMGT]i?B\b|ms\b|points\b))"  # 5 %, 24 GB
    r"|(?<=\d) (?=to (?:≈ )?\d)|(?<=\d to) (?=(?:≈ )?\d)"  # 0.06 to 0.08
    r"|(?<=\b\w) (?== \d)|(?<=\b\w =) (?=\d)"  # r = 8
    r"|(?<=\br) (?=\d)"  # LoRA r 4
    r"|(?<=\(\d,) (?=\d\))"  # φ(8, 8)
    r"|(?<=\w) (?=/ [a-z]\b)|(?<=\w /) (?=[a-z]\b)"  # alpha / r
)
# A verdict's class and sign; the notebooks' emoji need a font that not every reader has
VERDICTS = {
    "RIGHT": ("right", "✔\N{VARIATION SELECTOR-15}"),
    "Right": ("right", "✔\N{VARIATION SELECTOR-15}"),
    "WRONG": ("wrong", "✘"),
    "DEPENDS": ("depends", "◐"),
    "UNTESTED": ("open", "○"),
    "Not yet": ("open", "○"),
}
VERDICT = re.compile(
    rf"(?:\*\*)?(?:✅|❌|⚖️|◻️) (?:\*\*)?({'|'.join(VERDICTS)})(?:\.?\*\*)?"
)


def chapters():
    return sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))


def pages():
    """The paths of the pages that exist, relative to the repository."""
    names = [name for name in PAGES if (ROOT / name).is_file()]
    names += [path.relative_to(ROOT).as_posix() for path in chapters()]
    return names


def relinked(text, page, known):
    """The page's Markdown with links that hold in the book.

    page, known: paths relative to the repository."""

    def link(match):
        words, target = match[1], match[2]
        if not target or re.match(r"\w+:", target):
            return match[0]
        path = os.path.normpath(Path(page).parent / target).replace(os.sep, "/")
        if (ROOT / path).is_dir():
            path = f"{path}/README.md"
        if path in known:
            place = os.path.relpath(RENAMED.get(path, path), Path(page).parent)
            return f"[{words}]({place.replace(os.sep, '/')}{match[3] or ''})"
        if address():
            return f"[{words}]({address()}/blob/main/{path})"
        return words

    parts, at = [], 0
    for match in CODE.finditer(text):
        # code is left alone, but for a link whose words are code
        if match[0].startswith("```"):
            parts += [LINK.sub(link, text[at : match.start()]), match[0]]
            at = match.end()
    return "".join([*parts, LINK.sub(link, text[at:])])


def take_images_along(text, page, out):
    for target in IMAGE.findall(text):
        source = ROOT / Path(page).parent / target
        if source.is_file():
            (out / page).parent.joinpath(target).parent.mkdir(
                parents=True, exist_ok=True
            )
            shutil.copyfile(source, (out / page).parent / target)


def words_of(markdown, most=300):
    """The first words of a Markdown text, plain."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    plain = " ".join(re.sub(r"[*`#>$]|<[^>]+>", "", plain).split())
    plain = plain.removeprefix("What to see").lstrip(":, ")
    return plain if len(plain) <= most else plain[:most].rsplit(" ", 1)[0] + " …"


def describe_figures(cells):
    """A figure without an alternative text gets the words that follow it."""
    for at, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            if "image/png" not in output.get("data", {}):
                continue
            told = output.setdefault("metadata", {}).setdefault("image/png", {})
            after = [c.source for c in cells[at + 1 :] if c.cell_type == "markdown"]
            words = words_of(after[0]) if after else ""
            told.setdefault(
                "alt", words if len(words) > 20 else "A figure of this chapter."
            )


def badge(match):
    kind, sign = VERDICTS[match[1]]
    sign = f'<span aria-hidden="true">{sign}</span>'
    return f'<span class="verdict {kind}">{sign} {match[1]}</span>'


def kept_together(markdown):
    """Markdown whose numbers stay in one line with what belongs to them: their sign,
    their unit, the letter that they are the value of."""
    parts, at = [], 0
    for match in NOT_PROSE.finditer(markdown):
        parts += [markdown[at : match.start()], match[0]]
        at = match.end()
    parts.append(markdown[at:])
    parts[::2] = [TOGETHER.sub("\N{NO-BREAK SPACE}", part) for part in parts[::2]]
    return "".join(parts)


def set_text(markdown):
    """Markdown with verdicts as badges, and numbers that are kept together."""
    return VERDICT.sub(badge, kept_together(markdown))


def name_fold(cell):
    """Say what is folded, and how much it is."""
    if "hide-input" not in cell.metadata.get("tags", []):
        return
    what = f"code ({len(cell.source.splitlines())} lines)"
    if role(cell) == "solution":
        what = "solution"
    elif is_imports(cell.source):
        what = "imports"
    cell.metadata["mystnb"] = {
        "code_prompt_show": f"Show the {what}",
        "code_prompt_hide": f"Hide the {what}",
    }


def prepare_notebook(path, known, out):
    page = path.relative_to(ROOT).as_posix()
    notebook = nbformat.read(path, as_version=4)
    lay_out(notebook, path)
    # the book has its own way to the next page, and nothing to install
    drop = ("install", "navigation")
    notebook.cells = [cell for cell in notebook.cells if role(cell) not in drop]
    describe_figures(notebook.cells)
    others = {other.name[:2]: other.name for other in chapters() if other != path}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            take_images_along(cell.source, page, out)
            cell.source = kept_together(relinked(cell.source, page, known))
        elif cell.cell_type == "code":
            name_fold(cell)
            for output in cell.outputs:
                if markdown := output.get("data", {}).get("text/markdown"):
                    markdown = relinked(linked(markdown, others), page, known)
                    output.data["text/markdown"] = set_text(markdown)
    nbformat.write(notebook, out / RENAMED.get(page, page))


def prepare_text(page, known, out):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = {path.name[:2]: path.name for path in chapters()}
    if page.startswith("chapters/"):
        text = VERDICT.sub(badge, linked(text, names))
    take_images_along(text, page, out)
    text = kept_together(relinked(text, page, known))
    if page == "README.md":
        text += "\n\n" + contents(known)
    (out / RENAMED.get(page, page)).write_text(text, encoding="utf-8")


def contents(known):
    """README's hidden tables of contents: the order of the pages."""

    def toctree(caption, names):
        here = [
            RENAMED.get(name, name)
            for name in names
            if name in known or name.startswith("api/")
        ]
        lines = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *here, "```"]
        return "\n".join(lines)

    numbered = [path.relative_to(ROOT).as_posix() for path in chapters()]
    course = ["chapters/README.md", *numbered, "chapters/which_one.md"]
    claims = ["chapters/claims.md", "chapters/claims.ipynb"]
    api = [f"api/{module}.md" for module, _ in API]
    return "\n\n".join(
        [
            toctree("The course", course),
            toctree("Claims", claims),
            toctree("For instructors", ["chapters/instructor.md"]),
            toctree(
                "How it is built",
                ["ARCHITECTURE.md", "CONTRIBUTING.md", "data/base/README.md"],
            ),
            toctree("Reference", api),
        ]
    )


def write_api(out):
    """One page a module: its public names, and the classes that these are made from,
    with their docstrings, each once."""
    (out / "api").mkdir()
    seen = []
    for name, what in API:
        module = importlib.import_module(name)
        things = {f"{name}.{n}": getattr(module, n) for n in public(module)}
        things |= bases([*things.values(), *seen])
        new = {n: thing for n, thing in things.items() if thing not in seen}
        seen += new.values()
        text = f"# `{name}`: {what}\n\n```{{eval-rst}}\n"
        text += f".. automodule:: {name}\n   :no-members:\n\n"
        directives = [f".. auto{kind(thing)}:: {n}" for n, thing in new.items()]
        directives.sort(key=lambda line: (line.split("::")[0], line.rpartition(".")[2]))
        text += "\n\n".join(directives) + "\n```\n"
        (out / "api" / f"{name}.md").write_text(text, encoding="utf-8")


def bases(things):
    """{name: class} of what this package's classes inherit from, and is not public: it
    has fields and methods that their users need."""
    found = [base for t in things if isinstance(t, type) for base in t.__mro__[1:]]
    return {
        f"{base.__module__}.{base.__qualname__}": base
        for base in found
        if base.__module__.split(".")[0] == "minipeft" and base not in things
    }


def kind(thing):
    """What autodoc calls it: so it also sorts, classes before functions."""
    if not isinstance(thing, type):
        return "function" if callable(thing) else "data"
    return "exception" if issubclass(thing, Exception) else "class"


def public(module):
    """A module's names: those that it lists, or else the functions and classes that it,
    or its package, defines."""
    if hasattr(module, "__all__"):
        names = module.__all__
        return [n for n in names if not inspect.ismodule(getattr(module, n))]
    return [
        name
        for name, thing in vars(module).items()
        if callable(thing)
        and f"{thing.__module__}.".startswith(f"{module.__name__}.")
        and not name.startswith("_")
    ]


def gather(out):
    """Write all pages to the folder `out`, which is made anew."""
    shutil.rmtree(out, ignore_errors=True)
    known = set(pages())
    for page in sorted(known):
        (out / page).parent.mkdir(parents=True, exist_ok=True)
        if page.endswith(".ipynb"):
            prepare_notebook(ROOT / page, known, out)
        else:
            prepare_text(page, known, out)
    write_api(out)


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
