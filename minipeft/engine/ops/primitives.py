"""The primitives: forward, then one VJP per input. g is the gradient of the loss with respect to the output.

Nothing here assumes a dtype: polynomial primitives also run on object arrays of `fractions.Fraction`. A broadcast
input's VJP may return the broadcast shape; the engine sums it to the input's (`engine.tensor.sum_to`).
"""
from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy

from minipeft.engine.tensor import Tensor, array_of, op
from minipeft.backend import Array, scalar, to_host, xp
from minipeft.engine.ops.erf import erf_of


@op
def add(a, b):
    """a + b, elementwise, broadcast;   da = g,   db = g."""
    return a + b, (lambda g: g, lambda g: g)


@op
def sub(a, b):
    """a - b, elementwise, broadcast;   da = g,   db = -g."""
    return a - b, (lambda g: g, lambda g: -g)


@op
def mul(a, b):
    """a * b, elementwise, broadcast;   da = g b,   db = g a."""
    return a * b, (lambda g: g * b, lambda g: g * a)


@op
def div(a, b):
    """a / b, elementwise, broadcast;   da = g / b,   db = -g a / b^2."""
    return a / b, (lambda g: g / b, lambda g: -g * a / (b * b))


@op
def neg(a):
    """-a, elementwise;   da = -g."""
    return -a, (lambda g: -g,)


@op
def power(a, *, exponent):
    """a^n, elementwise, for a constant n = exponent;   da = g n a^(n-1), and 0 where n is 0, also at a = 0."""
    return a ** exponent, (lambda g: g * exponent * a ** (exponent - 1) if exponent else g * 0,)


@op
def exp(a):
    """e^a, elementwise;   da = g e^a."""
    out = xp.exp(a)
    return out, (lambda g: g * out,)


@op
def log(a):
    """ln a, elementwise;   da = g / a."""
    return xp.log(a), (lambda g: g / a,)


@op
def tanh(a):
    """tanh a, elementwise;   da = g (1 - tanh^2 a)."""
    out = xp.tanh(a)
    return out, (lambda g: g * (1 - out * out),)


@op
def erf(a):
    """2/sqrt(pi) * integral of exp(-t^2) from 0 to a, elementwise;   da = g 2/sqrt(pi) exp(-a^2)."""
    return erf_of(a), (lambda g: g * (2 / math.sqrt(math.pi)) * xp.exp(-a * a),)


@op
def relu(a):
    """max(a, 0), elementwise;   da = g where a > 0, else 0."""
    positive = a > 0
    return xp.maximum(a, scalar(Fraction(0), a)), (lambda g: g * positive,)


@op
def where(condition, a, b):
    """a where the boolean array `condition` holds, else b, elementwise;   da = g where it holds, db = g where not."""
    return xp.where(condition, a, b), (None, lambda g: g * condition, lambda g: g * ~condition)


@op
def matmul(a, b):
    """[..., m, k] @ [..., k, n] -> [..., m, n];   da = g b^T,   db = a^T g.

    Raises ValueError for fewer than two axes."""
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"matmul: shapes {list(a.shape)} and {list(b.shape)}; expected two axes or more (reshape)")
    return a @ b, (lambda g: g @ b.swapaxes(-1, -2), lambda g: a.swapaxes(-1, -2) @ g)


@op
def matrix_transpose(a):
    """[..., m, n] -> [..., n, m];   da = g transposed likewise."""
    return a.swapaxes(-1, -2), (lambda g: g.swapaxes(-1, -2),)


@op
def transpose(a, *, axes):
    """a [...] of any shape, its axes in the order `axes`;   da = g, its axes put back."""
    inverse = tuple(sorted(range(len(axes)), key=lambda i: axes[i] % len(axes)))
    return a.transpose(axes), (lambda g: g.transpose(inverse),)


@op
def reshape(a, *, shape):
    """The numbers of a [...] in another `shape`;   da = g in the old one."""
    old = a.shape
    return a.reshape(shape), (lambda g: g.reshape(old),)


@op
def sum(a, *, axis=None, keepdims=False):
    """Sum of a [...] over `axis` (None: all), kept as 1 if `keepdims`;   da = g spread over the summed axes."""
    old = a.shape
    kept = _kept_shape(old, axis)
    return a.sum(axis=axis, keepdims=keepdims), (lambda g: xp.broadcast_to(xp.asarray(g).reshape(kept), old),)


def mean(a: Any, axis: Any = None, keepdims: bool = False) -> Tensor:
    """Mean of a [...] over axis, keepdims as in `sum`. It is sum / count, with the count in the array's own kind, so
    that object arrays stay exact (an int / an int would be a float)."""
    old = array_of(a).shape
    count = math.prod(n for n, kept in zip(old, _kept_shape(old, axis)) if kept == 1)
    total = sum(a, axis=axis, keepdims=keepdims)
    return div(total, scalar(Fraction(count), total))


def _kept_shape(shape: tuple, axis: Any) -> tuple:
    """`shape` with the summed axes as 1."""
    axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    summed = {a % len(shape) for a in axes}
    return tuple(1 if i in summed else n for i, n in enumerate(shape))


@op
def index(a, *, key):
    """a[key] of an a [...], for integers and slices, or one array of distinct indices >= 0;   da = g at key, else 0.

    Raises ValueError for repeated indices, whose gradients would be lost (use `embedding`), and for several arrays."""
    old = a.shape
    arrays = [to_host(k) for k in (key if isinstance(key, tuple) else (key,))
              if hasattr(k, "dtype") or isinstance(k, (list, tuple, range))]
    if any(k.dtype != bool and (len(arrays) > 1 or len(numpy.unique(k)) < k.size) for k in arrays):
        raise ValueError("index: indices repeat, or come in several arrays; ops.embedding looks rows up")

    def vjp(g: Array) -> Array:
        out = xp.zeros(old, dtype=g.dtype)
        out[key] = g[()]  # a 0-d g becomes a number: an object array would store the array itself
        return out

    return a[key], (vjp,)


@op
def scatter(a, indices, *, shape):
    """Zeros of `shape`, except a [n] at the flat `indices` [n], distinct and in range;   da = g at these."""
    out = xp.zeros(shape, dtype=a.dtype)
    out.reshape(-1)[indices] = a
    return out, (lambda g: g.reshape(-1)[indices], None)


@op
def concat(*parts, axis=0):
    """parts [.., n_i, ..] joined along `axis` -> [.., sum n_i, ..];   each part's gradient is its slice of g."""
    ends = numpy.cumsum([part.shape[axis] for part in parts])
    axis = axis % parts[0].ndim

    def vjp_of(start: int, end: int):
        return lambda g: g[(slice(None),) * axis + (slice(start, end),)]

    return xp.concatenate(parts, axis=axis), tuple(
        vjp_of(int(end) - part.shape[axis], int(end)) for part, end in zip(parts, ends))
