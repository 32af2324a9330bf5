"""Systems of linear equations as an op.

    x = a^-1 b        with h = a^-T g:        db = h,   da = -h x^T        (from a dx + da x = db)

The inverse is never formed. Floating-point numbers go to the library of the backend; Fractions are solved exactly, by
elimination.
"""
from __future__ import annotations

from fractions import Fraction

import numpy

from minipeft.backend import xp
from minipeft.engine.calling import once
from minipeft.engine.tensor import op


@op
def solve(a, b):
    """The x with a x = b.   a [..., n, n], b [..., n, m] -> x [..., n, m]; leading axes broadcast.

    da = -h x^T,   db = h,   with h = a^-T g, computed once for both. Raises ValueError for shapes that do not fit, and
    for a singular a: where elimination meets a pivot of 0, or finite numbers give an x that is not finite."""
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"solve: shapes {list(a.shape)} and {list(b.shape)}; expected [..., n, n] and [..., n, m]")
    x = _solution(a, b)
    h = once(lambda g: _solution(a.swapaxes(-1, -2), g))
    return x, (lambda g: -h(g) @ x.swapaxes(-1, -2), h)


def _solution(a, b):
    """Both arrays get the leading axes of the result first: CuPy does not broadcast here."""
    lead = numpy.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (xp.broadcast_to(side, (*lead, *side.shape[-2:])) for side in (a, b))
    if a.dtype == object:
        return _eliminated(a, b)
    try:
        x = xp.linalg.solve(a, b)
    except ValueError as error:  # NumPy's LinAlgError, for a pivot of 0
        raise _singular(a) from error
    if not xp.isfinite(x).all() and xp.isfinite(a).all() and xp.isfinite(b).all():  # CuPy raises nothing
        raise _singular(a)
    return x


def _eliminated(a, b):
    """Gauss-Jordan elimination in Fractions. A pivot may be any number but 0, since nothing is rounded."""
    n = a.shape[-1]
    x = xp.empty(b.shape, dtype=object)
    for at in numpy.ndindex(b.shape[:-2]):
        rows = [[Fraction(v) for v in (*left, *right)] for left, right in zip(a[at], b[at])]
        for k in range(n):
            pivot = next((i for i in range(k, n) if rows[i][k]), None)
            if pivot is None:
                raise _singular(a)
            rows[k], rows[pivot] = rows[pivot], rows[k]
            top = [v / rows[k][k] for v in rows[k]]
            rows = [top if i == k else [u - row[k] * v for u, v in zip(row, top)] for i, row in enumerate(rows)]
        x[at] = [row[n:] for row in rows]
    return x


def _singular(a) -> ValueError:
    return ValueError(f"solve: a {list(a.shape)} holds a matrix that is singular, or so near to it that the solution "
                      f"is not finite; expected invertible matrices")
