"""Double quantization by itself: offsets, bytes and what they stand for."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.backend import use
from minipeft.quant import double
from minipeft.quant.dynamic_map import dynamic_map
from tests.strict_namespace import strict

MAP = np.array(dynamic_map(), "float32")


def back(stored: dict[str, np.ndarray], n: int) -> np.ndarray:
    return double.decoded(**stored, levels=dynamic_map(), at=np.arange(n))


def random(seed: int, n: int, exponent: int = 0) -> np.ndarray:
    return abs(np.random.default_rng(seed).standard_normal(n).astype("float32")) * np.float32(10.0 ** exponent)


@given(seed=st.integers(0, 2 ** 32 - 1), n=st.integers(1, 600), exponent=st.integers(-30, 30))
def test_absmax_comes_back_within_half_a_gap_of_the_map_a_bin_and_the_roundings(seed, n, exponent):
    absmax = random(seed, n, exponent)
    stored = double.encoded(absmax, dynamic_map())
    nested = np.repeat(stored["nested_absmax"], 256)[:n].astype("float64")
    # Half of the widest gap, half a bin of 2/65535, and at most eight roundings of numbers up to nested or the offset.
    half = float(np.diff(MAP).max()) / 2 + 1 / 65535
    bound = nested * (half + 6 * 2.0 ** -24) + (absmax.max() + float(stored["offset"])) * 2 * 2.0 ** -24
    assert (abs(back(stored, n).astype("float64") - absmax) <= bound).all()
    assert {name: (a.shape, a.dtype.name) for name, a in stored.items()} == {
        "qabsmax": ((n,), "uint8"), "nested_absmax": ((-(-n // 256),), "float32"), "offset": ((), "float32")}


@given(seed=st.integers(0, 2 ** 32 - 1), n=st.integers(1, 5000))
def test_the_offset_is_the_mean_within_the_error_of_a_float32_sum(seed, n):
    x = random(seed, n)
    # the longest chain of additions: runs of 16 at four levels, the rest, 3 sums, 7 lanes and 7 numbers
    longest = 16 * 4 + 4 * 4 + 3 + 16
    assert abs(float(double.mean(x)) - x.mean(dtype="float64")) <= (longest + 1) * 2.0 ** -24 * x.mean(dtype="float64")


def test_a_long_mean_adds_in_cascades_and_a_running_sum_would_be_far_off():
    x = np.full(2 ** 20, 0.1, "float32")
    assert abs(double.mean(x) - np.float32(0.1)) <= 2 ** -24 and abs(x.cumsum()[-1] / 2 ** 20 - 0.1) > 1e-4


def test_codes_are_those_of_the_nearest_of_65536_bins_and_not_of_the_nearest_level():
    """Counted by hand: the bin's number is compared with the midpoints, one after the other."""
    absmax = random(3, 4000)
    stored = double.encoded(absmax, dynamic_map())
    f = np.float32
    middles = [f(0.5) * (a + b) for a, b in zip(MAP, MAP[1:])]
    exact = []
    for i, z in enumerate(absmax - stored["offset"]):
        y = z * (f(1) / stored["nested_absmax"][i // 256])
        k = int((min(max(y, f(-1)), f(1)) + f(1)) * f(0.5) * f(65535) + f(0.5))
        grid = f(-1) + f(2) * f(k) / f(65535)
        assert stored["qabsmax"][i] == sum(bool(m < grid) for m in middles), i
        exact.append(sum(bool(m < y) for m in middles))
    apart = stored["qabsmax"].astype(int) - exact
    assert 0 < (apart != 0).mean() < 0.006 and abs(apart).max() == 1


def test_equal_scales_have_an_offset_alone_and_come_back_equal():
    stored = double.encoded(np.full(300, 0.75, "float32"), dynamic_map())
    assert stored["qabsmax"].max() == 0 and (stored["nested_absmax"] == 0).all()
    assert (back(stored, 300) == 0.75).all()


@pytest.mark.parametrize("absmax", [np.array([3.4e38] * 9 + [1e38], "float32"), np.array([1e-45, 0, 3e-45], "float32"),
                                    np.array([1e-39, 2e-39, 4e-39], "float32"), np.array([0.0], "float32")],
                         ids=["the sum overflows", "smallest", "the reciprocal overflows", "zero"])
def test_scales_at_the_ends_of_float32_come_back_finite_and_close(absmax):
    stored = double.encoded(absmax, dynamic_map())
    assert all(np.isfinite(a).all() for a in stored.values())
    width = float(stored["nested_absmax"].max())
    assert (abs(back(stored, len(absmax)).astype("float64") - absmax) <= 0.0071 * width + 2.0 ** -149
            + 2.0 ** -22 * float(absmax.max())).all()


def test_scales_decode_on_a_device_to_the_same_bits():
    absmax = random(5, 700)
    stored = double.encoded(absmax, dynamic_map())
    with use(strict):
        device = {name: strict.asarray(a) for name, a in stored.items()}
        found = double.decoded(**device, levels=dynamic_map(), at=strict.asarray(np.arange(700))).get()
    assert found.tobytes() == back(stored, 700).tobytes()
