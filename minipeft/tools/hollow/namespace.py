"""The namespace of hollow arrays, for `minipeft.use`: the library runs on it as it runs on NumPy and on CuPy.

    ledger = Ledger()
    with minipeft.use(Hollow(ledger)):
        loss, gradients = minipeft.value_and_grad(step, params)        nothing is computed; `ledger` has all the memory

It has the names that the library uses for arrays. Any other name raises AttributeError.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.tools.hollow.array import HollowArray, allocated, elementwise, product
from minipeft.tools.hollow.layout import contiguous
from minipeft.tools.hollow.ledger import Ledger

_ELEMENTWISE = """abs add clip copysign cos divide exp floor hypot ldexp log maximum minimum multiply negative power sin
sqrt square subtract tan tanh true_divide where""".split()
_TRUTHS = "equal greater greater_equal isfinite isinf isnan less less_equal logical_not not_equal".split()
_CONSTANTS = "bool_ dtype finfo float16 float32 float64 iinfo inf int32 int64 integer nan newaxis pi uint8".split()


class Hollow:
    """What `minipeft.use` takes: a module-like object. ledger: notes the memory of every array that is made here."""

    __name__ = "hollow"
    ndarray = HollowArray

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.lib = _Lib
        self.linalg = _Linalg

    def __getattr__(self, name: str) -> Any:
        if name in _CONSTANTS:
            return getattr(numpy, name)
        if name == "where":
            return lambda condition, a, b: elementwise(condition, a, b, dtype=self.result_type(a, b))
        if name in _ELEMENTWISE:
            return elementwise
        if name in _TRUTHS:
            return lambda *inputs, out=None: elementwise(*inputs, out=out, dtype="bool")
        raise AttributeError(f"hollow arrays have no {name!r}: nothing in the library used it so far")

    @staticmethod
    def result_type(*inputs: Any) -> numpy.dtype:
        """NumPy's dtype of the result of an operation on `inputs`: arrays, numbers, dtypes."""
        return numpy.result_type(*(x.dtype if isinstance(x, HollowArray) else x for x in inputs))

    # ---- new arrays

    def empty(self, shape: Any, dtype: Any = float) -> HollowArray:
        """A new array of this `shape`."""
        return allocated(self.ledger, shape, dtype)

    zeros = ones = empty

    def full(self, shape: Any, value: Any, dtype: Any = None) -> HollowArray:
        """A new array of this `shape`; `value` gives its dtype if none is given."""
        return self.empty(shape, numpy.asarray(value).dtype if dtype is None else dtype)

    def empty_like(self, a: HollowArray, dtype: Any = None) -> HollowArray:
        """A new array of the shape of a [...]."""
        return self.empty(a.shape, a.dtype if dtype is None else dtype)

    zeros_like = ones_like = empty_like

    def full_like(self, a: HollowArray, value: Any) -> HollowArray:
        """A new array of the shape of a [...], whatever the `value`."""
        return self.empty_like(a)

    def asarray(self, value: Any, dtype: Any = None) -> HollowArray:
        """The way in. A `value` of the host, an array or a number, gives a new array of its shape; a hollow one is
        itself."""
        if isinstance(value, HollowArray):
            return value
        host = numpy.asarray(value, dtype)
        return self.empty(host.shape, host.dtype)

    array = asarray

    def arange(self, *bounds: int) -> HollowArray:
        """As many integers as Python's range has for these `bounds`: [n]."""
        return self.empty((len(range(*map(int, bounds))),), "int64")

    def eye(self, n: int, dtype: Any = float) -> HollowArray:
        """[n, n]."""
        return self.empty((n, n), dtype)

    def tri(self, n: int, m: int, k: int = 0, dtype: Any = float) -> HollowArray:
        """[n, m], wherever the diagonal `k` is."""
        return self.empty((n, m), dtype)

    def concatenate(self, parts: Any, axis: int = 0) -> HollowArray:
        """The `parts` joined along `axis`: [.., sum n_i, ..]."""
        parts = list(parts)
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.empty(shape, self.result_type(*parts))

    def stack(self, parts: Any, axis: int = 0) -> HollowArray:
        """The `parts` [...] side by side along a new `axis`."""
        shape = list(parts[0].shape)
        shape.insert(axis, len(parts))
        return self.empty(shape, self.result_type(*parts))

    def tile(self, a: HollowArray, times: tuple[int, ...]) -> HollowArray:
        """a [...] repeated `times` along each axis."""
        shape = (1,) * (len(times) - a.ndim) + a.shape
        return self.empty([n * t for n, t in zip(shape, times)], a.dtype)

    def take_along_axis(self, a: HollowArray, indices: HollowArray, axis: int) -> HollowArray:
        """Numbers of a [...] along `axis`, of the shape of `indices`."""
        return self.empty(indices.shape, a.dtype)

    def cumsum(self, a: HollowArray, axis: int) -> HollowArray:
        """Sums of a [...] along `axis`, of the same shape."""
        return a.cumsum(axis)

    # ---- products, views, and what has no result

    def matmul(self, a: HollowArray, b: HollowArray, out: Any = None) -> HollowArray:
        """a @ b.   a [..., m, k], b [..., k, n] -> [..., m, n], in `out` if it is given."""
        return product(a, b, out)

    def einsum(self, pattern: str, a: HollowArray, b: HollowArray) -> HollowArray:
        """The sum of a b over the last axis: [..., n], [..., n] -> [...]. Raises ValueError for another `pattern`."""
        if pattern != "...i,...i->...":
            raise ValueError(f"einsum of {pattern!r}: nothing in the library used it so far")
        return self.empty(numpy.broadcast_shapes(a.shape, b.shape)[:-1], self.result_type(a, b))

    def broadcast_to(self, a: HollowArray, shape: Any) -> HollowArray:
        """A view of a [...] in a larger `shape`."""
        extra = len(shape) - a.ndim
        return a.view(tuple(shape), (0,) * extra + tuple(
            0 if n == 1 != m else s for n, m, s in zip(a.shape, shape[extra:], a.strides)))

    def ascontiguousarray(self, a: HollowArray) -> HollowArray:
        """a [...] itself if its numbers lie in order, else a copy."""
        return a if contiguous(a.shape, a.strides, a.itemsize) else a.copy()

    def copyto(self, target: Any, source: Any, where: Any = True) -> None:
        """Nothing: there are no numbers to write from `source` to `target`, or `where`."""


class _Linalg:
    @staticmethod
    def solve(a: HollowArray, b: HollowArray) -> HollowArray:
        return b.copy()


class _Lib:
    class stride_tricks:  # noqa: N801  (as NumPy spells it)
        @staticmethod
        def as_strided(x: HollowArray, shape: tuple, strides: tuple) -> HollowArray:
            return x.view(tuple(shape), tuple(strides))
