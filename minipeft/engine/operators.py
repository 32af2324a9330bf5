"""The names of a Tensor's operators, for readers and type checkers. `ops/operators.py` sets them to ops."""
from __future__ import annotations

from typing import Any, Callable

Operator = Callable[..., Any]


class Operators:
    """a + b, a - b, a * b, a / b, a @ b, a ** n, -a, a[key], and the methods of an array that are ops."""

    __slots__ = ()
    __add__: Operator
    __radd__: Operator
    __sub__: Operator
    __rsub__: Operator
    __mul__: Operator
    __rmul__: Operator
    __truediv__: Operator
    __rtruediv__: Operator
    __matmul__: Operator
    __rmatmul__: Operator
    __pow__: Operator
    __neg__: Operator
    __getitem__: Operator
    sum: Operator
    mean: Operator
    reshape: Operator
    transpose: Operator
    mT: Any
