"""`attach`: build a method on the places that it chooses in a model, and plug it."""
from __future__ import annotations

import re
from typing import Any, Protocol

import numpy

from minipeft.checks import shown
from minipeft.nn.init import require_rng
from minipeft.nn.module import Model, whole
from minipeft.nn.state import State
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.trained_on import record


class Method(Protocol):
    """Hyper-parameters, where they apply, {name: place}, and what is put there, {name: piece}. A frozen dataclass.

    `places` raises for what does not fit the model, before `build` draws a number; `shapes` says how large the arrays
    of a piece will be, {leaf: shape}, before they are made. Without rng, `build` makes zeros, to be filled."""

    def places(self, model: Any) -> Any: ...
    def shapes(self, name: str, place: Any, model: Any) -> dict[str, tuple]: ...
    def build(self, model: Any, places: Any, rng: Any) -> Any: ...


def attach(model: Model, method: Method, rng: numpy.random.Generator, name: str | None = None) -> Attachment:
    """Build `method` on the places that it chooses in `model`, and plug it.

    name: how the attachment is called, by default the method's name in lower case. Raises ValueError, before any
    random number is drawn, for a taken or malformed name, a pattern that matches nothing, and sizes out of range;
    TypeError for something that is no method, no whole model or no generator."""
    if isinstance(method, type) or not hasattr(method, "places"):
        raise TypeError(f"method is {shown(method)}; expected one such as LoRA(rank=8)")
    name = type(method).__name__.lower() if name is None else name
    check_name(model, name)
    require_rng(rng)
    places = dict(method.places(model))
    attachment = Attachment(model, name, method, places, method.build(model, places, rng))
    put(model, [attachment])
    return attachment


def put(model: Model, attachments: list[Attachment]) -> None:
    """Attach and plug these, in order, by one assignment; their names have passed `check_name`.

    Raises ValueError where one cannot lie above what is plugged."""
    host, new = model.host, {a.name: a for a in attachments}
    host.recorder = record
    host.now = State({**host.now.attached, **new}, {**host.now.plugged, **dict.fromkeys(new)})


def check_name(model: Model, name: str) -> None:
    """Raises ValueError unless `name` is well-formed and free on the model, TypeError for a part of a model."""
    attachments = whole(model).attachments
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name is {shown(name)}; expected letters, digits, '_' and '-'")
    if name in attachments:
        raise ValueError(f"an attachment named {name!r} is already on this model ({attachments[name].state}); "
                         f"pass another name, or remove it")
