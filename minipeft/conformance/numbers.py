"""Numbers for cases: numbers of a dtype, or numbers so small and dyadic that no operation rounds them."""
from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy

from minipeft.conformance.arithmetic import on_grid


def integers(rng: numpy.random.Generator, shape: tuple, dtype: str = "float64") -> numpy.ndarray:
    """An array of integers in -2 .. 2, in half precision -1 .. 1, as float64. Sums of a few products then stay below
    2^8, where bfloat16 holds every integer."""
    most = 1 if dtype in ("bfloat16", "float16") else 2
    return rng.integers(-most, most + 1, shape).astype(numpy.float64)


def floats(rng: numpy.random.Generator, shape: tuple, dtype: str = "float64", scale: float = 1.0) -> numpy.ndarray:
    """An array of Gaussian numbers times `scale`, rounded to numbers of the dtype, as float64."""
    return on_grid(scale * rng.standard_normal(shape), dtype)


def drawn(rng: numpy.random.Generator, shape: tuple, dtype: str, exact: bool) -> numpy.ndarray:
    """`integers` for an exact case, `floats` for a bounded one."""
    return integers(rng, shape, dtype) if exact else floats(rng, shape, dtype)


def nonzero(rng: numpy.random.Generator, shape: tuple, dtype: str, exact: bool) -> numpy.ndarray:
    """Like `drawn`, but an exact array has no entry 0: all are -1 or 1."""
    if not exact:
        return drawn(rng, shape, dtype, exact)
    return rng.choice([-1.0, 1.0], shape)


def wide(x: Any) -> numpy.ndarray:
    """x as longdouble, for the reference of a live case."""
    return numpy.asarray(x, numpy.longdouble)


def fractions(x: Any) -> numpy.ndarray:
    """x as an array of `Fraction`, for an exact reference."""
    x = numpy.asarray(x)
    out = numpy.empty(x.shape, object)
    out[...] = numpy.vectorize(Fraction, otypes=[object])(x) if x.size else x
    return out


def rounded(x: Any) -> numpy.ndarray:
    """An array of exact numbers rounded once, correctly, to float64."""
    return numpy.vectorize(float, otypes=[numpy.float64])(x) if numpy.size(x) else numpy.zeros(numpy.shape(x))


def derangement(rng: numpy.random.Generator, n: int) -> numpy.ndarray:
    """A random permutation [n] that leaves no element in its place; for n = 1, the identity."""
    order = rng.permutation(n)
    shifted = numpy.empty(n, numpy.int64)
    shifted[order] = numpy.roll(order, 1)
    return shifted


def float_of(value: Any) -> Any:
    """A parameter of a case as it is passed to an implementation. Infinity and NaN, which JSON lacks, are stored as
    strings."""
    return float(value) if isinstance(value, str) else value
