"""Values as the text of a script: every array gets one name and one definition, however many calls it is passed to."""
from __future__ import annotations

import keyword
import re
from typing import Any, Mapping

import numpy

_RESERVED = ("importlib", "os", "sys", "array", "inf", "nan", "zeros", "plugin", "error", "given")
_RESULTS = {"forward": "y", "weight": "w", "vjp": "grads", "save": "blob"}
_WIDTH = 120
_LONG = 8  # entries; longer arrays of zeros are written zeros(shape)


class Names:
    """The names of a script's inputs and results. locked: the script makes its inputs read-only, as the kit does."""

    def __init__(self) -> None:
        self.arrays: dict[tuple, str] = {}
        self.lines: list[str] = []
        self.taken = set(_RESERVED)
        self.results: dict[Any, str] = {}
        self.locked = False

    @property
    def definitions(self) -> list[str]:
        """The lines that define the inputs."""
        lock = [f"for given in ({', '.join(self.arrays.values())},):", "    given.flags.writeable = False"]
        return _packed(self.lines) + (lock if self.locked and self.arrays else [])

    def result(self, event: Any, stem: str) -> str:
        """The name of the result of a call `event`; a new one is made from `stem`."""
        if event not in self.results:
            self.results[event] = self._free(stem)
        return self.results[event]

    def of(self, value: Any, own: Mapping[str, numpy.ndarray]) -> str:
        """`value` as an expression. own: {name: array}, the arrays that keep their name. An array is recognized by
        identity, not by its numbers."""
        if isinstance(value, numpy.ndarray):
            return self._array(value, own)
        if isinstance(value, numpy.generic):
            return repr(value.item())
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{k!r}: {self.of(v, own)}" for k, v in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            items = ", ".join(self.of(item, own) for item in value)
            return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
        return repr(value)

    def _array(self, value: numpy.ndarray, own: Mapping[str, numpy.ndarray]) -> str:
        bits = (value.dtype.str, value.shape, numpy.ascontiguousarray(value).tobytes())
        key = (next((name for name, array in own.items() if array is value), "a"), *bits)
        if key not in self.arrays:
            self.arrays[key] = self._free(key[0])
            self.lines.append(f"{self.arrays[key]} = {literal(value)}")
        return self.arrays[key]

    def _free(self, stem: str) -> str:
        stem = re.sub(r"\W", "_", stem)
        stem = f"_{stem}" if keyword.iskeyword(stem) or not stem.isidentifier() else stem
        number, name = 1, stem
        while name in self.taken or name == "layer" or re.fullmatch(r"layer\d+", name):
            number += 1
            name = f"{stem}_{number}"
        self.taken.add(name)
        return name


def _packed(statements: list[str]) -> list[str]:
    """The statements, as many on each line as fit."""
    lines: list[str] = []
    for statement in statements:
        if lines and len(lines[-1]) + len(statement) + 2 <= _WIDTH:
            lines[-1] += f"; {statement}"
        else:
            lines.append(statement)
    return lines


def literal(array: numpy.ndarray) -> str:
    """An expression that gives the numbers of `array`, bit for bit."""
    kind = "" if array.dtype in (numpy.float64, numpy.int64, bool) else f", {array.dtype.name!r}"
    if not array.size or array.size > _LONG and not array.any() and not numpy.signbit(array).any():
        return f"zeros({array.shape}, {array.dtype.name!r})"
    return f"array({array.tolist()!r}{kind})"


def result_of(call: str) -> str:
    """The name that a script gives to the result of `call`."""
    return _RESULTS.get(call, call)


def rows_of(array: numpy.ndarray, value: numpy.ndarray) -> str | None:
    """The index of the rows of `array` that make up `value`, as text; None if `value` is not made up of its rows."""
    if array.ndim != value.ndim or not array.ndim or array.shape[1:] != value.shape[1:] or not len(value):
        return None
    rows = [next((i for i, row in enumerate(array) if numpy.array_equal(row, wanted)), -1) for wanted in value]
    if -1 in rows:
        return None
    return f"{rows[0]}:" if rows == list(range(rows[0], len(array))) else str(rows)


def printed(expression: str, value: Any) -> str:
    """`expression`, which stands for `value`, in the form that prints plain numbers."""
    return f"{expression}.tolist()" if isinstance(value, numpy.ndarray) else expression


def numbers_of(value: Any) -> str:
    """`value` as the text that `printed` would print."""
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        value = (value.astype(numpy.float64) if value.dtype.kind == "f" else value).tolist()
    return repr(value)
