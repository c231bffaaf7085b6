"""What every chapter has alike, whatever program opens it."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from minipeft.course import layout
from minipeft.course.layout import fold_code, install_source, lay_out, linked, role

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
NAMES = {"04": "04_lora.ipynb", "05": "05_lora_in_practice.ipynb", "09": "09_nf4.ipynb"}


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem, scope="module")
def pair(request):
    """A chapter as it is, and laid out."""
    before = nbformat.read(request.param, as_version=4)
    after = copy.deepcopy(before)
    lay_out(after, request.param)
    return before, after, request.param


class TestChapters:
    """All chapters, laid out in memory."""

    def test_a_second_time_changes_nothing(self, pair):
        _, after, path = pair
        again = copy.deepcopy(after)
        lay_out(again, path)
        assert nbformat.writes(again) == nbformat.writes(after)
        nbformat.validate(after)

    def test_code_and_outputs_stay(self, pair):
        before, after, _ = pair

        def of_the_chapter(notebook):
            return [
                (
                    cell.source,
                    json.dumps([o.get("data", o.get("text")) for o in outputs]),
                )
                for cell in notebook.cells
                if role(cell) != "install"
                and (outputs := cell.get("outputs", [])) is not None
                and cell.cell_type == "code"
            ]

        assert of_the_chapter(before) == of_the_chapter(after)
        counts = [c.execution_count for c in after.cells if c.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))

    def test_solutions_are_folded_for_every_reader(self, pair):
        _, after, _ = pair
        solutions = [cell for cell in after.cells if role(cell) == "solution"]
        assert solutions
        for cell in solutions:
            assert cell.metadata["jupyter"]["source_hidden"] is True
            assert "hide-input" in cell.metadata["tags"]
            assert cell.metadata["cellView"] == "form"

    def test_links_lead_to_chapters_and_on_and_back(self, pair):
        _, after, path = pair
        place = CHAPTERS.index(path)
        last = after.cells[-1]
        assert role(last) == "navigation" and "(README.md)" in last.source
        for other in CHAPTERS:
            near = other in CHAPTERS[max(0, place - 1) : place + 2] and other != path
            assert (f"({other.name})" in last.source) == near

    def test_the_second_cell_installs(self, pair):
        _, after, _ = pair
        assert role(after.cells[1]) == "install"
        assert [role(cell) for cell in after.cells].count("install") == 1


PNG = nbformat.v4.new_output("display_data", {"image/png": "x", "text/plain": "x"})
RECORD = 'json.loads(Path("../benchmarks/results/chapter01.json").read_text())'


def lines(number, first="a = 1"):
    return "\n".join([first, *("b = 2" for _ in range(number - 1))])


class TestFolds:
    """One rule for what is folded, whoever reads it."""

    @pytest.mark.parametrize(
        "source, outputs, folded",
        [
            (lines(40), [], False),
            (lines(41), [], True),
            (lines(41, "assert True"), [], True),
            (lines(12), [PNG], False),
            (lines(13), [PNG], True),
            (lines(13, "assert True"), [PNG], False),
            (lines(13, "class A: pass"), [PNG], False),
            (lines(13, "history = train(model)"), [PNG], False),
            (lines(13, "claim('x', 'y', True)"), [PNG], False),
            (lines(13, RECORD), [], True),
            (lines(12, RECORD), [], False),
            ("import os\n" * 13, [], True),
            ("import os\n" * 12, [], False),
            ("import os\n" * 6 + lines(7), [], False),
            ("%time\n" + lines(20), [], False),
        ],
    )
    def test_what_is_folded(self, source, outputs, folded):
        cell = nbformat.v4.new_code_cell(source, outputs=outputs)
        fold_code([cell])
        assert ("jupyter" in cell.metadata) == folded
        assert ("hide-input" in cell.metadata.get("tags", [])) == folded
        assert (cell.metadata.get("cellView") == "form") == folded

    def test_what_became_short_is_unfolded(self):
        own = {"jupyter": {"outputs_hidden": True}, "tags": ["nbval-skip"]}
        cell = nbformat.v4.new_code_cell(lines(50), metadata=copy.deepcopy(own))
        fold_code([cell])
        assert cell.metadata != own
        cell.source = lines(5)
        fold_code([cell])
        assert cell.metadata == own

    def test_a_notebook_that_is_no_chapter_gets_its_folds_alone(self, tmp_path):
        cells = [nbformat.v4.new_code_cell(lines(number)) for number in (5, 50)]
        path = tmp_path / "claims.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        layout.main([path])
        after = nbformat.read(path, as_version=4).cells
        assert [cell.source for cell in after] == [cell.source for cell in cells]
        assert [bool(cell.metadata) for cell in after] == [False, True]


class TestLinks:
    """Mentions become links, where Markdown can hold one."""

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("see chapter 04.", "see [chapter 04](04_lora.ipynb)."),
            ("Chapter 09", "[Chapter 09](09_nf4.ipynb)"),
            (
                "chapters 04 and 09",
                "chapters [04](04_lora.ipynb) and [09](09_nf4.ipynb)",
            ),
            (
                "chapters 04, 05 and 77",
                "chapters [04](04_lora.ipynb), [05](05_lora_in_practice.ipynb) and 77",
            ),
            ("chapter 77", "chapter 77"),
            ("chapter 041", "chapter 041"),
            ("# From chapter 04\\nchapter 4", "# From chapter 04\\nchapter 4"),
            (
                "# 05 On\\n\\nSee chapter 04.",
                "# 05 On\\n\\nSee [chapter 04](04_lora.ipynb).",
            ),
            ("`chapter 04` $chapter 04$", "`chapter 04` $chapter 04$"),
            ("[chapter 04](04_lora.ipynb)", "[chapter 04](04_lora.ipynb)"),
            ("```\\nchapter 04\\n```", "```\\nchapter 04\\n```"),
            (
                "<details><summary>chapter 04?</summary>\\n\\nIn chapter 04.",
                "<details><summary>chapter 04?</summary>\\n\\nIn [chapter 04]"
                "(04_lora.ipynb).",
            ),
        ],
    )
    def test_mentions(self, text, expected):
        text, expected = text.replace("\\n", "\n"), expected.replace("\\n", "\n")
        assert linked(text, NAMES) == expected
        assert linked(expected, NAMES) == expected


class TestInstall:
    """The cell that installs the course where it is absent."""

    def test_nothing_happens_where_it_is_there(self, monkeypatch):
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran"))
        exec(install_source(""), {})

    @pytest.fixture
    def absent(self, monkeypatch, tmp_path):
        ran = []
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "minipeft" else 1
        )
        monkeypatch.setattr(subprocess, "run", lambda cmd, check: ran.append(cmd))
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "chapters").mkdir()
        monkeypatch.chdir(tmp_path / "chapters")
        return tmp_path, ran

    def test_in_the_repository_it_installs_that(self, absent):
        root, ran = absent
        (root / "pyproject.toml").touch()
        exec(install_source("https://example.org/x"), {})
        (pip,) = ran
        assert pip[-1] == f"{root}[course,quant]" and str(root) in sys.path

    def test_alone_it_fetches_the_course(self, absent):
        root, ran = absent
        course = root / "chapters" / "minipeft-course"
        (course / "chapters").mkdir(parents=True)
        exec(install_source("https://example.org/x"), {})
        clone, pip = ran
        assert clone[-2:] == ["https://example.org/x", str(course)]
        assert pip[-1] == f"{course}[course,quant]"
        assert Path.cwd() == course / "chapters"

    def test_alone_and_without_an_address_it_says_so(self, absent):
        with pytest.raises(RuntimeError, match="folder of the whole course"):
            exec(install_source(""), {})

    def test_the_address_is_the_projects(self, tmp_path):
        assert layout.address(tmp_path) == ""
        file = tmp_path / "pyproject.toml"
        file.write_text("[project]\nname = 'x'\n")
        assert layout.address(tmp_path) == ""
        file.write_text("[project.urls]\nRepository = 'https://example.org/x'\n")
        assert layout.address(tmp_path) == "https://example.org/x"


def test_files_are_laid_out(tmp_path, capsys):
    """The command changes a file once."""
    folder = tmp_path / "chapters"
    folder.mkdir()
    path = folder / CHAPTERS[0].name
    path.write_bytes(CHAPTERS[0].read_bytes())
    layout.main([path])
    first = path.read_bytes()
    layout.main([path])
    assert path.read_bytes() == first


README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESSES = ["https://github.com/me/course", "https://git.example.org/me/course"]


class TestAddress:
    """One value of pyproject.toml; what needs it is left out while it is empty."""

    def test_readme_says_what_pyproject_says(self):
        assert layout.with_public_links(README, layout.address()) == README

    def test_without_an_address_nothing_pretends_to_have_one(self):
        plain = layout.with_public_links(README, "")
        for word in ("git clone", "colab", "github.io", "badge.svg", "OWNER"):
            assert word not in plain

    @pytest.mark.parametrize("address", ADDRESSES)
    def test_with_an_address_and_back(self, address):
        full = layout.with_public_links(README, address)
        assert f"git clone {address}\n" in full
        assert ("https://me.github.io/course/" in full) == ("github.com" in address)
        assert layout.with_public_links(full, "") == README
        assert layout.with_public_links(full, address) == full

    def test_chapters_open_in_colab(self, monkeypatch):
        assert "Colab" not in layout.navigation(CHAPTERS[1])
        monkeypatch.setattr(layout, "address", lambda: ADDRESSES[0])
        link = "colab.research.google.com/github/me/course/blob/main/chapters/02_"
        assert link in layout.navigation(CHAPTERS[1])
        monkeypatch.setattr(layout, "address", lambda: ADDRESSES[1])
        assert "Colab" not in layout.navigation(CHAPTERS[1])


class TestReadme:
    """What README promises a newcomer."""

    def test_three_lines_for_windows(self):
        block = README.split("Windows, or no `make`")[1].split("```")[1]
        commands = [line.split("  ")[0] for line in block.strip().splitlines()]
        assert commands == [
            "py setup_env.py",
            r".venv\Scripts\minipeft doctor",
            r".venv\Scripts\python lab.py",
        ]
        assert (ROOT / "setup_env.py").exists() and (ROOT / "lab.py").exists()

    def test_sizes_are_those_of_the_setup(self):
        import setup_env
        from minipeft import doctor

        for size in (*setup_env.DOWNLOAD.values(), *setup_env.ON_DISK.values()):
            assert f"{size:g} GB" in README
        sizes = {build.lower(): size for build, size in doctor.SIZES.items()}
        assert sizes == setup_env.ON_DISK

    def test_hours_are_those_of_the_chapters(self):
        minutes = []
        for path in CHAPTERS:
            first = nbformat.read(path, as_version=4).cells[0].source
            minutes.append(sum(map(int, re.findall(r"(\d+) minutes?", first))))
        hours = sum(minutes) / len(minutes) / 60
        assert 2.1 < hours < 2.6, "README says: two to three hours a chapter"
        assert 39 < 18 * hours < 45, "README says: some 42 hours for all eighteen"

    def test_the_container_runs_what_is_there(self):
        for name in ("Dockerfile", ".devcontainer/devcontainer.json"):
            text = (ROOT / name).read_text()
            assert "python setup_env.py" in text and "lab.py" in text
        docker = (ROOT / "Dockerfile").read_text()
        command = json.loads(re.search(r"^CMD (.+)$", docker, re.M)[1])
        assert command[:2] == [".venv/bin/python", "lab.py"]
        json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
