"""Which modules a configuration of PEFT's chooses, by PEFT's own rules.

    target_modules=["q", "v"]            a module is chosen if its path is one of these or ends with "." and one of them
    target_modules=".*decoder.*\\.q"     a string must match the whole path
    target_modules="all-linear"          every linear layer except the head, in any case of letters
    exclude_modules                      the first two rules; what it matches is not chosen
    layers_to_transform=[1]              with a list of targets: only these layers, by the first number in the path that
                                         has two words before it; a path that is listed whole is chosen in any layer
    layers_pattern="block"               the number counts that stands behind this word
    modules_to_save                      a module at or below one of these is never chosen
    rank_pattern, alpha_pattern          {regular expression: value}; the first counts that matches the end of the path

A path is the module's name in the Hugging Face model, "encoder.block.0.layer.0.SelfAttention.q". In T5, the number of
the layer is that of a block, of the encoder and of the decoder. Measured with peft 0.21.2; the last number in the path,
which older versions took, is in T5 that of a sublayer.
"""
from __future__ import annotations

import re
from typing import Any, Callable, Iterable, Mapping, Sequence

from minipeft.checks import shown
from minipeft.formats.peft.expression import Expression, Steps

_WORDS = 20  # how many last words of paths an error names


def chosen(config: Mapping[str, Any], modules: Sequence[str], linear: Iterable[str]) -> list[str]:
    """The paths among `modules` that the fields of `config` choose, in order. linear: those of "all-linear". Raises
    ValueError for a malformed field, and where nothing is chosen."""
    targets, steps = config.get("target_modules"), Steps()
    excluded = _rule("exclude_modules", config.get("exclude_modules"), steps)
    saved = [Expression(name, r"(^|.*\.)", r"($|\..*)", steps) for name in names_in(config, "modules_to_save")]
    in_layer = _layers(config, steps)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targeted: Callable[[str], bool] = set(linear).__contains__
    else:
        targeted = _rule("target_modules", targets, steps)
    whole = frozenset(targets if isinstance(targets, list) else ())
    found = [path for path in modules if targeted(path) and (path in whole or in_layer(path)) and not excluded(path)
             and not any(expression.begins(path) for expression in saved)]
    if not found:
        words = dict.fromkeys(path.rpartition(".")[2] for path in modules)
        raise ValueError(f"target_modules is {shown(targets)}, which chooses none of the {len(modules)} modules of "
                         f"this model; their names end in {', '.join(list(words)[:_WORDS])}")
    return found


def idle(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """The names in the target_modules of `config`, where these are a list, that none of the `modules` ends with."""
    targets = config.get("target_modules")
    ends = {end for path in modules for end in _ends(path)}
    return [name for name in targets if name not in ends] if isinstance(targets, list) else []


def names_in(config: Mapping[str, Any], field: str) -> list[str]:
    """The names in a `field` of the `config`: a list of them, or null. Raises ValueError for anything else."""
    names = config.get(field)
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{field} is {shown(names)}; expected a list of names of modules, or null")
    return names


def ends_with(path: str, names: Iterable[str]) -> bool:
    """Whether `path` is one of the names or ends with "." and one of them."""
    return not _ends(path).isdisjoint(names)


def _ends(path: str) -> set[str]:
    """"a.b.c", "b.c" and "c" of the path "a.b.c"."""
    parts = path.split(".")
    return {".".join(parts[at:]) for at in range(len(parts))}


class Patterns(dict[str, Any]):
    """A rank_pattern or alpha_pattern. given: {regular expression: value}. Raises ValueError for a wrong expression."""

    def __init__(self, given: Mapping[str, Any]):
        super().__init__(given)
        steps = Steps()
        self._expressions = {key: Expression(key, r"(.*\.)?(", ")$", steps) for key in given}

    def first(self, path: str) -> Any:
        """The value of the first expression that matches the end of `path`; None if none does."""
        return next((self[key] for key, expression in self._expressions.items() if expression.begins(path)), None)

    def unused(self, paths: Iterable[str]) -> list[str]:
        """The expressions that match the end of none of the `paths`."""
        paths = list(paths)
        return [key for key, expression in self._expressions.items() if not any(map(expression.begins, paths))]


def first_match(patterns: Mapping[str, Any], path: str) -> Any:
    """The value of the first of the `patterns` {regular expression: value} that matches the end of `path`, or None."""
    return (patterns if isinstance(patterns, Patterns) else Patterns(patterns)).first(path)


def pattern(config: Mapping[str, Any], field: str) -> Patterns:
    """The rank_pattern or alpha_pattern in `field` of the `config`, {regular expression: number}; {} for null. Raises
    ValueError for anything else."""
    found = config.get(field)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{field} is {shown(found)}; expected {{regular expression: number}}")
    return Patterns(found or {})


def _rule(field: str, value: Any, steps: Steps) -> Callable[[str], bool]:
    if value is None or value == []:
        return lambda path: False
    if isinstance(value, str):
        return Expression(value, steps=steps).whole
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        names = frozenset(value)
        return lambda path: ends_with(path, names)
    raise ValueError(f"{field} is {shown(value)}; expected a list of names, or a regular expression")


def _layers(config: Mapping[str, Any], steps: Steps) -> Callable[[str], bool]:
    """Whether a path is in one of layers_to_transform. Raises ValueError for fields that PEFT refuses, too."""
    layers, names = config.get("layers_to_transform"), config.get("layers_pattern")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(i) is int for i in layers)):
        raise ValueError(f"layers_to_transform is {shown(layers)}; expected a number or a list of numbers")
    names = [names] if isinstance(names, str) and names else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"layers_pattern is {shown(names)}; expected a name or a list of names")
    if names and layers is None:
        raise ValueError(f"layers_pattern is {shown(names)} without layers_to_transform; expected both")
    if layers and not isinstance(targets := config.get("target_modules"), list):
        raise ValueError(f"layers_to_transform is {shown(layers)} and target_modules {shown(targets)}; expected a list "
                         f"of targets")
    if not layers:
        return lambda path: True
    numbered = frozenset(layers)
    before = [Expression(name, r"(?:^|.*?\.)", r"\.", steps) for name in names] \
        or [Expression(r".*?\.[^.]*\.", steps=steps)]

    def holds(path: str) -> bool:
        numbers = (re.compile(r"(\d+)\.").match(path, at) for expression in before for at in expression.ends(path))
        found = next((number for number in numbers if number), None)
        return found is not None and int(found[1]) in numbered
    return holds
