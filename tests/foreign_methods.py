"""Four methods written as somebody outside of the package writes them: with the public names of `minipeft` alone.

    ForeignIA3      W = l W0                            l scales the rows of W0 [d_out, d_in], or its columns
    ForeignVeRA     W = W0 + diag(b) B diag(d) A        A and B are random, frozen, and shared by all weights of a shape
    ForeignDoRA     W = m (W0 + B A) / |W0 + B A|       the norm of each row, held fixed in the gradient
    ForeignPrefix   k' = [K; k], v' = [V; v]            at the keys and values of every attention
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import minipeft
from minipeft import Fixed, Method, Parameter, Piece, Reparam, fixed, normal, ones, register, setting, trained, uniform


class Rescaled(Reparam):
    """W = l W0.   l [d_out, 1] scales what W0 gives, l [1, d_in] what it reads."""

    l: Parameter  # noqa: E741

    def dense(self):
        return self.base.dense() * self.l


@register
@dataclass(frozen=True)
class ForeignIA3(Method):
    """Keys, values, and the inputs of the feed-forward's second matrix, each times a vector that starts at 1.
    Liu et al., 2022, arXiv:2205.05638, sec. 3.3."""

    kinds = ("linear",)
    where: Any = r"\.(k|v|wo)\.weight$"

    def arrays(self, name, slot, model):
        d_out, d_in = slot.shape
        return {"l": trained((1, d_in) if name.endswith(".wo.weight") else (d_out, 1), ones)}

    def make(self, name, slot, arrays):
        return Rescaled(**arrays)


class VectorBased(Reparam):
    """W = W0 + diag(b) B diag(d) A.   Kopiczko et al., 2023, arXiv:2310.11454, eq. (2).   A [r, d_in], B [d_out, r]."""

    A: Fixed
    B: Fixed
    d: Parameter
    b: Parameter

    def dense(self):
        return self.base.dense() + self.b * (self.B @ (self.d * self.A))


@register
@dataclass(frozen=True)
class ForeignVeRA(Method):
    """rank: r. d_start: where d starts; b starts at 0. A and B are uniform (Kaiming), once for each shape of weight."""

    rank: int = setting(4, lambda r: type(r) is int and r >= 1, "an integer >= 1")
    d_start: float = 0.1
    where: Any = r"\.(q|v)\.weight$"

    def arrays(self, name, slot, model):
        (d_out, d_in), r = slot.shape, self.rank
        shared = f"{d_out}x{d_in}"
        return {"A": fixed((r, d_in), uniform((6 / d_in) ** 0.5), shared),
                "B": fixed((d_out, r), uniform((6 / r) ** 0.5), shared),
                "d": trained((r, 1), lambda shape, dtype, rng: ones(shape, dtype) * dtype.type(self.d_start)),
                "b": trained((d_out, 1))}

    def make(self, name, slot, arrays):
        return VectorBased(**arrays)


class Decomposed(Reparam):
    """W = m V / |V|, V = W0 + s B A.   Liu et al., 2024, arXiv:2402.09353, eq. (5); |V| is a constant for the gradient
    (sec. 4.3). As in the authors' code, the norm is that of each row of W [d_out, d_in].   m [d_out, 1]."""

    A: Parameter
    B: Parameter
    m: Parameter

    def dense(self):
        V = self.base.dense() + self.scale * (self.B @ self.A)
        return self.m * (V / minipeft.stop_gradient(norms(V)))


def norms(V):
    """|V|, of each row: [d_out, 1]."""
    return (V * V).sum(axis=1, keepdims=True) ** 0.5


@register
@dataclass(frozen=True)
class ForeignDoRA(Method):
    """rank: r. alpha: in s = alpha / r. m starts at the norms of the weight with everything that lies below."""

    transparent = False  # m V / |V| is V up to rounding
    rank: int = setting(2, lambda r: type(r) is int and r >= 1, "an integer >= 1")
    alpha: float = 4
    where: Any = r"\.(q|v)\.weight$"

    def arrays(self, name, slot, model):
        d_out, d_in = slot.shape
        return {"A": trained((self.rank, d_in), uniform(d_in ** -0.5)), "B": trained((d_out, self.rank)),
                "m": trained((d_out, 1), lambda shape, dtype, rng: norms(slot.fold().dense()).data)}

    def make(self, name, slot, arrays):
        return Decomposed(**arrays, scale=self.alpha / self.rank)


class Prefix(Piece):
    """(k, v [batch, key, heads * d_k], bias) -> [K; k], [V; v], and a bias of 0 at the new keys.
    K, V [p, heads * d_k]."""

    K: Parameter
    V: Parameter

    def __call__(self, k, v, bias):
        batch = minipeft.zeros((k.shape[0], 1, 1), k.dtype)
        if bias is not None:
            seen = minipeft.zeros((*bias.shape[:-1], self.K.shape[0]), bias.dtype)
            bias = minipeft.ops.concat(seen, bias, axis=-1)
        return (minipeft.ops.concat(self.K + batch, k, axis=1), minipeft.ops.concat(self.V + batch, v, axis=1), bias)


@register
@dataclass(frozen=True)
class ForeignPrefix(Method):
    """length: p. Li & Liang, 2021, arXiv:2101.00190, sec. 4.2. Departure: K and V are trained directly, without the
    network that makes them in sec. 4.3."""

    kinds = ("keys_values",)
    transparent = False
    length: int = setting(3, lambda p: type(p) is int and p >= 1, "an integer >= 1")
    where: Any = r"\.keys_values$"

    def arrays(self, name, site, model):
        return {leaf: trained((self.length, site.width), normal(0.5)) for leaf in "KV"}

    def make(self, name, site, arrays):
        return Prefix(**arrays)
