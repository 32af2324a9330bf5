"""Laws of a block's state: switched off and on, and beside another block. All are M or S."""
from __future__ import annotations

from typing import Any

from minipeft.conformance.case import Case
from minipeft.conformance.fault import RAISES, Fault
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.selective.cases import SELECTIONS, selections
from minipeft.conformance.methods.selective.equations import NAMES, trained, values
from minipeft.conformance.methods.selective.laws import (Seen, advance, everything, gradients, judged, names_of, out,
                                                         weights)
from minipeft.conformance.observe import between, fact, same

LAWS = Laws()
law = LAWS.law


def once(case: Case) -> Case:
    """The case with one step: where everything is trained, many steps lead far away."""
    return case.but(params={"steps": 1})


@law("D1", "M: off, everything is as before training, bit for bit, biases too; on, the training is back", "off",
     "on", "step", "weights", "forward")
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


@law("D2", "S: switched off and on, it trains the same weights", "off", "on", "trainable", "vjp")
def still_selected(case: Case, make: Make) -> Seen:
    for twin in (case, case.but(params={"train": SELECTIONS["the norm"]})):
        layer = make(twin)
        layer.off()
        layer.on()
        yield fact("trainable() after off() and on()", sorted(layer.trainable()), sorted(trained(twin)))
        yield fact("gradients after off() and on()", names_of(layer.arrays("vjp", {}, twin["x"], twin["g"])),
                   sorted(trained(twin)))


@law("D3", "M: off() takes back everything ever trained, parts of arrays and earlier choices too, and on() brings "
     "back all of it", "off", "on", "step", "weights", "select", "train_elements")
def switched_after_choices(case: Case, make: Make) -> Seen:
    layer, case = make(everything(case)), once(case)
    layer.select(r"\.bias$")
    advance(layer, case)
    layer.train_elements({"fc1.weight": case["mask"]})
    advance(layer, case)
    yield from _off_and_on(layer, case, "biases and then a mask")


@law("D4", "M: off() and on() again, after further steps, give the base and the weights after these steps", "off", "on",
     "step", "weights")
def steps_in_between(case: Case, make: Make) -> Seen:
    layer, case = make(everything(case)), once(case)
    advance(layer, case)
    layer.off()
    layer.on()
    advance(layer, case)
    yield from _off_and_on(layer, case, "steps before and after off() and on()")


@law("D5", "M: a step while it is off, refused or not, leaves the base as it was", "off", "on", "step", "weights")
def step_while_off(case: Case, make: Make) -> Seen:
    layer, case = make(everything(case)), once(case)
    advance(layer, case)
    layer.off()
    try:
        advance(layer, case)
    except Fault as fault:
        if fault.kind != RAISES:
            raise
    layer.on()
    yield from _base_back(layer, case, "a step while it was off")


def _off_and_on(layer: Any, case: Case, what: str) -> Seen:
    tuned = weights(layer, case)
    yield from _base_back(layer, case, what)
    layer.on()
    again = weights(layer, case)
    for name in NAMES:
        yield same(f"{name} after {what}, off() and on()", again[name], tuned[name])


def _base_back(layer: Any, case: Case, what: str) -> Seen:
    layer.off()
    base = weights(layer, case)
    for name in NAMES:
        yield same(f"{name} after {what}, and off()", base[name], case[name])


@law("H1", "M: two blocks alive at once do not affect each other", "vjp", "forward")
def two_alive(case: Case, make: Make) -> Seen:
    for twin in selections(case)[1:3]:
        layer = make(case)
        y, before = out(layer, case), gradients(layer, case)
        other = make(twin.but({name: -case[name] for name in NAMES}, {"eps": 4 * case.params["eps"]}, exact=False))
        out(other, twin)
        gradients(other, twin)
        yield same("y after another block was used", out(layer, case), y)
        after = layer.arrays("vjp", {}, case["x"], case["g"])
        yield fact("gradients after another block was used", names_of(after), sorted(trained(case)))
        for name in trained(case):
            if after.get(name) is not None:
                yield between(judged(case, name), f"d {name} after another block was used", after[name], before[name],
                              *[values(case)[f"d {name}"]] * 2)
