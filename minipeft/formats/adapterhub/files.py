"""From a directory of AdapterHub's to an attachment, and back."""
from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any, Mapping

from minipeft.attaching.attach import put
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.load import made
from minipeft.files import read_shapes
from minipeft.formats.adapterhub.codecs import codec_for, parts, writer
from minipeft.formats.adapterhub.directory import NAMES, VERSION, read_config
from minipeft.formats.adapterhub.head import check_head
from minipeft.formats.adapterhub.names import HERE
from minipeft.formats.arrays import finite, named
from minipeft.formats.folder import default_name, read_finite
from minipeft.formats.peft.codec import Codec
from minipeft.formats.peft.names import check_shapes, mapped
from minipeft.formats.row import Row, shapes_of, to_ours, to_theirs
from minipeft.models.folder import naming
from minipeft.models.t5 import T5
from minipeft.nn.module import Model

_MODEL = "transformer."  # in front of every key of a T5AdapterModel


@dataclasses.dataclass(frozen=True)
class Source:
    """The contents of a directory of AdapterHub's beyond method and tensors. outer: all fields of adapter_config.json.
    config: those of its "config", as they are meant today. notes: the changes that were made in order to read it."""

    outer: Mapping[str, Any]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def load(model: Model, path: str | os.PathLike, name: str | None = None, with_head: bool = True,
         as_adapterhub: bool = False) -> Attachment:
    """The adapter in the directory `path`, attached to `model`, a T5, and plugged. name: by default that of the
    directory. with_head: whether a head that lies beside the adapter must be that of the model; False leaves it alone.
    as_adapterhub: whether a prefix is loaded with the distances that AdapterHub's T5 gives the tokens (`prefix.py`).

    Every tensor of the file has its place on the model, or nothing is changed. The base is not checked, because the
    files do not say which tensors they were trained on. Raises ValueError, naming the directory, for another model, a
    method or field that is not supported, tensors that are missing, extra, empty, of another shape or not finite,
    another head, and a taken name; FileNotFoundError for a missing file. Warns where keys or fields were changed in
    order to be read."""
    attachment = read(model, Path(path), name, with_head, as_adapterhub)
    for note in attachment.source.notes:  # first, for those who turn warnings into errors
        warnings.warn(f"{path}: {note}", stacklevel=2)
    put(model, [attachment])
    return attachment


def read(model: Model, directory: Path, name: str | None = None, with_head: bool = True,
         as_adapterhub: bool = False) -> Attachment:
    """The attachment that `load` puts on the model, not attached yet. name, with_head and as_adapterhub are those of
    `load`. Raises as in `load`."""
    with naming(directory):
        if not isinstance(model, T5):
            raise ValueError(f"AdapterHub's files are read for T5 alone, and this is a {type(model).__name__}")
        (outer, config, notes), file = read_config(directory, model), NAMES.weights_of(directory)
        codec = codec_for(config)
        if not as_adapterhub and any(part.get("architecture") == "prefix_tuning" for part in parts(config)):
            raise ValueError(
                "it has a prefix, and in AdapterHub's T5 a prefix of P also moves all tokens P positions away from "
                "their queries, which no paper says. To load it with these distances, and so with its numbers, call "
                "minipeft.formats.adapterhub.load(model, directory, as_adapterhub=True)")
        stored = read_shapes(file)
        if not stored:
            raise ValueError(f"{file.name} holds no tensor at all: this adapter does nothing")
        method = codec.method(config, stored, model)
        rows = _named(codec.rows(method, model, config), outer["name"])
        inside = len(_MODEL) if all(key.startswith(_MODEL) for key in stored) else 0
        bare = {key: key[inside:] for key in stored}
        renamed, words = mapped(bare.values(), shapes_of(rows), library="AdapterHub")
        check_shapes({renamed[bare[key]]: shape for key, shape in stored.items()}, shapes_of(rows))
        theirs = read_finite(file, {key: renamed[bare[key]] for key in stored})
        if with_head:
            check_head(model, directory, theirs)
        found = made(model, directory, default_name(directory) if name is None else name, lambda: method,
                     to_ours(rows, theirs), None)
        found.source = Source(outer, config, (*notes, *words))
        return found


def save(attachment: Attachment, path: str | os.PathLike, base_model: str | None = None,
         dtype: str | None = None) -> None:
    """Write the attachment as a directory that AdapterHub reads, with adapter_config.json and adapter.safetensors.

    path: a new or empty folder. base_model: the value of model_name; by default as in the directory that the attachment
    came from, else null. dtype: how tensors are stored ("float32", "bfloat16", ...); None keeps their own. Fields that
    were read and mean nothing here are written back. No head is written: it belongs to the base. Raises ValueError,
    before anything is written, for a method that AdapterHub does not have or cannot hold, and for numbers that are not
    finite."""
    outer, arrays = written_config(attachment, base_model), finite(attachment, path)
    NAMES.write(path, outer, to_theirs(_rows(attachment, outer), arrays, True), dtype)


def to_adapterhub(attachment: Attachment, arrays: Mapping[str, Any], gradients: bool | None = None) -> dict[str, Any]:
    """{AdapterHub's key: array}: arrays of the attachment under AdapterHub's keys, in its shapes and orientations.

    arrays: {name: array}, with names as in `attachment.parameters` or `attachment.tensors`. gradients: whether they are
    gradients; by default, arrays that are all equal to the attachment's own are values. Raises ValueError for an
    unknown name, for another shape, and as `save` does."""
    found, gradients = named(attachment, arrays, gradients)
    return to_theirs(_rows(attachment, written_config(attachment)), found, not gradients)


def written_config(attachment: Attachment, base_model: str | None = None) -> dict[str, Any]:
    """All fields of the adapter_config.json that `save` writes for the attachment; base_model as in `save`. Raises
    ValueError for a method that AdapterHub cannot hold."""
    source, model = attachment.source, attachment.model
    config = _codec(attachment).config(attachment.method, model)
    width = model.config.d_model  # type: ignore[attr-defined]  # _codec has seen that it is a T5
    outer = {"name": attachment.name, "model_name": None, "model_class": "T5ForConditionalGeneration",
             "model_type": "t5"}
    if isinstance(source, Source):
        config, outer = {**config, **source.config}, {**outer, **source.outer}
    if base_model is not None:
        outer["model_name"] = base_model
    return {**outer, "config": config, "hidden_size": width, "version": VERSION}


def _codec(attachment: Attachment) -> Codec:
    if not attachment.places:
        raise ValueError(f"{attachment.name!r} was removed from its model")
    if not isinstance(attachment.model, T5):
        raise ValueError(f"{attachment.name!r} is on a {type(attachment.model).__name__}, and for AdapterHub adapters "
                         f"of T5 alone are written")
    return writer(attachment.method)


def _rows(attachment: Attachment, outer: Mapping[str, Any]) -> list[Row]:
    """The rows of the attachment. ValueError where an array of it has none."""
    rows = _named(_codec(attachment).rows(attachment.method, attachment.model, outer["config"]), outer["name"])
    left = sorted(set(attachment.tensors) - {row.ours for row in rows})
    if left:
        raise ValueError(f"{attachment.name!r} cannot be written for AdapterHub, which has no place for {left[0]}")
    return rows


def _named(rows: list[Row], name: str) -> list[Row]:
    """The rows with the name of the adapter in their keys."""
    return [dataclasses.replace(row, theirs=row.theirs.replace(HERE, name)) for row in rows]
