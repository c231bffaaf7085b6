"""What every chapter has alike: links to the other chapters, solutions and plotting
code folded for each reader, and a cell that installs the course where it is absent.

python -m minipeft.course.layout README.md chapters/*.ipynb

It changes no word and runs nothing, and a second time it changes nothing. The runner of
chapters (`minipeft.course.notebook`) does it before it runs one.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import nbformat

from ..io import write_text

# How each reader is told to fold a cell's code: JupyterLab, the book, Colab. VS Code
# keeps what is folded to itself, so there it stands open
FOLDED = {"source_hidden": True}, "hide-input", "form"
LONG, SCREEN = 12, 40  # lines
INSTALL = """\
# @title Install the course, where it is absent (in Colab, say)
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("minipeft") is None:
    course = Path.cwd().parent
    if not (course / "pyproject.toml").exists():
        {fetch}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--editable"]
    subprocess.run([*pip, f"{{course}}[course,quant]"], check=True)
    sys.path.insert(0, str(course))"""
FETCH = """\
import os

        course = Path("minipeft-course").resolve()
        clone = ["git", "clone", "--depth", "1", "{address}", str(course)]
        subprocess.run(clone, check=True)
        os.chdir(course / "chapters")"""
NOT_THERE = 'raise RuntimeError("open this chapter in the folder of the whole course")'
MENTION = re.compile(r"[Cc]hapters? \d\d(?:(?:, | and | or | to |, and )\d\d)*\b")
UNTOUCHED = re.compile(
    r"```.*?```|`[^`]*`|\[[^\]]*\]\([^)]*\)|\$[^$]*\$|^#[^\n]*$", re.M | re.S
)


def address(root=Path(__file__).parents[2]):
    """The course's public address, from pyproject.toml; "" while it has none."""
    project = root / "pyproject.toml"
    if not project.is_file():
        return ""
    urls = tomllib.loads(project.read_text(encoding="utf-8"))["project"].get("urls", {})
    return urls.get("Repository", "")


def repository(address):
    """("owner", "name") of a repository on GitHub, or None."""
    found = re.fullmatch(r"https://github\.com/([^/]+)/([^/]+?)(\.git)?/?", address)
    return found and (found[1], found[2])


def in_colab(address, name):
    """The link that opens a chapter in Colab, which reads GitHub; "" elsewhere."""
    if not (found := repository(address)):
        return ""
    colab = "https://colab.research.google.com/github"
    return f"[Open in Colab]({colab}/{'/'.join(found)}/blob/main/chapters/{name})"


def public_links(address):
    """README's lines that need an address: badge, book, Colab, clone."""
    if not address:
        return ""
    lines = []
    if found := repository(address):
        tests = f"{address}/actions/workflows/test.yml"
        lines += [
            f"[![tests]({tests}/badge.svg)]({tests})",
            f"[The book](https://{found[0]}.github.io/{found[1]}/)",
            in_colab(address, "04_lora.ipynb"),
        ]
    clone = f"```\ngit clone {address}\n```"
    return "\n\n".join(filter(None, [" · ".join(lines), clone]))


def with_public_links(readme, address):
    """README's text with these lines between their two marks."""
    lines = public_links(address)
    block = f"{lines}\n\n" if lines else ""
    return re.sub(
        r"(?<=<!-- the address of pyproject\.toml -->\n).*?(?=<!-- end -->)",
        lambda match: block,
        readme,
        flags=re.S,
    )


def role(cell):
    return cell.metadata.get("minipeft", {}).get("role", "")


def is_imports(source):
    """Is most of this code imports?"""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # IPython's own
        return False
    imports = [s for s in statements if isinstance(s, (ast.Import, ast.ImportFrom))]
    lines = sum(s.end_lineno - s.lineno + 1 for s in imports)
    return 2 * lines > len(source.splitlines())


def is_plumbing(cell):
    """Is it code that one reads when one needs it? More than a screen is, and of what
    has more than a few lines: imports; and what reads a record or draws a figure,
    without what a reader came for (training, laws, claims, classes)."""
    lines = len(cell.source.splitlines())
    if lines <= LONG or lines > SCREEN or is_imports(cell.source):
        return lines > LONG
    figure = any("image/png" in output.get("data", {}) for output in cell.outputs)
    record = "/benchmarks/results/" in cell.source
    teaches = re.search(
        r"\b(train|claim|show)\(|\bcheck\.|\bassert\b|^class ", cell.source, re.M
    )
    return (figure or record) and not teaches


def fold(cell):
    jupyter, tag, view = FOLDED
    cell.metadata["jupyter"] = cell.metadata.get("jupyter", {}) | jupyter
    tags = cell.metadata.get("tags", [])
    cell.metadata["tags"] = tags if tag in tags else [*tags, tag]
    cell.metadata["cellView"] = view


def unfold(cell):
    jupyter, tag, _ = FOLDED
    for place, folded in (("jupyter", jupyter), ("tags", (tag,))):
        found = cell.metadata.pop(place, {})
        if isinstance(found, dict):
            rest = {name: value for name, value in found.items() if name not in folded}
        else:
            rest = [name for name in found if name not in folded]
        if rest:
            cell.metadata[place] = rest
    cell.metadata.pop("cellView", None)


def fold_code(cells):
    """Fold solutions and plumbing, for all readers, and nothing else."""
    for cell in cells:
        if cell.cell_type == "code":
            folded = role(cell) in ("solution", "install") or is_plumbing(cell)
            (fold if folded else unfold)(cell)


def linked(text, chapters):
    """Markdown in which "chapter 04" is a link, outside headings, code and links.

    chapters: {"04": "04_lora.ipynb"}."""

    def link(match):
        words = match[0]
        if len(re.findall(r"\d\d", words)) == 1:
            target = chapters.get(words[-2:])
            return f"[{words}]({target})" if target else words
        return re.sub(
            r"\d\d",
            lambda n: f"[{n[0]}]({chapters[n[0]]})" if n[0] in chapters else n[0],
            words,
        )

    def outside(part):
        # HTML holds no Markdown: <summary>
        lines = part.split("\n")
        return "\n".join(
            line if line.lstrip().startswith("<") else MENTION.sub(link, line)
            for line in lines
        )

    parts, at = [], 0
    for match in UNTOUCHED.finditer(text):
        parts += [outside(text[at : match.start()]), match[0]]
        at = match.end()
    return "".join([*parts, outside(text[at:])])


def title(notebook):
    """ "04 LoRA: the BA decomposition"."""
    return notebook.cells[0].source.partition("\n")[0].lstrip("# ")


def beside(path):
    """The chapters before and after this one: paths or None."""
    chapters = sorted(path.parent.glob("[0-9][0-9]_*.ipynb"))
    place = chapters.index(path)
    before = chapters[place - 1] if place else None
    return before, chapters[place + 1] if place + 1 < len(chapters) else None


def navigation(path):
    """The last cell: the chapter before, the list of all, the chapter after."""

    def named(other):
        return f"[{title(nbformat.read(other, as_version=4))}]({other.name})"

    before, after = beside(path)
    parts = [
        f"← {named(before)}" if before else "",
        "[All chapters](README.md)",
        in_colab(address(), path.name),
        f"{named(after)} →" if after else "",
    ]
    return " · ".join(filter(None, parts))


def install_source(address):
    fetch = FETCH.format(address=address) if address else NOT_THERE
    return INSTALL.format(fetch=fetch)


def is_chapter(path):
    """Is this path's notebook one of the chapters, which have a number?"""
    return path.parent.name == "chapters" and path.name[:2].isdigit()


def lay_out(notebook, path):
    """Give a chapter its links, folds, install cell and navigation, in place; any other
    notebook its folds.

    path: where it lies, among the other chapters. A cell that is added is counted as
    executed, as it does nothing where the course is installed."""
    path = Path(path).resolve()
    if not is_chapter(path):
        fold_code(notebook.cells)
        return
    chapters = {p.name[:2]: p.name for p in path.parent.glob("[0-9][0-9]_*.ipynb")}
    chapters.pop(path.name[:2], None)
    kept = [
        cell for cell in notebook.cells if role(cell) not in ("install", "navigation")
    ]
    for cell in kept:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, chapters)
    install = nbformat.v4.new_code_cell(install_source(address()), id="install")
    install.metadata = {"minipeft": {"role": "install"}}
    last = nbformat.v4.new_markdown_cell(navigation(path), id="navigation")
    last.metadata = {"minipeft": {"role": "navigation"}}
    notebook.cells = [kept[0], install, *kept[1:], last]
    fold_code(notebook.cells)
    if any(cell.get("execution_count") for cell in kept):
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for count, cell in enumerate(code, 1):
            cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count


def main(names):
    for name in names:
        if Path(name).suffix == ".md":
            text = Path(name).read_text(encoding="utf-8")
            write_text(Path(name), with_public_links(text, address()))
            continue
        notebook = nbformat.read(name, as_version=4)
        before = nbformat.writes(notebook)
        lay_out(notebook, name)
        after = nbformat.writes(notebook)
        if after != before:
            write_text(Path(name), after + "\n")
            print(f"{name}: laid out")


if __name__ == "__main__":
    main(sys.argv[1:])
