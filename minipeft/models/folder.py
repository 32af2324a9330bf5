"""A pretrained model is a folder: config.json says what it is, model.safetensors holds its weights."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Mapping

from minipeft.backend import Array
from minipeft.files import write_atomic, write_tensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def existing_folder(path: str | os.PathLike) -> Path:
    """The folder as a Path. Raises FileNotFoundError, saying what is expected, if it holds no config.json."""
    directory = Path(path)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}: expected a folder with {CONFIG} and {WEIGHTS}")
    return directory


def write_folder(path: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, Array],
                 metadata: Mapping[str, str], dtype: str | None) -> None:
    """Write both files, each atomically, the folder made if it is missing. dtype: as for `files.write_tensors`."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, tensors, metadata, dtype)
    write_atomic(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
