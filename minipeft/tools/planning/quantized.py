"""The size of quantized weights: bits for each number, and the bytes that each block and each tensor adds.

    nf4, fp4     4 bits, a float32 absmax for each 64 numbers         4.5 bits       Dettmers et al., 2023,
      double     an 8-bit absmax, a float32 for 256 of them           4.127 bits     arXiv:2305.14314, sec. 3
    int2 .. 8    2 .. 8 bits, scale and offset (float32) per 32       N + 2 bits     Xu et al., 2023, arXiv:2309.14717
    q4_0 .. q8_0 18, 20, 22, 24 and 34 bytes for each 32 numbers      llama.cpp's blocks

The codebooks are constants of the library. (Other libraries hold a copy for each tensor, 64 bytes, and 1,024 more with
double quantization.) A product with such a weight makes the dense matrix, multiplies, and drops it. The backward pass
makes it again. So the float weights are gone, and one dense matrix at a time is a temporary.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy

from minipeft.backend import xp
from minipeft.checks import shown
from minipeft.engine.ops import dequantized_linear, embedding
from minipeft.engine.tensor import Tensor
from minipeft.nn.weight import Fixed


@dataclasses.dataclass(frozen=True)
class Kind:
    """bits: of the code of a number. block: how many numbers share `extra` bytes of scales and offsets. rows: whether
    each block lies in one row."""

    bits: int
    block: int
    extra: int
    rows: bool = True


NESTED, MEAN = 256, 4  # scales that share a scale of their own; bytes of the offset of all scales of a tensor
KINDS: dict[str, Kind] = {
    **{name: Kind(4, 64, 4, rows=False) for name in ("nf4", "fp4")},
    **{f"int{bits}": Kind(bits, 32, 8) for bits in (2, 3, 4, 8)},
    "q4_0": Kind(4, 32, 2), "q4_1": Kind(4, 32, 4), "q5_0": Kind(5, 32, 2), "q5_1": Kind(5, 32, 4),
    "q8_0": Kind(8, 32, 2)}


def kind_of(name: str, double: bool = False) -> Kind:
    """The kind of this `name`. double: whether its scales are quantized, too. Raises ValueError for another name, and
    for a kind that has no double quantization."""
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"quantize is {shown(name)}; expected one of {', '.join(KINDS)}")
    if double and name not in ("nf4", "fp4"):
        raise ValueError(f"double quantization is for nf4 and fp4; {name} has none")
    return KINDS[name]


def size(shape: tuple[int, int], name: str, double: bool = False) -> int:
    """The bytes of a weight of this `shape` [d_out, d_in], quantized as `name`; double: as in `kind_of`. Raises
    ValueError as `kind_of` does, and where a row is not made of whole blocks."""
    kind, numbers = kind_of(name, double), math.prod(shape)
    if kind.rows and shape[1] % kind.block:
        raise ValueError(f"{shape[1]} columns are not whole blocks of {kind.block}, as {name} needs them")
    blocks, codes = math.ceil(numbers / kind.block), math.ceil(numbers * kind.bits / 8)
    if double:
        return codes + blocks + math.ceil(blocks / NESTED) * 4 + MEAN
    return codes + blocks * kind.extra


class Quantized:
    """A weight of which only the codes are in memory. shape: [d_out, d_in]. dtype: in which it multiplies. size: of the
    codes and everything beside them, in bytes."""

    drops = False

    def __init__(self, shape: tuple[int, int], dtype: Any, size: int):
        self.shape, self.dtype = tuple(shape), numpy.dtype(dtype)
        self.codes = Fixed(xp.empty((size,), "uint8"))

    @property
    def arrays(self) -> dict[str, Fixed]:
        """Its codes, as one array."""
        return {"codes": self.codes}

    def dense(self) -> Tensor:
        """W [d_out, d_in], in memory for as long as the result is."""
        return Tensor(xp.empty(self.shape, self.dtype))

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W^T.   x [..., d_in] -> [..., d_out]."""
        return dequantized_linear(x, dequantize=lambda: xp.empty(self.shape, self.dtype))

    def rows(self, ids: Any) -> Tensor:
        """W[ids].   ids [...] -> [..., d_in]."""
        return embedding(self.dense(), ids)

    def vector(self) -> Tensor:
        """Raises TypeError: a matrix [d_out, d_in] is no vector."""
        raise TypeError("a quantized weight is a matrix")
