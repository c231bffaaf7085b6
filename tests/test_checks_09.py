"""Chapter 09's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

import functools
import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from judging import accepts, judge, rejects
from torch import nn

from minipeft import LinearDelta
from minipeft.course import check, compare


def blank(*_):
    raise NotImplementedError


# ------------------------------------------------------------------------- pack_nibbles


def pack(codes):
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed):
    return torch.stack([packed >> 4, packed & 15], -1).flatten()


def test_pack_nibbles_solution():
    accepts(check.pack_nibbles, pack, unpack)
    accepts(
        check.pack_nibbles,
        lambda c: c[::2] * 16 + c[1::2],
        lambda p: torch.stack([p // 16, p % 16], 1).view(-1),
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", (blank, blank)),
        (
            "halves of each byte are swapped",
            (lambda c: (c[1::2] << 4) | c[::2], unpack),
        ),
        (
            "first half of the tensor",
            (lambda c: (c[: len(c) // 2] << 4) | c[len(c) // 2 :], unpack),
        ),
        ("cannot be told apart", (lambda c: c[::2] + c[1::2], unpack)),
        ("not uint8", (lambda c: (c[::2].int() << 4) | c[1::2], unpack)),
        ("two go into each", (lambda c: c, lambda p: p)),
        ("none in common", (lambda c: (c[::2] << 4) & c[1::2], unpack)),
        ("have to alternate", (pack, lambda p: torch.cat([p >> 4, p & 15]))),
        (
            "unpack(pack(codes)) is not codes",
            (pack, lambda p: torch.stack([p & 15, p >> 4], -1).flatten()),
        ),
        ("is there a `return`", (lambda c: None, unpack)),
        (
            "one row of bytes",
            (lambda c: pack(c)[:, None], lambda p: unpack(p.flatten())),
        ),
        (
            "byte & 15 keeps the low half",
            (pack, lambda p: torch.stack([p >> 4, p], -1).flatten()),
        ),
        ("and should give back", (pack, lambda p: torch.stack([p >> 4, p & 15], -1))),
        ("15 · 16 + 2", (lambda c: (c[::2] << 3) | c[1::2], unpack)),
    ],
)
def test_pack_nibbles_mistakes(says, answer):
    rejects(says, check.pack_nibbles, *answer)


# ---------------------------------------------------------------------- normal_codebook


def codebook(end=None, positive=None, negative=None, zero=True, norm=True, sign=1):
    def function(bits):
        half, ppf = 2 ** (bits - 1), NormalDist().inv_cdf
        outer = end(bits) if end else 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2

        def side(n):
            return [ppf(outer + (0.5 - outer) * i / n) for i in range(n)]

        numbers = [
            *side(positive(half) if positive else half),
            *(-x for x in side(negative(half) if negative else half - 1)),
        ]
        numbers = torch.tensor(sorted(numbers + ([0.0] if zero else [])))
        return sign * numbers / (numbers.max() if norm else 1)

    return function


def test_normal_codebook_solution():
    accepts(check.normal_codebook, codebook())


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        (
            "equally far apart",
            lambda bits: torch.cat(
                [
                    torch.linspace(-1, 0, 2 ** (bits - 1)),
                    torch.linspace(0, 1, 2 ** (bits - 1) + 1)[1:],
                ]
            ),
        ),
        ("Zero is not among", codebook(negative=lambda half: half, zero=False)),
        ("do not end at 1", codebook(norm=False)),
        ("sides are swapped", lambda bits: -codebook()(bits).flip(0)),
        ("they fall", lambda bits: codebook()(bits).flip(0)),
        (
            "outermost probability is another one",
            codebook(end=lambda bits: 1 - 1 / 2 ** (bits + 2)),
        ),
        (
            "outermost probability is another one",
            codebook(end=lambda bits: 1 - 1 / 2 ** (bits + 1)),
        ),
        (
            "outermost probability is another one",
            codebook(end=lambda bits: 1 - 1 / (2 ** (bits + 1) - 2)),
        ),
        ("that of four bits", codebook(end=lambda bits: 0.9677083)),
        (
            "Zero is not among",
            lambda bits: (lambda z: z / z.max())(
                torch.distributions.Normal(0.0, 1.0).icdf(
                    (torch.arange(2**bits) + 0.5) / 2**bits
                )
            ),
        ),
        (
            "infinite",
            lambda bits: torch.distributions.Normal(0.0, 1.0).icdf(
                torch.linspace(0, 1, 2**bits)
            ),
        ),
        ("tell 2^", codebook(negative=lambda half: half)),
        ("is there a `return`", lambda bits: None),
    ],
)
def test_normal_codebook_mistakes(says, answer):
    rejects(says, check.normal_codebook, answer)


# ----------------------------------------------------------------------- predict_errors

RIGHT = {
    "W times 8": 1.0,
    "rounded twice": 1.0,
    "rows times factors": 1.0,
    "8 to 9 bits": 0.25,
    "outlier, one scale": 0.5,
    "outlier, blocks of 64": 0.012,
    "bits": 5.0,
    "bits, double": 4.254,
}


def test_predict_errors_solution():
    accepts(check.predict_errors, RIGHT)
    accepts(
        check.predict_errors,
        {key: np.float32(RIGHT[key]) for key in sorted(RIGHT)},
        outlier=64.0,
        block=32,
    )
    more = {"outlier, one scale": 0.2, "outlier, blocks of 64": 0.005}
    more |= {"bits": 4.25, "bits, double": 4.0635}
    accepts(check.predict_errors, RIGHT | more, outlier=128.0, block=128)
    rejects(
        "'bits': you say 5, which is too large", check.predict_errors, RIGHT, block=128
    )


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", None),
        ("Give a dictionary", [1.0] * 8),
        ("no prediction for 'bits'", {k: v for k, v in RIGHT.items() if k != "bits"}),
        ("the codes stay as they are", RIGHT | {"W times 8": 8.0}),
        ("changes nothing", RIGHT | {"rounded twice": 2.0}),
        ("cancels in the relative error", RIGHT | {"rows times factors": 10.0}),
        ("goes with its square", RIGHT | {"8 to 9 bits": 0.5}),
        ("all other weights round to zero", RIGHT | {"outlier, one scale": 1.0}),
        ("all other weights round to zero", RIGHT | {"outlier, one scale": 0.016}),
        ("only the 63 weights", RIGHT | {"outlier, blocks of 64": 0.5}),
        ("only the 63 weights", RIGHT | {"outlier, blocks of 64": 0.0}),
        ("one scale of 32 bits", RIGHT | {"bits": 4.0}),
        ("one scale of 32 bits", RIGHT | {"bits": 4.5}),
        ("share another one", RIGHT | {"bits, double": 4.25}),
        ("share another one", RIGHT | {"bits, double": 4.127}),
        ("a number is wanted", RIGHT | {"bits": "five"}),
        ("a number is wanted", RIGHT | {"bits": None}),
    ],
)
def test_predict_errors_mistakes(says, answer):
    rejects(says, check.predict_errors, answer)


# ------------------------------------------------------------------------ choose_format


def nearest(y, code):
    return code[(y[..., None] - code).abs().argmin(-1)]


def choosing(
    scale=32,
    relative=True,
    over=sum,
    whole=True,
    turned=False,
    steps="int",
    budget=None,
    word=True,
    own_size=False,
):
    def error(w, code, size):
        rows = w.reshape(-1, size)
        top = rows.abs().amax(1, keepdim=True)
        near = (nearest(rows / top, code) * top).reshape(w.shape)
        return float(
            (w - near).square().mean() / (w.square().mean() if relative else 1)
        )

    def function(weights, codes, sizes, most):
        errors = {}
        for name, code in codes.items():
            for size in sizes:
                bits = math.log2(len(code))
                bits = (math.ceil(bits) if whole else bits) + scale / size
                if bits <= (budget or most):
                    errors[name, size] = [error(w, code, size) for w in weights]
        best = min(errors, key=lambda key: over(errors[key]))
        even = [key for key in errors if key[0].startswith(steps)]
        if own_size:
            even = [key for key in even if key[1] == best[1]] or even
        pair = [errors[best], errors[min(even, key=lambda key: sum(errors[key]))]]
        result = compare(*(pair[::-1] if turned else pair), loss=True)
        return *best, result.verdict if word else result

    return function


def test_choose_format_solution():
    accepts(check.choose_format, choosing())
    accepts(check.choose_format, choosing(), scale_bits=32)
    accepts(check.choose_format, choosing(scale=16), scale_bits=16)

    def in_numpy(weights, codes, sizes, budget):
        name, size, verdict = choosing()(weights, codes, sizes, budget)
        return [name, np.int64(size), verdict]

    accepts(check.choose_format, in_numpy)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("pays its share of its block", choosing(scale=0)),
        ("bits a weight, more than", choosing(scale=16)),
        ("whatever it needs: the budget counts", choosing(budget=99)),
        ("is allowed too", choosing(scale=40)),
        ("the largest matrix decides", choosing(relative=False)),
        ("first matrix only", choosing(over=lambda found: found[0])),
        ("is allowed too", choosing(over=lambda found: -sum(found))),
        ("turned round", choosing(turned=True)),
        ("the best allowed format of equal", choosing(steps="nf")),
        ("The verdict is a word", choosing(word=False)),
        ("in blocks of your own size alone", choosing(own_size=True)),
        ("three things", lambda *given: choosing()(*given)[:2]),
        ("is not one of the formats", lambda *given: ("nf4", 7, "ahead")),
        ("gives None", lambda *given: None),
    ],
)
def test_choose_format_mistakes(says, answer):
    rejects(says, check.choose_format, answer)


# --------------------------------------------------------------------- four_bit_adapter


class FourBit(LinearDelta):
    """The solution; the answers below change one line of it."""

    def __init__(self, W, code, block_size):
        super().__init__()
        rows = W.reshape(-1, block_size)
        scale = self.scale_of(rows)
        index = self.index_of(rows / torch.where(scale == 0, 1.0, scale), code)
        packed = self.pack(index.flatten().to(torch.uint8))
        self.keep(packed, scale, code, W)

    def scale_of(self, rows):
        return rows.abs().amax(1, keepdim=True)

    def index_of(self, y, code):
        return torch.bucketize(y, (code[1:] + code[:-1]) / 2)

    def pack(self, index):
        return (index[::2] << 4) | index[1::2]

    def unpack(self, packed):
        return torch.stack([packed >> 4, packed & 15], -1)

    def keep(self, packed, scale, code, W):
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("code", code)

    def dense(self, base):
        index = self.unpack(self.packed).int()
        rows = self.code[index].view(len(self.scale), -1) * self.scale
        return rows.view(base.weight.shape)

    def delta(self, base):
        return self.dense(base) - base.weight


def four(**methods):
    return type("Mine", (FourBit,), methods)


class LowFirst(LinearDelta):
    """The other half first, as its own unpack has it; the update without delta."""

    def __init__(self, W, code, block_size):
        super().__init__()
        blocks = W.flatten().split(block_size)
        top = torch.stack([block.abs().max() for block in blocks])
        y = torch.stack([b / (t if t else 1) for b, t in zip(blocks, top)])
        index = (y[..., None] - code).abs().argmin(-1).flatten().byte()
        self.register_buffer("bytes", index[::2] + 16 * index[1::2])
        self.register_buffer("top", top)
        self.code = code

    def delta(self, base):
        index = torch.stack([self.bytes % 16, self.bytes // 16], 1).long()
        y = self.code[index].reshape(len(self.top), -1) * self.top[:, None]
        return y.reshape(base.weight.shape) - base.weight


def keep_dense(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    self.W = W


def keep_dense_buffer(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    self.register_buffer("W", W)


def keep_trained(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    self.more = torch.nn.Parameter(torch.zeros(3))


def keep_plain(self, packed, scale, code, W):
    self.packed, self.scale, self.code = packed, scale, code


def test_four_bit_adapter_solution():
    accepts(check.four_bit_adapter, FourBit)
    accepts(check.four_bit_adapter, LowFirst)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", four(__init__=blank)),
        ("nothing here yet", four(delta=blank)),
        ("the class itself", lambda W, code, size: FourBit(W, code, size)),
        ("return Ŵ itself", four(delta=FourBit.dense)),
        (
            "The sign is turned round",
            four(delta=lambda self, base: base.weight - self.dense(base)),
        ),
        ("Two go into a byte", four(pack=lambda self, i: i, unpack=lambda self, p: p)),
        ("keep the dense weight", four(keep=keep_dense)),
        ("keep the dense weight", four(keep=keep_dense_buffer)),
        ("rounding has no gradient", four(keep=keep_trained)),
        ("saves nothing", four(keep=keep_plain)),
        (
            "One scale for the whole weight",
            four(scale_of=lambda self, rows: rows.abs().max().expand(len(rows), 1)),
        ),
        (
            "each other's place",
            four(unpack=lambda self, p: torch.stack([p & 15, p >> 4], -1)),
        ),
        (
            "before all second ones",
            four(unpack=lambda self, p: torch.cat([p >> 4, p & 15])),
        ),
        (
            "the code below",
            four(
                index_of=lambda self, y, code: (
                    torch.searchsorted(code, y.contiguous(), right=True) - 1
                ).clamp(0)
            ),
        ),
        (
            "contains nan",
            four(
                scale_of=lambda self, rows: (
                    rows.abs().amax(1, keepdim=True)
                    / (rows.abs().amax(1, keepdim=True) > 0)
                )
            ),
        ),
    ],
)
def test_four_bit_adapter_mistakes(says, answer):
    rejects(says, check.four_bit_adapter, answer)


# ------------------------------------------------------- what a trial by learners found


def test_unpack_is_given_bytes_of_its_own():
    kept = {}

    def remembering(codes):
        kept["codes"] = codes
        return pack(codes)

    for answer in (lambda packed: kept["codes"], lambda packed: unpack(packed).float()):
        for verdict in judge(check.pack_nibbles, remembering, answer):
            assert not verdict
    accepts(check.pack_nibbles, pack, lambda packed: unpack(packed).long())


def test_codebooks_of_many_bits():
    def up_to_four(bits):
        return codebook()(bits) if bits <= 4 else torch.linspace(-1, 1, 2**bits)

    for verdict in judge(check.normal_codebook, up_to_four):
        assert not verdict


def test_an_outlier_is_not_nothing():
    for said in (0.0087, 0.03):
        wrong = RIGHT | {"outlier, blocks of 64": said}
        for verdict in judge(check.predict_errors, wrong):
            assert not verdict and "outlier, blocks" in verdict.message


def looking(look, bits=None):
    """The solution with another look at the matrices' errors."""

    def answer(weights, codes, sizes, budget):
        errors = {}
        for (name, code), size in itertools.product(codes.items(), sizes):
            needed = (bits or (lambda n: math.ceil(math.log2(n))))(len(code))
            if needed + 32 / size <= budget:
                rows = [w.reshape(-1, size) for w in weights]
                errors[name, size] = [rounded(row, code) for row in rows]
        best = min(errors, key=lambda key: look(errors[key]))
        plain = [key for key in errors if key[0].startswith("int")]
        plain = min(plain, key=lambda key: look(errors[key]))
        return *best, compare(errors[best], errors[plain], loss=True).verdict

    def rounded(rows, code):
        top = rows.abs().amax(1, keepdim=True)
        index = torch.bucketize(rows / top, (code[1:] + code[:-1]) / 2)
        return ((code[index] * top - rows).square().sum() / rows.square().sum()).item()

    return answer


def test_the_mean_of_squared_errors_and_whole_bits():
    accepts(check.choose_format, looking(sum))
    for look in (max, lambda e: sorted(e)[1], lambda e: sum(x**0.5 for x in e)):
        for verdict in judge(check.choose_format, looking(look)):
            assert not verdict
    rejects("a whole number of bits", check.choose_format, looking(sum, bits=math.log2))


def in_a_list(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    self.hidden = [W.clone()]


def in_a_closure(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    self.hidden = lambda: W


def in_numpy(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    self.hidden = {"W": W.numpy()}


def once_made(self, base):
    if not hasattr(self, "cache"):
        self.cache = [self.dense(base)]
    return self.cache[0] - base.weight


def changing(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    W.mul_(2)


def test_the_dense_weight_is_found_wherever_it_is_kept():
    for keep in (in_a_list, in_a_closure, in_numpy):
        rejects("keep the dense weight", check.four_bit_adapter, four(keep=keep))
    rejects("keep the dense weight", check.four_bit_adapter, four(delta=once_made))
    rejects("change W itself", check.four_bit_adapter, four(keep=changing))


def test_the_verdict_is_against_the_best_by_the_mean():
    """The format is right, and what it is compared with is found by one look."""

    def answer(*given, look):
        right = looking(sum)(*given)
        weights, codes, sizes, budget = given
        if "int4d" not in codes:
            return right
        even = {name: code for name, code in codes.items() if name.startswith("int")}
        plain = looking(look)(weights, even, sizes, budget)
        pair = [
            [error(w, codes[name], size) for w in weights]
            for name, size in (right[:2], plain[:2])
        ]
        return *right[:2], compare(*pair, loss=True).verdict

    def error(w, code, size):
        rows = w.reshape(-1, size)
        top = rows.abs().amax(1, keepdim=True)
        return float((nearest(rows / top, code) * top - rows).square().mean()) / float(
            rows.square().mean()
        )

    accepts(check.choose_format, functools.partial(answer, look=sum))
    for look in (min, max, lambda e: sorted(e)[1], lambda e: e[0], lambda e: e[-1]):
        for verdict in judge(check.choose_format, functools.partial(answer, look=look)):
            # in some draws another mistake gives the very same words
            words = "the best allowed format of equal", "names *begin* with int"
            assert not verdict and any(word in verdict.message for word in words)


# ------------------------------------------------------- found by trying to fool them


def choosing_by(look, bits=math.ceil, names=lambda name: name.startswith("int")):
    def answer(weights, codes, sizes, budget):
        errors = {}
        for name, code in codes.items():
            for size in sizes:
                if bits(math.log2(len(code))) + 16 / size <= budget:
                    near = [rounded(w, code, size) for w in weights]
                    pairs = list(zip(weights, near))
                    errors[name, size] = [
                        float((w - n).square().mean() / w.square().mean())
                        for w, n in pairs
                    ]
        best = min(errors, key=lambda key: look(errors[key], weights))
        even = min(
            (key for key in errors if names(key[0])), key=lambda key: sum(errors[key])
        )
        return *best, compare(errors[best], errors[even], loss=True).verdict

    return answer


def rounded(w, code, size):
    rows = w.reshape(-1, size)
    top = rows.abs().amax(1, keepdim=True)
    return (nearest(rows / top, code) * top).reshape(w.shape)


def by_variance(errors, weights):
    return sum(e * float(w.square().mean() / w.var()) for e, w in zip(errors, weights))


@pytest.mark.parametrize(
    "says, answer",
    [
        ("round the logarithm", choosing_by(lambda e, w: sum(e), bits=round)),
        ("the variance", choosing_by(by_variance)),
        (
            "by their sizes",
            choosing_by(lambda e, w: sum(a * b.numel() for a, b in zip(e, w))),
        ),
        (
            "*begin* with int",
            choosing_by(lambda e, w: sum(e), names=lambda name: "int" in name),
        ),
    ],
)
def test_formats_that_seem_the_best(says, answer):
    verdict = check.choose_format(answer, scale_bits=16)
    assert not verdict and says in verdict.message, verdict.message


def test_the_codebook_is_ones_own():
    from minipeft.quant import normal_float

    rejects("the course's own", check.normal_codebook, lambda bits: normal_float(bits))


def keep_ones(self, packed, scale, code, W):
    FourBit.keep(self, packed, torch.where(scale == 0, 1.0, scale), code, W)


def keep_bits(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    self.register_buffer("bits", W.float().view(torch.int32))


def keep_a_list(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    self.W = W.tolist()


def keep_frozen(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    del self.scale
    self.scale = nn.Parameter(scale, requires_grad=False)


def keep_bound(self, packed, scale, code, W):
    FourBit.keep(self, packed, scale, code, W)
    self.dense = lambda base: FourBit.dense(self, base)


def alone(self, base, x):
    return nn.functional.linear(x, self.dense(base), base.bias)


def anew(self, base):
    """Rounds the layer's weight in each call, and reads no byte."""
    W = base.weight
    size = W.numel() // len(self.scale)
    return FourBit.dense(type(self)(W.clone(), self.code, size), base) - W


def rows_of_even_length(self, index):
    return FourBit.pack(self, index) if len(index) != 30 else index.view(6, 5)[:, 3:5]


@pytest.mark.parametrize(
    "says, answer",
    [
        ("A block of zeros", four(keep=keep_ones)),
        ("keep the dense weight", four(keep=keep_bits)),
        ("keep the dense weight", four(keep=keep_a_list)),
        ("an active adapter's Parameters are", four(keep=keep_frozen)),
        ("A copy of it", four(keep=keep_bound)),
        ("one of the two is lost", four(forward=alone)),
        ("were loaded, and delta does not follow", four(delta=anew)),
        ("bytes", four(pack=rows_of_even_length)),
    ],
)
def test_four_bits_that_are_right_by_accident(says, answer):
    verdict = check.four_bit_adapter(answer)
    assert not verdict and says in verdict.message, verdict.message
