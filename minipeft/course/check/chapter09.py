"""Chapter 09, four bits: rounding, blocks, the codebook, packing, double quantisation,
and what it all costs."""

import random
from statistics import NormalDist

import torch

from .teacher import checks, compare, need, same

__all__ = [
    "absmax_round",
    "bits_per_weight",
    "blockwise_nearest",
    "double_quantize",
    "normal_codebook",
    "pack_nibbles",
]


@checks(
    "Whole numbers from -m to m, m = 2^(bits - 1) - 1, times one step for the whole"
    " tensor: absmax rounding."
)
def absmax_round(function) -> None:
    """function(w, bits) -> w rounded to equal steps, a tensor of w's shape."""
    for bits in (8, 4, 3):
        w = torch.randn(random.randint(5, 9), 11, dtype=torch.float64)
        w.view(-1)[0] = -4.5  # the largest in size is negative
        m, absmax = 2 ** (bits - 1) - 1, w.abs().max()
        step = absmax / m
        mistakes = {
            "You return the whole numbers themselves: multiply by the step again, so"
            " that the result stands for w.": ((w / step).round()),
            "Your step comes from the largest number, not from the largest in *size*:"
            " take abs() first. Here the largest in size is negative, and it does not"
            " survive.": ((w / (w.max() / m)).round() * (w.max() / m)),
            "You have 2^(bits - 1) steps on each side: with the zero that is one"
            " whole number too many for so few bits. It is 2^(bits - 1) - 1.": (
                (w / (absmax / (m + 1))).round() * (absmax / (m + 1))
            ),
            "You have 2^bits - 1 steps on each side: twice as many whole numbers as"
            " there are codes. One bit is the sign.": (
                (w / (absmax / (2**bits - 1))).round() * (absmax / (2**bits - 1))
            ),
            "You cut off instead of rounding (int, trunc or floor): then the error is"
            " up to a whole step, not half a one.": ((w / step).trunc() * step),
            "You take one absmax a row. That is better than one for all, and section"
            " 2.2 comes to it; here it is one.": (
                (w / (w.abs().amax(1, keepdim=True) / m)).round()
                * (w.abs().amax(1, keepdim=True) / m)
            ),
        }
        mistakes[
            "You cut off instead of rounding (int, trunc or floor): the error is up to"
            " a whole step."
        ] = (w / step).floor() * step
        low, wide = w.min(), (w.max() - w.min()) / (2**bits - 1)
        mistakes |= {
            "You spread the steps from the smallest to the largest number: then zero"
            " need not be among them. Here the steps start at zero, and the largest"
            " *size* is m of them.": (((w - low) / wide).round() * wide + low),
            "You take one absmax a column. Here it is one for the whole tensor.": (
                (w / (w.abs().amax(0, keepdim=True) / m)).round()
                * (w.abs().amax(0, keepdim=True) / m)
            ),
            "You round w itself, so that the step is 1: divide by the step first, and"
            " multiply by it afterwards.": (w.round()),
            "Your step is the absmax itself: it is the absmax divided by m.": (
                (w / absmax).round() * absmax
            ),
        }
        compare(
            function(w.clone(), bits),
            (w / step).round() * step,
            mistakes,
            "Your result",
        )


def nearest(y, code):
    return code[(y[..., None] - code).abs().argmin(-1)]


@checks(
    "The nearest code in every block, times the block's own absmax, in the tensor's"
    " shape. This is block-wise quantisation with any codebook.",
    "x has blocks · block_size entries: x.view(-1, block_size) has a block a row.",
)
def blockwise_nearest(function) -> None:
    """function(x, code, block_size) -> x as quantisation leaves it. code: sorted, from
    -1 to 1."""
    for _ in range(3):
        size, blocks = random.choice([4, 8]), random.randint(6, 9)
        x = torch.randn(2, blocks * size // 2, dtype=torch.float64)
        x = x * torch.logspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
        code = torch.tensor(
            [-1.0, -0.55, -0.2, 0.0, 0.15, 0.4, 0.7, 1.0], dtype=torch.float64
        )
        rows = x.reshape(-1, size)
        absmax = rows.abs().amax(1, keepdim=True)
        y = rows / absmax
        columns = x.reshape(size, -1)
        by_column = columns.abs().amax(0, keepdim=True)
        spread = rows.std(1, keepdim=True)
        even = code[((y + 1) / 2 * (len(code) - 1)).round().long()]
        floor = code[
            (torch.searchsorted(code, y.contiguous(), right=True) - 1).clamp(0, 7)
        ]
        ceiling = code[torch.searchsorted(code, y.contiguous()).clamp(0, 7)]
        top = rows.max(1, keepdim=True).values
        mistakes = {
            "You use one absmax for the whole tensor: each block needs its own.": (
                nearest(x / x.abs().max(), code) * x.abs().max()
            ),
            "Your absmax runs along the wrong axis: a block is block_size"
            " *neighbours*, a row of x.view(-1, block_size).": (
                nearest(rows / rows.abs().amax(0, keepdim=True), code)
                * rows.abs().amax(0, keepdim=True)
            ),
            "Your blocks run down the columns: neighbours in memory belong together,"
            " x.view(-1, block_size).": (
                nearest(columns / by_column, code) * by_column
            ),
            "You return numbers between -1 and 1: multiply each block by its absmax"
            " again.": nearest(y, code),
            "You take the code below, not the nearest one: compare with the middles"
            " between codes.": floor * absmax,
            "You take the code above, not the nearest one: compare with the middles"
            " between codes.": ceiling * absmax,
            "You scale by the largest number of a block, not the largest in size:"
            " take abs() first.": (nearest(rows / top, code) * top),
            "You scale by the mean size of a block: then what is larger is cut off."
            " It is the largest.": (
                nearest(rows / rows.abs().mean(1, keepdim=True), code)
                * rows.abs().mean(1, keepdim=True)
            ),
            "You scale by the standard deviation of a block: then what is larger is"
            " cut off. It is the largest.": (nearest(rows / spread, code) * spread),
            "You find the index as if the codes stood at equal distances. They do"
            " not: compare with the middles between neighbours.": even * absmax,
            "The signs are lost: divide the numbers themselves by the absmax, not"
            " their sizes.": (nearest(y.abs(), code) * absmax),
            "You look for the nearest code without dividing by the absmax first.": (
                nearest(rows, code) * absmax
            ),
        }
        mistakes = {
            message: wrong.reshape(x.shape) for message, wrong in mistakes.items()
        }
        got = function(x.clone(), code.clone(), size)
        need(
            not (isinstance(got, torch.Tensor) and not got.is_floating_point()),
            "You return the indices of the codes: look the codes up, code[index], and"
            " multiply by the absmax.",
        )
        if (
            isinstance(got, torch.Tensor)
            and got.shape != x.shape
            and got.numel() == x.numel()
        ):
            need(
                not same(
                    got.reshape(x.shape), (nearest(y, code) * absmax).reshape(x.shape)
                ),
                "The numbers are right, but not the shape: bring the blocks back into"
                " x's shape at the end.",
            )
        compare(
            got, (nearest(y, code) * absmax).reshape(x.shape), mistakes, "Your result"
        )


def quantiles(bits, outermost=None, positive=None, negative=None):
    half, ppf = 2 ** (bits - 1), NormalDist().inv_cdf
    outermost = outermost or 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2

    def side(n):
        return [ppf(outermost + (0.5 - outermost) * i / n) for i in range(n)]

    positive, negative = positive or half, half - 1 if negative is None else negative
    return sorted([*side(positive), 0.0, *(-x for x in side(negative))])


@checks(
    "Quantiles on either side, a zero, 1 at the end: for four bits these are NF4's"
    " sixteen numbers."
)
def normal_codebook(function) -> None:
    """function(bits) -> a sorted tensor of 2^bits numbers."""
    for bits in (4, 3, 2):
        got = function(bits)
        need(got is not None, "Your codebook is None: is there a `return` at the end?")
        got = torch.as_tensor(got).float()
        n, raw = 2**bits, torch.tensor(quantiles(bits), dtype=torch.float32)
        right = raw / raw.max()
        need(
            bool(got.isfinite().all()),
            "One of your numbers is infinite: the quantile of probability 1 is. That is"
            " what the outermost probability, a little below 1, is for.",
        )
        need(
            not same(got.flip(0), right),
            "Your numbers are right, but they fall: sort them, the smallest first.",
        )
        need(
            len(got) == n,
            f"For {bits} bits you have {len(got)} numbers; {bits} bits tell 2^{bits} ="
            f" {n} apart. (Is the zero in twice, or not at all?)",
        )
        need(
            bool((got == 0).any()),
            "Zero is not among your numbers: then a weight that is zero does not stay"
            " zero. One of the two sides gives up a number for it.",
        )
        steps = torch.linspace(-1, 1, n, dtype=torch.float32)
        half = torch.cat(
            [
                torch.linspace(-1, 0, n // 2, dtype=torch.float32),
                torch.linspace(0, 1, n // 2 + 1, dtype=torch.float32)[1:],
            ]
        )
        mistakes = {
            "Your numbers are the quantiles, but they do not end at 1: divide by the"
            " largest.": raw,
            "Your two sides are swapped: NF4 has one number more on the *positive*"
            " side.": -right.flip(0),
        }
        need(
            not (same(got, steps) or same(got, half)),
            "Your numbers are equally far apart. Equally far apart should be their "
            "*probabilities*: put them through the inverse of the normal distribution.",
        )

        def scaled(numbers):
            return torch.tensor(numbers, dtype=torch.float32) / max(numbers)

        if bits < 4:
            need(
                not same(
                    got, scaled(quantiles(bits, outermost=1 - (1 / 32 + 1 / 30) / 2))
                ),
                "Your outermost probability is that of four bits, also where there are"
                f" {bits}: it depends on the number of bins.",
            )
        for end in (
            1 - 1 / (2 * n),
            1 - 1 / (2 * n - 2),
            1 - 1 / (4 * n),
            1 - 1 / n,
            1 - 1 / (n + 1),
        ):
            need(
                not same(got, scaled(quantiles(bits, outermost=end))),
                "Your outermost probability is another one: it is the mean of "
                "1 - 1/(2·2^bits) and 1 - 1/(2·(2^bits - 1)).",
            )
        levels = [
            k / count for count in (n // 2, n // 2 - 1) for k in range(1, count + 1)
        ]
        plain = [*levels[: n // 2], 0.0, *(-x for x in levels[n // 2 :])]
        need(
            not same(got, scaled(sorted(plain))),
            "You have the probabilities themselves, equally far apart: put them through"
            " the inverse of the normal distribution.",
        )
        compare(got, right, mistakes, "Your codebook")


@checks(
    "Neighbours share a byte, the first in the high half, and unpacking gives back"
    " every code."
)
def pack_nibbles(pack, unpack) -> None:
    """pack(codes) -> bytes, half as many, uint8; unpack(bytes) -> codes. codes: (n,)
    uint8 below 16, n even."""
    for _ in range(3):
        codes = torch.randint(0, 16, (2 * random.randint(5, 9),), dtype=torch.uint8)
        codes[:2] = torch.tensor([15, 2])
        packed = pack(codes.clone())
        need(
            isinstance(packed, torch.Tensor),
            "pack should return a tensor: is there a `return`?",
        )
        need(
            packed.dim() == 1,
            f"Your bytes have the shape {tuple(packed.shape)}: one row of bytes is"
            " wanted, (n / 2,).",
        )
        need(
            len(packed) == len(codes) // 2,
            f"{len(codes)} codes became {len(packed)} bytes; two go into each, so it"
            f" should be {len(codes) // 2}.",
        )
        need(
            packed.dtype == torch.uint8,
            f"Your bytes are {packed.dtype}, not uint8: then nothing is saved. Keep the"
            " dtype, or convert at the end.",
        )
        high, low = codes[::2], codes[1::2]
        half = len(codes) // 2
        need(
            not torch.equal(packed, (low << 4) | high),
            "The two halves of each byte are swapped: the *first* code belongs into "
            "the high half, as in bitsandbytes.",
        )
        need(
            not torch.equal(packed, (codes[:half] << 4) | codes[half:]),
            "You pair the first half of the tensor with the second: "
            "*neighbours* share a byte, codes[::2] and codes[1::2].",
        )
        need(
            not torch.equal(packed, high + low),
            "You add the two codes: then they cannot be told apart. Shift the first one"
            " up by four bits (times 16).",
        )
        need(
            not torch.equal(packed, (high << 4) & low),
            "& keeps the bits that both have, and after the shift they have none in "
            "common: use | or +.",
        )
        need(
            torch.equal(packed, (high << 4) | low),
            "Your bytes are not the codes side by side: for the codes 15, 2 the byte is"
            " 15 · 16 + 2 = 242.",
        )
        back = unpack(packed.clone())
        need(
            isinstance(back, torch.Tensor),
            "unpack should return a tensor: is there a `return`?",
        )
        need(
            not torch.equal(back, torch.cat([high, low])),
            "unpack puts all first codes before all second ones: they have to "
            "alternate again (torch.stack along a new last axis, then flatten).",
        )
        need(
            back.shape == codes.shape,
            f"unpack gives the shape {tuple(back.shape)}, and should give back"
            f" {tuple(codes.shape)}, two codes for each byte, flat.",
        )
        need(
            not torch.equal(back[1::2].to(torch.uint8), packed),
            "The second code still has the first one in its high half: "
            "byte & 15 keeps the low half alone.",
        )
        need(
            torch.equal(back.to(torch.uint8), codes),
            "unpack(pack(codes)) is not codes. byte >> 4 is the first code, byte & 15"
            " the second.",
        )


@checks(
    "Less the mean, blocks of their own, 8 bits each, and the mean added at the end:"
    " double quantisation."
)
def double_quantize(function) -> None:
    """function(absmax, code, block_size) -> the scales as double quantisation leaves
    them."""
    code = torch.linspace(-1, 1, 255, dtype=torch.float64)
    for _ in range(3):
        size = 16
        absmax = (
            0.05
            + 0.01 * torch.randn(size * random.randint(4, 7), dtype=torch.float64).abs()
        )
        absmax[3] *= 6  # one block holds an outlier

        def rounded(x, size=size):
            rows = x.view(-1, size)
            scale = rows.abs().amax(1, keepdim=True)
            return (nearest(rows / scale, code) * scale).view(-1)

        mean = absmax.mean()
        right = rounded(absmax - mean) + mean
        got = function(absmax.clone(), code.clone(), size)
        mistakes = {
            "The mean is missing: scales are all positive, so without it half of the"
            " codes are never used, and the error is larger. Subtract it first and"
            " add it at the end.": rounded(absmax),
            "You subtract the mean, but do not add it again at the end.": rounded(
                absmax - mean
            ),
            "You add a mean that you never subtracted.": rounded(absmax) + mean,
            "You use one scale for all of them: the outlier among them spoils the"
            " rest. They come in blocks too.": (
                rounded(absmax - mean, len(absmax)) + mean
            ),
            "You subtract the smallest, not the mean: then half of the signed codes"
            " are never used.": (rounded(absmax - absmax.min()) + absmax.min()),
            "Nothing has been rounded: the scales came back as they were.": absmax,
        }
        rows = absmax.view(-1, size)
        own = rows.mean(1, keepdim=True)
        less = rows - mean
        signed = less.amax(1, keepdim=True)
        scale = less.abs().amax(1, keepdim=True)
        mistakes |= {
            "You subtract a mean from each block: there is one for all scales, and"
            " only it is stored.": (
                rounded((rows - own).view(-1)) + own.expand_as(rows).reshape(-1)
            ),
            "You scale by the largest of a block, not by the largest in size. Less"
            " the mean, there are negative ones: abs() first.": (
                (nearest(less / signed, code) * signed).view(-1) + mean
            ),
            "You add the mean to numbers between -1 and 1: multiply each block by its"
            " own scale first.": (nearest(less / scale, code).view(-1) + mean),
            "The code you return is the rounded one of each block, and neither scale"
            " nor mean has come back.": (nearest(less / scale, code).view(-1)),
        }
        compare(got, right, mistakes, "Your scales")


@checks(
    "The codes, the scales in 8 bits, and the scales of the scales: for NF4's numbers"
    " it is 4.127."
)
def bits_per_weight(function) -> None:
    """function(bits, block_size, double_block=None) -> bits for each weight;
    double_block None: scales in 32 bits."""
    for bits, size, double in ((4, 64, 256), (4, 32, 128), (3, 128, 512), (8, 256, 64)):
        for outer in (None, double):
            right = (
                bits + 32 / size
                if outer is None
                else bits + 8 / size + 32 / (size * outer)
            )
            mistakes = {
                "The scales are missing: each block has one, and each weight pays its"
                " share of it.": bits,
                "You charge every weight a whole scale. A block of block_size weights"
                " shares it.": bits + 32,
                "Your share is upside down: block_size / 32 instead of 32 /"
                " block_size.": bits + size / 32,
                "That is in bytes; bits are asked for.": right / 8,
                "Those are the scales alone: the code itself takes `bits` more.": (
                    right - bits
                ),
            }
            if outer is None:
                mistakes["You count a scale as 16 bits; it is kept in 32."] = (
                    bits + 16 / size
                )
            else:
                mistakes |= {
                    "With double quantisation a scale has 8 bits, not 32.": (
                        bits + 32 / size
                    ),
                    "The scales of the scales are missing: they cost 32 bits for"
                    " double_block blocks.": bits + 8 / size,
                    "The second scale is shared by double_block *blocks*, so by"
                    " block_size · double_block weights.": (
                        bits + 8 / size + 32 / outer
                    ),
                    "The second scale stays in 32 bits; only the first becomes 8.": (
                        bits + 8 / size + 8 / (size * outer)
                    ),
                    "You count the first scales twice, in 32 bits and in 8: the 8-bit"
                    " codes replace them.": (
                        bits + 32 / size + 8 / size + 32 / (size * outer)
                    ),
                }
            got = function(bits, size) if outer is None else function(bits, size, outer)
            need(
                got is not None, "Your result is None: is there a `return` at the end?"
            )
            compare(
                torch.tensor(float(got), dtype=torch.float64),
                torch.tensor(float(right), dtype=torch.float64),
                {
                    m: torch.tensor(float(v), dtype=torch.float64)
                    for m, v in mistakes.items()
                },
                "Your count",
            )
