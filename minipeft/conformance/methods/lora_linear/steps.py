"""One step of gradient descent on A and B: the outputs after it, and the bounds on their errors.

    A' = A - lr dA     B' = B - lr dB     both gradients at the old A and B

The error of A' is the bound on dA, which holds for any order of computing it, and the two roundings of the step
(`running.Bounded`). An output f is a polynomial; let |f| be f with absolute values. Then

    |f(A' + eA, B' + eB) - f(A', B')|  <=  |f|(|A'| + eA, |B'| + eB) - |f|(|A'|, |B'|)

and computing f from there adds at most kappa |f|(|A'| + eA, |B'| + eB), in any order.
"""
from __future__ import annotations

import math
from typing import Any, Callable, Mapping

import numpy

from minipeft.conformance.case import Case, remembered
from minipeft.conformance.methods.lora_linear.equations import equations, lengths, scale_of, values
from minipeft.conformance.numbers import wide
from minipeft.conformance.running import Bounded, value_of
from minipeft.conformance.tolerance import Value

Formula = Callable[..., dict[str, Any]]  # (s, array by name, A, B) -> {output: array}


def rate_of(ref: Mapping[str, Value]) -> float:
    """lr: a power of two, so that only sums are rounded. It is at most 1/8, and no number of A and B moves by more than
    1: they keep about the size they were drawn with, and float16 holds the outputs. ref: has "dA" and "dB"."""
    most = float(max(abs(ref[name].exact).max() for name in ("dA", "dB")))
    return 2.0 ** -max(3, math.ceil(math.log2(most))) if most else 0.125


def leaves_after(case: Case, ref: Mapping[str, Value]) -> dict[str, Bounded]:
    """{"A", "B"} after a step at the learning rate rate_of(ref). ref: has "dA" and "dB"."""
    return {leaf: Bounded.of(case[leaf], case.arith) - rate_of(ref) * Bounded(
        ref[f"d{leaf}"].exact, case.tau(ref[f"d{leaf}"]), case.arith) for leaf in "AB"}


def outputs_after(case: Case, ref: Mapping[str, Value], formula: Formula,
                  costs: Mapping[str, tuple[int, int]]) -> dict[str, Value]:
    """{output: its reference after a step, and its bound}. ref: has "dA" and "dB" before the step. formula(s, array by
    name, A, B): the outputs. costs: {output: (k, n)}, those of the outputs before the step."""
    a, b = leaves_after(case, ref).values()
    s = scale_of(case)
    exact = formula(s, lambda name: wide(case[name]), a.value, b.value)
    sized = [formula(abs(s), lambda name: abs(wide(case[name])), abs(a.value) + off * a.error,
                     abs(b.value) + off * b.error) for off in (0, 1)]
    found = {}
    for name, (k, n) in costs.items():
        low, high = (size[name] for size in sized)
        bound = case.tau(Value(exact[name], high, k, n)) + (high - low)
        found[name] = value_of(Bounded(exact[name], bound, case.arith))
    return found


@remembered
def values_after(case: Case) -> dict[str, Value]:
    """{output: its reference after a step, and its bound} of a linear layer. It is never exact: a step on dyadic data
    makes numbers that half precision rounds."""
    def formula(s: Any, of: Callable[[str], Any], A: Any, B: Any) -> dict[str, Any]:
        return equations(s, of("W"), of("b"), A, B, of("x"), of("g"))

    return outputs_after(case, values(case), formula, lengths(case))


def sizes_after(case: Case, ref: Mapping[str, Value]) -> dict[str, numpy.ndarray]:
    """{"A", "B": array}: bounds on the absolute values of A and B after a step. ref: has "dA" and "dB"."""
    return {leaf: numpy.asarray(abs(moved.value) + moved.error, numpy.float64)
            for leaf, moved in leaves_after(case, ref).items()}
