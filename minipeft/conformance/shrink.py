"""The smallest case that still fails: a failing case of 48 x 33 numbers becomes one that fits in a line.

    delete indices of a named axis from every array that has it; halves first, then quarters, down to one index
    entries -> 0, then 1, then without their fraction; whole arrays first, then pieces of them
    numbers among the params -> 1, then 0

A step is kept if the case still fails and the plain implementation still gets all its outputs right. So an exact case
stays exact, and no case becomes one that ought to be refused. The search is deterministic: for an implementation
without state, the same case always shrinks in the same way. An implementation that answers the same call differently (a
counter, a cache, a generator of its own) may lead to another case each time.
"""
from __future__ import annotations

import dataclasses
import types
from typing import Any, Callable, Iterator

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.fault import Fault
from minipeft.conformance.method import Method
from minipeft.conformance.observe import near
from minipeft.conformance.plugin import Plugin

VOCABULARY = ("vocab", "V")     # axes whose indices are the entries of integer arrays called "ids"


def shrink(case: Case, method: Method, fails: Callable[[Case], bool], tries: int = 400) -> Case:
    """A case no larger than `case` on which `fails` is still true. fails: true of `case`; called at most `tries` times.
    A candidate on which it raises an exception is dropped."""
    search = Search(case, method, fails, tries)
    before = None
    while before is not search.best and search.left > 0:
        before = search.best
        for axis in dict.fromkeys(axis for axes in method.axes.values() for axis in axes):
            search.cut(axis)
        for size in (lambda array: array.size, lambda array: array.size // 2):
            for name in case.arrays:
                search.simplify(name, size(search.best[name]))
        for name in case.params:
            search.settle(name)
    return search.best


class Search:
    """The search of `shrink`: the best case so far, and how often `fails` may still be called."""

    def __init__(self, case: Case, method: Method, fails: Callable[[Case], bool], tries: int):
        self.best, self.method, self.fails, self.left = case, method, fails, tries
        self.asked = {case.id}
        self.conventions = {**method.default(), **case.conventions}
        # a demand that the first case does not meet is dropped: under other conventions the plain one is wrong
        self.demands = [holds for holds in (sound, needs_no_rounding) if holds(method, case)]

    def accept(self, candidate: Case | None) -> bool:
        """Whether the candidate still fails; if so, it becomes the best. None is never accepted."""
        if candidate is None or self.left <= 0 or candidate.id in self.asked:
            return False
        self.asked.add(candidate.id)
        settled = dataclasses.replace(candidate, conventions=self.conventions)
        if candidate.exact and not self.method.exact_when(settled):
            return False
        if not all(holds(self.method, candidate) for holds in self.demands):
            return False
        self.left -= 1
        try:
            still = bool(self.fails(candidate))
        except Exception:  # an invalid case may raise anything
            still = False
        if still:
            self.best = candidate
        return still

    def cut(self, axis: str) -> None:
        """Deletes as many indices of the axis as possible, the last ones first."""
        least = max(1, self.method.sizes.get(axis, (1, 1))[0])
        chunk = max(1, self._length(axis) // 2)
        while chunk and self.left > 0:
            stop = self._length(axis)
            while stop > 0 and self.left > 0:
                start = max(0, stop - chunk)
                if self._length(axis) - (stop - start) >= least:
                    self.accept(without(self.best, self.method, axis, start, stop))
                stop = start
            chunk = min(chunk // 2, self._length(axis) // 2)

    def _length(self, axis: str) -> int:
        return next((self.best[name].shape[i] for name, i in places(self.best, self.method, axis)), 0)

    def simplify(self, name: str, chunk: int) -> None:
        """Replaces entries of the array `name` by simpler ones, `chunk` neighbours at a time, then fewer, the last ones
        first. Integers and masks stay as they are: they are choices, not sizes."""
        while chunk and self.best[name].dtype == numpy.float64 and self.left > 0:
            for stop in range(self.best[name].size, 0, -chunk):
                any(self.accept(self.best.but({name: array}))
                    for array in simpler(self.best[name], slice(max(0, stop - chunk), stop)))
            chunk = chunk // 2 if chunk < self.best[name].size else 0

    def settle(self, name: str) -> None:
        """Replaces the param `name`, if it is a number, by 1 or 0."""
        value = self.best.params[name]
        if type(value) in (int, float) and value not in (0, 1):
            any(self.accept(self.best.but(params={name: type(value)(n)})) for n in (1, 0))


def places(case: Case, method: Method, axis: str) -> Iterator[tuple[str, int]]:
    """Every (array, number of its dimension) that the axis names; none if the lengths differ."""
    found = [(name, i) for name, axes in method.axes.items() if name in case and case[name].ndim == len(axes)
             for i, a in enumerate(axes) if a == axis]
    if len({case[name].shape[i] for name, i in found}) == 1:
        yield from found


def without(case: Case, method: Method, axis: str, start: int, stop: int) -> Case | None:
    """The case without the indices start..stop of an axis; None if no array has it. If it is the vocabulary's, the ids
    of later rows move with these rows, and the id of a deleted row becomes that of the row in its place."""
    arrays: dict[str, numpy.ndarray] = {}
    for name, i in places(case, method, axis):
        arrays[name] = numpy.delete(arrays.get(name, case[name]), slice(start, stop), axis=i)
    if not arrays:
        return None
    if axis in VOCABULARY:
        left = min(array.shape[i] for (name, i) in places(case, method, axis) for array in [arrays[name]])
        for name, array in case.arrays.items():
            if name.endswith("ids") and numpy.issubdtype(array.dtype, numpy.integer):
                ids = arrays.get(name, array)
                ids = numpy.where(ids >= stop, ids - (stop - start), numpy.where(ids > start, start, ids))
                arrays[name] = numpy.where(ids == left, left - 1, ids).astype(array.dtype)
    return case.but(arrays)


def simpler(array: numpy.ndarray, piece: slice) -> Iterator[numpy.ndarray]:
    """Copies of the array with the entries of a piece set to 0, or to 1, or truncated, wherever that is simpler."""
    for value in (0.0, 1.0, None):
        flat = array.reshape(-1).copy()
        new = numpy.trunc(flat[piece]) if value is None else numpy.full_like(flat[piece], value)
        flat[piece] = numpy.where(_rank(new) < _rank(flat[piece]), new, flat[piece])
        if not numpy.array_equal(flat, array.reshape(-1)):
            yield flat.reshape(array.shape)


def _rank(x: numpy.ndarray) -> numpy.ndarray:
    """The complexity of each entry: 0 for 0, 1 for 1, 2 for other integers, 3 for anything else."""
    return numpy.where(x == 0, 0, numpy.where(x == 1, 1, numpy.where(x == numpy.trunc(x), 2, 3)))


def sound(method: Method, case: Case) -> bool:
    """Whether the plain implementation gets every output of the case right."""
    plain: Any = types.SimpleNamespace(capabilities={"dtypes": (case.dtype,)}, **{method.name: method.plain})
    make = Plugin(plain).make(method)
    try:
        with numpy.errstate(all="ignore"):
            values = method.reference(case)
            return all(near(case, name, compute(make, case), values[name]).holds
                       for name, (_, compute) in method.outputs.items() if name in values)
    except (Fault, ArithmeticError, LookupError, TypeError, ValueError):
        return False


def needs_no_rounding(method: Method, case: Case) -> bool:
    """Whether the outputs of an exact case are numbers of its dtype; True for any other case."""
    try:
        return not case.exact or all(numpy.array_equal(on_grid(value.exact, case.dtype), value.exact)
                                     for value in method.reference(case).values())
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return False
