"""The array namespace `xp`: NumPy on the host, CuPy on a GPU, or any module with the same names.

    from minipeft.backend import xp            xp.exp(x) is numpy.exp(x) or cupy.exp(x)
    with use("cupy"): ...                      inside the block, and in this thread or task only

The code of an operation never asks which library it runs on. It does not need to: NumPy and CuPy differ in few ways,
all of them are listed here, and each is handled as the arrow says. The tests use a strict namespace, a NumPy that
refuses whatever CuPy would refuse.

 1. Indices out of range: NumPy raises, CuPy wraps silently.      -> token ids are range-checked on the host
                                                                     (`nn.inputs.check_ids`) before they are moved.
 2. Scatter-add: CuPy's is atomic, its summation order varies.    -> `engine.ops.fused.embedding` sorts ids and adds
                                                                     segments.
 3. Random streams differ for one seed.                           -> numbers are drawn by a host numpy.random.Generator
                                                                     and moved; `xp.random` is not used at all.
 4. Reductions: NumPy returns scalars, CuPy 0-d arrays.           -> `@op` wraps every result with `xp.asarray`.
 5. No implicit copy to the host: numpy.asarray(cupy_array) and   -> `to_host` and `to_device`, explicit, at the edge.
    numpy functions on CuPy arrays raise or change library.
 6. Host and device arrays do not mix in one operation.           -> `@op` says which input lives where.
 7. CuPy has no object arrays (no `Fraction`).                    -> exact laws run on NumPy only.
 8. CuPy lacks erf in its main namespace, errstate, frompyfunc.   -> `engine.ops.erf` is written here, once, for both.
 9. NumPy 2 promotes float32 * numpy.float64 scalar to float64.   -> scalars are Python floats (math.sqrt, never
                                                                     np.sqrt(int)) or `scalar(value, like)`.
10. ufunc.reduceat: older CuPy lacks it, and no document says    -> `segment_sum`, below, adds runs of rows in an
    in which order a newer one adds.                                 order of its own there.
"""
from __future__ import annotations

import contextlib
import contextvars
import ctypes
import importlib
import os
from typing import Any, Iterator

import numpy

Array = Any  # an array of whichever namespace is in use
_NAMES = ("numpy", "cupy")


def resolve(backend: Any) -> Any:
    """The namespace for `backend`: "numpy", "cupy", or a module-like object, which is returned as it is.

    Raises ValueError for another name, TypeError for an object that is no array namespace, and ImportError or
    RuntimeError, saying what to do, where CuPy cannot run."""
    if not isinstance(backend, str):
        if not hasattr(backend, "ndarray"):
            raise TypeError(f"backend is {type(backend).__name__}; expected 'numpy', 'cupy' or an array namespace")
        return backend
    if backend not in _NAMES:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(_NAMES)}, or an array namespace")
    if backend == "numpy":
        return numpy
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError("backend 'cupy' needs CuPy: pip install 'minipeft[cuda12]' or 'minipeft[cuda13]', "
                          "whichever matches the CUDA driver") from error
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises a type of its own, which cannot be named without importing it
        raise RuntimeError(f"backend 'cupy': CuPy is installed but finds no usable GPU ({error})") from error
    return cupy


_current: contextvars.ContextVar[Any] = contextvars.ContextVar("minipeft_backend", default=None)


def namespace() -> Any:
    """The namespace in use: that of the innermost `use`, else that of the environment variable MINIPEFT_BACKEND, else
    NumPy."""
    current = _current.get()
    if current is None:
        current = resolve(os.environ.get("MINIPEFT_BACKEND") or "numpy")
        _current.set(current)
    return current


class _Namespace:
    """`xp`: looks each name up in the namespace in use."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_current.get() or namespace(), name)


xp: Any = _Namespace()


@contextlib.contextmanager
def use(backend: Any) -> Iterator[Any]:
    """Run the block on `backend` ("numpy", "cupy" or a namespace). `model.to(backend)` moves a model. Raises as
    `resolve` does."""
    found = resolve(backend)
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)


def to_host(array: Array) -> Any:
    """`array`, of any shape, as a NumPy array. A device array is copied, a NumPy array is not."""
    if isinstance(array, (numpy.ndarray, numpy.generic)):
        return numpy.asarray(array)
    return array.get() if hasattr(array, "get") else numpy.asarray(array)


def to_device(array: Array, where: Any = None) -> Array:
    """`array`, of any shape, as an array of the namespace `where`, by default the one in use. An array that is already
    there is not copied."""
    target = namespace() if where is None else resolve(where)
    if isinstance(array, target.ndarray):
        return array
    return target.asarray(to_host(array))


def scalar(value: Any, like: Array) -> Any:
    """`value` as a scalar of the dtype of `like`: float32 arrays stay float32, Fraction arrays stay exact."""
    return like.dtype.type(value)


def segment_sum(rows: Array, starts: Any) -> Array:
    """Sums of consecutive runs of `rows` [n, d]; run i begins at row starts[i] (host integers) -> [runs, d].

    The order of the additions within a run is fixed, and so are the bits of the sum. Off NumPy the order is a tree:
    log2(longest run) passes over all rows. The first adds to each row the row before it, if that is in the same run;
    the next ones the row 2, 4, 8, ... before it. After them the last row of a run holds its sum."""
    if len(starts) == 0:
        return rows[:0]
    if namespace() is numpy:
        return numpy.add.reduceat(rows, starts, axis=0)
    ends = numpy.append(starts[1:], rows.shape[0])
    run = numpy.repeat(numpy.arange(len(starts)), ends - starts)
    sums, reach = rows.copy(), 1
    while reach < max(ends - starts):
        same = to_device((run[reach:] == run[:-reach])[:, None])
        sums[reach:] += xp.where(same, sums[:-reach], xp.zeros((), rows.dtype))
        reach *= 2
    return sums[to_device(ends - 1)]


def keep_heap() -> bool:
    """Ask glibc to keep freed memory: no mmap for large arrays, no trimming. True if it was done (glibc only).

    Training frees and allocates the same large arrays at every step, and mapping fresh pages takes up to a quarter of
    its time. The setting is process-wide, so programs call this, and an import never does."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))
