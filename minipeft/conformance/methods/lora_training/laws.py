"""Laws of training steps of LoRA: against the reference, and of the frozen arrays.

V: results against the reference. M: relations among the implementation's own results, some also against the reference.
S: facts, such as a set of names.
A law is given a case and `make(case)`, which builds the implementation under test; it yields observations.
"""
from __future__ import annotations

from typing import Any, Iterator

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.fault import NOT_FINITE, WRONG_TYPE, Fault
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_training.batches import Micro, steps_of
from minipeft.conformance.methods.lora_training.equations import path_values, values
from minipeft.conformance.observe import Observation, fact, near, same

LAWS = Laws()
law = LAWS.law
Seen = Iterator[Observation]


def number(where: str, value: Any) -> numpy.ndarray:
    """A Python or NumPy float as an array of shape []. where: the call that returned it. Raises Fault if it is no
    float, or not finite."""
    if not isinstance(value, (float, numpy.floating)):
        raise Fault(WRONG_TYPE, f"{where} returned {type(value).__name__}; expected a float")
    if not numpy.isfinite(value):
        raise Fault(NOT_FINITE, f"{where} returned {value}")
    return numpy.array(float(value))


def step(run: Any, micro_batches: list[Micro]) -> numpy.ndarray:
    """Makes a step, and returns its loss, []."""
    return number("lora_training.step", run.step(micro_batches))


def weights(run: Any, case: Case) -> dict[str, numpy.ndarray]:
    """{"A", "B", "W", "b": array}."""
    return run.arrays("weights", {name: case[name].shape for name in ("A", "B", "W", "b")})


def moments(run: Any, case: Case) -> dict[str, numpy.ndarray]:
    """{"m.A", "m.B", "v.A", "v.B": array}; under SGD whatever the handle has."""
    shapes = {f"{kind}.{name}": case[name].shape for kind in "mv" for name in "AB"}
    return run.arrays("moments", shapes if case.params["optimizer"] != "sgd" else {})


def trained(case: Case, make: Make, steps: list[list[Micro]] | None = None) -> Any:
    """A new handle after all steps: those of the case, or `steps`."""
    run = make(case)
    for micro_batches in steps_of(case) if steps is None else steps:
        step(run, micro_batches)
    return run


def ended(case: Case, make: Make, steps: list[list[Micro]] | None = None) -> dict[str, numpy.ndarray]:
    """The weights of a new handle after all steps: those of the case, or `steps`."""
    return weights(trained(case, make, steps), case)


def sgd(case: Case, **params: Any) -> Case:
    """The case under plain SGD, with these params; it is bounded."""
    kept = {name: value for name, value in case.params.items() if name not in ("beta1", "beta2", "eps")}
    return Case(case.method, case.dtype, False, {**kept, "optimizer": "sgd", **params}, case.arrays, case.label,
                case.conventions, case.declared)


@law("T1", "V: the loss of a step is the mean over all its tokens, before the update", "step")
def losses(case: Case, make: Make) -> Seen:
    run = make(case)
    got = numpy.stack([step(run, micro_batches) for micro_batches in steps_of(case)])
    yield near(case, "losses", got, values(case)["losses"])


@law("T2", "V: A and B after every step are the equations'", "step", "weights")
def paths(case: Case, make: Make) -> Seen:
    yield from path(case, make)


@law("T2s", "V: A and B are the equations' under SGD too, where the size of a gradient matters", "step", "weights",
     kinds=("bounded",), where=lambda case: case.params["optimizer"] != "sgd")
def paths_of_sgd(case: Case, make: Make) -> Seen:
    yield from path(sgd(case), make)


def path(case: Case, make: Make) -> Seen:
    """A and B after every step against the reference."""
    run = make(case)
    for t, (micro_batches, after) in enumerate(zip(steps_of(case), path_values(case)), start=1):
        step(run, micro_batches)
        found = weights(run, case)
        for name, value in after.weights.items():
            yield near(case, f"{name} after step {t}", found[name], value)


@law("T3", "V: the moments after every step are the equations'", "step", "moments", kinds=("bounded",),
     where=lambda case: case.params["optimizer"] != "sgd")
def moments_of_steps(case: Case, make: Make) -> Seen:
    run = make(case)
    for t, (micro_batches, after) in enumerate(zip(steps_of(case), path_values(case)), start=1):
        step(run, micro_batches)
        found = moments(run, case)
        for name, value in after.moments.items():
            yield near(case, f"{name} after step {t}", found[name], value)


@law("T4", "V: the norm before clipping is that of the step's gradient, over A and B together", "step", "grad_norm",
     kinds=("bounded",))
def norms(case: Case, make: Make) -> Seen:
    run = make(case)
    for t, (micro_batches, after) in enumerate(zip(steps_of(case), path_values(case)), start=1):
        step(run, micro_batches)
        yield near(case, f"norm of step {t}", number("lora_training.grad_norm", run.grad_norm()), after.norm)


@law("T5", "V: the learning rate of every step is the schedule's", "step", "lr")
def rates(case: Case, make: Make) -> Seen:
    run = make(case)
    for t, (micro_batches, after) in enumerate(zip(steps_of(case), path_values(case)), start=1):
        step(run, micro_batches)
        yield near(case, f"learning rate of step {t}", number("lora_training.lr", run.lr()), after.lr)


@law("T5w", "V: without a warm-up, and after the last step of a schedule, the learning rate is the schedule's", "step",
     "weights", kinds=("bounded",), examples=20)
def ends_of_schedules(case: Case, make: Make) -> Seen:
    """The schedule has three steps; from the fourth step on the learning rate is 0."""
    for kind in ("linear", "cosine"):
        twin = sgd(case, schedule=kind, warmup=0, steps=3)
        run = make(twin)
        for t, (micro_batches, after) in enumerate(zip(steps_of(twin), path_values(twin)), start=1):
            step(run, micro_batches)
            found = weights(run, twin)
            for name, value in after.weights.items():
                yield near(twin, f"{name} after step {t}, {kind}", found[name], value)
            if run.offers("lr"):
                yield near(twin, f"learning rate of step {t}, {kind}", number("lora_training.lr", run.lr()), after.lr)


@law("T6", "M: W and b are never touched, bit for bit", "step", "weights")
def frozen(case: Case, make: Make) -> Seen:
    run = make(case)
    for t, micro_batches in enumerate(steps_of(case), start=1):
        step(run, micro_batches)
        found = weights(run, case)
        for name in ("W", "b"):
            yield same(f"{name} after step {t}", found[name], case[name])


@law("T7", "S: frozen arrays have no optimizer state", "step", "moments")
def state_of_frozen(case: Case, make: Make) -> Seen:
    run = make(case)
    step(run, steps_of(case)[0])
    of = sorted({name.rpartition(".")[2] for name in moments(run, case)})
    yield fact("arrays that have moments", of, [] if case.params["optimizer"] == "sgd" else ["A", "B"],
               "moments of a frozen array are memory, and a decay that acts on it")
