"""A site is a named place in the stream of hidden states: the identity until something is plugged there.

    sublayer      (x, n, F) -> F'          x [batch, time, d_model] the residual stream, n the input of the sublayer
                                           (in pre-LN norm(x)), F its output before the residual is added
    input         (embeddings, mask) -> (embeddings', mask')      [batch, time, d_model] and [batch, time], before
                                                                  positions are added
    keys_values   (k, v, bias) -> (k', v', bias')                 [batch, key, heads * d] of one attention, after any
                                                                  cache; bias broadcasts to its scores

A piece at a site is a callable with that signature. Pieces are applied in the order in which they were plugged, or in
the order in which a routing names them.

Where rows of one batch see prompts of different length, the shorter rows are padded on the left and masked there.
Padding on the left takes no position (`nn.positions`).
"""
from __future__ import annotations

from typing import Any, Callable, Sequence

import numpy

from minipeft.engine.tensor import array_of
from minipeft.backend import to_device, xp
from minipeft.nn.place import Place
from minipeft.nn.routing import Groups, by_row, view_of
from minipeft.engine.ops import concat, index

KINDS = ("sublayer", "input", "keys_values")


class Site(Place):
    """A place in the stream. At sites of kind "sublayer" and "input", rows of a batch may see different attachments.

    kind: "sublayer", "input" or "keys_values". width: the length of the last axis of the arrays that pass here, d_model
    or heads * d_k. dtype: of these arrays. Raises ValueError for another kind."""

    def __init__(self, kind: str, width: int, dtype: Any):
        if kind not in KINDS:
            raise ValueError(f"site kind is {kind!r}; expected one of {', '.join(KINDS)}")
        super().__init__(kind)
        self.width, self.dtype = width, numpy.dtype(dtype)

    def __call__(self, *stream: Any) -> Any:
        """stream -> F' at a sublayer, or the whole stream, changed, at the other kinds; shapes as in the table above.

        Raises ValueError at a keys and values site where rows see different attachments."""
        if self.kind == "sublayer":
            return by_row(self, lambda pieces, *rows: self._apply(pieces, *rows)[-1], *stream)
        groups = view_of(self.host).groups(self)
        if len(groups) == 1:
            return self._apply(self.compose(groups[0][0]), *stream)
        if self.kind == "keys_values":
            raise ValueError("rows of one batch see different attachments at a site of kind 'keys_values', where an "
                             "attachment may change the number of keys; run these rows apart")
        return self._padded(groups, *stream)

    def _apply(self, pieces: Sequence[Callable], *stream: Any) -> Any:
        for piece in pieces:
            stream = (*stream[:-1], piece(*stream)) if self.kind == "sublayer" else piece(*stream)
        return stream

    def _padded(self, groups: Groups, x: Any, mask: Any) -> tuple[Any, Any]:
        """Run each group of rows by itself, then pad all to the longest: zeros on the left, which the mask hides."""
        mask = xp.ones(x.shape[:2], dtype=bool) if mask is None else mask
        parts = [self._apply(self.compose(here), index(x, key=to_device(rows)), mask[to_device(rows)])
                 for here, rows in groups]
        longest = max(part.shape[1] for part, _ in parts)
        xs, masks = [], []
        for part, seen in parts:
            batch, time, d_model = part.shape
            xs.append(concat(xp.zeros((batch, longest - time, d_model), dtype=part.dtype), part, axis=1))
            masks.append(xp.concatenate([xp.zeros((batch, longest - time), dtype=bool), array_of(seen)], axis=1))
        back = to_device(numpy.argsort(numpy.concatenate([rows for _, rows in groups])))
        return index(concat(*xs, axis=0), key=back), xp.concatenate(masks, axis=0)[back]
