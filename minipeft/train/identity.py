"""The description of a run, apart from its length: runs that agree in it and in their start make the same bits.

A checkpoint holds the trained parameters, but not the frozen ones, the data or the hyper-parameters. It carries this
description of them, and a checkpoint of another run is refused, with the first difference. Plugged attachments are
described in their order, bottom first, because a model's output depends on it. `start_of` describes where a run began:
a fingerprint of its parameters, its cursor in the data, and the optimizer's counts of steps.
"""
from __future__ import annotations

import dataclasses
import json
from typing import Any, Mapping

from minipeft.engine.tensor import Leaf
from minipeft.checks import python, shown
from minipeft.nn.fingerprint import fingerprint
from minipeft.train.data import Batches
from minipeft.train.optim import AdamW


def describe(model: Any, params: Mapping[str, Leaf], batches: Batches, optimizer: AdamW,
             **settings: Any) -> dict[str, Any]:
    """The model's configuration and frozen weights, its plugged attachments, the parameters, the data, the optimizer
    and the `settings`, in the form that JSON gives back."""
    decayed, ratios = set(optimizer.decayed(params)), optimizer.ratios(params)
    attachments = getattr(model, "attachments", None) or {}
    order = getattr(model, "plugged", None)
    plugged = [attachments[name] for name in (attachments if order is None else order)]
    config: Any = getattr(model, "config", None)
    arrays = {**model.state(), **{name: p.data for a in plugged for name, p in a.arrays.items()}}
    return json.loads(json.dumps({
        "config": config.resolved() if hasattr(config, "resolved") else _plain_fields(config),
        "attachments": [{"name": a.name, "kind": type(a.method).__name__, "state": a.state, **_plain_fields(a.method)}
                        for a in plugged if a.state != "off"],
        "frozen weights": fingerprint({name: array for name, array in arrays.items() if name not in params}),
        "params": {name: {"shape": p.shape, "dtype": str(p.dtype), "decayed": name in decayed,
                          **({"lr ratio": ratios[name]} if ratios[name] != 1 else {})} for name, p in params.items()},
        "batches": batches.describe(), "optimizer": optimizer.describe(), **settings}))


def start_of(params: Mapping[str, Leaf], batches: Batches, optimizer: AdamW) -> dict[str, Any]:
    """Where a run begins: a fingerprint of the parameters, the cursor in the data, and how often the optimizer has
    already stepped each parameter."""
    moments = {name: optimizer.moments(name, p) for name, p in params.items()}
    return {"parameters": fingerprint({name: p.data for name, p in params.items()}), "batches": dict(batches.state()),
            "steps": {name: held.t for name, held in moments.items() if held is not None}}


def _plain_fields(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that are numbers, strings, or tuples of these and of methods. (`where` is left out,
    because it may be a function. It shows in the parameters' names, and a mask in the arrays. A field that a file omits
    at its default is left out there, so that a field which is added later refuses no older checkpoint.)"""
    if not dataclasses.is_dataclass(settings):
        return {}
    values = {field.name: python(getattr(settings, field.name)) for field in dataclasses.fields(settings)
              if not (field.metadata.get("optional") and getattr(settings, field.name) == field.default)}
    return {name: list(map(_plain, value)) if isinstance(value, tuple) else value for name, value in values.items()
            if name != "where" and isinstance(value, (str, int, float, tuple))}


def _plain(value: Any) -> Any:
    """An item of a tuple: a number, a string, a tuple, or a method (a part of a `Union`) with its fields."""
    return {"kind": type(value).__name__, **_plain_fields(value)} if dataclasses.is_dataclass(value) else python(value)


def difference(there: Any, here: Any, at: str = "") -> str | None:
    """The first difference between a checkpoint's description (`there`) and this run's (`here`), as a sentence; None if
    they agree. at: the keys that lead to them, separated by " / "."""
    if isinstance(there, list) and isinstance(here, list) and _are_named(there) and _are_named(here):
        names = [item["name"] for item in there], [item["name"] for item in here]
        if sorted(names[0]) == sorted(names[1]) and names[0] != names[1]:
            return f"{at} are {shown(', '.join(names[0]))} there and {shown(', '.join(names[1]))} here, bottom first"
        there, here = ({item["name"]: item for item in items} for items in (there, here))
    if isinstance(there, dict) and isinstance(here, dict):
        for key in (*here, *(key for key in there if key not in here)):
            inside = f"{at} / {key}" if at else key
            if key not in there or key not in here:
                return f"{shown(inside)[1:-1]} exists only {'here' if key in here else 'there'}"
            found = difference(there[key], here[key], inside)
            if found is not None:
                return found
        return None
    return None if there == here else f"{at} is {shown(there)} there and {shown(here)} here"


def _are_named(items: list) -> bool:
    return all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items)
