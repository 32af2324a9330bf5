"""A validator for the part of JSON Schema, draft-07, that the schema of the vectors uses.

It is stricter than the draft in two points: 5.0 is not an integer, and a number must fit into a float64 (1e400 and
10^400 do not). An unknown keyword is an error, so that no rule of the schema goes unchecked.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Callable, Mapping

from minipeft.files import read_json

SPEC = 1  # version of the rules for a verdict; part of every document and every report
NAME = "minipeft-vectors-v1.json"
FOLDER = Path(__file__).parent / "v1"
LATER = FOLDER.parent / "v2"  # same format, later conventions: v1 is frozen, byte for byte
Where = tuple[Any, ...]


def _is_number(v: Any) -> bool:
    return type(v) in (int, float) and abs(v) <= sys.float_info.max


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict), "array": lambda v: isinstance(v, list), "null": lambda v: v is None,
    "string": lambda v: isinstance(v, str), "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: type(v) is int, "number": lambda v: _is_number(v)}
_NOTES = {"$schema", "$id", "title", "description", "definitions"}


class Mismatch(ValueError):
    """A document does not match the schema. where: the path to the field, from the root. what: the fault."""

    def __init__(self, where: Where, what: str):
        super().__init__(f"{'.'.join(map(str, where)) or 'the document'}: {what}")
        self.where, self.what = where, what


def the_schema() -> dict[str, Any]:
    """The schema of this version."""
    return read_json(FOLDER / NAME)


def match(value: Any, rule: Mapping[str, Any], root: Mapping[str, Any], where: Where = ()) -> None:
    """Check `value` against the schema `rule`. root: the whole schema, for references. where: the path to `value`.
    Raises Mismatch, naming the first field that does not match, and KeyError for an unknown keyword."""
    if "$ref" in rule:
        return match(value, root["definitions"][rule["$ref"].removeprefix("#/definitions/")], root, where)
    kinds = rule.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_TYPES[kind](value) for kind in kinds):
        raise Mismatch(where, f"is {_shown(value)}; expected {' or '.join(kinds)}")
    for keyword, wanted in rule.items():
        if keyword not in _NOTES and keyword != "type":
            _RULES[keyword](value, wanted, rule, root, where)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _enum(value: Any, wanted: list, rule: Mapping, root: Mapping, where: Where) -> None:
    if not any(type(value) is type(w) and value == w for w in wanted):
        raise Mismatch(where, f"is {_shown(value)}; expected {' or '.join(map(repr, wanted))}")


def _const(value: Any, wanted: Any, rule: Mapping, root: Mapping, where: Where) -> None:
    _enum(value, [wanted], rule, root, where)


def _any_of(value: Any, wanted: list, rule: Mapping, root: Mapping, where: Where) -> None:
    found = []
    for other in wanted:
        try:
            return match(value, other, root, where)
        except Mismatch as mismatch:
            found.append(mismatch.what)
    raise Mismatch(where, "; nor ".join(found))


def _pattern(value: Any, wanted: str, rule: Mapping, root: Mapping, where: Where) -> None:
    strict = f"{wanted[:-1]}\\Z" if wanted.endswith("$") else wanted  # Python's $ also stands before a last newline
    if isinstance(value, str) and not re.search(strict, value):
        raise Mismatch(where, f"is {_shown(value)}; expected a match of {wanted}")


def _limit(of: Callable[[Any], Any], kinds: tuple, holds: Callable[[Any, Any], bool], word: str) -> Callable:
    def rule_of(value: Any, wanted: Any, rule: Mapping, root: Mapping, where: Where) -> None:
        if type(value) in kinds and not holds(of(value), wanted):
            raise Mismatch(where, f"is {_shown(value)}; expected {word} {wanted}")
    return rule_of


def _required(value: Any, wanted: list, rule: Mapping, root: Mapping, where: Where) -> None:
    for name in wanted if isinstance(value, dict) else ():
        if name not in value:
            raise Mismatch((*where, name), "is missing")


def _properties(value: Any, wanted: Mapping, rule: Mapping, root: Mapping, where: Where) -> None:
    for name, inner in wanted.items() if isinstance(value, dict) else ():
        if name in value:
            match(value[name], inner, root, (*where, name))


def _additional(value: Any, wanted: Any, rule: Mapping, root: Mapping, where: Where) -> None:
    for name in value if isinstance(value, dict) else ():
        if name in rule.get("properties", ()):
            continue
        if wanted is False:
            raise Mismatch((*where, name), "is not known")
        match(value[name], wanted, root, (*where, name))


def _names(value: Any, wanted: Mapping, rule: Mapping, root: Mapping, where: Where) -> None:
    for name in value if isinstance(value, dict) else ():
        match(name, wanted, root, (*where, name))


def _items(value: Any, wanted: Mapping, rule: Mapping, root: Mapping, where: Where) -> None:
    for i, item in enumerate(value if isinstance(value, list) else ()):
        match(item, wanted, root, (*where, i))


def _unique(value: Any, wanted: bool, rule: Mapping, root: Mapping, where: Where) -> None:
    if wanted and isinstance(value, list) and len({json.dumps(v, sort_keys=True) for v in value}) < len(value):
        raise Mismatch(where, "holds an entry twice")


_NUMBERS = (int, float)
_RULES: dict[str, Callable] = {
    "enum": _enum, "const": _const, "anyOf": _any_of, "pattern": _pattern, "required": _required,
    "properties": _properties, "additionalProperties": _additional, "propertyNames": _names, "items": _items,
    "uniqueItems": _unique,
    "minimum": _limit(lambda v: v, _NUMBERS, lambda a, b: a >= b, "at least"),
    "maximum": _limit(lambda v: v, _NUMBERS, lambda a, b: a <= b, "at most"),
    "minItems": _limit(len, (list,), lambda a, b: a >= b, "entries, at least"),
    "maxItems": _limit(len, (list,), lambda a, b: a <= b, "entries, at most"),
    "maxLength": _limit(len, (str,), lambda a, b: a <= b, "a length of at most")}
