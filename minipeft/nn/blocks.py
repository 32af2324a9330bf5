"""The residual block and the stack of blocks, written once for both models and for encoder and decoder.

    pre-LN     x + drop(F(norm(x)))          T5; Xiong et al., 2020, arXiv:2002.04745
    post-LN    norm(x + drop(F(x)))          Vaswani et al., 2017, sec. 3.1 and 5.4

F is self-attention, then (in a decoder) attention to the encoder's output, then the feed-forward. A site of kind
"sublayer" receives (x, the input of F, drop(F)) before the residual is added.
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
    """attn: self-attention. cross: attention to the encoder's output, None in an encoder. ff: the feed-forward.

    attn_norm, cross_norm, ff_norm: their norms. pre_norm: pre-LN, or else post-LN. p: the dropout rate on outputs."""

    def __init__(self, attn: Attention, attn_norm: Norm, cross: Attention | None, cross_norm: Norm | None,
                 ff: FeedForward, ff_norm: Norm, pre_norm: bool, p: float):
        self.attn, self.attn_norm = attn, attn_norm
        self.cross, self.cross_norm = cross, cross_norm
        self.ff, self.ff_norm = ff, ff_norm
        self.pre_norm, self.p = pre_norm, p

    def __call__(self, x: Any, bias: Any, mask: Any = None, encoded: Any = None, encoded_mask: Any = None,
                 rng: Any = None, cache: tuple[KeyValues, KeyValues] | None = None) -> Tensor:
        """x [batch, time, d_model] -> the same shape.

        encoded [batch, source, d_model]: the encoder's output, in a decoder. bias, mask: added to the scores [batch,
        heads, query, key] of self-attention. encoded_mask: added to those of cross-attention. cache: the keys and
        values of both attentions, in decoding."""
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
    """Positions, blocks, and an optional final norm.

    position: one of the classes of `nn.positions`. p: the dropout rate on the embeddings. input: the input site, if
    the stack has one. drop_last: whether dropout follows the final norm, as in T5."""

    def __init__(self, blocks: list[Block], norm: Norm | None, position: Sinusoidal | Learned | RelativeBuckets,
                 p: float, input: Site | None, drop_last: bool):
        self.input = input
        self.position = position
        self.blocks = blocks
        self.norm = norm
        self.p, self.drop_last = p, drop_last
        for block in blocks:  # a piece there may add keys, and need their bias
            block.attn.keys_values.position = position

    def __call__(self, x: Any, mask: Array | None = None, encoded: Any = None, encoded_mask: Array | None = None,
                 rng: Any = None, cache: list[tuple[KeyValues, KeyValues]] | None = None) -> tuple[Tensor, Any]:
        """The hidden states [batch, time, d_model] and their mask. An input site may have made both longer than x.

        x: embeddings [batch, time, d_model]. mask [batch, time] is True at tokens. With `encoded`, the encoder's output
        [batch, source, d_model], the stack is a causal decoder; encoded_mask [batch, source] is the encoder's. With a
        `cache`, one pair per block, x continues the tokens that are in it."""
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
    """The mask to add to all scores of a stack: -inf where the mask [batch, key] hides the key, and in a decoder also
    where the key comes later than the query (decoding: queries, keys). None if nothing is hidden."""
    seen = None if mask is None else mask[:, None, None, :]
    if decoding is None or decoding[0] == 1:  # a single query is the last one: no key comes later
        return additive(seen, dtype)
    seen = causal(*decoding) if seen is None else seen & causal(*decoding)
    return key_first(additive(seen, dtype))  # laid out once for all blocks
