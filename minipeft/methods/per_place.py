"""Ranks, scales and other numbers that may differ from place to place.

    s = alpha / r            "alpha/r"          Hu et al., 2021, arXiv:2106.09685, sec. 4.1
    s = alpha / sqrt(r)      "alpha/sqrt(r)"    Kalajdzievski, 2023, arXiv:2312.03732 (rsLoRA)
    s = alpha                "alpha"            a fixed number

    LoRA(8, rank_pattern={r"decoder\\.": 4, r"\\.v\\.": 16})         decoder: r = 4; v of the encoder: 16; the others: 8

A pattern is a regular expression that is searched in the dotted name of a place, as in `where`. The first that is found
counts.
"""
from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from typing import Any, Callable, Mapping

from minipeft.attaching.fields import expect, finite_in, integer, number
from minipeft.attaching.method import Method, setting
from minipeft.checks import shown
from minipeft.nn.place import Place
from minipeft.nn.slot import Slot

SCALINGS = ("alpha/r", "alpha/sqrt(r)", "alpha")
Pattern = tuple[tuple[str, Any], ...]  # ((regular expression, value), ...); a mapping becomes one


def nonzero(value: Any) -> bool:
    """Whether `value` is a finite number other than 0."""
    return number(value) and value != 0


def pattern_setting(holds: Callable[[Any], bool], values: str) -> Any:
    """A field of a method that is a pattern. holds: the check of its values, which `values` names in an error."""
    return setting((), lambda v: isinstance(v, tuple) and all(
        isinstance(p, tuple) and len(p) == 2 and is_expression(p[0]) and holds(p[1]) for p in v),
        f"{{regular expression: {values}}}", optional=True)


def is_expression(text: Any) -> bool:
    """Whether `text` is a regular expression."""
    try:
        return isinstance(text, str) and re.compile(text) is not None
    except (re.error, RecursionError, OverflowError):
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankPerPlace(Method):
    """A method with a rank at each place; a subclass gives the default. rank_pattern: {regular expression: rank}, or a
    tuple of such pairs, for the places in whose name the expression is found. The first match counts, and the other
    places have `rank`. any_rank: whether r may exceed min(d_out, d_in). PEFT allows this, though it only takes more
    memory: no matrix of this shape has such a rank.

    Raises ValueError for fields out of range and, on a model, for a pattern that matches none of the places."""

    rank: int
    any_rank: bool = setting(False, lambda v: type(v) is bool, "True or False", optional=True)
    rank_pattern: Mapping[str, int] | Pattern = pattern_setting(integer, "an integer >= 1")

    def __post_init__(self) -> None:
        as_pairs(self, "rank_pattern")
        super().__post_init__()

    def places(self, model: Any) -> dict[str, Place]:
        """{name: place}, as in `Method.places`. Raises ValueError where a pattern matches none of these names."""
        found = super().places(model)
        all_match(self, "rank_pattern", found)
        return found

    def own_rank(self, name: str) -> int:
        """r at the place called `name`."""
        return first(self.rank_pattern, name, self.rank)

    def rank_at(self, name: str, slot: Slot, parts: int = 1) -> int:
        """r at the place called `name`. parts: into how many equal parts d_out is split; each has a rank of its own.
        Raises ValueError for a rank that no matrix of this shape can have, unless `any_rank` allows it."""
        rank, most = self.own_rank(name), min(slot.shape[0] // parts, slot.shape[1])
        if rank > most and not self.any_rank:
            raise ValueError(f"{type(self).__name__}: rank {rank} exceeds {most}, the largest that "
                             f"{f'a part of ' if parts > 1 else ''}{name} {list(slot.shape)} can have")
        return rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerPlace(RankPerPlace):
    """A method with a rank and an alpha at each place; a subclass gives both their defaults. scaling: what s is, one of
    the names in the table at the top of this file. rank_pattern, alpha_pattern: as in `RankPerPlace`.

    Raises ValueError for fields out of range and, on a model, for a pattern that matches none of the places."""

    alpha: float
    scaling: str = setting("alpha/r", lambda v: v in SCALINGS, f"one of {', '.join(SCALINGS)}", optional=True)
    alpha_pattern: Mapping[str, float] | Pattern = pattern_setting(nonzero, "a finite number other than 0")

    def __post_init__(self) -> None:
        as_pairs(self, "alpha_pattern")
        super().__post_init__()

    def places(self, model: Any) -> dict[str, Place]:
        """{name: place}, as in `Method.places`. Raises ValueError where a pattern matches none of these names."""
        found = super().places(model)
        all_match(self, "alpha_pattern", found)
        return found

    def alpha_at(self, name: str) -> float:
        """alpha at the place called `name`."""
        return first(self.alpha_pattern, name, self.alpha)

    def scale_at(self, name: str, slot: Slot) -> Fraction:
        """s at the place called `name`: exact, but for the rounding of sqrt(r). It takes the dtype of the array that it
        multiplies. Raises ValueError where it is not finite there."""
        rank, alpha = self.own_rank(name), self.alpha_at(name)
        divisor = {"alpha/r": rank, "alpha/sqrt(r)": math.sqrt(rank), "alpha": 1}[self.scaling]
        scale = Fraction(alpha) / Fraction(divisor)
        expect(self, "alpha" if alpha == self.alpha else "alpha_pattern", finite_in(scale, slot.dtype),
               f"a finite {self.scaling.replace('/', ' / ')} in {slot.dtype}")
        return scale


def as_pairs(method: Method, field: str) -> None:
    """Turn a mapping in `field` of a frozen method into pairs: a file can hold those, and a mapping has no hash."""
    if isinstance(given := getattr(method, field), Mapping):
        object.__setattr__(method, field, tuple(given.items()))


def all_match(method: Method, field: str, found: Mapping[str, Place]) -> None:
    """Raises ValueError where an expression in `field` is found in none of the names of the places `found`."""
    for expression, _ in getattr(method, field):
        if not any(re.search(expression, name) for name in found):
            raise ValueError(f"{type(method).__name__}: {field} has {shown(expression)}, which matches none of the "
                             f"{len(found)} places; expected one found in {next(iter(found))}, for example")


def first(pattern: Any, name: str, otherwise: Any) -> Any:
    """The value of the first expression of `pattern` that is found in `name`; `otherwise` where none is."""
    return next((value for expression, value in pattern if re.search(expression, name)), otherwise)
