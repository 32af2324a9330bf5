"""Which base is this? A hash over names in sorted order, shapes, and values widened to float64. So a model loaded in
float32 and one loaded in float64 from the same file are the same base, if the file holds at most float32."""
from __future__ import annotations

from typing import Iterable, Iterator, Mapping

import numpy

from minipeft.backend import Array, to_host

_CHUNK = 1 << 20  # numbers hashed at a time, so that no second copy of the model is made


def fingerprint(arrays: Mapping[str, Array]) -> str:
    """SHA-256, in hexadecimal, of arrays {name: array}."""
    return sha256(_bytes_of(arrays))


def sha256(parts: Iterable[bytes]) -> str:
    """SHA-256, in hexadecimal, of the concatenated `parts`."""
    import hashlib  # here, because it loads OpenSSL, which an import of minipeft need not wait for
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _bytes_of(arrays: Mapping[str, Array]) -> Iterator[bytes]:
    for name in sorted(arrays):
        array = to_host(arrays[name])
        yield f"{name}\0{','.join(map(str, array.shape))}\0".encode()
        flat = array.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            yield numpy.ascontiguousarray(flat[start:start + _CHUNK], dtype="<f8").tobytes()
