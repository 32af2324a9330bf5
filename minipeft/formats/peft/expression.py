"""Regular expressions of a file, matched in bounded time.

A file is untrusted, and for an expression such as (a+)+$ Python's `re` can take years. So `re` parses an expression,
and it is matched here, by sets of positions in the text:

    ends(x, S)     all positions at which a match of x can end that begins at a position in S

    c              one to the right of those in S at which the character c stands
    x y            ends(y, ends(x, S))
    x | y          ends(x, S) and ends(y, S)
    x*             S, ends(x, S), ends(x, ends(x, S)), ... until nothing is new
    (?=x)          those in S at which a match of x begins

Nothing is tried twice, whatever the order in which `re` would try it. Greedy and lazy repeats are the same here: they
differ in which match is found, and not in whether there is one. Not supported is everything that depends on the match
that was found: backreferences, conditions, atomic groups and possessive repeats.
"""
from __future__ import annotations

import re
from re import _parser  # type: ignore[attr-defined]  # Python has no public parser of expressions
from typing import Any, Callable, Iterable

from minipeft.checks import shown

STEPS = 3_000_000   # in all, for the expressions and texts that one `Steps` counts: a few seconds
_LONGEST = 10_000   # characters of an expression
_PARSING = 30       # steps for each character
_PLAIN = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"})
_KNOWN = _PLAIN | {"BRANCH", "SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"}
_KINDS: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal, "CATEGORY_SPACE": str.isspace, "CATEGORY_WORD": lambda c: c.isalnum() or c == "_"}


class Steps:
    """How much may still be computed, by all the expressions that share it. left: so many steps."""

    def __init__(self, left: int = STEPS):
        self.left = left

    def take(self, steps: int = 1) -> None:
        """Take so many `steps`. Raises ValueError where not enough is left."""
        self.left -= steps
        if self.left < 0:
            raise ValueError("its regular expressions take too long on the names of this model; expected simpler ones, "
                             "or lists of names")


class Expression:
    """A regular expression. before, after: what stands in front of it and behind it. steps: shared with others, or its
    own. Raises ValueError, which shows `text`, where it is none, is too long or nested too deeply, or has a part that
    is not supported."""

    def __init__(self, text: Any, before: str = "", after: str = "", steps: Steps | None = None):
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise ValueError(f"{shown(text)} is no regular expression of a sensible length")
        self._text, self._steps = text, Steps() if steps is None else steps
        self._steps.take(_PARSING * len(text))
        try:
            whole = re.compile(f"{before}{text}{after}")
            parsed = _parser.parse(f"{before}{text}{after}")
            self._parts, self._flags = parsed, parsed.state.flags
            names = set(_names(parsed))
            plain = {str(op) for op, _ in _parser.parse(text)} <= _PLAIN
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{shown(text)} is not a regular expression: {error}") from None
        if not names <= _KNOWN:
            raise ValueError(f"{shown(text)} has a part that is not supported ({min(names - _KNOWN)}): expected a "
                             f"regular expression without backreferences, conditions and atomic groups")
        self._re = whole if plain else None  # without a repeat or a choice, `re` is quick

    def begins(self, text: str) -> bool:
        """Whether a match begins at the start of `text`."""
        return self._quick(text, "match") if self._re else bool(self.ends(text))

    def whole(self, text: str) -> bool:
        """Whether all of `text` is a match."""
        return self._quick(text, "fullmatch") if self._re else len(text) in self.ends(text)

    def ends(self, text: str) -> list[int]:
        """The positions in `text` at which a match can end that begins at its start, in rising order. Raises ValueError
        for an expression that is nested too deeply, or takes too long."""
        try:
            ends = _Text(text, self._steps).ends(self._parts, 1, self._flags)
        except RecursionError:
            raise ValueError(f"{shown(self._text)} is nested too deeply; expected a simpler expression") from None
        return [at for at in range(len(text) + 1) if ends >> at & 1]

    def _quick(self, text: str, how: str) -> bool:
        self._steps.take()
        return getattr(self._re, how)(text) is not None


def _names(parts: Iterable) -> Iterable[str]:
    """The names of all operations of a parsed expression."""
    for op, value in parts:
        yield str(op)
        for inner in value if isinstance(value, tuple) else ():
            for sub in inner if isinstance(inner, list) else [inner]:
                if isinstance(sub, _parser.SubPattern):
                    yield from _names(sub)


class _Text:
    """The text that expressions are matched with. A set of positions is an integer: bit i stands for position i, which
    lies in front of the character i."""

    def __init__(self, text: str, steps: Steps):
        self.text, self.steps, self.end = text, steps, 1 << len(text)
        self.at: dict[str, int] = {}  # {character: where it stands}
        for i, character in enumerate(text):
            self.at[character] = self.at.get(character, 0) | 1 << i

    def ends(self, parts: Iterable, S: int, flags: int) -> int:
        """As in the table above. parts: [(operation, value), ...] as `re` parses them; all of them, in order."""
        for op, value in parts:
            self.steps.take()
            if not S:
                return 0
            S = getattr(self, f"_{str(op).lower()}")(value, S, flags)
        return S

    def _literal(self, value: int, S: int, flags: int) -> int:
        return (S & self._where([("LITERAL", value)], flags)) << 1

    def _not_literal(self, value: int, S: int, flags: int) -> int:
        return (S & self._where([("NEGATE", None), ("LITERAL", value)], flags)) << 1

    def _any(self, value: None, S: int, flags: int) -> int:
        return (S & (self.end - 1 if flags & re.DOTALL else self.end - 1 & ~self.at.get("\n", 0))) << 1

    def _in(self, value: Any, S: int, flags: int) -> int:
        return (S & self._where(value, flags)) << 1

    def _where(self, items: Any, flags: int) -> int:
        """At which positions a character of the set [items] stands."""
        if len(items) == 1 and not flags & re.IGNORECASE and str(items[0][0]) == "LITERAL":
            return self.at.get(chr(items[0][1]), 0)
        return sum(where for character, where in self.at.items() if _holds(items, character, flags))

    def _branch(self, value: Any, S: int, flags: int) -> int:
        found = 0
        for parts in value[1]:
            found |= self.ends(parts, S, flags)
        return found

    def _subpattern(self, value: Any, S: int, flags: int) -> int:
        _, added, removed, parts = value
        return self.ends(parts, S, (flags | added) & ~removed)

    def _max_repeat(self, value: Any, S: int, flags: int) -> int:
        least, most, parts = value
        for _ in range(least):
            before, S = S, self.ends(parts, S, flags)
            if S in (0, before):  # as it will stay
                break
        new = found = S
        for _ in range(most - least):
            new = self.ends(parts, new, flags) & ~found
            if not new:
                break
            found |= new
        return found

    _min_repeat = _max_repeat

    def _assert(self, value: Any, S: int, flags: int) -> int:
        ahead, parts = value
        width = 0 if ahead > 0 else parts.getwidth()[0]
        return sum(1 << i for i in range(width, len(self.text) + 1) if S >> i & 1
                   and (ends := self.ends(parts, 1 << i - width, flags)) and (ahead > 0 or ends >> i & 1))

    def _assert_not(self, value: Any, S: int, flags: int) -> int:
        return S & ~self._assert(value, S, flags)

    def _at(self, value: Any, S: int, flags: int) -> int:
        where = str(value)
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return S & 1
        if where in ("AT_END", "AT_END_STRING"):
            return S & self.end
        word = self._where([("CATEGORY", "CATEGORY_WORD")], flags)
        borders = word ^ word << 1
        return S & (borders if where == "AT_BOUNDARY" else ~borders)


def _holds(items: Any, character: str, flags: int) -> bool:
    """Whether the set [items] has the character, or with IGNORECASE one of its cases."""
    cases = {character, character.lower(), character.upper()} if flags & re.IGNORECASE else {character}
    inside = any(_is(str(op), value, case) for op, value in items for case in cases)
    return inside != any(str(op) == "NEGATE" for op, _ in items)


def _is(op: str, value: Any, character: str) -> bool:
    if op == "LITERAL":
        return ord(character) == value
    if op == "RANGE":
        return value[0] <= ord(character) <= value[1]
    if op == "CATEGORY":
        kind = str(value)
        return _KINDS[kind.replace("NOT_", "")](character) != ("NOT_" in kind)
    return False
