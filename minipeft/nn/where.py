"""One grammar for "which": a regular expression searched in the dotted name, a callable on it, or a list of these.

A name is chosen if any of the list chooses it. A pattern that matches nothing raises and lists the nearest names."""
from __future__ import annotations

import re
from typing import Callable, Iterable, Sequence, Union

Where = Union[str, Callable[[str], bool], Sequence[Union[str, Callable[[str], bool]]]]


def matching(names: Iterable[str], where: Where, what: str = "parameter") -> list[str]:
    """The `names` that `where` chooses, in their own order.

    Raises ValueError for a pattern that is malformed or matches nothing, TypeError for something else."""
    names = list(names)
    patterns = list(where) if isinstance(where, (list, tuple)) else [where]
    if not patterns:
        raise ValueError(f"where is an empty list; expected at least one pattern on {what} names")
    chosen: set[str] = set()
    for pattern in patterns:
        chooses = _predicate(pattern)
        hits = [name for name in names if chooses(name)]
        if not hits:
            raise ValueError(_nothing(pattern, names, what))
        chosen.update(hits)
    return [name for name in names if name in chosen]


def _predicate(pattern: object) -> Callable[[str], object]:
    if isinstance(pattern, str):
        try:
            return re.compile(pattern).search
        except re.error as error:
            raise ValueError(f"where={pattern!r} is not a regular expression: {error}") from None
    if callable(pattern):
        return pattern
    raise TypeError(f"where is {type(pattern).__name__}; expected a regular expression, a callable on the name, "
                    f"or a list of these")


def _nothing(pattern: object, names: list[str], what: str) -> str:
    shown = repr(pattern) if isinstance(pattern, str) else "the callable"
    if not names:
        return f"where={shown} matches nothing: there is no {what}"
    import difflib  # here, for the one error that needs it
    near = difflib.get_close_matches(re.sub(r"[\\^$()]", "", pattern), names, n=3, cutoff=0.3) \
        if isinstance(pattern, str) else []
    return (f"where={shown} matches none of the {len(names)} {what} names; "
            f"nearest: {', '.join(near or names[:3])}")
