"""Blocks: every number gets its code by the rule, at the ends of float32 too, and no block hears of another."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minipeft.quant import quantize_4bit
from minipeft.quant.codebooks import LEVELS, ascending, thresholds, widest_half_gap
from tests.methods_under_test import share

KINDS = pytest.mark.parametrize("kind", LEVELS)
BLOCKS = st.sampled_from([1, 2, 3, 7, 8, 32, 64])
TINY = np.float32(1e-38)
MAX = float(np.finfo("float32").max)


def numbers(**limits) -> st.SearchStrategy[np.ndarray]:
    """Up to 150 float32 numbers: any finite ones, with `limits` as for `floats`."""
    return st.integers(1, 150).flatmap(lambda n: arrays("float32", n, elements=st.floats(
        width=32, allow_nan=False, allow_infinity=False, **limits)))


def by_hand(x: np.ndarray, kind: str, size: int) -> tuple[bytes, bytes]:
    """packed and absmax, one block and one number after the other."""
    codes, scales = [], []
    bounds, order = thresholds(LEVELS[kind]), ascending(LEVELS[kind])
    for start in range(0, len(x), size):
        block = x[start:start + size]
        absmax = max(abs(block))
        if len(block) < size:
            absmax = max(absmax, TINY)
        # a full block of zeros has no quotient, and one of numbers below 1e-38 no useful reciprocal
        divide = len(block) < size or 0 < absmax < TINY
        for w in block:
            y = w / absmax if divide else w * (np.float32(1) / absmax) if absmax else np.float32(0)
            codes.append(order[sum(bool(t < y) for t in bounds)])
        scales.append(absmax)
    if len(codes) % 2:
        codes.append(order[sum(bool(t < 0) for t in bounds)])
    return bytes(16 * int(a) + int(b) for a, b in zip(codes[::2], codes[1::2])), np.array(scales, "float32").tobytes()


@KINDS
@share(50)
@given(x=numbers(), size=BLOCKS)
@example(x=np.array([1e-40, -1e-40, 3e-41, 0, 1e-45], "float32"), size=2)
@example(x=np.array([MAX, -MAX, 1e38, 3e38, 1.0], "float32"), size=4)
@example(x=np.zeros(5, "float32"), size=2)
@example(x=np.array([3e-39, 1e-39, 9e-39], "float32"), size=3)
@example(x=np.array([3e-39, 1e-39, 9e-39], "float32"), size=4)
def test_codes_and_scales_are_those_of_the_rule_for_one_number_after_the_other(kind, x, size):
    q = quantize_4bit(x, kind, size)
    assert (q.packed.tobytes(), q.absmax.tobytes()) == by_hand(x, kind, size)


@KINDS
def test_full_blocks_are_multiplied_by_a_reciprocal_and_a_partial_block_is_divided_where_this_changes_codes(kind):
    """Numbers next to a threshold, whose quotient and product lie on different sides of it."""
    rng, bounds = np.random.default_rng(0), thresholds(LEVELS[kind])
    absmax = rng.uniform(0.5, 2, 20_000).astype("float32")
    bound = rng.choice(bounds, len(absmax))
    w = bound * absmax
    matters = np.flatnonzero((w / absmax > bound) != (w * (1 / absmax) > bound))[:40]
    assert len(matters) == 40
    for i in matters:
        pair = np.array([absmax[i], w[i]], "float32")
        full, partial = (quantize_4bit(pair, kind, size).packed.tobytes() for size in (2, 3))
        assert full == by_hand(pair, kind, 2)[0] != by_hand(pair, kind, 3)[0] == partial


@KINDS
@given(x=numbers(), size=BLOCKS)
@example(x=np.array([1e-40, -1e-40, 3e-41, 0, 1e-45], "float32"), size=5)
@example(x=np.array([MAX, -MAX, 1e38, 3e38, 1.0], "float32"), size=5)
def test_the_error_is_at_most_half_the_widest_gap_times_absmax_always(kind, x, size):
    """And the roundings: 2^-22 of 1 / absmax, which is subnormal for the largest absmax; 2^-24 of the product, 2^-25 of
    a threshold, 2^-24 of level * absmax. Together below 2^-21. Subnormal results are rounded to 2^-149."""
    q = quantize_4bit(x, kind, size)
    absmax = np.repeat(q.absmax.astype("float64"), size)[:len(x)]
    error = abs(q.dequantize().astype("float64") - x)
    assert (error <= absmax * (widest_half_gap(LEVELS[kind]) + 2.0 ** -21) + 2.0 ** -150).all()


def test_the_bound_of_the_error_is_reached():
    for kind, levels in LEVELS.items():
        low, high = sorted(levels)[:2] if kind == "nf4" else (2 / 3, 1.0)
        x = np.array([1.0, (low + high) / 2], "float32")
        error = abs(float(quantize_4bit(x, kind, 2).dequantize()[1]) - float(x[1]))
        assert error == pytest.approx(widest_half_gap(levels), rel=1e-6)


NORMAL = {"min_value": -2.0 ** 100, "max_value": 2.0 ** 100, "allow_subnormal": False}


@KINDS
@share(50)
@given(x=numbers(**NORMAL), size=BLOCKS)
def test_quantizing_again_changes_nothing(kind, x, size):
    """Except code 8 of FP4, the zero of small positive numbers, which becomes code 0, the zero of zero."""
    once = quantize_4bit(x, kind, size)
    again = quantize_4bit(once.dequantize(), kind, size)
    codes = once.packed
    if kind == "fp4":
        codes = np.where(codes >> 4 == 8, 0, codes >> 4) << 4 | np.where(codes & 15 == 8, 0, codes & 15)
    assert again.packed.tobytes() == codes.tobytes()
    assert again.absmax.tobytes() == once.absmax.tobytes()
    assert again.dequantize().tobytes() == once.dequantize().tobytes()


@KINDS
@share(50)
@given(seed=st.integers(0, 2 ** 32 - 1), n=st.integers(1, 300), size=BLOCKS, power=st.integers(-90, 90))
def test_a_power_of_two_scales_absmax_and_leaves_the_codes(kind, seed, n, size, power):
    x = np.random.default_rng(seed).standard_normal(n).astype("float32")
    q, scaled = quantize_4bit(x, kind, size), quantize_4bit(np.ldexp(x, power), kind, size)
    assert scaled.packed.tobytes() == q.packed.tobytes()
    assert scaled.absmax.tobytes() == np.ldexp(q.absmax, power).tobytes()
    assert scaled.dequantize().tobytes() == np.ldexp(q.dequantize(), power).tobytes()


@KINDS
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n", [128, 131, 40], ids=["full", "and a partial block", "partial"])
def test_zeros_come_back_as_zeros_beside_others_and_alone(kind, double, n):
    alone = quantize_4bit(np.zeros(n, "float32"), kind, 64, double)
    assert (alone.dequantize() == 0).all() and alone.dequantize().shape == (n,)
    assert set(alone.packed) == {0x77 if kind == "nf4" else 0x00}
    x = np.random.default_rng(0).standard_normal(64 + n).astype("float32")
    x[64:] = 0
    assert not quantize_4bit(x, kind, 64, double).dequantize()[64:].any()


def test_a_full_block_of_zeros_has_absmax_0_and_a_partial_one_1e_38():
    assert quantize_4bit(np.zeros(100, "float32")).absmax.tolist() == [0, float(TINY)]
    assert quantize_4bit(np.full(3, 1e-40, "float32")).absmax.tolist() == [float(TINY)]


def test_a_full_block_of_subnormal_numbers_comes_back_as_well_as_any_other():
    x = np.array([1e-40, -6e-41, 0, 8e-41], "float32")
    found = quantize_4bit(x, blocksize=4).dequantize()
    assert (abs(found - x) <= 0.16 * x.max()).all() and found[0] == x[0]


@KINDS
@share(50)
@given(seed=st.integers(0, 2 ** 32 - 1), whole=st.integers(1, 6), rest=st.integers(0, 7), half=st.integers(1, 8))
def test_blocks_do_not_hear_of_each_other(kind, seed, whole, rest, half):
    """Quantized together or each alone: the same codes, scales and numbers."""
    size = 2 * half
    x = np.random.default_rng(seed).standard_normal(whole * size + min(rest, size - 1)).astype("float32")
    alone = [quantize_4bit(x[start:start + size], kind, size) for start in range(0, len(x), size)]
    q = quantize_4bit(x, kind, size)
    assert q.packed.tobytes() == b"".join(part.packed.tobytes() for part in alone)
    assert q.absmax.tobytes() == b"".join(part.absmax.tobytes() for part in alone)
    assert q.dequantize().tobytes() == b"".join(part.dequantize().tobytes() for part in alone)


@pytest.mark.parametrize("size", [100, 64, 4097, 40_000, 2 ** 31 - 1])
def test_long_arrays_are_cut_where_no_block_and_no_byte_is_cut(size):
    """Longer than the pieces in which they are worked on."""
    x = np.random.default_rng(4).standard_normal(100_001).astype("float32")
    q = quantize_4bit(x, "nf4", size)
    at = np.array([0, size // 2, min(32_768, len(x) - 1), 65_537, len(x) - 1])
    block = at[at < len(x)] // size
    wanted = [abs(x[b * size:(b + 1) * size]).max() for b in block]
    assert q.absmax[block].tolist() == wanted and len(q.absmax) == -(-len(x) // size)
    assert (abs(q.dequantize() - x) <= 0.1520 * np.repeat(q.absmax, min(size, len(x)))[:len(x)]).all()
    half = quantize_4bit(x[:2 * size], "nf4", size)
    assert q.packed[:len(half.packed) - 1].tobytes() == half.packed[:-1].tobytes()


@KINDS
@share(50)
@given(seed=st.integers(0, 2 ** 32 - 1), n=st.integers(1, 2000), size=BLOCKS)
def test_double_quantization_leaves_the_codes_and_moves_numbers_with_their_scales(kind, seed, n, size):
    x = np.random.default_rng(seed).standard_normal(n).astype("float32")
    plain, double = quantize_4bit(x, kind, size), quantize_4bit(x, kind, size, double=True)
    assert double.packed.tobytes() == plain.packed.tobytes()
    apart = 0.0071 * float(double.nested_absmax.max()) + 2.0 ** -20 * float(plain.absmax.max())
    assert (abs(double.dequantize().astype("float64") - plain.dequantize()) <= apart).all()
