"""The attachments of a model, as one immutable value. A move replaces it by a single assignment.

    attached    {name: attachment}                       all of them, plugged or not
    plugged     {name: None or its merged constants}     in order, bottom first

So an interrupt in the middle of a move leaves the state before the move or the state after it, and nothing in between.
A forward reads the state once, when it begins, so a move in another thread does not disturb it. Moves themselves are
not synchronized: make them from one thread at a time.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterable, Mapping

from minipeft.nn.scaled import scaled

Names = tuple[str, ...]
Asked = tuple[tuple[str, float], ...]  # attachments, bottom first, each with the factor of its change


class Attached:
    """An attachment, as far as a state knows it: `at` is {place: piece}."""

    at: Mapping[Any, Any] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One entry in the list of a place: the name of a plugged attachment, its piece there, and the constant weight
    `merged` if the attachment is merged, else None. factor: by which the piece's change is multiplied already."""

    name: str
    piece: Any
    merged: Any = None
    factor: float = 1

    def is_like(self, other: "Entry") -> bool:
        """Whether the other one has the same name, the same piece and the same constant."""
        return self.name == other.name and self.piece is other.piece and self.merged is other.merged


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """attached, plugged: as in the table above. entries: {place: its plugged entries}, bottom first, derived from these
    two.

    Making a state raises ValueError where a place cannot compose its entries."""

    attached: Mapping[str, Attached] = dataclasses.field(default_factory=dict)
    plugged: Mapping[str, Mapping[Any, Any] | None] = dataclasses.field(default_factory=dict)
    entries: Mapping[Any, tuple[Entry, ...]] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", self.laid(((name, 1) for name in self.plugged), self.plugged))
        for place, entries in self.entries.items():
            place.compose(entries)

    def laid(self, asked: Iterable[tuple[str, float]], merged: Mapping[str, Mapping | None] | None = None
             ) -> dict[Any, tuple[Entry, ...]]:
        """{place: its entries} for the attachments that are `asked` for, each with its factor, bottom first. merged:
        {name: None or its merged constants}. Raises ValueError where a change cannot be multiplied by its factor."""
        found: dict[Any, tuple[Entry, ...]] = {}
        for name, factor in asked:
            constants = (merged or {}).get(name)
            for place, piece in self.attached[name].at.items():
                constant = None if constants is None else constants[place]
                entry = Entry(name, scaled(name, place, piece, factor), constant, factor)
                found[place] = (*found.get(place, ()), entry)
        return found

    def replace(self, attached: Mapping | None = None, plugged: Mapping | None = None) -> "State":
        """The state with another map `attached`, another map `plugged`, or both. Raises ValueError as `State` does."""
        return State(self.attached if attached is None else attached, self.plugged if plugged is None else plugged)


class Host:
    """The object that all `places` of one model share. now: the present state of the model.

    recorder: called with (host, state, orders, parameters) after `value_and_grad` has differentiated parameters of this
    model; orders are the attachments that the rows of the batch saw, each bottom first. remembered: facts about the
    base that are expensive to compute again; origin: the base from which it was quantized (`attaching.trained_on`)."""

    def __init__(self, places: tuple[Any, ...] = ()) -> None:
        self.now, self.places, self.is_known = State(), places, False  # whether all places refer to it
        self.recorder: Callable[[Host, State, frozenset[Names], frozenset], None] | None = None
        self.remembered: Any = None
        self.origin: Any = None

    def differentiated(self, parameters: frozenset) -> None:
        """Tells the recorder that these `parameters` are about to change, under the attachments plugged now."""
        if self.recorder is not None:
            self.recorder(self, self.now, frozenset([tuple(self.now.plugged)]), parameters)
