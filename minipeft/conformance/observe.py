"""What a property sees: a value of the implementation beside the one that it is held against.

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
    """name: of what was seen, in words. tau: the bound of level B, None at the others. why: what a difference means
    where the name does not say it."""

    name: str
    level: str
    got: Any
    want: Any
    tau: numpy.ndarray | None = None
    why: str = ""

    @property
    def rho(self) -> float:
        """Error over bound; at levels E and S 0 or infinity."""
        if self.level == "B":
            return rho(self.got, self.want, self.tau)
        if self.level == "E":
            return 0.0 if numpy.array_equal(self.got, self.want) else float("inf")
        return 0.0 if self.got == self.want else float("inf")

    @property
    def sees(self) -> float:
        """Of level B: the smallest error that shows wherever it is, as a share of the largest number; infinity where
        all numbers are 0."""
        largest = abs(numpy.asarray(self.want, numpy.float64)).max(initial=0)
        return float(numpy.max(self.tau, initial=0) / largest) if self.tau is not None and largest else math.inf

    @property
    def holds(self) -> bool:
        return self.rho <= 1

    def like(self, other: Any) -> bool:
        """Whether `other`, what something else gives in the same place, is what was got: within the bound."""
        if self.level == "S":
            return bool(self.got == other)
        got, other = numpy.asarray(self.got), numpy.asarray(other)
        if got.shape != other.shape:
            return False
        return bool(numpy.array_equal(got, other)) if self.level == "E" else rho(got, other, self.tau) <= 1


def near(case: Case, name: str, got: Any, value: Value, why: str = "") -> Observation:
    """Held against the reference: within its bound, or bit for bit where the case is exact."""
    return between(case, name, got, value.exact, value, why=why)


def between(case: Case, name: str, got: Any, want: Any, *values: Value, why: str = "") -> Observation:
    """Two outputs held against each other, each within its own bound of the exact result."""
    if case.exact:
        return same(name, got, numpy.asarray(want, numpy.float64), why)
    return Observation(name, "B", got, want, case.tau(*values), why)


def same(name: str, got: Any, want: Any, why: str = "") -> Observation:
    """Equal as numbers, every one (+0 = -0)."""
    return Observation(name, "E", got, want, why=why)


def fact(name: str, got: Any, want: Any, why: str = "") -> Observation:
    """Something that is so or not: a set of names, a state, an error that was raised."""
    return Observation(name, "S", got, want, why=why)


def none_of(frozen: Iterable[str], gradients: Mapping[str, Any]) -> Observation:
    """The fact that no frozen array has a gradient; of one that has, whether it is zeros."""
    there = {name: gradients[name] for name in frozen if gradients.get(name) is not None}
    return fact("gradients of frozen arrays", [n if numpy.any(g) else f"{n} (zeros)" for n, g in there.items()], [],
                "zeros are a gradient too: memory for it, decay and momentum act on it")


def raised(name: str, action: Any, why: str = "") -> Observation:
    """The fact that `action()` raises an error; one of the harness (a hang, NaN) is not that."""
    try:
        action()
    except Fault as fault:
        return fact(name, "an error" if fault.kind == RAISES else fault.kind, "an error", why)
    return fact(name, "no error", "an error", why)


def refused(case: Case, action: Any) -> Observation:
    """The fact that a case which makes no sense is refused by an error. Of a parameter that is missing or not finite,
    numbers that are not finite say as much: nobody takes them for a result."""
    seen = raised(case.label, action)
    loud = seen.got == NOT_FINITE and any(value in (None, "inf", "-inf", "nan") for value in case.params.values())
    return fact(seen.name, "an error", "an error") if loud else seen
