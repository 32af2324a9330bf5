"""Arithmetic of a dtype in plain NumPy: float64 and float32 as they are, half precision by rounding what is stored.

Products are summed in float32 where the dtype is narrower, as kernels do, and rounded once when they are stored.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.conformance.arithmetic import arithmetic, on_grid


class Emulated:
    """r(x) rounds to storage; mm(a, b) is a matrix product, rounded. Arrays are float64 holding values of the grid."""

    def __init__(self, dtype: str):
        self.dtype = dtype
        self.wide = arithmetic(dtype).accumulate

    def r(self, x: Any) -> numpy.ndarray:
        return on_grid(x, self.dtype)

    def mm(self, a: Any, b: Any) -> numpy.ndarray:
        return self.r(numpy.matmul(numpy.asarray(a, self.wide), numpy.asarray(b, self.wide)))

    def sum(self, x: Any, axis: Any = None, keepdims: bool = False) -> numpy.ndarray:
        """Summed in the accumulator, rounded once."""
        return self.r(numpy.asarray(x, self.wide).sum(axis=axis, keepdims=keepdims))
