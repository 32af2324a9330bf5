"""Values that are held fixed: constants for the gradient, and for a gradient check that moves the parameters."""
from __future__ import annotations

import contextvars
from typing import Any

from minipeft.engine.tensor import Tensor, array_of
from minipeft.backend import Array

stopped: contextvars.ContextVar["Stopped | None"] = contextvars.ContextVar("stopped", default=None)


class Stopped:
    """Values that `stop_gradient` passed in one run, replayed in the runs after it (see `check.py`)."""

    def __init__(self) -> None:
        self.values: list[Array] = []
        self.replay: int | None = None


def stop_gradient(x: Any) -> Tensor:
    """x as a constant. A gradient check holds it fixed while it moves the parameters."""
    value, memory = array_of(x), stopped.get()
    if memory is not None:
        if memory.replay is None:
            memory.values.append(value)
        else:
            value = memory.values[memory.replay]
            memory.replay += 1
    return Tensor(value)
