"""Where a learner's code stopped: the message quotes the expression, and says what its
names held."""

import linecache

import pytest
import torch
from torch import nn

from minipeft.course import check
from minipeft.course.check.stop import place


def answer(source: str):
    """The function f that a cell defines; its lines can be quoted, as a notebook's."""
    lines = source.splitlines(keepends=True)
    linecache.cache["<cell>"] = len(source), None, lines, "<cell>"
    values = {"torch": torch, "nn": nn}
    exec(compile(source, "<cell>", "exec"), values)
    return values["f"]


def stopped(source: str, *args) -> str:
    with pytest.raises(Exception) as caught:
        answer(source)(*args)
    return place(caught.value)


X, A = torch.zeros(4, 5), torch.zeros(3, 6)


@pytest.mark.parametrize(
    "line, said",
    [
        ("x @ A.T", "`x @ A.T`: x is (4, 5), A is (3, 6)"),
        ("2 + (x @ A) + x", "`x @ A`: x is (4, 5), A is (3, 6)"),  # the part alone
        ("x.view(-1, 7)", "`x.view(-1, 7)`: x is (4, 5)"),
        ("x[9]", "`x[9]`: x is (4, 5)"),
        ("A.foo", "`A.foo`: A is (3, 6)"),
        ("None + A", "`None + A`: A is (3, 6)"),
        ("x + torch.ones(2, 7)", "`x + torch.ones(2, 7)`: x is (4, 5)"),
        ("[1, 2][len(x)]", "`[1, 2][len(x)]`: x is (4, 5)"),
    ],
)
def test_the_part_that_failed_is_quoted_with_what_it_held(line, said):
    text = stopped(f"def f(x, A):\n    y = x\n    return {line}\n", X, A)
    assert text == f" (line 3 of your cell, at {said})"


@pytest.mark.parametrize(
    "value, said",
    [
        (None, "v is None"),
        ([1, 2], "v is a list of 2"),
        ("text", "v is 'text'"),
        (torch.tensor(3), "v is one number int64"),
        (torch.zeros(2, dtype=torch.bool), "v is (2,) bool"),
    ],
)
def test_values_in_a_few_words(value, said):
    text = stopped("def f(v, x):\n    return v @ x\n", value, X)
    assert f": {said}, x is (4, 5))" in text


def test_an_expression_over_two_lines_is_one():
    source = "def f(x, A):\n    return (\n        x\n        @ A.T\n    )\n"
    said = " (line 3 of your cell, at `x @ A.T`: x is (4, 5), A is (3, 6))"
    assert stopped(source, X, A) == said


def test_the_attributes_of_a_module():
    source = (
        "class M(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.A = nn.Parameter(torch.zeros(2, 3))\n"
        "    def forward(self, x):\n"
        "        return x @ self.A\n"
        "def f(x):\n"
        "    return M()(x)\n"
    )
    assert "line 6" in stopped(source, X)
    assert "at `x @ self.A`: x is (4, 5), self.A is (2, 3)" in stopped(source, X)


def test_a_statement_has_its_line_alone():
    source = "def f():\n    raise ValueError('no')\n"
    assert stopped(source) == " (line 2 of your cell)"


def test_a_source_that_is_not_known_has_its_line_alone():
    values = {}
    exec(compile("def f(x):\n    return x.foo\n", "<unknown>", "exec"), values)
    with pytest.raises(AttributeError) as caught:
        values["f"](X)
    assert place(caught.value) == " (line 2 of your cell)"


def test_names_that_stand_in_the_cell_are_not_run():
    """A property that counts how often it is read is read by the code alone."""
    source = (
        "class Counts:\n"
        "    read = 0\n"
        "    @property\n"
        "    def x(self):\n"
        "        Counts.read += 1\n"
        "        return None\n"
        "c = Counts()\n"
        "def f():\n"
        "    return c.x + 1\n"
    )
    f = answer(source)
    with pytest.raises(TypeError) as caught:
        f()
    assert "at `c.x + 1`" in place(caught.value)
    assert f.__globals__["Counts"].read == 1


def test_a_check_says_it():
    wrong = answer("def f(A, B, alpha, r):\n    return alpha / r * A @ B\n")
    said = check.lora_delta(wrong).message
    assert (
        "RuntimeError" in said
        and "(line 2 of your cell, at `alpha / r * A @ B`" in said
    )
    assert "A is (" in said and "B is (" in said


def test_a_loop_that_cannot_begin_shows_what_it_goes_through():
    source = "def f(x):\n    if True:\n        for p in x.foo:\n            pass\n"
    model = nn.Linear(2, 3)
    model.foo = nn.Linear(2, 3)
    assert stopped(source, model) == " (line 3 of your cell, at `x.foo`)"


def test_a_line_of_the_package_is_no_line_of_the_cell():
    """An error that the package raises is shown where the cell calls it."""
    source = "def f(names):\n    return LoraConfig(r=names)\n"
    source = "from minipeft import LoraConfig\n" + source
    text = stopped(source, -3)
    assert text == " (line 3 of your cell, at `LoraConfig(r=names)`: names is -3)"
