"""Laws of training steps of LoRA, mostly without a reference: micro-batches, padding, clipping, decay, resuming."""
from __future__ import annotations

from typing import Any, Callable

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import RAISES, Fault
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_training.batches import Micro, first_steps, joined, steps_of
from minipeft.conformance.methods.lora_training.equations import After, path_values
from minipeft.conformance.methods.lora_training.laws import (Seen, ended, moments, number, sgd, step, trained,
                                                             weights)
from minipeft.conformance.numbers import derangement, wide
from minipeft.conformance.observe import Observation, between, fact, near, raised, same
from minipeft.conformance.tolerance import Value

LAWS = Laws()
law = LAWS.law


def snapshot(run: Any, case: Case) -> dict[str, numpy.ndarray]:
    """{name: array} of the weights, and of the moments if the handle offers them."""
    return {**weights(run, case), **(moments(run, case) if run.offers("moments") else {})}


def alike(case: Case, what: str, run: Any, before: dict[str, numpy.ndarray]) -> Seen:
    """Observations that `snapshot(run)` is `before`, bit for bit."""
    for name, array in snapshot(run, case).items():
        yield same(f"{name} {what}", array, before[name])


def both(case: Case, what: str, got: dict, want: dict, *afters: After) -> Seen:
    """Observations that A and B of `got` are those of `want`. afters: the references of both, for the bounds."""
    for name in "AB":
        yield between(case, f"{name} {what}", got[name], want[name], *(after.weights[name] for after in afters))


@law("T8", "M: micro-batches of any sizes equal one batch of all their rows", "step", "weights")
def accumulated(case: Case, make: Make) -> Seen:
    steps, last = steps_of(case), path_values(case)[-1]
    one = [[joined(micro_batches)] for micro_batches in steps]
    yield from both(case, "of micro-batches and of one batch", ended(case, make), ended(case, make, one), last, last)
    run, whole = make(case), make(case)
    got, want = step(run, steps[0]), step(whole, one[0])
    first = path_values(case)[0]
    yield between(case, "loss of micro-batches and of one batch", got, want, first.loss, first.loss)
    if run.offers("grad_norm") and not case.exact:
        got, want = (number("lora_training.grad_norm", r.grad_norm()) for r in (run, whole))
        yield between(case, "norm of micro-batches and of one batch", got, want, first.norm, first.norm)


@law("T8z", "M: a micro-batch of padding alone changes nothing, or is refused", "step", "weights")
def only_padding(case: Case, make: Make) -> Seen:
    steps, last = steps_of(case), path_values(case)[-1]
    x, t, w = steps[0][0]
    run = make(case)
    before = weights(run, case)
    try:
        step(run, [steps[0][0], (x, t, 0 * w), *steps[0][1:], (x, t, 0 * w)])
    except Fault as fault:
        yield fact("a micro-batch of padding", fault.kind, RAISES, fault.detail)
        for name, array in weights(run, case).items():
            yield same(f"{name} after the refusal", array, before[name])
        return
    for micro_batches in steps[1:]:
        step(run, [(x, t, 0 * w), *micro_batches])
    yield from both(case, "with and without padding", weights(run, case), ended(case, make), last, last)


@law("T8n", "S: a step of padding alone is refused, and leaves no trace", "step", "weights")
def no_tokens(case: Case, make: Make) -> Seen:
    run, twin, steps = make(case), make(case), steps_of(case)
    for r in (run, twin):
        step(r, steps[0])
    before = snapshot(run, case)
    yield raised("step() without a token", lambda: run.step([(x, t, 0 * w) for x, t, w in steps[0]]),
                 "there is no mean over nothing")
    yield from alike(case, "after the refusal", run, before)
    for micro_batches in steps[1:]:
        step(run, micro_batches)
        step(twin, micro_batches)
    yield from alike(case, "later", run, snapshot(twin, case))


@law("T9", "M: the order of rows and of micro-batches does not matter", "step", "weights")
def order(case: Case, make: Make) -> Seen:
    rng, last = numpy.random.default_rng(case.seed), path_values(case)[-1]
    moved = [[tuple(a[chosen] for a in micro) for micro in micro_batches[::-1]
              for chosen in [derangement(rng, len(micro[2]))]] for micro_batches in steps_of(case)]
    yield from both(case, "of the rows in another order", ended(case, make, moved), ended(case, make), last, last)


@law("T9p", "M: the numbers in padding do not matter, bit for bit", "step", "weights")
def inert_padding(case: Case, make: Make) -> Seen:
    pads = case["w"] == 0
    other = case.but({name: numpy.where(pads[:, None], 1 - case[name][::-1], case[name]) for name in ("x", "t")})
    got, want = ended(case, make, steps_of(other)), ended(case, make)
    for name in "AB":
        yield same(f"{name} with other numbers in padding", got[name], want[name])


@law("T10", "V: where the loss is 0, decay acts alone: A and B times 1 - lr decay at every step", "step", "weights",
     kinds=("bounded",))
def decay(case: Case, make: Make) -> Seen:
    nothing = case.but({"x": 0 * case["x"], "t": numpy.tile(case["b"], (len(case["x"]), 1))},  # y = b, bit for bit
                       {"lr": 0.25, "weight_decay": 1.0})
    run, after = make(nothing), path_values(nothing)
    for micro_batches in steps_of(nothing):
        yield fact("the loss", float(step(run, micro_batches)), 0.0)
    found = weights(run, case)
    for name, value in after[-1].weights.items():  # their bounds contain that of the schedule
        yield near(case, f"{name} after {len(after)} steps", found[name], value)


def once(case: Case, **params: Any) -> Case:
    """The case with one step of SGD, without decay or schedule, and with these params."""
    return first_steps(sgd(case, **{"weight_decay": 0.0, "schedule": "constant", **params}), 1)


@law("T11", "M: a clipped step of SGD has the length lr clip, over A and B together", "step", "weights",
     kinds=("bounded",))
def clipped(case: Case, make: Make) -> Seen:
    norm = path_values(once(case, clip=None))[0].norm
    bound = float(case.tau(norm)) / float(norm.exact) if norm.exact else 1.0
    if bound > 0.25:
        return
    clip = float(f"{float(norm.exact) * 0.5:.3g}")
    short = once(case, clip=clip)
    found, last = ended(short, make), path_values(short)[0]
    length = numpy.sqrt(sum(((wide(found[name]) - case[name]) ** 2).sum() for name in "AB"))
    off = numpy.sqrt(sum((case.tau(last.weights[name]) ** 2).sum() for name in "AB"))
    want = case.params["lr"] * clip * float(norm.exact / (norm.exact + extra(case)))
    yield Observation("how far A and B went", "B", numpy.array([length]), numpy.array([want]), numpy.array([off]))


def extra(case: Case) -> float:
    """The term that is added to the norm, by the convention "clip"."""
    return 1e-6 if case.conventions.get("clip", "").endswith("1e-6)") else 0.0


@law("T11n", "M: clipping above the norm changes nothing", "step", "weights", kinds=("bounded",))
def clipped_by_nothing(case: Case, make: Make) -> Seen:
    """Not bit for bit: an implementation that does not need the norm may fold the mean into the step."""
    free = case.but(params={"clip": None})
    most = max(float(after.norm.exact + case.tau(after.norm)) for after in path_values(free))
    high = case.but(params={"clip": 4 * most + 1})
    yield from both(case, "clipped at four times the norm", ended(high, make), ended(free, make),
                    path_values(high)[-1], path_values(free)[-1])


@law("T12", "M: stopped after two steps, saved, loaded into a new run or a used one and continued, it is the same, bit "
     "for bit", "step", "weights", "state", "load_state")
def resumed(case: Case, make: Make) -> Seen:
    steps = steps_of(case)
    stop = min(2, len(steps) - 1) or 1
    begun = trained(case, make, steps[:stop])
    blob, stopped = begun.state(), snapshot(begun, case)
    want, end = gone_on(begun, steps[stop:]), snapshot(begun, case)
    new = make(case.but({"A": 0 * case["A"], "B": 0 * case["B"]}))
    used = trained(case.but({"A": -case["A"]}), make)  # it has more steps than the file, and other moments
    for what, run in (("a new run", new), ("a used run", used)):
        run.load_state(blob)
        yield from alike(case, f"where it was loaded into {what}", run, stopped)
        yield same(f"losses and rates after load into {what}", gone_on(run, steps[stop:]), want)
        yield from alike(case, f"at the end, loaded into {what}", run, end)


def gone_on(run: Any, steps: list[list[Micro]]) -> numpy.ndarray:
    """Makes these steps. Returns the loss of each, and its learning rate if the handle offers that. (Before the first
    step there is none.)"""
    found = []
    for micro_batches in steps:
        found.append(step(run, micro_batches))
        if run.offers("lr"):
            found.append(number("lora_training.lr", run.lr()))
    return numpy.array(found)


@law("T13", "M: A and B padded with zeros to twice the rank, alpha doubled, are trained alike; the zeros stay", "step",
     "weights")
def padded(case: Case, make: Make) -> Seen:
    r = len(case["A"])
    twin = case.but({"A": numpy.concatenate([case["A"], 0 * case["A"]]),
                     "B": numpy.concatenate([case["B"], 0 * case["B"]], axis=1)}, {"alpha": 2 * case.params["alpha"]})
    got, want = ended(twin, make), ended(case, make)
    grown, last = path_values(twin)[-1].weights, path_values(case)[-1].weights
    for name, kept in (("A", (slice(r), slice(None))), ("B", (slice(None), slice(r)))):
        value = Value(grown[name].exact[kept], grown[name].mag[kept], 1, 1)
        yield between(case, name, got[name][kept], want[name], value, last[name])
    yield same("the zeros of A", got["A"][r:], 0 * case["A"])
    yield same("the zeros of B", got["B"][:, r:], 0 * case["B"])


@law("T15", "M: two runs beside each other do not affect each other", "step", "weights")
def side_by_side(case: Case, make: Make) -> Seen:
    alone = snapshot(trained(case, make), case)
    other = case.but({"A": -case["A"]})
    first, second = make(case), make(other)
    for micro_batches in steps_of(case):
        step(first, micro_batches)
        step(second, micro_batches)
    yield from alike(case, "of a run beside another", first, alone)


WRONG: dict[str, Callable[[Micro], Micro]] = {
    "x of another width": lambda micro: (micro[0][:, :-1], micro[1], micro[2]),
    "t of another width": lambda micro: (micro[0], micro[1][:, :-1], micro[2]),
    "fewer rows in t": lambda micro: (micro[0], micro[1][1:], micro[2])}


@law("X2", "S: a refused step leaves everything as it was", "step", "weights", examples=20)
def refused(case: Case, make: Make) -> Seen:
    steps = steps_of(case)
    run = trained(case, make, steps[:1])
    before = snapshot(run, case)
    good = joined(steps[0])
    for what, spoil in WRONG.items():
        yield raised(f"step() with {what}", lambda: run.step([good, spoil(good)]))
        yield from alike(case, f"after {what}", run, before)
