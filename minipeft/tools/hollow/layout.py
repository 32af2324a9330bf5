"""Where the numbers of an array would lie: strides in bytes, and which changes of shape need a copy.

    address of x[i, j, ..] = start + i strides[0] + j strides[1] + ..

A view has the memory of another array and strides of its own. NumPy copies where no strides describe the new shape, and
so a plan of memory has to know the strides.
"""
from __future__ import annotations

import math
from typing import Any, Sequence

Shape = tuple[int, ...]


def in_order(shape: Sequence[int], itemsize: int) -> Shape:
    """The strides of a new array of this `shape`, its last axis innermost. itemsize: bytes of a number."""
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def contiguous(shape: Shape, strides: Shape, itemsize: int) -> bool:
    """Whether the numbers lie side by side in the order of the axes. shape, strides, itemsize: of the array."""
    return all(n == 1 or s == t for n, s, t in zip(shape, strides, in_order(shape, itemsize))) or 0 in shape


def resolved(shape: Any, size: int) -> Shape:
    """`shape` as a tuple, with -1 replaced by what `size` numbers leave for it. Raises ValueError for another size."""
    given = tuple(int(n) for n in shape) if isinstance(shape, (tuple, list)) else (int(shape),)
    if -1 in given:
        rest = -math.prod(given)
        given = tuple(size // rest if n == -1 else n for n in given) if rest else given
    if math.prod(given) != size:
        raise ValueError(f"cannot reshape {size} numbers to {list(shape) if isinstance(shape, tuple) else shape}")
    return given


def reshaped(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """The strides of the same numbers in the shape `new`; None where there are none, so that they must be copied.

    shape, strides: of the array. Axes are taken in groups that hold equally many numbers before and after. A group has
    new strides if its old axes lie as if they were one."""
    old = [(n, s) for n, s in zip(shape, strides) if n != 1]
    found = [0] * len(new)
    at = i = 0
    while at < len(new) and i < len(old):
        end, j, ours, theirs = at + 1, i + 1, new[at], old[i][0]
        while ours != theirs:
            if ours < theirs:
                ours, end = ours * new[end], end + 1
            else:
                theirs, j = theirs * old[j][0], j + 1
        if any(old[k][1] != old[k + 1][0] * old[k + 1][1] for k in range(i, j - 1)):
            return None
        step = old[j - 1][1]
        for k in range(end - 1, at - 1, -1):
            found[k], step = step, step * new[k]
        at, i = end, j
    return tuple(found)


def like(shape: Shape, strides: Shape, itemsize: int) -> Shape:
    """The strides of a new array of this `shape` that lies in the order of axes of one with these `strides`, as NumPy's
    results lie. itemsize: bytes of a number."""
    order = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    steps = in_order([shape[axis] for axis in order], itemsize)
    found = [0] * len(shape)
    for axis, step in zip(order, steps):
        found[axis] = step
    return tuple(found)
