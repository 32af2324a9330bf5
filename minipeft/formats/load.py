"""`minipeft.load`: an adapter file of ours, or a directory of another library's."""
from __future__ import annotations

import os
from typing import Any

from minipeft.attaching import load as ours
from minipeft.formats import peft
from minipeft.nn.module import Model


def load(model: Model, path: Any, force: bool = False, name: Any = None) -> Any:
    """The attachment in the adapter file or directory `path`, attached to `model` and plugged."""
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        return peft.load(model, path, name)
    return ours.load(model, path, force, name)
