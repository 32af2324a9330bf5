"""f and f' over any kind of number: longdouble, Bounded, fractions (relu alone), 50 digits.

    relu        max(z, 0)                        gelu       z Phi(z),  Phi(z) = (1 + erf(z / sqrt 2)) / 2
    gelu_tanh   z (1 + t) / 2,                   swish      z S(z),    S(z) = (1 + tanh(z / 2)) / 2
                t = tanh(sqrt(2 / pi) (z + 0.044715 z^3))

Hendrycks & Gimpel, 2016, arXiv:1606.08415 (gelu, and the approximation). S is computed by tanh: of the forms in use it
has the largest rounding errors, so no form exceeds the bound.
"""
from __future__ import annotations

from fractions import Fraction
from typing import Any, Callable

import numpy

from minipeft.conformance.running import Bounded, erf, exp, positive, relu, tanh

POLYNOMIAL = ("relu",)


class Constants:
    """1/2 and irrational constants, in the kind of number that the array `like` holds. A Bounded one has the error of
    one rounding."""

    def __init__(self, like: Any):
        self.arith = like.arith if isinstance(like, Bounded) else None
        self.mpmath = None
        if self.arith is None and like.dtype == object and like.size and not isinstance(like.flat[0], Fraction):
            import mpmath
            self.mpmath = mpmath

    def of(self, decimal: str, root: str = "1", over_pi: bool = False) -> Any:
        """decimal * sqrt(root), or decimal * sqrt(root / pi)."""
        if self.mpmath is not None:
            pi = self.mpmath.pi if over_pi else 1
            return self.mpmath.mpf(decimal) * self.mpmath.sqrt(self.mpmath.mpf(root) / pi)
        pi = 4 * numpy.arctan(numpy.longdouble(1)) if over_pi else numpy.longdouble(1)
        value = numpy.longdouble(decimal) * numpy.sqrt(numpy.longdouble(root) / pi)
        return value if self.arith is None else Bounded(value, self.arith.u_s * abs(value), self.arith)


def _normal(z: Any, c: Constants) -> Any:
    """Phi(z), the normal distribution function."""
    return (erf(z * c.of("1", "0.5")) + 1) * 0.5


def _density(z: Any, c: Constants) -> Any:
    return exp(z * z * -0.5) * c.of("1", "0.5", over_pi=True)


def _bent(z: Any, c: Constants) -> Any:
    """t of gelu_tanh."""
    return tanh((z + z * z * z * c.of("0.044715")) * c.of("1", "2", over_pi=True))


def _gelu_tanh_slope(z: Any, c: Constants) -> Any:
    t, inner = _bent(z, c), (z * z * c.of("0.134145") + 1) * c.of("1", "2", over_pi=True)   # 0.134145 = 3 * 0.044715
    return (t + 1) * 0.5 + z * (1 - t * t) * inner * 0.5


def _sigmoid(z: Any) -> Any:
    return (tanh(z * 0.5) + 1) * 0.5


ACTIVATIONS: dict[str, tuple[Callable[[Any, Constants], Any], Callable[[Any, Constants], Any]]] = {
    "relu": (lambda z, c: relu(z), lambda z, c: positive(z)),
    "gelu": (lambda z, c: z * _normal(z, c), lambda z, c: _normal(z, c) + z * _density(z, c)),
    "gelu_tanh": (lambda z, c: z * (_bent(z, c) + 1) * 0.5, _gelu_tanh_slope),
    "swish": (lambda z, c: z * _sigmoid(z), lambda z, c: _sigmoid(z) * (z * (1 - _sigmoid(z)) + 1))}
