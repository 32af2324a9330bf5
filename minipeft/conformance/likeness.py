"""How a wrong tensor differs from the right one: mistakes that leave a recognizable pattern.

    MINE = REF with its axes in another order        a weight stored [d_in, d_out], heads not moved back
    MINE = c REF                                     a scale forgotten, applied twice, or of another size
    MINE = REF with rows in another order            a permuted batch, heads interleaved in another way
    MINE = REF + v, one vector v for all rows        a bias or a position too many or too few
    MINE = 0

A pattern must hold within REF's own bound (scaled if MINE is a multiple of REF); nothing is guessed beyond that.
"""
from __future__ import annotations

import itertools
import math
from typing import Mapping

import numpy

_MOST_AXES = 4


def likeness(mine: numpy.ndarray, ref: numpy.ndarray, tau: numpy.ndarray, sizes: Mapping[str, int]) -> str:
    """The pattern in words, or "". mine: any shape. ref, tau: the right tensor and its bound, of one shape. sizes:
    {name: size}, by which a factor may be named."""
    if mine.size == 0 or not numpy.isfinite(mine).all():
        return ""
    with numpy.errstate(over="ignore", invalid="ignore"):  # a number that overflows is not within the bound
        return _likeness(mine.astype(numpy.float64), ref.astype(numpy.float64), tau, sizes)


def _likeness(mine: numpy.ndarray, ref: numpy.ndarray, tau: numpy.ndarray, sizes: Mapping[str, int]) -> str:
    found = _axes(mine, ref, tau)
    if not found and mine.shape == ref.shape:
        found = _multiple(mine, ref, tau, sizes) or _order(mine, ref, tau) or _shift(mine, ref, tau)
    elif not found and mine.size == ref.size:
        flat = mine.reshape(ref.shape)
        found = "REF in another shape, the numbers in the same order" if _within(flat, ref, tau) else ""
    return found


def _within(mine: numpy.ndarray, ref: numpy.ndarray, tau: numpy.ndarray) -> bool:
    return mine.shape == ref.shape and bool((abs(mine - ref) <= tau).all())


def _axes(mine: numpy.ndarray, ref: numpy.ndarray, tau: numpy.ndarray) -> str:
    """Tries every other order of the axes. Axes of length 1 are left out: they have no order, and may be missing."""
    left_out = " (those of length 1 left out)" if 1 in (*mine.shape, *ref.shape) else ""
    mine, ref, tau = mine.squeeze(), ref.squeeze(), tau.squeeze()
    _, *others = itertools.permutations(range(ref.ndim)) if ref.ndim <= _MOST_AXES else ((),)
    for axes in others:
        if _within(mine, ref.transpose(axes), tau.transpose(axes)):
            return (f"the transpose of REF{left_out}" if axes == (1, 0) else
                    f"REF with its axes in the order {list(axes)}{left_out}")
    return ""


def _multiple(mine: numpy.ndarray, ref: numpy.ndarray, tau: numpy.ndarray, sizes: Mapping[str, int]) -> str:
    """MINE = c REF with the c of least squares, whose error is at most sum(|REF| tau) / sum(REF^2)."""
    if not mine.any() and bool((abs(ref) > tau).any()):
        return "zero everywhere"
    largest = abs(ref).max()
    if largest == 0:
        return ""
    mine, ref, tau = mine / largest, ref / largest, tau / largest  # so that no square underflows
    square = float((ref * ref).sum())
    c = float((mine * ref).sum()) / square
    slack = max(1.0, abs(c)) * tau
    error = float((abs(ref) * slack).sum()) / square
    if c == 0 or not math.isfinite(c) or not _within(mine, c * ref, slack + abs(ref) * error):
        return ""
    name = _name_of(c, error, sizes)
    if ref.size == 1 and not name:
        return ""  # a single number is a multiple of any other
    certain = -math.log10(max(error / abs(c), 2.0 ** -53))
    digits = math.ceil(min(9, max(1, certain, 1 - math.log10(abs(c - 1) or 1))))  # enough to tell c from 1
    return f"MINE = {c:.{digits}g} x REF" + (f", and that is {name}" if name else "")


def _name_of(c: float, error: float, sizes: Mapping[str, int]) -> str:
    """At most three names of c: -1, or 2 or a size to the power 1, -1, 1/2 or -1/2, if c equals it within its error."""
    known = {"-1": -1.0}
    for name, size in {"2": 2, **sizes}.items():
        known.update({name: float(size), f"1/{name}": 1 / size, f"sqrt({name})": math.sqrt(size),
                      f"1/sqrt({name})": 1 / math.sqrt(size)})
    names = [name for name, value in known.items() if abs(c - value) <= error]
    return " or ".join(names[:3])


def _order(mine: numpy.ndarray, ref: numpy.ndarray, tau: numpy.ndarray) -> str:
    """Rows along one axis in another order: matched by their products with a random vector, then compared in full."""
    rng = numpy.random.default_rng(0)
    for axis in range(ref.ndim):
        n = ref.shape[axis]
        a, b = (numpy.moveaxis(x, axis, 0).reshape(n, -1) for x in (mine, ref))
        if n < 2:
            continue
        direction = rng.standard_normal(a.shape[1])
        order = numpy.empty(n, numpy.int64)
        order[numpy.argsort(a @ direction, kind="stable")] = numpy.argsort(b @ direction, kind="stable")
        if _within(mine, numpy.take(ref, order, axis), numpy.take(tau, order, axis)):
            shown = ", ".join(str(i) for i in order[:8])
            return f"REF in another order along axis {axis}: MINE holds REF's [{shown}{', ...' if n > 8 else ''}]"
    return ""


def _shift(mine: numpy.ndarray, ref: numpy.ndarray, tau: numpy.ndarray) -> str:
    """One vector added to every row: the difference is the same in all rows."""
    if ref.ndim < 2 or ref.size == ref.shape[-1]:
        return ""
    difference = (mine - ref).reshape(-1, ref.shape[-1])
    slack = tau.reshape(difference.shape)
    if (abs(difference - difference[:1]) <= slack + slack[:1]).all():
        return "REF with one vector added to every row (a bias, or something else that all rows share)"
    return ""
