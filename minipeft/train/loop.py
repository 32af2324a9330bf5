"""The training loop: forward, backward, accumulate, clip, step; evaluate, log, checkpoint; resume to the same bits.

Accumulation weighs micro-batches by their label tokens: with n_i tokens and mean loss L_i each,

    grad = sum_i n_i grad L_i / sum_i n_i

is the gradient of the mean over all tokens, as of one big batch. (Averaging the L_i instead is a common error.)
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy

from minipeft.autograd.tensor import Leaf, value_and_grad
from minipeft.backend import Array, to_host
from minipeft.nn.fingerprint import fingerprint
from minipeft.train import checkpoint as checkpoints
from minipeft.train.data import Batches, label_tokens
from minipeft.train.optim import AdamW
from minipeft.train.progress import Progress
from minipeft.train.schedule import Schedule, constant


@dataclasses.dataclass
class History:
    """What a run did. losses: of the steps made by this call (a resumed run has the rest in its log)."""

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    best: tuple[int, float] | None = None
    seconds: float = 0.0


def fit(model: Any, params: Mapping[str, Leaf], batches: Batches, *, steps: int, optimizer: AdamW | None = None,
        schedule: Schedule | None = None, clip: float | None = 1.0, accumulate: int = 1, seed: int = 0,
        dropout: bool = True, evaluate: Callable[[], float] | None = None, eval_every: int | None = None,
        log: str | os.PathLike | None = None, checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 100, resume: bool = True, progress: bool = True, label: str = "training") -> History:
    """Train `params` in place for `steps` optimizer steps on model.loss(**batch, rng=rng).

    params: {name: Parameter}, e.g. `select(model, ".*")` or `attachment.parameters`; nothing else changes.
    schedule: factor on the learning rate at each step; clip: largest global norm of the gradient (None: no limit);
    accumulate: micro-batches per step, weighted by label tokens; seed: of dropout, which `dropout=False` turns off.
    evaluate: a score, higher is better, taken every `eval_every` steps and after the last.
    log: a JSONL file, a line per step and per evaluation. checkpoint: a file, written every `checkpoint_every`
    micro-batches and at the end; if it is there and `resume`, the run goes on from it and ends with the bits of a run
    that was never stopped (on one machine, BLAS and thread count).

    Raises FloatingPointError for a loss or gradient that is not finite, before the parameters or the checkpoint are
    touched; ValueError for a checkpoint of another run."""
    run = _Run(model, params, batches, steps, optimizer or AdamW(), schedule or constant(), clip, accumulate, seed,
               dropout, log, checkpoint, checkpoint_every)
    run.start(resume)
    history = run.history
    begun = time.perf_counter() - history.seconds
    with Progress(steps, history.step, label, progress) as bar:
        try:
            while history.step < steps:
                loss = run.step()
                history.seconds = time.perf_counter() - begun
                bar.update(history.step, f"loss {loss:.4f}" + (f"  score {history.scores[-1][1]:.4f}"
                                                               if history.scores else ""))
                if evaluate and (history.step == steps or (eval_every and history.step % eval_every == 0)):
                    run.scored(float(evaluate()))
                run.checkpoint_if_due()
            run.finish()
        finally:
            run.close()
    return history


class _Run:
    """The state of a run: everything that a checkpoint holds, and the moves between checkpoints."""

    def __init__(self, model: Any, params: Mapping[str, Leaf], batches: Batches, steps: int, optimizer: AdamW,
                 schedule: Schedule, clip: float | None, accumulate: int, seed: int, dropout: bool, log: Any,
                 checkpoint: Any, checkpoint_every: int):
        for what, value in (("steps", steps), ("accumulate", accumulate), ("checkpoint_every", checkpoint_every)):
            if value < 1:
                raise ValueError(f"{what} is {value}; expected at least 1")
        if not params:
            raise ValueError("nothing is selected: params is empty")
        self.model, self.params, self.batches, self.optimizer = model, params, batches, optimizer
        self.schedule, self.clip, self.accumulate, self.seed = schedule, clip, accumulate, seed
        self.log_path, self.path, self.every = log, checkpoint, checkpoint_every
        self.rng = numpy.random.default_rng(seed) if dropout else None
        self.history = History()
        self.partial: dict[str, Array] = {}
        self.tokens, self.loss_sum, self.micro, self.saved_at = 0, 0.0, 0, 0
        self.log: Any = None

    # ---- one optimizer step

    def step(self) -> float:
        """Micro-batches until a step is full, then the update. Returns the mean loss per token."""
        while True:
            loss, tokens = self._micro_batch()
            if self.micro % self.accumulate == 0:
                break
            self.checkpoint_if_due()
        grads, mean = self.partial, loss
        if self.accumulate > 1:
            grads, mean = {name: g / self.tokens for name, g in grads.items()}, self.loss_sum / self.tokens
        norm = math.sqrt(sum(float(to_host((g * g).sum())) for g in grads.values()))
        self._finite("gradient norm", norm)
        if self.clip is not None and norm > self.clip:
            grads = {name: g * (self.clip / norm) for name, g in grads.items()}
        at = self.history.step + 1
        lr = self.optimizer.lr * self.schedule(at)
        self.optimizer.step(self.params, grads, lr)
        self.history.step = at
        self.history.losses.append(mean)
        self._write_log({"step": at, "loss": mean, "lr": lr, "grad_norm": norm, "tokens": self.tokens})
        self.partial, self.tokens, self.loss_sum = {}, 0, 0.0
        return mean

    def _micro_batch(self) -> tuple[float, int]:
        batch = self.batches.next()
        tokens = label_tokens(batch)
        loss, grads = value_and_grad(lambda: self.model.loss(**batch, rng=self.rng), self.params)
        self._finite("loss", loss)
        if self.accumulate == 1:
            self.partial = grads
        else:
            for name, g in grads.items():
                term = g * tokens
                if name in self.partial:
                    term += self.partial[name]
                self.partial[name] = term
        self.tokens, self.loss_sum, self.micro = self.tokens + tokens, self.loss_sum + loss * tokens, self.micro + 1
        return loss, tokens

    def _finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = f"; the last checkpoint is {self.path}, unharmed" if self.path and Path(self.path).exists() else ""
            raise FloatingPointError(f"{what} is {value} at step {self.history.step + 1} (micro-batch "
                                     f"{self.micro + 1}): lower the learning rate, clip, or look for NaN in the "
                                     f"weights{kept}")

    def scored(self, score: float) -> None:
        """Record an evaluation."""
        step = self.history.step
        self.history.scores.append((step, score))
        if self.history.best is None or score > self.history.best[1]:
            self.history.best = (step, score)
        self._write_log({"step": step, "score": score})

    # ---- log and checkpoint

    def start(self, resume: bool) -> None:
        """Open the log; go on from the checkpoint if there is one."""
        offset = 0
        if self.path is not None and resume and Path(self.path).exists():
            self.partial, state = checkpoints.load(self.path, self.params, self.optimizer, self._describe())
            self.history = History(state["step"], [], [(s, v) for s, v in state["scores"]],
                                   tuple(state["best"]) if state["best"] else None, state["seconds"])
            self.tokens, self.loss_sum, self.micro = state["tokens"], state["loss_sum"], state["micro"]
            self.saved_at, offset = self.micro, state["log"]
            self.batches.load_state(state["batches"])
            if self.rng is not None:
                self.rng.bit_generator.state = state["rng"]
        if self.log_path is not None:
            self.log = open(self.log_path, "r+b" if offset and Path(self.log_path).exists() else "wb")
            self.log.seek(offset)
            self.log.truncate()

    def checkpoint_if_due(self) -> None:
        if self.micro - self.saved_at >= self.every:
            self.save()

    def finish(self) -> None:
        if self.micro != self.saved_at:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, if there is a place for it; the log is on the disk before it."""
        self.saved_at = self.micro
        if self.path is None:
            return
        if self.log is not None:
            self.log.flush()
            os.fsync(self.log.fileno())
        h = self.history
        checkpoints.save(self.path, self.params, self.optimizer, self.partial, {
            "step": h.step, "scores": h.scores, "best": h.best, "seconds": h.seconds, "tokens": self.tokens,
            "loss_sum": self.loss_sum, "micro": self.micro, "batches": self.batches.state(),
            "rng": self.rng.bit_generator.state if self.rng else None,
            "log": self.log.tell() if self.log is not None else 0}, self._describe())

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def _write_log(self, line: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write((json.dumps(line) + "\n").encode())
            self.log.flush()

    def _describe(self) -> dict[str, Any]:
        """What the run is, but for its length. The frozen base is part of it: a checkpoint does not hold it."""
        if not hasattr(self, "_description"):
            frozen = {name: array for name, array in self.model.state().items() if name not in self.params}
            self._description = {
                "params": {name: [list(p.shape), str(p.dtype)] for name, p in self.params.items()},
                "optimizer": self.optimizer.describe(), "clip": self.clip, "accumulate": self.accumulate,
                "seed": self.seed, "dropout": self.rng is not None, "batches": self.batches.describe(),
                "frozen": fingerprint(frozen)}
        return self._description
