"""The names of weights here and in another library: a table of patterns, read in either direction.

In a pattern S is encoder or decoder, i is a layer, Q is q, k, v or o, W is wi, wi_0, wi_1 or wo, and * is weight or
bias. Every other letter stands for itself.
"""
from __future__ import annotations

import re
from typing import Iterable

_PARTS = {"S": "encoder|decoder", "i": r"\d+", "Q": "[qkvo]", "W": "wi|wi_0|wi_1|wo", "*": "weight|bias"}
_PART = r"\b[SiQW]\b|\*"


def translated(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    """The name by the first row (pattern, translation) of `table` whose pattern it matches; None if none does."""
    for pattern, translation in table:
        regex = re.sub(rf"{_PART}|\.", lambda m: f"({_PARTS[m[0]]})" if m[0] in _PARTS else r"\.", pattern)
        match = re.fullmatch(regex, name)
        if match:
            parts = dict(zip(re.findall(_PART, pattern), match.groups()))
            return re.sub(_PART, lambda m: parts[m[0]], translation)
    return None
