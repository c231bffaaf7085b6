"""Chapter 02's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import pytest
import torch
from judging import accepts, rejects
from torch import nn

from minipeft.course import check


def stub(*arguments):
    raise NotImplementedError


# --------------------------------------------------------------------------- step_bytes


def test_step_bytes_solution():
    accepts(
        check.step_bytes, lambda total, trained: 2 * (total - trained) + 16 * trained
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "every number have a gradient",
            lambda total, trained: 2 * (total - trained) + 4 * trained + 12 * total,
        ),
        ("16 bytes for the frozen", lambda total, trained: 16 * total),
        ("*two* means", lambda total, trained: 2 * (total - trained) + 12 * trained),
        (
            "optimizer is missing",
            lambda total, trained: 2 * (total - trained) + 8 * trained,
        ),
        ("frozen numbers are missing", lambda total, trained: 16 * trained),
        ("twice", lambda total, trained: 2 * total + 16 * trained),
        (
            "in 32 bits: here",
            lambda total, trained: 4 * (total - trained) + 16 * trained,
        ),
        ("another copy", lambda total, trained: 2 * (total - trained) + 20 * trained),
        (
            "or their gradients",
            lambda total, trained: 2 * (total - trained) + 14 * trained,
        ),
        (
            "have a gradient: only",
            lambda total, trained: 2 * (total - trained) + 4 * total + 12 * trained,
        ),
        (
            "gigabytes",
            lambda total, trained: (2 * (total - trained) + 16 * trained) / 1e9,
        ),
        ("each is several bytes", lambda total, trained: total - trained + 4 * trained),
        ("I count", lambda total, trained: 5),
        ("is there a `return`", lambda total, trained: None),
        ("nothing here yet", stub),
    ],
)
def test_step_bytes_mistakes(says, answer):
    rejects(says, check.step_bytes, answer)


# --------------------------------------------------------------------------- adamw_step


def adamw(
    p,
    g,
    m,
    v,
    t,
    lr,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.01,
    give=lambda p, m, v: (p, m, v),
    decay=lambda lr, wd: 1 - lr * wd,
    l2=0.0,
    fix=(True, True),
    root=True,
    eps_inside=False,
    late=0,
    sign=-1,
    swap=False,
    correct=None,
    new_m=lambda b, m, g: b * m + (1 - b) * g,
    new_v=lambda b, v, g, m: b * v + (1 - b) * g * g,
):
    p = p * decay(lr, weight_decay)
    if swap:
        beta1, beta2 = beta2, beta1
    m = new_m(beta1, m, g + l2 * weight_decay * p / decay(lr, weight_decay))
    v = new_v(beta2, v, g, m)
    for_m, for_v = (
        correct(beta1, beta2, t)
        if correct
        else (1 - beta1 ** (t + late), 1 - beta2 ** (t + late))
    )
    m_hat = m / for_m if fix[0] else m
    v_hat = v / for_v if fix[1] else v
    bottom = (
        (v_hat + eps).sqrt() if eps_inside else (v_hat.sqrt() if root else v_hat) + eps
    )
    return give(p + sign * lr * m_hat / bottom, m, v)


def changed(**change):
    return lambda *arguments: adamw(*arguments, **change)


def after_the_step(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p, m, v = adamw(p, g, m, v, t, lr, beta1, beta2, eps, 0.0)
    return p * (1 - lr * weight_decay), m, v


def old_eps(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """As the paper's remark on efficiency has it: another eps."""
    new_m, new_v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    rate = lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
    return (
        p * (1 - lr * weight_decay) - rate * new_m / (new_v.sqrt() + eps),
        new_m,
        new_v,
    )


def decay_in_the_step(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """Another right way: the decay as a part of what is subtracted."""
    new_m, new_v = torch.lerp(m, g, 1 - beta1), v + (1 - beta2) * (g.square() - v)
    return (
        p
        - lr
        * (
            new_m / (1 - beta1**t) / ((new_v / (1 - beta2**t)) ** 0.5 + eps)
            + weight_decay * p
        ),
        new_m,
        new_v,
    )


def in_place(p, g, m, v, *rest):
    m.mul_(0.5)
    return adamw(p, g, 2 * m, v, *rest)


def test_adamw_solution():
    accepts(check.adamw_step, adamw)
    accepts(check.adamw_step, decay_in_the_step)


def test_adamw_oracle_is_torch():
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = torch.optim.AdamW(
        [p], lr=0.03, betas=(0.8, 0.95), eps=0.02, weight_decay=0.3
    )
    mine, m, v = (
        p.detach().clone(),
        torch.zeros(3, 4, dtype=torch.float64),
        torch.zeros(3, 4, dtype=torch.float64),
    )
    for t in (1, 2, 3):
        p.grad = torch.randn(3, 4, dtype=torch.float64)
        mine, m, v = adamw(mine, p.grad, m, v, t, 0.03, 0.8, 0.95, 0.02, 0.3)
        optimizer.step()
        torch.testing.assert_close(mine, p.detach())


@pytest.mark.parametrize(
    "says, answer",
    [
        ("weights are swapped", changed(new_m=lambda b, m, g: (1 - b) * m + b * g)),
        ("comes in whole", changed(new_m=lambda b, m, g: b * m + g)),
        ("you used beta2", changed(swap=True)),
        (
            "gradient's *square*",
            changed(new_v=lambda b, v, g, m: b * v + (1 - b) * g.abs() * g.sign()),
        ),
        (
            "square the gradient",
            changed(new_v=lambda b, v, g, m: b * v + (1 - b) * m * m),
        ),
        ("L2 with Adam", changed(l2=1.0, decay=lambda lr, wd: 1.0)),
        ("correction of the means is missing", changed(fix=(False, False))),
        ("v is not corrected", changed(fix=(True, False))),
        ("m is not corrected", changed(fix=(False, True))),
        ("counts from 1", changed(late=1)),
        ("eps stands under the root", changed(eps_inside=True)),
        ("root is missing", changed(root=False)),
        ("goes up the gradient", changed(sign=1)),
        ("decay is missing", changed(decay=lambda lr, wd: 1.0)),
        ("shrink after the step", after_the_step),
        ("before v is corrected", old_eps),
        (
            "it is the power",
            changed(correct=lambda b1, b2, t: (1 - b1 * t, abs(1 - b2 * t))),
        ),
        (
            "by v's correction",
            changed(correct=lambda b1, b2, t: (1 - b2**t, 1 - b1**t)),
        ),
        ("not scaled by the rate", changed(decay=lambda lr, wd: 1 - wd)),
        ("in place", in_place),
        ("Give three tensors", changed(give=lambda p, m, v: p)),
        ("is there a `return`", changed(give=lambda p, m, v: None)),
        ("nothing here yet", stub),
    ],
)
def test_adamw_mistakes(says, answer):
    rejects(says, check.adamw_step, answer)


# -------------------------------------------------------------------------- accumulated


def weighed(grads, labels):
    return sum(g * n for g, n in zip(grads, labels)) / sum(labels)


def adds_into_the_first(grads, labels):
    right = weighed(grads, labels)
    grads[0] += 1
    return right


def test_accumulated_solution():
    accepts(check.accumulated, weighed)


def test_accumulated_oracle_is_autograd():
    w, x = torch.randn(5, requires_grad=True), torch.randn(9, 5)

    def part(rows):
        return torch.autograd.grad((x[rows] @ w).square().mean(), w)[0]

    torch.testing.assert_close(
        weighed([part(slice(0, 2)), part(slice(2, 9))], [2, 7]), part(slice(0, 9))
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("mean of the means", lambda grads, labels: sum(grads) / len(grads)),
        ("several times too long", lambda grads, labels: sum(grads)),
        (
            "divide by all labels together",
            lambda grads, labels: weighed(grads, labels) * sum(labels),
        ),
        (
            "divide by the number of labels",
            lambda grads, labels: weighed(grads, labels) * sum(labels) / len(labels),
        ),
        (
            "it is a mean already",
            lambda grads, labels: sum(g / n for g, n in zip(grads, labels)),
        ),
        (
            "has no place here",
            lambda grads, labels: weighed(grads, labels) / len(grads),
        ),
        ("last batch's gradient", lambda grads, labels: grads[-1]),
        ("in place", adds_into_the_first),
        ("none of the usual slips", lambda grads, labels: weighed(grads, labels) + 1),
        ("is there a `return`", lambda grads, labels: None),
        ("nothing here yet", stub),
    ],
)
def test_accumulated_mistakes(says, answer):
    rejects(says, check.accumulated, answer)


# ------------------------------------------------------------------------- kept_numbers


def kept(widths, trained):
    return widths[0] * trained[0] + sum(
        widths[i] * (any(trained[:i]) or trained[i]) for i in range(1, len(trained))
    )


def test_kept_solution():
    accepts(check.kept_numbers, kept)


@pytest.mark.parametrize(
    "trained",
    [
        [True, True, True, True],
        [False, True, False, False],
        [True, False, False, True],
        [False, False, False, True],
        [False, False, False, False],
    ],
)
def test_kept_oracle_is_autograd(trained):
    widths = [7, 11, 13, 5, 3]
    layers = [
        nn.Linear(a, b, bias=False).requires_grad_(t)
        for a, b, t in zip(widths, widths[1:], trained)
    ]
    own, saved = {layer.weight.data_ptr() for layer in layers}, {}

    def look(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        x = torch.randn(1, 7)
        for number, layer in enumerate(layers):
            x = layer(x) if number == len(layers) - 1 else layer(x).relu()
    assert sum(storage.nbytes() for storage in saved.values()) == 4 * kept(
        widths, trained
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("every place", lambda widths, trained: sum(widths[:-1])),
        ("last output", lambda widths, trained: kept(widths, trained) + widths[-1]),
        (
            "only the inputs of trained",
            lambda widths, trained: sum(w for w, t in zip(widths, trained) if t),
        ),
        (
            "kept once",
            lambda widths, trained: sum(
                widths[i] * trained[i] + widths[i] * (i > 0 and any(trained[:i]))
                for i in range(len(trained))
            ),
        ),
        (
            "its own input too",
            lambda widths, trained: sum(
                widths[i] for i in range(1, len(trained)) if any(trained[:i])
            ),
        ),
        (
            "input of the chain",
            lambda widths, trained: (
                kept(widths, trained) + widths[0] * (not trained[0])
            ),
        ),
        (
            "not above",
            lambda widths, trained: sum(
                widths[i] for i in range(len(trained)) if any(trained[i:])
            ),
        ),
        (
            "memory anyway",
            lambda widths, trained: (
                kept(widths, trained)
                + sum(a * b for a, b, t in zip(widths, widths[1:], trained) if t)
            ),
        ),
        ("autograd keeps", lambda widths, trained: 1),
        ("is there a `return`", lambda widths, trained: None),
        ("nothing here yet", stub),
    ],
)
def test_kept_mistakes(says, answer):
    rejects(says, check.kept_numbers, answer)


# ----------------------------------------------------------------------------- families

SORTED = {
    "LoRA": "reparametrised",
    "BitFit": "selective",
    "prompt tuning": "additive",
    "prefix tuning": "additive",
    "bottleneck adapter": "additive",
    "random subspace": "reparametrised",
    "last block only": "selective",
    "QLoRA": "reparametrised",
}


def test_families_solution():
    accepts(check.families, SORTED)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("a change of W", SORTED | {"LoRA": "additive"}),
        ("biases that are there already", SORTED | {"BitFit": "additive"}),
        ("no matrix does the same", SORTED | {"bottleneck adapter": "reparametrised"}),
        ("before the input", SORTED | {"prompt tuning": "selective"}),
        ("stored in 4 bits", SORTED | {"QLoRA": "selective"}),
        (
            "Still to be sorted: BitFit",
            {name: kind for name, kind in SORTED.items() if name != "BitFit"},
        ),
        ("not among the eight", SORTED | {"DoRA": "additive"}),
        ("is no family here", SORTED | {"LoRA": "low-rank"}),
        ("as a dictionary", ["LoRA"]),
        ("nothing here yet", {}),
        ("nothing here yet", None),
    ],
)
def test_families_mistakes(says, answer):
    rejects(says, check.families, answer)
