"""Directories of PEFT's with something changed."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Mapping

from minipeft.files import read_tensors, write_tensors
from tests.methods.golden import FIXTURES

GONE = object()  # as a field: it is taken out
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edited(folder: str, target: Path, fields: Mapping[str, Any] = {},
           tensors: Callable[[dict], Mapping[str, Any]] = dict, dtype: str | None = None) -> Path:
    """A copy, in the new folder `target`, of a folder below tests/fixtures, with these fields, and with the tensors
    that `tensors` makes of its own {key: array}. dtype: how they are stored."""
    source = FIXTURES / folder
    config = {**json.loads((source / CONFIG).read_text()), **fields}
    target.mkdir()
    (target / CONFIG).write_text(json.dumps({field: v for field, v in config.items() if v is not GONE}))
    write_tensors(target / WEIGHTS, tensors(read_tensors(source / WEIGHTS)[0]), {"format": "pt"}, dtype, signed=False)
    return target
