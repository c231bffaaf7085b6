"""`make lab` opens a copy of the chapters that is the learner's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import lab

ROOT = Path(__file__).parents[1]


def notebook(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    for number, cell in enumerate(cells):
        cell.id = f"c{number:03}"
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture
def course(tmp_path):
    """chapters/ with two notebooks, a page and a figure; `work` is absent."""
    chapters = tmp_path / "chapters"
    (chapters / "figures").mkdir(parents=True)
    (chapters / ".jupyterlab.json").write_text("{}")
    (chapters / "figures" / "one.png").write_bytes(b"picture")
    (chapters / "README.md").write_text("the chapters")
    nbformat.write(notebook("a = 1", "a + 1"), chapters / "01_one.ipynb")
    nbformat.write(notebook("b = 1"), chapters / "02_two.ipynb")
    return chapters, tmp_path / "work"


def as_saved_by_lab(path):
    """What opening and running writes: metadata, counts, outputs, no word changed."""
    opened = nbformat.read(path, as_version=4)
    opened.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)"},
        "language_info": {"name": "python", "version": "3.12.1"},
    }
    for cell in opened.cells:
        cell.execution_count = 7
        cell.metadata["trusted"] = True
        cell.outputs = [nbformat.v4.new_output("stream", text="run\n")]
    nbformat.write(opened, path)


def change_first_cell(path, source):
    changed = nbformat.read(path, as_version=4)
    changed.cells[0].source = source
    nbformat.write(changed, path)


def first_cell(path):
    return nbformat.read(path, as_version=4).cells[0].source


class TestCopy:
    """A copy follows chapters/ until the learner changes it, and then never again."""

    def test_the_first_start_copies_everything(self, course):
        chapters, work = course
        assert lab.copy_chapters(chapters, work) == []
        copied = {p.relative_to(work).as_posix() for p in work.rglob("*.*")}
        names = {"01_one.ipynb", "02_two.ipynb", "README.md", "figures/one.png"}
        assert copied == names | {lab.RECORD}
        for name in names:
            assert (work / name).read_bytes() == (chapters / name).read_bytes()

    def test_a_new_chapter_and_a_new_version_arrive(self, course):
        chapters, work = course
        lab.copy_chapters(chapters, work)
        nbformat.write(notebook("c = 1"), chapters / "03_three.ipynb")
        change_first_cell(chapters / "01_one.ipynb", "a = 2")
        (chapters / "README.md").write_text("three chapters")
        assert lab.copy_chapters(chapters, work) == []
        assert first_cell(work / "01_one.ipynb") == "a = 2"
        assert (work / "03_three.ipynb").exists()
        assert (work / "README.md").read_text() == "three chapters"

    def test_opening_and_running_is_no_change(self, course):
        chapters, work = course
        lab.copy_chapters(chapters, work)
        as_saved_by_lab(work / "01_one.ipynb")
        run = (work / "01_one.ipynb").read_bytes()
        assert lab.copy_chapters(chapters, work) == []
        assert (work / "01_one.ipynb").read_bytes() == run, "outputs stay until then"
        change_first_cell(chapters / "01_one.ipynb", "a = 2")
        assert lab.copy_chapters(chapters, work) == []
        assert first_cell(work / "01_one.ipynb") == "a = 2"

    @pytest.mark.parametrize("runs_it_too", [False, True])
    def test_a_learners_work_is_never_overwritten(self, course, runs_it_too):
        chapters, work = course
        lab.copy_chapters(chapters, work)
        change_first_cell(work / "01_one.ipynb", "a = 'mine'")
        if runs_it_too:
            as_saved_by_lab(work / "01_one.ipynb")
        (work / "README.md").write_text("my notes")
        mine = (work / "01_one.ipynb").read_bytes()
        assert lab.copy_chapters(chapters, work) == [], "nothing new, nothing to say"
        for version in ("a = 2", "a = 3"):
            change_first_cell(chapters / "01_one.ipynb", version)
            (chapters / "README.md").write_text(version)
            left = lab.copy_chapters(chapters, work)
            assert left == ["01_one.ipynb", "README.md"]
            assert (work / "01_one.ipynb").read_bytes() == mine
            assert (work / "README.md").read_text() == "my notes"
        (work / "01_one.ipynb").rename(work / "mine.ipynb")
        assert lab.copy_chapters(chapters, work) == ["README.md"]
        assert first_cell(work / "01_one.ipynb") == "a = 3"
        assert (work / "mine.ipynb").read_bytes() == mine

    def test_an_attachment_and_a_broken_file_are_work_too(self, course):
        chapters, work = course
        lab.copy_chapters(chapters, work)
        pasted = json.loads((work / "01_one.ipynb").read_text())
        pasted["cells"][0] |= {"cell_type": "markdown", "source": ["a = 1"]}
        pasted["cells"][0]["attachments"] = {"x.png": {"image/png": "eA=="}}
        (work / "01_one.ipynb").write_text(json.dumps(pasted))
        (work / "02_two.ipynb").write_text("{ half a notebo")
        for name in ("01_one.ipynb", "02_two.ipynb"):
            change_first_cell(chapters / name, "new = 1")
        assert lab.copy_chapters(chapters, work) == ["01_one.ipynb", "02_two.ipynb"]
        assert (work / "02_two.ipynb").read_text() == "{ half a notebo"

    @pytest.mark.parametrize("record", [None, "", "[]", "not JSON"])
    def test_without_its_record_nothing_is_replaced(self, course, record):
        chapters, work = course
        lab.copy_chapters(chapters, work)
        change_first_cell(chapters / "01_one.ipynb", "a = 2")
        if record is None:
            (work / lab.RECORD).unlink()
        else:
            (work / lab.RECORD).write_text(record)
        assert lab.copy_chapters(chapters, work) == ["01_one.ipynb"]
        assert first_cell(work / "01_one.ipynb") == "a = 1"
        change_first_cell(chapters / "02_two.ipynb", "b = 2")
        assert lab.copy_chapters(chapters, work) == ["01_one.ipynb"]
        assert first_cell(work / "02_two.ipynb") == "b = 2"

    def test_what_the_learner_adds_stays(self, course):
        chapters, work = course
        lab.copy_chapters(chapters, work)
        (work / "notes.md").write_text("mine")
        nbformat.write(notebook("x"), chapters / "notes.ipynb")
        (chapters / "notes.md").write_text("the course's own")
        assert lab.copy_chapters(chapters, work) == ["notes.md"]
        assert (work / "notes.md").read_text() == "mine"


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", *who, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_git_pull_brings_chapters_to_a_learner_who_has_worked(course, tmp_path):
    chapters, _ = course
    upstream = chapters.parent
    shutil.copy(ROOT / ".gitignore", upstream)
    git(upstream, "init", "-q", "-b", "main")
    git(upstream, "add", ".")
    git(upstream, "commit", "-qm", "one")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(upstream), str(clone))
    lab.copy_chapters(clone / "chapters", clone / "work")
    as_saved_by_lab(clone / "work" / "02_two.ipynb")
    change_first_cell(clone / "work" / "01_one.ipynb", "a = 'mine'")
    assert git(clone, "status", "--porcelain") == "", "no tracked file has changed"
    for name in ("01_one.ipynb", "02_two.ipynb"):
        change_first_cell(chapters / name, "new = 1")
    git(upstream, "commit", "-qam", "two")
    git(clone, "pull", "-q", "--ff-only")
    left = lab.copy_chapters(clone / "chapters", clone / "work")
    assert left == ["01_one.ipynb"]
    assert first_cell(clone / "work" / "01_one.ipynb") == "a = 'mine'"
    assert first_cell(clone / "work" / "02_two.ipynb") == "new = 1"
    assert git(clone, "status", "--porcelain") == ""


def test_relative_files_resolve_in_the_copy():
    """work/ stands where chapters/ stands, so ../benchmarks is the same folder."""
    assert lab.WORK.parent == lab.CHAPTERS.parent == ROOT
    assert subprocess.run(
        ["git", "check-ignore", "-q", "work/01_model.ipynb"], cwd=ROOT
    ).returncode in (0, 128)  # 128: not a git checkout


@pytest.mark.parametrize("system", ["posix", "nt"])
def test_lab_opens_at_the_copy(monkeypatch, capsys, system):
    monkeypatch.setattr(lab, "copy_chapters", lambda: ["04_lora.ipynb"])
    started = []
    monkeypatch.setattr(os, "execv", lambda python, command: started.append(command))
    done = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda cmd: started.append(cmd) or done)
    monkeypatch.setattr(lab.os, "name", system)
    try:
        lab.main(["--no-browser"])
    except SystemExit as stopped:
        assert system == "nt" and stopped.code == 3
    finally:
        monkeypatch.undo()
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert "--LabApp.default_url=/lab/tree/work/README.md" in command
    assert "--MappingKernelManager.transport_encryption=auto" in command
    assert command[-1] == "--no-browser"
    said = capsys.readouterr().out
    assert "work/04_lora.ipynb" in said and "yours stays" in said


@pytest.mark.parametrize(
    "user, arguments, added",
    [
        (0, [], True),
        (0, ["--no-browser", "--port", "9000"], True),
        (0, ["--allow-root"], False),
        (0, ["--ServerApp.allow_root=True"], False),
        (1000, ["--no-browser"], False),
        (None, [], False),
    ],
)
def test_root_is_let_in(monkeypatch, capsys, user, arguments, added):
    """JupyterLab refuses root, the user of containers and of rented machines."""
    if user is None:  # Windows
        monkeypatch.delattr(os, "geteuid", raising=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
    given = lab.as_root(arguments)
    assert given == (["--allow-root", *arguments] if added else arguments)
    assert ("You are root" in capsys.readouterr().out) == added
