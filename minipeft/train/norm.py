"""The length of all gradients as one vector, sqrt(sum of squares), also where squares underflow or overflow.

In float32 the square of 8e-26 is 0, and that of 1e20 is infinity. Where squares may have been lost, the sum is taken
again, of the squares of g / max |g|, in float64. Everywhere else the plain sum is taken, and nothing is copied.
"""
from __future__ import annotations

import math
from typing import Mapping

import numpy

from minipeft.backend import Array, to_host, xp


def global_norm(grads: Mapping[str, Array]) -> float:
    """The length of all gradients grads, {name: array}, as one vector; not finite if one of them is not."""
    arrays = [xp.asarray(g) for g in grads.values()]
    with numpy.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = xp.stack([xp.asarray((g * g).sum()) for g in arrays])  # one copy to the host, not one each
    found = to_host(squares).tolist()
    if math.isfinite(total := sum(found)) and total >= sum(map(_lost, arrays)):
        return math.hypot(*map(math.sqrt, found))
    return _scaled([g for g in arrays if g.size])


def _lost(g: Array) -> float:
    """If the sum of an array's squares is below this, squares lost to underflow could change it."""
    if g.dtype.kind != "f":
        return 0.0
    limits = xp.finfo(g.dtype)
    return g.size * float(limits.tiny) / float(limits.eps)


def _scaled(arrays: list[Array]) -> float:
    sizes = [float(to_host(abs(g).max())) for g in arrays]
    largest = math.nan if any(map(math.isnan, sizes)) else max(sizes, default=0.0)
    if largest == 0 or not math.isfinite(largest):
        return largest
    parts = [g.astype("float64") / largest for g in arrays]
    return largest * math.sqrt(math.fsum(float(to_host((part * part).sum())) for part in parts))
