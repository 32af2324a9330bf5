"""Weights with everything that is plugged merged into them, as a file stores them, and how much of each change is left.

    W' = round(f(W))        f(W) in float64 from the arrays as they are, then one rounding to the dtype of the file

A half-precision number has few digits (bfloat16 8 bits, float16 11). So the change d = f(W) - W is mostly rounded away
where it is small beside the last place of W, and coarsely rounded elsewhere:

    error = |(round(f(W)) - round(W)) - d| / |d|        Frobenius norms; 0: all of d is there, 1: as if nothing were

The rounding is to nearest, so no entry is off by more than u (|f(W)| + |W|), u = 2^-8 or 2^-11. An error above 1 says
that rounding did more than the adapter. Where it is large, the adapter should stay beside the weights, or they should
be stored as float32.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

from minipeft.backend import to_host
from minipeft.files import as_stored
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Reparam
from minipeft.nn.wide import relative_error, wide_base, wide_weight
from minipeft.quant.weight import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The weights that `save_pretrained` merged. `print` it for the table.

    errors: {name of a weight: relative error of its change, as in the formula at the top of this file}; empty where
    nothing was merged. dtypes: {name: how the weight is stored}."""

    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest of the errors; 0 where nothing was merged."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        if not self.errors:
            return "nothing was merged"
        width, kinds = max(map(len, self.errors)), max(10, *map(len, self.dtypes.values()))
        return "\n".join([f"{'merged weight':<{width}}  {'stored as':<{kinds}}  error of its change",
                          *(f"{name:<{width}}  {self.dtypes[name]:<{kinds}}  {error:.2e}"
                            for name, error in self.errors.items())])


def merged_weight(name: str, slot: Slot, dtype: str) -> tuple[Any, float, str]:
    """(the weight of a slot called `name` with everything plugged there merged into it; the error of its change; how it
    is stored). The weight is an array on the host, [d_out, d_in] or [d], rounded once to the stored `dtype`; or a
    QuantizedWeight, where that is what it is merged into. Raises TypeError for a weight without a dense form,
    ValueError for overflow in `dtype`."""
    base = wide_base(slot)
    before, after = base.data, wide_weight(base, slot.entries).dense().data
    wanted, codes = to_host(after - before), _codes(slot)
    if codes is not None:
        realized = to_host(codes.dense().data.astype(wanted.dtype) - before)
        return codes, relative_error(realized, wanted), str(codes.scheme)
    stored = as_stored(name, to_host(after), dtype)
    realized = stored.astype(wanted.dtype) - as_stored(name, to_host(before), dtype)
    return stored, relative_error(realized, wanted), dtype


def _codes(slot: Slot) -> QuantizedWeight | None:
    """The quantized weight that a slot with entries is merged into, if it is one: the constant of the topmost entry, or
    of one that is not merged yet what its method would merge it into."""
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
