"""What holds for training a soft prompt, and for the file that it is kept in."""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import ABSENT, Fault
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.soft_prompt.equations import BASE, values
from minipeft.conformance.methods.soft_prompt.laws import Seen, out, rows_of
from minipeft.conformance.observe import between, fact, near, none_of, raised, same
from minipeft.conformance.plugin import checked

LAWS = Laws()
law = LAWS.law


def gradient(layer: Any, case: Case) -> numpy.ndarray:
    """dP, of as many rows as are trained: p at least."""
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
    total = sum(gradient(layer, row)[:p] for row in alone)
    yield between(case, "dP against the sum over the rows", gradient(layer, case)[:p], total,
                  values(case)["dP"], *(values(row)["dP"] for row in alone))


@law("P3s", "M: asking for gradients changes neither the layer nor the gradients", "vjp", "forward")
def gradients_alone(case: Case, make: Make) -> Seen:
    layer, ref, p = make(case), values(case)["dP"], len(case["P"])
    before, once, again = out(layer, case), gradient(layer, case), gradient(layer, case)
    yield same("y after gradients were asked for", out(layer, case), before)
    yield between(case, "dP, asked for again", again[:p], once[:p], ref, ref)


@law("P3d", "S: every row that is trained reaches the output", "vjp")
def alive(case: Case, make: Make) -> Seen:
    found, p = gradient(make(case), case), len(case["P"])
    reached = numpy.append(values(case)["dP"].exact.any(axis=1), numpy.ones(len(found) - p, bool))
    dead = numpy.flatnonzero(reached & ~found.any(axis=1)).tolist()
    yield fact("dead prompt rows", dead, [], f"dP has {len(found)} rows and the prompt {p}; what has no gradient "
                                             f"is counted as trained and never is")


@law("P3a", "S: nothing but the prompt has a gradient", "vjp")
def frozen(case: Case, make: Make) -> Seen:
    yield none_of(BASE, make(case).arrays("vjp", {}, case["ids"], case["mask"], case["g"]))


@law("P3t", "S: exactly P is trained", "trainable")
def trainable(case: Case, make: Make) -> Seen:
    yield fact("trainable()", sorted(make(case).trainable()), ["P"])


def _untrained(case: Case) -> Case:
    return case.but({"P": 0 * case["P"]})


@law("P6", "M: saved and loaded, it is the same, bit for bit", "save", "load", "forward")
def round_trip(case: Case, make: Make) -> Seen:
    layer, fresh = make(case), make(_untrained(case))
    fresh.load(layer.save())
    yield same("y after save and load", out(fresh, case), out(layer, case))
    if fresh.offers("vjp"):
        yield same("dP after save and load", gradient(fresh, case), gradient(layer, case))


@law("P6k", "S: the file holds the prompt and nothing of the layer", "state_keys")
def keys(case: Case, make: Make) -> Seen:
    yield fact("arrays of the layer in the saved state", sorted(set(make(case).state_keys()) & set(BASE)), [])


@law("P6x", "S: a saved prompt of another width is refused", "save", "load", "forward",
     where=lambda case: case["E"].shape[1] > 1)
def wrong_file(case: Case, make: Make) -> Seen:
    blob = make(case).save()
    narrow = case.but({**{name: case[name][:, 1:] for name in ("P", "E", "position") if name in case},
                       **{name: case[name][1:, 1:] for name in "qkvo"}, "g": case["g"][..., 1:]})
    layer = make(narrow)
    y = out(layer, narrow)
    yield raised("load() of a prompt of another width", lambda: layer.load(blob))
    yield same("y after the refusal", out(layer, narrow), y)
