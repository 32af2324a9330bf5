"""The state of a run: everything that its next step depends on.

A micro-batch replaces one immutable `Record` by the next, in one assignment. The parameters, the moments, the data's
cursor and dropout's generator are changed in place. `State.settle` makes them agree with a record again, whatever
interrupted the run: a step that began is finished (`update.py`), and everything else goes back to the last record.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping

import numpy

from minipeft.engine.tensor import Leaf
from minipeft.backend import Array, to_device
from minipeft.train.checkpoint import Checkpoint
from minipeft.train.data import Batches
from minipeft.train.optim import AdamW
from minipeft.train.update import to_its_end


@dataclasses.dataclass
class History:
    """The history of a run. step: optimizer steps made; losses: of the steps made by this call (the log of a resumed
    run has the earlier ones); scores: (step, score) of all evaluations; best: the first of the highest; seconds: the
    time of all calls together."""

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    best: tuple[int, float] | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Record:
    """A run as it is after a micro-batch. step, micro: optimizer steps and micro-batches so far. partial, loss_sum,
    tokens: sums of gradients, losses and label tokens over the micro-batches since the last step. cursor, rng: states
    of the data and of dropout's generator. losses, scores: how many entries of the state's lists are on record. best:
    (step, score) of the first highest score. due: whether an evaluation is to be made before the next step. log: the
    log's length in bytes. tail: the last line of the log."""

    step: int = 0
    micro: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    partial: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    cursor: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rng: Mapping[str, Any] | None = None
    losses: int = 0
    scores: int = 0
    best: tuple[int, float] | None = None
    due: bool = False
    log: int = 0
    tail: bytes = b""


class State:
    """The state of a run. rng: dropout's generator, or None. record: the Record after the last complete micro-batch."""

    def __init__(self, params: Mapping[str, Leaf], optimizer: AdamW, batches: Batches,
                 rng: numpy.random.Generator | None):
        self.params, self.optimizer, self.batches, self.rng = params, optimizer, batches, rng
        self.record = Record(cursor=dict(batches.state()), rng=self.drawn())
        self.seconds = 0.0
        self._losses: list[float] = []
        self._scores: list[tuple[int, float]] = []
        self._pending: tuple[Record, int] | None = None  # of a step that may have begun: the record and count after it

    def drawn(self) -> Mapping[str, Any] | None:
        """The state of dropout's generator; None without dropout."""
        return None if self.rng is None else self.rng.bit_generator.state

    def scores(self) -> list[tuple[int, float]]:
        """(step, score) of all evaluations on record."""
        return self._scores[:self.record.scores]

    def history(self) -> History:
        """The history of the run up to its record."""
        record = self.record
        return History(record.step, self._losses[:record.losses], self.scores(), record.best,
                       self.seconds)

    def figures(self) -> str:
        """The last loss of this call and the last score, for the progress bar."""
        r = self.record
        latest = {"loss": self._losses[r.losses - 1] if r.losses else None,
                  "score": self._scores[r.scores - 1][1] if r.scores else None}
        return ", ".join(f"{what} {value:.4f}" for what, value in latest.items() if value is not None)

    def commit(self, after: Record, step: Callable[[], None] | None = None, loss: float | None = None,
               score: float | None = None) -> None:
        """Make `after` the record, with the `loss` or `score` that it counts. step: the optimizer's step, which is made
        first; None if there is none."""
        if loss is not None:
            self._losses[after.losses - 1:] = [loss]
        if score is not None:
            self._scores[after.scores - 1:] = [(after.step, score)]
        if step is not None:
            self._pending = after, self.optimizer.made + 1
            step()
        self.record = after
        self._pending = None

    def settle(self) -> None:
        """After an exception: make everything that changes in place agree with the record. May be called again."""
        if self._pending is not None and self.optimizer.made >= self._pending[1]:
            self.record = self._pending[0]
        self._pending = None
        self.batches.load_state(self.record.cursor)
        if self.rng is not None and self.record.rng is not None:
            self.rng.bit_generator.state = self.record.rng

    def arrays(self) -> dict[str, dict[str, Array]]:
        """{group: {name: array}} for a checkpoint; the arrays are not copied."""
        found = {name: self.optimizer.moments(name, p) for name, p in self.params.items()}
        stepped = {name: held for name, held in found.items() if held is not None}
        return {"param": {name: p.data for name, p in self.params.items()},
                "m": {name: held.m for name, held in stepped.items()},
                "v": {name: held.v for name, held in stepped.items()}, "partial": dict(self.record.partial)}

    def counters(self) -> dict[str, Any]:
        """The rest of the state for a checkpoint, as JSON can hold it (the table in `saved.py`)."""
        r = self.record
        found = {name: self.optimizer.moments(name, p) for name, p in self.params.items()}
        return {"step": r.step, "micro": r.micro, "tokens": r.tokens, "loss_sum": r.loss_sum, "scores": self.scores(),
                "best": r.best, "due": r.due, "seconds": self.seconds, "batches": dict(r.cursor), "rng": r.rng,
                "log": r.log, "steps": {name: held.t for name, held in found.items() if held is not None}}

    def restore(self, saved: Checkpoint) -> None:
        """Restore the checked checkpoint `saved`, in place and completely, whatever interrupts it."""
        moved = {group: {name: to_device(array) for name, array in members.items()}
                 for group, members in saved.arrays.items()}
        there = saved.state
        moments = {name: (moved["m"][name], moved["v"][name], t) for name, t in there["steps"].items()}
        record = Record(there["step"], there["micro"], there["tokens"], float(there["loss_sum"]), moved["partial"],
                        there["batches"], there["rng"], 0, len(there["scores"]), there["best"], there["due"],
                        there["log"])

        def put() -> None:
            for name, p in self.params.items():
                p.data[...] = moved["param"][name]
            self.optimizer.restore(self.params, moments)
            self._losses, self._scores, self.seconds = [], list(there["scores"]), float(there["seconds"])
            self.record = record
            self.settle()

        to_its_end(put)
