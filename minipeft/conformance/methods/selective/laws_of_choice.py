"""Laws of a block whose choice of trained weights changes. All are M or S."""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.selective.cases import SELECTIONS, refusals
from minipeft.conformance.methods.selective.equations import NAMES, trained, values
from minipeft.conformance.methods.selective.laws import (Seen, advance, everything, gradients, judged, names_of, out,
                                                         weights)
from minipeft.conformance.observe import between, fact, raised, same
from minipeft.conformance.tolerance import Value

LAWS = Laws()
law = LAWS.law
PATTERNS = {r"\.bias$": "the biases (BitFit)", "^norm": "the norm", r"^fc1\.": "one layer", "fc2.weight": "one matrix",
            r"^norm\.weight$|^fc2\.weight$": "the norm's scale and a matrix"}


@law("S1", "M: a pattern selects the names in which it is found, and nothing else; twice is the same as once", "select",
     "vjp")
def pattern(case: Case, make: Make) -> Seen:
    layer = make(case)
    for text, which in PATTERNS.items():
        twin = case.but(params={"train": SELECTIONS[which]})
        layer.select(text)
        found, ref = gradients(layer, twin), values(case)
        yield fact(f"gradients after select({text!r})", names_of(found), sorted(trained(twin)))
        if layer.offers("trainable"):
            yield fact(f"trainable() after select({text!r})", sorted(layer.trainable()), sorted(trained(twin)))
        layer.select(text)
        again, fresh = gradients(layer, twin), gradients(make(twin), twin)
        for name in trained(twin):
            for how, other in (("twice", again), ("and where it was selected at once", fresh)):
                yield between(judged(case, name), f"d {name} after select({text!r}) {how}", other[name], found[name],
                              *[ref[f"d {name}"]] * 2)


@law("S2", "M: weights trained before another selection keep their values, bit for bit", "select", "step", "weights")
def next_selection(case: Case, make: Make) -> Seen:
    layer = make(case)
    layer.select(r"\.bias$")
    advance(layer, case)
    before = weights(layer, case)
    layer.select(r"\.weight$")
    chosen = weights(layer, case)
    advance(layer, case)
    after = weights(layer, case)
    for name in NAMES:
        yield same(f"{name} after select()", chosen[name], before[name])
        if name.endswith("bias"):
            yield same(f"{name}, trained before, after steps of the others", after[name], before[name])


@law("S3", "M: a mask holds until the next choice, every name has its own, and a selected name is trained whole",
     "train_elements", "select", "vjp")
def mask_after_mask(case: Case, make: Make) -> Seen:
    layer, mask = make(case), case["mask"]
    layer.train_elements({"fc1.weight": mask})
    layer.select(r"^fc1\.weight$")
    yield from _chosen(layer, case, make, {"fc1.weight": mask | True}, "a name selected after a mask of it")
    layer.train_elements({"fc1.weight": mask})
    picked = case["rows"]
    chosen = {"fc2.weight": mask.T if mask.all() else ~mask.T, "norm.bias": picked,
              "fc2.bias": picked if picked.all() else ~picked}
    layer.train_elements(chosen)
    yield from _chosen(layer, case, make, chosen, "three masks after another one")


@law("S4", "M: rows may come in any order, those of a vector are its elements, and a new choice replaces the old",
     "train_rows", "vjp")
def rows_after_rows(case: Case, make: Make) -> Seen:
    layer, rows = make(case), case["rows"]
    ids, others = numpy.flatnonzero(rows), numpy.flatnonzero(~rows)
    layer.train_rows({"fc2.weight": others if len(others) else ids})
    layer.train_rows({"fc2.weight": ids[::-1].copy()})
    whole = numpy.broadcast_to(rows[:, None], case["fc2.weight"].shape)
    yield from _chosen(layer, case, make, {"fc2.weight": whole}, "rows, the last first, after other rows")
    layer.train_rows({"fc2.bias": ids})
    yield from _chosen(layer, case, make, {"fc2.bias": rows}, "elements of a vector, after rows of a matrix")


def _chosen(layer: Any, case: Case, make: Make, chosen: dict[str, numpy.ndarray], how: str) -> Seen:
    """Observations that gradients and names are those of this choice. how: the choice in words."""
    found, ref = gradients(layer, case, list(chosen)), values(case)
    full = gradients(make(everything(case)), case, NAMES)
    yield fact(f"gradients of {how}", names_of(found), sorted(chosen))
    if layer.offers("trainable"):
        yield fact(f"trainable() of {how}", sorted(layer.trainable()), sorted(chosen))
    for name, here in chosen.items():
        yield same(f"d {name} outside {how}", found[name][~here], 0 * found[name][~here])
        value = ref[f"d {name}"]
        part = Value(value.exact[here], value.mag[here], value.k, value.n)
        yield between(case, f"d {name} of {how}", found[name][here], full[name][here], part, part)


@law("X2", "S: names that do not exist, nothing at all and weights of other shapes are refused", "forward",
     kinds=("exact",), examples=2)
def refused(case: Case, make: Make) -> Seen:
    for refusal in refusals(case.dtype):
        twin = case.but(refusal.case.arrays, refusal.case.params)
        yield raised(refusal.what, lambda: make(twin).forward(twin["x"]))


@law("X2s", "S: a pattern that matches nothing is refused, and leaves everything as it was", "select", "trainable",
     "forward", kinds=("exact",))
def nothing_matches(case: Case, make: Make) -> Seen:
    layer = make(case)
    y = out(layer, case)
    yield raised("select() of a pattern that matches nothing", lambda: layer.select(r"attention\.q"))
    yield raised("select() of a name with a letter too many", lambda: layer.select(r"^fc1\.weights$"))
    yield raised("select() of a name in capitals", lambda: layer.select(r"FC1\.WEIGHT"))
    yield fact("trainable() after all", sorted(layer.trainable()), sorted(trained(case)))
    yield same("y after all", out(layer, case), y)


@law("X2e", "S: a mask of another shape, of nothing, or of a name that does not exist is refused", "train_elements",
     "trainable", kinds=("exact",))
def wrong_mask(case: Case, make: Make) -> Seen:
    layer, mask = make(case), case["mask"]
    wrong = {"with an axis too many": mask[None], "of one row too many": numpy.concatenate([mask, mask[:1]]),
             "of one row for all": numpy.ones(mask.shape[1:], bool), "that is false everywhere": mask & False}
    for how, other in wrong.items():
        yield raised(f"a mask {how}", lambda: layer.train_elements({"fc1.weight": other}))
    yield raised("a mask of a name that does not exist", lambda: layer.train_elements({"fc3.weight": mask}))
    yield fact("trainable() after all", sorted(layer.trainable()), sorted(trained(case)))


@law("X2r", "S: rows that do not exist, and none at all, are refused", "train_rows", "trainable", kinds=("exact",))
def wrong_rows(case: Case, make: Make) -> Seen:
    layer, count = make(case), len(case["rows"])
    for how, ids in (("beyond the last", [0, count]), ("before the first", [-1]), ("none", [])):
        yield raised(f"rows: {how}", lambda: layer.train_rows({"fc2.weight": numpy.array(ids, numpy.int64)}))
    yield fact("trainable() after all", sorted(layer.trainable()), sorted(trained(case)))
