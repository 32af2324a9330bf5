"""How a wrong output is related to the right one, for failures that no planted bug explains.

    got = c want                            c = r, alpha, 1/r, alpha/r, sqrt(r), N, -1, ...
    got - base = c (want - base)            base: the same output with one of the inputs zero
    got = want transposed; rows in another order; zeros; NaN; errors of the size of a narrower dtype
    where the error is

Every comparison is within the bound of the observation. A factor is given a name if the value of the name lies within
the range that the bounds leave open. Nothing here decides anything: these are hints for people.
"""
from __future__ import annotations

import itertools
import math
from typing import Any, Iterator

import numpy

from minipeft.conformance.arithmetic import UNIT, arithmetic, on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.method import Method
from minipeft.conformance.observe import Observation
from minipeft.conformance.tolerance import Value, rho, tau

_U = 2.0 ** -53


def hints(method: Method, case: Case, seen: Observation) -> list[str]:
    """Hints on the wrong observation `seen` of `case`, in words, the most telling first; none for a fact, for shapes
    that differ or for empty arrays."""
    if seen.level == "S" or numpy.shape(seen.got) != numpy.shape(seen.want) or not numpy.size(seen.got):
        return []
    got, want = (numpy.asarray(x, numpy.float64) for x in (seen.got, seen.want))
    bound = numpy.zeros(got.shape) if seen.tau is None else numpy.asarray(seen.tau, numpy.float64)
    if not numpy.isfinite(got).all():
        return [_not_finite(seen.name, got)]
    with numpy.errstate(all="ignore"):
        found = [*_factor(method, case, seen.name, got, want, bound), *_arrangement(seen.name, got, want, bound)]
        if not found:
            found = [*_from_base(method, case, seen.name, got, want, bound)]
        if not found:
            found = [*_precision(method, case, seen.name, got, want)]
        return [*found, _place(seen.name, got, want, bound)]


def _not_finite(name: str, got: numpy.ndarray) -> str:
    bad = ~numpy.isfinite(got)
    rows = sorted({index[0] for index in numpy.argwhere(bad).tolist() if index})
    return f"{name} has {int(bad.sum())} of {got.size} numbers that are NaN or infinite, in rows {_listed(rows)}"


def _factor(method: Method, case: Case, name: str, got: Any, want: Any, bound: Any) -> Iterator[str]:
    if not got.any():
        yield f"{name} is zero everywhere"
    elif (fit := proportion(got, want, bound)) and _says_something(fit, method, case, got):
        yield f"{name} is {_with_name(fit, method, case)} times the expected value"


def _from_base(method: Method, case: Case, name: str, got: Any, want: Any, bound: Any) -> Iterator[str]:
    """The factor by which the contribution of one input is wrong."""
    output, bases = _output(method, case, want), dict[str, list[str]]()
    for array, value in case.arrays.items():
        if output is None or value.dtype != numpy.float64 or not value.any():
            continue
        try:
            base = numpy.asarray(method.reference(case.but({array: 0 * value}))[output[0]].exact, numpy.float64)
        except (ArithmeticError, LookupError, ValueError):
            continue
        if not numpy.isfinite(base).all() or not (abs(base) > bound).any() or not (abs(want - base) > bound).any():
            continue  # it would only repeat the factor of the whole output
        if (abs(got - base) <= bound).all():
            bases.setdefault("it does not depend on {0}", []).append(array)
        elif (fit := proportion(got - base, want - base, 2 * bound)) and _says_something(fit, method, case, got):
            text = f"the contribution of {{0}} is {_with_name(fit, method, case)} times the expected value"
            bases.setdefault(text, []).append(array)
    for text, arrays in bases.items():
        yield f"{name}: {text.format(' and '.join(arrays))}"


def proportion(got: Any, want: Any, bound: Any) -> tuple[float, float] | None:
    """(c, its uncertainty) if got = c want within `bound` and c is not 1, else None. The three have one shape."""
    size = float((want * want).sum())
    if not size:
        return None
    c = float((got * want).sum()) / size
    allowed = bound * (1 + abs(c)) + 4 * _U * abs(c * want)
    spread = float((allowed * abs(want)).sum()) / size
    fits = bool((abs(got - c * want) <= allowed).all())
    return (c, spread) if fits and spread < abs(c) and abs(c - 1) > spread else None


def _says_something(fit: tuple[float, float], method: Method, case: Case, got: Any) -> bool:
    """Whether the factor is worth reporting: a single number is always a multiple of another."""
    return got.size > 1 or bool(_names(*fit, method, case))


def _with_name(fit: tuple[float, float], method: Method, case: Case) -> str:
    names = _names(*fit, method, case)
    return f"{fit[0]:.4g}" + (f" (= {' = '.join(names)})" if names else "")


def _names(c: float, spread: float, method: Method, case: Case) -> list[str]:
    """At most three expressions in the case's sizes and params that equal c, the simplest first."""
    quantities = {key: float(v) for key, v in case.params.items()
                  if isinstance(v, (int, float)) and not isinstance(v, bool) and v and math.isfinite(v)}
    for array, axes in method.axes.items():
        if array in case and case[array].ndim == len(axes):
            quantities.update((axis, float(n)) for axis, n in zip(axes, case[array].shape) if n)
    found: list[str] = []
    for text, value in _expressions(quantities):
        for sign in ("", "-"):
            if abs((-value if sign else value) - c) <= spread + 4 * _U * abs(c) and len(found) < 3:
                found.append(f"{sign}{text}")
        if found and text.count(" ") == 0 and len(found) == 3:
            break
    simple = [text for text in found if " " not in text]
    return simple or found


def _expressions(quantities: dict[str, float]) -> Iterator[tuple[str, float]]:
    yield from (("1", 1.0), ("2", 2.0), ("1/2", 0.5))
    for q, v in quantities.items():
        if abs(v) == 1:
            continue
        yield from ((q, v), (f"1/{q}", 1 / v))
        if v > 0:
            yield from ((f"sqrt({q})", v ** 0.5), (f"1/sqrt({q})", v ** -0.5))
        yield from ((f"{q}^2", v * v), (f"1/{q}^2", 1 / v ** 2))
    for (p, a), (q, b) in itertools.permutations(quantities.items(), 2):
        if abs(a) == 1 or abs(b) == 1:
            continue
        yield f"{p} / {q}", a / b
        if b > 0:
            yield from ((f"{p} / sqrt({q})", a * b ** -0.5), (f"sqrt({q}) / {p}", b ** 0.5 / a))
        if p < q:
            yield from ((f"{p} * {q}", a * b), (f"1 / ({p} * {q})", 1 / (a * b)))


def _arrangement(name: str, got: Any, want: Any, bound: Any) -> Iterator[str]:
    if got.ndim == 2 and got.shape[0] == got.shape[1] and len(got) > 1 and (abs(got.T - want) <= bound.T + bound).all():
        yield f"{name} is transposed"
    if got.ndim >= 1 and len(got) > 1:
        rows = [next((i for i in range(len(want)) if (abs(row - want[i]) <= 2 * bound[i]).all()), None) for row in got]
        if sorted(row for row in rows if row is not None) == list(range(len(got))) and rows != list(range(len(got))):
            yield f"{name} has its rows in another order: {_listed(rows)}"


def _precision(method: Method, case: Case, name: str, got: Any, want: Any) -> Iterator[str]:
    output = None if case.exact else _output(method, case, want)
    for dtype in ("float32", "float16", "bfloat16"):
        if output is None or UNIT[dtype] <= case.arith.u_s:
            continue
        if rho(got, want, tau(output[1], arithmetic(dtype))) <= 1:
            stored = numpy.array_equal(on_grid(got, dtype), got)
            yield (f"{name} is only as accurate as {dtype}: is something {'stored' if stored else 'computed'} in "
                   f"{dtype}, not in {case.dtype}?")
            return


def _output(method: Method, case: Case, want: Any) -> tuple[str, Value] | None:
    """(name, Value) of the reference's output that equals `want`, or None."""
    for name, value in method.reference(case).items():
        if value.exact.shape == want.shape and numpy.array_equal(numpy.asarray(value.exact, numpy.float64), want):
            return name, value
    return None


def _place(name: str, got: Any, want: Any, bound: Any) -> str:
    error = abs(got - want)
    bad = error > bound
    at = numpy.unravel_index(int(numpy.argmax(numpy.where(bad, error, -1))), got.shape)
    where = f"the largest error of {name} is at {[int(i) for i in at]}: got {got[at]:.6g}, expected {want[at]:.6g}"
    for axis, word in enumerate(("row", "column")[:got.ndim] if got.ndim <= 2 else ()):
        lines = numpy.flatnonzero(bad.any(axis=tuple(i for i in range(got.ndim) if i != axis)))
        if 2 * len(lines) <= got.shape[axis]:
            where += f", and only {word}{'s' if len(lines) > 1 else ''} {_listed(lines.tolist())} of " \
                     f"{got.shape[axis]} {'are' if len(lines) > 1 else 'is'} wrong"
    return where


def _listed(items: list) -> str:
    return ", ".join(map(str, items[:8])) + (", ..." if len(items) > 8 else "")
