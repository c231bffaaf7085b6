"""Chapter 12's checks accept the solution, refuse the blank stub kindly, and name the
mistakes that are plausible."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judging import accepts, judge, rejects
from torch import nn

from minipeft.course import check, compare
from minipeft.slot import Adapter


def blank(*args):
    raise NotImplementedError


# -------------------------------------------------------------------------- soft_prompt


def soft_prompt(prompt, x, mask, labels):
    n = len(prompt)
    return (
        torch.cat((prompt.expand(len(x), -1, -1), x), 1),
        F.pad(mask, (n, 0), value=1),
        F.pad(labels, (n, 0), value=-100),
    )


def with_x(join):
    return lambda prompt, x, *rest: (
        join(prompt.expand(len(x), -1, -1), x),
        *soft_prompt(prompt, x, *rest)[1:],
    )


def with_mask(change):
    def answer(prompt, x, mask, labels):
        x, _, labels = soft_prompt(prompt, x, mask, labels)
        return x, change(mask, len(prompt)), labels

    return answer


def with_labels(change):
    return lambda prompt, x, mask, labels: (
        *soft_prompt(prompt, x, mask, labels)[:2],
        change(labels, len(prompt)),
    )


def ones(mask, n):
    return torch.ones(len(mask), n, dtype=mask.dtype)


def test_soft_prompt_solutions():
    accepts(check.soft_prompt, soft_prompt)
    accepts(
        check.soft_prompt,
        lambda prompt, x, mask, labels: (
            torch.cat((prompt[None].repeat(len(x), 1, 1), x), 1),
            torch.cat((mask.new_ones(len(x), len(prompt)), mask), 1),
            torch.cat((labels.new_full((len(x), len(prompt)), -100), labels), 1),
        ),
    )
    accepts(
        check.soft_prompt,
        with_mask(
            lambda mask, n: torch.cat((torch.ones(len(mask), n), mask), 1).bool()
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("stands behind the text", with_x(lambda p, x: torch.cat((x, p), 1))),
        (
            "You add the prompt",
            with_x(
                lambda p, x: torch.cat((x[:, : p.shape[1]] + p, x[:, p.shape[1] :]), 1)
            ),
        ),
        (
            "takes the place of the first tokens",
            with_x(lambda p, x: torch.cat((p, x[:, p.shape[1] :]), 1)),
        ),
        ("reversed order", with_x(lambda p, x: torch.cat((p.flip(1), x), 1))),
        ("lost touch", with_x(lambda p, x: torch.cat((p.detach(), x), 1))),
        ("the shape", with_x(lambda p, x: x[:, 1:])),
        ("mask hides the prompt", with_mask(lambda mask, n: F.pad(mask, (n, 0)))),
        (
            "at the end of the mask",
            with_mask(lambda mask, n: F.pad(mask, (0, n), value=1)),
        ),
        (
            "padding has become visible",
            with_mask(lambda mask, n: torch.ones(len(mask), mask.shape[1] + n)),
        ),
        (
            "repeat the start of the text's mask",
            with_mask(lambda mask, n: torch.cat((mask[:, :n], mask), 1)),
        ),
        ("mask is as long as before", with_mask(lambda mask, n: mask)),
        ("labels are as long as before", with_labels(lambda labels, n: labels)),
        (
            "labels are 0, and 0 is a token",
            with_labels(lambda labels, n: F.pad(labels, (n, 0))),
        ),
        (
            "labels are -1",
            with_labels(lambda labels, n: F.pad(labels, (n, 0), value=-1)),
        ),
        (
            "belong in front",
            with_labels(lambda labels, n: F.pad(labels, (0, n), value=-100)),
        ),
        (
            "repeat the first label",
            with_labels(
                lambda labels, n: torch.cat((labels[:, :1].expand(-1, n), labels), 1)
            ),
        ),
        (
            "cut the labels",
            with_labels(lambda labels, n: F.pad(labels, (n, 0), value=-100)[:, :-n]),
        ),
        (
            "no whole numbers",
            with_labels(
                lambda labels, n: torch.cat(
                    (torch.full((len(labels), n), -100.0), labels), 1
                )
            ),
        ),
        (
            "a new Parameter",
            with_x(
                lambda p, x: torch.cat((torch.nn.Parameter(p.detach().clone()), x), 1)
            ),
        ),
        ("Your x has the shape", with_x(lambda p, x: torch.cat((p[:, :1], x), 1))),
        (
            "Give me three tensors",
            lambda prompt, x, mask, labels: torch.cat(
                (prompt.expand(len(x), -1, -1), x), 1
            ),
        ),
        (
            "same number of dimensions",
            lambda prompt, x, mask, labels: (torch.cat((prompt, x), 1), mask, labels),
        ),
    ],
)
def test_soft_prompt_mistakes(says, answer):
    rejects(says, check.soft_prompt, answer)


# ------------------------------------------------------------------------------- places


def places(mask, n):
    return F.pad(mask, (n, 0), value=1), (mask.cumsum(1) - 1).clamp(min=0) + n


def positions(change):
    return lambda mask, n: (places(mask, n)[0], change(mask, n))


def masks(change):
    return lambda mask, n: (change(mask, n), places(mask, n)[1])


def test_places_solutions():
    accepts(check.places, places)
    accepts(
        check.places,
        lambda mask, n: (
            (wide := F.pad(mask, (n, 0), value=1)),
            (wide.cumsum(1) - 1)[:, n:],
        ),
    )
    accepts(
        check.places,
        lambda mask, n: (
            torch.cat((mask.new_ones(len(mask), n), mask), 1),
            torch.arange(mask.shape[1]) - mask.argmax(1, keepdim=True) + n,
        ),
    )
    accepts(
        check.places,
        positions(lambda mask, n: (mask.cumsum(1) - 1 + n).masked_fill(mask == 0, 1)),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("not shifted: they begin at 0", positions(lambda mask, n: mask.cumsum(1) - 1)),
        (
            "count the padding on the left",
            positions(
                lambda mask, n: n + torch.arange(mask.shape[1]).expand(mask.shape)
            ),
        ),
        (
            "not shifted, and they count padding",
            positions(lambda mask, n: torch.arange(mask.shape[1]).expand(mask.shape)),
        ),
        ("one too high", positions(lambda mask, n: mask.cumsum(1) + n)),
        ("shifted by n twice", positions(lambda mask, n: mask.cumsum(1) - 1 + 2 * n)),
        (
            "those of the text alone",
            positions(lambda mask, n: F.pad(mask, (n, 0), value=1).cumsum(1) - 1),
        ),
        ("should have", positions(lambda mask, n: 3 * mask.cumsum(1) + n)),
        ("one too low", positions(lambda mask, n: mask.cumsum(1) - 2 + n)),
        (
            "take off all padding, on whichever side",
            positions(
                lambda mask, n: (
                    torch.arange(mask.shape[1]) + n - (mask == 0).sum(1, keepdim=True)
                )
            ),
        ),
        (
            "padded by two on the right",
            positions(
                lambda mask, n: (
                    (mask.cumsum(1) - 1 + n) * (mask[:, -1:] * 1.0) + (1 - mask[:, -1:])
                )
            ),
        ),
        (
            "count the padding on the left",
            positions(
                lambda mask, n: (
                    torch.arange(mask.shape[1])[None] + n
                    if len(mask) == 1
                    else places(mask, n)[1]
                )
            ),
        ),
        ("has the shape", masks(lambda mask, n: F.pad(mask, (n + 1, 0), value=1))),
        ("mask hides the prefix", masks(lambda mask, n: F.pad(mask, (n, 0)))),
        ("at the end of the mask", masks(lambda mask, n: F.pad(mask, (0, n), value=1))),
        (
            "padding has become visible",
            masks(lambda mask, n: torch.ones(len(mask), mask.shape[1] + n)),
        ),
        ("as long as before", masks(lambda mask, n: mask)),
        ("Give me two tensors", lambda mask, n: F.pad(mask, (n, 0), value=1)),
    ],
)
def test_places_mistakes(says, answer):
    rejects(says, check.places, answer)


# -------------------------------------------------------------------------- prefix_gate


def scores_of(q, k, pk, root=None, masked=True):
    root = q.shape[-1] ** 0.5 if root is None else root
    text = q @ k.T / root
    return q @ pk.T / root, (
        text.masked_fill(~torch.ones_like(text).tril().bool(), -torch.inf)
        if masked
        else text
    )


def share(prefix, text):
    return torch.softmax(torch.cat((prefix, text), 1), 1)[:, : prefix.shape[1]]


def prefix_gate(q, k, pk):
    return share(*scores_of(q, k, pk)).sum(1)


def by_exp(q, k, pk):
    prefix, text = (scores.exp().sum(1) for scores in scores_of(q, k, pk))
    return prefix / (prefix + text)


def by_logsumexp(q, k, pk):
    prefix, text = (scores.logsumexp(1) for scores in scores_of(q, k, pk))
    return torch.sigmoid(prefix - text)


def by_counting(q, k, pk):
    return len(pk) / (len(pk) + torch.arange(1, len(q) + 1, dtype=q.dtype))


def without_exp(q, k, pk):
    prefix, text = scores_of(q, k, pk, masked=False)
    return prefix.sum(1) / (prefix.sum(1) + text.tril().sum(1))


def two_maxima(q, k, pk):
    prefix, text = (
        (scores - scores.amax(1, keepdim=True)).exp().sum(1)
        for scores in scores_of(q, k, pk)
    )
    return prefix / (prefix + text)


def test_prefix_gate_solutions():
    accepts(check.prefix_gate, prefix_gate)
    accepts(check.prefix_gate, lambda q, k, pk: prefix_gate(q, k, pk)[:, None])
    accepts(check.prefix_gate, by_logsumexp)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("not finite", by_exp),
        ("share for each vector", lambda q, k, pk: share(*scores_of(q, k, pk))),
        (
            "That is the ratio",
            lambda q, k, pk: torch.div(*(s.exp().sum(1) for s in scores_of(q, k, pk))),
        ),
        ("share of the text", lambda q, k, pk: 1 - prefix_gate(q, k, pk)),
        (
            "not masked",
            lambda q, k, pk: share(*scores_of(q, k, pk, masked=False)).sum(1),
        ),
        ("not divided", lambda q, k, pk: share(*scores_of(q, k, pk, root=1)).sum(1)),
        ("You count keys", by_counting),
        ("mean over the prefix", lambda q, k, pk: share(*scores_of(q, k, pk)).mean(1)),
        ("before it is divided", lambda q, k, pk: scores_of(q, k, pk)[0].exp().sum(1)),
        ("leave the exp out", without_exp),
        (
            "over the prefix alone",
            lambda q, k, pk: torch.softmax(scores_of(q, k, pk)[0], 1).sum(1),
        ),
        (
            "masked scores to zero",
            lambda q, k, pk: share(
                scores_of(q, k, pk)[0], scores_of(q, k, pk, masked=False)[1].tril()
            ).sum(1),
        ),
        ("one maximum for both", two_maxima),
        (
            "mask the prefix too",
            lambda q, k, pk: share(
                scores_of(q, k, pk)[0].masked_fill(
                    ~torch.ones(len(q), len(pk)).tril().bool(), -torch.inf
                ),
                scores_of(q, k, pk)[1],
            ).sum(1),
        ),
    ],
)
def test_prefix_gate_mistakes(says, answer):
    rejects(says, check.prefix_gate, answer)


# ------------------------------------------------------------------------- predict_gate

e = math.e
GATES = {
    "zero keys": 0.25,
    "score 2": e**2 / (e**2 + 3),
    "all up by 3": e**2 / (e**2 + 3),
    "query doubled": e**4 / (e**4 + 3),
    "stands twice": 0.4,
    "spread": e**0.5 / (e**0.5 + 3),
    "what is left": 0.75,
}


def test_predict_gate_right_answers():
    accepts(check.predict_gate, GATES)
    accepts(check.predict_gate, {k: np.float32(v) for k, v in GATES.items()}, 10, 30)
    accepts(check.predict_gate, {k: torch.tensor(v) for k, v in GATES.items()})
    accepts(check.predict_gate, {k: round(v, 2) for k, v in reversed(GATES.items())})


def test_predict_gate_with_other_numbers():
    other = {
        "zero keys": 5 / 50,
        "score 2": 5 * e**2 / (5 * e**2 + 45),
        "all up by 3": 5 * e**2 / (5 * e**2 + 45),
        "query doubled": 5 * e**4 / (5 * e**4 + 45),
        "stands twice": 10 / 55,
        "spread": 5 * e**0.5 / (5 * e**0.5 + 45),
        "what is left": 0.9,
    }
    accepts(check.predict_gate, other, 5, 45)
    rejects("count the keys", check.predict_gate, GATES, 5, 45)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", [0.25]),
        (
            "no prediction for 'spread'",
            {k: v for k, v in GATES.items() if k != "spread"},
        ),
        ("expected a number", GATES | {"score 2": "0.7"}),
        ("nothing here yet", GATES | {"score 2": None}),
        ("count the keys", GATES | {"zero keys": 0.0}),
        ("count the keys", GATES | {"zero keys": 1 / 3}),
        ("between 0 and 1", GATES | {"zero keys": 25}),
        ("e⁰ = 1 for each", GATES | {"score 2": 0.4}),
        ("added to all scores alike", GATES | {"all up by 3": 0.98}),
        ("e⁴ and e⁰", GATES | {"query doubled": GATES["score 2"]}),
        ("20 keys beside 30", GATES | {"stands twice": 0.25}),
        ("mean of e^s", GATES | {"spread": 0.25}),
        ("weakened by 1 - g", GATES | {"what is left": 1.0}),
    ],
)
def test_predict_gate_mistakes(says, answer):
    rejects(says, check.predict_gate, answer)


# ---------------------------------------------------------------------------- search_on


def searched(losses, really=None, pick=None):
    finite = {r: each for r, each in losses.items() if np.isfinite(each).all()}
    best = min(finite, key=pick or (lambda rate: np.mean(finite[rate])))

    def worse(rate):
        if rate not in finite:
            return True
        return compare(finite[best], finite[rate], loss=True).verdict == "ahead"

    def ends(rate):
        return really(losses, best, rate, worse) if really else worse(rate)

    sides = set()
    if not any(rate < best and ends(rate) for rate in losses):
        sides.add("smaller")
    if not any(rate > best and ends(rate) for rate in losses):
        sides.add("larger")
    return best, sides


def in_loops(losses):
    """Another style: lists, and two sorted halves."""
    rates = sorted(losses)
    mean = [np.mean(losses[rate]) for rate in rates]
    best = int(np.nanargmin(mean))
    open_to = []
    for side, others in (("smaller", rates[:best]), ("larger", rates[best + 1 :])):
        done = False
        for rate in others:
            if not np.isfinite(np.mean(losses[rate])):
                done = True
            elif (
                compare(losses[rate], losses[rates[best]], loss=True).verdict
                == "behind"
            ):
                done = True
        if not done:
            open_to.append(side)
    return [rates[best], open_to]


def only_next(losses, best, rate, worse):
    rates = sorted(losses)
    return abs(rates.index(rate) - rates.index(best)) == 1 and worse(rate)


def diverged_is_unknown(losses, best, rate, worse):
    return bool(np.isfinite(losses[rate]).all()) and worse(rate)


def without_the_nan(losses):
    kept = {rate: [x for x in each if x == x] for rate, each in losses.items()}
    kept = {rate: each for rate, each in kept.items() if each}
    return min(kept, key=lambda rate: np.mean(kept[rate])), searched(losses)[1]


def test_search_on_right_answers():
    accepts(check.search_on, searched)
    accepts(check.search_on, in_loops)


def test_search_on_may_ask_for_the_other_sides():
    def done(losses):
        best, sides = searched(losses)
        return best, {"smaller", "larger"} - sides

    accepts(check.search_on, done, "done")
    rejects("name those that are done", check.search_on, searched, "done")


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("is there a `return`", lambda losses: None),
        ("Return two things", lambda losses: searched(losses)[0]),
        ("should be one of", lambda losses: ("0.1", set())),
        ("are a set of", lambda losses: (searched(losses)[0], "larger")),
        ("are a set of", lambda losses: (searched(losses)[0], {"up"})),
        (
            "largest mean",
            lambda losses: searched(losses, pick=lambda rate: -np.mean(losses[rate])),
        ),
        (
            "One lucky seed",
            lambda losses: searched(losses, pick=lambda rate: min(losses[rate])),
        ),
        ("a seed has diverged", without_the_nan),
        (
            "Comparisons with nan",
            lambda losses: (
                min(losses, key=lambda rate: np.mean(losses[rate])),
                searched(losses)[1],
            ),
        ),
        (
            "higher by chance",
            lambda losses: searched(losses, lambda losses, best, rate, worse: True),
        ),
        ("one further on may be", lambda losses: searched(losses, only_next)),
        ("no need to search", lambda losses: searched(losses, diverged_is_unknown)),
        (
            "turned round",
            lambda losses: (
                searched(losses)[0],
                {
                    {"smaller": "larger", "larger": "smaller"}[s]
                    for s in searched(losses)[1]
                },
            ),
        ),
        (
            "name those on which to go on",
            lambda losses: (
                searched(losses)[0],
                {"smaller", "larger"} - searched(losses)[1],
            ),
        ),
    ],
)
def test_search_on_mistakes(says, answer):
    rejects(says, check.search_on, answer)


# ---------------------------------------------------------------------- low_rank_prompt


class LowRank(Adapter):
    """The solution; each mistake below changes one line of it."""

    def __init__(self, start, r):
        super().__init__()
        self.register_buffer("start", start)
        self.A = nn.Parameter(torch.randn(len(start), r))
        self.B = nn.Parameter(torch.zeros(r, start.shape[1]))

    def prompt(self):
        return self.start + self.A @ self.B

    def embedded(self, base, ids):
        x = base.module.get_input_embeddings()(ids)
        return torch.cat((self.prompt().expand(len(x), -1, -1), x), 1)

    def mask(self, mask, n):
        return F.pad(mask, (n, 0), value=1)

    def labels(self, labels, n):
        return F.pad(labels, (n, 0), value=-100)

    def forward(self, base, input_ids, attention_mask=None, labels=None, **others):
        n = len(self.start)
        if attention_mask is not None:
            attention_mask = self.mask(attention_mask, n)
        if labels is not None:
            labels = self.labels(labels, n)
        return base(
            inputs_embeds=self.embedded(base, input_ids),
            attention_mask=attention_mask,
            labels=labels,
            **others,
        )


def low_rank(**methods):
    return type("Changed", (LowRank,), methods)


def starting(change):
    class Changed(LowRank):
        def __init__(self, start, r):
            super().__init__(start, r)
            change(self, start, r)

    return Changed


class WithKwargs(LowRank):
    """Another style: all arguments by name, einsum."""

    def forward(self, base, **given):
        P = self.start + torch.einsum("nr,rd->nd", self.A, self.B)
        ids = given.pop("input_ids")
        x = base.module.get_input_embeddings()(ids)
        rows = P[None].repeat(len(x), 1, 1)
        if given.get("attention_mask") is not None:
            ones = torch.ones(len(x), len(P), dtype=torch.long)
            given["attention_mask"] = torch.cat((ones, given["attention_mask"]), 1)
        if given.get("labels") is not None:
            none = torch.full((len(x), len(P)), -100)
            given["labels"] = torch.cat((none, given["labels"]), 1)
        return base(inputs_embeds=torch.cat((rows, x), 1), **given)


class Blank(Adapter):
    def __init__(self, start, r):
        super().__init__()
        raise NotImplementedError


def forgetting(self, base, input_ids, attention_mask=None, labels=None, **others):
    return LowRank.forward(self, base, input_ids, attention_mask, labels)


def behind(self, base, ids):
    n = len(self.start)
    x = LowRank.embedded(self, base, ids)
    return torch.cat((x[:, n:], x[:, :n]), 1)


def zeros_for_A(self, start, r):
    nn.init.zeros_(self.A)


def trained_start(self, start, r):
    del self.start
    self.start = nn.Parameter(start)


def frozen_start(self, start, r):
    del self.start
    self.start = nn.Parameter(start, requires_grad=False)


def test_low_rank_prompt_right_answers():
    accepts(check.low_rank_prompt, LowRank)
    accepts(check.low_rank_prompt, WithKwargs)
    accepts(
        check.low_rank_prompt,
        starting(lambda s, start, r: (nn.init.zeros_(s.A), nn.init.normal_(s.B))),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", Blank),
        ("class itself", nn.Linear),
        ("class itself", 3),
        ("both start at zero", starting(zeros_for_A)),
        ("More is trained", starting(trained_start)),
        ("More is trained", starting(frozen_start)),
        (
            "I look for an nn.Parameter as self.A",
            starting(lambda s, start, r: (delattr(s, "A"), setattr(s, "A", start))),
        ),
        (
            "A should have the shape",
            starting(
                lambda s, start, r: setattr(
                    s, "A", nn.Parameter(torch.randn(r, len(start)))
                )
            ),
        ),
        (
            "not the words in `start`",
            starting(lambda s, start, r: nn.init.normal_(s.B)),
        ),
        ("`start` is missing", low_rank(prompt=lambda s: s.A @ s.B)),
        ("A B is missing", low_rank(prompt=lambda s: s.start + 0 * (s.A @ s.B))),
        (
            "a factor too many",
            low_rank(prompt=lambda s: s.start + s.A @ s.B / s.A.shape[1]),
        ),
        ("stands behind the text", low_rank(embedded=behind)),
        ("Your mask hides", low_rank(mask=lambda s, mask, n: F.pad(mask, (n, 0)))),
        (
            "padding has become visible",
            low_rank(mask=lambda s, mask, n: torch.ones_like(F.pad(mask, (n, 0)))),
        ),
        ("padding has become visible", low_rank(mask=lambda s, mask, n: None)),
        ("0 is a token", low_rank(labels=lambda s, labels, n: F.pad(labels, (n, 0)))),
        (
            "no gradient reaches A",
            low_rank(prompt=lambda s: s.start + s.A.detach() @ s.B),
        ),
        ("lost touch", low_rank(prompt=lambda s: (s.start + s.A @ s.B).detach())),
        ("does not reach the model", low_rank(forward=forgetting)),
        (
            "no output of the model",
            low_rank(
                forward=lambda s, base, *a, **k: (
                    LowRank.forward(s, base, *a, **k).logits
                )
            ),
        ),
    ],
)
def test_low_rank_prompt_mistakes(says, answer):
    rejects(says, check.low_rank_prompt, answer)


# ------------------------------------------------------- what a trial by learners found


def test_masks_and_positions_are_whole_numbers():
    def floating(place):
        def answer(*given):
            function = soft_prompt if len(given) == 4 else places
            return [
                p.float() if at == place else p for at, p in enumerate(function(*given))
            ]

        return answer

    rejects("expected integers", check.soft_prompt, floating(1))
    rejects("expected integers", check.places, floating(0))
    rejects("expected integers", check.places, floating(1))


def test_the_search_takes_means_and_asks_compare():
    for look in (max, lambda losses: sorted(losses)[1], lambda losses: losses[0]):

        def answer(losses, look=look):
            finite = {r: each for r, each in losses.items() if np.isfinite(each).all()}
            return searched(losses, pick=lambda rate: look(finite[rate]))

        rejects("the mean", check.search_on, answer)

    def higher_mean(losses, best, rate, worse):
        each = losses[rate]
        return not np.isfinite(each).all() or np.mean(each) > 1.1 * np.mean(
            losses[best]
        )

    def last(losses, best, rate, worse):
        return rate in (min(losses), max(losses)) and worse(rate)

    for really in (higher_mean, last):
        for verdict in judge(check.search_on, lambda each: searched(each, really)):
            assert not verdict


def test_a_mask_of_minus_a_hundred_is_no_mask():
    for fill in (-100.0, -1000.0):

        def answer(q, k, pk, fill=fill):
            h = q.shape[1] ** 0.5
            future = ~torch.ones(len(q), len(k)).tril().bool()
            text = (q @ k.T / h).masked_fill(future, fill)
            return share(q @ pk.T / h, text)

        for verdict in judge(check.prefix_gate, answer):
            assert not verdict


def test_factors_of_rank_one_and_a_start_that_moves():
    def plain_start(self, start, r):
        del self.start
        self.start = start

    def zeroed(self, start, r):
        start.zero_()

    for says, change in (
        ("rank 1", lambda self, start, r: nn.init.ones_(self.A)),
        ("no buffer of start's shape", plain_start),
        ("change `start` in place", zeroed),
    ):
        rejects(says, check.low_rank_prompt, starting(change))


# ------------------------------------------------------------------ once accepted wrong


def prompts_of(B, n):
    """Right for B rows and n vectors alone."""

    def answer(prompt, x, mask, labels):
        each = prompt.expand(B or len(x), -1, -1)
        return (
            torch.cat((each, x), 1),
            F.pad(mask, (n or len(prompt), 0), value=1),
            F.pad(labels, (n or len(prompt), 0), value=-100),
        )

    return answer


@pytest.mark.parametrize(
    "says, answer",
    [
        ("", prompts_of(4, None)),
        ("", prompts_of(None, 2)),
        (
            "Your mask has the shape",
            with_mask(lambda m, n: torch.cat((torch.ones_like(m[:, :n]), m), 1)),
        ),
        (
            "Your labels differs",
            with_labels(
                lambda y, n: F.pad(y.masked_fill(y < 1, -100), (n, 0), "constant", -100)
            ),
        ),
        (
            "Under torch.no_grad()",
            lambda p, *g: soft_prompt(p if torch.is_grad_enabled() else 0 * p, *g),
        ),
    ],
)
def test_prompts_of_any_size(says, answer):
    rejects(says, check.soft_prompt, answer)


def in_8_bits(mask, n):
    return (mask.to(torch.int8).cumsum(1, dtype=torch.int8) - 1).clamp(min=0) + n


@pytest.mark.parametrize(
    "says, answer",
    [("For a row", positions(in_8_bits)), ("", lambda mask, n: places(mask, 2))],
)
def test_places_of_any_number(says, answer):
    rejects(says, check.places, answer)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("keeps its diagonal", lambda q, k, pk: strict(q, k, pk)),
        ("", lambda q, k, pk: prefix_gate(q, k, pk[:3])),
        ("", lambda q, k, pk: prefix_gate(q, k, pk) if len(q) > 1 else q[:, 0] * 0 + 1),
        (
            "nothing is divided by `q.shape[1] ** 0.5`",
            lambda q, k, pk: prefix_gate(q, k, pk * q.shape[1] ** 0.5),
        ),
    ],
)
def test_gates_of_any_size(says, answer):
    rejects(says, check.prefix_gate, answer)


def strict(q, k, pk):
    scores = torch.cat((q @ pk.T, q @ k.T), 1) / q.shape[1] ** 0.5
    seen = torch.ones(len(q), len(pk) + len(k)).tril(len(pk) - 1).bool()
    seen[:, : len(pk)] = True
    shares = scores.masked_fill(~seen, -torch.inf).softmax(1)
    return shares[:, : len(pk)].sum(1)


def test_a_rate_that_diverged_closes_its_side():
    def hidden(losses, best, rate, worse):
        out = [r for r in losses if (r > best) == (rate > best) and r != best]
        finite = [r for r in out if np.isfinite(losses[r]).all()]
        return worse(rate) and not (rate not in finite and finite)

    rejects("", check.search_on, lambda losses: searched(losses, hidden))


def test_what_is_said_of_a_search_is_in_the_words_of_the_question():
    def one_side(losses):
        return searched(losses)[0], {"smaller"}

    wrong = check.search_on(one_side, "done")
    assert "it is done at" in wrong.message and "go on" not in wrong.message


class OfTheFirst(LowRank):
    def __init__(self, start, r):
        super().__init__(start, r)
        self.prompt = lambda: self.start + self.A @ self.B


class Keeping(LowRank):
    kept = None

    def prompt(self):
        if torch.is_grad_enabled() or self.kept is None:
            self.kept = LowRank.prompt(self)
        return self.kept


class LabelsAndMask(LowRank):
    def forward(self, base, input_ids, attention_mask=None, labels=None, **others):
        n = len(self.start)
        if attention_mask is not None:
            attention_mask = self.mask(attention_mask, n)
            labels = None if labels is None else self.labels(labels, n)
        x = self.embedded(base, input_ids)
        given = dict(attention_mask=attention_mask, labels=labels)
        return base(inputs_embeds=x, **given, **others)


class Bypassing(LowRank):
    def forward(self, base, *args, **others):
        return super().forward(Below(base.module), *args, **others)


class Below:
    def __init__(self, module):
        self.module = module

    def __call__(self, **given):
        return self.module(**given)


class RankTwo(LowRank):
    def __init__(self, start, r):
        super().__init__(start, 2)


def without_positions(self, base, *args, position_ids=None, **others):
    return LowRank.forward(self, base, *args, **others)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("A copy of it", OfTheFirst),
        ("does not follow a change", Keeping),
        ("", LabelsAndMask),
        ("base.module", Bypassing),
        ("should have the shape", RankTwo),
        ("`position_ids`", low_rank(forward=without_positions)),
        ("seeds torch's global", starting(lambda *_: torch.manual_seed(0))),
        (
            "After model.eval()",
            low_rank(
                prompt=lambda s: (
                    LowRank.prompt(s) if s.training else s.start + 0 * s.A[:, :1]
                )
            ),
        ),
    ],
)
def test_a_prompt_is_the_same_in_every_call(says, answer):
    rejects(says, check.low_rank_prompt, answer)
