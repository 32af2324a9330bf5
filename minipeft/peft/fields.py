"""The fields of a method, checked: an error names the method, the field, what it is, and what is expected."""
from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy


def plain(method: Any) -> None:
    """Turn NumPy scalars among the fields of a frozen dataclass into Python's, and lists into tuples, as files need."""
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, numpy.generic):
            object.__setattr__(method, field.name, value.item())
        elif isinstance(value, list) and field.name != "where":
            object.__setattr__(method, field.name, tuple(tuple(v) if isinstance(v, list) else v for v in value))


def expect(method: Any, name: str, holds: Any, expected: str) -> None:
    """Raises ValueError unless `holds`."""
    if not holds:
        raise ValueError(f"{type(method).__name__}: {name} is {getattr(method, name)!r}; expected {expected}")


def number(value: Any) -> bool:
    """A finite int or float, no bool."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def integer(value: Any, least: int = 1) -> bool:
    """An int of at least `least`, no bool."""
    return type(value) is int and value >= least
