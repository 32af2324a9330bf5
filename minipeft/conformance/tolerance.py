"""The largest error of a correct implementation: derived, never tuned.

    gamma_n = n u / (1 - n u)               a sum of n products in any order, with or without FMA, is off by at most
                                            gamma_n |x| . |y|
    kappa   = (1 + u_s)^k (1 + u_m)^4 (1 + gamma_n(u_a)) - 1
    tau     = kappa M + n eta               M = the same equation with every operand replaced by its absolute value
    rho     = max |got - exact| / tau       conforms iff rho <= 1

k counts the roundings to storage on the longest path; n is the total length of the sums along it. u_m is the unit
roundoff of a product's inputs if a coarser one is declared (TF32): two inputs, in two products in a row, make 4. M
accounts for cancellation, so the only absolute tolerance is n eta, the error by underflow in n products (derived in
`running.py`). N. Higham, Accuracy and Stability of Numerical Algorithms, ch. 3; rho is the ratio that LAPACK's own
tests print, componentwise.

If an equation is not a polynomial (exp, gelu, a norm), M does not exist, and `running.py` derives the bound.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import numpy

from minipeft.conformance.arithmetic import Arithmetic, reference_unit
from minipeft.conformance.numbers import rounded


@dataclasses.dataclass(frozen=True)
class Value:
    """The reference for one output. exact: its value (float64 if it is correctly rounded, else longdouble). mag, k, n:
    the M, k and n of the bound; mag has the shape of `exact`."""

    exact: numpy.ndarray
    mag: numpy.ndarray
    k: int
    n: int


def rounded_values(values: Mapping[str, Value]) -> dict[str, Value]:
    """{name: Value} in exact numbers (fractions, or many digits) rounded once, correctly, to float64."""
    return {name: Value(rounded(v.exact), rounded(v.mag), v.k, v.n) for name, v in values.items()}


def kappa(k: int, n: int, arith: Arithmetic) -> float:
    """The relative error of k roundings and sums of length n. Raises ValueError where n u_a >= 1: no bound exists."""
    if n * arith.u_a >= 1:
        raise ValueError(f"sums of {n} terms accumulated in {arith.accumulate}: no bound holds for them")
    gamma = n * arith.u_a / (1 - n * arith.u_a)
    # expm1 and log1p: in float64, kappa is only a few ulps of 1, which (1 + u) ** k - 1 would lose by cancellation
    roundings = k * numpy.log1p(arith.u_s) + 4 * numpy.log1p(arith.u_m) + numpy.log1p(gamma)
    return float(numpy.expm1(roundings))


def tau(value: Value, arith: Arithmetic) -> numpy.ndarray:
    """The bound, elementwise. It includes the error of the reference itself: n roundings in longdouble, or, if it was
    correctly rounded to float64, half an ulp, which matters for implementations in float64."""
    own = value.n * reference_unit() if value.exact.dtype == numpy.longdouble else 2.0 ** -53
    return (kappa(value.k, value.n, arith) + own) * value.mag + value.n * arith.eta


def rho(got: Any, exact: Any, bound: Any) -> float:
    """max |got - exact| / bound over arrays of one shape. The ratio is 0 where both are equal, whatever the bound; rho
    is infinity if there is a NaN."""
    error = abs(numpy.asarray(got, numpy.longdouble) - numpy.asarray(exact, numpy.longdouble))
    if error.size == 0:
        return 0.0
    with numpy.errstate(divide="ignore", invalid="ignore"):
        ratio = numpy.where(error == 0, 0, error / bound)
    return float(ratio.max()) if numpy.isfinite(ratio).all() else float("inf")
