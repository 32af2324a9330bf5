"""The residual block and the stack of them, written once for both models, encoder and decoder.

    pre-LN     x + drop(F(norm(x)))          T5; Xiong et al., 2020, arXiv:2002.04745
    post-LN    norm(x + drop(F(x)))          Vaswani et al., 2017, sec. 3.1 and 5.4

F is self-attention, then (in a decoder) attention to the encoder's output, then the feed-forward. A site of kind
"sublayer" sees (x, what F read, drop(F)) before the residual is added.
"""
from __future__ import annotations

from typing import Any, Callable

from minipeft.engine.tensor import Tensor, array_of
from minipeft.backend import Array
from minipeft.nn.attention import Attention, KeyValues, additive, causal
from minipeft.nn.layers import FeedForward, LayerNorm, RMSNorm
from minipeft.nn.module import Module
from minipeft.nn.positions import Learned, RelativeBuckets, Sinusoidal, positions_of
from minipeft.nn.site import Site
from minipeft.engine.ops import add, dropout, key_first

Norm = LayerNorm | RMSNorm


class Block(Module):
    """x [batch, time, d_model] -> the same. `cross` is None in an encoder.

    bias, mask and encoded_mask are added to scores [batch, heads, query, key], as in `nn.attention`."""

    def __init__(self, attn: Attention, attn_norm: Norm, cross: Attention | None, cross_norm: Norm | None,
                 ff: FeedForward, ff_norm: Norm, pre_norm: bool, p: float):
        self.attn, self.attn_norm = attn, attn_norm
        self.cross, self.cross_norm = cross, cross_norm
        self.ff, self.ff_norm = ff, ff_norm
        self.pre_norm, self.p = pre_norm, p

    def __call__(self, x: Any, bias: Any, mask: Any = None, encoded: Any = None, encoded_mask: Any = None,
                 rng: Any = None, cache: tuple[KeyValues, KeyValues] | None = None) -> Tensor:
        kept, kept_encoded = cache if cache is not None else (None, None)
        x = self._residual(x, lambda n: self.attn(n, n, bias, rng, kept, mask), self.attn.out, self.attn_norm, rng)
        if self.cross is not None and self.cross_norm is not None:
            cross = self.cross
            x = self._residual(x, lambda n: cross(n, encoded, None, rng, kept_encoded, encoded_mask),
                               cross.out, self.cross_norm, rng)
        return self._residual(x, lambda n: self.ff(n, rng), self.ff.out, self.ff_norm, rng)

    def _residual(self, x: Any, sublayer: Callable[[Any], Tensor], site: Site, norm: Norm, rng: Any) -> Tensor:
        n = norm(x) if self.pre_norm else x
        y = add(x, site(x, n, dropout(sublayer(n), self.p, rng)))
        return y if self.pre_norm else norm(y)


class Stack(Module):
    """Positions, blocks, and an optional final norm.   embeddings [batch, time, d_model] -> the same.

    With `encoded` (the encoder's output) the stack is a causal decoder. input: whether it has a site of that kind.
    drop_last: dropout after the final norm, as T5 has it."""

    def __init__(self, blocks: list[Block], norm: Norm | None, position: Sinusoidal | Learned | RelativeBuckets,
                 p: float, input: Site | None, drop_last: bool):
        self.input = input
        self.position = position
        self.blocks = blocks
        self.norm = norm
        self.p, self.drop_last = p, drop_last

    def __call__(self, x: Any, mask: Array | None = None, encoded: Any = None, encoded_mask: Array | None = None,
                 rng: Any = None, cache: list[tuple[KeyValues, KeyValues]] | None = None) -> tuple[Tensor, Any]:
        """The hidden states, and the mask that goes with them (an input site may have made both longer).

        x [batch, time, d_model]; masks [batch, time], True at tokens; with a cache, x continues what it holds."""
        if self.input is not None:
            x, mask = self.input(x, mask)
        start = cache[0][0].length if cache else 0
        time, dtype = array_of(x).shape[1], array_of(x).dtype
        position = self.position.embed(positions_of(mask, start, time))
        x = dropout(x if position is None else add(x, position), self.p, rng)
        bias = self.position.bias(time, start + time, start)
        hidden = _hidden(mask, dtype, (time, start + time) if encoded is not None else None)
        hidden_encoded = _hidden(encoded_mask, dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, bias, hidden, encoded, hidden_encoded, rng, cache[i] if cache else None)
        if self.norm is not None:
            x = self.norm(x)
        return (dropout(x, self.p, rng) if self.drop_last else x), mask


def _hidden(mask: Array | None, dtype: Any, decoding: tuple[int, int] | None = None) -> Any:
    """What to add to all scores of a stack: -inf where a query may not look, because the mask [batch, key] hides the
    key, or it comes later: decoding (queries, keys). None if nothing is hidden."""
    seen = None if mask is None else mask[:, None, None, :]
    if decoding is None or decoding[0] == 1:  # a single query is the last one: no key comes later
        return additive(seen, dtype)
    seen = causal(*decoding) if seen is None else seen & causal(*decoding)
    return key_first(additive(seen, dtype))  # laid out once for all blocks
