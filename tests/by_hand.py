"""Pieces attached to single places by hand, as `attach` does it to a whole model."""
from __future__ import annotations

from typing import Any, Mapping, Sequence

from minipeft.nn.state import Attached, State


def piece_on(method: Any, place: Any, rng: Any) -> Any:
    """The piece that a method makes for one place by itself; at a slot, over its base."""
    arrays = {leaf: d.kind(d.init(d.shape, d.dtype or place.dtype, rng))
              for leaf, d in method.arrays("weight", place, None).items()}
    piece = method.make("weight", place, arrays)
    return piece.over(place.base) if hasattr(place, "base") else piece


class Held(Attached):
    """Pieces {place: piece} under one name."""

    def __init__(self, at: dict):
        self.at, self.own = at, frozenset()


def put(place: Any, pieces: Mapping[str, Any], plugged: Sequence[str] | None = None,
        merged: Mapping[str, Any] | None = None) -> Any:
    """Attach pieces by name, beside what is there, and plug some (all, without `plugged`) on top, bottom first.
    merged: {name: its constant}. A piece of None is attached to the model and not here. Returns the place."""
    now, merged = place.host.now, merged or {}
    attached = dict(now.attached)
    for name, piece in pieces.items():
        at = dict(attached[name].at) if name in attached else {}
        attached[name] = Held(at if piece is None else {**at, place: piece})
    constants = {name: {place: merged[name]} if name in merged else None
                 for name in (pieces if plugged is None else plugged)}
    place.host.now = State(attached, {**now.plugged, **constants})
    return place


def replug(place: Any, *names: str, **merged: Any) -> None:
    """Plug just these of what is attached, bottom first."""
    place.host.now = place.host.now.replace(
        plugged={name: {place: merged[name]} if name in merged else None for name in names})
