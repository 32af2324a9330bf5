"""Loading an attachment from a file onto a model: everything is checked before the model is touched."""
from __future__ import annotations

import os
import re

import numpy

from minipeft.backend import to_device
from minipeft.nn.fingerprint import fingerprint
from minipeft.nn.module import Module, attachments_of
from minipeft.nn.weight import parameters_of
from minipeft.peft import adapter_file
from minipeft.peft.attach import Attachment, check_name, put
from minipeft.peft.lora import LoRA

METHODS = {method.__name__: method for method in (LoRA,)}


def load(model: Module, path: str | os.PathLike, force: bool = False, name: str | None = None) -> Attachment:
    """The attachment that `path` holds, on `model`, plugged. name: by default the one that it was saved under.

    Raises ValueError, leaving the model as it was, for a damaged file, places that the model lacks, tensors that
    are missing, extra, of another shape or dtype or not finite, a taken name, and a file made for another base: a
    low-rank update means something on the weights that it was trained on alone. So it is with what lay below it:
    attachments that it was trained on top of must be plugged. force=True skips only these last two checks."""
    file = adapter_file.read(path)
    name = file.name if name is None else name
    check_name(model, name)
    if file.kind not in METHODS:
        raise ValueError(f"{path}: method {file.kind!r} is not known; known are {', '.join(METHODS)}")
    try:
        method = METHODS[file.kind](**file.fields, where=[f"^{re.escape(place)}$" for place in file.places])
        places = method.places(model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not fit this model: {error}") from error
    pieces = {where: method.on(place, numpy.random.default_rng(0)) for where, place in places.items()}
    expected = {f"{where}.{leaf}": p for where, piece in pieces.items() for leaf, p in parameters_of(piece).items()}
    if set(expected) != set(file.tensors):
        odd = sorted(set(expected) ^ set(file.tensors))
        raise ValueError(f"{path}: {odd[0]!r} is {'missing' if odd[0] in expected else 'not expected'} "
                         f"({len(odd)} tensors do not match)")
    for key, p in expected.items():
        if file.tensors[key].shape != p.shape:
            raise ValueError(f"{path}: {key} has shape {list(file.tensors[key].shape)}; expected {list(p.shape)}")
        if file.tensors[key].dtype.kind != "f":
            raise ValueError(f"{path}: {key} has dtype {file.tensors[key].dtype}; expected floating point")
        with numpy.errstate(over="ignore"):
            array = file.tensors[key].astype(p.dtype)
        if not numpy.isfinite(array).all():
            raise ValueError(f"{path}: {key} holds numbers that are not finite in {p.dtype}")
        p.data = to_device(array)
    found = fingerprint(model.state())
    if found != file.base and not force:
        raise ValueError(f"{path}: made for another base model (fingerprint {file.base[:12]}..., this model has "
                         f"{found[:12]}...); load that base, or pass force=True if you know that they agree")
    for under, wanted in file.below.items():
        other = attachments_of(model).get(under)
        if not force and (other is None or other.state == "off" or fingerprint(other.tensors) != wanted):
            raise ValueError(f"{path}: was trained on top of attachment {under!r}, which is not plugged here with the "
                             f"same tensors; load and plug it first, or pass force=True")
    return put(model, name, method, dict(places), pieces)
