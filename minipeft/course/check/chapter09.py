"""Chapter 09, four bits: the faults in a packer and in a codebook, errors and bits said
beforehand, a format under a budget, and four bits as an adapter."""

import copy
import functools
import math
import random
from statistics import NormalDist

import torch
from torch import nn

from ... import LinearDelta, LoraConfig, get_peft_model
from ...slot import Base
from ..comparison import compare as told_apart
from .kinds import Choices, configured, told_by_the_mean
from .practice import copy_stands_alone, fit, held_entries, missed, written
from .sandbox import package_calls
from .slips import Formula
from .teacher import Wrong, checks, compare, need, same

__all__ = [
    "choose_format",
    "four_bit_adapter",
    "normal_codebook",
    "pack_nibbles",
    "predict_errors",
]


# ---- 1. two to a byte ----------------------------------------------------------------


@checks(
    "Neighbours share a byte, the first in the high half, and unpacking gives back"
    " every code."
)
def pack_nibbles(pack, unpack) -> None:
    """pack(codes) -> bytes, half as many, uint8; unpack(bytes) -> codes. codes: (n,)
    uint8 below 16, n even."""
    for _ in range(3):
        codes = drawn_codes(2 * random.randint(5, 9))
        codes[:2] = torch.tensor([15, 2])
        check_packing(pack(codes.clone()), codes)
        codes = drawn_codes(len(codes))
        packed = (codes[::2] << 4) | codes[1::2]
        check_unpacking(unpack(packed.clone()), packed, codes)


def drawn_codes(n: int):
    return torch.randint(0, 16, (n,), dtype=torch.uint8)


def check_packing(packed, codes) -> None:
    need(
        isinstance(packed, torch.Tensor),
        "pack should return a tensor: is there a `return`?",
    )
    need(
        packed.dim() == 1,
        f"Your bytes have the shape {tuple(packed.shape)}: one row of bytes is wanted,"
        " (n / 2,).",
    )
    need(
        len(packed) == len(codes) // 2,
        f"{len(codes)} codes became {len(packed)} bytes; two go into each, so it should"
        f" be {len(codes) // 2}.",
    )
    need(
        packed.dtype == torch.uint8,
        f"Your bytes are {packed.dtype}, not uint8: then nothing is saved. Keep the"
        " dtype, or convert at the end.",
    )
    high, low = codes[::2], codes[1::2]
    half = len(codes) // 2
    slips = {
        "The two halves of each byte are swapped: the *first* code belongs into the"
        " high half, as in bitsandbytes.": (low << 4) | high,
        "You pair the first half of the tensor with the second: *neighbours* share a"
        " byte, codes[::2] and codes[1::2].": (codes[:half] << 4) | codes[half:],
        "You add the two codes: then they cannot be told apart. Shift the first one up"
        " by four bits (times 16).": high + low,
        "& keeps the bits that both have, and after the shift they have none in"
        " common: use | or +.": (high << 4) & low,
    }
    for message, wrong in slips.items():
        need(not torch.equal(packed, wrong), message)
    need(
        torch.equal(packed, (high << 4) | low),
        "Your bytes are not the codes side by side: for the codes 15, 2 the byte is"
        " 15 · 16 + 2 = 242.",
    )


def check_unpacking(back, packed, codes) -> None:
    need(
        isinstance(back, torch.Tensor),
        "unpack should return a tensor: is there a `return`?",
    )
    need(
        not back.is_floating_point(),
        f"unpack gives {back.dtype}: a codebook is looked up by whole numbers.",
    )
    need(
        not torch.equal(back, torch.cat([codes[::2], codes[1::2]])),
        "unpack puts all first codes before all second ones: they have to alternate"
        " again (torch.stack along a new last axis, then flatten).",
    )
    need(
        back.shape == codes.shape,
        f"unpack gives the shape {tuple(back.shape)}, and should give back"
        f" {tuple(codes.shape)}, two codes for each byte, flat.",
    )
    need(
        not torch.equal(back[1::2].to(torch.uint8), packed),
        "The second code still has the first one in its high half: byte & 15 keeps the"
        " low half alone.",
    )
    need(
        torch.equal(back.to(torch.uint8), codes),
        "unpack(pack(codes)) is not codes. byte >> 4 is the first code, byte & 15 the"
        " second.",
    )


# ---- 2. the codebook for any number of bits ------------------------------------------


def quantiles(bits, outermost=None, positive=None, negative=None):
    half, ppf = 2 ** (bits - 1), NormalDist().inv_cdf
    outermost = outermost or 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2

    def side(n):
        return [ppf(outermost + (0.5 - outermost) * i / n) for i in range(n)]

    positive, negative = positive or half, half - 1 if negative is None else negative
    return sorted([*side(positive), 0.0, *(-x for x in side(negative))])


def one_step_for_both(bits):
    """NF4's recipe, with the steps of the positive side on the negative one."""
    half, ppf = 2 ** (bits - 1), NormalDist().inv_cdf
    outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    side = [ppf(outermost + (0.5 - outermost) * i / half) for i in range(half)]
    numbers = torch.tensor(sorted([*side, 0.0, *(-x for x in side[: half - 1])]))
    return numbers / numbers.max()


def scaled(numbers):
    return torch.tensor(numbers, dtype=torch.float32) / max(numbers)


def equally_far_apart(bits) -> list:
    """From -1 to 1, and from -1 to 0 and from 0 to 1."""
    n = 2**bits
    whole = torch.linspace(-1, 1, n, dtype=torch.float32)
    negative = torch.linspace(-1, 0, n // 2, dtype=torch.float32)
    positive = torch.linspace(0, 1, n // 2 + 1, dtype=torch.float32)
    return [whole, torch.cat([negative, positive[1:]])]


def with_another_end(bits) -> list:
    n = 2**bits
    below_one = 1 / (2 * n), 1 / (2 * n - 2), 1 / (4 * n), 1 / n, 1 / (n + 1)
    below_one += ((1 / n + 1 / (n - 1)) / 2,)
    return [scaled(quantiles(bits, outermost=1 - end)) for end in below_one]


def probabilities(bits):
    """The sides and the zero, not put through the inverse of the distribution."""
    half = 2 ** (bits - 1)
    levels = [k / count for count in (half, half - 1) for k in range(1, count + 1)]
    return scaled(sorted([*levels[:half], 0.0, *(-x for x in levels[half:])]))


def other_recipes(bits) -> dict:
    """{message: the codebooks of this slip's forms}"""
    of_four = scaled(quantiles(bits, outermost=1 - (1 / 32 + 1 / 30) / 2))
    return {
        "Your numbers are equally far apart. Equally far apart should be their"
        " *probabilities*: put them through the inverse of the normal distribution.": (
            equally_far_apart(bits)
        ),
        "Your outermost probability is that of four bits, also where there are"
        f" {bits}: it depends on the number of bins.": [of_four] if bits != 4 else [],
        "Your outermost probability is another one: it is the mean of 1 - 1/(2·2^bits)"
        " and 1 - 1/(2·(2^bits - 1)).": with_another_end(bits),
        "You have the probabilities themselves, equally far apart: put them through the"
        " inverse of the normal distribution.": [probabilities(bits)],
    }


def check_numbers(got, right, bits) -> None:
    """Finite, in their order, as many as the bits tell apart, and zero among them."""
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
        len(got) == len(right),
        f"For {bits} bits you have {len(got)} numbers; {bits} bits tell 2^{bits} ="
        f" {len(right)} apart. (Is the zero in twice, or not at all?)",
    )
    need(
        bool((got == 0).any()),
        "Zero is not among your numbers: then a weight that is zero does not stay zero."
        " One of the two sides gives up a number for it.",
    )


def one_codebook(got, bits) -> None:
    raw = torch.tensor(quantiles(bits), dtype=torch.float32)
    right = raw / raw.max()
    check_numbers(got, right, bits)
    for message, forms in other_recipes(bits).items():
        need(not any(same(got, wrong) for wrong in forms), message)
    mistakes = {
        "Your numbers are the quantiles, but they do not end at 1: divide by the"
        " largest.": raw,
        "Your two sides are swapped: NF4 has one number more on the *positive* side.": (
            -right.flip(0)
        ),
        "Your numbers are divided by their spread: divide by the largest.": (
            raw / raw.std()
        ),
        "Both sides have the same steps: the side with a number fewer has wider ones,"
        " so that it, too, ends at the outermost probability.": one_step_for_both(bits),
    }
    compare(got, right, mistakes, "Your codebook")


@checks(
    "Quantiles on either side, a zero, 1 at the end: for four bits these are NF4's"
    " sixteen numbers."
)
def normal_codebook(function) -> None:
    """function(bits) -> a sorted tensor of 2^bits numbers."""
    for bits in (4, 3, 2, 5, 8):
        got = function(bits)
        need(got is not None, "Your codebook is None: is there a `return` at the end?")
        one_codebook(torch.as_tensor(got).float(), bits)
    borrowed = package_calls(function, 4)
    need(
        not borrowed,
        f"You call the course's own {borrowed[:1]}: the exercise is to write it.",
    )


# ---- 3. errors and bits, said beforehand ---------------------------------------------


def in_blocks(w, code, size: int):
    """w rounded to the nearest code, each block of `size` neighbours times its
    absmax."""
    rows = w.reshape(-1, size)
    scale = rows.abs().amax(1, keepdim=True)
    y = rows / torch.where(scale == 0, torch.ones_like(scale), scale)
    index = torch.bucketize(y, (code[1:] + code[:-1]) / 2)
    return (code[index] * scale).reshape(w.shape)  # a block of zeros stays zero


def relative_error(w, w_hat) -> float:
    return float((w - w_hat).square().mean() / w.square().mean())


def equal_steps(bits: int):
    """2^bits - 1 numbers from -1 to 1, zero among them."""
    m = 2 ** (bits - 1) - 1
    return torch.arange(-m, m + 1, dtype=torch.float64) / m


def normal_code(bits: int = 4):
    numbers = torch.tensor(quantiles(bits), dtype=torch.float64)
    return numbers / numbers.max()


WHY = {
    "W times 8": "each block's absmax grows with its weights, so the codes stay as they"
    " are",
    "rounded twice": "every weight is already one of the block's sixteen numbers, and"
    " the absmax is among them: the second rounding changes nothing",
    "rows times factors": "a block lies within one row, so a row's factor is part of"
    " its scales, and cancels in the relative error of the row",
    "8 to 9 bits": "one bit more halves the step (nearly), and the squared error goes"
    " with its square",
    "outlier, one scale": "one step is a seventh of the outlier: all other weights"
    " round to zero and are lost. How large is their mean square beside that of all,"
    " the outlier included?",
    "outlier, blocks of 64": "only the 63 weights beside the outlier round to zero; all"
    " others keep NF4's error. Both are small beside the outlier's own square",
    "bits": "the code has 4, and each block pays for one scale of 32 bits",
    "bits, double": "the code has 4, each block pays for a scale of 8 bits, and 256"
    " blocks share another one of 32 bits",
}


def true_numbers(outlier: float, block: int) -> dict:
    """What the predictions are compared with, by rounding 2^18 normal numbers."""
    code, side = normal_code(), 512
    w = torch.randn(side, side, dtype=torch.float64)
    plain = relative_error(w, in_blocks(w, code, 64))
    factors = torch.logspace(-1, 1, side, dtype=torch.float64)[:, None]
    hit = torch.randn(16, 4096, dtype=torch.float64)  # the same case 16 times
    hit[:, 1234] = outlier
    once = in_blocks(w, code, 64)
    eight, nine = (
        relative_error(w, in_blocks(w, equal_steps(bits), 64)) for bits in (8, 9)
    )
    by_rows = w * factors
    return {
        "W times 8": relative_error(8 * w, in_blocks(8 * w, code, 64)) / plain,
        "rounded twice": relative_error(w, in_blocks(once, code, 64)) / plain,
        "rows times factors": relative_error(by_rows, in_blocks(by_rows, code, 64))
        / plain,
        "8 to 9 bits": nine / eight,
        "outlier, one scale": relative_error(hit, in_blocks(hit, equal_steps(4), 4096)),
        "outlier, blocks of 64": relative_error(hit, in_blocks(hit, code, 64)),
        "bits": 4 + 32 / block,
        "bits, double": 4 + 8 / block + 32 / (block * 256),
    }


@checks(
    "All eight. The scale of a block takes with it what its weights share; what they do"
    " not share, an outlier, costs its neighbours."
)
def predict_errors(predicted, outlier=64.0, block=32) -> None:
    """predicted: {situation: a number}."""
    predicted = written(predicted, WHY, "put your eight numbers", "{situation: number}")
    for case, true in true_numbers(outlier, block).items():
        one_number(case, predicted[case], true)


def one_number(case: str, said, true: float) -> None:
    wanted = f"{case!r}: a number is wanted, you have {said!r}."
    need(not isinstance(said, str | bool), wanted)
    try:
        said = float(said)
    except (TypeError, ValueError) as error:
        raise Wrong(wanted) from error
    near = {"outlier, blocks of 64": 0.2, "bits": 3e-4, "bits, double": 3e-4}
    need(
        abs(said - true) <= near.get(case, 0.1) * true,
        f"{case!r}: you say {missed(said, true)}. Think again: {WHY[case]}.",
    )


# ---- 4. a format under a budget ------------------------------------------------------


def bits_of(code, size: int, scale_bits: int) -> float:
    return math.ceil(math.log2(len(code))) + scale_bits / size


def matrices(kind: str) -> list:
    """Three weights (8, 256): all normal, all uniform, or some of them uniform or with
    outliers."""
    uniform = {"uniform": (0, 1, 2), "first": (0,), "large": (1,), "one": (0, 2)}
    uniform = uniform.get(kind, ())
    outliers = {"outliers": (0, 1, 2), "one": (1,)}.get(kind, ())
    found = []
    for place in range(3):
        w = torch.randn(8, 256, dtype=torch.float64)
        if place == 1 and kind == "sizes":
            w = 2 * torch.rand(96, 256, dtype=torch.float64) - 1
        if place == 1 and kind == "shifted":  # all are nearly one number
            w = 0.95 + 0.1 * torch.rand(8, 256, dtype=torch.float64)
        if place in uniform:
            w = 2 * torch.rand(8, 256, dtype=torch.float64) - 1
        if kind == "signs" and place != 1:  # nearly all of one size
            w = w.sign() * (1 + 0.1 * w)
        elif kind == "signs":
            w[:, ::64] *= 8
        if place in outliers:
            w[:, ::64] *= 40
        if kind == "large" and place == 1:
            w = 50 * w
        found.append(w)
    return found


def formats_drawn() -> dict:
    return {
        "nf4": normal_code(),
        "int4": equal_steps(4),
        "nf3": normal_code(3),
        "int3": equal_steps(3),
        "int5": equal_steps(5),
        "nine-point": normal_code(4)[[0, 2, 4, 6, 7, 8, 10, 12, 15]],
    }


@checks(
    "The smallest mean of the relative errors that the budget of bits buys, scales"
    " counted, and a verdict by the course's rule."
)
def choose_format(function, scale_bits=32) -> None:
    """function(weights, codes, sizes, budget) -> (code's name, block size, verdict)."""
    formats, verdicts = Choices(), Choices()
    for kind, budget, sizes in (
        ("large", 4.3, [256, 128, 64, 32]),
        ("normal", 4.5, [256, 16, 64]),
        ("normal", 4.495, [64, 256]),
        ("normal", 4.0, [16, 64, 128, 256]),
        ("uniform", 4.3, [256, 128, 64]),
        ("outliers", 5.0, [256, 64, 32, 16]),
        ("first", 4.3, [256, 128, 64, 32]),
        ("normal", 3.2, [64, 256]),
        ("one", 4.3, [256, 64]),
        ("signs", 4.5, [64]),
        ("uniform", 4.45, [256, 64]),
        ("sizes", 4.5, [64]),
        ("shifted", 4.5, [64]),
        ("outliers", 5.2, [32, 256]),
        ("by hand", 4.2, [256]),
        ("by hand, four", 4.2, [256]),
        ("first, few codes", 5.0, [256, 16]),  # equal steps are best at another size
        ("one, few codes", 4.125, [256, 32]),
    ):
        weights, codes = matrices(kind.split(",")[0]), formats_drawn()
        if kind.startswith("by hand"):
            weights, codes = by_hand(kind == "by hand")
        elif kind.endswith("few codes"):
            codes = {name: codes[name] for name in ("nf4", "int3")}
        given = [w.clone() for w in weights], copy.deepcopy(codes), list(sizes), budget
        got = function(*given)
        need(got is not None, "Your function gives None: is there a `return`?")
        need(
            isinstance(got, tuple | list) and len(got) == 3,
            f"Return three things: a name, a size, a verdict; you return {got!r}.",
        )
        errors = errors_of(weights, codes, sizes)
        bits = {key: bits_of(codes[key[0]], key[1], scale_bits) for key in errors}
        allowed = {key: errors[key] for key in errors if bits[key] <= budget}
        needs = bits, budget
        a_format(tuple(got[:2]), errors, allowed, needs, weights, codes, formats)
        a_verdict(got[2], allowed, verdicts)
    formats.judge()
    verdicts.judge()


def by_hand(five: bool) -> tuple:
    """(weights, codes) whose errors are known: each weight has one size, beside a 1 in
    each row, and a code misses this size by what its error says. Of four codes another
    one seems the best by each look at the matrices but the mean; a fifth is ahead of
    the best by the mean, and not told apart from the others."""
    sizes = torch.tensor([0.2, 0.4, 0.7], dtype=torch.float64)
    weights = []
    for size in sizes:
        w = size * torch.randn(8, 256, dtype=torch.float64).sign()
        w[:, 0] = 1
        weights.append(w)
    names = "int4", "int4b", "int4c", "int4d"
    names = names if five else ("nf4", "nf4b", "int4", "int4b")
    errors = dict(zip(names, told_by_the_mean()))
    if five:
        errors["nf4"] = [error - 0.15 for error in errors["int4"]]
        errors["point"] = [  # between the two by its mean, and not told apart from nf4
            error + more for error, more in zip(errors["nf4"], (0.3, -0.2, 0.2))
        ]
    codes = {}
    for name, three in errors.items():
        wide = sizes * (1 + (0.1 * torch.tensor(three).double()).sqrt())
        codes[name] = torch.cat([-wide.flip(0), wide, torch.ones(4)]).unique()
    return weights, {
        name: codes[name] for name in random.sample(sorted(codes), len(codes))
    }


def errors_of(weights, codes, sizes) -> dict:
    """{(code's name, size): the three relative errors}"""
    return {
        (name, size): [relative_error(w, in_blocks(w, code, size)) for w in weights]
        for name, code in codes.items()
        for size in sizes
    }


LOOKS = {
    "You look at the worst matrix: take the mean over all of them.": max,
    "You look at the best matrix: take the mean over all of them.": min,
    "You look at the first matrix only: take the mean over all of them.": (
        lambda errors: errors[0]
    ),
    "You take the median of the matrices: take the mean.": (
        lambda errors: sorted(errors)[1]
    ),
    "You take roots of the errors: they are squared errors.": lambda errors: sum(
        map(math.sqrt, errors)
    ),
}


def a_format(key, errors, allowed, needs, weights, codes, formats) -> None:
    need(
        key in errors,
        f"{key} is not one of the formats: a name out of {list(codes)} and a size out"
        f" of {sorted({size for _, size in errors})}.",
    )
    sizes = [w.square().mean().item() for w in weights]
    right = best_of(allowed)
    slips = {
        message: min(allowed, key=lambda one: look(allowed[one]))
        for message, look in LOOKS.items()
    }
    slips |= {
        "You add up squared errors as they are: then the largest matrix decides alone."
        " Divide each by its matrix's mean square.": min(
            allowed, key=lambda one: sum(e * s for e, s in zip(allowed[one], sizes))
        ),
        "You take the best format of all, whatever it needs: the budget counts.": (
            best_of(errors)
        ),
        "You weigh the matrices by their sizes: the mean counts each alike.": min(
            allowed,
            key=lambda one: sum(e * w.numel() for e, w in zip(allowed[one], weights)),
        ),
        "You divide by the variance, from which the mean is taken off: divide by the"
        " mean square.": min(
            allowed,
            key=lambda one: sum(
                e * w.square().mean().item() / w.var(correction=0).item()
                for e, w in zip(allowed[one], weights)
            ),
        ),
        "You take the format with the most bits: the error decides.": max(
            allowed, key=lambda one: (needs[0][one], -sum(allowed[one]))
        ),
    }
    slips |= bit_slips(errors, codes, needs)
    formats.add(key, right, slips, no_format(key, right, errors, needs))


def bit_slips(errors, codes, needs) -> dict:
    """{message: the best format of those that seem to be within the budget}"""
    bits, budget = needs

    def exact(key):
        return math.log2(len(codes[key[0]]))

    def whole(key):
        return math.ceil(exact(key))

    counts = {
        "You forget that each weight pays its share of its block's scale.": whole,
        "You take the logarithm as it is: an index into the codes has a whole number"
        " of bits.": lambda key: bits[key] - whole(key) + exact(key),
        "You round the logarithm: 3 bits tell 8 codes apart, and nine need a fourth.": (
            lambda key: bits[key] - whole(key) + round(exact(key))
        ),
    }
    found = {}
    for message, count in counts.items():
        seem = {key: errors[key] for key in errors if count(key) <= budget}
        found[message] = best_of(seem)
    strict = {key: errors[key] for key in errors if bits[key] < budget}
    found["A format that needs exactly the budget is allowed."] = best_of(strict)
    return found


def best_of(errors):
    """The format with the lowest mean error."""
    return min(errors, key=lambda key: sum(errors[key]), default=None)


def no_format(key, right, errors, needs) -> str:
    """What to say of a wrong format that has no name."""
    bits, budget = needs
    if bits[key] > budget:
        return (
            f"{key} needs {bits[key]:g} bits a weight, more than {budget:g}: the code's"
            " bits and each weight's share of its block's scale."
        )
    found, least = (sum(errors[one]) / len(errors[one]) for one in (key, right))
    return (
        f"You choose {key}, with a mean relative error of {found:.4f}; {right} is"
        f" allowed too, and has {least:.4f}."
    )


def a_verdict(verdict, allowed, verdicts) -> None:
    right = best_of(allowed)
    even = {key: each for key, each in allowed.items() if key[0].startswith("int")}
    plain = best_of(even)
    named = best_of({key: each for key, each in allowed.items() if "int" in key[0]})
    like_right = {key: each for key, each in even.items() if key[1] == right[1]}
    own_size = best_of(like_right or even)

    def against(other):
        return told_apart(allowed[right], allowed[other], loss=True).verdict

    wanted = against(plain)
    verdicts.add_verdict(
        verdict,
        wanted,
        "compare(a, b, loss=True) says whether *a* is ahead of b, and smaller errors"
        " are better.",
        f"You say {verdict!r}; the course's rule says {wanted!r} of {right} against"
        f" {plain}, the best allowed format of equal steps by the mean of its errors.",
        {
            "Equal steps are the formats whose names *begin* with int.": against(named),
            "You compare with equal steps in blocks of your own size alone: the best"
            " allowed one may have another.": against(own_size),
        },
    )


# ---- 5. four bits as an adapter ------------------------------------------------------


@checks(
    "Packed bytes and scales, nothing dense, and W's gradient goes through to x. A LoRA"
    " beside it trains for 40 steps with three seeds: that is QLoRA, in two adapters.",
    "delta(base) and base.weight are (d_out, d_in).",
)
def four_bit_adapter(adapter_class) -> None:
    """adapter_class(W, code, block_size), a LinearDelta: delta = W in four bits - W."""
    need(
        isinstance(adapter_class, type) and issubclass(adapter_class, LinearDelta),
        "Give me the class itself, a subclass of LinearDelta.",
    )
    for d_out, d_in, size, code in (
        (6, 16, 8, normal_code()),
        (4, 12, 16, equal_steps(4)),
        (8, 8, 8, normal_code()),
        (6, 5, 10, normal_code(3)),
        (4, 8, 8, torch.linspace(-1, 1, 16, dtype=torch.float64)),  # without a zero
    ):
        W = torch.randn(d_out, d_in, dtype=torch.float64)
        W = W * torch.logspace(-1, 1, d_out, dtype=torch.float64)[:, None]
        if size == d_in:
            W[0], W[1, 2] = 0, 0  # a block of zeros, and one zero in another
        one_layer_in_four_bits(adapter_class, W, code, size)
    result = told_apart(
        [trained_beside(adapter_class, seed) for seed in range(3)],
        reference_losses(),
        loss=True,
    )
    need(
        abs(result.difference) < 1e-3,
        "A LoRA trained beside yours does not end where it ends beside the same weights"
        f" kept dense: {result}.",
    )


def one_layer_in_four_bits(adapter_class, W, code, size):
    layer = nn.Linear(*W.T.shape, dtype=W.dtype)
    layer.weight.data.copy_(W)
    given = W.clone()
    adapter = adapter_class(given, code.clone(), size)
    need(torch.equal(given, W), "You change W itself: leave it as it is.")
    kept_in_four_bits(adapter, W, size)
    model = nn.Sequential(layer)
    config = configured(lambda base: adapter)
    model = get_peft_model(model, config(target_modules=["0"]))
    slot = model.get_base_model()[0]
    base = Base(slot, "default")
    right = in_blocks(W, code, size)
    compare(
        slot.adapters["default"].delta(base).detach(),
        right - W,
        slips_of_rounding(W, code, size, right),
        "delta(base)",
        formula=Formula(rounding, W, code, size),
    )
    x = torch.randn(2, 3, W.shape[1], dtype=W.dtype, requires_grad=True)
    y = x @ right.T + layer.bias
    mistakes = {
        "The base's weight is in it twice: the layer below computes x Wᵀ already, so"
        " delta is Ŵ - W.": (y + x @ W.T).detach()
    }
    compare(slot(x), y, mistakes, "The layer's output", {"x": x})
    copy_stands_alone(slot, lambda slot: slot(x), slot.adapters)
    beside_another(model, slot, x, y)
    need(held_entries(adapter) < W.numel(), DENSE)
    need(
        bool(from_other_bytes(adapter_class, adapter, base, code, size)),
        "Bytes and scales of another weight were loaded, and delta does not follow:"
        " make Ŵ from what is kept, and from nothing else.",
    )
    model.merge_adapter()
    need(held_entries(slot.adapters) < W.numel(), DENSE)
    need(
        same(slot.base_layer.weight.detach(), right),
        "Merged, the layer's weight is not W in four bits.",
    )


@torch.no_grad()
def beside_another(model, slot, x, y) -> None:
    """A LoRA below it or above it is heard, too."""
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["0"]))
    model.double()
    lora = slot.adapters["lora"]
    lora.lora_B.weight.normal_()
    right = y + x @ lora.delta(Base(slot, "lora")).T
    for order in ("lora", "default"), ("default", "lora"):
        model.set_adapter(list(order))
        need(
            same(slot(x), right),
            "With a LoRA beside it one of the two is lost: `base(x)` has what the"
            " adapters before it give, so add to it, and do not compute the layer"
            " anew.",
        )
    model.set_adapter("default")


@torch.no_grad()
def from_other_bytes(adapter_class, adapter, base, code, size) -> bool:
    """Whether delta is that of the bytes and scales which were loaded."""
    other = torch.randn(base.weight.shape, dtype=base.weight.dtype)
    kept = copy.deepcopy(adapter.state_dict())
    adapter.load_state_dict(adapter_class(other.clone(), code, size).state_dict())
    found = adapter.delta(base)
    adapter.load_state_dict(kept)
    return same(found, in_blocks(other, code, size) - base.weight)


DENSE = (
    "You keep the dense weight, W or Ŵ: make it again from bytes and scales, each time"
    " that delta is called."
)


def kept_in_four_bits(adapter, W, size):
    kept = adapter.state_dict()
    loose = [name for name, _ in adapter.named_parameters()]
    need(
        not loose,
        f"{', '.join(loose)} would be trained: an active adapter's Parameters are, and"
        " rounding has no gradient. Use register_buffer.",
    )
    need(
        kept,
        "Your adapter saves nothing: keep bytes and scales by register_buffer, so that"
        " they move and are saved with the model.",
    )
    codes = [t for t in kept.values() if t.dtype == torch.uint8]
    need(
        codes,
        "I find no uint8 among what is kept: the codes are to be packed, two to a"
        " byte.",
    )
    count = sum(t.numel() for t in codes)
    need(
        count != W.numel(),
        f"You keep {count} bytes for {W.numel()} codes: that is eight bits each. Two"
        " go into a byte.",
    )
    need(
        count == W.numel() // 2,
        f"You keep {count} bytes; {W.numel()} codes of four bits are {W.numel() // 2}.",
    )
    rest = sum(t.numel() for t in kept.values() if t.dtype != torch.uint8)
    allowed = W.numel() // size + 16
    need(rest < W.numel() and held_entries(adapter) < W.numel(), DENSE)
    need(
        rest <= allowed,
        f"You keep {rest} numbers beside the bytes; {W.numel() // size} scales, and"
        " perhaps the 16 of the codebook, are all that is needed.",
    )


def rounding(W, code, block_size):
    rows = W.reshape(-1, block_size)
    scale = rows.abs().amax(1, keepdim=True)
    y = rows / torch.where(scale == 0, 1.0, scale)
    index = torch.bucketize(y, (code[1:] + code[:-1]) / 2)
    W_hat = (code[index] * scale).view(W.shape)
    return W_hat - W


def slips_of_rounding(W, code, size, right) -> dict:
    rows = W.reshape(-1, size)
    scale = rows.abs().amax(1, keepdim=True)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    y = rows / scale
    middles = (code[1:] + code[:-1]) / 2
    index = torch.bucketize(y, middles)
    below = (torch.searchsorted(code, y.contiguous(), right=True) - 1).clamp(0)
    swapped = index.flatten().view(-1, 2).flip(1).reshape(index.shape)
    halves = index.flatten().view(-1, 2).T.reshape(index.shape)
    high = torch.where(torch.tensor([True, False]).repeat(size // 2), index, 0)
    across = in_blocks(W.T.contiguous(), code, size).T
    largest = rows.amax(1, keepdim=True)
    signed = torch.where(largest == 0, torch.ones_like(largest), largest)
    one_sided = code[torch.bucketize(rows / signed, middles)] * signed
    filled = code[index] * scale
    wrong = {
        "delta is zero: it is Ŵ - W.": W,
        "Your blocks run down the columns: they are neighbours in a row.": across,
        "A block of zeros does not stay zero: divide it by 1, but keep 0 as its"
        " scale.": filled,
        "A scale is the largest entry without its sign: take abs() first.": one_sided,
        "You always use NF4's code: `code` is given.": in_blocks(
            W, normal_code(), size
        ),
        "You return Ŵ itself. The layer below adds x Wᵀ, so the change is Ŵ - W.": (
            right + W
        ),
        "The sign is turned round: the change is Ŵ - W.": 2 * W - right,
        "One scale for the whole weight: each block has its own.": in_blocks(
            W, code, W.numel()
        ),
        "One scale a row: a block is `block_size` neighbours.": in_blocks(
            W, code, W.shape[1]
        ),
        "The scales are missing: multiply each block by its own.": code[index],
        "You take the code below, not the nearest one: compare with the middles.": (
            code[below] * scale
        ),
        "The two codes of each byte come back in each other's place.": (
            code[swapped] * scale
        ),
        "unpack puts all first codes before all second ones: they have to alternate.": (
            code[halves] * scale
        ),
        "The second code of each byte is lost.": code[high] * scale,
    }
    wrong = {message: w_hat.reshape(W.shape) for message, w_hat in wrong.items()}
    return {
        message: w_hat - W
        for message, w_hat in wrong.items()
        if not same(w_hat - W, right - W)
    }


@functools.cache
def reference_losses() -> list:
    return [trained_beside(None, seed) for seed in range(3)]


def trained_beside(adapter_class, seed: int) -> float:
    """The loss of a LoRA after 40 steps beside two layers in four bits, whose task is
    the dense network with a change of rank one. adapter_class: None for dense weights
    that hold the rounded values."""
    generator = torch.Generator().manual_seed(seed)
    code = normal_code().float()

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    layers = nn.Linear(32, 24, bias=False), nn.Linear(24, 16, bias=False)
    for layer in layers:
        layer.weight.data.copy_(draw(*layer.weight.shape) / layer.in_features**0.5)
    W1, W2 = (layer.weight.detach().clone() for layer in layers)
    task = W1 + 0.5 * draw(24, 1) @ draw(1, 32) / 32**0.5
    if adapter_class is None:
        for layer in layers:
            layer.weight.data.copy_(in_blocks(layer.weight.data, code, 16))
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules=["0", "2"])
    model = get_peft_model(model, lora, adapter_name="lora")
    if adapter_class is not None:

        def make(base):
            weight = getattr(base, "module", base).weight.detach()
            return adapter_class(weight.clone(), code, 16)

        four = configured(make)(target_modules=["0", "2"])
        model.add_adapter("four", four)
        model.set_adapter(["four", "lora"])

    def loss(rows=32):
        x = draw(rows, 32)
        return (model(x) - torch.relu(x @ task.T) @ W2.T).square().mean()

    fit(loss, model.parameters(), steps=40, lr=1e-2)
    with torch.no_grad():
        return loss(256).item()
