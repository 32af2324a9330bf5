"""The fields of a method, checked: an error names the method, the field, its value, and the values expected."""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterable

import numpy

from minipeft.backend import xp
from minipeft.checks import is_integer, is_number, python, shown


def file_fields(kind: Any) -> list[str]:
    """The names of those fields of `kind`, a method or its class, that an adapter file holds: all except `where` and
    those with `setting(..., in_file=False)`."""
    return [f.name for f in dataclasses.fields(kind) if f.name != "where" and f.metadata.get("in_file", True)]


def plain(method: Any) -> None:
    """Turn the fields of a frozen dataclass into values that a file can hold, at any depth: NumPy scalars into
    Python's; lists, ranges and arrays into tuples. Fields that no file holds stay as they are."""
    for name in file_fields(method):
        object.__setattr__(method, name, _plain(getattr(method, name)))


def _plain(value: Any) -> Any:
    value = python(value)
    if isinstance(value, (list, tuple, range, numpy.ndarray)):
        return tuple(_plain(v) for v in value)
    return value


def check_settings(method: Any) -> None:
    """Raises ValueError for a field whose value fails the check of its `setting`."""
    for field in dataclasses.fields(method):
        if "holds" in field.metadata:
            expect(method, field.name, _holds(field.metadata["holds"], getattr(method, field.name)),
                   field.metadata["expected"])


def _holds(check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except TypeError:  # such as "8" >= 1
        return False


def is_plain(value: Any) -> bool:
    """Whether a file would give back `value` (as `plain` leaves it) unchanged."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, str) or type(value) in (int, float) and is_number(value)


def described(method: Any) -> dict[str, Any]:
    """The method as an adapter file describes it: the name of its class, and its fields."""
    return {"kind": type(method).__name__, **method.fields()}


def expect(method: Any, name: str, holds: Any, expected: str) -> None:
    """Raises ValueError, for the field `name` of a method, unless `holds`. expected: the end of the message."""
    if not holds:
        raise ValueError(f"{type(method).__name__}: {name} is {shown(getattr(method, name))}; expected {expected}")


def one_of(value: Any, names: Iterable[str]) -> bool:
    """Whether `value` is a string among `names`. (A value of another type may be unhashable.)"""
    return isinstance(value, str) and value in set(names)


def finite_in(scale: Any, dtype: Any) -> bool:
    """Whether the factor `scale` is finite in `dtype`, the dtype of the weights that it multiplies."""
    return dtype.kind != "f" or abs(scale) <= float(xp.finfo(dtype).max)


def number(value: Any) -> bool:
    """Whether `value` is a finite int or float, and not a bool."""
    return is_number(value)


def integer(value: Any, least: int = 1) -> bool:
    """Whether `value` is an int of at least `least`, and not a bool."""
    return is_integer(value, least)
