"""How far a correct implementation may be from the exact result: derived, never tuned.

    gamma_n = n u / (1 - n u)               a sum of n products in any order, with or without FMA, is off by at most
                                            gamma_n |x| . |y|
    kappa   = (1 + u_s)^k (1 + u_m)^4 (1 + gamma_n(u_a)) - 1
    tau     = kappa M + n eta               M = the same equation with every operand replaced by its absolute value
    rho     = max |got - exact| / tau       conforms iff rho <= 1

k counts the roundings to storage on the longest path, n is the total length of the sums along it. u_m is what rounding
the inputs of a product costs where it is declared (TF32): two of each, in two products in a row. Cancellation is in M,
so there is no absolute tolerance but n eta, what underflow costs n products (`running.py` derives it). N. Higham,
Accuracy and Stability of Numerical Algorithms, ch. 3; rho is the ratio that LAPACK's own tests print, componentwise.

Where an equation is not a polynomial (exp, gelu, a norm), M does not exist, and `running.py` derives the bound.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import numpy

from minipeft.conformance.arithmetic import Arithmetic, reference_unit
from minipeft.conformance.numbers import rounded


@dataclasses.dataclass(frozen=True)
class Value:
    """The reference for one output: `exact` (float64 if it is correctly rounded, else longdouble), and what a bound on
    the error is made of: mag, k, n."""

    exact: numpy.ndarray
    mag: numpy.ndarray
    k: int
    n: int


def rounded_values(values: Mapping[str, Value]) -> dict[str, Value]:
    """Values in exact numbers (fractions, or many digits) as float64: rounded once, correctly."""
    return {name: Value(rounded(v.exact), rounded(v.mag), v.k, v.n) for name, v in values.items()}


def kappa(k: int, n: int, arith: Arithmetic) -> float:
    """The relative error of k roundings and sums of length n. Raises ValueError where n u_a >= 1: no bound exists."""
    if n * arith.u_a >= 1:
        raise ValueError(f"sums of {n} terms accumulated in {arith.accumulate}: no bound holds for them")
    gamma = n * arith.u_a / (1 - n * arith.u_a)
    # expm1 and log1p: in float64 kappa itself is a few ulps, and (1 + u) ** k - 1 would lose it to cancellation
    roundings = k * numpy.log1p(arith.u_s) + 4 * numpy.log1p(arith.u_m) + numpy.log1p(gamma)
    return float(numpy.expm1(roundings))


def tau(value: Value, arith: Arithmetic) -> numpy.ndarray:
    """The bound, elementwise. A reference in longdouble is itself off by n roundings of its own; one in float64 was
    rounded once, correctly: half an ulp, which counts where it is held against float64."""
    own = value.n * reference_unit() if value.exact.dtype == numpy.longdouble else 2.0 ** -53
    return (kappa(value.k, value.n, arith) + own) * value.mag + value.n * arith.eta


def rho(got: Any, exact: Any, bound: Any) -> float:
    """max |got - exact| / tau; 0 where both are equal, whatever the bound; infinity for NaN."""
    error = abs(numpy.asarray(got, numpy.longdouble) - numpy.asarray(exact, numpy.longdouble))
    if error.size == 0:
        return 0.0
    with numpy.errstate(divide="ignore", invalid="ignore"):
        ratio = numpy.where(error == 0, 0, error / bound)
    return float(ratio.max()) if numpy.isfinite(ratio).all() else float("inf")
