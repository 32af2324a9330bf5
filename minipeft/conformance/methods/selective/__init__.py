"""Selective tuning (BitFit, norms, layers, elements, rows) of a feed-forward block: the parts of the method.

    def selective(weights, train, dtype, *, eps=1e-5):              # -> an object with forward(x)

weights: {"norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias": array}. train: a list of their
names; these weights are trained, whole. The factory raises an error for an unknown name, and for an empty list. Every
method but `forward` may be missing:

    forward(x)                        y [N, d]
    vjp(x, g)                         {name: array} and "x"; None, or no entry, for a frozen weight
    trainable()                       the set of names that are trained
    step(x, g, lr, weight_decay=0.0)  one step of gradient descent at the rate lr; the decay is decoupled, multiplied by
                                      lr, and acts only on trained weights; after off(), a step may be refused
    weights()                         {name: array}, all six, as forward uses them
    select(pattern)                   from now on the weights in whose names the regular expression is found are
                                      trained, whole, and nothing else; weights trained before keep their values
    train_elements({name: booleans})  likewise, the elements with True; gradients have the weight's shape, 0 elsewhere
    train_rows({name: integers})      likewise, these rows, in any order; of a vector, these elements
    off(), on()                       take the training off, and put it back
"""
from __future__ import annotations

from typing import Any, Callable

from minipeft.conformance.case import Case
from minipeft.conformance.method import Make, Method
from minipeft.conformance.methods.selective.cases import draw, refusals, vectors
from minipeft.conformance.methods.selective.equations import (DECAYS, NAMES, exact_reference, polynomial, reference,
                                                              trained)
from minipeft.conformance.methods.selective.laws import LAWS, advance, chosen_by, gradients, out, weights
from minipeft.conformance.methods.selective.laws_of_choice import LAWS as LAWS_OF_CHOICE
from minipeft.conformance.methods.selective.laws_of_state import LAWS as LAWS_OF_STATE
from minipeft.conformance.methods.selective.mutants import PLANTED
from minipeft.conformance.methods.selective.mutants_of_choice import PLANTED as PLANTED_IN_CHOICE
from minipeft.conformance.methods.selective.mutants_of_state import PLANTED as PLANTED_IN_STATE
from minipeft.conformance.methods.selective.notes import NOTES
from minipeft.conformance.methods.selective.plain import Selective
from minipeft.conformance.numbers import float_of


def arguments(case: Case) -> tuple:
    """The factory's positional arguments (weights, train, dtype), and its keyword eps."""
    return ({name: case[name] for name in NAMES}, trained(case), case.dtype), {"eps": float_of(case.params["eps"])}


def _gradient(name: str) -> Callable:
    return lambda make, case: gradients(make(case), case, [name])[name]


def _after(name: str) -> Callable:
    def read(make: Make, case: Case) -> Any:
        layer = make(case)
        advance(layer, case)
        return weights(layer, case)[name]
    return read


def _part_of(what: str, name: str) -> dict:
    """Outputs of a block that trains only some elements or rows of the weight `name`. what: "elements" or "rows"."""
    def gradient(make: Make, case: Case) -> Any:
        layer = make(case)
        chosen_by(layer, case, what)
        return gradients(layer, case, [name])[name]

    def after(make: Make, case: Case) -> Any:
        layer = make(case)
        chosen_by(layer, case, what)
        advance(layer, case)
        return weights(layer, case)[name]
    return {f"d {what} of {name}": ((f"train_{what}", "vjp"), gradient),
            f"{what} of {name} after": ((f"train_{what}", "step", "weights"), after)}


OUTPUTS = {
    "y": (("forward",), lambda make, c: out(make(c), c)),
    "dx": (("vjp",), lambda make, c: gradients(make(c), c)["x"]),
    **{f"d {name}": (("vjp",), _gradient(name)) for name in NAMES},
    **{f"{name} after": (("step", "weights"), _after(name)) for name in NAMES},
    **_part_of("elements", "fc1.weight"), **_part_of("rows", "fc2.weight")}


METHOD = Method(
    name="selective", title="selective tuning of a feed-forward block",
    equation=("y = x + relu(n fc1.weight^T + fc1.bias) fc2.weight^T + fc2.bias, n = z o norm.weight + norm.bias",
              "z = (x - mean) / sqrt(variance + eps), the variance a mean of squares; W [out, in]",
              "what is not selected has no gradient and does not move; what is: W <- (1 - lr decay) W - lr dW",
              "`mask` chooses elements of fc1.weight, `rows` rows of fc2.weight, which are trained alone"),
    source={"paper": "Ben Zaken et al., 2021, arXiv:2106.10199 (BitFit: the biases)", "where": "number unverified"},
    conventions={"decay": DECAYS},
    axes={"norm.weight": ("d",), "norm.bias": ("d",), "fc1.weight": ("hidden", "d"), "fc1.bias": ("hidden",),
          "fc2.weight": ("d", "hidden"), "fc2.bias": ("d",), "x": ("N", "d"), "g": ("N", "d"),
          "mask": ("hidden", "d"), "rows": ("d",)},
    sizes={"N": (1, 6), "d": (1, 12), "hidden": (1, 10)},
    draw=draw, arguments=arguments, reference=reference, exact=exact_reference, outputs=OUTPUTS,
    properties=(*LAWS.all, *LAWS_OF_CHOICE.all, *LAWS_OF_STATE.all), plain=Selective,
    mutants=(*PLANTED.all, *PLANTED_IN_CHOICE.all, *PLANTED_IN_STATE.all),
    refusals=refusals, vectors=vectors, notes=NOTES,
    exact_when=lambda case: polynomial(case, *trained(case)))
