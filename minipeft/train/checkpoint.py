"""A checkpoint is one safetensors file that holds everything that training changes.

    param/NAME, m/NAME, v/NAME, partial/NAME        parameters, moments, gradients accumulated so far
    metadata "state" (JSON)                         counters, random state, data cursor, scores, log length (`saved.py`)
    metadata "run" (JSON)                           what the run is and where it began (`identity.py`); the checkpoint
                                                    of another run is refused
    metadata "sha256"                               the digest of these two texts; `files.py` adds one of the tensors

It is written atomically (`atomic.write_atomic`): a killed run leaves this checkpoint or the one before, whole. The
digests reveal damage. They are not signatures: whoever can write the file can also write its digests. So every number
is checked again before a run resumes from it.
"""
from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Mapping

import numpy

from minipeft.backend import Array, to_host, xp
from minipeft.checks import shown
from minipeft.files import json_object, read_metadata, read_tensors, write_tensors
from minipeft.nn.fingerprint import sha256

_FORMAT, _FIRST = "minipeft-checkpoint-2", "minipeft-checkpoint-1"
GROUPS = ("param", "m", "v", "partial")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint. arrays: {group: {name: array}} on the host; state, run: its two JSON objects."""

    path: str
    arrays: dict[str, dict[str, numpy.ndarray]]
    state: dict[str, Any]
    run: dict[str, Any]


def write(path: str | os.PathLike, arrays: Mapping[str, Mapping[str, Array]], state: Mapping[str, Any],
          run: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically. arrays: {group: {name: array}}; floats in `state` and `run` survive exactly.

    Raises FloatingPointError, and keeps the existing file, if an array holds NaN or infinity."""
    tensors = {f"{group}/{name}": array for group, members in arrays.items() for name, array in members.items()}
    for key, array in tensors.items():
        if not to_host(xp.isfinite(array).all()):
            raise FloatingPointError(f"{key} holds NaN or infinity: {path} is not written")
    texts = {"state": json.dumps(state), "run": json.dumps(run)}
    write_tensors(path, tensors, {"format": _FORMAT, "sha256": _digest(texts), **texts})


def read(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint. The entries of its JSON objects `state` and `run` are not checked here.

    Raises ValueError naming the file if it is truncated, altered, of an earlier version, or not a checkpoint."""
    metadata = read_metadata(path)
    if metadata.get("format") == _FIRST:
        raise ValueError(f"{path} is a checkpoint of an earlier version of minipeft ({_FIRST}), which does not say "
                         f"where its run began: finish the run with that version, or pass resume=False to start afresh "
                         f"and replace it")
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint of minipeft (its metadata says format "
                         f"{shown(metadata.get('format'))})")
    tensors, metadata = read_tensors(path, signed=True)
    texts = {key: metadata.get(key, "") for key in ("state", "run")}
    if metadata.get("sha256") != _digest(texts):
        raise ValueError(f"{path}: the checkpoint's metadata was altered: its sha256 does not match")
    arrays: dict[str, dict[str, numpy.ndarray]] = {group: {} for group in GROUPS}
    for key, array in tensors.items():
        group, _, name = key.partition("/")
        if group not in arrays:
            raise ValueError(f"{path}: {shown(key)} is not a tensor of a checkpoint")
        arrays[group][name] = array
    state, run = (json_object(f"{path}: {key!r} in the checkpoint's metadata", texts[key].encode(), finite=True)
                  for key in ("state", "run"))
    return Checkpoint(str(path), arrays, state, run)


def _digest(texts: Mapping[str, str]) -> str:
    return sha256(["\0".join(texts[key] for key in sorted(texts)).encode()])
