"""The inputs of a model: ids and masks, checked on the host before they are moved to the backend in use."""
from __future__ import annotations

from typing import Any, Mapping

import numpy

from minipeft.engine.tensor import array_of
from minipeft.backend import Array, to_device, to_host
from minipeft.checks import shown


def host_ids(ids: Any, name: str) -> numpy.ndarray:
    """ids, of any shape, as one array on the host. name: of the argument, for errors.

    Raises ValueError for lists of different length, TypeError for a dict (a whole batch), text, or None."""
    ids = array_of(ids)
    if isinstance(ids, Mapping):
        raise TypeError(f"{name} is a {type(ids).__name__} with {', '.join(map(str, list(ids)[:5]))}; expected ids "
                        f"[batch, time]: pass {name}=batch[{name!r}], and its attention_mask by name")
    if ids is None or isinstance(ids, (str, bytes)):
        raise TypeError(f"{name} is {shown(ids)}; expected ids [batch, time], which a tokenizer makes of text")
    try:
        return to_host(ids)
    except ValueError:
        raise ValueError(f"{name} has rows of different length; pad them (minipeft.batch_of does)") from None


def check_ids(ids: Any, vocab: int, name: str) -> Array:
    """Token ids [batch, time] on the current backend. They are checked on the host: CuPy would wrap an id out of range.

    vocab: the number of ids. name: of the argument, for errors.
    Raises ValueError for another number of axes, an empty batch, non-integers and ids outside 0 .. vocab - 1."""
    host = host_ids(ids, name)
    if host.ndim != 2 or host.size == 0:
        raise ValueError(f"{name} has shape {list(host.shape)}; expected [batch, time], neither of them 0")
    if not numpy.issubdtype(host.dtype, numpy.integer):
        raise ValueError(f"{name} has dtype {host.dtype}; expected integers")
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"{name} holds {low if low < 0 else high}; expected ids from 0 to {vocab - 1}")
    return to_device(host)


def check_mask(mask: Any, shape: tuple, name: str) -> Array | None:
    """A boolean mask [batch, time] on the current backend, True where there is a token; None stays None.

    shape: of the ids that it masks. name: of the argument, for errors.
    Raises ValueError for another shape or values other than 0 and 1."""
    if mask is None:
        return None
    host = host_ids(mask, name)
    if host.shape != shape:
        raise ValueError(f"{name} has shape {list(host.shape)}; expected {list(shape)}, as the ids it masks")
    if not numpy.isin(host, (0, 1)).all():
        raise ValueError(f"{name} holds values other than 0 and 1")
    return to_device(host.astype(bool))
