"""`quantize`: put quantized weights in place of a model's own.

    quantize(model, "nf4", double=True)           every linear weight but the head
    quantize(model, "int4", r"\\.ff\\.", group=64)    the feed-forward weights alone

    W  ->  codes, scales          of the base of each slot; the array W is gone, once nobody else refers to it

What is attached stays attached: a quantized weight takes the place of the innermost weight, below everything that is
plugged. So the order of `attach` and `quantize` does not matter for the outputs.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import numpy

from minipeft.backend import to_host
from minipeft.checks import shown
from minipeft.nn.module import Model, whole
from minipeft.nn.wide import relative_error
from minipeft.nn.weight import Parameter
from minipeft.nn.where import Where, matching
from minipeft.quant.scheme import scheme
from minipeft.quant.weight import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The weights that `quantize` replaced; `print` it for the table. scheme: in words. before, after: {name of a
    weight: its bytes}. errors: {name: |W~ - W| / |W|}, in Frobenius norms."""

    scheme: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    errors: Mapping[str, float]

    def __str__(self) -> str:
        width = max(map(len, [*self.errors, "weight"]))
        before, after = sum(self.before.values()), sum(self.after.values())
        return "\n".join([f"{'weight':<{width}}  {'bytes':>12}  {'before':>12}  error of the weight",
                          *(f"{name:<{width}}  {self.after[name]:>12,}  {self.before[name]:>12,}  {error:.2e}"
                            for name, error in self.errors.items()),
                          f"{'all':<{width}}  {after:>12,}  {before:>12,}  {self.scheme}: {after / before:.3f} of the "
                          f"bytes"])


def quantize(model: Model, kind: str = "nf4", where: Where | None = None, keep: bool = False, **options: Any
             ) -> Quantized:
    """Replace the linear weights that `where` chooses by quantized ones, in place. By default these are all but the
    head.

    kind: "nf4", "fp4" (options: blocksize=64, double=False), "int2", "int3", "int4", "int8" (group=32), "q4_0", "q4_1",
    "q5_0", "q5_1" or "q8_0". keep: whether the dequantized numbers stay in memory, which makes steps faster and saves
    nothing. It changes no bit of any result.

    Raises ValueError for an unknown kind or option, for a weight that is quantized already, under a merged attachment
    or not finite, and for a shape that the kind cannot hold; TypeError for a part of a model. The model then stays as
    it was."""
    if type(keep) is not bool:
        raise ValueError(f"keep is {shown(keep)}; expected True or False")
    chosen, made = scheme(kind, **options), {}
    slots = {name: slot for name, slot in whole(model).slots.items() if slot.kind in ("linear", "embedding")}
    head = getattr(getattr(model, "head", None), "weight", None)
    linear = [name for name, slot in slots.items() if slot.kind == "linear" and slot is not head]
    names = linear if where is None else matching(slots, where, "matrix")
    for name in names:
        slot = slots[name]
        if not isinstance(slot.base, Parameter):
            raise ValueError(f"{name} is quantized already ({slot.base}); expected floating-point numbers")
        for entry in slot.merged:
            raise ValueError(f"{name} cannot be quantized while {entry.name!r} is merged: unmerge first")
        if not numpy.isfinite(to_host(slot.base.data)).all():
            raise ValueError(f"{name} holds NaN or infinity; expected finite numbers")
        try:
            made[name] = QuantizedWeight.of(slot.base.data, chosen, keep)
        except ValueError as error:
            raise ValueError(f"{name} {list(slot.shape)}: {error}") from None
    before = {name: slots[name].base.dense().data for name in names}
    result = Quantized(str(chosen), {name: W.nbytes for name, W in before.items()},
                       {name: weight.nbytes for name, weight in made.items()},
                       {name: relative_error(to_host(made[name].dense().data), to_host(W))
                        for name, W in before.items()})
    del before
    for name, weight in made.items():
        slots[name].base = weight
    return result
