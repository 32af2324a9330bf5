"""How arrays lie in memory. This changes no number, and matters for speed alone."""
from __future__ import annotations

from minipeft.backend import xp
from minipeft.engine.tensor import op


@op
def key_first(bias):
    """The same bias [batch, heads, query, key], laid out in memory as `attention` lays out its scores;   dbias = g."""
    laid = xp.ascontiguousarray(bias.transpose(0, 3, 1, 2))               # [batch, key, heads, query]
    return laid.transpose(0, 2, 3, 1), (lambda g: g,)
