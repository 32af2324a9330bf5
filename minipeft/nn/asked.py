"""The argument `adapter` of a forward: which attachments each row of the batch sees, and how strongly.

    None                    the base alone
    "a"                     this attachment
    ("a", "b")              these, bottom first
    {"a": 0.5, "b": 2}      these, bottom first, the change that each of them makes multiplied by its factor

A list has one such item for each row. Anything else is one item for all rows.
"""
from __future__ import annotations

from typing import Any, Mapping

from minipeft.checks import is_number, python, shown
from minipeft.nn.state import Asked


def asked_by_row(adapter: Any, batch: int, attachments: Mapping[str, Any]) -> list[Asked]:
    """The attachments and factors that each of the `batch` rows asks for, bottom first. adapter: as in the table at the
    top of this file. attachments: those of the model, by name.

    Raises ValueError for a list of another length, an unknown name, a name twice in one item, and a factor that is not
    a finite number; TypeError for another kind of item."""
    items = adapter if isinstance(adapter, list) else [adapter] * batch
    if len(items) != batch:
        raise ValueError(f"adapter lists {len(items)} entries for a batch of {batch} rows; expected one per row")
    rows = [_asked(item) for item in items]
    for name in {name for row in rows for name, _ in row}:
        if name not in attachments:
            raise ValueError(f"adapter {name!r} is not attached to this model; "
                             f"attached: {', '.join(attachments) or 'none'}")
    if any(len({name for name, _ in row}) != len(row) for row in rows):
        raise ValueError("adapter names one attachment twice for a row")
    return rows


def _asked(item: Any) -> Asked:
    if item is None or isinstance(item, str):
        return () if item is None else ((item, 1.0),)
    wrong = [name for name in (item if isinstance(item, (tuple, dict)) else [item]) if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"adapter holds {shown(wrong[0])}, of type {type(wrong[0]).__name__}; expected names (of an "
                        f"attachment a: a.name), tuples of names, dicts {{name: factor}}, or None")
    if isinstance(item, tuple):
        return tuple((name, 1.0) for name in item)
    for name, factor in item.items():
        if not is_number(factor):
            raise ValueError(f"adapter {{{name!r}: {shown(factor)}}}; expected a finite number as the factor")
    return tuple((name, float(python(factor))) for name, factor in item.items())
