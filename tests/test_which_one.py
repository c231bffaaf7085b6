"""The decision page comes to an answer for every project, and each answer names a cell
of chapter 16 that is there."""

import itertools
import json
import re
from pathlib import Path

import pytest

from minipeft.course.which_one import (
    AIMS,
    MEMORIES,
    RULES,
    Project,
    decide,
    page,
    write_page,
)

CHAPTERS = Path(__file__).parents[1] / "chapters"
FIVE = {
    "the captain's voice, and a large base that does it when asked": (
        Project(aim="amplify", prompt_enough=True),
        "none: prompt it",
    ),
    "a handbook that changes every week": (
        Project(aim="facts", memory="full"),
        "none: retrieve it",
    ),
    "questions to one database, on a server with room": (
        Project(aim="teach", memory="full"),
        "full fine-tuning",
    ),
    "sixteen customers' skills, one card that holds the base in four bits": (
        Project(aim="teach", memory="4-bit base", tasks=16),
        "QLoRA",
    ),
    "two hundred authors' tones, thirty letters each": (
        Project(aim="amplify", tasks=200, examples=30),
        "(IA)³",
    ),
}


@pytest.mark.parametrize("name", FIVE)
def test_five_projects_come_to_their_answers(name):
    project, method = FIVE[name]
    answer = decide(project)
    assert answer.method.startswith(method)
    assert answer.cell in str(answer) and answer.why in str(answer)


def test_the_five_differ():
    assert len({decide(project).method for project, _ in FIVE.values()}) >= 3


def test_every_project_has_an_answer_and_every_answer_a_project():
    flags = [False, True]
    found = {
        decide(
            Project(
                aim=aim,
                memory=memory,
                tasks=tasks,
                examples=examples,
                prompt_enough=prompt,
                zero_latency=fast,
                keep_base=keep,
            )
        )
        for aim, memory, tasks, examples, prompt, fast, keep in itertools.product(
            AIMS, MEMORIES, (1, 16), (32, 2000), flags, flags, flags
        )
    }
    assert found == {rule.answer for rule in RULES}


@pytest.mark.parametrize("field", [{"aim": "teech"}, {"memory": "24 GB"}])
def test_what_is_no_choice_is_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Project(**field)


def headed_cells():
    """{heading of chapter 16: the code cells below it}"""
    text = (CHAPTERS / "16_bake_off.ipynb").read_text(encoding="utf-8")
    found = {}
    now = None
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        heading = re.match(r"#{2,3} (.+)", source)
        if cell["cell_type"] == "markdown" and heading:
            now = heading[1].strip()
        elif cell["cell_type"] == "code":
            found.setdefault(now, []).append(source)
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.answer.method)
def test_the_cell_is_there_and_asserts_what_the_answer_says(rule):
    cells = headed_cells()
    assert rule.answer.cell in cells, list(cells)
    shown = "\n".join(cells[rule.answer.cell])
    assert "assert " in shown or "finding(" in shown


def test_the_page_is_what_the_code_says(tmp_path):
    assert (CHAPTERS / "which_one.md").read_text(encoding="utf-8") == page()
    write_page(tmp_path)
    text = (tmp_path / "which_one.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert rule.question in text and rule.answer.method in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (CHAPTERS / target).exists()
