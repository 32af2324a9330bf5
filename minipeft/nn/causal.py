"""The blocks of a model without an encoder: grouped-query attention with rotary positions, then a feed-forward.

    x + o(attention(rotate(q(n)), rotate(k(n)), v(n)))      n = norm(x)           Touvron et al., 2023, arXiv:2302.13971
    x + ff(n)                                               n = norm(x)
    query head h reads the key/value head h // (heads / kv_heads)                 Ainslie et al., 2023, arXiv:2305.13245

Keys and values are never repeated: the queries of all heads that share a key/value head are laid one behind the other
along the axis of queries, and attend to it as one head. So no copy of keys and values is made, and the matrix products
are fewer and larger.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.backend import Array, to_host, xp
from minipeft.engine.ops import add, attention, concat, key_first, reshape, rotate
from minipeft.engine.ops.drop import dropout_mask
from minipeft.engine.tensor import Tensor, array_of
from minipeft.nn.attention import KeyValues, additive, causal
from minipeft.nn.layers import FeedForward, Linear, RMSNorm
from minipeft.nn.module import Module
from minipeft.nn.positions import positions_of
from minipeft.nn.rotary import Rotary, Rotation
from minipeft.nn.site import Site


class GroupedAttention(Module):
    """Causal self-attention with kv_heads heads of keys and values, with a keys and values site and a sublayer site.

    q [heads * d, d_model], k and v [kv_heads * d, d_model], o [d_model, heads * d]: the projections. norms: of each
    head of q and of each head of k, [d] each (Qwen 3), or None. p: the rate of the dropout on the probabilities."""

    def __init__(self, q: Linear, k: Linear, v: Linear, o: Linear, heads: int, kv_heads: int,
                 norms: tuple[RMSNorm, RMSNorm] | None, p: float):
        self.q, self.k, self.v, self.o = q, k, v, o
        if norms is not None:
            self.q_norm, self.k_norm = norms
        self.keys_values = Site("keys_values", k.weight.shape[0], k.weight.dtype)
        self.out = Site("sublayer", o.weight.shape[0], o.weight.dtype)
        self.heads, self.kv_heads, self.p = heads, kv_heads, p
        self.head_dim, self.normed = q.weight.shape[0] // heads, norms is not None

    def __call__(self, x: Any, rotation: Rotation, mask: Any = None, rng: Any = None,
                 cache: KeyValues | None = None) -> Tensor:
        """x [batch, query, d_model] -> the same shape.

        rotation: that of the positions of x (`Rotary.rotation`). mask: of `unseen`, added to the scores. cache: keeps
        the keys, normed and rotated, and the values."""
        q, k, v = self.q(x, rng), self.k(x, rng), self.v(x, rng)
        if self.normed:
            q, k = self._by_head(self.q_norm, q), self._by_head(self.k_norm, k)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            cache.extend(k, v)
            k, v = cache.read()
        times, queries, bias = self.heads // self.kv_heads, q.shape[1], None
        if self.keys_values.used:
            k, v, bias = self.keys_values(k, v, None if mask is None else mask[:, :, :queries])
            bias, mask = bias_together(bias, self.kv_heads, times, queries), None
        keep = None
        if rng is not None and self.p:
            keep = dropout_mask((len(q), self.kv_heads, times * queries, k.shape[1]), self.p, rng, q.dtype)
        mixed = attention(together(q, self.kv_heads, times), k, v, bias, keep, mask, heads=self.kv_heads,
                          scale=self.head_dim ** -0.5)
        return self.o(apart(mixed, self.kv_heads, times), rng)

    def _by_head(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """norm of every head of x [batch, time, heads * d]."""
        batch, time, width = x.shape
        heads = width // self.head_dim
        return norm(x.reshape(batch, time * heads, self.head_dim)).reshape(batch, time, width)


def together(q: Any, kv_heads: int, times: int) -> Tensor:
    """q [batch, query, kv_heads * times * d] -> [batch, times * query, kv_heads * d]: the `times` heads that share a
    head of `kv_heads` one behind the other, along the queries."""
    if times == 1:
        return q
    batch, queries, width = q.shape
    split = q.reshape(batch, queries, kv_heads, times, width // (kv_heads * times))
    return split.transpose(0, 3, 1, 2, 4).reshape(batch, times * queries, width // times)


def apart(mixed: Any, kv_heads: int, times: int) -> Tensor:
    """The inverse of `together` for the same kv_heads and times: mixed [batch, times * query, kv_heads * d] -> [batch,
    query, kv_heads * times * d]."""
    if times == 1:
        return mixed
    batch, rows, width = mixed.shape
    split = mixed.reshape(batch, times, rows // times, kv_heads, width // kv_heads)
    return split.transpose(0, 2, 3, 1, 4).reshape(batch, rows // times, width * times)


def bias_together(bias: Any, kv_heads: int, times: int, queries: int) -> Any:
    """bias [1 or batch, 1 or heads, 1 or query, key] -> [1 or batch, 1 or kv_heads, 1 or times * query, key], in the
    order of `together`. None stays None. kv_heads, times, queries: how many."""
    if bias is None or times == 1 or (bias.shape[1] == 1 and bias.shape[2] == 1):
        return bias
    if bias.shape[1] == 1:
        return concat(*[bias] * times, axis=2)
    batch, heads, given, keys = bias.shape
    if given < queries:
        bias = add(bias, xp.zeros((1, 1, queries, 1), dtype=bias.dtype))
    return reshape(bias, shape=(batch, kv_heads, times * queries, keys))


class CausalBlock(Module):
    """Attention, then the feed-forward, each pre-LN. attn, attn_norm, ff, ff_norm: as in `nn.blocks.Block`."""

    def __init__(self, attn: GroupedAttention, attn_norm: RMSNorm, ff: FeedForward, ff_norm: RMSNorm):
        self.attn, self.attn_norm, self.ff, self.ff_norm = attn, attn_norm, ff, ff_norm

    def __call__(self, x: Any, rotation: Rotation, mask: Any = None, rng: Any = None,
                 cache: KeyValues | None = None) -> Tensor:
        """x [batch, time, d_model] -> the same shape; rotation, mask, rng and cache as in `GroupedAttention`."""
        n = self.attn_norm(x)
        x = add(x, self.attn.out(x, n, self.attn(n, rotation, mask, rng, cache)))
        n = self.ff_norm(x)
        return add(x, self.ff.out(x, n, self.ff(n, rng)))


class CausalStack(Module):
    """An input site, blocks, and a final norm. position: the rotary positions. input: the input site."""

    def __init__(self, blocks: list[CausalBlock], norm: RMSNorm, position: Rotary, input: Site):
        self.input = input
        self.position = position
        self.blocks = blocks
        self.norm = norm
        for block in blocks:  # a piece there may add keys, and need their place
            block.attn.keys_values.position = position

    def __call__(self, x: Any, mask: Array | None = None, rng: Any = None,
                 cache: list[KeyValues] | None = None) -> Tensor:
        """x [batch, time, d_model], behind the input site -> hidden states of the same shape.

        mask [batch, key] is True at tokens. A row counts its positions from its first True, so padding on the left
        changes nothing but the last places of a float. With a `cache`, one for each block, x continues the tokens that
        are in it, and the mask covers those too."""
        start, time = cache[0].length if cache else 0, array_of(x).shape[1]
        positions = positions_of(mask, 0, start + time)[..., start:]
        rotation = self.position.rotation(positions)
        attn = self.blocks[0].attn
        hidden = unseen(mask, time, start + time, attn.heads // attn.kv_heads, array_of(x).dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, hidden, rng, cache[i] if cache else None)
        return self.norm(x)


def unseen(mask: Array | None, queries: int, keys: int, times: int, dtype: Any) -> Any:
    """What is added to the scores of all blocks, in `dtype`: -inf where the mask [batch, key] hides the key, and where
    the key comes later than the query, for the last `queries` of the `keys` positions. [1 or batch, 1, 1 or times *
    query, key], the queries once for each of the `times` heads, as in `together`; made once, and laid out as the scores
    are. None if nothing is hidden."""
    seen = None if mask is None or to_host(mask).all() else mask[:, None, None, :]
    if queries > 1:
        seen = causal(queries, keys) if seen is None else seen & causal(queries, keys)
    if seen is None:
        return None
    return key_first(xp.concatenate([additive(seen, dtype)] * (times if queries > 1 else 1), axis=2)).data


def to_the_right(x: Any, mask: Array) -> tuple[Array, Array]:
    """Each row of the array x [batch, time, ...] and of its mask [batch, time] with the padding behind its last token
    moved to its front, so that new tokens can follow."""
    last = mask.shape[1] - to_host(mask)[:, ::-1].argmax(axis=1)  # [batch]: 1 + the column of the last token
    order = (numpy.arange(mask.shape[1]) + last[:, None]) % mask.shape[1]
    return _rows_in(x, order), _rows_in(mask, order)


def _rows_in(x: Array, order: numpy.ndarray) -> Array:
    """x [batch, time, ...] with the columns of each row in the order [batch, time]."""
    return x[xp.arange(len(x))[:, None], xp.asarray(order)]
