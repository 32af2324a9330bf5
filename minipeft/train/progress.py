"""The progress bar of training: shown with rich, if it is installed and standard error is a terminal."""
from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A progress bar; a context manager. `update` moves it to a step and shows a line of figures beside it.

    steps: the number at which it is full; done: the steps made before; label: the text in front; enabled: False never
    shows it."""

    def __init__(self, steps: int, done: int, label: str, enabled: bool):
        self.steps, self.done, self.label, self.enabled = steps, done, label, enabled and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self.enabled:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            self._bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.steps, completed=self.done, figures="")
        return self

    def update(self, step: int, figures: str) -> None:
        """Show that `step` optimizer steps are done, and the text `figures`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
