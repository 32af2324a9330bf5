"""The weights of a run's best evaluation: saved in a file, and restored from it.

    fit(model, lora, ..., evaluate=score, best="best.safetensors")       saved at every new best score
    restore(lora, "best.safetensors")                                    restored

If the trained parameters are those of exactly one attachment, the file is its adapter file, which `load` attaches to
another model. Otherwise it is a safetensors file of the parameters by name, with the metadata format =
minipeft-parameters.
"""
from __future__ import annotations

import os
import re
from typing import Any, Mapping

import numpy

from minipeft.engine.tensor import Leaf
from minipeft.backend import to_device, to_host, xp
from minipeft.checks import shown
from minipeft.files import read_tensors, write_tensors
from minipeft.train.update import to_its_end

_FORMAT, _ADAPTER = "minipeft-parameters", "minipeft-adapter"


def keep(path: str | os.PathLike, model: Any, params: Mapping[str, Leaf]) -> None:
    """Write the parameters to a file, atomically: an adapter file if they are those of one attachment of `model`.

    Raises FloatingPointError if one of them is not finite."""
    for name, p in params.items():
        if not to_host(xp.isfinite(p.data).all()):
            raise FloatingPointError(f"{name} holds NaN or infinity: {path} is not written")
    attachment = sole_attachment(model, params)
    if attachment is not None:
        attachment.save(path)
    else:
        write_tensors(path, {name: p.data for name, p in params.items()}, {"format": _FORMAT})


def sole_attachment(model: Any, params: Mapping[str, Leaf]) -> Any:
    """The attachment of `model` whose parameters are exactly `params`, or None."""
    wanted = set(map(id, params.values()))
    return next((a for a in (getattr(model, "attachments", None) or {}).values()
                 if set(map(id, a.parameters.values())) == wanted), None)


def restore(params: Any, path: str | os.PathLike) -> None:
    """Restore `params` from a file that `fit(..., best=path)` wrote. Each parameter gets a new array.

    params: an attachment, or {name: Parameter}, under the names used in `fit`. (For an adapter file the name of the
    attachment does not matter.) Before anything changes, raises ValueError naming the file for a file of another kind,
    for names, shapes or dtypes that are not those of `params`, for an adapter of another method or base, and for
    numbers that are not finite; TypeError if `params` is neither."""
    attachment = None if isinstance(params, Mapping) else params
    held = params if attachment is None else getattr(attachment, "parameters", None)
    if not isinstance(held, Mapping) or not all(isinstance(p, Leaf) for p in held.values()):
        raise TypeError(f"params is {shown(params)}; expected an attachment, or {{name: Parameter}} as minipeft.select "
                        f"returns it")
    tensors, metadata = read_tensors(path, signed=True)
    kind = metadata.get("format")
    if kind not in (_FORMAT, _ADAPTER):
        raise ValueError(f"{path} is not a file of parameters: its metadata says format {shown(kind)}; expected "
                         f"{_FORMAT} or {_ADAPTER}, as fit(..., best=...) writes them")
    targets = {_inside(name) if kind == _ADAPTER else name: (name, p) for name, p in held.items()}
    odd = sorted(set(targets) - set(tensors)) + sorted(set(tensors) - set(targets) - _constants(tensors, attachment))
    if odd or not targets:
        found = "there is nothing to restore" if not odd else f"it holds no {odd[0]!r}" if odd[0] in targets else \
            f"it holds {shown(odd[0])}, which is not one of these parameters"
        raise ValueError(f"{path} does not fit: {found}")
    for stored, (name, p) in targets.items():
        array = tensors[stored]
        if array.shape != p.shape or array.dtype != p.dtype:
            raise ValueError(f"{path}: {name} is {array.dtype} {list(array.shape)}; expected {p.dtype} "
                             f"{list(p.shape)}")
        if not numpy.isfinite(array).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    moved = [(p, to_device(tensors[stored])) for stored, (_, p) in targets.items()]
    misfit = getattr(attachment, "misfit", None)
    why = misfit(metadata) if kind == _ADAPTER and misfit is not None else None
    if why is not None:
        raise ValueError(f"{path} does not fit: {why}")
    tell = getattr(getattr(getattr(attachment, "model", None), "host", None), "differentiated", None)

    def put() -> None:
        for p, array in moved:
            p.data = array  # a new object, so that whoever remembers the old array notices the change

    if tell is not None:
        tell(frozenset(held.values()))  # a restore changes the parameters, as training does
    to_its_end(put)


def _inside(name: str) -> str:
    """place@attachment.leaf -> place.leaf, the name in an adapter file."""
    return re.sub(r"@[A-Za-z0-9_-]+\.", ".", name, count=1)


def _constants(tensors: Mapping[str, numpy.ndarray], attachment: Any) -> set[str]:
    """The names in an adapter file of arrays that are not trained, such as the indices of a mask, if they equal those
    of the attachment."""
    own = {} if attachment is None else {_inside(n): to_host(a.data) for n, a in attachment.arrays.items()
                                         if not isinstance(a, Leaf)}
    return {name for name, array in own.items() if name in tensors and array.dtype == tensors[name].dtype
            and numpy.array_equal(array, tensors[name])}
