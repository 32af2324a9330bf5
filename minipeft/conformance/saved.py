"""Attachments of minipeft as bytes, which the kit's protocol uses; the library itself reads and writes files."""
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from minipeft.attaching.attachment import Attachment
from minipeft.attaching.load import load


def bytes_of(attachment: Attachment) -> bytes:
    """The bytes of the adapter file of `attachment`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        attachment.save(path)
        return path.read_bytes()


def loaded(model: Any, blob: bytes) -> Attachment:
    """The attachment in the adapter file `blob`, loaded into `model` beside the attachments that it has. They stay as
    they are if the file does not fit. Raises the errors of `load`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        path.write_bytes(blob)
        taken = len(model.attachments)
        while f"loaded-{taken}" in model.attachments:
            taken += 1
        return load(model, path, name=f"loaded-{taken}")
