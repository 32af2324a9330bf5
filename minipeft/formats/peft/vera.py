"""VeRA in a file of PEFT's.

    path.vera_lambda_b [d_out]         base_model.vera_A [r, the largest d_in]
    path.vera_lambda_d [r]             base_model.vera_B [the largest d_out, r]         of the weights that it adapts

With save_projection false the file has neither A nor B: they are drawn from projection_prng_key, as PEFT draws them.
"""
from __future__ import annotations

import math
from typing import Any, Iterable

import numpy

from minipeft.attaching.fields import integer, number
from minipeft.attaching.method import Method
from minipeft.backend import to_host
from minipeft.checks import shown
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import PREFIX, modules, path_of
from minipeft.formats.peft.places import flag, only, rank, target_modules, targets, where
from minipeft.formats.row import Row
from minipeft.methods.vera import VeRA


@codec
class VeRAFile(Codec):
    """VeRA, with or without its projections."""

    peft_type = "VERA"
    used = frozenset({"target_modules", "layers_to_transform", "layers_pattern", "r", "d_initial",
                      "projection_prng_key"})
    harmless = frozenset({"save_projection", "vera_dropout", "init_weights"})  # the first is how it is stored
    neutral = {"bias": ("none",), "fan_in_fan_out": (False,)}
    needed = ("r",)
    defaults = {"target_modules": ["q", "v"], "projection_prng_key": 0, "d_initial": 0.1, "save_projection": True,
                "vera_dropout": 0.0, "init_weights": True, "bias": "none", "fan_in_fan_out": False,
                "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        paths, key, start = targets(config, model, "linear"), config["projection_prng_key"], config["d_initial"]
        if not (integer(key, 0) and key < 2 ** 32):
            if not flag(config, "save_projection", True):
                raise ValueError(f"projection_prng_key is {shown(key)}; expected an integer from 0 to 2^32 - 1, from "
                                 f"which A and B are drawn (save_projection is false)")
            key = None  # A and B are in the file
        r, slots = rank(config), modules(model)
        drawn = r * sum(largest(model.slots[slots[path]] for path in paths))
        whole = sum(math.prod(slot.shape) for slot in model.slots.values())
        if drawn > whole and not flag(config, "save_projection", True):
            raise ValueError(f"r is {shown(r)}, for which A and B would have {drawn:,} numbers, more than the whole "
                             f"model ({whole:,}); expected a smaller one, or A and B in the file")
        start = start if number(start) and start else VeRA.d_initial  # where training began
        return VeRA(r, start, where(paths, model), key)

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        found, places = [], method.places(model)
        for name, slot in places.items():
            at = f"{PREFIX}{path_of(model, name)}.vera_lambda_"
            found += [Row(f"{name}.b", f"{at}b", (slot.shape[0],)), Row(f"{name}.d", f"{at}d", (method.rank,))]
        if flag(config, "save_projection", True):
            d_out, d_in = largest(places.values())
            found += [Row("vera.A", "base_model.vera_A", (method.rank, d_in)),
                      Row("vera.B", "base_model.vera_B", (d_out, method.rank))]
        return found

    def computed(self, method: Any, model: Any, config: Config) -> dict[str, numpy.ndarray]:
        if flag(config, "save_projection", True):
            return {}
        name, slot = next(iter(method.places(model).items()))
        declared = method.arrays(name, slot, model)
        return {f"vera.{leaf}": to_host(declared[leaf].init(declared[leaf].shape, slot.dtype, None)) for leaf in "AB"}

    def writes(self, method: Any) -> bool:
        return isinstance(method, VeRA)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        places = method.places(model)
        only("VERA", places, "linear")
        return {"r": method.rank, "d_initial": method.d_initial, "projection_prng_key": method.key or 0,
                "target_modules": target_modules(places, model)}


def largest(slots: Iterable[Any]) -> tuple[int, int]:
    """(the largest d_out, the largest d_in) of `slots`, matrices [d_out, d_in]."""
    d_out, d_in = zip(*(slot.shape for slot in slots))
    return max(d_out), max(d_in)
