"""VeRA: one pair of frozen random matrices for all weights, and two trained vectors for each weight.

    W = W0 + diag(b) B diag(d) A        Kopiczko et al., 2023, arXiv:2310.11454, eq. (2)

    x [.., d_in] --+-- W0 [d_out, d_in], frozen ----------------------------------------+-- y [.., d_out]
                   +-- A [r, d_in], shared -- * d [r] -- B [d_out, r], shared -- * b ---+      b [d_out] starts at 0

Random directions are good enough to adapt along, if each of them can be made stronger or weaker. Only these strengths
are trained, r + d_out numbers for each weight, and A and B are stored once, however many weights there are.

    adapter = attach(model, VeRA(rank=256), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-2))
    adapter.merge()

On T5-small, q and v of all 18 attentions: 27,648 parameters of 60,506,624.

A and B are as large as the largest weight needs. A smaller weight takes the first d_in columns of A and the first
d_out rows of B. As A is frozen, x is not kept for the backward pass. dd needs x A^T [.., r], and db needs what b
multiplies [.., d_out].
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy

from minipeft.attaching.fields import expect, finite_in, integer, number
from minipeft.attaching.method import Declared, Method, fixed, register, setting, trained
from minipeft.backend import Array, to_device
from minipeft.engine.ops import embedding, linear
from minipeft.engine.tensor import Tensor
from minipeft.nn.init import Init, ones, uniform
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Fixed, Parameter, Reparam
from minipeft.nn.where import Where


class VectorBased(Reparam):
    """W0 + diag(b) B diag(d) A.   d [r], b [d_out]; A [r, >= d_in] and B [>= d_out, r], shared with other weights."""

    A: Fixed
    B: Fixed
    d: Parameter
    b: Parameter

    def own(self) -> tuple[Tensor, Tensor]:
        """The parts of A [r, d_in] and B [d_out, r] that this weight uses."""
        d_out, d_in = self.shape
        return self.A[:, :d_in], self.B[:d_out]

    def dense(self) -> Tensor:
        A, B = self.own()
        return self.base.dense() + (self.b.reshape(-1, 1) * B * self.d) @ A

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T = x W0^T + (((x A^T) * d) B^T) * b, never forming B A."""
        A, B = self.own()
        return self.base.project(x, rng) + linear(linear(x, A) * self.d, B) * self.b

    def rows(self, ids: Array) -> Tensor:
        """W[ids] = W0[ids] + b[ids] (B[ids] * d) A."""
        A, B = self.own()
        return self.base.rows(ids) + embedding(self.b.reshape(-1, 1), ids) * ((embedding(B, ids) * self.d) @ A)


def constant(value: float) -> Init:
    """An init of equal numbers, all `value`."""
    return lambda shape, dtype, rng: ones(shape, dtype) * dtype.type(value)


def by_key(key: int, skip: int) -> Init:
    """An init of the numbers that PEFT draws from `projection_prng_key`: those of torch's Mersenne Twister, seeded with
    `key`, after the first `skip`. They are uniform, of 24 random bits, and rounded to float32 in every dtype."""
    def init(shape: tuple, dtype: Any, rng: Any) -> Array:
        bound = float(numpy.float32(math.sqrt(6 / shape[1])))
        drawn = numpy.random.RandomState(key).randint(0, 2 ** 32, skip + math.prod(shape), "uint32")[skip:]
        numbers = (drawn & (2 ** 24 - 1)) / 2 ** 24 * (2 * bound) - bound
        return to_device(numbers.astype("float32").astype(dtype).reshape(shape))
    return init


@register
@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """VeRA. rank: r, which may exceed the sizes of a weight. d_initial: where d starts; b starts at 0. where: which
    matrices. key: None draws A and B (Kaiming uniform, as in the paper) from the generator given to `attach`; a number
    draws those of a PEFT adapter with this projection_prng_key. Raises ValueError for fields out of range."""

    rank: int = setting(256, integer, "an integer >= 1")
    d_initial: float = setting(0.1, lambda v: number(v) and v != 0, "a finite number other than 0")
    where: Where = r"\.(q|v)\.weight$"
    key: int | None = setting(None, lambda v: v is None or integer(v, 0) and v < 2 ** 32, "None or an integer in "
                              "[0, 2^32)")

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        expect(self, "d_initial", finite_in(self.d_initial, slot.dtype), f"a finite number in {slot.dtype}")
        r, shapes = self.rank, [place.shape for place in self.places(model).values()]  # type: ignore[attr-defined]
        d_out, d_in = (max(shape[axis] for shape in shapes) for axis in (0, 1))
        A, B = (uniform(math.sqrt(6 / columns)) for columns in (d_in, r))
        if self.key is not None:
            A, B = by_key(self.key, 0), by_key(self.key, r * d_in)
        return {"A": fixed((r, d_in), A, "vera"), "B": fixed((d_out, r), B, "vera"),
                "d": trained((r,), constant(self.d_initial)), "b": trained((slot.shape[0],))}

    def make(self, name: str, slot: Slot, arrays: Any) -> VectorBased:
        return VectorBased(**arrays)


# Mistakes that people make
#
# * A and B are drawn again from a seed when a file is loaded. The numbers then depend on the library's version, and in
#   PEFT on the default dtype at that moment. Here they are in the file, once.
# * A and B are drawn for each weight, and then stored for each weight: the small file is lost. Here all weights share
#   one pair, even those of different sizes.
# * d starts at 0 as b does: then neither ever gets a gradient. Here d = 0 is refused.
# * A scale alpha / r as in LoRA. VeRA has none: b and d are the scale.
#
# Next: `methods/lora.py`, where A and B are trained; `attaching/build.py`, on arrays that several places share.
