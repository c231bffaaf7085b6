"""Chapter 18's checks accept the solution, refuse the blank stub, and name the mistake
in what is plausibly wrong."""

from fractions import Fraction
from itertools import zip_longest

import numpy as np
import pytest
import torch
from judging import accepts, rejects

from minipeft.course import check


def stub(*args):
    raise NotImplementedError


# -------------------------------------------------------------------- combined_gradient


def combined(gradients, labels):
    return sum(g * n for g, n in zip(gradients, labels)) / sum(labels)


def test_combined_solution():
    accepts(check.combined_gradient, combined)
    accepts(
        check.combined_gradient,
        lambda g, n: torch.einsum(
            "w,w...->...", torch.tensor(n).double() / sum(n), torch.stack(g)
        ),
    )


def in_place(gradients, labels):
    for gradient, count in zip(gradients, labels):
        gradient *= count / sum(labels)
    return sum(gradients)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("mean of the processes' means", lambda g, n: sum(g) / len(g)),
        ("mean of the processes' means", lambda g, n: torch.stack(g).mean(0)),
        ("divide, and weigh", lambda g, n: sum(g)),
        ("by the number of processes", lambda g, n: combined(g, n) * sum(n) / len(n)),
        ("do not divide", lambda g, n: combined(g, n) * sum(n)),
        ("divide twice", lambda g, n: combined(g, n) / len(n)),
        ("is a mean already", lambda g, n: sum(a / b for a, b in zip(g, n))),
        ("sum of the means by all labels", lambda g, n: sum(g) / sum(n)),
        ("Only the first", lambda g, n: g[0]),
        ("most labels", lambda g, n: g[n.index(max(n))]),
        ("You changed `gradients` in place", in_place),
        ("shape", lambda g, n: combined(g, n).sum()),
        ("should be a tensor", lambda g, n: combined(g, n).tolist()),
        ("is there a `return`", lambda g, n: None),
        ("nothing here yet", stub),
    ],
)
def test_combined_mistakes(says, answer):
    rejects(says, check.combined_gradient, answer)


# ---------------------------------------------------------------------- ring_all_reduce


def ring(buffers, send, rounds=2, step=1, scale=1.0):
    W = len(buffers)
    parts = [list(b.chunk(W)) for b in buffers]
    for k in range(W - 1):
        moving = [parts[i][(i - k) % W] for i in range(W)]
        for i in range(W):
            to = (i + step) % W
            parts[to][(i - k) % W] = parts[to][(i - k) % W] + send(i, to, moving[i])
    for k in range(W - 1 if rounds == 2 else 0):
        moving = [parts[i][(i + 1 - k) % W] for i in range(W)]
        for i in range(W):
            to = (i + step) % W
            parts[to][(i + 1 - k) % W] = send(i, to, moving[i])
    return [torch.cat(p) * scale for p in parts]


def whole_buffers(buffers, send):
    W = len(buffers)
    sums, moving = [b.clone() for b in buffers], list(buffers)
    for _ in range(W - 1):
        moving = [send((i - 1) % W, i, moving[(i - 1) % W]) for i in range(W)]
        sums = [a + b for a, b in zip(sums, moving)]
    return sums


def through_the_first(buffers, send):
    total = sum([send(i, 0, b) for i, b in enumerate(buffers) if i], buffers[0])
    return [total] + [send(0, i, total) for i in range(1, len(buffers))]


def only_the_first(buffers, send):
    total = sum([send(i, 0, b) for i, b in enumerate(buffers) if i], buffers[0])
    return [total, *buffers[1:]]


def overwritten(buffers, send):
    return [
        send((i - 1) % len(buffers), i, buffers[i - 1]) for i in range(len(buffers))
    ]


def test_ring_solution():
    accepts(check.ring_all_reduce, ring)

    def backwards(buffers, send):  # the ring the other way round, in place
        W, n = len(buffers), len(buffers[0]) // len(buffers)
        for add in (True, False):
            for k in range(W - 1):
                start = 0 if add else -1
                out = []
                for i in range(W):
                    c = (i + k + start) % W
                    out.append((c, buffers[i][c * n : c * n + n].clone()))
                for i, (c, piece) in enumerate(out):
                    arrived = send(i, (i - 1) % W, piece)
                    place = buffers[(i - 1) % W][c * n : c * n + n]
                    place.copy_(place + arrived if add else arrived)
        return buffers

    accepts(check.ring_all_reduce, backwards)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("Nothing was sent", lambda b, send: [sum(b)] * len(b)),
        ("send chunks of 1/W", whole_buffers),
        ("more than one neighbour", through_the_first),
        ("has the sum, process 1 has not", only_the_first),
        ("that is a reduce-scatter", lambda b, send: ring(b, send, rounds=1)),
        ("divide by W", lambda b, send: ring(b, send, scale=1 / len(b))),
        ("what it began with", lambda b, send: b),
        ("other numbers than the sum", overwritten),
        ("one a process", lambda b, send: sum(b)),
        ("0 to 1", lambda b, send: [b[i] + send(i + 1, i, b[i]) for i in (0, 1)]),
        ("of the buffer's shape", lambda b, send: [p[:1] for p in ring(b, send)]),
        ("is there a `return`", lambda b, send: None),
        ("nothing here yet", stub),
    ],
)
def test_ring_mistakes(says, answer):
    rejects(says, check.ring_all_reduce, answer)


# ------------------------------------------------------------------------ traffic_order

RIGHT = ["DDP, LoRA", "FSDP2, QLoRA", "DDP, full", "FSDP2, LoRA", "FSDP2, full"]


def test_order_solution():
    accepts(check.traffic_order, RIGHT)
    accepts(check.traffic_order, tuple(RIGHT))


def order(*places):
    return [RIGHT[place] for place in places]


@pytest.mark.parametrize(
    "says, answer",
    [
        ("the reverse", RIGHT[::-1]),
        ("only an adapter's gradients", order(1, 0, 2, 3, 4)),
        ("gathers every frozen weight", order(0, 1, 3, 2, 4)),
        ("In 4 bits a weight is an eighth", order(0, 2, 1, 3, 4)),
        ("come on top", order(0, 1, 2, 4, 3)),
        ("Give each of these once", RIGHT[:4]),
        ("Give each of these once", [RIGHT[0]] * 5),
        ("Give each of these once", "DDP, LoRA"),
        ("nothing here yet", None),
    ],
)
def test_order_mistakes(says, answer):
    rejects(says, check.traffic_order, answer)


# ---------------------------------------------------------------------------- step_cost


def cost(frozen, checkpointing):
    return 1 + 1 + (not frozen) + checkpointing


def test_cost_solution():
    accepts(check.step_cost, cost)
    accepts(check.step_cost, lambda f, c: (2.0 if f else 3.0) + (1.0 if c else 0.0))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("still sends gradients to its inputs", lambda f, c: cost(f, c) - f),
        ("two products for each", lambda f, c: cost(f, c) - (not f)),
        ("A frozen base costs less", lambda f, c: 3 + c),
        ("once more, frozen or not", lambda f, c: cost(f, False)),
        ("not the whole step", lambda f, c: cost(f, False) * (2 if c else 1)),
        ("all are 2 times too large", lambda f, c: 2 * cost(f, c)),
        ("not in forward passes", lambda f, c: cost(f, c) / 3),
        ("that of 1 forward passes", lambda f, c: 1),
        ("expected a number", lambda f, c: "3"),
        ("expected a number", lambda f, c: True),
        ("is there a `return`", lambda f, c: None),
        ("nothing here yet", stub),
    ],
)
def test_cost_mistakes(says, answer):
    rejects(says, check.step_cost, answer)


# --------------------------------------------------------------------------- card_count


def fewest(sharded, whole, card, sizes):
    for count in sorted(sizes):
        if sharded / count + whole <= card:
            return count
    return None


def test_cards_solution():
    accepts(check.card_count, fewest)
    accepts(
        check.card_count,
        lambda s, w, card, sizes: min(
            (n for n in sizes if s + n * w <= n * card), default=None
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("You divide everything", lambda s, w, c, z: fewest(s + w, 0, c, z)),
        ("You divide nothing", lambda s, w, c, z: 1 if s + w <= c else None),
        ("needs for itself", lambda s, w, c, z: fewest(s, 0, c, z)),
        ("and not what is sharded", lambda s, w, c, z: fewest(w, s, c, z)),
        (
            "the most cards",
            lambda s, w, c, z: next(
                (n for n in sorted(z, reverse=True) if s / n + w <= c), None
            ),
        ),
        (
            "need not be sorted",
            lambda s, w, c, z: next((n for n in z if s / n + w <= c), None),
        ),
        ("exactly full", lambda s, w, c, z: fewest(s, w, c - 1e-6, z)),
        ("not the largest", lambda s, w, c, z: fewest(s, w, c, z) or max(z)),
        ("not 0", lambda s, w, c, z: fewest(s, w, c, z) or 0),
        ("can be had", lambda s, w, c, z: fewest(s, w, c, range(1, 1000))),
        ("I find", lambda s, w, c, z: 3),
        ("None for every case", lambda s, w, c, z: None),
        ("nothing here yet", stub),
    ],
)
def test_cards_mistakes(says, answer):
    rejects(says, check.card_count, answer)


# ----------------------------------------------------------------------- first_mismatch


def mismatch(calls):
    for index, names in enumerate(zip_longest(*calls)):
        if len(set(names)) > 1:
            return index, dict(enumerate(names))
    return None


def test_mismatch_solution():
    accepts(check.first_mismatch, mismatch)

    def by_index(calls):
        for k in range(max(map(len, calls))):
            here = {r: c[k] if k < len(c) else None for r, c in enumerate(calls)}
            if any(name != here[0] for name in here.values()):
                return k, here

    accepts(check.first_mismatch, by_index)


def changed(change):
    def answer(calls):
        found = mismatch(calls)
        return found and change(*found)

    return answer


def short(calls):
    for index, names in enumerate(zip(*calls)):
        if len(set(names)) > 1:
            return index, dict(enumerate(names))


def last(calls):
    names = list(enumerate(zip_longest(*calls)))
    apart = [(k, dict(enumerate(n))) for k, n in names if len(set(n)) > 1]
    return apart[-1] if apart else None


@pytest.mark.parametrize(
    "says, answer",
    [
        ("zip is too short", short),
        ("the first two", lambda calls: mismatch(calls[:2])),
        ("count from 1", changed(lambda k, names: (k + 1, names))),
        ("is never reached", last),
        ("the ones that agree too", changed(lambda k, names: (k, {0: names[0]}))),
        ("Return (index", changed(lambda k, names: k)),
        (
            "has None",
            changed(
                lambda k, names: (k, {r: n or "nothing" for r, n in names.items()})
            ),
        ),
        ("where all calls agree", lambda calls: mismatch(calls) or (0, {})),
        ("None for every run", lambda calls: None),
        ("nothing here yet", stub),
    ],
)
def test_mismatch_mistakes(says, answer):
    rejects(says, check.first_mismatch, answer)


# ------------------------------------------------------------- as other classes have it


def test_the_order_may_begin_with_the_most():
    least = ["DDP, LoRA", "FSDP2, QLoRA", "DDP, full", "FSDP2, LoRA", "FSDP2, full"]
    assert check.traffic_order(least[::-1], first="most")
    wrong = check.traffic_order(least, first="most")
    assert not wrong and "sends most" in wrong.message


def test_the_cost_may_be_in_another_unit():
    def cost(frozen, checkpointing):
        return 2 * (2 + (not frozen) + checkpointing)

    assert check.step_cost(cost, forward=2)
    assert not check.step_cost(cost)
    wrong = check.step_cost(lambda f, c: cost(f, c) / 2, forward=2)
    assert not wrong


def test_a_part_of_a_card_may_have_to_stay_free():
    def count(sharded, whole, card, sizes, free=2):
        fits = [n for n in sizes if sharded / n + whole + free <= card]
        return min(fits, default=None)

    assert check.card_count(count, reserve=2)
    wrong = check.card_count(lambda *case: count(*case, free=0), reserve=2)
    assert not wrong and "have to stay free" in wrong.message


def test_a_process_that_calls_no_more_may_have_a_name():
    def mismatch(calls, missing="nothing"):
        longest = max(map(len, calls))
        full = [[*one, *[missing] * (longest - len(one))] for one in calls]
        for index, names in enumerate(zip(*full)):
            if len({*names}) > 1:
                return index, dict(enumerate(names))
        return None

    assert check.first_mismatch(mismatch, missing="nothing")
    wrong = check.first_mismatch(lambda c: mismatch(c, None), missing="nothing")
    assert not wrong and "'nothing'" in wrong.message


# ------------------------------------------------------------- what learners also wrote


def rank_after_rank(calls):
    """Each process is compared with the first, one after the other."""
    for other in calls[1:]:
        for index, pair in enumerate(zip_longest(calls[0], other)):
            if pair[0] != pair[1]:
                names = {r: (one + [None] * 9)[index] for r, one in enumerate(calls)}
                return index, names
    return None


def by_what_is_called(calls):
    if len({tuple(sorted(one)) for one in calls}) == 1:
        return None
    return mismatch(calls)


@pytest.mark.parametrize(
    "name, says, answer",
    [
        (
            "combined_gradient",
            "wrong dimension",
            lambda g, n: (torch.stack(g) * torch.tensor(n)).sum(0) / sum(n),
        ),
        (
            "combined_gradient",
            "averages afterwards",
            lambda g, n: combined(g, n) * len(n),
        ),
        (
            "combined_gradient",
            "most labels that",
            lambda g, n: combined(g, n) * sum(n) / max(n),
        ),
        (
            "ring_all_reduce",
            "one and the same tensor",
            lambda buffers, send: [ring(buffers, send)[0]] * len(buffers),
        ),
        ("first_mismatch", "the first difference is in call 1", rank_after_rank),
        ("first_mismatch", "You find no difference", by_what_is_called),
        ("step_cost", "a third", lambda f, c: (3 - f) * (4 / 3 if c else 1)),
        ("step_cost", "a half", lambda f, c: (3 - f) * (1.5 if c else 1)),
        ("step_cost", "forward pass itself", lambda f, c: 2 - f + c),
        (
            "card_count",
            "all up to the largest",
            lambda s, w, c, sizes: fewest(s, w, c, range(1, max(sizes) + 1)),
        ),
        (
            "card_count",
            "in place",
            lambda s, w, c, sizes: (sizes.sort(), fewest(s, w, c, sizes))[1],
        ),
        (
            "card_count",
            "Nothing is left to choose from",
            lambda s, w, c, sizes: min(n for n in sizes if s / n + w <= c),
        ),
    ],
)
def test_what_learners_wrote(name, says, answer):
    rejects(says, getattr(check, name), answer)


# -------------------------------------------- once accepted wrong, or refused right


def reading_memory(buffers, send, W_up_to=9, halves=2):
    """Sends as many numbers as it should, and adds up what it was never sent."""
    W, total = len(buffers), sum(buffers)
    for _ in range(halves * (W - 1)):
        for i in range(W):
            send(i, (i + 1) % W, buffers[i].chunk(W)[0])
    return [total.clone() for _ in buffers]


def one_for_all(buffers, send):
    total = ring(buffers, send)[0]
    return [total.clone() for _ in buffers]


def own_copy(buffers, send):
    """What arrives is thrown away: the neighbour's chunk is read in its place."""

    def lost(source, target, tensor):
        send(source, target, tensor)
        return tensor

    return ring(buffers, lost)


def second_half_unsent(buffers, send):
    left = len(buffers) * (len(buffers) - 1)

    def some(source, target, tensor):
        nonlocal left
        left -= 1
        return send(source, target, tensor) if left >= 0 else tensor.clone()

    return ring(buffers, some)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("does not use what arrives", reading_memory),
        ("does not use what arrives", one_for_all),
        ("does not use what arrives", own_copy),
        ("too few", second_half_unsent),
        ("too few", lambda b, send: reading_memory(b, send, halves=1)),
        (
            "Nothing was sent",
            lambda b, send: (
                ring(b, send) if len(b) < 5 else [sum(b).clone() for _ in b]
            ),
        ),
        ("keep the dtype", lambda b, send: [each.float() for each in ring(b, send)]),
    ],
)
def test_what_a_process_knows_was_sent_to_it(says, answer):
    rejects(says, check.ring_all_reduce, answer)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("Only the first three", lambda g, n: combined(g[:3], n[:3])),
        ("You sort the labels", lambda g, n: combined(g, sorted(n))),
        (
            "a single label",
            lambda g, n: combined(*zip(*[(a, k) for a, k in zip(g, n) if k > 1])),
        ),
        (
            "The sum of the processes' means",
            lambda g, n: sum(g) if len({*n}) == 1 else combined(g, n),
        ),
    ],
)
def test_labels_in_any_order_and_of_any_number(says, answer):
    rejects(says, check.combined_gradient, answer)


def test_a_cost_may_be_any_kind_of_number():
    accepts(check.step_cost, lambda f, c: Fraction(cost(f, c)))
    accepts(check.step_cost, lambda f, c: torch.tensor(float(cost(f, c))))
    accepts(check.step_cost, lambda f, c: np.float32(cost(f, c)))


@pytest.mark.parametrize("factor", [1, 2e12, 4e3])
def test_a_cost_in_another_unit_is_told(factor):
    def other(frozen, checkpointing):
        return factor * cost(frozen, checkpointing)

    rejects("ratios of your costs are right", check.step_cost, other, forward=2)


def test_the_names_may_be_written_in_another_way():
    accepts(check.traffic_order, [name.lower().replace(" ", "") for name in RIGHT])


def with_free(free=0, card=1.0, divided=0):
    def count(sharded, whole, size, sizes):
        return fewest(sharded + divided, whole + free, size * card, sizes)

    return count


@pytest.mark.parametrize(
    "says, answer",
    [
        ("is not divided", with_free(divided=2)),
        ("convert nothing", with_free(free=2, card=2**30 / 1e9)),
        ("I find", lambda s, w, c, sizes: with_free(2)(s, w, c, range(1, 9))),
        ("I find", with_free(free=1.95)),
        (
            "Your code stopped with IndexError",
            lambda s, w, c, sizes: (sizes[0], with_free(2)(s, w, c, sizes))[1],
        ),
        (
            "Your code stopped with ZeroDivisionError",
            lambda s, w, c, sizes: min(
                (n for n in sizes if n >= s / (c - 2 - w) > 0), default=None
            ),
        ),
        ("`sizes` is empty", lambda s, w, c, z: with_free(2)(s, w, c, z or [8])),
    ],
)
def test_cards_at_the_edges(says, answer):
    rejects(says, check.card_count, answer, reserve=2)


def where(differ):
    """The first call in which differ(names) is true."""

    def answer(calls):
        for index, names in enumerate(zip_longest(*calls)):
            if differ(names):
                return index, dict(enumerate(names))
        return None

    return answer


@pytest.mark.parametrize(
    "says, answer",
    [
        ("some of the processes only", where(lambda names: names[0] != names[-1])),
        ("where all processes differ", where(lambda n: len({*n}) == len(n))),
        ("is never reached", where(lambda n: len({*n}) == 2)),
        ("You find no difference", where(lambda n: len({*n[:3]}) > 1)),
        (
            "You find no difference",
            where(lambda n: len({str(name).split()[0] for name in n}) > 1),
        ),
    ],
)
def test_every_process_and_every_name_counts(says, answer):
    rejects(says, check.first_mismatch, answer)


def test_a_list_is_as_good_as_a_tuple():
    accepts(
        check.first_mismatch, lambda calls: (lambda x: x and list(x))(mismatch(calls))
    )
