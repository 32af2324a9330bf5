"""QA-LoRA: a LoRA on sums over groups of neighboring inputs. A quantized weight takes up its change without new codes.

    W[o, i] = W~[o, i] + k s (B A)[o, i // g],   s = alpha / r     Xu et al., 2023, arXiv:2309.14717, Algorithm 1
    W~ = a q + b   ->   a q + (b + k s B A)                        merged: codes q and scales a keep every bit

    x [.., d_in] --+-- W~ [d_out, d_in], frozen, quantized --------------------------------+-- y [.., d_out]
                   +-- sum over each group of g [.., L] -- A [r, L] -- B [d_out, r] * k s --+      B starts at 0

The change is one number for the g neighboring inputs of a group, with L = d_in / g groups in a row. A group of a
quantized weight has an offset b, which is also added to all of its weights, so merging adds one number to another. b is
stored as a floating-point number, so the sum is only rounded once. Other methods change each weight of a group
differently. The merged numbers then need new codes, and these lose much of the change.

    adapter = attach(model, QALoRA(rank=8, group=32), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    adapter.merge()

On T5-small, q and v of all 18 attentions: 152,064 parameters of 60,506,624.

Which weights can take it up. `quantize(model, "int4")` stores b in the dtype of the model. The authors' code stores
a (q - z), and needs a modified GPTQ whose zero points z are floats. The usual files have z as an integer of N bits,
where no fraction fits, and users ask how to merge (yuhuixu1993/qa-lora #31, #35, #42). llama.cpp's Q4_1 and Q5_1 store
a float offset as a matter of course: d q + m, m in float16, for blocks of 32. Merging changes m alone and rounds it
once. We found no other tool that merges into them. A group of the adapter may hold several groups of the weight, but
must not cut one. Where it does, and where the weight has no such offsets (floats, NF4, Q4_0), merging gives the dense
weight, as with any method: `slot.fold()` is then a `Parameter`, and otherwise a `QuantizedWeight`. Rounded zero
points, `quantize(model, "int4", zero="rounded")`, take up the change too, but up to a / 2 of it is lost.

The factor k. Three conventions are in use, and the same A and B make another change under each of them:

    pooling            what A gets of a group     k
    "sum"              the sum                    1              the paper ("summation within each group")
    "mean"             the mean                   1 / g          the authors' code (yuhuixu1993/qa-lora #5)
    "mean * groups"    L times the mean           L / g          PEFT's use_qalora; the paper's where d_in = g^2

The two forms of the offset. With eq. (1), W~ = a q + b, the change is added to b. The paper's merge, beta - s B A /
alpha, is right where beta is a zero point: a (q - z) takes up a change c by z - c / a. Both are the same weight, and b
needs no division.

With dy the gradient at y and p = pool(x) [.., L]: dA = k s (dy B)^T p and dB = k s dy^T (p A^T). Only p is kept for
them, which is g times smaller than the x that LoRA keeps.
"""
from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

from minipeft.attaching.fields import expect, finite_in, integer, number, one_of
from minipeft.attaching.method import Declared, register, setting, trained
from minipeft.backend import Array, xp
from minipeft.engine.ops import dropout, embedding, low_rank_linear
from minipeft.engine.tensor import Tensor
from minipeft.methods.per_place import PerPlace, nonzero
from minipeft.nn.init import kaiming
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter, Reparam, Weight
from minipeft.nn.where import Where

POOLINGS = ("sum", "mean", "mean * groups")


class GroupedLowRank(Reparam):
    """W~[o, i] + k s (B A)[o, i // g].   A [r, L], B [d_out, r], L = d_in / g; scale: k s."""

    A: Parameter
    B: Parameter
    scale: Fraction
    p: float
    strength = "scale"

    def change(self) -> Tensor:
        """k s B A [d_out, L]: one number for each group of inputs."""
        return self.scale * (self.B @ self.A)

    def dense(self) -> Tensor:
        return self.base.dense() + self._spread(self.change())

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T = x W~^T + k s (drop(p) A^T) B^T, where p [.., L] holds the sums over the groups of x [.., d_in]. The
        change [d_out, d_in] is never formed."""
        groups = self.A.shape[1]
        p = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups).sum(axis=-1)
        return low_rank_linear(self.base.project(x, rng), dropout(p, self.p, rng), self.A, self.B, scale=self.scale)

    def rows(self, ids: Array) -> Tensor:
        """W[ids] = W~[ids] + k s (B[ids] A), spread over the groups. As in LoRA's lookup, there is no dropout."""
        return self.base.rows(ids) + self._spread(self.scale * (embedding(self.B, ids) @ self.A))

    def merged(self) -> Weight:
        """The quantized weight below with k s B A added to its offsets, where it has offsets for these groups or for
        equal parts of them, and they can hold the sums. Otherwise dense(), as a constant."""
        shifted = getattr(self.base, "shifted", None)
        if shifted is not None:
            try:
                return shifted(self.change().data)
            except ValueError:  # no offset for each of these groups, or one that cannot hold its sum
                pass
        return super().merged()

    @property
    def drops(self) -> bool:
        return self.p > 0 or self.base.drops

    def _spread(self, change: Tensor) -> Tensor:
        """A number for each group [.., L] -> the same number for each input of the group [.., d_in]."""
        d_in, (*lead, groups) = self.shape[1], change.shape
        ones = xp.ones((d_in // groups,), dtype=change.dtype)
        return (change.reshape(*lead, groups, 1) * ones).reshape(*lead, d_in)


@register
@dataclasses.dataclass(frozen=True)
class QALoRA(PerPlace):
    """QA-LoRA. rank: r. alpha: in s = alpha / r. group: g, the number of neighboring inputs that share a change. To
    merge into the offsets of a quantized weight, it must be a multiple of the group of that weight. dropout: on the
    pooled input, in training. where: which matrices (linear weights and embedding tables), by default q and v of every
    attention. pooling: k, as in the table at the top of this file. scaling, rank_pattern, alpha_pattern, any_rank:
    another s, other ranks and alphas at some places, ranks beyond min(d_out, d_in) (`per_place.py`). A rank beyond L is
    allowed, and only takes more memory.

    The start of A: for "sum", its entries have the bounds of LoRA's A, which has d_in inputs. For the means they have
    those of a linear layer of L inputs, as in PEFT. Departures: the authors' code starts A with Xavier's
    bounds. The paper's experiments quantize by GPTQ; `quantize` rounds to the nearest. PEFT drops inputs before they
    are pooled; here and in the authors' code, dropout acts on the pooled input.

    Raises ValueError for fields out of range and, on a model, for a group that does not divide d_in, where r exceeds
    min(d_out, d_in), and where a pattern matches no place."""

    rank: int = setting(8, integer, "an integer >= 1")
    alpha: float = setting(16, nonzero, "a finite number other than 0")
    group: int = setting(32, integer, "an integer >= 1")
    dropout: float = setting(0.0, lambda v: number(v) and 0 <= v < 1, "a number in [0, 1)")
    where: Where = r"\.(q|v)\.weight$"
    pooling: str = setting("sum", lambda v: one_of(v, POOLINGS), f"one of {', '.join(map(repr, POOLINGS))}")

    def groups_at(self, name: str, slot: Slot) -> int:
        """L = d_in / g at the place called `name`. Raises ValueError where g does not divide d_in."""
        d_in = slot.shape[1]
        if d_in % self.group:
            raise ValueError(f"QALoRA: group is {self.group}, and {name} has d_in = {d_in}; expected a number that "
                             f"divides it")
        return d_in // self.group

    def scale_at(self, name: str, slot: Slot) -> Fraction:
        """k s at the place called `name`, exact as in `PerPlace`. Raises ValueError where it is not finite there."""
        groups = self.groups_at(name, slot)
        k = {"sum": Fraction(1), "mean": Fraction(1, self.group), "mean * groups": Fraction(groups, self.group)}
        scale = k[self.pooling] * super().scale_at(name, slot)
        expect(self, "alpha", finite_in(scale, slot.dtype), f"a finite k s in {slot.dtype}")
        return scale

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        (d_out, d_in), groups, r = slot.shape, self.groups_at(name, slot), self.rank_at(name, slot)
        self.scale_at(name, slot)  # raises where it is not finite
        return {"A": trained((r, groups), kaiming(d_in if self.pooling == "sum" else groups)),
                "B": trained((d_out, r))}

    def make(self, name: str, slot: Slot, arrays: Any) -> GroupedLowRank:
        return GroupedLowRank(**arrays, scale=self.scale_at(name, slot), p=self.dropout)


# Mistakes that people make
#
# * Factors of one library are loaded into another: the three k differ by g, by L and by L / g, and the files of other
#   libraries do not say which one they are for. In PEFT, L / g makes the change depend on the width of the layer.
# * The change is merged by beta - s B A / alpha into an offset that is added: it has the wrong sign and size.
# * The zero points are rounded after merging, or were packed as integers before (qa-lora #31, #35, #42): the error is
#   as large as that of quantizing to this number of bits, or larger. After merging they are no longer integers.
# * The constants in the authors' merge, groups of 32 and s = 16 / 64, are used for another group, rank or alpha.
# * The change is tiled, [c_1 .. c_L c_1 .. c_L], where each number should be repeated, [c_1 .. c_1 c_2 .. c_2].
# * An adapter for groups of 16 is merged into a weight with groups of 32: two different numbers do not fit into one
#   offset. Here merging gives the dense weight then.
#
# Next: `quant/affine.py`, on codes, scales and offsets; `methods/lora.py`, where every input has its own column of A;
# `quant/weight.py`, on the weight below.
