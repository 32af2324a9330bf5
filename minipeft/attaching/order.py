"""The entries below and above an attachment, in one state of the model. Nothing moves here; the moves are in
`attachment.py`."""
from __future__ import annotations

from typing import Any, Collection, Mapping

from minipeft.nn.place import Place
from minipeft.nn.state import Entry, State


def around(state: State, place: Place, name: str) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """The entries below and above attachment `name` at a place, in a state where it is plugged there."""
    entries = state.entries[place]
    at = [entry.name for entry in entries].index(name)
    return entries[:at], entries[at + 1:]


def lie_alike(place: Place, name: str, one: State, other: State) -> bool:
    """Whether the same entries lie below attachment `name` at a place in two states, one and other."""
    below, now = around(one, place, name)[0], around(other, place, name)[0]
    return len(below) == len(now) and all(a.is_like(b) for a, b in zip(below, now))


def nothing_merged_above(move: str, name: str, places: Mapping[str, Place], state: State) -> None:
    """Raises ValueError if another attachment is merged on top of attachment `name` at one of its places in this state.
    The error says that `move` is refused."""
    for where, place in places.items():
        for entry in around(state, place, name)[1]:
            if entry.merged is not None:
                raise ValueError(f"cannot {move} {name!r}: {entry.name!r} was merged on top of it at {where}; unmerge "
                                 f"{entry.name!r} first")


def below_merged(name: str, where: str, place: Any, state: State) -> Any:
    """The weight below attachment `name` at the place called `where`, on which its merge is based. Raises ValueError if
    an entry below is not merged in this state."""
    below, _ = around(state, place, name)
    loose = [entry.name for entry in below if entry.merged is None]
    if loose:
        raise ValueError(f"merge {loose[-1]!r} first: at {where} it lies unmerged below {name!r}")
    return below[-1].merged if below else place.base


def inserted(state: State, name: str, merged: Mapping[Place, Any] | None, above: frozenset[str]) -> State:
    """The state with attachment `name` plugged below the lowest of those in `above`, or else on top. merged: None, or
    its constants {place: weight}."""
    order = list(state.plugged)
    at = next((i for i, other in enumerate(order) if other in above), len(order))
    return state.replace(plugged={**{n: state.plugged[n] for n in order[:at]}, name: merged,
                                  **{n: state.plugged[n] for n in order[at:]}})


def replaced(state: State, names: Collection[str], new: Any) -> State:
    """The state with the attachment `new` attached and plugged where the lowest of `names` was plugged, or on top if
    none was, and with these switched off. Raises ValueError as `State` does."""
    order = list(state.plugged)
    at = next((i for i, name in enumerate(order) if name in names), len(order))
    plugged = {n: state.plugged[n] for n in order[:at]} | {new.name: None} | {n: state.plugged[n] for n in order[at:]}
    return State({**state.attached, new.name: new}, {n: m for n, m in plugged.items() if n not in names})


def without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of `mapping` without one name."""
    return {key: value for key, value in mapping.items() if key != name}
