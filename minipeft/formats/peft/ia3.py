"""(IA)^3 in a file of PEFT's.

    an output is scaled     path.ia3_l [d_out, 1]       l * (x W^T)
    an input is scaled      path.ia3_l [1, d_in]        (l * x) W^T, in feedforward_modules

feedforward_modules is a regular expression that matches a whole path, or a list of endings. An ending counts without a
dot before it, so that "o" means "wo" as well.
"""
from __future__ import annotations

import functools
import re
from typing import Any

import numpy

from minipeft.attaching.method import Method
from minipeft.checks import shown
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import PREFIX, modules, path_of
from minipeft.formats.peft.places import only, target_modules, targets, where
from minipeft.formats.peft.targets import chosen
from minipeft.formats.row import Row
from minipeft.methods.ia3 import IA3

USUAL = IA3.inputs  # the columns of what is called "wo"


@codec
class IA3File(Codec):
    """(IA)^3, on the outputs of layers, and on the inputs of those in feedforward_modules."""

    peft_type = "IA3"
    used = frozenset({"target_modules", "exclude_modules", "feedforward_modules"})
    harmless = frozenset({"init_ia3_weights"})
    neutral = {"fan_in_fan_out": (False,)}
    defaults = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"], "exclude_modules": None,
                "init_ia3_weights": True, "fan_in_fan_out": False, "modules_to_save": None}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        paths, slots = targets(config, model, "linear"), modules(model)
        scaled = [slots[path] for path in feedforward(config["feedforward_modules"], paths)]
        usual = [slots[path] for path in paths if re.search(USUAL, slots[path])]
        inputs = USUAL if scaled == usual else rf"^({'|'.join(map(re.escape, scaled))})$" if scaled else "^$"
        return IA3(where=where(paths, model), inputs=inputs)

    def rows(self, method: Any, model: Any, config: Config) -> list[Row]:
        found = []
        for name, slot in linear(method, model).items():
            shape = (1, slot.shape[1]) if method.scales_input(name) else (slot.shape[0], 1)
            found.append(Row(f"{name.removesuffix('.weight')}.l", f"{PREFIX}{path_of(model, name)}.ia3_l", shape,
                             functools.partial(numpy.reshape, shape=shape), numpy.ravel))
        return found

    def writes(self, method: Any) -> bool:
        return isinstance(method, IA3)

    def config(self, method: Any, model: Any) -> dict[str, Any]:
        places = linear(method, model)
        only("IA3", places, "linear")
        names = target_modules(places, model)
        scaled = {path_of(model, name) for name in places if method.scales_input(name)}
        paths = [path_of(model, name) for name in places]
        inputs = [name for name in names if any(path.endswith(name) for path in scaled)]
        if set(feedforward(inputs, paths)) != scaled:  # a word means layers of both kinds
            names, inputs = sorted(paths), sorted(scaled)
        return {"target_modules": names, "feedforward_modules": inputs}


def feedforward(value: Any, paths: list[str]) -> list[str]:
    """Those of `paths` that feedforward_modules chooses, whose `value` is a list of endings or a regular expression.
    Raises ValueError for anything else."""
    if isinstance(value, list) and all(isinstance(end, str) and end for end in value):
        return [path for path in paths if path.endswith(tuple(value))]
    if not isinstance(value, str):
        raise ValueError(f"feedforward_modules is {shown(value)}; expected a list of names, or a regular expression")
    every = [*paths, "\n"]  # a path that stays, because "." does not match it
    others = set(chosen({"target_modules": every, "exclude_modules": value}, every, []))
    return [path for path in paths if path not in others]


def linear(method: IA3, model: Any) -> dict[str, Any]:
    """The matrices among the places of the method. Their biases are scaled by the same l."""
    return {name: slot for name, slot in method.places(model).items() if slot.kind != "bias"}
