"""Bounds for the difference of two correct computations: derived, never tuned.

    fl(a op b) = (a op b)(1 + d), |d| <= u           gamma_n = n u / (1 - n u)
    |fl(x . y) - x . y| <= gamma_n |x| . |y|         a sum of n products, in any order, with or without FMA

N. Higham, Accuracy and Stability of Numerical Algorithms. After k single roundings and sums of total length n

    |computed - exact| <= ((1 + u)^k (1 + gamma_n) - 1) M        M = the same equation on absolute values

No absolute tolerance is needed, because M also bounds the terms that cancel.
"""
from __future__ import annotations

import math
from typing import Any, Mapping

import numpy

from minipeft.engine.tensor import array_of

# Law 3, merge, allows 1e-12 relative for a whole float64 model. As a multiple of u = 2^-53 that is about 9,000
# roundings in sequence. The longest path through a tiny model has fewer (3 blocks of 3 sublayers, sums of at most 17
# terms), each amplified a little by norms and softmax. In float32 the same multiple of u = 2^-24 is 5.4e-4.
WHOLE_MODEL = 1e-12 * 2 ** 53


def tau(magnitude: numpy.ndarray, n: int, k: int, u: float) -> numpy.ndarray:
    """The bound above, elementwise, for M = magnitude, n, k, u, plus n times the smallest subnormal for underflow."""
    tiny = float(numpy.finfo(numpy.float32 if u > 2 ** -50 else numpy.float64).smallest_subnormal)
    return ((1 + u) ** k * (1 + n * u / (1 - n * u)) - 1) * magnitude + n * tiny


def wide(x: Any) -> numpy.ndarray:
    """An array or Parameter x, of any shape, in the longest floats of this machine, for computing a reference."""
    return numpy.asarray(array_of(x)).astype(numpy.longdouble)


def within(found: numpy.ndarray, wanted: numpy.ndarray, bound: numpy.ndarray) -> bool:
    """Whether found and wanted have one shape and |found - wanted| <= bound, elementwise. NaN is within none."""
    return found.shape == wanted.shape and bool((abs(wide(found) - wide(wanted)) <= bound).all())


def close(found: numpy.ndarray, wanted: numpy.ndarray, u: float) -> bool:
    """Whether `found` [...] and `wanted` [...] have one shape and dtype, and differ by at most WHOLE_MODEL roundings,
    that is WHOLE_MODEL u times the largest number of `wanted`."""
    bound = WHOLE_MODEL * u * float(abs(wanted).max())
    return found.dtype == wanted.dtype and within(found, wanted, numpy.full(wanted.shape, bound))


def close_gradients(found: Mapping[str, numpy.ndarray], wanted: Mapping[str, numpy.ndarray], u: float) -> str | None:
    """The name of the first gradient of `found` that differs from that of `wanted` by more than WHOLE_MODEL u times its
    scale, or None. Both are {name: array}.

    A gradient's scale is its largest number, but at least a thousandth of the largest of all gradients. Otherwise the
    gradient of a key's bias would fail: it is exactly 0 in mathematics (softmax ignores a shift of all scores), but in
    floating point it is a sum of numbers that cancel only up to rounding."""
    assert set(found) == set(wanted)
    largest = max(float(abs(g).max()) for g in wanted.values())
    for name, g in wanted.items():
        scale = max(float(abs(g).max()), largest / 1000)
        if found[name].dtype != g.dtype or not within(found[name], g, numpy.full(g.shape, WHOLE_MODEL * u * scale)):
            return name
    return None


def norm_of(x: numpy.ndarray) -> float:
    """sqrt(sum x^2), of an x of any shape."""
    return math.sqrt(float((wide(x) ** 2).sum()))
