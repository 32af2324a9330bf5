"""A method is tried before a model is touched: one piece for each kind and shape of place, on arrays of zeros.

The piece must be made of the declared arrays and hold no other, and must compute what its place computes, in shape and
dtype. Nothing is drawn.
"""
from __future__ import annotations

import math
from typing import Any, Iterator

import numpy

from minipeft.attaching.build import Plan
from minipeft.backend import Array, xp
from minipeft.checks import shown
from minipeft.engine.ops.overflow import quiet
from minipeft.engine.tensor import Leaf, Tensor, array_of
from minipeft.nn.place import Place
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Fixed, Piece, Reparam

ROWS = 2  # how long the stream of a trial is


def tried(plan: Plan) -> Plan:
    """`plan`, whose method makes pieces that fit. Raises TypeError for a piece of the wrong kind and for one whose
    computation fails, ValueError for arrays that are missing or not declared, and for results of another shape or
    dtype."""
    seen = set()
    for name, place in plan.places.items():
        like = (place.kind, getattr(place, "shape", None), tuple(sorted(plan.declared[name])))
        if like not in seen:
            seen.add(like)
            _try(plan, name, place)
    return plan


def _try(plan: Plan, name: str, place: Place) -> None:
    where = f"{type(plan.method).__name__} at {name}"
    keys = {d.key(name, leaf) for leaf, d in plan.declared[name].items()}
    own = {key: d.kind(_zeros(*d.shape, dtype=dtype)) for key, (d, dtype) in plan.arrays().items() if key in keys}
    piece = plan.piece(name, own)
    _check_kind(where, place, piece)
    _check_arrays(where, piece, own)
    with quiet(all="ignore"):  # zeros may divide zeros; only shapes and dtypes count here
        try:
            results = list(_results(place, piece))
        except ValueError:
            raise
        except Exception as error:
            raise TypeError(f"{where}: its {type(piece).__name__} fails: {type(error).__name__}: {error}") from error
    for what, found, shape, dtype in results:
        if array_of(found) is not None and (array_of(found).shape != shape or array_of(found).dtype != dtype):
            raise ValueError(f"{where}: {what} of its {type(piece).__name__} is {array_of(found).dtype} "
                             f"{list(array_of(found).shape)}; expected {dtype} {list(shape)}")


def _check_kind(where: str, place: Place, piece: Any) -> None:
    if isinstance(place, Slot) and not isinstance(piece, Reparam):
        raise TypeError(f"{where}: make() gives {type(piece).__name__}; a slot takes a Reparam (write a class below "
                        f"minipeft.Reparam that defines dense())")
    if not isinstance(place, Slot) and not (isinstance(piece, Piece) and callable(piece)):
        raise TypeError(f"{where}: make() gives {type(piece).__name__}; a site takes a Piece (write a class below "
                        f"minipeft.Piece that defines __call__)")


def _check_arrays(where: str, piece: Any, own: dict[str, Any]) -> None:
    """The declared arrays are attributes of the piece, and there is no other Parameter in it."""
    held = {id(a) for a in piece.arrays.values()}
    for key, array in own.items():
        if id(array) not in held:
            raise ValueError(f"{where}: arrays() declares {key.rpartition('.')[2]!r}, which is no attribute of the "
                             f"{type(piece).__name__} that make() gives")
    declared = {id(a) for a in own.values()}
    for path, array in _found(vars(piece), type(piece).__name__):
        if id(array) not in declared:
            raise ValueError(f"{where}: {path} is a {type(array).__name__} that arrays() does not declare: it would be "
                             f"neither trained nor saved")


def _found(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every Parameter and Fixed inside of a value, with where it is."""
    if isinstance(value, (Leaf, Fixed)):
        yield path, value
    elif depth < 8:
        if isinstance(value, dict):
            inside = [(f"{path}.{key}", v) for key, v in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
        else:
            inside = [(f"{path}.{key}", v) for key, v in getattr(value, "__dict__", {}).items()] \
                if not isinstance(value, type) else []
        for where, v in inside:
            yield from _found(v, where, depth + 1)


def _results(place: Any, piece: Any) -> Iterator[tuple[str, Any, tuple, Any]]:
    """(what was computed, the result, its shape, its dtype) of a piece at its place."""
    dtype = place.dtype
    if isinstance(place, Slot):
        weight = piece.over(place.fold())
        dense = weight.dense()
        if not isinstance(dense, Tensor):
            raise TypeError(f"dense() gives {shown(dense)}; expected a Tensor")
        yield "dense()", dense, place.shape, dtype
        if len(place.shape) == 2:
            d_out, d_in = place.shape
            yield "project(x)", weight.project(_zeros(ROWS, d_in, dtype=dtype)), (ROWS, d_out), dtype
            yield "rows(ids)", weight.rows(xp.zeros((1, ROWS), dtype=int)), (1, ROWS, d_in), dtype
        else:
            yield "vector()", weight.vector(), place.shape, dtype
        return
    shape = (1, ROWS, place.width)
    x = _zeros(*shape, dtype=dtype)
    if place.kind == "sublayer":
        yield "the output", piece(x, x, x), shape, dtype
    elif place.kind == "input":
        out, mask = piece(x, None)
        yield "the embeddings", out, (1, array_of(out).shape[1], place.width), dtype
        yield "the mask", mask, (1, array_of(out).shape[1]), numpy.dtype(bool)
    else:
        k, v, _ = piece(x, x, None)
        yield "the keys", k, (1, array_of(k).shape[1], place.width), dtype
        yield "the values", v, (1, array_of(k).shape[1], place.width), dtype


def _zeros(*shape: int, dtype: Any) -> Array:
    """Zeros; of integers 0, 1, 2, ..., because indices may have to be distinct."""
    if numpy.dtype(dtype).kind in "iu":
        return xp.arange(math.prod(shape), dtype=dtype).reshape(shape)
    return xp.zeros(shape, dtype=dtype)
