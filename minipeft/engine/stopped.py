"""Values that count as constants in a gradient, and that a gradient check holds fixed while it moves parameters."""
from __future__ import annotations

import contextvars
from typing import Any

from minipeft.engine.tensor import Tensor, array_of
from minipeft.backend import Array

stopped: contextvars.ContextVar["Stopped | None"] = contextvars.ContextVar("stopped", default=None)


class Stopped:
    """The values that passed `stop_gradient` in one run. replay: the index of the next, in a later run (`check.py`)."""

    def __init__(self) -> None:
        self.values: list[Array] = []
        self.replay: int | None = None


def stop_gradient(x: Any) -> Tensor:
    """x, of any shape, as a constant. A gradient check holds it fixed while it moves the parameters."""
    value, run = array_of(x), stopped.get()
    if run is not None:
        if run.replay is None:
            run.values.append(value)
        else:
            value = run.values[run.replay]
            run.replay += 1
    return Tensor(value)
