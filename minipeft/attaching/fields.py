"""The fields of a method, checked: an error names the method, the field, what it is, and what is expected."""
from __future__ import annotations

import dataclasses
from typing import Any, Iterable

import numpy

from minipeft.backend import xp
from minipeft.checks import is_integer, is_number, python, shown


def plain(method: Any) -> None:
    """Turn what the fields of a frozen dataclass hold into what a file can say: NumPy scalars into Python's; lists,
    ranges and arrays into tuples, also inside one another. `where` and `mask` stay as they are: no file holds them."""
    for field in dataclasses.fields(method):
        if field.name not in ("where", "mask"):
            object.__setattr__(method, field.name, _plain(getattr(method, field.name)))


def _plain(value: Any) -> Any:
    value = python(value)
    if isinstance(value, (list, tuple, range, numpy.ndarray)):
        return tuple(_plain(v) for v in value)
    return value


def described(method: Any) -> dict[str, Any]:
    """The method as an adapter file says it: its kind and its fields, but for `where` and `mask`, which stand there as
    the names that were chosen and as tensors."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name not in ("where", "mask")}
    return {"kind": type(method).__name__, **fields}


def expect(method: Any, name: str, holds: Any, expected: str) -> None:
    """Raises ValueError unless `holds`."""
    if not holds:
        raise ValueError(f"{type(method).__name__}: {name} is {shown(getattr(method, name))}; expected {expected}")


def one_of(value: Any, names: Iterable[str]) -> bool:
    """Whether it is a string among `names`; anything else may not be hashable."""
    return isinstance(value, str) and value in set(names)


def finite_in(scale: Any, dtype: Any) -> bool:
    """Whether a factor stays finite in the dtype of the weights that it meets."""
    return dtype.kind != "f" or abs(scale) <= float(xp.finfo(dtype).max)


def number(value: Any) -> bool:
    """A finite int or float, no bool."""
    return is_number(value)


def integer(value: Any, least: int = 1) -> bool:
    """An int of at least `least`, no bool."""
    return is_integer(value, least)
