"""Laws of a bottleneck adapter.

V: results against the reference. M: relations among the implementation's own results, some also against the reference.
S: facts, such as a set of names.
Only V finds one activation in the place of another.
A law is given a case and `make(case)`, which builds the implementation under test; it yields observations.
"""
from __future__ import annotations

from typing import Any, Iterator

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.bottleneck_adapter.activations import ACTIVATIONS
from minipeft.conformance.methods.bottleneck_adapter.equations import (LEAVES, PLACEMENTS, reads, stream_twice,
                                                                       values)
from minipeft.conformance.numbers import derangement
from minipeft.conformance.observe import Observation, between, fact, near, same
from minipeft.conformance.tolerance import Value

LAWS = Laws()
law = LAWS.law
Seen = Iterator[Observation]


def out(adapter: Any, case: Case) -> numpy.ndarray:
    """y [N, d] of the case."""
    return adapter.array("forward", case["x"].shape, *(case[name] for name in ("x", "n", "F")))


def y_of(make: Make, case: Case) -> numpy.ndarray:
    """y [N, d] of the case, by a new adapter."""
    return out(make(case), case)


def gradients_of(make: Make, case: Case, *more: str) -> dict:
    """As `gradients_by`, of a new adapter."""
    return gradients_by(make(case), case, *more)


def gradients_by(adapter: Any, case: Case, *more: str) -> dict:
    """{name: gradient} of the adapter's weights, and of the arrays `more` ("x", "n", "F")."""
    shapes = {name: case[name].shape for name in (*LEAVES, *more)}
    return adapter.arrays("vjp", shapes, *(case[name] for name in ("x", "n", "F", "g")))


def without_adapter(case: Case) -> Case:
    """The case with U = 0 and b_U = 0, whose A is 0."""
    return case.but({"U": 0 * case["U"], "b_U": 0 * case["b_U"]})


def streams(case: Case) -> list[str]:
    """The names of x, n and F that have a gradient; n has one only where it is read."""
    return ["x", "F", *(["n"] if "n" in reads(case) else [])]


@law("A1", "V: the forward is the equation of its placement", "forward")
def forward(case: Case, make: Make) -> Seen:
    yield near(case, "y", y_of(make, case), values(case)["y"])


@law("A2", "V: all gradients are the equation's, summed over the batch", "vjp")
def gradients(case: Case, make: Make) -> Seen:
    names = (*LEAVES, *streams(case))
    found, ref = gradients_of(make, case, *streams(case)), values(case)
    for name in names:
        yield near(case, f"d{name}", found[name], ref[f"d{name}"])


@law("A2s", "M: asking for gradients changes neither the adapter nor the gradients, nor does a forward of other inputs",
     "vjp", "forward")
def gradients_alone(case: Case, make: Make) -> Seen:
    adapter, ref = make(case), values(case)
    before, once, again = out(adapter, case), gradients_by(adapter, case), gradients_by(adapter, case)
    yield same("y after gradients were asked for", out(adapter, case), before)
    out(adapter, case.but({name: -case[name] for name in ("x", "n", "F")}))
    later = gradients_by(adapter, case)
    for name in LEAVES:
        for how, found in (("again", again), ("after a forward of other inputs", later)):
            yield between(case, f"d{name}, asked for {how}", found[name], once[name], *[ref[f"d{name}"]] * 2)


@law("A1a", "V: every activation is the one that is asked for, in value and gradient", "forward", kinds=("bounded",))
def activations(case: Case, make: Make) -> Seen:
    for name in ACTIVATIONS:
        twin = case.but(params={"activation": name})
        ref, adapter = values(twin), make(twin)
        yield near(case, f"y with {name}", out(adapter, twin), ref["y"])
        if adapter.offers("vjp"):
            yield near(case, f"db_D with {name}", gradients_of(make, twin)["b_D"], ref["db_D"])


@law("A1p", "V: every placement is the one that is asked for", "forward")
def placements(case: Case, make: Make) -> Seen:
    for name in PLACEMENTS:
        twin = case.but(params={"placement": name})
        yield near(case, f"y with placement {name}", y_of(make, twin), values(twin)["y"])


@law("A2n", "S: n has a gradient where it is read, and nowhere else", "vjp")
def absent(case: Case, make: Make) -> Seen:
    found = make(case).arrays("vjp", {}, *(case[name] for name in ("x", "n", "F", "g")))
    yield fact("the gradient of n", "absent" if found.get("n") is None else "there",
               "there" if "n" in reads(case) else "absent", "zeros are not absent: they are computed and passed on")


@law("A3", "M: with U = 0 and b_U = 0 it is x + F, bit for bit", "forward")
def zero_is_nothing(case: Case, make: Make) -> Seen:
    zero = without_adapter(case)
    y = y_of(make, zero)
    if stream_twice(case):
        yield near(case, "y with U = 0, b_U = 0", y, values(zero)["y"])
    else:
        yield same("y with U = 0, b_U = 0", y, on_grid(case["x"] + case["F"], case.dtype))


@law("A3g", "M: with U = 0 gradients pass unchanged, and those of D and b_D are 0", "vjp")
def zero_passes_gradients(case: Case, make: Make) -> Seen:
    zero = without_adapter(case)
    found = gradients_of(make, zero, "x", "F")
    for name in ("x", "F"):
        times = 2 if name == "x" and stream_twice(case) else 1
        yield same(f"d{name} with U = 0", found[name], times * case["g"])
    for name in ("D", "b_D"):
        yield same(f"d{name} with U = 0", found[name], 0 * found[name])


@law("A4", "M: with D = 0 and b_D = 0 the same s b_U is added to every row", "forward")
def bias_of_the_output(case: Case, make: Make) -> Seen:
    flat = case.but({"D": 0 * case["D"], "b_D": 0 * case["b_D"]})
    other, ref = flat.but({"U": -2 * case["U"]}), values(flat)["y"]
    y = y_of(make, flat)
    yield near(case, "y with D = 0, b_D = 0", y, ref)
    yield between(case, "y with D = 0, b_D = 0 and another U", y_of(make, other), y, ref, values(other)["y"])


@law("A5", "M: the added term is linear in (U, b_U)", "forward")
def linear_above(case: Case, make: Make) -> Seen:
    twice = case.but({name: 2 * case[name] for name in ("U", "b_U")})
    ref, y, zero = values(twice)["y"], y_of(make, case), y_of(make, without_adapter(case))
    yield between(case, "y(2 U, 2 b_U) - y against y - y(0, 0)", y_of(make, twice) - y, y - zero, ref, ref, ref, ref)


@law("A5s", "M: the scale multiplies all of A, its bias included", "forward")
def scaled(case: Case, make: Make) -> Seen:
    larger = case.but(params={"scale": 2 * case.params["scale"]})
    twin = case.but({name: 2 * case[name] for name in ("U", "b_U")})
    ref = values(twin)["y"]
    yield between(case, "y with 2 s against y with 2 U, 2 b_U", y_of(make, larger), y_of(make, twin), ref,
                  values(larger)["y"])


@law("A5g", "M: <dU, U> + <db_U, b_U> = <g, y - y(0, 0)>", "vjp", "forward")
def linear_gradient(case: Case, make: Make) -> Seen:
    found, ref, zero = gradients_of(make, case), values(case), without_adapter(case)
    moved = y_of(make, case) - y_of(make, zero)
    left = sum((found[k] * case[k]).sum() for k in ("U", "b_U"))
    bound = sum((case.tau(ref[f"d{k}"]) * abs(case[k])).sum() for k in ("U", "b_U"))
    bound += (case.tau(ref["y"], values(zero)["y"]) * abs(case["g"])).sum()
    own = sum(abs(found[k] * case[k]).sum() for k in ("U", "b_U")) + abs(moved * case["g"]).sum()
    yield _numbers("both sides", left, (moved * case["g"]).sum(), bound, own, case)


@law("A6", "M: relu: <dD, D> + <db_D, b_D> = <dU, U>", "vjp", where=lambda case: case.params["activation"] == "relu")
def homogeneous_gradient(case: Case, make: Make) -> Seen:
    found, ref = gradients_of(make, case), values(case)
    left, right = (sum((found[k] * case[k]).sum() for k in names) for names in (("D", "b_D"), ("U",)))
    bound = sum((case.tau(ref[f"d{k}"]) * abs(case[k])).sum() for k in ("D", "b_D", "U"))
    yield _numbers("both sides", left, right, bound, sum(abs(found[k] * case[k]).sum() for k in ("D", "b_D", "U")),
                   case)


def _numbers(name: str, got: Any, want: Any, bound: Any, size: Any, case: Case) -> Observation:
    """Compares two sums that were computed here. size: of their terms, whose roundings are added to the bound."""
    terms = case["U"].size + case["D"].size + case["x"].size
    return Observation(name, "B", numpy.array([got]), numpy.array([want]),
                       numpy.array([bound + 2 * terms * 2.0 ** -53 * size], numpy.float64))


@law("A6h", "M: relu: (2 D, 2 b_D, U / 2) is the same function", "forward",
     where=lambda case: case.params["activation"] == "relu")
def homogeneous(case: Case, make: Make) -> Seen:
    twin = case.but({"D": 2 * case["D"], "b_D": 2 * case["b_D"], "U": case["U"] / 2})
    yield between(case, "y", y_of(make, twin), y_of(make, case), values(twin)["y"], values(case)["y"])


@law("A7", "M: the order of the bottleneck's units does not matter", "forward",
     where=lambda case: len(case["D"]) > 1)
def units_moved(case: Case, make: Make) -> Seen:
    order, ref = derangement(numpy.random.default_rng(case.seed), len(case["D"])), values(case)["y"]
    twin = case.but({"D": case["D"][order], "b_D": case["b_D"][order], "U": case["U"][:, order]})
    yield between(case, "y", y_of(make, twin), y_of(make, case), ref, ref)


@law("A7p", "M: a unit whose column of U is 0 changes nothing", "forward")
def unit_added(case: Case, make: Make) -> Seen:
    twin = case.but({"D": numpy.concatenate([case["D"], case["D"][:1]]),
                     "b_D": numpy.concatenate([case["b_D"], case["b_D"][:1]]),
                     "U": numpy.concatenate([case["U"], 0 * case["U"][:, :1]], axis=1)})
    yield between(case, "y", y_of(make, twin), y_of(make, case), values(twin)["y"], values(case)["y"])


@law("A8", "M: A reads what its placement says, and nothing else", "forward")
def what_is_read(case: Case, make: Make) -> Seen:
    read, y = reads(case), y_of(make, case)
    for name in ("x", "n", "F"):
        if name not in read:
            other = case.but({name: 2 * case[name]})
            held = numpy.zeros_like(y) if name == "n" else case[name]
            yield between(case, f"y with 2 {name}", y_of(make, other), y + held, values(other)["y"], values(case)["y"])
    if case.params["placement"] == "pfeiffer" and not stream_twice(case):
        swapped = case.but({"x": case["F"], "F": case["x"]})
        yield between(case, "y with x and F exchanged", y_of(make, swapped), y, values(swapped)["y"],
                      values(case)["y"])


@law("A10", "M: rows do not see each other", "forward")
def independent_rows(case: Case, make: Make) -> Seen:
    y, ref, n = y_of(make, case), values(case)["y"], len(case["x"])
    order = derangement(numpy.random.default_rng(case.seed), n)
    for what, chosen in (("in another order", order), ("without the first ones", numpy.arange(n // 2, n))):
        rows = case.but({name: case[name][chosen] for name in ("x", "n", "F", "g")})
        part = Value(ref.exact[chosen], ref.mag[chosen], ref.k, ref.n)
        yield between(case, f"y of the rows {what}", y_of(make, rows), y[chosen], part, part)
