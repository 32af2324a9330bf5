"""Gradients against central differences along random directions, in float64.

    <grad f(p), d>  =  d/dt f(p + t d) at t = 0  ~  D(h) = (f(p + h d) - f(p - h d)) / 2h  +  O(h^2)

Richardson extrapolation removes the h^2 term: R(h) = (4 D(h/2) - D(h)) / 3 has error O(h^4). The tolerance is the sum
of two parts, and nothing in it is tuned. Truncation: the difference of two extrapolations, |R(h) - R(h/2)|. It is about
the error of the worse one, R(h), while R(h/2) is the one used. Rounding of f: about u times the length of its sums
times the size of their terms, divided by the step; u = 2^-53. The size is |f| + sum |p df/dp|, because f alone may be
small where large terms cancel.

Where f has a kink within h, as a relu has, the extrapolations differ by far more, and that could hide a wrong gradient.
So h is halved, as in Ridders' method (1982, Advances in Engineering Software 4, 75-76), until they agree to within
rounding; beyond that no smaller step would do better. A gradient is judged at that step alone. Where they never agree,
or where the slopes on the two sides of the point itself differ, no derivative is found, and a ValueError says so.

One direction of a smooth function costs six evaluations, whatever the number of parameters. So many shapes can be
checked at little cost.
"""
from __future__ import annotations

import math
from typing import Callable, Mapping

import numpy

from minipeft.engine.stopped import Stopped, stopped
from minipeft.engine.tensor import Leaf, Tensor, leaves_of, value_and_grad
from minipeft.backend import to_device, to_host
from minipeft.checks import is_number, shown

_U = 2.0 ** -53
_ROUNDINGS = 2.0 ** 10  # roundings on the longest path through f, each of relative size u; generous for small models
_LEAST = 2.0 ** -24     # the smallest step; below it, rounding hides all but the first six digits
_SURE = 3               # pairs of extrapolations in a row must agree before a gradient is refused


def check_gradients(step: Callable[[], Tensor], params: Mapping[str, Leaf], rng: numpy.random.Generator,
                    each: bool = True, h: float = 2.0 ** -7) -> float:
    """Compare `value_and_grad(step, params)` with central differences; return the worst error / tolerance (<= 1).

    step: a function without arguments that returns the loss, a scalar. rng: draws the directions. each: one direction
    per parameter, so that a small gradient cannot hide behind a large one; False: one direction for all. h: the largest
    step along a direction of unit length. Values that pass `stop_gradient` are held fixed. Raises AssertionError
    naming the parameter whose gradient is wrong; ValueError naming it if it is not float64, or if the differences find
    no derivative at this point (a kink, or a random loss); ValueError for an h that is not a finite number > 0;
    TypeError for an rng that is not a numpy.random.Generator; and what `value_and_grad` raises."""
    for name, p in leaves_of(params).items():
        if p.dtype != numpy.float64:
            raise ValueError(f"{name} is {p.dtype}; gradients are checked in float64")
    if not isinstance(rng, numpy.random.Generator):
        raise TypeError(f"rng is {shown(rng)}; expected a numpy.random.Generator, as numpy.random.default_rng(seed) "
                        f"gives")
    if not is_number(h) or not h > 0:
        raise ValueError(f"h is {shown(h)}; expected a finite number > 0")
    memory = Stopped()
    token = stopped.set(memory)
    try:
        loss, grads = value_and_grad(step, params, training=False)
        terms = [abs(to_host(p.data) * to_host(grads[name])) for name, p in params.items()]
        size = abs(loss) + sum(float(t[numpy.isfinite(t)].sum()) for t in terms)  # a NaN fails below, with its name
        worst = 0.0
        for names in ([n] for n in params) if each else [list(params)]:
            f, directions = _along(step, {n: params[n] for n in names}, rng, memory)
            claimed = sum(float((to_host(grads[name]) * d).sum()) for name, d in directions.items())
            worst = max(worst, _check(_Differences(f, loss, size, h), claimed, ", ".join(names)))
        return worst
    finally:
        stopped.reset(token)


def _along(step: Callable[[], Tensor], params: Mapping[str, Leaf], rng: numpy.random.Generator,
           memory: Stopped) -> tuple[Callable[[float], float], dict[str, numpy.ndarray]]:
    """f, where f(t) is the loss at p + t d; and d, one random direction of unit length, {name: array}."""
    directions = {name: rng.standard_normal(p.shape) for name, p in params.items()}
    length = math.sqrt(sum(float((d * d).sum()) for d in directions.values())) or 1.0
    directions = {name: d / length for name, d in directions.items()}

    def f(t: float) -> float:
        kept = {name: p.data for name, p in params.items()}
        memory.replay = 0
        try:
            for name, p in params.items():
                p.data = kept[name] + t * to_device(directions[name])
            return float(to_host(step().data).item())
        finally:
            for name, p in params.items():
                p.data = kept[name]

    return f, directions


class _Differences:
    """f at +-h, +-h/2, +-h/4, ..., each evaluated when first needed. f0: f(0). size: the size of the terms of f."""

    def __init__(self, f: Callable[[float], float], f0: float, size: float, h: float):
        self.f, self.f0, self.size, self.h = f, f0, size, h
        self.values: list[tuple[float, float]] = []

    def at(self, i: int) -> tuple[float, float, float]:
        """s = h / 2^i, f(s), f(-s)."""
        while len(self.values) <= i:
            s = self.h / 2 ** len(self.values)
            self.values.append((self.f(s), self.f(-s)))
        return self.h / 2 ** i, *self.values[i]

    def judged(self, i: int, claimed: float) -> tuple[float, float, float]:
        """The error of a claimed slope against R(h / 2^(i+1)), and the tolerances for truncation and for rounding."""
        coarse, fine = self.slope(i), self.slope(i + 1)
        return abs(claimed - fine), abs(fine - coarse), self.rounding(i)

    def slope(self, i: int) -> float:
        """R(h / 2^i)."""
        (s, above, below), (half, near, nearer) = self.at(i), self.at(i + 1)
        return (4 * (near - nearer) / (2 * half) - (above - below) / (2 * s)) / 3

    def bend(self, i: int) -> float:
        """The slope right of 0 less that on the left, extrapolated: error O(h^2 / 4^i), O(h^3 / 8^i) if f is smooth."""
        gaps = [(above - 2 * self.f0 + below) / s for s, above, below in (self.at(i), self.at(i + 1))]
        return 2 * gaps[1] - gaps[0]

    def rounding(self, i: int) -> float:
        """The error in R(h / 2^(i+1)) that the roundings of f may cause."""
        largest = max(abs(v) for pair in self.values for v in pair)
        return _ROUNDINGS * _U * (largest + self.size) / (self.h / 2 ** (i + 2))

    def kinked(self, i: int) -> bool:
        """Whether the slopes on both sides differ by more than curvature and rounding can explain."""
        return abs(self.bend(i + 1)) > abs(self.bend(i + 1) - self.bend(i)) + 8 * self.rounding(i)


def _check(differences: _Differences, claimed: float, names: str) -> float:
    """error / tolerance at the largest step where extrapolations agree, because smaller steps suffer more rounding."""
    i, agreed = 0, 0
    while agreed < _SURE:
        if i and differences.h / 2 ** (i + 2) < _LEAST:
            raise ValueError(_NOWHERE.format(names=names, least=_LEAST))
        error, truncation, rounding = differences.judged(i, claimed)
        if not math.isfinite(error):
            raise _wrong(names, claimed, differences.slope(i + 1), truncation + rounding)
        agreed = agreed + 1 if truncation <= rounding else 0
        if agreed == 1 and error <= truncation + rounding:
            return error / (truncation + rounding) if error else 0.0
        i += 1
    first = i - _SURE
    error, truncation, rounding = differences.judged(first, claimed)
    tolerance = truncation + differences.judged(first + 1, claimed)[1] + rounding  # the two may have agreed by chance
    if error <= tolerance:
        return error / tolerance
    if differences.kinked(first):
        raise ValueError(_HERE.format(names=names, bend=differences.bend(first)))
    raise _wrong(names, claimed, differences.slope(first + 1), tolerance)


def _wrong(names: str, claimed: float, slope: float, tolerance: float) -> AssertionError:
    return AssertionError(f"gradient of {names}: along a random direction the VJP says {claimed!r}, central differences"
                          f" say {slope!r}; they differ by {abs(claimed - slope):.3g}, allowed {tolerance:.3g}")


_NOWHERE = ("{names}: the loss has no derivative here that differences could find: down to steps of {least:.2g} along "
            "a random direction no two extrapolations agree. Either it has a kink nearer than that (a relu near 0): "
            "move the parameters a little; or it changes from call to call (dropout): check a step without dropout")
_HERE = ("{names}: the loss has a kink at this very point (a relu at 0), where there is no derivative to compare with: "
         "its slopes on both sides differ by {bend:.3g} along a random direction. Move the parameters a little, for "
         "example by 0.01 times random numbers")
