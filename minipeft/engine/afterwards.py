"""Telling a forward which parameters it was run for. The engine knows nothing of models, and models have to know.

    when_differentiated(key, told, call)        during the forward
    call(everything told under key, the parameters that were differentiated)        when the gradients are there
"""
from __future__ import annotations

import contextlib
import contextvars
from typing import Any, Callable, Iterable, Iterator

Call = Callable[[frozenset, frozenset], None]
_afterwards: contextvars.ContextVar[dict[Any, tuple[Call, set]] | None] = contextvars.ContextVar(
    "afterwards", default=None)


def when_differentiated(key: Any, told: Iterable[Any], call: Call) -> None:
    """Inside of `value_and_grad`: once its gradients are there, `call` runs once for each key, with all that was told
    under the key and the parameters that were differentiated. Outside of `value_and_grad` this does nothing."""
    calls = _afterwards.get()
    if calls is not None:
        calls.setdefault(key, (call, set()))[1].update(told)


@contextlib.contextmanager
def listening(training: bool) -> Iterator[dict[Any, tuple[Call, set]]]:
    """Collects the calls of `when_differentiated` that are made in this block; none of them without `training`."""
    calls: dict[Any, tuple[Call, set]] = {}
    token = _afterwards.set(calls if training else None)
    try:
        yield calls
    finally:
        _afterwards.reset(token)
