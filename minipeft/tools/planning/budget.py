"""Does it fit? The largest batch and the largest rank whose peak stays within a budget.

    fits(n): peak(n) <= budget        the peak grows with the batch and with the rank

Between two known points the peak is nearly a straight line, so the next guess is where that line meets the budget. Each
guess is a plan of its own, so that the answer is exact and not extrapolated.
"""
from __future__ import annotations

import dataclasses
import re
from typing import Callable

from minipeft.checks import integer, shown

_UNITS = {"": 1, "B": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9, "TB": 10 ** 12,
          "KIB": 2 ** 10, "MIB": 2 ** 20, "GIB": 2 ** 30, "TIB": 2 ** 40}
MOST = 2 ** 20  # of a batch or a rank; beyond this nothing is searched


@dataclasses.dataclass(frozen=True)
class Budget:
    """limit: the budget in bytes. fits: whether the peak is within it. batch: the largest batch that fits at the rank
    that was asked for, 0 if none does. rank: the largest rank that fits at the batch that was asked for, 0 if none
    does; None for a method without one. rank_is_bound: whether a larger rank is not possible on this model, although
    there would be room."""

    limit: int
    fits: bool
    batch: int
    rank: int | None
    rank_is_bound: bool = False


def in_bytes(budget: int | str) -> int:
    """The `budget` in bytes: an integer, or a text such as "24GB" (10^9 bytes each) or "24GiB" (2^30). Raises
    ValueError for anything else."""
    if not isinstance(budget, str):
        return integer("budget", budget, 1)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
    if not found or found[2].upper() not in _UNITS or not float(found[1]):
        raise ValueError(f"budget is {shown(budget)}; expected a size such as 24GB or 23.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def answer(limit: int, peak: int, batch: int, rank: int | None, peak_at: Callable[[int, int | None], int],
           most: int = MOST) -> Budget:
    """Whether `peak`, that of `batch` and `rank`, is within the limit, and the largest batch and rank that are.
    peak_at(batch, rank) gives the peak of another batch or rank, and raises ValueError for a rank that cannot be. most:
    the largest batch that is tried."""
    largest = search(limit, lambda n: peak_at(n, rank), {batch: peak}, most)
    if rank is None:
        return Budget(limit, peak <= limit, largest, None)
    bound: list[int] = []

    def of_rank(r: int) -> int:
        try:
            return peak_at(batch, r)
        except ValueError:
            bound.append(r)
            return 2 * max(limit, peak)

    best = search(limit, of_rank, {rank: peak})
    return Budget(limit, peak <= limit, largest, best, best + 1 in bound)


def search(limit: int, peak: Callable[[int], int], known: dict[int, int], most: int = MOST) -> int:
    """The largest n from 1 to `most` with peak(n) <= limit; 0 if there is none. known: {n: its peak}, some of them."""
    found = dict(known)

    def fits(n: int) -> bool:
        if n not in found:
            found[n] = peak(n)
        return found[n] <= limit

    if not fits(1):
        return 0
    low, high = 1, most + 1
    for n in known:
        low, high = (max(low, n), high) if fits(n) else (low, min(high, n))
    while high - low > 1:
        other = high if high in found else max((n for n in found if n < low), default=low)
        slope = (found[other] - found[low]) / (other - low) if other != low else 0
        line = low + int((limit - found[low]) / slope) if slope > 0 else 2 * low
        far = min(16 * low, high - 1)  # `high` itself may be where the search ends, with no peak known there
        line = min(line, far)
        for n in (line, line + 1, (low + high) // 2 if high in found else far):  # a bent line is halved as well
            if low < n < high:
                low, high = (n, high) if fits(n) else (low, n)
    return low
