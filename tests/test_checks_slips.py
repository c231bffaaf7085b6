"""A formula with one step done otherwise: each such result gets the step's name, and
nothing else gets one. And what numbers alone show of a mistake."""

import pytest
import torch

from minipeft.course.check import sandbox, teacher
from minipeft.course.check.sandbox import Wrong
from minipeft.course.check.slips import NAMED, Formula, alike, variations
from minipeft.course.check.teacher import compare, kind_of_difference

LENGTH = 3.0


def lengths(W, A, B, s):
    return LENGTH * (W - s * B @ A).square().sum(1).sqrt()


def given():
    torch.manual_seed(0)
    shapes = (5, 7), (2, 7), (5, 2)
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes] + [0.7]


def said_of(got, function=lengths, values=None, **settings) -> str:
    """What is said of a result, or nothing."""
    try:
        Formula(function, *(values or given()), **settings).explain(got, "It")
    except Wrong as wrong:
        return str(wrong)
    return ""


W, A, B, s = given()
UPDATE = s * B @ A
SAID = [
    ("the factor `LENGTH` is left out", (W - UPDATE).norm(dim=1)),
    ("is divided by", LENGTH / (W - UPDATE).norm(dim=1)),
    ("`s * B @ A` is not subtracted from `W`", LENGTH * W.norm(dim=1)),
    ("is added, not subtracted", LENGTH * (W + UPDATE).norm(dim=1)),
    ("`s` is left out", LENGTH * (W - B @ A).norm(dim=1)),
    ("`s` is in it twice", LENGTH * (W - s * UPDATE).norm(dim=1)),
    ("`s` is divided by `B`", LENGTH * (W - s / B @ A).norm(dim=1)),
    ("`B` is divided by `s`", LENGTH * (W - B / s @ A).norm(dim=1)),
    ("the root", LENGTH * (W - UPDATE).square().sum(1)),
    ("the sum has 0 in the place of 1", LENGTH * (W - UPDATE).norm(dim=0)),
    ("the mean", LENGTH * (W - UPDATE).square().mean(1).sqrt()),
]


@pytest.mark.parametrize("says, got", SAID)
def test_a_step_done_otherwise_is_named(says, got):
    assert says in said_of(got)


def test_nothing_is_said_of_the_right_result_and_of_others():
    right = lengths(*given())
    for other in (right, right + 1, right.flip(0), torch.randn(5), None, right[:3]):
        assert said_of(other) == ""
    two_steps = LENGTH * (W + B @ A).norm(dim=1)  # the sign, and the scale
    assert said_of(two_steps) == ""


def test_what_is_said_gives_what_was_got():
    """Whatever step is done otherwise, its own words are among those said, or there
    are too many that give the same."""
    values = given()
    right, formula = lengths(*values), Formula(lengths, *values)
    found = 0
    for words, other in variations(lengths):
        try:
            wrong = other(*values)
        except Exception:
            continue
        if alike(wrong, right) or not torch.as_tensor(wrong).isfinite().all():
            continue
        found += 1
        named = formula.steps_that_give(wrong)
        assert words in named
        for one in named:
            results = [w(*values) for text, w in variations(lengths) if text == one]
            assert any(alike(wrong, result) for result in results)
    assert found >= 20


def same_twice(x, y):
    return x * y * y


def test_steps_that_give_the_same_are_all_named():
    x, y = torch.randn(4).double(), torch.randn(4).double()
    said = said_of(x * y, same_twice, [x, y])
    assert said == "It is what the formula gives when the factor `y` is left out."
    said = said_of(x, same_twice, [x, y])
    assert said == (
        "It is what the formula gives when `x * y` is divided by `y`, not multiplied,"
        " or when `x` is divided by `y`, not multiplied."
    )


def test_many_steps_that_give_the_same_are_not_named():
    def product(a, b, c, d):
        return a * b * c * d

    two = torch.full((3,), 2.0)
    formula = Formula(product, two, two, two, two)
    assert len(formula.steps_that_give(8 * torch.ones(3))) > NAMED
    assert said_of(8 * torch.ones(3), product, [two] * 4) == ""


def averages(values, weights):
    mean = 0.0
    for value, weight in zip(values, weights):
        mean = weight * mean + (1 - weight) * value
    return mean, {"last": value, "all": len(values) > 2}


def test_loops_numbers_tuples_and_dictionaries():
    values, weights = [1.0, 5.0, 2.5], [0.5, 0.7, 0.9]
    mean, rest = averages(values, weights)
    plain = 0.0
    for value, weight in zip(values, weights):
        plain = weight * plain + value
    said = said_of((plain, rest), averages, [values, weights])
    assert "`1 - weight` is left out" in said
    assert said_of((plain, rest | {"all": False}), averages, [values, weights]) == ""
    said = said_of((mean, rest | {"all": False}), averages, [values, weights])
    assert "3 stands in the place of 2 in `len(values) > 2`" in said


def test_what_is_done_with_the_result():
    got = 1 + lengths(W, A, B, 1.0)
    assert "`s` is left out" in said_of(got, after=lambda norm: 1 + norm)
    formula = Formula(lengths, *given()).then(lambda norm: 1 + norm)
    with pytest.raises(Wrong, match="`s` is left out"):
        formula.explain(got, "It")


def test_a_part_is_named_by_all_that_was_returned():
    """Of one part alone several steps could be the fault."""

    def both(x, y):
        return x + y, x - y

    values = [torch.randn(4).double(), torch.randn(4).double()]
    x, y = values
    assert "subtracted" in said_of(x - y, both, values, whole=(x - y, x - y))
    assert said_of(x - y, both, values, whole=(x - y, x + y)) == ""


def test_compare_prefers_the_messages_of_the_exercise():
    formula = Formula(lengths, *given())
    right, wrong = lengths(*given()), lengths(W, A, B, 1.0)
    with pytest.raises(Wrong, match="its own words"):
        compare(wrong, right, {"its own words": wrong}, "It", formula=formula)
    with pytest.raises(Wrong, match="`s` is left out"):
        compare(wrong, right, {}, "It", formula=formula)
    compare(right, right, {}, "It", formula=formula)


def test_a_formula_leaves_its_arguments_alone():
    def grown(x):
        x += 1
        return x * 2

    x = torch.zeros(3).double().requires_grad_()
    said_of(torch.ones(3), grown, [x])
    assert not x.any()


# ------------------------------------------------------------ what numbers alone show

R = torch.tensor([[1.5, -2.0, 0.5], [-0.3, 4.0, 2.2], [3.0, 0.7, -1.1], [0.9, 5.0, -3]])
R = R.double()
K = torch.tensor([[2.0], [0.3], [-1.0], [5.0]]).double()
G = torch.linspace(-1, 3, 12, dtype=torch.float64).view(4, 3) ** 2


@pytest.mark.parametrize(
    "says, got",
    [
        ("-1 times", -R),
        ("the square", R.square()),
        ("the root", R.abs().sqrt()),
        ("one divided by", 1 / R),
        ("4 of 12 signs", R.abs()),
        ("every entry is off by 2", R + 2),
        ("off by -0.5 times `g`", R - 0.5 * G),
        ("in other places", R.flip(0)),
        ("right in 9 of 12", R * torch.tensor([[1.0], [1], [1], [7]])),
        ("along dimension 1 all entries are off by one factor", R * K),
        ("along dimension 0 all entries are off by one factor", R / R.norm(dim=0)),
        ("along dimension 1 all entries are off by one term", R + K),
        ("nearly right", R + 1e-3 * (1 + G.flip(0))),
        ("", R + 0.5 * G * R),
    ],
)
def test_what_numbers_alone_show(says, got, monkeypatch):
    monkeypatch.setattr(teacher, "watch", sandbox.Watch())
    teacher.watch.given = {"g": G, "p": G[:2], "t": 3, "h": G.flip(1)}
    error = ((got - R).abs().max() / R.abs().max()).item()
    said = kind_of_difference(got, R, error)
    assert says in said and bool(says) == bool(said), said


def test_an_argument_is_named_only_where_it_is_the_only_one(monkeypatch):
    monkeypatch.setattr(teacher, "watch", sandbox.Watch())
    teacher.watch.given = {"g": G, "twice": 2 * G}
    assert kind_of_difference(R + G, R, 1.0) == ""
