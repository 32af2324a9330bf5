"""How the script of a failure imports the plug-in, from whatever folder it is run in.

    import os, sys; sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..")); import mine as plugin

The folder is the one in which the module was found. It is written relative to the script, so that both may move
together; if they have no folder in common, it is absolute. A name that `import` does not accept ("my-plugin") is
imported by `importlib`.
"""
from __future__ import annotations

import keyword
import os
import sys
from pathlib import Path
from typing import Any


def name_of(plugin: Any) -> str | None:
    """The dotted name by which another process can import `plugin`; None if it is not a module, or a module that was
    not imported under its name."""
    name = getattr(plugin, "__name__", None)
    is_module = isinstance(plugin, type(sys)) and isinstance(name, str) and sys.modules.get(name) is plugin
    return name if is_module and name != "__main__" else None


def imports(name: str, folder: Path) -> str:
    """The statements, in one line, by which a script in `folder` imports the module `name` as `plugin`."""
    at = _from(folder.resolve(), found_in(name))
    where = f"os.path.join(os.path.dirname(__file__), {at!r})" if not os.path.isabs(at) else repr(at)
    parts = name.split(".")
    if all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        return f"import os, sys; sys.path.insert(0, {where}); import {name} as plugin"
    return f"import importlib, os, sys; sys.path.insert(0, {where}); plugin = importlib.import_module({name!r})"


def found_in(name: str) -> Path:
    """The folder from which the module `name` was imported; the working folder if it has no file."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return Path.cwd()
    path, parts = Path(file).resolve(), name.split(".")
    if path.stem == "__init__":
        path = path.parent
    above = list(path.parents)
    return above[len(parts) - 1] if len(parts) <= len(above) else path.parent


def _from(folder: Path, root: Path) -> str:
    """`root` relative to `folder`; absolute if they share only the topmost folder."""
    try:
        shared = Path(os.path.commonpath([folder, root]))
    except ValueError:  # two drives
        return str(root)
    return str(root) if shared == Path(shared.anchor) else Path(os.path.relpath(root, folder)).as_posix()
