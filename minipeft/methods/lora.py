"""LoRA: a frozen weight plus a trained low-rank product.

    W = W0 + s B A,   s = alpha / r          Hu et al., 2021, arXiv:2106.09685, eq. (3); the factor: sec. 4.1

    x [.., d_in] --+-- W0 [d_out, d_in], frozen -------------+-- y [.., d_out]         B starts at 0, so that
                   +-- A [r, d_in] -- B [d_out, r] -- * s ---+                         attaching changes nothing

The update that a task needs often has a low rank, so a narrow product can hold it. r (d_in + d_out) numbers are trained
instead of d_in d_out, and merged into W they cost nothing at inference.

    adapter = attach(model, LoRA(rank=8, alpha=16), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    adapter.merge()

On T5-small, q and v of all 18 attentions: 294,912 parameters of 60,506,624.

With g the gradient at y: dA = s (g B)^T x and dB = s g^T (x A^T). The dense gradient g^T x, of the size of W, is never
formed. x is still kept, for dA. dx = g W, of which s (g B) A is LoRA's part, is still computed for the layers below.
"""
from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

from minipeft.attaching.fields import expect, integer, number
from minipeft.attaching.method import Declared, register, setting, trained
from minipeft.backend import Array
from minipeft.engine.ops import dropout, embedding, low_rank_linear
from minipeft.engine.tensor import Tensor
from minipeft.methods import lora_inits, merged, pissa
from minipeft.methods.per_place import PerPlace, nonzero
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter, Reparam
from minipeft.nn.where import Where


class LowRank(Reparam):
    """W0 + s B A.   A [r, d_in], B [d_out, r]; for a table [vocab, d]: A [r, d], B [vocab, r]."""

    A: Parameter
    B: Parameter
    scale: Fraction
    p: float
    strength = "scale"

    def dense(self) -> Tensor:
        return self.base.dense() + self.scale * (self.B @ self.A)

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T = x W0^T + s (drop(x) A^T) B^T, never forming B A. Dropout acts on the adapter's copy of x alone."""
        return low_rank_linear(self.base.project(x, rng), dropout(x, self.p, rng), self.A, self.B, scale=self.scale)

    def rows(self, ids: Array) -> Tensor:
        """W[ids] = W0[ids] + s B[ids] A. A lookup has no input vector, so dropout does not act here."""
        return self.base.rows(ids) + self.scale * (embedding(self.B, ids) @ self.A)

    @property
    def drops(self) -> bool:
        return self.p > 0 or self.base.drops


@register
@dataclasses.dataclass(frozen=True)
class LoRA(PerPlace):
    """LoRA. rank: r. alpha: in s = alpha / r. dropout: on the input of A, in training. where: which matrices (linear
    weights and embedding tables), by default q and v of every attention, as in most of the paper's experiments
    (sec. 5.1). init: how A starts, "gaussian", "kaiming" or "orthogonal", with B = 0 (`lora_inits.py`), or "pissa"
    (`pissa.py`). enable: which of the projections that a matrix holds side by side get a product each (`merged.py`).
    scaling, rank_pattern, alpha_pattern, any_rank: another s, other ranks and alphas at some places, ranks beyond
    min(d_out, d_in) (`per_place.py`).

    Departure: with "gaussian", an embedding's A has the variance of a linear layer's, 1 / (3 d); in the authors' code,
    as with "kaiming", it is N(0, 1).
    Raises ValueError for fields out of range and, on a model, where r exceeds min(d_out, d_in), where a pattern matches
    no place, and for an `enable` that does not fit."""

    rank: int = setting(8, integer, "an integer >= 1")
    alpha: float = setting(16, nonzero, "a finite number other than 0")
    dropout: float = setting(0.0, lambda v: number(v) and 0 <= v < 1, "a number in [0, 1)")
    where: Where = r"\.(q|v)\.weight$"
    init: str = setting("gaussian", lambda v: v in lora_inits.NAMES, f"one of {', '.join(lora_inits.NAMES)}")
    enable: tuple[bool, ...] | None = setting(None, merged.chooses, "booleans, one of them True", optional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "enable", self.enable is None or self.init != "pissa", "None where init is 'pissa'")
        expect(self, "any_rank", not self.any_rank or self.init not in ("pissa", "orthogonal"),
               f"False where init is {self.init!r}, which has at most min(d_out, d_in) directions")

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        (d_out, d_in), s, (k, n) = slot.shape, self.scale_at(name, slot), merged.parts(self.enable, name, slot)
        r = self.rank_at(name, slot, parts=n)  # k = n = 1 without `enable`
        if self.init == "pissa":
            return pissa.principal(name, slot, r, s)
        return {"A": trained((k * r, d_in), lora_inits.INITS[self.init](slot, r)), "B": trained((d_out // n * k, r))}

    def make(self, name: str, slot: Slot, arrays: Any) -> Reparam:
        piece = {**arrays, "scale": self.scale_at(name, slot), "p": self.dropout}
        if self.enable is not None:
            return merged.MergedLowRank(**piece, enable=self.enable)
        return pissa.PrincipalLowRank(**piece) if self.init == "pissa" else LowRank(**piece)


# Mistakes that people make, from the catalogue of `minipeft.conformance` (--list --method lora_linear)
#
# * s = alpha, not alpha / r: the update is r times too strong (Blaizzy/mlx-vlm #841 and #845,
#   rasbt/LLMs-from-scratch #821).
# * Unmerging by subtraction: every cycle of merge and unmerge moves the weight a little (huggingface/trl #6688). Here
#   the base array is kept, and comes back bit for bit.
# * Merging twice adds the update twice (EricLBuehler/candle-lora #26). Here a second merge raises ValueError.
# * Biases or the frozen weight are trained too (huggingface/peft #2759, #3580). Here `adapter.parameters` has A and B.
# * Dropout acts on the base path, too. It belongs on the adapter's copy of x alone.
#
# Next: `nn/weight.py`, on weights; `attaching/attach.py`, on attaching a method to a model; `engine/ops/fused.py`, on
# the gradients of `low_rank_linear`. Variants: `methods/per_place.py`, `methods/lora_inits.py`, `methods/pissa.py`,
# `methods/merged.py`.
