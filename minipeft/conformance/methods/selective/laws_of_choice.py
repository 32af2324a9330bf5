"""What holds where the choice changes, or is switched off. All M and S."""
from __future__ import annotations

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.selective.cases import SELECTIONS, refusals
from minipeft.conformance.methods.selective.equations import NAMES, trained
from minipeft.conformance.methods.selective.laws import Seen, advance, gradients, out, weights
from minipeft.conformance.observe import fact, raised, same

LAWS = Laws()
law = LAWS.law
PATTERNS = {r"\.bias$": "the biases (BitFit)", "^norm": "the norm", r"^fc1\.": "one layer", "fc2.weight": "one matrix"}


@law("S1", "M: a pattern selects the names in which it is found, and nothing else; twice is the same as once", "select",
     "vjp")
def pattern(case: Case, make: Make) -> Seen:
    layer = make(case)
    for text, which in PATTERNS.items():
        twin = case.but(params={"train": SELECTIONS[which]})
        layer.select(text)
        found = gradients(layer, twin)
        yield fact(f"gradients after select({text!r})",
                   sorted(name for name, g in found.items() if g is not None and name != "x"), sorted(trained(twin)))
        layer.select(text)
        again, fresh = gradients(layer, twin), gradients(make(twin), twin)
        for name in trained(twin):
            yield same(f"d {name} after select({text!r}) twice", again[name], found[name])
            yield same(f"d {name} after select({text!r}) and where it was selected at once", found[name], fresh[name])


@law("S2", "M: what was trained before another selection stays where it is, bit for bit", "select", "step", "weights")
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


@law("D1", "M: off, everything is as before training, bit for bit, biases too; on, it is back", "off", "on", "step",
     "weights", "forward")
def switched(case: Case, make: Make) -> Seen:
    for twin in (case, case.but(params={"train": SELECTIONS["the biases (BitFit)"]}),
                 case.but(params={"train": SELECTIONS["everything"]})):
        layer = make(twin)
        base = out(layer, twin)
        advance(layer, twin)
        y, tuned = out(layer, twin), weights(layer, twin)
        for time in ("once", "twice"):
            layer.off()
            yield same(f"y after off(), {time}", out(layer, twin), base)
            restored = weights(layer, twin)
            for name in NAMES:
                yield same(f"{name} after off(), {time}", restored[name], case[name])
            layer.on()
            yield same(f"y after on(), {time}", out(layer, twin), y)
            again = weights(layer, twin)
            for name in trained(twin):
                yield same(f"{name} after on(), {time}", again[name], tuned[name])


@law("D2", "S: switched off and on, it trains what it did", "off", "on", "trainable", "vjp")
def still_selected(case: Case, make: Make) -> Seen:
    for twin in (case, case.but(params={"train": SELECTIONS["the norm"]})):
        layer = make(twin)
        layer.off()
        layer.on()
        yield fact("trainable() after off() and on()", sorted(layer.trainable()), sorted(trained(twin)))
        found = layer.arrays("vjp", {}, twin["x"], twin["g"])
        yield fact("gradients after off() and on()",
                   sorted(name for name, g in found.items() if g is not None and name != "x"), sorted(trained(twin)))


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
    yield fact("trainable() after both", sorted(layer.trainable()), sorted(trained(case)))
    yield same("y after both", out(layer, case), y)


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
