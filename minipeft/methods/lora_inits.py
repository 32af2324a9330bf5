"""How LoRA's A starts. B starts at 0, so that attaching changes nothing.

    gaussian      N(0, 1 / (3 d_in))                  the paper's distribution, with the variance of its authors' code
    kaiming       U(-1/sqrt(d_in), 1/sqrt(d_in))      as in the authors' code and in PEFT
                  N(0, 1) for an embedding table      as there, where this factor is called B and the other A
    orthogonal    A A^T = I                           the rows are orthonormal: Saxe et al., 2014, arXiv:1312.6120
    pissa         A and B from the weight itself      `pissa.py`

The paper gives no variance. On linear layers, the first two have the same one.
"""
from __future__ import annotations

import math
from typing import Any, Callable

import numpy

from minipeft.backend import Array, to_device
from minipeft.nn.init import Init, Rng, normal, uniform, zeros
from minipeft.nn.slot import Slot


def gaussian(slot: Slot, rank: int) -> Init:
    """N(0, 1 / (3 d_in)), for the A of a place `slot`, of any rank."""
    return normal(slot.shape[1] ** -0.5 / math.sqrt(3))


def kaiming(slot: Slot, rank: int) -> Init:
    """U(-1/sqrt(d_in), 1/sqrt(d_in)), or N(0, 1) where the place `slot` is an embedding table; for any rank."""
    return normal(1.0) if slot.kind == "embedding" else uniform(slot.shape[1] ** -0.5)


def orthogonal(slot: Slot, rank: int) -> Init:
    """Orthonormal rows, `rank` at a time: A = Q^T of G^T = Q R, with G [r, d_in] ~ N(0, 1) and the diagonal of R
    positive. So all sets of r orthonormal rows are equally likely. torch.nn.init.orthogonal_ is defined in this way.

    PEFT's "orthogonal" is something else: neither factor is 0 or has orthonormal rows. Both are Gaussian matrices times
    alternate rows of one orthogonal [r, r] matrix. Their product is 0 up to rounding, so there attaching moves the
    outputs a little, and r must be even."""
    def init(shape: tuple, dtype: Any, rng: Rng) -> Array:
        if rng is None:
            return zeros(shape, dtype)
        parts = []
        for _ in range(shape[0] // rank):
            q, r = numpy.linalg.qr(rng.standard_normal((rank, shape[1])).T)
            parts.append((q * numpy.where(numpy.diagonal(r) < 0, -1, 1)).T)
        return to_device(numpy.ascontiguousarray(numpy.concatenate(parts), dtype))
    return init


INITS: dict[str, Callable[[Slot, int], Init]] = {"gaussian": gaussian, "kaiming": kaiming, "orthogonal": orthogonal}
NAMES = (*INITS, "pissa")
