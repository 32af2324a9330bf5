"""The log of a run: a JSONL file with one line per step and per evaluation, cut back to the checkpoint on resume.

A checkpoint stores the length that the log had when it was written. Lines that a killed run wrote after that are
dropped and written again. So the log of a resumed run equals, byte for byte, that of a run that was never stopped. (If
the resumed run is longer, the evaluation after the old last step stays in the log.)

Each line is written at its own offset in the file, so writing it twice changes nothing.
"""
from __future__ import annotations

import json
import os
from typing import Any

from minipeft.atomic import check_regular


def line(**fields: Any) -> bytes:
    """One line of the log: `fields` as JSON."""
    return (json.dumps(fields) + "\n").encode()


class Log:
    """An open log. path None: nothing is written. Opening does not change an existing file."""

    def __init__(self, path: str | os.PathLike | None, keep: int = 0):
        """keep: the length of the log in bytes, as a checkpoint says. Raises ValueError if the file is shorter or
        missing, if no line ends there, and if it is not a regular file."""
        self._keep, self._file = keep, -1
        if path is None:
            return
        size = os.stat(path).st_size if os.path.exists(path) else None
        if keep and (size is None or size < keep):
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{path}: the log {found}, but the checkpoint was written when it had {keep}: put it "
                             f"back, or start afresh with resume=False")
        if size is not None:
            check_regular(path, os.stat(path).st_mode)
        if keep and not _ends_a_line(path, keep):
            raise ValueError(f"{path}: no line of the log ends at byte {keep}, where the log of the checkpoint ended, "
                             f"so it is another log: put the old one back, or start afresh with resume=False")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0),
                             0o666)

    def begin(self) -> None:
        """Cut the file to the bytes to keep."""
        if self._file >= 0:
            os.ftruncate(self._file, self._keep)

    def write(self, at: int, text: bytes) -> None:
        """Write `text` at the byte offset `at`. The operating system has the text when this returns."""
        if self._file >= 0 and text:
            os.lseek(self._file, at, os.SEEK_SET)
            while text:
                text = text[os.write(self._file, text):]

    def sync(self) -> None:
        """Flush the log to the disk."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file. May be called again."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _ends_a_line(path: str | os.PathLike, at: int) -> bool:
    with open(path, "rb") as file:
        file.seek(at - 1)
        return file.read(1) == b"\n"
