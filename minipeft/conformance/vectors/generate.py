"""`vectors generate [--check]`: makes the published files again, from the methods alone, and writes them or compares
their bytes: those of v1, and in v2 those under conventions that were introduced later (`Method.after`).

Safeguards: every vector passes `publish.py`, everything is made twice and must be the same, the files are read back by
the strict reader before they are written, and a method has only one type of group. The files mention no commit, time,
machine or installed library, so they come out the same anywhere (unless `numpy.random` changes its stream: then other
numbers are drawn).
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterable

from minipeft.conformance.method import Method
from minipeft.conformance.vectors.publish import lint, vectors_of
from minipeft.conformance.vectors.read import PACK, PACK_LATER, read
from minipeft.conformance.vectors.schema import FOLDER, LATER
from minipeft.conformance.vectors.write import files
from minipeft.files import write_atomic

MISSING = "making vectors needs mpmath: pip install 'minipeft[conformance]'"
_ROOM = 2_000_000  # bytes of package data


def main(argv: list[str]) -> int:
    """The command `vectors` with the arguments `argv`, of which the first is "generate". Returns the exit status of
    `generate`; 2, with a message, if mpmath is missing."""
    from minipeft.conformance.methods import all_methods
    parser = argparse.ArgumentParser(prog="python -m minipeft.conformance vectors")
    parser.add_argument("command", choices=["generate"])
    parser.add_argument("--check", action="store_true", help="compare with the existing files, write nothing")
    parser.add_argument("--method", action="append", metavar="NAME", help="only this method (may be repeated)")
    args = parser.parse_args(argv)
    known = all_methods()
    if unknown := [name for name in args.method or () if name not in known]:
        parser.error(f"--method {unknown[0]}: expected one of {', '.join(known)}")
    if not _many_digits():
        print(MISSING, file=sys.stderr)
        return 2
    return generate([known[name] for name in args.method or known], args.check)


def _many_digits() -> bool:
    """Whether exact results that are not fractions can be computed: whether mpmath is installed."""
    try:
        import mpmath  # noqa: F401
    except ImportError:
        return False
    return True


def generate(methods: Iterable[Method], check: bool = False, folder: Path = FOLDER, later: Path = LATER) -> int:
    """Write the files of these methods, or compare them with the existing ones. check: compare only. folder, later: of
    v1 and v2. Returns 0 if all is well; 1, after a line on the fault, if not: then nothing was written."""
    made: dict[Path, bytes] = {}
    try:
        for method in methods:
            for one, pack, place in ((method, PACK, folder), (method.after, PACK_LATER, later)):
                if one is not None:
                    made |= {place / name: data for name, data in _made(one, pack, twice=not check).items()}
    except ValueError as error:
        print(f"not published: {error}", file=sys.stderr)
        return 1
    if check:
        odd = next((line for path, data in made.items() if (line := difference(path, data))), "")
        print(odd or f"{len(made)} files have the bytes that the methods give", file=sys.stderr if odd else sys.stdout)
        return int(bool(odd))
    there = [path for place in (folder, later) if place.is_dir() for path in place.iterdir()]
    size = sum(path.stat().st_size for path in there if path not in made) + sum(map(len, made.values()))
    if size > _ROOM:
        print(f"not published: {size} bytes in all; the package may hold at most {_ROOM}", file=sys.stderr)
        return 1
    for path, data in made.items():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, data)
        print(f"{path.name}: {len(data)} bytes")
    return 0


def _made(method: Method, pack: str, twice: bool) -> dict[str, bytes]:
    """{file name: bytes} for one method. Raises ValueError if something may not be published."""
    vectors = vectors_of(method)
    for sentence in lint(method, vectors):
        raise ValueError(sentence)
    made = files(method, vectors, pack)
    if twice and files(method, vectors_of(method), pack) != made:
        raise ValueError(f"{method.name}: the files differ when made twice: something is drawn without a seed")
    with tempfile.TemporaryDirectory() as folder:
        for name, data in made.items():
            (Path(folder) / name).write_bytes(data)
        if len(read(method.name, folder)) != len(vectors):
            raise ValueError(f"{method.name}: the files, read back, hold another number of vectors")
    return made


def difference(path: Path, wanted: bytes) -> str:
    """How the file at `path` differs from the bytes `wanted`, in words; "" if it does not."""
    if not path.is_file():
        return f"{path.name}: is missing"
    found = path.read_bytes()
    if found == wanted:
        return ""
    if path.suffix == ".json":
        mine, theirs = (_tests(data) for data in (wanted, found))
        for id in [*mine, *theirs]:
            if mine.get(id) != theirs.get(id):
                state = "is new" if id not in theirs else "is no longer made" if id not in mine else "differs"
                return f"{path.name}: test {id} {state}"
    at = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
    return f"{path.name}: differs from byte {at} on ({len(found)} bytes, {len(wanted)} expected)"


def _tests(data: bytes) -> dict[str, Any]:
    """{id: test} of a document; {} if it is not a valid one."""
    try:
        return {test["id"]: (test, group["conventions"]) for group in json.loads(data)["groups"]
                for test in group["tests"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
