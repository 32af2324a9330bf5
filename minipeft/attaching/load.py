"""Loading attachments from files onto a model: everything is checked before the model is touched."""
from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any, Callable, Mapping, Sequence, overload

import numpy

from minipeft.attaching import adapter_file
from minipeft.attaching.adapter_file import AdapterFile
from minipeft.attaching.attach import check_name, put
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.build import Plan, wanted
from minipeft.attaching.method import Declared, class_of
from minipeft.attaching.origin import across, are_related
from minipeft.attaching.trained_on import TrainedOn, content, content_of_base, on_base
from minipeft.attaching.trial import tried
from minipeft.backend import Array, to_device
from minipeft.checks import shown
from minipeft.nn.fingerprint import fingerprint
from minipeft.nn.module import Model
from minipeft.nn.where import exactly

_ADDED_LATER = {"PromptTuning": frozenset({"next_to_text"})}  # fields that early files of version 1 do not have
Path = str | os.PathLike


@overload
def load(model: Model, path: Path, force: bool = False, name: str | None = None) -> Attachment: ...


@overload
def load(model: Model, path: list[Path] | tuple[Path, ...], force: bool = False,
         name: Sequence[str] | None = None) -> list[Attachment]: ...


def load(model: Model, path: Any, force: bool = False, name: Any = None) -> Any:
    """The attachment in the adapter file `path`, attached to `model` and plugged. name: by default that in the file.

    A list of paths gives a list of attachments, and `name` is then a list too. They are plugged together, each above
    those that it was trained on, or not at all. Adapters that were trained in the same steps are loaded in this way.

    An adapter is valid only on the weights that it was trained on. So the model must have these: the same base, in
    tensors and configuration; below the adapter, plugged attachments of the same content, whatever their names; and the
    attachments that were trained together with it. A base and its quantizations are relatives: an adapter of one of
    them is loaded on another with a warning (`origin.py`). force=True skips these checks, and no others.

    Raises a ValueError that names the file, and leaves the model as it was: where these checks fail; for a damaged
    file; for places that the model lacks; for fields that are missing or unknown; for tensors that are missing, extra,
    of another shape or dtype or not finite; and for a name that is taken. Shapes are compared with the file's before
    any array of that size is made. A file of version 1 is checked by the rules of version 1, with a warning."""
    found = ready(model, path, force, name)
    for note in found.notes:  # first, for those who turn warnings into errors
        warnings.warn(note, stacklevel=2)
    return found.put()


@dataclasses.dataclass(frozen=True)
class Ready:
    """Attachments that were read from files and fit their model. attachments: in the order of the files. ordered: each
    with its file, in the order in which they will be plugged. notes: the warnings for whoever loads them.
    several: whether a list of files was asked for."""

    model: Model
    attachments: list[Attachment]
    ordered: list[tuple[AdapterFile, Attachment]]
    notes: list[str]
    several: bool

    def put(self) -> Any:
        """Attach and plug them; returns them as `load` does. Raises ValueError where one cannot lie above another."""
        try:
            put(self.model, [attachment for _, attachment in self.ordered])
        except ValueError as error:
            raise ValueError(f"{', '.join(file.path for file, _ in self.ordered)}: {error}") from None
        return self.attachments if self.several else self.attachments[0]


def ready(model: Model, path: Any, force: bool = False, name: Any = None) -> Ready:
    """The attachments that `load` would put on the model. path, force, name: as in `load`, which says what is raised.
    Nothing changes."""
    several = isinstance(path, (list, tuple))
    paths = list(path) if several else [path]
    names = [name] * len(paths) if name is None or not several else list(name)
    if not paths or len(names) != len(paths):
        raise ValueError(f"{len(paths)} files and {len(names)} names; expected at least one file, and a name for each")
    read = [_attachment(model, adapter_file.read(p), n) for p, n in zip(paths, names)]
    twice = [a.name for i, (_, a) in enumerate(read) if a.name in [b.name for _, b in read[:i]]]
    if twice:
        raise ValueError(f"two of the files are called {twice[0]!r}; pass name=[...], one for each")
    notes = [] if force else [note for file, _ in read for note in _base_notes(model, file)]
    ordered = _in_order(model, read, force)
    notes += [f"{file.path} is an adapter file of version 1, which names the attachments that were plugged when it was "
              f"saved, not those that it was trained on; save it again for version 2"
              for file, _ in read if file.version == "1"]
    return Ready(model, [attachment for _, attachment in read], ordered, notes, several)


def _attachment(model: Model, file: AdapterFile, name: str | None) -> tuple[AdapterFile, Attachment]:
    """The attachment of a file, made for this model and not attached yet."""
    trained_on = file.trained_on if file.version != "1" else _as_version_1_meant(model, file)
    return file, made(model, file.path, file.name if name is None else name, lambda: _method(model, file), file.tensors,
                      trained_on)


def made(model: Model, path: Any, name: str, method: Callable[[], Any], tensors: Mapping[str, numpy.ndarray],
         trained_on: TrainedOn | None) -> Attachment:
    """An attachment called `name`, made for this model of the file `path`, and not attached yet. method: makes the
    method that the file describes. tensors: {"place.leaf": array}, on the host. Raises a ValueError that names the file
    for a name that is taken, a method that does not fit the model, and tensors that do not fit the method. Shapes are
    compared before anything of these sizes is made."""
    try:
        check_name(model, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        plan = wanted(model, method())
    except Exception as error:  # the method's own code read the file's fields
        raise ValueError(f"{path}: does not fit this model: {error}") from error
    _same_shapes(path, plan, tensors)
    try:
        tried(plan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not fit this model: {error}") from error

    def from_file(key: str, declared: Declared, dtype: Any) -> Array:
        return to_device(_fitting(f"{path}: {key}", tensors[key], dtype))

    pieces, arrays = plan.built(from_file)
    try:
        tried(plan, pieces, arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not fit this model: {error}") from error
    return Attachment(model, name, plan.method, plan.places, pieces, arrays, trained_on)


def _same_shapes(path: Any, plan: Plan, tensors: Mapping[str, numpy.ndarray]) -> None:
    """Raises ValueError unless `tensors` are exactly the arrays that the method declares, in their shapes."""
    shapes = {key: declared.shape for key, (declared, _) in plan.arrays().items()}
    if set(shapes) != set(tensors):
        odd = sorted(set(shapes) ^ set(tensors))
        raise ValueError(f"{path}: {shown(odd[0])} is {'missing' if odd[0] in shapes else 'not expected'} "
                         f"({len(odd)} tensors do not match)")
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            raise ValueError(f"{path}: {key} has shape {list(tensors[key].shape)}; expected {list(shape)}")


def _method(model: Model, file: AdapterFile) -> Any:
    """The method of a file, on the places that the file names. ValueError for one that the model lacks, for fields that
    are missing, and for texts that were altered."""
    kind = class_of(file.kind, file.fields, _ADDED_LATER.get(file.kind, frozenset()) if file.version == "1"
                    else frozenset())
    if file.altered:
        raise ValueError("its metadata was changed after it was written: the signature does not match")
    known = {name for name, _ in model.named_places()}
    unknown = [place for place in file.places if place not in known]
    if unknown:
        raise ValueError(f"it has no place {shown(unknown[0])} ({len(unknown)} of {len(file.places)} are missing)")
    return kind.from_file(file.fields, exactly(file.places), file.tensors)


def _fitting(what: str, array: numpy.ndarray, dtype: Any) -> numpy.ndarray:
    """The array of a file in the dtype that the method declares. ValueError for another kind of dtype, and for numbers
    that are not finite in it."""
    if array.dtype.kind != dtype.kind:
        raise ValueError(f"{what} has dtype {array.dtype}; expected "
                         f"{'floating point' if dtype.kind == 'f' else dtype}")
    with numpy.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if dtype.kind in "iu" and not numpy.array_equal(narrow, array):
        raise ValueError(f"{what} holds integers beyond {dtype}")
    if not numpy.isfinite(narrow).all():
        raise ValueError(f"{what} holds numbers that are not finite in {dtype}")
    return narrow


# ---- the weights it was trained on


def _base_notes(model: Model, file: AdapterFile) -> list[str]:
    """Nothing where the model has the base of the file, a warning where it has a relative; else raises ValueError."""
    found = fingerprint(model.state()) if file.version == "1" else content_of_base(model)
    if found != file.trained_on.base:
        if file.version != "1" and are_related(file.trained_on, here := on_base(model)):
            return [f"{file.path}: {across(file.trained_on, here)}"]
        raise ValueError(f"{file.path}: made for another base model, of other tensors or another configuration "
                         f"(fingerprint {shown(file.trained_on.base)[1:13]}..., this model has {found[:12]}...); load "
                         f"that base, or pass force=True if you know that they agree")
    return []


def _as_version_1_meant(model: Model, file: AdapterFile) -> TrainedOn:
    """The attachments that were plugged below when a file of version 1 was saved, as a record of version 2, as far as
    they are on this model."""
    here = [model.attachments[n] for n in file.below_in_v1 if n in model.attachments]
    return dataclasses.replace(on_base(model), below=tuple(a.layer for a in here))


def _in_order(model: Model, read: list[tuple[AdapterFile, Attachment]],
              force: bool) -> list[tuple[AdapterFile, Attachment]]:
    """The files in an order in which each lies above those that it was trained on. ValueError where there is none."""
    if force:
        return read
    plugged = [model.attachments[name] for name in model.plugged]
    below = [a.layer.content for a in plugged]
    waiting, ordered = list(read), []
    while waiting:
        ready = next((pair for pair in waiting if not _lacks(pair[0], below, model)), None)
        if ready is None:
            raise ValueError(_lacks(waiting[0][0], below, model))
        waiting.remove(ready)
        ordered.append(ready)
        below.append(content(ready[1].method, ready[0].tensors))  # as the file has them, before any rounding
    for file, attachment in ordered:
        for other in attachment.trained_on.together if attachment.trained_on else ():
            if other.content not in below:
                there = other.name in [a.name for _, a in ordered] or other.name in model.attachments
                raise ValueError(f"{file.path}: was trained together with attachment {shown(other.name)}, which is "
                                 f"neither plugged here with the same tensors nor among the files"
                                 + (" (the one of this name here has other tensors, as after more training)"
                                    if there else "") +
                                 f"; load both in one call, load(model, [{shown(os.path.basename(file.path))}, ...]), "
                                 f"or pass force=True")
    return ordered


def _lacks(file: AdapterFile, below: list[str], model: Model) -> str | None:
    """Why a file cannot lie above attachments of the contents `below`, bottom first; None if it can."""
    if file.version == "1":
        for name, saved in file.below_in_v1.items():
            other = model.attachments.get(name)
            if other is None or other.state == "off" or fingerprint(other.tensors) != saved:
                return _not_here(file, name)
        return None
    at = 0
    for layer in file.trained_on.below:
        if layer.content not in below[at:]:
            return _not_here(file, layer.name, layer.content in below)
        at = below.index(layer.content, at) + 1
    return None


def _not_here(file: AdapterFile, name: str, elsewhere: bool = False) -> str:
    where = "plugged in another order here" if elsewhere else "not plugged here with the same tensors"
    return (f"{file.path}: was trained on top of attachment {shown(name)}, which is {where}; load and plug it first, "
            f"or pass force=True")
