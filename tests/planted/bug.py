"""What a planted bug is, and how it is planted. The bugs themselves are in the lists beside this file."""
from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Bug:
    """what, in words; file of the package; old text -> new text; the test that must fail."""

    what: str
    file: str
    old: str
    new: str
    test: str


def plant(package: Path, bug: Bug) -> None:
    """Edit a copy of the package. Raises ValueError unless the old text is there exactly once."""
    path = package / bug.file
    text = path.read_text("utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.what}: {bug.old!r} is {text.count(bug.old)} times in {bug.file}; expected once")
    path.write_text(text.replace(bug.old, bug.new), "utf-8")
