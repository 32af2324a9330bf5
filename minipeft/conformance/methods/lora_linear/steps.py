"""One step of gradient descent on A and B, and what it makes of the outputs: with how far off these may be.

    A' = A - lr dA     B' = B - lr dB     both gradients at the old A and B

The error of A' is that of dA, which any order of computing it stays within, and the two roundings of the step
(`running.Bounded`). An output f is a polynomial, so that with |f|, the same with absolute values,

    |f(A' + eA, B' + eB) - f(A', B')|  <=  |f|(|A'| + eA, |B'| + eB) - |f|(|A'|, |B'|)

and to compute it from there costs kappa |f|(|A'| + eA, |B'| + eB), in any order.
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
    """lr: a power of two, so that nothing but sums is rounded, 1/8 at most, by which no number of A and B moves by more
    than 1: they stay as large as they were drawn, and float16 holds what they make."""
    most = float(max(abs(ref[name].exact).max() for name in ("dA", "dB")))
    return 2.0 ** -max(3, math.ceil(math.log2(most))) if most else 0.125


def leaves_after(case: Case, ref: Mapping[str, Value]) -> dict[str, Bounded]:
    """{"A", "B"} after a step at rate_of(ref)."""
    return {leaf: Bounded.of(case[leaf], case.arith) - rate_of(ref) * Bounded(
        ref[f"d{leaf}"].exact, case.tau(ref[f"d{leaf}"]), case.arith) for leaf in "AB"}


def outputs_after(case: Case, ref: Mapping[str, Value], formula: Formula,
                  costs: Mapping[str, tuple[int, int]]) -> dict[str, Value]:
    """{output: its reference after a step, and its bound}. costs: {output: (k, n)}, as of an output before it."""
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
    """Of a linear layer. Never bit for bit: a step on dyadic data makes numbers that half precision rounds."""
    def formula(s: Any, of: Callable[[str], Any], A: Any, B: Any) -> dict[str, Any]:
        return equations(s, of("W"), of("b"), A, B, of("x"), of("g"))

    return outputs_after(case, values(case), formula, lengths(case))


def sizes_after(case: Case, ref: Mapping[str, Value]) -> dict[str, numpy.ndarray]:
    """{"A", "B"}: no number of theirs is larger after a step."""
    return {leaf: numpy.asarray(abs(moved.value) + moved.error, numpy.float64)
            for leaf, moved in leaves_after(case, ref).items()}
