"""How a matrix becomes codes, and what the codes mean: the contract of a quantization.

    encode(W)                 {leaf: array}     codes, scales, and whatever else is stored in place of W
    decode(arrays, rows)      W~[rows]          the numbers that these arrays stand for: the definition of the weight

A scheme is a frozen dataclass of settings. It holds no array, so one object serves every matrix of a model. The arrays
are kept by a `QuantizedWeight` (`weight.py`), which moves, saves and counts them under their leaves.
"""
from __future__ import annotations

import abc
import inspect
from typing import Any, Callable, Mapping

import numpy

from minipeft.backend import Array
from minipeft.checks import python, shown

Shape = tuple[int, int]  # [d_out, d_in]
Leaves = Mapping[str, Array]
SCHEMES: dict[str, Callable[..., "Scheme"]] = {}  # by kind: makes the scheme from options


class Scheme(abc.ABC):
    """One way to quantize a matrix [d_out, d_in]. kind: its name, as `scheme` takes it. Encoding is work on the host,
    in NumPy. Decoding happens at every step, wherever the arrays are."""

    kind: str

    @abc.abstractmethod
    def leaves(self, shape: Shape, dtype: Any) -> dict[str, tuple[tuple[int, ...], numpy.dtype]]:
        """{leaf: (shape, dtype)} of the arrays for a matrix of this shape and dtype. Raises ValueError for a shape that
        the scheme cannot hold."""

    @abc.abstractmethod
    def encode(self, matrix: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """{leaf: array} for `matrix` [d_out, d_in], finite floating-point numbers. Raises ValueError for a shape that
        the scheme cannot hold."""

    @abc.abstractmethod
    def decode(self, arrays: Leaves, shape: Shape, rows: Any) -> Array:
        """W~[rows]: [n, d_in] in the dtype in which the scheme computes. arrays: {leaf: array}, as `encode` gives them.
        rows: a slice of rows, or ids [n]."""

    def decode_to(self, out: Array, arrays: Leaves, shape: Shape, rows: slice) -> None:
        """Write W~[rows] to `out` [n, d_in], which is contiguous and may have another dtype than `decode` gives, with
        arrays and rows as there. rows is a slice without a step. A scheme that can write there at once, without an
        array in between, overrides it."""
        out[...] = self.decode(arrays, shape, rows)

    def shifted(self, arrays: Leaves, shape: Shape, delta: Array) -> dict[str, Array]:
        """The arrays of W~ + delta, where delta [d_out, groups] holds one number for each of `groups` equal groups of
        neighboring columns. Only offsets change. Raises ValueError for a scheme without an offset for each group."""
        raise ValueError(f"{self} has no offset that a change could be merged into")

    @abc.abstractmethod
    def __str__(self) -> str:
        """The kind with its settings, in words."""


def scheme(kind: str, **options: Any) -> Scheme:
    """The scheme called `kind`, with `options`. Raises ValueError for a kind, an option or a value that is unknown."""
    kind = python(kind)
    if not isinstance(kind, str) or kind not in SCHEMES:
        raise ValueError(f"kind is {shown(kind)}; expected one of {', '.join(SCHEMES)}")
    known = list(inspect.signature(SCHEMES[kind]).parameters)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"{kind} has no option {shown(unknown[0])}; expected {', '.join(known) or 'none'}")
    return SCHEMES[kind](**options)
