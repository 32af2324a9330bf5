"""Attachments of minipeft as the bytes that the protocol wants: the library itself reads and writes files."""
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from minipeft.attaching.attachment import Attachment
from minipeft.attaching.load import load


def bytes_of(attachment: Attachment) -> bytes:
    """What the library saves."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        attachment.save(path)
        return path.read_bytes()


def loaded(model: Any, blob: bytes) -> Attachment:
    """Loaded on top of what is there, which stays as it is if the file does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        path.write_bytes(blob)
        taken = len(model.attachments)
        while f"loaded-{taken}" in model.attachments:
            taken += 1
        return load(model, path, name=f"loaded-{taken}")
