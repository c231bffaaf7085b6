"""Chapter 09's checks accept the solution, refuse the blank stub kindly, and name the
mistake in what is plausibly wrong."""

from statistics import NormalDist

import pytest
import torch
from judging import accepts, rejects

from minipeft.course import check


def blank(*_):
    raise NotImplementedError


# ------------------------------------------------------------------------- absmax_round


def rounding(
    m=lambda bits: 2 ** (bits - 1) - 1,
    size=lambda w: w.abs().max(),
    to=torch.round,
    back=True,
):
    def function(w, bits):
        step = size(w) / m(bits)
        return to(w / step) * (step if back else 1)

    return function


def affine(w, bits):
    step = (w.max() - w.min()) / (2**bits - 1)
    return ((w - w.min()) / step).round() * step + w.min()


def by_hand(w, bits):
    m, top = 2 ** (bits - 1) - 1, max(abs(float(x)) for x in w.flatten())
    return torch.tensor(
        [[round(float(x) * m / top) * top / m for x in row] for row in w], dtype=w.dtype
    )


def test_absmax_round_solution():
    accepts(check.absmax_round, rounding())
    accepts(check.absmax_round, by_hand)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("multiply by the step again", rounding(back=False)),
        ("take abs() first", rounding(size=lambda w: w.max())),
        ("one whole number too many", rounding(m=lambda bits: 2 ** (bits - 1))),
        ("One bit is the sign", rounding(m=lambda bits: 2**bits - 1)),
        ("cut off instead of rounding", rounding(to=torch.trunc)),
        ("cut off instead of rounding", rounding(to=torch.floor)),
        ("one absmax a row", rounding(size=lambda w: w.abs().amax(1, keepdim=True))),
        ("one absmax a column", rounding(size=lambda w: w.abs().amax(0, keepdim=True))),
        ("zero need not be among them", affine),
        ("You round w itself", lambda w, bits: w.round()),
        ("Your step is the absmax itself", rounding(m=lambda bits: 1)),
        ("is there a `return`", lambda w, bits: None),
    ],
)
def test_absmax_round_mistakes(says, answer):
    rejects(says, check.absmax_round, answer)


# -------------------------------------------------------------------- blockwise_nearest


def nearest(y, code):
    return code[(y[..., None] - code).abs().argmin(-1)]


def blocks(
    scale=lambda rows: rows.abs().amax(1, keepdim=True),
    rows=lambda x, size: x.reshape(-1, size),
    look=nearest,
    back=True,
    shape=True,
):
    def function(x, code, size):
        found = rows(x, size)
        absmax = scale(found)
        y = look(found / absmax, code) * (absmax if back else 1)
        return y.reshape(x.shape) if shape else y

    return function


def test_blockwise_nearest_solution():
    accepts(check.blockwise_nearest, blocks())

    def middles(y, code):
        return code[torch.bucketize(y, (code[1:] + code[:-1]) / 2)]

    accepts(check.blockwise_nearest, blocks(look=middles))

    def one_by_one(x, code, size):
        parts = []
        for block in x.flatten().split(size):
            top = block.abs().max()
            parts += [
                min(code.tolist(), key=lambda c: abs(c - float(number / top))) * top
                for number in block
            ]
        return torch.stack(parts).view(x.shape)

    accepts(check.blockwise_nearest, one_by_one)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        (
            "one absmax for the whole tensor",
            blocks(scale=lambda rows: rows.abs().max()),
        ),
        (
            "along the wrong axis",
            blocks(scale=lambda rows: rows.abs().amax(0, keepdim=True)),
        ),
        (
            "down the columns",
            lambda x, code, size: blocks(
                lambda r: r.abs().amax(0, keepdim=True), lambda x, s: x.reshape(s, -1)
            )(x, code, size),
        ),
        ("multiply each block by its absmax", blocks(back=False)),
        (
            "the code below",
            blocks(
                look=lambda y, code: code[
                    (torch.searchsorted(code, y.contiguous(), right=True) - 1).clamp(
                        0, 7
                    )
                ]
            ),
        ),
        (
            "the code above",
            blocks(
                look=lambda y, code: code[
                    torch.searchsorted(code, y.contiguous()).clamp(0, 7)
                ]
            ),
        ),
        (
            "largest number of a block, not the largest in size",
            blocks(scale=lambda rows: rows.max(1, keepdim=True).values),
        ),
        ("standard deviation", blocks(scale=lambda rows: rows.std(1, keepdim=True))),
        (
            "at equal distances",
            blocks(
                look=lambda y, code: code[
                    ((y + 1) / 2 * (len(code) - 1)).round().long()
                ]
            ),
        ),
        ("The signs are lost", blocks(look=lambda y, code: nearest(y.abs(), code))),
        (
            "without dividing",
            lambda x, code, size: (
                nearest(x.reshape(-1, size), code)
                * x.reshape(-1, size).abs().amax(1, keepdim=True)
            ).reshape(x.shape),
        ),
        ("mean size", blocks(scale=lambda rows: rows.abs().mean(1, keepdim=True))),
        (
            "indices of the codes",
            lambda x, code, size: (x.view(-1, size)[..., None] - code).abs().argmin(-1),
        ),
        ("not the shape", blocks(shape=False)),
    ],
)
def test_blockwise_nearest_mistakes(says, answer):
    rejects(says, check.blockwise_nearest, answer)


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


# ---------------------------------------------------------------------- double_quantize


def double(subtract=torch.mean, add=torch.mean, whole=False):
    def function(absmax, code, size):
        less, more = (f(absmax) if f else 0 for f in (subtract, add))
        rows = (absmax - less).view(-1, len(absmax) if whole else size)
        scale = rows.abs().amax(1, keepdim=True)
        return (nearest(rows / scale, code) * scale).view(-1) + more

    return function


def double_codes(absmax, code, size):
    rows = (absmax - absmax.mean()).view(-1, size)
    return nearest(rows / rows.abs().amax(1, keepdim=True), code).view(-1)


def test_double_quantize_solution():
    accepts(check.double_quantize, double())


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("The mean is missing", double(None, None)),
        ("do not add it again", double(add=None)),
        ("never subtracted", double(subtract=None)),
        ("one scale for all", double(whole=True)),
        ("the smallest, not the mean", double(torch.min, torch.min)),
        ("Nothing has been rounded", lambda absmax, code, size: absmax),
        (
            "a mean from each block",
            lambda absmax, code, size: (
                lambda rows: torch.cat(
                    [
                        nearest((r - r.mean()) / (r - r.mean()).abs().max(), code)
                        * (r - r.mean()).abs().max()
                        + r.mean()
                        for r in rows
                    ]
                )
            )(absmax.view(-1, size)),
        ),
        (
            "abs() first",
            lambda absmax, code, size: (
                (
                    lambda rows: (
                        nearest(rows / rows.amax(1, keepdim=True), code)
                        * rows.amax(1, keepdim=True)
                    ).view(-1)
                )((absmax - absmax.mean()).view(-1, size))
                + absmax.mean()
            ),
        ),
        (
            "by its own scale first",
            lambda absmax, code, size: double_codes(absmax, code, size) + absmax.mean(),
        ),
        (
            "neither scale nor mean",
            lambda absmax, code, size: double_codes(absmax, code, size),
        ),
        ("is there a `return`", lambda absmax, code, size: None),
    ],
)
def test_double_quantize_mistakes(says, answer):
    rejects(says, check.double_quantize, answer)


# ---------------------------------------------------------------------- bits_per_weight


def bits(bits, size, double=None):
    return bits + (32 / size if double is None else 8 / size + 32 / (size * double))


def test_bits_per_weight_solution():
    accepts(check.bits_per_weight, bits)


@pytest.mark.parametrize(
    "says, answer",
    [
        ("nothing here yet", blank),
        ("scales are missing", lambda b, size, double=None: b),
        ("a whole scale", lambda b, size, double=None: b + 32),
        ("upside down", lambda b, size, double=None: b + size / 32),
        ("as 16 bits", lambda b, size, double=None: b + 16 / size),
        ("8 bits, not 32", lambda b, size, double=None: b + 32 / size),
        (
            "scales of the scales",
            lambda b, size, double=None: b + (8 if double else 32) / size,
        ),
        (
            "block_size · double_block",
            lambda b, size, double=None: (
                b + (8 / size + 32 / double if double else 32 / size)
            ),
        ),
        ("That is in bytes", lambda b, size, double=None: bits(b, size, double) / 8),
        ("the scales alone", lambda b, size, double=None: bits(b, size, double) - b),
        (
            "second scale stays in 32 bits",
            lambda b, size, double=None: (
                b + (8 / size + 8 / (size * double) if double else 32 / size)
            ),
        ),
        (
            "count the first scales twice",
            lambda b, size, double=None: (
                b + 32 / size + (8 / size + 32 / (size * double) if double else 0)
            ),
        ),
        ("is there a `return`", lambda b, size, double=None: None),
    ],
)
def test_bits_per_weight_mistakes(says, answer):
    rejects(says, check.bits_per_weight, answer)
