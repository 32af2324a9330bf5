"""`quantize`: put quantized weights in place of a model's own.

    quantize(model, "nf4", double=True)           every linear weight but the head
    quantize(model, "int4", r"\\.ff\\.", group=64)    the feed-forward weights alone

    W  ->  codes, scales          of the base of each slot; W is freed once nothing else refers to it

Attachments stay: a quantized weight takes the place of the innermost weight, below everything that is plugged. So the
order of `attach` and `quantize` does not matter for the outputs, unless a method starts from the weights, as PiSSA and
DoRA do.

The model remembers the base that was quantized (`attaching/origin.py`), so that an adapter of one of the two can be
loaded on the other.
"""
from __future__ import annotations

import collections
import dataclasses
from typing import Any, Mapping

from minipeft.attaching.origin import Origin
from minipeft.attaching.trained_on import content_of_base, has_origin, origin_of
from minipeft.backend import to_host
from minipeft.checks import boolean
from minipeft.nn.module import Model, whole
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter
from minipeft.nn.where import Where, matching
from minipeft.nn.wide import relative_error
from minipeft.quant.scheme import Scheme, scheme
from minipeft.quant.weight import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The weights that `quantize` replaced; `print` it for the table. scheme: in words. before, after: {name of a
    weight: its bytes}. errors: {name: |W~ - W| / |W|}, in Frobenius norms. kept: the bytes of the dequantized numbers
    that stay in memory, 0 without `keep`."""

    scheme: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    errors: Mapping[str, float]
    kept: int = 0

    def __str__(self) -> str:
        width = max(map(len, [*self.errors, "weight"]))
        before, after = sum(self.before.values()), sum(self.after.values())
        kept = f", and {self.kept:,} bytes of dequantized numbers are kept" if self.kept else ""
        return "\n".join([f"{'weight':<{width}}  {'bytes':>12}  {'before':>12}  error of the weight",
                          *(f"{name:<{width}}  {self.after[name]:>12,}  {self.before[name]:>12,}  {error:.2e}"
                            for name, error in self.errors.items()),
                          f"{'all':<{width}}  {after:>12,}  {before:>12,}  {self.scheme}: {after / before:.3f} of the "
                          f"bytes{kept}; the largest error is {max(self.errors.values()):.2e}"])


def quantize(model: Model, kind: str = "nf4", where: Where | None = None, keep: bool = False, **options: Any
             ) -> Quantized:
    """Replace the linear weights that `where` chooses by quantized ones, in place. By default these are all but the
    head. Embedding tables are quantized where they are asked for.

    kind: "nf4", "fp4" (options: blocksize=64, double=False), "int2", "int3", "int4", "int8" (group=32, zero="float" or
    "rounded", stored=None, "float16", ...: the dtype of scales and offsets), "q4_0", "q4_1", "q5_0", "q5_1" or "q8_0".
    keep: whether the dequantized numbers stay in memory. Steps are then faster, and no memory is saved. It changes no
    bit of any result.

    Raises ValueError for an unknown kind or option, for a weight that is already quantized, lies under a merged
    attachment or is not finite, for a shape that the kind cannot hold, and where there is nothing to quantize;
    TypeError for a part of a model. The model then stays as it was."""
    keep = boolean("keep", keep)
    chosen, slots = scheme(kind, **options), _chosen(model, where)
    made, errors = {}, {}
    for name, slot in slots.items():
        made[name] = _quantized(name, slot, chosen, keep)
        errors[name] = relative_error(to_host(made[name].dense().data), to_host(slot.base.dense().data))
    before = {name: slot.base.dense().data.nbytes for name, slot in slots.items()}
    origin = origin_of(model)
    original = content_of_base(model) if origin is None else origin.base
    model.host.differentiated(frozenset(model.base_parameters.values()))  # the base is about to change
    _put(model, slots, made, original)
    return Quantized(str(chosen), before, {name: weight.nbytes for name, weight in made.items()}, errors,
                     sum(weight.kept_bytes for weight in made.values()))


def _chosen(model: Model, where: Where | None) -> dict[str, Slot]:
    slots = {name: slot for name, slot in whole(model).slots.items() if slot.kind in ("linear", "embedding")}
    head = getattr(getattr(model, "head", None), "weight", None)
    names = matching(slots, where, "matrix") if where is not None else [
        name for name, slot in slots.items() if slot.kind == "linear" and slot is not head]
    if not names:
        raise ValueError("the model has no linear weight but its head: there is nothing to quantize; name weights by "
                         "`where`")
    return {name: slots[name] for name in names}


def _quantized(name: str, slot: Slot, chosen: Scheme, keep: bool) -> QuantizedWeight:
    if not isinstance(slot.base, Parameter):
        raise ValueError(f"{name} is quantized already ({slot.base}); expected floating-point numbers")
    for entry in slot.merged:
        raise ValueError(f"{name} cannot be quantized while {entry.name!r} is merged: unmerge first")
    try:
        return QuantizedWeight.of(slot.base.data, chosen, keep)
    except ValueError as error:
        raise ValueError(f"{name} {list(slot.shape)}: {error}") from None


def _put(model: Model, slots: Mapping[str, Slot], made: Mapping[str, QuantizedWeight], original: str) -> None:
    """All of them, and the origin of the new base; or, after an interrupt, none. original: the fingerprint in the
    origin. That of the new base takes a pass over its weights, so this is where an interrupt often falls."""
    old = {name: slot.base for name, slot in slots.items()}
    try:
        for name, weight in made.items():
            slots[name].base = weight
        has_origin(model, Origin(original, _in_words(model)))
    except BaseException:
        for name, base in old.items():
            slots[name].base = base
        raise


def _in_words(model: Model) -> str:
    """ "26 matrices in int4, groups of 32", and so on for each scheme in the model."""
    counts = collections.Counter(str(slot.base.scheme) for slot in model.slots.values()
                                 if isinstance(slot.base, QuantizedWeight))
    return "; ".join(f"{n} {'matrix' if n == 1 else 'matrices'} in {words}" for words, n in counts.items())
