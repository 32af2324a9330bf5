"""Arrays of an attachment on their way into another library's file."""
from __future__ import annotations

from typing import Any, Mapping

import numpy

from minipeft.attaching.attachment import Attachment
from minipeft.backend import to_host
from minipeft.checks import shown


def finite(attachment: Attachment, path: Any) -> dict[str, numpy.ndarray]:
    """{"place.leaf": array}: the arrays of the attachment, on the host. Raises ValueError, saying that `path` is not
    written, for numbers that are not finite."""
    arrays = {key: to_host(array) for key, array in attachment.tensors.items()}
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not numpy.isfinite(array).all():
            raise ValueError(f"{key} holds NaN or infinity: {path} is not written")
    return arrays


def named(attachment: Attachment, arrays: Mapping[str, Any],
          gradients: bool | None) -> tuple[dict[str, numpy.ndarray], bool]:
    """({"place.leaf": array}, whether they are gradients), of arrays {name: array} with names as in
    `attachment.parameters` or `attachment.tensors`. gradients: by default, arrays that are all equal to the
    attachment's own are values, and others are gradients. The gradients of fixed numbers are added; they are 0. Raises
    ValueError for an unknown name and for another shape."""
    own = {key: to_host(array) for key, array in attachment.tensors.items()}
    found = {}

    def key(name: str) -> str:
        return name.replace(f"@{attachment.name}.", ".")

    for name, array in arrays.items():
        if key(name) not in own:
            raise ValueError(f"{shown(name)} is no array of {attachment!r}; expected names as in its parameters")
        found[key(name)] = to_host(array)
        if found[key(name)].shape != own[key(name)].shape:
            raise ValueError(f"{name} has shape {list(array.shape)}; expected {list(own[key(name)].shape)}")
    if gradients is None:
        gradients = not all(numpy.array_equal(array, own[k]) for k, array in found.items())
    if gradients:
        trained = {key(name) for name in attachment.parameters}
        found.update({k: numpy.zeros_like(array) for k, array in own.items()
                      if k not in trained and k not in found and array.dtype.kind == "f"})
    return found, gradients
