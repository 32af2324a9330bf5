"""Shared Hypothesis strategies: an array is drawn as (shape, dtype, layout, seed), and the seed makes the numbers.

What Hypothesis shrinks is then the shape, the layout and the seed, never digits. Sizes are 1 .. 5 and pairwise
distinct, so that no two axes can be swapped unnoticed, and 1 is among them, so that broadcasting is met everywhere.

    @given(shapes(2).flatmap(lambda shape: arrays(shape)))              a float64 array in any layout
    @given(seeds(), layouts()) ... draw_array(seed, (3, 2), "float32", layout)      the same, made in the test
    arrays((2, 3), FRACTION)                                            exact: halves as fractions.Fraction
"""
from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy
from hypothesis import strategies as st

FRACTION = "fraction"
LAYOUTS = ("plain", "transposed", "strided", "reversed")
_SIZES = (2, 3, 1, 4, 5)  # permutations shrink toward this order


def seeds() -> st.SearchStrategy[int]:
    """Seeds of a numpy Generator; they shrink toward 0."""
    return st.integers(0, 2 ** 32 - 1)


def dtypes() -> st.SearchStrategy[str]:
    """float64 (to which it shrinks) and float32."""
    return st.sampled_from(["float64", "float32"])


def layouts() -> st.SearchStrategy[str]:
    """Memory layouts, see `lay_out`; they shrink toward the plain one."""
    return st.sampled_from(LAYOUTS)


def sizes(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """`count` <= 5 pairwise distinct sizes out of 1 .. 5."""
    return st.permutations(_SIZES).map(lambda order: tuple(order[:count]))


def shapes(least: int, most: int | None = None) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of `least` to `most` axes (exactly `least` without `most`), of pairwise distinct sizes."""
    return st.integers(least, least if most is None else most).flatmap(sizes)


def broadcastable(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes that broadcast to `shape`: leading axes left out, others of size 1."""
    def cut(choice: tuple[int, list[bool]]) -> tuple[int, ...]:
        dropped, narrow = choice
        return tuple(1 if one else n for n, one in zip(shape, narrow))[dropped:]
    return st.tuples(st.integers(0, len(shape)), st.lists(st.booleans(), min_size=len(shape),
                                                          max_size=len(shape))).map(cut)


def arrays(shape: tuple[int, ...], dtype: str = "float64",
           layout: st.SearchStrategy[str] | None = None) -> st.SearchStrategy[Any]:
    """Arrays of `shape`, see `draw_array`, in every layout unless `layout` says otherwise."""
    return st.builds(draw_array, seeds(), st.just(shape), st.just(dtype), layouts() if layout is None else layout)


def draw_array(seed: int, shape: tuple[int, ...], dtype: str = "float64", layout: str = "plain") -> Any:
    """Standard normal numbers of `dtype`, or halves -2, -3/2 .. 2 as Fractions for dtype FRACTION, laid out."""
    rng = numpy.random.default_rng(seed)
    if dtype == FRACTION:
        return lay_out(fractions(rng.integers(-4, 5, shape), 2), layout)
    return lay_out(rng.standard_normal(shape).astype(dtype), layout)


def fractions(numerators: Any, denominator: int) -> Any:
    """An object array of Fraction(numerator, denominator)."""
    out = numpy.empty(numpy.shape(numerators), dtype=object)
    for at, n in numpy.ndenumerate(numerators):
        out[at] = Fraction(int(n), denominator)
    return out


def lay_out(array: Any, layout: str) -> Any:
    """The same numbers as a view that is, if it has an axis longer than 1: "transposed" (Fortran order), "strided"
    (every second number of a longer last axis) or "reversed" (a negative step)."""
    if array.ndim == 0 or layout == "plain":
        return array
    if layout == "transposed":
        return array.T.copy().T
    if layout == "reversed":
        return array[..., ::-1].copy()[..., ::-1]
    longer = numpy.zeros((*array.shape[:-1], 2 * array.shape[-1]), dtype=array.dtype)
    longer[..., ::2] = array
    return longer[..., ::2]
