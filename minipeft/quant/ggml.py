"""llama.cpp's blocks: 32 neighboring weights of a row share a float16 scale d and, in two kinds, a float16 offset m.

    q4_0, q5_0    w~ = d (q - 2^(N-1))    d = w_k / -2^(N-1), where w_k is the weight of largest magnitude
    q4_1, q5_1    w~ = d q + m            d = (max - min) / (2^N - 1),   m = min
    q8_0          w~ = d q                d = max |w| / 127,   q in -127 .. 127

Source: `gguf.quants` of the `gguf` package (llama.cpp's gguf-py), whose bytes and numbers these are, bit for bit. Codes
are rounded with the float32 scale, before d and m are rounded to float16, and ties round away from zero.

Bits per weight and the error |W~ - W| / |W| of normal random weights, in Frobenius norms:

           q4_0    q4_1    q5_0    q5_1    q8_0
    bits    4.5     5.0     5.5     6.0     8.5
    error   8.6%    7.8%    4.3%    3.8%    0.5%

q4_1 and q5_1 keep the offset as a float of its own, so `shifted` merges a change that is one number per block into m,
with one rounding to float16. q4_0, q5_0 and q8_0 have nowhere to put such a change.

Two cases are left open by gguf. Where d or m is too large for float16, it stores infinity, and the block decodes to
NaN; here that is a ValueError. Where 1/d overflows float32, it casts NaN to an integer; here the code is 0, as with
gguf on x86. Such a d is 0 in float16, so the numbers of the block do not depend on its codes.

W~ quantized again has the same codes, d and m, where d is not 0 and |m| <= 1024 d. An m of 0 may change its sign.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy

from minipeft.backend import Array, to_device, to_host
from minipeft.checks import shown
from minipeft.quant.groups import by_rows, group_count, per_group, scaled, stored_as
from minipeft.quant.packing import packed, row_bytes, unpacked
from minipeft.quant.scheme import SCHEMES, Leaves, Scheme, Shape

BLOCK = 32
KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


@dataclasses.dataclass(frozen=True)
class Blocks(Scheme):
    """One of llama.cpp's formats of blocks. kind: "q4_0", "q4_1", "q5_0", "q5_1" or "q8_0". It computes in float32,
    to which other weights are converted. The arrays are `codes`, `d` and `m`. `codes` has q in the order of the
    columns, as in `packing.py`; `ggml_bytes.py` makes the bytes of a file. Raises ValueError for another kind, and in
    `encode` for a scale or an offset that is too large for float16."""

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {shown(self.kind)}; expected one of {', '.join(KINDS)}")

    @property
    def bits(self) -> int:
        """N, the bits of a code."""
        return int(self.kind[1])

    @property
    def has_offset(self) -> bool:
        """Whether there is an m."""
        return self.kind.endswith("_1")

    @property
    def center(self) -> int:
        """The code that stands for 0 in the formats without an offset."""
        return 2 ** (self.bits - 1) if self.kind in ("q4_0", "q5_0") else 0

    def leaves(self, shape: Shape, dtype: Any) -> dict[str, tuple[tuple[int, ...], numpy.dtype]]:
        """As in `Scheme.leaves`. None of them depends on the dtype of the matrix."""
        half = (shape[0], group_count(self, shape, BLOCK)), numpy.dtype("float16")
        codes = (shape[0], row_bytes(shape[1], self.bits)), numpy.dtype("int8" if self.bits == 8 else "uint8")
        return {"codes": codes, "d": half, **({"m": half} if self.has_offset else {})}

    def encode(self, matrix: numpy.ndarray) -> dict[str, numpy.ndarray]:
        some = self._signed if self.bits == 8 else self._with_offset if self.has_offset else self._centered
        return by_rows(lambda rows: some(self._blocks(rows)), matrix, self.leaves(matrix.shape, matrix.dtype))

    def decode(self, arrays: Leaves, shape: Shape, rows: Any) -> Array:
        codes, d = arrays["codes"][rows], arrays["d"][rows].astype("float32")
        q = unpacked(codes, self.bits, shape[1], "float32", minus=self.center)
        return scaled(q, d, arrays["m"][rows].astype("float32") if self.has_offset else None)

    def shifted(self, arrays: Leaves, shape: Shape, delta: Array) -> dict[str, Array]:
        """The arrays of W~ + delta, where delta is [d_out, n], and n divides the number of blocks in a row: m' =
        float16(m + delta), with the sum in float64. So |m' - (m + delta)| is at most half a unit in the last place of
        m', up to 2^-53 of m'. Raises ValueError for q4_0, q5_0 and q8_0, which have no m, for another shape, for NaN or
        infinity, and for an m' that is too large for float16."""
        if not self.has_offset:
            return super().shifted(arrays, shape, delta)
        change = per_group(self, to_host(delta), shape, group_count(self, shape, BLOCK))
        return {**arrays, "m": to_device(stored_as(self, "the offset m", to_host(arrays["m"]) + change, "float16"))}

    def _blocks(self, matrix: numpy.ndarray) -> numpy.ndarray:
        """A copy in float32 [n, blocks, 32]."""
        if matrix.dtype == "float64":
            return stored_as(self, "a weight", matrix, "float32").reshape(len(matrix), -1, BLOCK)
        return matrix.astype("float32").reshape(len(matrix), -1, BLOCK)

    def _centered(self, w: numpy.ndarray) -> dict[str, numpy.ndarray]:
        at = abs(w).argmax(axis=2)[..., None]
        d = numpy.take_along_axis(w, at, axis=2)[..., 0] / -self.center
        stored = stored_as(self, "the scale d", d, "float16")
        return {"codes": self._codes(w, d, self.center + 0.5), "d": stored}

    def _with_offset(self, w: numpy.ndarray) -> dict[str, numpy.ndarray]:
        low, top = w.min(axis=2), w.max(axis=2)
        m = stored_as(self, "the offset m", low, "float16")
        with numpy.errstate(over="ignore"):
            d = (top - low) / (2 ** self.bits - 1)
        stored = stored_as(self, "the scale d", d, "float16")
        w -= low[..., None]
        return {"codes": self._codes(w, d, 0.5), "d": stored, "m": m}

    def _signed(self, w: numpy.ndarray) -> dict[str, numpy.ndarray]:
        d = abs(w).max(axis=2) / 127
        stored = stored_as(self, "the scale d", d, "float16")
        inverse, lost = _inverse(d)
        w *= inverse[..., None]
        whole = numpy.trunc(w)
        w -= whole  # exact, as is twice the rest, which is 1 or more from half a unit on
        whole += numpy.trunc(w + w)
        whole[lost] = 0
        return {"codes": whole.astype("int8").reshape(len(w), -1), "d": stored}

    def _codes(self, w: numpy.ndarray, d: numpy.ndarray, more: float) -> numpy.ndarray:
        """trunc(w / d + more) as gguf computes it, in place of w; packed."""
        inverse, lost = _inverse(d)
        w *= inverse[..., None]
        w += more
        q = w.astype("uint8")
        numpy.minimum(q, 2 ** self.bits - 1, out=q)
        q[lost] = 0
        return packed(q.reshape(len(q), -1), self.bits)

    def __str__(self) -> str:
        return self.kind.upper()


def _inverse(d: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """1/d, or 0 where that is not finite; and where d is too small for 1/d, though it is not 0."""
    with numpy.errstate(divide="ignore", over="ignore"):
        inverse = 1 / d
    inverse[~numpy.isfinite(inverse)] = 0
    return inverse, (d != 0) & (inverse == 0)


SCHEMES.update({kind: functools.partial(Blocks, kind) for kind in KINDS})
