"""One LoRA in place of several attachments: the weighted sum of their changes.

    d = w_1 d_1 + w_2 d_2 + ...        d_i the change of a weight by attachment i, such as s_i B_i A_i

    "cat"             A = [A_1; A_2; ...], B = [c_1 B_1, c_2 B_2, ...], c_i = w_i s_i      exact; the ranks add up
    "svd"             the best approximation of d of a given rank, by its singular vectors
    "factor-linear"   A = sum sign(c_i) sqrt|c_i| A_i, B = sum sqrt|c_i| B_i               not d: see below

Where all c_i are equal, the new LoRA has this scale and the B_i stay as they are, so no number is rounded.

The product of two sums has cross terms: "factor-linear" gives d plus sqrt|c_1 c_2| (+-B_1 A_2 +- B_2 A_1) and so on,
which are as large as d itself for unrelated adapters. It is offered because PEFT has it, under the name "linear".
`errors` of the new attachment shows, for each place, |its change - d| / |d|.
"""
from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any, Sequence

import numpy

from minipeft.attaching.attach import check_name
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.fields import finite_in
from minipeft.attaching.order import nothing_merged_above, replaced
from minipeft.attaching.origin import are_related
from minipeft.attaching.trained_on import TrainedOn, on_base
from minipeft.checks import integer, number, shown
from minipeft.methods.lora import LoRA
from minipeft.nn.slot import Slot
from minipeft.nn.wide import relative_error
from minipeft.operations.change import Factors, difference, factors, svd_of_product
from minipeft.operations.made import lora_of

HOW = ("cat", "svd", "factor-linear")
Term = tuple[Attachment, Fraction, Factors | None]  # an attachment at one place, its weight, and its factors there


def combine(attachments: Sequence[Attachment], weights: Sequence[float], how: str = "cat", rank: int | None = None,
            name: str | None = None) -> Attachment:
    """A new attachment, plugged, whose change of every weight is the sum of those of `attachments` times `weights`. An
    attachment that has no piece at a place adds nothing there.

    how: as in the table at the top of this file. "cat" and "factor-linear" need LoRAs, "svd" takes every method that
    acts on matrices. rank: for "svd", of each place; None keeps the whole sum. It is at most the rank that the sum can
    have. name: of the new attachment, by default "combined". It is a LoRA without dropout, on all places together. One
    attachment with the weight 1, under "cat", is copied as it is, whatever its method.

    The new attachment stands for the others, so those are switched off, and it is plugged where the lowest of them was.
    Its file says that it was trained on the base of theirs. `errors` {place: relative error} says how far its change,
    as stored, is from the sum.

    Raises, before anything changes, TypeError for what is no attachment, and ValueError for attachments that are
    merged, removed, given twice or on different models; where another one is merged on top of the new one's position;
    for weights that are not as many finite numbers; for methods, places and ranks that `how` cannot take; for NaN and
    overflow; and for an attachment that was trained on top of, or together with, one that is not combined with it, or
    on another base than the others."""
    inputs, ws = _checked(attachments, weights)
    model, name = inputs[0].model, "combined" if name is None else name
    if how not in HOW:
        raise ValueError(f"how is {shown(how)}; expected one of {', '.join(map(repr, HOW))}")
    if rank is not None and how != "svd":
        raise ValueError(f"rank is {shown(rank)} with how={how!r}, where the rank follows from the attachments; "
                         f"expected how='svd'")
    rank = rank if rank is None else integer("rank", rank, least=1)
    check_name(model, name)
    now = model.host.now
    if how == "cat" and len(inputs) == 1 and ws == [1]:
        made = _copied(inputs[0], name)
    else:
        made = _combined(inputs, ws, how, rank, name)
    state = replaced(now, [a.name for a in inputs], made)
    nothing_merged_above("plug", name, {where: place for a in inputs for where, place in a.places.items()}, state)
    model.host.now = state
    return made


def _checked(attachments: Any, weights: Any) -> tuple[list[Attachment], list[Fraction]]:
    inputs = list(attachments) if isinstance(attachments, (list, tuple)) else [attachments]
    for a in inputs:
        if not isinstance(a, Attachment):
            raise TypeError(f"attachments holds {shown(a)}; expected attachments, as attach() and load() give them")
        if a.state in ("removed", "merged"):
            raise ValueError(f"cannot combine {a.name!r}: it is {a.state}; expected off or plugged")
    if not inputs:
        raise ValueError("attachments is empty; expected at least one")
    for i, a in enumerate(inputs):
        if a.model is not inputs[0].model:
            raise ValueError(f"{inputs[0].name!r} and {a.name!r} are on different models; expected one model")
        if a in inputs[:i]:
            raise ValueError(f"{a.name!r} is given twice; expected each attachment once, with the sum of its weights")
    if not isinstance(weights, (list, tuple, numpy.ndarray)) or len(weights) != len(inputs):
        raise ValueError(f"weights is {shown(weights)}; expected {len(inputs)} numbers, one for each attachment")
    return inputs, [Fraction(number("a weight", w)) for w in weights]


def _copied(a: Attachment, name: str) -> Attachment:
    """The attachment under another name, with arrays of its own."""
    pieces = {where: a.at[place] for where, place in a.places.items()}
    pieces, arrays = copy.deepcopy((pieces, dict(zip(a.tensors, a.arrays.values()))))
    made = Attachment(a.model, name, a.method, a.places, pieces, arrays, a.trained_on)
    made.errors.update(dict.fromkeys(a.places, 0.0))
    return made


def _combined(inputs: list[Attachment], ws: list[Fraction], how: str, rank: int | None, name: str) -> Attachment:
    terms: dict[str, list[Term]] = {}
    for a, w in zip(inputs, ws):
        for where, slot in a.places.items():
            if not isinstance(slot, Slot) or slot.kind not in LoRA.kinds:
                raise ValueError(f"cannot combine {a.name!r}: at {where} it acts on a place of kind {slot.kind!r}; a "
                                 f"LoRA holds changes of matrices and embedding tables alone")
            terms.setdefault(where, []).append((a, w, f := factors(a, slot)))
            if f is not None and not finite_in(w * f.s, numpy.dtype("float64")):
                raise ValueError(f"cannot combine {a.name!r}: at {where} the weight {float(w):g} times its scale "
                                 f"{float(f.s):g} overflows; expected a smaller weight")
            if how != "svd" and f is None:
                method = type(a.method).__name__
                raise ValueError(f"cannot combine {a.name!r} by how={how!r}: the change that {method} makes is no "
                                 f"product of two factors; use how='svd', or adapter={{{a.name!r}: "
                                 f"{float(w):g}, ...}} at inference")
    trained_on = _trained_on(inputs, {a for found in terms.values() for a, _, f in found if f is None})
    slots, parts, errors = inputs[0].model.slots, {}, {}
    for where in (where for where in slots if where in terms):
        slot, found = slots[where], terms[where]
        with numpy.errstate(over="ignore", invalid="ignore"):
            dense: Any = sum(float(w) * (f.dense() if f else difference(a, slot)) for a, w, f in found)
        if not numpy.isfinite(dense).all():
            raise ValueError(f"the sum of the changes at {where} is not finite; expected attachments without NaN and "
                             f"infinity, and weights at which it does not overflow")
        part = {"cat": _cat, "factor-linear": _linear}[how](where, found) if how != "svd" else _svd(found, dense, rank)
        parts[where] = part.stored(where, slot.dtype)
        errors[where] = relative_error(parts[where].dense(), dense)
    return lora_of(inputs[0].model, name, parts, trained_on, errors)


def _cat(where: str, terms: list[Term]) -> Factors:
    cs, fs = [w * f.s for _, w, f in terms if f], [f for *_, f in terms if f]
    A, most = numpy.concatenate([f.A for f in fs]), min(fs[0].B.shape[0], fs[0].A.shape[1])
    if len(A) > most:
        raise ValueError(f"the ranks at {where} add up to {len(A)}, and no matrix of its shape has more than {most}; "
                         f"use how='svd', which needs no more")
    alike = len(set(cs)) == 1 and cs[0] != 0
    B = numpy.concatenate([f.B if alike else float(c) * f.B.astype("float64") for c, f in zip(cs, fs)], axis=1)
    return Factors(A, B, cs[0] if alike else Fraction(1))


def _linear(where: str, terms: list[Term]) -> Factors:
    cs, fs = [float(w * f.s) for _, w, f in terms if f], [f for *_, f in terms if f]
    if len({f.rank for f in fs}) > 1:
        raise ValueError(f"the ranks at {where} are {', '.join(str(f.rank) for f in fs)}; how='factor-linear' adds "
                         f"factors of one rank; use how='cat' or how='svd'")
    A = sum(numpy.sign(c) * abs(c) ** 0.5 * f.A.astype("float64") for c, f in zip(cs, fs))
    B = sum(abs(c) ** 0.5 * f.B.astype("float64") for c, f in zip(cs, fs))
    return Factors(A, B, Fraction(1))


def _svd(terms: list[Term], dense: numpy.ndarray, rank: int | None) -> Factors:
    fs = [f for *_, f in terms if f]
    if len(fs) == len(terms):
        U, S, Vt = svd_of_product(
            numpy.concatenate([float(w * f.s) * f.B.astype("float64") for _, w, f in terms if f], axis=1),
            numpy.concatenate([f.A.astype("float64") for f in fs]))
    else:
        U, S, Vt = numpy.linalg.svd(dense, full_matrices=False)
    return Factors(Vt[:rank], U[:, :rank] * S[:rank], Fraction(1))


def _trained_on(inputs: list[Attachment], dense: set[Attachment]) -> TrainedOn | None:
    """The base that the sum is valid on. dense: those whose change depends on the weight below them."""
    model, combined = inputs[0].model, {a.layer.content for a in inputs}
    here = on_base(model)
    bases: dict[str | None, TrainedOn] = {}
    for a in inputs:
        said = a.trained_on.settled(model) if a.trained_on is not None else here
        bases.setdefault(said.base, TrainedOn(said.base, origin=said.origin))
        if a in dense and said.base != here.base:
            raise ValueError(f"cannot combine {a.name!r}: it was trained on another base than the model has now, and "
                             f"the change that {type(a.method).__name__} makes depends on it")
        for layer in (*said.below, *said.together):
            if layer.content not in combined:
                raise ValueError(f"cannot combine {a.name!r}: it was trained on top of or together with attachment "
                                 f"{layer.name!r}, which is not combined with it (or has other numbers by now)")
            if a in dense and layer in said.below:
                raise ValueError(f"cannot combine {a.name!r}: it was trained on top of attachment {layer.name!r}, and "
                                 f"the change that {type(a.method).__name__} makes depends on the weight below it")
    if len(bases) > 1:
        first, *others = bases.values()
        also = " (a base and its quantization, or two quantizations, are different bases)" \
            if all(are_related(first, other) for other in others) else ""
        raise ValueError(f"{', '.join(repr(a.name) for a in inputs)} were trained on different bases{also}; expected "
                         f"one")
    return next(iter(bases.values())) if any(a.trained_on for a in inputs) else None
