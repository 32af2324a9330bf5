"""A place is where something can be attached: a slot (for a weight) or a site (in the stream of hidden states).

A place keeps what it was built with, everything attached to it by name, and an ordered list of what is plugged. What
it computes is always a pure function of these: nothing is ever added into the base or subtracted from it, so that
unplug, unmerge and swap restore every bit.

A *routing* lets every row of a batch see its own entries: `adapter=["a", None, ("a", "b")]`. It is set for one
forward, read by places alone, and overrides what is plugged.
"""
from __future__ import annotations

import contextlib
import contextvars
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy

from minipeft.autograd.tensor import Tensor
from minipeft.backend import to_device
from minipeft.ops import concat, embedding, index, reshape

Names = tuple[str, ...]


class Plugged:
    """An entry of a place's list: the attachment's name, the constant it was merged into, if it was, and when it was
    plugged (later ones have larger numbers, all over a model)."""

    __slots__ = ("name", "merged", "time")

    def __init__(self, name: str, merged: Any = None, time: int = 0):
        self.name, self.merged, self.time = name, merged, time


class Place:
    """`kind` says what may be attached here; `attached` and `plugged` say what is."""

    def __init__(self, kind: str):
        self.kind = kind
        self.attached: dict[str, Any] = {}
        self.plugged: list[Plugged] = []

    def by_row(self, run: Callable[..., Any], *streams: Any) -> Any:
        """run(names, *streams), names None meaning what is plugged; under a mixed routing, once per group of rows
        that see the same entries here, on those rows of every stream [batch, ...], put back in order."""
        groups = self._groups()
        if len(groups) == 1:
            return run(groups[0][0], *streams)
        parts = [run(names, *(None if s is None else index(s, key=to_device(rows)) for s in streams))
                 for names, rows in groups]
        back = to_device(numpy.argsort(numpy.concatenate([rows for _, rows in groups])))
        return index(concat(*parts, axis=0), key=back)

    def per_row(self, run: Callable[[Names | None], Tensor]) -> Tensor:
        """run(names) -> [...]; under a mixed routing, stacked for every row -> [batch, ...]."""
        groups = self._groups()
        if len(groups) == 1:
            return run(groups[0][0])
        results = [run(names) for names, _ in groups]
        table = concat(*(reshape(r, shape=(1, -1)) for r in results), axis=0)
        group_of_row = numpy.empty(sum(len(rows) for _, rows in groups), dtype=numpy.int64)
        for g, (_, rows) in enumerate(groups):
            group_of_row[rows] = g
        return reshape(embedding(table, to_device(group_of_row)), shape=(len(group_of_row), *results[0].shape))

    def _groups(self) -> list[tuple[Names | None, Any]]:
        """(names that are attached here, rows that see just these); one group [(None, None)] without a routing."""
        routing = _routing.get()
        if routing is None:
            return [(None, None)]
        groups: dict[Names, list[int]] = {}
        for row, names in enumerate(routing):
            groups.setdefault(tuple(n for n in names if n in self.attached), []).append(row)
        return [(names, numpy.array(rows)) for names, rows in groups.items()]


_routing: contextvars.ContextVar[Sequence[Names] | None] = contextvars.ContextVar("routing", default=None)


@contextlib.contextmanager
def routed(adapter: Any, batch: int, attachments: Mapping[str, Any]) -> Iterator[None]:
    """Set the routing that `adapter` means for a batch of that many rows: None leaves what is plugged, a name (or a
    tuple of names) holds for all rows, a list has an entry for each row: a name, a tuple of names, or None for the
    base alone. Raises ValueError for a wrong length or an unknown name, before anything is computed."""
    token = _routing.set(None if adapter is None else _per_row(adapter, batch, attachments))
    try:
        yield
    finally:
        _routing.reset(token)


def _per_row(adapter: Any, batch: int, attachments: Mapping[str, Any]) -> list[Names]:
    entries = adapter if isinstance(adapter, list) else [adapter] * batch
    if len(entries) != batch:
        raise ValueError(f"adapter lists {len(entries)} entries for a batch of {batch} rows; expected one per row")
    for e in entries:
        if not (e is None or isinstance(e, str) or isinstance(e, tuple) and all(isinstance(n, str) for n in e)):
            raise TypeError(f"adapter holds {type(e).__name__}; expected names, tuples of names, or None")
    rows = [() if e is None else (e,) if isinstance(e, str) else e for e in entries]
    for name in {n for names in rows for n in names}:
        if name not in attachments:
            raise ValueError(f"adapter {name!r} is not attached to this model; "
                             f"attached: {', '.join(attachments) or 'none'}")
    if any(len(set(names)) != len(names) for names in rows):
        raise ValueError("adapter names one attachment twice for a row")
    return rows
