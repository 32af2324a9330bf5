"""Weights computed in float64, whatever their own dtype: the same equation on the same numbers, widened exactly."""
from __future__ import annotations

import copy
import math
from typing import Any, Iterable

import numpy

from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter, Reparam, Weight


class OnOriginal(Parameter):
    """A merged constant that was computed over other weights than those below its entry. It cannot be computed again
    from the entry."""

    __slots__ = ()


def wide_dense(weight: Weight) -> Parameter:
    """The dense form of a weight as a constant in float64, [d_out, d_in] or [d]."""
    return Parameter(_wide(weight.dense().data))


def wide_base(slot: Slot) -> Parameter:
    """The base of a slot as a constant in float64. One of another kind of weight is taken in its dense form."""
    return wide_dense(slot.base)


def wide_piece(piece: Any) -> Any:
    """A copy of `piece` whose floating-point arrays are in float64. The piece itself stays as it is."""
    twin = copy.copy(piece)
    for leaf, array in piece.arrays.items():
        setattr(twin, leaf, type(array)(_wide(array.data)))
    return twin


def wide_weight(base: Weight, entries: Iterable[Any], as_merged: bool = True) -> Weight:
    """`base`, in float64, under the pieces of `entries`, bottom first, all in float64. A merged entry is computed from
    its piece like the others, unless it was merged into something other than their sum: in a way of its method's
    own, into a quantized weight, or over the original weights. Then its constant stands for it. With as_merged=False
    every entry is computed from its piece."""
    weight = base
    for entry in entries:
        weight = wide_dense(entry.merged) if as_merged and is_its_own(entry) else wide_piece(entry.piece).over(weight)
    return weight


def is_its_own(entry: Any) -> bool:
    """Whether the constant of an `entry` is something other than its piece's dense(), rounded."""
    return entry.merged is not None and (type(entry.piece).merged is not Reparam.merged
                                         or type(entry.merged) is not Parameter)


def relative_error(found: Any, wanted: Any) -> float:
    """|found - wanted| / |wanted| of arrays of one shape, [d_out, d_in] or [d], in Frobenius norms. Where nothing is
    wanted it is 0 if nothing is found, and infinite otherwise. Both are scaled by the same power of two first, so that
    the squares of tiny and of huge numbers stay in range."""
    n = numpy.frexp(abs(wanted).max() or abs(found).max())[1]
    off, size = (float(numpy.linalg.norm(numpy.ldexp(x.astype("float64").reshape(-1), -n)))
                 for x in (found - wanted, wanted))
    return off / size if size else math.inf if off else 0.0


def _wide(array: Any) -> Any:
    return array.astype("float64") if array.dtype.kind == "f" else array
