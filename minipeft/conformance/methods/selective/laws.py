"""Laws of a block of which some weights are trained.

V: results against the reference. M: relations among the implementation's own results, some also against the reference.
S: facts, such as a set of names.
A law is given a case and `make(case)`, which builds the implementation under test; it yields observations.

Freezing a weight may let other kernels run: a gradient is not needed, or a smaller product suffices. So two choices
give the same result within both bounds, not bit for bit. Only numbers that are not computed are compared bit for bit:
frozen weights, and zeros.
"""
from __future__ import annotations

from typing import Any, Iterator, Mapping

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.selective.cases import SELECTIONS, selections
from minipeft.conformance.methods.selective.equations import (NAMES, elements, elements_moved, polynomial, rates, rows,
                                                              rows_moved, trained, values, whole_moved)
from minipeft.conformance.numbers import derangement, floats
from minipeft.conformance.observe import Observation, between, fact, near, same
from minipeft.conformance.tolerance import Value

LAWS = Laws()
law = LAWS.law
Seen = Iterator[Observation]


def out(layer: Any, case: Case, x: Any = None) -> numpy.ndarray:
    """y [N, d] of the case's x, or of another x."""
    x = case["x"] if x is None else x
    return layer.array("forward", x.shape, x)


def gradients(layer: Any, case: Case, names: Any = None) -> dict[str, Any]:
    """{name: gradient} of the weights that the case trains, or of `names`, and of x. All of them must exist."""
    names = trained(case) if names is None else names
    return layer.arrays("vjp", {name: case[name].shape for name in (*names, "x")}, case["x"], case["g"])


def weights(layer: Any, case: Case) -> dict[str, numpy.ndarray]:
    """{name: weight}, all six."""
    return layer.arrays("weights", {name: case[name].shape for name in NAMES})


def advance(layer: Any, case: Case) -> None:
    """Makes the case's steps. A decay of 0 is not passed: it is the default."""
    decay = [case.params["decay"]] if case.params["decay"] else []
    for lr in rates(case):
        layer.step(case["x"], case["g"], lr, *decay)


def judged(case: Case, name: str) -> Case:
    """The case, but bounded if this weight, or its gradient, depends on z of the norm: see `polynomial`."""
    return case.but(exact=case.exact and polynomial(case, name))


def everything(case: Case, **params: Any) -> Case:
    """The case with all weights trained, and with these params."""
    return case.but(params={"train": SELECTIONS["everything"], **params})


def names_of(found: Mapping[str, Any]) -> list[str]:
    """The names of the weights that have a gradient in `found`, sorted."""
    return sorted(name for name, g in found.items() if g is not None and name != "x")


def chosen_by(layer: Any, case: Case, what: str) -> Mapping[str, numpy.ndarray]:
    """Makes the layer train the case's elements, or its rows. Returns {name: which elements that means}. what:
    "elements" or "rows"."""
    if what == "elements":
        layer.train_elements(elements(case))
        return elements(case)
    layer.train_rows({"fc2.weight": numpy.flatnonzero(case["rows"])})
    return rows(case)


@law("L1", "V: the forward is the equation", "forward")
def forward(case: Case, make: Make) -> Seen:
    yield near(case, "y", out(make(case), case), values(case)["y"])


@law("L1s", "M: the choice of trained weights does not change the output", "forward")
def forward_of_all(case: Case, make: Make) -> Seen:
    y, ref = out(make(case), case), values(case)["y"]
    for twin in selections(case)[1:]:
        yield between(case, f"y where {twin.params['train']} are trained", out(make(twin), twin), y, ref, ref)


@law("L2", "V: the gradients of the trained weights, and dx, are the equation's, summed over the batch", "vjp")
def gradients_hold(case: Case, make: Make) -> Seen:
    ref = values(case)
    for twin in (case, everything(case)):
        found = gradients(make(twin), twin)
        for name in trained(twin):
            yield near(judged(case, name), f"d {name}", found[name], ref[f"d {name}"])
        yield near(case, "dx", found["x"], ref["dx"])


@law("L2s", "M: asking for gradients changes neither the layer nor the gradients, nor does a forward of another x",
     "vjp", "forward")
def gradients_alone(case: Case, make: Make) -> Seen:
    layer, ref = make(everything(case)), values(case)
    before, once, again = out(layer, case), gradients(layer, case, NAMES), gradients(layer, case, NAMES)
    yield same("y after gradients were asked for", out(layer, case), before)
    out(layer, case, -case["x"])
    later = gradients(layer, case, NAMES)
    for name in NAMES:
        for how, found in (("again", again), ("after a forward of another x", later)):
            yield between(judged(case, name), f"d {name}, asked for {how}", found[name], once[name],
                          *[ref[f"d {name}"]] * 2)


@law("L7", "S: trained weights have a gradient; the gradients of all others do not exist", "vjp")
def support(case: Case, make: Make) -> Seen:
    for twin in selections(case):
        found = make(twin).arrays("vjp", {}, twin["x"], twin["g"])
        yield fact(f"gradients where {twin.params['train']} are trained", names_of(found), sorted(trained(twin)),
                   "zeros are a gradient too: memory for it, decay and momentum act on it")


@law("L7t", "S: trainable() is the selection", "trainable")
def trainable(case: Case, make: Make) -> Seen:
    for twin in selections(case):
        yield fact("trainable()", sorted(make(twin).trainable()), sorted(trained(twin)))


@law("L7s", "M: after steps with decay, frozen weights are as they were, bit for bit", "step", "weights")
def frozen(case: Case, make: Make) -> Seen:
    for twin in selections(case):
        layer = make(twin)
        advance(layer, twin)
        after = weights(layer, twin)
        for name in NAMES:
            if name not in trained(twin):
                yield same(f"{name} after steps where {twin.params['train']} are trained", after[name], case[name])


@law("L7v", "V: after steps with and without decay, trained weights are where gradient descent leads", "step",
     "weights")
def trained_weights(case: Case, make: Make) -> Seen:
    for twin in (case, everything(case), everything(case, decay=0.0)):
        layer, ref = make(twin), whole_moved(twin)
        advance(layer, twin)
        after = weights(layer, twin)
        for name in trained(twin):
            yield near(judged(case, name), f"{name} after steps where {twin.params['train']} are trained"
                       f"{'' if twin.params['decay'] else ', without decay'}", after[name], ref[name])


@law("L7w", "V: every step uses the rate that it is given", "step", "weights", kinds=("bounded",))
def rate_of_each(case: Case, make: Make) -> Seen:
    twin = case.but(params={"rates": [case.params["lr"], 8 * case.params["lr"]]})
    layer, ref = make(twin), whole_moved(twin)
    advance(layer, twin)
    after = weights(layer, twin)
    for name in trained(twin):
        yield near(case, f"{name} after a step, and one at 8 times its rate", after[name], ref[name])


@law("L7y", "V: after steps, y and gradients are those of the current weights", "step", "weights",
     "forward", "vjp")
def of_now(case: Case, make: Make) -> Seen:
    layer = make(case)
    out(layer, case)
    gradients(layer, case)
    advance(layer, case)
    now = case.but(weights(layer, case), exact=False)  # it is not known how many digits a trained weight has
    ref, found = values(now), gradients(layer, case)
    yield near(now, "y after steps", out(layer, case), ref["y"])
    for name in (*trained(case), "x"):
        yield near(now, f"d {name} after steps", found[name], ref["dx" if name == "x" else f"d {name}"])


@law("L7z", "M: a step at rate 0 changes nothing, bit for bit, whatever the decay", "step", "weights")
def no_rate(case: Case, make: Make) -> Seen:
    layer = make(everything(case))
    layer.step(case["x"], case["g"], 0.0, case.params["decay"])
    after = weights(layer, case)
    for name in NAMES:
        yield same(f"{name} after a step at rate 0", after[name], case[name], "lr multiplies the decay too")


@law("L7e", "M: with a mask, the gradient is the whole weight's where the mask is true, and 0 elsewhere",
     "train_elements", "vjp")
def masked_gradient(case: Case, make: Make) -> Seen:
    yield from _restricted(case, make, "elements")


@law("L7r", "M: with rows, the gradient is the whole weight's in these rows, and 0 elsewhere", "train_rows", "vjp")
def row_gradient(case: Case, make: Make) -> Seen:
    yield from _restricted(case, make, "rows")


def _restricted(case: Case, make: Make, what: str) -> Seen:
    layer = make(case)
    (name, here), = chosen_by(layer, case, what).items()
    found = gradients(layer, case, [name])
    yield fact(f"gradients where {what} of {name} are trained", names_of(found), [name])
    full, part = gradients(make(everything(case)), case, [name]), _part(values(case)[f"d {name}"], here)
    yield same(f"d {name} where its {what} are not trained", found[name][~here], 0 * full[name][~here])
    yield between(case, f"d {name} where its {what} are trained", found[name][here], full[name][here], part, part)


@law("L7es", "V: after steps with decay, elements outside a mask are as they were, those inside are the equation's",
     "train_elements", "step", "weights")
def masked_steps(case: Case, make: Make) -> Seen:
    yield from _stepped(case, make, "elements")


@law("L7rs", "V: after steps with decay, rows that are not trained are as they were, the others are the equation's",
     "train_rows", "step", "weights")
def row_steps(case: Case, make: Make) -> Seen:
    yield from _stepped(case, make, "rows")


def _stepped(case: Case, make: Make, what: str) -> Seen:
    layer = make(case)
    chosen = chosen_by(layer, case, what)
    (name, here), = chosen.items()
    advance(layer, case)
    after = weights(layer, case)
    for other in NAMES:
        frozen_here = ~here if other == name else numpy.ones(case[other].shape, bool)
        yield same(f"{other} after steps, where the {what} of {name} that are trained are not it",
                   after[other][frozen_here], case[other][frozen_here])
    ref = (elements_moved if what == "elements" else rows_moved)(case)[name]
    yield near(case, f"{what} of {name} after steps", after[name][here], _part(ref, here))


@law("L8", "M: a gradient is the same, whatever else is trained", "vjp")
def subset(case: Case, make: Make) -> Seen:
    full, ref = gradients(make(everything(case)), case, NAMES), values(case)
    for twin in selections(case):
        found = gradients(make(twin), twin)
        for name in (*trained(twin), "x"):
            yield between(judged(case, name), f"d {name} where {twin.params['train']} are trained", found[name],
                          full[name], *[ref["dx" if name == "x" else f"d {name}"]] * 2)


@law("L8o", "M: the order in which names are selected changes nothing", "vjp")
def order(case: Case, make: Make) -> Seen:
    for names in (case.params["train"], SELECTIONS["the biases (BitFit)"]):
        twin, back = (case.but(params={"train": " ".join(some)}) for some in (names.split(), names.split()[::-1]))
        found, again = (gradients(make(c), c) for c in (twin, back))
        for name in trained(twin):
            yield between(judged(case, name), f"d {name}, selected in another order", again[name], found[name],
                          *[values(case)[f"d {name}"]] * 2)


@law("F1", "V: the norm is right at small variance, at width 4, and for a constant row", "forward", kinds=("bounded",),
     examples=2)
def norm(case: Case, make: Make) -> Seen:
    bare = bare_norm(case)
    yield near(bare, "y of a block that adds the norm of x to x", out(make(bare), bare), values(bare)["y"],
               "1 / sqrt(variance + eps), eps 1e-5 under the root, the variance a mean of squares")


@law("F1g", "V: a gradient passes the norm, trained or frozen", "vjp", kinds=("bounded",), examples=2)
def through_the_norm(case: Case, make: Make) -> Seen:
    bare = bare_norm(case)
    for which in ("the norm", "one matrix"):
        twin = bare.but(params={"train": SELECTIONS[which]})
        found = gradients(make(twin), twin)["x"]
        yield near(bare, f"dx of a block that adds the norm of x to x, {which} trained", found,
                   values(bare)["dx"], "dx = g + r (q - mean(q) - z mean(q o z)): mean and variance have gradients")


def bare_norm(case: Case) -> Case:
    """A block with y = x + z, as relu(z) - relu(-z) = z, of width 4. Its rows have variance 1e-4, 1e-5 and 1e-6, about
    mean 0 and about mean 1; variance about 1; and variance 0."""
    shape = numpy.array([3.0, -1, -1, -1]) / 3 ** 0.5
    small = [m + s * shape for m in (0.0, 1.0) for s in (1e-2, 10 ** -2.5, 1e-3)]
    x = on_grid([*small, shape, 2 + shape[::-1], numpy.zeros(4), numpy.full(4, 0.3)], case.dtype)
    eye, g = numpy.eye(4), floats(numpy.random.default_rng(case.seed), x.shape, case.dtype)
    arrays = {"norm.weight": numpy.ones(4), "norm.bias": numpy.zeros(4), "fc1.weight": numpy.concatenate([eye, -eye]),
              "fc1.bias": numpy.zeros(8), "fc2.weight": numpy.concatenate([eye, -eye], axis=1),
              "fc2.bias": numpy.zeros(4), "x": x, "g": g, "mask": numpy.ones((8, 4), bool),
              "rows": numpy.ones(4, bool)}
    return case.but(arrays, {"eps": 1e-5, "train": SELECTIONS["the norm"]}, exact=False)


@law("L10", "M: rows do not see each other", "forward")
def independent_rows(case: Case, make: Make) -> Seen:
    layer, ref, n = make(case), values(case)["y"], len(case["x"])
    y = out(layer, case)
    shuffled = derangement(numpy.random.default_rng(case.seed), n)
    moved = _part(ref, shuffled)
    yield between(case, "y of the rows in another order", out(layer, case, case["x"][shuffled]), y[shuffled], moved,
                  moved)
    half = _part(ref, slice(n // 2, n))
    yield between(case, "y of the last rows alone", out(layer, case, case["x"][n // 2:]), y[n // 2:], half, half)


def _part(value: Value, chosen: Any) -> Value:
    return Value(value.exact[chosen], value.mag[chosen], value.k, value.n)
