"""Old names, which work for one more version and warn. Whoever removes this file removes them all.

    minipeft.peft.lora, minipeft.autograd.tensor, minipeft.ops       modules that moved
    ops.swap, tensor.pullback, weight.Constant, weight.Slot          names that changed or moved
    LoRA(start=...), PromptTuning(start=...)                         a field that is now init
    Selective(type="norm scale")                                     a value that is now "norm weight"

These are names of 0.1, which go in 0.3. A name of 0.2 goes in 0.4:

    LoRA(init="uniform")                                             a value that is now "kaiming"
"""
from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from typing import Any

_ATTACHING = ("attach", "attachment", "trained_on", "adapter_file", "load", "fields", "report", "select")
_NAMES = {
    "minipeft.engine.ops.swap": "minipeft.engine.ops.matrix_transpose",
    "minipeft.engine.ops.primitives.swap": "minipeft.engine.ops.primitives.matrix_transpose",
    "minipeft.engine.tensor.pullback": "minipeft.engine.tensor.backward",
    "minipeft.engine.tensor.once": "minipeft.engine.calling.once",
    "minipeft.engine.ops.fused.key_first": "minipeft.engine.ops.layout.key_first",
    "minipeft.engine.tensor.when_differentiated": "minipeft.engine.afterwards.when_differentiated",
    "minipeft.nn.weight.Constant": "minipeft.nn.weight.Fixed",
    "minipeft.nn.weight.Slot": "minipeft.nn.slot.Slot"}
Values = dict[str, dict[str, tuple[str, tuple[str, str]]]]  # {field: {old value: (new value, the versions)}}
_SINCE_0_2, _SINCE_0_3 = ("0.2", "0.3"), ("0.3", "0.4")  # the first with the new name, the first without the old one


def _warn(old: str, new: str, versions: tuple[str, str] = _SINCE_0_2) -> None:
    """Warn at the line that used the old name: the nearest outside this file, `__init__` and the import system."""
    frame: Any = sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    warnings.warn_explicit(f"{old} is called {new} since minipeft {versions[0]}; the old name goes in {versions[1]}",
                           DeprecationWarning, frame.f_code.co_filename, frame.f_lineno,
                           frame.f_globals.get("__name__"),
                           frame.f_globals.setdefault("__warningregistry__", {}))


def _is_ours(module: str) -> bool:
    return module == "minipeft" or module.startswith((__name__, "importlib"))


def _new_module(old: str) -> str | None:
    """Where a module of 0.1 is now."""
    if not old.startswith("minipeft."):
        return None
    package, _, inside = old.removeprefix("minipeft.").partition(".")
    peft = "attaching" if inside.partition(".")[0] in _ATTACHING else "methods"
    new = {"autograd": "engine", "ops": "engine.ops", "peft": peft}.get(package)
    return None if new is None else f"minipeft.{new}.{inside}".rstrip(".")


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of 0.1 under their old names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if _new_module(name) is None else importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        new = _new_module(spec.name) or ""
        _warn(spec.name, new)
        found = importlib.import_module(new)
        module = types.ModuleType(spec.name)
        vars(module).update({name: value for name, value in vars(found).items() if not name.startswith("__")})
        setattr(module, "__getattr__", functools.partial(_of_moved, found))  # for names that changed, too
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is left to do."""


def _of_moved(found: types.ModuleType, name: str) -> Any:
    if name.startswith("__"):  # the import system asks for __path__, which would lead it to the new files
        raise AttributeError(name)
    return getattr(found, name)


def _renamed(module: str, name: str) -> Any:
    old = f"{module}.{name}"
    if old not in _NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(old, _NAMES[old])
    home, _, new = _NAMES[old].rpartition(".")
    return getattr(importlib.import_module(home), new)


def _accept_old_fields(kind: type, fields: dict[str, str], values: Values) -> None:
    """Lets the constructor of `kind` take old names of fields, and old values of fields."""
    init = kind.__init__  # type: ignore[misc]
    order = [field.name for field in dataclasses.fields(kind) if not field.kw_only]

    def new_value(field: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(new_value(field, v) for v in value)
        if isinstance(value, str) and value in values.get(field, {}):
            new, versions = values[field][value]
            _warn(repr(value), repr(new), versions)
            return new
        return value

    @functools.wraps(init)
    def accepting(self: Any, *args: Any, **named: Any) -> None:
        for old, new in fields.items():
            if old in named and new in named:
                raise TypeError(f"{kind.__name__} got {old} and {new}, which are one field; expected {new} alone")
            if old in named:
                _warn(f"the field {old} of {kind.__name__}", new)
                named[new] = named.pop(old)
        for field in values.keys() & named.keys():
            named[field] = new_value(field, named[field])
        init(self, *(new_value(field, value) for field, value in zip(order, args)), *args[len(order):], **named)

    setattr(kind, "__init__", accepting)
    for old, new in fields.items():
        setattr(kind, old, property(functools.partial(_old_field, old=old, new=new)))


def _old_field(method: Any, old: str, new: str) -> Any:
    _warn(f"the field {old} of {type(method).__name__}", new)
    return getattr(method, new)


def install(lora: type, prompt: type, selective: type) -> None:
    """Makes the old names work; lora, prompt and selective are the methods with old fields. Called once, when minipeft
    is imported. Their constructors raise TypeError for a field under both of its names."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
    for module in {old.rpartition(".")[0] for old in _NAMES}:
        setattr(importlib.import_module(module), "__getattr__", functools.partial(_renamed, module))
    _accept_old_fields(lora, {"start": "init"}, {"init": {"uniform": ("kaiming", _SINCE_0_3)}})
    _accept_old_fields(prompt, {"start": "init"}, {})
    _accept_old_fields(selective, {}, {"type": {"norm scale": ("norm weight", _SINCE_0_2)}})
