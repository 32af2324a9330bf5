"""Checks the arguments of `fit` before anything is changed. Each error says what was passed and what to pass."""
from __future__ import annotations

import dataclasses
import os
from typing import Any, Callable, Mapping

from minipeft.engine.tensor import Leaf, leaves_of
from minipeft.checks import integer, number, python, shown
from minipeft.train.lock import lock_file
from minipeft.train.optim import AdamW
from minipeft.train.schedule import MAKERS, Schedule, ends_after

File = str | os.PathLike | None


@dataclasses.dataclass
class Settings:
    """The arguments of a run, as in `fit`, checked, with numbers as Python's. best, log, checkpoint: paths or None.
    Raises ValueError or TypeError naming an argument that is wrong."""

    steps: int
    schedule: Schedule
    clip: float | None
    accumulate: int
    seed: int
    dropout: bool
    evaluate: Callable[[], Any] | None
    eval_every: int | None
    patience: int | None
    best: File
    log: File
    checkpoint: File
    checkpoint_every: int

    def __post_init__(self) -> None:
        for what, least in {"steps": 1, "accumulate": 1, "seed": 0, "checkpoint_every": 1}.items():
            setattr(self, what, integer(what, getattr(self, what), least))
        if self.evaluate is not None and not callable(self.evaluate):
            raise TypeError(f"evaluate is {shown(self.evaluate)}; expected a function without arguments that returns a "
                            f"score, higher is better")
        for what, why in {"eval_every": "there is nothing to evaluate", "patience": "there is no score to wait for",
                          "best": "without scores there is no best one"}.items():
            if getattr(self, what) is not None and self.evaluate is None:
                raise ValueError(f"{what} is {shown(getattr(self, what))}, but {why}: pass evaluate=")
        if self.patience is not None and self.eval_every is None:
            raise ValueError(f"patience is {shown(self.patience)}, but eval_every is None, so the only evaluation "
                             f"comes after the last step: pass eval_every=")
        for what in ("eval_every", "patience"):
            if getattr(self, what) is not None:
                setattr(self, what, integer(what, getattr(self, what), 1))
        if self.clip is not None:
            expected = "a finite number > 0, or None"
            clip, self.clip = self.clip, number("clip", self.clip, expected=expected)
            if self.clip <= 0:
                raise ValueError(f"clip is {shown(clip)}; expected {expected}")
        if type(python(self.dropout)) is not bool:
            raise TypeError(f"dropout is {shown(self.dropout)}; expected True or False (the model's config sets the "
                            f"rate)")
        self.dropout = bool(self.dropout)
        _check_files({"log": self.log, "checkpoint": self.checkpoint, "best": self.best})
        _check_schedule(self.schedule, self.steps)


def _check_schedule(schedule: Any, steps: int) -> None:
    if schedule in MAKERS:
        name = schedule.__name__
        call = {"constant": "constant()", "inverse_sqrt": "inverse_sqrt(d_model)"}.get(name, f"{name}(steps)")
        raise TypeError(f"schedule is the function {name}; expected the schedule that it returns: {call}")
    if not callable(schedule):
        raise TypeError(f"schedule is {shown(schedule)}; expected a function of the step (1, 2, ...), such as "
                        f"linear_decay({steps})")
    if ends_after(schedule) < steps:
        raise ValueError(f"schedule is {shown(schedule)}, which ends before the {steps} steps of this run: its factor "
                         f"would stay at the last value; make it for {steps} steps")


def _check_files(paths: Mapping[str, Any]) -> None:
    files = {what: path for what, path in paths.items() if path is not None}
    for what, path in files.items():
        _check_file(what, path)
    for one, a in files.items():
        for other, b in files.items():
            if one != other and (os.path.realpath(a) == os.path.realpath(b)
                                 or os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)):
                raise ValueError(f"{one} and {other} are both {shown(os.fsdecode(a))}; expected different files")
            if os.path.realpath(a) == os.path.realpath(lock_file(b)):
                raise ValueError(f"{one} is {shown(os.fsdecode(a))}, which is the lock file of {other}; expected "
                                 f"another name")


def _check_file(what: str, path: Any) -> None:
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"{what} is {shown(path)}; expected the path of a file")
    text = os.fsdecode(path)
    if not text or "\0" in text or os.path.isdir(text):
        raise ValueError(f"{what} is {shown(text)}, {'a folder' if text and os.path.isdir(text) else 'not a path'}; "
                         f"expected the path of a file")
    try:
        os.stat(text)
    except FileNotFoundError:
        pass
    except OSError as error:  # such as a link to itself or a name that is too long: it could not be written either
        raise ValueError(f"{what} is {shown(text)}, which cannot be reached: {error.strerror}") from None
    if not os.path.isdir(os.path.dirname(os.path.realpath(text))):
        hint = "'~' is not expanded: pass Path(...).expanduser()" if text.startswith("~") else "create it first"
        raise ValueError(f"{what} is {shown(text)}, in a folder that does not exist: {hint}")


def check_objects(model: Any, batches: Any, optimizer: Any) -> None:
    """Raises TypeError, saying what to pass, for a model, batches or an optimizer of the wrong type."""
    if isinstance(model, type) or not callable(getattr(model, "loss", None)):
        raise TypeError(f"model is {shown(model)}; expected a model, with a method `loss`")
    if not all(callable(getattr(batches, name, None)) for name in ("next", "state", "load_state")):
        raise TypeError(f"batches is a {type(batches).__name__}; expected a stream of batches: wrap pairs of ids with "
                        f"Batches(pairs, batch_size)")
    if isinstance(batches, type):
        raise TypeError("batches is the class Batches; expected Batches(pairs, batch_size)")
    if isinstance(optimizer, type):
        raise TypeError(f"optimizer is the class {optimizer.__name__}; expected an instance: "
                        f"{optimizer.__name__}(lr=...)")
    if not isinstance(optimizer, AdamW):
        raise TypeError(f"optimizer is {shown(optimizer)}; expected AdamW(lr=...)")


def parameters(model: Any, params: Any) -> dict[str, Leaf]:
    """The parameters to train, {name: Parameter}. params: such a mapping, or an attachment of `model`.

    Raises TypeError for anything else; ValueError if there are none, if one has two names, if an array is read-only,
    and if training them would change nothing, because their attachment is off, merged, removed or of another model."""
    named = isinstance(params, Mapping)
    if not named and (isinstance(params, type) or not isinstance(getattr(params, "state", None), str)
                      or not hasattr(params, "parameters")):
        found = f"a {type(params).__name__}" if isinstance(params, (list, tuple, set)) else shown(params)
        raise TypeError(f"params is {found}; expected an attachment, or {{name: Parameter}} as minipeft.select(model, "
                        f"where) returns it")
    if not named:
        _check_attachment(model, params)
        params = params.parameters
    for name, p in leaves_of(params).items():
        if not isinstance(name, str):
            raise TypeError(f"params has the key {shown(name)}; expected names, as minipeft.select returns them")
        if not getattr(getattr(p.data, "flags", None), "writeable", True):
            raise ValueError(f"the array of {name} is read-only: p.data = p.data.copy() makes it writable")
    _check_owners(model, params)
    return dict(params)


def _check_attachment(model: Any, attachment: Any) -> None:
    name, state = attachment.name, attachment.state
    if state == "removed":
        raise ValueError(f"the attachment {name!r} was removed from its model: attach it again")
    if attachment.model is not model:
        raise ValueError(f"the attachment {name!r} belongs to another model, not to the one that is to be trained")
    if state == "off":
        raise ValueError(f"the attachment {name!r} is off, so the loss does not depend on it: plug() it first")
    if state == "merged":
        raise ValueError(f"the attachment {name!r} is merged, so the loss depends on the merged weights and not on its "
                         f"parameters: unmerge() first")


def _check_owners(model: Any, params: Mapping[str, Leaf]) -> None:
    """Raises ValueError, saying why, if the loss will not depend on a parameter, as far as the model can tell."""
    attachments = getattr(model, "attachments", None)
    base = getattr(model, "base_parameters", None)
    if not isinstance(attachments, Mapping) or not isinstance(base, Mapping):
        return
    known, names = set(map(id, base.values())), set(base)
    wanted = set(map(id, params.values()))
    for attachment in attachments.values():
        own = attachment.parameters
        known.update(map(id, own.values()))
        names.update(own)
        if wanted.intersection(map(id, own.values())):
            _check_attachment(model, attachment)
    for name, p in params.items():
        if id(p) not in known and (name in names or "@" in str(name)):
            raise ValueError(f"params[{shown(name)}] is not a parameter of this model: it belongs to another model, or "
                             f"to an attachment that was removed")
