"""Which buffers were alive when: the memory of a computation, counted from its arrays and not by the allocator.

A buffer is the memory that an array owns; a view belongs to the buffer that it shows. `Buffers.see(thing)` notes the
buffers of every array that `thing` leads to, through Tensors, lists and the closures of functions. Weak references
report the end of a buffer without keeping it alive. A buffer that outlives the computation and was not made by it (a
weight, a batch) was there before, and is not counted. An array that is never passed to `see` is not counted either.
"""
from __future__ import annotations

import functools
import gc
import types
import weakref
from typing import Any, Iterator

from minipeft.engine.tensor import Tensor
from minipeft.backend import Array, xp


class Buffers:
    """Births and deaths of buffers in order, each with the value of `at` when it happened. Every buffer has a number.
    Arrays must allow weak references; those of NumPy and CuPy do."""

    def __init__(self) -> None:
        self.at: Any = None
        self.bytes: list[int] = []                        # by the buffer's number
        self.made: set[int] = set()                       # numbers of buffers that the computation made
        self.alive: dict[int, int] = {}                   # id of the array that owns it -> number
        self._ends: dict[int, weakref.ref] = {}
        self._events: list[tuple[int, int, Any]] = []     # number, bytes born (or -bytes, died), at

    def see(self, thing: Any, made: bool = False) -> list[int]:
        """The numbers of the buffers that `thing` leads to. made: whether the computation made the new ones."""
        return [self._number(owner, made) for owner in owners(thing)]

    def born(self, size: int) -> int:
        """Note a buffer of `size` bytes made now, and return its number. If `see` never meets it, call `died`."""
        self.bytes.append(size)
        number = len(self.bytes) - 1
        self.made.add(number)
        self._events.append((number, size, self.at))
        return number

    def died(self, number: int | None) -> None:
        """Note the end of the buffer with this `number`; None does nothing."""
        if number is not None:
            self._events.append((number, -self.bytes[number], self.at))

    def before(self) -> set[int]:
        """The buffers that existed before the computation. Call this when it is over and its results are dropped."""
        gc.collect()  # closures may form reference cycles
        return set(self.alive.values()) - self.made

    def peak(self, before: set[int]) -> tuple[int, Any]:
        """The most bytes that were alive at once, the buffers `before` left out, and the value of `at` at that time."""
        live, most, where = 0, 0, None
        for number, change, at in self._events:
            live += change if number not in before else 0
            if live > most:
                most, where = live, at
        return most, where

    def _number(self, owner: Array, made: bool) -> int:
        key = id(owner)
        if key not in self.alive:
            self.alive[key] = self.born(owner.nbytes)
            if not made:
                self.made.discard(self.alive[key])
            self._ends[key] = weakref.ref(owner, functools.partial(self._ended, key))
        return self.alive[key]

    def _ended(self, key: int, _: weakref.ref) -> None:
        self.died(self.alive.pop(key))
        del self._ends[key]


def owners(thing: Any) -> Iterator[Array]:
    """The arrays, of any shape, that own the memory of the arrays inside `thing`, each once."""
    seen: set[int] = set()
    todo = [thing]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, xp.ndarray):
            if isinstance(thing.base, xp.ndarray):
                todo.append(thing.base)
            else:
                yield thing
        else:
            todo += _inside(thing)


def _inside(thing: Any) -> list[Any]:
    """The contents of a container, a Tensor or a callable. A Tensor's node is left out: its VJPs belong to the op that
    made the Tensor."""
    if isinstance(thing, Tensor):
        return [thing.data]
    if isinstance(thing, (list, tuple, set)):
        return list(thing)
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, types.MethodType):
        return [thing.__func__, vars(thing.__self__)] if hasattr(thing.__self__, "__dict__") else [thing.__func__]
    if isinstance(thing, types.FunctionType):
        return [*(_content(cell) for cell in thing.__closure__ or ()), thing.__defaults__, thing.__kwdefaults__]
    return [vars(thing)] if callable(thing) and hasattr(thing, "__dict__") and not isinstance(thing, type) else []


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None
