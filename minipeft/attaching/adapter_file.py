"""One attachment in one safetensors file.

    tensors     "place.leaf", e.g. "encoder.0.attn.q.weight.A"
    metadata    format, version ("2"); name; method (JSON: its class and fields, without `where`); places (JSON list of
                the resolved names); base, below, together (the weights that the tensors were trained on, as in
                `trained_on.py`: a fingerprint, and JSON lists of {name, content}); where this base was quantized,
                origin (JSON: base and quantization, as in `origin.py`); signature (SHA-256 of these texts)

The file also holds a SHA-256 of its tensors (`files.py`), so a flipped bit is found wherever it is.

Version 1 is still read. It has no signature. Its `base` is a fingerprint of the tensors alone. Its `below` names the
attachments that were plugged below when it was saved, {name: fingerprint of tensors}, whatever it was trained on.
"""
from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Mapping

import numpy

from minipeft.backend import Array
from minipeft.checks import shown
from minipeft.files import json_object, read_metadata, read_tensors, write_tensors
from minipeft.nn.fingerprint import sha256
from minipeft.attaching.fields import described
from minipeft.attaching.origin import Origin
from minipeft.attaching.trained_on import Layer, TrainedOn

_FORMAT, _VERSION = "minipeft-adapter", "2"
SIGNED = ("name", "method", "places", "base", "below", "together")
_ORIGIN = "origin"  # signed too, where there is one; so files of adapters on other bases are as before
_RENAMED = {"start": "init"}                      # fields that version 1 calls by another name
_VALUES_RENAMED = {"norm scale": "norm weight"}   # and values
_INITS_RENAMED = {"uniform": "kaiming"}           # values of LoRA's init that files of minipeft 0.1 and 0.2 have


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file. The types are checked; whether it fits a model is checked by `load`.

    path: of the file. name: of the attachment. kind, fields: the method's class and fields. places: their names.
    trained_on: base, origin, below and together. tensors: {"place.leaf": array}. version: of the format. altered:
    whether the texts differ from those that were signed. below_in_v1: the `below` of a file of version 1, whose
    `trained_on` has only a `base`."""

    path: str
    name: str
    kind: str
    fields: dict[str, Any]
    places: list[str]
    trained_on: TrainedOn
    tensors: dict[str, numpy.ndarray]
    version: str = _VERSION
    altered: bool = False
    below_in_v1: dict[str, str] = dataclasses.field(default_factory=dict)


def write(path: str | os.PathLike, name: str, method: Any, places: list[str], tensors: Mapping[str, Array],
          trained_on: TrainedOn) -> None:
    """Write an attachment atomically to `path`: its name, its method, the names of its places, its tensors
    {"place.leaf": array}, and the record trained_on. The places stand for `where`, which chose them, and indices among
    the tensors stand for a mask. Raises as `files.write_tensors` does."""
    texts = {"name": name, "method": method_text(method), "places": json.dumps(places),
             "base": trained_on.base or "",
             **{key: json.dumps([dataclasses.asdict(layer) for layer in getattr(trained_on, key)])
                for key in ("below", "together")}}
    if trained_on.origin is not None:
        texts[_ORIGIN] = json.dumps(dataclasses.asdict(trained_on.origin))
    write_tensors(path, tensors, {"format": _FORMAT, "version": _VERSION, "signature": signature(texts), **texts})


def read(path: str | os.PathLike) -> AdapterFile:
    """The content of the file at `path`. Raises a ValueError that names the file for metadata that are incomplete or of
    the wrong types, and raises as `files.read_tensors` does for a damaged file."""
    metadata = read_metadata(path)
    version = metadata.get("version")
    if metadata.get("format") != _FORMAT or version not in ("1", _VERSION):
        raise ValueError(f"{path}: not an adapter file of minipeft, version 1 or {_VERSION} (its metadata says format "
                         f"{shown(metadata.get('format'))}, version {shown(version)})")
    tensors, metadata = read_tensors(path, signed=version != "1")
    texts = {key: metadata.get(key) for key in SIGNED if key != "together" or version != "1"}
    missing = [key for key, text in texts.items() if text is None]
    if missing:
        raise ValueError(f"{path}: the adapter's metadata is incomplete or malformed ({missing[0]} is missing)")
    try:
        method, places, below = (json.loads(metadata[key]) for key in ("method", "places", "below"))
        together = [] if version == "1" else json.loads(metadata["together"])
        kind = method.pop("kind")
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: the adapter's metadata is incomplete or malformed ({shown(error)})") from None
    if not isinstance(kind, str):
        raise ValueError(f"{path}: method {shown(kind)} is not known")
    if not isinstance(places, list) or not places or not all(isinstance(p, str) for p in places) \
            or len(set(places)) < len(places):
        raise ValueError(f"{path}: places is not a list of distinct names")
    if kind == "LoRA":
        method |= {key: _renamed(method[key], _INITS_RENAMED) for key in ("start", "init") if key in method}
    found = AdapterFile(str(path), metadata["name"], kind, method, places, TrainedOn(metadata["base"]), tensors,
                        str(version))
    if version == "1":
        if not isinstance(below, dict) or not all(isinstance(v, str) for v in below.values()):
            raise ValueError(f"{path}: below is not a map of names to fingerprints")
        return dataclasses.replace(found, fields=_from_version_1(method), below_in_v1=below)
    trained_on = dataclasses.replace(base_of(metadata, path), below=_layers(path, "below", below),
                                     together=_layers(path, "together", together))
    return dataclasses.replace(found, trained_on=trained_on,
                               altered=metadata.get("signature") != signature(metadata))


def _layers(path: Any, key: str, value: Any) -> tuple[Layer, ...]:
    if not isinstance(value, list) or not all(
            isinstance(v, dict) and set(v) == {"name", "content"} and all(isinstance(t, str) for t in v.values())
            for v in value):
        raise ValueError(f"{path}: {key} is not a list of names and fingerprints")
    return tuple(Layer(**v) for v in value)


def base_of(metadata: Mapping[str, str], path: str | os.PathLike = "the file") -> TrainedOn:
    """The base, with its origin, that a file with this `metadata` names. Raises a ValueError that names the file for an
    origin that is malformed."""
    if _ORIGIN not in metadata:
        return TrainedOn(metadata.get("base"))
    found = json_object(f"{path}: {_ORIGIN!r} in the adapter's metadata", metadata[_ORIGIN].encode())
    if set(found) != {"base", "quantization"} or not all(isinstance(t, str) for t in found.values()):
        raise ValueError(f"{path}: {_ORIGIN} is not a fingerprint and the words for a quantization")
    return TrainedOn(metadata.get("base"), origin=Origin(**found))


def signature(texts: Mapping[str, str]) -> str:
    """SHA-256 of those of the `texts` {key: text} that are named in SIGNED, and of the origin where there is one."""
    signed = {key: texts[key] for key in (*SIGNED, _ORIGIN) if key in texts}
    return sha256([json.dumps(sorted(signed.items())).encode()])


def method_text(method: Any) -> str:
    """The method's kind and fields as a file holds them: JSON."""
    return json.dumps(described(method))


def _from_version_1(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(key, key): _renamed(value, _VALUES_RENAMED) for key, value in fields.items()}


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A string, or a list of strings, under its other name; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [names.get(v, v) if isinstance(v, str) else v for v in value]
    return names.get(value, value) if isinstance(value, str) else value
