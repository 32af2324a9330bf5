"""The state of a run in its checkpoint, every number of it checked before anything is restored.

    step, micro              optimizer steps and micro-batches so far
    tokens, loss_sum         of the micro-batches since the last step
    scores, best, due        [[step, score], ...], the first of the highest, whether an evaluation is still to be made
    seconds                  of all calls of `fit`
    batches, rng             the data's cursor; the state of dropout's generator, or null
    steps                    {name: t}, how often the optimizer has stepped each parameter
    log                      the log's length in bytes

The digest of a checkpoint reveals damage, but whoever alters a number can compute a new digest. So nothing here is
trusted: a state that no run of these settings can reach raises ValueError.
"""
from __future__ import annotations

import dataclasses
import json
from typing import Any, Mapping

import numpy

from minipeft.engine.tensor import Leaf
from minipeft.checks import is_integer, is_number, shown
from minipeft.train.checkpoint import Checkpoint
from minipeft.train.data import Batches
from minipeft.train.optim import AdamW

_MOST = 2 ** 53  # no count gets this far
_KEYS = ("step", "micro", "tokens", "loss_sum", "scores", "best", "due", "seconds", "batches", "rng", "steps", "log")


def checked(found: Checkpoint, start: Mapping[str, Any], params: Mapping[str, Leaf], optimizer: AdamW, batches: Batches,
            rng: numpy.random.Generator | None, accumulate: int = 1, logged: bool = True) -> Checkpoint:
    """The checkpoint `found`, checked against the parameters and settings of this run; its scores are tuples.

    start: where the run began (`identity.start_of`). rng: dropout's generator, whose own state does not matter.
    accumulate: micro-batches per step. logged: whether the run keeps a log. Raises ValueError naming the file and the
    entry that is wrong."""
    state, where = found.state, f"{found.path}: the checkpoint's"
    if set(state) != set(_KEYS):
        odd = sorted(set(state) ^ set(_KEYS))[0]
        raise ValueError(f"{where} state {'lacks' if odd in _KEYS else 'has an unknown entry'} {shown(odd)}")
    _check_start(start, where)

    def expect(key: str, holds: Any, expected: str) -> None:
        if not holds:
            raise ValueError(f"{where} {key} is {shown(state[key])}; expected {expected}")

    for key in ("step", "micro", "tokens", "log"):
        expect(key, _count(state[key]), "an integer >= 0")
    for key in ("loss_sum", "seconds"):
        expect(key, is_number(state[key]), "a finite number")
    expect("due", type(state["due"]) is bool, "true or false")
    step, micro, tokens = state["step"], state["micro"], state["tokens"]
    expect("micro", micro // accumulate == step,
           f"the count after {shown(step)} steps of {accumulate} micro-batches each")
    expect("tokens", tokens == 0 or micro % accumulate, "0 right after a step")
    expect("loss_sum", tokens or state["loss_sum"] == 0, "0, because no tokens were counted since the last step")
    expect("seconds", state["seconds"] >= 0, "a number >= 0")
    expect("log", logged or state["log"] == 0, "0, because there is no log")
    expect("due", not state["due"] or step and micro % accumulate == 0, "false, except right after a step")
    scores = _scores(state["scores"])
    expect("scores", scores is not None and (not scores or scores[-1][0] <= step),
           f"a list of [step, score], the steps rising from at least 1 to at most {shown(step)}")
    assert scores is not None
    expect("due", not state["due"] or not scores or scores[-1][0] < step, "false: the evaluation is among the scores")
    best = max(scores, key=lambda at: at[1], default=None)  # the first of equals
    expect("best", state["best"] is None if best is None else _scores([state["best"]]) == [best],
           f"the first of the highest scores, {shown(best)}")
    before = getattr(batches, "batches_before", None)
    if before is not None:
        try:
            reached = before(state["batches"]) == before(start["batches"]) + micro
        except ValueError as error:
            raise ValueError(f"{where} batches: {error}") from None
        expect("batches", reached, f"the cursor after {shown(micro)} micro-batches from {shown(start['batches'])}")
    expect("rng", _is_state_of(state["rng"], rng), "null" if rng is None else
           f"a state of {type(rng.bit_generator).__name__} that the run's seed leads to")
    expect("steps", _steps(state["steps"], start["steps"], step, params, optimizer),
           f"the count of every parameter, {shown(step)} more than at the run's start")
    _check_arrays(found, set(state["steps"]), tokens > 0, params)
    return dataclasses.replace(found, state={**state, "scores": scores, "best": best})


def _count(value: Any, least: int = 0) -> bool:
    return is_integer(value, least) and value < _MOST


def _scores(value: Any) -> list[tuple[int, float]] | None:
    """[[step, score], ...] with rising steps; None for anything else."""
    if not isinstance(value, list) or not all(isinstance(at, list) and len(at) == 2 and _count(at[0], 1)
                                              and is_number(at[1]) for at in value):
        return None
    found = [(at, float(score)) for at, score in value]
    return found if all(a[0] < b[0] for a, b in zip(found, found[1:])) else None


def _check_start(start: Any, where: str) -> None:
    if not isinstance(start, dict) or set(start) != {"parameters", "batches", "steps"} \
            or not isinstance(start["parameters"], str) or not isinstance(start["steps"], dict) \
            or not all(_count(t, 1) for t in start["steps"].values()):
        raise ValueError(f"{where} start is {shown(start)}; expected a fingerprint of the parameters, the place in the "
                         f"data, and the optimizer's counts")


def _steps(found: Any, start: Mapping[str, int], step: int, params: Mapping[str, Leaf], optimizer: AdamW) -> bool:
    """Whether `found` counts `step` more steps of every parameter than `start`. (A class derived from AdamW may keep no
    counts.)"""
    if not isinstance(found, dict) or not all(_count(t, 1) for t in found.values()):
        return False
    wanted = {name: start.get(name, 0) + step for name in params if step or name in start}
    return found == wanted and not set(start) - set(params) or not found and type(optimizer) is not AdamW


def _is_state_of(state: Any, rng: numpy.random.Generator | None) -> bool:
    """Whether `state` is one that this generator can reach, as far as its form tells."""
    if rng is None or not isinstance(state, dict):
        return rng is None and state is None
    kind = type(rng.bit_generator)
    try:
        probe = kind(0)
        probe.state = state
        now: Any = rng.bit_generator.state
        texts = [json.dumps(s, sort_keys=True) for s in (probe.state, state)]  # as text, true is not 1
        if texts[0] != texts[1] or state.get("has_uint32", 0) not in (0, 1):
            return False
        fixed = now["state"].get("inc") if isinstance(now.get("state"), dict) else None
        return fixed is None or state["state"]["inc"] == fixed  # PCG64: the seed fixes the stream
    except Exception:  # NumPy raises exceptions of many types for an invalid state
        return False


def _check_arrays(found: Checkpoint, stepped: set[str], has_partial: bool, params: Mapping[str, Leaf]) -> None:
    """Raises ValueError unless the arrays have the names, shapes and dtypes of `params`, and numbers that are possible:
    finite, and >= 0 in v."""
    partial = set(params) if has_partial else set()
    for group, expected in (("param", set(params)), ("m", stepped), ("v", stepped), ("partial", partial)):
        odd = sorted(set(found.arrays[group]) ^ expected)
        if odd:
            raise ValueError(f"{found.path}: {group}/{shown(odd[0])[1:-1]} is "
                             f"{'missing' if odd[0] in expected else 'not a selected parameter'}")
        for name, array in found.arrays[group].items():
            p = params[name]
            if array.shape != p.shape or array.dtype != p.dtype and group != "partial" or array.dtype.kind != "f":
                raise ValueError(f"{found.path}: {group}/{name} is {array.dtype} {list(array.shape)}; "
                                 f"expected {p.dtype} {list(p.shape)}")
            if not numpy.isfinite(array).all():
                raise ValueError(f"{found.path}: {group}/{name} holds NaN or infinity")
            if group == "v" and array.size and array.min() < 0:
                raise ValueError(f"{found.path}: {group}/{name} holds {array.min()}; expected a mean of squares, >= 0")
