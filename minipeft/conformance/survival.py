"""The share of an update that survives a merge in half precision: a question of digits, not of right and wrong.

    W' = fl(W + D)        share = 1 - |(W' - W) - D| / |D|,  Frobenius norms; D = s B A

Rounding W' costs up to u |W| per entry (0.4 % of W in bfloat16), which is the share u |W| / |D| of the update. An
update that is small beside W is mostly lost even in a correct merge. So the share is reported beside that after one
correct rounding.
"""
from __future__ import annotations

from typing import Iterator

import numpy

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.fault import Fault, Skip
from minipeft.conformance.method import Method
from minipeft.conformance.plugin import Plugin

RATIOS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_SIZE, _RANK = 64, 4


def survival(plugin: Plugin, method: Method, dtype: str) -> Iterator[dict[str, float]]:
    """For each ratio |D| / |W| of RATIOS, {"ratio", "share": kept by the implementation's merge, "best": kept by one
    correct rounding}. Nothing if the plug-in cannot merge."""
    make = plugin.make(method)
    for ratio in RATIOS:
        case = plugin.settle(_case(dtype, ratio), method)
        try:
            layer = make(case)
            if not layer.offers("merge", "weight"):
                return
            layer.merge()
            merged = layer.array("weight", case["W"].shape)
        except (Fault, Skip):
            return  # a property has reported it
        update = numpy.asarray(method.reference(case)["W_merged"].exact, numpy.float64) - case["W"]
        best = on_grid(case["W"] + update, dtype)
        yield {"ratio": ratio, "share": kept(merged - case["W"], update), "best": kept(best - case["W"], update)}


def kept(moved: numpy.ndarray, update: numpy.ndarray) -> float:
    """The share of `update` in the actual change `moved`, 1 - |moved - update| / |update|, at least 0."""
    return max(0.0, 1 - float(numpy.linalg.norm(moved - update) / numpy.linalg.norm(update)))


def _case(dtype: str, ratio: float) -> Case:
    rng = numpy.random.default_rng(11)
    w, a, b = (rng.standard_normal(shape) for shape in ((_SIZE, _SIZE), (_RANK, _SIZE), (_SIZE, _RANK)))
    b *= ratio * numpy.linalg.norm(w) / numpy.linalg.norm(b @ a)
    arrays = {"W": w, "b": 0 * w[0], "A": a, "B": b, "x": w[:2], "g": w[:2]}
    return Case("lora_linear", dtype, False, {"alpha": float(_RANK)},
                {name: on_grid(array, dtype) for name, array in arrays.items()})
