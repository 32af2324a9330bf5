"""A case: the inputs of one test, exactly representable in its dtype, and how its outputs are judged."""
from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from typing import Any, Callable, Mapping, TypeVar

import numpy

from minipeft.conformance.arithmetic import Arithmetic, arithmetic
from minipeft.conformance.tolerance import Value, tau

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of one test of a method.

    dtype: the one in which the implementation computes. arrays: float64 (holding only numbers of `dtype`), int64 or
    bool. params: numbers and strings, as JSON holds them. exact: the data are small integers or dyadic, so that every
    operation of the method is exact in every dtype and in any order; outputs are then compared bit for bit.
    conventions, declared: the conventions and the arithmetic that the implementation declares; set by the harness.
    label: the subject of the case, in words."""

    method: str
    dtype: str
    exact: bool
    params: Mapping[str, Any]
    arrays: Mapping[str, numpy.ndarray]
    label: str = ""
    conventions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    declared: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> numpy.ndarray:
        return self.arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    @functools.cached_property
    def arith(self) -> Arithmetic:
        """The arithmetic that the implementation is judged by."""
        return arithmetic(self.dtype, self.declared)

    def tau(self, *values: Value) -> numpy.ndarray:
        """The bound on one output, elementwise, or the sum of the bounds on several: when two outputs are compared with
        each other, each may be off by its own bound."""
        return numpy.sum([tau(value, self.arith) for value in values], axis=0)

    def but(self, arrays: Mapping[str, numpy.ndarray] | None = None, params: Mapping[str, Any] | None = None,
            **fields: Any) -> "Case":
        """A copy with these arrays, params and other fields replaced."""
        return dataclasses.replace(self, arrays={**self.arrays, **(arrays or {})},
                                   params={**self.params, **(params or {})}, **fields)

    def without(self, *names: str) -> "Case":
        """A copy without the arrays of these names."""
        return dataclasses.replace(self, arrays={k: v for k, v in self.arrays.items() if k not in names})

    @functools.cached_property
    def digest(self) -> str:
        """sha256, in hex, of method, dtype, exact, params, conventions and arrays. It never changes, so results that
        depend on these alone may be cached under it."""
        digest = hashlib.sha256(json.dumps([self.method, self.dtype, self.exact, dict(sorted(self.params.items())),
                                            dict(sorted(self.conventions.items()))], sort_keys=True).encode())
        for name in sorted(self.arrays):
            array = self.arrays[name]
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(numpy.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def id(self) -> str:
        """The method and eight digits of the digest. This is short enough to read, but 32 bits are too few to tell
        thousands of cases apart with certainty."""
        return f"{self.method}-{self.digest[:8]}"

    @functools.cached_property
    def seed(self) -> int:
        """A seed for numbers that a property draws itself: the same for the same case."""
        return int(self.digest[:8], 16)


class _Key:
    """A case as a cache key: equal keys have equal references and bounds."""

    def __init__(self, case: Case):
        self.case, self.key = case, (case.digest, case.arith)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def remembered(reference: Callable[[Case], T]) -> Callable[[Case], T]:
    """`reference`, with its results cached by case: every property asks for them, and in the self-test every planted
    bug."""
    @functools.lru_cache(2000)
    def known(key: _Key) -> T:
        return reference(key.case)

    @functools.wraps(reference)
    def of(case: Case) -> T:
        return copy.copy(known(_Key(case)))

    return of
