"""DoRA: LoRA on the direction of each row of a weight, and a trained length for it.

    W = (m / |V|) V,   V = W0 + s B A,   s = alpha / r          Liu et al., 2024, arXiv:2402.09353, eq. (5)

    x [.., d_in] --+-- W0 [d_out, d_in], frozen -------------+-- * m / |V|, both [d_out, 1] -- y [.., d_out]
                   +-- A [r, d_in] -- B [d_out, r] -- * s ---+
                                          B starts at 0 and m at |W0|, so that attaching changes nothing

LoRA tends to change the length of a row and its direction together, while full fine-tuning often changes mostly one of
them. With a length m of its own, each row can do either, for d_out more numbers than LoRA trains.

    adapter = attach(model, DoRA(rank=8, alpha=16), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    adapter.merge()

On T5-small, q and v of all 18 attentions: 313,344 parameters of 60,506,624.

|V| is a constant for the gradient (sec. 4.3, eq. (11)). So with g the gradient at y, A and B have LoRA's gradients of
(m / |V|) g, and dm = sum(g (x V^T)) / |V| over all positions. No op of the norm is recorded, and no array is kept for
it. Each forward still computes V and |V|, which takes longer than LoRA's narrow product. Merged, it costs nothing.

Rows or columns? In eq. (2), W is [d, k] and |W| is the norm of each column. Read for a weight [d_out, d_in], this is
one m for each input (norm="input"). The authors' code, PEFT and AdapterHub have one for each output (norm="output", the
default). For an embedding table [vocab, d], PEFT has norm="input": one m for each of the d dimensions.
"""
from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

from minipeft.attaching.fields import integer, number, one_of
from minipeft.attaching.method import Declared, register, setting, trained
from minipeft.backend import Array, xp
from minipeft.engine.ops import dropout, embedding, low_rank_linear
from minipeft.engine.ops.overflow import quiet
from minipeft.engine.stopped import stop_gradient
from minipeft.engine.tensor import Tensor
from minipeft.methods.lora_inits import INITS
from minipeft.methods.per_place import PerPlace, nonzero
from minipeft.nn.init import Rng
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter, Reparam
from minipeft.nn.where import Where


def lengths(V: Any, axis: int) -> Tensor:
    """|V| along `axis`, 1 in place of 0.   V [d_out, d_in] -> [d_out, 1] or [1, d_in].

    So nothing is divided by the 0 of a row of zeros, such as that of a padding token, neither here nor in a VJP."""
    squares = (V * V).sum(axis=axis, keepdims=True)
    return (squares + (squares.data == 0)) ** 0.5


class Decomposed(Reparam):
    """(m / |V|) V, V = W0 + s B A.   A [r, d_in], B [d_out, r]; m [d_out, 1], or [1, d_in] where the norm's axis is 0.
    detach: |V| is a constant for the gradient."""

    A: Parameter
    B: Parameter
    m: Parameter
    scale: Fraction
    p: float
    axis: int
    detach: bool

    def dense(self) -> Tensor:
        return self.factor() * self.V()

    def V(self, constant: bool = False) -> Tensor:
        """W0 + s B A [d_out, d_in]. constant: of stopped values, so that no op of it is recorded."""
        W0, B, A = (stop_gradient(part) if constant else part for part in (self.base.dense(), self.B, self.A))
        return W0 + self.scale * (B @ A)

    def factor(self) -> Tensor:
        """m / |V| [d_out, 1] or [1, d_in]: exactly 1 at the start, where m is computed as |V| is."""
        return self.m / lengths(self.V(constant=self.detach), self.axis)

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T = (x W0^T + s (drop(x) A^T) B^T) (m / |V|), or, for a norm of columns, the same of x (m / |V|) with no
        factor behind it. Dropout acts on the input of A alone."""
        factor = self.factor().reshape(-1)
        if self.axis == 0:
            x = x * factor
        y = low_rank_linear(self.base.project(x, rng), dropout(x, self.p, rng), self.A, self.B, scale=self.scale)
        return y if self.axis == 0 else y * factor

    def rows(self, ids: Array) -> Tensor:
        """W[ids] = (m / |V|)[ids] (W0[ids] + s B[ids] A). As in LoRA's lookup, there is no dropout."""
        factor, rows = self.factor(), self.base.rows(ids) + self.scale * (embedding(self.B, ids) @ self.A)
        return rows * (factor.reshape(-1) if self.axis == 0 else embedding(factor, ids))

    @property
    def drops(self) -> bool:
        return self.p > 0 or self.base.drops


@register
@dataclasses.dataclass(frozen=True)
class DoRA(PerPlace):
    """DoRA. rank: r. alpha: in s = alpha / r. dropout: on the input of A, in training. where: which matrices (linear
    weights and embedding tables), by default q and v of every attention. init: how A starts, one of INITS of
    `lora_inits.py`; B starts at 0. detach: whether |V| is a constant for the gradient; AdapterHub's is not. norm:
    "output", of each row of V (m [d_out, 1]), or "input", of each column (m [1, d_in]). scaling, rank_pattern,
    alpha_pattern: another s, other ranks and alphas at some places (`per_place.py`).

    m starts at |W| of the weight with everything that is plugged below, and at 0 for a row of zeros, which training
    leaves at 0. Departures: in PEFT, dropout also acts on a part of x W0^T; here that is never dropped. AdapterHub's
    norm is that of W0 + B A, without s. Raises ValueError for fields out of range, and on a model where r exceeds
    min(d_out, d_in)."""

    rank: int = setting(8, integer, "an integer >= 1")
    alpha: float = setting(16, nonzero, "a finite number other than 0")
    dropout: float = setting(0.0, lambda v: number(v) and 0 <= v < 1, "a number in [0, 1)")
    where: Where = r"\.(q|v)\.weight$"
    init: str = setting("gaussian", lambda v: one_of(v, INITS), f"one of {', '.join(INITS)}")
    detach: bool = setting(True, lambda v: type(v) is bool, "True or False")
    norm: str = setting("output", lambda v: one_of(v, ("output", "input")), "'output' or 'input'")

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        (d_out, d_in), rank = slot.shape, self.rank_at(name, slot)
        self.scale_at(name, slot)  # raises where it is not finite

        def length(shape: tuple, dtype: Any, rng: Rng) -> Array:
            W = xp.ascontiguousarray(slot.fold().dense().data)  # as V is, so that both are summed in one order
            with quiet(all="ignore"):
                m = lengths(Tensor(W), self._axis).data * W.any(axis=self._axis, keepdims=True)
            if not xp.isfinite(m).all():
                raise ValueError(f"DoRA: |W| of {name} is not finite in {slot.dtype}; expected finite numbers, whose "
                                 f"squares are finite")
            return m

        return {"A": trained((rank, d_in), INITS[self.init](slot, rank)), "B": trained((d_out, rank)),
                "m": trained((d_out, 1) if self._axis == 1 else (1, d_in), length)}

    def make(self, name: str, slot: Slot, arrays: Any) -> Decomposed:
        return Decomposed(**arrays, scale=self.scale_at(name, slot), p=self.dropout, axis=self._axis,
                          detach=self.detach)

    @property
    def _axis(self) -> int:
        return 1 if self.norm == "output" else 0


# Mistakes that people make, from the threads of other libraries and from comparing them
#
# * The gradient passes through the norm. Or it does not, and the norm is recorded all the same, with arrays of the
#   size of W.
# * Dropout acts on the frozen path: with B = 0, training differs from evaluation as soon as m differs from |V|
#   (huggingface/peft #2153, #2122).
# * Two adapters on one weight are merged in another order than they are computed in: the merged model is another model
#   (huggingface/peft #3608, #3609).
# * Unmerging divides by m / |V|: where an m is 0, the weight is lost. Here the base is kept.
# * Merging leaves out s, or resetting does not bring W0 back.
#
# Next: `methods/lora.py`, on V; `engine/stopped.py`, on values that count as constants; `methods/ia3.py`, on factors
# alone.
