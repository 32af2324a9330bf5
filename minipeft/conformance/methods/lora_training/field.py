"""Kinds of numbers that the equations are run over: longdoubles, 50 digits, and numbers that carry their bounds.

A block is a polynomial of its operands, evaluated by an implementation in whatever order it likes. Where the operands
carry errors e themselves, and F is the polynomial with every operand replaced by its absolute value,

    error = F(|v| + e) - F(|v|)  +  kappa(k, n) F(|v| + e)  +  n eta

is the first-order rule of `tolerance.py` with what the operands' errors do to it. Hyper-parameters are scalars of the
accumulator, rounded once more where they meet an array.
"""
from __future__ import annotations

import math
from typing import Any, Callable

import numpy

from minipeft.conformance.arithmetic import Arithmetic, arithmetic, on_grid
from minipeft.conformance.numbers import wide
from minipeft.conformance.running import Bounded, sqrt
from minipeft.conformance.tolerance import kappa


class Field:
    """Numbers that an exact result is computed in. array, scalar: from floats."""

    array: Callable = staticmethod(wide)
    scalar: Callable = staticmethod(numpy.longdouble)

    def factor(self, x: Any, t: int) -> Any:
        """What a schedule gives at step t."""
        return x

    def stored(self, x: Any) -> Any:
        """A scalar where it meets arrays."""
        return x

    def block(self, f: Callable, k: int, n: int, *operands: Any) -> Any:
        """The polynomial f(*operands); k and n as in `tolerance.py`."""
        return f(*operands)

    def root(self, x: Any) -> Any:
        return sqrt(x)

    def norm(self, a: Any, b: Any) -> Any:
        """The length of both arrays as one vector."""
        n = math.prod(a.shape) + math.prod(b.shape)
        return self.root(self.block(lambda a, b: (a * a).sum() + (b * b).sum(), 5, n + 2, a, b))

    def within(self, x: Any, most: float, k: int) -> Any:
        """x, of which an implementation never finds more than `most`, but for k roundings."""
        return x

    def clipped(self, clip: float, norm: Any, extra: float) -> Any:
        """min(1, clip / (norm + extra))."""
        clip, norm = self.scalar(clip), norm + self.scalar(extra)
        return clip / norm if norm > clip else self.scalar(1)

    def cos_pi(self, x: Any) -> Any:
        return numpy.cos(4 * numpy.arctan(numpy.longdouble(1)) * x)


class Digits(Field):
    """As many digits as mpmath is set to."""

    def __init__(self) -> None:
        import mpmath
        self.mp = mpmath
        self.scalar = mpmath.mpf

    def array(self, x: Any) -> numpy.ndarray:
        x = numpy.asarray(x)
        out = numpy.empty(x.shape, object)
        out[...] = numpy.vectorize(self.mp.mpf, otypes=[object])(x) if x.size else x
        return out

    def cos_pi(self, x: Any) -> Any:
        return self.mp.cos(self.mp.pi * x)


class Bounds(Field):
    """Numbers that carry their bounds, in an arithmetic."""

    def __init__(self, arith: Arithmetic):
        self.arith, self.sums = arith, arithmetic(arith.accumulate)

    def array(self, x: Any) -> Bounded:
        return Bounded.of(wide(x), self.arith)

    def scalar(self, x: Any) -> Bounded:
        """Off the accumulator's grid, it may have been rounded to it."""
        return Bounded(x, abs(on_grid(x, self.arith.accumulate) - x), self.sums)

    def factor(self, x: Any, t: int) -> Bounded:
        """At most 1, and off by at most (10 + 2 t) u. A formula is by 10 u: cos is steepest where pi x, of three
        roundings, is pi / 2; 4 u of its own count half, as these do; the sum, its product with the warm-up, and that
        one's division round once each. A schedule may also be stepped, f times a ratio: this and the product round once
        each, at t steps. A ratio (1 + cos) / (1 + cos) has the last one's numerator below, to the bit: nothing is left
        of it but the last, as in the formula. Of 1 + a / b, a / b has five roundings, and f a / b is how far f goes at
        that step: up and down by 2 in all, which makes 10 u."""
        return Bounded(x, (10 + 2 * t) * self.sums.u_s, self.sums)

    def stored(self, x: Bounded) -> Bounded:
        once = abs(on_grid(x.value, self.arith.store) - x.value)
        if x.error.any():
            once = self.arith.u_s * (abs(x.value) + x.error) + self.arith.eta
        return Bounded(x.value, x.error + once, self.arith)

    def block(self, f: Callable, k: int, n: int, *operands: Bounded) -> Bounded:
        size = f(*(abs(o.value) for o in operands))
        most = f(*(abs(o.value) + o.error for o in operands))
        error = most - size + kappa(k, n, self.arith) * most + n * self.arith.eta
        return Bounded(f(*(o.value for o in operands)), abs(error), self.arith)

    def root(self, x: Bounded) -> Bounded:
        """Of a number that an implementation never finds negative: the root falls most where x falls most."""
        value = numpy.sqrt(x.value)
        moved = value - numpy.sqrt(numpy.maximum(x.value - x.error, 0))
        return Bounded(value, moved + (self.arith.u_s + self.arith.u_a) * (value + moved) + self.arith.eta, self.arith)

    def within(self, x: Bounded, most: float, k: int) -> Bounded:
        return Bounded(x.value, numpy.minimum(x.error, abs(x.value) + most * (1 + kappa(k, 1, self.arith))), self.arith)

    def clipped(self, clip: float, norm: Bounded, extra: float) -> Bounded:
        """Four roundings: clip, the sum, the quotient, and of the quotient where it meets an array; none where it is
        1 for sure."""
        low, high = (numpy.maximum(norm.value + extra + sign * norm.error, 0) for sign in (-1, 1))
        value, most, least = (min(wide(1), wide(clip) / size) if size > 0 else wide(1)
                              for size in (norm.value + extra, low, high))
        rounding = 4 * self.arith.u_s + self.arith.eta
        sure = clip * (1 - rounding) >= high
        error = 0 if sure else max(most - value, value - least) + rounding * most
        return Bounded(value, error, self.arith)
