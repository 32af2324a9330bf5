"""Selective tuning of a pre-LN feed-forward block: the smallest base that has a norm, weights and biases.

    z = (x - mean) r,   r = 1 / sqrt(variance + eps)      mean and variance of a row, the latter a mean of squares (1/d)
    n = z o norm.weight + norm.bias                       Ba et al., 2016, arXiv:1607.06450
    h = n fc1.weight^T + fc1.bias
    y = x + relu(h) fc2.weight^T + fc2.bias

    d fc2.weight = g^T relu(h)     d fc2.bias = sum g     gh = (g fc2.weight) o (h > 0)          g = dL/dy
    d fc1.weight = gh^T n          d fc1.bias = sum gh    gn = gh fc1.weight
    d norm.weight = sum gn o z     d norm.bias = sum gn   q  = gn o norm.weight     (sums over the batch, no means)
    dx = g + r (q - mean(q) - z mean(q o z))

x, g [N, d]; norm.weight, norm.bias, fc2.bias [d]; fc1.weight [hidden, d], fc1.bias [hidden]; fc2.weight [d, hidden].
A set of names, or of elements, is trained; everything else has no gradient and does not move:

    W <- (1 - lr decay) W - lr dW                 where it is trained, under the convention "towards 0"
    W <- (1 - lr decay) W + lr decay W0 - lr dW   under "towards the start", with W0 the weight before training

In half precision the statistics of a row are taken in the accumulator's precision, and z is rounded when it is stored.
For the gradients, z is not kept: it is formed again from x and the stored mean and r, each rounded once.

A norm is not a polynomial: whether it rounds dyadic numbers depends on how it is written. Where norm.weight is 0, n is
norm.bias whatever z is, and only d norm.weight still depends on z: see `polynomial`.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping

import numpy

from minipeft.conformance.case import Case, remembered
from minipeft.conformance.numbers import rounded
from minipeft.conformance.running import Bounded, positive, relu, sqrt, value_of
from minipeft.conformance.tolerance import Value

NAMES = ("norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
DECAYS = ("towards 0", "towards the start")


def equations(w: Mapping[str, Any], x: Any, g: Any, eps: Any) -> dict[str, Any]:
    """{"y", "dx", "d <name>": array} by the equations above. w: {name: weight}. Arrays of longdoubles, of Bounded
    numbers, or of objects of many digits."""
    d, inner = x.shape[-1], _inner(x)
    mean = inner.sum(axis=-1, keepdims=True) / d
    centred = inner - mean
    r = 1 / sqrt((centred * centred).sum(axis=-1, keepdims=True) / d + eps)            # [N, 1]
    z = _stored(centred * r, x)                                                        # [N, d]
    again = _stored((inner - _kept(mean, x)) * _kept(r, x), x)                         # z, as the gradients have it
    n = z * w["norm.weight"] + w["norm.bias"]
    h = n @ w["fc1.weight"].T + w["fc1.bias"]                                          # [N, hidden]
    a = relu(h)
    gh = (g @ w["fc2.weight"]) * positive(h)
    gn = gh @ w["fc1.weight"]                                                          # [N, d]
    q, s = _inner(gn * w["norm.weight"]), _inner(again)
    through = _kept(r, x) * (q - q.sum(axis=-1, keepdims=True) / d - s * ((q * s).sum(axis=-1, keepdims=True) / d))
    return {"y": x + (a @ w["fc2.weight"].T + w["fc2.bias"]), "dx": g + _stored(through, x),
            "d norm.weight": (gn * again).sum(axis=0), "d norm.bias": gn.sum(axis=0),
            "d fc1.weight": gh.T @ n, "d fc1.bias": gh.sum(axis=0),
            "d fc2.weight": g.T @ a, "d fc2.bias": g.sum(axis=0)}


def _inner(x: Any) -> Any:
    """The same numbers; results computed from them are rounded to the accumulator's precision."""
    if not isinstance(x, Bounded):
        return x
    wide = x.arith.accumulate
    return Bounded(x.value, x.error, dataclasses.replace(x.arith, store=wide, multiply=wide))


def _stored(x: Any, like: Any) -> Any:
    """x, rounded to storage in the arithmetic of `like`."""
    return Bounded(x.value, x.error, like.arith) * 1 if isinstance(x, Bounded) else x


def _kept(x: Any, like: Any) -> Any:
    """x, rounded to storage; results computed from it are rounded to the accumulator's precision."""
    return _inner(_stored(x, like))


def polynomial(case: Case, *trains: str) -> bool:
    """Whether y and the gradients of the weights `trains` are polynomials: nothing that depends on z is one."""
    return not case["norm.weight"].any() and "norm.weight" not in trains


def moved(w0: Mapping[str, Any], chosen: Mapping[str, numpy.ndarray], x: Any, g: Any, eps: Any,
          case: Case, difference: bool = False) -> dict[str, Any]:
    """{name: weight after the case's steps}. w0: {name: weight before}. chosen: {name: which elements are trained}.

    difference: d is stored, and W = W0 + d is formed from it, so that training can be taken off again; otherwise W is
    stored. `1 *` adds a rounding: gradient and decay may be summed before they are multiplied by lr."""
    decay, home = case.params["decay"], case.conventions.get("decay", DECAYS[0]) == DECAYS[1]
    w, apart = dict(w0), {name: 0 * w0[name] for name in chosen}
    for lr in rates(case):
        found, keep = equations(w, x, g, eps), 1 - lr * decay
        for name, here in chosen.items():
            grad = 1 * found[f"d {name}"]
            if difference:
                d = apart[name]
                apart[name] = d * keep - lr * grad if home else d - lr * (grad + decay * w[name])
                new = w0[name] + apart[name]
            else:
                new = w[name] * keep - lr * grad
                new = new + lr * decay * w0[name] if home else new
            w[name] = _where(here, new, w0[name])
    return w


def _where(here: numpy.ndarray, a: Any, b: Any) -> Any:
    if isinstance(a, Bounded):
        return Bounded(numpy.where(here, a.value, b.value), numpy.where(here, a.error, b.error), a.arith)
    return numpy.where(here, a, b)


def rates(case: Case) -> list[float]:
    """The learning rate of every step: params["rates"], or params["lr"] for all."""
    return case.params.get("rates") or [case.params["lr"]] * case.params["steps"]


def trained(case: Case) -> list[str]:
    """The names that the case trains, in its order."""
    return case.params["train"].split()


def whole(case: Case, names: Any = None) -> dict[str, numpy.ndarray]:
    """{name: True everywhere} for the weights that the case trains, or for `names`."""
    return {name: numpy.ones(case[name].shape, bool) for name in (trained(case) if names is None else names)}


def elements(case: Case) -> dict[str, numpy.ndarray]:
    """{"fc1.weight": the elements that its mask chooses}."""
    return {"fc1.weight": case["mask"]}


def rows(case: Case) -> dict[str, numpy.ndarray]:
    """{"fc2.weight": the elements of the rows that the case chooses}."""
    return {"fc2.weight": numpy.broadcast_to(case["rows"][:, None], case["fc2.weight"].shape)}


def _numbers(case: Case, number: Callable) -> tuple:
    """weights, x, g and eps, converted by `number`."""
    return {name: number(case[name]) for name in NAMES}, number(case["x"]), number(case["g"]), number(
        numpy.float64(case.params["eps"]))


def _bounded(case: Case) -> tuple:
    """weights, x, g and eps as Bounded numbers. eps has the error of one rounding to the accumulator's precision."""
    w, x, g, eps = _numbers(case, lambda v: Bounded.of(v, case.arith))
    return w, x, g, Bounded(eps.value, eps.value * case.arith.u_a, case.arith)


@remembered
def values(case: Case) -> dict[str, Value]:
    """{output: its reference, with its bound} of y, dx and every gradient, whatever the case trains."""
    return {name: value_of(b) for name, b in equations(*_bounded(case)).items()}


def values_moved(case: Case, chosen: Mapping[str, numpy.ndarray]) -> dict[str, Value]:
    """{name: the weight after the case's steps}. chosen: {name: which elements are trained}. The bound is the larger
    one of the two ways of storing a trained weight; a frozen weight has bound 0."""
    w, x, g, eps = _bounded(case)
    direct, apart = (moved(w, chosen, x, g, eps, case, difference) for difference in (False, True))
    found = {}
    for name in NAMES:
        b = Bounded(direct[name].value, numpy.maximum(direct[name].error, apart[name].error), case.arith)
        found[name] = value_of(b) if name in chosen else Value(b.value, 0 * b.value, 0, 0)
    return found


@remembered
def whole_moved(case: Case) -> dict[str, Value]:
    """`values_moved` of the weights that the case trains."""
    return values_moved(case, whole(case))


@remembered
def elements_moved(case: Case) -> dict[str, Value]:
    """`values_moved` of the elements that the case's mask chooses."""
    return values_moved(case, elements(case))


@remembered
def rows_moved(case: Case) -> dict[str, Value]:
    """`values_moved` of the rows that the case chooses."""
    return values_moved(case, rows(case))


def reference(case: Case) -> dict[str, Value]:
    """All published outputs of a case: y, dx, the gradients of the trained weights, all weights after its steps; and
    gradient and result of a weight of which only a mask, or some rows, are trained."""
    found = values(case)
    kept = {name: v for name, v in found.items() if name in ("y", "dx", *(f"d {leaf}" for leaf in trained(case)))}
    kept |= {f"{name} after": v for name, v in whole_moved(case).items()}
    for what, chosen, after in (("elements", elements(case), elements_moved(case)),
                                ("rows", rows(case), rows_moved(case))):
        (name, here), = chosen.items()
        v = found[f"d {name}"]
        kept[f"d {what} of {name}"] = Value(v.exact * here, v.mag * here, v.k, v.n)
        kept[f"{what} of {name} after"] = after[name]
    return kept


def exact_reference(case: Case) -> dict[str, Value]:
    """As `reference`, computed in 50 digits and rounded once, to float64."""
    import mpmath
    with mpmath.workdps(50):
        w, x, g, eps = _numbers(case, _digits(mpmath.mpf))
        full = equations(w, x, g, eps)
        found: dict[str, Any] = {**full, **_after(moved(w, whole(case), x, g, eps, case))}
        for what, chosen in (("elements", elements(case)), ("rows", rows(case))):
            (name, here), = chosen.items()
            found[f"d {what} of {name}"] = numpy.where(here, full[f"d {name}"], mpmath.mpf(0))
            found[f"{what} of {name} after"] = moved(w, chosen, x, g, eps, case)[name]
        return {name: Value(rounded(found[name]), rounded(v.mag), v.k, v.n) for name, v in reference(case).items()}


def _after(w: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name} after": value for name, value in w.items()}


def _digits(number: Callable) -> Callable:
    """A function that converts float64 arrays to object arrays of `number`."""
    def convert(x: Any) -> numpy.ndarray:
        out = numpy.empty(numpy.shape(x), object)
        out[...] = numpy.vectorize(number, otypes=[object])(x)
        return out
    return convert
