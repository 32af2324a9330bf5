"""Laws of the gradient of a soft prompt, and of the trained arrays."""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import ABSENT, Fault
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.soft_prompt.equations import BASE, values
from minipeft.conformance.methods.soft_prompt.laws import Seen, other_ids, out, rows_of
from minipeft.conformance.numbers import wide
from minipeft.conformance.observe import between, fact, near, none_of, same
from minipeft.conformance.plugin import checked

LAWS = Laws()
law = LAWS.law


def gradient(layer: Any, case: Case) -> numpy.ndarray:
    """dP [n, d], of as many rows n as are trained: at least p. Raises Fault if dP is missing or has another shape."""
    found = layer.arrays("vjp", {}, case["ids"], case["mask"], case["g"]).get("P")
    if found is None:
        raise Fault(ABSENT, "soft_prompt.vjp has no 'P'")
    p, d = case["P"].shape
    return checked("soft_prompt.vjp['P']", found, (max(p, len(found)), d))


@law("P3", "V: dP is the gradient of the embeddings at the prompt's places, summed over the batch", "vjp")
def summed(case: Case, make: Make) -> Seen:
    yield near(case, "dP", gradient(make(case), case)[:len(case["P"])], values(case)["dP"])


@law("P3m", "M: dP of a batch is the sum of those of its rows", "vjp", where=lambda case: len(case["ids"]) > 1)
def additive(case: Case, make: Make) -> Seen:
    layer, p = make(case), len(case["P"])
    alone = [rows_of(case, slice(row, row + 1)) for row in range(len(case["ids"]))]
    total = sum(wide(gradient(layer, row)[:p]) for row in alone)  # longdouble: the kit's own roundings must not count
    yield between(case, "dP against the sum over the rows", gradient(layer, case)[:p], total,
                  values(case)["dP"], *(values(row)["dP"] for row in alone))


@law("P3s", "M: asking for gradients changes neither the layer nor the gradients", "vjp", "forward")
def gradients_alone(case: Case, make: Make) -> Seen:
    layer, ref, p = make(case), values(case)["dP"], len(case["P"])
    before, once, again = out(layer, case), gradient(layer, case), gradient(layer, case)
    yield same("y after gradients were asked for", out(layer, case), before)
    yield between(case, "dP, asked for again", again[:p], once[:p], ref, ref)


@law("P3o", "M: gradients are those of the call they are asked for, whatever was run before", "vjp", "forward")
def gradients_of_the_call(case: Case, make: Make) -> Seen:
    layer, ref, p = make(case), values(case)["dP"], len(case["P"])
    out(layer, case.but({"ids": other_ids(case)}))
    yield near(case, "dP after a forward of other ids", gradient(layer, case)[:p], ref)
    if layer.offers("disabled"):
        out(layer, case, "disabled")
        yield near(case, "dP after the prompt was switched off for a call", gradient(layer, case)[:p], ref)


@law("P3d", "S: every row that is trained reaches the output", "vjp")
def alive(case: Case, make: Make) -> Seen:
    found, p = gradient(make(case), case), len(case["P"])
    ref = values(case)["dP"]
    moves = (abs(ref.exact) > case.tau(ref)).any(axis=1)  # so that rounding cannot make it 0
    reached = numpy.append(moves, numpy.ones(len(found) - p, bool))
    dead = numpy.flatnonzero(reached & ~found.any(axis=1)).tolist()
    yield fact("dead prompt rows", dead, [], f"dP has {len(found)} rows and the prompt {p}; what has no gradient "
                                             f"is counted as trained and never is")


@law("P3a", "S: nothing but the prompt has a gradient", "vjp")
def frozen(case: Case, make: Make) -> Seen:
    yield none_of(BASE, make(case).arrays("vjp", {}, case["ids"], case["mask"], case["g"]))


@law("P3t", "S: exactly P is trained", "trainable")
def trainable(case: Case, make: Make) -> Seen:
    yield fact("trainable()", sorted(make(case).trainable()), ["P"])
