"""`minipeft.load`: an adapter file of ours, or a directory of another library's."""
from __future__ import annotations

import os
from typing import Any

from minipeft.attaching import load as ours
from minipeft.formats import peft
from minipeft.nn.module import Model


def load(model: Model, path: Any, force: bool = False, name: Any = None, as_peft: bool = False) -> Any:
    """The attachment in the adapter file or directory `path`, attached to `model` and plugged.

    force: of a file of ours, as in `attaching.load.load`. as_peft: of a directory of PEFT's, as in
    `formats.peft.load`."""
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        return peft.load(model, path, name, as_peft)
    return ours.load(model, path, force, name)
