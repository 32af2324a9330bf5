"""(IA)^3 in a file of PEFT's.

    an output is scaled     path.ia3_l [d_out, 1]       l * (x W^T)
    an input is scaled      path.ia3_l [1, d_in]        (l * x) W^T, in feedforward_modules

feedforward_modules is a regular expression that matches a whole path, or a list of endings. An ending counts without a
dot before it, so that "o" means "wo" as well.
"""
from __future__ import annotations

import functools
import re
from typing import Any, Callable, Iterable

import numpy

from minipeft.attaching.method import Method
from minipeft.formats.peft.codec import Codec, Config, Shapes, codec
from minipeft.formats.peft.names import PREFIX, modules, path_of
from minipeft.formats.peft.places import NO_MODULES, only, target_modules, targets, where
from minipeft.formats.peft.row import Row
from minipeft.formats.peft.targets import chosen, rule
from minipeft.methods.ia3 import IA3

USUAL = IA3.inputs  # the columns of what is called "wo"


@codec
class IA3File(Codec):
    peft_type = "IA3"
    used = frozenset({"target_modules", "exclude_modules", "feedforward_modules"})
    harmless = frozenset({"init_ia3_weights"})
    neutral = {"fan_in_fan_out": (False,), **NO_MODULES}
    defaults = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}

    def method(self, config: Config, shapes: Shapes, model: Any) -> Method:
        paths, slots = targets(config, model, "linear"), modules(model)
        scaled = [slots[path] for path in filter(reads(config["feedforward_modules"]), paths)]
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
        inputs = _endings(names, scaled, model)
        if inputs is None:  # one word means layers of both kinds
            names = sorted(path_of(model, name) for name in places)
            inputs = sorted(scaled)
        return {"target_modules": names, "feedforward_modules": inputs, "fan_in_fan_out": False,
                "init_ia3_weights": True, "exclude_modules": None, "modules_to_save": None}


def reads(value: Any) -> Callable[[str], bool]:
    """Whether feedforward_modules chooses a path. Raises ValueError for a malformed field."""
    chooses = rule("feedforward_modules", value)
    return (lambda path: path.endswith(tuple(value))) if isinstance(value, list) else chooses


def linear(method: IA3, model: Any) -> dict[str, Any]:
    """The matrices among the places of the method. Their biases are scaled by the same l."""
    return {name: slot for name, slot in method.places(model).items() if slot.kind != "bias"}


def _endings(names: Iterable[str], scaled: set[str], model: Any) -> list[str] | None:
    """Those of `names` that choose the paths `scaled` and, as endings, no other path that `names` choose; None where
    there are none that do."""
    paths = chosen({"target_modules": list(names)}, list(modules(model)), [])
    found = [name for name in names if any(path.endswith(name) for path in scaled)]
    return found if set(filter(reads(found), paths)) == scaled else None
