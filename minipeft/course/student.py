"""The student's edition of a chapter, and an nbgrader course folder: `minipeft student
chapters/04_lora.ipynb --out mine`.

A chapter holds its exercises as cells with a role (see CONTRIBUTING.md): question,
stub, check, hint, solution. For a student the solutions and hidden tests go, the
outputs are cleared, and each stub says what to do. For nbgrader stub and solution
become one cell, from which `nbgrader generate_assignment` takes the solution out, and
the checks give points.
"""

import copy
import re
import shutil
from pathlib import Path

import nbformat

SOLUTION = re.compile(r"^### BEGIN SOLUTION\n(.*?)\n### END SOLUTION$", re.M | re.S)
HIDDEN = re.compile(
    r"^[ \t]*### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS[^\n]*\n?", re.M | re.S
)
CALL = re.compile(r"^(check\.\w+\(.*\))$", re.M)
# in code: "../benchmarks/results/x.json"
FILES = (
    re.compile(r"(?<=[\"'])\.\./[\w./-]+(?=[\"'])"),
    # in prose: [text](figures/x.png)
    re.compile(r"(?<=\]\()(?!https?:|#|attachment:)[^)\s#]+"),
)
CONFIG = '''"""A course of minipeft under nbgrader. Run nbgrader in this folder: nbgrader generate_assignment NAME."""
c = get_config()
c.CourseDirectory.course_id = "minipeft"
# Our stubs hold the signature and say what to do, so that nothing has to stand where a solution was taken out.
c.ClearSolutions.code_stub = {"python": "# (Your answer stands above this line.)"}
c.Execute.timeout = 600  # seconds a cell: chapters train real models
'''


class StudentError(ValueError):
    """A file that is no chapter, or a place where nothing can be written."""


def part(cell) -> tuple:
    """(the exercise that a cell belongs to, its role in it), or (None, None)."""
    mine = cell.metadata.get("minipeft", {})
    return mine.get("exercise"), mine.get("role") if mine.get("exercise") else None


def say_what_to_do(stub: str, question: str) -> str:
    """A stub whose NotImplementedError names the exercise; where a value is asked for
    (x = None), a comment does."""
    title = re.search(r"^#+ (.+)$", question, re.M)[1].strip().replace('"', "'")
    todo = (
        f"{title}{'' if title.endswith('?') else '.'} Write your answer here, then run"
        " the check below."
    )
    if "raise NotImplementedError" not in stub:
        return f"# {todo}\n{stub}"
    return re.sub(
        r"raise NotImplementedError(?!\()", f'raise NotImplementedError("{todo}")', stub
    )


def cleared(notebook):
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def exercises(notebook) -> dict:
    """{exercise: {role: its cell}}"""
    found = {}
    for cell in notebook.cells:
        name, role = part(cell)
        if name:
            found.setdefault(name, {})[role] = cell
    return found


def student_edition(notebook):
    """The chapter without solutions, hidden tests and outputs."""
    notebook = cleared(notebook)
    for name, cells in exercises(notebook).items():
        cells["stub"].source = say_what_to_do(
            cells["stub"].source, cells["question"].source
        )
    notebook.cells = [cell for cell in notebook.cells if part(cell)[1] != "solution"]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = HIDDEN.sub("", cell.source).rstrip("\n")
            if SOLUTION.search(cell.source):
                raise StudentError(
                    f"a solution stands outside an exercise: {cell.source[:80]!r}"
                )
    return notebook


def nbgrader_source(notebook):
    """The chapter as nbgrader's instructor version: with solutions, each check worth
    its points."""
    notebook = cleared(notebook)
    for name, cells in exercises(notebook).items():
        stub, solution, check = cells["stub"], cells["solution"], cells["check"]
        answer = SOLUTION.search(solution.source)
        stub.source = (
            f"{say_what_to_do(stub.source, cells['question'].source)}\n\n{answer[0]}"
        )
        check.source = CALL.sub(
            r"verdict = \1\nassert verdict, verdict\nverdict", check.source
        )
        mark(cells["question"], f"{name}-question", locked=True)
        mark(stub, name, solution=True)
        mark(
            check,
            f"{name}-check",
            grade=True,
            locked=True,
            points=check.metadata["minipeft"]["points"],
        )
    notebook.cells = [cell for cell in notebook.cells if part(cell)[1] != "solution"]
    return notebook


def mark(cell, grade_id, **what):
    """nbgrader's metadata, version 3 (it refuses unknown keys)."""
    cell.metadata["nbgrader"] = {
        "schema_version": 3,
        "grade_id": grade_id,
        "grade": False,
        "solution": False,
        "locked": False,
        "task": False,
    } | what


def take_files_along(notebook, home: Path, out: Path) -> None:
    """Copy what the chapter reads or links to beside it, and let it look there."""

    def moved(match):
        target = (home / match[0]).resolve()
        # another chapter: it has its own edition
        if not target.is_file() or target.suffix == ".ipynb":
            return match[0]
        inside = (
            match[0]
            if not match[0].startswith("..")
            else f"files/{match[0].replace('../', '')}"
        )
        (out / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, out / inside)
        return inside

    for cell in notebook.cells:
        cell.source = FILES[cell.cell_type == "markdown"].sub(moved, cell.source)


def write(path, out, nbgrader=False, force=False) -> Path:
    """Write one chapter's edition; returns its path. An edition that is there already,
    maybe worked in, is kept."""
    path, out = Path(path), Path(out)
    if path.suffix != ".ipynb" or not path.is_file():
        raise StudentError(f"{path}: no such notebook")
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises whatever comes of reading it
        raise StudentError(
            f"{path} is no notebook:"
            f" {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None
    if not exercises(notebook):
        raise StudentError(
            f"{path} has no exercises: is it a chapter of the course, and the full"
            " edition of it?"
        )
    missing = [
        name
        for name, cells in exercises(notebook).items()
        if not {"question", "stub", "check", "solution"} <= set(cells)
    ]
    if missing:
        raise StudentError(
            f"{path} lacks cells of {', '.join(missing)}: is it a student's edition"
            " already?"
        )
    folder = out / "source" / path.stem if nbgrader else out
    target = folder / path.name
    if target.exists() and not force:
        raise StudentError(
            f"{target} is there already, perhaps with somebody's work: --force"
            " replaces it"
        )
    if target.exists() and target.samefile(path):
        raise StudentError(f"{target} is the chapter itself: choose another --out")
    edition = (nbgrader_source if nbgrader else student_edition)(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    take_files_along(edition, path.parent, folder)
    nbformat.validate(edition)
    nbformat.write(edition, target)
    if nbgrader and not (out / "nbgrader_config.py").exists():
        (out / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    return target
