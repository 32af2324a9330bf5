"""A progress line, rewritten in place on a terminal."""
from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Shows the current method, dtype, stage and property of a run. shown: whether to show anything at all."""

    def __init__(self, shown: bool):
        self.shown, self.last = shown, 0.0

    def __enter__(self) -> "Progress":
        return self

    def take(self, message: dict[str, Any]) -> None:
        """Shows a message of the run, at most ten a second."""
        if self.shown and "now" in message and time.monotonic() - self.last > 0.1:
            self.last = time.monotonic()
            sys.stderr.write("\r\x1b[2K" + " ".join(word or "examining failures" for word in message["now"])[:78])
            sys.stderr.flush()

    def __exit__(self, *_: Any) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[2K")
