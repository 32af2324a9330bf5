"""HiRA: the frozen weight is multiplied, element by element, by one plus a low-rank matrix.

    W = W0 * (1 + B A)        Huang et al., HiRA, ICLR 2025, openreview.net/forum?id=TwJrTz9cRS

    x [.., d_in] -- W0 [d_out, d_in] * (1 + B [d_out, r] A [r, d_in]) -- y [.., d_out]        B starts at 0

The update W0 * (B A) can have a full rank, although only r (d_in + d_out) numbers are trained. Entries that are large
in W0 can move most, and an entry that is 0 in W0 stays 0.

    adapter = attach(model, HiRA(rank=8), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    adapter.merge()

On T5-small, q and v of all 18 attentions: 294,912 parameters of 60,506,624.

The product with x needs the entries of the weight below, so above a quantized weight these are computed for every
forward, and above another method the weight that it gives. dA and dB are computed from W0 * (g^T x), of the size of W.
So W0 and W wait for the backward pass at every place: in a step, a quantized base saves no memory at these places.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from minipeft.attaching.fields import integer
from minipeft.attaching.method import Declared, register, setting, trained
from minipeft.backend import Array
from minipeft.engine.ops import embedding
from minipeft.engine.tensor import Tensor
from minipeft.methods.delta import Added
from minipeft.methods.per_place import RankPerPlace
from minipeft.nn.init import kaiming
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter
from minipeft.nn.where import Where


class Modulated(Added):
    """W0 * (1 + B A).   A [r, d_in], B [d_out, r]."""

    A: Parameter
    B: Parameter

    def dense(self) -> Tensor:
        return self.base.dense() * (1 + self.B @ self.A)

    def change(self) -> Tensor:
        """W0 * (B A) [d_out, d_in], for a product in which the weight below has dropout."""
        return self.base.dense() * (self.B @ self.A)

    def rows(self, ids: Array) -> Tensor:
        """W[ids] = W0[ids] * (1 + B[ids] A)."""
        return self.base.rows(ids) * (1 + embedding(self.B, ids) @ self.A)


@register
@dataclasses.dataclass(frozen=True)
class HiRA(RankPerPlace):
    """HiRA. rank: r. where: which matrices. rank_pattern: other ranks at some places (`per_place.py`). A starts as
    LoRA's with init="kaiming", B at 0; there is no scale.

    Raises ValueError for fields out of range, and on a model where r exceeds min(d_out, d_in)."""

    rank: int = setting(8, integer, "an integer >= 1")
    where: Where = r"\.(q|v)\.weight$"

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        (d_out, d_in), r = slot.shape, self.rank_at(name, slot)
        return {"A": trained((r, d_in), kaiming(d_in)), "B": trained((d_out, r))}

    def make(self, name: str, slot: Slot, arrays: Any) -> Modulated:
        return Modulated(**arrays)


# Mistakes that people make
#
# * W0 is multiplied by B A alone, without the 1: the weight starts at 0.
# * B A multiplies what W0 gives for x. That is another function: the product acts on the entries of W0.
# * Unmerging by division by 1 + B A loses digits, and fails where an entry of it is 0. Here the base is kept.
# * Two of these are applied in one step as W0 * (1 + B1 A1 + B2 A2), and merged one after the other as
#   W0 * (1 + B1 A1) * (1 + B2 A2). Here the second always acts on the weight that the first one gives.
#
# Next: `methods/loha.py`, where both factors are trained; `nn/slot.py`, on weights above weights.
