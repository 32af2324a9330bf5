"""Initial values: functions of (shape, dtype, rng) that give an array.

    zeros, ones, xavier                  are such functions
    normal(std), uniform(bound),
    truncated_normal(std)                make one
    kaiming(d_in)                        makes uniform(1 / sqrt(d_in))

Numbers are drawn on the host, so that every backend starts from the same bits. `rng=None` gives zeros where numbers
would be drawn, to be filled from a file: the pages of a zero array cost nothing until they are written.
"""
from __future__ import annotations

import math
from typing import Any, Callable, TypeAlias

import numpy

from minipeft.backend import Array, to_device, xp

Rng: TypeAlias = "numpy.random.Generator | None"  # as a string: importing numpy.random takes its time
Init: TypeAlias = "Callable[[tuple, Any, Rng], Array]"


def compute_dtype(dtype: Any) -> str:
    """The name of `dtype`, "float32" or "float64". Raises ValueError for any other: half precision is for files
    only."""
    if dtype not in ("float32", "float64", numpy.float32, numpy.float64):
        raise ValueError(f"dtype is {dtype!r}; models compute in 'float32' or 'float64'")
    return numpy.dtype(dtype).name


def check_rng(rng: Any) -> None:
    """Raises TypeError unless `rng` is None or a numpy.random.Generator."""
    if rng is not None and not isinstance(rng, numpy.random.Generator):
        raise TypeError(f"rng is {type(rng).__name__}; expected a numpy.random.Generator, as "
                        f"numpy.random.default_rng(seed) gives")


def require_rng(rng: Any) -> None:
    """Raises TypeError unless `rng` is a numpy.random.Generator."""
    check_rng(rng)
    if rng is None:
        raise TypeError("rng is None; expected a numpy.random.Generator, as numpy.random.default_rng(seed) gives")


def zeros(shape: tuple, dtype: Any, rng: Rng = None) -> Array:
    """All 0, [*shape] in `dtype`; rng is not used."""
    return xp.zeros(shape, dtype)


def ones(shape: tuple, dtype: Any, rng: Rng = None) -> Array:
    """All 1, [*shape] in `dtype`; rng is not used."""
    return xp.ones(shape, dtype)


def normal(std: float) -> Init:
    """An init that draws from N(0, std^2)."""
    return lambda shape, dtype, rng: zeros(shape, dtype) if rng is None else \
        to_device((rng.standard_normal(shape) * std).astype(dtype))


def truncated_normal(std: float) -> Init:
    """An init that draws from N(0, std^2), again where it draws a number beyond 2 std."""
    def draw(shape: tuple, dtype: Any, rng: Rng) -> Array:
        if rng is None:
            return zeros(shape, dtype)
        x = rng.standard_normal(shape)
        while (beyond := abs(x) > 2).any():
            x[beyond] = rng.standard_normal(int(beyond.sum()))
        return to_device((x * std).astype(dtype))
    return draw


def uniform(bound: float) -> Init:
    """An init that draws from U(-bound, bound)."""
    return lambda shape, dtype, rng: zeros(shape, dtype) if rng is None else \
        to_device(rng.uniform(-bound, bound, shape).astype(dtype))


def kaiming(d_in: int) -> Init:
    """An init that draws from U(-1/sqrt(d_in), 1/sqrt(d_in)): torch's for linear layers, and that of LoRA's authors.

    He et al., 2015, arXiv:1502.01852, for a leaky ReLU with the slope sqrt 5."""
    return uniform(d_in ** -0.5)


def xavier(shape: tuple, dtype: Any, rng: Rng) -> Array:
    """U(-b, b) with b = sqrt(6 / (d_in + d_out)); shape [d_out, d_in].   Glorot & Bengio, 2010, eq. (16)."""
    return uniform(math.sqrt(6 / (shape[0] + shape[1])))(shape, dtype, rng)
