"""Selective tuning: a chosen subset of the model's own weights is trained, as a difference that can be taken off again.

    W = W0 + d        d of the shape of W0, or of the rows or elements of it that are trained; it starts at 0 (delta.py)

Which: by component, by layer, by type (biases alone: BitFit, Ben Zaken et al., 2021, arXiv:2106.10199), by name, by
rows of an embedding table, or by a mask such as the elements of largest Fisher information (mask.py).

W0 is frozen and never written to: one base serves many tasks, and weight decay pulls d to 0, that is W to W0. Training
d is training W directly, up to rounding (direct tuning is `fit(model, select(model, where), ...)`). What is saved: the
moments are of the size of d, and so is the file, but for the indices of a mask, which it holds too. What is not: with a
mask, dW is computed whole before its n elements are taken; what is not chosen costs time, and no memory after that.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping, Self

from minipeft.backend import Array
from minipeft.nn.parts import COMPONENTS, TYPES, slots_having
from minipeft.nn.weight import Reparam, Slot
from minipeft.nn.where import Where, matching
from minipeft.methods.delta import Delta, MaskedDelta, RowDelta
from minipeft.attaching.fields import expect, integer, one_of, plain
from minipeft.methods.mask import check_rows, indices_of_mask


@dataclasses.dataclass(frozen=True)
class Selective:
    """component: one or more of "attention", "feed-forward", "embedding", "norm", "position", "head".
    layers: indices of blocks in each stack, -1 the last; first, last: so many blocks at either end of each stack.
    type: one or more of "bias", "norm weight", "matrix". where: a pattern on the names of slots.
    rows: ids, whose rows of the embedding tables are trained. mask: {slot name: boolean array of its shape, or
    distinct flat indices into it}; it does not count when methods are compared. A slot is trained if all conditions
    that are given choose it; with none given, all are. Raises ValueError for fields out of range or empty, and, on a
    model, for anything that is asked for and that it does not have."""

    component: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    first: int | None = None
    last: int | None = None
    type: str | tuple[str, ...] | None = None
    where: Where = ""
    rows: tuple[int, ...] | None = None
    mask: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        plain(self)
        for name in ("component", "type", "layers"):  # one alone means a tuple of one
            if isinstance(chosen := getattr(self, name), (str, int)):
                object.__setattr__(self, name, (chosen,))
        for name, known in (("component", COMPONENTS), ("type", TYPES)):
            expect(self, name, _all(getattr(self, name), lambda part: one_of(part, known)),
                   f"some of {', '.join(known)}")
        for name in ("first", "last"):
            expect(self, name, getattr(self, name) is None or integer(getattr(self, name)),
                   "a number of blocks, at least 1, or None")
        expect(self, "layers", _all(self.layers, lambda i: type(i) is int), "indices of blocks, at least one")
        expect(self, "rows", _all(self.rows, lambda i: integer(i, 0)) and len(set(self.rows or ())) == len(
            self.rows or ()), "distinct ids, at least one")
        expect(self, "mask", self.mask is None or isinstance(self.mask, Mapping) and self.mask and self.rows is None,
               "{slot name: array}, and no rows beside it")

    @classmethod
    def from_file(cls, fields: Mapping[str, Any], where: Where, tensors: Mapping[str, Array]) -> Self:
        """As `load` makes it: a mask is not among the fields of an adapter file, but among its tensors, as indices."""
        masks = {key.removesuffix(".indices"): array for key, array in tensors.items() if key.endswith(".indices")}
        return cls(**fields, where=where, mask=masks or None)

    def places(self, model: Any) -> dict[str, Slot]:
        """The slots that all conditions choose."""
        chosen = slots_having(model.slots, self.component, self.type, self.layers, self.first, self.last)
        if self.rows is not None:
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
            self.shapes(name, slot, model)  # raises for rows or a mask that do not fit
        return chosen

    def shapes(self, name: str, slot: Slot, model: Any) -> dict[str, tuple]:
        """Of d, and of the indices of a mask, at one slot."""
        shape = tuple(slot.base.shape)
        if self.rows is not None:
            return {"d": (len(check_rows(name, shape, self.rows)), shape[1])}
        if self.mask is None:
            return {"d": shape}
        n = indices_of_mask(name, shape, self.mask[name]).shape
        return {"d": n, "indices": n}

    def build(self, model: Any, places: dict[str, Slot], rng: Any) -> dict[str, Reparam]:
        """{slot: W0 + d}; draws nothing."""
        return {name: self._delta(name, slot) for name, slot in places.items()}

    def _delta(self, name: str, slot: Slot) -> Reparam:
        shape = tuple(slot.base.shape)
        if self.rows is not None:
            return RowDelta(slot.base, check_rows(name, shape, self.rows))
        if self.mask is not None:
            return MaskedDelta(slot.base, indices_of_mask(name, shape, self.mask[name]))
        return Delta(slot.base)


def _all(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether `value` is None, or a tuple, not empty, whose items all hold."""
    return value is None or isinstance(value, tuple) and bool(value) and all(map(holds, value))
