"""How a model learns, after a forward, which parameters were differentiated. The engine itself knows nothing of models.

    when_differentiated(key, told, call)        the model asks for this during the forward
    call(everything told under key, the parameters that were differentiated)        once the gradients are computed
"""
from __future__ import annotations

import contextlib
import contextvars
from typing import Any, Callable, Iterable, Iterator

Call = Callable[[frozenset, frozenset], None]
_afterwards: contextvars.ContextVar[dict[Any, tuple[Call, set]] | None] = contextvars.ContextVar(
    "afterwards", default=None)


def when_differentiated(key: Any, told: Iterable[Any], call: Call) -> None:
    """Inside `value_and_grad`: once its gradients are computed, `call` runs, once for each `key`. It receives all that
    was `told` under that key, and the parameters that were differentiated. Elsewhere this does nothing."""
    calls = _afterwards.get()
    if calls is not None:
        calls.setdefault(key, (call, set()))[1].update(told)


@contextlib.contextmanager
def listening(training: bool) -> Iterator[dict[Any, tuple[Call, set]]]:
    """Collects the calls that `when_differentiated` asks for in this block; with training=False, none."""
    calls: dict[Any, tuple[Call, set]] = {}
    token = _afterwards.set(calls if training else None)
    try:
        yield calls
    finally:
        _afterwards.reset(token)
