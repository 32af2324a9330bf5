"""From a method to its pieces: which places, which arrays, and the pieces that are made of these arrays.

    wanted(model, method)        Plan: places and declared arrays, checked; nothing is drawn and nothing is made
    plan.built(fill)             the pieces, of arrays that `fill` gives: drawn by `attach`, read from a file by `load`
"""
from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable, Mapping

import numpy

from minipeft.attaching.method import Declared, Method
from minipeft.backend import Array, xp
from minipeft.checks import is_integer, shown
from minipeft.nn.init import zeros
from minipeft.nn.place import Place
from minipeft.nn.weight import Fixed, Parameter

_DTYPES = ("bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64")
Arrays = dict[str, Parameter | Fixed]  # {"place.leaf": array}, those of a whole attachment or of one place


@dataclasses.dataclass(frozen=True)
class Plan:
    """The places and arrays that a method asks for on a model. places: {name: place}. declared: {name: {leaf:
    Declared}}. model: all places of the model, also those that the method does not choose."""

    method: Method
    places: Mapping[str, Place]
    declared: Mapping[str, Mapping[str, Declared]]
    model: frozenset[Place] = frozenset()

    def arrays(self) -> dict[str, tuple[Declared, Any]]:
        """{"place.leaf": (Declared, dtype)}: every array once, in order."""
        return {d.key(name, leaf): (d, numpy.dtype(d.dtype or self.places[name].dtype))  # type: ignore[attr-defined]
                for name, leaves in self.declared.items() for leaf, d in leaves.items()}

    def built(self, fill: Callable[[str, Declared, Any], Array]) -> tuple[dict[str, Any], Arrays]:
        """({name: piece}, {"place.leaf": array}). fill(key, declared, dtype) gives each array once."""
        own: Arrays = {key: d.kind(fill(key, d, dtype)) for key, (d, dtype) in self.arrays().items()}
        return {name: self.piece(name, own) for name in self.places}, own

    def piece(self, name: str, own: Arrays) -> Any:
        """The piece of the place called `name`, made of its arrays among `own`. Raises TypeError or ValueError where
        the method's make() fails."""
        arrays = {leaf: own[d.key(name, leaf)] for leaf, d in self.declared[name].items()}
        return called(f"{type(self.method).__name__} at {name}: make()", self.method.make, name, self.places[name],
                      arrays, fits=False)


def wanted(model: Any, method: Method) -> Plan:
    """The places that the method chooses and the arrays that it declares there.

    Raises as the method does for places that do not fit; ValueError for a place that is not the model's, for malformed
    declarations, and for a shared array that two places declare differently; TypeError where the method returns no
    mapping."""
    what, known = type(method).__name__, dict(model.named_places())
    places = _named(f"{what}.places()", "places {name: place}", called(f"{what}.places()", method.places, model))
    if not places:
        raise ValueError(f"{what}.places() chooses nothing on this model; expected at least one place")
    for name, place in places.items():
        if known.get(name) is not place:
            raise ValueError(f"{what}.places() gives {shown(name)}, which is no place of this model under that name")
    declared = {}
    for name, place in places.items():
        found = called(f"{what}.arrays() at {name}", method.arrays, name, place, model)
        declared[name] = _named(f"{what}.arrays() at {name}", "arrays {leaf: trained(shape) or fixed(shape, init)}",
                                found)
    seen: dict[str, Declared] = {}
    for name, leaves in declared.items():
        if not leaves:
            raise ValueError(f"{what}.arrays() declares nothing at {name}; expected at least one array")
        for leaf, d in leaves.items():
            _check(f"{what}.arrays() at {name}", leaf, d)
            if d.shared is not None and d.shared in known:
                raise ValueError(f"{what}.arrays() at {name}: {leaf!r} is shared as {d.shared!r}, which is the name of "
                                 f"a place; expected another name")
            first = seen.setdefault(d.key(name, leaf), d)
            if (first.shape, first.kind, first.dtype) != (d.shape, d.kind, d.dtype):
                raise ValueError(f"{what}.arrays() at {name}: {leaf!r} is shared as {d.shared!r} and declared as "
                                 f"{_said(d)}; another place declares {_said(first)}; expected one shape and dtype")
    return Plan(method, places, declared, frozenset(known.values()))


def called(what: str, function: Callable, *inputs: Any, fits: bool = True) -> Any:
    """function(*inputs), which runs code of a method. An error becomes a TypeError that begins with `what`. By a
    ValueError a method refuses a place that does not fit: it passes as it is. With fits=False
    it is a fault of the method like any other, and begins with `what`, too."""
    try:
        return function(*inputs)
    except ValueError as error:
        if fits:
            raise
        raise ValueError(f"{what}: {error}") from error
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from error
    except Exception as error:
        raise TypeError(f"{what}: {type(error).__name__}: {error}") from error


def _named(what: str, expected: str, found: Any) -> dict:
    if not isinstance(found, Mapping):
        raise TypeError(f"{what} gives {shown(found)}; expected {expected}")
    return dict(found)


def _said(d: Declared) -> str:
    return f"{d.kind.__name__} {list(d.shape)}{f' {d.dtype}' if d.dtype else ''}"


def _check(where: str, leaf: Any, declared: Any) -> None:
    if not isinstance(leaf, str) or not leaf.isidentifier() or leaf == "base":
        raise ValueError(f"{where}: {shown(leaf)} is no name of an array; expected an identifier other than 'base'")
    if not isinstance(declared, Declared):
        raise ValueError(f"{where}: {leaf!r} is {type(declared).__name__}; expected trained(shape) or fixed(shape, "
                         f"init)")
    if not isinstance(declared.shape, tuple) or not all(is_integer(n) for n in declared.shape):
        raise ValueError(f"{where}: {leaf!r} has shape {shown(declared.shape)}; expected a tuple of integers")
    if not callable(declared.init):
        raise ValueError(f"{where}: the init of {leaf!r} is {shown(declared.init)}; expected a function of (shape, "
                         f"dtype, rng), such as minipeft.zeros or minipeft.normal(0.02)")
    if declared.dtype is not None and declared.dtype.name not in _DTYPES:
        raise ValueError(f"{where}: {leaf!r} has dtype {declared.dtype}, which no file can hold; expected one of "
                         f"{', '.join(_DTYPES)}")
    shared = declared.shared
    if shared is not None and not (isinstance(shared, str) and re.fullmatch("[^@/]+", shared)):
        raise ValueError(f"{where}: {leaf!r} is shared as {shown(shared)}; expected a name without '@' and '/'")


def drawn(plan: Plan, rng: numpy.random.Generator) -> Callable[[str, Declared, Any], Array]:
    """A `fill` for the arrays of `plan` that calls the init of each with `rng` and copies the result, because an init
    may return the base's own array. Raises ValueError for an init that gives no array, or one of another shape or
    dtype, and TypeError for one that fails."""
    def fill(key: str, declared: Declared, dtype: Any) -> Array:
        what = f"{type(plan.method).__name__}: the init of {key}"
        array = called(f"{what}, a function of (shape, dtype, rng), fails", declared.init, declared.shape, dtype, rng)
        if not isinstance(array, xp.ndarray) or array.shape != declared.shape or array.dtype != dtype:
            found = f"{array.dtype} {list(array.shape)}" if isinstance(array, xp.ndarray) else \
                type(array).__name__
            raise ValueError(f"{what} gives {found}; expected {dtype} {list(declared.shape)}")
        return array if declared.init is zeros else array.copy()  # a page of zeros costs nothing until it is written
    return fill
