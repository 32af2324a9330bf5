"""Folders of other libraries, with a configuration in JSON beside a file of tensors. All of it is untrusted.

    adapter_config.json                         what the method is and where
    adapter_model.safetensors, or               its arrays, {key: array}; what the keys are called differs between
    adapter.safetensors                         libraries, and so does the name of this file (`Names`)

A folder is written whole or not at all: the files go into a folder beside it, which takes its place at the end.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy

from minipeft.atomic import missing_folder
from minipeft.files import read_json, read_tensors, write_atomic, write_tensors

LFS = b"version https://git-lfs.github.com/spec/"
CONFIG = "adapter_config.json"
LIMIT = 2 ** 20  # bytes of a configuration


@dataclasses.dataclass(frozen=True)
class Names:
    """How a library calls the file of the tensors: weights, and the pickle that it writes in place of it."""

    weights: str
    pickle: str

    def read_config(self, directory: Path) -> dict[str, Any]:
        """The fields of adapter_config.json in `directory`. Raises FileNotFoundError without one, and ValueError for a
        file that is no JSON object or a pointer of Git LFS."""
        path = directory / CONFIG
        if not path.exists():
            raise FileNotFoundError(f"{directory} holds no {CONFIG}: expected a folder with {CONFIG} and "
                                    f"{self.weights}")
        no_pointer(path)
        return read_json(path, LIMIT)

    def weights_of(self, directory: Path) -> Path:
        """The file of the tensors in `directory`. Raises ValueError for a pickle alone and for a pointer of Git LFS,
        FileNotFoundError where there is none."""
        path = directory / self.weights
        if not path.exists() and (directory / self.pickle).exists():
            raise ValueError(f"{directory}: {pickled(self.pickle, self.weights)}")
        if not path.exists():
            raise FileNotFoundError(f"{directory} holds no {self.weights}; expected it beside {CONFIG}")
        no_pointer(path)
        return path

    def write(self, path: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, numpy.ndarray],
              dtype: str | None) -> None:
        """Write both files into the new or empty folder `path`. config: the fields; tensors: {key: array}; dtype: as in
        `files.write_tensors`. Raises as `whole` and `files.write_tensors` do."""
        with whole(path) as beside:
            write_tensors(beside / self.weights, tensors, {"format": "pt"}, dtype)
            write_atomic(beside / CONFIG, (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode())


def read_finite(file: Path, renamed: Mapping[str, str]) -> dict[str, numpy.ndarray]:
    """{key: array} of a file of tensors. renamed: {key in the file: the key to use}. Raises ValueError for numbers that
    are not finite, and as `files.read_tensors` does."""
    found = {renamed[key]: array for key, array in read_tensors(file)[0].items()}
    for key, array in found.items():
        if not numpy.isfinite(array).all():
            raise ValueError(f"{key} holds NaN or infinity; expected finite numbers")
    return found


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
