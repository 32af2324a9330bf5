"""Adapter files as an attacker writes them: altered, and signed again."""
from __future__ import annotations

from typing import Any, Mapping

from minipeft.files import write_tensors
from minipeft.attaching.adapter_file import SIGNED, signature


def write_signed(path: Any, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """The file with a signature that fits its texts, if they are there to be signed."""
    if all(isinstance(metadata.get(key), str) for key in SIGNED):
        metadata = {**metadata, "signature": signature(metadata)}
    write_tensors(path, tensors, metadata)
