"""The log of a run: a JSONL file, one line per step and per evaluation, cut back to the checkpoint on resume.

A checkpoint knows how long the log was when it was written. What a killed run wrote after that is dropped and written
again, so that the log of a resumed run is that of a run which was never stopped, byte for byte. (If the resumed run is
a longer one, the evaluation after the old last step stays in it.)

A line is written at the place in the file that the run has for it, so writing it once more changes nothing.
"""
from __future__ import annotations

import json
import os
from typing import Any

from minipeft.atomic import check_regular


def line(**fields: Any) -> bytes:
    """One line."""
    return (json.dumps(fields) + "\n").encode()


class Log:
    """Context manager. path None: a log that goes nowhere. Opening changes nothing in an existing file."""

    def __init__(self, path: str | os.PathLike | None, keep: int = 0):
        """keep: bytes that a checkpoint vouches for. Raises ValueError for a file that has fewer, or is missing, for
        one whose lines end elsewhere, and for what is no regular file."""
        self._keep, self._file = keep, -1
        if path is None:
            return
        size = os.stat(path).st_size if os.path.exists(path) else None
        if keep and (size is None or size < keep):
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{path}: the log {found}, the checkpoint was written when it had {keep}: put it "
                             f"back, or start afresh with resume=False")
        if size is not None:
            check_regular(path, os.stat(path).st_mode)
        if keep and not _ends_a_line(path, keep):
            raise ValueError(f"{path}: no line of the log ends at byte {keep}, where the checkpoint says that it ended"
                             f", so it is another log: put the old one back, or start afresh with resume=False")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0),
                             0o666)

    def begin(self) -> None:
        """Drop everything but the bytes to keep."""
        if self._file >= 0:
            os.ftruncate(self._file, self._keep)

    def write(self, at: int, text: bytes) -> None:
        """Write at a place in the file; the text is with the operating system when this returns."""
        if self._file >= 0 and text:
            os.lseek(self._file, at, os.SEEK_SET)
            while text:
                text = text[os.write(self._file, text):]

    def sync(self) -> None:
        """Flush to the disk."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        """May be called again."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _ends_a_line(path: str | os.PathLike, at: int) -> bool:
    with open(path, "rb") as file:
        file.seek(at - 1)
        return file.read(1) == b"\n"
