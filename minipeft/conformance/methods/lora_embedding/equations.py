"""LoRA on an embedding table, which may also be the output head.

    y      = E[ids] + s A^T[ids] B^T,   s = alpha / r         row i of the table: E[i] + s B a_i, a_i column i of A
    E'     = E + s (B A)^T                                    merged
    logits = h E'^T = h E^T + s (h B) A                       the same table as the head
    dA[:, v] = s sum over ids = v of (g B)^T     dB = s sum over all of g^T A^T[ids]      g = dL/dy; sums, no means
    with q = dL/dlogits as well:   dA += s (h B)^T q     dB += s h^T (q A^T)

Hu et al., 2021, arXiv:2106.09685, eq. (3), with W = E^T and x the unit vector of an id. E [V, d], A [r, V], B [d, r],
ids [b, t], g [b, t, d], h [N, d], q [N, V]. E has no gradient. A method on a table acts at all of its uses, or it is
refused. The scalings are those of `lora_linear`.
"""
from __future__ import annotations

from fractions import Fraction
from typing import Any, Callable

import numpy

from minipeft.conformance.case import Case, remembered
from minipeft.conformance.methods.lora_linear.equations import scale_of
from minipeft.conformance.methods.lora_linear.steps import outputs_after
from minipeft.conformance.numbers import fractions, wide
from minipeft.conformance.tolerance import Value, rounded_values


def equations(s: Any, ids: Any, E: Any, A: Any, B: Any, g: Any, h: Any, q: Any) -> dict[str, Any]:
    """{output: array} by the equations above, over any kind of number: longdouble, Fraction, or absolute values for
    the bounds. s: the scale."""
    table, seen = E + s * (B @ A).T, A.T[ids]                                          # [V, d], [b, t, r]
    flat, where = g.reshape(-1, g.shape[-1]), one_hot(ids, len(E))                     # [b t, d], [b t, V]
    da = s * ((flat @ B).T @ where)                                                    # [r, V]
    db = s * (flat.T @ seen.reshape(-1, len(A)))                                       # [d, r]
    return {"y": E[ids] + s * (seen @ B.T), "dA": da, "dB": db, "E_merged": table, "y_merged": table[ids],
            "logits": h @ E.T + s * ((h @ B) @ A), "logits_merged": h @ table.T,
            "dA_tied": da + s * ((h @ B).T @ q), "dB_tied": db + s * (h.T @ (q @ A.T))}


def one_hot(ids: numpy.ndarray, V: int) -> numpy.ndarray:
    """[b, t] -> [b t, V]: 1 at each id, 0 elsewhere. Raises IndexError for an id that the table lacks."""
    if ids.size and not (0 <= ids.min() and ids.max() < V):
        raise IndexError(f"ids from {ids.min()} to {ids.max()} in a table of {V} rows")
    return (ids.reshape(-1, 1) == numpy.arange(V)) * 1


def lengths(case: Case) -> dict[str, tuple[int, int]]:
    """{output: (k, n)}: the number of roundings to storage on the longest path, and the total length of its sums.

    A lookup rounds nothing. y and E' round the product, s, its product, and the sum. dA rounds g B, s, its product, and
    the sum over an id's occurrences, which many libraries (torch on a CPU) keep in storage and round at every addition.
    dB rounds the product, s, and its product. The head is as y, with one product more. A tied table adds the sum of
    both uses."""
    (v, d), r, n, (b, t) = case["E"].shape, len(case["A"]), len(case["h"]), case["ids"].shape
    often = int(numpy.bincount(case["ids"].reshape(-1)).max())
    return {"y": (4, r + 2), "E_merged": (4, r + 2), "y_merged": (4, r + 2), "dA": (3 + often, d + often + 1),
            "dB": (3, b * t + 1), "logits": (5, d + r + 2), "logits_merged": (5, d + r + 2),
            "dA_tied": (4 + often, d + max(often, n) + 2), "dB_tied": (5, max(b * t, v + n) + 2)}


@remembered
def values(case: Case) -> dict[str, Value]:
    """{output: its reference in longdouble, with its bound}."""
    return valued(case, wide, numpy.longdouble)


def valued(case: Case, number: Any, scalar: Any) -> dict[str, Value]:
    """As `values`, over another kind of number. number: of an array, to an array of them. scalar: of one number."""
    arrays = [number(case[name]) for name in ("E", "A", "B", "g", "h", "q")]
    s = scale_of(case, scalar)
    exact, mag = equations(s, case["ids"], *arrays), equations(abs(s), case["ids"], *map(abs, arrays))
    return {name: Value(exact[name], mag[name], *kn) for name, kn in lengths(case).items()}


def exact_values(case: Case) -> dict[str, Value]:
    """As `values`, computed in fractions and rounded once, to float64."""
    return rounded_values(valued(case, fractions, Fraction))


def unmerge_bound(case: Case, A: Any = None, B: Any = None) -> numpy.ndarray:
    """[V, d]: how far E + D - D may be from E, with D = s (B A)^T. The sum is rounded twice, and both passes use the
    same computed D. A, B: of another D than the case's."""
    u, A, B = case.arith.u_s, case["A"] if A is None else A, case["B"] if B is None else B
    size = abs(case["E"]) + abs(float(scale_of(case))) * (abs(B) @ abs(A)).T
    return 2 * (1 + u) ** 3 * u * size + 2 * case.arith.eta


@remembered
def values_after(case: Case) -> dict[str, Value]:
    """{output: its reference after a step, and its bound}, derived as in `lora_linear/steps.py`."""
    def formula(s: Any, of: Callable[[str], Any], A: Any, B: Any) -> dict[str, Any]:
        return equations(s, case["ids"], of("E"), A, B, of("g"), of("h"), of("q"))

    return outputs_after(case, values(case), formula, lengths(case))
