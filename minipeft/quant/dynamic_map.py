"""The dynamic map: 256 numbers in [-1, 1] that are dense near zero, for 8-bit codes.

    for i = 0 .. 6:   +-10^(i - 6) m,   m = the 2^i midpoints of 2^i + 1 equally spaced numbers from 0.1 to 1
    and 0 and 1                         2 (1 + 2 + ... + 64) + 2 = 256 numbers, ascending

Dettmers, 2015, arXiv:1511.04561 ("dynamic tree"); Dettmers et al., 2021, arXiv:2110.02861, sec. 1.3. The largest number
is 1, and the smallest is -0.99296874, since -1 is left out.

Equal bit for bit to the map that bitsandbytes makes with PyTorch. For that, two details of PyTorch's linspace matter:
the first half counts from the start and the second from the end, and start + i * step is one fused operation with one
rounding. With a rounding of the product, 42 of the 256 numbers differ by up to 6e-8.
"""
from __future__ import annotations

import functools

import numpy

from minipeft.quant.codebooks import Levels

_F32 = numpy.float32


@functools.lru_cache
def dynamic_map() -> Levels:
    """The 256 numbers, ascending, as float32."""
    found = [0.0, 1.0]
    for i in range(7):
        ends = _evenly(0.1, 1.0, 2 ** i + 1)
        middles = (ends[:-1] + ends[1:]) / _F32(2) * _F32(10.0 ** (i - 6))
        found += [*middles.tolist(), *(-middles).tolist()]
    return tuple(sorted(found))


def _evenly(start: float, end: float, n: int) -> numpy.ndarray:
    """n equally spaced float32 numbers. The fused operation is done in float64, where the product is exact."""
    step = numpy.float64((_F32(end) - _F32(start)) / _F32(n - 1))
    i = numpy.arange(n)
    up, down = numpy.float64(_F32(start)) + step * i, numpy.float64(_F32(end)) - step * (n - 1 - i)
    return numpy.where(i < n // 2, up, down).astype("float32")
