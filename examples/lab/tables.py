"""One table in two forms: for a terminal (by rich), and in markdown for a page."""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Sequence

import numpy
from rich import box
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    value: of a row (None: no meaning there; a tuple: several numbers). form: how it is written. reduce: turns the
    values of several seeds into one: the mean or, for times on a busy machine, the median."""

    heading: str
    value: Callable[[Any], Any]
    form: str = "{:.1f}"
    reduce: Callable[..., Any] = numpy.mean

    def cell(self, group: Sequence[Any]) -> str:
        """One number for the rows of a group; yes or NO for booleans."""
        values = [self.value(row) for row in group]
        if any(v is None for v in values):
            return "-"
        if isinstance(values[0], bool):
            return "yes" if all(values) else "NO"
        return self.form.format(*map(float, numpy.ravel(self.reduce(values, axis=0))))


def cells(rows: Sequence[Any], columns: Sequence[Column]) -> list[list[str]]:
    """One line for each method, in the order of the rows, with the seeds reduced to one number."""
    names = dict.fromkeys(row.method for row in rows)
    return [[name, *(column.cell([row for row in rows if row.method == name]) for column in columns)]
            for name in names]


def on_terminal(title: str, rows: Sequence[Any], columns: Sequence[Column]) -> Table:
    """The table for a terminal."""
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    for i, heading in enumerate(("method", *(column.heading for column in columns))):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for line in cells(rows, columns):
        table.add_row(*line)
    return table


def as_markdown(rows: Sequence[Any], columns: Sequence[Column]) -> str:
    """The table in markdown."""
    head = ["method", *(column.heading for column in columns)]
    lines = [head, ["---", *("---:" for _ in columns)], *cells(rows, columns)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
