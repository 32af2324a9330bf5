"""The implementation under test, guarded: its arguments are read-only, its results are checked, and its mistakes become
Faults that never stop the run.

A plug-in is any module with `capabilities` and functions named after the methods:

    capabilities = dict(name="mylib", version="1.0", dtypes=["float64", "float32"],
                        conventions={"lora_linear": {"scaling": "alpha/r"}},           # what departs from the defaults
                        arith={"bfloat16": dict(accumulate="bfloat16")})               # default: float32 sums

    def lora_linear(W, b, A, B, alpha, dtype, *, dropout=0.0):                         # -> an object with forward(x)

Arguments and results are NumPy arrays of float64 or integers that hold only numbers of the dtype. If the object lacks a
call, or answers it with NotImplementedError, the properties that need it are skipped, counted and shown.
"""
from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any, Callable, Mapping

import numpy

from minipeft.conformance.arithmetic import DTYPES, arithmetic, on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.fault import ABSENT, NOT_FINITE, OFF_GRID, RAISES, WRONG_SHAPE, WRONG_TYPE, Fault, Skip
from minipeft.conformance.guard import guarded, last_lines
from minipeft.conformance.method import Method
from minipeft.conformance.methods import NAMES

_STORED = ("forward", "weight")  # their results were stored in the dtype; gradients may be kept in a wider one


@dataclasses.dataclass
class Plugin:
    """A module, or any object, that implements methods. limit: seconds that one call may take. calling: called with the
    name of each call before it is made, so that a watching process knows which call does not return. alone: whether it
    runs in a process of its own, where only the plug-in itself can raise KeyboardInterrupt.

    Raises ValueError for `capabilities` that are malformed or name unknown dtypes, methods or arithmetic."""

    module: Any
    limit: float = 10.0
    calling: Callable[[str], None] = lambda where: None
    alone: bool = False

    def __post_init__(self) -> None:
        self.hung: set[str] = set()
        self.made: list[tuple[Case, Handle]] = []  # since it was last emptied; the script of a failure shows these
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
        """Whether the plug-in has a function for this method."""
        return callable(getattr(self.module, method.name, None))

    def conventions(self, method: Method) -> dict[str, str]:
        """The conventions of the method: the declared values, and the defaults of the others. Later conventions are
        left out where they have their default. Raises ValueError for a convention or value that does not exist."""
        found = method.default()
        for name, value in self.declared.get(method.name, {}).items():
            if name not in method.conventions or value not in method.conventions[name]:
                raise ValueError(f"capabilities['conventions'][{method.name!r}] says {name}={value!r}; expected "
                                 f"{method.conventions.get(name) or dict(method.conventions)}")
            if name not in method.later or value != method.conventions[name][0]:
                found[name] = value
        return found

    def settle(self, case: Case, method: Method) -> Case:
        """The case with the conventions and the arithmetic by which this implementation is judged."""
        case = dataclasses.replace(case, conventions=self.conventions(method),
                                   declared=self.arith.get(case.dtype, {}))
        return dataclasses.replace(case, exact=case.exact and method.exact_when(case))

    def make(self, method: Method) -> Callable[..., "Handle"]:
        """A function case -> a fresh handle. It raises Skip for a case that needs a keyword which the factory lacks,
        and Fault if the factory fails."""
        factory = getattr(self.module, method.name)
        known = _keywords(factory)

        def build(case: Case) -> Handle:
            args, kwargs = method.arguments(case)
            if unknown := [name for name in kwargs if known is not None and name not in known]:
                raise Skip(f"not offered: {method.name}() takes no {', '.join(unknown)}")
            inner = guarded(self, method.name, factory, args, kwargs)
            if inner is None:
                raise Fault(WRONG_TYPE, f"{method.name}() returned None; expected an object with forward()")
            handle = Handle(self, method, inner, case.dtype)
            self.made.append((case, handle))
            return handle
        return build


class Handle:
    """The object that a factory returned. Every call of it is guarded, and recorded for the script of a failure."""

    def __init__(self, plugin: Plugin, method: Method, inner: Any, dtype: str):
        self._plugin, self._method, self._inner, self._dtype = plugin, method, inner, dtype
        self._calls: list[tuple] = []

    @property
    def last(self) -> str:
        """The name of the last call; "" before the first."""
        return f"{self._method.name}.{self._calls[-1][0]}" if self._calls else ""

    def offers(self, *names: str) -> bool:
        """Whether the object has all calls of these names."""
        return all(map(self._has, names))

    def _has(self, name: str) -> bool:
        try:
            return callable(getattr(self._inner, name, None))
        except Exception:
            return True  # it exists, and the call will show what is wrong with it

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append((name, args, kwargs))
            if not self._has(name):
                raise Fault(RAISES, f"the object that {self._method.name}() returned has no {name}()")
            return guarded(self._plugin, f"{self._method.name}.{name}",
                           lambda *args, **kwargs: getattr(self._inner, name)(*args, **kwargs), args, kwargs)
        return call

    def array(self, name: str, shape: tuple, *args: Any, **kwargs: Any) -> numpy.ndarray:
        """The result of the call `name`, a finite array of this shape. Raises Fault for any other result, and for one
        of forward() or weight() with numbers that the dtype does not have."""
        where = f"{self._method.name}.{name}"
        found = checked(where, getattr(self, name)(*args, **kwargs), shape)
        store = arithmetic(self._dtype, self._plugin.arith.get(self._dtype, {})).store
        if name in _STORED and not numpy.array_equal(on_grid(found, store), found):
            raise Fault(OFF_GRID, f"{where} returned numbers that are not {store} numbers: they were computed in, or "
                                  f"returned from, another dtype than {self._dtype}")
        return found

    def arrays(self, name: str, shapes: Mapping[str, tuple], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The result of the call `name`, {name: array or None}. The arrays named in `shapes` must be there, with these
        shapes. Raises Fault for any other result."""
        found = getattr(self, name)(*args, **kwargs)
        where = f"{self._method.name}.{name}"
        if not isinstance(found, Mapping):
            raise Fault(WRONG_TYPE, f"{where} returned {type(found).__name__}; expected a dict of arrays")
        absent = [key for key in shapes if found.get(key) is None]
        if absent:
            raise Fault(ABSENT, f"{where} has no {', '.join(map(repr, absent))}")
        return {key: value if value is None else
                checked(f"{where}[{key!r}]", value, shapes.get(key, numpy.shape(value)))
                for key, value in found.items()}


def checked(where: str, value: Any, shape: tuple) -> numpy.ndarray:
    """A copy of `value`, which must be a finite float64 array of this shape. Raises Fault, beginning with `where`, for
    anything else."""
    if not isinstance(value, numpy.ndarray) or value.dtype != numpy.float64:
        found = f"an array of {value.dtype}" if isinstance(value, numpy.ndarray) else type(value).__name__
        raise Fault(WRONG_TYPE, f"{where} returned {found}; expected a NumPy array of float64")
    if value.shape != tuple(shape):
        raise Fault(WRONG_SHAPE, f"{where} returned {list(value.shape)}; expected {list(shape)}")
    if not numpy.isfinite(value).all():
        raise Fault(NOT_FINITE, f"{where} has {int((~numpy.isfinite(value)).sum())} of {value.size} numbers that are "
                                "NaN or infinite")
    return value.copy()  # the implementation may change its own array later


def _keywords(function: Callable) -> set[str] | None:
    """The names that a function accepts as keywords; None if it accepts any, or if its signature is unknown."""
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


def load(name: str, limit: float = 10.0) -> Plugin:
    """The plug-in in the module with this dotted name. limit: seconds for one call. Raises ValueError, with advice, if
    it cannot be imported."""
    try:
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, SyntaxError, ...
        raise ValueError(f"--impl {name} cannot be imported: {last_lines(error)}. Give the dotted name of a module "
                         f"that can be imported from the current folder, such as mypkg.adapter") from error
    return Plugin(module, limit)
