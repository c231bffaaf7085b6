"""The examples in README, in the help and in the guides: they answer right, each writes
into a folder of its own, and git ignores these folders."""

import contextlib
import io
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest
import torch

from minipeft import cli_options
from minipeft.lanternwick import scoring
from minipeft.lm import generate

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "chapters").glob("*.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ANSWERS = {
    "Name each resident of Tide Street.": (
        "SELECT name FROM residents WHERE street = 'Tide Street' ;"
    ),
    "Count the residents with a cat.": (
        "SELECT COUNT(*) FROM residents WHERE pet = 'cat' ;"
    ),
    "Name the youngest resident with a squirrel.": (
        "SELECT name FROM residents WHERE pet = 'squirrel' ORDER BY age LIMIT 1 ;"
    ),
}


def documents():
    """The text of all that names commands: pages, help, chapters, scripts."""
    yield from (page.read_text(encoding="utf-8") for page in PAGES)
    yield from (text for text in vars(cli_options).values() if isinstance(text, str))
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        yield "\n".join(cell.source for cell in cells)
    for folder in ("benchmarks", "minipeft"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "cli_options.py":
                yield path.read_text(encoding="utf-8").partition('"""\n')[0]


def folders():
    """{folder: the commands that write it} in all documents."""
    found = defaultdict(set)
    command = re.compile(
        r"(?:minipeft|python) [^\n`]*?--(?:out|keep|log)[ =](?P<out>[a-z][\w-]*)"
        r"|\.save_pretrained\(\"(?P<saved>[a-z][\w-]*)\"\)  # Hugging Face"
    )
    for text in documents():
        for match in command.finditer(text):
            line = match[0].replace("python -m minipeft", "minipeft")
            found[match["out"] or match["saved"]].add(line)
    found["base"].add("minipeft pretrain")  # the default
    return found


def test_examples_write_into_folders_of_their_own():
    """Whoever types one after the other meets no folder of another command."""
    found = folders()
    assert {"my-adapter", "sql-lora", "handout", "course", "base"} <= found.keys()
    runs = found.pop("runs")  # a log, which several runs share
    assert all("--log runs" in command for command in runs)
    for folder, commands in found.items():
        assert len(commands) == 1, (folder, commands)


def test_an_adapter_that_is_read_was_made_just_before():
    for text in (README, cli_options.ABOUT):
        used = list(re.finditer(r"--adapter ([\w-]+)", text))
        assert used
        for match in used:
            made = re.findall(r"finetune .*--out ([\w-]+)", text[: match.start()])
            assert made[-1:] == [match[1]]


def test_git_ignores_what_the_examples_make():
    for folder in folders():
        command = ["git", "check-ignore", "--quiet", f"{folder}/file"]
        status = subprocess.run(command, cwd=ROOT, capture_output=True).returncode
        if status == 128:
            pytest.skip("not a git checkout")
        assert status == 0, f"{folder}/ is not in .gitignore"
    for kept in ("data/base/README.md", "minipeft/course/show.py"):
        command = ["git", "check-ignore", "--quiet", "--no-index", kept]
        assert subprocess.run(command, cwd=ROOT).returncode == 1, kept


@pytest.fixture(scope="module")
def readmes_block(tmp_path_factory):
    """(the names that README's Python block defines, what it prints)"""
    block = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert "evaluate(model, tokenizer, sql)" in block
    block = block.replace("tokenizer, sql))", "tokenizer, sql, limit=20))")
    scope, printed = {}, io.StringIO()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fastest for a model this small on a busy machine
    with (
        contextlib.chdir(tmp_path_factory.mktemp("readme")),
        contextlib.redirect_stdout(printed),
    ):
        exec(compile(block, "README.md", "exec"), scope)
        assert (Path("my-adapter") / "adapter_model.safetensors").is_file()
    torch.set_num_threads(threads)
    return scope, printed.getvalue()


def test_readmes_block_ends_in_the_right_answer(readmes_block):
    _, printed = readmes_block
    right = ANSWERS["Name each resident of Tide Street."]
    assert printed.splitlines()[-1].strip() == right


def test_examples_are_answered_rightly(readmes_block):
    """Every question of a page or of the help, by the model of README's block."""
    scope, _ = readmes_block
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    asked = re.findall(
        r"Question: ([^\n]*?)\\n *SQL:", "\n".join([*pages, cli_options.ABOUT])
    )
    assert len(asked) >= 4 and set(asked) == ANSWERS.keys()
    for question, right in ANSWERS.items():
        prompt = f"Question: {question}\nSQL:"
        sql = generate(scope["model"], scope["tokenizer"], prompt)
        expected = scoring.answer(right)
        assert expected and scoring.answer(sql) == expected, (question, sql)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_fits_beside_the_contents(page):
    """A line of a page's code or output is read without scrolling sideways."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```.*?^```", text, re.M | re.S):
        for line in block.splitlines():
            assert len(line) <= 88, line


def test_all_say_how_long_the_demo_takes():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo = (ROOT / "benchmarks" / "demo.py").read_text(encoding="utf-8")
    for text in (README, makefile, demo):
        line = next(line for line in text.splitlines() if "make demo" in line)
        assert "half a minute" in line, line
