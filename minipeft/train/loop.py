"""The training loop: forward, backward, accumulate, clip, step; evaluate, log, checkpoint; resume to the same bits.

Accumulation weights micro-batches by their label tokens. If micro-batch i has n_i label tokens and the mean loss L_i,

    grad = sum_i n_i grad L_i / sum_i n_i

is the gradient of the mean over all tokens, as of one big batch. (Averaging the L_i instead is a common error.) A
micro-batch without label tokens, n_i = 0, contributes nothing.
"""
from __future__ import annotations

import contextvars
import dataclasses
import math
import os
import time
from typing import Any, Callable, Mapping

import numpy

from minipeft.engine.tensor import array_of, value_and_grad
from minipeft.backend import Array, to_host, xp
from minipeft.checks import is_number, python, shown
from minipeft.train import arguments, best as best_file, checkpoint as checkpoints
from minipeft.train.data import Batches, label_tokens
from minipeft.train.lock import Lock
from minipeft.train.log import Log, line
from minipeft.train.norm import global_norm
from minipeft.train.optim import AdamW
from minipeft.train.progress import progress_bar
from minipeft.train.resume import Identity, resumed
from minipeft.train.schedule import Schedule, constant
from minipeft.train.state import History, Record, State


def fit(model: Any, params: Any, batches: Batches, *, steps: int, optimizer: AdamW | None = None,
        schedule: Schedule | None = None, clip: float | None = 1.0, accumulate: int = 1, seed: int = 0,
        dropout: bool = True, evaluate: Callable[[], float] | None = None, eval_every: int | None = None,
        patience: int | None = None, best: str | os.PathLike | None = None, log: str | os.PathLike | None = None,
        checkpoint: str | os.PathLike | None = None, checkpoint_every: int = 100, resume: bool = True,
        progress: bool = True, label: str = "training") -> History:
    """Train `params` in place for `steps` optimizer steps on model.loss(**batch, rng=rng); return the History.

    params: a plugged attachment, or {name: Parameter}, e.g. `select(model, ".*")`; nothing else changes. optimizer:
    None is AdamW(). schedule: a function from the step (1, 2, ...) to a factor on the learning rate; None is 1. One
    that ends, such as `cosine_decay(steps)`, must not end before `steps`. clip: the global norm to which a
    longer gradient is scaled down, or None. accumulate: micro-batches per step, weighted by label tokens; one whose
    labels are all -100 contributes nothing. seed: of dropout, which `dropout=False` turns off.

    evaluate: a function that returns a score, higher is better. It is called after every `eval_every` steps and after
    the last. It may end the run by raising StopIteration. patience: the run ends after this many evaluations in a row
    without a new best score. best: a file for the weights of the best score so far: an adapter file if one attachment
    alone is trained, otherwise the parameters by name. `minipeft.restore(params, best)` restores them.

    log: a JSONL file, a line per step and per evaluation; a fresh run overwrites it.
    checkpoint: a file, written every `checkpoint_every` micro-batches, at the end, and when an exception ends the run.
    If it exists, the run resumes from it and ends with the bits of a run that was never stopped (on one machine, BLAS
    and thread count), its log and best file included. `steps` may have grown since (an evaluation made after the old
    last step stays on record). The parameters passed must be those that the run began with, or those of the
    checkpoint. With resume=False the run starts afresh and replaces the checkpoint. One run at a time may use a
    checkpoint, a log or a best file: a lock file `.NAME.lock` lies beside each until the run ends.
    progress: whether to show a bar named `label`, if standard error is a terminal and rich is installed.

    If an exception stops the run (also Ctrl-C or a failing `evaluate`), the micro-batch is completed or undone, the
    checkpoint is written if there is something new, and the exception propagates, with the History so far as its
    attribute `history`. An evaluation that failed is made again when the run is resumed.

    Raises FloatingPointError for a loss that is not finite, and for a gradient that is not finite or has squares that
    are not, before they reach parameters, moments or the checkpoint; also for parameters that are not finite, before
    they are written. Raises ValueError for a step without label tokens, a score that is not finite, or a learning rate
    that is not finite and >= 0. Before anything changes, raises ValueError or TypeError for wrong arguments, a
    checkpoint that is damaged or of another run, a log shorter than its checkpoint says, or a missing `best` file;
    RuntimeError if another run holds one of the files."""
    settings = arguments.Settings(
        steps=steps, schedule=constant() if schedule is None else schedule, clip=clip, accumulate=accumulate, seed=seed,
        dropout=dropout, evaluate=evaluate, eval_every=eval_every, patience=patience, best=best, log=log,
        checkpoint=checkpoint, checkpoint_every=checkpoint_every)
    optimizer = AdamW() if optimizer is None else optimizer
    arguments.check_objects(model, batches, optimizer)
    params = arguments.parameters(model, params)
    optimizer.decayed(params), optimizer.ratios(params)  # they raise for a pattern that matches nothing
    state = State(params, optimizer, batches, numpy.random.default_rng(settings.seed) if settings.dropout else None)
    run = _Run(model, state, settings)
    try:
        try:
            return run.made(resume, label, progress)
        finally:
            run.close()
    except BaseException as error:
        run.close()  # again, because an interrupt may have come just before
        if run.begun:
            error.history = state.history()  # type: ignore[attr-defined]
        raise


class _Run:
    """One call of `fit`."""

    def __init__(self, model: Any, state: State, settings: arguments.Settings):
        self.model, self.state, self.settings, self.lines = model, state, settings, Log(None)
        self.locks = [Lock(path) for path in (settings.checkpoint, settings.log, settings.best) if path is not None]
        self.identity: Identity | None = None
        self.on_disk: Record | None = None  # what the checkpoint holds, as far as this call knows
        self.begun, self.ended = 0.0, False  # when it would have begun without pauses; whether evaluate() ended it

    def made(self, resume: bool, label: str, progress: bool) -> History:
        """The whole run, from the checkpoint to the history."""
        s, state, saved = self.settings, self.state, None
        for lock in self.locks:
            lock.acquire()
        found = s.checkpoint is not None and os.path.exists(s.checkpoint)
        if s.checkpoint is not None:
            self.identity = Identity(self.model, state, s)
            if found and resume:
                saved = resumed(s.checkpoint, self.identity, self.model, state, s)
        self.lines = Log(s.log, saved.state["log"] if saved else 0)
        if saved is not None:
            state.restore(saved)
        if saved is not None or not found:
            self.on_disk = state.record  # also if there is no file: nothing worth saving has been done yet
        try:
            if self.on_disk is None:
                self._save()  # so that a run killed early does not leave the checkpoint that it replaces
            self.begun = time.perf_counter() - state.seconds
            self.lines.begin()
            with progress_bar(s.steps, state.record.step, label, progress) as show:
                self._train(show)
            return state.history()
        except BaseException as error:
            self._stopped(error)
            raise

    def close(self) -> None:
        """Close the log, and release the locks. May be called again."""
        self.lines.close()
        for lock in self.locks:
            lock.release()

    def _train(self, show: Callable[[int, str], None]) -> None:
        state = self.state
        self._evaluate()  # if one was due when the run was stopped
        while not self._over():
            self._micro_batch()
            self.lines.write(*_tail(state.record))
            self._evaluate()
            show(state.record.step, state.figures())
            state.seconds = time.perf_counter() - self.begun
            if state.record.micro % self.settings.checkpoint_every == 0:
                self._save()
        if state.record is not self.on_disk:
            self._save()

    def _over(self) -> bool:
        record, patience = self.state.record, self.settings.patience
        if record.step >= self.settings.steps or self.ended:
            return True
        if patience is None or record.best is None:
            return False
        scores = self.state.scores()
        return len(scores) - 1 - scores.index(record.best) >= patience

    def _micro_batch(self) -> None:
        """Forward and backward, and the step if one is due; recorded at the end, by one assignment."""
        state, s, record = self.state, self.settings, self.state.record
        batch = state.batches.next()
        tokens = label_tokens(batch)
        after = dataclasses.replace(record, micro=record.micro + 1, tokens=record.tokens + tokens, due=False)
        if tokens:
            loss, grads = contextvars.copy_context().run(  # in a copy: an interrupt leaves no context variable set
                value_and_grad, lambda: self.model.loss(**batch, rng=state.rng), state.params)
            what, step = f"the batch at {dict(record.cursor)}", record.step + 1
            _finite(f"the loss of {what}", loss, step)
            partial, loss_sum = grads, loss  # alone in its step: its weight would cancel
            if s.accumulate > 1:
                partial, loss_sum = _weighted(grads, tokens, record.partial), record.loss_sum + loss * tokens
                _finite(f"the gradient's norm for {what}", global_norm(partial), step)
            after = dataclasses.replace(after, partial=partial, loss_sum=loss_sum)
        after = dataclasses.replace(after, cursor=dict(state.batches.state()), rng=state.drawn())
        if after.micro % s.accumulate == 0:
            self._step(after)
        else:
            state.commit(after)

    def _step(self, sums: Record) -> None:
        """Update the parameters from the partial sums, and record the step."""
        state, s, step = self.state, self.settings, sums.step + 1
        if not sums.tokens:
            raise ValueError(f"step {step} has no label tokens: every label is -100, in all of its micro-batches "
                             f"({s.accumulate}); the last of them is the batch at {dict(state.record.cursor)}")
        weight = sums.tokens if s.accumulate > 1 else 1
        norm = global_norm(sums.partial) / weight
        _finite("the gradient's norm", norm, step)
        scale = (s.clip / norm if s.clip is not None and norm > s.clip else 1.0) / weight
        _has_squares(sums.partial, norm * scale * weight, step)
        loss, lr = sums.loss_sum / weight, self._rate(step)
        text = line(step=step, loss=loss, lr=lr, grad_norm=norm, tokens=sums.tokens)
        due = s.evaluate is not None and bool(
            step == s.steps or (s.eval_every is not None and step % s.eval_every == 0))
        after = dataclasses.replace(sums, step=step, tokens=0, loss_sum=0.0, partial={}, losses=sums.losses + 1,
                                    due=due, log=self._length(sums, text), tail=text)
        state.commit(after, lambda: state.optimizer.step(state.params, sums.partial, lr, scale), loss=loss)

    def _rate(self, step: int) -> float:
        factor = python(self.settings.schedule(step))
        if callable(factor):
            raise TypeError(f"schedule({step}) is {shown(factor)}, itself a schedule: pass that, not the function that "
                            f"makes it")
        if not isinstance(factor, (int, float)):
            raise TypeError(f"schedule({step}) is {shown(factor)}; expected a factor on the learning rate")
        lr = python(self.state.optimizer.lr) * factor
        if not is_number(lr) or lr < 0:
            raise ValueError(f"lr is {shown(lr)}; expected a finite number >= 0: schedule({step}) is {shown(factor)}")
        return float(lr)

    def _evaluate(self) -> None:
        """If an evaluation is due, make it, and record it together with its line of the log."""
        state, s, record = self.state, self.settings, self.state.record
        if not record.due or s.evaluate is None:
            return
        try:
            returned = s.evaluate()
        except StopIteration:
            self.ended = True
            return
        score = _number(returned)
        if not math.isfinite(score):
            raise ValueError(f"evaluate() returned {shown(returned)} after step {record.step}; expected a finite "
                             f"number")
        best = record.best
        if best is None or score > best[1]:
            best = (record.step, score)
            if s.best is not None:
                best_file.keep(s.best, self.model, state.params)
        text = line(step=record.step, score=score)
        state.commit(dataclasses.replace(record, scores=record.scores + 1, best=best, due=False,
                                         log=self._length(record, text), tail=text), score=score)
        self.lines.write(*_tail(state.record))

    def _length(self, before: Record, text: bytes) -> int:
        return before.log + len(text) if self.settings.log is not None else 0

    def _save(self) -> None:
        """Write the checkpoint. The log is flushed to the disk first, because the checkpoint relies on its length."""
        record = self.state.record
        self.lines.write(*_tail(record))
        if self.settings.checkpoint is not None and self.identity is not None:
            self.lines.sync()
            checkpoints.write(self.settings.checkpoint, self.state.arrays(), self.state.counters(),
                              self.identity.at(record.step))
        self.on_disk = record

    def _stopped(self, error: BaseException) -> None:
        """After an exception: complete or undo the micro-batch, and save the run if that is possible."""
        try:
            self.state.settle()
            if self.state.record is not self.on_disk:
                self._save()
        except Exception as problem:
            error.add_note(f"The checkpoint could not be written: {problem}")


def _weighted(grads: dict[str, Array], tokens: int, partial: Mapping[str, Array]) -> dict[str, Array]:
    """partial + tokens * grads in new arrays, because those of value_and_grad may be shared. Empties `grads`."""
    found = {}
    for name in list(grads):
        found[name] = xp.asarray(grads.pop(name) * tokens)
        if name in partial:
            found[name] += partial[name]
    return found


def _tail(record: Record) -> tuple[int, bytes]:
    """The byte offset of the log's last line, and the line."""
    return record.log - len(record.tail), record.tail


def _number(score: Any) -> float:
    """The value that evaluate() returned as a float; NaN if it is not a number."""
    score = array_of(score)
    try:
        return math.nan if isinstance(score, (str, bytes)) else \
            float(to_host(score).item() if hasattr(score, "ndim") else score)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _has_squares(grads: Mapping[str, Array], norm: float, step: int) -> None:
    """Raises FloatingPointError if a second moment, a square, might be infinite in the gradient's dtype."""
    largest = min(float(xp.finfo(g.dtype).max) for g in grads.values())
    if norm > math.sqrt(largest):
        _finite("the gradient's norm, squared,", math.inf, step)


def _finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is {value}, in step {step}: lower the learning rate, or look for NaN in the "
                                 f"weights. Parameters, moments and checkpoint are as they were before this step")
