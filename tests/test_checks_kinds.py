"""Wrong answers that a check once accepted, and right ones that it once refused, with
others of their kinds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import accepts, rejects
from torch import nn

from minipeft.course import check


class Lora(nn.Module):
    """The solution; the answers below change one line of it."""

    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.linear(x) + self.update(x)

    def update(self, x):
        return self.scale * self.dropout(x) @ self.A.T @ self.B.T


def lora(**methods):
    return type("Mine", (Lora,), methods)


def dropping(p):
    """dropout is p(dropout)."""

    def start(self, linear, r, alpha, dropout=0.0):
        Lora.__init__(self, linear, r, alpha, dropout)
        self.dropout = nn.Dropout(p(dropout))

    return lora(__init__=start)


def base_without_graph(self, x):
    with torch.no_grad():
        y = self.linear(x)
    return y + self.update(x)


def copying(self, linear, r, alpha, dropout=0.0):
    copy = nn.Linear(linear.in_features, linear.out_features)
    copy.load_state_dict(linear.state_dict())
    Lora.__init__(self, copy, r, alpha, dropout)


class Subclass(nn.Linear):
    def __init__(self, linear, r, alpha, dropout=0.0):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.A = nn.Parameter(torch.randn(r, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        self.scale, self.dropout = alpha / r, nn.Dropout(dropout)

    def forward(self, x):
        low = F.linear(self.dropout(x), self.A)
        return super().forward(x) + self.scale * F.linear(low, self.B)


@pytest.mark.parametrize(
    "answer",
    [Lora, lora(__init__=copying), Subclass],
    ids=["plain", "copy", "subclass"],
)
def test_lora_layers_that_are_right(answer):
    accepts(check.lora_layer, answer)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("gradient of x", lora(forward=base_without_graph)),
        (
            "gradient of x",
            lora(forward=lambda s, x: s.linear(x) + s.update(x.detach())),
        ),
        ("gradient of x", lora(forward=lambda s, x: s.linear(x.data) + s.update(x))),
        (
            "reaches B",
            lora(update=lambda s, x: s.scale * s.dropout(x) @ s.A.T @ s.B.detach().T),
        ),
        (
            "`dropout` is the share that is dropped",
            dropping(lambda p: 1 - p if p else p),
        ),
        ("`dropout` is the share that is dropped", dropping(lambda p: 0.5 if p else 0)),
        ("`dropout` is the share that is dropped", dropping(lambda p: p * p * 2)),
    ],
)
def test_lora_layers_that_are_wrong(says, answer):
    rejects(says, check.lora_layer, answer)


def sequential(h, W_down, b_down, W_up, b_up, act):
    return h + act(h @ W_down.T + b_down) @ W_up.T + b_up


def prompt(prompt, x, mask, labels):
    B, n = len(x), len(prompt)
    ones = torch.ones(B, n, dtype=mask.dtype)
    none = torch.full((B, n), -100)
    each = prompt.expand(B, -1, -1)
    return tuple(
        torch.cat(pair, 1) for pair in ((each, x), (ones, mask), (none, labels))
    )


@pytest.mark.parametrize(
    "says, checker, answer",
    [
        (
            "no gradient reaches A",
            check.lora_delta,
            lambda A, B, alpha, r: alpha / r * B @ A.detach(),
        ),
        (
            "not the right gradient of B",
            check.lora_delta,
            lambda A, B, alpha, r: alpha / r * (2 * B - B.detach()) @ A,
        ),
        (
            "not the right gradient of W_down",
            check.sequential_adapter,
            lambda h, W, b, U, c, act: sequential(
                h, 0.5 * W + 0.5 * W.detach(), b, U, c, act
            ),
        ),
        (
            "reaches W_up",
            check.sequential_adapter,
            lambda h, W, b, U, c, act: sequential(h, W, b, U.detach(), c, act),
        ),
        (
            "no gradient reaches p",
            check.soft_prompt,
            lambda p, x, mask, labels: prompt(p.detach(), x, mask, labels),
        ),
        (
            "reaches x",
            check.soft_prompt,
            lambda p, x, mask, labels: prompt(p, x.detach(), mask, labels),
        ),
        (
            "Two shapes do not fit",
            check.soft_prompt,
            lambda p, x, mask, labels: (torch.cat((p, x), 1), mask, labels),
        ),
        (
            "Two shapes do not fit",
            check.soft_prompt,
            lambda p, x, mask, labels: (torch.cat((p[None], x), 1), mask, labels),
        ),
    ],
)
def test_gradients_are_all_compared(says, checker, answer):
    rejects(says, checker, answer)


class Fusion(nn.Module):
    def __init__(self, experts, d):
        super().__init__()
        self.experts = [expert.requires_grad_(False) for expert in experts]
        self.query, self.key = nn.Linear(d, d), nn.Linear(d, d)
        self.value = nn.Linear(d, d, bias=False)
        nn.init.eye_(self.value.weight)
        self.finish()

    def finish(self):
        pass

    def forward(self, y):
        u = torch.stack([expert(y) for expert in self.experts])
        p = (self.query(y) * self.key(u)).sum(-1).softmax(0)
        return y + (p.unsqueeze(-1) * self.value(u)).sum(0)


def fusion(**methods):
    return type("Mine", (Fusion,), methods)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("key.bias", fusion(finish=lambda s: s.requires_grad_(False))),
        (
            "value.weight: frozen",
            fusion(finish=lambda s: s.value.requires_grad_(False)),
        ),
        (
            "query.weight: frozen",
            fusion(finish=lambda s: s.query.requires_grad_(False)),
        ),
        (
            "experts are not frozen",
            fusion(finish=lambda s: [e.requires_grad_() for e in s.experts]),
        ),
        (
            "experts are not frozen",
            fusion(finish=lambda s: s.experts[-1].requires_grad_()),
        ),
    ],
)
def test_fusion_modules(says, answer):
    accepts(check.fusion_module, Fusion)
    rejects(says, check.fusion_module, answer)


def scales(close):
    def find(W, W_new):
        l = (W * W_new).sum(1) / W.square().sum(1)
        return l if close(l[:, None] * W, W_new) else None

    return find


def quotient(W, W_new):
    ratio = W_new / W
    return ratio[:, 0] if torch.allclose(ratio, ratio[:, :1]) else None


def close_enough(a, b):
    return torch.allclose(a, b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("None is the answer", scales(lambda a, b: bool((a - b).abs().max() < 0.5))),
        ("None is the answer", scales(lambda a, b: torch.isclose(a, b).any())),
        ("None is the answer", scales(lambda a, b: torch.allclose(a[0], b[0]))),
        ("None is the answer", scales(close_enough)),
        ("None is the answer", scales(lambda a, b: (a - b).abs().mean() < 1e-6)),
        ("None is the answer", scales(lambda a, b: abs((a - b).mean()) < 1e-6)),
        ("None is the answer", scales(lambda a, b: (a - b).square().mean() < 1e-8)),
        ("stay zero", quotient),
    ],
)
def test_find_scales(says, answer):
    accepts(check.find_scales, scales(torch.allclose))
    rejects(says, check.find_scales, answer)


def d90(reached):
    def find(losses, start, full):
        good = [d for d, loss in losses.items() if reached(loss, start, full)]
        return min(good, default=None)

    return find


@pytest.mark.parametrize(
    "says, answer",
    [
        ("Exactly 90 % is enough", d90(lambda x, s, f: s - x > 0.9 * (s - f))),
        ("90 % of the whole gain", d90(lambda x, s, f: s - x >= 0.9 * s - f)),
        ("90 % of the whole gain", d90(lambda x, s, f: x <= f + 0.1 * s)),
    ],
)
def test_d90(says, answer):
    accepts(check.d90, d90(lambda x, s, f: s - x >= 0.9 * (s - f)))
    rejects(says, check.d90, answer)


def nucleus(inside):
    def keep(probs, p):
        ordered, order = probs.sort(descending=True)
        mask = inside(ordered.cumsum(0) - ordered, p)
        mask[0] = True  # the likeliest token, for p = 0 too
        result = torch.zeros_like(probs)
        result[order[mask]] = ordered[mask]
        return result / result.sum()

    return keep


def test_nucleus_where_the_first_have_exactly_p():
    accepts(check.nucleus, nucleus(lambda before, p: before < p))
    rejects("exactly p", check.nucleus, nucleus(lambda before, p: before <= p))


def rank(least):
    def largest(shapes, layers, targets, budget):
        one = layers * sum(sum(shapes[name]) for name in targets)
        return max(least, np.int64(budget) // one)

    return largest


def test_a_budget_that_pays_for_nothing():
    accepts(check.rank_at_budget, rank(0))
    rejects("the answer is 0", check.rank_at_budget, rank(1))


def rowwise_hadamard(x):
    n = len(x)
    i = torch.arange(n)
    rows = []
    for j in range(n):
        shared = i & j
        ones = sum((shared >> bit) & 1 for bit in range(n.bit_length()))
        rows.append(((1 - 2 * (ones % 2)) * x).sum())
    return torch.stack(rows)


def borrowed_hadamard(x):
    from minipeft.methods.projections import hadamard

    return hadamard(x)


def test_a_transform_of_ones_own_and_a_fast_one():
    rejects("as many as n²", check.fast_hadamard, rowwise_hadamard)
    rejects("You call the course's own", check.fast_hadamard, borrowed_hadamard)


def fold(side):
    def folded(W, b, l, feedforward):
        return (W * l, b) if side(W, l, feedforward) else (W * l[:, None], b * l)

    return folded


def test_shapes_do_not_say_which_side_is_scaled():
    accepts(check.fold_ia3, fold(lambda W, l, feedforward: feedforward))
    by_shape = fold(lambda W, l, _: len(l) == W.shape[1])
    rejects("wrong side", check.fold_ia3, by_shape)


def half_frozen(layer, optimizer):
    if not (layer.A.requires_grad and layer.B.requires_grad):
        return "frozen"
    return "healthy"


def test_an_adapter_of_which_b_alone_learns_is_not_frozen():
    verdicts = [check.diagnose(half_frozen)]
    assert not any(verdicts)


class TestRightInAnotherPrecision:
    def test_accumulated(self):
        def weighed(grads, labels):
            shares = torch.tensor(labels) / sum(labels)  # float32
            return sum(g * share for g, share in zip(grads, shares))

        accepts(check.accumulated, weighed)
        accepts(
            check.accumulated,
            lambda grads, labels: (
                sum(g.float() * n for g, n in zip(grads, labels)) / sum(labels)
            ),
        )

    def test_adamw(self):
        def step(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            m_hat = m / (1 - torch.tensor(beta1) ** t)
            v_hat = v / (1 - torch.tensor(beta2) ** t)
            return p * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps), m, v

        accepts(check.adamw_step, step)

    def test_same_run(self):
        def rates(c, rate_A, rate_B, optimizer):
            c = torch.tensor(c)
            return torch.tensor(rate_A), rate_B / (c if optimizer == "adam" else c**2)

        accepts(check.same_run, rates)

    def test_nearest_kron_from_a_random_start(self):
        def alternate(T, p, m, q, n):
            blocks = T.reshape(p, q, m, n).transpose(1, 2).reshape(p * m, q * n).float()
            d = torch.randn(q * n)
            for _ in range(500):
                c = blocks @ d / d.square().sum()
                d = blocks.T @ c / c.square().sum()
            return c.view(p, m), d.view(q, n)

        accepts(check.nearest_kron, alternate)

    def test_gram_norms_by_a_diagonal(self):
        def norms(W, A, B, s):
            W, A, B = W.detach(), A.detach(), B.detach()
            inner = 2 * s * (B * (W @ A.T)).sum(1) + s**2 * (B @ (A @ A.T) * B).sum(1)
            return ((W @ W.T).diagonal() + inner).sqrt()

        accepts(check.gram_norms, norms)


def test_preparing_with_the_models_own_method():
    def prepare(model):
        for p in model.parameters():
            p.requires_grad_(False)
            if p.is_floating_point():
                p.data = p.data.float()
        model.enable_input_require_grads()
        return model

    accepts(check.prepare_for_training, prepare)


def test_orders_that_do_not_matter():
    def best(scores, budget):
        every = torch.cat(list(scores.values()))
        places = set(every.argsort(descending=True)[:budget].tolist())
        found, at = {}, 0
        for name, score in scores.items():
            found[name] = torch.tensor([at + i in places for i in range(len(score))])
            at += len(score)
        return dict(reversed(found.items()))

    accepts(check.allocate, best)

    def as_numpy(scores, budget):
        return {name: mask.numpy() for name, mask in best(scores, budget).items()}

    accepts(check.allocate, as_numpy)
    # the last one is kept where the budget is 0: order[-1] is the smallest
    rejects(
        "With a budget of 0",
        check.allocate,
        lambda scores, budget: {
            name: score
            >= torch.cat(list(scores.values())).sort(descending=True).values[budget - 1]
            for name, score in scores.items()
        },
    )


def test_a_missed_number_is_not_told():
    from minipeft.course.check.practice import missed

    assert missed(2, 9.5) == "2, which is far too small"
    assert missed(9, 9.5) == "9, which is too small"
    assert missed(-2, -1) == "-2, which is too large"
    assert missed(-2, 2) == "-2, which has the wrong sign"
    assert missed(0.1, 0) == "0.1, which is far too large"
    assert missed(-0.1, 3e-16) == "-0.1, which is far too large"
