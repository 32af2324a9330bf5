"""The arithmetic that an implementation declares: the dtypes in which it stores, multiplies and accumulates.

    fl(a op b) = (a op b)(1 + d), |d| <= u      u = 2^-53 (float64), 2^-24 (float32), 2^-11 (float16, TF32's inputs),
                                                2^-8 (bfloat16)

A single u per dtype would give no useful bound for half precision (n u = 1 at n = 256 in bfloat16): kernels store
bfloat16 and accumulate in float32. So u_s of storage and u_a of accumulation are separate.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any, Mapping

import numpy

from minipeft.files import round_bf16, widen_bf16

UNIT = {"float64": 2.0 ** -53, "float32": 2.0 ** -24, "tf32": 2.0 ** -11, "float16": 2.0 ** -11,
        "bfloat16": 2.0 ** -8}
DTYPES = ("float64", "float32", "float16", "bfloat16")
_SUBNORMAL = {"float64": 2.0 ** -1074, "float32": 2.0 ** -149, "float16": 2.0 ** -24, "bfloat16": 2.0 ** -133}
_NORMAL = {"float64": 2.0 ** -1022, "float32": 2.0 ** -126, "float16": 2.0 ** -14, "bfloat16": 2.0 ** -126}
_FIELDS = {"store": tuple(_SUBNORMAL), "multiply": tuple(UNIT), "accumulate": tuple(_SUBNORMAL), "ftz": (False, True)}


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of one dtype.

    store: the dtype of results. multiply: the dtype of a product's inputs, which may be "tf32". accumulate: the dtype
    of sums. ftz: whether subnormal numbers are flushed to zero."""

    store: str
    multiply: str
    accumulate: str
    ftz: bool = False

    @property
    def u_s(self) -> float:
        """The unit roundoff of storage."""
        return UNIT[self.store]

    @property
    def u_a(self) -> float:
        """The unit roundoff of sums."""
        return UNIT[self.accumulate]

    @property
    def u_m(self) -> float:
        """The unit roundoff of a product's inputs; 0 if they are multiplied as they are stored, or in a wider dtype."""
        return UNIT[self.multiply] if UNIT[self.multiply] > UNIT[self.store] else 0.0

    @property
    def eta(self) -> float:
        """The largest error by underflow in one operation. The accumulator alone would not do: float16 sums in float32,
        but underflows when it is stored."""
        table = _NORMAL if self.ftz else _SUBNORMAL
        return max(table[self.store], table[self.accumulate])


def arithmetic(dtype: str, declared: Mapping[str, Any] | None = None) -> Arithmetic:
    """The arithmetic of a dtype: everything in that dtype, except that half precision is summed in float32.

    declared: fields of `Arithmetic` that differ from this. Raises ValueError for an unknown field or value, and if
    results would be stored in a coarser dtype."""
    half = dtype in ("float16", "bfloat16")
    fields: dict[str, Any] = {"store": dtype, "multiply": dtype, "accumulate": "float32" if half else dtype,
                              "ftz": False}
    for name, value in (declared or {}).items():
        if name not in _FIELDS or value not in _FIELDS[name]:
            raise ValueError(f"arith[{dtype!r}] says {name}={value!r}; expected one of "
                             f"{_FIELDS[name] if name in _FIELDS else tuple(_FIELDS)}")
        fields[name] = value
    if UNIT[fields["store"]] > UNIT[dtype]:
        raise ValueError(f"arith[{dtype!r}] says store={fields['store']!r}, which has fewer digits than {dtype}: such "
                         f"results are not results in {dtype}; declare the dtype {fields['store']}")
    return Arithmetic(**fields)


def on_grid(x: Any, dtype: str) -> numpy.ndarray:
    """x, of any shape, rounded once to the nearest number of `dtype` (ties to even), and returned as float64, which
    holds every such number exactly."""
    x = numpy.asarray(x, numpy.float64)
    if dtype == "bfloat16":
        return _on_bf16(x)
    with numpy.errstate(over="ignore"):
        return x.astype(dtype).astype(numpy.float64)


def _on_bf16(x: numpy.ndarray) -> numpy.ndarray:
    """x rounded to bfloat16, which keeps 7 of float64's 52 bits of fraction. If no number is subnormal or overflows,
    the other bits are rounded off directly: this is twice as fast, and emulation does little else."""
    size = abs(x)
    if not (((size >= 2.0 ** -126) & (size < 2.0 ** 127)) | (size == 0)).all():
        return widen_bf16(round_bf16(x)).astype(numpy.float64)
    bits = numpy.ascontiguousarray(x).view(numpy.uint64).reshape(x.shape)
    half = numpy.uint64((1 << 44) - 1) + ((bits >> numpy.uint64(45)) & numpy.uint64(1))
    return ((bits + half) & ~numpy.uint64((1 << 45) - 1)).view(numpy.float64)


@functools.cache
def reference_unit() -> float:
    """The unit roundoff of longdouble on this machine, in which the references of live cases are computed."""
    return float(numpy.finfo(numpy.longdouble).eps) / 2
