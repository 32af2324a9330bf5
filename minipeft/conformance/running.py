"""Bounds for equations that are not polynomials: every number carries a bound on the error of a correct implementation.

    c = a op b        error(c) = the errors of a and b, propagated  +  one rounding of the computed value
    c = f(a)          error(c) = max |f'| over [a - e, a + e] times e  +  the roundings of f itself  +  one rounding
    c = a @ b         error(c) = |a| eb + ea |b| + ea eb  +  gamma_n ((|a| + ea)(|b| + eb) + n eta) + n eta
                                 +  one rounding

One rounding of x costs at most u |x| + eta. A sum of n products underflows at most n times. With gradual underflow each
product loses at most eta / 2 and a sum nothing, since a subnormal sum is exact (with FMAs, each loses at most eta / 2).
With flushing to zero, a product or a sum loses at most eta. But a flushed sum turns two nonzero terms into one zero, so
products and sums together are flushed at most n times.

This is a running error analysis (N. Higham, Accuracy and Stability of Numerical Algorithms, sec. 3.3). The equations of
a method are written once, for any kind of number; run on `Bounded` arrays they yield their own bound. It is pessimistic
where errors are correlated, since it ignores that, and it never needs a constant typed by hand.
"""
from __future__ import annotations

import math
from typing import Any, Callable

import numpy

from minipeft.conformance.arithmetic import Arithmetic
from minipeft.conformance.numbers import wide
from minipeft.conformance.tolerance import Value, kappa

# The error of exp, erf and tanh themselves, in roundings. IEEE 754 demands correct rounding of + - * / and sqrt (one
# rounding), but not of these functions, so a number must be chosen. An ulp of f is at most 2 u |f|: 8 u allows a
# library four ulps. 4 u would be too little: NumPy's float32 exp was measured at 3.4 u and its tanh at 1.9 u (a test
# checks both), but torch's erf at 6 u, so that a correct GELU failed.
FUNCTION_ROUNDINGS = 8
_ERF = numpy.vectorize(math.erf, otypes=[numpy.longdouble])


class Bounded:
    """An array with error bounds: value (longdouble) and error >= |computed - value|, of any one shape. arith: the
    arithmetic of the implementation. It has the operators of NumPy arrays."""

    __array_ufunc__ = None  # makes NumPy leave `array @ bounded` to __rmatmul__

    def __init__(self, value: Any, error: Any, arith: Arithmetic):
        self.value, self.arith = wide(value), arith
        self.error = numpy.broadcast_to(wide(error), self.value.shape)

    @classmethod
    def of(cls, x: Any, arith: Arithmetic) -> "Bounded":
        """`x` as Bounded. An array is an input of the implementation and has no error."""
        return x if isinstance(x, Bounded) else cls(x, 0.0, arith)

    def _stored(self, value: Any, error: Any, roundings: float = 1.0) -> "Bounded":
        """A result with this error, after `roundings` roundings to storage."""
        arith = self.arith
        return Bounded(value, error + roundings * arith.u_s * (abs(value) + error) + arith.eta, arith)

    @property
    def shape(self) -> tuple:
        """As in NumPy."""
        return self.value.shape

    @property
    def T(self) -> "Bounded":
        """The transpose."""
        return self._moved(lambda x: x.T)

    def _moved(self, move: Callable) -> "Bounded":
        return Bounded(move(self.value), move(self.error), self.arith)

    def __getitem__(self, key: Any) -> "Bounded":
        return self._moved(lambda x: x[key])

    def reshape(self, *shape: Any) -> "Bounded":
        """As in NumPy."""
        return self._moved(lambda x: x.reshape(*shape))

    def swapaxes(self, a: int, b: int) -> "Bounded":
        """As in NumPy."""
        return self._moved(lambda x: x.swapaxes(a, b))

    def __neg__(self) -> "Bounded":
        return Bounded(-self.value, self.error, self.arith)

    def __add__(self, other: Any) -> "Bounded":
        other = Bounded.of(other, self.arith)
        return self._stored(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Any) -> "Bounded":
        return self + -Bounded.of(other, self.arith)

    def __rsub__(self, other: Any) -> "Bounded":
        return -self + other

    def __mul__(self, other: Any) -> "Bounded":
        other = Bounded.of(other, self.arith)
        return self._stored(self.value * other.value, abs(self.value) * other.error + self.error * abs(other.value)
                            + self.error * other.error)

    def __truediv__(self, other: Any) -> "Bounded":
        other = Bounded.of(other, self.arith)
        least = abs(other.value) - other.error
        with numpy.errstate(divide="ignore", invalid="ignore"):
            value = self.value / other.value
            error = numpy.where(least > 0, (self.error + abs(value) * other.error) / least, numpy.inf)
        return self._stored(value, error)

    def __rtruediv__(self, other: Any) -> "Bounded":
        return Bounded.of(other, self.arith) / self

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, other: Any) -> "Bounded":
        other = Bounded.of(other, self.arith)
        a, b, ea, eb = abs(self.value), abs(other.value), self.error, other.error
        n = self.shape[-1]
        lost = n * self.arith.eta
        sums = kappa(0, n, self.arith) * ((a + ea) @ (b + eb) + lost)
        return self._stored(self.value @ other.value, a @ eb + ea @ b + ea @ eb + lost + sums)

    def __rmatmul__(self, other: Any) -> "Bounded":
        return Bounded.of(other, self.arith) @ self

    def sum(self, axis: Any = None, keepdims: bool = False) -> "Bounded":
        """As in NumPy, accumulated in any order."""
        value, error = (x.sum(axis=axis, keepdims=keepdims) for x in (self.value, self.error))
        n = self.value.size // max(1, value.size)
        sums = kappa(0, n, self.arith) * (abs(self.value) + self.error).sum(axis=axis, keepdims=keepdims)
        lost = n * self.arith.eta if self.arith.ftz else 0.0  # without flushing, a sum does not underflow
        return self._stored(value, error + sums + lost)

    def through(self, f: Callable, slope: Callable, own: int) -> "Bounded":
        """f(self), elementwise. slope(low, high): the largest |f'| in between. own: roundings of f itself, in addition
        to that of storage."""
        value = f(self.value)
        steepest = slope(self.value - self.error, self.value + self.error)
        error = steepest * self.error + own * (self.arith.u_a * abs(value) + self.arith.eta)
        return self._stored(value, error)


def value_of(b: Bounded) -> Value:
    """The Value with which a property compares an output: kappa times its `mag` is the error of `b`."""
    return Value(b.value, b.error / kappa(1, 1, b.arith), 1, 1)


def _nearest_to_zero(low: Any, high: Any) -> Any:
    return numpy.where((low <= 0) & (high >= 0), 0, numpy.minimum(abs(low), abs(high)))


def _function(name: str, f: Callable, slope: Callable, own: int) -> Callable:
    """An elementary function for longdoubles, for Bounded, and for objects (50 digits, by mpmath)."""
    def of(x: Any) -> Any:
        if isinstance(x, Bounded):
            return x.through(f, slope, own)
        x = numpy.asarray(x)
        if x.dtype == object:
            import mpmath
            return numpy.vectorize(getattr(mpmath, name), otypes=[object])(x)
        return f(x)
    of.__name__, of.__doc__ = name, f"{name}(x), elementwise."
    return of


exp = _function("exp", numpy.exp, lambda low, high: numpy.exp(high), FUNCTION_ROUNDINGS)
tanh = _function("tanh", numpy.tanh, lambda low, high: 1 - numpy.tanh(_nearest_to_zero(low, high)) ** 2,
                 FUNCTION_ROUNDINGS)
erf = _function("erf", _ERF, lambda low, high: 2 / math.sqrt(math.pi) * numpy.exp(-_nearest_to_zero(low, high) ** 2),
                FUNCTION_ROUNDINGS)


def _sqrt_slope(low: Any, high: Any) -> Any:
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return numpy.where(low > 0, 0.5 / numpy.sqrt(abs(low)), numpy.inf)


sqrt = _function("sqrt", numpy.sqrt, _sqrt_slope, 1)


def positive(x: Any) -> Any:
    """1 where x > 0, else 0, elementwise: the derivative of relu. For Bounded x, the error is 1 where an implementation
    may see the other sign."""
    if isinstance(x, Bounded):
        return Bounded(x.value > 0, abs(x.value) <= x.error, x.arith)
    return (numpy.asarray(x) > 0) * 1


def relu(x: Any) -> Any:
    """max(x, 0), elementwise, without a rounding."""
    if isinstance(x, Bounded):
        value = numpy.maximum(x.value, 0)
        return Bounded(value, numpy.minimum(x.error, numpy.maximum(x.value + x.error, 0)), x.arith)
    return x * positive(x)


def softmax(x: Any) -> Any:
    """p = exp(x - max) / sum exp(x - max) over the last axis of x [..., n]. A masked score is -inf; its p is 0 without
    error. The error of max itself does not matter, since any shift gives the same function.

    The bound, for Bounded x: if the scores change by at most e, p changes by at most a factor exp(+-2 e); x - max is
    rounded. Each exp may also underflow, by w, and their sum, which is at least 1, by n w: this changes p by w + n p w.

    An implementation may also compute exp(x - l), l = max + log sum exp(x - max). A factor exp(+-e) in the sum changes
    l by e; l is rounded, by u |l|, and x - l, by u |x - l|. These errors of the exponent are relative errors of p, even
    if all x are equal and the first form has nothing to round. The bound is the larger of both."""
    if not isinstance(x, Bounded):
        shifted = exp(x - x.max(axis=-1, keepdims=True)) if numpy.asarray(x).dtype != object else _exp_masked(x)
        return shifted / shifted.sum(axis=-1, keepdims=True)
    arith, seen = x.arith, numpy.isfinite(x.value)
    top = x.value.max(axis=-1, keepdims=True)
    p = numpy.exp(x.value - top)
    p = p / p.sum(axis=-1, keepdims=True)
    shift, off = (numpy.where(seen, v, 0) for v in (abs(numpy.where(seen, x.value, 0) - top), x.error))
    off_by_most = off.max(axis=-1, keepdims=True)                            # the error of the maximum itself
    own = FUNCTION_ROUNDINGS * arith.u_a + arith.u_s
    moved = numpy.where(seen, off + arith.u_s * (shift + off + off_by_most) + own, 0)
    most = moved.max(axis=-1, keepdims=True)
    summed = most + numpy.log1p(kappa(1, x.shape[-1], arith))
    relative = numpy.expm1(numpy.maximum(most + summed, _by_log_sum(x, seen, off, summed) + own))
    lost = (FUNCTION_ROUNDINGS + 1) * arith.eta * (1 + x.shape[-1] * p)
    stored = x._stored(p, p * relative + lost * (1 + relative))
    return Bounded(stored.value, numpy.where(seen, stored.error, 0), arith)


def _by_log_sum(x: Bounded, seen: Any, off: Any, summed: Any) -> Any:
    """The error of x - l, l = log sum exp x, where l is computed. off: the error of x. summed: the error of the
    logarithm of the sum."""
    arith, top = x.arith, x.value.max(axis=-1, keepdims=True)
    log = numpy.log(numpy.exp(x.value - top).sum(axis=-1, keepdims=True))
    of_log = summed + (FUNCTION_ROUNDINGS * arith.u_a + arith.u_s) * (log + summed)
    of_log = of_log + (FUNCTION_ROUNDINGS + 1) * arith.eta
    of_l = of_log + arith.u_s * (abs(top + log) + of_log) + arith.eta
    far = abs(numpy.where(seen, x.value, 0) - top - log)
    return off + of_l + arith.u_s * (far + off + of_l) + arith.eta


def _exp_masked(x: numpy.ndarray) -> numpy.ndarray:
    """exp(x - max) for objects, 0 where x is None (masked)."""
    out = numpy.empty(x.shape, object)
    for row in numpy.ndindex(*x.shape[:-1]):
        seen = [v for v in x[row] if v is not None]
        for j, v in enumerate(x[row]):
            out[(*row, j)] = 0 if v is None else exp(numpy.array([v - max(seen)], object))[0]
    return out
