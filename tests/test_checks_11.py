"""Chapter 11's checks accept the solution, refuse the blank stub, and name the mistake
in what is plausibly wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from judging import accepts, rejects
from torch import nn

from minipeft.course import check


def stub(*args):
    raise NotImplementedError


# ------------------------------------------------------------------- sequential_adapter


def test_sequential_solution():
    accepts(
        check.sequential_adapter,
        lambda h, D, b, U, c, act: h + act(h @ D.T + b) @ U.T + c,
    )
    accepts(
        check.sequential_adapter,
        lambda h, D, b, U, c, act: F.linear(act(F.linear(h, D, b)), U, c).add(h),
    )
    accepts(
        check.sequential_adapter,
        lambda h, D, b, U, c, act: (
            torch.einsum("dm,...m->...d", U, act((D @ h[..., None])[..., 0] + b))
            + h
            + c
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "residual is forgotten",
            lambda h, D, b, U, c, act: act(h @ D.T + b) @ U.T + c,
        ),
        (
            "after the up-projection: it belongs in the middle",
            lambda h, D, b, U, c, act: h + act((h @ D.T + b) @ U.T + c),
        ),
        ("no activation", lambda h, D, b, U, c, act: h + (h @ D.T + b) @ U.T + c),
        (
            "before the down-projection",
            lambda h, D, b, U, c, act: h + (act(h) @ D.T + b) @ U.T + c,
        ),
        (
            "residual must pass untouched",
            lambda h, D, b, U, c, act: act(h + act(h @ D.T + b) @ U.T + c),
        ),
        ("Both biases", lambda h, D, b, U, c, act: h + act(h @ D.T) @ U.T),
        ("b_down is missing", lambda h, D, b, U, c, act: h + act(h @ D.T) @ U.T + c),
        ("b_up is missing", lambda h, D, b, U, c, act: h + act(h @ D.T + b) @ U.T),
        (
            "after the activation",
            lambda h, D, b, U, c, act: h + (act(h @ D.T) + b) @ U.T + c,
        ),
        ("it is added", lambda h, D, b, U, c, act: h - act(h @ D.T + b) @ U.T - c),
        (
            "lost touch with h and W_down and b_down and W_up and b_up",
            lambda h, D, b, U, c, act: (h + act(h @ D.T + b) @ U.T + c).detach(),
        ),
        (
            "no gradient reaches h:",
            lambda h, D, b, U, c, act: h.detach() + act(h.detach() @ D.T + b) @ U.T + c,
        ),
        (
            "changed `h` in place",
            lambda h, D, b, U, c, act: h.add_(act(h.clone() @ D.T + b) @ U.T + c),
        ),
        (
            "W_down and W_up have changed places",
            lambda h, D, b, U, c, act: h + act(h @ U + b) @ D + c,
        ),
        (
            "always bend in the same way",
            lambda h, D, b, U, c, act: h + torch.relu(h @ D.T + b) @ U.T + c,
        ),
        (
            "always bend in the same way",
            lambda h, D, b, U, c, act: h + F.gelu(h @ D.T + b) @ U.T + c,
        ),
        (
            "h goes on twice",
            lambda h, D, b, U, c, act: 2 * h + act(h @ D.T + b) @ U.T + c,
        ),
        (
            "differs from the formula",
            lambda h, D, b, U, c, act: h + 2 * act(h @ D.T + b) @ U.T + c,
        ),
        (
            "should be a tensor",
            lambda h, D, b, U, c, act: (h, act(h @ D.T + b) @ U.T + c),
        ),
        (
            "output's size comes first",
            lambda h, D, b, U, c, act: h + act(h @ D + b) @ U + c,
        ),
        ("is there a `return`", lambda h, D, b, U, c, act: None),
        ("nothing here yet", stub),
    ],
)
def test_sequential_mistakes(says, answer):
    rejects(says, check.sequential_adapter, answer)


# ------------------------------------------------------------------------ adapter_layer


class Parallel(nn.Module):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, part, d, m, scaling):
        super().__init__()
        self.part, self.scaling = part.requires_grad_(False), scaling
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def adapter(self, h):
        return self.up(torch.relu(self.down(h)))

    def forward(self, x):
        return self.part(x) + self.scaling * self.adapter(x)


def with_forward(forward):
    return type("Changed", (Parallel,), {"forward": forward})


def after_init(change):
    class Changed(Parallel):
        def __init__(self, part, d, m, scaling):
            super().__init__(part, d, m, scaling)
            change(self, d, m)

    return Changed


class Blank(nn.Module):
    def __init__(self, part, d, m, scaling):
        super().__init__()
        raise NotImplementedError


class Written(nn.Module):
    """Right, and written otherwise: a copy of the part, one module for the branch,
    zeros by filling."""

    def __init__(self, part, d, m, scaling):
        super().__init__()
        self.frozen, self.s = copy.deepcopy(part).eval(), scaling
        for p in self.frozen.parameters():
            p.requires_grad = False
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        with torch.no_grad():
            for p in self.up.parameters():
                p.fill_(0)

    def forward(self, x):
        said = self.up(F.relu(self.down(x))).mul(self.s)
        return said + self.frozen(x)


def test_layer_solution():
    accepts(check.adapter_layer, Parallel)
    accepts(check.adapter_layer, Written)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "That is the sequential adapter: it reads",
            with_forward(lambda s, x: s.part(x) + s.scaling * s.adapter(s.part(x))),
        ),
        (
            "sequential adapter, without the scale",
            with_forward(lambda s, x: s.part(x) + s.adapter(s.part(x))),
        ),
        ("The scale is missing", with_forward(lambda s, x: s.part(x) + s.adapter(x))),
        (
            "The whole sum is scaled",
            with_forward(
                lambda s, x: (
                    (s.part(x) + s.adapter(x)) * (s.scaling if s.up.weight.any() else 1)
                )
            ),
        ),
        (
            "must give exactly what the part gives; it does not",
            with_forward(lambda s, x: s.scaling * s.adapter(x)),
        ),
        (
            "residual stream around this layer",
            with_forward(lambda s, x: x + s.part(x) + s.scaling * s.adapter(x)),
        ),
        (
            "relu between down and up",
            with_forward(lambda s, x: s.part(x) + s.scaling * s.up(s.down(x))),
        ),
        ("never reaches", with_forward(lambda s, x: s.part(x))),
        (
            "divide by the scale",
            with_forward(lambda s, x: s.part(x) + s.adapter(x) / s.scaling),
        ),
        (
            "scale misses up's bias",
            with_forward(
                lambda s, x: s.part(x) + s.up(s.scaling * torch.relu(s.down(x)))
            ),
        ),
        (
            "relu comes after up",
            with_forward(
                lambda s, x: s.part(x) + s.scaling * torch.relu(s.up(s.down(x)))
            ),
        ),
        (
            "another activation",
            with_forward(lambda s, x: s.part(x) + s.scaling * s.up(F.gelu(s.down(x)))),
        ),
        (
            "gradient that goes down to x",
            with_forward(lambda s, x: s.part(x).detach() + s.scaling * s.adapter(x)),
        ),
        (
            "gradient that goes down to x",
            with_forward(lambda s, x: s.part(x) + s.scaling * s.adapter(x.detach())),
        ),
        (
            "scaling is trained too",
            after_init(
                lambda s, d, m: setattr(
                    s, "scaling", nn.Parameter(torch.tensor(s.scaling))
                )
            ),
        ),
        ("is there a `return`", with_forward(lambda s, x: None)),
        (
            "make up's weight and bias zero",
            after_init(lambda s, d, m: nn.init.normal_(s.up.weight)),
        ),
        (
            "make up's weight and bias zero",
            after_init(lambda s, d, m: nn.init.normal_(s.up.bias)),
        ),
        ("both zero", after_init(lambda s, d, m: nn.init.zeros_(s.down.weight))),
        ("part is not frozen", after_init(lambda s, d, m: s.part.requires_grad_(True))),
        (
            "own parameters are frozen",
            after_init(lambda s, d, m: s.requires_grad_(False)),
        ),
        (
            "swapped",
            after_init(
                lambda s, d, m: (
                    setattr(s, "down", nn.Linear(m, d)),
                    setattr(s, "up", nn.Linear(d, m)),
                )
            ),
        ),
        (
            "this is no LoRA",
            after_init(lambda s, d, m: setattr(s, "down", nn.Linear(d, m, bias=False))),
        ),
        ("there is none", after_init(lambda s, d, m: delattr(s, "down"))),
        ("nothing here yet", Blank),
    ],
)
def test_layer_mistakes(says, answer):
    rejects(says, check.adapter_layer, answer)


# ----------------------------------------------------------------------- count_adapters


def count(d, m, layers, placement):
    return layers * (1 + (placement == "houlsby")) * (2 * d * m + m + d)


def test_count_solution():
    accepts(check.count_adapters, count)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("two adapters into each layer", lambda d, m, L, p: L * (2 * d * m + m + d)),
        ("only Houlsby has two", lambda d, m, L, p: 2 * L * (2 * d * m + m + d)),
        (
            "biases are missing",
            lambda d, m, L, p: count(d, m, L, p) - L * (1 + (p == "houlsby")) * (m + d),
        ),
        (
            "bias of the down-projection",
            lambda d, m, L, p: count(d, m, L, p) - L * (1 + (p == "houlsby")) * m,
        ),
        (
            "bias of the up-projection",
            lambda d, m, L, p: count(d, m, L, p) - L * (1 + (p == "houlsby")) * d,
        ),
        (
            "you count one.",
            lambda d, m, L, p: L * (1 + (p == "houlsby")) * (d * m + m + d),
        ),
        ("`layers` of them", lambda d, m, L, p: count(d, m, 1, p)),
        ("bottleneck is m wide", lambda d, m, L, p: count(d, d, L, p)),
        (
            "You have d twice",
            lambda d, m, L, p: L * (1 + (p == "houlsby")) * (2 * d * m + 2 * d),
        ),
        (
            "You have m twice",
            lambda d, m, L, p: L * (1 + (p == "houlsby")) * (2 * d * m + 2 * m),
        ),
        (
            "count the norms too",
            lambda d, m, L, p: count(d, m, L, p) + (4 * d * L if p == "houlsby" else 0),
        ),
        ("I count", lambda d, m, L, p: 17),
        ("is there a `return`", lambda d, m, L, p: None),
        ("nothing here yet", stub),
    ],
)
def test_count_mistakes(says, answer):
    rejects(says, check.count_adapters, answer)


# ------------------------------------------------------------------ fold_linear_adapter


def fold(W, b, D, c, U, e):
    step = U @ D
    return W + step @ W, b + step @ b + U @ c + e


def by_probing(W, b, D, c, U, e):
    """What the two do to zero is the bias; what they do to unit vectors, the weight."""

    def both(x):
        return (y := F.linear(x, W, b)) + F.linear(F.linear(y, D, c), U, e)

    zero = torch.zeros(W.shape[1], dtype=W.dtype)
    return (both(torch.eye(W.shape[1], dtype=W.dtype)) - both(zero)).T, both(zero)


def test_fold_solution():
    accepts(check.fold_linear_adapter, fold)
    accepts(check.fold_linear_adapter, by_probing)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "so W stays in the sum",
            lambda W, b, D, c, U, e: (U @ D @ W, fold(W, b, D, c, U, e)[1]),
        ),
        ("has to be in it", lambda W, b, D, c, U, e: (W, fold(W, b, D, c, U, e)[1])),
        ("down is met first", lambda W, b, D, c, U, e: (W + (U @ D).T @ W, b)),
        ("it is added", lambda W, b, D, c, U, e: (W - U @ D @ W, b)),
        (
            "passes through the adapter too",
            lambda W, b, D, c, U, e: (W + U @ D @ W, b + U @ c + e),
        ),
        (
            "b itself is missing",
            lambda W, b, D, c, U, e: (W + U @ D @ W, fold(W, b, D, c, U, e)[1] - b),
        ),
        (
            "go through W_up",
            lambda W, b, D, c, U, e: (W + U @ D @ W, b + U @ D @ b + e),
        ),
        (
            "b_up is missing",
            lambda W, b, D, c, U, e: (W + U @ D @ W, fold(W, b, D, c, U, e)[1] - e),
        ),
        ("bias is as it was", lambda W, b, D, c, U, e: (W + U @ D @ W, b)),
        (
            "Only the adapter's biases",
            lambda W, b, D, c, U, e: (W + U @ D @ W, U @ c + e),
        ),
        ("Two shapes do not fit", lambda W, b, D, c, U, e: (W + U @ D, b)),
        (
            "Two shapes do not fit",
            lambda W, b, D, c, U, e: (W + U @ D @ W, b + U @ D @ b + c + e),
        ),
        ("W_new has the shape", lambda W, b, D, c, U, e: fold(W, b, D, c, U, e)[::-1]),
        (
            "W_new has the shape",
            lambda W, b, D, c, U, e: (fold(W, b, D, c, U, e)[0].T, b),
        ),
        ("Give me two tensors", lambda W, b, D, c, U, e: W + U @ D @ W),
        ("Two shapes do not fit", lambda W, b, D, c, U, e: (W + W @ U @ D, b)),
        ("in place", lambda W, b, D, c, U, e: (W.add_(U @ D @ W), b)),
        ("nothing here yet", stub),
    ],
)
def test_fold_mistakes(says, answer):
    rejects(says, check.fold_linear_adapter, answer)
