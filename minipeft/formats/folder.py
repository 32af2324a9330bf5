"""Directories of other libraries: they are written whole, and read only where the files themselves are there.

    no_pointer(path)                    a pointer of Git LFS stands for a file that was not fetched
    with whole("folder") as beside:     the files are written into a folder beside it, which takes its place at the end
"""
from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Iterator

from minipeft.atomic import missing_folder

LFS = b"version https://git-lfs.github.com/spec/"


def no_pointer(path: Path) -> None:
    """Raises ValueError for a pointer of Git LFS, which stands for a file that was not fetched."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")


def pickled(pickle: str, target: str) -> str:
    """Why the file `pickle` is not opened, and how to make the file `target` of it."""
    return (f"{pickle} is a pickle, which can run code when it is opened; minipeft reads safetensors alone. If you "
            f"trust it, convert it once, in Python with torch: safetensors.torch.save_file({{k: v.clone() for k, v in "
            f"torch.load({pickle!r}, weights_only=True).items()}}, {target!r})")


def default_name(directory: Path) -> str:
    """A name for an attachment that comes from `directory`: the directory's, with '_' for other characters."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", directory.absolute().name) or "adapter"


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside `path`, which takes its place when the block ends, and is gone where the block raises. Raises
    ValueError for a `path` that is not an empty folder, and FileNotFoundError where the folder around it is missing."""
    directory = Path(path)
    if directory.is_symlink():  # which stays, and its folder is filled
        directory = directory.resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is not an empty folder; expected a new or an empty one")
    parent = directory.absolute().parent
    if not parent.is_dir():
        raise missing_folder(path, parent)
    beside = parent / f".{directory.name}-{os.getpid()}-{os.urandom(4).hex()}.tmp"
    beside.mkdir()
    try:
        yield beside
        os.replace(beside, directory)  # which replaces an empty folder, too
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
