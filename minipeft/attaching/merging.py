"""Merging into a constant weight, and how much of the change is lost by it.

    W': the constant        W~: the weight below, with an error where it is quantized        f: the piece over it

    merge()                     W' = f(W~)        in the dtype of W~, or the weight that the method makes of it
    merge("requantized")        W' = Q(f(W~))     quantized again as the base is, with new codes and scales
    merge(originals)            W' = f(W)         over the weights W that W~ was quantized from

    error = |(W' - W~) - d| / |d|,   d = f(W~) - W~        Frobenius norms, f in float64; 0: all of d is there

The first is the default, and only rounding is lost. But W' is a float weight, and no longer small, unless the method
makes another one, as QA-LoRA does. The second keeps it small. But where an entry of d is smaller than the gap between
two codes, Q often rounds it away: the error of a small change is about 1, as if it had been dropped. Peft's
Linear4bit.merge does this. In the third, the piece meets weights on which it was not trained. With d' = f(W) - W the
error is |(W - W~) + (d' - d)| / |d|, which is large where W~ is far from W and d is small. docs/quantization.md has
figures.

    Dettmers et al., 2023, arXiv:2305.14314, eq. (5), for f on W~. The paper does not merge.
"""
from __future__ import annotations

import warnings
from typing import Any, Mapping

from minipeft.attaching.order import around, below_merged
from minipeft.attaching.trained_on import content_of_base, origin_of
from minipeft.backend import Array, to_device, to_host, xp
from minipeft.checks import shown
from minipeft.nn.absent import is_absent
from minipeft.nn.merge_report import MergeReport
from minipeft.nn.module import Model
from minipeft.nn.place import Place
from minipeft.nn.slot import Slot
from minipeft.nn.state import State
from minipeft.nn.weight import Parameter, Weight
from minipeft.nn.wide import OnOriginal, relative_error, wide_dense, wide_piece

REQUANTIZED = "requantized"


def merged(attachment: Any, state: State, into: Any = None) -> tuple[dict[Place, Weight], MergeReport]:
    """The constants {place: weight} that merging `attachment` puts in place of its entries in this state, and the
    report. into: None, "requantized", a model, or {name: array}, [d_out, d_in] or [d], of the original weights. Nothing
    changes. There is a warning if `into` is another model than the one from which the base was quantized.

    Raises ValueError where an entry below is not merged, where the method acts on hidden states, and where a merged
    weight does not fit its slot; for "requantized" where no weight is quantized, and for a sum that is not finite; for
    original weights that are missing, not finite or of another shape or dtype, and above another merged attachment;
    TypeError for another `into`."""
    originals = _originals(into)
    slots = {where: _slot(attachment, where, place) for where, place in attachment.places.items()}
    if originals is None and into is not None and not any(map(_can_requantize, slots.values())):
        raise ValueError(f"{attachment.name!r} cannot be merged into quantized weights: none of its weights is "
                         f"quantized; expected a base after minipeft.quantize, or merge() without `into`")
    given = {} if originals is None else {
        where: _original(attachment, where, slot, originals, state) for where, slot in slots.items()
        if not is_absent(slot)}
    constants: dict[Place, Weight] = {}
    errors, stored = {}, {}
    for where, slot in slots.items():
        below, piece = below_merged(attachment.name, where, slot, state), attachment.at[slot]
        if where in given:
            weight: Any = OnOriginal(piece.over(given[where]).dense().data)
        elif originals is None and into is not None and _can_requantize(slot):
            weight = _requantized(attachment, where, slot, piece.over(below).dense().data)
        else:
            weight = piece.over(below).merged()
        what = f"{type(attachment.method).__name__} at {where}: merged()"
        constants[slot] = _fitting(what, slot, weight)
        stored[where] = str(getattr(weight, "scheme", weight.dtype))
        if where in given or not isinstance(slot.base, Parameter):
            errors[where] = _lost(piece, below, weight)
    if isinstance(into, Model):
        _warn_of_strangers(attachment, into)
    return constants, MergeReport(errors, stored)


def _slot(attachment: Any, where: str, place: Any) -> Slot:
    if not isinstance(place, Slot):
        raise ValueError(f"{attachment.name!r} cannot be merged: at {where} it acts on hidden states, which no "
                         f"weight of the model can absorb")
    return place


def _lost(piece: Any, below: Weight, constant: Weight) -> float:
    W = wide_dense(below)
    d = wide_piece(piece).over(W).dense().data - W.data
    return relative_error(to_host(wide_dense(constant).data - W.data), to_host(d))


# ---- quantized again


def _can_requantize(slot: Slot) -> bool:
    return hasattr(slot.base, "requantized")


def _requantized(attachment: Any, where: str, slot: Any, matrix: Array) -> Weight:
    if not to_host(xp.isfinite(matrix).all()):
        raise ValueError(f"{attachment.name!r} cannot be merged: at {where} its sum with the base holds NaN or "
                         f"infinity, which cannot be quantized")
    return slot.base.requantized(matrix)


# ---- over the original weights


def _originals(into: Any) -> Mapping[str, Array] | None:
    """{name: array} where original weights are given, else None."""
    if isinstance(into, Model):
        return into.state()
    if isinstance(into, Mapping):
        return into
    if isinstance(into, str) and into != REQUANTIZED:
        raise ValueError(f"into is {shown(into)}; expected {REQUANTIZED!r}, the original weights, or None")
    if into is not None and not isinstance(into, str):
        raise TypeError(f"into is {type(into).__name__}; expected {REQUANTIZED!r}, a model or {{name: array}} with the "
                        f"original weights, or None")
    return None


def _warn_of_strangers(attachment: Any, model: Model) -> None:
    """Warn if the base of the attachment's model is known to be quantized from another model than `model`."""
    origin = origin_of(attachment.model)
    if origin is not None and (found := content_of_base(model)) != origin.base:
        warnings.warn(f"{attachment.name!r} is merged over weights that are not the original ones: its base was "
                      f"quantized from a model with the fingerprint {origin.base[:12]}..., and this one has "
                      f"{found[:12]}...; the errors in the report include how far the two differ", stacklevel=4)


def _original(attachment: Any, where: str, slot: Slot, originals: Mapping[str, Array], state: State) -> Parameter:
    below = around(state, slot, attachment.name)[0]
    if below:
        raise ValueError(f"{attachment.name!r} cannot be merged over the original weights: at {where} it lies on top "
                         f"of {below[-1].name!r}; merge the lowest attachment over them, and those above without "
                         f"`into`")
    if where not in originals:
        quantized = [name for name in originals if name.startswith(f"{where}.")]
        found = f" (they hold {quantized[0]}: they are quantized themselves)" if quantized else ""
        raise ValueError(f"the original weights lack {where}{found}; expected those from before minipeft.quantize")
    array = originals[where]
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if shape != slot.shape or dtype != slot.dtype:
        found = shown(array) if shape is None or dtype is None else f"{dtype} {list(shape)}"
        raise ValueError(f"the original of {where} is {found}; expected {slot.dtype} {list(slot.shape)}")
    if not to_host(xp.isfinite(to_device(array)).all()):
        raise ValueError(f"the original of {where} holds NaN or infinity; expected finite numbers")
    return Parameter(to_device(array))


def _fitting(what: str, slot: Slot, merged: Any) -> Weight:
    """`merged`, if it can stand in the slot: a Weight of the slot's shape and dtype. ValueError otherwise."""
    if not all(hasattr(merged, name) for name in ("arrays", "project", "rows", "drops")):
        raise ValueError(f"{what} gives {type(merged).__name__}; expected a weight, such as minipeft.Parameter(array)")
    if tuple(merged.shape) != slot.shape or merged.dtype != slot.dtype:
        raise ValueError(f"{what} gives {merged.dtype} {list(merged.shape)}; expected {slot.dtype} {list(slot.shape)}")
    return merged
