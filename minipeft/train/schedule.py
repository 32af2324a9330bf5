"""Learning-rate schedules: functions from the step (1, 2, ...) to a factor on the optimizer's lr.

A schedule that ends has `.steps`, the number of steps that it was made for. `fit` refuses to train for more steps.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable

from minipeft.checks import is_number, python, shown

Schedule = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class _Decay:
    """Up from 0 to 1 over `warmup` steps, then down by the factor `fall` to 0 one step after the last of `steps`."""

    name: str
    fall: Callable[[int, int, int], float]  # of step, steps and warmup
    steps: int
    warmup: int

    def __post_init__(self) -> None:
        for field in ("steps", "warmup"):
            object.__setattr__(self, field, python(getattr(self, field)))
        if not is_number(self.steps) or not is_number(self.warmup) or not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup is {shown(self.warmup)} and steps {shown(self.steps)}; "
                             f"expected 0 <= warmup < steps")

    def __call__(self, step: int) -> float:
        rise = min(1.0, step / self.warmup) if self.warmup else 1.0
        return rise * self.fall(step, self.steps, self.warmup)

    def __repr__(self) -> str:
        return f"{self.name}(steps={self.steps}, warmup={self.warmup})"


def _line(step: int, steps: int, warmup: int) -> float:
    return max(0.0, min(1.0, (steps - step + 1) / (steps - warmup)))


def _half_wave(step: int, steps: int, warmup: int) -> float:
    return (1 + math.cos(math.pi * max(0.0, min(1.0, (step - 1 - warmup) / (steps - warmup))))) / 2


def constant() -> Schedule:
    """The schedule that is 1 at every step; it does not end."""
    return lambda step: 1.0


def linear_decay(steps: int, warmup: int = 0) -> Schedule:
    """min(1, step / warmup), then (steps - step + 1) / (steps - warmup): up from 0 to 1 over `warmup` steps, then down
    in a straight line to 0 one step after the last of `steps`.

    Devlin et al., 2019, arXiv:1810.04805, appendix A.2. Raises ValueError unless 0 <= warmup < steps."""
    return _Decay("linear_decay", _line, steps, warmup)


def cosine_decay(steps: int, warmup: int = 0) -> Schedule:
    """min(1, step / warmup), then (1 + cos(pi x)) / 2 with x = (step - 1 - warmup) / (steps - warmup): up from 0 to 1
    over `warmup` steps, then down along a cosine to 0 one step after the last of `steps`.

    Loshchilov & Hutter, 2017, arXiv:1608.03983, eq. (5), without restarts. Raises ValueError unless
    0 <= warmup < steps."""
    return _Decay("cosine_decay", _half_wave, steps, warmup)


def inverse_sqrt(d_model: int, warmup: int = 4000) -> Schedule:
    """d_model^-0.5 min(step^-0.5, step warmup^-1.5), for an optimizer with lr 1; it does not end.

    Vaswani et al., 2017, arXiv:1706.03762, sec. 5.3, eq. (3). Raises ValueError for a d_model or warmup below 1."""
    d_model, warmup = python(d_model), python(warmup)
    if not is_number(d_model) or not is_number(warmup) or d_model < 1 or warmup < 1:
        raise ValueError(f"d_model is {shown(d_model)} and warmup {shown(warmup)}; expected both to be at least 1")
    return lambda step: d_model ** -0.5 * min(step ** -0.5, step * warmup ** -1.5)


MAKERS = (constant, linear_decay, cosine_decay, inverse_sqrt)


def ends_after(schedule: Any) -> float:
    """How many steps a schedule was made for: its `.steps`, or infinity if it has none."""
    steps = getattr(schedule, "steps", None)
    return python(steps) if is_number(steps) else math.inf
