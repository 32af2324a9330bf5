"""Where the sixteen levels of NF4 come from: quantiles of the normal distribution.

    p* = 0.9677083
    positive levels   Phi^-1(p),  p = the first 8 of 9 equally spaced probabilities from p* down to 1/2
    negative levels  -Phi^-1(p),  p = the first 7 of 8
    NF4 = these fifteen and 0, divided by the largest

The paper gives q_i = (Q(i / 17) + Q((i + 1) / 17)) / 2 (Dettmers et al., 2023, arXiv:2305.14314, eq. (4)). As printed
this does not give the levels: the quantiles at both ends are infinite, and a symmetric set of sixteen has no zero. The
equation above is that of the authors' code. p* is 1 - (1/32 + 1/30) / 2 = 0.96770833..., cut after seven digits.

With probabilities, quantiles and the division in float32, all sixteen numbers equal those that are in use, in every
bit. In float64 they differ by up to 1.1e-7, since the numbers in use are those of the float32 computation. This file
explains `codebooks.NF4`; the library never runs it.
"""
from __future__ import annotations

import statistics
from typing import Any

import numpy

OUTERMOST = 0.9677083


def normal_float(dtype: Any = "float32") -> numpy.ndarray:
    """The levels of NF4, ascending: [16]. dtype: the one of the probabilities, the quantiles and the division."""
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in evenly(OUTERMOST, 0.5, 9, dtype)[:-1].tolist()]
    negative = [-quantile(p) for p in evenly(OUTERMOST, 0.5, 8, dtype)[:-1].tolist()]
    levels = numpy.sort(numpy.array([*negative, 0.0, *positive], dtype=dtype))
    return levels / levels.max()


def evenly(start: float, end: float, n: int, dtype: Any) -> numpy.ndarray:
    """n equally spaced numbers from `start` to `end`: [n]. The first half counts from the start, the second from the
    end, as PyTorch's linspace does."""
    first, last = numpy.array(start, dtype), numpy.array(end, dtype)
    steps = numpy.arange(n, dtype=dtype)
    step = (last - first) / numpy.array(n - 1, dtype)
    return numpy.where(numpy.arange(n) < n // 2, first + steps * step, last - steps[::-1] * step)
