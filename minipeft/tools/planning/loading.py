"""Before the step: the weights are read, and perhaps quantized. Both can take more memory than the step itself.

    load        the model's weights + the arrays of the file                       `T5.from_pretrained`
    quantize    the float weights + all codes + work on one matrix                 `minipeft.quantize`
    streamed    the weights as they are in the step + two copies of one matrix     in place of both

Other libraries copy and quantize one tensor at a time, and drop it. This is planned for weights in half precision,
which are theirs.
"""
from __future__ import annotations

from typing import Any

import numpy

from minipeft.backend import xp
from minipeft.nn.where import matching
from minipeft.tools.hollow.ledger import TEMPORARY
from minipeft.tools.planning import quantized
from minipeft.tools.planning.purposes import WEIGHTS
from minipeft.tools.planning.settings import Settings

WORK = 6  # copies of the largest matrix in float32: the numbers of the codes, and the error, of which two in float64


def loaded(base: dict[str, Any], s: Settings) -> dict[str, dict[str, int]]:
    """{"load": {purpose: bytes}} for the arrays `base` {name: array} under the settings s."""
    weights = sum(a.nbytes for a in base.values())
    copies = weights if s.array_dtype == "float32" else max(a.nbytes for a in base.values())
    return {"load": {WEIGHTS: weights, TEMPORARY: copies}}


def streamed(model: Any, base: dict[str, Any]) -> dict[str, dict[str, int]]:
    """{"load": {purpose: bytes}} where each tensor is quantized as soon as it is read, and dropped: transformers does
    so with bitsandbytes. model: after `quantize`. base: {name: array} of before."""
    return {"load": {WEIGHTS: sum(p.data.nbytes for p in model.base_arrays.values()),
                     TEMPORARY: 2 * max(a.nbytes for a in base.values())}}


def quantize(model: Any, s: Settings) -> dict[str, dict[str, int]]:
    """Put codes in place of the matrices that the settings s choose. {"quantize": {purpose: bytes}} at its peak. Raises
    ValueError where `quantize_where` finds nothing, and for a shape that the kind cannot hold."""
    assert s.quantize is not None
    before = sum(p.data.nbytes for p in model.base_arrays.values())
    linear = {name: slot for name, slot in model.slots.items() if slot.kind == "linear"}
    where = s.quantize_where if s.quantize_where is not None else r"^(?!head\.)"
    codes, largest = [], 0
    for name in matching(linear, where, "matrix"):
        slot = linear[name]
        try:
            codes.append(quantized.size(slot.shape, s.quantize, s.double))
        except ValueError as error:
            raise ValueError(f"{name} {list(slot.shape)}: {error}") from None
        largest = max(largest, slot.base.data.nbytes)
        slot.base = quantized.Quantized(slot.shape, slot.dtype, codes[-1])
    own = s.array_dtype == "float32"
    return {"quantize": {WEIGHTS: before, TEMPORARY: sum(codes) + WORK * largest if own else max(codes) + largest}}


def cast_rest(model: Any, s: Settings) -> int:
    """Cast everything that is not quantized to float32, if the settings s say so; the bytes that this adds."""
    if not s.cast_rest:
        return 0
    added = 0
    for p in model.base_parameters.values():
        added += 4 * p.data.size - p.data.nbytes
        p.data = xp.empty(p.shape, "float32")
    for site in model.sites.values():
        site.dtype = numpy.dtype("float32")
    return added
