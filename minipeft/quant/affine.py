"""Affine quantization in groups: the integers of a group of neighboring weights share a scale and an offset.

    w~ = a q + b,   q in 0 .. 2^N - 1        a = (max - min) / (2^N - 1),   b = min,   q = round((w - b) / a)

Min and max are those of `group` neighboring weights of one row. Xu et al., 2023, arXiv:2309.14717 (QA-LoRA), eq. (1).
A group whose weights are all equal has a = 1 and q = 0.

The offset b is a floating-point number of its own, in the dtype of the weights. So a change that is one number per
group goes into b, and no code and no scale moves (`methods/qalora.py`).
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy

from minipeft.backend import Array, xp
from minipeft.checks import shown
from minipeft.quant.packing import packed, unpacked
from minipeft.quant.scheme import SCHEMES, Leaves, Scheme, Shape

BITS = (2, 3, 4, 8)


@dataclasses.dataclass(frozen=True)
class Affine(Scheme):
    """Integers of `bits` bits in groups of `group` neighboring columns. Raises ValueError for other numbers of bits and
    for a group that is no integer >= 2."""

    bits: int
    group: int = 32

    @property
    def kind(self) -> str:  # type: ignore[override]
        """ "int4", "int3", ..."""
        return f"int{self.bits}"

    def leaves(self, shape: Shape, dtype: Any) -> dict[str, tuple[tuple[int, ...], numpy.dtype]]:
        d_out, groups = shape[0], self._groups(shape)
        return {"codes": ((d_out, -(-shape[1] * self.bits // 8)), numpy.dtype("uint8")),
                "scale": ((d_out, groups), numpy.dtype(dtype)), "offset": ((d_out, groups), numpy.dtype(dtype))}

    def encode(self, matrix: numpy.ndarray) -> dict[str, numpy.ndarray]:
        (d_out, d_in), groups = matrix.shape, self._groups(matrix.shape)
        grouped = matrix.reshape(d_out, groups, self.group)
        offset, top = grouped.min(axis=2), grouped.max(axis=2)
        scale = (top - offset) / (2 ** self.bits - 1)
        scale[scale == 0] = 1
        codes = numpy.rint((grouped - offset[..., None]) / scale[..., None])
        codes = numpy.clip(codes, 0, 2 ** self.bits - 1).astype("uint8").reshape(d_out, d_in)
        return {"codes": packed(codes, self.bits), "scale": scale, "offset": offset}

    def decode(self, arrays: Leaves, shape: Shape, rows: Any) -> Array:
        q = unpacked(arrays["codes"][rows], self.bits, shape[1])
        scale, offset = arrays["scale"][rows], arrays["offset"][rows]
        out = q.astype(scale.dtype).reshape(len(q), -1, self.group)
        out *= scale[..., None]
        out += offset[..., None]
        return out.reshape(len(q), shape[1])

    def shifted(self, arrays: Leaves, shape: Shape, delta: Array) -> dict[str, Array]:
        per = self._groups(shape) / delta.shape[1]
        if per != int(per):
            raise ValueError(f"the change has {delta.shape[1]} groups along {shape[1]} columns, and the weight has "
                             f"{self._groups(shape)}; expected groups that hold whole groups of the weight")
        moved = arrays["offset"] + xp.repeat(delta.astype(arrays["offset"].dtype), int(per), axis=1)
        return {**arrays, "offset": moved}

    def _groups(self, shape: Shape) -> int:
        if shape[1] % self.group:
            raise ValueError(f"{self}: {shape[1]} columns are not whole groups of {self.group}; expected a group size "
                             f"that divides {shape[1]}")
        return shape[1] // self.group

    def __str__(self) -> str:
        return f"int{self.bits}, groups of {self.group}"


def _affine(bits: int, group: int = 32) -> Affine:
    if type(group) is not int or group < 2:
        raise ValueError(f"group is {shown(group)}; expected an integer >= 2")
    return Affine(bits, group)


SCHEMES.update({f"int{bits}": functools.partial(_affine, bits) for bits in BITS})
