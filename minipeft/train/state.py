"""The state of a run: everything that its next step depends on, to and from a checkpoint."""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import numpy

from minipeft.autograd.tensor import Leaf
from minipeft.backend import Array, to_device
from minipeft.train.checkpoint import Checkpoint
from minipeft.train.data import Batches
from minipeft.train.optim import AdamW


@dataclasses.dataclass
class History:
    """What a run did. losses: of the steps made by this call (a resumed run has the earlier ones in its log);
    scores: (step, score) of all evaluations; best: the first of the highest; seconds: of all calls together."""

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    best: tuple[int, float] | None = None
    seconds: float = 0.0


@dataclasses.dataclass
class State:
    """partial, loss_sum, tokens: of the micro-batches since the last step; micro: of all. rng: of dropout, or None."""

    params: Mapping[str, Leaf]
    optimizer: AdamW
    batches: Batches
    rng: numpy.random.Generator | None
    history: History = dataclasses.field(default_factory=History)
    partial: dict[str, Array] = dataclasses.field(default_factory=dict)
    loss_sum: float = 0.0
    tokens: int = 0
    micro: int = 0

    def arrays(self) -> dict[str, dict[str, Array]]:
        """{group: {name: array}}, as a checkpoint holds them: not copies."""
        stepped = [name for name in self.params if name in self.optimizer.steps]
        return {"param": {name: p.data for name, p in self.params.items()},
                "m": {name: self.optimizer.m[name] for name in stepped},
                "v": {name: self.optimizer.v[name] for name in stepped}, "partial": self.partial}

    def counters(self) -> dict[str, Any]:
        """The rest, as JSON can hold it."""
        h, steps = self.history, self.optimizer.steps
        return {"step": h.step, "scores": h.scores, "best": h.best, "seconds": h.seconds, "micro": self.micro,
                "tokens": self.tokens, "loss_sum": self.loss_sum, "batches": self.batches.state(),
                "rng": self.rng.bit_generator.state if self.rng is not None else None,
                "steps": {name: steps[name] for name in self.params if name in steps}}

    def check(self, saved: Checkpoint) -> None:
        """Raises ValueError unless the arrays of a checkpoint are those of these parameters."""
        stepped, groups = set(saved.state["steps"]), saved.arrays
        partial = set(self.params) if saved.state["tokens"] else set()
        for group, expected in (("param", set(self.params)), ("m", stepped), ("v", stepped), ("partial", partial)):
            odd = sorted(set(groups[group]) ^ expected)
            if odd:
                raise ValueError(f"{saved.path}: {group}/{odd[0]} is "
                                 f"{'missing' if odd[0] in expected else 'not a selected parameter'}")
            for name, array in groups[group].items():
                p = self.params[name]
                if array.shape != p.shape or array.dtype != p.dtype:
                    raise ValueError(f"{saved.path}: {group}/{name} is {array.dtype} {list(array.shape)}; "
                                     f"expected {p.dtype} {list(p.shape)}")

    def restore(self, saved: Checkpoint) -> None:
        """Changes everything in place to what a checkpoint, which `check` has passed, says."""
        state, optimizer = saved.state, self.optimizer
        moved = {group: {name: to_device(array) for name, array in members.items()}
                 for group, members in saved.arrays.items()}
        moments = ((optimizer.m, moved["m"]), (optimizer.v, moved["v"]), (optimizer.steps, state["steps"]))
        self.batches.load_state(state["batches"])
        if self.rng is not None:
            self.rng.bit_generator.state = state["rng"]
        for name, p in self.params.items():
            p.data[...] = moved["param"][name]
            for kept, found in moments:
                kept.pop(name, None)
                if name in found:
                    kept[name] = found[name]
        self.partial, self.loss_sum = moved["partial"], state["loss_sum"]
        self.tokens, self.micro = state["tokens"], state["micro"]
        self.history = History(state["step"], [], [(at, score) for at, score in state["scores"]],
                               tuple(state["best"]) if state["best"] else None, state["seconds"])
