"""Groups of neighboring weights of one row that share a scale and, in some formats, an offset: common steps.

    w~ = a q + b          in place, one rounding for the product and one for the sum
    b' = b + delta        the offsets of W~ + delta, where delta is one number for each group
"""
from __future__ import annotations

from typing import Any, Callable, Mapping

import numpy

from minipeft.backend import Array
from minipeft.quant.scheme import Scheme, Shape

CHUNK = 2 ** 17  # weights encoded at a time, so that no temporary array is as large as a matrix


def group_count(scheme: Scheme, shape: Shape, size: int) -> int:
    """Groups of `size` columns in a matrix of `shape` [d_out, d_in]. Raises ValueError, naming the scheme, unless they
    are whole."""
    if not shape[0] or not shape[1]:
        raise ValueError(f"{scheme}: the matrix {list(shape)} is empty; expected at least one weight")
    if shape[1] % size:
        raise ValueError(f"{scheme}: {shape[1]} columns are not whole groups of {size}; expected a number of columns "
                         f"that {size} divides")
    return shape[1] // size


def by_rows(encode: Callable[[numpy.ndarray], Mapping[str, numpy.ndarray]], matrix: numpy.ndarray,
            leaves: Mapping[str, tuple[tuple[int, ...], numpy.dtype]]) -> dict[str, numpy.ndarray]:
    """{leaf: array} of `encode`, called with a few rows of `matrix` [d_out, d_in] at a time. leaves: {leaf: (shape,
    dtype)} of the whole. No number of a row depends on another row."""
    out = {leaf: numpy.empty(shape, dtype) for leaf, (shape, dtype) in leaves.items()}
    step = max(1, CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        for leaf, found in encode(matrix[start:start + step]).items():
            out[leaf][start:start + step] = found
    return out


def scaled(q: Array, scale: Array, offset: Array | None) -> Array:
    """scale q + offset, in place of q [n, d], which is floating-point; scale and offset [n, groups] in its dtype."""
    grouped = q.reshape(len(q), scale.shape[1], -1)
    grouped *= scale[..., None]
    if offset is not None:
        grouped += offset[..., None]
    return q


def per_group(scheme: Scheme, delta: numpy.ndarray, shape: tuple[int, int], groups: int) -> numpy.ndarray:
    """delta [d_out, n] as float64 [d_out, groups]: each of its n columns belongs to groups / n neighboring groups of
    the weight of `shape` [d_out, d_in]. Raises ValueError, naming the scheme, unless n divides groups and all is
    finite."""
    if delta.ndim != 2 or delta.shape[0] != shape[0] or not delta.shape[1] or groups % delta.shape[1]:
        raise ValueError(f"{scheme}: the change is {list(delta.shape)}, and the weight {list(shape)} has {groups} "
                         f"groups in a row; expected [{shape[0]}, n], where n divides {groups}")
    if not numpy.isfinite(delta).all():
        raise ValueError(f"{scheme}: the change holds NaN or infinity; expected finite numbers")
    return numpy.repeat(delta.astype("float64"), groups // delta.shape[1], axis=1)


def stored_as(scheme: Scheme, what: str, wanted: numpy.ndarray, dtype: Any) -> numpy.ndarray:
    """`wanted`, floating-point numbers [n, groups], in the `dtype` in which they are kept. Raises ValueError, naming
    the scheme and `what` the numbers are, for NaN, infinity, and a number that is too large for the dtype."""
    with numpy.errstate(over="ignore"):
        found = wanted.astype(dtype)
    if not numpy.isfinite(found).all():
        wrong = wanted[~numpy.isfinite(found)].flat[0]
        raise ValueError(f"{scheme}: {what} of a group is {wrong:.6g}, too large for {numpy.dtype(dtype)}; expected "
                         f"finite numbers of at most {float(numpy.finfo(dtype).max):.6g}")
    return found
