"""Rotary positions: queries and keys are turned by an angle that grows with the position, so that a score depends on
the distance alone.

    (R_p q) . (R_s k) = q . R_(s-p) k       R_p turns pair i of a head by p f_i, with f_i = theta^(-2i/d), i < d/2

Su et al., 2021, arXiv:2104.09864, sec. 3.2. Departure: the paper's pairs are neighbors, (2i, 2i + 1). Here they are
(i, i + d/2), for which Hugging Face's files have their rows. A scaling slows the rotation down, for texts longer than
in pre-training:

    linear    f_i / factor                                              Chen et al., 2023, arXiv:2306.15595
    llama3    f_i / factor where the wavelength 2 pi / f_i is above L / low, f_i where it is below L / high, and a blend
              of both between; L is the original length                 the code of Llama 3.1, as in transformers
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy

from minipeft.backend import Array, to_device
from minipeft.engine.ops import rotate
from minipeft.engine.tensor import Tensor
from minipeft.nn.module import Module

TYPES = ("default", "linear", "llama3")
Rotation = tuple[Array, Array]  # cos, sin


@dataclasses.dataclass(frozen=True)
class Frequencies:
    """How fast the pairs of a head turn. theta: the base. type: one of TYPES. factor: of linear and llama3. low, high,
    length: of llama3, the factors of the wavelengths between which it blends, and the original length L."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    length: int = 8192

    def of(self, head_dim: int) -> numpy.ndarray:
        """f [head_dim / 2] in float64, radians for each position."""
        f = self.theta ** -(numpy.arange(0, head_dim, 2) / head_dim)
        if self.type == "default":
            return f
        if self.type == "linear":
            return f / self.factor
        wavelength = 2 * math.pi / f
        s = (self.length / wavelength - self.low) / (self.high - self.low)
        return numpy.where(wavelength > self.length / self.low, f / self.factor,
                           numpy.where(wavelength < self.length / self.high, f, (1 - s) * f / self.factor + s * f))


class Rotary(Module):
    """The rotary positions of a stack. head_dim: numbers of a head, even. dtype: of the tables."""

    def __init__(self, head_dim: int, frequencies: Frequencies, dtype: Any):
        self.frequencies, self.dtype = frequencies.of(head_dim), numpy.dtype(dtype)

    def rotation(self, positions: numpy.ndarray) -> Rotation:
        """cos and sin for `rotate`, [1 or batch, time, d/2] each, of positions [time] or [batch, time]. They are
        computed in float64 and rounded once."""
        angle = positions.reshape(-1, positions.shape[-1])[..., None] * self.frequencies
        return to_device(numpy.cos(angle).astype(self.dtype)), to_device(numpy.sin(angle).astype(self.dtype))

    def as_at_zero(self, keys: Any) -> Tensor:
        """keys [batch, p, heads * d], unrotated, in front of a text, as if they were all at position 0 and token i of
        the text at p + i. Tokens are at i in fact, so the keys are turned by the angle of -p: a score depends on the
        distance alone."""
        p = keys.shape[1]
        return rotate(keys, *self.rotation(numpy.full(p, -p)))

    def embed(self, positions: numpy.ndarray) -> None:
        """None, for positions [time] and [batch, time] alike: nothing is added to embeddings."""
        return None

    def bias(self, queries: int, keys: int, start: int) -> None:
        """None, whatever queries, keys and start are: nothing is added to scores."""
        return None
