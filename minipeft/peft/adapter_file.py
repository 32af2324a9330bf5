"""One attachment in one safetensors file: a few MB that turn a base model into another one.

    tensors     "place.leaf", e.g. "encoder.0.attn.q.weight.A"
    metadata    format, version; name; method (JSON: its class and fields, without `where`); places (JSON list of the
                resolved names); base (fingerprint of the bare model, as it was when this was written); below (JSON:
                what had been plugged before it then, {name: fingerprint of that attachment's tensors})
"""
from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Mapping

import numpy

from minipeft.backend import Array
from minipeft.files import read_tensors, write_tensors
from minipeft.nn.fingerprint import fingerprint
from minipeft.nn.module import Module
from minipeft.checks import shown

_FORMAT, _VERSION = "minipeft-adapter", "1"


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What such a file says, its types checked; whether it fits a model is for `load` to find out."""

    name: str
    kind: str
    fields: dict[str, Any]
    places: list[str]
    base: str
    below: dict[str, str]
    tensors: dict[str, numpy.ndarray]


def write(path: str | os.PathLike, name: str, method: Any, places: list[str], tensors: Mapping[str, Array],
          below: Mapping[str, str], model: Module) -> None:
    """Write atomically; `where` is replaced by the names that it chose, a mask by the indices among the tensors."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name not in ("where", "mask")}
    write_tensors(path, tensors, {
        "format": _FORMAT, "version": _VERSION, "name": name,
        "method": json.dumps({"kind": type(method).__name__, **fields}), "places": json.dumps(places),
        "base": fingerprint(model.state()), "below": json.dumps(below)})


def read(path: str | os.PathLike) -> AdapterFile:
    """Raises ValueError that names the file for one whose metadata is incomplete or of other types."""
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise ValueError(f"{path}: not an adapter file of minipeft, version {_VERSION} (its metadata says format "
                         f"{shown(metadata.get('format'))}, version {shown(metadata.get('version'))})")
    try:
        method, places = json.loads(metadata["method"]), json.loads(metadata["places"])
        name, base, below = metadata["name"], metadata["base"], json.loads(metadata["below"])
        kind = str(method.pop("kind"))
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: the adapter's metadata is incomplete or malformed ({shown(error)})") from None
    if not isinstance(places, list) or not places or not all(isinstance(p, str) for p in places) \
            or len(set(places)) < len(places):
        raise ValueError(f"{path}: places is not a list of distinct names")
    if not isinstance(below, dict) or not all(isinstance(v, str) for v in below.values()):
        raise ValueError(f"{path}: below is not a map of names to fingerprints")
    return AdapterFile(name, kind, method, places, base, below, tensors)
