"""A LoRA out of two checkpoints: the best low-rank approximation of what fine-tuning changed.

    d = W_tuned - W = U S V^T        A = V_r^T, B = U_r S_r, s = 1        Eckart and Young, 1936: no matrix of rank r is
                                                                          nearer to d in the Frobenius norm
    error = |B A - d| / |d|

Fine-tuning often changes a weight by a matrix that is close to one of low rank. The error says for each tensor whether
it did. A LoRA cannot hold every change: those of norm weights, biases and T5's table of distances are lost, and have
the error 1.
"""
from __future__ import annotations

from fractions import Fraction

import numpy

from minipeft.attaching.attach import check_name, put
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.trained_on import on_base
from minipeft.backend import to_host
from minipeft.checks import integer, shown
from minipeft.methods.lora import LoRA
from minipeft.nn.module import Model, whole
from minipeft.nn.wide import relative_error, wide_base
from minipeft.operations.change import Factors
from minipeft.operations.made import lora_of


def extract(model: Model, tuned: Model, rank: int, name: str | None = None) -> Attachment:
    """A LoRA, plugged on `model`, that turns it into an approximation of `tuned`, a model of the same class and
    configuration; computed in float64. A tied table is one tensor.

    rank: of each place. It is at most the numerical rank of d there, which is the number of singular values above
    2^-52 max(d_out, d_in) times the largest. name: of the attachment, by default "extracted". Tensors that are equal
    get no place. `errors` of the attachment has the relative error of every tensor that differs, 1 for those that a
    LoRA cannot hold.

    Raises, before anything changes, TypeError for what is no whole model; ValueError for models of another class,
    configuration or shape, for attachments that are plugged or merged on either, for numbers that are not finite or
    overflow as factors, for models of which no matrix differs, and for a name that is taken."""
    check_name(model, name := "extracted" if name is None else name)
    _same_kind(model, whole(tuned))
    rank = integer("rank", rank, least=1)
    parts: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    others = tuned.slots
    for where, slot in model.slots.items():
        d = to_host(wide_base(others[where]).data) - to_host(wide_base(slot).data)
        if not numpy.isfinite(d).all():
            raise ValueError(f"{where} holds NaN or infinity in one of the models; expected finite numbers")
        if not d.any():
            continue
        errors[where] = 1.0
        if slot.kind in LoRA.kinds:
            U, S, Vt = numpy.linalg.svd(d, full_matrices=False)
            r = min(rank, max(1, int((S > S[0] * max(d.shape) * 2.0 ** -52).sum())))
            parts[where] = Factors(Vt[:r], U[:, :r] * S[:r], Fraction(1)).stored(where, slot.dtype)
            errors[where] = relative_error(parts[where].dense(), d)
    if not parts:
        found = f"; only {', '.join(list(errors)[:5])} differ, which no LoRA can hold" if errors else ""
        raise ValueError(f"no matrix of the two models differs: there is nothing to extract{found}")
    made = lora_of(model, name, parts, on_base(model), errors)
    put(model, [made])
    return made


def _same_kind(model: Model, tuned: Model) -> None:
    for what, one in (("model", model), ("tuned", tuned)):
        if one.plugged:
            raise ValueError(f"{what} has {one.plugged[0]!r} plugged; expected the bare checkpoints: unplug it, or "
                             f"save the model merged and load that")
    if type(model) is not type(tuned):
        raise ValueError(f"tuned is a {type(tuned).__name__}; expected a {type(model).__name__}, as model is")
    ours, theirs = (getattr(m, "config").computes() for m in (model, tuned))
    for field in ours:
        if ours[field] != theirs[field]:
            raise ValueError(f"the configurations differ: {field} of tuned is {shown(theirs[field])}; expected "
                             f"{shown(ours[field])}")
    shapes = {name: slot.shape for name, slot in tuned.slots.items()}
    for name, slot in model.slots.items():
        if shapes.get(name) != slot.shape:
            raise ValueError(f"{name} of tuned has shape {list(shapes.get(name, ()))}; expected {list(slot.shape)}")
