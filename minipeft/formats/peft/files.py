"""From a directory of PEFT's to an attachment, and back."""
from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any, Mapping

import numpy

from minipeft.attaching.attach import put
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.load import made
from minipeft.checks import shown
from minipeft.files import read_shapes
from minipeft.formats.arrays import finite, named
from minipeft.formats.folder import default_name, read_finite
from minipeft.formats.peft import beside
from minipeft.formats.peft.codec import CODECS, HARMLESS, Codec
from minipeft.formats.peft.copies import check_copies, copies
from minipeft.formats.peft.directory import NAMES, codec_for
from minipeft.formats.peft.names import check_shapes, mapped, modules, stripped
from minipeft.formats.peft.targets import idle
from minipeft.formats.row import shapes_of, to_ours, to_theirs
from minipeft.models.folder import naming
from minipeft.nn.module import Model

VERSION = "0.21.2"  # of the PEFT whose files these are


@dataclasses.dataclass(frozen=True)
class Source:
    """The contents of a directory of PEFT's beyond method and tensors. config: all its fields. tensors: {key: array} of
    those of which we use a part alone, or the difference from the base. notes: sentences for the reader."""

    config: Mapping[str, Any]
    tensors: Mapping[str, numpy.ndarray] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load(model: Model, path: str | os.PathLike, name: str | None = None, as_peft: bool = False) -> Attachment:
    """The adapter in the directory `path`, attached to `model` and plugged. name: by default that of the directory.
    as_peft: where PEFT departs from the paper of a method, do as PEFT does; without it such a file is refused.

    Every tensor of the file has its place on the model, or nothing is changed. The base is not checked, because PEFT's
    files do not say which tensors they were trained on. Raises ValueError, naming the directory, for a peft_type or
    field that is not supported, a departure from the paper without as_peft, tensors that are missing, extra, empty, of
    another shape or not finite, and a taken name; FileNotFoundError for a missing file. Warns where keys were renamed
    in order to be read, of names that choose nothing, and of what PEFT does otherwise."""
    attachment = read(model, Path(path), name, as_peft)
    for note in attachment.source.notes:  # first, for those who turn warnings into errors
        warnings.warn(f"{path}: {note}", stacklevel=2)
    put(model, [attachment])
    return attachment


def read(model: Model, directory: Path, name: str | None = None, as_peft: bool = False) -> Attachment:
    """The attachment that `load` puts on the model, not attached yet. name, as_peft, what it raises: as in `load`."""
    with naming(directory):
        config, file = NAMES.read_config(directory), NAMES.weights_of(directory)
        codec, stored = codec_for(config), read_shapes(file)
        config = {**config, **{field: v for field, v in codec.defaults.items() if config.get(field) is None}}
        if not stored:
            raise ValueError(f"{file.name} holds no tensor at all: this adapter does nothing")
        main = codec.method(config, {stripped(key): shape for key, shape in stored.items()}, model)
        departure = codec.departure(main, model)
        if departure and not as_peft:
            raise ValueError(f"{departure}. Pass as_peft=True to get the numbers of PEFT")
        method = beside.joined(main, codec, config, model)
        rows = beside.rows(method, codec, model, config)
        bases = copies(stored, {row.theirs for row in rows}, model)
        expected = {**shapes_of(rows), **{key: array.shape for key, array in bases.items()}}
        renamed, notes = mapped(stored, expected, model, hint=_advice(config, model))
        check_shapes({renamed[key]: shape for key, shape in stored.items()}, expected)
        theirs = read_finite(file, renamed)
        check_copies(theirs, bases)
        main = codec.completed(main, theirs, model)
        method = beside.joined(main, codec, config, model)
        rows = beside.rows(method, codec, model, config)
        ours = {**to_ours(rows, theirs), **beside.computed(method, codec, model, config)}
        found = made(model, directory, default_name(directory) if name is None else name, lambda: method, ours, None)
        restored = {row.theirs for row in rows if row.at is ... and row.base is None}
        notes += [*codec.notes(main, model, config),
                  *beside.notes([row.theirs for row in rows], codec, config, model)]
        found.source = Source(config, {key: array for key, array in theirs.items() if key not in restored},
                              tuple(notes))
        return found


def _advice(config: Mapping[str, Any], model: Model) -> str:
    """The end of the error for tensors that are not those of their config on this model: likely reasons, and advice."""
    base, names = config.get("base_model_name_or_path"), idle(config, modules(model))
    return ". ".join([
        *([f"In target_modules, {', '.join(map(shown, names[:3]))} chooses no module of this model"] if names else []),
        *([f"The file calls its base {shown(base)}"] if base and isinstance(base, str) else []),
        "Expected a model like the one that it was trained on, and the configuration that was saved with it"])


def save(attachment: Attachment, path: str | os.PathLike, base_model: str | None = None,
         dtype: str | None = None) -> None:
    """Write the attachment as a directory that PEFT reads, with adapter_config.json and adapter_model.safetensors.

    path: a new or empty folder. base_model: what base_model_name_or_path says; by default as in the directory that the
    attachment came from, else null. dtype: how tensors are stored ("float32", "bfloat16", ...); None keeps their own.
    Fields that were read and mean nothing here are written back. Raises ValueError, before anything is written, for a
    method that PEFT does not have or cannot hold, and for numbers that are not finite."""
    codec, config, arrays = _codec(attachment), written_config(attachment), finite(attachment, path)
    rows, kept = beside.rows(attachment.method, codec, attachment.model, config), _kept(attachment)
    tensors = {**kept, **to_theirs(rows, arrays, True, kept)}
    config["base_model_name_or_path"] = config.get("base_model_name_or_path") if base_model is None else base_model
    for note in beside.notes([row.theirs for row in rows], codec, config, attachment.model):
        warnings.warn(f"{path}: {note}", stacklevel=2)
    NAMES.write(path, config, tensors, dtype)


def to_peft(attachment: Attachment, arrays: Mapping[str, Any], gradients: bool | None = None) -> dict[str, Any]:
    """{PEFT's key: array}: arrays of the attachment under PEFT's keys, in its shapes and orientations.

    arrays: {name: array}, with names as in `attachment.parameters` or `attachment.tensors`: values or gradients.
    gradients: which of the two they are. It matters where PEFT's tensor includes the base weight and ours does not,
    such as a copy of a head. By default, arrays that are all equal to the attachment's own are values, and others are
    gradients. Gradients of numbers that are not trained are 0, as PEFT has them. Raises ValueError for an unknown name
    and for another shape."""
    found, gradients = named(attachment, arrays, gradients)
    rows = beside.rows(attachment.method, _codec(attachment), attachment.model, written_config(attachment))
    return to_theirs(rows, found, not gradients, _kept(attachment))


def written_config(attachment: Attachment) -> dict[str, Any]:
    """All fields of the adapter_config.json that `save` writes for the attachment. Raises ValueError for a method that
    PEFT does not have or cannot hold."""
    codec, read = _codec(attachment), attachment.source.config if isinstance(attachment.source, Source) else {}
    task = "SEQ_2_SEQ_LM" if hasattr(attachment.model, "encoder") else "CAUSAL_LM"
    config = {"task_type": task, "peft_version": VERSION, "base_model_name_or_path": None, "revision": None,
              "auto_mapping": None, **codec.defaults}
    main = beside.main_of(attachment.method, attachment.model)
    return {**config, **codec.config_again(main, attachment.model, read), **_source(attachment),
            **beside.written(attachment.method, codec, attachment.model, read),
            "peft_type": codec.peft_type, "inference_mode": True}


def _source(attachment: Attachment) -> Mapping[str, Any]:
    """The fields of the file that the attachment came from that still hold: those that no method decides."""
    source = attachment.source
    if not isinstance(source, Source):
        return {}
    decided = (_codec(attachment).used | beside.fields(_codec(attachment))) - HARMLESS
    return {field: value for field, value in source.config.items() if field not in decided}


def _kept(attachment: Attachment) -> Mapping[str, numpy.ndarray]:
    return attachment.source.tensors if isinstance(attachment.source, Source) else {}


def _codec(attachment: Attachment) -> Codec:
    """The codec that writes the attachment: that of the file that it came from, else the first for its method."""
    method = attachment.method
    said = attachment.source.config["peft_type"] if isinstance(attachment.source, Source) else None
    if not attachment.places:
        raise ValueError(f"{attachment.name!r} was removed from its model")
    main = beside.main_of(method, attachment.model)
    found = [codec for codec in CODECS.values() if codec.writes(main)]
    if not found:
        raise ValueError(f"{attachment.name!r} cannot be written for PEFT, which has nothing like {shown(method)}")
    return next((codec for codec in found if codec.peft_type == said), found[0])
