"""Affine quantization in groups: the integers of a group of neighboring weights share a scale and an offset.

    w~ = a q + b,      q in 0 .. 2^N - 1      a = (max - min) / (2^N - 1),   b = min,   q = round((w - b) / a)

Min and max are those of `group` neighboring weights of one row. Xu et al., 2023, arXiv:2309.14717 (QA-LoRA), eq. (1).
Where max = min, a = 1 and q = 0. The offset can be kept in two ways.

zero="float": b is a number of its own, in the dtype of the scale. So a change that is one number per group can be added
to b, and no code and no scale changes (`methods/qalora.py`). The form a (q - z) of other libraries has the zero point
z = -b/a, which is seldom an integer. `zero_points` computes it.

zero="rounded": z is an integer. By the standard convention every group can represent the number 0, and z is its code:

    w~ = a (q - z),    low = min(min, 0),   a = (max(max, 0) - low) / (2^N - 1),   z = round(-low / a),
                       q = round(w / a) + z

The table has the error |W~ - W| / |W| of normal random weights in groups of 32, in Frobenius norms. Its last row is for
a merge into rounded zero points, of a change that is one normal random number per group, as large as a weight. It is
the error of the merge alone, |(W' - W~) - change| / |W|:

                       int2     int3     int4     int8
    zero="float"      39.3%    16.8%     7.8%     0.5%
    zero="rounded"    40.6%    17.3%     8.1%     0.5%
    its merge         40.4%    17.3%     8.1%     0.5%

So a merge into rounded zero points adds an error as large as that of the quantization. A change below half a step of
its group is lost altogether. QA-LoRA needs offsets that are floats. A weight takes N + 64/group bits with scales and
offsets in float32, and N + 32/group with stored="float16".

W~ quantized again has the same codes and the same b, where a is not subnormal. It has the same a where
a (2^N - 1) + b is a number of the dtype; elsewhere a differs by at most 3u a + u |top| / (2^N - 1), where u is the unit
roundoff and top the largest number of the group. With rounded zero points, codes and z are the same in every group that
reaches both ends of its codes: its smallest code is 0, or z is; and its largest code is 2^N - 1, or z is.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy

from minipeft.backend import Array, to_device, to_host
from minipeft.checks import integer, shown
from minipeft.quant.groups import by_rows, group_count, per_group, scaled, stored_as
from minipeft.quant.packing import packed, row_bytes, unpacked
from minipeft.quant.scheme import SCHEMES, Leaves, Scheme, Shape

BITS = (2, 3, 4, 8)
_STORED = (None, "float16", "float32", "float64")
_FARTHEST = 2 ** 15 - 1  # of a zero point from 0, in int16


@dataclasses.dataclass(frozen=True)
class Affine(Scheme):
    """Integers of `bits` bits, 2, 3, 4 or 8, in groups of `group` neighboring columns. zero: "float" or "rounded".
    stored: the dtype of scales and offsets, "float16", "float32" or "float64"; by default that of the weights. Codes
    are computed with the scale and the offset as they are stored. W~ is computed in float64 where scales are float64,
    and in float32 otherwise.

    |W~ - W| <= a/2, up to the roundings of a, b and W~. Raises ValueError for other values, and in `encode` for a group
    whose numbers overflow."""

    bits: int
    group: int = 32
    zero: str = "float"
    stored: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits is {shown(self.bits)}; expected one of {', '.join(map(str, BITS))}")
        object.__setattr__(self, "group", integer("group", self.group, least=2))
        if self.zero not in ("float", "rounded"):
            raise ValueError(f"zero is {shown(self.zero)}; expected 'float' or 'rounded'")
        if not (self.stored is None or isinstance(self.stored, str)) or self.stored not in _STORED:
            raise ValueError(f"stored is {shown(self.stored)}; expected one of {', '.join(map(repr, _STORED))}")

    @property
    def kind(self) -> str:  # type: ignore[override]
        """ "int4", "int3", ..."""
        return f"int{self.bits}"

    def leaves(self, shape: Shape, dtype: Any) -> dict[str, tuple[tuple[int, ...], numpy.dtype]]:
        groups, kept = (shape[0], group_count(self, shape, self.group)), numpy.dtype(self.stored or dtype)
        return {"codes": ((shape[0], row_bytes(shape[1], self.bits)), numpy.dtype("uint8")), "scale": (groups, kept),
                **({"offset": (groups, kept)} if self.zero == "float" else {"zero": (groups, numpy.dtype("int16"))})}

    def encode(self, matrix: numpy.ndarray) -> dict[str, numpy.ndarray]:
        leaves = self.leaves(matrix.shape, matrix.dtype)
        some = self._with_offset if self.zero == "float" else self._with_zero
        return by_rows(functools.partial(some, leaves["scale"][1]), matrix, leaves)

    def decode(self, arrays: Leaves, shape: Shape, rows: Any) -> Array:
        scale = arrays["scale"][rows]
        dtype = _arithmetic(scale.dtype)
        q = unpacked(arrays["codes"][rows], self.bits, shape[1], dtype)
        if self.zero == "float":
            return scaled(q, scale.astype(dtype), arrays["offset"][rows].astype(dtype))
        grouped = q.reshape(len(q), -1, self.group)
        grouped -= arrays["zero"][rows].astype(dtype)[..., None]  # exact: these are small integers
        return scaled(q, scale.astype(dtype), None)

    def shifted(self, arrays: Leaves, shape: Shape, delta: Array) -> dict[str, Array]:
        """The arrays of W~ + delta, where delta is [d_out, n], and n divides the number of groups in a row.

        zero="float": b' = b + delta, summed in float64 and rounded to the dtype of b. zero="rounded": z' = round(z -
        delta / a). It loses up to half a step of a group, and all of a delta below that. z' may lie outside 0 .. 2^N -
        1: codes are not changed, and z is kept in 16 bits. Raises ValueError for another shape, NaN or infinity, and
        for offsets or zero points that cannot be stored."""
        host = {leaf: to_host(array) for leaf, array in arrays.items() if leaf != "codes"}
        change = per_group(self, to_host(delta), shape, group_count(self, shape, self.group))
        if self.zero == "float":
            found = host["offset"] = stored_as(self, "the offset", host["offset"] + change, host["offset"].dtype)
        else:
            with numpy.errstate(over="ignore", divide="ignore", invalid="ignore"):  # a file may have a scale of 0
                found = numpy.rint(host["zero"] - change / host["scale"])
            if not abs(found).max() <= _FARTHEST:
                raise ValueError(f"{self}: a zero point would become {found.flat[abs(found).argmax()]:.6g}; expected "
                                 f"at most {_FARTHEST} from 0: the change is too large for the scale of its group")
            found = host["zero"] = found.astype("int16")
        self._check_ends(**host)
        return {**arrays, "offset" if self.zero == "float" else "zero": to_device(found)}

    def zero_points(self, arrays: Leaves) -> Array:
        """[d_out, groups]: z in w~ = a (q - z), of the arrays of a weight. With zero="float" it is -b/a, rounded, so
        a (q - z) has other roundings than a q + b."""
        dtype = _arithmetic(arrays["scale"].dtype)
        if self.zero == "rounded":
            return arrays["zero"].astype(dtype)
        return -arrays["offset"].astype(dtype) / arrays["scale"].astype(dtype)

    def _with_offset(self, kept: numpy.dtype, matrix: numpy.ndarray) -> dict[str, numpy.ndarray]:
        w = self._grouped(matrix)
        offset = stored_as(self, "the offset", w.min(axis=2) + 0.0, kept)  # 0.0 also where it is -0.0
        low = offset.astype(w.dtype)
        scale = self._scale(low, w.max(axis=2), kept)
        self._check_ends(scale, offset=offset)
        w -= low[..., None]
        w /= scale.astype(w.dtype)[..., None]
        return {"codes": self._codes(numpy.rint(w, out=w)), "scale": scale, "offset": offset}

    def _with_zero(self, kept: numpy.dtype, matrix: numpy.ndarray) -> dict[str, numpy.ndarray]:
        w = self._grouped(matrix)
        low = numpy.minimum(w.min(axis=2), 0)
        scale = self._scale(low, numpy.maximum(w.max(axis=2), 0), kept)
        a = scale.astype(w.dtype)
        zero = numpy.clip(numpy.rint(-low / a), 0, self._last)
        self._check_ends(scale, zero=zero)
        w /= a[..., None]
        numpy.rint(w, out=w)
        w += zero[..., None]
        return {"codes": self._codes(w), "scale": scale, "zero": zero.astype("int16")}

    @property
    def _last(self) -> int:
        return 2 ** self.bits - 1

    def _grouped(self, matrix: numpy.ndarray) -> numpy.ndarray:
        """A copy [n, groups, group], in the dtype of the arithmetic."""
        return matrix.astype(_arithmetic(matrix.dtype)).reshape(len(matrix), -1, self.group)

    def _scale(self, low: numpy.ndarray, top: numpy.ndarray, kept: numpy.dtype) -> numpy.ndarray:
        """(top - low) / (2^N - 1) in the dtype in which it is kept; 1 where top = low."""
        with numpy.errstate(over="ignore"):
            span = top - low
        scale = stored_as(self, "the scale", span / self._last, kept)
        # A subnormal scale may be rounded to half its value. Rounded up, it lets the last code reach the top.
        short = (scale < numpy.finfo(kept).smallest_normal) & (scale.astype(span.dtype) * self._last < span)
        scale[short] = numpy.nextafter(scale[short], kept.type(1))
        scale[span <= 0] = 1  # below 0, if the offset was rounded to above all weights of its group
        return scale

    def _check_ends(self, scale: numpy.ndarray, offset: Any = 0, zero: Any = 0) -> None:
        """Raise ValueError unless the first and the last number of each group are finite."""
        a, b, z = (numpy.asarray(x, _arithmetic(scale.dtype)) for x in (scale, offset, zero))
        with numpy.errstate(over="ignore"):
            ends = [a * (q - z) + b for q in (0, self._last)]
        if not numpy.isfinite(ends).all():
            raise ValueError(f"{self}: the numbers of a group overflow {a.dtype}; expected weights that differ "
                             f"by less than {float(numpy.finfo(a.dtype).max):.6g}")

    def _codes(self, rounded: numpy.ndarray) -> numpy.ndarray:
        numpy.clip(rounded, 0, self._last, out=rounded)
        return packed(rounded.astype("uint8").reshape(len(rounded), -1), self.bits)

    def __str__(self) -> str:
        return (f"int{self.bits}, groups of {self.group}" + ", rounded zero points" * (self.zero == "rounded")
                + f", scales in {self.stored}" * (self.stored is not None))


def _arithmetic(dtype: Any) -> str:
    return "float64" if dtype == "float64" else "float32"


SCHEMES.update({f"int{bits}": functools.partial(Affine, bits) for bits in BITS})
