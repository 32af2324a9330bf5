"""Strides and copies of changed shapes are NumPy's, for any layout."""
import numpy
from hypothesis import given
from hypothesis import strategies as st

from minipeft.tools.hollow.layout import contiguous, in_order, like, reshaped, resolved


@st.composite
def arrays(draw):
    """A float32 array of up to 5 axes: permuted, with some axes sliced or broadcast."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    x = numpy.zeros(shape, "float32").transpose(draw(st.permutations(range(len(shape)))))
    axis = draw(st.integers(0, x.ndim - 1))
    x = x[(slice(None),) * axis + (slice(None, None, draw(st.sampled_from([1, 2]))),)]
    return numpy.broadcast_to(x, (2, *x.shape)) if draw(st.booleans()) else x


@st.composite
def reshapes(draw):
    """(an array, a shape of as many numbers)."""
    x = draw(arrays())
    factors = [f for n in x.shape for f in ([2, 3] if n == 6 else [2, 2] if n == 4 else [n])]
    order = draw(st.permutations(factors)) if draw(st.booleans()) else factors
    new = []
    for factor in order:
        if new and draw(st.booleans()):
            new[-1] *= factor
        else:
            new.append(factor)
    return x, tuple(new)


@given(reshapes())
def test_a_reshape_is_a_view_exactly_where_numpys_is_and_has_its_strides(case):
    x, new = case
    theirs = x.reshape(new)
    found = reshaped(x.shape, x.strides, new)
    assert (found is not None) == numpy.shares_memory(x, theirs)
    if found is not None:  # the stride of an axis of one is never used
        assert [s for n, s in zip(new, found) if n > 1] == [s for n, s in zip(new, theirs.strides) if n > 1]


@given(arrays())
def test_an_array_is_contiguous_where_numpy_says_so(x):
    assert contiguous(x.shape, x.strides, x.itemsize) == x.flags.c_contiguous


@given(arrays())
def test_a_result_lies_in_the_order_of_its_operand(x):
    if 0 not in x.strides and 1 not in x.shape:
        assert like(x.shape, x.strides, 4) == (x + x).strides


def test_a_new_array_has_its_last_axis_innermost():
    assert in_order((2, 3, 5), 4) == numpy.zeros((2, 3, 5), "float32").strides == (60, 20, 4)


def test_minus_one_stands_for_what_is_left():
    assert resolved((2, -1), 12) == (2, 6) and resolved(-1, 12) == (12,) and resolved([3, 4], 12) == (3, 4)
