"""The error function by rational approximation, which NumPy does not have.

    erf(x) = x P(x^2) / Q(x^2)                                     |x| <= 0.46875
    erfc(x) = exp(-x^2) P(x) / Q(x)                        0.46875 < |x| <= 4
    erfc(x) = exp(-x^2) (1/sqrt(pi) + P(1/x^2) / (x^2 Q(1/x^2))) / x      |x| > 4

W. J. Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969), 631-637; coefficients
as in his routine CALERF. Absolute error below 1e-15 in float64.
"""
from __future__ import annotations

import math
from typing import Sequence

from minipeft.backend import Array, xp

# Highest power first.
_NEAR = ((1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
          3.20937758913846947e3),
         (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3))
_MIDDLE = ((2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
            2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
            1.23033935479799725e3),
           (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
            3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3))
_FAR = ((1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
         1.60837851487422766e-2, 6.58749161529837803e-4),
        (1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
         2.33520497626869185e-3))


def erf_of(x: Array) -> Array:
    """erf(x) elementwise, in the dtype of x. NaN stays NaN; +-inf give +-1."""
    y = abs(x)
    near = xp.minimum(y, 0.46875) ** 2
    middle = xp.clip(y, 0.46875, 4.0)
    far = 1 / xp.clip(y, 4.0, 30.0) ** 2
    tail = xp.exp(-xp.minimum(y, 30.0) ** 2)
    beyond = (1 / math.sqrt(math.pi) - far * _ratio(far, _FAR)) * xp.sqrt(far)
    large = 1 - tail * xp.where(y <= 4.0, _ratio(middle, _MIDDLE), beyond)
    return xp.where(y <= 0.46875, x * _ratio(near, _NEAR), xp.copysign(large, x))


def _ratio(x: Array, coefficients: tuple[Sequence[float], Sequence[float]]) -> Array:
    """P(x) / Q(x) by Horner's rule."""
    values = []
    for polynomial in coefficients:
        value = xp.full_like(x, polynomial[0])
        for c in polynomial[1:]:
            value *= x
            value += c
        values.append(value)
    return values[0] / values[1]
