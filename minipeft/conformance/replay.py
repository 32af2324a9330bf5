"""A failure as two files: its case, to be run once more by the kit, and a script that needs no kit.

    <property>-<case id>.safetensors    the arrays; under the key "minipeft" of the string map, JSON: schema, method,
                                        property, dtype, exact, params, conventions, declared, label, case
    <property>-<case id>.py             see `script.py`

A file that is there already stays as it is: the same failure is not written twice, another one gets a number.
"""
from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, Sequence

import numpy

from minipeft.conformance.arithmetic import DTYPES, arithmetic, on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.fault import Fault
from minipeft.conformance.method import Method
from minipeft.conformance.methods import all_methods
from minipeft.conformance.observe import Observation
from minipeft.conformance.outputs import property_named
from minipeft.conformance.plugin import Handle, Plugin
from minipeft.conformance.script import listed, script, taped
from minipeft.files import read_tensors, write_atomic, write_tensors

SCHEMA = "minipeft-failure-v1"
_KEY = "minipeft"
_FIELDS = {"schema": str, "method": str, "property": str, "dtype": str, "exact": bool, "params": dict,
           "conventions": dict, "declared": dict, "label": str, "case": str}
_BYTES = 2 ** 26        # of a file; a failing case is small
_TAIL = 200             # characters of a name that file systems take


def write(folder: str | os.PathLike, plugin: Plugin | str, method: Method, prop_id: str, case: Case,
          seen: Sequence[Observation | Fault], calls: Sequence[tuple[Case, Handle]]) -> tuple[Path, Path]:
    """(case, script), written into `folder`, which is made if it is not there. plugin: or the name of its module.
    seen, calls: of the failing run (`Plugin.made`); the property is run again, and where it does not fail a second
    time, the script shows these."""
    name = plugin if isinstance(plugin, str) else getattr(plugin.module, "__name__", plugin.name)
    under_test = calls[0][1]._plugin if isinstance(plugin, str) and calls else plugin
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prop = property_named(method, prop_id)
    tape, wrong = taped(prop, case, under_test.make(method)) if isinstance(under_test, Plugin) else ([], None)
    if wrong is None:
        tape, wrong = listed(calls), next(o for o in seen if isinstance(o, Fault) or not o.holds)
    rho = f", rho {wrong.rho:.3g}" if isinstance(wrong, Observation) and wrong.level == "B" else ""
    about = wrong.name if isinstance(wrong, Observation) else wrong.kind
    title = f"{case.id}, {case.dtype}\n\n{prop.id}, {prop.title}\nwhat fails: {about}{rho}\n"
    text = script(name, method, title, tape, wrong)
    stem = _safe(f"{prop_id}-{case.id}")
    return _saved(folder, stem, prop_id, case), _written(folder, stem, text)


def _safe(name: str) -> str:
    """A name of letters, digits, "-" and "_" alone."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[-_TAIL:]


def _free(folder: Path, stem: str, suffix: str, same: Any) -> tuple[Path, bool]:
    """The first name that is free or holds the same, and whether it does."""
    number = 1
    while True:
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
        if not os.path.lexists(path):
            return path, False
        if same(path):
            return path, True
        number += 1


def _written(folder: Path, stem: str, text: str) -> Path:
    data = text.encode("utf-8")
    path, there = _free(folder, stem, ".py", lambda path: path.is_file() and path.read_bytes() == data)
    if not there:
        write_atomic(path, data)
    return path


def _saved(folder: Path, stem: str, prop_id: str, case: Case) -> Path:
    fields = {"schema": SCHEMA, "method": case.method, "property": prop_id, "dtype": case.dtype, "exact": case.exact,
              "params": dict(case.params), "conventions": dict(case.conventions), "declared": dict(case.declared),
              "label": case.label, "case": case.id}
    metadata = {_KEY: json.dumps(fields, sort_keys=True, allow_nan=False)}

    def same(path: Path) -> bool:
        try:
            arrays, found = read_tensors(path)
        except (OSError, ValueError):
            return False
        return found == metadata and list(sorted(arrays)) == sorted(case.arrays) and all(
            _bits(arrays[name]) == _bits(case[name]) for name in arrays)

    path, there = _free(folder, stem, ".safetensors", same)
    if not there:
        write_tensors(path, dict(case.arrays), metadata)
    return path


def _bits(array: numpy.ndarray) -> tuple:
    return array.dtype.str, array.shape, numpy.ascontiguousarray(array).tobytes()


def read(path: str | os.PathLike) -> tuple[str, Case]:
    """(property, case) of a file that `write` wrote. Raises ValueError that names the file and what is wrong."""
    size = os.stat(path).st_size
    if size > _BYTES:
        raise ValueError(f"{path}: {size} bytes; a failing case has {_BYTES} at most")
    arrays, metadata = read_tensors(path)
    if set(metadata) != {_KEY}:
        raise ValueError(f"{path}: the string map has {sorted(metadata)}; expected {_KEY!r} alone")
    fields = _fields(path, metadata[_KEY])
    method = all_methods().get(fields["method"])
    if method is None:
        raise ValueError(f"{path}: unknown method {fields['method']!r}; known are {', '.join(all_methods())}")
    try:
        property_named(method, fields["property"])
        case = Case(fields["method"], fields["dtype"], fields["exact"], fields["params"], arrays, fields["label"],
                    fields["conventions"], fields["declared"])
        _check(method, case)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if case.id != fields["case"]:
        raise ValueError(f"{path}: the numbers are those of {case.id}, not of {fields['case']}: it was changed")
    return fields["property"], case


def _fields(path: Any, text: str) -> dict[str, Any]:
    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        fields = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_KEY} is not valid JSON: {error}") from None
    if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
        raise ValueError(f"{path}: expected the fields {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(fields[name]) is not kind:
            raise ValueError(f"{path}: {name} is a {type(fields[name]).__name__}; expected a {kind.__name__}")
    if fields["schema"] != SCHEMA:
        raise ValueError(f"{path}: schema {fields['schema']!r}; expected {SCHEMA!r}")
    return fields


def _check(method: Method, case: Case) -> None:
    """Raises ValueError for what no case of this method can be."""
    if case.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {case.dtype!r}; known are {', '.join(DTYPES)}")
    for name, value in case.params.items():
        if not (value is None or type(value) in (bool, int, str) or type(value) is float and math.isfinite(value)):
            raise ValueError(f"the param {name!r} is {value!r:.80}; expected a finite number or a string")
    for name, value in case.conventions.items():
        if value not in method.conventions.get(name, ()):
            raise ValueError(f"unknown convention {name}={value!r} of {method.name}")
    if not all(isinstance(value, (str, bool)) for value in case.declared.values()):
        raise ValueError("declared is not of strings and booleans")
    arithmetic(case.dtype, case.declared)
    for name, array in case.arrays.items():
        if array.dtype not in (numpy.float64, numpy.int64, numpy.bool_):
            raise ValueError(f"the array {name!r} is of {array.dtype}; expected float64, int64 or bool")
        if array.dtype == numpy.float64 and not numpy.array_equal(on_grid(array, case.dtype), array, equal_nan=True):
            raise ValueError(f"the array {name!r} has numbers that {case.dtype} does not have")
