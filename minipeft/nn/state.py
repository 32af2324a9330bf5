"""What is attached to a model, as one immutable value. A move replaces it by a single assignment.

    attached    {name: what was attached}                everything, whether it is plugged or not
    plugged     {name: None or its merged constants}     in order, bottom first

So an interrupt in the middle of a move leaves the state from before it or the one after it, never half of each, and a
forward that read the state when it began is not disturbed by a move that another thread makes. Moves themselves are
not synchronized: make them from one thread at a time.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterable, Mapping

Names = tuple[str, ...]


class Attached:
    """Something that was attached: `at` is {place: piece}."""

    at: Mapping[Any, Any] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One thing that is plugged at a place: the attachment's name, its piece, and the constant that it was merged
    into, or None."""

    name: str
    piece: Any
    merged: Any = None

    def is_like(self, other: "Entry") -> bool:
        """Whether the other one is the same thing in the same state."""
        return self.name == other.name and self.piece is other.piece and self.merged is other.merged


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """entries: what is plugged at each place, bottom first; it follows from `attached` and `plugged`.

    Making a state raises ValueError where a place cannot compose what is plugged there."""

    attached: Mapping[str, Attached] = dataclasses.field(default_factory=dict)
    plugged: Mapping[str, Mapping[Any, Any] | None] = dataclasses.field(default_factory=dict)
    entries: Mapping[Any, tuple[Entry, ...]] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", self.laid(self.plugged.items()))
        for place, entries in self.entries.items():
            place.compose(entries)

    def laid(self, plugged: Iterable[tuple[str, Mapping | None]]) -> dict[Any, tuple[Entry, ...]]:
        """{place: its entries} if these were plugged in this order: names, and None or merged constants."""
        found: dict[Any, tuple[Entry, ...]] = {}
        for name, merged in plugged:
            for place, piece in self.attached[name].at.items():
                entry = Entry(name, piece, None if merged is None else merged[place])
                found[place] = (*found.get(place, ()), entry)
        return found

    def replace(self, attached: Mapping | None = None, plugged: Mapping | None = None) -> "State":
        """The state with another map in place of one, or of both."""
        return State(self.attached if attached is None else attached, self.plugged if plugged is None else plugged)


class Host:
    """What the places of one model share: the state that is in force, in `now`.

    recorder: called with (host, state, orders, parameters) after `value_and_grad` has differentiated parameters of this
    model; orders are the attachments that the rows of the batch saw, each bottom first. remembered: facts about the
    base that are expensive to find out again (`attaching.trained_on`)."""

    def __init__(self, places: tuple[Any, ...] = ()) -> None:
        self.now, self.places, self.is_known = State(), places, False  # whether all places know it
        self.recorder: Callable[[Host, State, frozenset[Names], frozenset], None] | None = None
        self.remembered: Any = None

    def differentiated(self, parameters: frozenset) -> None:
        """Says that these parameters are about to change while what is plugged now is in force."""
        if self.recorder is not None:
            self.recorder(self, self.now, frozenset([tuple(self.now.plugged)]), parameters)
