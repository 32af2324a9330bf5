"""Loading an attachment from a file onto a model: everything is checked before the model is touched."""
from __future__ import annotations

import os
import re
from typing import Any

import numpy

from minipeft.backend import to_device, to_host
from minipeft.nn.fingerprint import fingerprint
from minipeft.nn.module import Module, attachments_of
from minipeft.nn.weight import Constant, Parameter, arrays_of
from minipeft.peft import adapter_file
from minipeft.peft.adapter_file import AdapterFile
from minipeft.peft.attach import Attachment, check_name, put
from minipeft.peft.bottleneck import Bottleneck
from minipeft.checks import shown
from minipeft.peft.lora import LoRA
from minipeft.peft.prompt import PromptTuning
from minipeft.peft.selective import Selective

METHODS: dict[str, Any] = {method.__name__: method for method in (LoRA, Bottleneck, Selective, PromptTuning)}


def load(model: Module, path: str | os.PathLike, force: bool = False, name: str | None = None) -> Attachment:
    """The attachment that `path` holds, on `model`, plugged. name: by default the one that it was saved under.

    Raises ValueError, leaving the model as it was, for a damaged file, places that the model lacks, tensors that
    are missing, extra, of another shape or dtype or not finite, a taken name, and a file made for another base: a
    low-rank update means something on the weights that it was trained on alone. So it is with what was plugged
    before it, anywhere in the model, when it was saved: that must be plugged. force=True skips only these last two
    checks. Sizes and shapes are compared with the file's before anything of that size is made."""
    file = adapter_file.read(path)
    name = file.name if name is None else name
    check_name(model, name)
    if file.kind not in METHODS:
        raise ValueError(f"{path}: method {shown(file.kind)} is not known; known are {', '.join(METHODS)}")
    try:
        method = _method(model, file)
        places = method.places(model)
        shapes = {f"{where}.{leaf}": tuple(shape) for where, place in places.items()
                  for leaf, shape in method.shapes(where, place, model).items()}
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: does not fit this model: {error}") from error
    if set(shapes) != set(file.tensors):
        odd = sorted(set(shapes) ^ set(file.tensors))
        raise ValueError(f"{path}: {shown(odd[0])} is {'missing' if odd[0] in shapes else 'not expected'} "
                         f"({len(odd)} tensors do not match)")
    for key, shape in shapes.items():  # before anything of these sizes is made
        if file.tensors[key].shape != shape:
            raise ValueError(f"{path}: {key} has shape {list(file.tensors[key].shape)}; expected {list(shape)}")
    pieces = method.build(model, places, None)
    for where, piece in pieces.items():
        for leaf, p in arrays_of(piece).items():
            p.data = to_device(_fitting(f"{path}: {where}.{leaf}", file.tensors[f"{where}.{leaf}"], p))
    found = fingerprint(model.state())
    if found != file.base and not force:
        raise ValueError(f"{path}: made for another base model (fingerprint {file.base[:12]}..., this model has "
                         f"{found[:12]}...); load that base, or pass force=True if you know that they agree")
    for under, wanted in file.below.items():
        other = attachments_of(model).get(under)
        if not force and (other is None or other.state == "off" or fingerprint(other.tensors) != wanted):
            raise ValueError(f"{path}: was trained on top of attachment {shown(under)}, which is not plugged here "
                             f"with the same tensors; load and plug it first, or pass force=True")
    return put(model, name, method, dict(places), pieces)


def _method(model: Module, file: AdapterFile) -> Any:
    """The method of a file, on the places that the file names. ValueError for one that the model lacks."""
    known = {name for name, _ in model.named_places()}
    unknown = [place for place in file.places if place not in known]
    if unknown:
        raise ValueError(f"it has no place {shown(unknown[0])} ({len(unknown)} of {len(file.places)} are missing)")
    where = tuple(f"^{re.escape(place)}$" for place in file.places)
    kind = METHODS[file.kind]
    if kind is Selective:
        return Selective.from_file(file.fields, where, file.tensors)
    return kind(**file.fields, where=where)


def _fitting(what: str, array: numpy.ndarray, p: Parameter | Constant) -> numpy.ndarray:
    """The array of a file in the dtype that `p` has. ValueError for another kind of dtype, numbers that are not finite
    in it, and a constant that is not the one which the method's fields give."""
    dtype = p.data.dtype
    if array.dtype.kind != dtype.kind:
        raise ValueError(f"{what} has dtype {array.dtype}; expected "
                         f"{'floating point' if dtype.kind == 'f' else dtype}")
    if isinstance(p, Constant) and not numpy.array_equal(array, to_host(p.data)):
        raise ValueError(f"{what} is not what the method's fields say it is")
    with numpy.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if not numpy.isfinite(narrow).all():
        raise ValueError(f"{what} holds numbers that are not finite in {dtype}")
    return narrow
