"""One array under two names: ours, and another library's. The equation of a file format is a list of rows.

    theirs[at] = out(ours) (+ base)           for values; a gradient goes through `out` alone, which is linear
    ours       = back(theirs[at] (- base))

    Row("encoder.0.attn.q.weight.A", "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", (8, 512))
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterable, Mapping

import numpy

Map = Callable[[numpy.ndarray], numpy.ndarray]


def same(array: numpy.ndarray) -> numpy.ndarray:
    """The array [...] as it is."""
    return array


def transposed(array: numpy.ndarray) -> numpy.ndarray:
    """array [m, n] -> [n, m]."""
    return array.T


@dataclasses.dataclass(frozen=True)
class Row:
    """ours: "place.leaf", as in `Attachment.tensors`. theirs: the key in their file. shape: of their array. out, back:
    linear maps, ours to theirs and back. base: the part of the model that their value includes and ours does not. at:
    the part of their array that this row is about; by default the whole.

    Several rows may have the same `theirs`, each with an `at` of its own, or the same `ours`: then the file holds one
    array several times, and the copies must be equal."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    out: Map = same
    back: Map = same
    base: numpy.ndarray | None = None
    at: Any = ...


def shapes_of(rows: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    """{their key: shape}, of all `rows`."""
    return {row.theirs: row.shape for row in rows}


def to_theirs(rows: Iterable[Row], ours: Mapping[str, numpy.ndarray], values: bool,
              kept: Mapping[str, numpy.ndarray] = {}) -> dict[str, numpy.ndarray]:
    """{their key: array} of `ours` {our key: array}, by the `rows`. values: whether `ours` are values; if not, they are
    gradients. kept: {their key: array} as they were read, from which the parts that no row is about are taken; where
    there is none, they are 0. A value that includes the base, and whose difference is still the one that was read, is
    the one in `kept`, because adding what was subtracted may round. A key of which none of our arrays is given is left
    out."""
    found: dict[str, numpy.ndarray] = {}
    for row in rows:
        if row.ours not in ours:
            continue
        array = row.out(ours[row.ours])
        if values and row.base is not None:
            read = kept.get(row.theirs)
            if read is not None and numpy.array_equal((read - row.base).astype(array.dtype), array):
                array = read
            else:
                array = array + row.base
        if row.at is ...:
            found[row.theirs] = numpy.ascontiguousarray(array)
            continue
        if row.theirs not in found:
            start = kept.get(row.theirs) if values else None
            found[row.theirs] = numpy.zeros(row.shape, array.dtype) if start is None else start.astype(array.dtype)
        found[row.theirs][row.at] = array
    return found


def to_ours(rows: Iterable[Row], theirs: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """{our key: array} of `theirs` {their key: array}, by the `rows`. Raises ValueError where copies of one array
    differ."""
    found: dict[str, numpy.ndarray] = {}
    first: dict[str, str] = {}
    for row in rows:
        array = theirs[row.theirs][row.at]
        array = row.back(array if row.base is None else array - row.base)
        if row.ours not in found:
            found[row.ours], first[row.ours] = array, row.theirs
        elif not numpy.array_equal(found[row.ours], array):
            raise ValueError(f"{first[row.ours]} and {row.theirs} differ; expected the same array twice")
    return found
