"""Attachments, and the moves that they can make.

    off  --plug-->  plugged  --merge-->  merged            remove: from off or plugged
    off <--unplug-- plugged <--unmerge-- merged            save: from any

In PEFT's words, plug and unplug are enable and disable, and remove is delete.

At every place the plugged attachments have one entry each, in an ordered list, and the place computes a fold of it. A
merged entry is a constant, computed from the weight below it. So merge needs all entries below to be merged, and plug,
unplug, unmerge and remove need no merged entry above. Nothing is ever subtracted.

A move makes the next `State` of the model and puts it in place by one assignment. Every illegal move raises before
that. After an interrupt the model has the state before the move or the state after it, nothing in between. A forward in
another thread goes on with the state that it began with. Make moves on one model from one thread at a time.
"""
from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Iterator, Mapping

from minipeft.attaching import adapter_file
from minipeft.attaching.merging import merged
from minipeft.attaching.order import inserted, lie_alike, nothing_merged_above, without
from minipeft.attaching.origin import across, are_related
from minipeft.attaching.trained_on import Layer, TrainedOn, content, marks, on_base, settle
from minipeft.backend import Array, to_host, xp
from minipeft.checks import shown
from minipeft.nn.merge_report import MergeReport
from minipeft.nn.module import Model
from minipeft.nn.place import Place
from minipeft.nn.state import Attached, State
from minipeft.nn.weight import Fixed, Parameter


class Attachment(Attached):
    """A method, attached to a model under a name. `attach` and `load` make it.

    Its constructor takes places {name: place}, pieces {name: piece}, arrays {"place.leaf": array} with every array of
    the pieces once, and trained_on, the weights that its tensors were last trained on (None if they never were).

    errors: {name: relative error}, for an attachment that `combine` or `extract` made: how far its change at a place is
    from the change that it stands for (see there). Empty otherwise. No file holds it.

    source: of an attachment that was read from another library's file, what that file says beyond method and tensors
    (see `minipeft.formats`). None otherwise. No file of ours holds it."""

    def __init__(self, model: Model, name: str, method: Any, places: Mapping[str, Place], pieces: Mapping[str, Any],
                 arrays: Mapping[str, Parameter | Fixed], trained_on: TrainedOn | None = None):
        self.model, self.name, self.method, self.trained_on = model, name, method, trained_on
        self._places, self._arrays = dict(places), dict(arrays)
        self.at = {place: pieces[where] for where, place in places.items()}
        self.errors: dict[str, float] = {}
        self.source: Any = None
        self.own = frozenset(p for p in self._arrays.values() if isinstance(p, Parameter))
        self._above: frozenset[str] = frozenset()  # those that lay above it when it was switched off
        self._known: tuple[list[int] | None, str] | None = None  # checksums, and the content they belong to

    @property
    def state(self) -> str:
        """ "off", "plugged" or "merged"; "removed" after `remove`."""
        return self._state_in(self.model.host.now)

    @property
    def places(self) -> dict[str, Place]:
        """{name: place}; empty after `remove`."""
        return {} if self.state == "removed" else self._places

    @property
    def arrays(self) -> dict[str, Parameter | Fixed]:
        """{"place@name.leaf": array}: its own parameters and fixed arrays (such as indices); empty after `remove`."""
        return {} if self.state == "removed" else {
            f"@{self.name}.".join(key.rsplit(".", 1)): p for key, p in self._arrays.items()}

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Those of its `arrays` that are trained."""
        return {name: p for name, p in self.arrays.items() if isinstance(p, Parameter)}

    @property
    def tensors(self) -> dict[str, Array]:
        """{"place.leaf": array}: the data of all its arrays, under names that do not depend on its own name."""
        return {} if self.state == "removed" else self._tensors()

    def plug(self) -> None:
        """Switch it on (enable it) at every place. It returns to its old position, below the attachments that lay above
        it when it was unplugged and are still plugged. If there are none, it lies on top.

        Raises ValueError unless it is off, where one entry could not lie above another (see `Reparam.over`), and where
        an attachment is merged on top of its position: that constant would hide it."""
        plugged = inserted(self._required("plug", "off"), self.name, None, self._above)
        nothing_merged_above("plug", self.name, self._places, plugged)
        self._become(plugged)

    def unplug(self) -> None:
        """Switch it off (disable it): take it out of the lists. The model then gives its old outputs, bit for bit.

        Raises ValueError unless it is plugged, and while another attachment is merged on top of it."""
        self._become(self._taken_out("unplug", self._required("unplug", "plugged")))

    @contextlib.contextmanager
    def off(self) -> Iterator["Attachment"]:
        """`with attachment.off():` switches it off for the block, then puts it back in its old position and state. An
        attachment that was off before stays off; one that is removed or plugged inside the block stays so.

        Raises ValueError after `remove`, and while another attachment is merged on top of it; and, when the block ends,
        if it was merged into weights that have since changed, or another one is merged on top of its position."""
        before = self._required("switch off", "off", "plugged", "merged")
        if self.name not in before.plugged:
            yield self
            return
        off = self._taken_out("switch off", before)
        try:
            try:
                self._become(off)
                yield self
            finally:
                self._put_back(before, off)
        finally:
            self._put_back(before, off)  # again, in case the first was interrupted; else it changes nothing

    def merge(self, into: Any = None) -> MergeReport:
        """Replace its entry at every slot by a constant weight. The base array is kept beside it. Returns a report of
        what the merge lost; print it.

        into: None for the weight that the method merges into (`Reparam.merged`), by default a float weight, W~ + d.
        "requantized" quantizes this sum again as the base is. The original weights, as a model or {name: array}, merge
        over these in place of the quantized ones. `attaching/merging.py` compares the three.

        Raises ValueError unless it is plugged, where an entry below is not merged, where the method acts on hidden
        states and not on weights, and where the merged weight does not fit the slot; for "requantized" where no weight
        is quantized, and for original weights that do not fit; TypeError for another `into`."""
        now = self._required("merge", "plugged")
        constants, report = merged(self, now, into)
        self._become(now.replace(plugged={**now.plugged, self.name: constants}))
        return report

    def unmerge(self) -> None:
        """Drop the constants. Merging left the base arrays as they were, so every bit comes back.

        Raises ValueError unless it is merged, and while another attachment is merged on top of it."""
        now = self._required("unmerge", "merged")
        nothing_merged_above("unmerge", self.name, self._places, now)
        self._become(now.replace(plugged={**now.plugged, self.name: None}))

    def remove(self) -> None:
        """Take the attachment off the model for good. Its name can be used again.

        Raises ValueError while it is merged, while another attachment is merged on top of it, and after `remove`."""
        now = self._required("remove", "off", "plugged")
        if self.name in now.plugged:
            nothing_merged_above("remove", self.name, self._places, now)
        settle(now, changing=frozenset([self]))
        self._become(State(without(now.attached, self.name), without(now.plugged, self.name)))

    def save(self, file: str | os.PathLike) -> None:
        """Write its tensors to the safetensors file `file`, with the method, the names of the places, and a fingerprint
        of the weights that the tensors were trained on: an adapter is valid only on these. An attachment that was never
        trained names the base alone.

        Raises ValueError after `remove` and for numbers that are not finite, FileNotFoundError for a missing folder. If
        it raises, an older file of this name stays as it was."""
        self._required("save", "off", "plugged", "merged")
        for name, array in self._tensors().items():
            if array.dtype.kind == "f" and not to_host(xp.isfinite(array).all()):
                raise ValueError(f"{name} holds NaN or infinity: {file} is not written")
        trained = self.trained_on or on_base(self.model)
        adapter_file.write(file, self.name, self.method, list(self._places), self.tensors, trained.settled(self.model))

    @property
    def layer(self) -> Layer:
        """Its name and content, as another attachment's file records them."""
        tensors = self._tensors()
        now = marks(tensors)
        if now is None or self._known is None or self._known[0] != now:
            self._known = now, content(self.method, tensors)
        return Layer(self.name, self._known[1])

    def misfit(self, metadata: Mapping[str, str]) -> str | None:
        """Why an adapter file with this `metadata` cannot hold tensors of this attachment; None if it can."""
        if json.loads(metadata.get("method", "null")) != json.loads(adapter_file.method_text(self.method)):
            return f"its method is {shown(metadata.get('method'))}; expected {adapter_file.method_text(self.method)}"
        said, here = adapter_file.base_of(metadata), on_base(self.model)
        if said.base == here.base:
            return None
        return f"it was {across(said, here)}" if are_related(said, here) else "it was trained on another base model"

    def __repr__(self) -> str:
        return f"Attachment({self.name!r}, {type(self.method).__name__}, {self.state}, {len(self.places)} places)"

    def _tensors(self) -> dict[str, Array]:
        return {key: p.data for key, p in self._arrays.items()}

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

    def _taken_out(self, move: str, now: State) -> State:
        """The state without it. Remembers which attachments lie above it."""
        nothing_merged_above(move, self.name, self._places, now)
        order = list(now.plugged)
        self._above = frozenset(order[order.index(self.name) + 1:])
        return now.replace(plugged=without(now.plugged, self.name))

    def _put_back(self, before: State, off: State) -> None:
        """Put it back where it was before it was switched off, if it is still off."""
        now = self.model.host.now
        if now is off:
            self._become(before)
        elif self._state_in(now) == "off":
            back = inserted(now, self.name, before.plugged[self.name], self._above)
            nothing_merged_above("switch on", self.name, self._places, back)
            if self._state_in(back) == "merged" and not all(
                    lie_alike(place, self.name, before, back) for place in self.at):
                raise ValueError(f"{self.name!r} stays off: it was merged into weights that changed while it was off; "
                                 f"plug it and merge it again")
            self._become(back)
