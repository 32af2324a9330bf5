"""The rows of a case as steps of micro-batches, as a handle's `step` gets them, one step after the other.

    x [N, in], t [N, out], w [N]       inputs, targets, 1 for a token that counts and 0 for padding
    step [N], micro [N]                which step a row belongs to, and which micro-batch of that step

A step whose rows are all padding is left out: no mean exists.
"""
from __future__ import annotations

from typing import Any, Mapping

import numpy

from minipeft.conformance.case import Case

Micro = tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]


def steps_of(case: Case) -> list[list[Micro]]:
    """[step][micro-batch] = (x [n, in], t [n, out], w [n])."""
    found = []
    for step in numpy.unique(case["step"]):
        of_step = case["step"] == step
        parts = [of_step & (case["micro"] == micro) for micro in numpy.unique(case["micro"][of_step])]
        if case["w"][of_step].any():
            found.append([(case["x"][rows], case["t"][rows], case["w"][rows]) for rows in parts])
    return found


def joined(micro_batches: list[Micro]) -> Micro:
    """All rows of these micro-batches as one."""
    x, t, w = (numpy.concatenate(parts) for parts in zip(*micro_batches))
    return x, t, w


def first_steps(case: Case, count: int) -> Case:
    """The case with only its first `count` steps."""
    kept = numpy.isin(case["step"], numpy.unique(case["step"])[:count])
    return case.but({name: case[name][kept] for name in ("x", "t", "w", "step", "micro")})


def repeated(case: Case, count: int) -> Case:
    """The case with `count` steps, by repeating its own."""
    own, names = int(case["step"].max()) + 1, ("x", "t", "w", "micro")
    times = -(-count // own)
    tiled = {name: numpy.concatenate([case[name]] * times) for name in names}
    step = numpy.concatenate([case["step"] + i * own for i in range(times)])
    return first_steps(case.but({**tiled, "step": step}), count)


def settings(case: Case) -> dict[str, Any]:
    """The factory's argument `optimizer`, from the case's params."""
    p: Mapping[str, Any] = case.params
    found = {"name": p["optimizer"], "lr": p["lr"], "weight_decay": p["weight_decay"], "clip": p.get("clip"),
             "schedule": {"kind": p["schedule"], "warmup": p["warmup"], "steps": p["steps"]}}
    if p["optimizer"] != "sgd":
        found |= {"betas": [p["beta1"], p["beta2"]], "eps": p["eps"]}
    return found
