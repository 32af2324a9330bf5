"""The hollow array: a shape, a dtype, strides, and memory that is only counted.

    a @ b, a + b, a.sum(axis=0), a[ids]      a hollow array of the shape and dtype that NumPy's result has
    a.T, a[2:5], a.reshape(-1)               a view of the same memory, wherever NumPy gives a view
    a += b                                   a itself

There are no numbers, so a question about them gets the answer that it has in an ordinary training step: everything is
finite, `all` is true, `any` is false, and a number is 1.
"""
from __future__ import annotations

import math
from typing import Any

import numpy

from minipeft.tools.hollow.layout import Shape, contiguous, in_order, like, reshaped, resolved
from minipeft.tools.hollow.ledger import Ledger, Memory

_SCALARS = (bool, int, float, numpy.generic)
_HOST = 2 ** 16  # numbers of an integer array that `get` tells apart


class HollowArray:
    """An array without numbers. shape, dtype, strides (in bytes): as of a numpy.ndarray. memory: that of its owner.
    truth: the answer of `bool`."""

    __slots__ = ("shape", "dtype", "strides", "memory", "truth")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Shape, dtype: numpy.dtype, strides: Shape, memory: Memory, truth: bool = True):
        self.shape, self.dtype, self.strides, self.memory, self.truth = shape, dtype, strides, memory, truth

    # ---- attributes

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)
    nbytes = property(lambda self: self.size * self.dtype.itemsize)
    T = property(lambda self: self.transpose())

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return self.truth

    def __int__(self) -> int:
        return 1

    __index__ = __int__

    def __float__(self) -> float:
        return 1.0

    def item(self) -> Any:
        """A number of its kind: 1."""
        return 1.0 if self.dtype.kind == "f" else 1

    def get(self) -> Any:
        """A numpy.ndarray of its shape, which takes no memory. Integers differ from each other, as the ids of a batch
        may; all other numbers are 0."""
        if self.dtype.kind in "iu" and 1 < self.size <= _HOST:
            return numpy.arange(self.size, dtype="int64").astype(self.dtype).reshape(self.shape)
        return numpy.broadcast_to(numpy.zeros((), self.dtype), self.shape)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a hollow array has no numbers")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """numpy.float32(2) * a reaches NumPy first. Such an operation is allowed, and no other one."""
        if method != "__call__" or options or not isinstance(inputs[0], numpy.generic):
            raise TypeError(f"numpy.{ufunc.__name__} was given a hollow array")
        return elementwise(*inputs)

    # ---- views

    def view(self, shape: Shape, strides: Shape) -> "HollowArray":
        """An array of this `shape` and these `strides` in the same memory."""
        return HollowArray(shape, self.dtype, strides, self.memory)

    def transpose(self, *axes: Any) -> "HollowArray":
        """Its axes in the order `axes`, by default reversed: a view [...]."""
        given = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        order = [a % self.ndim for a in given] if given else range(self.ndim)[::-1]
        return self.view(tuple(self.shape[a] for a in order), tuple(self.strides[a] for a in order))

    def swapaxes(self, a: int, b: int) -> "HollowArray":
        """With the axes a and b exchanged: a view [...]."""
        order = list(range(self.ndim))
        order[a], order[b] = order[b], order[a]
        return self.transpose(order)

    def reshape(self, *shape: Any) -> "HollowArray":
        """Its numbers in another `shape`: a view where there can be one, else a copy."""
        new = resolved(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape, self.size)
        if contiguous(self.shape, self.strides, self.itemsize):
            return self.view(new, in_order(new, self.itemsize))
        strides = reshaped(self.shape, self.strides, new)
        return self.new(new) if strides is None else self.view(new, strides)

    def __getitem__(self, key: Any) -> "HollowArray":
        """A view for integers, slices, None and an ellipsis; new memory for arrays of integers."""
        keys = key if isinstance(key, tuple) else (key,)
        missing = self.ndim - sum(k is not None and k is not Ellipsis for k in keys)
        whole = (slice(None),) * missing
        if any(k is Ellipsis for k in keys):
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            keys = (*keys[:at], *whole, *keys[at + 1:])
        else:
            keys = (*keys, *whole)
        shape: list[int] = []
        strides: list[int] = []
        chosen: list[Shape] = []
        axis, place = 0, 0
        for k in keys:
            if k is None:
                shape.append(1)
                strides.append(0)
                continue
            n, step = self.shape[axis], self.strides[axis]
            axis += 1
            if isinstance(k, slice):
                shape.append(len(range(*k.indices(n))))
                strides.append(step * (k.step or 1))
            elif isinstance(k, (HollowArray, numpy.ndarray)):
                place = place if chosen else len(shape)
                chosen.append(k.shape)
        if chosen:
            return self.new((*shape[:place], *numpy.broadcast_shapes(*chosen), *shape[place:]))
        return self.view(tuple(shape), tuple(strides))

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing: there are no numbers to replace."""

    # ---- new memory

    def new(self, shape: Shape, dtype: Any = None, strides: Shape | None = None, truth: bool = True) -> "HollowArray":
        """A new array of this `shape`; by default of this dtype, and with its last axis innermost. strides, truth: as
        in the constructor."""
        return allocated(self.memory.ledger, shape, self.dtype if dtype is None else dtype, strides, truth)

    def copy(self) -> "HollowArray":
        """A copy [...]."""
        return self.new(self.shape)

    def astype(self, dtype: Any, copy: bool = True) -> "HollowArray":
        """In another dtype: a copy [...], unless it has that dtype and `copy` is False."""
        found = numpy.dtype(dtype)
        if found == self.dtype and not copy:
            return self
        return self.new(self.shape, found, like(self.shape, self.strides, found.itemsize))

    def clip(self, low: Any, high: Any) -> "HollowArray":
        """Clipped to `low` .. `high`, elementwise."""
        return elementwise(self, low, high)

    def cumsum(self, axis: int) -> "HollowArray":
        """Sums along `axis`, of the same shape."""
        return self.new(self.shape, _summed(self.dtype))

    def reduced(self, dtype: Any, axis: Any, keepdims: bool, truth: bool = True) -> "HollowArray":
        """The result of a reduction over `axis` (None: all), kept as 1 if `keepdims`: [...]. truth: as in the
        constructor."""
        axes = range(self.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        gone = {a % self.ndim for a in axes}
        return self.new(tuple(1 if i in gone else n for i, n in enumerate(self.shape) if keepdims or i not in gone),
                        dtype, truth=truth)


def _summed(dtype: numpy.dtype) -> numpy.dtype:
    return numpy.dtype("int64") if dtype.kind in "bi" and dtype.itemsize < 8 else dtype


def _reduction(dtype_of: Any, truth: bool = True) -> Any:
    def method(self: HollowArray, axis: Any = None, keepdims: bool = False) -> HollowArray:
        return self.reduced(dtype_of(self.dtype), axis, keepdims, truth)
    return method


def allocated(ledger: Ledger, shape: Any, dtype: Any, strides: Shape | None = None, truth: bool = True) -> HollowArray:
    """A new array of this `shape` and dtype, noted in the `ledger`. strides, truth: as of `HollowArray`."""
    shape = tuple(int(n) for n in shape) if isinstance(shape, (tuple, list)) else (int(shape),)
    dtype = numpy.dtype(dtype)
    strides = in_order(shape, dtype.itemsize) if strides is None else strides
    return HollowArray(shape, dtype, strides, Memory(ledger, math.prod(shape) * dtype.itemsize), truth)


def elementwise(*inputs: Any, out: Any = None, dtype: Any = None) -> HollowArray:
    """An operation on `inputs`, arrays and numbers, of which one at least is a hollow array, elementwise. out: the
    array that takes the result. dtype: of the result; by default that to which NumPy promotes the inputs. Raises
    TypeError for an array of another kind, ValueError for shapes that do not broadcast."""
    if out is not None:
        return out
    arrays = [x for x in inputs if isinstance(x, HollowArray)]
    for x in inputs:
        if not isinstance(x, (HollowArray, *_SCALARS)):
            raise TypeError(f"a hollow array meets {type(x).__name__}; expected hollow arrays and numbers")
    shape = numpy.broadcast_shapes(*(a.shape for a in arrays))
    if dtype is None:
        dtype = numpy.result_type(*(x.dtype if isinstance(x, HollowArray) else x for x in inputs))
    same = next((a for a in arrays if a.shape == shape and 0 not in a.strides), None)
    strides = None if same is None else like(shape, same.strides, numpy.dtype(dtype).itemsize)
    return arrays[0].new(shape, dtype, strides)


def product(a: HollowArray, b: HollowArray, out: Any = None) -> HollowArray:
    """a @ b.   a [..., m, k], b [..., k, n] -> [..., m, n]. out: the array that takes the result. Raises ValueError
    for shapes that do not fit."""
    if out is not None:
        return out
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul of {list(a.shape)} and {list(b.shape)}")
    lead = numpy.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new((*lead, a.shape[-2], b.shape[-1]), numpy.result_type(a.dtype, b.dtype))


def _install() -> None:
    def yields(b: Any) -> bool:
        """Whether the right-hand side has operators of its own, and says so, as a Tensor does."""
        return getattr(b, "__array_ufunc__", 0) is None

    def binary(dtype: Any) -> Any:
        return lambda a, b: NotImplemented if yields(b) else elementwise(a, b, dtype=dtype)

    def divided(a: HollowArray, b: Any) -> Any:
        return NotImplemented if yields(b) else elementwise(a, b, dtype="float64" if a.dtype.kind in "biu" else None)

    for name in ("add", "sub", "mul", "floordiv", "mod", "pow", "and", "or", "xor", "truediv"):
        forward = divided if name == "truediv" else binary(None)
        setattr(HollowArray, f"__{name}__", forward)
        setattr(HollowArray, f"__r{name}__", forward)
        setattr(HollowArray, f"__i{name}__", lambda a, b: a)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(HollowArray, f"__{name}__", binary("bool"))
    for name in ("neg", "abs", "invert", "pos"):
        setattr(HollowArray, f"__{name}__", lambda a: elementwise(a))
    setattr(HollowArray, "__matmul__", lambda a, b: NotImplemented if yields(b) else product(a, b))
    for name in ("sum", "mean", "max", "min", "prod"):
        setattr(HollowArray, name, _reduction(_summed if name in ("sum", "prod") else lambda dtype: dtype))
    for name in ("argmax", "argmin"):
        setattr(HollowArray, name, _reduction(lambda _: "int64"))
    setattr(HollowArray, "all", _reduction(lambda _: "bool"))
    setattr(HollowArray, "any", _reduction(lambda _: "bool", truth=False))


_install()
