"""NF4 and FP4: weights as 4-bit codes of sixteen levels, with a scale for each block of 64.

    w~ = level[code] * absmax_b               one float32 product; then one rounding to the dtype of the model

NF4, FP4, blocks and double quantization: Dettmers et al., 2023, arXiv:2305.14314, sec. 2 and 3. The levels are in
`codebooks.py`, the rule from numbers to codes in `blockwise.py`, the bytes in place of absmax in `double.py`.

Stored for a matrix, in flat row-major order, are the bytes of bitsandbytes:

    packed         [ceil(n / 2)]          uint8: two codes in a byte, the first in the high nibble
    absmax         [blocks]               float32
    or, doubled:   qabsmax [blocks] uint8,  nested_absmax [ceil(blocks / 256)] float32,  offset [] float32
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy

from minipeft.backend import Array, xp
from minipeft.checks import boolean, integer, python, shown
from minipeft.quant import blockwise, double as nested
from minipeft.quant.codebooks import LEVELS, Levels, level_pairs, levels_at
from minipeft.quant.dynamic_map import dynamic_map
from minipeft.quant.scheme import SCHEMES, Leaves, Scheme, Shape


@dataclasses.dataclass(frozen=True)
class FourBit(Scheme):
    """Codes of sixteen levels, in blocks. kind: "nf4" or "fp4". blocksize: numbers in a block, any integer from 1 to
    2^31 - 1 (bitsandbytes takes the powers of two from 32 to 4096). double: whether absmax is quantized too.

    levels, absmax_levels: the float32 numbers that the 4-bit codes and the bytes of qabsmax stand for. A checkpoint
    brings its own; by default they are those of `codebooks.py` and `dynamic_map.py`.

    Raises ValueError for an unknown kind, another block size, a `double` that is no bool, and levels that are not 16,
    or 256, finite float32 numbers."""

    kind: str
    blocksize: int = 64
    double: bool = False
    levels: Levels = dataclasses.field(default=(), repr=False)
    absmax_levels: Levels = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", python(self.kind))
        if not isinstance(self.kind, str) or self.kind not in LEVELS:
            raise ValueError(f"kind is {shown(self.kind)}; expected one of {', '.join(LEVELS)}")
        object.__setattr__(self, "double", boolean("double", self.double))
        blocksize = integer("blocksize", self.blocksize, 1)
        if blocksize >= 2 ** 31:
            raise ValueError(f"blocksize is {shown(blocksize)}; expected an integer below 2^31")
        object.__setattr__(self, "blocksize", blocksize)
        object.__setattr__(self, "levels", _levels("levels", self.levels, 16) or LEVELS[self.kind])
        object.__setattr__(self, "absmax_levels",
                           _levels("absmax_levels", self.absmax_levels, 256) or dynamic_map())

    def leaves(self, shape: Shape, dtype: Any) -> dict[str, tuple[tuple[int, ...], numpy.dtype]]:
        n = self._size(shape)
        blocks, byte, single = -(-n // self.blocksize), numpy.dtype("uint8"), numpy.dtype("float32")
        packed = {"packed": ((-(-n // 2),), byte)}
        if not self.double:
            return {**packed, "absmax": ((blocks,), single)}
        return {**packed, "qabsmax": ((blocks,), byte), "nested_absmax": ((-(-blocks // nested.BLOCK),), single),
                "offset": ((), single)}

    def encode(self, matrix: numpy.ndarray) -> dict[str, numpy.ndarray]:
        self._size(matrix.shape)
        packed, absmax = blockwise.encoded(matrix.reshape(-1), self.blocksize, self.levels)
        stored = nested.encoded(absmax, self.absmax_levels) if self.double else {"absmax": absmax}
        return {"packed": packed, **stored}

    def decode(self, arrays: Leaves, shape: Shape, rows: Any) -> Array:
        if not isinstance(rows, slice):
            return self._gathered(arrays, shape, rows)
        first, last, step = rows.indices(shape[0])
        if step != 1:
            return self._gathered(arrays, shape, xp.arange(first, last, step))
        out = xp.empty((max(0, last - first), shape[1]), dtype="float32")
        self.decode_to(out, arrays, shape, rows)
        return out

    def decode_to(self, out: Array, arrays: Leaves, shape: Shape, rows: slice) -> None:
        d_in, size = shape[1], self.blocksize
        first, last, _ = rows.indices(shape[0])
        if first < last:
            first, last = first * d_in, last * d_in                          # the flat range of numbers
            blocks = xp.arange(first // size, -(-last // size))
            self._write(out.reshape(-1), arrays["packed"][first // 2:-(-last // 2)], first % 2,
                        self._absmax(arrays, blocks), first % size)

    def _write(self, out: Array, packed: Array, head: int, absmax: Array, skipped: int) -> None:
        """Decode to `out` [n], neighbors. head: whether the first byte begins with a number that lies before them.
        skipped: how many numbers of the first block do."""
        n = len(out)
        # The levels go to `out` itself where whole bytes begin and end there, and to an array beside it elsewhere.
        fits = out.dtype == "float32" and 2 * len(packed) == n
        values = out if fits else xp.empty(2 * len(packed), dtype="float32")
        level_pairs(packed, self.levels, out=values)
        blockwise.times_absmax(values[head:head + n], absmax, skipped, self.blocksize, out=out)

    def _gathered(self, arrays: Leaves, shape: Shape, ids: Array) -> Array:
        """W~[ids]."""
        (d_out, d_in), ids = shape, ids[:, None].astype("int64")
        if d_in % 2 or d_in % self.blocksize:  # rows begin inside bytes or blocks: each number from its own
            at = ids * d_in + xp.arange(d_in)
            return levels_at(arrays["packed"], self.levels, at) * self._absmax(arrays, at // self.blocksize)
        per_row = d_in // self.blocksize
        blocks = (ids * per_row + xp.arange(per_row)).reshape(-1)
        out = xp.empty((len(ids), d_in), dtype="float32")
        self._write(out.reshape(-1), arrays["packed"].reshape(d_out, -1)[ids[:, 0]].reshape(-1), 0,
                    self._absmax(arrays, blocks), 0)
        return out

    def _absmax(self, arrays: Leaves, blocks: Array) -> Array:
        """absmax of these blocks, any shape of integers."""
        if not self.double:
            return arrays["absmax"][blocks]
        return nested.decoded(arrays["qabsmax"], arrays["nested_absmax"], arrays["offset"], self.absmax_levels, blocks)

    def _size(self, shape: tuple[int, ...]) -> int:
        if not shape[0] * shape[1]:
            raise ValueError(f"{self} cannot hold an empty matrix {list(shape)}")
        return shape[0] * shape[1]

    def __str__(self) -> str:
        return f"{self.kind}, blocks of {self.blocksize}{', double' if self.double else ''}"


def _levels(name: str, levels: Any, n: int) -> Levels:
    """The levels as a tuple of float32 numbers, or () for none."""
    try:
        values = numpy.asarray(levels, dtype="float64")
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {shown(levels)}; expected {n} numbers") from None
    if values.size and (values.shape != (n,) or not numpy.isfinite(values).all()
                        or (abs(values) > numpy.finfo("float32").max).any()):
        raise ValueError(f"{name} is {shown(levels)}; expected {n} finite numbers")
    return tuple(values.astype("float32").tolist())


SCHEMES.update({kind: functools.partial(FourBit, kind) for kind in LEVELS})
