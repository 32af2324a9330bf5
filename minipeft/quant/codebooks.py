"""The sixteen levels of NF4 and FP4, and the thresholds between them.

    w~ = level[code] * absmax
    t_i = (l_i + l_{i+1}) / 2                  thresholds: midpoints of neighboring levels, in float32
    code = the number of thresholds below y    in the order of the levels; y = w / absmax

NF4 (Dettmers et al., 2023, arXiv:2305.14314, sec. 3): quantiles of a normal distribution. Seven are negative, eight are
positive, and one is 0. `normal_float.py` computes them. FP4: floating-point numbers of one sign bit, two bits of
exponent and one of mantissa. They are divided by 12, so that the largest is 1. This is not the FP4 of the OCP (E2M1),
whose smallest positive number is 0.5/6. Here it is 0.0625/12.

A number that equals a threshold gets the lower level. The comparison must be with thresholds: 9 of the 15 midpoints of
NF4 are rounded, so in float32 the distances to two levels can be equal where the number is not at the threshold. The
`argmin` of distances then gives another code.
"""
from __future__ import annotations

import functools

import numpy

from minipeft.backend import Array, namespace, to_device

Levels = tuple[float, ...]  # float32 numbers, by code

NF4: Levels = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
               -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
               0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
               1.0)
_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)
FP4: Levels = tuple(float(numpy.float32(sign * twelfths) / numpy.float32(12))
                    for sign in (1, -1) for twelfths in _TWELFTHS)
LEVELS = {"nf4": NF4, "fp4": FP4}


@functools.lru_cache
def ascending(levels: Levels) -> numpy.ndarray:
    """The codes from the lowest level to the highest: [levels], uint8. Of equal levels the lower code comes first.

    FP4 has two zeros, the codes 0 and 8, with a threshold at 0 between them. A positive number that is nearest to zero
    gets code 8, and zero itself gets code 0."""
    return numpy.argsort(numpy.array(levels), kind="stable").astype("uint8")


@functools.lru_cache
def thresholds(levels: Levels) -> numpy.ndarray:
    """The float32 midpoints of neighboring levels, from the lowest: [levels - 1]."""
    values = numpy.array(levels, dtype="float32")[ascending(levels)]
    return (values[:-1] + values[1:]) * numpy.float32(0.5)


def widest_half_gap(levels: Levels) -> float:
    """Half the largest distance of two neighboring levels: how far a number in [-1, 1] can be from its level, if -1 and
    1 are levels."""
    return float(numpy.diff(numpy.sort(numpy.array(levels))).max()) / 2


def packed_codes(y: numpy.ndarray, levels: Levels) -> numpy.ndarray:
    """The codes of y [n], float32, n even, two in a byte, the first in the high nibble: [n / 2], uint8.

    Fifteen comparisons of whole arrays take a fraction of the time of `searchsorted`, which searches for one number
    after the other. For the same reason two neighboring codes are taken as one number of 16 bits."""
    bounds = thresholds(levels)
    below, above = (y > bounds[0]).view("uint8"), numpy.empty(y.shape, dtype=bool)
    for bound in bounds[1:]:
        numpy.greater(y, bound, out=above)
        below += above.view("uint8")
    two = below.view("<u2")                                      # first + 256 second
    packed = (two << 4 | two >> 8).astype("uint8")               # 16 first + second, and more that is cut off
    order = ascending(levels)
    if (order[:-1] < order[1:]).all():
        return packed
    byte = numpy.arange(256)
    return (order[byte >> 4] << 4 | order[byte & 15]).take(packed)


@functools.lru_cache
def _pairs(levels: Levels) -> numpy.ndarray:
    """The two levels that a byte stands for: [256, 2], float32."""
    byte, values = numpy.arange(256), numpy.array(levels, dtype="float32")
    return numpy.stack([values[byte >> 4], values[byte & 15]], axis=1)


def level_pairs(packed: Array, levels: Levels, out: Array) -> None:
    """Write the levels of the codes in `packed` [n / 2] to `out` [n], float32 and contiguous.

    One look-up gives both levels of a byte. For NumPy's `take` the pair is one number of eight bytes. A byte is never
    out of range, so mode="clip" changes nothing; but with the default mode `take` would fill a copy of `out` first."""
    if namespace() is numpy:
        numpy.take(_pairs(levels).view("float64")[:, 0], packed, out=out.view("float64"), mode="clip")
    else:
        out.reshape(-1, 2)[...] = to_device(_pairs(levels))[packed]


def levels_at(packed: Array, levels: Levels, at: Array) -> Array:
    """The levels of the numbers at the positions `at`, any shape of integers, in float32. packed: [n / 2] bytes."""
    return to_device(_pairs(levels)).reshape(-1)[packed[at // 2].astype("int64") * 2 + at % 2]
