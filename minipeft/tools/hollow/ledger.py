"""The ledger of a program's memory: when each piece of it was allocated and freed, and for which purpose.

    live(t) = the bytes allocated before t - the bytes freed before t            peak = the largest live(t)

Python frees an array as soon as nothing refers to it, so the ledger of hollow arrays has the order of events that the
same program has on real arrays. The purpose of a piece of memory is often known only later. A gradient, for
instance, is an array like any other until the backward pass is over. So the ledger keeps the events, and `peak` reads
them at the end.
"""
from __future__ import annotations

import collections
from typing import Iterable

TEMPORARY = "temporaries"


class Memory:
    """One piece of memory of `size` bytes, owned by an array and shared by its views. It is freed when the last of them
    is gone."""

    __slots__ = ("ledger", "number")

    def __init__(self, ledger: "Ledger", size: int):
        self.ledger, self.number = ledger, len(ledger.sizes)
        ledger.sizes.append(size)
        ledger.alive.add(self.number)
        ledger.events.append(self.number)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.ledger.sizes[self.number]

    def __del__(self) -> None:
        self.ledger.alive.discard(self.number)
        self.ledger.events.append(~self.number)


class Ledger:
    """The events of a program on hollow arrays.

    events: n where piece n was allocated, ~n where it was freed, in order. sizes: bytes by n. alive: the pieces that
    are not freed. purpose: {n: purpose of piece n}; those that are missing are temporaries."""

    def __init__(self) -> None:
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.alive: set[int] = set()
        self.purpose: dict[int, str] = {}

    def peak(self, start: int, end: int, without: Iterable[int] = ()) -> dict[str, int]:
        """{purpose: bytes} at the moment with the most bytes alive, between the events number `start` and `end`. The
        pieces `without` are left out."""
        left_out = set(without)
        now: collections.Counter = collections.Counter()
        live = most = 0
        found: dict[str, int] = {}
        for at, event in enumerate(self.events[:end]):
            number = event if event >= 0 else ~event
            if number not in left_out:
                change = self.sizes[number] if event >= 0 else -self.sizes[number]
                live += change
                now[self.purpose.get(number, TEMPORARY)] += change
            if at >= start - 1 and live > most:
                most, found = live, dict(now)
        return {purpose: size for purpose, size in found.items() if size}
