"""A piece at a fraction of its strength: the change that it makes, multiplied by a factor w.

    W -> W + w (f(W) - W)         at a slot, for a piece that makes f(W) of the weight W below it
    F -> F + w (A(F) - F)         at a sublayer site, for a piece that makes A(F) of the sublayer's output F

At w = 1 it is the piece itself, at w = 0 what lies below it. Where a number of the piece already multiplies its whole
change, such as LoRA's s, the piece names it as its `strength`. Then w multiplies this number, in a copy of the piece,
and no difference is computed.

Prompts and prefixes add positions, and there is no fraction of a position.
"""
from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any, Self

import numpy

from minipeft.backend import Array
from minipeft.engine.tensor import Tensor
from minipeft.nn.weight import Fixed, Parameter, Piece, Reparam, Weight


def scaled(name: str, place: Any, piece: Any, factor: float) -> Any:
    """`piece` of the attachment `name` at `place`, with its change multiplied by `factor`. At 1 it is the same object.
    Raises ValueError at a site where a change cannot be multiplied, and where the factor overflows."""
    if factor == 1:
        return piece
    if place.kind in ("input", "keys_values"):
        raise ValueError(f"adapter {{{name!r}: {factor:g}}}: {name!r} adds positions at a site of kind {place.kind!r}, "
                         f"and no factor can weaken a position; expected the factor 1")
    strength = Fraction(factor) * (1 if piece.strength is None else getattr(piece, piece.strength))
    dtype = numpy.dtype(place.dtype)
    if dtype.kind == "f" and not abs(strength) <= float(numpy.finfo(dtype).max):
        raise ValueError(f"adapter {{{name!r}: {factor:g}}}: the factor, times the strength of {name!r} itself, "
                         f"overflows in {dtype}; expected a smaller factor")
    if piece.strength is not None:
        twin = copy.copy(piece)
        setattr(twin, piece.strength, strength)
        return twin
    return (ScaledOutput if place.kind == "sublayer" else ScaledWeight)(piece=piece, factor=factor)


class ScaledWeight(Reparam):
    """W + w (f(W) - W).   piece: f; factor: w."""

    piece: Any
    factor: float

    @property
    def arrays(self) -> dict[str, Parameter | Fixed]:
        """Those of the piece."""
        return self.piece.arrays

    @property
    def drops(self) -> bool:
        return self.piece.drops

    def over(self, base: Weight) -> Self:
        twin = copy.copy(self)
        twin.base, twin.piece = base, self.piece.over(base)
        return twin

    def dense(self) -> Tensor:
        W = self.base.dense()
        return W + self.factor * (self.piece.dense() - W)

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """y + w (f(W) x - y) with y = W x. Dropout below draws one mask, which both terms see."""
        before = copy.deepcopy(rng) if self.base.drops else None
        y = self.base.project(x, rng)
        piece = self.piece.over(_Multiplied(self.base, x, y, before))
        return y + self.factor * (piece.project(x, rng) - y)

    def rows(self, ids: Array) -> Tensor:
        """W[ids] + w (f(W)[ids] - W[ids]).   ids [...] -> [..., d_in]."""
        rows = self.base.rows(ids)
        return rows + self.factor * (self.piece.rows(ids) - rows)


class ScaledOutput(Piece):
    """F + w (A(F) - F) at a sublayer site.   piece: A; factor: w."""

    piece: Any
    factor: float

    def __call__(self, *stream: Any) -> Any:
        """stream: x, n, F [batch, time, d] -> F' [batch, time, d]."""
        F = stream[-1]
        return F + self.factor * (self.piece(*stream) - F)


class _Multiplied:
    """The weight W below a piece, once it has given y = W x. It gives the same y for the same x again, and for another
    x it drops what it dropped then: `before` is the generator as it was."""

    def __init__(self, weight: Weight, x: Any, y: Tensor, before: Any):
        self.weight, self.x, self.y, self.before = weight, x, y, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight, name)

    def project(self, x: Any, rng: Any = None) -> Tensor:
        if x is self.x:
            return self.y
        return self.weight.project(x, rng if rng is None or self.before is None else copy.deepcopy(self.before))
