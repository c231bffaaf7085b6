"""The student's edition of a chapter, and an nbgrader course folder: `minipeft student
chapters/04_lora.ipynb --out one-chapter`.

A chapter holds its exercises as cells with a role (see CONTRIBUTING.md): question,
stub, check, hint, solution. Stub and solution become one cell, in which the stub says
what to do. This is nbgrader's instructor version, with points on the checks. nbgrader's
own preprocessors then take solutions and hidden tests out: this is the student's
edition.
"""

import copy
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from ..io import all_or_nothing, brief, check_choice, read_text, write_text
from . import layout, variants

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
# [text](x.png), [text](x.md#part): the text, the file, the part
TEXT_LINK = re.compile(
    r"\[((?:[^][]|\[[^][]*\])*)\]\((?!https?:|#|attachment:)([^)\s#]+)(#[^)\s]*)?\)"
)
README = "README.md"
HEADING = "# A handout of minipeft\n"
ABOUT = (
    HEADING
    + """
Chapters of the course minipeft, which builds parameter-efficient fine-tuning by hand,
without the solutions of their exercises:

{chapters}

**Open it.** You need Python 3.11 or newer and the course's package: {install}. Then
type `jupyter lab` in this folder, and open the chapter.

**Answer.** Run the first code cells. In each exercise write your answer where the stub
says so, and run the cell below it: the check says whether the answer is right, and if
not, what is wrong. Run it as often as you like. A hint is folded below it.

Keep the notebook's name, and the folders beside it: the chapter reads them.
"""
)
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
        # displayed, not the cell's value: nbgrader would take that for partial credit
        check.source = CALL.sub(
            r"verdict = \1\nassert verdict, verdict\ndisplay(verdict)", check.source
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
    with all_or_nothing(out, is_somebodys_readme) as part:
        for edition in editions:
            folder = part / edition.target.parent.relative_to(out)
            folder.mkdir(parents=True, exist_ok=True)
            chapters = beside(edition, editions)
            take_files_along(edition, folder, chapters)
            write_text(folder / README, about(chapters))
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


def beside(edition: Edition, editions) -> dict:
    """{file name: title} of the chapters that will lie in the edition's folder."""
    folder = edition.target.parent
    found = {path.name: path.stem for path in folder.glob("*.ipynb")}
    for other in editions:
        if other.target.parent == folder:
            found[other.target.name] = layout.title(other.notebook)
    return dict(sorted(found.items()))


def about(chapters: dict) -> str:
    """A handout's README.md."""
    lines = [f"- [{title}]({name})" for name, title in chapters.items()]
    install = "install it as your teacher says"
    if address := layout.address():
        install = f"`pip install 'minipeft[course] @ git+{address}'`"
    return ABOUT.format(chapters="\n".join(lines), install=install)


def is_somebodys_readme(place: Path) -> bool:
    """A README.md that no handout has written is not replaced."""
    if place.name != README or not place.exists():
        return False
    return not place.read_bytes().startswith(HEADING.encode())


def take_files_along(edition: Edition, out: Path, chapters) -> None:
    """Copy what the chapter reads or links to into `out`, and let it look there. A link
    to what the handout does not hold becomes plain text.

    chapters: names of the chapters that will lie beside it."""
    files = Files(edition.source, out, chapters)
    for cell in edition.notebook.cells:
        if cell.cell_type == "code":
            cell.source = CODE_LINK.sub(files.moved_code, cell.source)
        else:
            cell.source = files.moved_text(cell.source, files.home, out)


@dataclass
class Files:
    """The files of one chapter: where they are, and where they go."""

    source: Path
    out: Path
    chapters: dict
    copied: set = field(default_factory=set)

    def __post_init__(self):
        self.home = self.source.resolve().parent
        self.root = repository(self.home)

    def copy(self, link, folder):
        """Copy what a link in `folder` leads to. Returns its place, or None: it leads
        to nothing, to a chapter, or out of the course."""
        target = (folder / link).resolve()
        if not target.is_file() or target.suffix == ".ipynb":
            return None
        if not target.is_relative_to(self.root):
            print(f"{self.source}: {link} lies outside the course: not copied")
            return None
        if target.is_relative_to(self.home):
            place = self.out / target.relative_to(self.home)
        else:
            place = self.out / "files" / target.relative_to(self.root)
        if target in self.copied:
            return place
        self.copied.add(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".md":
            text = read_text(target, StudentError)
            write_text(place, self.moved_text(text, target.parent, place.parent))
        else:
            shutil.copyfile(target, place)
        return place

    def moved_code(self, match):
        place = self.copy(match[0], self.home)
        return match[0] if place is None else place.relative_to(self.out).as_posix()

    def moved_text(self, text, folder, new_folder):
        """Markdown from `folder` as it stands in `new_folder`."""

        def moved(match):
            words, link, part = match.groups(default="")
            target = (folder / link).resolve()
            if target.parent == self.home and target.name in (README, *self.chapters):
                place = self.out / target.name
            elif target.suffix == ".ipynb":
                return words  # a chapter of the course that is not handed out
            elif (place := self.copy(link, folder)) is None:
                return words if target.exists() else match[0]
            new = Path(os.path.relpath(place, new_folder)).as_posix()
            return f"[{words}]({new}{part})"

        return TEXT_LINK.sub(moved, text)
