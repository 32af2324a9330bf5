"""Norms and scores whose squares or products leave the range of their dtype: the same equations, on scaled numbers.

    x / sqrt(mean(x^2) + eps)  =  y / sqrt(mean(y^2) + 4^-n eps)               y = 2^-n x,   |y| <= 1
    softmax(q K^T + bias)  =  softmax(2^n (y Z^T + 2^-n bias))                 y = 2^-i q,   Z = 2^-j K,   n = i + j

A power of two rounds nothing. The ops of `fused.py` compute as always, and come here only where their result is not
finite: a row that did not overflow keeps its bits. Inputs that are NaN or infinite are not repaired.
"""
from __future__ import annotations

import math
from typing import Any, Callable, Sequence

import numpy

from minipeft.backend import Array, xp

# Silences the warnings of an overflow that is expected. CuPy has no such warnings, and no errstate.
quiet = numpy.errstate


def exponent(x: Array, axis: Any) -> Array:
    """n with |x| <= 2^n along `axis`, which is kept as 1: [.., d] -> [.., 1]. Meaningless where x is not finite."""
    return xp.frexp(abs(x).max(axis=axis, keepdims=True))[1]


def mean_product(a: Array, b: Array) -> Array:
    """mean(a b) over the last axis: a, b [..., d] -> [..., 1]. It takes one pass and makes no array of products. The
    terms are not added pairwise, as `mean` adds them."""
    return xp.einsum("...i,...i->...", a, b)[..., None] / a.shape[-1]


def normalize_again(x: Array, z: Array, r: Array, lost: Array, eps: float, centered: bool) -> None:
    """Writes the rows `lost` [...] of z = (x - mean) r [..., d] and of r = 1 / sqrt(variance + eps) [..., 1]. Without
    `centered`, mean is 0 (RMSNorm)."""
    with quiet(all="ignore"):
        y = x[lost]
        n = exponent(y, -1)
        y = xp.ldexp(y, -n)
        if centered:
            y = y - y.mean(axis=-1, keepdims=True)
        deviation = xp.sqrt(mean_product(y, y))
        deviation = xp.where(xp.isfinite(deviation), deviation, math.nan)  # an infinity is not normalized
        least = xp.ldexp(xp.full_like(deviation, math.sqrt(eps)), -n)      # 0 where it is too small to count
        z[lost] = xp.where(deviation == 0, y, y / xp.hypot(deviation, least))
        r[lost] = 1 / xp.hypot(xp.ldexp(deviation, n), math.sqrt(eps))


def score_again(p: Array, top: Array, q: Array, k: Array, biases: Sequence[Array],
                product: Callable[[Array, Array], Array]) -> Array:
    """Writes the scores p [batch, key, heads, query] of queries whose largest score `top` is not finite; top becomes 0.

    q and k [batch, heads, time, d]; biases laid out as p; product(a, b) gives a b for each head, laid out as p. Returns
    the queries that may look nowhere, booleans [batch, 1, heads, query]: such a query averages all values, and no
    gradient goes through its scores."""
    with quiet(all="ignore"):
        blind = xp.zeros(top.shape, dtype=bool)
        for bias in biases:
            blind = blind | (bias.max(axis=1, keepdims=True) == -math.inf)
        lost = ~xp.isfinite(top) & ~blind
        if lost.any():
            i, j = exponent(q, -1), exponent(k, (-2, -1))                  # [batch, heads, query, 1], [.., 1, 1]
            n = (i + j).transpose(0, 3, 1, 2)
            s = product(xp.ldexp(k, -j), xp.ldexp(q, -i).swapaxes(-1, -2))
            for bias in biases:
                s += xp.ldexp(bias, -n)
            largest = s.max(axis=1, keepdims=True)
            if len(biases) > 1:  # each hides some keys, and together they hide all
                blind = blind | lost & ((biases[0] + biases[1]).max(axis=1, keepdims=True) == -math.inf)
            xp.copyto(p, xp.ldexp(s - largest, n), where=lost)
            xp.copyto(top, xp.zeros((), top.dtype), where=lost)
        xp.copyto(p, xp.zeros((), p.dtype), where=blind)
        xp.copyto(top, xp.zeros((), top.dtype), where=blind)
    return blind
