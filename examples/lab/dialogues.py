"""Dialogues with their summaries, read from a file, and split into those to train on and those to test on.

    id,topic,dialogue,summary                        .csv: a header, then rows; text with line breaks is in quotes
    {"dialogue": "...", "summary": "..."}            .jsonl: an object on each line

id and topic may be missing. Some collections summarize a dialogue several times, in rows of their own. So the parts are
parts of the dialogues, not of the rows: no dialogue is in both.
"""
from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy

from minipeft.checks import shown
from minipeft.formats.folder import no_pointer

COLUMNS = ("dialogue", "summary")
MOST_TRAIN, MOST_TEST = 125, 10             # unless more are asked for: as in the lab
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """One row. id: as in the file, or its number there."""

    dialogue: str
    summary: str
    id: str
    topic: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the dialogue. Dialogues that differ in white space alone are the same."""
        return tuple(self.dialogue.split())


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[Dialogue]:
    """The rows of a .csv or .jsonl file. columns: the names of the dialogue's column and of the summary's.

    Raises FileNotFoundError for a missing file; ValueError, naming the file and the row, for another kind of file, text
    that is not UTF-8, broken CSV or JSON, missing columns, an empty dialogue or summary, and no rows at all."""
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {".csv": _of_csv, ".jsonl": _of_jsonl}
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected a .csv or .jsonl file with the columns "
                                f"{' and '.join(map(repr, columns))} (nothing is downloaded)")
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} ends in {path.suffix!r}; expected .csv or .jsonl")
    no_pointer(path)
    try:
        found = [_dialogue(path, i, row, columns) for i, row in enumerate(readers[path.suffix.lower()](path), 1)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no row; expected dialogues and summaries")
    return found


def _of_csv(path: Path) -> Iterator[Row]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"{path}: line {reader.line_num} has more fields than the header: a text with "
                                     f"commas or line breaks must stand in quotes")
                yield row
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.reader.line_num}: {error}") from None


def _of_jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} is {shown(row)}; expected an object with a dialogue and a "
                                 f"summary")
            yield row


def _dialogue(path: Path, number: int, row: Row, columns: Sequence[str]) -> Dialogue:
    for name in columns:
        if name not in row:
            raise ValueError(f"{path}: row {number} has no column {name!r}; it has "
                             f"{', '.join(map(repr, row)) or 'none'}. The options --dialogue-column and "
                             f"--summary-column say which to read")
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{path}: row {number} has {shown(row[name])} as {name!r}; expected text")
    dialogue, summary = (row[name].strip() for name in columns)
    return Dialogue(dialogue, summary, str(number if row.get("id") in (None, "") else row["id"]),
                    str(row.get("topic") or ""))


def split(rows: Sequence[Dialogue], test: Sequence[Dialogue] | int | None, train: int | None,
          seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """(rows to train on, rows to test on), in an order drawn by `seed`.

    test: how many, each of another dialogue (None: a quarter, at most MOST_TEST), or the test rows themselves. train:
    how many of the other rows (None: all, at most MOST_TRAIN). Raises ValueError where there are too few."""
    order = [rows[i] for i in numpy.random.default_rng(seed).permutation(len(rows))]
    first = {row.words: row for row in reversed(order)}
    asked = max(1, min(MOST_TEST, len(first) // 4)) if test is None else test
    held = [row for row in order if first[row.words] is row][:asked] if isinstance(asked, int) else list(asked)
    tested = {row.words for row in held}
    left = [row for row in order if row.words not in tested]
    if isinstance(asked, int) and len(held) < asked or len(left) < (train or 1):
        others = f"{asked} test dialogues" if isinstance(asked, int) else f"the {len(held)} test rows of another file"
        raise ValueError(f"{len(rows)} rows with {len(first)} different dialogues are too few for {others} and "
                         f"{train or 1} others to train on")
    return left[:train or MOST_TRAIN], held
