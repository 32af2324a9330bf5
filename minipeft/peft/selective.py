"""Selective tuning: a chosen subset of the model's own weights is trained, as a difference that can be taken off again.

    W = W0 + d                  d of the shape of W0, starts at 0
    W = W0 + scatter(d, i)      d [n] at the flat indices i [n] of an element mask; every other element is W0's

Which: by component, by layer, by type (biases alone: BitFit, Ben Zaken et al., 2021, arXiv:2106.10199), by name, by
rows of an embedding table, or by a mask such as the elements of largest Fisher information (`mask.py`).

W0 is frozen and never written to: one base serves many tasks, and weight decay pulls d to 0, that is W to W0. Training
d is training W directly, up to rounding (direct tuning is `fit(model, select(model, where), ...)`). What is saved: the
moments and the file are of the size of d. What is not: with a mask, dW is computed whole before its n elements are
taken; what is not chosen costs no memory after that, but it costs time.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping, Self

import numpy

from minipeft.autograd.tensor import Tensor
from minipeft.backend import Array, to_device
from minipeft.nn import init
from minipeft.nn.parts import COMPONENTS, TYPES, slots_having
from minipeft.nn.weight import Constant, Parameter, Reparam, Slot, Weight
from minipeft.nn.where import Where, matching
from minipeft.ops import add, embedding, scatter
from minipeft.peft.fields import expect, integer, plain
from minipeft.peft.mask import indices_of_mask, indices_of_rows


@dataclasses.dataclass(frozen=True)
class Selective:
    """component: one or more of "attention", "feed-forward", "embedding", "norm", "position", "head".
    layers: indices of blocks in each stack, -1 the last; first, last: so many blocks at either end of each stack.
    type: one or more of "bias", "norm scale", "matrix". where: a pattern on the names of slots.
    rows: ids, whose rows of the embedding tables are trained. mask: {slot name: boolean array of its shape, or
    distinct flat indices into it}. A slot is trained if all conditions that are given choose it.
    Raises ValueError for fields out of range, and, on a model, for a condition that chooses nothing there."""

    component: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    first: int = 0
    last: int = 0
    type: str | tuple[str, ...] = ()
    where: Where = ""
    rows: tuple[int, ...] = ()
    mask: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        plain(self)
        for name, known in (("component", COMPONENTS), ("type", TYPES)):
            chosen = getattr(self, name)
            object.__setattr__(self, name, (chosen,) if isinstance(chosen, str) else chosen)
            expect(self, name, _all(getattr(self, name), lambda part: part in known), f"some of {', '.join(known)}")
        for name in ("first", "last"):
            expect(self, name, integer(getattr(self, name), 0), "a number of blocks")
        expect(self, "layers", _all(self.layers, lambda i: type(i) is int), "a tuple of indices of blocks")
        expect(self, "rows", _all(self.rows, lambda i: integer(i, 0)) and len(set(self.rows)) == len(self.rows),
               "a tuple of distinct ids")
        expect(self, "mask", self.mask is None or isinstance(self.mask, Mapping) and self.mask and not self.rows,
               "{slot name: array}, and no rows beside it")

    @classmethod
    def from_file(cls, fields: Mapping[str, Any], where: Where, tensors: Mapping[str, Array]) -> Self:
        """As `load` makes it: a mask is not among the fields of an adapter file, but among its tensors, as indices."""
        masks = {key.removesuffix(".indices"): array for key, array in tensors.items() if key.endswith(".indices")}
        return cls(**fields, where=where, mask=masks if masks and not fields.get("rows") else None)

    def places(self, model: Any) -> dict[str, Slot]:
        """The slots that all conditions choose."""
        chosen = slots_having(model.slots, self.component, self.type, self.layers, self.first, self.last)
        if self.rows:
            chosen = {name: slot for name, slot in chosen.items() if slot.kind == "embedding"}
            if not chosen:
                raise ValueError("Selective: rows chooses nothing: the other conditions leave no embedding table")
        if self.mask is not None:
            odd = sorted(set(self.mask) - set(chosen))
            if odd:
                raise ValueError(f"Selective: mask names {odd[0]!r}, which the model lacks, or a condition leaves out")
            chosen = {name: chosen[name] for name in self.mask}
        chosen = {name: chosen[name] for name in matching(chosen, self.where)}
        for name, slot in chosen.items():
            self._indices(name, slot)  # raises for a mask that does not fit
        return chosen

    def build(self, model: Any, places: dict[str, Slot], rng: numpy.random.Generator) -> dict[str, Reparam]:
        """{slot: W0 + d}; draws nothing."""
        return {name: Delta(slot.base) if indices is None else MaskedDelta(slot.base, indices)
                for name, slot in places.items() for indices in [self._indices(name, slot)]}

    def _indices(self, name: str, slot: Slot) -> numpy.ndarray | None:
        """The flat indices of the elements that are trained; None for all."""
        shape = tuple(slot.base.shape)
        if self.rows:
            return indices_of_rows(name, shape, self.rows)
        return None if self.mask is None else indices_of_mask(name, shape, self.mask[name])


def _all(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether `value` is a tuple whose items all hold."""
    return isinstance(value, tuple) and all(map(holds, value))


class Delta(Reparam):
    """W0 + d."""

    def __init__(self, base: Weight):
        self.base, self.d = base, Parameter(init.zeros(tuple(base.shape), base.dtype))

    def dense(self) -> Tensor:
        return add(self.base.dense(), self.d)

    def rows(self, ids: Array) -> Tensor:
        """W0[ids] + d[ids]: no whole table is added up for a few rows."""
        return add(self.base.rows(ids), embedding(self.d, ids))


class MaskedDelta(Reparam):
    """W0 + scatter(d, i).   d [n], indices [n], ascending."""

    def __init__(self, base: Weight, indices: numpy.ndarray):
        self.base, self.indices = base, Constant(to_device(indices))
        self.d = Parameter(init.zeros(indices.shape, base.dtype))

    def dense(self) -> Tensor:
        return add(self.base.dense(), scatter(self.d, self.indices.data, shape=self.shape))
