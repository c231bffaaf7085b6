"""Chapter 02's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from judging import accepts, judge, rejects
from torch import nn

from minipeft.course import check, compare


def stub(*arguments):
    raise NotImplementedError


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


def one_step_late(beta1, beta2, t):
    return 1 - beta1 ** max(t - 1, 1), 1 - beta2 ** max(t - 1, 1)


def one_size(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    _, new_m, new_v = adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay)
    size = (new_v / (1 - beta2**t)).mean().sqrt() + eps
    step = lr * new_m / (1 - beta1**t) / size
    return p * (1 - lr * weight_decay) - step, new_m, new_v


def by_sign(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    _, new_m, new_v = adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay)
    return p * (1 - lr * weight_decay) - lr * new_m.sign(), new_m, new_v


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
        ("has the rate twice", changed(decay=lambda lr, wd: 1 - lr * lr * wd)),
        ("in this order", changed(give=lambda p, m, v: (p, v, m))),
        ("beta1 is an argument", changed(new_m=lambda b, m, g: 0.9 * m + 0.1 * g)),
        (
            "beta2 is an argument",
            changed(new_v=lambda b, v, g, m: 0.999 * v + 0.001 * g * g),
        ),
        ("absolute value", changed(new_v=lambda b, v, g, m: b * v + (1 - b) * g.abs())),
        ("You correct with t - 1", changed(correct=one_step_late)),
        ("every number has its own v", one_size),
        ("by the sign of m", by_sign),
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


def halved(grads, labels):
    """A running mean, of two at a time."""
    found = grads[0]
    for g in grads[1:]:
        found = (found + g) / 2
    return found


def in_32_bits(grads, labels):
    """The gradients have 32 bits, and whoever counts on that is right."""
    weights = torch.tensor(labels).float() / sum(labels)
    return torch.einsum("n...,n->...", torch.stack(grads), weights)


def running(grads, labels):
    found, seen = torch.zeros_like(grads[0]), 0
    for g, n in zip(grads, labels):
        seen += n
        found = found + (g - found) * (n / seen if n else 0)
    return found


def test_accumulated_solution():
    accepts(check.accumulated, weighed)
    accepts(check.accumulated, in_32_bits)
    accepts(check.accumulated, running)


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
        ("Each is a mean already", lambda grads, labels: sum(grads) / sum(labels)),
        ("two at a time", halved),
        ("last batch's gradient", lambda grads, labels: grads[-1]),
        (
            "equal counts of labels",
            lambda grads, labels: (
                grads[0] if len({*labels}) == 1 else weighed(grads, labels)
            ),
        ),
        (
            "without labels has no weight",
            lambda grads, labels: weighed(grads, [max(1, n) for n in labels]),
        ),
        ("in place", adds_into_the_first),
        ("every entry is off by 1", lambda grads, labels: weighed(grads, labels) + 1),
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


# ------------------------------------------------------------------------ predict_steps


def distances(n=50):
    """The right predictions, by closed formulas."""
    return {
        "Adam, 1 step, g = 1000": 1,
        f"Adam, {n} steps, g = 0.001": n,
        "AdamW, 1 step, g = 0": 0.2,
        "Adam with L2, 1 step, g = 0": 1,
        "SGD, 1 step, g = 1000": 1000,
        f"SGD, {n} steps, g = 0.001": 0.001 * n,
        f"momentum, {n} steps, g = 1": 10 * n - 90 * (1 - 0.9**n),
    }


@pytest.mark.parametrize("n", [20, 50, 100])
def test_steps_right_answers(n):
    judged = partial(check.predict_steps, n=n)
    accepts(judged, distances(n))
    accepts(judged, {case: np.float32(v) for case, v in distances(n).items()})
    accepts(judged, {case: torch.tensor(float(v)) for case, v in distances(n).items()})
    accepts(judged, dict(reversed(distances(n).items())))


# Adam's eps of 1e-8 beside a gradient of 0.001, which the closed forms leave out
EPS_BESIDE_G = 1.01 * 1e-5


def test_steps_oracle_is_torch():
    """Adam, AdamW and momentum of torch.optim, on one number."""
    makers = {
        "Adam, 50 steps, g = 0.001": (torch.optim.Adam, {}, 0.0, 0.001, 50),
        "AdamW, 1 step, g = 0": (torch.optim.AdamW, {"weight_decay": 0.1}, 2.0, 0.0, 1),
        "Adam with L2, 1 step, g = 0": (
            torch.optim.Adam,
            {"weight_decay": 0.1},
            2.0,
            0.0,
            1,
        ),
        "momentum, 50 steps, g = 1": (torch.optim.SGD, {"momentum": 0.9}, 0.0, 1.0, 50),
    }
    for case, (maker, options, start, g, steps) in makers.items():
        p = torch.tensor([start], dtype=torch.float64, requires_grad=True)
        optimizer = maker([p], lr=1e-3, **options)
        for _ in range(steps):
            p.grad = torch.full_like(p, g)
            optimizer.step()
        went = abs(p.item() - start) / 1e-3
        assert went == pytest.approx(distances()[case], rel=EPS_BESIDE_G), case


@pytest.mark.parametrize(
    "says, answer",
    [
        ("the quotient is one", {"Adam, 1 step, g = 1000": 1000}),
        ("the length of the rate", {"Adam, 50 steps, g = 0.001": 0.05}),
        ("the length of the rate", {"Adam, 50 steps, g = 0.001": 1}),
        ("lr · 0.1 · 2", {"AdamW, 1 step, g = 0": 0}),
        ("lr · 0.1 · 2", {"AdamW, 1 step, g = 0": 1}),
        ("divides it by its size", {"Adam with L2, 1 step, g = 0": 0.2}),
        ("a step is lr · g", {"SGD, 1 step, g = 1000": 1}),
        ("they add up", {"SGD, 50 steps, g = 0.001": 0.001}),
        ("they add up", {"SGD, 50 steps, g = 0.001": 50}),
        ("needs some ten steps", {"momentum, 50 steps, g = 1": 500}),
        ("needs some ten steps", {"momentum, 50 steps, g = 1": 50}),
        ("expected a number", {"SGD, 1 step, g = 1000": "1000"}),
        ("write your prediction", {"SGD, 1 step, g = 1000": None}),
        ("is not one of", {"SGD": 1}),
    ],
)
def test_steps_mistakes(says, answer):
    rejects(says, check.predict_steps, distances() | answer)


def test_steps_that_are_not_all_there():
    rejects("no prediction for", check.predict_steps, {"SGD, 1 step, g = 1000": 1000})
    rejects("Give a dictionary", check.predict_steps, list(distances().values()))
    rejects("nothing here yet", check.predict_steps, None)


# ------------------------------------------------------------------------ choose_method


def mean(values):
    return sum(values) / len(values)


def not_behind(a, b):
    return compare(a, b, loss=True).verdict != "behind"


def chosen(methods, card, bill=None, judge=not_behind, least=True, frozen=2, join=mean):
    """The rule; each mistake below changes one of its parts."""
    bill = bill or (
        lambda way: (
            frozen * (way["total"] - way["trained"])
            + 16 * way["trained"]
            + way["activations"]
        )
    )
    fit = {name: way["loss"] for name, way in methods.items() if bill(way) <= card}
    if not fit:
        return min(methods, key=lambda name: methods[name]["trained"])
    best = min(fit, key=lambda name: join(fit[name].values()))
    good = [name for name in fit if judge(fit[name], fit[best])]
    pick = min if least else max
    return pick(good, key=lambda name: methods[name]["trained"])


def of_all(way):
    return 2 * way["total"] + 16 * way["trained"] + way["activations"]


def with_arrays(methods, card):
    names = list(methods)
    total, trained, kept = (
        np.array([methods[n][key] for n in names], dtype=float)
        for key in ("total", "trained", "activations")
    )
    fits = 2 * total + 14 * trained + kept <= card
    loss = np.array([[methods[n]["loss"][s] for s in range(3)] for n in names])
    best = np.where(fits, loss.mean(1), np.inf).argmin()
    good = [i for i in range(len(names)) if fits[i] and not_behind(loss[i], loss[best])]
    return names[min(good, key=lambda i: trained[i])]


def test_choose_method_right_answers():
    accepts(check.choose_method, chosen)
    accepts(check.choose_method, with_arrays)
    four_bits = partial(check.choose_method, frozen=0.5)
    accepts(four_bits, lambda *given: chosen(*given, frozen=0.5))


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "leave the activations out",
            lambda *g: chosen(
                *g, bill=lambda w: 2 * (w["total"] - w["trained"]) + 16 * w["trained"]
            ),
        ),
        (
            "but they are there",
            lambda *g: chosen(*g, bill=lambda w: 16 * w["trained"] + w["activations"]),
        ),
        ("whether it fits or not", lambda *g: chosen(*g, bill=lambda w: 0)),
        ("with the lowest mean", lambda *g: chosen(*g, judge=lambda a, b: a is b)),
        (
            "may be behind the best that fits",
            lambda *g: chosen(*g, judge=lambda a, b: True),
        ),
        (
            "may be behind the best that fits",
            lambda *g: chosen(*g, judge=lambda a, b: compare(a, b).verdict != "behind"),
        ),
        ("by the rule it is", lambda *g: chosen(*g, least=False)),
        ("one lucky seed", lambda *g: chosen(*g, join=min)),
        ("one lucky seed", lambda *g: chosen(*g, join=lambda losses: [*losses][0])),
        ("for the trained parameters as well", lambda *g: chosen(*g, bill=of_all)),
        ("", lambda *g: chosen(*g, frozen=4)),
        ("", lambda methods, card: chosen(methods, card * 2**30 / 1e9)),
        ("", lambda methods, card: chosen(methods, 0.999 * card)),
        ("is not one of", lambda *g: "QLoRA"),
        ("is not one of", lambda *g: 3),
        ("is there a `return`", lambda *g: None),
        ("nothing here yet", stub),
    ],
)
def test_choose_method_mistakes(says, answer):
    verdicts = judge(check.choose_method, answer)
    assert not any(verdicts)
    assert any(says in verdict.message for verdict in verdicts), verdicts


# ---------------------------------------------------------------------------- fine_tune


@pytest.fixture(scope="module", autouse=True)
def optimizers_are_loaded():
    """The first use of torch.optim takes seconds, which no check should wait for."""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).zero_grad()


def tune(
    model,
    batches,
    lr,
    warmup,
    clip,
    weight_decay,
    rate=lambda lr, t, warmup: lr * min(1, t / warmup),
    decays=lambda p: p.dim() > 1,
    zero=True,
    clipping=nn.utils.clip_grad_norm_,
    maker=torch.optim.AdamW,
    trained=lambda p: p.requires_grad,
    give=lambda losses: losses,
    fresh=False,
    one_batch=False,
    graph=False,
    warm=None,
):
    """The solution; each mistake below changes one of its parts."""
    params = [p for p in model.parameters() if trained(p)]
    groups = [
        {"params": [p for p in params if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in params if not decays(p)], "weight_decay": 0.0},
    ]
    optimizer = maker([g for g in groups if g["params"]], lr=lr)
    losses = []
    for t, batch in enumerate(batches, 1):
        for group in optimizer.param_groups[:warm]:
            group["lr"] = rate(lr, t, warmup)
        if fresh:
            optimizer = maker([g for g in groups if g["params"]], lr=lr)
            for group in optimizer.param_groups:
                group["lr"] = rate(lr, t, warmup)
        loss = model(**(batches[0] if one_batch else batch)).loss
        if zero:
            optimizer.zero_grad()
        loss.backward()
        clipping(params, clip)
        optimizer.step()
        losses.append(loss if graph else loss.item())
    return give(losses)


def by_schedule(model, batches, lr, warmup, clip, weight_decay):
    """With a LambdaLR, and tensors as losses."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if "norm" in n or n.endswith("bias")]
    rest = [p for n, p in named if all(p is not q for q in plain)]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": weight_decay}, {"params": plain}],
        lr=lr,
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup)
    )
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest + plain, clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return tuple(losses)


def tuned(**changes):
    return lambda *given: tune(*given, **changes)


def each(params, clip):
    for p in params:
        nn.utils.clip_grad_norm_([p], clip)


def by_group(params, clip):
    for matrices in (True, False):
        nn.utils.clip_grad_norm_([p for p in params if (p.dim() > 1) == matrices], clip)


def always(params, clip):
    total = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
    for p in params:
        if p.grad is not None:
            p.grad.mul_(clip / (total + 1e-6))


def without_biases(model, *given):
    few = [p for p in model.parameters() if p.dim() < 2 and p.requires_grad]
    for p in few:
        p.requires_grad_(False)
    losses = tune(model, *given)
    for p in few:
        p.requires_grad_(True)
    return losses


def on_a_copy(model, *given):
    return tune(copy.deepcopy(model), *given)


def thawed(model, *given):
    return tune(model.requires_grad_(True), *given)


@pytest.mark.parametrize("answer", [tune, by_schedule])
def test_fine_tune_right_answers(answer):
    for verdict in judge(check.fine_tune, answer, variants=2):
        assert verdict, verdict


@pytest.mark.parametrize(
    "says, answer",
    [
        ("earlier batches are still in .grad", tuned(zero=False)),
        ("The rate does not rise", tuned(rate=lambda lr, t, w: lr)),
        (
            "Your first step has the rate 0",
            tuned(rate=lambda lr, t, w: lr * min(1, (t - 1) / w)),
        ),
        ("The gradients are not clipped", tuned(clipping=lambda params, clip: None)),
        ("each tensor by itself", tuned(clipping=each)),
        ("You clip the values", tuned(clipping=nn.utils.clip_grad_value_)),
        ("You scale every gradient", tuned(clipping=always)),
        ("norms decay too", tuned(decays=lambda p: True)),
        ("Nothing decays", tuned(decays=lambda p: False)),
        ("got into the gradient", tuned(maker=torch.optim.Adam)),
        ("plain gradient descent", tuned(maker=torch.optim.SGD)),
        ("none of the usual slips", tuned(maker=torch.optim.NAdam)),
        ("not trained, for no parameter group", without_biases),
        ("The rate rises on and on", tuned(rate=lambda lr, t, w: lr * t / w)),
        (
            "set behind the step",
            tuned(rate=lambda lr, t, w: lr if t == 1 else lr * min(1, (t - 1) / w)),
        ),
        ("one step ahead", tuned(rate=lambda lr, t, w: lr * min(1, (t + 1) / w))),
        ("do not warm up", tuned(warm=1)),
        ("first batch again and again", tuned(one_batch=True)),
        ("begin from zero in each step", tuned(fresh=True)),
        ("each parameter group by itself", tuned(clipping=by_group)),
        ("groups are turned round", tuned(decays=lambda p: p.dim() < 2)),
        ("three dimensions does not decay", tuned(decays=lambda p: p.dim() == 2)),
        ("still holds the graph", tuned(graph=True)),
        ("still holds the graph", tuned(graph=True, give=tuple)),
        ("A frozen parameter has changed", thawed),
        ("The model has not changed", on_a_copy),
        ("return the list of losses", tuned(give=lambda losses: None)),
        ("Return a list of 7 losses", tuned(give=lambda losses: losses[1:])),
        ("Return a list of 7 losses", tuned(give=mean)),
        ("as it was before its step", tuned(give=lambda losses: [*losses[1:], 0.0])),
        ("nothing here yet", stub),
    ],
)
def test_fine_tune_mistakes(says, answer):
    for verdict in judge(check.fine_tune, answer, variants=2):
        assert not verdict and says in verdict.message, verdict.message


# ---------------------------------------------- what a second trial by learners found


def flat_decay(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    decay = weight_decay * (p.ndim > 1)
    return adamw(p, g, m, v, t, lr, beta1, beta2, eps, decay)


def decay_with_a_gradient(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    decay = weight_decay * (g != 0)
    return adamw(p, g, m, v, t, lr, beta1, beta2, eps, decay)


def by_count(grads, labels):
    found = dict(zip(labels, grads))
    return sum(g * n for n, g in found.items()) / sum(found)


@pytest.mark.parametrize(
    "says, checker, answer",
    [
        ("if it is a vector", "adamw_step", flat_decay),
        ("gradient is zero", "adamw_step", decay_with_a_gradient),
        ("labels are sorted", "accumulated", lambda g, n: weighed(g, sorted(n))),
        ("replace each other", "accumulated", by_count),
        ("eight batches alone", "accumulated", lambda g, n: weighed(g[:8], n[:8])),
        (
            "they are different places",
            "kept_numbers",
            lambda widths, trained: sum(
                {w for i, w in enumerate(widths[:-1]) if any(trained[: i + 1])}
            ),
        ),
    ],
)
def test_what_learners_wrote(says, checker, answer):
    rejects(says, getattr(check, checker), answer)


def in_order(order):
    """Losses are compared without their seeds."""

    def alike(a, b):
        return compare(order(a.values()), order(b.values()), loss=True)

    return lambda *g: chosen(*g, judge=lambda a, b: alike(a, b).verdict != "behind")


def smallest_bill(methods, card):
    fit = {n: w for n, w in methods.items() if of_all(w) - 2 * w["trained"] <= card}
    best = min(fit, key=lambda n: mean(fit[n]["loss"].values()))
    good = [n for n in fit if not_behind(fit[n]["loss"], fit[best]["loss"])]
    return min(good, key=lambda n: of_all(fit[n]) - 2 * fit[n]["trained"])


def first_behind(methods, card):
    fit = {n: w for n, w in methods.items() if of_all(w) - 2 * w["trained"] <= card}
    found = best = min(fit, key=lambda n: mean(fit[n]["loss"].values()))
    for name in sorted(fit, key=lambda n: -fit[n]["trained"]):
        if fit[name]["trained"] < fit[best]["trained"]:
            if not not_behind(fit[name]["loss"], fit[best]["loss"]):
                break
            found = name
    return found


@pytest.mark.parametrize(
    "says, answer",
    [
        ("pairs two dictionaries", in_order(list)),
        ("pairs two dictionaries", in_order(sorted)),
        ("smallest bill", smallest_bill),
        ("stop at the first method", first_behind),
        ("median", lambda *g: chosen(*g, join=lambda x: sorted(x)[1])),
    ],
)
def test_what_learners_chose(says, answer):
    rejects(says, check.choose_method, answer)


def zeroed_late(model, batches, *given):
    """zero_grad() at the end of a step."""

    def own(params, clip):
        nn.utils.clip_grad_norm_(params, clip)

    first = {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}

    def clipping(params, clip):
        for p in params:
            if id(p) in first and p.grad is not None:
                p.grad += first.pop(id(p))
        own(params, clip)

    return tune(model, batches, *given, clipping=clipping)


def with_the_frozen(model, *given):
    def clipping(params, clip):
        nn.utils.clip_grad_norm_(model.parameters(), clip)

    return tune(model, *given, clipping=clipping)


def frozen_at_the_end(model, *given):
    losses = tune(model, *given)
    model.requires_grad_(False)
    return losses


@pytest.mark.parametrize(
    "says, answer",
    [
        ("an earlier run left in .grad", zeroed_late),
        ("count in your norm", with_the_frozen),
        ("leave requires_grad as it was", frozen_at_the_end),
        ("one number, decays", tuned(decays=lambda p: p.dim() != 1)),
        ("with a single row", tuned(decays=lambda p: p.numel() > max((*p.shape, 1)))),
    ],
)
def test_what_learners_trained(says, answer):
    for verdict in judge(check.fine_tune, answer, variants=2):
        assert not verdict and says in verdict.message, verdict.message
