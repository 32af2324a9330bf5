"""The levels and thresholds of NF4 and FP4, and where they come from."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.backend import use
from minipeft.quant.codebooks import (FP4, LEVELS, NF4, ascending, level_pairs, levels_at, packed_codes, thresholds,
                                      widest_half_gap)
from minipeft.quant.dynamic_map import dynamic_map
from minipeft.quant.normal_float import normal_float
from tests.strict_namespace import strict

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nf4"
KINDS = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "cases.npz") as arrays:
        return {name: arrays[name] for name in ("nf4/code", "fp4/code", "dq_code", "thresholds/x")}


@pytest.mark.parametrize("kind", LEVELS)
def test_the_levels_are_those_of_bitsandbytes_bit_for_bit(kind, golden):
    assert np.array(LEVELS[kind], "float32").tobytes() == golden[f"{kind}/code"].tobytes()
    assert all(np.float32(level) == level for level in LEVELS[kind])


def test_nf4_is_the_quantiles_of_the_normal_distribution_computed_in_float32_bit_for_bit():
    assert normal_float("float32").tobytes() == np.array(NF4, "float32").tobytes()


def test_nf4_computed_in_float64_differs_by_less_than_2e_7_and_is_not_equal():
    found = normal_float("float64")
    assert found.dtype == "float64" and 1e-8 < abs(found - NF4).max() < 2e-7
    assert (found.astype("float32") == np.array(NF4, "float32")).sum() == 6


def test_the_thresholds_of_nf4_are_those_of_the_golden_data_and_of_the_cuda_kernel(golden):
    """The literals are the kernel's. The second is a tie between two float32 numbers but for its last digit."""
    wanted = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
              -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
              0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011]
    found = thresholds(NF4)
    assert found.tobytes() == golden["thresholds/x"][0, 1:16].tobytes()
    assert found.tolist() == np.array(wanted, "float32").tolist()


def test_fp4_is_twelfths_with_a_sign_two_bits_of_exponent_and_one_of_mantissa():
    for code, level in enumerate(FP4):
        sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
        # the exponents 0, 1, 2, 3 are those of 2^-4 m, 2^3, 2^2 and 2^1
        twelfths = 0.0625 * mantissa if exponent == 0 else 2 ** (4 - exponent) * (1 + 0.5 * mantissa)
        assert abs(level - sign * twelfths / 12) <= 2 ** -24 * abs(level), code
    assert ascending(FP4).tolist() == [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]


def test_the_widest_gaps_are_known():
    assert widest_half_gap(NF4) == pytest.approx((1 - 0.6961928) / 2, rel=1e-7)
    assert widest_half_gap(FP4) == pytest.approx(1 / 6, rel=1e-7)


def test_the_dynamic_map_is_that_of_bitsandbytes_bit_for_bit(golden):
    assert np.array(dynamic_map(), "float32").tobytes() == golden["dq_code"].tobytes()
    assert (dynamic_map()[0], dynamic_map()[127], dynamic_map()[255]) == (np.float32(-0.99296874), 0, 1)


@KINDS
def test_a_number_gets_the_code_of_the_nearest_level_and_at_a_threshold_the_lower_one(levels):
    """By hand: count the thresholds below, one number after the other, in the neighborhood of each threshold."""
    bounds, order = thresholds(levels), ascending(levels)
    y = np.concatenate([[np.nextafter(t, np.float32(-2)), t, np.nextafter(t, np.float32(2))] for t in bounds]
                       + [np.array([-1, 0, 1], "float32")])
    wanted = [order[sum(bool(t < number) for t in bounds)] for number in y]
    assert unpacked(packed_codes(y, levels)) == wanted
    assert len(set(wanted)) == 16


@KINDS
@given(seed=st.integers(0, 2 ** 32 - 1), half=st.integers(1, 40))
def test_levels_come_back_from_packed_codes_in_order(levels, seed, half):
    packed = np.random.default_rng(seed).integers(0, 256, half, dtype="uint8")
    wanted = np.array(levels, "float32")[unpacked(packed)]
    out = np.empty(2 * half, "float32")
    level_pairs(packed, levels, out=out)
    assert out.tobytes() == wanted.tobytes() == levels_at(packed, levels, np.arange(2 * half)).tobytes()
    with use(strict):
        device, out = strict.asarray(packed), strict.empty(2 * half, "float32")
        level_pairs(device, levels, out=out)
        at = strict.asarray(np.arange(2 * half))
        assert out.get().tobytes() == wanted.tobytes() == levels_at(device, levels, at).get().tobytes()


def unpacked(packed: np.ndarray) -> list[int]:
    return [code for byte in packed.tolist() for code in divmod(byte, 16)]
