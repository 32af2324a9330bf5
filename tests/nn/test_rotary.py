"""Rotary positions: frequencies, rotations, and keys in front of a text."""
from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minipeft.engine.ops import rotate
from minipeft.nn.rotary import Frequencies, Rotary
from tests.strategies import draw_array, seeds


def rotary(d: int = 6, **fields) -> Rotary:
    return Rotary(d, Frequencies(**fields), "float64")


def test_a_frequency_is_a_power_of_theta_and_every_pair_i_and_i_plus_half_turns_by_its_own():
    f = Frequencies(100.0).of(6)
    assert np.allclose(f, [1, 100 ** (-1 / 3), 100 ** (-2 / 3)], rtol=1e-15, atol=0)
    cos, sin = rotary(theta=100.0).rotation(np.array([0, 5]))
    x = np.zeros((1, 2, 6))
    x[..., 1] = 1
    found = rotate(x, cos, sin).data
    assert found[0, 0].tolist() == [0, 1, 0, 0, 0, 0]
    assert found[0, 1].tolist() == [0, math.cos(5 * f[1]), 0, 0, math.sin(5 * f[1]), 0]


@given(seeds(), st.integers(-50, 50), st.integers(0, 50), st.integers(0, 1000))
def test_a_score_depends_on_the_distance_alone(seed, distance, position, shift):
    """The angle of a position up to 1100 is rounded by at most 1100 u, and a rotation keeps lengths."""
    q, k = draw_array(seed, (1, 1, 6)), draw_array(seed + 1, (1, 1, 6))
    table = rotary()

    def score(at_q: int, at_k: int) -> float:
        return float((rotate(q, *table.rotation(np.array([at_q]))).data
                      * rotate(k, *table.rotation(np.array([at_k]))).data).sum())

    size = float(np.linalg.norm(q) * np.linalg.norm(k))
    assert abs(score(position, position + distance)
               - score(position + shift, position + shift + distance)) <= 8 * 1150 * 2.0 ** -53 * size


def test_positions_by_row_and_positions_of_all_rows():
    table, positions = rotary(), np.array([[0, 1, 2], [0, 0, 1]])
    cos, sin = table.rotation(positions)
    assert cos.shape == sin.shape == (2, 3, 3)
    for row in range(2):
        one, other = table.rotation(positions[row])
        assert np.array_equal(one[0], cos[row]) and np.array_equal(other[0], sin[row])


def test_linear_divides_every_frequency_and_tables_have_the_dtype_of_the_model():
    assert np.array_equal(Frequencies(50.0, "linear", 4.0).of(8), Frequencies(50.0).of(8) / 4)
    cos, _ = Rotary(4, Frequencies(), "float32").rotation(np.array([123457]))
    assert cos.dtype == np.float32
    assert cos[0, 0, 1] == np.float32(math.cos(123457 * 0.01)), "computed in float64, rounded once"


def test_keys_in_front_are_turned_as_if_the_text_began_behind_them():
    table, keys, q = rotary(), draw_array(0, (1, 3, 6)), draw_array(1, (1, 1, 6))
    here = rotate(q, *table.rotation(np.array([4]))).data @ table.as_at_zero(keys).data.swapaxes(1, 2)
    there = rotate(q, *table.rotation(np.array([4 + 3]))).data @ keys.swapaxes(1, 2)
    assert np.allclose(here, there, rtol=0, atol=1e-14)
