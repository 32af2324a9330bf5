"""erf by Cody's approximation against the C library's."""
from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.engine import ops
from minipeft.engine.ops.erf import erf_of
from tests.strategies import draw_array, layouts, seeds, shapes

CUTS = (0.46875, 4.0, 30.0)  # where the formula changes
GRID = numpy.concatenate([numpy.linspace(-7, 7, 20_001), numpy.geomspace(1e-310, 1e3, 2_001),
                          *[c + numpy.arange(-3, 4) * math.ulp(c) for c in CUTS]])


def test_erf_is_within_1e_15_on_a_grid_across_all_its_pieces():
    error = abs(erf_of(GRID) - numpy.array([math.erf(x) for x in GRID.tolist()]))
    assert error.max() < 1e-15


@given(st.floats(-1e4, 1e4))
def test_erf_is_within_1e_15_anywhere(x):
    assert abs(float(erf_of(numpy.array([x]))[0]) - math.erf(x)) < 1e-15


@given(st.floats(0, 1e-3))
def test_erf_keeps_its_relative_accuracy_near_zero(x):
    """x P(x^2) / Q(x^2): a product of few roundings, no cancellation. Subnormal results have no relative accuracy."""
    assert abs(float(erf_of(numpy.array([x]))[0]) - math.erf(x)) <= 1e-15 * math.erf(x) + 5e-324


def test_erf_is_odd_bounded_and_never_decreases_by_more_than_its_error():
    x = numpy.sort(abs(GRID))
    y = erf_of(x)
    assert (erf_of(-x) == -y).all() and (y <= 1).all() and (y >= 0).all()
    assert (numpy.diff(y) >= -1e-15).all()


def test_special_values():
    found = erf_of(numpy.array([0.0, -0.0, numpy.inf, -numpy.inf, numpy.nan, 6.0, -6.0]))
    assert found[:4].tolist() == [0, 0, 1, -1] and numpy.isnan(found[4])
    assert numpy.signbit(found[1]) and found[5:].tolist() == [1, -1]


def test_the_far_piece_overflows_nowhere():
    with numpy.errstate(over="raise", invalid="raise", divide="raise"):
        assert erf_of(numpy.array([1e300, -1e300, 0.0, 1e-300])).tolist()[:2] == [1, -1]


def test_in_float32_it_is_float32_and_right_to_the_roundings_of_its_formula():
    """Degree 8 by Horner's rule with positive coefficients: 2 roundings of relative size u a step for each of P and
    Q, and at most 8 more; exp(-y^2) adds y^2 exp(-y^2) <= 1/e of one. So 40 u in all."""
    x = GRID[abs(GRID) > 1e-30].astype(numpy.float32)
    found = erf_of(x)
    assert found.dtype == numpy.float32
    assert abs(found - numpy.array([math.erf(v) for v in x.tolist()])).max() <= 40 * 2.0 ** -24


@given(seeds(), shapes(0, 3), layouts())
def test_it_works_elementwise_on_any_shape_and_layout(seed, shape, layout):
    x = draw_array(seed, shape, "float64", layout)
    assert ops.erf(x).shape == shape
    flat = erf_of(numpy.ascontiguousarray(x).reshape(-1))
    # exp is vectorized on contiguous arrays only; its implementations differ in the last place
    assert abs(ops.erf(x).data.reshape(-1) - flat).max() < 1e-15


@pytest.mark.parametrize("x", [-3.0, -0.3, 0.0, 0.46875, 2.0])
def test_its_gradient_is_the_gaussian(x):
    forward, (vjp,) = ops.erf.__wrapped__(numpy.array([x]))  # type: ignore[attr-defined]
    wanted = 2 / math.sqrt(math.pi) * math.exp(-x * x)
    assert abs(float(vjp(numpy.ones(1))[0]) - wanted) <= 8 * 2.0 ** -53 * wanted * (1 + x * x)
