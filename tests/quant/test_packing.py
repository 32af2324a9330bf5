"""Codes of a few bits in bytes: packing is undone by unpacking, and the bits are where the page says."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minipeft.backend import to_host, use
from minipeft.quant.packing import packed, row_bytes, unpacked
from tests.strategies import seeds
from tests.strict_namespace import strict

BITS = (2, 3, 4, 5, 8)


def codes_of(seed: int, n: int, d: int, bits: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2 ** bits, (n, d), dtype="uint8")


@pytest.mark.parametrize("bits", BITS)
@given(seed=seeds(), n=st.integers(0, 3), d=st.integers(1, 70))
def test_unpacking_undoes_packing_for_every_width_and_length(bits, seed, n, d):
    codes = codes_of(seed, n, d, bits)
    found = unpacked(packed(codes, bits), bits, d)
    assert found.dtype == "uint8" and found.shape == (n, d) and (found == codes).all()


@pytest.mark.parametrize("bits", BITS)
@given(seed=seeds(), d=st.integers(1, 70))
def test_the_bits_of_a_row_follow_each_other_from_the_lowest_on_and_the_rest_of_its_last_byte_is_0(bits, seed, d):
    codes = codes_of(seed, 2, d, bits)
    data = packed(codes, bits)
    assert data.dtype == "uint8" and data.shape == (2, row_bytes(d, bits))
    for row, found in zip(codes, data):
        assert sum(int(q) << (i * bits) for i, q in enumerate(row)) == int.from_bytes(found.tobytes(), "little")


@pytest.mark.parametrize("bits", BITS)
@given(dtype=st.sampled_from(["float32", "float64", "int8"]), seed=seeds(), minus=st.integers(0, 8))
def test_unpacked_codes_are_in_the_dtype_that_is_asked_for_less_the_number_that_is_taken_off(bits, dtype, seed, minus):
    codes = codes_of(seed, 2, 24, bits) % 128
    found = unpacked(packed(codes, bits), bits, 24, dtype, minus)
    assert found.dtype == dtype and (found == codes.astype("int64") - minus).all()


def test_unpacked_codes_are_a_new_array_which_may_be_written_to_without_harm():
    for bits in BITS:
        data = packed(codes_of(0, 2, 24, bits), bits)
        first = unpacked(data, bits, 24, "float32")
        wanted = first.copy()
        first += 1
        assert (unpacked(data, bits, 24, "float32") == wanted).all()
        unpacked(data, bits, 24)[...] = 0
        assert (unpacked(data, bits, 24) == wanted).all()


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_is_the_same_in_the_strict_namespace(bits):
    data = packed(codes_of(1, 3, 41, bits), bits)
    wanted = unpacked(data, bits, 41, "float32", minus=3)
    with use(strict):
        found = to_host(unpacked(strict.asarray(data), bits, 41, "float32", minus=3))
    assert found.tobytes() == wanted.tobytes()
