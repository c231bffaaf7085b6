"""The student's edition of a chapter, and an nbgrader course folder: `minipeft student
chapters/04_lora.ipynb --out mine`.

A chapter holds its exercises as cells with a role (see CONTRIBUTING.md): question,
stub, check, hint, solution. Stub and solution become one cell, in which the stub says
what to do. This is nbgrader's instructor version, with points on the checks. nbgrader's
own preprocessors then take solutions and hidden tests out: this is the student's
edition.
"""

import copy
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import nbformat

from ..io import all_or_nothing, brief, check_choice, read_text, write_text
from . import variants

GRADERS = ("nbgrader", "otter")
ROLES = ("question", "stub", "check", "hint", "solution")
NEEDED = {"question", "stub", "check", "solution"}
# What may stand in no student's edition, however it is written: "### BEGIN SOLUTION",
# "#BEGIN HIDDEN TESTS", "# end  solution".
SOLUTION_MARKERS, TEST_MARKERS = (
    re.compile(rf"\b(BEGIN|END)[\W_]*{word}|(#|<!--)\W*(?i:(begin|end)[\W_]*{word})")
    for word in ("SOLUTION", r"HIDDEN[\W_]*TEST")
)
CALL = re.compile(r"^(check\.\w+\(.*\))$", re.M)
CODE_LINK = re.compile(r"(?<=[\"'])\.\./[\w./-]+(?=[\"'])")  # "../results/x.json"
TEXT_LINK = re.compile(r"(?<=\]\()(?!https?:|#|attachment:)[^)\s#]+")  # [text](x.png)
CONFIG = '''"""A course of minipeft under nbgrader.

Run nbgrader in this folder: nbgrader generate_assignment NAME."""
c = get_config()
c.CourseDirectory.course_id = "minipeft"
# A stub holds the signature and says what to do: nothing stands in for a solution.
c.ClearSolutions.code_stub = {"python": "# (Your answer stands above this line.)"}
c.Execute.timeout = 600  # seconds a cell: chapters train real models
'''


OTTER_TEST = '''"""Otter-Grader's test of an exercise; made by minipeft student."""

from otter.test_files import test_case

OK_FORMAT = False
name = "{name}"
points = {points}


@test_case(name="{name}")
def test_answer(env):
    verdict = eval("{call}", env)
    assert verdict, verdict
'''


class StudentError(ValueError):
    """A file that is not a chapter, or a place where nothing can be written."""


# ---- reading a chapter ---------------------------------------------------------------


def read_chapter(path: Path):
    """The notebook, with all that an edition needs. StudentError says what it lacks."""
    if not path.is_file():
        raise StudentError(f"{path}: no such notebook")
    if path.suffix != ".ipynb":
        raise StudentError(f"{path} is not a notebook: expected a .ipynb file")
    text = read_text(path, StudentError)
    try:
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises many kinds
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise StudentError(f"{path} is not a notebook: {first_line[:200]}") from None
    for cell in notebook.cells:
        cell.source = cell.source.replace("\r\n", "\n").replace("\r", "\n")
        cell.metadata.pop("nbgrader", None)
    try:
        check_exercises(notebook)
    except StudentError as error:
        raise StudentError(f"{path}: {error}") from None
    return notebook


def check_exercises(notebook) -> None:
    """StudentError unless each exercise has its cells, once, and a marked solution."""
    found = {}
    for number, cell in enumerate(notebook.cells, 1):
        name, role = part(cell, f"cell {number}")
        if name:
            roles = found.setdefault(name, [])
            if role in roles:
                raise StudentError(f"exercise {name!r} has two cells of role {role!r}")
            roles.append(role)
    if not found:
        raise StudentError(
            "it has no exercises; expected a chapter in its full edition"
        )
    for name, roles in found.items():
        if missing := sorted(NEEDED - {*roles}):
            raise StudentError(
                f"exercise {name!r} lacks its {', '.join(missing)}: is it a student's"
                " edition already?"
            )
    for name, cells in exercises(notebook).items():
        for role in ("stub", "check", "solution"):
            if cells[role].cell_type != "code":
                raise StudentError(f"the {role} of exercise {name!r} must be code")
        solution_region(cells["solution"].source, name)


def part(cell, where="a cell") -> tuple:
    """(the exercise that a cell belongs to, its role in it), or (None, None)."""
    mine = cell.metadata.get("minipeft", {})
    if not isinstance(mine, dict):
        mine = {"exercise": mine}
    name, role = mine.get("exercise"), mine.get("role")
    if name is None and role not in ROLES:
        return None, None
    if not isinstance(name, str) or not name or role not in ROLES:
        raise StudentError(
            f"{where} has the metadata minipeft = {brief(dict(mine))}; expected an"
            f" exercise's name and a role of {', '.join(ROLES)}"
        )
    return name, role


def exercises(notebook) -> dict:
    """{exercise: {role: its cell}}"""
    found = {}
    for cell in notebook.cells:
        name, role = part(cell)
        if name:
            found.setdefault(name, {})[role] = cell
    return found


def solution_region(source: str, name: str = "") -> str:
    """The lines from ### BEGIN SOLUTION to ### END SOLUTION, both included."""
    lines = source.split("\n")
    begins = [i for i, line in enumerate(lines) if "BEGIN SOLUTION" in line]
    ends = [i for i, line in enumerate(lines) if "END SOLUTION" in line]
    good = len(begins) == len(ends) == 1 and begins[0] < ends[0]
    if not good or lines[begins[0]][:1].isspace():
        raise StudentError(
            f"the solution of exercise {name!r} must stand between one line ###"
            " BEGIN SOLUTION and one line ### END SOLUTION, not indented"
        )
    return "\n".join(lines[begins[0] : ends[0] + 1])


# ---- the editions --------------------------------------------------------------------


def say_what_to_do(stub: str, question: str, name: str = "") -> str:
    """A stub whose NotImplementedError names the exercise; where a value is asked for
    (x = None), a comment does."""
    heading = re.search(r"^#+ +(.+)$", question, re.M)
    title = heading[1].strip() if heading else name
    title = title.replace("\\", "").replace('"', "'")
    todo = (
        f"{title}{'' if title.endswith('?') else '.'} Write your answer here, then run"
        " the check below."
    )
    if "raise NotImplementedError" not in stub:
        return f"# {todo}\n{stub}"
    call = f'raise NotImplementedError("{todo}")'
    return re.sub(r"raise NotImplementedError(?!\()", lambda match: call, stub)


def merged(notebook):
    """A copy in which stub and solution are one cell, and outputs are cleared."""
    notebook = copy.deepcopy(notebook)
    answers = {}
    for name, cells in exercises(notebook).items():
        stub = say_what_to_do(cells["stub"].source, cells["question"].source, name)
        answer = solution_region(cells["solution"].source, name)
        answers[name] = f"{stub}\n\n{answer}"
    notebook.cells = [cell for cell in notebook.cells if part(cell)[1] != "solution"]
    for cell in notebook.cells:
        if SOLUTION_MARKERS.search(cell.source):
            raise StudentError(
                f"a solution stands outside an exercise's cell for it, in the cell"
                f" {cell.source[:80]!r}"
            )
        if part(cell)[0]:
            cell.metadata["minipeft"].pop("variants", None)  # other classes' exercises
        if part(cell)[1] == "stub":
            cell.source = answers[part(cell)[0]]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    return notebook


def student_edition(notebook):
    """The chapter without solutions, hidden tests and outputs."""
    try:
        from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions
    except ImportError:
        raise StudentError(
            "students' editions are made with nbgrader: pip install 'minipeft[teach]'"
        ) from None
    notebook = merged(notebook)
    steps = (
        ClearSolutions(enforce_metadata=False, code_stub={"python": ""}),
        ClearHiddenTests(enforce_metadata=False),
    )
    for step in steps:
        try:
            notebook, _ = step.preprocess(notebook, {})
        except (RuntimeError, ValueError) as error:
            raise StudentError(f"nbgrader: {error}") from None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.rstrip()
        left = SOLUTION_MARKERS.search(cell.source) or TEST_MARKERS.search(cell.source)
        if left:
            raise StudentError(
                f"{left[0]!r} would be left in the student's edition, in the cell"
                f" {cell.source[:80]!r}"
            )
    everything = nbformat.writes(notebook)
    left = SOLUTION_MARKERS.search(everything) or TEST_MARKERS.search(everything)
    if left:
        raise StudentError(
            f"{left[0]!r} would be left in the student's edition, outside the text of"
            " its cells: in metadata or an attachment"
        )
    return notebook


def nbgrader_source(notebook):
    """The chapter as nbgrader's instructor version: with solutions, each check worth
    its points."""
    notebook = merged(notebook)
    for name, cells in exercises(notebook).items():
        check = cells["check"]
        points = points_of(name, check)
        check.source = CALL.sub(
            r"verdict = \1\nassert verdict, verdict\nverdict", check.source
        )
        mark(cells["question"], f"{name}-question", locked=True)
        mark(cells["stub"], name, solution=True)
        mark(check, f"{name}-check", grade=True, locked=True, points=points)
    return notebook


def points_of(name: str, check):
    """What a check is worth. StudentError: no number, or a name that graders refuse."""
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise StudentError(
            f"exercise {name!r}: graders take only letters, digits, _ and - in names"
        )
    points = check.metadata["minipeft"].get("points")
    if type(points) not in (int, float) or not 0 <= points < math.inf:
        raise StudentError(
            f"the check of exercise {name!r} has points = {brief(points)} in its"
            " metadata; expected a number, 0 or more"
        )
    return points


def otter_tests(notebook) -> dict:
    """{exercise: the test file that Otter-Grader reads}, each its check and its
    points."""
    found = {}
    for name, cells in exercises(notebook).items():
        check = cells["check"]
        calls = CALL.findall(check.source)
        if len(calls) != 1:
            raise StudentError(
                f"the check of exercise {name!r} must call check.something(...) on a"
                " line of its own, once"
            )
        values = {"name": name, "points": points_of(name, check), "call": calls[0]}
        found[name] = OTTER_TEST.format_map(values)
    return found


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


# ---- writing -------------------------------------------------------------------------


@dataclass
class Edition:
    """A chapter that is ready to be written."""

    notebook: object
    source: Path
    target: Path
    tests: dict  # {exercise: Otter's test of it}


def prepare(path, out, grader=None, force=False, variant=0) -> Edition:
    """Make one chapter's edition without writing anything. StudentError: it cannot be
    made, or the target exists, maybe with somebody's work in it."""
    path, out = Path(path), Path(out)
    try:
        notebook = variants.of_class(read_chapter(path), variant)
    except variants.VariantError as error:
        raise StudentError(f"{path}: {error}") from None
    folder = {"nbgrader": out / "source" / path.stem, "otter": out / path.stem}
    folder = folder.get(grader, out)
    target = folder / path.name
    if target.exists() and target.samefile(path):
        raise StudentError(f"{target} is the chapter itself: choose another --out")
    if target.exists() and not force:
        raise StudentError(
            f"{target} is there already, perhaps with somebody's work: --force"
            " replaces it"
        )
    try:
        edition = student_edition(notebook)  # in any case: it refuses what would leak
        if grader == "nbgrader":
            edition = nbgrader_source(notebook)
        tests = otter_tests(notebook) if grader == "otter" else {}
        nbformat.validate(edition)
    except (StudentError, nbformat.ValidationError) as error:
        raise StudentError(f"{path}: {error}") from None
    return Edition(edition, path, target, tests)


def write_all(paths, out, grader=None, force=False, variant=0) -> list:
    """Write editions of chapters, all or, on an error, none; returns their paths.
    grader: None, "nbgrader" or "otter". variant: the class they are for
    (variants.of_class)."""
    if grader is not None:
        check_choice("grader", grader, GRADERS)
    editions = [prepare(path, out, grader, force, variant) for path in paths]
    targets = [edition.target for edition in editions]
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise StudentError(f"two chapters would become {twice[0]}")
    with all_or_nothing(out) as part:
        for edition in editions:
            folder = part / edition.target.parent.relative_to(out)
            folder.mkdir(parents=True, exist_ok=True)
            take_files_along(edition, folder)
            text = nbformat.writes(edition.notebook) + "\n"
            write_text(folder / edition.target.name, text)
            for name, test in edition.tests.items():
                (folder / "tests").mkdir(exist_ok=True)
                write_text(folder / "tests" / f"{name}.py", test)
        if grader == "nbgrader" and not (Path(out) / "nbgrader_config.py").exists():
            write_text(part / "nbgrader_config.py", CONFIG)
    return targets


def write(path, out, grader=None, force=False, variant=0) -> Path:
    """Write one chapter's edition; returns its path."""
    return write_all([path], out, grader, force, variant)[0]


def repository(folder: Path) -> Path:
    """The folder that holds the course: what lies outside is not handed out."""
    for place in (folder, *folder.parents):
        if (place / ".git").exists() or (place / "pyproject.toml").is_file():
            return place
    return folder


def take_files_along(edition: Edition, out: Path) -> None:
    """Copy what the chapter reads or links to into `out`, and let it look there."""
    home = edition.source.resolve().parent
    root = repository(home)

    def moved(match):
        link = match[0]
        target = (home / link).resolve()
        # another chapter: it has its own edition
        if not target.is_file() or target.suffix == ".ipynb":
            return link
        if not target.is_relative_to(root):
            print(f"{edition.source}: {link} lies outside the course: not copied")
            return link
        if target.is_relative_to(home):
            inside = target.relative_to(home)
        else:
            inside = "files" / target.relative_to(root)
        (out / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, out / inside)
        return inside.as_posix()

    for cell in edition.notebook.cells:
        links = CODE_LINK if cell.cell_type == "code" else TEXT_LINK
        cell.source = links.sub(moved, cell.source)
