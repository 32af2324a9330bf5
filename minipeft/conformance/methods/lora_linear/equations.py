"""LoRA on a linear layer.

    y  = x W^T + b + s (x A^T) B^T,   s = alpha / r          Hu et al., 2021, arXiv:2106.09685, eq. (3), sec. 4.1
    W' = W + s B A                                           merged
    dA = s (g B)^T x     dB = s g^T (x A^T)     dx = g W + s (g B) A      g = dL/dy; sums over the batch, no means

x [N, in], W [out, in], b [out], A [r, in], B [out, r], g [N, out]. W and b have no gradient.
The scaling alpha / sqrt(r) is that of Kalajdzievski, 2023, arXiv:2312.03732 (rsLoRA); with "alpha", s is alpha itself.
"""
from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy

from minipeft.conformance.case import Case, remembered
from minipeft.conformance.numbers import fractions, wide
from minipeft.conformance.tolerance import Value, rounded_values

SCALINGS = ("alpha/r", "alpha/sqrt(r)", "alpha")


def equations(s: Any, W: Any, b: Any, A: Any, B: Any, x: Any, g: Any) -> dict[str, Any]:
    """{output: array} by the equations above, over any kind of number: longdouble, Fraction, or absolute values for
    the bounds. s: the scale."""
    merged = W + s * (B @ A)                                                           # [out, in]
    return {"y": x @ W.T + b + s * ((x @ A.T) @ B.T),                                  # [N, out]
            "dA": s * ((g @ B).T @ x),                                                 # [r, in]
            "dB": s * (g.T @ (x @ A.T)),                                               # [out, r]
            "dx": g @ W + s * ((g @ B) @ A),                                           # [N, in]
            "W_merged": merged, "y_merged": x @ merged.T + b}


def lengths(case: Case) -> dict[str, tuple[int, int]]:
    """{output: (k, n)}: the number of roundings to storage on the longest path, and the total length of its sums.

    W_merged has k = 4: B A, s, their product, and the sum. y has k = 6: two products, s, its product, and two sums,
    as if b came last."""
    (n, d_in), (d_out, r) = case["x"].shape, case["B"].shape
    return {"y": (6, d_in + r + 3), "dA": (5, d_out + n + 2), "dB": (5, d_in + n + 2), "dx": (5, d_out + r + 3),
            "W_merged": (4, r + 2), "y_merged": (6, d_in + r + 4)}


def scale_of(case: Case, number: Any = numpy.longdouble) -> Any:
    """s by the case's convention. number: makes one of a float or an int, such as numpy.longdouble or Fraction."""
    alpha, r = number(case.params["alpha"]), case["A"].shape[0]
    rule = case.conventions.get("scaling", SCALINGS[0])
    if rule == "alpha/sqrt(r)":
        root = math.isqrt(r)
        return alpha / number(root) if root * root == r else alpha / numpy.sqrt(number(r))
    return alpha / number(r) if rule == "alpha/r" else alpha


def in_defaults(case: Case) -> Case:
    """The same layer under the default convention: alpha is chosen so that alpha / r is its scale. It is exact where
    sqrt(r) is; elsewhere alpha is off by one rounding of float64."""
    if case.conventions.get("scaling", SCALINGS[0]) == SCALINGS[0]:
        return case
    return case.but(params={"alpha": float(scale_of(case) * case["A"].shape[0])})


@remembered
def values(case: Case) -> dict[str, Value]:
    """{output: its reference in longdouble, with its bound}."""
    return valued(case, wide, numpy.longdouble)


def valued(case: Case, number: Any, scalar: Any) -> dict[str, Value]:
    """As `values`, over another kind of number. number: of an array, to an array of them. scalar: of one number."""
    arrays = [number(case[name]) for name in ("W", "b", "A", "B", "x", "g")]
    s = scale_of(case, scalar)
    exact, mag = equations(s, *arrays), equations(abs(s), *map(abs, arrays))
    return {name: Value(exact[name], mag[name], *kn) for name, kn in lengths(case).items()}


def exact_values(case: Case) -> dict[str, Value]:
    """As `values`, computed in fractions and rounded once, to float64."""
    return rounded_values(valued(case, fractions, Fraction))


def never_rounded(case: Case) -> bool:
    """Whether dyadic data, drawn for s = alpha / r, stay exact under the case's convention. With s = alpha = 10, for
    example, sums pass 2^8, beyond which bfloat16 lacks odd integers."""
    rule, alpha, r = case.conventions["scaling"], case.params["alpha"], case["A"].shape[0]
    if rule == "alpha/sqrt(r)":
        return r in (1, 4, 16)
    return rule == "alpha/r" or isinstance(alpha, (int, float)) and abs(alpha) <= 2


def unmerge_bound(case: Case, A: Any = None, B: Any = None) -> numpy.ndarray:
    """[out, in]: how far W + D - D may be from W, with D = s B A. The sum is rounded twice, and both passes use the
    same computed D. A, B: of another D than the case's."""
    u, A, B = case.arith.u_s, case["A"] if A is None else A, case["B"] if B is None else B
    size = abs(case["W"]) + abs(float(scale_of(case))) * (abs(B) @ abs(A))
    return 2 * (1 + u) ** 3 * u * size + 2 * case.arith.eta


def forced_dropout(case: Case, keep: numpy.ndarray, p: float) -> Value:
    """y [N, out] where only A's input is dropped out: it is x o keep / (1 - p), which costs one rounding more. keep
    [N, in]: 1 for numbers that are kept, 0 for others."""
    dropped = case.but({"x": case["x"] * keep / (1 - p)})
    zero = case.but({"B": 0 * case["B"]})
    full, base, low, none = (values(c)["y"] for c in (case, zero, dropped, dropped.but({"B": 0 * case["B"]})))
    return Value(base.exact + low.exact - none.exact, base.mag + low.mag - none.mag, full.k + 1, full.n)
