"""From the fields of a configuration to the places of a method, and back.

    target_modules, exclude_modules, layers_to_transform        ->   paths   ->   where, a pattern list
    rank_pattern, alpha_pattern, by path                       <->   the same by our names
"""
from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Iterable, Mapping, TypeVar

from minipeft.checks import is_integer, is_number, shown
from minipeft.formats.peft.codec import Config, Shapes
from minipeft.formats.peft.names import linear_modules, modules, path_of, words
from minipeft.formats.peft.targets import chosen, first_match, pattern
from minipeft.methods.per_place import PerPlace, RankPerPlace

R = TypeVar("R", bound=RankPerPlace)
TARGETS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
PLACES = TARGETS | {"modules_to_save"}
_WORDS = {"linear": "a linear layer", "embedding": "an embedding table", "norm": "a norm",
          "position": "a table of positions"}


def where(paths: list[str], model: Any) -> tuple[str, ...]:
    """The pattern list that chooses exactly the slots of the modules at `paths`."""
    slots = modules(model)
    return tuple(f"^{re.escape(slots[path])}$" for path in paths)


def targets(config: Config, model: Any, *kinds: str, shapes: Shapes = {}, prefix: str = "lora_") -> list[str]:
    """The paths that the config chooses on the model. Where it does not say which, they are those that stand in the
    keys of `shapes` before a word that begins with `prefix`. kinds: those of slots that may be chosen, by default any.
    Raises ValueError for a module of another kind, and where nothing is chosen."""
    slots = modules(model)
    found = _in_keys(slots, shapes, prefix) if config.get("target_modules") is None and shapes else \
        chosen(config, list(slots), linear_modules(model))
    for path in found if kinds else ():
        if (kind := model.slots[slots[path]].kind) not in kinds:
            raise ValueError(f"target_modules is {shown(config.get('target_modules'))}, which chooses {path}, "
                             f"{_WORDS[kind]}; expected {' or '.join(_WORDS[kind] for kind in kinds)}, as in PEFT")
    return found


def _in_keys(slots: Iterable[str], shapes: Shapes, prefix: str) -> list[str]:
    """The paths among `slots` that stand in keys of `shapes` before a word that begins with `prefix`."""
    paths = {words(path): path for path in slots}
    longest = max(map(len, paths))
    found = {paths.get(said[:at]) for said in map(words, shapes) for at, word in enumerate(said)
             if word.startswith(prefix) and at <= longest}
    if not found - {None}:
        raise ValueError(f"target_modules is not given, and no tensor belongs to a module of this model: "
                         f"{', '.join(shown(key) for key in list(shapes)[:3])}")
    return [path for path in slots if path in found]


def rank(config: Config, field: str = "r") -> int:
    """The rank in `field`. Raises ValueError unless it is an integer of at least 1."""
    if not is_integer(config.get(field), 1):
        raise ValueError(f"{field} is {shown(config.get(field))}; expected an integer >= 1")
    return config[field]


def alpha(value: Any, field: str) -> float:
    """The alpha in `field`, which is `value`. Raises ValueError for 0, text, null and what is not finite."""
    if not is_number(value) or value == 0:
        raise ValueError(f"{field} is {shown(value)}; expected a finite number other than 0, which would switch the "
                         f"adapter off")
    return value


def flag(config: Config, field: str, usual: bool = False) -> bool:
    """The True or False in `field`; `usual` where the file has nothing or null. Raises ValueError for anything else."""
    value = usual if config.get(field) is None else config[field]
    if type(value) is not bool:
        raise ValueError(f"{field} is {shown(value)}; expected true or false")
    return value


def by_place(config: Config, field: str, paths: list[str], model: Any, usual: Any) -> tuple[tuple[str, Any], ...]:
    """Our pattern, ((regular expression, value), ...), of PEFT's rank_pattern or alpha_pattern in `field`: an entry for
    each of `paths` whose value differs from the usual one. Raises ValueError for a value that is no rank or alpha."""
    given, slots = pattern(config, field), modules(model)
    for key, value in given.items():
        what = f"{field}[{shown(key)}]"
        if field == "rank_pattern":
            rank({what: value}, what)
        else:
            alpha(value, what)
    found = {path: first_match(given, path) for path in paths}
    return tuple((f"^{re.escape(slots[path])}$", value) for path, value in found.items()
                 if value is not None and value != usual)


def of_any_rank(method: R, model: Any) -> R:
    """`method`, which may have ranks beyond min(d_out, d_in) if it has one on this `model`: PEFT allows them."""
    places: Mapping[str, Any] = method.places(model)
    large = any(method.own_rank(name) > min(slot.shape) for name, slot in places.items())
    return dataclasses.replace(method, any_rank=True) if large else method


def unused_patterns(config: Config, paths: list[str]) -> list[str]:
    """A sentence for each of rank_pattern and alpha_pattern that has a key which matches none of `paths`."""
    unused = {field: pattern(config, field).unused(paths) for field in ("rank_pattern", "alpha_pattern")}
    return [f"{field} has {', '.join(map(shown, keys[:3]))} ({len(keys)} in all), which no adapted module matches"
            for field, keys in unused.items() if keys]


def usual(method: PerPlace, times: int = 1) -> tuple[int, float]:
    """The r and alpha of a file of `method`, whose scale is alpha / r, or alpha / sqrt(r). times: how much larger a
    rank is written than it is here."""
    return times * method.rank, _alpha(method, method.alpha, method.rank, times)


def patterns(method: RankPerPlace, names: Iterable[str], model: Any, times: int = 1) -> dict[str, dict[str, Any]]:
    """PEFT's rank_pattern and, for a method with alphas, alpha_pattern, on the places `names`: an entry for each place
    whose rank or alpha is not the usual one, under its path. times: as in `usual`."""
    ranks = {path_of(model, name): method.own_rank(name) for name in names}
    found: dict[str, dict[str, Any]] = {
        "rank_pattern": {path: times * r for path, r in ranks.items() if r != method.rank}}
    if isinstance(method, PerPlace):
        alphas = {path_of(model, name): _alpha(method, method.alpha_at(name), method.own_rank(name), times)
                  for name in names}
        found["alpha_pattern"] = {path: a for path, a in alphas.items() if a != usual(method, times)[1]}
    return found


def _alpha(method: PerPlace, value: float, r: int, times: int) -> float:
    """The alpha that gives, beside a rank of times * r, the s that an alpha of `value` gives here beside r."""
    if method.scaling == "alpha":
        return value * r * times
    return value if times == 1 else value * (times if method.scaling == "alpha/r" else math.sqrt(times))


def only(peft_type: str, names: Mapping[str, Any], *kinds: str) -> None:
    """Raises ValueError unless all places, `names` {name: slot}, are of one of the `kinds`, those that PEFT has the
    peft_type for."""
    for name, slot in names.items():
        if slot.kind not in kinds:
            raise ValueError(f"{name} is {_WORDS.get(slot.kind, slot.kind)}; {peft_type} of PEFT is for "
                             f"{' or '.join(_WORDS[kind] for kind in kinds)}")


def target_modules(names: Mapping[str, Any], model: Any) -> list[str]:
    """target_modules for the places `names`: the last words of their paths where these choose exactly them, else whole
    paths."""
    paths = [path_of(model, name) for name in names]
    words = sorted({path.rpartition(".")[2] for path in paths})
    short = {"target_modules": words}
    return words if sorted(chosen(short, list(modules(model)), [])) == sorted(paths) else sorted(paths)
