"""Reads the vectors of a method from untrusted files: their contents are checked against the schema, the two files
against each other, the numbers against the dtype, and each test against its own id.
"""
from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.tolerance import Value
from minipeft.conformance.vectors.schema import FOLDER, LATER, Mismatch, match, the_schema
from minipeft.files import read_json, read_tensors

PACK = "2026.11.0"  # name of the pack in v1, in this package
PACK_LATER = "2026.12.0"  # name of the pack in v2
_LIMIT = 16 * 2 ** 20  # bytes of the largest file that is read


@dataclasses.dataclass(frozen=True)
class Vector:
    """One test. case: its inputs, with the conventions that it is meant for. outputs: {name: Value}, empty if `result`
    is "must_raise". result: "valid" or "must_raise". absent: gradients that must not exist. flags: of the notes on the
    planted bugs in `kills`. kills: {planted bug: floor(log2(error / bound)), or the level "E" or "S" at which it is
    found}, see `publish.py`."""

    case: Case
    outputs: Mapping[str, Value]
    result: str
    absent: tuple[str, ...]
    flags: tuple[str, ...] = ()
    kills: Mapping[str, int | str] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id of its case."""
        return self.case.id

    @property
    def label(self) -> str:
        """The subject of the case, in words."""
        return self.case.label

    @property
    def level(self) -> str:
        """E: bit for bit. B: within a bound. S: an error is expected."""
        return "S" if self.result == "must_raise" else "E" if self.case.exact else "B"


@dataclasses.dataclass(frozen=True)
class Pack:
    """The vectors of one method. name: of the pack, such as "2026.11.0". header, notes: of the JSON file."""

    method: str
    name: str
    header: tuple[str, ...]
    notes: Mapping[str, Any]
    vectors: tuple[Vector, ...]

    def __iter__(self) -> Iterator[Vector]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)


def read(method: str, folder: str | os.PathLike | None = None) -> Pack:
    """The vectors of the method called `method`: those of this package (v1, then v2; read once), or those in `folder`.

    Raises ValueError, naming the file, the test and the field, for anything that is not as it should be; also if there
    are no files, and for a `method` that is not an identifier, so that it cannot lead to another folder."""
    if not method.isidentifier():
        raise ValueError(f"{method!r} cannot be the name of a method")
    return _packaged(method) if folder is None else _read(method, Path(folder))


@functools.cache
def _packaged(method: str) -> Pack:
    pack = _read(method, FOLDER)
    if not (LATER / f"{method}.json").is_file():
        return pack
    later = _read(method, LATER)
    return dataclasses.replace(pack, notes={**pack.notes, **later.notes}, vectors=(*pack.vectors, *later.vectors))


def _read(method: str, base: Path) -> Pack:
    path, tensors = base / f"{method}.json", base / f"{method}.safetensors"
    for file in (path, tensors):
        if not file.is_file():
            raise ValueError(f"{file}: there is no such file; vectors of {method!r} are a .json and a .safetensors")
        if file.stat().st_size > _LIMIT:
            raise ValueError(f"{file}: {file.stat().st_size} bytes; at most {_LIMIT} are read")
    document = read_json(path)
    try:
        match(document, schema := the_schema(), schema)
    except Mismatch as mismatch:
        raise ValueError(f"{path}: {_place(document, mismatch.where)}: {mismatch.what}") from None
    return _pack(document, _Arrays(tensors, read_tensors(tensors)[0]), path, method)


def _place(document: Any, where: tuple) -> str:
    """A path to a field as text; a path through a test is given from the test's id on."""
    name = ".".join(map(str, where)) or "the document"
    if len(where) > 3 and where[0] == "groups" and where[2] == "tests":
        test = document["groups"][where[1]]["tests"][where[3]]
        if isinstance(test, dict) and isinstance(test.get("id"), str):
            return f"test {test['id'][:80]}: {'.'.join(map(str, where[4:])) or name}"
    return name


def _pack(document: dict, arrays: "_Arrays", path: Path, method: str) -> Pack:
    if document["method"] != method:
        raise ValueError(f"{path}: method: is {document['method']!r}; expected {method!r}, as the file is called")
    known = {mutant for note in document["notes"].values() for mutant in note["mutants"]}
    vectors = [_vector(document, group, test, arrays, path, known)
               for group in document["groups"] for test in group["tests"]]
    if document["numberOfTests"] != len(vectors):
        raise ValueError(f"{path}: numberOfTests: is {document['numberOfTests']}; there are {len(vectors)} tests")
    used = set(document["withdrawn"])
    for vector in vectors:
        if vector.id in used:
            raise ValueError(f"{path}: test {vector.id}: id: is used twice, or was withdrawn")
        used.add(vector.id)
    arrays.none_left()
    return Pack(method, document["pack"], tuple(document["header"]), document["notes"], tuple(vectors))


def _vector(document: dict, group: dict, test: dict, arrays: "_Arrays", path: Path, known: set[str]) -> Vector:
    """known: the planted bugs that the notes name."""
    dtype, exact, raises = group["dtype"], group["level"] != "B", test["result"] == "must_raise"

    def wrong(field: str, what: str) -> ValueError:
        return ValueError(f"{path}: test {test['id']}: {field}: {what}")

    if (group["level"] == "S") != raises:
        raise wrong("result", f"is {test['result']!r} in a group of level {group['level']}")
    if raises == bool(test["outputs"]):
        raise wrong("outputs", "must be empty if the test must raise, and not empty otherwise")
    for flag in test["flags"]:
        if flag not in document["notes"]:
            raise wrong("flags", f"{flag!r} has no note")
    for mutant in test["kills"]:
        if mutant not in known:
            raise wrong("kills", f"{mutant!r} is in no note")
    case = Case(document["method"], dtype, exact, test["params"],
                {name: arrays.input(test["id"], name, dtype) for name in test["inputs"]}, test["comment"],
                group["conventions"])
    if case.id != test["id"]:
        raise wrong("id", f"its inputs, params and conventions have the id {case.id}")
    outputs = {name: arrays.value(test["id"], name, bound, group["level"], dtype)
               for name, bound in test["outputs"].items()}
    return Vector(case, outputs, test["result"], tuple(test["absent_grads"]), tuple(test["flags"]), test["kills"])


class _Arrays:
    """The tensors of a file; each may be taken once, and all must be taken."""

    def __init__(self, path: Path, tensors: dict[str, numpy.ndarray]):
        self.path, self.left = path, dict(tensors)

    def _take(self, id: str, kind: str, name: str, dtypes: tuple[str, ...]) -> numpy.ndarray:
        array = self.left.pop(f"{id}/{kind}/{name}", None)
        if array is None:
            raise self._wrong(id, kind, name, "is missing")
        if array.dtype.name not in dtypes:
            raise self._wrong(id, kind, name, f"has dtype {array.dtype}; expected {' or '.join(dtypes)}")
        if array.dtype == numpy.float64 and not numpy.isfinite(array).all():
            raise self._wrong(id, kind, name, "holds NaN or infinity")
        array.flags.writeable = False
        return array

    def _wrong(self, id: str, kind: str, name: str, what: str) -> ValueError:
        return ValueError(f"{self.path}: test {id}: {kind}/{name}: {what}")

    def _on_grid(self, id: str, kind: str, name: str, array: numpy.ndarray, dtype: str) -> None:
        if array.dtype == numpy.float64 and not numpy.array_equal(on_grid(array, dtype), array):
            raise self._wrong(id, kind, name, f"holds a number that is not a {dtype} number")

    def input(self, id: str, name: str, dtype: str) -> numpy.ndarray:
        """The input `name` of the test `id`. Raises ValueError if it is missing or has other dtypes or numbers."""
        array = self._take(id, "in", name, ("float64", "int64", "bool"))
        self._on_grid(id, "in", name, array, dtype)
        return array

    def value(self, id: str, name: str, bound: dict, level: str, dtype: str) -> Value:
        """The output `name` of the test `id`, with its bound. At level E the exact result must be of the dtype, and no
        bound is needed."""
        exact = self._take(id, "out", name, ("float64",))
        mag = abs(exact) if level == "E" else self._take(id, "mag", name, ("float64",))
        for kind, array in (("out", exact), ("mag", mag)):
            if list(array.shape) != bound["shape"]:
                raise self._wrong(id, kind, name, f"has shape {list(array.shape)}; expected {bound['shape']}")
        if (mag < 0).any():
            raise self._wrong(id, "mag", name, "is negative somewhere")
        if level == "E":
            self._on_grid(id, "out", name, exact, dtype)
        return Value(exact, mag, bound["k"], bound["n"])

    def none_left(self) -> None:
        if self.left:
            raise ValueError(f"{self.path}: {next(iter(self.left))}: belongs to no test")
