"""A short run that can be stopped anywhere and resumed: what it leaves behind is compared with a run that was not."""
from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy

import minipeft
from minipeft.train import checkpoint as checkpoints
from tests.train import tiny

KINDS = ["full", "LoRA"]
FILES = {"run.safetensors", "log.jsonl", "best.safetensors"}


class StoppedRun:
    """Three steps of two micro-batches, one pair of which has no label tokens; an evaluation after each, and a
    checkpoint every three micro-batches, so that some fall between two steps. Dropout is on. Any two are the same
    run."""

    def __init__(self, folder: Path, kind: str):
        self.folder = folder
        self.model = tiny.model()
        chosen: Any = minipeft.attach(self.model, minipeft.LoRA(2, dropout=0.1), numpy.random.default_rng(0)) \
            if kind == "LoRA" else minipeft.select(self.model, ".*")
        self.chosen, self.params = chosen, dict(getattr(chosen, "parameters", chosen))
        self.optimizer, pairs = minipeft.AdamW(lr=1e-2), tiny.pairs(7)
        self.batches = minipeft.Batches([*pairs, (pairs[0][0], [-100] * 3)], 2)

    def score(self) -> float:
        """It rises and falls, so that the best is not the last."""
        first = next(iter(self.params.values()))
        return float(numpy.sin(1e5 * abs(first.data).sum()))

    def fit(self, **settings: Any) -> Any:
        return minipeft.fit(self.model, self.chosen, self.batches, **{**dict(
            steps=3, optimizer=self.optimizer, schedule=minipeft.cosine_decay(3), accumulate=2, clip=0.5,
            evaluate=self.score, eval_every=1, log=self.folder / "log.jsonl", best=self.folder / "best.safetensors",
            checkpoint=self.folder / "run.safetensors", checkpoint_every=3), **settings})

    def stopped(self, by: Any) -> BaseException | None:
        """What came out of fit, run inside the context manager `by`."""
        try:
            with by:
                self.fit()
        except BaseException as error:
            return error
        return None

    def outcome(self) -> dict[str, Any]:
        """All that the run left in memory and on the disk, but for how long it took."""
        saved = checkpoints.read(self.folder / "run.safetensors")
        saved.state.pop("seconds")
        arrays = {(group, name): (a.dtype, a.shape, a.tobytes()) for group, members in saved.arrays.items()
                  for name, a in members.items()}
        return {"memory": tiny.bits(self.params, self.optimizer), "cursor": self.batches.state(), "arrays": arrays,
                "state": saved.state, "run": saved.run, "log": (self.folder / "log.jsonl").read_bytes(),
                "best": (self.folder / "best.safetensors").read_bytes(), "files": set(tiny.files(self.folder)),
                "base": {name: a.tobytes() for name, a in self.model.state().items()}}


def lines_of(kind: str, folder: Path, interrupt: Any) -> int:
    """How many lines the run has where it may be interrupted."""
    StoppedRun(folder, kind).stopped(interrupt)
    return interrupt.lines


def stop_and_resume(folder: Path, kind: str, interrupt: Any, again: bool) -> tuple[dict[str, Any], str]:
    """A run that is stopped by `interrupt`, and resumed with its own objects (`again`) or new ones; its outcome, and
    what was wrong in between, "" if nothing."""
    run = StoppedRun(folder, kind)
    error = run.stopped(interrupt)
    left = set(tiny.files(folder)) - FILES
    wrong = f"left {sorted(left)}" if left else ""
    if error is not None and not isinstance(error, KeyboardInterrupt):
        wrong = f"raised {type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt) and run.optimizer.made:
        history = getattr(error, "history", None)
        if history is None or history.step != run.optimizer.made or len(history.losses) != history.step:
            wrong = f"history is {history} after {run.optimizer.made} steps"
        if not (folder / "run.safetensors").exists():
            wrong = "no checkpoint"
    if not again:
        run = StoppedRun(folder, kind)
    with contextlib.suppress(KeyboardInterrupt):
        history = run.fit()
        if history.step != 3 or len(history.scores) != 3:
            wrong = wrong or f"history is {history} at the end"
    return run.outcome(), wrong
