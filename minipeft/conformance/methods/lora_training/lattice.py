"""Tells whether a case is exact: whether the dtype holds every partial sum, in any order.

    x = q i, |x| <= M        q: a power of two, i: integers.   x y = (q q') i i' ;  x + y is a multiple of min(q, q')

Sums of the absolute values bound every partial sum. Where M / q < 2^p, with p the binary digits of the dtype, nothing
is rounded.
"""
from __future__ import annotations

from typing import Any, Callable

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.methods.lora_training.batches import steps_of
from minipeft.conformance.methods.lora_training.equations import train
from minipeft.conformance.methods.lora_training.field import Field
from minipeft.conformance.numbers import wide

_DIGITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
_LEAST = {"float16": -24}  # the least exponent of q that is accepted; -126 for others


class Rounded(Exception):
    """A number was rounded, or may have been."""


class Lattice:
    """Arrays on a lattice: value, most (M above, for any order of summation), and power (the exponent of q). The
    operators are those of NumPy arrays. Raises Rounded if the dtype may round."""

    __array_ufunc__ = None

    def __init__(self, value: Any, most: Any, power: int, dtype: str):
        self.value, self.most, self.power, self.dtype = wide(value), wide(most), power, dtype
        largest = float(numpy.max(self.most, initial=0))
        if largest >= 2.0 ** (power + _DIGITS[dtype]) or (largest and power < _LEAST.get(dtype, -126)):
            raise Rounded

    @classmethod
    def of(cls, x: Any, dtype: str) -> "Lattice":
        """An array as it is given, with the largest q that divides it."""
        return x if isinstance(x, Lattice) else cls(x, abs(wide(x)), _power(x), dtype)

    def _with(self, other: Any, f: Callable, power: Callable) -> "Lattice":
        other = Lattice.of(other, self.dtype)
        return Lattice(f(self.value, other.value), f(self.most, other.most), power(self.power, other.power), self.dtype)

    def _moved(self, f: Callable) -> "Lattice":
        return Lattice(f(self.value), f(self.most), self.power, self.dtype)

    @property
    def T(self) -> "Lattice":
        """The transpose."""
        return self._moved(lambda x: x.T)

    def sum(self) -> "Lattice":
        """The sum of all entries."""
        return self._moved(lambda x: x.sum())

    def __neg__(self) -> "Lattice":
        return Lattice(-self.value, self.most, self.power, self.dtype)

    def __add__(self, other: Any) -> "Lattice":
        return self._with(other, lambda x, y: x + y, min)

    def __rsub__(self, other: Any) -> "Lattice":
        return -self + other

    def __mul__(self, other: Any) -> "Lattice":
        return self._with(other, lambda x, y: x * y, lambda p, q: p + q)

    def __matmul__(self, other: Any) -> "Lattice":
        return self._with(other, lambda x, y: x @ y, lambda p, q: p + q)

    def __truediv__(self, other: Any) -> "Lattice":
        """Raises Rounded for a divisor that is no power of two."""
        divisor = float(other.value if isinstance(other, Lattice) else other)
        fraction, power = numpy.frexp(divisor)
        if abs(fraction) != 0.5:
            raise Rounded
        return Lattice(self.value / divisor, self.most / abs(divisor), self.power - int(power) + 1, self.dtype)

    __radd__, __rmul__ = __add__, __mul__


def _power(x: Any) -> int:
    """The exponent of the largest power of two that divides every entry."""
    entries = numpy.unique(abs(numpy.asarray(x, numpy.float64)))
    ratios = [float(entry).as_integer_ratio() for entry in entries if entry]
    return min((_trailing(top) - bottom.bit_length() + 1 for top, bottom in ratios), default=0)


def _trailing(n: int) -> int:
    return (n & -n).bit_length() - 1


class _Exact(Field):
    """The field of Lattice: it raises Rounded as soon as a number may be rounded."""

    def __init__(self, dtype: str):
        self.dtype = dtype

    def array(self, x: Any) -> Lattice:
        """x on its lattice."""
        return Lattice.of(x, self.dtype)

    scalar = array

    def norm(self, a: Any, b: Any) -> Any:
        """None: norms are not compared bit for bit."""
        return None


def stays_exact(case: Case) -> bool:
    """Whether no number of the case is ever rounded: under SGD without clipping at a constant learning rate, on dyadic
    numbers, for as many steps as the dtype has digits for. Other schedules may be stepped, the last rate times a
    quotient, which rounds. The numbers of tokens of every step and of every micro-batch must be powers of two: an
    implementation may divide by either."""
    p = case.params
    if p["optimizer"] != "sgd" or p.get("clip") is not None or p["schedule"] != "constant":
        return False
    steps = steps_of(case)
    tokens = [n for parts in steps for n in [sum(w.sum() for _, _, w in parts), *(w.sum() for _, _, w in parts)]]
    try:
        return all(numpy.frexp(n)[0] == 0.5 for n in tokens) and bool(train(case, _Exact(case.dtype)))
    except Rounded:
        return False
