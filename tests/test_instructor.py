"""The instructor's guide: its code runs, its quotations are what the checks say, its
minutes are the chapters'."""

import ast
import re
from pathlib import Path

import nbformat

from minipeft.course import check

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "chapters" / "instructor.md").read_text(encoding="utf-8")


def said_by(checker):
    """All texts in the file of a check, and in the one that chapters share."""
    chapter = checker.__wrapped__.__module__.rpartition(".")[2]
    texts = []
    for name in (chapter, "kinds"):
        file = Path(check.__file__).parent / f"{name}.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_quotations_are_what_the_checks_say():
    quoted = re.findall(r"`(\w+)`: “([^”]+)”", GUIDE)
    assert len(quoted) >= 25
    for name, words in quoted:
        assert words.count("`") % 2 == 0, (name, "half of a code's marks", words)
        assert words.removeprefix("grad_A ") in said_by(getattr(check, name)), (
            name,
            words,
        )


def test_minutes_are_the_chapters():
    for path in sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb")):
        first = nbformat.read(path, as_version=4).cells[0].source
        part = re.search(rf"^## {path.stem[:2]} .*?(?=^## )", GUIDE, re.M | re.S)[0]
        read, exercises = (
            re.search(r"about (\d+) minutes to read", first)[1],
            re.search(r"take about (\d+) minutes", first)[1],
        )
        assert f"{read} to read" in part and f"{exercises} for" in part, path.stem
        assert first.splitlines()[0].removeprefix("# ") in part


def test_the_assignments_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    code = "\n".join(blocks).replace("STEPS, LIMIT = 80, 100", "STEPS, LIMIT = 2, 8")
    code = re.sub(r"\(([\d.e-]+),( [\d.e-]+,?)+\)", r"(\1,)", code)  # one rate for each
    scope = {"__name__": "assignments"}
    exec(compile(code, "instructor.md", "exec"), scope)
    assert (
        "Toeplitz" in scope["own_method"].data
        and "(IA)³" in scope["bake_off"].data
        and "WRONG: 6.8 million is r = 8" in scope["audit"]
    )
    numbers = [
        int(n.replace(",", ""))
        for n in re.findall(r"\| ([\d,]+) \|", scope["own_method"].data)
    ]
    assert numbers[0] < numbers[1]
