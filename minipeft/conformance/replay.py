"""A failure as two files: its case, which the kit can run once more, and a script that does not need the kit.

    <property>-<case id>.safetensors    the arrays; under the key "minipeft" of the string map, JSON: schema, method,
                                        property, dtype, exact, params, conventions, declared, label, case
    <property>-<case id>.py             see `script.py`; its docstring ends with eight hex digits of the sha256 of the
                                        rest, by which the kit recognizes an unchanged script of its own

The same property on the same case is the same failure: its files replace those of an earlier run, so that the newest
files are those of the last run. Nothing else is ever overwritten, neither an edited script nor one of another plug-in:
the failure then gets a number, the same for both of its files.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy

from minipeft.conformance.arithmetic import DTYPES, arithmetic, on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.fault import Fault
from minipeft.conformance.guard import last_lines
from minipeft.conformance.importing import imports, name_of
from minipeft.conformance.method import Method
from minipeft.conformance.methods import all_methods
from minipeft.conformance.observe import Observation
from minipeft.conformance.outputs import REFUSALS, property_named
from minipeft.conformance.plugin import Handle, Plugin
from minipeft.conformance.script import listed, script, taped
from minipeft.files import read_tensors, write_atomic, write_tensors

SCHEMA = "minipeft-failure-v1"
_KEY = "minipeft"
_FIELDS = {"schema": str, "method": str, "property": str, "dtype": str, "exact": bool, "params": dict,
           "conventions": dict, "declared": dict, "label": str, "case": str}
_BYTES = 2 ** 26        # largest file that is read; a failing case is small
_TAIL = 200             # longest name in characters; every file system accepts it
_NO_SCRIPT = "none: the plug-in is not a module that a script could import"


def write(folder: str | os.PathLike, plugin: Plugin | str, method: Method, prop_id: str, case: Case,
          seen: Sequence[Observation | Fault], calls: Sequence[tuple[Case, Handle]]) -> tuple[Path, Path | str]:
    """Write the two files of a failure into `folder`, which is made if it does not exist.

    Returns (case file, script); instead of the script's path, a sentence if no script could import the plug-in. plugin:
    the plug-in, or the name of its module. prop_id, case: the property that failed and its case. seen, calls: the
    observations and the (case, handle) pairs of the failing run; the property is run again, and if it does not fail a
    second time, the script shows these. Raises OSError if a file cannot be written."""
    name = plugin if isinstance(plugin, str) else name_of(plugin.module)
    under_test = calls[0][1]._plugin if isinstance(plugin, str) and calls else plugin
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem, metadata = _safe(f"{prop_id}-{case.id}"), _metadata(prop_id, case)
    if name is None:
        file, _ = _free(folder, stem, prop_id, case, None)
        write_tensors(file, dict(case.arrays), metadata)
        return file, _NO_SCRIPT
    prop = property_named(method, prop_id)
    tape, wrong = taped(prop, case, under_test.make(method)) if isinstance(under_test, Plugin) else ([], None)
    if wrong is None:
        tape, wrong = listed(calls), next(o for o in seen if not o.holds)
    rho = f", rho {wrong.rho:.3g}" if isinstance(wrong, Observation) and wrong.level == "B" else ""
    about = wrong.name if isinstance(wrong, Observation) else wrong.kind
    title = f"{method.name}, {case.dtype}: {prop.id}, {prop.title}; wrong here: {about}{rho}"
    importing = imports(name, folder)
    text = _signed(script(importing, method, title, tape, wrong))
    file, path = _free(folder, stem, prop_id, case, importing)
    write_tensors(file, dict(case.arrays), metadata)
    write_atomic(path, text.encode("utf-8"))
    return file, path


def _safe(name: str) -> str:
    """`name` with every character other than letters, digits, "-" and "_" replaced by "_"."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[-_TAIL:]


def _free(folder: Path, stem: str, prop_id: str, case: Case, importing: str | None) -> tuple[Path, Path]:
    """The paths of case and script with the first number under which no other file would be overwritten. importing: the
    statements by which the script imports the plug-in; None for no script."""
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        file, path = folder / f"{name}.safetensors", folder / f"{name}.py"
        if ((not os.path.lexists(file) or _ours(file, prop_id, case))
                and (importing is None or not os.path.lexists(path) or _our_script(path, importing))):
            return file, path
    raise AssertionError("unreachable")


def _ours(file: Path, prop_id: str, case: Case) -> bool:
    """Whether `write` wrote this file, for this property and this case."""
    try:
        id, found = read(file)
    except (OSError, ValueError):
        return False
    return not file.is_symlink() and (id, found.id) == (prop_id, case.id)


def _our_script(path: Path, importing: str) -> bool:
    """Whether `write` wrote this script for this plug-in, and nobody changed it."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError):
        return False
    head, _, body = text.partition("\n")
    plain = re.sub(r' \[[0-9a-f]{8}\]"""$', '"""', head)
    same_plugin = importing.rpartition("; ")[2] in body.partition("\n")[0].split("; ")
    return same_plugin and not path.is_symlink() and _signed(f"{plain}\n{body}") == text


def _signed(text: str) -> str:
    """The script with eight digits of its sha256 at the end of its first line, the docstring."""
    head, _, body = text.partition("\n")
    return f'{head[:-3]} [{hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]}]"""\n{body}'


def _metadata(prop_id: str, case: Case) -> dict[str, str]:
    fields = {"schema": SCHEMA, "method": case.method, "property": prop_id, "dtype": case.dtype, "exact": case.exact,
              "params": dict(case.params), "conventions": dict(case.conventions), "declared": dict(case.declared),
              "label": case.label, "case": case.id}
    return {_KEY: json.dumps(fields, sort_keys=True, allow_nan=False)}


def read(path: str | os.PathLike) -> tuple[str, Case]:
    """(id of the property, case) from the file `path`, written by `write`. Raises ValueError, naming the file and the
    fault, for any other file; OSError if it cannot be read."""
    size = os.stat(path).st_size
    if size > _BYTES:
        raise ValueError(f"{path}: {size} bytes; a failing case has at most {_BYTES}")
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
        _sense(method, case, fields["property"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if case.id != fields["case"]:
        raise ValueError(f"{path}: its contents have the id {case.id}, not {fields['case']}: it was changed")
    return fields["property"], case


def _fields(path: Any, text: str) -> dict[str, Any]:
    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

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
    """Raises ValueError for values that no case of this method can have."""
    if case.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {case.dtype!r}; known are {', '.join(DTYPES)}")
    for name, value in case.params.items():
        if not (value is None or type(value) in (bool, int, str) or type(value) is float and math.isfinite(value)):
            raise ValueError(f"the param {name!r} is {value!r:.80}; expected a finite number or a string")
    for name, value in case.conventions.items():
        if value not in method.conventions.get(name, ()):
            raise ValueError(f"unknown convention {name}={value!r} of {method.name}")
    if not all(isinstance(value, (str, bool)) for value in case.declared.values()):
        raise ValueError("declared has values other than strings and booleans")
    arithmetic(case.dtype, case.declared)
    for name, array in case.arrays.items():
        if array.dtype not in (numpy.float64, numpy.int64, numpy.bool_):
            raise ValueError(f"the array {name!r} is of {array.dtype}; expected float64, int64 or bool")
        if array.dtype == numpy.float64 and not numpy.array_equal(on_grid(array, case.dtype), array, equal_nan=True):
            raise ValueError(f"the array {name!r} has numbers that are not {case.dtype} numbers")


def _sense(method: Method, case: Case, prop_id: str) -> None:
    """Raises ValueError for a case from which the reference itself cannot compute: no implementation is to blame for
    that. A case that must be refused is invalid on purpose; only the layer's arguments must exist."""
    absent = [name for name in method.axes if name not in case]
    # an array is optional if one of the published cases lacks it
    if missing := [name for name in absent if all(name in other for other in method.vectors())]:
        raise ValueError(f"the array {missing[0]!r} is missing")
    if prop_id == REFUSALS:
        _tried("the arguments of the layer", lambda: method.arguments(case))
        return
    lengths: dict[str, int] = {}
    for name, array in case.arrays.items():
        axes = method.axes.get(name)
        if axes is None:
            raise ValueError(f"unknown array {name!r}; {method.name} has {', '.join(method.axes)}")
        if array.ndim != len(axes):
            raise ValueError(f"the array {name!r} is of shape {list(array.shape)}; expected [{', '.join(axes)}]")
        for axis, length in zip(axes, array.shape):
            if lengths.setdefault(axis, length) != length:
                raise ValueError(f"the array {name!r} is of shape {list(array.shape)}, [{', '.join(axes)}], but "
                                 f"elsewhere {axis} is {lengths[axis]}")
        if not numpy.isfinite(array).all():
            raise ValueError(f"the array {name!r} has numbers that are NaN or infinite")
    with numpy.errstate(all="ignore"):
        values = _tried("the reference", lambda: (method.arguments(case), method.reference(case))[1])
    for name, value in values.items():
        if not numpy.isfinite(value.exact).all():
            raise ValueError(f"the reference gives {name} with NaN or infinity")


def _tried(what: str, compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except Exception as error:  # an invalid case may raise anything
        raise ValueError(f"{what} cannot be computed: {last_lines(error)}") from None
