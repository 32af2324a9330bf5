"""The activations that models call: one node each, equal to `definitions.py` in value and gradient (law 9,
fused = definition)."""
from __future__ import annotations

import math

from minipeft.engine.tensor import op
from minipeft.backend import xp
from minipeft.engine.ops.erf import erf_of
from minipeft.engine.ops.overflow import quiet

FAR = 64.0  # a bound for |x|, far beyond where the tanh of gelu_tanh is +-1, in float64 too


@op
def gelu(x):
    """x Phi(x), elementwise;   dx = g (Phi(x) + x phi(x)), phi the normal density."""
    cdf = erf_of(x * math.sqrt(0.5))
    cdf += 1
    cdf *= 0.5

    def vjp(g):
        with quiet(over="ignore"):  # e^-inf is 0
            return g * (cdf + x * xp.exp(-0.5 * (x * x)) * (1 / math.sqrt(2 * math.pi)))

    return x * cdf, (vjp,)


@op
def gelu_tanh(x):
    """x (1 + t) / 2, elementwise, with t = tanh(c (x + a x^3)), c = sqrt(2/pi), a = 0.044715.

    dx = g ((1 + t) / 2 + x (1 - t^2) c (1 + 3 a x^2) / 2)."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    with quiet(over="ignore"):  # the tanh of an infinity is 1
        t = xp.asarray(x * x)   # NumPy makes a scalar of a 0-d product
        t *= a
        t += 1
        t *= x
        t *= c
    xp.tanh(t, out=t)
    out = t + 1
    out *= 0.5
    out *= x

    def vjp(g):
        near = xp.asarray(xp.clip(x, -FAR, FAR))  # beyond it 1 - t^2 is 0, and an infinity times 0 is NaN
        d = near * near
        d *= 3 * a * c
        d += c
        d *= near
        d *= xp.subtract(1, xp.multiply(t, t, out=near), out=near)
        d += t
        d += 1
        d *= 0.5
        d *= g
        return d

    return out, (vjp,)


@op
def silu(x):
    """x S(x), elementwise, with S(x) = 1 / (1 + e^-x);   dx = g S(x) (1 + x (1 - S(x)))."""
    s = xp.tanh(x * 0.5)
    s += 1
    s *= 0.5
    return x * s, (lambda g: g * (s * (1 + x * (1 - s))),)
