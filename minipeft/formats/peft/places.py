"""From the fields of a configuration to the places of a method, and back.

    target_modules, exclude_modules, layers_to_transform        ->   paths   ->   where, a pattern list
    rank_pattern, alpha_pattern, by path                       <->   the same by our names
"""
from __future__ import annotations

import re
from typing import Any, Mapping

from minipeft.checks import is_integer, is_number, shown
from minipeft.formats.peft.codec import Config
from minipeft.formats.peft.names import linear_modules, modules, path_of
from minipeft.formats.peft.targets import chosen, first_match, pattern
from minipeft.methods.per_place import PerPlace

PLACES = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})


def where(paths: list[str], model: Any) -> tuple[str, ...]:
    """The pattern list that chooses exactly the slots of the modules at `paths`."""
    slots = modules(model)
    return tuple(f"^{re.escape(slots[path])}$" for path in paths)


def targets(config: Config, model: Any) -> list[str]:
    """The paths that the config chooses on the model."""
    return chosen(config, list(modules(model)), linear_modules(model))


def rank(config: Config, field: str = "r") -> int:
    """The rank in `field`. Raises ValueError unless it is an integer of at least 1."""
    if not is_integer(config.get(field), 1):
        raise ValueError(f"{field} is {shown(config.get(field))}; expected an integer >= 1")
    return config[field]


def alpha(value: Any, field: str) -> float:
    """The alpha in `field`. Raises ValueError for 0, text, null and what is not finite."""
    if not is_number(value) or value == 0:
        raise ValueError(f"{field} is {shown(value)}; expected a finite number other than 0, which would switch the "
                         f"adapter off")
    return value


def by_place(config: Config, field: str, paths: list[str], model: Any, usual: Any) -> tuple[tuple[str, Any], ...]:
    """Our pattern, ((regular expression, value), ...), of PEFT's rank_pattern or alpha_pattern in `field`: an entry for
    each of `paths` whose value differs from the usual one."""
    given, slots = pattern(config, field), modules(model)
    found = {path: first_match(given, path) for path in paths}
    return tuple((f"^{re.escape(slots[path])}$", value) for path, value in found.items()
                 if value is not None and value != usual)


def patterns(method: PerPlace, names: Mapping[str, Any], model: Any) -> dict[str, dict[str, Any]]:
    """PEFT's rank_pattern and alpha_pattern of a method on the places `names`: an entry for each place whose rank or
    alpha is not the usual one, under its path."""
    ranks = {path_of(model, name): method.rank_at(name, slot) for name, slot in names.items()}
    alphas = {path_of(model, name): method.alpha_at(name) for name in names}
    return {"rank_pattern": {path: r for path, r in ranks.items() if r != method.rank},
            "alpha_pattern": {path: a for path, a in alphas.items() if a != method.alpha}}


def target_modules(names: Mapping[str, Any], model: Any) -> list[str]:
    """target_modules for the places `names`: the last words of their paths where these choose exactly them, else whole
    paths."""
    paths = [path_of(model, name) for name in names]
    words = sorted({path.rpartition(".")[2] for path in paths})
    short = {"target_modules": words}
    return words if sorted(chosen(short, list(modules(model)), [])) == sorted(paths) else sorted(paths)
