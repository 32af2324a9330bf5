"""What a run is, but for its length: two runs that agree in this, and start alike, make the same bits.

A checkpoint holds the trained parameters; the frozen ones, the data and the hyper-parameters it only names. So it
carries this description, and a checkpoint of another run is refused with the first difference.
"""
from __future__ import annotations

import dataclasses
import json
from typing import Any, Mapping

from minipeft.autograd.tensor import Leaf
from minipeft.nn.fingerprint import fingerprint
from minipeft.train.data import Batches
from minipeft.train.optim import AdamW


def describe(model: Any, params: Mapping[str, Leaf], batches: Batches, optimizer: AdamW,
             **settings: Any) -> dict[str, Any]:
    """The model's configuration and what is frozen in it, the parameters, the data, the optimizer, the settings; as
    JSON gives them back."""
    decayed = set(optimizer.decayed(params))
    plugged = {name: a for name, a in getattr(model, "attachments", {}).items() if a.state != "off"}
    arrays = {**model.state(), **{name: p.data for a in plugged.values() for name, p in a.arrays.items()}}
    return json.loads(json.dumps({
        "config": _plain_fields(getattr(model, "config", None)),
        "attachments": {name: {"kind": type(a.method).__name__, "state": a.state, **_plain_fields(a.method)}
                        for name, a in plugged.items()},
        "frozen weights": fingerprint({name: array for name, array in arrays.items() if name not in params}),
        "params": {name: {"shape": p.shape, "dtype": str(p.dtype), "decayed": name in decayed}
                   for name, p in params.items()},
        "batches": batches.describe(), "optimizer": optimizer.describe(), **settings}))


def _plain_fields(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that are numbers, strings, and tuples of these. (`where` may be a function; it shows in
    the names, and a mask in the arrays.)"""
    if not dataclasses.is_dataclass(settings):
        return {}
    return {field.name: value for field in dataclasses.fields(settings)
            if field.name != "where" and isinstance(value := getattr(settings, field.name), (str, int, float, tuple))}


def difference(there: Any, here: Any, at: str = "") -> str | None:
    """The first place where two descriptions differ, as a sentence; None if they agree."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in (*here, *(key for key in there if key not in here)):
            inside = f"{at} / {key}" if at else key
            if key not in there or key not in here:
                return f"{inside} exists only {'here' if key in here else 'there'}"
            found = difference(there[key], here[key], inside)
            if found is not None:
                return found
        return None
    return None if there == here else f"{at} is {there!r} there and {here!r} here"
