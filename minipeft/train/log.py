"""The log of a run: a JSONL file, one line per step and per evaluation, cut back to the checkpoint on resume.

A checkpoint knows how long the log was when it was written. What a killed run wrote after that is dropped and written
again, so that the log of a resumed run is that of a run which was never stopped, byte for byte. (If the resumed run is
a longer one, the evaluation after the old last step stays in it.)
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """Context manager. path None: a log that goes nowhere. Opening changes nothing in an existing file."""

    def __init__(self, path: str | os.PathLike | None, keep: int = 0):
        """keep: bytes that a checkpoint vouches for. Raises ValueError for a file that has fewer, or is missing."""
        if path is not None and keep:
            size = Path(path).stat().st_size if Path(path).exists() else None
            if size is None or size < keep:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{path}: the log {found}, the checkpoint was written when it had {keep}: put it "
                                 f"back, or start afresh with resume=False")
        self._keep, self._file = keep, None if path is None else open(path, "ab")
        if self._file is not None:
            self._file.seek(keep)  # what is behind does not count, even before `begin` drops it

    def begin(self) -> None:
        """Drop everything but the bytes to keep."""
        if self._file is not None:
            self._file.truncate(self._keep)

    def write(self, **line: Any) -> None:
        """Append one line; it is with the operating system when this returns."""
        if self._file is not None:
            self._file.write((json.dumps(line) + "\n").encode())
            self._file.flush()

    def sync(self) -> int:
        """Flush to the disk; returns the length in bytes, for a checkpoint to remember."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
