"""The rows of a long sweep, on the disk as they come: a sweep that was interrupted goes on where it was.

A line per row; before them one of what all rows depend on, so that rows of another base or of other test words are
never taken for this sweep's.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Callable, Generic, TypeVar

R = TypeVar("R")


class RowLog(Generic[R]):
    """Rows of one dataclass, told apart by the fields that `key` names. go_on: keep those that `path` holds.

    Raises SystemExit, before anything is written over, for a file that belongs to another sweep."""

    def __init__(self, path: Path, kind: Callable[..., R], key: tuple[str, ...], settings: dict[str, Any],
                 go_on: bool):
        self.path, self.key = path, key
        self.found: dict[tuple, R] = {}
        if not go_on or not path.exists():
            path.write_text(json.dumps(settings) + "\n", "utf-8")
            return
        head, *lines = path.read_text("utf-8").split("\n")
        if json.loads(head) != settings:
            raise SystemExit(f"{path} is of another sweep, {head}; this one is {json.dumps(settings)}: choose another "
                             f"--out, or start afresh without --go-on")
        if lines.pop():                         # a line that was cut off as it was written
            path.write_text("\n".join([head, *lines, ""]), "utf-8")
        for line in lines:
            row = kind(**json.loads(line))
            self.found[self._key(row)] = row

    def row(self, make: Callable[..., R], **key: Any) -> R:
        """The row of these key fields: the one on record, else make(**key), which is then recorded."""
        place = tuple(key[name] for name in self.key)
        if place not in self.found:
            self.found[place] = made = make(**key)
            assert self._key(made) == place
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(made)) + "\n")      # type: ignore[call-overload]
        return self.found[place]

    def _key(self, row: R) -> tuple:
        return tuple(getattr(row, name) for name in self.key)
