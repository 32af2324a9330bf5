"""LoHa: the update is the elementwise product of two low-rank matrices, and so has a rank of up to r^2.

    W = W0 + s (B1 A1) * (B2 A2)        Hyeon-Woo et al., 2021, arXiv:2108.06098 (FedPara)
                                        s = alpha / r: Yeh et al., 2023, arXiv:2309.14859 (LyCORIS)

    x [.., d_in] -- W0 + s (B1 [d_out, r] A1 [r, d_in]) * (B2 [d_out, r] A2 [r, d_in]) -- y [.., d_out]

An elementwise product is not confined to the r directions of its factors, so its rank can be r^2. With 2 r (d_in +
d_out) numbers trained, LoRA reaches at most the rank 2 r.

    adapter = attach(model, LoHa(rank=8), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    adapter.merge()

On T5-small, q and v of all 18 attentions: 589,824 parameters of 60,506,624.

Each forward forms the d_out d_in numbers of the update, and the backward pass keeps both of its factors. For small r
there is a narrower way, not taken here: products of the rows of A1 and A2, and of the columns of B1 and B2, make it one
product of rank r^2.
"""
from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

from minipeft.attaching.fields import integer
from minipeft.attaching.method import Declared, register, setting, trained
from minipeft.backend import Array
from minipeft.engine.ops import embedding
from minipeft.engine.tensor import Tensor
from minipeft.methods.delta import Added
from minipeft.methods.per_place import PerPlace, nonzero
from minipeft.nn.init import kaiming
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter
from minipeft.nn.where import Where


class Hadamard(Added):
    """W0 + s (B1 A1) * (B2 A2).   A1, A2 [r, d_in]; B1, B2 [d_out, r]."""

    A1: Parameter
    B1: Parameter
    A2: Parameter
    B2: Parameter
    scale: Fraction
    strength = "scale"

    def change(self) -> Tensor:
        """s (B1 A1) * (B2 A2): [d_out, d_in]."""
        return self.scale * ((self.B1 @ self.A1) * (self.B2 @ self.A2))

    def rows(self, ids: Array) -> Tensor:
        """W[ids] = W0[ids] + s (B1[ids] A1) * (B2[ids] A2)."""
        left, right = embedding(self.B1, ids) @ self.A1, embedding(self.B2, ids) @ self.A2
        return self.base.rows(ids) + self.scale * (left * right)


@register
@dataclasses.dataclass(frozen=True)
class LoHa(PerPlace):
    """LoHa. rank: r of both products. alpha: in s = alpha / r; by default s is 1, as in FedPara. where: which matrices.
    scaling, rank_pattern, alpha_pattern: another s, other ranks and alphas at some places (`per_place.py`). B2 starts
    at 0, and the others as LoRA's A with init="kaiming", each by its own number of columns.

    Raises ValueError for fields out of range, and on a model where r exceeds min(d_out, d_in)."""

    rank: int = setting(8, integer, "an integer >= 1")
    alpha: float = setting(8, nonzero, "a finite number other than 0")
    where: Where = r"\.(q|v)\.weight$"

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        (d_out, d_in), r = slot.shape, self.rank_at(name, slot)
        self.scale_at(name, slot)  # raises where it is not finite
        return {"A1": trained((r, d_in), kaiming(d_in)), "B1": trained((d_out, r), kaiming(r)),
                "A2": trained((r, d_in), kaiming(d_in)), "B2": trained((d_out, r))}

    def make(self, name: str, slot: Slot, arrays: Any) -> Hadamard:
        return Hadamard(**arrays, scale=self.scale_at(name, slot))


# Mistakes that people make
#
# * The two products are multiplied as matrices, or added. Both run where W is square, and the rank is lost.
# * A factor of each product starts at 0. Then every gradient is 0, and nothing is ever trained: one 0 is enough.
# * s acts on each product, so that the update is s^2 times (B1 A1) * (B2 A2).
# * Unmerging by subtraction: every cycle of merge and unmerge moves the weight a little (huggingface/trl #6688).
#
# Next: `methods/hira.py`, where the weight itself is one of the factors; `methods/delta.py`, on `Added`.
