"""Whether the output files of a run can be written: checked before it starts, since a run takes minutes."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path


def file_trouble(path: str | os.PathLike) -> str:
    """Why no file can be written at `path`, in words; "" if one can."""
    path = Path(path)
    try:
        if path.is_dir():
            return "it is a folder"
        if _there(path) and not path.is_file():
            return "it is not a regular file"
        return _trouble(path.parent)
    except OSError as error:  # a name that the file system does not accept
        return error.strerror or str(error)


def folder_trouble(path: str | os.PathLike) -> str:
    """Why no file can be written into the folder `path`, which need not exist yet, in words; "" if one can."""
    path = Path(path)
    try:
        if _there(path) and not path.is_dir():
            return "it is not a folder"
        return _trouble(next(above for above in (path, *path.absolute().parents) if _there(above)))
    except OSError as error:
        return error.strerror or str(error)


def _there(path: Path) -> bool:
    """os.path.lexists, except that it raises OSError for a name that no file can have."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _trouble(folder: Path) -> str:
    if not folder.exists():
        return f"there is no such folder: {folder}"
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
