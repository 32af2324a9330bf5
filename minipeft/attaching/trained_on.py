"""The weights that the tensors of an attachment were trained on, identified by content and not by name.

    base        the model's own tensors and configuration
    below       the attachments that were plugged below it, bottom first, anywhere in the model
    together    the attachments that were trained in the same steps

The record is made whenever the attachment's parameters are differentiated for an update (the engine's
`when_differentiated`), so a loop written by hand counts like `fit`. An attachment below that is not trained itself is
recorded with its content at that moment. One that is trained in the same step is still changing, so its content is
recorded ("settled") later: before it changes in another step, when it is removed, or when the record is saved.

The fingerprint of the base takes a pass over all weights, so it is computed once and remembered. It is computed again
after the base was trained or replaced. A sample of its numbers is compared to notice arrays overwritten by hand.

A base that `quantize` made has an origin, and the record names it too (`origin.py`).
"""
from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any, Mapping

import numpy

from minipeft.backend import Array, to_host
from minipeft.nn.fingerprint import fingerprint, sha256
from minipeft.nn.module import Model
from minipeft.nn.state import Host, Names, State
from minipeft.attaching.fields import described
from minipeft.attaching.origin import Origin


@dataclasses.dataclass(frozen=True)
class Layer:
    """An attachment in the record of another one. name: for people alone. content: a fingerprint."""

    name: str
    content: str


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """The record. base: a fingerprint; None for a base that was trained in the same steps. below, together: layers, or
    attachments whose content is not settled yet. origin: of a quantized base."""

    base: str | None
    below: tuple[Any, ...] = ()
    together: tuple[Any, ...] = ()
    origin: Origin | None = None

    def settled(self, model: Model | None = None, changing: frozenset | None = None) -> "TrainedOn":
        """The record with the present content of the attachments in `changing` (by default all of them) and, if a model
        is given and `base` is None, of its base."""
        def layer(other: Any) -> Any:
            return other if isinstance(other, Layer) or changing is not None and other not in changing else other.layer

        on = on_base(model) if self.base is None and model is not None else self
        return TrainedOn(on.base, tuple(map(layer, self.below)), tuple(map(layer, self.together)), on.origin)


def content(method: Any, tensors: Mapping[str, Array]) -> str:
    """A fingerprint of an attachment: of its method's name and fields, and of its tensors {"place.leaf": array}."""
    fields = described(method)
    if (fields["kind"], fields.get("init")) == ("LoRA", "kaiming"):
        fields["init"] = "uniform"  # as it was called in minipeft 0.2, whose files hold such fingerprints
    said = json.dumps(fields, sort_keys=True)
    return sha256([said.encode(), fingerprint(tensors).encode()])


def content_of_base(model: Model) -> str:
    """A fingerprint of a bare model: its tensors, and every field of its configuration that changes what it
    computes."""
    bases = [getattr(place, "base", None) for place in model.host.places]  # quicker than by name, at every step
    sample = [_sample(array.data) for base in bases for array in getattr(base, "arrays", {}).values()]
    known = model.host.remembered
    if known is None or known[0] != sample:
        computes = getattr(getattr(model, "config", None), "computes", dict)
        said = json.dumps(computes(), sort_keys=True)
        known = model.host.remembered = sample, sha256([said.encode(), fingerprint(model.state()).encode()])
        model.host.recorder = record  # it forgets this when the base is trained or replaced
    return known[1]


def origin_of(model: Model) -> Origin | None:
    """The origin of the base of `model`. None for a base that was not quantized, and for one that was trained or
    replaced since."""
    known = model.host.origin
    return None if known is None or known[0] != content_of_base(model) else known[1]


def has_origin(model: Model, origin: Origin) -> None:
    """From now on the base of `model`, as it is, has this `origin`."""
    model.host.origin = content_of_base(model), origin


def on_base(model: Model) -> TrainedOn:
    """The record of tensors that are valid on the base of `model` alone."""
    return TrainedOn(content_of_base(model), origin=origin_of(model))


def _sample(array: Array) -> tuple:
    """The identity of an array and, on the host, a few dozen of its numbers, evenly spread. Quick to read, it changes
    when the array is replaced or, almost surely, when it is overwritten."""
    if type(array) is not numpy.ndarray or array.dtype.hasobject:
        return (id(array),)
    return id(array), array.reshape(-1)[::max(1, array.size // 32)].tobytes()


def marks(tensors: Mapping[str, Array]) -> list[int] | None:
    """A checksum of each array of `tensors`, {name: array}: a cheap way to notice any changed number. None where an
    array holds objects."""
    host = [numpy.ascontiguousarray(to_host(array)) for array in tensors.values()]
    return None if any(array.dtype.hasobject for array in host) else [zlib.crc32(array.data) for array in host]


def settle(state: State, changing: frozenset, model: Model | None = None) -> None:
    """Put the present content of the attachments `changing` of this state (and, with a model, of its base) into the
    records of others that were trained together with them. To be called before they change in a step of their own."""
    for attachment in state.attached.values():
        record = attachment.trained_on  # type: ignore[attr-defined]
        if attachment not in changing and record is not None:
            attachment.trained_on = record.settled(model, changing)  # type: ignore[attr-defined]


def record(host: Host, state: State, orders: frozenset[Names], parameters: frozenset) -> None:
    """The `recorder` of a model `host` with attachments: makes the record of each attachment that has some of the
    `parameters`, which were differentiated in this state. orders: the attachments that the rows of the batch saw, each
    bottom first."""
    attached: dict[str, Any] = dict(state.attached)
    trained = {name: a for name, a in attached.items() if not a.own.isdisjoint(parameters)}
    others = parameters.difference(*(a.own for a in trained.values()))
    base_too = bool(others) and any(
        p in others for place in host.places for p in getattr(getattr(place, "base", None), "arrays", {}).values())
    model = next(iter(attached.values())).model if attached else None
    settle(state, frozenset(trained.values()), model if base_too else None)
    if base_too:
        host.remembered = None
    for name, attachment in trained.items():
        seen = [order for order in orders if name in order]
        if seen:
            order = max(seen, key=lambda order: (order.index(name), order))
            below = [attached[n] for n in order[:order.index(name)]]
            beside = [n for n in trained if n != name and any(n in order for order in seen)]
            on = TrainedOn(None) if base_too else on_base(attachment.model)
            attachment.trained_on = dataclasses.replace(
                on, below=tuple(a if a.name in trained else a.layer for a in below),
                together=tuple(trained[n] for n in beside))
