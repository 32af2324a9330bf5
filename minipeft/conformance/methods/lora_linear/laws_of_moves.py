"""What holds for a LoRA layer that has moves: several adapters, a file, a second way of merging. All M and S."""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_linear.equations import unmerge_bound, values
from minipeft.conformance.methods.lora_linear.laws import Seen, out
from minipeft.conformance.observe import Observation, between, fact, near, raised, same

LAWS = Laws()
law = LAWS.law


def second(case: Case) -> Case:
    """Another adapter for the same layer: of the same numbers, so on the same grid."""
    return case.but({"A": case["A"][::-1] * -1, "B": numpy.roll(case["B"], 1, axis=0)},
                    {"alpha": 2 * case.params["alpha"]})


def with_two(case: Case, make: Make) -> Any:
    layer, other = make(case), second(case)
    layer.add("second", other["A"], other["B"], other.params["alpha"])
    return layer


@law("L9", "M: adapters do not see each other", "add", "activate", "forward")
def swapped(case: Case, make: Make) -> Seen:
    layer, ref = with_two(case, make), values(second(case))["y"]
    layer.activate(["default"])
    first = out(layer, case)
    layer.activate(["second"])
    other = out(layer, case)
    yield near(case, "y of the second adapter", other, ref)
    layer.activate(["default"])
    yield same("y of the first, after the second", out(layer, case), first)
    if layer.offers("remove"):
        layer.remove("second")
        yield same("y of the first, the second removed", out(layer, case), first)


@law("L9m", "M: a merged and unmerged adapter leaves nothing to the next one", "add", "activate", "merge", "unmerge",
     "forward")
def swapped_after_a_merge(case: Case, make: Make) -> Seen:
    layer, ref = with_two(case, make), values(second(case))["y"]
    layer.activate(["default"])
    layer.merge()
    layer.unmerge()
    layer.activate(["second"])
    y = out(layer, case)
    if case.exact:
        yield near(case, "y of the second", y, ref)
    else:
        bound = case.tau(ref) + abs(case["x"]) @ unmerge_bound(case).T
        yield Observation("y of the second", "B", y, ref.exact, bound)


@law("L9r", "M: each row of a mixed batch is that row with its adapter", "add", "activate", "forward", "forward_rows")
def rows(case: Case, make: Make) -> Seen:
    layer, n = with_two(case, make), len(case["x"])
    names = [("default", "second", None)[i % 3] for i in range(n)]
    y = layer.array("forward_rows", (n, case["W"].shape[0]), case["x"], names)
    for name, twin in (("default", case), ("second", second(case)), (None, case.but({"B": 0 * case["B"]}))):
        chosen = [i for i in range(n) if names[i] == name]
        if chosen:
            alone = twin.but({"x": case["x"][chosen], "g": case["g"][chosen]})
            yield near(case, f"rows of {name or 'the base'}", y[chosen], values(alone)["y"])


@law("L13", "M: saved and loaded, it is the same, bit for bit", "save", "load", "forward")
def round_trip(case: Case, make: Make) -> Seen:
    layer = make(case)
    y = out(layer, case)
    fresh = make(_untrained(case))
    fresh.load(layer.save())
    yield same("y after save and load", out(fresh, case), y)
    if layer.offers("state_keys"):
        names = sorted(layer.state_keys())
        yield fact("the base in the saved state", [name for name in names if name in ("W", "b", "weight", "bias")], [])


def _untrained(case: Case) -> Case:
    return case.but({"A": 0 * case["A"], "B": 0 * case["B"]}, {"alpha": 1.0})


@law("L13m", "M: saved while merged and loaded, it is not merged twice", "save", "load", "merge", "forward")
def merged_round_trip(case: Case, make: Make) -> Seen:
    layer, ref = make(case), values(case)
    y = out(layer, case)
    layer.merge()
    fresh = make(_untrained(case))
    fresh.load(layer.save())
    if not (fresh.offers("is_merged") and fresh.is_merged()):
        fresh.merge()
    yield between(case, "merged y after save and load", out(fresh, case), y, ref["y"], ref["y_merged"])


@law("L13x", "S: a saved adapter of another shape is refused", "save", "load",
     where=lambda case: case["x"].shape[1] > 1)
def wrong_file(case: Case, make: Make) -> Seen:
    blob = make(case).save()
    narrow = case.but({"W": case["W"][:, 1:], "A": case["A"][:, 1:], "x": case["x"][:, 1:]})
    layer = make(narrow)
    y = out(layer, narrow)
    yield raised("load() of an adapter for another d_in", lambda: layer.load(blob))
    yield same("y after the refusal", out(layer, narrow), y)


@law("L14", "M: both ways of merging give the same weight, bit for bit", "merge", "merge_safe", "weight")
def one_rounding_rule(case: Case, make: Make) -> Seen:
    plain, safe = make(case), make(case)
    plain.merge()
    safe.merge_safe()
    w = plain.array("weight", case["W"].shape)
    yield same("W by the checked merge", safe.array("weight", case["W"].shape), w)


@law("X2", "S: what is refused leaves everything as it was", "add", "activate", "forward", kinds=("exact",))
def refused(case: Case, make: Make) -> Seen:
    layer, other = make(case), second(case)
    y = out(layer, case)
    wide = numpy.concatenate([other["A"], other["A"][:1]])
    yield raised("add() with A and B of different rank", lambda: layer.add("second", wide, other["B"], 1.0))
    yield raised("activate() of an unknown name", lambda: layer.activate(["nobody"]))
    yield same("y after both", out(layer, case), y)
