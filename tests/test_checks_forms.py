"""An answer may be a function with names, one of *args, a partial, a method or an
object: it is judged in the same way."""

import ast
import functools
import types

import pytest
import torch
from mutants import built, solutions

from minipeft.course import check


def answers():
    """{exercise: (its one function, the check with its settings)}"""
    found = {}
    for name, (_, source, names, settings) in solutions().items():
        try:
            given = built(ast.parse(source), names)
        except (KeyError, NameError):
            continue  # the answer is a number, or stands in the chapter
        if len(given) == 1 and isinstance(given[0], types.FunctionType):
            found[name] = given[0], functools.partial(getattr(check, name), **settings)
    return found


ANSWERS = answers()


class Object:
    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def method(self, *args):
        return self.function(*args)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


FORMS = {
    "args": lambda function: lambda *args: function(*args),
    "partial": functools.partial,
    "object": Object,
    "method": lambda function: Object(function).method,
    "module": Module,
}


def detached(value):
    if isinstance(value, torch.Tensor):
        return value.detach()
    return type(value)(map(detached, value)) if type(value) in (list, tuple) else value


def changed(function, change, arguments):
    """The function, whose result or whose arguments are then changed; with the same
    parameters."""

    @functools.wraps(function)
    def other(*args):
        result = function(*args)
        for part in args if arguments else ():
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                with torch.no_grad():
                    part.add_(1)
        return change(result)

    return other


@pytest.mark.parametrize("name", ANSWERS)
def test_a_right_answer_in_any_form(name):
    function, judge = ANSWERS[name]
    for form, make in FORMS.items():
        assert judge(make(function)), form


def test_a_wrong_answer_in_any_form():
    wrong = {"detached": (detached, False), "in place": (lambda value: value, True)}
    refused = dict.fromkeys(wrong, 0)
    for name, (function, judge) in ANSWERS.items():
        for kind, (change, arguments) in wrong.items():
            mistaken = changed(function, change, arguments)
            if judge(mistaken):  # no gradient is asked for, or no tensor is given
                continue
            refused[kind] += 1
            for form, make in FORMS.items():
                assert not judge(make(mistaken)), (name, kind, form)
    assert refused["detached"] > 10 and refused["in place"] > 20, refused
