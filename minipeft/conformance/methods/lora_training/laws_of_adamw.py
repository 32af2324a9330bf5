"""Laws of AdamW alone: the length of its first step, and its parts where they can be told apart."""
from __future__ import annotations

import numpy

from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.lora_training.batches import first_steps, repeated, steps_of
from minipeft.conformance.methods.lora_training.equations import path_values
from minipeft.conformance.methods.lora_training.laws import Seen, ended, step, weights
from minipeft.conformance.observe import Observation, near

LAWS = Laws()
law = LAWS.law


def adamw(case: Case) -> bool:
    """Whether the case's optimizer is AdamW."""
    return case.params["optimizer"] != "sgd"


@law("T14", "M: the first step of AdamW moves no number by more than the learning rate", "step", "weights",
     kinds=("bounded",), where=adamw)
def first_step(case: Case, make: Make) -> Seen:
    changed = {"weight_decay": 0.0, "schedule": "constant", "beta1": 0.75, "beta2": 0.96875}
    plain = first_steps(case.but(params=changed), 1)
    found, lr, u = ended(plain, make), case.params["lr"], case.arith.u_s
    for name in "AB":
        moved = abs(found[name] - case[name])
        # eight roundings: m / (1 - b1), sqrt(v / (1 - b2)), their quotient, its product with lr; and the difference
        tau = lr * 8 * u * (1 + 8 * u) + u * (abs(case[name]) + lr * (1 + 8 * u)) * (1 + u)
        yield Observation(f"how far {name} went beyond it", "B", numpy.maximum(moved - lr, 0), 0 * moved, tau)


@law("T16", "V: twelve steps of AdamW from A = 0 on gradients of one sign and the size of eps, where its parts can be "
     "told apart", "step", "weights", kinds=("bounded",), where=adamw, examples=20)
def of_the_size_of_eps(case: Case, make: Make) -> Seen:
    yield from of_one_sign(repeated(case, 12), make, 0.75)


@law("T17", "V: three steps of AdamW from A = 0 with beta1 = 0, where nothing is kept of earlier gradients", "step",
     "weights", kinds=("bounded",), where=adamw, examples=20)
def without_first_moment(case: Case, make: Make) -> Seen:
    yield from of_one_sign(first_steps(case, 3), make, 0.0)


def of_one_sign(case: Case, make: Make, beta1: float) -> Seen:
    """A after every step from A = 0, on gradients of one sign and the size of eps. So the bound is relative: nothing
    cancels, and A holds only updates. B moves so little that dA hardly changes."""
    arrays = {name: 0 * case[name] for name in ("W", "b", "A")} | {name: abs(case[name]) for name in ("B", "x")}
    eps = 2.0 ** -5
    twin = case.but({**arrays, "t": -abs(case["t"])}, {
        "eps": eps, "lr": eps / 64, "clip": None, "schedule": "constant", "weight_decay": 0.0,
        "alpha": abs(case.params["alpha"]), "beta1": beta1, "beta2": 0.9375})
    gradient = path_values(first_steps(twin, 1))[0].moments["m.A"].exact / (1 - beta1)
    if not gradient.all():
        return
    times = 2.0 ** int(numpy.round(numpy.log2(eps / numpy.median(gradient))))
    twin = twin.but({"t": twin["t"] * times})
    run = make(twin)
    for t, (micro_batches, after) in enumerate(zip(steps_of(twin), path_values(twin)), start=1):
        step(run, micro_batches)
        yield near(twin, f"A after step {t}", weights(run, twin)["A"], after.weights["A"])
