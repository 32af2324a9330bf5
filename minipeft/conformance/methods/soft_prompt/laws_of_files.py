"""Laws of a soft prompt's file, and of layers beside each other."""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import RAISES, Fault
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.soft_prompt.equations import BASE, values
from minipeft.conformance.methods.soft_prompt.laws import Seen, out
from minipeft.conformance.methods.soft_prompt.laws_of_training import gradient
from minipeft.conformance.observe import between, fact, raised, same

LAWS = Laws()
law = LAWS.law


def shown(layer: Any, case: Case) -> dict[str, numpy.ndarray]:
    """{name: array}: everything that the layer computes, as far as it offers it. y is first, since a first call may
    prepare what later ones use."""
    found = {"y": out(layer, case)}
    if layer.offers("vjp"):
        found["dP"] = gradient(layer, case)
    if layer.offers("base_forward"):
        found["y without a prompt"] = out(layer, case, "base_forward")
    return found


def alike(case: Case, what: str, got: dict[str, numpy.ndarray], want: dict[str, numpy.ndarray]) -> Seen:
    """Observations that `got` is `want`, both as from `shown`, bit for bit. dP is compared within its bound: it is a
    sum over the batch, whose order may change from call to call."""
    ref, p = values(case)["dP"], len(case["P"])
    for name, array in got.items():
        if name == "dP":
            yield between(case, f"dP {what}", array[:p], want[name][:p], ref, ref)
        else:
            yield same(f"{name} {what}", array, want[name])


def another(case: Case) -> Case:
    """The case with another prompt. It attends to other places, and is not 0: a load that adds to it is found."""
    return case.but({"P": -2 * case["P"]})


@law("P6", "M: saved and loaded, it is the same, bit for bit, in a new layer and in one that was used", "save", "load",
     "forward")
def round_trip(case: Case, make: Make) -> Seen:
    layer = make(case)
    want, blob = shown(layer, case), layer.save()
    for what, used in (("a new layer", False), ("a layer that was used", True)):
        other = make(another(case))
        if used:
            shown(other, case)
        other.load(blob)
        yield from alike(case, f"after load into {what}", shown(other, case), want)


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


@law("P6l", "M: a saved prompt of another length is loaded as it is, or refused", "save", "load", "forward",
     where=lambda case: len(case["P"]) > 1)
def other_length(case: Case, make: Make) -> Seen:
    short = case.but({"P": case["P"][1:]})
    for what, of, into in (("shorter", short, case), ("longer", case, short)):
        layer, ref = make(into), values(of)["y"]
        before = out(layer, into)
        saved = make(of)
        blob = saved.save()
        try:
            layer.load(blob)
        except Fault as fault:
            yield fact(f"load() of a {what} prompt", fault.kind, RAISES, fault.detail)
            yield same(f"y after a {what} prompt was refused", out(layer, into), before)
            continue
        yield between(of, f"y after load of a {what} prompt", out(layer, of), out(saved, of), ref, ref)


@law("P7", "M: two layers beside each other do not affect each other", "forward")
def side_by_side(case: Case, make: Make) -> Seen:
    first = make(case)
    alone = shown(first, case)
    other = case.but({"P": -case["P"]})
    shown(make(other), other)
    yield from alike(case, "of a layer beside another", shown(first, case), alone)
