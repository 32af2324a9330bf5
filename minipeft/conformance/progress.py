"""A line that says what is being run, rewritten in place on a terminal."""
from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Takes the messages of a run; shows the current one at most ten times a second."""

    def __init__(self, shown: bool):
        self.shown, self.last = shown, 0.0

    def __enter__(self) -> "Progress":
        return self

    def take(self, message: dict[str, Any]) -> None:
        if self.shown and "now" in message and time.monotonic() - self.last > 0.1:
            self.last = time.monotonic()
            sys.stderr.write("\r\x1b[2K" + " ".join(word or "looking into failures" for word in message["now"])[:78])
            sys.stderr.flush()

    def __exit__(self, *_: Any) -> None:
        if self.shown:
            sys.stderr.write("\r\x1b[2K")
