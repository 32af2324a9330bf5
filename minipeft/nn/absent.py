"""The place of a bias that a linear layer lacks: y = x W^T, and y = x W^T + b where a method adds a b there.

It is a slot of kind "absent bias", called "<layer>.bias". `named_places` lists it, so that a method can choose it;
`slots` does not, because the model has no weight there. It has no array, so no file, count or fingerprint knows of it.
"""
from __future__ import annotations

from typing import Any

from minipeft.backend import Array, xp
from minipeft.engine.tensor import Tensor
from minipeft.nn.slot import Slot

ABSENT = "absent bias"


class Absent:
    """The weight in the place of a bias that is not there: zeros [d_out], without an array. of: the slot of the matrix
    [d_out, d_in] beside it."""

    drops = False

    def __init__(self, of: Slot):
        self._of = of

    @property
    def arrays(self) -> dict:
        """None: {}."""
        return {}

    @property
    def shape(self) -> tuple:
        """[d_out], that of the bias of such a layer."""
        return self._of.shape[:1]

    @property
    def dtype(self) -> Any:
        """The dtype of the matrix beside it."""
        return self._of.dtype

    def dense(self) -> Tensor:
        """Zeros [d_out]."""
        return Tensor(xp.zeros(self.shape, dtype=self.dtype))

    vector = dense

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """Raises TypeError: a bias [d_out] is no matrix."""
        raise TypeError("a bias is added, not multiplied by")

    def rows(self, ids: Array) -> Tensor:
        """Raises TypeError: a bias [d_out] is no table."""
        raise TypeError("a bias has no rows to look up")


def absent_bias(weight: Slot) -> Slot:
    """The place of the bias [d_out] that the layer with this `weight` [d_out, d_in] lacks."""
    return Slot(ABSENT, Absent(weight))


def is_absent(place: Any) -> bool:
    """Whether nothing is at `place` unless a method puts it there."""
    return place.kind == ABSENT
