"""Writes vectors as files: one JSON document and one safetensors file per method, with the same bytes for the same
vectors."""
from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy

from minipeft.conformance.method import Method
from minipeft.conformance.vectors.read import PACK, Vector
from minipeft.conformance.vectors.schema import NAME, SPEC
from minipeft.files import write_tensors

_LINE = 116
WITHDRAWN: dict[str, str] = {}  # {id of a test of an earlier pack that was removed: why}

VERDICT = (
    "tensors: <id>/in/<input>, <id>/out/<output>, at level B <id>/mag/<output>; floats are F64, inputs are numbers of "
    "the group's dtype, so casting is exact; params: null is 'not given', 'inf' and 'nan' are these numbers",
    "level B: |got - want| <= kappa(k, n, dtype) * mag + n * tiny    for every element of every output",
    "level E: got == want    bit for bit (+0 = -0): nothing is ever rounded, in any order of summation",
    "level S: an error is raised, when the layer is made or when it is first used",
    "kappa(k, n, dtype) = (1 + u_s)^k * (1 + u_m)^4 * (1 + n * u_a / (1 - n * u_a)) - 1 + 2^-53: k roundings to "
    "storage, sums of n products, half an ulp of `want`; as expm1(k * log1p(u_s) + ...) in float64",
    "u = 2^-53 for float64, 2^-24 for float32, 2^-11 for float16 and tf32, 2^-8 for bfloat16; u_s: of the dtype; u_a: "
    "of what sums are accumulated in, float32 for float16 and bfloat16; u_m = 0, or u of what a product's inputs are "
    "rounded to if that is coarser than the dtype (tf32)",
    "tiny = the smallest subnormal of the dtype: 2^-1074 for float64, 2^-149 for float32, 2^-24 for float16, 2^-133 "
    "for bfloat16; the smallest normal (2^-1022, 2^-126, 2^-14, 2^-126) if subnormals are flushed to zero",
    "mag: the equation with every operand replaced by its absolute value; where k = n = 1, a running error analysis in "
    "the arithmetic that is the default above, divided by kappa(1, 1)",
    "absent_grads: these gradients do not exist; zeros are a gradient")

CROSSCHECK = ("exact rational arithmetic, or 50 digits where a function is not rational: rounded once, the values",
              "minipeft's own engine, float64, within the bound", "plain NumPy, in the dtype, within the bound")


def files(method: Method, vectors: Sequence[Vector], pack: str = PACK) -> dict[str, bytes]:
    """{file name: its bytes}, the two files of a method. pack: the name of the pack."""
    text = pretty(document(method, vectors, pack)) + "\n"
    return {f"{method.name}.json": text.encode(), f"{method.name}.safetensors": _bytes_of(tensors(vectors))}


def document(method: Method, vectors: Sequence[Vector], pack: str = PACK) -> dict[str, Any]:
    """The contents of the JSON file of a method. pack: the name of the pack."""
    notes = {flag: {"description": note.words, "effect": note.effect, "links": list(note.links),
                    "mutants": [m.id for m in method.mutants if m.flag == flag]}
             for flag, note in method.notes.items()}
    groups: dict[tuple, dict[str, Any]] = {}
    for vector in vectors:
        key = (vector.case.dtype, vector.level, *sorted(vector.case.conventions.items()))
        groups.setdefault(key, _group(method, vector))["tests"].append(_test(vector))
    return {"schema": NAME, "pack": pack, "spec_version": SPEC, "method": method.name, "title": method.title,
            "numberOfTests": len(vectors), "header": [*method.equation, *VERDICT], "notes": notes,
            "withdrawn": {id: why for id, why in WITHDRAWN.items() if id.startswith(f"{method.name}-")},
            "groups": list(groups.values())}


def _group(method: Method, vector: Vector) -> dict[str, Any]:
    return {"type": "".join(part.capitalize() for part in method.name.split("_")), "dtype": vector.case.dtype,
            "level": vector.level, "conventions": dict(vector.case.conventions),
            "source": {"generator": "minipeft", "crosscheck": list(CROSSCHECK)},
            "reference": {"paper": method.source["paper"], "where": method.source["where"],
                          "equation": list(method.equation)}, "tests": []}


def _test(vector: Vector) -> dict[str, Any]:
    outputs = {name: {"k": v.k, "n": v.n, "shape": list(v.exact.shape)} for name, v in vector.outputs.items()}
    return {"id": vector.id, "comment": vector.label, "flags": list(vector.flags), "params": dict(vector.case.params),
            "inputs": list(vector.case.arrays), "outputs": outputs, "absent_grads": list(vector.absent),
            "kills": dict(vector.kills), "result": vector.result}


def tensors(vectors: Sequence[Vector]) -> dict[str, numpy.ndarray]:
    """The contents of the safetensors file, {name: array}."""
    found = {}
    for vector in vectors:
        found.update({f"{vector.id}/in/{name}": array for name, array in vector.case.arrays.items()})
        for name, value in vector.outputs.items():
            found[f"{vector.id}/out/{name}"] = value.exact
            if vector.level == "B":
                found[f"{vector.id}/mag/{name}"] = value.mag
    return found


def _bytes_of(arrays: Mapping[str, numpy.ndarray]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.safetensors"
        write_tensors(path, arrays, signed=False)  # without metadata, since the published bytes have none
        return path.read_bytes()


def pretty(value: Any, depth: int = 0) -> str:
    """`value` as JSON, indented by `depth`, with as many short entries on a line as fit: a test takes a few lines, and
    a change to it is a small diff."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value or len(flat) + depth <= _LINE:
        return flat
    if isinstance(value, dict):
        inner = [f"{json.dumps(key)}: {pretty(item, depth + 1)}" for key, item in value.items()]
    else:
        inner = [pretty(item, depth + 1) for item in value]
    lines = [inner[0]]
    for item in inner[1:]:
        if "\n" not in lines[-1] + item and depth + len(lines[-1]) + len(item) < _LINE:
            lines[-1] += f", {item}"
        else:
            lines.append(item)
    pad, (first, last) = "\n" + " " * (depth + 1), "{}" if isinstance(value, dict) else "[]"
    return first + pad + ("," + pad).join(lines) + "\n" + " " * depth + last
