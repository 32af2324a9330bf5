"""A strict array namespace: NumPy's results behind CuPy's manners, for machines without a GPU.

    with minipeft.use(strict): ...        strict.asarray(host_array) moves in, array.get() moves out, nothing else does

`strict.ndarray` wraps a numpy.ndarray and is none. It refuses every item of the difference list of `minipeft.backend`
that can be refused, where CuPy would raise, copy, wrap or vary silently:

    numpy.asarray(a), numpy.exp(a), a + host_array     TypeError: no silent conversion, no mixture
    a[ids] with an id out of range                     IndexError, where CuPy wraps
    a[ids] = v with an id twice                        ValueError: on a GPU the order of the writes is open
    object arrays, also of Fraction                    ValueError
    float32 with a float64 scalar or array             TypeError, where NumPy and CuPy promote
    errstate, frompyfunc, spacing, random, erf, ...    AttributeError: names that CuPy lacks, or that we do not use
    add.reduceat, add.at                               AttributeError
    linalg.solve of a singular matrix                  infinities, where NumPy raises

Reductions and a[0] give arrays of no axes, never scalars; `empty` is full of NaN. Only what is listed in _FUNCTIONS
exists; a test with CuPy at hand holds that list against it. The arithmetic is NumPy's, so results are too, bit for bit.
"""
from __future__ import annotations

from typing import Any

import numpy

_FLOAT32, _FLOAT64 = numpy.dtype("float32"), numpy.dtype("float64")
_SCALARS = (bool, int, float, numpy.generic)


class StrictArray:
    """`strict.ndarray`. `_host` is the numpy.ndarray inside, which nobody outside this file touches."""

    __slots__ = ("_host",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: Any):
        if host.dtype.kind not in "biuf":
            raise ValueError(f"strict arrays do not hold dtype {host.dtype}")
        self._host = host

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    T = property(lambda self: _out(self._host.T))

    # ---- out of the library, explicitly

    def get(self) -> Any:
        """A copy on the host."""
        return self._host.copy()

    def item(self) -> Any:
        return self._host.item()

    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __float__(self) -> float:
        return float(self._host)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"strict.{self._host!r}"

    def __deepcopy__(self, memo: dict) -> "StrictArray":
        return StrictArray(self._host.copy())

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a strict array is not converted silently; use .get()")

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was given a strict array")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """numpy.float32(2) * a reaches NumPy first; that alone is let through."""
        if method == "__call__" and len(inputs) == 2 and isinstance(inputs[0], numpy.generic) and not options:
            return _elementwise(ufunc, *inputs)
        raise TypeError(f"numpy.{ufunc.__name__} was given a strict array")

    # ---- indexing

    def __getitem__(self, key: Any) -> "StrictArray":
        return _out(self._host[_key(self._host, key, writes=False)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[_key(self._host, key, writes=True)] = _in(value)

    # ---- methods; each gives an array, also of no axes

    def get_method(name: str) -> Any:  # type: ignore[misc]  # noqa: N805
        def method(self: "StrictArray", *args: Any, **options: Any) -> "StrictArray":
            return _out(getattr(self._host, name)(*_in(args), **_in(options)))
        method.__name__ = name
        return method

    for _name in ("reshape", "transpose", "swapaxes", "sum", "mean", "max", "min", "prod", "argmax", "argmin", "any",
                  "all", "copy", "ravel", "squeeze", "clip", "round", "cumsum", "argsort", "astype"):
        locals()[_name] = get_method(_name)
    del _name, get_method


def _out(result: Any) -> Any:
    """What NumPy computed, as a strict array: scalars become arrays of no axes."""
    if isinstance(result, (list, tuple)):
        return type(result)(map(_out, result))
    return StrictArray(numpy.asarray(result))


def _in(value: Any) -> Any:
    """An argument for NumPy: strict arrays unwrapped, in tuples, lists and dicts too; host arrays refused."""
    if isinstance(value, StrictArray):
        return value._host
    if isinstance(value, numpy.ndarray):
        raise TypeError("a numpy.ndarray was given where a strict array is expected: host and device do not mix")
    if isinstance(value, (list, tuple)):
        return type(value)(map(_in, value))
    if isinstance(value, dict):
        return {name: _in(v) for name, v in value.items()}
    return value


def _key(host: Any, key: Any, writes: bool) -> Any:
    """An index, its integer arrays checked against the axes that they index."""
    parts = list(key) if isinstance(key, tuple) else [key]
    axes, arrays = 0, []
    consumed = sum(_in(k).ndim if isinstance(k, StrictArray) and k.dtype == bool else k is not None
                   for k in parts if k is not Ellipsis)
    for k in parts:
        if isinstance(k, (list, numpy.ndarray)):
            raise TypeError(f"a {type(k).__name__} does not index a strict array")
        if k is Ellipsis:
            axes += host.ndim - consumed
        elif isinstance(k, StrictArray) and k.dtype == bool:
            axes += k.ndim
        elif isinstance(k, StrictArray):
            n, found = host.shape[axes], k._host
            if found.size and not (-n <= found.min() and found.max() < n):
                raise IndexError(f"index {found.min()} .. {found.max()} on an axis of {n}: CuPy would wrap silently")
            arrays.append(found.astype("int64") % n if n else found)
            axes += 1
        elif k is not None:
            axes += 1
    if writes and arrays:
        places = numpy.stack([a.reshape(-1) for a in numpy.broadcast_arrays(*arrays)])
        if len(numpy.unique(places, axis=1).T) != places.shape[1]:
            raise ValueError("a scatter writes one element twice: on a GPU the order is open")
    return _in(key)


def _elementwise(ufunc: Any, *inputs: Any, out: Any = None) -> Any:
    """A ufunc on strict arrays and scalars, of which at least one is an array."""
    for x in inputs:
        if not isinstance(x, (StrictArray, *_SCALARS)):
            raise TypeError(f"{ufunc.__name__} of a strict array and {type(x).__name__}")
    if not any(isinstance(x, StrictArray) for x in inputs):
        raise TypeError(f"strict.{ufunc.__name__} was given no strict array")
    hosts = [_in(x) for x in inputs]
    kinds = [x.dtype for x in hosts if hasattr(x, "dtype")]
    if _FLOAT32 in kinds and numpy.result_type(*hosts) == _FLOAT64:
        raise TypeError(f"{ufunc.__name__} would promote float32 to float64 ({', '.join(map(str, kinds))})")
    if out is None:
        return _out(ufunc(*hosts))
    if not isinstance(out, StrictArray):
        raise TypeError(f"{ufunc.__name__}: out is {type(out).__name__}")
    ufunc(*hosts, out=out._host)
    return out


def _function(function: Any, args: tuple, options: dict) -> Any:
    """Any other function, on strict arrays alone; float32 does not become float64 there either."""
    hosts, named = _in(args), _in(options)
    found = _out(function(*hosts, **named))
    flat = [x for a in hosts for x in (a if isinstance(a, (list, tuple)) else [a])]
    given = [x.dtype for x in flat if isinstance(x, (numpy.ndarray, numpy.generic))]
    if _FLOAT32 in given and isinstance(found, StrictArray) and found.dtype == _FLOAT64 and "dtype" not in options:
        raise TypeError(f"{function.__name__} would promote float32 to float64 ({', '.join(map(str, given))})")
    return found


def _install_operators() -> None:
    def yields(b: Any) -> bool:
        """Whether the right-hand side has operators of its own, and says so, as a Tensor does."""
        return getattr(b, "__array_ufunc__", 0) is None

    def binary(ufunc: Any) -> Any:
        return lambda a, b: NotImplemented if yields(b) else _elementwise(ufunc, a, b)

    def reflected(ufunc: Any) -> Any:
        return lambda a, b: NotImplemented if yields(b) else _elementwise(ufunc, b, a)

    def in_place(ufunc: Any) -> Any:
        return lambda a, b: _elementwise(ufunc, a, b, out=a)

    def unary(ufunc: Any) -> Any:
        return lambda a: _elementwise(ufunc, a)

    for name, ufunc in {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply, "truediv": numpy.true_divide,
                        "floordiv": numpy.floor_divide, "mod": numpy.remainder, "pow": numpy.power,
                        "matmul": numpy.matmul, "and": numpy.bitwise_and, "or": numpy.bitwise_or,
                        "xor": numpy.bitwise_xor, "lshift": numpy.left_shift, "rshift": numpy.right_shift}.items():
        setattr(StrictArray, f"__{name}__", binary(ufunc))
        setattr(StrictArray, f"__r{name}__", reflected(ufunc))
        setattr(StrictArray, f"__i{name}__", in_place(ufunc))
    for name, ufunc in {"lt": numpy.less, "le": numpy.less_equal, "gt": numpy.greater, "ge": numpy.greater_equal,
                        "eq": numpy.equal, "ne": numpy.not_equal}.items():
        setattr(StrictArray, f"__{name}__", binary(ufunc))
    for name, ufunc in {"neg": numpy.negative, "abs": numpy.absolute, "invert": numpy.invert}.items():
        setattr(StrictArray, f"__{name}__", unary(ufunc))


_install_operators()
StrictArray.__module__, StrictArray.__qualname__ = "strict", "ndarray"

_UFUNCS = """abs add arctan copysign cos cosh divide equal exp exp2 expm1 floor floor_divide greater greater_equal
hypot invert isfinite isinf isnan less less_equal log log1p log2 logical_and logical_not logical_or maximum minimum
multiply negative not_equal power remainder rint sign sin sinh sqrt square subtract tan tanh true_divide""".split()
_FUNCTIONS = """all any arange argmax argmin argsort ascontiguousarray atleast_2d broadcast_to clip concatenate
count_nonzero cumsum diag einsum empty_like expand_dims eye flip frexp full full_like ldexp linspace matmul max
mean min moveaxis nonzero ones ones_like outer pad prod repeat reshape roll searchsorted sort split squeeze stack
sum swapaxes take take_along_axis tile transpose tri tril triu unique var where zeros zeros_like""".split()
_CONSTANTS = """bool_ dtype finfo float16 float32 float64 floating iinfo inf int16 int32 int64 int8 integer issubdtype
nan newaxis pi result_type uint16 uint32 uint64 uint8""".split()


class StrictNamespace:
    """What `minipeft.use` takes: a module-like object. Names are those of the lists above, and no others."""

    __name__ = "strict"
    ndarray = StrictArray
    offered = frozenset(["asarray", "array", "copyto", "empty", "lib", "linalg", "may_share_memory", "ndarray",
                         *_UFUNCS, *_FUNCTIONS, *_CONSTANTS])

    def __getattr__(self, name: str) -> Any:
        if name in _CONSTANTS:
            return getattr(numpy, name)
        if name in _UFUNCS:
            return lambda *inputs, out=None: _elementwise(getattr(numpy, name), *inputs, out=out)
        if name in _FUNCTIONS:
            return lambda *args, **options: _function(getattr(numpy, name), args, options)
        raise AttributeError(f"the strict namespace has no {name!r}: either CuPy lacks it, or nothing used it so far; "
                             f"if CuPy has it, add it to tests/strict_namespace.py")

    @staticmethod
    def asarray(value: Any, dtype: Any = None) -> StrictArray:
        """The way in: host arrays are copied, strict arrays are themselves."""
        if isinstance(value, StrictArray) and dtype in (None, value.dtype):
            return value
        return StrictArray(numpy.array(value._host if isinstance(value, StrictArray) else value, dtype=dtype))

    @staticmethod
    def array(value: Any, dtype: Any = None) -> StrictArray:
        """A copy, always."""
        return StrictArray(numpy.array(value._host if isinstance(value, StrictArray) else value, dtype=dtype))

    @staticmethod
    def copyto(target: StrictArray, source: StrictArray, where: StrictArray) -> None:
        """Writes into `target`, of one dtype with `source`."""
        if target.dtype != source.dtype:
            raise TypeError(f"copyto of {source.dtype} into {target.dtype}")
        numpy.copyto(_in(target), _in(source), where=_in(where))

    class lib:  # noqa: N801  (as NumPy and CuPy spell it)
        class stride_tricks:  # noqa: N801
            @staticmethod
            def as_strided(x: StrictArray, shape: tuple, strides: tuple) -> StrictArray:
                """A view, as in CuPy, which has no `writeable`."""
                return StrictArray(numpy.lib.stride_tricks.as_strided(_in(x), shape, strides, writeable=False))

    class linalg:  # noqa: N801
        @staticmethod
        def solve(a: StrictArray, b: StrictArray) -> StrictArray:
            """As CuPy: leading axes do not broadcast, and a singular matrix raises nothing and gives infinities."""
            if a.shape[:-1] != b.shape[:-1]:
                raise ValueError(f"linalg.solve of {list(a.shape)} and {list(b.shape)}: CuPy does not broadcast here")
            try:
                return _function(numpy.linalg.solve, (a, b), {})
            except numpy.linalg.LinAlgError:
                return _out(numpy.full(b.shape, numpy.inf, b.dtype))

    @staticmethod
    def may_share_memory(a: StrictArray, b: StrictArray) -> bool:
        """A bool of Python, as of CuPy."""
        return numpy.may_share_memory(_in(a), _in(b))

    @staticmethod
    def empty(shape: Any, dtype: Any = float) -> StrictArray:
        """Full of NaN (of ones, for integers): who reads before writing is seen."""
        return StrictArray(numpy.full(shape, numpy.nan if numpy.dtype(dtype).kind == "f" else 1, dtype))


strict: Any = StrictNamespace()
