"""OFT: the rows of a weight are rotated, all by the same trained rotation.

    W = W0 R^T,   R = (I + Q)(I - Q)^-1,   Q = -Q^T        Qiu et al., 2023, arXiv:2306.07280
    x W^T = (x R) W0^T        R is block-diagonal, and so is Q; the blocks are [b, b]

    x [.., d_in] -- * R, d_in / b blocks [b, b] -- W0 [d_out, d_in], frozen -- y [.., d_out]        Q = 0: R = I

A rotation changes neither the lengths of the rows nor the angles between them, in which, the authors argue, much of the
pretrained knowledge lies. The Cayley form makes a rotation of any skew-symmetric Q, so that Q is trained freely.

    adapter = attach(model, OFT(block_size=32), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    adapter.merge()

On T5-small, q and v of all 18 attentions: 285,696 parameters of 60,506,624.

For Q = 0 the system that gives R has the exact solution I, and a product with I rounds nothing, so that attaching
changes no bit. Left out: the constraint of COFT, which bounds the norm of Q.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import numpy

from minipeft.attaching.fields import integer
from minipeft.attaching.method import Declared, Method, register, setting, trained
from minipeft.backend import Array, to_device, xp
from minipeft.engine.ops import reshape, scatter, solve
from minipeft.engine.tensor import Tensor, array_of
from minipeft.methods.per_place import Pattern, all_match, as_pairs, first, pattern_setting
from minipeft.nn.place import Place
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter, Reparam
from minipeft.nn.where import Where

CAYLEY = ("paper", "transposed", "neumann")
MOST_TERMS = 1000  # of the series: each is a product of all blocks, so a file with more would take for ever


class Rotated(Reparam):
    """W0 R^T.   q [blocks or 1, b (b - 1) / 2]: the numbers above the diagonal of Q [blocks or 1, b, b], row by row.
    With 1, all blocks are the same. size: b. cayley, terms: as in `OFT`."""

    q: Parameter
    size: int
    cayley: str
    terms: int

    def __init__(self, q: Parameter, size: int, cayley: str, terms: int):
        super().__init__(q=q, size=size, cayley=cayley, terms=terms)
        self._above = numpy.flatnonzero(numpy.triu(numpy.ones((q.shape[0], size, size)), 1))

    def rotation(self) -> Tensor:
        """R [blocks or 1, b, b]."""
        blocks, size = self.q.shape[0], self.size
        above = scatter(self.q.reshape(-1), to_device(self._above), shape=(blocks, size, size))
        Q = above.mT - above if self.cayley == "transposed" else above - above.mT
        I = xp.eye(size, dtype=Q.dtype)  # noqa: E741
        if self.cayley != "neumann":
            return solve(I - Q, I + Q)   # (I - Q)^-1 and I + Q commute
        series = Q
        for _ in range(self.terms - 2):  # 2 Q + Q^2, then 2 Q + 2 Q^2 + Q^3, ...
            series = 2 * Q + Q @ series
        return I + series

    def dense(self) -> Tensor:
        return turned(self.base.dense(), self.rotation().mT)

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T = (x R) W0^T."""
        return self.base.project(turned(x, self.rotation()), rng)

    def rows(self, ids: Array) -> Tensor:
        """W[ids] = W0[ids] R^T."""
        return turned(self.base.rows(ids), self.rotation().mT)


def turned(x: Any, R: Tensor) -> Tensor:
    """x R, block by block.   x [..., d], R [d / b or 1, b, b] -> [..., d]."""
    shape, size = array_of(x).shape, R.shape[-1]
    blocks = reshape(x, shape=(-1, shape[-1] // size, size)).transpose(1, 0, 2)        # [d / b, rows, b]
    return (blocks @ R).transpose(1, 0, 2).reshape(shape)


@register
@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """OFT. block_size: b, a divisor of each d_in. where: which matrices. share: whether all blocks of a weight are the
    same. Q starts at 0. cayley: how R is made of Q. terms: t, where that is a series.

        "paper"         (I + Q)(I - Q)^-1, a rotation
        "transposed"    (I - Q)(I + Q)^-1, the inverse rotation; in PEFT with use_cayley_neumann=False
        "neumann"       I + 2 Q + 2 Q^2 + .. + 2 Q^(t-2) + Q^(t-1); in PEFT by default, t = num_cayley_neumann_terms.
                        Near the paper's for small Q, and no rotation

    block_size_pattern: {regular expression: b} for places in whose name the expression is found (`per_place.py`).
    Raises ValueError for fields out of range, and on a model where b does not divide d_in."""

    block_size: int = setting(32, lambda v: integer(v, 2), "an integer >= 2")
    where: Where = r"\.(q|v)\.weight$"
    share: bool = setting(False, lambda v: type(v) is bool, "True or False")
    cayley: str = setting("paper", lambda v: v in CAYLEY, f"one of {', '.join(CAYLEY)}")
    terms: int = setting(5, lambda v: integer(v, 4) and v <= MOST_TERMS, f"an integer from 4 to {MOST_TERMS}")
    block_size_pattern: Mapping[str, int] | Pattern = pattern_setting(lambda v: integer(v, 2), "an integer >= 2")

    def __post_init__(self) -> None:
        as_pairs(self, "block_size_pattern")
        super().__post_init__()

    def places(self, model: Any) -> dict[str, Place]:
        """{name: place}, as in `Method.places`. Raises ValueError where a pattern matches none of these names."""
        found = super().places(model)
        all_match(self, "block_size_pattern", found)
        return found

    def size_at(self, name: str) -> int:
        """b at the place called `name`."""
        return first(self.block_size_pattern, name, self.block_size)

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        size, d_in = self.size_at(name), slot.shape[1]
        if d_in % size:
            fitting = ", ".join(str(n) for n in range(2, d_in + 1) if d_in % n == 0)
            raise ValueError(f"OFT: block_size {size} does not divide {d_in}, the width of {name} {list(slot.shape)}; "
                             + (f"expected one of {fitting}" if fitting else "a row of one number has no rotation"))
        return {"q": trained((1 if self.share else d_in // size, size * (size - 1) // 2))}

    def make(self, name: str, slot: Slot, arrays: Any) -> Rotated:
        return Rotated(**arrays, size=self.size_at(name), cayley=self.cayley, terms=self.terms)


# Mistakes that people make
#
# * The file does not say which Cayley form it was trained with. PEFT's two forms turn in opposite directions, so that
#   changing one switch undoes the training. Here the form is a field, and in the file.
# * A truncated series in place of the inverse, with large Q: R is no rotation any more, and the norms grow.
# * Two rotations are merged in one order and applied in the other, and rotations do not commute. Here the upper one
#   always acts on the weight that the lower one gives.
# * R is merged on the side of the outputs and applied on the side of the inputs (huggingface/peft #1996).
# * The bound on the norm of Q is kept by writing to the trained array in each forward (PEFT's coft). So a model may
#   change because it is evaluated.
#
# Next: `engine/ops/linalg.py`, on the gradient of `solve`; `nn/weight.py`, on `rows`.
