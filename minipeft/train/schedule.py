"""Learning-rate schedules: functions from the step (1, 2, ...) to a factor on the optimizer's lr."""
from __future__ import annotations

import math
from typing import Callable

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """1 at every step."""
    return lambda step: 1.0


def linear_decay(steps: int, warmup: int = 0) -> Schedule:
    """Up from 0 to 1 over `warmup` steps, then down to 0 one step after the last of `steps`."""
    _check(steps, warmup)
    return lambda step: _warm(step, warmup) * max(0.0, min(1.0, (steps - step + 1) / (steps - warmup)))


def cosine_decay(steps: int, warmup: int = 0) -> Schedule:
    """Up from 0 to 1 over `warmup` steps, then (1 + cos(pi x)) / 2 down to 0 one step after the last of `steps`.

    Loshchilov & Hutter, 2017, arXiv:1608.03983, eq. (5), without restarts."""
    _check(steps, warmup)
    return lambda step: _warm(step, warmup) * (
        1 + math.cos(math.pi * max(0.0, min(1.0, (step - 1 - warmup) / (steps - warmup))))) / 2


def inverse_sqrt(d_model: int, warmup: int = 4000) -> Schedule:
    """d_model^-0.5 min(step^-0.5, step warmup^-1.5), with an optimizer of lr 1.   Vaswani et al., 2017, sec. 5.3."""
    if d_model < 1 or warmup < 1:
        raise ValueError(f"d_model is {d_model} and warmup {warmup}; expected at least 1 of both")
    return lambda step: d_model ** -0.5 * min(step ** -0.5, step * warmup ** -1.5)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, step / warmup) if warmup else 1.0


def _check(steps: int, warmup: int) -> None:
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup is {warmup} and steps {steps}; expected 0 <= warmup < steps")
