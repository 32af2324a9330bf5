"""Checks of arguments. NumPy scalars are numbers like Python's, and an error shows only the beginning of a long value.

Every check of an integer or a number goes through `integer` or `number`, so that `np.int64(2)` is accepted wherever 2
is, and `True` nowhere.
"""
from __future__ import annotations

import math
from typing import Any

import numpy

_SHOWN = 200  # characters of a value in an error message


def shown(value: Any) -> str:
    """The repr of `value`; only its beginning if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # repr fails for integers of thousands of digits and for very deep lists
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def python(value: Any) -> Any:
    """`value`, a NumPy scalar or an array without axes, as Python's number; anything else as it is."""
    return value.item() if isinstance(value, numpy.generic) or isinstance(value, numpy.ndarray) and not value.ndim \
        else value


def is_integer(value: Any, least: int = 0) -> bool:
    """Whether a value of Python's or NumPy's is an integer of at least `least`; a bool is not."""
    value = python(value)
    return type(value) is int and value >= least


def is_number(value: Any) -> bool:
    """Whether a value of Python's or NumPy's is a number that is finite as a float; a bool is not."""
    value = python(value)
    if type(value) is int:
        return abs(value) < 2 ** 1023
    return type(value) is float and math.isfinite(value)


def integer(what: str, value: Any, least: int = 0) -> int:
    """The value as Python's int. Raises ValueError, naming it `what`, unless it is an integer of at least `least`."""
    if not is_integer(value, least):
        raise ValueError(f"{what} is {shown(value)}; expected an integer >= {least}")
    return python(value)


def boolean(what: str, value: Any) -> bool:
    """The value as Python's bool. Raises ValueError, naming it `what`, unless it is True or False, Python's or
    NumPy's."""
    if type(python(value)) is not bool:
        raise ValueError(f"{what} is {shown(value)}; expected True or False")
    return python(value)


def number(what: str, value: Any, least: float = -math.inf, expected: str | None = None) -> float:
    """The value as Python's float. Raises ValueError, naming it `what`, unless it is finite and at least `least`.
    expected: how the error describes the allowed numbers, instead of by `least`."""
    if not is_number(value) or python(value) < least:
        wanted = expected or ("a finite number" if least == -math.inf else f"a finite number >= {least:g}")
        raise ValueError(f"{what} is {shown(value)}; expected {wanted}")
    return float(python(value))
