"""One checkpoint is one safetensors file: everything that the next step depends on.

    param/NAME, m/NAME, v/NAME, partial/NAME        parameters, moments, gradients accumulated so far
    metadata "state" (JSON)                         counters, random state, data cursor, best score, log offset
    metadata "run" (JSON)                           what the run is; a checkpoint of another run is refused

It is written atomically (`files.write_tensors`), so a killed run leaves the last checkpoint or the one before, whole.
"""
from __future__ import annotations

import json
import os
from typing import Any, Mapping

import numpy

from minipeft.autograd.tensor import Leaf
from minipeft.backend import Array, to_device
from minipeft.files import read_tensors, write_tensors
from minipeft.train.optim import AdamW

_FORMAT = "minipeft-checkpoint-1"


def save(path: str | os.PathLike, params: Mapping[str, Leaf], optimizer: AdamW, partial: Mapping[str, Array],
         state: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically. `state` and `run` are what JSON can hold; floats survive exactly."""
    groups: dict[str, Mapping[str, Array]] = {"param": {name: p.data for name, p in params.items()},
                                              "m": optimizer.m, "v": optimizer.v, "partial": partial}
    tensors = {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
    write_tensors(path, tensors, {"format": _FORMAT, "state": json.dumps({**state, "steps": optimizer.steps}),
                                  "run": json.dumps(run, sort_keys=True)})


def load(path: str | os.PathLike, params: Mapping[str, Leaf], optimizer: AdamW,
         run: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Restore parameters (in place) and moments; return (partial gradients, state).

    Raises ValueError, before anything changes, for a file that is damaged, of another run or of other parameters."""
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint of minipeft (its metadata says {metadata.get('format')!r})")
    saved = json.loads(metadata["run"])
    for key in sorted({*saved, *run}):
        if json.dumps(saved.get(key)) != json.dumps(run.get(key)):
            raise ValueError(f"{path}: belongs to another run: {key} is {saved.get(key)!r} there and "
                             f"{run.get(key)!r} here; delete it, or pass resume=False to start afresh over it")
    state = json.loads(metadata["state"])
    groups: dict[str, dict[str, numpy.ndarray]] = {"param": {}, "m": {}, "v": {}, "partial": {}}
    for key, array in tensors.items():
        group, _, name = key.partition("/")
        if group not in groups or name not in params or array.shape != params[name].shape:
            raise ValueError(f"{path}: {key} {list(array.shape)} does not belong to the selected parameters")
        groups[group][name] = array
    if set(groups["param"]) != set(params) or set(groups["m"]) != set(state["steps"]):
        raise ValueError(f"{path}: its parameters are not the {len(params)} selected ones")
    for name, p in params.items():
        p.data[...] = to_device(groups["param"][name])
    optimizer.m, optimizer.v = ({n: to_device(a) for n, a in groups[g].items()} for g in ("m", "v"))
    optimizer.steps = {name: int(t) for name, t in state["steps"].items()}
    return {name: to_device(array) for name, array in groups["partial"].items()}, state
