"""A place is where something can be attached: a slot (for a weight) or a site (in the stream of hidden states).

A place keeps what it was built with. What it computes is always a pure function of that and of the model's state
(`state.py`): nothing is ever added into the base or subtracted from it, so that unplug, unmerge and swap restore every
bit. Rows of one batch may see different attachments (`routing.py`).
"""
from __future__ import annotations

from typing import Any, Callable, Iterator

import numpy

from minipeft.engine.tensor import Tensor
from minipeft.backend import to_device
from minipeft.nn.routing import view_of
from minipeft.nn.state import Entry, Host
from minipeft.engine.ops import concat, embedding, index, reshape


class Place:
    """`kind` says what may be attached here. `host` holds the state; all places of a model share one."""

    def __init__(self, kind: str):
        self.kind = kind
        self.host = Host()

    @property
    def attached(self) -> dict[str, Any]:
        """{name: piece} of everything that is attached here, plugged or not."""
        return {name: a.at[self] for name, a in self.host.now.attached.items() if self in a.at}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is plugged here, bottom first."""
        return self.host.now.entries.get(self, ())

    @property
    def merged(self) -> tuple[Entry, ...]:
        """Those of the entries that are merged, bottom first."""
        return tuple(entry for entry in self.entries if entry.merged is not None)

    @property
    def used(self) -> bool:
        """Whether any row of the forward under way sees something here."""
        return any(entries for entries, _ in view_of(self.host).groups(self))

    def pieces(self) -> Iterator[Any]:
        """Everything here that may hold arrays, each once: the base, what is attached, merged constants."""
        base = getattr(self, "base", None)
        yield from () if base is None else (base,)
        yield from self.attached.values()
        yield from (entry.merged for entry in self.merged)

    def compose(self, entries: tuple[Entry, ...]) -> Any:
        """What this place makes of entries, bottom first: the pieces, in order. A slot makes one weight of them, and
        raises ValueError for some that cannot lie above each other."""
        return tuple(entry.piece for entry in entries)

    def by_row(self, run: Callable[..., Any], *streams: Any) -> Any:
        """run(composed, *streams); where rows see different attachments here, once per group of rows that see the same,
        on those rows of every stream [batch, ...], put back in order."""
        groups = view_of(self.host).groups(self)
        if len(groups) == 1:
            return run(self.compose(groups[0][0]), *streams)
        parts = [run(self.compose(here), *(None if s is None else index(s, key=to_device(rows)) for s in streams))
                 for here, rows in groups]
        back = to_device(numpy.argsort(numpy.concatenate([rows for _, rows in groups])))
        return index(concat(*parts, axis=0), key=back)

    def per_row(self, run: Callable[[Any], Tensor]) -> Tensor:
        """run(composed) -> [...]; where rows see different attachments here, stacked for every row -> [batch, ...]."""
        groups = view_of(self.host).groups(self)
        if len(groups) == 1:
            return run(self.compose(groups[0][0]))
        results = [run(self.compose(here)) for here, _ in groups]
        table = concat(*(reshape(r, shape=(1, -1)) for r in results), axis=0)
        group_of_row = numpy.empty(sum(len(rows) for _, rows in groups), dtype=numpy.int64)
        for g, (_, rows) in enumerate(groups):
            group_of_row[rows] = g
        return reshape(embedding(table, to_device(group_of_row)), shape=(len(group_of_row), *results[0].shape))
