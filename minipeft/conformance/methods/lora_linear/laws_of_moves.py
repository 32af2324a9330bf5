"""Laws of the operations of a LoRA layer: several adapters, files, and a second way of merging. All are M or S."""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_linear.equations import SCALINGS, scale_of, unmerge_bound, values
from minipeft.conformance.methods.lora_linear.laws import Seen, gradients_of, out, refusal, restored
from minipeft.conformance.methods.lora_linear.steps import rate_of, values_after
from minipeft.conformance.observe import Observation, between, fact, near, raised, same

LAWS = Laws()
law = LAWS.law


def second(case: Case) -> Case:
    """Another adapter for the same layer. It has the same numbers, so they are on the same grid; another rank where the
    layer has room for one; and -2 times the scale. Its rank is 1 or 4: their square roots are rational, so exact cases
    stay exact."""
    (r, d_in), d_out, rule = case["A"].shape, len(case["B"]), case.conventions.get("scaling", SCALINGS[0])
    rank = 1 if r > 1 else 4 if min(d_in, d_out) >= 4 else 1
    a = numpy.stack([numpy.roll(case["A"][-1 - i % r], i) for i in range(rank)])
    b = numpy.stack([numpy.roll(case["B"][:, i % r], i + 1) for i in range(rank)], axis=1)
    divisor = {"alpha/r": rank, "alpha/sqrt(r)": rank ** 0.5, "alpha": 1}[rule]
    return case.but({"A": a, "B": b}, {"alpha": -2 * float(scale_of(case)) * divisor})


def with_two(case: Case, make: Make, active: str = "default") -> Any:
    """A layer with the case's adapter and `second(case)`, of which `active` is active."""
    layer, other = make(case), second(case)
    layer.add("second", other["A"], other["B"], other.params["alpha"])
    layer.activate([active])
    return layer


def untrained(case: Case) -> Case:
    """The case with A = 0, B = 0 and alpha = 1."""
    return case.but({"A": 0 * case["A"], "B": 0 * case["B"]}, {"alpha": 1.0})


def no_adapter(case: Case) -> Case:
    """The case with B = 0, whose reference is that of the base alone."""
    return case.but({"B": 0 * case["B"]})


@law("L9", "M: adapters do not see each other", "add", "activate", "forward")
def swapped(case: Case, make: Make) -> Seen:
    layer, ref = with_two(case, make), values(second(case))["y"]
    first = out(layer, case)
    layer.activate(["second"])
    yield near(case, "y of the second adapter", out(layer, case), ref)
    layer.activate([])
    yield near(case, "y with no adapter active", out(layer, case), values(no_adapter(case))["y"])
    layer.activate(["default"])
    yield same("y of the first, after the others", out(layer, case), first)
    if layer.offers("remove"):
        layer.remove("second")
        yield same("y of the first, the second removed", out(layer, case), first)


@law("L9a", "M: training, merging and saving act on the active adapter", "add", "activate", "forward")
def active_alone(case: Case, make: Make) -> Seen:
    other, bounded = second(case), case.but(exact=False)
    layer, ref, after = with_two(case, make, "second"), values(other), values_after(other)
    if layer.offers("vjp"):
        found = gradients_of(layer, other)
        for leaf in "ABx":
            yield near(case, f"d{leaf} of the second", found[leaf], ref[f"d{leaf}"])
    if layer.offers("save", "load"):
        fresh = make(untrained(other))
        fresh.load(layer.save())
        yield near(case, "y of the second, saved and loaded", out(fresh, case), ref["y"])
    if layer.offers("step"):
        layer.step(case["x"], case["g"], rate_of(ref))
        yield near(bounded, "y of the second after a step", out(layer, case), after["y"])
        layer.activate(["default"])
        yield near(case, "y of the first, after a step of the second", out(layer, case), values(case)["y"])
    if layer.offers("merge", "weight"):
        layer = with_two(case, make, "second")
        layer.merge()
        yield near(case, "W with the second merged", layer.array("weight", case["W"].shape), ref["W_merged"])


@law("L9m", "M: a merged and unmerged adapter leaves nothing to the next one", "add", "activate", "merge", "unmerge",
     "forward")
def swapped_after_a_merge(case: Case, make: Make) -> Seen:
    layer = with_two(case, make)
    layer.merge()
    layer.unmerge()
    layer.activate(["second"])
    yield _second_after_a_merge(case, "y of the second", layer)


@law("L9w", "M: a merged adapter leaves nothing behind when it is replaced or removed, unless that is refused", "add",
     "activate", "merge", "forward")
def replaced_while_merged(case: Case, make: Make) -> Seen:
    layer = with_two(case, make)
    layer.merge()
    no = refusal("activate() while another is merged", lambda: layer.activate(["second"]))
    yield from no or [_second_after_a_merge(case, "y of the second, activated while the first was merged", layer)]
    if layer.offers("remove", "weight"):
        layer = with_two(case, make)
        layer.merge()
        no = refusal("remove() while merged", lambda: layer.remove("default"))
        yield from no or [restored("W, the merged adapter removed", layer, case)]


def _second_after_a_merge(case: Case, name: str, layer: Any) -> Observation:
    ref, y = values(second(case))["y"], out(layer, case)
    if case.exact:
        return near(case, name, y, ref)
    return Observation(name, "B", y, ref.exact, case.tau(ref) + abs(case["x"]) @ unmerge_bound(case).T)


@law("L9r", "M: each row of a mixed batch is computed with its own adapter", "add", "activate", "forward",
     "forward_rows")
def rows(case: Case, make: Make) -> Seen:
    layer, n = with_two(case, make), len(case["x"])
    names = [("default", "second", None)[i % 3] for i in range(n)]
    y = layer.array("forward_rows", (n, case["W"].shape[0]), case["x"], names)
    for name, twin in (("default", case), ("second", second(case)), (None, no_adapter(case))):
        chosen = [i for i in range(n) if names[i] == name]
        if chosen:
            alone = twin.but({"x": case["x"][chosen], "g": case["g"][chosen]})
            yield near(case, f"rows of {name or 'the base'}", y[chosen], values(alone)["y"])


@law("L13", "M: saved and loaded, it is the same, bit for bit", "save", "load", "forward")
def round_trip(case: Case, make: Make) -> Seen:
    layer, ref = make(case), values(case)
    y = out(layer, case)
    fresh = make(untrained(case))
    out(fresh, case)                                          # what it may keep of this is stale after the load
    fresh.load(layer.save())
    yield same("y after save and load", out(fresh, case), y)
    if fresh.offers("vjp"):
        found = gradients_of(fresh, case)
        for leaf in "ABx":
            yield near(case, f"d{leaf} after save and load", found[leaf], ref[f"d{leaf}"])
    if layer.offers("state_keys"):
        names = sorted(layer.state_keys())
        yield fact("the base in the saved state", [name for name in names if name in ("W", "b", "weight", "bias")], [])


@law("L13r", "M: a file of another rank is loaded with that rank, or refused", "save", "load", "forward")
def other_rank(case: Case, make: Make) -> Seen:
    other = second(case)
    blob, layer = make(other).save(), make(case)
    y = out(layer, case)
    no = refusal("load() of a file of another rank", lambda: layer.load(blob))
    yield from no or [near(case, "y after the load", out(layer, case), values(other)["y"])]
    if no:
        yield same("y after the refusal", out(layer, case), y)


@law("L13m", "M: saved while merged and loaded, it is not merged twice", "save", "load", "merge", "forward")
def merged_round_trip(case: Case, make: Make) -> Seen:
    layer, ref = make(case), values(case)
    y = out(layer, case)
    layer.merge()
    fresh = make(untrained(case))
    if fresh.offers("unmerge"):                               # what it may keep of this is stale after the load
        fresh.merge()
        fresh.unmerge()
    fresh.load(layer.save())
    if not (fresh.offers("is_merged") and fresh.is_merged()):
        fresh.merge()
    yield between(case, "merged y after save and load", out(fresh, case), y, ref["y"], ref["y_merged"])


@law("L13x", "S: a saved adapter of another shape is refused", "save", "load",
     where=lambda case: case["x"].shape[1] > 1)
def wrong_file(case: Case, make: Make) -> Seen:
    blob = make(case).save()
    narrow = case.but({"W": case["W"][:, 1:], "A": case["A"][:, 1:], "x": case["x"][:, 1:]},
                      {"alpha": 2 * case.params["alpha"]})
    layer = make(narrow)
    y = out(layer, narrow)
    yield raised("load() of an adapter for another d_in", lambda: layer.load(blob))
    yield same("y after the refusal", out(layer, narrow), y)


@law("L14", "M: both ways of merging give the same weight, bit for bit, and the same state", "merge", "merge_safe",
     "weight", "forward")
def one_rounding_rule(case: Case, make: Make) -> Seen:
    plain, safe, ref = make(case), make(case), values(case)
    plain.merge()
    safe.merge_safe()
    w = plain.array("weight", case["W"].shape)
    yield same("W by the checked merge", safe.array("weight", case["W"].shape), w)
    yield near(case, "y after the checked merge", out(safe, case), ref["y_merged"])


@law("X2", "S: a refused call leaves everything as it was", "add", "activate", "forward", kinds=("exact",))
def refused(case: Case, make: Make) -> Seen:
    layer, other = make(case), second(case)
    y = out(layer, case)
    wide = numpy.concatenate([other["A"], other["A"][:1]])
    yield raised("add() with A and B of different rank", lambda: layer.add("second", wide, other["B"], 1.0))
    yield raised("activate() of what was not added", lambda: layer.activate(["second"]))
    yield raised("activate() of an unknown name", lambda: layer.activate(["nobody"]))
    if layer.offers("forward_rows"):
        names = ["nobody"] * len(case["x"])
        yield raised("forward_rows() with an unknown name", lambda: layer.forward_rows(case["x"], names))
    yield same("y after these", out(layer, case), y)
