"""The laws of the chapters, read from the files: nothing is run here (`pytest --nbval`
runs them)."""

import ast
import copy
import importlib
import re
from pathlib import Path

import nbformat
import pytest

from minipeft.course import check
from minipeft.course.figures import are_numbers
from minipeft.course.layout import SCREEN, is_plumbing, lay_out
from minipeft.course.notebook import run as execute
from minipeft.course.student import read_chapter, student_edition

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
SECTIONS = [
    "The idea in one picture",
    "Derivation",
    "Build it",
    "Laws",
    "Experiment",
    "Claim check",
    "What goes wrong",
    "Exercises",
    "In practice",
    "Summary",
]
MACHINE = re.compile(r"(?<![\w.])(/(home|root|Users|work|tmp|opt|usr)/|[A-Z]:\\\\?\w)")
HEAVY = 1_500_000


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem, scope="module")
def path(request):
    return request.param


@pytest.fixture(scope="module")
def chapter(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(chapter):
    return [cell for cell in chapter.cells if cell.cell_type == "code"]


def prose(chapter):
    return [cell for cell in chapter.cells if cell.cell_type == "markdown"]


def text_of(output) -> str:
    texts = [output.get("text", "")] + [
        text for kind, text in output.get("data", {}).items() if "image/" not in kind
    ]
    return "".join("".join(text) for text in texts)


def pictures(cells) -> list:
    return [
        output
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def role(cell) -> str:
    return cell.metadata.get("minipeft", {}).get("role", "")


def sections(chapter) -> dict:
    """{heading: its cells}, for the headings of the second level."""
    found, now = {}, None
    for cell in chapter.cells:
        heading = (
            re.match(r"## (?:\d+\. )?(.+)", cell.source)
            if cell.cell_type == "markdown"
            else None
        )
        now = heading[1].strip() if heading else now
        if now:
            found.setdefault(now, []).append(cell)
    return found


def section(chapter, name) -> list:
    return next(
        cells
        for heading, cells in sections(chapter).items()
        if heading.startswith(name)
    )


def test_there_are_chapters():
    assert CHAPTERS


# ------------------------------------------------------------------------ notebook laws


def test_executed_from_top_to_bottom(chapter):
    assert [cell.execution_count for cell in code(chapter)] == list(
        range(1, len(code(chapter)) + 1)
    )


def test_outputs_are_there_and_clean(chapter):
    outputs = [output for cell in code(chapter) for output in cell.outputs]
    assert len(outputs) > len(code(chapter)) / 2, (
        "were the outputs cleared? then --nbval compares nothing"
    )
    for output in outputs:
        assert output.output_type != "error", text_of(output)
        assert output.get("name") != "stderr", (
            "a warning or a progress bar was left in the file"
        )
        assert not any("widget" in key for key in output.get("data", {})), (
            "a widget shows nothing in a saved notebook"
        )


PLACEHOLDER = re.compile(r"\b[A-Z]+(?:_[A-Z]+){2,}\b|\bTODO\b|@@")


def test_no_sentence_is_left_to_be_filled_in(chapter):
    for cell in chapter.cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
            assert not PLACEHOLDER.search(prose), cell.source


def test_no_paths_of_a_machine(chapter):
    for cell in chapter.cells:
        for text in [cell.source] + [
            text_of(output) for output in cell.get("outputs", [])
        ]:
            assert not MACHINE.search(text), text[:300]


def test_size_and_kernel(path, chapter):
    assert path.stat().st_size < HEAVY
    assert chapter.metadata.kernelspec.name == "python3"


def test_starts_with_its_title(path, chapter):
    first = chapter.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith(
        f"# {path.stem[:2]} "
    )


def test_imports_are_public(chapter):
    for cell in code(chapter):
        for node in ast.walk(ast.parse(cell.source)):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] == "minipeft"
            ):
                module = importlib.import_module(node.module)
                assert not any(part.startswith("_") for part in node.module.split("."))
                for name in (alias.name for alias in node.names):
                    assert not name.startswith("_") and hasattr(module, name), (
                        f"{node.module} has no public {name}"
                    )
            private = isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
            assert not private, f"uses a private name: {node.attr}"


def test_tags_are_spelt_as_nbval_reads_them(chapter):
    for cell in chapter.cells:
        for tag in cell.metadata.get("tags", []):
            assert tag == tag.lower() and "_" not in tag, (
                f"nbval ignores the tag {tag!r} silently"
            )


def test_few_outputs_go_unchecked(chapter):
    ignored = [
        cell
        for cell in code(chapter)
        if "nbval-ignore-output" in cell.metadata.get("tags", [])
        or "NBVAL_IGNORE_OUTPUT" in cell.source
    ]
    assert len(ignored) <= len(code(chapter)) / 10


def test_images_have_words_beside_them(chapter):
    """Each figure is followed by a sentence on what to see."""
    for at, cell in enumerate(chapter.cells):
        if pictures([cell]):
            assert any(
                near.cell_type == "markdown" for near in chapter.cells[at + 1 : at + 3]
            ), cell.source


def test_images_have_alternative_texts(chapter):
    alts = [
        picture.metadata.get("image/png", {}).get("alt", "")
        for picture in pictures(chapter.cells)
    ]
    assert all(len(alt) > 20 for alt in alts), alts


def test_numbers_in_tables_stand_below_each_other(chapter):
    for cell in code(chapter):
        for output in cell.outputs:
            head, *rows = [
                line[2:-2].split(" | ")
                for line in output.get("data", {}).get("text/markdown", "").split("\n")
            ]
            if rows and set(rows[0]) <= {"---", "---:"}:
                for name, mark, *column in zip(head, *rows):
                    right = mark == "---:" or not are_numbers(column)
                    assert right, f"run the chapter again: {name}"


def test_laid_out(path, chapter):
    again = copy.deepcopy(chapter)
    lay_out(again, path)
    words = f"python -m minipeft.course.layout chapters/{path.name}"
    assert nbformat.writes(again) == nbformat.writes(chapter), words


def folds(cell):
    """How the cell's code is folded: for JupyterLab, the book, Colab."""
    hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    tagged = "hide-input" in cell.metadata.get("tags", [])
    return hidden, tagged, cell.metadata.get("cellView") == "form"


def test_plumbing_is_folded_for_every_reader(chapter):
    for cell in code(chapter):
        folded = role(cell) in ("solution", "install") or is_plumbing(cell)
        assert folds(cell) == (folded,) * 3, cell.source
        if not folded:
            assert len(cell.source.splitlines()) <= SCREEN, cell.source
        if role(cell) in ("toy", "stub", "check") or "claim(" in cell.source:
            assert not folded or len(cell.source.splitlines()) > SCREEN, cell.source


def test_students_have_the_same_folds(path, chapter):
    pytest.importorskip("nbgrader")
    edition = {cell.id: cell for cell in student_edition(read_chapter(path)).cells}
    for cell in code(chapter):
        if role(cell) != "solution":
            assert folds(edition[cell.id]) == folds(cell), cell.source


def test_links_to_files_hold(path, chapter):
    for cell in prose(chapter):
        for target in re.findall(
            r"\]\((?!https?:|#|attachment:)([^)\s]+)\)", cell.source
        ):
            assert (path.parent / target.split("#")[0]).exists(), target


# ------------------------------------------------------------------------------ anatomy


def test_the_first_cell_says_what_to_expect(chapter):
    first = chapter.cells[0].source
    for words in (
        "claim",
        "You will build",
        "minutes? to read",
        "minutes? to run",
        "You need",
    ):
        assert re.search(words, first), f"the first cell does not say: {words}"


def test_sections_in_order(chapter):
    headings = list(sections(chapter))
    assert len(headings) == len(SECTIONS), headings
    for heading, expected in zip(headings, SECTIONS):
        assert heading.startswith(expected), f"{heading!r} where {expected!r} should be"


def test_the_idea_is_drawn(chapter):
    assert pictures(section(chapter, "The idea"))


def test_each_step_of_the_derivation_is_shown(chapter):
    cells = section(chapter, "Derivation")
    steps = [
        at
        for at, cell in enumerate(cells)
        if cell.cell_type == "markdown" and cell.source.startswith("### ")
    ]
    assert len(steps) >= 3
    for start, end in zip(steps, [*steps[1:], len(cells)]):
        assert any(
            cell.cell_type == "code" and cell.outputs for cell in cells[start:end]
        ), cells[start].source[:80]


def test_build_it(chapter):
    cells = section(chapter, "Build it")
    (toy,) = [cell for cell in cells if role(cell) == "toy"]
    assert len([line for line in toy.source.splitlines() if line.strip()]) <= 25
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    assert any(re.search(r"^show\(", source, re.M) for source in sources), (
        "the package's class is not shown"
    )
    assert any("grad" in source and "assert" in source for source in sources), (
        "gradients are not compared"
    )


def test_laws_are_asserted(chapter):
    assert (
        sum(
            cell.source.count("assert ")
            for cell in section(chapter, "Laws")
            if cell.cell_type == "code"
        )
        >= 4
    )


def test_experiment_trains_and_shows(chapter):
    cells = section(chapter, "Experiment")
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert "train(" in text and "generate(" in text and "table(" in text
    assert pictures(cells)


def test_claims_are_judged(chapter):
    cells = [
        cell
        for cell in section(chapter, "Claim check")
        if "claim(" in cell.source and cell.cell_type == "code"
    ]
    assert len(cells) >= 3
    for cell in cells:
        said = "".join(text_of(output) for output in cell.outputs)
        assert re.search(r"\*\*\S+ (RIGHT|WRONG|DEPENDS)\.\*\*", said), cell.source


def test_mistakes_are_made_on_purpose(chapter):
    cells = section(chapter, "What goes wrong")
    assert 2 <= sum(cell.source.startswith("### ") for cell in cells) <= 4
    assert (
        sum("ymptom" in cell.source for cell in cells if cell.cell_type == "markdown")
        >= 2
    )


def test_exercises(chapter):
    cells = section(chapter, "Exercises")
    exercises = {}
    for cell in cells:
        if "exercise" in cell.metadata.get("minipeft", {}):
            exercises.setdefault(cell.metadata.minipeft.exercise, {})[role(cell)] = cell
    assert 3 <= len(exercises) <= 6
    for name, parts in exercises.items():
        assert list(parts) == ["question", "stub", "check", "hint", "solution"], name
        assert re.search(r"difficulty [123]", parts["question"].source), name
        assert re.search(r"\d+ minutes", parts["question"].source), name
        assert (
            "raise NotImplementedError" in parts["stub"].source
            or "= None" in parts["stub"].source
        ), name
        assert parts["hint"].source.startswith("<details>"), name
        solution = parts["solution"]
        assert solution.metadata.get("jupyter", {}).get("source_hidden") is True, name
        assert (
            "### BEGIN SOLUTION" in solution.source
            and "### END SOLUTION" in solution.source
        ), name
        assert "raise NotImplementedError" not in solution.source, name
        (checker,) = set(re.findall(r"check\.(\w+)\(", parts["check"].source))
        assert (
            callable(getattr(check, checker)) and f"check.{checker}(" in solution.source
        ), name
        assert "Not yet" in text_of(parts["check"].outputs[-1]), (
            f"{name}: the blank stub is not refused"
        )
        assert "Right" in text_of(solution.outputs[-1]), (
            f"{name}: the solution is not accepted"
        )
        assert parts["check"].metadata.minipeft.points > 0, name


def test_every_check_has_wrong_answers():
    """For each check, some test_checks_NN.py holds the solution and at least four wrong
    answers."""
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in Path(__file__).parent.glob("test_checks_*.py")
    )
    cells = [
        cell for path in CHAPTERS for cell in nbformat.read(path, as_version=4).cells
    ]
    for cell in (cell for cell in cells if role(cell) == "check"):
        name = re.search(r"check\.(\w+)\(", cell.source)[1]
        # partial: with its keywords
        judged = rf"(accepts|partial|judge)\(\s*check\.{name},"
        assert re.search(judged, text), name
        tables = [
            part
            for part in text.split("@pytest.mark.parametrize(")
            if re.search(rf"check\.{name}\b", part)
        ]
        # four, and the blank stub: each opens a bracket at the depth of the list
        answers = [len(re.findall(r"^        \(", table, re.M)) for table in tables]
        assert max(answers, default=0) >= 5, name


def test_practice_and_summary(chapter):
    practice = "\n".join(cell.source for cell in section(chapter, "In practice"))
    assert "peft" in practice
    summary = "\n".join(cell.source for cell in section(chapter, "Summary"))
    assert summary.count("<details>") >= 4, "recall questions have folded answers"
    assert summary.count("<details>") == summary.count("</details>")
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{4,5}", summary), (
        "references have arXiv ids"
    )


def test_the_list_of_chapters_is_whole():
    listed = (ROOT / "chapters" / "README.md").read_text(encoding="utf-8")
    numbers = re.findall(r"^\| (\d\d) \|", listed, re.M)
    assert numbers == [f"{number:02}" for number in range(1, 19)]
    for path in CHAPTERS:
        assert f"({path.name})" in listed, (
            f"chapters/README.md does not link {path.name}"
        )
    for target in re.findall(r"\]\(([^)]+\.ipynb)\)", listed):
        assert (ROOT / "chapters" / target).exists(), (
            f"chapters/README.md links {target}, which is not there"
        )


def test_a_saved_notebook_keeps_the_order_of_lines_and_tables(tmp_path, monkeypatch):
    for name in ("TQDM_DISABLE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # so that the test's own end sets them back
    code = "print('a')\nprint('b', flush=True)\ndisplay('table')\nprint('c')"
    cells = [nbformat.v4.new_code_cell(code)]
    file = tmp_path / "01_order.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), file)
    execute(file)
    (cell,) = nbformat.read(file, as_version=4).cells
    assert [text_of(output) for output in cell.outputs] == ["a\nb\n", "'table'", "c\n"]
