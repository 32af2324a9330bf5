"""Bottleneck adapters: two small layers in the residual stream of a frozen block.

    A(h) = U f(D h + b_D) + b_U                  Houlsby et al., 2019, arXiv:1902.00751
    y    = x + F + s A(h)                        x the residual stream, F the sublayer's output, n its input
        houlsby   h = F                          the same paper
        pfeiffer  h = x + F                      Pfeiffer et al., 2020, arXiv:2005.00247
        parallel  h = x, or h = n                He et al., 2021, arXiv:2110.04366

    z = D h + b_D,  a = f(z),  da = s g U,  dz = da f'(z),  dh = dz D                 g = dL/dy; sums, no means
    dU = s g^T a     db_U = s sum g     dD = dz^T h     db_D = sum dz     dx = g [+ dh]     dF = g [+ dh]     [dn = dh]

x, n, F, g [N, d], D [m, d], b_D [m], U [d, m], b_U [d]. f: relu; gelu(z) = z Phi(z); gelu_tanh, its approximation
z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2; swish(z) = z / (1 + e^-z).

Conventions. parallel_input: a parallel adapter reads the stream x or the sublayer's input n. residual: the term that
is added to pfeiffer's A before the block adds x. It is the sublayer's output F, or A's whole input x + F, so that x
counts twice.
"""
from __future__ import annotations

import fractions
from typing import Any, Callable

import numpy

from minipeft.conformance.case import Case, remembered
from minipeft.conformance.methods.bottleneck_adapter.activations import ACTIVATIONS, POLYNOMIAL, Constants
from minipeft.conformance.numbers import fractions as in_fractions
from minipeft.conformance.running import Bounded, value_of
from minipeft.conformance.tolerance import Value, kappa, rounded_values

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
CONVENTIONS = {"parallel_input": ("stream", "norm"), "residual": ("sublayer", "adapter_input")}
LEAVES = ("D", "b_D", "U", "b_U")


def reads(case: Case) -> tuple[str, ...]:
    """The names, of "x", "n" and "F", of the arrays that A reads; h is their sum."""
    if case.params["placement"] == "parallel":
        return ("n",) if case.conventions.get("parallel_input") == "norm" else ("x",)
    return ("F",) if case.params["placement"] == "houlsby" else ("x", "F")


def stream_twice(case: Case) -> bool:
    """Whether x counts twice, by the convention `residual`."""
    return case.params["placement"] == "pfeiffer" and case.conventions.get("residual") == "adapter_input"


def equations(case: Case, number: Callable, scale: Any) -> dict[str, Any]:
    """{output: array} by the equations above. number: converts a case's array to fractions, to numbers of 50 digits,
    or to numbers with their bounds. scale: s.

    s is multiplied with U and b_U first: no other order of the products has larger roundings. In dU and db_U it is
    multiplied with g; an implementation that folds it into U and b_U multiplies the finished sum: one rounding either
    way."""
    stream = {name: number(case[name]) for name in ("x", "n", "F")}
    D, b_D, U, b_U, g = (number(case[name]) for name in (*LEAVES, "g"))
    f, slope = ACTIVATIONS[case.params["activation"]]
    constants = Constants(D)
    h, read = in_any_order(*(stream[name] for name in reads(case))), reads(case)
    z = h @ D.T + b_D                                                                  # [N, m]
    a, sg = f(z, constants), scale * g
    twice = [stream["x"]] if stream_twice(case) else []
    dz = (g @ (scale * U)) * slope(z, constants)                                       # [N, m]
    dh = dz @ D                                                                        # [N, d]
    out = {"y": in_any_order(stream["x"], *twice, stream["F"], a @ (scale * U).T + scale * b_U),
           "dD": dz.T @ h, "db_D": dz.sum(axis=0), "dU": sg.T @ a, "db_U": sg.sum(axis=0),
           "dx": in_any_order(g, *([g] if twice else []), *([dh] if "x" in read else [])),
           "dF": in_any_order(g, *([dh] if "F" in read else []))}
    return {**out, "dn": dh} if "n" in read else out


def in_any_order(*terms: Any) -> Any:
    """The sum of the terms, of which the bound holds in any order: partial sums are rounded to storage, and none is
    larger than the sum of absolute values."""
    first = terms[0]
    if len(terms) == 1 or not isinstance(first, Bounded):
        return sum(terms[1:], start=first)
    size, error = sum(abs(t.value) + t.error for t in terms), sum(t.error for t in terms)
    roundings = len(terms) - 1
    more = kappa(roundings, roundings, first.arith) * size + roundings * first.arith.eta
    return Bounded(sum(t.value for t in terms), error + more, first.arith)


@remembered
def values(case: Case) -> dict[str, Value]:
    """{output: its reference in longdouble, with its bound}."""
    arith = case.arith
    found = equations(case, lambda x: Bounded.of(x, arith), numpy.longdouble(case.params["scale"]))
    return {name: value_of(b) for name, b in found.items()}


def exact_values(case: Case) -> dict[str, Value]:
    """As `values`, computed in fractions or 50 digits and rounded once, to float64; with the bounds of `values`."""
    if case.params["activation"] in POLYNOMIAL:
        found = equations(case, in_fractions, fractions.Fraction(case.params["scale"]))
    else:
        import mpmath
        with mpmath.workdps(50):
            found = equations(case, many_digits, mpmath.mpf(case.params["scale"]))
    bounds = values(case)
    return rounded_values({name: Value(found[name], bounds[name].mag, bounds[name].k, bounds[name].n)
                           for name in bounds})


def many_digits(x: Any) -> numpy.ndarray:
    """The array with every number as one of mpmath's."""
    import mpmath
    return numpy.vectorize(mpmath.mpf, otypes=[object])(x)
