"""PiSSA: a LoRA that starts from the principal part of the weight.

    W = W0 + s (B A - B0 A0),   s B0 A0 = U_r S_r V_r^T        Meng et al., 2024, arXiv:2404.02948, eqs. (2)-(5)

    W0 = U S V^T, with falling S;   B0 = sign(s) U_r sqrt(S_r / |s|),   A0 = sqrt(S_r / |s|) V_r^T
    A [r, d_in] and B [d_out, r] are trained and start at A0 and B0, which stay as they are

W0 acts most along its first r singular directions. These are trained themselves, and the rest of W0 is frozen.

Departures. The paper overwrites the frozen weight by the rest, W0 - s B0 A0. Here the base stays W0, and A0 and B0 are
saved beside A and B. So attaching changes no bit, switching off gives the original model, and the file is valid on it
(PEFT writes to the base). The paper has no factor s; it cancels at the start. Dropout acts on the whole change,
s (B A - B0 A0), so it has no effect at the start; in PEFT it acts on the principal part of the weight, too.
"""
from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import numpy

from minipeft.attaching.fields import finite_in
from minipeft.attaching.method import Declared, fixed, trained
from minipeft.backend import Array, to_device, to_host
from minipeft.engine.ops import dropout, embedding, linear
from minipeft.engine.ops.overflow import quiet
from minipeft.engine.tensor import Tensor
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Fixed, Parameter, Reparam


class PrincipalLowRank(Reparam):
    """W0 + s (B A - B0 A0).   A, A0 [r, d_in], B, B0 [d_out, r].

    The two products are subtracted first. As long as they are equal, the difference is exactly 0."""

    A: Parameter
    B: Parameter
    A0: Fixed
    B0: Fixed
    scale: Fraction
    p: float
    strength = "scale"

    def dense(self) -> Tensor:
        return self.base.dense() + self.scale * (self.B @ self.A - self.B0 @ self.A0)

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T, never forming a product of W's size. Both products see the same dropout of x; the base sees none."""
        y, x = self.base.project(x, rng), dropout(x, self.p, rng)
        return y + self.scale * (linear(linear(x, self.A), self.B) - linear(linear(x, self.A0), self.B0))

    def rows(self, ids: Array) -> Tensor:
        """W[ids] = W0[ids] + s (B[ids] A - B0[ids] A0)."""
        change = embedding(self.B, ids) @ self.A - embedding(self.B0, ids) @ self.A0
        return self.base.rows(ids) + self.scale * change

    @property
    def drops(self) -> bool:
        return self.p > 0 or self.base.drops


def principal(name: str, slot: Slot, rank: int, scale: Fraction) -> dict[str, Declared]:
    """The arrays of the place called `name`: A, B, A0 and B0 of this `rank`, for the factor `scale`. The weight is
    decomposed once, when the first of them is drawn. It includes everything that is plugged at that moment.

    The init then raises ValueError for a weight that is not finite, or whose rank is lower."""
    factors = functools.cache(functools.partial(_factors, name, slot, rank, scale))

    def start(which: int) -> Any:
        return lambda shape, dtype, rng: to_device(factors()[which].astype(dtype))

    (d_out, d_in), (a, b) = slot.shape, map(start, (0, 1))
    return {"A": trained((rank, d_in), a), "B": trained((d_out, rank), b), "A0": fixed((rank, d_in), a),
            "B0": fixed((d_out, rank), b)}


def _factors(name: str, slot: Slot, rank: int, scale: Fraction) -> tuple[numpy.ndarray, numpy.ndarray]:
    weight = to_host(slot.fold().dense().data).astype("float64")
    return factors_of(name, weight, slot.dtype, rank, scale)


def factors_of(name: str, weight: numpy.ndarray, dtype: Any, rank: int,
               scale: Fraction) -> tuple[numpy.ndarray, numpy.ndarray]:
    """A0 [r, d_in] and B0 [d_out, r] of a weight [d_out, d_in], all in float64. name: of its place, for errors. dtype:
    in which they have to be finite. Raises ValueError as `principal` says."""
    if not numpy.isfinite(weight).all():
        raise ValueError(f"LoRA: init is 'pissa', and {name} holds NaN or infinity; expected finite numbers")
    u, s, vt = numpy.linalg.svd(weight, full_matrices=False)
    if not s[rank - 1] > 0:
        raise ValueError(f"LoRA: init is 'pissa', and {name} has rank {int((s > 0).sum())}; expected at least {rank}: "
                         f"a part of size 0 would never be trained")
    with quiet(all="ignore"):
        root = numpy.sqrt(s[:rank] / abs(float(scale)))
    if not finite_in(root[0], dtype):  # the largest
        raise ValueError(f"LoRA: init is 'pissa', and s is {float(scale)}; expected a larger one: A and B of {name} "
                         f"are not finite in {dtype}")
    return root[:, None] * vt[:rank], (u[:, :rank] * root) * (1 if scale > 0 else -1)
