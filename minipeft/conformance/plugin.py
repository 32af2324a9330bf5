"""The implementation under test, guarded: what it is given is read-only, what it gives is checked, what it does wrong
becomes a Fault and never stops the run.

A plug-in is any module with `capabilities` and functions named after the methods:

    capabilities = dict(name="mylib", version="1.0", dtypes=["float64", "float32"],
                        conventions={"lora_linear": {"scaling": "alpha/r"}},           # what departs from the defaults
                        arith={"bfloat16": dict(accumulate="bfloat16")})               # default: float32 sums

    def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):                         # -> an object with forward(x)

Arrays are float64 or integer NumPy arrays both ways, with values on the grid of the dtype. What the object does not
offer, or answers with NotImplementedError, is a skip, counted and shown.
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import signal
import threading
import traceback
from typing import Any, Callable, Iterator, Mapping

import numpy

from minipeft.conformance.arithmetic import DTYPES, arithmetic, on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.fault import Fault, Skip
from minipeft.conformance.method import Method
from minipeft.conformance.methods import NAMES

_HANG = "does not return"
_STORED = ("forward", "weight")  # what these return was stored in the dtype; gradients may be kept in a wider one


@dataclasses.dataclass
class Plugin:
    """A module, or any object, that offers methods. limit: seconds that one call may take."""

    module: Any
    limit: float = 10.0

    def __post_init__(self) -> None:
        self.hung: set[str] = set()
        self.made: list[tuple[Case, Handle]] = []  # since it was last emptied: what a script of a failure shows
        declared = getattr(self.module, "capabilities", {})
        if not isinstance(declared, Mapping):
            raise ValueError(f"capabilities is a {type(declared).__name__}; expected a dict such as "
                             f"dict(name='mylib', version='1.0', dtypes=['float64', 'float32'])")
        unknown = set(declared) - {"name", "version", "dtypes", "conventions", "arith"}
        if unknown:
            raise ValueError(f"capabilities has {', '.join(sorted(map(repr, unknown)))}; expected name, version, "
                             f"dtypes, conventions, arith")
        self.name = str(declared.get("name", getattr(self.module, "__name__", type(self.module).__name__)))
        self.version = str(declared.get("version", "not declared"))
        self.dtypes = tuple(_of_kind(declared, "dtypes", (list, tuple), ("float64",)))
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"capabilities['dtypes'] has {dtype!r}; expected some of {', '.join(DTYPES)}")
        self.declared = {**_of_kind(declared, "conventions", Mapping, {})}
        for name, fields in self.declared.items():
            if name not in NAMES or not isinstance(fields, Mapping):
                raise ValueError(f"capabilities['conventions'] has {name!r}: {fields!r}; expected a method "
                                 f"({', '.join(NAMES)}) and a dict")
        self.arith = {**_of_kind(declared, "arith", Mapping, {})}
        for dtype, fields in self.arith.items():
            if dtype not in DTYPES or not isinstance(fields, Mapping):
                raise ValueError(f"capabilities['arith'] has {dtype!r}: {fields!r}; expected a dtype and a dict")
            arithmetic(dtype, fields)

    def offers(self, method: Method) -> bool:
        return callable(getattr(self.module, method.name, None))

    def conventions(self, method: Method) -> dict[str, str]:
        """The declared ones over the defaults. Raises ValueError for one that does not exist."""
        found = method.default()
        for name, value in self.declared.get(method.name, {}).items():
            if name not in method.conventions or value not in method.conventions[name]:
                raise ValueError(f"capabilities['conventions'][{method.name!r}] says {name}={value!r}; expected "
                                 f"{method.conventions.get(name) or dict(method.conventions)}")
            found[name] = value
        return found

    def settle(self, case: Case, method: Method) -> Case:
        """The case as this implementation is judged on it."""
        case = dataclasses.replace(case, conventions=self.conventions(method),
                                   declared=self.arith.get(case.dtype, {}))
        return dataclasses.replace(case, exact=case.exact and method.exact_when(case))

    def make(self, method: Method) -> Callable[..., "Handle"]:
        """case -> a fresh handle. Raises Skip for a case that needs a keyword which the factory does not have."""
        factory = getattr(self.module, method.name)
        known = _keywords(factory)

        def build(case: Case) -> Handle:
            args, kwargs = method.arguments(case)
            if unknown := [name for name in kwargs if known is not None and name not in known]:
                raise Skip(f"not offered: {method.name}() takes no {', '.join(unknown)}")
            handle = Handle(self, method, guarded(self, method.name, factory, args, kwargs), case.dtype)
            self.made.append((case, handle))
            return handle
        return build


class Handle:
    """What a factory returned; every call goes through the guard, and is written down for the script of a failure."""

    def __init__(self, plugin: Plugin, method: Method, inner: Any, dtype: str):
        self._plugin, self._method, self._inner, self._dtype = plugin, method, inner, dtype
        self._calls: list[tuple] = []

    def offers(self, *names: str) -> bool:
        return all(callable(getattr(self._inner, name, None)) for name in names)

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append((name, args, kwargs))
            function = getattr(self._inner, name, None)
            if not callable(function):
                raise Fault("raises", f"the object that {self._method.name}() returned has no {name}()")
            return guarded(self._plugin, f"{self._method.name}.{name}", function, args, kwargs)
        return call

    def array(self, name: str, shape: tuple, *args: Any, **kwargs: Any) -> numpy.ndarray:
        """A call that returns an array of this shape, finite."""
        where = f"{self._method.name}.{name}"
        found = checked(where, getattr(self, name)(*args, **kwargs), shape)
        store = arithmetic(self._dtype, self._plugin.arith.get(self._dtype, {})).store
        if name in _STORED and not numpy.array_equal(on_grid(found, store), found):
            raise Fault("off the grid", f"{where} returned numbers that {store} does not have: it was computed in, or "
                                        f"returned from, another dtype than {self._dtype}")
        return found

    def arrays(self, name: str, shapes: Mapping[str, tuple], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A call that returns {name: array or None}; those that have an entry in `shapes` must be there, in that
        shape."""
        found = getattr(self, name)(*args, **kwargs)
        where = f"{self._method.name}.{name}"
        if not isinstance(found, Mapping):
            raise Fault("wrong type", f"{where} returned {type(found).__name__}; expected a dict of arrays")
        absent = [key for key in shapes if found.get(key) is None]
        if absent:
            raise Fault("absent", f"{where} has no {', '.join(map(repr, absent))}")
        return {key: value if value is None else
                checked(f"{where}[{key!r}]", value, shapes.get(key, numpy.shape(value)))
                for key, value in found.items()}


def checked(where: str, value: Any, shape: tuple) -> numpy.ndarray:
    """A finite array of float64 of this shape; anything else is a Fault."""
    if not isinstance(value, numpy.ndarray) or value.dtype != numpy.float64:
        found = f"an array of {value.dtype}" if isinstance(value, numpy.ndarray) else type(value).__name__
        raise Fault("wrong type", f"{where} returned {found}; expected a NumPy array of float64")
    if value.shape != tuple(shape):
        raise Fault("wrong shape", f"{where} returned {list(value.shape)}; expected {list(shape)}")
    if not numpy.isfinite(value).all():
        raise Fault("not finite", f"{where} has {int((~numpy.isfinite(value)).sum())} of {value.size} numbers that "
                                  f"are NaN or infinite")
    return value.copy()  # what it does to its own array afterwards is its own business


def _keywords(function: Callable) -> set[str] | None:
    """The names that a function takes as keywords; None if it takes any, or nobody can say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _of_kind(declared: Mapping, name: str, kind: Any, default: Any) -> Any:
    value = declared.get(name, default)
    if not isinstance(value, kind):
        raise ValueError(f"capabilities[{name!r}] is {value!r}; expected a {'list' if kind is not Mapping else 'dict'}")
    return value


def guarded(plugin: Plugin, where: str, function: Callable, args: Any, kwargs: Any) -> Any:
    """function(*args, **kwargs) on read-only copies, in limited time. Every exception is a Fault, but for
    NotImplementedError, by which a plug-in says that it does not offer something: a Skip."""
    if where in plugin.hung:
        raise Fault(_HANG, f"{where} did not return before, and was not called again")
    given, copies = frozen((args, kwargs)), frozen((args, kwargs))
    try:
        with time_limit(plugin.limit):
            result = function(*given[0], **given[1])
    except _TimeUp:
        plugin.hung.add(where)
        raise Fault(_HANG, f"{where} took longer than {plugin.limit:g} s") from None
    except (KeyboardInterrupt, MemoryError):
        raise
    except NotImplementedError as error:
        raise Skip(f"{where} says that it is not implemented: {error}") from None
    except BaseException as error:
        if isinstance(error, ValueError) and "read-only" in str(error):
            raise Fault("writes into its inputs", f"{where}: {last_lines(error)}") from None
        raise Fault("raises", f"{where}: {last_lines(error)}") from None
    if not _equal(given, copies):
        raise Fault("writes into its inputs", f"{where} changed an array that it was given")
    return result


def frozen(value: Any) -> Any:
    """A copy in which every array is read-only."""
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
    """The error in one line, with where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{where}"


class _TimeUp(BaseException):
    """Not an Exception, so that a plug-in's own `except Exception` does not swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupts Python code that runs longer, in the main thread of a system that has an alarm; elsewhere nothing
    does, and the process that watches this one ends it (see `worker.py`)."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load(name: str, limit: float = 10.0) -> Plugin:
    """The plug-in of a module's dotted name. Raises ValueError with what to do when it cannot be imported."""
    try:
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, SyntaxError, ...
        raise ValueError(f"--impl {name} cannot be imported: {last_lines(error)}. It is the dotted name of a module "
                         f"that can be imported from here, such as mypkg.adapter") from error
    return Plugin(module, limit)
