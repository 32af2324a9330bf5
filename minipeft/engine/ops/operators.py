"""Tensor.__add__ = add and its like: one table, so that `primitives.py` needs no class and `tensor.py` no ops."""
from typing import Any, Callable

from minipeft.engine.tensor import Tensor
from minipeft.engine.ops import primitives as p

_TABLE: dict[str, Callable[..., Any]] = {
    "__add__": p.add, "__radd__": lambda a, b: p.add(b, a),
    "__sub__": p.sub, "__rsub__": lambda a, b: p.sub(b, a),
    "__mul__": p.mul, "__rmul__": lambda a, b: p.mul(b, a),
    "__truediv__": p.div, "__rtruediv__": lambda a, b: p.div(b, a),
    "__matmul__": p.matmul, "__rmatmul__": lambda a, b: p.matmul(b, a),
    "__neg__": p.neg, "__pow__": lambda a, exponent: p.power(a, exponent=exponent),
    "__getitem__": lambda a, key: p.index(a, key=key),
    "sum": lambda a, axis=None, keepdims=False: p.sum(a, axis=axis, keepdims=keepdims),
    "mean": lambda a, axis=None, keepdims=False: p.mean(a, axis=axis, keepdims=keepdims),
    "reshape": lambda a, *shape: p.reshape(a, shape=shape[0] if isinstance(shape[0], tuple) else shape),
    "transpose": lambda a, *axes: p.transpose(a, axes=axes),
}

for _name, _function in _TABLE.items():
    setattr(Tensor, _name, _function)
setattr(Tensor, "__array_ufunc__", None)  # array + Tensor is Tensor.__radd__, not an object array
