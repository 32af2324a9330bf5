"""What was attached where, and the moves that it can make.

    off  --plug-->  plugged  --merge-->  merged            remove: from off or plugged
    off <--unplug-- plugged <--unmerge-- merged            save: from any

At every place the plugged entries form an ordered list, and what the place computes is a fold of it. A merged entry is
a constant computed from what lies below, so: merge needs everything below to be merged, unplug and unmerge need nothing
merged above. Nothing is ever subtracted.

A move makes the next `State` of the model and puts it in place by one assignment. Every illegal move raises before
that, and an interrupt leaves the state from before the move or the one after it. A forward in another thread goes on
with the state that it began with; moves of one model are to be made by one thread at a time.
"""
from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Iterator, Mapping

from minipeft.backend import Array, to_host, xp
from minipeft.checks import shown
from minipeft.nn.module import Model
from minipeft.nn.place import Place
from minipeft.nn.state import Attached, Entry, State
from minipeft.nn.weight import Constant, Parameter, Slot, arrays_of
from minipeft.attaching import adapter_file
from minipeft.attaching.trained_on import Layer, TrainedOn, content, content_of_base, marks, settle


class Attachment(Attached):
    """Made by `attach` and `load`. trained_on: what its tensors were last trained on, None if they never were."""

    def __init__(self, model: Model, name: str, method: Any, places: Mapping[str, Place], pieces: Mapping[str, Any],
                 trained_on: TrainedOn | None = None):
        self.model, self.name, self.method, self.trained_on = model, name, method, trained_on
        self._places = dict(places)
        self.at = {place: pieces[where] for where, place in places.items()}
        self.own = frozenset(p for piece in self.at.values() for p in arrays_of(piece).values()
                             if isinstance(p, Parameter))
        self._above: frozenset[str] = frozenset()  # what lay above it when it was taken out of the lists
        self._known: tuple[list[int] | None, str] | None = None  # checksums, and the content that they belong to

    @property
    def state(self) -> str:
        """ "off", "plugged" or "merged"; "removed" after `remove`."""
        return self._state_in(self.model.host.now)

    @property
    def places(self) -> dict[str, Place]:
        """{name: place}; none after `remove`."""
        return {} if self.state == "removed" else self._places

    @property
    def arrays(self) -> dict[str, Parameter | Constant]:
        """{"place@name.leaf": what it has of its own}, in any state: parameters, and constants such as indices."""
        return {f"{where}@{self.name}.{leaf}": p for where, place in self.places.items()
                for leaf, p in arrays_of(self.at[place]).items()}

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Those of `arrays` that are trained."""
        return {name: p for name, p in self.arrays.items() if isinstance(p, Parameter)}

    @property
    def tensors(self) -> dict[str, Array]:
        """{"place.leaf": array}: all arrays of its own, under names that do not depend on how it is called."""
        return {} if self.state == "removed" else self._tensors()

    def plug(self) -> None:
        """Switch it on ("enable") at every place: where it lay before it was unplugged, below what lay above it then
        and is still plugged; otherwise on top.

        Raises ValueError unless it is off, and where it cannot lie above what is plugged (see `Reparam`)."""
        self._become(self._inserted(self._required("plug", "off"), None))

    def unplug(self) -> None:
        """Switch it off ("disable"): take it out of the lists; the base is what it was, bit for bit.

        Raises ValueError unless it is plugged, and while something is merged on top of it."""
        self._become(self._taken_out("unplug", self._required("unplug", "plugged")))

    @contextlib.contextmanager
    def off(self) -> Iterator["Attachment"]:
        """`with attachment.off():` switches it off for the block, and puts it back where it lay, in the state that it
        was in. One that was off before stays off; one that is removed or plugged inside the block stays so.

        Raises ValueError after `remove`, and while something is merged on top of it; at the end, where it was merged
        into weights that changed inside the block."""
        before = self._required("switch off", "off", "plugged", "merged")
        if self.name not in before.plugged:
            yield self
            return
        without = self._taken_out("switch off", before)
        try:
            try:
                self._become(without)
                yield self
            finally:
                self._put_back(before, without)
        finally:
            self._put_back(before, without)  # again, in case the first was interrupted; else it changes nothing

    def merge(self) -> None:
        """Replace this entry by the constant dense weight, at every slot; the base array is kept beside it.

        Raises ValueError unless it is plugged, where something below is not merged, and where the method acts in the
        stream and not on weights."""
        now = self._required("merge", "plugged")
        constants: dict[Place, Parameter] = {}
        for where, place in self._places.items():
            if not isinstance(place, Slot):
                raise ValueError(f"{self.name!r} cannot be merged: at {where} it acts on hidden states, which no "
                                 f"weight of the model can absorb")
            below, _ = self._around(place, now)
            loose = [e.name for e in below if e.merged is None]
            if loose:
                raise ValueError(f"merge {loose[-1]!r} first: at {where} it lies unmerged below {self.name!r}")
            under = below[-1].merged if below else place.base
            constants[place] = Parameter(self.at[place].over(under).dense().data)
        self._become(now.replace(plugged={**now.plugged, self.name: constants}))

    def unmerge(self) -> None:
        """Drop the constant; the base array was never touched, so every bit is back.

        Raises ValueError unless it is merged, and while something is merged on top of it."""
        now = self._required("unmerge", "merged")
        self._nothing_merged_above("unmerge", now)
        self._become(now.replace(plugged={**now.plugged, self.name: None}))

    def remove(self) -> None:
        """Take the attachment off the model for good; its name is free again.

        Raises ValueError while it is merged, or while something is merged on top of it."""
        now = self._required("remove", "off", "plugged")
        if self.name in now.plugged:
            self._nothing_merged_above("remove", now)
        settle(now, changing=frozenset([self]))
        self._become(State(_without(now.attached, self.name), _without(now.plugged, self.name)))

    def save(self, file: str | os.PathLike) -> None:
        """Write its own tensors to one safetensors file, with the method, the resolved names, and what the tensors were
        trained on: an adapter is valid only on the weights that it was trained on. One that was never trained names
        the base alone.

        Raises ValueError after `remove` and for numbers that are not finite, FileNotFoundError for a missing folder;
        the file that was there then stays."""
        self._required("save", "off", "plugged", "merged")
        for name, array in self._tensors().items():
            if array.dtype.kind == "f" and not to_host(xp.isfinite(array).all()):
                raise ValueError(f"{name} holds NaN or infinity: {file} is not written")
        trained = self.trained_on or TrainedOn(content_of_base(self.model))
        adapter_file.write(file, self.name, self.method, list(self._places), self.tensors, trained.settled(self.model))

    @property
    def layer(self) -> Layer:
        """Its name and content, as the file of another attachment names it."""
        tensors = self._tensors()
        now = marks(tensors)
        if now is None or self._known is None or self._known[0] != now:
            self._known = now, content(self.method, tensors)
        return Layer(self.name, self._known[1])

    def misfit(self, metadata: Mapping[str, str]) -> str | None:
        """Why the tensors of an adapter file with this metadata are none of this attachment; None if they may be."""
        if json.loads(metadata.get("method", "null")) != json.loads(adapter_file.method_text(self.method)):
            return f"its method is {shown(metadata.get('method'))}; expected {adapter_file.method_text(self.method)}"
        return None if metadata.get("base") == content_of_base(self.model) else "it was trained on another base model"

    def __repr__(self) -> str:
        return f"Attachment({self.name!r}, {type(self.method).__name__}, {self.state}, {len(self.places)} places)"

    def _tensors(self) -> dict[str, Array]:
        return {f"{where}.{leaf}": p.data for where, place in self._places.items()
                for leaf, p in arrays_of(self.at[place]).items()}

    def _become(self, state: State) -> None:
        self.model.host.now = state

    def _state_in(self, state: State) -> str:
        if state.attached.get(self.name) is not self:
            return "removed"
        if self.name not in state.plugged:
            return "off"
        return "plugged" if state.plugged[self.name] is None else "merged"

    def _required(self, move: str, *states: str) -> State:
        state = self.state
        if state == "removed":
            raise ValueError(f"cannot {move} {self.name!r}: it was removed from its model")
        if state not in states:
            raise ValueError(f"cannot {move} {self.name!r}: it is {state}; expected {' or '.join(states)}")
        return self.model.host.now

    def _around(self, place: Place, state: State) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """The entries below and above this one."""
        entries = state.entries[place]
        at = [e.name for e in entries].index(self.name)
        return entries[:at], entries[at + 1:]

    def _lies_alike(self, place: Place, one: State, other: State) -> bool:
        """Whether the same things lie below it in both states."""
        below, now = self._around(place, one)[0], self._around(place, other)[0]
        return len(below) == len(now) and all(a.is_like(b) for a, b in zip(below, now))

    def _nothing_merged_above(self, move: str, state: State) -> None:
        for where, place in self._places.items():
            for entry in self._around(place, state)[1]:
                if entry.merged is not None:
                    raise ValueError(f"cannot {move} {self.name!r}: {entry.name!r} was merged on top of it at "
                                     f"{where}; unmerge {entry.name!r} first")

    def _taken_out(self, move: str, now: State) -> State:
        """The state without it; which ones lay above it is remembered."""
        self._nothing_merged_above(move, now)
        order = list(now.plugged)
        self._above = frozenset(order[order.index(self.name) + 1:])
        return now.replace(plugged=_without(now.plugged, self.name))

    def _inserted(self, now: State, merged: Mapping[Place, Parameter] | None) -> State:
        """The state with it, below the lowest that lay above it when it was taken out."""
        order = list(now.plugged)
        at = next((i for i, name in enumerate(order) if name in self._above), len(order))
        return now.replace(plugged={**{name: now.plugged[name] for name in order[:at]}, self.name: merged,
                                    **{name: now.plugged[name] for name in order[at:]}})

    def _put_back(self, before: State, without: State) -> None:
        """Back to where it was before it was switched off, if it is off still."""
        now = self.model.host.now
        if now is without:
            self._become(before)
        elif self._state_in(now) == "off":
            back = self._inserted(now, before.plugged[self.name])
            if self._state_in(back) == "merged" and any(not self._lies_alike(place, before, back) for place in self.at):
                raise ValueError(f"{self.name!r} stays off: it was merged into weights that changed while it was off; "
                                 f"plug it and merge it again")
            self._become(back)


def _without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}
