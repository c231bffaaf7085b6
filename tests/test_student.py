"""The student's edition holds no answer and all the rest; nbgrader itself marks solved,
untouched and half-wrong work rightly."""

import copy
import csv
import json
import os
import re
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import nbformat
import pytest

from minipeft.cli import main
from minipeft.course import layout, variants
from minipeft.course.student import (
    StudentError,
    exercises,
    nbgrader_source,
    otter_tests,
    student_edition,
    write,
    write_all,
)

SOLUTION = re.compile(r"^### BEGIN SOLUTION\n(.*?)\n### END SOLUTION$", re.M | re.S)
ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
LORA = ROOT / "chapters" / "04_lora.ipynb"
HIDDEN = (
    "\n### BEGIN HIDDEN TESTS\nassert check.lora_delta(lora_delta), 'hidden'\n### END"
    " HIDDEN TESTS"
)


def read(path):
    return nbformat.read(path, as_version=4)


def imports_of(notebook):
    """The first code cell after the one that installs the course."""
    return next(
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and layout.role(cell) != "install"
    )


def changed(chapter, folder, change):
    """A copy of the chapter in `folder`, after change(its exercises, the notebook)."""
    notebook = read(chapter)
    change(exercises(notebook), notebook)
    path = folder / chapter.name
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chapter(tmp_path_factory):
    """Chapter 04's imports and exercises, with a hidden test: what a grader needs,
    without minutes of training."""
    notebook = read(LORA)
    imports = imports_of(notebook)
    notebook.cells = [
        notebook.cells[0],
        imports,
        *(
            cell
            for cell in notebook.cells
            if "exercise" in cell.metadata.get("minipeft", {})
        ),
    ]
    exercises(notebook)["lora_delta"]["check"].source += HIDDEN
    path = tmp_path_factory.mktemp("full") / LORA.name
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    """The folder of all chapters' editions."""
    folder = tmp_path_factory.mktemp("handout")
    write_all(CHAPTERS, folder)
    return folder


class TestStudentsEdition:
    """All chapters: the answers are gone, and nothing else."""

    @pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
    def test_nothing_but_the_answers_is_gone(self, path, handout):
        full, mine = read(path), read(handout / path.name)
        text = "\n".join(cell.source for cell in mine.cells)
        assert "BEGIN SOLUTION" not in text and "BEGIN HIDDEN" not in text
        assert not any(
            cell.outputs or cell.execution_count
            for cell in mine.cells
            if cell.cell_type == "code"
        )
        for name, cells in exercises(full).items():
            left = exercises(mine)[name]
            assert list(left) == ["question", "stub", "check", "hint"]
            for role in ("question", "check", "hint"):
                assert left[role].source == cells[role].source
            title = re.search(r"^### (.+)$", cells["question"].source, re.M)[1]
            assert title.split(":")[0] in left["stub"].source, (
                "the stub does not say which exercise it is"
            )
            assert ('raise NotImplementedError("' in left["stub"].source) == (
                "raise NotImplementedError" in cells["stub"].source
            )
            compile(left["stub"].source, name, "exec")
            answer = SOLUTION.search(cells["solution"].source)[1]
            assert answer not in text
        kept = [
            cell.source
            for cell in full.cells
            if "exercise" not in cell.metadata.get("minipeft", {})
        ]
        there = [
            cell.source
            for cell in mine.cells
            if "exercise" not in cell.metadata.get("minipeft", {})
        ]
        assert len(kept) == len(there)

    @pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
    def test_it_finds_its_files_wherever_it_lies(self, path, tmp_path):
        folder = tmp_path / "somewhere" / "else"
        mine = read(write(path, folder))
        for cell in mine.cells:
            if cell.cell_type == "code":
                # what may be absent stays as it is
                outside = re.findall(r"[\"'](\.\.(?:/[\w./-]*)?)[\"']", cell.source)
                assert not any((path.parent / name).exists() for name in outside), (
                    cell.source
                )
                for name in re.findall(r"[\"'](files/[\w./-]+)[\"']", cell.source):
                    assert (folder / name).is_file()
            else:
                for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)\)", cell.source):
                    assert (folder / target).is_file(), target

    @pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
    def test_the_exercises_can_be_worked_after_the_first_cell(self, path):
        """The stubs of the student's edition are refused, the solutions in their place
        accepted."""
        full = read(path)
        scope = {}
        exec(imports_of(full).source, scope)
        for number in range(variants.how_many(full)):
            check_exercises(variants.of_class(full, number), scope)

    def test_stubs_say_what_to_do_when_they_are_called(self):
        stub = exercises(student_edition(read(LORA)))["lora_delta"]["stub"].source
        scope = {}
        exec(stub, scope)
        with pytest.raises(
            NotImplementedError,
            match="Exercise 1: the update. Write your answer here, then run the check",
        ):
            scope["lora_delta"](1, 2, 3, 4)


def check_exercises(full, scope):
    mine = exercises(student_edition(full))
    for name, cells in exercises(full).items():
        call = re.search(r"check\.\w+\(.*\)", mine[name]["check"].source)[0]
        for source, right in (
            (mine[name]["stub"].source, False),
            (SOLUTION.search(cells["solution"].source)[1], True),
        ):
            exec(source, scope)
            verdict = eval(call, scope)
            assert bool(verdict) == right, (name, str(verdict))


ASKED = "Give BA, not B, of 17171 rows."


def with_variants(*listed):
    """A change of a chapter: its first exercise has these variants."""

    def change(cells, notebook):
        for exercise in cells.values():
            exercise["question"].metadata["minipeft"].pop("variants", None)
        question = next(iter(cells.values()))["question"]
        question.source += f" {ASKED}"
        question.metadata["minipeft"]["variants"] = list(listed)

    return change


class TestVariants:
    """Two classes do not share their answers."""

    @pytest.fixture
    def varied(self, chapter, tmp_path):
        change = with_variants({"BA": "AB", "B, of": "C, of"}, {"17171": "31313"})
        return changed(chapter, tmp_path, change)

    def test_classes_take_them_in_turn(self, varied, tmp_path):
        def handed(number):
            made = read(write(varied, tmp_path / str(number), variant=number))
            return [cell.source for cell in made.cells]

        plain, first, second, third = map(handed, range(4))
        assert plain == third
        assert second == [text.replace("17171", "31313") for text in plain]
        assert ASKED in "".join(plain)
        assert "Give AB, not C, of 17171 rows." in "".join(first)

    @pytest.mark.parametrize("grader", (None, "nbgrader", "otter"))
    def test_other_classes_are_not_told(self, varied, tmp_path, grader):
        made = write(varied, tmp_path / "out", grader=grader, variant=1)
        assert "variants" not in made.read_text(encoding="utf-8")
        assert "31313 rows" not in made.read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("variant", "message"),
        (
            ({"no such text": "x"}, "replaces 'no such text', which stands in none"),
            ({}, "must be a list of"),
            ({"BA": 3}, "must be a list of"),
            ({"": "x"}, "must be a list of"),
            ("BA", "must be a list of"),
        ),
    )
    def test_one_that_cannot_be_made_is_refused(
        self, chapter, tmp_path, variant, message
    ):
        path = changed(chapter, tmp_path, with_variants(variant))
        with pytest.raises(StudentError, match=message):
            write(path, tmp_path / "out", variant=1)
        assert not (tmp_path / "out").exists()

    def test_by_the_command(self, varied, tmp_path, capsys):
        out = tmp_path / "class"
        argv = ["student", str(varied), "--out", str(out), "--variant", "2"]
        assert main(argv) == 0
        assert "31313 rows" in (out / varied.name).read_text(encoding="utf-8")
        with pytest.raises(SystemExit):
            main([*argv[:-1], "-1"])
        assert "--variant" in capsys.readouterr().err


class TestWriting:
    """What stands in the way is never overwritten, and nothing is half-written."""

    def test_the_chapter_itself_is_left_alone(self, chapter, tmp_path):
        before, notebook = chapter.read_bytes(), read(chapter)
        as_it_was = copy.deepcopy(notebook)
        student_edition(notebook), nbgrader_source(notebook)
        assert notebook == as_it_was
        write(chapter, tmp_path)
        with pytest.raises(StudentError, match="perhaps with somebody's work: --force"):
            write(chapter, tmp_path)
        write(chapter, tmp_path, force=True)
        with pytest.raises(StudentError, match="is the chapter itself"):
            write(chapter, chapter.parent, force=True)
        assert chapter.read_bytes() == before

    @pytest.mark.parametrize("grader", [None, "nbgrader", "otter"])
    def test_one_that_cannot_be_written_stops_all(self, chapter, tmp_path, grader):
        first = changed(chapter, tmp_path, lambda cells, notebook: None)
        first = first.rename(tmp_path / "03_first.ipynb")
        out = tmp_path / "out"
        there = write(chapter, out, grader)
        before = there.read_bytes()
        with pytest.raises(StudentError, match="perhaps with somebody's work"):
            write_all([first, chapter], out, grader)
        assert len([*out.rglob("*.ipynb")]) == 1 and there.read_bytes() == before
        write_all([first, chapter], out, grader, force=True)
        assert len([*out.rglob("*.ipynb")]) == 2

    def test_two_of_one_name_would_be_one(self, chapter, tmp_path):
        other = changed(chapter, tmp_path, lambda cells, notebook: None)
        with pytest.raises(StudentError, match="two chapters would become"):
            write_all([chapter, other], tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestRefusals:
    """No solution and no hidden test survives, however it is marked."""

    def test_what_is_no_chapter_is_refused(self, chapter, tmp_path):
        with pytest.raises(StudentError, match="no such notebook"):
            write(tmp_path / "none.ipynb", tmp_path)
        for name in ("data.jsonl", "notes.md", "ipynb"):
            (tmp_path / name).write_text("{}")
            with pytest.raises(StudentError, match=rf"{name} is not a notebook"):
                write(tmp_path / name, tmp_path / "out")
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / "empty.ipynb")
        with pytest.raises(StudentError, match="has no exercises"):
            write(tmp_path / "empty.ipynb", tmp_path / "out")
        stripped = write(chapter, tmp_path / "once")
        with pytest.raises(StudentError, match="is it a student's edition already"):
            write(stripped, tmp_path / "twice")
        notebook = read(chapter)
        notebook.cells.append(
            nbformat.v4.new_code_cell("### BEGIN SOLUTION\n1\n### END SOLUTION")
        )
        with pytest.raises(StudentError, match="outside an exercise"):
            student_edition(notebook)

    @pytest.mark.parametrize("kind", ["code", "markdown", "raw"])
    @pytest.mark.parametrize(
        "text",
        [
            "### BEGIN SOLUTION\n42\n### END SOLUTION",
            "def f():\n    ### BEGIN SOLUTION\n    return 42\n    ### END SOLUTION",
            "### BEGIN SOLUTION\n42",
            "### BEGIN SOLUTION\r\n42\r\n### END SOLUTION\r\n",
            "### BEGIN SOLUTION   \n42\n### END SOLUTION\t",
            "#BEGIN SOLUTION\n42\n#END SOLUTION",
            "# BEGIN_SOLUTION\n42\n# END_SOLUTION",
            "## begin solution\n42\n## end solution",
            "<!-- BEGIN SOLUTION -->\n42\n<!-- END SOLUTION -->",
            "> ### BEGIN  SOLUTION\n> 42\n> ### END  SOLUTION",
            "42\n### END SOLUTION",
        ],
    )
    def test_a_solution_elsewhere(self, chapter, tmp_path, text, kind):
        cell = getattr(nbformat.v4, f"new_{kind}_cell")(text)
        path = changed(chapter, tmp_path, lambda cells, nb: nb.cells.append(cell))
        for grader in (None, "nbgrader", "otter"):
            with pytest.raises(StudentError, match="outside an exercise"):
                write(path, tmp_path / "out", grader)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("text", ["### BEGIN SOLUTION\n42", "END HIDDEN TESTS"])
    @pytest.mark.parametrize(
        "put",
        [
            lambda nb, text: nb.metadata.update(backup=text),
            lambda nb, text: nb.metadata.update(before=[{"cell": text}]),
            lambda nb, text: nb.cells[0].update(
                attachments={"a": {"text/plain": text}}
            ),
        ],
    )
    def test_outside_the_text_of_cells(self, chapter, tmp_path, put, text):
        path = changed(chapter, tmp_path, lambda cells, nb: put(nb, text))
        with pytest.raises(StudentError, match="metadata or an attachment"):
            write(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "text, message",
        [
            ("### BEGIN HIDDEN TESTS\nassert secret", "No end hidden tests"),
            ("    ### BEGIN HIDDEN TESTS  \nassert secret", "No end hidden tests"),
            ("### BEGIN HIDDEN TEST\nassert secret\n### END HIDDEN TEST", "be left"),
            ("# begin hidden tests\nassert secret\n# end hidden tests", "be left"),
            ("assert secret\n### END HIDDEN TESTS #", None),
            (HIDDEN + HIDDEN.split("\n### END")[0], "No end hidden tests"),
            ("### BEGIN HIDDEN TESTS\n### BEGIN HIDDEN TESTS\n1", "nested"),
        ],
    )
    def test_a_hidden_test_without_its_end(self, chapter, tmp_path, text, message):
        def change(cells, notebook):
            cells["lora_delta"]["check"].source += f"\n{text}"

        path = changed(chapter, tmp_path, change)
        if message is None:  # nbgrader takes the lone end away
            text = str(read(write(path, tmp_path / "out")))
            assert "HIDDEN" not in text
            return
        with pytest.raises(StudentError, match=message):
            write(path, tmp_path / "out")
        with pytest.raises(StudentError, match=message):
            write(path, tmp_path / "out", grader="nbgrader")

    @pytest.mark.parametrize(
        "old, new",
        [
            ("### BEGIN SOLUTION", "# the answer"),
            ("### END SOLUTION", ""),
            ("### BEGIN SOLUTION", "    ### BEGIN SOLUTION"),
            ("### END SOLUTION", "### END SOLUTION\n### END SOLUTION"),
            ("### BEGIN SOLUTION", "### END SOLUTION\n### BEGIN SOLUTION"),
        ],
    )
    def test_a_solution_without_its_markers(self, chapter, tmp_path, old, new):
        def change(cells, notebook):
            solution = cells["lora_delta"]["solution"]
            solution.source = solution.source.replace(old, new)

        path = changed(chapter, tmp_path, change)
        with pytest.raises(StudentError, match="exercise 'lora_delta' must stand"):
            write(path, tmp_path / "out")

    @pytest.mark.parametrize("ending", ["\r\n", "\r", " \n", "\t\n"])
    def test_a_solution_with_other_line_ends(self, chapter, tmp_path, ending):
        def change(cells, notebook):
            for cell in notebook.cells:
                cell.source = cell.source.replace("\n", ending)

        text = str(read(write(changed(chapter, tmp_path, change), tmp_path / "out")))
        assert "SOLUTION" not in text and "HIDDEN" not in text
        for cells in exercises(read(chapter)).values():
            assert SOLUTION.search(cells["solution"].source)[1] not in text

    @pytest.mark.parametrize(
        "metadata",
        [
            5,
            [],
            "lora_delta",
            {"exercise": 5, "role": "stub"},
            {"exercise": ["lora_delta"], "role": "stub"},
            {"exercise": "lora_delta"},
            {"exercise": "lora_delta", "role": "Solution"},
            {"exercise": "lora_delta", "role": None},
            {"role": "solution"},
        ],
    )
    def test_odd_metadata_names_its_cell(self, chapter, tmp_path, metadata):
        def change(cells, notebook):
            notebook.cells[3].metadata["minipeft"] = metadata

        path = changed(chapter, tmp_path, change)
        with pytest.raises(StudentError, match="cell 4 has the metadata .*expected an"):
            write(path, tmp_path / "out")

    def test_a_question_without_a_heading(self, chapter, tmp_path):
        def change(cells, notebook):
            cells["lora_delta"]["question"].source = 'Write "it".'

        mine = read(write(changed(chapter, tmp_path, change), tmp_path / "out"))
        stub = exercises(mine)["lora_delta"]["stub"].source
        compile(stub, "stub", "exec")
        assert 'NotImplementedError("lora_delta. Write your answer here' in stub

    @pytest.mark.parametrize(
        "heading", ['### What is "r"?', r"### $\alpha\nu$", "### \\"]
    )
    def test_any_heading_gives_a_stub_that_runs(self, chapter, tmp_path, heading):
        def change(cells, notebook):
            cells["lora_delta"]["question"].source = heading

        mine = read(write(changed(chapter, tmp_path, change), tmp_path / "out"))
        compile(exercises(mine)["lora_delta"]["stub"].source, "stub", "exec")

    @pytest.mark.parametrize("points", [None, "2", -1, True, float("nan"), [1]])
    def test_points_that_are_none(self, chapter, tmp_path, points):
        def change(cells, notebook):
            metadata = cells["lora_delta"]["check"].metadata["minipeft"]
            del metadata["points"]
            if points is not None:
                metadata["points"] = points

        path = changed(chapter, tmp_path, change)
        write(path, tmp_path / "out")  # only nbgrader needs them
        with pytest.raises(StudentError, match="'lora_delta' has points = "):
            write(path, tmp_path / "course", grader="nbgrader")
        assert not (tmp_path / "course").exists()

    def test_without_nbgrader_it_says_how_to_install_it(
        self, chapter, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, "nbgrader.preprocessors", None)
        with pytest.raises(StudentError, match=r"pip install 'minipeft\[teach\]'"):
            write(chapter, tmp_path / "out")


class TestFilesTakenAlong:
    """What a chapter links to is copied, and nothing else."""

    def test_nothing_outside_the_course(self, chapter, tmp_path, capsys):
        course = tmp_path / "course"
        (course / "chapters").mkdir(parents=True)
        (course / "pyproject.toml").touch()
        for name in ("secret.txt", "course/data.json", "course/chapters/a.png"):
            (tmp_path / name).write_text(name)
        (course / "chapters" / "link.txt").symlink_to(tmp_path / "secret.txt")
        prose = nbformat.v4.new_markdown_cell(
            f"[a](a.png) [b](../../secret.txt) [c]({tmp_path}/secret.txt) [d](link.txt)"
            " [e](b/../../data.json)"
        )
        code = nbformat.v4.new_code_cell(
            'open("../data.json"), open("../../secret.txt")'
        )
        (course / "chapters" / "b").mkdir()

        def change(cells, notebook):
            notebook.cells += [prose, code]

        path = changed(chapter, course / "chapters", change)
        out = tmp_path / "out"
        written = read(write(path, out))
        files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
        assert files == {"04_lora.ipynb", "README.md", "a.png", "files/data.json"}
        assert written.cells[-1].source == (
            'open("files/data.json"), open("../../secret.txt")'
        )
        assert "[e](files/data.json)" in written.cells[-2].source
        assert capsys.readouterr().out.count("outside the course: not copied") == 4


def links(path):
    """Files that a notebook or a page links to."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = read(path).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    found = re.findall(r"\]\((?!https?:|attachment:|#)([^)\s#]+)", text)
    return found + re.findall(r"(?:href|src)=[\"'](?!https?:|#)([^\"'#]+)", text)


class TestHandout:
    """A folder that stands for itself: its README says what it is, no link is dead."""

    @pytest.mark.parametrize("grader", [None, "nbgrader", "otter"])
    @pytest.mark.parametrize("names", [["04_lora"], ["16_bake_off"], ["01", "02"], ""])
    def test_no_link_is_dead(self, tmp_path, grader, names):
        chosen = [path for path in CHAPTERS if path.stem.startswith(tuple(names))]
        chosen = chosen or CHAPTERS
        made = write_all(chosen, tmp_path / "out", grader)
        pages = [*(tmp_path / "out").rglob("*.md"), *made]
        assert len(pages) >= len(made) + len({path.parent for path in made})
        for page in pages:
            for link in links(page):
                assert (page.parent / link).is_file(), (page, link)
        for path in made:
            about = (path.parent / "README.md").read_text(encoding="utf-8")
            assert f"]({path.name})" in about and "jupyter lab" in about
            assert "You teach" not in about and "olutions are folded" not in about
            assert not (path.parent / "instructor.md").exists()

    def test_chapters_that_are_handed_out_link_to_each_other(self, tmp_path):
        both = write_all(CHAPTERS[:2], tmp_path / "both")
        assert CHAPTERS[1].name in links(both[0])
        alone = write(CHAPTERS[0], tmp_path / "alone")
        assert not any(name.endswith(".ipynb") for name in links(alone))
        # the words stay
        words = re.sub(r"\]\([^)]*\)|\[", "", read(both[0]).cells[-1].source)
        found = re.sub(r"\]\([^)]*\)|\[", "", read(alone).cells[-1].source)
        assert found == words and layout.title(read(CHAPTERS[1])) in found

    def test_a_later_chapter_joins_the_list(self, tmp_path):
        for path in CHAPTERS[2:4]:
            write(path, tmp_path)
        assert {"03_intrinsic_dimension.ipynb", "04_lora.ipynb"} <= {
            *links(tmp_path / "README.md")
        }

    @pytest.mark.parametrize("text", ["my own words", "", "# The handouts"])
    def test_a_readme_of_ones_own_stays(self, tmp_path, text):
        (tmp_path / "README.md").write_text(text)
        write(LORA, tmp_path)
        assert (tmp_path / "README.md").read_text() == text

    def test_pages_that_link_to_pages(self, chapter, tmp_path):
        course = tmp_path / "course"
        (course / "chapters").mkdir(parents=True)
        (course / "pyproject.toml").touch()
        (course / "deep").mkdir()
        (course / "chapters" / "a.md").write_text("[b](../deep/b.md#part) [c](nope.md)")
        (course / "deep" / "b.md").write_text(
            "[back](../chapters/a.md) [it](../chapters/04_lora.ipynb)"
            " [other](../chapters/05.ipynb)"
        )
        (course / "chapters" / "05.ipynb").touch()

        def change(cells, notebook):
            prose = "[a [x]](a.md) [folder](../deep) [no](05.ipynb)"
            notebook.cells.append(nbformat.v4.new_markdown_cell(prose))

        path = changed(chapter, course / "chapters", change)
        written = read(write(path, tmp_path / "out")).cells[-1].source
        assert written == "[a [x]](a.md) folder no"
        a = (tmp_path / "out" / "a.md").read_text()
        b = (tmp_path / "out" / "files" / "deep" / "b.md").read_text()
        assert a == "[b](files/deep/b.md#part) [c](nope.md)"
        assert b == "[back](../../a.md) [it](../../04_lora.ipynb) other"

    def test_a_full_disk_names_the_target(self, tmp_path, capsys, monkeypatch):
        """shutil's error has the file read first, and the one written second."""

        def full(source, target):
            raise OSError(28, "No space left on device", source, None, target)

        monkeypatch.setattr("shutil.copyfile", full)
        out = tmp_path / "out"
        assert main(["student", str(LORA), "--out", str(out)]) == 1
        said = capsys.readouterr().err
        assert re.fullmatch(
            rf"minipeft: {out}/[\w/.-]+: No space left on device\n", said
        )
        assert "/." not in said.replace(str(tmp_path), "")


class TestCommand:
    def test_the_command(self, chapter, tmp_path, capsys):
        assert main(["student", str(chapter), "--out", str(tmp_path / "one")]) == 0
        assert (tmp_path / "one" / chapter.name).is_file()
        assert main(["student", "--all", "--out", str(tmp_path / "all")]) == 0
        assert sorted(path.name for path in (tmp_path / "all").glob("*.ipynb")) == [
            path.name for path in CHAPTERS
        ]
        assert (
            main(
                [
                    "student",
                    str(chapter),
                    "--nbgrader",
                    "--out",
                    str(tmp_path / "course"),
                ]
            )
            == 0
        )
        assert (tmp_path / "course" / "nbgrader_config.py").is_file()
        for names in (["nope.ipynb"], [str(chapter)], [str(chapter), "nope.ipynb"]):
            argv = ["student", "--all", *names, "--out", str(tmp_path / "none")]
            assert main(argv) == 1 and not (tmp_path / "none").exists()
        assert (
            main(["student", "--out", str(tmp_path)]) == 1
            and main(["student", "no.ipynb", "--out", str(tmp_path)]) == 1
        )
        assert main(["student", "04_lra.ipynb", "--out", str(tmp_path)]) == 1
        out, err = capsys.readouterr()
        assert "(did you mean '04_lora.ipynb'?)" in err and "chapters has others" in err
        assert (
            "nbgrader generate_assignment 04_lora" in out
            and "name a chapter" in err
            and "--all takes every chapter" in err
            and "no such notebook" in err
        )


def nbgrader(course, *argv):
    # as in an activated environment: nbgrader calls its own helpers by name
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *argv],
        cwd=course,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def says_why(marked):
    """The student sees the check's message, not a bare assertion."""
    said = str(
        [
            cell.outputs
            for cell in marked.cells
            if cell.metadata.get("nbgrader", {}).get("grade_id") == "lora_delta-check"
        ]
    )
    assert "forget to divide by r" in said


def says_right(marked):
    for cell in marked.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            # shown, and not the cell's value, which nbgrader takes for points
            (shown,) = cell.outputs
            assert shown.output_type == "display_data"
            assert "RIGHT" in str(shown.data).upper()


def hand_in(course, student, answers):
    """What a student hands in: the released notebook with these answers put in the
    place of the stubs."""
    notebook = read(course / "release" / "04_lora" / "04_lora.ipynb")
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = answers.get(name, cell.source)
    folder = course / "submitted" / student / "04_lora"
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / "04_lora.ipynb")


class TestNbgrader:
    @pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
    def test_nbgrader_takes_every_chapters_cells(self, path):
        from nbgrader.nbgraderformat import MetadataValidator

        source = nbgrader_source(read(path))
        nbformat.validate(source)
        MetadataValidator().validate_nb(source)
        marks = [
            cell.metadata["nbgrader"]
            for cell in source.cells
            if "nbgrader" in cell.metadata
        ]
        assert len({each["grade_id"] for each in marks}) == len(marks)
        assert all(
            each["points"] > 0 and each["locked"] for each in marks if each["grade"]
        )
        assert (
            sum(each["solution"] for each in marks)
            == sum(each["grade"] for each in marks)
            == len(exercises(read(path)))
        )
        for cell in source.cells:
            if cell.metadata.get("nbgrader", {}).get("grade"):
                assert "assert verdict, verdict" in cell.source

    def test_nbgrader_marks_as_it_should(self, chapter, tmp_path):
        course = tmp_path / "course"
        write(chapter, course, grader="nbgrader")
        nbgrader(course, "generate_assignment", "04_lora")
        released = read(course / "release" / "04_lora" / "04_lora.ipynb")
        text = "\n".join(cell.source for cell in released.cells)
        right = {
            name: SOLUTION.search(cells["solution"].source)[1]
            for name, cells in exercises(read(chapter)).items()
        }
        assert (
            not any(answer in text for answer in right.values())
            and "hidden" not in text
        )
        assert text.count('raise NotImplementedError("Exercise') >= 5
        hand_in(course, "solved", right)
        hand_in(course, "untouched", {})
        slip = "def lora_delta(A, B, alpha, r):\n    return alpha * B @ A"
        hand_in(course, "nearly", right | {"lora_delta": slip})
        warned = nbgrader(course, "autograde", "04_lora")
        assert "partial credit" not in warned and "full credit" not in warned, warned
        assert "Traceback" not in warned
        nbgrader(course, "export", "--to", "grades.csv")
        with open(course / "grades.csv", newline="") as file:
            score = {
                row["student_id"]: (float(row["score"]), float(row["max_score"]))
                for row in csv.DictReader(file)
            }
        points = {
            name: cells["check"].metadata["minipeft"]["points"]
            for name, cells in exercises(read(chapter)).items()
        }
        full = sum(points.values())
        assert score == {
            "solved": (full, full),
            "untouched": (0, full),
            "nearly": (full - points["lora_delta"], full),
        }
        for student, judge in (("nearly", says_why), ("solved", says_right)):
            judge(read(course / "autograded" / student / "04_lora" / "04_lora.ipynb"))


class TestOtter:
    """Tests that Otter-Grader reads; Gradescope runs its autograder.zip."""

    def test_each_answer_is_judged_by_its_check(self, chapter, tmp_path, monkeypatch):
        """Without Otter: its decorator is only a mark."""
        fake = types.ModuleType("otter.test_files")
        fake.test_case = lambda **about: lambda function: function
        monkeypatch.setitem(sys.modules, "otter.test_files", fake)
        made = write(chapter, tmp_path, "otter")
        assert made == tmp_path / "04_lora" / "04_lora.ipynb"
        full = read(chapter)
        env = {}
        exec(imports_of(full).source, env)
        for name, cells in exercises(full).items():
            test = {}
            path = made.parent / "tests" / f"{name}.py"
            exec(path.read_text(encoding="utf-8"), test)
            assert test["name"] == name and not test["OK_FORMAT"]
            assert test["points"] == cells["check"].metadata["minipeft"]["points"]
            exec(cells["stub"].source, env)
            with pytest.raises(AssertionError, match="Not yet"):
                test["test_answer"](env)
            exec(SOLUTION.search(cells["solution"].source)[1], env)
            test["test_answer"](env)

    @pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
    def test_every_chapter_has_them(self, path):
        assert otter_tests(read(path)).keys() == exercises(read(path)).keys()

    def test_otter_itself(self, chapter, tmp_path):
        pytest.importorskip("otter", reason="otter-grader is not installed")
        folder = write(chapter, tmp_path, "otter").parent
        cells = exercises(read(chapter))
        solved = read(folder / chapter.name)
        name, first = next(iter(cells.items()))
        exercises(solved)[name]["stub"].source = first["solution"].source
        nbformat.write(solved, folder / "handed_in.ipynb")
        run = partial(subprocess.run, cwd=folder, capture_output=True, text=True)
        otter = [sys.executable, "-m", "otter"]
        for argv in (["generate"], ["run", "-a", "autograder.zip", "handed_in.ipynb"]):
            done = run([*otter, *argv])
            assert done.returncode == 0, done.stderr[-2000:]
        marks = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        scores = {t["name"]: t.get("score", 0) for t in marks["tests"]}
        points = first["check"].metadata["minipeft"]["points"]
        assert scores[name] == points
        assert not any(scores[other] for other in cells if other != name)

    def test_a_check_that_cannot_be_found(self, chapter, tmp_path):
        def change(cells, notebook):
            cells["lora_delta"]["check"].source = "verdict = check.lora_delta(f)"

        path = changed(chapter, tmp_path, change)
        with pytest.raises(StudentError, match="must call check.something"):
            write(path, tmp_path / "out", "otter")
