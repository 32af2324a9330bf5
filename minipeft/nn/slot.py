"""A slot is a place for a weight: a base, and over it the entries of the plugged attachments, one over the other.

    base W0        entry a: W = f_a(W0)        entry b: W = f_b(f_a(W0))         fold() gives the topmost weight

    project, rows, vector     of the topmost weight                              layers call these
    merged entry              a constant, computed once from the weight below    the base array is kept beside it

No move writes to the base array, so unplugging and unmerging give back every bit of it.
"""
from __future__ import annotations

from typing import Any

from minipeft.backend import Array
from minipeft.engine.ops import reshape
from minipeft.engine.tensor import Tensor, array_of
from minipeft.nn.place import Place
from minipeft.nn.routing import by_row, per_row
from minipeft.nn.state import Entry, Names
from minipeft.nn.weight import Parameter, Weight


class Slot(Place):
    """A place for a weight. kind: "linear" or "embedding" [d_out, d_in], "bias", "norm" or "absent bias" [d],
    or "position", [positions, d] or T5's [buckets, heads]. base: the array, or a Weight that stands for it."""

    def __init__(self, kind: str, base: Any):
        super().__init__(kind)
        self.base: Weight = base if hasattr(base, "dense") else Parameter(base)

    @property
    def shape(self) -> tuple:
        """The shape of the base, [d_out, d_in] or [d]."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the base, in which the slot computes."""
        return self.base.dtype

    def compose(self, entries: tuple[Entry, ...]) -> Weight:
        """The base, then each of `entries` (bottom first) over the weight below it; a merged entry is its constant.
        Raises ValueError where one cannot lie above another (see `Reparam.over`)."""
        weight = self.base
        for entry in entries:
            weight = entry.merged if entry.merged is not None else entry.piece.over(weight)
        return weight

    def fold(self, names: Names | None = None) -> Weight:
        """The base under all plugged entries, or under those of the attachments `names` alone, in that order."""
        state = self.host.now
        entries = state.entries if names is None else state.laid((name, 1) for name in names)
        return self.compose(entries.get(self, ()))

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x [batch, time, d_in] -> x W^T [batch, time, d_out]. rng: a generator in training, for dropout."""
        return by_row(self, lambda weight, x: weight.project(x, rng), x)

    def rows(self, ids: Any) -> Tensor:
        """ids [batch, time] -> W[ids] [batch, time, d_in]."""
        return by_row(self, lambda weight, ids: weight.rows(array_of(ids)), ids)

    def table(self, ids: Array) -> Tensor:
        """W[ids] for ids [...] that all rows of the batch share: [..., d_in], or [batch, ..., d_in] when rows see
        different entries."""
        return per_row(self, lambda weight: weight.rows(ids))

    def vector(self) -> Tensor:
        """[d], or [batch, 1, d] when rows see different entries."""
        v = per_row(self, lambda weight: weight.vector())
        return v if v.ndim == 1 else reshape(v, shape=(v.shape[0], 1, v.shape[1]))
