"""`quantize_4bit`: an array of any shape in 4-bit codes, without a model.

    q = quantize_4bit(x, "nf4", blocksize=64, double=True)
    q.packed, q.qabsmax, q.nested_absmax, q.offset              the bytes that bitsandbytes makes on a CPU
    q.dequantize()                                              x~, float32, in the shape of x

The rule is in `blockwise.py`, with the places where bitsandbytes' CPU and CUDA differ. It is computed in float32, with
two roundings: of 1 / absmax, and of the product. A number close to a threshold can be on one side of it before these
roundings and on the other side after them, so a computation in float64 gives other codes. NumPy and PyTorch round these
operations alike.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy

from minipeft.backend import to_host
from minipeft.quant.fourbit import FourBit
from minipeft.quant.weight import decoded


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized4Bit:
    """An array in 4-bit codes. scheme: how they were made. shape: that of the array. packed: [ceil(n / 2)], uint8, the
    first element in the high nibble. absmax: [blocks], float32; None if it was quantized too. Then qabsmax [blocks],
    uint8, nested_absmax [ceil(blocks / 256)], float32, and offset, a float32 number, hold it; else these are None."""

    scheme: FourBit
    shape: tuple[int, ...]
    packed: numpy.ndarray
    absmax: numpy.ndarray | None = None
    qabsmax: numpy.ndarray | None = None
    nested_absmax: numpy.ndarray | None = None
    offset: numpy.float32 | None = None

    def dequantize(self) -> numpy.ndarray:
        """The numbers that the codes stand for: float32, in the shape of the array."""
        names = self.scheme.leaves((1, 1), "float32")
        arrays = {name: numpy.asarray(getattr(self, name)) for name in names}
        n = int(numpy.prod(self.shape, dtype="int64"))
        return decoded(self.scheme, arrays, (n, 1), "float32").reshape(self.shape)


def quantize_4bit(array: Any, kind: str = "nf4", blocksize: int = 64, double: bool = False) -> Quantized4Bit:
    """array [...], of any shape, in 4-bit codes. It holds float16, float32 or float64, and is cast to float32.

    kind: "nf4" or "fp4". blocksize: how many neighbors in flat row-major order share a scale, any integer >= 1.
    double: whether these scales are quantized to 8 bits.

    Raises TypeError for an array that does not hold floating-point numbers; ValueError for an empty one, for NaN,
    infinity or a number beyond float32, and for another kind, block size or `double`."""
    scheme = FourBit(kind, blocksize, double)
    values = to_host(array)
    if values.dtype.kind != "f":
        raise TypeError(f"the array holds {values.dtype}; expected float16, float32 or float64")
    if not values.size:
        raise ValueError(f"the array is empty {list(values.shape)}; expected at least one number")
    stored: dict[str, Any] = scheme.encode(values.reshape(1, -1))
    return Quantized4Bit(scheme, values.shape, **{leaf: data[()] for leaf, data in stored.items()})  # offset: a number
