"""Arithmetic of a dtype in plain NumPy: float64 and float32 natively, half precision by rounding every stored result.

For half precision, products are summed in float32, as kernels do, and the sum is rounded once when it is stored.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.conformance.arithmetic import arithmetic, on_grid


class Emulated:
    """Operations in `dtype` on float64 arrays that hold only numbers of that dtype."""

    def __init__(self, dtype: str):
        self.dtype = dtype
        self.wide = arithmetic(dtype).accumulate

    def r(self, x: Any) -> numpy.ndarray:
        """x, of any shape, rounded to numbers of the dtype."""
        return on_grid(x, self.dtype)

    def mm(self, a: Any, b: Any) -> numpy.ndarray:
        """The product [..., n, m] of a [..., n, k] and b [..., k, m], summed in the accumulator's dtype, rounded once.
        """
        return self.r(numpy.matmul(numpy.asarray(a, self.wide), numpy.asarray(b, self.wide)))

    def sum(self, x: Any, axis: Any = None, keepdims: bool = False) -> numpy.ndarray:
        """The sum of x over `axis`, computed in the accumulator's dtype and rounded once. keepdims: as in NumPy."""
        return self.r(numpy.asarray(x, self.wide).sum(axis=axis, keepdims=keepdims))
