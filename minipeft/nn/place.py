"""A place is where something can be attached: a slot (for a weight) or a site (in the stream of hidden states).

A place never changes. Its result is a pure function of the base that it was built with and of the model's state
(`state.py`). Nothing is ever added into the base or subtracted from it, so unplug, unmerge and swap restore every bit.
"""
from __future__ import annotations

from typing import Any, Iterator

from minipeft.nn.routing import view_of
from minipeft.nn.state import Entry, Host


class Place:
    """`kind` says which pieces may be attached here. `host` holds the state; all places of a model share one."""

    def __init__(self, kind: str):
        self.kind = kind
        self.host = Host()

    @property
    def attached(self) -> dict[str, Any]:
        """{name: piece}: all pieces that are attached here, plugged or not."""
        return {name: a.at[self] for name, a in self.host.now.attached.items() if self in a.at}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The plugged entries here, bottom first."""
        return self.host.now.entries.get(self, ())

    @property
    def merged(self) -> tuple[Entry, ...]:
        """Those of the entries that are merged, bottom first."""
        return tuple(entry for entry in self.entries if entry.merged is not None)

    @property
    def used(self) -> bool:
        """Whether any row of the present forward sees an entry here."""
        view = view_of(self.host)
        return self in view.state.entries if view.rows is None else any(entries for entries, _ in view.groups(self))

    def pieces(self) -> Iterator[Any]:
        """All objects here that may hold arrays, each once: the base, the attached pieces, merged constants."""
        base = getattr(self, "base", None)
        yield from () if base is None else (base,)
        yield from self.attached.values()
        yield from (entry.merged for entry in self.merged)

    def compose(self, entries: tuple[Entry, ...]) -> Any:
        """The pieces of `entries`, bottom first. A slot overrides this and makes one weight of them."""
        return tuple(entry.piece for entry in entries)
