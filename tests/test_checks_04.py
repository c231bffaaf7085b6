"""Chapter 04's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import math

import pytest
import torch
from judging import accepts, judge, rejects
from torch import nn

from minipeft.course import check

# --------------------------------------------------------------------------- lora_delta


def test_lora_delta_solution():
    accepts(check.lora_delta, lambda A, B, alpha, r: alpha / r * B @ A)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("forget to divide by r", lambda A, B, alpha, r: alpha * B @ A),
        ("factor alpha / r is missing", lambda A, B, alpha, r: B @ A),
        ("rsLoRA", lambda A, B, alpha, r: alpha / math.sqrt(r) * B @ A),
        ("upside down", lambda A, B, alpha, r: r / alpha * B @ A),
        ("folded in twice", lambda A, B, alpha, r: (alpha / r) ** 2 * B @ A),
        ("lies on its side", lambda A, B, alpha, r: alpha / r * (B @ A).T),
        ("lies on its side", lambda A, B, alpha, r: alpha / r * A.T @ B.T),
        ("in this order", lambda A, B, alpha, r: alpha / r * A @ B),
        ("lost touch", lambda A, B, alpha, r: alpha / r * (B @ A).detach()),
        ("is there a `return`", lambda A, B, alpha, r: None),
        ("should be a tensor", lambda A, B, alpha, r: 3.0),
        ("none of the usual slips", lambda A, B, alpha, r: alpha / r * B @ A + 1),
        ("the shape", lambda A, B, alpha, r: alpha / r * (B @ A)[:, :2]),
        (
            "leave the arguments as they are",
            lambda A, B, alpha, r: alpha / r * B.data.mul_(2) @ A / 2,
        ),
    ],
)
def test_lora_delta_mistakes(says, answer):
    rejects(says, check.lora_delta, answer)


# --------------------------------------------------------------------------- lora_layer


class Lora(nn.Module):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale, self.alpha, self.r = alpha / r, alpha, r
        self.dropout = nn.Dropout(dropout)

    def update(self, x):
        return self.scale * self.dropout(x) @ self.A.T @ self.B.T

    def forward(self, x):
        return self.linear(x) + self.update(x)


class ByLinears(nn.Module):
    """Another right way: A and B as Linears."""

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        self.linear, self.scale, self.dropout = (
            linear.requires_grad_(False),
            alpha / r,
            nn.Dropout(dropout),
        )
        self.A = nn.Linear(linear.in_features, r, bias=False)
        self.B = nn.Linear(r, linear.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x):
        return self.linear(x) + self.scale * self.B(self.A(self.dropout(x)))


def after_init(change):
    """A Lora whose __init__ ends with change(self)."""

    class Changed(Lora):
        def __init__(self, linear, r, alpha, dropout=0.0):
            super().__init__(linear, r, alpha, dropout)
            change(self)

    return Changed


def with_forward(forward):
    return type("Changed", (Lora,), {"forward": forward})


def set_parameters(**shapes):
    return after_init(
        lambda self: [
            setattr(self, name, nn.Parameter(shape(self)))
            for name, shape in shapes.items()
        ]
    )


def drop(self, x):
    return nn.functional.dropout(x, self.dropout.p, self.training)


def test_lora_layer_solutions():
    accepts(check.lora_layer, Lora)
    accepts(check.lora_layer, ByLinears)


class BlankLora(nn.Module):
    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        raise NotImplementedError


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "forget to divide by r",
            after_init(lambda self: setattr(self, "scale", self.alpha)),
        ),
        ("alpha / r is missing", after_init(lambda self: setattr(self, "scale", 1.0))),
        (
            "folded in twice",
            after_init(lambda self: setattr(self, "scale", self.scale**2)),
        ),
        ("both zero", after_init(lambda self: nn.init.zeros_(self.A))),
        ("B is random", after_init(lambda self: nn.init.normal_(self.B))),
        (
            "other way round",
            after_init(lambda self: (nn.init.zeros_(self.A), nn.init.normal_(self.B))),
        ),
        ("all alike", after_init(lambda self: nn.init.ones_(self.A))),
        (
            "are swapped",
            set_parameters(
                A=lambda s: torch.randn(s.linear.out_features, s.r),
                B=lambda s: torch.zeros(s.r, s.linear.in_features),
            ),
        ),
        (
            "are transposed",
            set_parameters(
                A=lambda s: torch.randn(s.linear.in_features, s.r),
                B=lambda s: torch.zeros(s.r, s.linear.out_features),
            ),
        ),
        (
            "A has the shape",
            set_parameters(A=lambda s: torch.randn(1, s.linear.in_features)),
        ),
        (
            "base weight is not frozen",
            after_init(lambda self: self.linear.requires_grad_(True)),
        ),
        (
            "its bias is not",
            after_init(lambda self: self.linear.bias.requires_grad_(True)),
        ),
        ("A or B is frozen", after_init(lambda self: self.A.requires_grad_(False))),
        (
            "Something else would train",
            after_init(
                lambda self: setattr(self, "extra", nn.Parameter(torch.zeros(2)))
            ),
        ),
        (
            "sees only an nn.Parameter",
            after_init(
                lambda self: (
                    delattr(self, "A"),
                    setattr(self, "A", torch.randn(self.r, self.linear.in_features)),
                )
            ),
        ),
        ("there is none", after_init(lambda self: delattr(self, "B"))),
        (
            "bias is added twice",
            with_forward(
                lambda self, x: self.linear(x) + self.update(x) + self.linear.bias
            ),
        ),
        (
            "is missing",
            with_forward(
                lambda self, x: (
                    self.linear(x) * 0
                    + self.update(x)
                    + (0 if self.B.any() else self.linear(x))
                )
            ),
        ),
        (
            "must give exactly what the base gives",
            with_forward(lambda self, x: self.update(x)),
        ),
        ("update never reaches", with_forward(lambda self, x: self.linear(x))),
        (
            "scaled too",
            with_forward(
                lambda self, x: (
                    (self.linear(x) + self.update(x) / self.scale)
                    * (self.scale if self.B.any() else 1)
                )
            ),
        ),
        ("is there a `return`", with_forward(lambda self, x: None)),
        (
            "drop the output",
            with_forward(
                lambda self, x: (
                    self.linear(x) + drop(self, self.scale * x @ self.A.T @ self.B.T)
                )
            ),
        ),
        (
            "numbers in the middle",
            with_forward(
                lambda self, x: (
                    self.linear(x) + self.scale * drop(self, x @ self.A.T) @ self.B.T
                )
            ),
        ),
        (
            "touches the base's path",
            with_forward(lambda self, x: self.linear(self.dropout(x)) + self.update(x)),
        ),
        (
            "touches the base's path",
            with_forward(
                lambda self, x: drop(
                    self, self.linear(x) + self.scale * x @ self.A.T @ self.B.T
                )
            ),
        ),
        (
            "dropout does nothing",
            with_forward(
                lambda self, x: self.linear(x) + self.scale * x @ self.A.T @ self.B.T
            ),
        ),
        (
            "still drops",
            with_forward(
                lambda self, x: (
                    self.linear(x)
                    + self.scale
                    * nn.functional.dropout(x, self.dropout.p)
                    @ self.A.T
                    @ self.B.T
                )
            ),
        ),
        (
            "must grow by",
            with_forward(
                lambda self, x: (
                    self.linear(x)
                    + self.scale
                    * (x * (torch.rand_like(x) > self.dropout.p * self.training))
                    @ self.A.T
                    @ self.B.T
                )
            ),
        ),
        (
            "no gradient reaches A",
            with_forward(
                lambda self, x: (
                    self.linear(x) + self.scale * x @ self.A.T.detach() @ self.B.T
                    if not self.dropout.p
                    else self.linear(x) + self.update(x)
                )
            ),
        ),
        ("the class itself", Lora(nn.Linear(4, 6), 2, 4)),
        ("nothing here yet", BlankLora),
    ],
)
def test_lora_layer_mistakes(says, answer):
    rejects(says, check.lora_layer, answer)


# ------------------------------------------------------------------------------ merging


@torch.no_grad()
def merge(layer):
    if not layer.merged:
        layer.linear.weight += layer.alpha / layer.r * layer.B @ layer.A
        layer.merged = True


@torch.no_grad()
def unmerge(layer):
    if layer.merged:
        layer.linear.weight -= layer.alpha / layer.r * layer.B @ layer.A
        layer.merged = False


def merge_with(weight=None, then=lambda layer: None, once=True, flag=True):
    @torch.no_grad()
    def wrong(layer):
        if not (once and layer.merged):
            update = (
                layer.alpha / layer.r * layer.B @ layer.A
                if weight is None
                else weight(layer)
            )
            layer.linear.weight += update
            then(layer)
            layer.merged = flag

    return wrong


def with_graph(layer):
    layer.linear.weight.add_(layer.alpha / layer.r * layer.B @ layer.A)
    layer.merged = True


def with_graph_and_assignment(layer):
    layer.linear.weight += layer.alpha / layer.r * layer.B @ layer.A
    layer.merged = True


def replaces(layer):
    layer.linear.weight = (
        layer.linear.weight + layer.alpha / layer.r * layer.B @ layer.A
    )


@torch.no_grad()
def scales_B_first(layer):
    layer.B *= layer.alpha / layer.r
    layer.linear.weight += layer.alpha / layer.r * layer.B @ layer.A
    layer.merged = True


@torch.no_grad()
def adds_again(layer):
    if layer.merged:
        layer.linear.weight += layer.alpha / layer.r * layer.B @ layer.A
        layer.merged = False


@torch.no_grad()
def always_subtracts(layer):
    layer.linear.weight -= layer.alpha / layer.r * layer.B @ layer.A
    layer.merged = False


@torch.no_grad()
def keeps_the_flag(layer):
    if layer.merged:
        layer.linear.weight -= layer.alpha / layer.r * layer.B @ layer.A


def stub(*arguments):
    raise NotImplementedError


def test_merging_solution():
    accepts(check.merging, merge, unmerge)


@pytest.mark.parametrize(
    "says, answers",
    [
        (
            "folded in twice",
            (merge_with(lambda s: (s.alpha / s.r) ** 2 * s.B @ s.A), unmerge),
        ),
        ("forget to divide by r", (merge_with(lambda s: s.alpha * s.B @ s.A), unmerge)),
        ("alpha / r is missing", (merge_with(lambda s: s.B @ s.A), unmerge)),
        ("scale counts twice", (scales_B_first, unmerge)),
        (
            "bias would count twice",
            (merge_with(then=lambda s: s.linear.bias.mul_(2)), unmerge),
        ),
        ("forward adds the update a second time", (merge_with(flag=False), unmerge)),
        ("Called a second time", (merge_with(once=False), unmerge)),
        ("by the graph", (with_graph, unmerge)),
        ("do it under torch.no_grad()", (with_graph_and_assignment, unmerge)),
        ("in place, under torch.no_grad()", (replaces, unmerge)),
        ("in this order", (merge_with(lambda s: s.alpha / s.r * s.A @ s.B), unmerge)),
        ("has not changed", (merge_with(lambda s: 0.0), unmerge)),
        (
            "add it to the old weight",
            (
                merge_with(lambda s: s.alpha / s.r * s.B @ s.A - s.linear.weight),
                unmerge,
            ),
        ),
        ("has to subtract", (merge, adds_again)),
        ("leaves the merged weight", (merge, lambda layer: None)),
        ("must do nothing", (merge, always_subtracts)),
        ("set layer.merged to False", (merge, keeps_the_flag)),
        ("nothing here yet", (stub, stub)),
        ("nothing here yet", (merge, stub)),
    ],
)
def test_merging_mistakes(says, answers):
    rejects(says, check.merging, *answers)


# --------------------------------------------------------------------- count_parameters


def test_count_solution():
    accepts(
        check.count_parameters,
        lambda shapes, layers, r, targets: (
            layers * r * sum(sum(shapes[name]) for name in targets)
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "only the targets",
            lambda shapes, layers, r, targets: (
                layers * r * sum(sum(shape) for shape in shapes.values())
            ),
        ),
        (
            "one layer",
            lambda shapes, layers, r, targets: (
                r * sum(sum(shapes[name]) for name in targets)
            ),
        ),
        (
            "rank is missing",
            lambda shapes, layers, r, targets: (
                layers * sum(sum(shapes[name]) for name in targets)
            ),
        ),
        (
            "counts A alone",
            lambda shapes, layers, r, targets: (
                layers * r * sum(shapes[name][1] for name in targets)
            ),
        ),
        (
            "counts B alone",
            lambda shapes, layers, r, targets: (
                layers * r * sum(shapes[name][0] for name in targets)
            ),
        ),
        (
            "grouped queries",
            lambda shapes, layers, r, targets: (
                layers * r * sum(2 * shapes[name][1] for name in targets)
            ),
        ),
        (
            "2 · r · d_out",
            lambda shapes, layers, r, targets: (
                layers * r * sum(2 * shapes[name][0] for name in targets)
            ),
        ),
        (
            "sizes add",
            lambda shapes, layers, r, targets: (
                layers * r * sum(math.prod(shapes[name]) for name in targets)
            ),
        ),
        (
            "frozen weights",
            lambda shapes, layers, r, targets: (
                layers * sum(math.prod(shapes[n]) + r * sum(shapes[n]) for n in targets)
            ),
        ),
        (
            "two thin factors",
            lambda shapes, layers, r, targets: (
                layers * sum(math.prod(shapes[name]) for name in targets)
            ),
        ),
        ("I count", lambda shapes, layers, r, targets: 6_815_744),
        ("is there a `return`", lambda shapes, layers, r, targets: None),
        ("nothing here yet", stub),
    ],
)
def test_count_mistakes(says, answer):
    rejects(says, check.count_parameters, answer)


# ---------------------------------------------------------------------- first_gradients


def gradients(x, g, A, B, alpha, r):
    return alpha / r * B.T @ g.T @ x, alpha / r * g.T @ x @ A.T


def changed(change):
    return lambda x, g, A, B, alpha, r: change(
        *gradients(x, g, A, B, alpha, r), alpha, r, x
    )


def test_gradients_solution():
    accepts(check.first_gradients, gradients)


def test_gradients_oracle_is_autograd():
    x, g, A, B = (
        torch.randn(5, 7),
        torch.randn(5, 9),
        torch.randn(3, 7, requires_grad=True),
        torch.randn(9, 3, requires_grad=True),
    )
    (4 / 3 * x @ A.T @ B.T * g).sum().backward()
    for mine, autograd in zip(
        gradients(x, g, A.detach(), B.detach(), 4, 3), (A.grad, B.grad)
    ):
        torch.testing.assert_close(mine, autograd)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "lacks the scale",
            changed(lambda a, b, alpha, r, x: (a * r / alpha, b * r / alpha)),
        ),
        ("scale is alpha", changed(lambda a, b, alpha, r, x: (a * r, b * r))),
        (
            "scale twice",
            changed(lambda a, b, alpha, r, x: (a * alpha / r, b * alpha / r)),
        ),
        ("swapped", changed(lambda a, b, alpha, r, x: (b, a))),
        ("transposed", changed(lambda a, b, alpha, r, x: (a.T, b.T))),
        (
            "mean over the rows",
            changed(lambda a, b, alpha, r, x: (a / len(x), b / len(x))),
        ),
        ("wrong sign", changed(lambda a, b, alpha, r, x: (-a, -b))),
        ("grad_A is zero", changed(lambda a, b, alpha, r, x: (0 * a, b))),
        ("two tensors", changed(lambda a, b, alpha, r, x: a)),
        ("nothing here yet", stub),
    ],
)
def test_gradient_mistakes(says, answer):
    rejects(says, check.first_gradients, answer)


# -------------------------------------------------------------------------- six_million


@pytest.mark.parametrize(
    "answer",
    [
        [(8, ["q_proj", "k_proj", "v_proj", "o_proj"]), (16, ["q_proj", "v_proj"])],
        [(16, ["v_proj", "q_proj"]), (13, ["q_proj", "o_proj"])],
    ],
)
def test_six_million_solution(answer):
    accepts(check.six_million, answer)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "exactly twice",
            [
                (16, ["q_proj", "k_proj", "v_proj", "o_proj"]),
                (16, ["q_proj", "v_proj"]),
            ],
        ),
        ("exactly half", [(8, ["q_proj", "v_proj"])]),
        ("there is another", [(16, ["q_proj", "v_proj"]), (16, ["v_proj", "q_proj"])]),
        (
            "for square",
            [(13, ["q_proj", "v_proj"]), (8, ["q_proj", "k_proj", "v_proj", "o_proj"])],
        ),
        ("5,120 r each", [(4, ["q_proj", "v_proj"])]),
        ("are called", [(8, ["q", "k", "v", "o"])]),
        ("Write it as", [8, 16]),
        ("Write it as", [(8, "q_proj")]),
        ("nothing here yet", []),
        ("nothing here yet", None),
    ],
)
def test_six_million_mistakes(says, answer):
    rejects(says, check.six_million, answer)


# --------------------------------------------------------------------------- in general


def test_stub_of_a_function():
    rejects("nothing here yet", check.lora_delta, stub)


def test_errors_name_the_learners_line():
    def divides_by_zero(A, B, alpha, r):
        return alpha / 0

    verdict, *_ = judge(check.lora_delta, divides_by_zero)
    assert (
        "ZeroDivisionError" in verdict.message
        and f"line {divides_by_zero.__code__.co_firstlineno + 1} " in verdict.message
    )
    assert str(verdict).startswith(
        "Not yet. "
    ) and verdict._repr_markdown_().startswith("❌")
