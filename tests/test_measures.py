"""The measures of tests/measure.py: what they count, and the limits that the package
keeps."""

import pytest
from measure import ROOT, all_it_calls, code_lines, measure, parts

from minipeft.methods.lora import Lora

CODE = '''"""A docstring
of two lines."""

import math  # counts


# a comment
def area(r, unit=None):
    """Not code."""
    a, b = r, r
    text = """two
    lines"""
    if unit is None:
        raise ValueError(
            text
        )
    c, d = divmod(a, b)
    return math.pi * a * b
'''


def test_what_is_counted(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(CODE)
    assert sorted(code_lines(CODE)) == [4, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    found = measure([path])
    assert (found.lines, found.statements) == (11, 8)
    assert (found.tuple_assignments, found.raises) == (1, 1)
    assert list(found.functions.values()) == [10]
    assert found.p90 == 25 and found.over_100 == 0


def test_what_shown_code_calls_is_counted():
    names = {thing.__qualname__ for thing in all_it_calls(Lora)}
    assert {"Lora", "initialize", "add_low_rank"} <= names


PACKAGES = parts()


@pytest.mark.parametrize("part", PACKAGES)
def test_lines_are_narrow(part):
    found = measure(PACKAGES[part])
    assert found.p90 <= 88
    assert found.over_100 == 0 or part == "command line"


HOUSE = [path for part in ("adapters", "methods", "quant") for path in PACKAGES[part]]


def test_one_statement_a_line():
    found = measure(HOUSE)
    assert found.per_100(found.tuple_assignments) <= 1


AROUND = {
    "benchmarks": sorted((ROOT / "benchmarks").glob("*.py")),
    "tests": sorted((ROOT / "tests").glob("*.py")),
}


@pytest.mark.parametrize("part", [*PACKAGES, *AROUND])
def test_functions_are_short(part):
    functions = measure((PACKAGES | AROUND)[part]).functions
    longest = max(functions, key=functions.get)
    assert functions[longest] <= 60, longest


@pytest.mark.parametrize(
    "files, most", [(HOUSE, 6403), (PACKAGES["lm"], 3427)], ids=["adapters", "lm"]
)
def test_nothing_grows_unseen(files, most):
    """Code lines. Raise a limit knowingly, or make room first."""
    assert measure(files).lines <= most


@pytest.mark.parametrize("path", PACKAGES["methods"], ids=lambda path: path.stem)
def test_a_file_of_a_method_holds_one_idea(path):
    """Code lines: the equation, its configuration, and no more."""
    assert measure([path]).lines <= 130
