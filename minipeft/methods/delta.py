"""Differences that are added to a frozen weight: to the whole, to some rows, to single elements.

    W = W0 + d                  Delta         d of the shape of W0
    W = W0 + P_rows^T d         RowDelta      d [n, d_in], at n given rows; P_rows [n, d_out] chooses these rows
    W = W0 + scatter(d, i)      MaskedDelta   d [n], at the flat indices i [n]

All start at 0. Every product with x forms W again, a sum of the size of W, and keeps it for dx. Lookups in a Delta and
a RowDelta add only the rows that they look up. Where a weight below has dropout, x is multiplied by both terms
separately, so that the dropout acts on the lower term alone.
"""
from __future__ import annotations

from typing import Any, Sequence

import numpy

from minipeft.backend import Array, to_device, to_host, xp
from minipeft.engine.ops import concat, embedding, linear, scatter
from minipeft.engine.tensor import Tensor
from minipeft.nn.weight import Fixed, Parameter, Reparam


class Added(Reparam):
    """W0 + `change()`."""

    def change(self) -> Any:
        """The difference, of the shape of W0. Raises TypeError unless a subclass defines it."""
        raise TypeError(f"{type(self).__name__} does not define change()")

    def dense(self) -> Tensor:
        return self.base.dense() + self.change()

    def project(self, x: Any, rng: Any = None) -> Tensor:
        if rng is None or not self.base.drops:
            return linear(x, self.dense())
        return self.base.project(x, rng) + linear(x, self.change())


class Delta(Added):
    """W0 + d."""

    d: Parameter

    def change(self) -> Parameter:
        return self.d

    def rows(self, ids: Array) -> Tensor:
        """W0[ids] + d[ids]."""
        return self.base.rows(ids) + embedding(self.d, ids)


class RowDelta(Added):
    """W0 with d [n, d_in] added to its n rows `ids`, ascending. shape: that of W0, [vocab, d_in]."""

    d: Parameter

    def __init__(self, d: Parameter, ids: Sequence[int], shape: tuple[int, int]):
        vocab, d_in = shape
        super().__init__(d=d)
        self._flat = (numpy.array(ids)[:, None] * d_in + numpy.arange(d_in)).reshape(-1)
        self._row = numpy.full(vocab, len(ids))  # the row in d of each id; len(ids) if it is not trained
        self._row[list(ids)] = numpy.arange(len(ids))

    def change(self) -> Tensor:
        """d at its rows, 0 elsewhere: [vocab, d_in]."""
        return scatter(self.d.reshape(-1), to_device(self._flat), shape=self.shape)

    def rows(self, ids: Array) -> Tensor:
        """W0[ids] + [d; 0][rows of ids in d], where ids [...] that are not trained take the row of zeros."""
        padded = concat(self.d, xp.zeros((1, self.shape[1]), dtype=self.dtype), axis=0)
        return self.base.rows(ids) + embedding(padded, to_device(self._row[to_host(ids)]))


class MaskedDelta(Added):
    """W0 + scatter(d, i).   d [n]; i: `indices` [n], ascending, stored with d (as int32 if W has < 2^31 elements)."""

    d: Parameter
    indices: Fixed

    def change(self) -> Tensor:
        """d at its indices, 0 elsewhere: [d_out, d_in] or [d]."""
        return scatter(self.d, self.indices, shape=self.shape)
