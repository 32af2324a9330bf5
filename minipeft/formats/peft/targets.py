"""Which modules a configuration of PEFT's chooses, by PEFT's own rules.

    target_modules=["q", "v"]            a module is chosen if its path is one of these or ends with "." and one of them
    target_modules=".*decoder.*\\.q"     a string must match the whole path
    target_modules="all-linear"          every linear layer except the head
    exclude_modules                      the same two rules; what it matches is not chosen
    layers_to_transform, layers_pattern  with a list of targets: only these layers, by the number in the path
    modules_to_save                      a module at or below one of these is never chosen

A path is the module's name in the Hugging Face model, "encoder.block.0.layer.0.SelfAttention.q".
"""
from __future__ import annotations

import re
from typing import Any, Callable, Iterable, Mapping, Sequence

from minipeft.checks import shown


def chosen(config: Mapping[str, Any], modules: Sequence[str], linear: Iterable[str]) -> list[str]:
    """The paths among `modules` that the fields of `config` choose, in order. linear: those of "all-linear". Raises
    ValueError for a malformed field, and where nothing is chosen."""
    targets = config.get("target_modules")
    excluded, saved = _rule("exclude_modules", config.get("exclude_modules")), names_in(config, "modules_to_save")
    if targets == "all-linear":
        wanted = set(linear)
        targeted: Callable[[str], bool] = wanted.__contains__
    else:
        targeted = _rule("target_modules", targets)
    in_layer = _layers(config) if isinstance(targets, (list, tuple)) else lambda path: True
    found = [path for path in modules if targeted(path) and in_layer(path) and not excluded(path)
             and not any(is_at_or_below(path, name) for name in saved)]
    if not found:
        raise ValueError(f"target_modules is {shown(targets)}, which chooses none of the {len(modules)} modules of "
                         f"this model; they are called {', '.join(modules[:3])}, ...")
    return found


def names_in(config: Mapping[str, Any], field: str) -> list[str]:
    """The names in a field that holds a list of them, or null. Raises ValueError for anything else."""
    names = config.get(field)
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{field} is {shown(names)}; expected a list of names of modules, or null")
    return names


def is_at_or_below(path: str, name: str) -> bool:
    """Whether the module `path` is one that modules_to_save calls `name`, or lies inside of such a one."""
    return f".{name}." in f".{path}."


def ends_with(path: str, names: Iterable[str]) -> bool:
    """Whether `path` is one of the names or ends with "." and one of them."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def first_match(patterns: Mapping[str, Any], path: str) -> Any:
    """The value of the first key of a rank_pattern or alpha_pattern that matches the end of `path`; None if none."""
    return next((value for key, value in patterns.items() if _compiled(rf"(.*\.)?({key})$", key).match(path)), None)


def pattern(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern, {regular expression: number}; {} for null. Raises ValueError for anything
    else."""
    found = config.get(field)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{field} is {shown(found)}; expected {{regular expression: number}}")
    for key in found:
        _compiled(key, key)
    return found


def _rule(field: str, value: Any) -> Callable[[str], bool]:
    if value is None or value == []:
        return lambda path: False
    if isinstance(value, str):
        expression = _compiled(value, value)
        return lambda path: expression.fullmatch(path) is not None
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return lambda path: ends_with(path, value)
    raise ValueError(f"{field} is {shown(value)}; expected a list of names, or a regular expression")


def _layers(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a path is in one of layers_to_transform. Without layers_pattern the number counts that stands last among
    those between dots, as in PEFT: in T5 that is the number of a sublayer."""
    layers, names = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return lambda path: True
    layers = [layers] if type(layers) is int else layers
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise ValueError(f"layers_to_transform is {shown(layers)}; expected a number or a list of numbers")
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"layers_pattern is {shown(names)}; expected a name or a list of names")
    expressions = [_compiled(rf".*\.{name}\.(\d+)\.", name) for name in names] or [re.compile(r".*\.[^.]*\.(\d+)\.")]

    def holds(path: str) -> bool:
        match = next((m for expression in expressions if (m := expression.match(path))), None)
        return match is not None and int(match[1]) in layers
    return holds


def _compiled(expression: str, said: str) -> re.Pattern:
    if not isinstance(expression, str) or len(expression) > 10_000:
        raise ValueError(f"{shown(said)} is no regular expression of a sensible length")
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{shown(said)} is not a regular expression: {error}") from None
