"""Observations of a property: a value of the implementation beside the value it is compared with.

Three levels, never mixed in one number:  E exact (bit for bit),  B bounded (rho <= 1),  S structural (facts).
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Iterable, Mapping

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import NOT_FINITE, RAISES, Fault
from minipeft.conformance.tolerance import Value, rho


@dataclasses.dataclass(frozen=True)
class Observation:
    """One comparison. name: the value observed, in words. level: "E", "B" or "S". got, want: the implementation's value
    and the expected one. tau: the bound of level B; None at the others. why: the meaning of a difference, if the name
    does not say it."""

    name: str
    level: str
    got: Any
    want: Any
    tau: numpy.ndarray | None = None
    why: str = ""

    @property
    def rho(self) -> float:
        """The worst error divided by its bound; at levels E and S, 0 or infinity."""
        if self.level == "B":
            return rho(self.got, self.want, self.tau)
        if self.level == "E":
            return 0.0 if numpy.array_equal(self.got, self.want) else float("inf")
        return 0.0 if self.got == self.want else float("inf")

    @property
    def sees(self) -> float:
        """At level B, the smallest error that is found wherever it occurs, as a share of the largest number; infinity
        if all numbers are 0, and at the other levels."""
        largest = abs(numpy.asarray(self.want, numpy.float64)).max(initial=0)
        return float(numpy.max(self.tau, initial=0) / largest) if self.tau is not None and largest else math.inf

    @property
    def holds(self) -> bool:
        """Whether the value is right."""
        return self.rho <= 1

    def like(self, other: Any) -> bool:
        """Whether `other`, the value of another implementation in the same place, equals `got`, within the bound at
        level B."""
        if self.level == "S":
            return bool(self.got == other)
        got, other = numpy.asarray(self.got), numpy.asarray(other)
        if got.shape != other.shape:
            return False
        return bool(numpy.array_equal(got, other)) if self.level == "E" else rho(got, other, self.tau) <= 1


def near(case: Case, name: str, got: Any, value: Value, why: str = "") -> Observation:
    """The output `got` compared with the reference `value`: within its bound, or bit for bit if the case is exact.
    name, why: of the Observation."""
    return between(case, name, got, value.exact, value, why=why)


def between(case: Case, name: str, got: Any, want: Any, *values: Value, why: str = "") -> Observation:
    """Two outputs, `got` and `want`, compared with each other. Each may be off by its own bound, so the bound is the
    sum of those of `values`; on an exact case they must be equal bit for bit."""
    if case.exact:
        return same(name, got, numpy.asarray(want, numpy.float64), why)
    return Observation(name, "B", got, want, case.tau(*values), why)


def same(name: str, got: Any, want: Any, why: str = "") -> Observation:
    """An observation at level E: all numbers must be equal (+0 = -0)."""
    return Observation(name, "E", got, want, why=why)


def fact(name: str, got: Any, want: Any, why: str = "") -> Observation:
    """An observation at level S, of a fact: a set of names, a state, an error that was raised."""
    return Observation(name, "S", got, want, why=why)


def none_of(frozen: Iterable[str], gradients: Mapping[str, Any]) -> Observation:
    """The fact that no array named in `frozen` has a gradient in `gradients`. It lists those that have one, and says of
    each if it is all zeros."""
    there = {name: gradients[name] for name in frozen if gradients.get(name) is not None}
    return fact("gradients of frozen arrays", [n if numpy.any(g) else f"{n} (zeros)" for n, g in there.items()], [],
                "zeros are a gradient too: they take memory, and decay and momentum act on the array")


def raised(name: str, action: Any, why: str = "") -> Observation:
    """The fact that `action()` raises an error. A Fault of another kind (a hang, NaN) does not count as one."""
    try:
        action()
    except Fault as fault:
        return fact(name, "an error" if fault.kind == RAISES else fault.kind, "an error", why)
    return fact(name, "no error", "an error", why)


def refused(case: Case, action: Any) -> Observation:
    """The fact that `action()` refuses an invalid case by an error. If a parameter of the case is missing or not
    finite, a result that is not finite is also accepted: nobody mistakes it for a valid result."""
    seen = raised(case.label, action)
    loud = seen.got == NOT_FINITE and any(value in (None, "inf", "-inf", "nan") for value in case.params.values())
    return fact(seen.name, "an error", "an error") if loud else seen
