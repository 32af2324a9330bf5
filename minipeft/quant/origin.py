"""The origin of a quantized base, in the metadata of its file: {"base": fingerprint, "quantization": words} as JSON.

A folder with a quantized base names the base from which its codes were made (`attaching/origin.py`). So after the base
was saved and read, an adapter of the original, or of another of its quantizations, is still known as a relative. Where
something is merged into the base on its way to the file, or its other weights are rounded, it becomes another base. The
file then names no origin.
"""
from __future__ import annotations

import dataclasses
import json
from typing import Mapping

from minipeft.attaching.origin import Origin
from minipeft.attaching.trained_on import has_origin, origin_of
from minipeft.files import json_object
from minipeft.nn.module import Model

ORIGIN = "origin"


def origin_in_metadata(model: Model, is_merged: bool, dtype: str | None) -> dict[str, str]:
    """{ORIGIN: text} for a file of the base of `model`, stored in `dtype`; {} if the base has no origin, or becomes
    another base in the file. is_merged: whether something is merged into it there."""
    exact = dtype is None or all(slot.dtype.name == dtype for slot in model.slots.values())
    origin = origin_of(model) if exact and not is_merged else None
    return {} if origin is None else {ORIGIN: json.dumps(dataclasses.asdict(origin))}


def read_origin(metadata: Mapping[str, str]) -> Origin | None:
    """The origin that the metadata of a file name, or None. Raises ValueError for a text that is no origin."""
    if ORIGIN not in metadata:
        return None
    found = json_object(f"{ORIGIN!r} in the metadata of the weights", metadata[ORIGIN].encode())
    if set(found) != {"base", "quantization"} or not all(isinstance(text, str) for text in found.values()):
        raise ValueError(f"{ORIGIN!r} in the metadata of the weights is no fingerprint with the words for a "
                         f"quantization")
    return Origin(**found)


def give_origin(model: Model, origin: Origin | None) -> None:
    """Let the base of `model`, which was just read, have this `origin`, if there is one."""
    if origin is not None:
        has_origin(model, origin)
