"""Kinds of numbers in which the equations are computed: longdoubles, 50 digits, and numbers that carry their bounds.

A block is a polynomial of its operands, which an implementation may evaluate in any order. Let the operands v have
errors e, and let F be the polynomial with every operand replaced by its absolute value. Then

    error = F(|v| + e) - F(|v|)  +  kappa(k, n) F(|v| + e)  +  n eta

is the first-order rule of `tolerance.py`, extended by the effect of the operands' errors. Hyper-parameters are scalars
in the accumulator's precision, and are rounded once more where they meet an array.
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
    """A kind of number for exact results: longdouble. array, scalar: convert floats to it."""

    array: Callable = staticmethod(wide)
    scalar: Callable = staticmethod(numpy.longdouble)

    def factor(self, x: Any, t: int) -> Any:
        """A schedule's factor x at step t, in this kind of number."""
        return x

    def stored(self, x: Any) -> Any:
        """A scalar, as it is where it meets arrays."""
        return x

    def block(self, f: Callable, k: int, n: int, *operands: Any) -> Any:
        """The polynomial f(*operands); k and n as in `tolerance.py`."""
        return f(*operands)

    def root(self, x: Any) -> Any:
        """The square root, elementwise."""
        return sqrt(x)

    def norm(self, a: Any, b: Any) -> Any:
        """The norm of the arrays a and b as one vector."""
        n = math.prod(a.shape) + math.prod(b.shape)
        return self.root(self.block(lambda a, b: (a * a).sum() + (b * b).sum(), 5, n + 2, a, b))

    def within(self, x: Any, most: float, k: int) -> Any:
        """x, whose absolute value exceeds `most` in no implementation, except by k roundings."""
        return x

    def clipped(self, clip: float, norm: Any, extra: float) -> Any:
        """min(1, clip / (norm + extra))."""
        clip, norm = self.scalar(clip), norm + self.scalar(extra)
        return clip / norm if norm > clip else self.scalar(1)

    def cos_pi(self, x: Any) -> Any:
        """cos(pi x)."""
        return numpy.cos(4 * numpy.arctan(numpy.longdouble(1)) * x)


class Digits(Field):
    """Numbers of as many digits as mpmath is set to."""

    def __init__(self) -> None:
        import mpmath
        self.mp = mpmath
        self.scalar = mpmath.mpf

    def array(self, x: Any) -> numpy.ndarray:
        """x in this kind of number."""
        x = numpy.asarray(x)
        out = numpy.empty(x.shape, object)
        out[...] = numpy.vectorize(self.mp.mpf, otypes=[object])(x) if x.size else x
        return out

    def cos_pi(self, x: Any) -> Any:
        """cos(pi x)."""
        return self.mp.cos(self.mp.pi * x)


class Bounds(Field):
    """Numbers that carry their bounds, in the arithmetic `arith`."""

    def __init__(self, arith: Arithmetic):
        self.arith, self.sums = arith, arithmetic(arith.accumulate)

    def array(self, x: Any) -> Bounded:
        """x in this kind of number."""
        return Bounded.of(wide(x), self.arith)

    def scalar(self, x: Any) -> Bounded:
        """A hyper-parameter. If the accumulator's dtype does not hold x, the error is that of rounding x to it."""
        return Bounded(x, abs(on_grid(x, self.arith.accumulate) - x), self.sums)

    def factor(self, x: Any, t: int) -> Bounded:
        """A schedule's factor x: at most 1, with an error of at most (10 + 2 t) u.

        By a formula the error is at most 10 u. cos is steepest at pi / 2, where pi x has three roundings; half of them,
        and half of the 4 u of cos itself, count. The sum, its product with the warm-up, and the warm-up's division
        round once each. A schedule may also be stepped: f is multiplied by a ratio, and ratio and product round once
        each at every step, 2 t u. The denominator of a ratio (1 + cos) / (1 + cos) is bit for bit the numerator of the
        step before, so only the last numerator's error is left, as in the formula. In a ratio 1 + a / b, a / b has five
        roundings, and f a / b is the change of f at that step; f changes by at most 2 in all, up and down: 10 u."""
        return Bounded(x, (10 + 2 * t) * self.sums.u_s, self.sums)

    def stored(self, x: Bounded) -> Bounded:
        """x with the error of one rounding to storage."""
        once = abs(on_grid(x.value, self.arith.store) - x.value)
        if x.error.any():
            once = self.arith.u_s * (abs(x.value) + x.error) + self.arith.eta
        return Bounded(x.value, x.error + once, self.arith)

    def block(self, f: Callable, k: int, n: int, *operands: Bounded) -> Bounded:
        """As in Field; its error is the formula at the top."""
        size = f(*(abs(o.value) for o in operands))
        most = f(*(abs(o.value) + o.error for o in operands))
        error = most - size + kappa(k, n, self.arith) * most + n * self.arith.eta
        return Bounded(f(*(o.value for o in operands)), abs(error), self.arith)

    def root(self, x: Bounded) -> Bounded:
        """The root of a number that is negative in no implementation. Its error is largest where x is too small."""
        value = numpy.sqrt(x.value)
        moved = value - numpy.sqrt(numpy.maximum(x.value - x.error, 0))
        return Bounded(value, moved + (self.arith.u_s + self.arith.u_a) * (value + moved) + self.arith.eta, self.arith)

    def within(self, x: Bounded, most: float, k: int) -> Bounded:
        """As in Field: the error is cut to what this leaves possible."""
        return Bounded(x.value, numpy.minimum(x.error, abs(x.value) + most * (1 + kappa(k, 1, self.arith))), self.arith)

    def clipped(self, clip: float, norm: Bounded, extra: float) -> Bounded:
        """As in Field, with four roundings: of clip, of the sum, of the quotient, and of the quotient where it meets an
        array. There is none where the result is 1 for certain."""
        low, high = (numpy.maximum(norm.value + extra + sign * norm.error, 0) for sign in (-1, 1))
        value, most, least = (min(wide(1), wide(clip) / size) if size > 0 else wide(1)
                              for size in (norm.value + extra, low, high))
        rounding = 4 * self.arith.u_s + self.arith.eta
        sure = clip * (1 - rounding) >= high
        error = 0 if sure else max(most - value, value - least) + rounding * most
        return Bounded(value, error, self.arith)
