"""The progress bar of training: shown with rich, if it is installed and standard error is a terminal."""
from __future__ import annotations

import contextlib
import sys
from typing import Any, Callable, Iterator


@contextlib.contextmanager
def progress_bar(steps: int, done: int, label: str, enabled: bool) -> Iterator[Callable[[int, str], None]]:
    """Shows a bar while the block runs. Gives a function that moves it to a step and shows a line of figures beside it.

    steps: the number at which it is full; done: the steps made before; label: the text in front; enabled: False never
    shows it."""
    Bar: Any = None
    if enabled and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar
    if Bar is None:
        yield lambda step, figures: None
        return
    with Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
             TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=steps, completed=done, figures="")
        yield lambda step, figures: bar.update(task, completed=step, figures=figures)
