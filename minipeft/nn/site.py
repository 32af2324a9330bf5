"""A site is a named place in the stream of hidden states: the identity until something is plugged there.

    sublayer      (x, n, F) -> F'          x [batch, time, d_model] the residual stream, n the input of the sublayer
                                           (in pre-LN norm(x)), F its output before the residual is added
    input         (embeddings, mask) -> (embeddings', mask')      [batch, time, d_model] and [batch, time], before
                                                                  positions are added
    keys_values   (k, v, bias) -> (k', v', bias')                 [batch, key, heads * d] of one attention, after any
                                                                  cache; bias [1 or batch, 1 or heads, 1 or
                                                                  query, key], or None, is added to its scores

A piece at a site is a callable with that signature. Pieces are applied in the order in which they were plugged, or in
the order in which a routing names them.

Where rows of one batch see different pieces, each group of rows that see the same runs as a batch by itself. Prompts
and prefixes of different length leave rows of different length, so the shorter rows are padded on the left and hidden
there. Padding on the left takes no position (`nn.positions`).
"""
from __future__ import annotations

import math
from typing import Any, Callable, Sequence

import numpy

from minipeft.engine.tensor import Tensor, array_of
from minipeft.backend import Array, to_device, xp
from minipeft.nn.place import Place
from minipeft.nn.routing import View, _view, by_row, view_of
from minipeft.engine.ops import add, concat, index, mean

KINDS = ("sublayer", "input", "keys_values")


class Site(Place):
    """A place in the stream. Rows of a batch may see different attachments.

    kind: "sublayer", "input" or "keys_values". width: the length of the last axis of the arrays that pass here, d_model
    or heads * d_k. dtype: of these arrays. position: at the keys and values of a self-attention, the positions of its
    stack (`nn.positions`), which a piece may ask for the bias of keys that it adds; elsewhere None. Raises ValueError
    for another kind."""

    def __init__(self, kind: str, width: int, dtype: Any):
        if kind not in KINDS:
            raise ValueError(f"site kind is {kind!r}; expected one of {', '.join(KINDS)}")
        super().__init__(kind)
        self.width, self.dtype = width, numpy.dtype(dtype)
        self.position: Any = None

    def __call__(self, *stream: Any) -> Any:
        """stream -> F' at a sublayer, or the whole stream, changed, at the other kinds; shapes as in the table
        above."""
        if self.kind == "sublayer":
            return by_row(self, lambda pieces, *rows: self._apply(pieces, *rows)[-1], *stream)
        groups = view_of(self.host).groups(self)
        if len(groups) == 1:
            return self._apply(self.compose(groups[0][0]), *stream)
        if self.kind == "input":
            x, mask = stream
            stream = x, xp.ones(x.shape[:2], dtype=bool) if mask is None else mask
        parts = [self._apart(here, rows, *stream) for here, rows in groups]
        back = to_device(numpy.argsort(numpy.concatenate([rows for _, rows in groups])))
        return _inputs(parts, back) if self.kind == "input" else _keys_values(parts, back)

    def _apply(self, pieces: Sequence[Callable], *stream: Any) -> Any:
        for piece in pieces:
            stream = (*stream[:-1], piece(*stream)) if self.kind == "sublayer" else piece(*stream)
        return stream

    def _apart(self, here: Any, rows: numpy.ndarray, *stream: Any) -> Any:
        """These rows of the stream, changed by the pieces of the entries `here`. Places of the model that a piece reads
        meanwhile see these rows alone."""
        view = view_of(self.host)
        token = _view.set(View(self.host, view.state, [(view.rows or [])[row] for row in rows]))
        try:
            return self._apply(self.compose(here), *(_rows(x, to_device(rows)) for x in stream))
        finally:
            _view.reset(token)


def _rows(x: Any, rows: Array) -> Any:
    """These rows of x [batch, ...]. An x [1, ...] is the same for all rows; None stays None."""
    if x is None or len(x) == 1:
        return x
    return index(x, key=rows) if isinstance(x, Tensor) else x[rows]


def _inputs(parts: Sequence[tuple], back: Array) -> tuple[Tensor, Array]:
    """The embeddings and masks of all groups, padded on the left to the longest by zeros, which the mask hides; then in
    the order `back`."""
    longest = max(x.shape[1] for x, _ in parts)
    xs, masks = [], []
    for x, mask in parts:
        batch, time, width = x.shape
        xs.append(concat(xp.zeros((batch, longest - time, width), dtype=x.dtype), x, axis=1))
        masks.append(xp.concatenate([xp.zeros((batch, longest - time), dtype=bool), array_of(mask)], axis=1))
    return index(concat(*xs, axis=0), key=back), xp.concatenate(masks, axis=0)[back]


def _keys_values(parts: Sequence[tuple], back: Array) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys, values and biases of all groups, padded on the left to the most keys, where the bias is -inf; then in
    the order `back`. The values are padded with the mean of their row: a query that sees nothing averages all values
    (`engine.ops.attention`), and so gets the average of its own."""
    most, given = max(k.shape[1] for k, _, _ in parts), [bias.shape for _, _, bias in parts if bias is not None]
    lead = numpy.broadcast_shapes((1, 1), *(shape[1:3] for shape in given))     # [1 or heads, 1 or query]
    ks, vs, biases = [], [], []
    for k, v, bias in parts:
        (batch, keys, width), dtype = k.shape, k.dtype
        padding = xp.zeros((batch, most - keys, 1), dtype=dtype)
        ks.append(concat(xp.zeros((batch, most - keys, width), dtype=dtype), k, axis=1))
        vs.append(concat(add(mean(v, axis=1, keepdims=True), padding), v, axis=1))
        seen = xp.zeros((batch, *lead, 1 if bias is not None else keys), dtype=dtype)
        biases.append(concat(xp.full((batch, *lead, most - keys), -math.inf, dtype=dtype),
                             seen if bias is None else add(bias, seen), axis=-1))
    needed = bool(given) or any(k.shape[1] < most for k, _, _ in parts)
    k, v, bias = (index(concat(*each, axis=0), key=back) for each in (ks, vs, biases))
    return k, v, bias if needed else None
