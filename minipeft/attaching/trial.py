"""A method is tried before a model is touched.

    tried(plan)                   a piece for each kind and shape of place, on arrays of zeros, before anything is drawn
    tried(plan, pieces, own)      every piece as it was made; pieces with fixed integers or booleans compute only here

A piece must be made of the declared arrays and hold no others, and its results must have the shapes and dtypes that
its place needs. Fixed integers and booleans choose something, such as rows, so a piece cannot be tried on made-up ones.
"""
from __future__ import annotations

from types import ModuleType
from typing import Any, Iterator, Mapping

import numpy

from minipeft.attaching.build import Arrays, Plan, called
from minipeft.backend import Array, xp
from minipeft.checks import shown
from minipeft.engine.ops.overflow import quiet
from minipeft.engine.tensor import Leaf, Tensor, array_of
from minipeft.nn.place import Place
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Fixed, Piece, Reparam

BATCH, TIME = 2, 3  # of the inputs of a trial


def tried(plan: Plan, pieces: Mapping[str, Any] | None = None, own: Arrays | None = None) -> Plan:
    """`plan` itself, if its method makes pieces that fit. pieces, own: the pieces that were built and their arrays,
    {name: piece} and {"place.leaf": array}. Raises TypeError for a piece of the wrong kind, TypeError or ValueError for
    one that fails, ValueError for arrays that are missing or not declared and results of another shape or dtype."""
    seen, arrays = set(), plan.arrays()
    for name, place in plan.places.items():
        leaves = plan.declared[name]
        like = (place.kind, getattr(place, "shape", None), getattr(place, "width", None),
                tuple(sorted((leaf, d.shape) for leaf, d in leaves.items())))
        keys = {d.key(name, leaf): d for leaf, d in leaves.items()}
        choosing = any(d.dtype is not None and d.dtype.kind in "iub" for d in leaves.values())
        if pieces is None and like not in seen:
            zeros = {key: d.kind(_zeros(*d.shape, dtype=arrays[key][1])) for key, d in keys.items()}
            _try(plan, name, place, plan.piece(name, zeros), zeros, computes=not choosing)
        elif pieces is not None:
            built = {key: (own or {})[key] for key in keys}
            _try(plan, name, place, pieces[name], built, computes=choosing and like not in seen)
        seen.add(like)
    return plan


def _try(plan: Plan, name: str, place: Place, piece: Any, own: Mapping[str, Any], computes: bool) -> None:
    where = f"{type(plan.method).__name__} at {name}"
    _check_kind(where, place, piece)
    _check_arrays(where, piece, own, plan.model)
    what, results = f"{where}: its {type(piece).__name__}", _results(place, piece)
    with quiet(all="ignore"):  # zeros may divide zeros; only shapes and dtypes count here
        while computes and (result := called(what, next, results, None, fits=False)) is not None:
            _check_result(what, *result)


def _check_kind(where: str, place: Place, piece: Any) -> None:
    if isinstance(piece, type):
        raise TypeError(f"{where}: make() gives the class {piece.__name__}; expected an object of it, "
                        f"{piece.__name__}(**arrays)")
    if isinstance(place, Slot) and not isinstance(piece, Reparam):
        raise TypeError(f"{where}: make() gives {type(piece).__name__}; a slot takes a Reparam (write a class below "
                        f"minipeft.Reparam that defines dense())")
    if not isinstance(place, Slot) and not (isinstance(piece, Piece) and callable(piece)):
        raise TypeError(f"{where}: make() gives {type(piece).__name__}; a site takes a Piece (write a class below "
                        f"minipeft.Piece that defines __call__)")


def _check_arrays(where: str, piece: Any, own: Mapping[str, Any], model: frozenset[Place]) -> None:
    """Raises ValueError unless the declared arrays are attributes of the piece, and no others are anywhere in it. It
    may refer to places of the `model`, whose arrays are the model's."""
    held = {id(a) for a in piece.arrays.values()}
    for key, array in own.items():
        if id(array) not in held:
            leaf, kind = key.rpartition(".")[2], type(piece).__name__
            raise ValueError(f"{where}: arrays() declares {leaf!r}, which is no attribute of the {kind} that make() "
                             f"gives; expected {kind}({leaf}=arrays[{leaf!r}], ...) (one in a list or a dict does not "
                             f"count)")
    for attribute, array in piece.arrays.items():
        if getattr(piece, attribute, None) is not array:
            raise ValueError(f"{where}: the array {attribute!r} is hidden by {type(piece).__name__}.{attribute}; "
                             f"expected another name")
    declared = {id(a) for a in own.values()}
    for path, array in _found(type(piece).__name__, piece, model):
        if id(array) not in declared:
            raise ValueError(f"{where}: {path} is a {type(array).__name__} that arrays() does not declare: it would be "
                             f"neither trained nor saved")


def _found(path: str, value: Any, model: frozenset[Place]) -> Iterator[tuple[str, Any]]:
    """Every Leaf and Fixed inside a value, each after the path to it, except behind places of the `model`."""
    waiting, seen = [(path, value)], set()
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType)) or isinstance(value, Place) and value in model:
            continue
        seen.add(id(value))
        if isinstance(value, (Leaf, Fixed)):
            yield path, value
        elif isinstance(value, dict):
            waiting += [(f"{path}[{shown(key)}]", v) for key, v in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [(f"{path}[{i}]", v) for i, v in enumerate(value)]
        else:
            waiting += [(f"{path}.{key}", v) for key, v in getattr(value, "__dict__", {}).items()]


def _results(place: Any, piece: Any) -> Iterator[tuple[str, Any, tuple, Any]]:
    """(what was computed, the result, its shape, its dtype) of a piece at its place."""
    dtype = place.dtype
    if isinstance(place, Slot):
        weight = piece.over(place.fold())
        yield "dense()", _tensor("dense()", weight.dense()), place.shape, dtype
        if len(place.shape) == 2:
            (d_out, d_in), x = place.shape, Tensor(_zeros(TIME, place.shape[1], dtype=dtype))
            yield "project(x)", _tensor("project(x)", weight.project(x, None)), (TIME, d_out), dtype
            ids = xp.zeros((BATCH, TIME), dtype=int)
            yield "rows(ids)", _tensor("rows(ids)", weight.rows(ids)), (BATCH, TIME, d_in), dtype
        else:
            yield "vector()", _tensor("vector()", weight.vector()), place.shape, dtype
        return
    shape = (BATCH, TIME, place.width)
    x = Tensor(_zeros(*shape, dtype=dtype))
    if place.kind == "sublayer":
        yield "the output", _tensor("it", piece(x, x, x)), shape, dtype
    elif place.kind == "input":
        for mask in (None, xp.ones((BATCH, TIME), dtype=bool)):
            out, seen = _parts("embeddings, mask", piece(x, mask))
            yield "the embeddings", _tensor("it", out), (BATCH, _length(out), place.width), dtype
            if seen is not None or mask is not None:
                yield "the mask", seen, (BATCH, _length(out)), numpy.dtype(bool)
    else:
        for kept, bias in ((x, None), (x.data, _zeros(1, 1, TIME, TIME, dtype=dtype))):  # decoding keeps arrays
            k, v, hides = _parts("keys, values, bias", piece(kept, kept, bias))
            yield "the keys", k, (BATCH, _length(k), place.width), dtype
            yield "the values", v, (BATCH, _length(k), place.width), dtype
            if hides is not None or bias is not None:
                yield "the bias", hides, (*getattr(hides, "shape", (1, 1, TIME, TIME))[:-1], _length(k)), dtype


def _tensor(what: str, found: Any) -> Tensor:
    if not isinstance(found, Tensor):
        raise TypeError(f"{what} gives {type(found).__name__}; expected a Tensor (of ops, so that gradients pass)")
    return found


def _parts(expected: str, result: Any) -> tuple:
    if not isinstance(result, tuple) or len(result) != expected.count(",") + 1:
        raise TypeError(f"it gives {type(result).__name__}; expected ({expected})")
    return result


def _length(x: Any) -> int:
    """The length of axis 1; 0 for anything without one, whose shape is then refused."""
    return (*getattr(x, "shape", ()), 0, 0)[1]


def _check_result(where: str, what: str, found: Any, shape: tuple, dtype: Any) -> None:
    array = array_of(found)
    if getattr(array, "shape", None) != shape or array.dtype != dtype:
        gives = f"{array.dtype} {list(array.shape)}" if hasattr(array, "dtype") else shown(array)
        raise ValueError(f"{where} gives {gives} for {what}; expected {dtype} {list(shape)}")


def _zeros(*shape: int, dtype: Any) -> Array:
    return xp.zeros(shape, dtype=dtype)
