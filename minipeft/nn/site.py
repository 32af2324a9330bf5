"""A site is a named place in the stream of hidden states: the identity until something is plugged there.

    sublayer   (x, n, F) -> F'             x [batch, time, d_model] the residual stream, n what the sublayer read (its
                                           norm, in pre-LN), F its output before the residual is added
    input      (embeddings, mask) -> (embeddings', mask')      before positions are added and the first block
    memory     (k, v, bias) -> (k', v', bias')                 of one attention, after any cache

What is attached is a callable with that signature. Entries are applied in the order in which they were plugged, or in
the order that a routing names them.
"""
from __future__ import annotations

from typing import Any

from minipeft.nn.place import Names, Place

KINDS = ("sublayer", "input", "memory")


class Site(Place):
    """A place in the stream. Sites of kind "sublayer" also take mixed routings, row by row."""

    def __init__(self, kind: str):
        if kind not in KINDS:
            raise ValueError(f"site kind is {kind!r}; expected one of {', '.join(KINDS)}")
        super().__init__(kind)

    def __call__(self, *stream: Any) -> Any:
        if not self.attached:
            return stream[-1] if self.kind == "sublayer" else stream
        if self.kind == "sublayer":
            return self.by_row(self._apply, *stream)
        groups = self._groups()
        if len(groups) > 1:
            raise ValueError(f"rows of one batch see different attachments at a site of kind {self.kind!r}, where "
                             f"what is plugged may change the length of the stream; run these rows apart")
        return self._apply(groups[0][0], *stream)

    def _apply(self, names: Names | None, *stream: Any) -> Any:
        for name in [entry.name for entry in self.plugged] if names is None else names:
            if self.kind == "sublayer":
                stream = (*stream[:-1], self.attached[name](*stream))
            else:
                stream = self.attached[name](*stream)
        return stream[-1] if self.kind == "sublayer" else stream
