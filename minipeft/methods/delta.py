"""Differences that are added to a frozen weight: of the whole, of some rows, of single elements.

    W = W0 + d                  Delta         d of the shape of W0
    W = W0 + P_rows^T d         RowDelta      d [n, d_in], at the rows whose ids are given
    W = W0 + scatter(d, i)      MaskedDelta   d [n], at the flat indices i [n]

All start at 0. W is formed anew at each use, a sum of the size of W beside the product, and kept for dx; lookups of a
Delta and a RowDelta add up only the rows that they look up. Where a weight below asks for dropout, the product is taken
of both terms apart, so that the dropout acts on the lower one as it would alone.
"""
from __future__ import annotations

from typing import Any, Sequence

import numpy

from minipeft.engine.tensor import Tensor
from minipeft.backend import Array, to_device, to_host, xp
from minipeft.nn import init
from minipeft.nn.weight import Constant, Parameter, Reparam, Weight
from minipeft.engine.ops import add, concat, embedding, linear, reshape, scatter


class Added(Reparam):
    """W0 + `change()`, a tensor of the shape of W0."""

    def change(self) -> Any:
        raise TypeError(f"{type(self).__name__} does not define change()")

    def dense(self) -> Tensor:
        return add(self.base.dense(), self.change())

    def project(self, x: Any, rng: Any = None) -> Tensor:
        if rng is None or not self.base.drops:
            return linear(x, self.dense())
        return add(self.base.project(x, rng), linear(x, self.change()))


class Delta(Added):
    """W0 + d."""

    def __init__(self, base: Weight):
        self.base, self.d = base, Parameter(init.zeros(tuple(base.shape), base.dtype))

    def change(self) -> Parameter:
        return self.d

    def rows(self, ids: Array) -> Tensor:
        """W0[ids] + d[ids]."""
        return add(self.base.rows(ids), embedding(self.d, ids))


class RowDelta(Added):
    """W0 with d added at `rows`, ascending.   d [n, d_in]."""

    def __init__(self, base: Weight, rows: Sequence[int]):
        vocab, d_in = base.shape
        self.base, self.d = base, Parameter(init.zeros((len(rows), d_in), base.dtype))
        self._flat = (numpy.array(rows)[:, None] * d_in + numpy.arange(d_in)).reshape(-1)
        self._place = numpy.full(vocab, len(rows))  # of each id in d; len(rows) for those that are not trained
        self._place[list(rows)] = numpy.arange(len(rows))

    def change(self) -> Tensor:
        return scatter(reshape(self.d, shape=(-1,)), to_device(self._flat), shape=self.shape)

    def rows(self, ids: Array) -> Tensor:
        """W0[ids] + [d; 0][place of ids in d]."""
        padded = concat(self.d, xp.zeros((1, self.shape[1]), dtype=self.dtype), axis=0)
        return add(self.base.rows(ids), embedding(padded, to_device(self._place[to_host(ids)])))


class MaskedDelta(Added):
    """W0 + scatter(d, i).   d [n], indices [n], ascending, which are stored with d (four bytes each, up to 2^31)."""

    def __init__(self, base: Weight, indices: numpy.ndarray):
        self.base, self.indices = base, Constant(to_device(indices))
        self.d = Parameter(init.zeros(indices.shape, base.dtype))

    def change(self) -> Tensor:
        return scatter(self.d, self.indices.data, shape=self.shape)
