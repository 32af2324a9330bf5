"""The training loop: forward, backward, accumulate, clip, step; evaluate, log, checkpoint; resume to the same bits.

Accumulation weighs micro-batches by their label tokens: with n_i tokens and mean loss L_i each,

    grad = sum_i n_i grad L_i / sum_i n_i

is the gradient of the mean over all tokens, as of one big batch. (Averaging the L_i instead is a common error.)
"""
from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy

from minipeft.autograd.tensor import Leaf, value_and_grad
from minipeft.backend import Array, to_host, xp
from minipeft.train import checkpoint as checkpoints
from minipeft.train.data import Batches, label_tokens
from minipeft.train.identity import describe, difference
from minipeft.train.log import Log
from minipeft.train.optim import AdamW
from minipeft.train.progress import Progress
from minipeft.train.schedule import Schedule, constant
from minipeft.train.state import History, State


def fit(model: Any, params: Mapping[str, Leaf], batches: Batches, *, steps: int, optimizer: AdamW | None = None,
        schedule: Schedule | None = None, clip: float | None = 1.0, accumulate: int = 1, seed: int = 0,
        dropout: bool = True, evaluate: Callable[[], float] | None = None, eval_every: int | None = None,
        log: str | os.PathLike | None = None, checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 100, resume: bool = True, progress: bool = True, label: str = "training") -> History:
    """Train `params` in place for `steps` optimizer steps on model.loss(**batch, rng=rng).

    params: {name: Parameter}, e.g. `select(model, ".*")` or `attachment.parameters`; nothing else changes.
    schedule: factor on the learning rate, a function of the step. clip: largest global norm of the gradient, or None.
    accumulate: micro-batches per step, weighted by label tokens. seed: of dropout, which `dropout=False` turns off.
    evaluate: a score, higher is better, taken after every `eval_every` steps and after the last.
    log: a JSONL file, a line per step and per evaluation; a fresh run writes over it.
    checkpoint: a file, written every `checkpoint_every` micro-batches and at the end. If it is there, the run goes on
    from it and ends with the bits of a run that was never stopped (on one machine, BLAS and thread count); `steps` may
    have grown since (an evaluation made after the old last step stays on record). With resume=False the run starts
    afresh, over the checkpoint that is there.

    Raises FloatingPointError for a loss or gradient that is not finite, before parameters, moments or the checkpoint
    are touched; ValueError, before anything is changed, for arguments out of range, a checkpoint that is damaged or of
    another run, a log shorter than its checkpoint says; and for a batch without label tokens."""
    _check(params, steps, accumulate, checkpoint_every, evaluate, eval_every, clip, seed, log, checkpoint)
    optimizer = AdamW() if optimizer is None else optimizer
    schedule = constant() if schedule is None else schedule
    optimizer.decayed(params)  # raises for a pattern that matches nothing
    state = State(params, optimizer, batches, numpy.random.default_rng(seed) if dropout else None)
    fixed = {} if checkpoint is None else describe(
        model, params, batches, optimizer, clip=clip, accumulate=accumulate, seed=seed, dropout=dropout,
        log="kept" if log is not None else "not kept")

    def identity(step: int) -> dict[str, Any]:
        return {**fixed, "schedule, summed over the steps made": math.fsum(map(schedule, range(1, step + 1)))}

    def save() -> None:
        if checkpoint is not None:
            length = lines.sync()  # the log is on the disk before the checkpoint that counts on it
            checkpoints.write(checkpoint, state.arrays(), {**state.counters(), "log": length},
                              identity(state.history.step))

    found = checkpoint is not None and Path(checkpoint).exists()
    saved = checkpoints.read(checkpoint) if checkpoint is not None and found and resume else None
    if saved is not None:
        _refuse_another(saved, identity(saved.state["step"]), steps)
        state.check(saved)
    with Log(log, saved.state["log"] if saved else 0) as lines:
        if saved is not None:
            state.restore(saved)
        elif found:
            save()  # so that a run killed early does not go on from the checkpoint that it was to replace
        lines.begin()
        history = state.history
        begun = time.perf_counter() - history.seconds
        with Progress(steps, history.step, label, progress) as bar:
            while history.step < steps:
                _micro_batch(model, state, accumulate)
                if state.micro % accumulate == 0:
                    lines.write(**_step(state, schedule, clip, accumulate))
                    if evaluate and (history.step == steps or (eval_every and history.step % eval_every == 0)):
                        lines.write(**_score(history, float(evaluate())))
                    bar.update(history.step, _figures(history))
                history.seconds = time.perf_counter() - begun
                if state.micro % checkpoint_every == 0 or history.step == steps:
                    save()
    return history


def _micro_batch(model: Any, state: State, accumulate: int) -> None:
    """Forward and backward; adds to the partial sums of `state`."""
    cursor = state.batches.state()
    batch = state.batches.next()
    tokens = label_tokens(batch)
    if tokens == 0:
        raise ValueError(f"the batch at {cursor} has no label tokens: every label is -100")
    loss, grads = value_and_grad(lambda: model.loss(**batch, rng=state.rng), state.params)
    _finite(f"the loss of the batch at {cursor}", loss, state.history.step + 1)
    if accumulate == 1:
        state.partial, state.loss_sum = grads, loss  # the weight would cancel; no second copy of the gradients
    else:
        _finite(f"the gradient's norm for the batch at {cursor}", global_norm(grads), state.history.step + 1)
        for name, g in grads.items():
            if name in state.partial:
                state.partial[name] += g * tokens
            else:
                state.partial[name] = g * tokens  # an array of our own: those of value_and_grad may be shared
        state.loss_sum += loss * tokens
    state.tokens += tokens
    state.micro += 1


def _step(state: State, schedule: Schedule, clip: float | None, accumulate: int) -> dict[str, Any]:
    """The update from the partial sums, which it empties. Returns the line of the log."""
    history, weight = state.history, state.tokens if accumulate > 1 else 1
    norm = global_norm(state.partial) / weight
    step = history.step + 1
    _finite("the gradient's norm", norm, step)
    scale = (clip / norm if clip is not None and norm > clip else 1.0) / weight
    lr, loss, tokens = state.optimizer.lr * schedule(step), state.loss_sum / weight, state.tokens
    state.optimizer.step(state.params, state.partial, lr, scale)
    history.step = step
    history.losses.append(loss)
    state.partial, state.loss_sum, state.tokens = {}, 0.0, 0
    return {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens}


def global_norm(grads: Mapping[str, Array]) -> float:
    """The length of all gradients as one vector: sqrt(sum of squares); infinity if a square overflows."""
    with numpy.errstate(over="ignore"):
        squares = xp.stack([xp.asarray((g * g).sum()) for g in grads.values()])  # one copy to the host, not one each
    return math.hypot(*map(math.sqrt, to_host(squares).tolist()))


def _score(history: History, score: float) -> dict[str, Any]:
    """Record an evaluation. Returns the line of the log."""
    if not math.isfinite(score):
        raise ValueError(f"evaluate() returned {score} after step {history.step}; expected a finite number")
    history.scores.append((history.step, score))
    if history.best is None or score > history.best[1]:
        history.best = (history.step, score)
    return {"step": history.step, "score": score}


def _finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is {value}, in step {step}: lower the learning rate, or look for NaN in the "
                                 f"weights. Parameters, moments and checkpoint are as they were before this step")


def _figures(history: History) -> str:
    score = f"  score {history.scores[-1][1]:.4f}" if history.scores else ""
    return f"loss {history.losses[-1]:.4f}{score}"


def _refuse_another(saved: checkpoints.Checkpoint, run: Mapping[str, Any], steps: int) -> None:
    differs = difference(saved.run, run)
    if differs is not None:
        raise ValueError(f"{saved.path} belongs to another run: {differs}; delete it, or pass resume=False to start "
                         f"afresh over it")
    if saved.state["step"] > steps:
        raise ValueError(f"{saved.path} is at step {saved.state['step']}, past the {steps} asked for")


def _check(params: Mapping[str, Leaf], steps: int, accumulate: int, checkpoint_every: int, evaluate: Any,
           eval_every: int | None, clip: float | None, seed: int, log: Any, checkpoint: Any) -> None:
    if not params:
        raise ValueError("nothing is selected: params is empty")
    for what, value, least in (("steps", steps, 1), ("accumulate", accumulate, 1), ("seed", seed, 0),
                               ("checkpoint_every", checkpoint_every, 1),
                               ("eval_every", 1 if eval_every is None else eval_every, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{what} is {value!r}; expected an integer >= {least}")
    if eval_every is not None and evaluate is None:
        raise ValueError(f"eval_every is {eval_every}, but there is nothing to evaluate: pass evaluate=")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip is {clip!r}; expected a finite number > 0, or None")
    for what, path in (("log", log), ("checkpoint", checkpoint)):
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"{what} is {str(path)!r}, in a folder that does not exist")
