"""Weights with everything that is plugged merged into them, as a file stores them, and how much of each change is left.

    W' = round(f(W))        f(W) in float64 from the arrays as they are, then one rounding to the dtype of the file

A half-precision number has few digits (bfloat16 8 bits, float16 11). So the change d = f(W) - W is mostly rounded away
where it is small beside the last place of W, and coarsely rounded elsewhere:

    error = |(round(f(W)) - round(W)) - d| / |d|        Frobenius norms; 0: all of d is there, 1: as if nothing were

The rounding is to nearest, so no entry is off by more than u (|f(W)| + |W|), u = 2^-8 or 2^-11. An error above 1 says
that rounding did more than the adapter. Where it is large, the adapter should stay beside the weights, or they should
be stored as float32.

Where an attachment was merged into something other than f(W), such as codes (`attaching/merging.py`), its constant is
stored, and codes stay codes. The error is measured against f(W) all the same.
"""
from __future__ import annotations

from typing import Any

from minipeft.backend import to_host
from minipeft.files import as_stored
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Reparam
from minipeft.nn.wide import is_its_own, relative_error, wide_base, wide_dense, wide_weight
from minipeft.quant.weight import QuantizedWeight


def merged_weight(name: str, slot: Slot, dtype: str) -> tuple[Any, float, str]:
    """(the weight of a slot called `name` with everything plugged there merged into it; the error of its change; how it
    is stored). The weight is an array on the host, [d_out, d_in] or [d], rounded once to the stored `dtype`; or a
    QuantizedWeight, where it is merged into one. Raises TypeError for a weight without a dense form,
    ValueError for overflow in `dtype`."""
    base = wide_base(slot)
    before, after = base.data, wide_weight(base, slot.entries).dense().data
    meant = wide_weight(base, slot.entries, as_merged=False).dense().data if any(map(is_its_own, slot.entries)) \
        else after
    wanted, codes = to_host(meant - before), _codes(slot)
    if codes is not None:
        realized = to_host(wide_dense(codes).data - before)
        return codes, relative_error(realized, wanted), str(codes.scheme)
    stored = as_stored(name, to_host(after), dtype)
    realized = stored.astype(wanted.dtype) - as_stored(name, to_host(before), dtype)
    return stored, relative_error(realized, wanted), dtype


def _codes(slot: Slot) -> QuantizedWeight | None:
    """The quantized weight that a slot with entries is merged into, if it is one: the constant of the topmost entry or,
    if that is not merged yet, the weight into which its method would merge it."""
    top = slot.entries[-1]
    if top.merged is not None:
        return top.merged if isinstance(top.merged, QuantizedWeight) else None
    if type(top.piece).merged is Reparam.merged:
        return None
    try:
        found = top.piece.over(slot.compose(slot.entries[:-1])).merged()
    except ValueError:  # the weight below does not allow it, and then it is merged into numbers
        return None
    return found if isinstance(found, QuantizedWeight) else None
