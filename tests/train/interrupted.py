"""KeyboardInterrupt at a line of our choice, as Ctrl-C might raise it."""
from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any, Callable

ROOT = Path(__file__).parent.parent.parent


class InterruptedAt:
    """Context manager: the n-th time that a line of a file below `folder` (a part of the repository, or several) is
    about to be run, `error` is raised there, once. lines: how many came; where: the line, raised: whether it came."""

    def __init__(self, n: int, *folders: str, error: type[BaseException] = KeyboardInterrupt):
        self.n, self.error, self.lines, self.raised, self.where = n, error, 0, False, ""
        self._folders = tuple(str(ROOT / folder) for folder in folders)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Callable | None:
        return self._line if frame.f_code.co_filename.startswith(self._folders) and not self.raised else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Callable | None:
        if event == "line" and not self.raised:
            self.lines += 1
            if self.lines == self.n:
                self.raised, self.where = True, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self.error
        return None if self.raised else self._line

    def __enter__(self) -> "InterruptedAt":
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)
