"""Decides which tests may be published. A test may be if

    (a) minipeft's own engine, in float64, agrees with the exact result within the bound of float64; if it follows
        another convention, with the exact result under that convention,
    (b) that result comes from the exact evaluator: fractions or 50 digits, rounded once,
    (c) the method in plain NumPy agrees in the dtype of the test, and
    (d) it finds a planted bug with a margin, unless it is a test that invalid input is refused.

The implementations in (a) and (c) know only the default conventions: they run a test under others as the same function
in terms of the defaults (`Method.in_defaults`). An output is left out of a test if its bound is larger than all of its
numbers.

(d) is measured twice. The implementation with the bug fails the test in the test's dtype. And in float64, where half
precision adds nothing, the bug alone changes an output by at least 10 bounds (2 in half precision). The second measure
is published, as floor(log2), since it does not depend on how a machine's BLAS sums. Other libraries are not part of the
rule, or the files would depend on what is installed: the tests check installed libraries against the files.
"""
from __future__ import annotations

import dataclasses
import importlib
import math
import types
from typing import Any, Iterable, Iterator

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import Fault
from minipeft.conformance.method import Method, Mutant
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.tolerance import Value
from minipeft.conformance.vectors.read import Vector
from minipeft.conformance.vectors.run import Seen, case_in, observed

MARGIN = {"float64": 10, "float32": 10, "bfloat16": 2, "float16": 2}
REFUSED_IN = ("float64", "float32")  # refusals do not depend on the dtype, and every test takes room
_BITS = 24  # precision of a published bound


def vectors_of(method: Method) -> list[Vector]:
    """The vectors of a method, after the check that they may be published. Raises ValueError, naming the case, for the
    first that may not."""
    spoken = dataclasses.replace(method, arguments=lambda case: method.arguments(method.in_defaults(case)))
    with numpy.errstate(all="ignore"):  # planted bugs overflow, and input to be refused may be infinite
        return _vectors_of(spoken)


def _vectors_of(method: Method) -> list[Vector]:
    vectors = [_valid(method, case) for case in method.vectors()]
    vectors += [_refused(method, dataclasses.replace(refusal.case, label=refusal.what))
                for dtype in REFUSED_IN for refusal in method.refusals(dtype)]
    return [_with_kills(method, _agreed(method, vector)) for vector in vectors]


def _settled(method: Method, case: Case) -> Case:
    """The case with all its conventions written out, so that they are part of its id."""
    case = dataclasses.replace(case, conventions={**method.default(), **case.conventions}, declared={})
    return dataclasses.replace(case, exact=case.exact and method.exact_when(case))


def _valid(method: Method, case: Case) -> Vector:
    case = _settled(method, case)
    outputs = {name: Value(value.exact, _rounded_up(value.mag), int(value.k), int(value.n))
               for name, value in method.exact(case).items() if name in method.outputs}
    expected = [name for name in method.reference(case) if name in method.outputs]  # the outputs of this case
    if missing := [name for name in expected if name not in outputs] or [*method.outputs][:not outputs]:
        raise ValueError(f"{_named(case)}: exact() has no {missing[0]}")
    outputs = {name: value for name, value in outputs.items() if case.exact or _says_something(case, value)}
    shown = any("vjp" in needs for needs, _ in method.outputs.values())
    return Vector(case, outputs, "valid", method.absent if shown else ())


def _says_something(case: Case, value: Value) -> bool:
    """False if the bound is larger than all numbers of the output, as after some steps in half precision."""
    largest = abs(value.exact).max(initial=0)
    return largest == 0 or bool((case.tau(value) <= largest).any())


def _refused(method: Method, case: Case) -> Vector:
    return Vector(dataclasses.replace(_settled(method, case), exact=True), {}, "must_raise", ())


def _rounded_up(mag: numpy.ndarray) -> numpy.ndarray:
    """`mag` rounded up to fewer bits: the last ones of a running error analysis may differ between machines."""
    digits, exponent = numpy.frexp(numpy.asarray(mag, numpy.float64))
    return numpy.ldexp(numpy.ceil(numpy.ldexp(digits, _BITS)), exponent - _BITS)


def _named(case: Case) -> str:
    return f"{case.id} ({case.dtype}, {case.label!r})"


def _plugin(method: Method, build: Any, case: Case) -> Plugin:
    declared = {"dtypes": ["float64", case.dtype], "conventions": {method.name: dict(case.conventions)}}
    return Plugin(types.SimpleNamespace(**{"capabilities": declared, method.name: build}))


def _agreed(method: Method, vector: Vector) -> Vector:
    """The vector itself, after (a) and (c)."""
    case, ours = vector.case, importlib.import_module(f"minipeft.conformance.methods.{method.name}.ours")
    for what, build, twin in (("minipeft, float64,", getattr(ours, method.name), _for_ours(method, vector, ours)),
                              (f"plain NumPy, {case.dtype},", method.plain, vector)):
        for seen in observed(method, twin, _plugin(method, build, twin.case).make(method)):
            if isinstance(seen.what, str) and build is method.plain:
                raise ValueError(f"{_named(case)}: {what} cannot be tested: {seen.output}: {seen.what}")
            if _wrong(seen):
                why = seen.what if isinstance(seen.what, Fault) else f"rho {getattr(seen.what, 'rho', 0):.3g}"
                raise ValueError(f"{_named(case)}: {what} does not agree on {seen.output}: {why}")
    return vector


def _for_ours(method: Method, vector: Vector, ours: Any) -> Vector:
    """The vector with the same inputs and the bounds of float64; if minipeft declares other conventions, with the exact
    results under these."""
    declared = {**getattr(ours, "CONVENTIONS", {}),
                **getattr(ours, "capabilities", {}).get("conventions", {}).get(method.name, {})}
    case = case_in(vector.case, "float64")
    case = dataclasses.replace(case, conventions={**case.conventions, **declared})
    case = dataclasses.replace(case, exact=case.exact and method.exact_when(case))
    values = vector.outputs if case.conventions == vector.case.conventions or not vector.outputs else method.exact(case)
    bounds = method.reference(case) if vector.outputs and not case.exact else values
    return dataclasses.replace(vector, case=case, outputs={
        name: Value(values[name].exact, bounds[name].mag, bounds[name].k, bounds[name].n) for name in vector.outputs})


def _wrong(seen: Seen) -> bool:
    return not isinstance(seen.what, str) and not seen.what.holds


def _with_kills(method: Method, vector: Vector) -> Vector:
    """The vector with the planted bugs that it finds filled in."""
    kills = {mutant.id: found for mutant in method.mutants if (found := _kill(method, mutant, vector)) is not None}
    if not kills and vector.result != "must_raise":
        raise ValueError(f"{_named(vector.case)}: finds no planted bug by a margin of {MARGIN[vector.case.dtype]}")
    flags = sorted({mutant.flag for mutant in method.mutants if mutant.id in kills})
    for flag in flags:
        if flag not in method.notes:
            raise ValueError(f"{_named(vector.case)}: the flag {flag} has no note")
    return dataclasses.replace(vector, kills=kills, flags=tuple(flags))


def _kill(method: Method, mutant: Mutant, vector: Vector) -> int | str | None:
    """How clearly the vector finds this bug (see `Vector.kills`); None if not by the margin."""
    make = _plugin(method, mutant.build, vector.case).make(method)
    if not any(map(_wrong, observed(method, vector, make))):
        return None
    return _margin(observed(method, vector, lambda case: make(case_in(case, "float64"))), MARGIN[vector.case.dtype])


def _margin(seen: Iterable[Seen], least: float) -> int | str | None:
    found: list[Any] = [s.what for s in seen if _wrong(s)]
    rho = max((o.rho for o in found if not isinstance(o, Fault) and o.level == "B"), default=0.0)
    if any(not isinstance(o, Fault) and o.level == "E" for o in found) or rho == math.inf:
        return "E"
    if rho >= least:
        return math.floor(math.log2(rho))
    return "S" if any(isinstance(o, Fault) or o.level == "S" for o in found) else None


def lint(method: Method, vectors: list[Vector]) -> Iterator[str]:
    """Sentences on everything that is wrong with the vectors of one method: ids that occur twice, missing labels,
    arrays of other dtypes, numbers that are not finite."""
    ids = [vector.id for vector in vectors]
    for i, vector in enumerate(vectors):
        if vector.id in ids[:i]:
            yield f"{_named(vector.case)}: occurs twice"
        if not vector.label:
            yield f"{_named(vector.case)}: has no label"
        for name, array in vector.case.arrays.items():
            if array.dtype.name not in ("float64", "int64", "bool"):
                yield f"{_named(vector.case)}: {name} is an array of {array.dtype}; expected float64, int64 or bool"
            elif not numpy.isfinite(array).all():
                yield f"{_named(vector.case)}: {name} holds NaN or infinity"
        for name, value in vector.outputs.items():
            if not (numpy.isfinite(value.exact).all() and numpy.isfinite(value.mag).all()):
                yield f"{_named(vector.case)}: the value of {name}, or its bound, is not finite"
