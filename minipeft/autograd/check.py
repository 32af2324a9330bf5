"""Gradients against central differences along random directions, in float64.

    <grad f(p), d>  =  d/dt f(p + t d) at t = 0  ~  D(h) = (f(p + h d) - f(p - h d)) / 2h  +  O(h^2)

Richardson extrapolation removes the h^2 term: R(h) = (4 D(h/2) - D(h)) / 3 has error O(h^4). The tolerance is the sum
of two parts, and nothing in it is tuned. Truncation: the difference of two extrapolations, |R(h) - R(h/2)|, which is
about the error of the worse one, while the better one is used. Rounding of f: about u times the length of its sums
times the size of their terms, divided by the step; the size is |f| + sum |p df/dp|, because f alone may be small where
large terms cancel.

One direction costs six evaluations whatever the number of parameters, so shapes can be varied freely.
"""
from __future__ import annotations

import math
from typing import Callable, Mapping

import numpy

from minipeft.autograd.tensor import Leaf, Tensor, _Stopped, _stopped, value_and_grad
from minipeft.backend import to_device, to_host

_U = 2.0 ** -53
_ROUNDINGS = 2.0 ** 10  # roundings on the longest path through f, each of relative size u; generous for small models


def check_gradients(step: Callable[[], Tensor], params: Mapping[str, Leaf], rng: numpy.random.Generator,
                    each: bool = True, h: float = 2.0 ** -7) -> float:
    """Compare `value_and_grad(step, params)` with central differences; return the worst error / tolerance (<= 1).

    each: one direction per parameter, so that a small one cannot hide behind a large one; False: one for all.
    h: the larger step, relative to a direction of unit length. Values that pass `stop_gradient` are held fixed.
    Raises AssertionError naming the parameter where they disagree, ValueError if a parameter is not float64."""
    for name, p in params.items():
        if p.dtype != numpy.float64:
            raise ValueError(f"{name} is {p.dtype}; gradients are checked in float64")
    memory = _Stopped()
    token = _stopped.set(memory)
    try:
        _, grads = value_and_grad(step, params)
        terms = [abs(to_host(p.data) * to_host(grads[name])) for name, p in params.items()]
        size = sum(float(t[numpy.isfinite(t)].sum()) for t in terms)  # a NaN fails below, under its own name
        worst = 0.0
        for names in ([n] for n in params) if each else [list(params)]:
            worst = max(worst, _check(step, {n: params[n] for n in names}, grads, rng, h, memory, size))
        return worst
    finally:
        _stopped.reset(token)


def _check(step: Callable[[], Tensor], params: Mapping[str, Leaf], grads: Mapping[str, numpy.ndarray],
           rng: numpy.random.Generator, h: float, memory: _Stopped, size: float) -> float:
    directions = {name: rng.standard_normal(p.shape) for name, p in params.items()}
    length = math.sqrt(sum(float((d * d).sum()) for d in directions.values())) or 1.0
    directions = {name: d / length for name, d in directions.items()}
    largest = 0.0

    def f(t: float) -> float:
        nonlocal largest
        kept = {name: p.data for name, p in params.items()}
        memory.replay = 0
        try:
            for name, p in params.items():
                p.data = kept[name] + t * to_device(directions[name])
            value = float(to_host(step().data).item())
        finally:
            for name, p in params.items():
                p.data = kept[name]
        largest = max(largest, abs(value))
        return value

    d1, d2, d4 = ((f(s) - f(-s)) / (2 * s) for s in (h, h / 2, h / 4))
    coarse, fine = (4 * d2 - d1) / 3, (4 * d4 - d2) / 3
    tolerance = abs(fine - coarse) + _ROUNDINGS * _U * (largest + size) / (h / 4)
    claimed = sum(float((to_host(grads[name]) * d).sum()) for name, d in directions.items())
    error = abs(claimed - fine)
    if not error <= tolerance:  # NaN fails too
        raise AssertionError(f"gradient of {', '.join(params)}: along a random direction the VJP says {claimed!r}, "
                             f"central differences say {fine!r}; they differ by {error:.3g}, allowed {tolerance:.3g}")
    return error / tolerance if tolerance else 0.0
