"""Attaching a method to a model, and the moves that an attachment can make.

    off  --plug-->  plugged  --merge-->  merged            remove: from off or plugged
    off <--unplug-- plugged <--unmerge-- merged            save: from any

At every place the plugged entries form an ordered list, and what the place computes is a fold of it. A merged entry is
a constant computed from what lies below, so: merge needs everything below to be merged, unplug and unmerge need nothing
merged above. Nothing is ever subtracted. Every illegal move raises before anything changes.
"""
from __future__ import annotations

import itertools
import os
import re
from typing import Any, Protocol

import numpy

from minipeft.backend import Array
from minipeft.nn.fingerprint import fingerprint
from minipeft.nn.init import require_rng
from minipeft.nn.module import Module, attachments_of
from minipeft.nn.place import Place, Plugged
from minipeft.nn.weight import Constant, Parameter, Slot, arrays_of
from minipeft.peft import adapter_file
from minipeft.checks import shown

_clock = itertools.count()  # when something was plugged, for all models together


class Method(Protocol):
    """Hyper-parameters, where they apply, {name: place}, and what is put there, {name: piece}. A frozen dataclass.

    `places` raises for what does not fit the model, before `build` draws a number; `shapes` says how large the arrays
    of a piece will be, {leaf: shape}, before they are made. Without rng, `build` makes zeros, to be filled."""

    def places(self, model: Any) -> Any: ...
    def shapes(self, name: str, place: Any, model: Any) -> dict[str, tuple]: ...
    def build(self, model: Any, places: Any, rng: Any) -> Any: ...


class Attachment:
    """What was attached where. Made by `attach` and `load`."""

    def __init__(self, model: Module, name: str, method: Method, places: dict[str, Place]):
        self.model, self.name, self.method, self.places = model, name, method, places

    @property
    def state(self) -> str:
        """ "off", "plugged" or "merged"; "removed" after `remove`."""
        if not self.places:
            return "removed"
        entry = self._entry()
        return "off" if entry is None else "plugged" if entry.merged is None else "merged"

    @property
    def arrays(self) -> dict[str, Parameter | Constant]:
        """{"place@name.leaf": what it has of its own}, in any state: parameters, and constants such as indices."""
        return {f"{where}@{self.name}.{leaf}": p for where, place in self.places.items()
                for leaf, p in arrays_of(place.attached[self.name]).items()}

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Those of `arrays` that are trained."""
        return {name: p for name, p in self.arrays.items() if isinstance(p, Parameter)}

    @property
    def tensors(self) -> dict[str, Array]:
        """{"place.leaf": array}: all arrays of its own, under names that do not depend on how it is called."""
        return {f"{where}.{leaf}": p.data for where, place in self.places.items()
                for leaf, p in arrays_of(place.attached[self.name]).items()}

    def plug(self) -> None:
        """Put on top of the list at every place."""
        self._require("plug", "off")
        now = next(_clock)
        for place in self.places.values():
            place.plugged.append(Plugged(self.name, time=now))

    def unplug(self) -> None:
        """Take out of the lists; the base is what it was, bit for bit."""
        self._require("unplug", "plugged")
        self._nothing_merged_above("unplug")
        for place in self.places.values():
            place.plugged = [e for e in place.plugged if e.name != self.name]

    def merge(self) -> None:
        """Replace this entry by the constant dense weight, at every slot; the base array is kept beside it.

        Raises ValueError where something below is not merged, or the method acts in the stream and not on weights."""
        self._require("merge", "plugged")
        constants = []
        for where, place in self.places.items():
            if not isinstance(place, Slot):
                raise ValueError(f"{self.name!r} cannot be merged: at {where} it acts on hidden states, which no "
                                 f"weight of the model can absorb")
            below, _ = self._around(place)
            loose = [e.name for e in below if e.merged is None]
            if loose:
                raise ValueError(f"merge {loose[-1]!r} first: at {where} it lies unmerged below {self.name!r}")
            under = below[-1].merged if below else place.base
            constants.append(Parameter(place.attached[self.name].over(under).dense().data))
        for place, constant in zip(self.places.values(), constants):
            next(e for e in place.plugged if e.name == self.name).merged = constant

    def unmerge(self) -> None:
        """Drop the constant; the base array was never touched, so every bit is back."""
        self._require("unmerge", "merged")
        self._nothing_merged_above("unmerge")
        for place in self.places.values():
            next(e for e in place.plugged if e.name == self.name).merged = None

    def remove(self) -> None:
        """Take the attachment off the model for good; its name is free again."""
        self._require("remove", "off", "plugged")
        if self.state == "plugged":
            self.unplug()
        for place in self.places.values():
            del place.attached[self.name]
        del attachments_of(self.model)[self.name]
        self.places = {}

    def save(self, file: str | os.PathLike) -> None:
        """Write its own tensors to one safetensors file, with method, resolved names, the base's fingerprint, and
        those of the attachments that were plugged before it, wherever in the model: what it learned means something on
        top of these alone. (While it is off, none are recorded.)"""
        self._require("save", "off", "plugged", "merged")
        attachments = attachments_of(self.model)
        times = {name: entry.time for name, a in attachments.items() if (entry := a._entry()) is not None}
        below = {name: fingerprint(attachments[name].tensors) for name, time in times.items()
                 if time < times.get(self.name, 0)}
        adapter_file.write(file, self.name, self.method, list(self.places), self.tensors, below, self.model)

    def __repr__(self) -> str:
        return f"Attachment({self.name!r}, {type(self.method).__name__}, {self.state}, {len(self.places)} places)"

    def _entry(self) -> Plugged | None:
        """Its entry at the first of its places; at the others it is in the same state."""
        return next((e for e in next(iter(self.places.values())).plugged if e.name == self.name), None)

    def _require(self, move: str, *states: str) -> None:
        if not self.places:
            raise ValueError(f"cannot {move} {self.name!r}: it was removed from its model")
        if self.state not in states:
            raise ValueError(f"cannot {move} {self.name!r}: it is {self.state}; expected {' or '.join(states)}")

    def _around(self, place: Place) -> tuple[list[Plugged], list[Plugged]]:
        """The entries below and above this one."""
        at = [e.name for e in place.plugged].index(self.name)
        return place.plugged[:at], place.plugged[at + 1:]

    def _nothing_merged_above(self, move: str) -> None:
        for where, place in self.places.items():
            for entry in self._around(place)[1]:
                if entry.merged is not None:
                    raise ValueError(f"cannot {move} {self.name!r}: {entry.name!r} was merged on top of it at "
                                     f"{where}; unmerge {entry.name!r} first")


def attach(model: Module, method: Method, rng: numpy.random.Generator, name: str | None = None) -> Attachment:
    """Build `method` on the places that it chooses in `model`, and plug it.

    name: how the attachment is called, by default the method's name in lower case. Raises ValueError, before any
    random number is drawn, for a taken or malformed name, a pattern that matches nothing, and sizes out of range."""
    if isinstance(method, type) or not hasattr(method, "places"):
        raise TypeError(f"method is {method!r}; expected one such as LoRA(rank=8)")
    name = type(method).__name__.lower() if name is None else name
    check_name(model, name)
    require_rng(rng)
    places = dict(method.places(model))
    return put(model, name, method, places, method.build(model, places, rng))


def put(model: Module, name: str, method: Method, places: dict[str, Place], pieces: dict[str, Any]) -> Attachment:
    """An attachment of pieces that are ready, plugged; `name` has passed `check_name`."""
    for where, place in places.items():
        place.attached[name] = pieces[where]
    attachment = Attachment(model, name, method, places)
    attachments_of(model)[name] = attachment
    attachment.plug()
    return attachment


def check_name(model: Module, name: str) -> None:
    """Raises ValueError unless `name` is well-formed and free on the model, TypeError for a part of a model."""
    attachments = attachments_of(model)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name is {shown(name)}; expected letters, digits, '_' and '-'")
    if name in attachments:
        raise ValueError(f"an attachment named {name!r} is already on this model ({attachments[name].state}); "
                         f"pass another name, or remove it")
