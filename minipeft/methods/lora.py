"""LoRA: low-rank adaptation of a frozen weight.

    h = W0 x + (alpha / r) B A x             Hu et al., 2021, arXiv:2106.09685, eq. (3); the factor alpha / r: sec. 4.1
    W = W0 + (alpha / r) B A                 after training, "merged": no cost in inference (sec. 4.1)

W0 [d_out, d_in] stays as it is, A [r, d_in] and B [d_out, r] are trained: r (d_in + d_out) numbers instead of
d_in d_out. B starts at 0, so attaching changes nothing; A starts Gaussian.

With s = alpha / r and g the gradient at the output, dA = s (g B)^T x and dB = s g^T (x A^T): the dense gradient
dW = g^T x, of the size of W, is never formed. x is still kept, because dA needs it.
"""
from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

from minipeft.engine.tensor import Tensor
from minipeft.backend import Array, scalar
from minipeft.nn import init
from minipeft.nn.module import Module
from minipeft.nn.weight import Parameter, Reparam, Slot, Weight
from minipeft.nn.where import Where, matching
from minipeft.engine.ops import add, dropout, embedding, low_rank_linear, matmul, mul
from minipeft.attaching.fields import expect, finite_in, integer, number, plain

QUERY_AND_VALUE = r"\.(q|v)\.weight$"  # the paper's choice in most experiments (sec. 5.1)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """rank r; alpha, in s = alpha / r; dropout on the input of A, in training; where: which matrices (linear weights,
    embedding tables), by default q and v of every attention.

    init: how A is drawn. "gaussian" is the paper's, N(0, 1 / (3 d_in)): the paper gives no variance, this is that of
    the authors' code, whose U(-1/sqrt(d_in), 1/sqrt(d_in)) is "uniform". Departure from that code for embeddings: there
    A starts 0 and B Gaussian; here a table is a matrix like any other. Raises ValueError for fields out of range."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    where: Where = QUERY_AND_VALUE
    init: str = "gaussian"

    def __post_init__(self) -> None:
        plain(self)
        expect(self, "rank", integer(self.rank), "an integer >= 1")
        expect(self, "alpha", number(self.alpha) and self.alpha != 0, "a finite number other than 0")
        expect(self, "dropout", number(self.dropout) and 0 <= self.dropout < 1, "a number in [0, 1)")
        expect(self, "init", self.init in ("gaussian", "uniform"), "'gaussian' or 'uniform'")

    def places(self, model: Module) -> dict[str, Slot]:
        """The slots that `where` chooses among the model's matrices. ValueError if a rank exceeds min(d_out, d_in)."""
        matrices = {name: slot for name, slot in model.slots.items() if slot.kind in ("linear", "embedding")}
        chosen = {name: matrices[name] for name in matching(matrices, self.where, "matrix")}
        for name, slot in chosen.items():
            expect(self, "alpha", finite_in(self._scale, slot.base.dtype), f"a finite alpha / r in {slot.base.dtype}")
            if self.rank > min(slot.base.shape):
                raise ValueError(f"LoRA: rank {self.rank} exceeds {min(slot.base.shape)}, the largest that "
                                 f"{name} {list(slot.base.shape)} can have")
        return chosen

    def shapes(self, name: str, slot: Slot, model: Module) -> dict[str, tuple]:
        """Of A and B at one slot."""
        d_out, d_in = slot.base.shape
        return {"A": (self.rank, d_in), "B": (d_out, self.rank)}

    def build(self, model: Module, places: dict[str, Slot], rng: init.Rng) -> dict[str, "LowRank"]:
        """{name: the reparametrized weight}."""
        return {name: self.on(slot, rng) for name, slot in places.items()}

    @property
    def _scale(self) -> Fraction:
        return Fraction(self.alpha) / self.rank

    def on(self, slot: Slot, rng: init.Rng) -> "LowRank":
        """The reparametrized weight of one slot; draws A."""
        d_out, d_in = slot.base.shape
        shape, bound, dtype = (self.rank, d_in), d_in ** -0.5, slot.base.dtype
        a = (init.normal(shape, bound / math.sqrt(3), rng, dtype) if self.init == "gaussian"
             else init.uniform(shape, bound, rng, dtype))
        return LowRank(slot.base, a, init.zeros((d_out, self.rank), dtype),
                       self._scale, self.dropout)


class LowRank(Reparam):
    """W + s B A.   A [r, d_in], B [d_out, r]; for a table [vocab, d]: A [r, d], B [vocab, r]."""

    def __init__(self, base: Weight, a: Array, b: Array, scale: Fraction, p: float):
        self.base, self.A, self.B = base, Parameter(a), Parameter(b)
        self.scale, self.p = scale, p  # an exact number: it enters arrays in their own kind

    @property
    def drops(self) -> bool:
        return self.p > 0 or self.base.drops

    def dense(self) -> Tensor:
        return add(self.base.dense(), mul(matmul(self.B, self.A), scalar(self.scale, self.A)))

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T + s (x A^T) B^T; only the adapter's copy of x is dropped, never the base path."""
        return low_rank_linear(self.base.project(x, rng), dropout(x, self.p, rng), self.A, self.B, scale=self.scale)

    def rows(self, ids: Array) -> Tensor:
        """W[ids] + s B[ids] A. Ids have no input to drop, so dropout does not act here."""
        return add(self.base.rows(ids), mul(matmul(embedding(self.B, ids), self.A), scalar(self.scale, self.A)))
