"""Differences that are added to a frozen weight: of the whole, of some rows, of single elements.

    W = W0 + d                  Delta         d of the shape of W0
    W = W0 + P_rows^T d         RowDelta      d [n, d_in], at the rows whose ids are given
    W = W0 + scatter(d, i)      MaskedDelta   d [n], at the flat indices i [n]

All start at 0. W is formed anew at each use, a sum of the size of W beside the product, and kept for dx; lookups of a
Delta and a RowDelta add up only the rows that they look up.
"""
from __future__ import annotations

from typing import Sequence

import numpy

from minipeft.autograd.tensor import Tensor
from minipeft.backend import Array, to_device, to_host, xp
from minipeft.nn import init
from minipeft.nn.weight import Constant, Parameter, Reparam, Weight
from minipeft.ops import add, concat, embedding, reshape, scatter


class Delta(Reparam):
    """W0 + d."""

    def __init__(self, base: Weight):
        self.base, self.d = base, Parameter(init.zeros(tuple(base.shape), base.dtype))

    def dense(self) -> Tensor:
        return add(self.base.dense(), self.d)

    def rows(self, ids: Array) -> Tensor:
        """W0[ids] + d[ids]."""
        return add(self.base.rows(ids), embedding(self.d, ids))


class RowDelta(Reparam):
    """W0 with d added at `rows`, ascending.   d [n, d_in]."""

    def __init__(self, base: Weight, rows: Sequence[int]):
        vocab, d_in = base.shape
        self.base, self.d = base, Parameter(init.zeros((len(rows), d_in), base.dtype))
        self._flat = (numpy.array(rows)[:, None] * d_in + numpy.arange(d_in)).reshape(-1)
        self._place = numpy.full(vocab, len(rows))  # of each id in d; len(rows) for those that are not trained
        self._place[list(rows)] = numpy.arange(len(rows))

    def dense(self) -> Tensor:
        return add(self.base.dense(), scatter(reshape(self.d, shape=(-1,)), to_device(self._flat), shape=self.shape))

    def rows(self, ids: Array) -> Tensor:
        """W0[ids] + [d; 0][place of ids in d]."""
        padded = concat(self.d, xp.zeros((1, self.shape[1]), dtype=self.dtype), axis=0)
        return add(self.base.rows(ids), embedding(padded, to_device(self._place[to_host(ids)])))


class MaskedDelta(Reparam):
    """W0 + scatter(d, i).   d [n], indices [n], ascending, which are stored with d (four bytes each, up to 2^31)."""

    def __init__(self, base: Weight, indices: numpy.ndarray):
        self.base, self.indices = base, Constant(to_device(indices))
        self.d = Parameter(init.zeros(indices.shape, base.dtype))

    def dense(self) -> Tensor:
        return add(self.base.dense(), scatter(self.d, self.indices.data, shape=self.shape))
