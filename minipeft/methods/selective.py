"""Selective tuning: a chosen subset of the model's own weights is trained, as a difference that can be taken off again.

    W = W0 + d        d of the shape of W0, or of its trained rows or elements (delta.py); it starts at 0

    x [.., d_in] -- W0 + d [d_out, d_in] -- y [.., d_out]        W0 frozen and kept, d trained

Many tasks need few of a model's weights changed, so a well-chosen subset is enough. The choice is by component, layer,
type (biases alone: BitFit, Ben Zaken et al., 2021, arXiv:2106.10199), name, rows of an embedding table, or by a mask
such as the elements of largest Fisher information (mask.py).

    adapter = attach(model, Selective(component="norm"), numpy.random.default_rng(0))
    fit(model, adapter, batches, steps=300, optimizer=AdamW(1e-3))
    with adapter.off(): ...

On T5-small, component="norm": 16,384 parameters of 60,506,624.

Neither training d nor a move writes to W0, so one base serves many tasks. Weight decay pulls d to 0, and so W to W0.
Apart from that, training d is training W directly (`fit(model, select(model, where), ...)`), up to rounding. The
optimizer's moments and the file have the size of d. With a mask, the file also holds indices, and dW is still computed
as a whole before its n elements are taken.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping, Self

import numpy

from minipeft.attaching.fields import expect, integer, one_of
from minipeft.attaching.method import Declared, Method, fixed, register, setting, trained
from minipeft.backend import Array, to_device
from minipeft.methods.delta import Added, Delta, MaskedDelta, RowDelta
from minipeft.methods.mask import check_rows, indices_of_mask
from minipeft.nn.parts import COMPONENTS, TYPES, slots_having
from minipeft.nn.place import Place
from minipeft.nn.slot import Slot
from minipeft.nn.where import Where, exactly, matching


def _all(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether `value` is None, or a non-empty tuple whose items all satisfy `holds`."""
    return value is None or isinstance(value, tuple) and bool(value) and all(map(holds, value))


def _some_of(known: tuple[str, ...]) -> Any:
    return setting(None, lambda v: _all((v,) if isinstance(v, str) else v, lambda part: one_of(part, known)),
                   f"some of {', '.join(known)}")


def _blocks() -> Any:
    return setting(None, lambda v: v is None or integer(v), "a number of blocks, at least 1, or None")


@register
@dataclasses.dataclass(frozen=True)
class Selective(Method):
    """Selective tuning. component: one or more of "attention", "feed-forward", "embedding", "norm", "position", "head".
    layers: indices of blocks in each stack, -1 the last. first, last: the first or last n blocks of each stack. type:
    one or more of "bias", "norm weight", "matrix". where: a pattern on the names of slots. rows: ids; only these rows
    of the embedding tables are trained. mask: {slot name: boolean array of its shape, or distinct flat indices into
    it}; ignored when methods are compared.

    A slot is trained if it meets every condition given; without conditions, all slots are. Raises ValueError for fields
    out of range or empty and, on a model, for conditions that choose nothing and for rows or masks that do not fit."""

    component: str | tuple[str, ...] | None = _some_of(COMPONENTS)
    layers: tuple[int, ...] | None = setting(None, lambda v: _all((v,) if type(v) is int else v,
                                                                  lambda i: type(i) is int),
                                             "indices of blocks, at least one")
    first: int | None = _blocks()
    last: int | None = _blocks()
    type: str | tuple[str, ...] | None = _some_of(TYPES)
    where: Where = ""
    rows: tuple[int, ...] | None = setting(None, lambda v: _all(v, lambda i: integer(i, 0))
                                           and len(set(v or ())) == len(v or ()), "distinct ids, at least one")
    mask: Mapping[str, Any] | None = setting(None, lambda v: v is None or isinstance(v, Mapping) and v,
                                             "{slot name: array}, and no rows beside it", in_file=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("component", "type", "layers"):  # a single value means a tuple of one
            if isinstance(chosen := getattr(self, name), (str, int)):
                object.__setattr__(self, name, (chosen,))
        expect(self, "mask", self.mask is None or self.rows is None, "{slot name: array}, and no rows beside it")

    @classmethod
    def from_file(cls, fields: Mapping[str, Any], where: Where, tensors: Mapping[str, Array]) -> Self:
        """The method in a file: fields, where and tensors as in `Method.from_file`. A mask is not among the fields, but
        among the tensors, as indices. Raises ValueError for indices that do not ascend."""
        masks = {key.removesuffix(".indices"): array for key, array in tensors.items() if key.endswith(".indices")}
        for name, indices in masks.items():
            if indices.ndim == 1 and indices.dtype.kind == "i" and (numpy.diff(indices) < 0).any():
                raise ValueError(f"Selective: the indices of {name} do not ascend; expected them as save() writes them")
        return cls(**fields, where=where, mask=masks or None)

    def described_where(self) -> Any:
        return self.where if self.mask is None else exactly(sorted(matching(self.mask, self.where)))

    def places(self, model: Any) -> dict[str, Place]:
        """The slots that all conditions choose. Raises ValueError for conditions that choose nothing on this model."""
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
        return {name: chosen[name] for name in matching(chosen, self.where)}

    def arrays(self, name: str, slot: Slot, model: Any) -> dict[str, Declared]:
        if self.rows is not None:
            return {"d": trained((len(check_rows(name, slot.shape, self.rows)), slot.shape[1]))}
        if self.mask is None:
            return {"d": trained(slot.shape)}
        indices = indices_of_mask(name, slot.shape, self.mask[name])
        return {"d": trained(indices.shape),
                "indices": fixed(indices.shape, lambda *_: to_device(indices), dtype=indices.dtype)}

    def make(self, name: str, slot: Slot, arrays: Any) -> Added:
        if self.rows is not None:
            return RowDelta(arrays["d"], check_rows(name, slot.shape, self.rows), slot.shape)
        return Delta(**arrays) if self.mask is None else MaskedDelta(**arrays)


# Mistakes that people make, from the catalogue of `minipeft.conformance` (--list --method selective)
#
# * Gradients of frozen weights are computed and then set to 0: nothing is saved, and momentum or decay still acts.
# * A step moves weights that were not selected (huggingface/peft #3580), or biases too (#2759).
# * Switched off and on again, everything is trainable (huggingface/peft #3447).
# * Rows of a tied table are trained for one of its uses alone, and the head keeps the old ones.
#
# Next: `methods/delta.py`, on the three differences; `methods/mask.py`, on scores that choose elements; `nn/parts.py`,
# on the parts of a model.
