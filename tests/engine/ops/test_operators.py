"""A number beside a Tensor takes the Tensor's kind, from either side, and no operator makes an object array."""
from fractions import Fraction

import numpy
import pytest

from minipeft.engine.ops.operators import alike
from minipeft.engine.tensor import Tensor

NUMBERS = [2, 0.5, Fraction(1, 3), numpy.float64(0.1), numpy.float32(0.1), numpy.int64(3), True]
OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}


@pytest.mark.parametrize("symbol", OPERATORS)
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__}({n})")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_number_on_either_side_keeps_the_dtype_and_means_its_value(number, dtype, symbol):
    x = numpy.array([[1.5, -2.0], [0.25, 4.0]], dtype)
    run, n = OPERATORS[symbol], x.dtype.type(float(number))
    for found, wanted in ((run(Tensor(x), number), run(x, n)), (run(number, Tensor(x)), run(n, x))):
        assert isinstance(found, Tensor) and found.dtype == dtype
        assert numpy.array_equal(found.data, wanted)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__}({n})")
def test_beside_fractions_a_number_is_an_exact_fraction(number):
    x = numpy.array([Fraction(1, 7), Fraction(-2)], dtype=object)
    exact = Fraction(float(number)) if isinstance(number, (float, numpy.floating)) else Fraction(int(number)) \
        if not isinstance(number, Fraction) else number
    for found in (number * Tensor(x), Tensor(x) * number):
        assert found.data.tolist() == [exact * v for v in x] and all(type(v) is Fraction for v in found.data)


@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_beside_integers_and_booleans_a_number_stays_what_it_is(dtype):
    x = Tensor(numpy.ones(3, dtype))
    assert alike(0.5, x) == 0.5 and type(alike(Fraction(1, 2), x)) is Fraction
    assert (0.5 * x).data.tolist() == [0.5] * 3


@pytest.mark.parametrize("thing", [None, "a", numpy.ones(2), 1j])
def test_what_is_no_real_number_is_left_alone(thing):
    assert alike(thing, Tensor(numpy.ones(2))) is thing


def test_an_array_on_the_left_gives_a_tensor_and_not_an_object_array():
    x, w = numpy.ones((2, 3)), Tensor(numpy.ones((3, 2)))
    assert isinstance(x @ w, Tensor) and isinstance(x + w.mT, Tensor) and isinstance(x / w.mT, Tensor)


def test_the_transpose_of_a_matrix_is_an_attribute():
    x = numpy.arange(12.0).reshape(2, 3, 2)
    assert numpy.array_equal(Tensor(x).mT.data, x.swapaxes(-1, -2))
