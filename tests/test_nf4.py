"""Four bits: codes, bytes and values against bitsandbytes to the bit, and against the
definition."""

import math
import time
from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as in_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import tolerance

from minipeft.quant import (
    FP4_CODE,
    INT4_CODE,
    NF4_CODE,
    AdamW8bit,
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_nf4,
    dynamic_map,
    linear_map,
    normal_float,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)
from minipeft.quant.blockwise import GRID


def same(w, block_size=64, double_quant=True, quant_type="nf4"):
    """Quantise here and there: every byte, scale and dequantised value must be equal.
    Returns ours."""
    ours = quantize_4bit(w, block_size, double_quant, quant_type)
    packed, state = bnb.quantize_4bit(
        w, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
    )
    assert torch.equal(ours.packed, packed.view(-1, 1))
    assert torch.equal(ours.absmax, state.absmax)
    if double_quant:
        assert torch.equal(ours.absmax2, state.state2.absmax) and torch.equal(
            ours.offset, state.offset
        )
    scales = (
        bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        if double_quant
        else state.absmax
    )
    with torch.compiler.set_stance("force_eager"):  # it would be compiled, for seconds
        theirs = in_torch(
            packed.view(-1), scales, state.code, block_size, w.shape, w.dtype
        )
    got = dequantize_4bit(ours)
    assert torch.equal(got, theirs.view(w.shape)) and got.dtype == w.dtype
    # the one written in C++ is wrong for some other widths
    if w.shape[-1] % 64 == 0 and block_size == 64:
        assert torch.equal(got, bnb.dequantize_4bit(packed, state).view(w.shape))
    return ours


class TestAgainstBitsandbytes:
    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.integers(1, 40), min_size=1, max_size=3),
        st.sampled_from([32, 64, 128, 256, 1024, 4096]),
        st.booleans(),
        st.sampled_from(["nf4", "fp4"]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.sampled_from([1e-3, 0.02, 1.0, 300.0]),
        st.integers(0, 3),
        st.integers(0, 2**31),
    )
    def test_bitsandbytes_to_the_bit(
        self, shape, block_size, double_quant, quant_type, dtype, scale, outliers, seed
    ):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(shape, generator=generator) * scale
        for _ in range(outliers):
            w.view(-1)[torch.randint(w.numel(), (1,), generator=generator)] *= 50
        # what 16 bits can hold
        same(w.clamp(-60000, 60000).to(dtype), block_size, double_quant, quant_type)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_large_matrix(self, dtype):
        w = (
            torch.randn(1024, 1536, generator=torch.Generator().manual_seed(1)) * 0.02
        ).to(dtype)
        for quant_type in ("nf4", "fp4"):
            same(w, quant_type=quant_type)

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_corner_cases(self, double_quant):
        for w in (
            torch.zeros(200),
            torch.full((3, 64), -0.7),
            torch.tensor([1e-30, -2e-30, 5e-31]),
            torch.ones(1),
            torch.tensor([1e-41, 0.0]),
            torch.cat([torch.zeros(64), torch.randn(64)]),
        ):
            same(w, double_quant=double_quant)
        empty = quantize_nf4(torch.empty(0, 7), double_quant=double_quant)
        assert dequantize_nf4(empty).shape == (0, 7) and empty.packed.numel() == 0
        not_contiguous = torch.randn(48, 64).T
        assert torch.equal(
            quantize_nf4(not_contiguous).packed,
            quantize_nf4(not_contiguous.contiguous()).packed,
        )

    def test_ties_go_to_the_lower_code(self):
        bounds = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
        same(
            torch.cat(
                [
                    bounds,
                    torch.nextafter(bounds, torch.tensor(2.0)),
                    torch.nextafter(bounds, torch.tensor(-2.0)),
                    torch.ones(19),
                ]
            ),
            double_quant=False,
        )

    def test_nan_and_infinity_are_refused(self):
        for bad in (math.nan, math.inf, -math.inf):
            w = torch.randn(70)
            w[-1] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                quantize_nf4(w)

    def test_wrong_arguments(self):
        for block_size in (16, 8192, 64.0):
            with pytest.raises(ValueError, match="32 to 4096"):
                quantize_nf4(torch.ones(4), block_size)
        with pytest.raises(ValueError, match="nf4, fp4, int4"):
            quantize_4bit(torch.ones(4), quant_type="nf5")
        with pytest.raises(ValueError, match="uint8"):
            quantize_nf4(quantize_nf4(torch.ones(4)).packed)


class TestCodes:
    def test_first_number_in_the_high_half(self):
        q = quantize_nf4(torch.tensor([1.0, -1.0, 0.0, 1.0]))
        assert q.packed.view(-1).tolist() == [0xF0, 0x7F]

    def test_the_sixteen_numbers_are_quantiles(self):
        # mean quantile, its division by the largest, both rounded here and there
        rounded = tolerance(torch.float32, steps=4)
        assert (normal_float(4) - NF4_CODE).abs().max() < rounded
        assert torch.equal(NF4_CODE, bnb.get_4bit_type("nf4", device="cpu"))
        assert torch.equal(FP4_CODE, bnb.get_4bit_type("fp4", device="cpu"))
        for bits in (2, 3, 4, 8):
            code = normal_float(bits)
            assert (
                len(code) == 2**bits
                and code[0] == -1
                and code[-1] == 1
                and (code == 0).sum() == 1
            )
            assert (code > 0).sum() == 2 ** (bits - 1) and torch.equal(
                code, code.sort().values
            )
        cdf = NormalDist().cdf
        largest = NormalDist().inv_cdf(1 - (1 / 32 + 1 / 30) / 2)
        steps = torch.tensor([cdf(x * largest) for x in NF4_CODE[8:].tolist()]).diff()
        # equally spaced in probability
        assert (steps - steps.mean()).abs().max() < largest * rounded

    @settings(max_examples=50, deadline=None)
    @given(
        st.integers(1, 500),
        st.sampled_from([33, 64, 100]),
        st.sampled_from(["nf4", "fp4", "int4"]),
        st.integers(0, 2**31),
    )
    def test_the_nearest_code_of_the_block(self, n, size, quant_type, seed):
        """Against the definition: no other code would have been closer."""
        w = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        got = dequantize_4bit(quantize_4bit(w, size, False, quant_type))
        code = {"nf4": NF4_CODE, "fp4": FP4_CODE, "int4": INT4_CODE}[quant_type]
        for block, values in zip(w.split(size), got.split(size)):
            best = (block[:, None] - block.abs().max() * code).abs().amin(1)
            # divided by the largest, multiplied again, and subtracted, twice
            off = tolerance(torch.float32, block.abs().max(), steps=4)
            assert ((block - values).abs() - best).abs().max() <= off
            assert values.abs().max() <= block.abs().max()

    def test_bits_a_weight(self):
        w = torch.randn(512, 512)
        assert quantize_nf4(w, double_quant=False).bits == 4 + 32 / 64
        # and one mean for the whole tensor
        exactly = 4 + 8 / 64 + 32 / (64 * 256) + 32 / 512**2
        assert quantize_nf4(w).bits == exactly

    def test_quantising_what_is_quantised_changes_nothing(self):
        once = dequantize_nf4(quantize_nf4(torch.randn(64, 70), double_quant=False))
        assert torch.equal(dequantize_nf4(quantize_nf4(once, double_quant=False)), once)

    def test_meta_tensors_have_the_right_sizes(self):
        w = torch.randn(100, 130)
        real, meta = quantize_nf4(w), quantize_nf4(w.to("meta"))
        assert [t.shape for t in meta.tensors()] == [
            t.shape for t in real.tensors()
        ] and meta.bits == real.bits
        assert dequantize_nf4(meta).shape == w.shape


class TestBlockwise:
    @pytest.mark.parametrize("signed", [True, False])
    def test_the_dynamic_map_is_that_of_bitsandbytes(self, signed):
        assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed))

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 3000),
        st.sampled_from([64, 256, 2048]),
        st.booleans(),
        st.integers(0, 2**31),
    )
    def test_blockwise_codes_on_the_grid_are_those_of_bitsandbytes(
        self, n, block_size, signed, seed
    ):
        x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        x[: n // 3] = 0
        x, code = (x if signed else x.abs()), dynamic_map(signed)
        q, absmax = quantize_blockwise(x, code, block_size, grid=GRID)
        theirs, state = bnb.quantize_blockwise(
            x, code=code.clone(), blocksize=block_size
        )
        assert torch.equal(q, theirs) and torch.equal(absmax, state.absmax)
        assert torch.equal(
            dequantize_blockwise(q, absmax, code, block_size),
            bnb.dequantize_blockwise(theirs, state),
        )

    @pytest.mark.parametrize(
        "code",
        [
            dynamic_map(),
            linear_map(8),
            linear_map(3),
            normal_float(2),
            linear_map(8, False),
        ],
    )
    def test_blockwise_finds_the_nearest(self, code):
        x = torch.randn(7, 300).abs() if code[0] >= 0 else torch.randn(7, 300)
        q, absmax = quantize_blockwise(x, code, 256)
        got = dequantize_blockwise(q, absmax, code, 256)
        for block, values in zip(x.view(-1).split(256), got.view(-1).split(256)):
            best = (block[:, None] - block.abs().max() * code).abs().amin(1)
            # divided by the largest, multiplied again, and subtracted, twice
            off = tolerance(torch.float32, block.abs().max(), steps=4)
            assert ((block - values).abs() - best).abs().max() <= off

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("place", [0, 300, 599])
    def test_blockwise_takes_finite_numbers(self, wrong, place):
        x = torch.randn(600)
        x[place] = wrong
        with pytest.raises(ValueError, match="NaN or infinity among the numbers"):
            quantize_blockwise(x, dynamic_map())

    @pytest.mark.parametrize(
        "code, found",
        [
            (torch.linspace(-1, 1, 300), "300 numbers"),
            (torch.linspace(-1, 1, 257), "257 numbers"),
            (torch.linspace(1, -1, 16), "16 numbers that are not sorted"),
            (torch.tensor([-1.0, 1.0, 0.0]), "3 numbers that are not sorted"),
            (torch.tensor([-1.0, float("nan"), 1.0]), "3 numbers that are not sorted"),
            (torch.zeros(0), "0 numbers"),
        ],
    )
    def test_what_is_no_codebook(self, code, found):
        x = torch.randn(64)
        make = (
            lambda: quantize_blockwise(x, code),
            lambda: AdamW8bit([x], signed=code),
            lambda: AdamW8bit([x], unsigned=code),
        )
        for wrong in make:
            with pytest.raises(ValueError, match=f"code: found {found}; expected 1 to"):
                wrong()

    @pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
    def test_blockwise_sizes(self, size):
        x, code = torch.randn(64), dynamic_map()
        q, absmax = quantize_blockwise(x, code)
        for wrong in (
            lambda: quantize_blockwise(x, code, size),
            lambda: quantize_blockwise(x.to("meta"), code, size),
            lambda: dequantize_blockwise(q, absmax, code, size),
        ):
            with pytest.raises(ValueError, match=f"block_size = {size}: expected a wh"):
                wrong()

    @pytest.mark.parametrize("size", [1, 7, 10**6])
    def test_blockwise_of_nothing_and_of_odd_sizes(self, size):
        for x in (torch.zeros(0), torch.randn(3, 5)):
            q, absmax = quantize_blockwise(x, dynamic_map(), size)
            again = dequantize_blockwise(q, absmax, dynamic_map(), size)
            assert again.shape == x.shape and absmax.isfinite().all()


class TestSpeedAndNames:
    def test_not_slower_than_agreed(self):
        """Against bitsandbytes, in turns, by processor time, the best of three: at most
        1.0 and 3 times as long."""
        w = torch.randn(4096, 4096) * 0.02
        ours, (packed, state) = (
            quantize_nf4(w, double_quant=False),
            bnb.quantize_4bit(w, quant_type="nf4"),
        )
        calls = {
            "quantize": (
                lambda: quantize_nf4(w),
                lambda: bnb.quantize_4bit(
                    w, quant_type="nf4", compress_statistics=True
                ),
            ),
            "dequantize": (
                lambda: dequantize_nf4(ours),
                lambda: bnb.dequantize_4bit(packed, state),
            ),
        }
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for name, most in (("quantize", 1.0), ("dequantize", 3.0)):
                times = [[], []]
                for _ in range(3):
                    for call, kept in zip(calls[name], times):
                        start = time.process_time()
                        call()
                        kept.append(time.process_time() - start)
                assert min(times[0]) <= most * min(times[1]), (
                    f"{name}: {min(times[0]):.4f} s against {min(times[1]):.4f} s"
                )
        finally:
            torch.set_num_threads(threads)

    def test_fp4_has_its_own_name(self):
        w = torch.randn(64)
        assert (
            quantize_fp4(w).quant_type == "fp4" and quantize_nf4(w).quant_type == "nf4"
        )
