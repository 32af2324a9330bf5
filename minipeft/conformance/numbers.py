"""Numbers for cases: on the grid of a dtype, or so small and dyadic that nothing is ever rounded."""
from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy

from minipeft.conformance.arithmetic import on_grid


def integers(rng: numpy.random.Generator, shape: tuple, dtype: str = "float64") -> numpy.ndarray:
    """Entries of -2 .. 2, in half precision -1 .. 1: sums of a few products stay below 2^8, where bfloat16 holds every
    integer."""
    most = 1 if dtype in ("bfloat16", "float16") else 2
    return rng.integers(-most, most + 1, shape).astype(numpy.float64)


def floats(rng: numpy.random.Generator, shape: tuple, dtype: str = "float64", scale: float = 1.0) -> numpy.ndarray:
    """Gaussian, rounded to the grid."""
    return on_grid(scale * rng.standard_normal(shape), dtype)


def drawn(rng: numpy.random.Generator, shape: tuple, dtype: str, exact: bool) -> numpy.ndarray:
    return integers(rng, shape, dtype) if exact else floats(rng, shape, dtype)


def nonzero(rng: numpy.random.Generator, shape: tuple, dtype: str, exact: bool) -> numpy.ndarray:
    """As `drawn`, no entry 0."""
    if not exact:
        return drawn(rng, shape, dtype, exact)
    return rng.choice([-1.0, 1.0], shape)


def wide(x: Any) -> numpy.ndarray:
    """In the longest floats there are, for a live reference."""
    return numpy.asarray(x, numpy.longdouble)


def fractions(x: Any) -> numpy.ndarray:
    """Every number as the fraction that it is, for an exact reference."""
    x = numpy.asarray(x)
    out = numpy.empty(x.shape, object)
    out[...] = numpy.vectorize(Fraction, otypes=[object])(x) if x.size else x
    return out


def rounded(x: Any) -> numpy.ndarray:
    """Exact numbers rounded once, correctly, to float64."""
    return numpy.vectorize(float, otypes=[numpy.float64])(x) if numpy.size(x) else numpy.zeros(numpy.shape(x))


def derangement(rng: numpy.random.Generator, n: int) -> numpy.ndarray:
    """A permutation of n >= 2 that leaves nothing in its place; of 1, the identity."""
    order = rng.permutation(n)
    shifted = numpy.empty(n, numpy.int64)
    shifted[order] = numpy.roll(order, 1)
    return shifted


def float_of(value: Any) -> Any:
    """A parameter as an implementation gets it: JSON has no infinity and no NaN, so these stand as strings."""
    return float(value) if isinstance(value, str) else value
