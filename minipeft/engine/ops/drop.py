"""Dropout: in training, a random share of the numbers is set to 0, and the others are scaled up to make up for it.

    y = x * m / (1 - p),   m_i ~ Bernoulli(1 - p)        Srivastava et al., 2014, JMLR 15, sec. 4

Departure from the paper, which multiplies by 1 - p when training is over: here the kept numbers are divided by 1 - p
during training ("inverted" dropout), as in every library.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.engine.tensor import array_of
from minipeft.backend import Array, to_device
from minipeft.engine.ops.primitives import mul


def dropout(x: Any, p: float, rng: numpy.random.Generator | None) -> Any:
    """x * m / (1 - p), x of any shape; x itself when `rng` is None or p is 0. p: the probability of a zero.

    The mask is drawn on the host, so that a CPU and a GPU run start from the same bits."""
    if rng is None or p == 0:
        return x
    return mul(x, dropout_mask(array_of(x).shape, p, rng, array_of(x).dtype))


def dropout_mask(shape: tuple, p: float, rng: numpy.random.Generator, dtype: Any) -> Array:
    """m / (1 - p) [*shape] in `dtype`: 0 with probability p, else 1 / (1 - p)."""
    kept = rng.random(shape, dtype=numpy.float32) >= p
    return to_device(kept.astype(dtype) / (1 - p))
