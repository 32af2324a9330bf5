"""Multi-head attention, its masks, and the cache of keys and values for decoding.

    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V            Vaswani et al., 2017, arXiv:1706.03762, eq. (1)
    MultiHead = Concat(head_1, ..., head_h) W^O,   head_i = Attention(x W_i^Q, m W_i^K, m W_i^V)      sec. 3.2.2

The projections of all heads are one matrix each: q, k, v [heads * d_k, d_model], o [d_model, heads * d_k].
"""
from __future__ import annotations

import math
from typing import Any

from minipeft.engine.tensor import Tensor, array_of
from minipeft.backend import Array, xp
from minipeft.nn.layers import Linear
from minipeft.nn.module import Module
from minipeft.nn.site import Site
from minipeft.engine.ops import add, attention
from minipeft.engine.ops.drop import dropout_mask


class KeyValues:
    """Keys and values of one attention, kept between decoding steps: [batch, capacity, heads * d], `length` in use.

    capacity: the largest length. A self-attention appends the keys and values of each new token. A cross-attention
    stores those of the encoder's output once (`fixed`)."""

    def __init__(self, capacity: int, fixed: bool = False):
        self.capacity, self.fixed, self.length = capacity, fixed, 0
        self.k: Array = None
        self.v: Array = None

    @property
    def complete(self) -> bool:
        """Whether it is fixed and already filled, so that no keys and values need to be projected."""
        return self.fixed and self.length > 0

    def extend(self, k: Tensor, v: Tensor) -> None:
        """Append the keys k and the values v [batch, time, heads * d] to those in use. Raises ValueError if they do not
        fit into the capacity."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} keys and values; expected at most the capacity of the cache, {self.capacity}")
        if self.k is None:
            batch = k.shape[0]
            self.k = xp.empty((batch, self.capacity, k.shape[2]), dtype=k.dtype)
            self.v = xp.empty((batch, self.capacity, v.shape[2]), dtype=v.dtype)
        self.k[:, self.length:end], self.v[:, self.length:end] = array_of(k), array_of(v)
        self.length = end

    def read(self) -> tuple[Array, Array]:
        """The keys and values in use, [batch, length, heads * d] each."""
        return self.k[:, :self.length], self.v[:, :self.length]


class Attention(Module):
    """Multi-head attention with a keys and values site, and a sublayer site at its output.

    q, k, v, o: the four projections. heads: how many. scale: the factor on the scores, d_k^-1/2 in the paper, 1 in T5
    (whose initialization of q absorbs it). p: the rate of the dropout on the probabilities."""

    def __init__(self, q: Linear, k: Linear, v: Linear, o: Linear, heads: int, scale: float, p: float):
        self.q, self.k, self.v, self.o = q, k, v, o
        self.keys_values = Site("keys_values", k.weight.shape[0], k.weight.dtype)
        self.out = Site("sublayer", o.weight.shape[0], o.weight.dtype)
        self.heads, self.scale, self.p = heads, scale, p

    def __call__(self, x: Any, source: Any, bias: Any = None, rng: Any = None,
                 cache: KeyValues | None = None, mask: Any = None) -> Tensor:
        """x [batch, query, d_model], source [batch, key, d_model] -> [batch, query, d_model].

        source: the input of k and v, x itself or the encoder's output. cache: keeps the keys and values, or has them
        all already. bias (relative positions) and mask (from `additive`) broadcast to the scores [batch, heads,
        query, key] and are added to them. They stay apart, because their sum would be as large as the scores. Only a
        keys and values site, which may change the number of keys, receives their sum, as one bias."""
        q = self.q(x, rng)
        if cache is None:
            k, v = self.k(source, rng), self.v(source, rng)
        else:
            if not cache.complete:
                cache.extend(self.k(source, rng), self.v(source, rng))
            k, v = cache.read()
        if self.keys_values.used:
            k, v, bias = self.keys_values(k, v, _sum(bias, mask))
            mask = None
        keep = None
        if rng is not None and self.p:
            shape = (q.shape[0], self.heads, q.shape[1], array_of(k).shape[1])
            keep = dropout_mask(shape, self.p, rng, q.dtype)
        return self.o(attention(q, k, v, bias, keep, mask, heads=self.heads, scale=self.scale), rng)


def causal(queries: int, keys: int) -> Array:
    """[1, 1, queries, keys]: True where a query may look, at itself and before. The last query is at the last key."""
    return xp.tri(queries, keys, keys - queries, dtype=bool)[None, None]


def additive(mask: Array | None, dtype: Any) -> Array | None:
    """An array to add to scores: 0 where the boolean `mask` [...] is True and -inf elsewhere, in `dtype`.

    Minus infinity hides a key whatever its score is, even when two masks hide it. A query that may look nowhere gives
    a uniform average and not NaN (`engine.ops.attention`)."""
    if mask is None:
        return None
    return xp.where(mask, xp.zeros((), dtype), xp.full((), -math.inf, dtype))


def _sum(a: Any, b: Any) -> Any:
    return a if b is None else b if a is None else add(a, b)
