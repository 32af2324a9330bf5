"""The rows of a long sweep, written to disk as they are made, so that an interrupted sweep can go on.

The file has a line for each row. Its first line holds the settings that all rows depend on, so that rows of another
base or of other test words are never mistaken for rows of this sweep.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Callable, Generic, TypeVar

R = TypeVar("R")


class RowLog(Generic[R]):
    """Rows of one dataclass in the file `path`.

    kind: the dataclass. key: the fields that tell rows apart. settings: what all rows depend on. go_on: keep the rows
    that the file already holds. Raises SystemExit for a file with other settings, before anything is overwritten."""

    def __init__(self, path: Path, kind: Callable[..., R], key: tuple[str, ...], settings: dict[str, Any],
                 go_on: bool):
        self.path, self.key = path, key
        self.found: dict[tuple, R] = {}
        if not go_on or not path.exists():
            path.write_text(json.dumps(settings) + "\n", "utf-8")
            return
        head, *lines = path.read_text("utf-8").split("\n")
        if json.loads(head) != settings:
            raise SystemExit(f"{path} is of another sweep, {head}; this one has {json.dumps(settings)}: choose another "
                             f"--out, or start anew without --go-on")
        if lines.pop():                         # a line that was cut off as it was written
            path.write_text("\n".join([head, *lines, ""]), "utf-8")
        for line in lines:
            row = kind(**json.loads(line))
            self.found[self._key(row)] = row

    def row(self, make: Callable[..., R], **key: Any) -> R:
        """The row with these key fields: the recorded one, or else make(**key), which is then recorded."""
        place = tuple(key[name] for name in self.key)
        if place not in self.found:
            self.found[place] = made = make(**key)
            assert self._key(made) == place
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(made)) + "\n")      # type: ignore[call-overload]
        return self.found[place]

    def _key(self, row: R) -> tuple:
        return tuple(getattr(row, name) for name in self.key)
