"""Checks that a run may resume from a checkpoint: it must be the same run, and its parameters those of the run's start
or of the checkpoint."""
from __future__ import annotations

import math
import os
from typing import Any

from minipeft.checks import shown
from minipeft.nn.fingerprint import fingerprint
from minipeft.train.arguments import Settings
from minipeft.train.checkpoint import Checkpoint, read
from minipeft.train.identity import describe, difference, start_of
from minipeft.train.saved import checked
from minipeft.train.state import State

_RATES = "schedule, summed over the steps made"
_OTHER = "delete it, or pass resume=False to start afresh and replace it"


class Identity:
    """The description of a run in its checkpoints. start: where it began; a resumed run takes it over from there."""

    def __init__(self, model: Any, state: State, settings: Settings):
        self.fixed = describe(
            model, state.params, state.batches, state.optimizer, clip=settings.clip, accumulate=settings.accumulate,
            seed=settings.seed, dropout=settings.dropout, log="kept" if settings.log is not None else "not kept")
        self.start = start_of(state.params, state.batches, state.optimizer)
        self._schedule, self._factors = settings.schedule, list[float]()

    def rates(self, step: int) -> float:
        """The schedule, summed over the first `step` steps. Another schedule changes it, a longer run does not."""
        while len(self._factors) < step:
            self._factors.append(float(self._schedule(len(self._factors) + 1)))
        return math.fsum(self._factors[:step])

    def at(self, step: int) -> dict[str, Any]:
        """The description for a checkpoint after `step` optimizer steps."""
        return {**self.fixed, _RATES: self.rates(step), "start": self.start}


def resumed(path: str | os.PathLike, identity: Identity, model: Any, state: State, settings: Settings) -> Checkpoint:
    """The checkpoint in the file `path`, checked for this run. `identity` takes over the start that it holds.

    Raises ValueError, naming the file and saying what to do, for a checkpoint that is damaged, of another run or start,
    or past the last step of this run, and if the file with the weights of its best score is missing."""
    found = read(path)
    said = {key: value for key, value in found.run.items() if key not in ("start", _RATES)}
    differs = difference(said, identity.fixed)
    if differs is not None:
        raise ValueError(f"{path} belongs to another run: {differs}; {_OTHER}")
    for key in ("start", _RATES):
        if key not in found.run:
            raise ValueError(f"{path}: the checkpoint's run lacks {key!r}")
    start = found.run["start"]
    saved = checked(found, start, state.params, state.optimizer, state.batches, state.rng, settings.accumulate,
                    settings.log is not None)
    step, scored = saved.state["step"], saved.state["best"]
    if step > settings.steps:
        raise ValueError(f"{path} is at step {step}, past the {settings.steps} steps asked for")
    rates = identity.rates(step)
    if found.run[_RATES] != rates:
        raise ValueError(
            f"{path} belongs to another run: {_RATES} is {shown(found.run[_RATES])} there and {shown(rates)} here, so "
            f"its {step} steps were made at other rates than {shown(settings.schedule)} gives. A run whose "
            f"schedule ends cannot be lengthened: finish it with the schedule that it began with, and start a second "
            f"run on the result with a checkpoint of its own; or start afresh with resume=False")
    here = identity.start["parameters"]  # bit for bit those of the run's start or of the checkpoint
    if here not in (start["parameters"], fingerprint(saved.arrays["param"])):
        raise ValueError(
            f"{path} belongs to another run, of another start: the parameters here are neither those that its run "
            f"began with nor those that it holds (another seed or base, or trained since): {_OTHER}, or restore the "
            f"parameters")
    best = settings.best
    if best is not None and scored is not None and not os.path.isfile(best):
        raise ValueError(f"best is {shown(str(best))}, which is missing: {path} has its best score from step "
                         f"{scored[0]}, and that file held the weights of that step; put it back, or start afresh "
                         f"with resume=False")
    identity.start = start
    if saved.state["micro"]:  # they were trained on the attachments that are plugged below them now
        tell = getattr(getattr(model, "host", None), "differentiated", None)
        if tell is not None:
            tell(frozenset(state.params.values()))
    return saved
