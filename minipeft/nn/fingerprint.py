"""Which base is this? A hash over sorted names, shapes, and values widened to float64, so that a model loaded in
float32 and in float64 from the same file are the same base."""
from __future__ import annotations

import hashlib
from typing import Mapping

import numpy

from minipeft.backend import Array, to_host

_CHUNK = 1 << 20  # numbers hashed at a time, so that no second copy of the model is made


def fingerprint(arrays: Mapping[str, Array]) -> str:
    """SHA-256, in hexadecimal, of {name: array}."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = to_host(arrays[name])
        digest.update(f"{name}\0{','.join(map(str, array.shape))}\0".encode())
        flat = array.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            digest.update(numpy.ascontiguousarray(flat[start:start + _CHUNK], dtype="<f8").tobytes())
    return digest.hexdigest()
