"""`attach`: put a method on the places that it chooses in a model, and plug it.

    method.places(model)                    which places
    method.arrays(name, place, model)       which arrays each of them gets; `attach` draws their initial values
    method.make(name, place, arrays)        the piece that is made of these arrays
    host.now = State(...)                   all pieces attached and plugged, by one assignment

The model's own weights are not touched, and its layers do not know of the attachment: a slot reads the state at every
forward.
"""
from __future__ import annotations

import re

import numpy

from minipeft.attaching.attachment import Attachment
from minipeft.attaching.build import drawn, wanted
from minipeft.attaching.method import Method, checked
from minipeft.attaching.trained_on import record
from minipeft.attaching.trial import tried
from minipeft.checks import shown
from minipeft.nn.init import require_rng
from minipeft.nn.module import Model, whole
from minipeft.nn.state import State


def attach(model: Model, method: Method, rng: numpy.random.Generator, name: str | None = None) -> Attachment:
    """Attach `method` to the places of `model` that it chooses, and plug it.

    rng: draws the initial arrays. name: of the attachment, by default the method's in lower case. Raises ValueError for
    a taken or malformed name, a pattern that matches nothing and sizes out of range; TypeError for a method that is not
    registered, a part of a model and an rng that is not a generator; TypeError or ValueError for a method that breaks
    its contract (see `Method`). Whatever is raised, the model and rng stay as they were."""
    name = type(checked(method)).__name__.lower() if name is None else name
    check_name(model, name)
    require_rng(rng)
    plan, before = tried(wanted(model, method)), rng.bit_generator.state
    try:
        pieces, arrays = plan.built(drawn(plan, rng))
        attachment = Attachment(model, name, method, tried(plan, pieces, arrays).places, pieces, arrays)
        put(model, [attachment])
    except BaseException:
        rng.bit_generator.state = before
        raise
    return attachment


def put(model: Model, attachments: list[Attachment]) -> None:
    """Attach and plug these `attachments`, in order, by one assignment; `check_name` has accepted their names.

    Raises ValueError where one cannot lie above another that is plugged."""
    host, new = model.host, {a.name: a for a in attachments}
    state = State({**host.now.attached, **new}, {**host.now.plugged, **dict.fromkeys(new)})
    host.recorder = record
    host.now = state


def check_name(model: Model, name: str) -> None:
    """Raises ValueError unless `name` is well-formed and free on the model, TypeError for a part of a model."""
    attachments = whole(model).attachments
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name is {shown(name)}; expected letters, digits, '_' and '-'")
    if name in attachments:
        raise ValueError(f"an attachment named {name!r} is already on this model ({attachments[name].state}); "
                         f"pass another name, or remove it")
