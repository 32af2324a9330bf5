"""A quantized weight: one more kind of weight. Its codes are stored, and its numbers are computed when they are needed.

    W~ = decode(codes, scales, ...)          dense(); the definition
    y = x W~^T,   dx = g W~                  project(x): one op, whose backward pass decodes again
    no dW~: the arrays are `Fixed`, and never trained

W~ is made for one product and dropped after it, so at most one dense matrix is alive at a time, in the forward and in
the backward pass. This is the base of QLoRA (Dettmers et al., 2023, arXiv:2305.14314, eq. (5)): a LoRA needs no code of
its own for it, because it asks the weight below for x W0^T alone.
"""
from __future__ import annotations

from typing import Any, Mapping

import numpy

from minipeft.backend import Array, to_device, to_host, xp
from minipeft.engine.ops import dequantized_linear
from minipeft.engine.tensor import Tensor
from minipeft.nn.weight import Fixed
from minipeft.quant.scheme import Leaves, Scheme, Shape

CHUNK = 2 ** 17  # numbers decoded at a time, so that the passes over them stay in the cache


def decoded(scheme: Scheme, arrays: Leaves, shape: Shape, dtype: Any) -> Array:
    """W~ [d_out, d_in] in `dtype`: the numbers that `arrays`, {leaf: array}, stand for under `scheme`. shape: [d_out,
    d_in]. CHUNK numbers are computed at a time."""
    out = xp.empty(shape, dtype=dtype)
    step = max(1, CHUNK // shape[1])
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        scheme.decode_to(out[rows], arrays, shape, rows)
    return out


class QuantizedWeight:
    """The weight that `arrays`, {leaf: array}, stand for under a `scheme`. shape: [d_out, d_in]. dtype: the dtype of
    dense(), in which the model computes. keep: whether the numbers stay in memory once they were decoded, for models
    that are small enough. It changes no bit of any result. To change the weight, replace an array (`Fixed.data`), as
    loading does; do not write into one."""

    drops = False
    source: str | None = None  # the dtype of the original numbers, where a file that it was read from says so

    def __init__(self, scheme: Scheme, shape: Shape, dtype: Any, arrays: Mapping[str, Array], keep: bool = False):
        self.scheme, self.dtype, self.keep = scheme, numpy.dtype(dtype), keep
        self.shape: Shape = (shape[0], shape[1])
        self._arrays = {leaf: Fixed(array) for leaf, array in arrays.items()}
        self._kept: tuple[list[Array], Array] | None = None  # the arrays that were decoded, and W~

    @classmethod
    def of(cls, matrix: Array, scheme: Scheme, keep: bool = False) -> "QuantizedWeight":
        """`matrix` [d_out, d_in], quantized. keep: as for the class. Raises ValueError for a shape that the scheme
        cannot hold, and for anything but finite floating-point numbers."""
        if matrix.dtype.kind != "f":
            raise ValueError(f"it has dtype {matrix.dtype}; expected floating-point numbers")
        if not to_host(xp.isfinite(matrix).all()):
            raise ValueError("it holds NaN or infinity; expected finite numbers")
        arrays = {leaf: to_device(array) for leaf, array in scheme.encode(to_host(matrix)).items()}
        return cls(scheme, matrix.shape, matrix.dtype, arrays, keep)

    @property
    def arrays(self) -> dict[str, Fixed]:
        """{leaf: array}: codes, scales and offsets. None of them is trained."""
        return self._arrays

    def dense(self) -> Tensor:
        """W~ [d_out, d_in]."""
        return Tensor(self._decoded())

    def project(self, x: Any, rng: Any = None) -> Tensor:
        """x W~^T.   x [..., d_in] -> [..., d_out]. Nothing but x's shape is kept for dx = g W~."""
        return dequantized_linear(x, dequantize=self._decoded)

    def rows(self, ids: Array) -> Tensor:
        """W~[ids].   ids [...] -> [..., d_in]. Only these rows are decoded."""
        found = self.scheme.decode(self._data, self.shape, ids.reshape(-1))
        return Tensor(found.astype(self.dtype, copy=False).reshape(*ids.shape, self.shape[1]))

    def vector(self) -> Tensor:
        """Raises TypeError: vectors [d] are not quantized."""
        raise TypeError(f"a quantized weight is a matrix {list(self.shape)}, and no vector")

    def requantized(self, matrix: Array) -> "QuantizedWeight":
        """Another `matrix` [d_out, d_in] of this shape, quantized in the same way. Raises as `of` does."""
        return type(self).of(matrix.astype(self.dtype, copy=False), self.scheme, self.keep)

    def shifted(self, delta: Array) -> "QuantizedWeight":
        """W~ + delta with the same codes and scales. delta [d_out, groups]: a number for each of `groups` equal groups
        of neighboring columns. Raises ValueError where the scheme has no offset for each of these groups."""
        arrays = self.scheme.shifted(self._data, self.shape, delta)
        return type(self)(self.scheme, self.shape, self.dtype, arrays, self.keep)

    @property
    def nbytes(self) -> int:
        """The bytes of its arrays, without the numbers that it keeps."""
        return sum(array.data.nbytes for array in self._arrays.values())

    @property
    def kept_bytes(self) -> int:
        """The bytes of the numbers that stay in memory once they were decoded."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize if self.keep else 0

    @property
    def _data(self) -> dict[str, Array]:
        return {leaf: array.data for leaf, array in self._arrays.items()}

    def _decoded(self) -> Array:
        if not self.keep:
            return self._decode()
        now, kept = [array.data for array in self._arrays.values()], self._kept
        if kept is None or any(a is not b for a, b in zip(kept[0], now)):  # loading and moving replace them
            kept = self._kept = now, self._decode()
        return kept[1]

    def _decode(self) -> Array:
        return decoded(self.scheme, self._data, self.shape, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}  # a copy decodes for itself

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.scheme}, {list(self.shape)}, {self.dtype})"
