"""Checks a plug-in against vectors, one output at a time, and reports why an output cannot be tested."""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterable, Iterator, Mapping

import numpy

from minipeft.conformance.arithmetic import arithmetic
from minipeft.conformance.case import Case
from minipeft.conformance.fault import NO_USE, Fault, Skip
from minipeft.conformance.guard import last_lines
from minipeft.conformance.method import Make, Method
from minipeft.conformance.observe import Observation, near, none_of, refused
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.tolerance import Value
from minipeft.conformance.vectors.read import Vector

RAISES, ABSENT = "must raise", "absent gradients"


@dataclasses.dataclass(frozen=True)
class Seen:
    """The outcome for one output of a vector. output: its name, RAISES or ABSENT; "" for the whole vector. what: the
    observation, the Fault, or the reason for a skip, a string."""

    vector: Vector
    output: str
    what: Observation | Fault | str


def run(method: Method, vectors: Iterable[Vector], plugin: Plugin) -> Iterator[Seen]:
    """The outcome of every vector in turn, for a plug-in that offers `method`."""
    declared, make = plugin.conventions(method), plugin.make(method)
    for vector in vectors:
        reason = skipped(method, vector, plugin.dtypes, declared)
        if reason:
            yield Seen(vector, "", reason)
        else:
            yield from observed(method, judged(method, vector, plugin.arith.get(vector.case.dtype, {})), make)


def skipped(method: Method, vector: Vector, dtypes: Iterable[str], declared: Mapping[str, str]) -> str:
    """Why a vector is not meant for an implementation with these dtypes and declared conventions. "" if it is: if it
    has these conventions, or if both give the same results, such as for a row without padding, wherever a prompt stands
    in a padded one."""
    case = vector.case
    if case.dtype not in dtypes:
        return f"{case.dtype} is not declared"
    has = method.meant(declared)
    odd = [f"{name} is {has[name]!r}, not {value!r}" for name, value in method.meant(case.conventions).items()
           if has[name] != value]
    if not odd or vector.result == "valid" and _alike(method, case, declared):
        return ""
    return f"other conventions: {', '.join(odd)}"


def _alike(method: Method, case: Case, declared: Mapping[str, str]) -> bool:
    """Whether the case gives the same results under its own conventions and under the declared ones."""
    own, other = (method.reference(dataclasses.replace(case, conventions=names))
                  for names in (case.conventions, declared))
    return own.keys() == other.keys() and all(numpy.array_equal(own[name].exact, other[name].exact) for name in own)


def judged(method: Method, vector: Vector, declared: Mapping[str, Any]) -> Vector:
    """The vector with the bounds for an implementation that declares this arithmetic for the dtype. Published bounds
    are those of the default arithmetic. For another they are derived again, since those of a running error analysis are
    not a formula in k and n."""
    case = dataclasses.replace(vector.case, declared=declared)
    if case.exact or case.arith == arithmetic(case.dtype):
        return dataclasses.replace(vector, case=case)
    bounds = method.reference(case)
    return dataclasses.replace(vector, case=case, outputs={
        name: Value(value.exact, bounds[name].mag, bounds[name].k, bounds[name].n)
        for name, value in vector.outputs.items()})


def observed(method: Method, vector: Vector, make: Make) -> Iterator[Seen]:
    """The outcome for every output of one vector. make: case -> a handle of the implementation."""
    case = vector.case
    if vector.result == "must_raise":
        compute = next(iter(method.outputs.values()))[1]
        yield Seen(vector, RAISES, _or_fault(lambda: refused(case, lambda: compute(make, case))))
        return
    try:
        offers = make(case).offers
    except Fault as fault:
        yield Seen(vector, next(iter(vector.outputs)), fault)
        return
    except Skip as skip:
        yield from (Seen(vector, name, str(skip)) for name in vector.outputs)
        return
    gradients: dict[str, Any] | None = None
    for name, value in vector.outputs.items():
        needs, compute = method.outputs[name]
        missing = [need for need in needs if not offers(need)]
        if missing:
            yield Seen(vector, name, f"not offered: {', '.join(missing)}")
            continue
        spies: list[_Spy] = []
        yield Seen(vector, name, _or_fault(lambda: near(case, name, compute(_spying(make, spies), case), value)))
        gradients = gradients or next((spy.gradients for spy in spies if spy.gradients is not None), None)
    if vector.absent and gradients is not None:
        yield Seen(vector, ABSENT, none_of(vector.absent, gradients))
    elif vector.absent:
        yield Seen(vector, ABSENT, "not offered: vjp")


def _or_fault(look: Callable[[], Observation]) -> Observation | Fault | str:
    """The observation; or the Fault, also for a result that cannot be used, such as None instead of a set of weights;
    or the reason for a Skip."""
    try:
        return look()
    except Skip as skip:
        return str(skip)
    except Fault as fault:
        return fault
    except Exception as error:
        return Fault(NO_USE, last_lines(error))


class _Spy:
    """A handle that remembers the gradients of its last `vjp`, whose arguments differ from method to method."""

    def __init__(self, handle: Any):
        self._handle = handle
        self.gradients: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def arrays(self, name: str, shapes: Mapping[str, tuple], *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = self._handle.arrays(name, shapes, *args, **kwargs)
        if name == "vjp":
            self.gradients = found
        return found


def _spying(make: Make, spies: list[_Spy]) -> Make:
    """`make`, with every handle wrapped in a _Spy and appended to `spies`."""
    def build(case: Case) -> _Spy:
        spies.append(_Spy(make(case)))
        return spies[-1]
    return build


def case_in(case: Case, dtype: str) -> Case:
    """The case with the same numbers for an implementation in another dtype, in which they must be exact."""
    return dataclasses.replace(case, dtype=dtype)
