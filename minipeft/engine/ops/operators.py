"""Tensor.__add__ = add and the like, in one table, so that `primitives.py` needs no class and `tensor.py` no ops.

A number beside a Tensor takes the Tensor's own kind, so that float32 stays float32 and Fractions stay exact.
"""
import math
from fractions import Fraction
from numbers import Rational, Real
from typing import Any, Callable

from minipeft.engine.ops import primitives as p
from minipeft.engine.tensor import Tensor


def alike(number: Any, x: Tensor) -> Any:
    """`number` (Python's, a Fraction, a NumPy scalar) as a float where x [...] holds floating-point numbers, and as a
    Fraction where x holds objects. Beside integers and booleans it stays as it is. So do infinities and NaN beside
    objects, and anything that is not a real number."""
    if not isinstance(number, Real) or x.dtype.kind not in "fO":
        return number
    if x.dtype.kind == "f":
        return float(number)
    if isinstance(number, Rational):
        return Fraction(number)
    return Fraction(float(number)) if math.isfinite(number) else number


def _both(op: Callable[[Any, Any], Tensor]) -> tuple[Callable, Callable]:
    """The operator with the Tensor on its left, and with the Tensor on its right."""
    return lambda a, b: op(a, alike(b, a)), lambda a, b: op(alike(b, a), a)


_add, _radd = _both(p.add)
_sub, _rsub = _both(p.sub)
_mul, _rmul = _both(p.mul)
_div, _rdiv = _both(p.div)

_TABLE: dict[str, Any] = {
    "__add__": _add, "__radd__": _radd, "__sub__": _sub, "__rsub__": _rsub,
    "__mul__": _mul, "__rmul__": _rmul, "__truediv__": _div, "__rtruediv__": _rdiv,
    "__matmul__": lambda a, b: p.matmul(a, b), "__rmatmul__": lambda a, b: p.matmul(b, a),
    "__neg__": lambda a: p.neg(a), "__pow__": lambda a, exponent: p.power(a, exponent=alike(exponent, a)),
    "__getitem__": lambda a, key: p.index(a, key=key),
    "mT": property(lambda a: p.matrix_transpose(a)),
    "sum": lambda a, axis=None, keepdims=False: p.sum(a, axis=axis, keepdims=keepdims),
    "mean": lambda a, axis=None, keepdims=False: p.mean(a, axis=axis, keepdims=keepdims),
    "reshape": lambda a, *shape: p.reshape(a, shape=shape[0] if isinstance(shape[0], tuple) else shape),
    "transpose": lambda a, *axes: p.transpose(a, axes=axes),
}

for _name, _function in _TABLE.items():
    setattr(Tensor, _name, _function)
setattr(Tensor, "__array_ufunc__", None)  # array + Tensor is Tensor.__radd__, not an object array
