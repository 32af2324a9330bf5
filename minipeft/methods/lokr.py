"""LoKr: the update is a Kronecker product of two small matrices.

    W = W0 + s kron(w1, w2),   w1 [l, m], w2 [k, n],   d_out = l k, d_in = m n        Edalati et al., 2022,
    w2 = w2_a w2_b of rank r, s = alpha / r            Yeh et al., 2023,              arXiv:2212.10650 (KronA)
                                                       arXiv:2309.14859 (LyCORIS)

    x [.., d_in] as X [.., m, n] --+-- W0 [d_out, d_in], frozen ---------+-- y [.., d_out]        w1 starts at 0
                                   +-- s w1 [l, m] X w2^T, w2 [k, n] ----+   as Y [.., l, k]

Every block of the update is one small matrix w2, times a number of w1. The rank is that of w1 times that of w2, so few
numbers can give a high rank: with the settings below, 768 give the rank 128 to a weight [512, 512].

    adapter = attach(model, LoKr(rank=8), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-2))
    adapter.merge()

On T5-small, q and v of all 18 attentions: 27,648 parameters of 60,506,624.

w2 is trained as a product of rank r if r < max(k, n) / 2, and as a full matrix otherwise. With decompose_both the same
holds for w1. kron(w1, w2) is formed for `dense` alone.
"""
from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

from minipeft.attaching.fields import integer
from minipeft.attaching.method import Declared, register, setting, trained
from minipeft.backend import Array
from minipeft.engine.ops import embedding, linear, reshape
from minipeft.engine.tensor import Tensor, array_of
from minipeft.methods.per_place import PerPlace, nonzero
from minipeft.nn.init import kaiming, zeros
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Reparam
from minipeft.nn.where import Where


class Kronecker(Reparam):
    """W0 + s kron(w1, w2).   w1 [l, m] or w1_a [l, r], w1_b [r, m]; w2 [k, n] or w2_a [k, r], w2_b [r, n]."""

    scale: Fraction
    strength = "scale"

    def factor(self, name: str) -> Tensor:
        """w1 [l, m] or w2 [k, n], by its `name`: the array itself, or the product of its two factors."""
        whole = getattr(self, name, None)
        return getattr(self, f"{name}_a") @ getattr(self, f"{name}_b") if whole is None else whole

    def dense(self) -> Tensor:
        w1, w2 = self.factor("w1"), self.factor("w2")
        (l, m), (k, n) = w1.shape, w2.shape                                 # noqa: E741
        kron = w1.reshape(l, 1, m, 1) * w2.reshape(1, k, 1, n)              # [l, k, m, n]
        return self.base.dense() + self.scale * kron.reshape(l * k, m * n)

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T = x W0^T + s (w1 X w2^T), with x [..., m n] as X [..., m, n], and Y [..., l, k] as y [..., l k]."""
        w1, w2 = self.factor("w1"), self.factor("w2")
        lead = array_of(x).shape[:-1]
        X = reshape(x, shape=(*lead, w1.shape[1], w2.shape[1]))
        Y = linear(linear(X, w2).mT, w1).mT                                 # [..., l, k]
        return self.base.project(x, rng) + self.scale * Y.reshape(*lead, self.shape[0])

    def rows(self, ids: Array) -> Tensor:
        """W[ids] = W0[ids] + s w1[ids // k] x w2[ids mod k], an outer product [..., m, n] as [..., m n]."""
        w1, w2 = self.factor("w1"), self.factor("w2")
        left, right = embedding(w1, ids // w2.shape[0]), embedding(w2, ids % w2.shape[0])
        outer = left.reshape(*ids.shape, -1, 1) * right.reshape(*ids.shape, 1, -1)
        return self.base.rows(ids) + self.scale * outer.reshape(*ids.shape, self.shape[1])


def split(d: int, factor: int | None) -> tuple[int, int]:
    """d as a product of two integers: (factor, d / factor) where this is possible. Otherwise the first is the largest
    divisor of d up to its square root, and up to `factor`, unless that is None."""
    if factor is not None and d % factor == 0:
        return factor, d // factor
    most = math.isqrt(d) if factor is None else min(factor, math.isqrt(d))
    first = next(n for n in range(most, 0, -1) if d % n == 0)
    return first, d // first


@register
@dataclasses.dataclass(frozen=True)
class LoKr(PerPlace):
    """LoKr. rank: r. alpha: in s = alpha / r; by default s is 1. where: which matrices. factor: how d_out and d_in are
    split (see `split`). decompose_both: whether w1 may be a product, too. full: s where neither w1 nor w2 is a product
    and r means nothing, "1" as in LyCORIS or "alpha / r" as in PEFT. scaling, rank_pattern, alpha_pattern: another s,
    other ranks and alphas at some places (`per_place.py`). w1 (or w1_a) starts at 0, and the others as LoRA's A with
    init="kaiming", each by its own number of columns. Raises ValueError for fields out of range."""

    rank: int = setting(8, integer, "an integer >= 1")
    alpha: float = setting(8, nonzero, "a finite number other than 0")
    where: Where = r"\.(q|v)\.weight$"
    factor: int | None = setting(None, lambda v: v is None or integer(v), "None or an integer >= 1")
    decompose_both: bool = setting(False, lambda v: type(v) is bool, "True or False")
    full: str = setting("1", lambda v: v in ("1", "alpha / r"), "'1' or 'alpha / r'")

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        r = self.own_rank(name)
        self.scale_at(name, slot)  # raises where it is not finite
        (l, k), (m, n) = (split(d, self.factor) for d in slot.shape)        # noqa: E741
        found = {"w1": trained((l, m))}
        if self.decompose_both and 2 * r < max(l, m):
            found = {"w1_a": trained((l, r), zeros), "w1_b": trained((r, m), kaiming(m))}
        if 2 * r < max(k, n):
            return {**found, "w2_a": trained((k, r), kaiming(r)), "w2_b": trained((r, n), kaiming(n))}
        return {**found, "w2": trained((k, n), kaiming(n))}

    def make(self, name: str, slot: Slot, arrays: Any) -> Kronecker:
        scale = self.scale_at(name, slot)
        return Kronecker(**arrays, scale=Fraction(1) if {"w1", "w2"} == set(arrays) and self.full == "1" else scale)


# Mistakes that people make
#
# * The factors are exchanged: kron(w2, w1) has the same shape and the same numbers, in another order.
# * alpha / r also where both factors are full matrices, and r means nothing: PEFT does this and LyCORIS does not, so a
#   file alone does not say how strong it is. Here `full` says it.
# * Layers get ranks of their own and are trained with one scale, but inference divides alpha by each rank: a factor of
#   up to 32 (WalkingMeatAxolotl/AnimaLoraStudio #241).
# * kron(w1, w2) is formed for each product with x, which costs as much as the weight itself.
#
# Next: `methods/loha.py`, on another product; `engine/ops/fused.py`, on `linear`.
