"""Positions of tokens, added to embeddings (sinusoidal, learned) or to attention scores (T5's buckets).

Every kind has two methods. `embed` gives the term for embeddings [batch, time, d_model], `bias` the term for scores
[batch, heads, query, key]. One of them gives None. Positions are integers on the host, [time], or [batch, time] where
rows of a batch are padded on the left. `start` is the position of the first query. It is not 0 when decoding continues
from a cache.

A row's positions start at its first real token: padding on the left takes no position, a hole in the mask takes one.
"""
from __future__ import annotations

import math
from typing import Any

import numpy

from minipeft.engine.tensor import Tensor
from minipeft.backend import Array, to_device, to_host
from minipeft.nn.module import Module
from minipeft.nn.slot import Slot
from minipeft.engine.ops import toeplitz


def positions_of(mask: Array | None, start: int, time: int) -> numpy.ndarray:
    """start, start + 1, ... [time]; [batch, time] for a mask [batch, time] that hides columns on the left of some row.
    In that case each row counts from its first True, and the hidden columns before it have position 0."""
    columns = numpy.arange(start, start + time)
    if mask is None:
        return columns
    padding = to_host(mask).argmax(axis=1)  # 0 for a row of padding alone
    return numpy.maximum(columns - padding[:, None], 0) if padding.any() else columns


class Sinusoidal(Module):
    """PE[p, 2i] = sin(p / 10000^(2i/d)),  PE[p, 2i+1] = cos(the same), with d = d_model, in `dtype`.

    Vaswani et al., 2017, arXiv:1706.03762, sec. 3.5."""

    def __init__(self, d_model: int, dtype: Any):
        self.d_model, self.dtype = d_model, numpy.dtype(dtype)

    def embed(self, positions: numpy.ndarray) -> Array:
        """positions [..., time] -> [..., time, d_model]."""
        angle = positions[..., None] / 10000 ** (numpy.arange(0, self.d_model, 2) / self.d_model)
        table = numpy.empty((*positions.shape, self.d_model))
        table[..., 0::2] = numpy.sin(angle)
        table[..., 1::2] = numpy.cos(angle[..., :self.d_model // 2])
        return to_device(table.astype(self.dtype))

    def bias(self, queries: int, keys: int, start: int) -> None:
        """None, whatever queries, keys and start are: positions are in the embeddings."""
        return None


class Learned(Module):
    """A table of positions, trained like any weight.   weight [max_length, d_model]."""

    def __init__(self, weight: Array):
        self.weight = Slot("position", weight)

    def embed(self, positions: numpy.ndarray) -> Tensor:
        """positions [time] -> [time, d_model], or [batch, time, d_model] when rows see different entries; positions
        [batch, time] -> [batch, time, d_model].

        Raises ValueError for positions beyond the table."""
        last, length = int(positions.max()), self.weight.base.shape[0]
        if last >= length:
            raise ValueError(f"the input, with any prompt in front of it, reaches position {last}; "
                             f"the table of learned positions ends at {length - 1} (config.max_length)")
        ids = to_device(positions)
        return self.weight.table(ids) if positions.ndim == 1 else self.weight.rows(ids)

    def bias(self, queries: int, keys: int, start: int) -> None:
        """None, whatever queries, keys and start are: positions are in the embeddings."""
        return None


class RelativeBuckets(Module):
    """T5's relative position bias: a learned number per head and bucket of the distance key - query.

    Raffel et al., 2020, arXiv:1910.10683, sec. 2.1.   weight [buckets, heads]; one table for a whole stack.
    max_distance, bidirectional: as in `bucket`."""

    def __init__(self, weight: Array, max_distance: int, bidirectional: bool):
        self.weight = Slot("position", weight)
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def embed(self, positions: numpy.ndarray) -> None:
        """None, for positions [time] and [batch, time] alike: positions enter through the scores."""
        return None

    def bias(self, queries: int, keys: int, start: int) -> Tensor:
        """[1, heads, queries, keys], or [batch, heads, queries, keys] when rows see different entries. start: the
        position of the first query. The result is a view of queries + keys - 1 numbers per head, one per distance."""
        distances = numpy.arange(keys - 1 - start, -queries - start, -1)                  # of the last key first
        ids = bucket(distances, self.weight.base.shape[0], self.max_distance, self.bidirectional)
        return toeplitz(self.weight.table(to_device(ids)), queries=queries)


def bucket(distance: numpy.ndarray, buckets: int, max_distance: int, bidirectional: bool) -> numpy.ndarray:
    """The bucket of each distance = key - query, [...] -> [...]. A small distance has a bucket to itself; larger ones
    share buckets that widen logarithmically. On each side, all beyond max_distance share one.

    buckets: how many. bidirectional: half of them are for keys to the right, half for the others. Otherwise (causal)
    keys to the right count as distance 0."""
    first = numpy.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first, n = buckets * (distance > 0), abs(distance)
    else:
        n = numpy.maximum(-distance, 0)
    exact = buckets // 2
    ratio = numpy.maximum(n, exact).astype(numpy.float32) / numpy.float32(exact)
    log = numpy.log(ratio.astype(numpy.float64)).astype(numpy.float32)  # rounded to float32, like the reference:
    far = log / numpy.float32(math.log(max_distance / exact)) * numpy.float32(buckets - exact)  # decisive at edges
    return first + numpy.where(n < exact, n, numpy.minimum(exact + far.astype(numpy.int64), buckets - 1))
