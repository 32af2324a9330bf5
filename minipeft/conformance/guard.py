"""One guarded call of an implementation: its arguments are read-only, its time is limited, its errors become Faults."""
from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from typing import Any, Callable, Iterator, Mapping

import numpy

from minipeft.conformance.fault import HANGS, RAISES, WRITES, Fault, Skip


def guarded(plugin: Any, where: str, function: Callable, args: Any, kwargs: Any) -> Any:
    """function(*args, **kwargs) on read-only copies, in limited time.

    plugin: the `Plugin` whose call it is, with its limit. where: the name of the call, such as "lora_linear.forward".
    Raises Fault for every exception, for a call that takes too long and for arguments that were changed; Skip for a
    NotImplementedError, by which a plug-in says that it does not offer something; and KeyboardInterrupt if the user
    interrupts the run."""
    if where in plugin.hung:
        raise Fault(HANGS, f"{where} did not return earlier, and was not called again")
    given, copies = frozen((args, kwargs)), frozen((args, kwargs))
    plugin.calling(where)
    try:
        with time_limit(plugin.limit):
            result = function(*given[0], **given[1])
    except _TimeUp:
        plugin.hung.add(where)
        raise Fault(HANGS, f"{where} took longer than {plugin.limit:g} s") from None
    except NotImplementedError as error:
        raise Skip(f"{where} says that it is not implemented: {error}") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not plugin.alone:
            raise
        if isinstance(error, ValueError) and "read-only" in str(error):
            raise Fault(WRITES, f"{where}: {last_lines(error)}") from None
        raise Fault(RAISES, f"{where}: {last_lines(error)}") from None
    if not _equal(given, copies):
        raise Fault(WRITES, f"{where} changed an array that it received")
    return result


def frozen(value: Any) -> Any:
    """A copy of `value` in which every array, also inside dicts, lists and tuples, is a read-only copy."""
    if isinstance(value, numpy.ndarray):
        value = value.copy()
        value.flags.writeable = False
        return value
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    return type(value)(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, numpy.ndarray):
        return isinstance(b, numpy.ndarray) and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return True


def last_lines(error: BaseException) -> str:
    """The error in one line, with the file and the line that raised it."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"  # the message says where
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{where}"


class _TimeUp(BaseException):
    """Not an Exception, so that an `except Exception` of the plug-in does not swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context that interrupts Python code after this many seconds, in the main thread of a system with an alarm.
    Elsewhere it does nothing, and the process that watches this one ends it (see `worker.py`). The time is counted in
    tenths by ten alarms: a machine that was suspended delivers only one, however long that took."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    left = 10

    def tick(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise _TimeUp

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, seconds / left, seconds / left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
