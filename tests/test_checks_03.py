"""Chapter 03's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import zlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from judging import accepts, judge, rejects
from torch import nn

from minipeft import LayerConfig, LinearDelta
from minipeft.course import check, compare
from minipeft.weights import linear_features

# ------------------------------------------------------------------------ fast_hadamard


def fast(x, last=None, scale=1.0):
    h = 1
    while h < (last or len(x)):
        a, b = x.view(-1, 2, h).unbind(1)
        x = torch.stack([a + b, a - b], 1).flatten()
        h *= 2
    return x * scale


def recursive(x):
    if len(x) == 1:
        return x
    a, b = x.chunk(2)
    return torch.cat([recursive(a + b), recursive(a - b)])


def dense(x):
    H = torch.ones(1, 1, dtype=x.dtype)
    while len(H) < len(x):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H @ x


def two_calls(x):
    """Another right way: transform the halves, then add and subtract."""
    if len(x) == 1:
        return x
    a, b = (two_calls(half) for half in x.chunk(2))
    return torch.cat([a + b, a - b])


def four_calls(x):
    if len(x) == 1:
        return x
    a, b = x.chunk(2)
    return torch.cat([four_calls(a) + four_calls(b), four_calls(a) - four_calls(b)])


def difference_first(x):
    h = 1
    while h < len(x):
        a, b = x.view(-1, 2, h).unbind(1)
        x = torch.stack([a - b, a + b], 1).flatten()
        h *= 2
    return x


def neighbours_only(x):
    a, b = x.view(-1, 2).unbind(1)
    return torch.stack([a + b, a - b], 1).flatten()


def in_place(x):
    x.copy_(fast(x))
    return x


def no_end(x):
    """Halving ends at two numbers."""
    if len(x) == 2:
        return torch.stack([x[0] + x[1], x[0] - x[1]])
    a, b = x.chunk(2)
    return torch.cat([no_end(a + b), no_end(a - b)])


def turned(x):
    if len(x) == 1:
        return x
    a, b = x.chunk(2)
    return torch.cat([turned(a + b), turned(b - a)])


def test_a_difference_turned_round():
    rejects("you have b - a", check.fast_hadamard, turned)


def test_fast_hadamard_solutions():
    accepts(check.fast_hadamard, fast)
    accepts(check.fast_hadamard, recursive)
    accepts(check.fast_hadamard, two_calls)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("divide by √n", lambda x: fast(x) / len(x) ** 0.5),
        ("the way back", lambda x: fast(x) / len(x)),
        ("build a matrix", dense),
        ("not fast", four_calls),
        ("in place", in_place),
        ("For n = 1 your code stops", no_end),
        ("For n = 1 your code stops", lambda x: recursive(x) + 0 * x[1]),
        ("one number", lambda x: recursive(x) if len(x) > 1 else 2 * x),
        ("is there a `return`", lambda x: None),
        ("fit", lambda x: torch.ones(3, 3) @ x),
    ],
)
def test_fast_hadamard_mistakes(says, answer):
    rejects(says, check.fast_hadamard, answer)


@pytest.mark.parametrize(
    "answer", [difference_first, neighbours_only, lambda x: fast(x, len(x) // 2)]
)
def test_fast_hadamard_slips(answer):
    """With two numbers some of them look alike: what counts is that each is refused
    with a word on the stages."""
    for verdict in judge(check.fast_hadamard, answer):
        assert not verdict
        assert any(word in verdict.message for word in ("stage", "difference first")), (
            verdict.message
        )


# ------------------------------------------------------------------------- hash_project


def count(index):
    return torch.bincount(index).float()


def into_zeros(theta, index, sign):
    """torch.zeros has 32 bits."""
    found = torch.zeros(len(index))
    for column in range(len(theta)):
        rows = index == column
        found[rows] = theta[column] * sign[rows] / rows.sum() ** 0.5
    return found


def test_hash_project_solution():
    accepts(
        check.hash_project,
        lambda theta, index, sign: theta[index] * sign / count(index).sqrt()[index],
    )
    accepts(
        check.hash_project,
        lambda theta, index, sign: (
            theta[index] * sign / torch.bincount(index).sqrt()[index]
        ),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("length √c", lambda theta, index, sign: theta[index] * sign),
        (
            "square root of that",
            lambda theta, index, sign: theta[index] * sign / count(index)[index],
        ),
        (
            "signs are missing",
            lambda theta, index, sign: theta[index] / count(index).sqrt()[index],
        ),
        (
            "only on average",
            lambda theta, index, sign: (
                theta[index] * sign * (len(theta) / len(index)) ** 0.5
            ),
        ),
        (
            "divide by √d",
            lambda theta, index, sign: theta[index] * sign / len(theta) ** 0.5,
        ),
        (
            "divide by √D",
            lambda theta, index, sign: theta[index] * sign / len(index) ** 0.5,
        ),
        (
            "the way back",
            lambda theta, index, sign: torch.zeros(len(theta)).index_add(
                0, index, sign
            ),
        ),
        (
            "lost touch",
            lambda theta, index, sign: (
                theta.detach()[index] * sign / count(index).sqrt()[index]
            ),
        ),
        (
            "theta's dtype",
            lambda theta, index, sign: (
                theta[index] * sign / count(index).sqrt()[index]
            ).float(),
        ),
        ("the same dtype", into_zeros),
        ("is there a `return`", lambda theta, index, sign: None),
    ],
)
def test_hash_project_mistakes(says, answer):
    rejects(says, check.hash_project, answer)


# ---------------------------------------------------------------------------------- d90


def right(losses, start, full):
    return min(
        (d for d, loss in losses.items() if start - loss >= 0.9 * (start - full)),
        default=None,
    )


def least(losses, start, full, share=0.9, gain=float):
    goal = share * (start - full)
    return min((d for d in losses if gain(start - losses[d]) >= goal), default=None)


def test_d90_solution():
    accepts(check.d90, least)
    accepts(check.d90, right)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "order of the dictionary",
            lambda losses, start, full: next(
                d for d in losses if start - losses[d] >= 0.9 * (start - full)
            ),
        ),
        (
            "largest d",
            lambda losses, start, full: max(
                d for d in losses if start - losses[d] >= 0.9 * (start - full)
            ),
        ),
        (
            "compare the losses themselves",
            lambda losses, start, full: min(
                d for d in losses if full / losses[d] >= 0.9
            ),
        ),
        (
            "not start?",
            lambda losses, start, full: min(
                (d for d in losses if losses[d] <= 0.1 * start), default=None
            ),
        ),
        (
            "give the dimension",
            lambda losses, start, full: losses[right(losses, start, full)],
        ),
        (
            "10 % of the gain",
            lambda losses, start, full: min(
                d for d in losses if start - losses[d] >= 0.1 * (start - full)
            ),
        ),
        (
            "Curves are noisy",
            lambda losses, start, full: (
                512 if losses.get(128) == 1.4 else right(losses, start, full)
            ),
        ),
        (
            "give None",
            lambda losses, start, full: right(losses, start, full) or max(losses),
        ),
        ("89 %", lambda losses, start, full: least(losses, start, full, share=0.89)),
        (
            "do not take abs()",
            lambda losses, start, full: least(losses, start, full, gain=abs),
        ),
        ("not start?", lambda losses, start, full: None),
    ],
)
def test_d90_mistakes(says, answer):
    rejects(says, check.d90, answer)


# --------------------------------------------------------------------- predict_subspace


def expected(D=10_000, d=100):
    return {
        "length": 1,
        "gradient": (d / D) ** 0.5,
        "fall": d / D,
        "Adam": (d / D) ** 0.5,
        "rank": 64,
        "two": 2 * d,
    }


@pytest.mark.parametrize("D, d", [(10_000, 100), (40_000, 100)])
def test_subspace_right_answers(D, d):
    judged = partial(check.predict_subspace, D=D, d=d)
    right = expected(D, d)
    for verdict in judge(judged, right, variants=3):
        assert verdict, verdict
    assert judged({case: np.float32(value) for case, value in right.items()})
    assert judged({case: torch.tensor(float(v)) for case, v in right.items()})


@pytest.mark.parametrize(
    "says, answer",
    [
        ("keep lengths", {"length": 0.1}),
        ("the *squared* length", {"gradient": 0.01}),
        ("the *squared* length", {"gradient": 1}),
        ("the squared length of the gradient that it sees", {"fall": 0.1}),
        ("has the length η √n", {"Adam": 0.01}),
        ("has the length η √n", {"Adam": 1}),
        ("is a random matrix", {"rank": 1}),
        ("is a random matrix", {"rank": 63}),
        ("the dimensions add", {"two": 100}),
        ("the dimensions add", {"two": 201}),
        ("expected a number", {"rank": "full"}),
        ("write your prediction", {"two": None}),
        ("is not one of", {"three": 300}),
    ],
)
def test_subspace_mistakes(says, answer):
    verdict = check.predict_subspace(expected() | answer)
    assert not verdict and says in verdict.message, verdict.message


def test_subspace_that_is_not_all_there():
    rejects("no prediction for 'length'", check.predict_subspace, {"rank": 64})
    rejects("Give a dictionary", check.predict_subspace, [1, 0.1])
    rejects("nothing here yet", check.predict_subspace, None)


# ----------------------------------------------------------------------------- choose_d


def mean(values):
    return sum(values) / len(values)


def chosen(
    runs,
    start,
    full,
    key="valid_loss",
    join=mean,
    share=0.9,
    reached=None,
    judged="test_loss",
    look=None,
    given=dict,
    **settings,
):
    """The rule; each mistake below changes one of its parts."""
    reached = reached or (lambda loss: start - loss >= share * (start - full))
    found = {}
    for run in runs:
        by_stride = found.setdefault(run["d"], {})
        by_stride.setdefault(run["stride"], {})[run["seed"]] = run

    def size(by_seed):
        return join([run[key] for run in by_seed.values()])

    own = {d: min(strides.values(), key=look or size) for d, strides in found.items()}
    tried = sorted(own)
    good = [d for d in tried if reached(size(own[d]))]
    if not good:
        return None
    smaller = tried[tried.index(good[0]) - 1]
    pair = [
        given({seed: run[judged] for seed, run in own[d].items()})
        for d in (good[0], smaller)
    ]
    return good[0], compare(*pair, **{"loss": True} | settings).verdict


def with_lists(runs, start, full):
    """Sorted, with lists in the order of the seeds, and numpy's numbers."""
    runs = sorted(runs, key=lambda run: (run["d"], run["stride"], run["seed"]))
    groups = [runs[i : i + 3] for i in range(0, len(runs), 3)]
    own = {}
    for group in groups:
        valid = np.mean([run["valid_loss"] for run in group])
        if group[0]["d"] not in own or valid < own[group[0]["d"]][0]:
            own[group[0]["d"]] = valid, [run["test_loss"] for run in group]
    tried = list(own)
    for smaller, d in zip(tried, tried[1:]):
        if own[d][0] <= start - 0.9 * (start - full):
            return [np.int64(d), compare(own[d][1], own[smaller][1], loss=True).verdict]


def said_of(*given, word):
    """The right d, and always one word."""
    found = chosen(*given)
    return found and (found[0], word)


def test_choose_d_right_answers():
    accepts(check.choose_d, chosen)
    accepts(check.choose_d, with_lists)
    accepts(partial(check.choose_d, share=0.8), lambda *g: chosen(*g, share=0.8))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("by the test loss", lambda *g: chosen(*g, key="test_loss")),
        ("one lucky seed", lambda *g: chosen(*g, join=min)),
        (
            "count the gain",
            lambda r, s, f: chosen(r, s, f, reached=lambda loss: loss <= f / 0.9),
        ),
        ("the smallest with 90% of the gain", lambda *g: (4096, "ahead")),
        ("turned round: these are losses", lambda *g: chosen(*g, loss=False)),
        ("highest loss of any seed", lambda *g: chosen(*g, join=max)),
        ("compares validation losses", lambda *g: chosen(*g, judged="valid_loss")),
        ("That all seeds agree", lambda *g: said_of(*g, word="ahead")),
        ("on the test losses", lambda *g: said_of(*g, word="not told apart")),
        ("return None", lambda *g: chosen(*g) or (16384, "not told apart")),
        ("You return None, and", lambda *g: None),
        ("The verdict is a word", lambda *g: chosen(*g) and (chosen(*g)[0], True)),
        ("Return two things", lambda *g: chosen(*g) and chosen(*g)[0]),
    ],
)
def test_choose_d_mistakes(says, answer):
    rejects(says, check.choose_d, answer)


# -------------------------------------------------------------------------- my_subspace


class Own(LinearDelta):
    """The solution; each mistake below changes one part of it."""

    def __init__(self, d_in, d_out, d, seed):
        super().__init__()
        self.shape = d_out, d_in
        self.draw(d, d_in * d_out, seed)
        self.theta = nn.Parameter(torch.zeros(d))
        self.finish()

    def draw(self, d, size, seed):
        draws = torch.Generator().manual_seed(seed)
        P = torch.randn(size, d, generator=draws) / size**0.5
        self.register_buffer("P", P, persistent=False)

    def finish(self):
        pass

    def delta(self, base):
        return (self.P @ self.theta).view(self.shape)


class Orthonormal(Own):
    """Exactly orthogonal columns, and an update without the matrix product with P."""

    def draw(self, d, size, seed):
        draws = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(size, d, generator=draws))[0]
        self.register_buffer("P", Q.T.reshape(d, *self.shape), persistent=False)

    def delta(self, base):
        return torch.einsum("k,kij->ij", self.theta, self.P)


def own(
    adapter=Own, seeds=lambda seed, path: seed + zlib.crc32(path.encode()), **methods
):
    """A configuration whose adapters have these methods in the place of the right
    ones."""
    adapter = type("Changed", (adapter,), methods)

    @dataclass(kw_only=True)
    class Config(LayerConfig):
        d: int = 64
        seed: int = 0

        def create(self, base, path):
            sizes = linear_features(base.module)
            return adapter(*sizes, self.d, seeds(self.seed, path))

    return Config


def drawn(draw):
    """P is draw(size, d, generator)."""

    def method(self, d, size, seed):
        P = draw(size, d, torch.Generator().manual_seed(seed))
        self.register_buffer("P", P, persistent=False)

    return method


def gaussian(size, d, draws):
    return torch.randn(size, d, generator=draws) / size**0.5


def saved(self, d, size, seed):
    Own.draw(self, d, size, seed)
    self.register_buffer("P", self.P)


def trained(self, d, size, seed):
    self.P = nn.Parameter(gaussian(size, d, torch.Generator().manual_seed(seed)))


def global_draw(self, d, size, seed):
    torch.manual_seed(seed)
    P = torch.randn(size, d) / size**0.5
    self.register_buffer("P", P, persistent=False)


def forked_draw(self, d, size, seed):
    """What is around it keeps its random numbers."""
    with torch.random.fork_rng():
        global_draw(self, d, size, seed)


class Lying(Own):
    def delta(self, base):
        return super().delta(base).T


class Detached(Own):
    def delta(self, base):
        return super().delta(base).detach() + 0 * self.theta.sum()


class Cut(Own):
    def update(self, base, x):
        return super().update(base, x.detach())


class Twice(Own):
    def update(self, base, x):
        return base(x) + super().update(base, x)


@dataclass(kw_only=True)
class Blank(LayerConfig):
    d: int = 64
    seed: int = 0

    def create(self, base, path):
        raise NotImplementedError


SUBSPACES = {"gauss": own(), "exact": own(Orthonormal), "forked": own(draw=forked_draw)}


@pytest.mark.parametrize("answer", SUBSPACES.values(), ids=SUBSPACES)
def test_my_subspace_right_answers(answer):
    for verdict in judge(check.my_subspace, answer, variants=2):
        assert verdict, verdict


@pytest.mark.parametrize(
    "says, answer",
    [
        ("theta starts at zero", own(finish=lambda s: s.theta.data.fill_(1))),
        ("nn.Parameter as self.theta", own(finish=lambda s: setattr(s, "theta", None))),
        (
            "expected (6,)",
            own(finish=lambda s: setattr(s, "theta", nn.Parameter(torch.zeros(6, 1)))),
        ),
        ("a seed draws P again", own(draw=saved)),
        ("P is drawn once and then frozen", own(draw=trained)),
        (
            "should have length 1",
            own(draw=drawn(lambda size, d, g: torch.randn(size, d, generator=g))),
        ),
        (
            "A direction is zero",
            own(draw=drawn(lambda size, d, g: torch.zeros(size, d))),
        ),
        (
            "nearly orthogonal",
            own(draw=drawn(lambda size, d, g: gaussian(size, 1, g).expand(-1, d))),
        ),
        ("Two layers of one shape", own(seeds=lambda seed, path: seed)),
        ("does not arrive", own(seeds=lambda seed, path: zlib.crc32(path.encode()))),
        ("another P", own(seeds=lambda seed, path: int(torch.randint(10**6, (1,))))),
        ("hash() of a text", own(seeds=lambda seed, path: hash(path) % 2**31 + seed)),
        ("hash() of a text", own(seeds=lambda seed, path: hash((seed, path)) % 2**31)),
        ("hash() of a text", own(seeds=lambda seed, path: hash(f"{path}/{seed}"))),
        ("seeds torch's global generator", own(draw=global_draw)),
        ("delta is", own(Lying)),
        ("theta", own(Detached)),
        ("gradient of x", own(Cut)),
        ("must give what the base gives", own(Twice)),
        ("delta gives None", own(delta=lambda s, b: None)),
        ("class itself", Own),
        ("class itself", own()(target_modules=["q_proj"])),
        ("nothing here yet", Blank),
    ],
)
def test_my_subspace_mistakes(says, answer):
    verdict = check.my_subspace(answer)
    assert not verdict and says in verdict.message, verdict.message


def blank(*answers):
    raise NotImplementedError


@pytest.mark.parametrize("name", ["choose_d", "fast_hadamard", "hash_project", "d90"])
def test_a_blank_stub_is_refused_kindly(name):
    rejects("There is nothing here yet", getattr(check, name), blank)


# ------------------------------------------------------- found by trying to fool them


def by_each_seed(runs, start, full):
    """Each seed at a stride of its own."""
    best = {}
    for run in runs:
        key = run["d"], run["seed"]
        if key not in best or run["valid_loss"] < best[key]["valid_loss"]:
            best[key] = run
    runs = [run | {"stride": 1} for run in best.values()]
    return chosen(runs, start, full)


def from_above(runs, start, full):
    sizes = sorted({run["d"] for run in runs}, reverse=True)
    found = None
    for d in sizes:
        own = [run for run in runs if run["d"] in (d, min(sizes))]
        got = chosen(own, start, full)
        if got is None:
            break
        found = d
    return found and (found, "ahead")


def of_the_luckiest(by_seed):
    return min(run["valid_loss"] for run in by_seed.values())


def at_ones_stride(runs, start, full):
    """The smaller d at the stride of the chosen one."""
    found = chosen(runs, start, full)
    if found is None:
        return None
    tried = sorted({run["d"] for run in runs})
    d, smaller = found[0], tried[tried.index(found[0]) - 1]
    sums = {}
    for run in runs:
        if run["d"] == d:
            sums[run["stride"]] = sums.get(run["stride"], 0) + run["valid_loss"]
    stride = min(sums, key=sums.get)
    pair = [
        {
            run["seed"]: run["test_loss"]
            for run in runs
            if (run["d"], run["stride"]) == (one, stride)
        }
        for one in (d, smaller)
    ]
    return d, compare(*pair, loss=True).verdict


@pytest.mark.parametrize(
    "says, answer",
    [
        ("a stride of its own", by_each_seed),
        ("go down from the largest", from_above),
        ("at the stride of yours", at_ones_stride),
        ("does not pair the seeds", lambda *g: chosen(*g, paired=False)),
        ("median", lambda *g: chosen(*g, join=lambda v: sorted(v)[1])),
        (
            "the stride by one seed",
            lambda *g: chosen(*g, look=lambda by_seed: by_seed[0]["valid_loss"]),
        ),
        ("the stride by one seed", lambda *g: chosen(*g, look=of_the_luckiest)),
        (
            "does not pair the seeds",
            lambda *g: chosen(*g, given=lambda losses: sorted(losses.values())),
        ),
    ],
)
def test_dimensions_that_seem_right(says, answer):
    rejects(says, check.choose_d, answer)


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "89.8 %",
            lambda losses, start, full: min(
                (d for d in losses if start - losses[d] >= 0.895 * (start - full)),
                default=None,
            ),
        ),
        (
            "far below full's",
            lambda losses, start, full: min(
                (d for d in losses if abs(losses[d] - full) <= 0.1 * (start - full)),
                default=None,
            ),
        ),
        (
            "not to the best",
            lambda losses, start, full: right(
                losses, start, min(full, *losses.values())
            ),
        ),
    ],
)
def test_gains_of_another_whole(says, answer):
    rejects(says, check.d90, answer)


def test_columns_of_many_entries_and_the_dtype():
    def in_eight_bits(theta, index, sign):
        count = torch.bincount(index).to(torch.uint8).to(theta.dtype)
        return theta[index] * sign / count.sqrt()[index]

    def in_double(theta, index, sign):
        return theta[index] * sign / torch.bincount(index).double().sqrt()[index]

    rejects("1,498 entries", check.hash_project, in_eight_bits)
    rejects("theta's dtype", check.hash_project, in_double)


def test_a_matrix_made_by_numpy():
    def answer(x):
        H = np.ones((1, 1))
        while len(H) < len(x):
            H = np.block([[H, H], [H, -H]])
        return torch.from_numpy(H @ x.double().numpy()).to(x.dtype)

    verdict = check.fast_hadamard(answer)
    assert not verdict and "in numpy" in verdict.message, verdict.message


def few_rows(size, d, draws):
    P = torch.zeros(size, d)
    P[:60] = torch.randn(60, d, generator=draws) / 60**0.5
    return P / P.norm(dim=0)


def by_order():
    """P depends on how many layers were made before."""
    config = own()

    def create(self, base, path):
        self.made = getattr(self, "made", 0) + 1
        return Own(*linear_features(base.module), self.d, 1000 * self.seed + self.made)

    config.create = create
    return config


@pytest.mark.parametrize(
    "says, answer",
    [
        (
            "get the same P: 'model.layers",
            own(
                seeds=lambda s, p: 999 * s + int("0" + "".join(filter(str.isdigit, p)))
            ),
        ),
        ("get the same P: 'model", own(seeds=lambda s, p: 9999 * s + sum(map(ord, p)))),
        (
            "get the same P: 'model",
            own(seeds=lambda s, p: s + zlib.crc32(p.encode()) % 997),
        ),
        ("made before it", by_order()),
        ("never move", own(draw=drawn(few_rows))),
    ],
)
def test_directions_that_are_tied(says, answer):
    verdict = check.my_subspace(answer)
    assert not verdict and says in verdict.message, verdict.message


def bound(self):
    self.delta = lambda base: Own.delta(self, base)


def biased(self, base, x):
    return nn.functional.linear(x, self.delta(base), base.bias)


def test_subspaces_that_are_right_on_one_layer_only():
    for answer in (own(finish=bound), own(update=biased)):
        verdict = check.my_subspace(answer)
        assert not verdict
        assert "A copy of it" in verdict.message or "base gives" in verdict.message
