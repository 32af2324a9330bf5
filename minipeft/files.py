"""The only reader and writer of safetensors: bounded, atomic, half precision widened and rounded here.

    8 bytes    n, little-endian
    n bytes    JSON {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, .., "__metadata__": {..}}
    the rest   little-endian data; the offsets count from its start

A file is untrusted: every size is checked against the file's own length before anything is allocated, nothing is
unpickled. float16 and bfloat16 are storage formats: widened to float32 on load, which is exact, and rounded once, to
nearest even, on save. (The safetensors package does the writing; its NumPy interface does not know bfloat16, so the
reading of raw bytes is here.)
"""
from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Mapping

import numpy
import safetensors

from minipeft.backend import Array, to_host

_HEADER_LIMIT = 100_000_000  # bytes, as the format's own library has it
_BF16 = "bfloat16"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": _BF16, "I64": "int64", "I32": "int32",
           "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
           "BOOL": "bool"}
STORAGE = ("float64", "float32", "float16", _BF16)


def read_tensors(path: str | os.PathLike, dtype: str | None = None) -> tuple[dict[str, numpy.ndarray], dict[str, str]]:
    """({name: array}, metadata) of a safetensors file. float16 and bfloat16 come as float32.

    dtype: what floating-point tensors are converted to ("float32" or "float64"); None leaves the others as stored.
    Raises ValueError that names the file and what is wrong with it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file, size, path)
        metadata = header.pop("__metadata__", {})
        spans = _checked(header, metadata, size - start, path)
        return {name: _read(file, start + begin, stored, shape, dtype)
                for name, (begin, _, stored, shape) in spans.items()}, metadata


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The string map of a safetensors file; its tensors are checked but not read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file, size, path)
        metadata = header.pop("__metadata__", {})
        _checked(header, metadata, size - start, path)
        return metadata


def read_dtypes(path: str | os.PathLike) -> dict[str, str]:
    """{name: the dtype it is stored in, "bfloat16" among them} of a safetensors file; checked, its tensors not read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file, size, path)
        metadata = header.pop("__metadata__", {})
        return {name: stored for name, (_, _, stored, _) in _checked(header, metadata, size - start, path).items()}


def _header(file: Any, size: int, path: Any) -> tuple[dict[str, Any], int]:
    """The parsed JSON header, and where the data starts."""
    if size < 8:
        raise ValueError(f"{path}: {size} bytes; a safetensors file has at least 8")
    n = int.from_bytes(file.read(8), "little")
    if n > min(size - 8, _HEADER_LIMIT):
        raise ValueError(f"{path}: the header claims {n} bytes, but {size - 8} follow "
                         f"(and at most {_HEADER_LIMIT} are read): truncated, or not a safetensors file")
    try:
        header = json.loads(file.read(n).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is a JSON {type(header).__name__}; expected an object")
    return header, 8 + n


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, at any depth: json would keep the last of two entries of one name, another reader the first."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _checked(header: dict[str, Any], metadata: Any, room: int, path: Any) -> dict[str, tuple]:
    """{name: (begin, end, dtype, shape)}; the tensors lie end to end and fill the data exactly."""
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: __metadata__ is not a map of strings")
    spans = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{path}: {name!r} needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{path}: {name!r} has dtype {dtype!r}; known are {', '.join(_DTYPES)}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 32 \
                or math.prod(n or 1 for n in shape) >= 2 ** 59:
            raise ValueError(f"{path}: {name!r} has shape {shape!r} and offsets {offsets!r}; expected sizes >= 0 "
                             f"that an array can have")
        begin, end = offsets
        wanted = math.prod(shape) * _itemsize(_DTYPES[dtype])
        if end - begin != wanted or end > room:
            raise ValueError(f"{path}: {name!r}, {dtype} {shape}, takes {wanted} bytes; its offsets {offsets} give "
                             f"{end - begin}, and the file holds {room} bytes of data")
        spans[name] = (begin, end, _DTYPES[dtype], tuple(shape))
    reached = 0
    for begin, end, *_ in sorted(spans.values(), key=lambda span: span[:2]):
        if begin != reached:
            raise ValueError(f"{path}: a tensor begins at byte {begin} of the data, where {reached} is due")
        reached = end
    if reached != room:
        raise ValueError(f"{path}: the tensors end at byte {reached} of {room} bytes of data")
    return spans


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2 ** 63 for v in value)


def _itemsize(dtype: str) -> int:
    return 2 if dtype == _BF16 else numpy.dtype(dtype).itemsize


def _read(file: Any, at: int, stored: str, shape: tuple, dtype: str | None) -> numpy.ndarray:
    file.seek(at)
    raw = numpy.dtype("<u2" if stored == _BF16 else "u1" if stored == "bool" else numpy.dtype(stored).newbyteorder("<"))
    flat = numpy.fromfile(file, raw, count=math.prod(shape))
    if stored == _BF16:
        flat = widen_bf16(flat)
    elif stored == "float16":
        flat = flat.astype(numpy.float32)
    elif stored == "bool":
        flat = flat != 0
    array = flat.reshape(shape).astype(flat.dtype.newbyteorder("="), copy=False)
    if not dtype or not numpy.issubdtype(array.dtype, numpy.floating):
        return array
    with numpy.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return array.astype(dtype, copy=False)


def widen_bf16(bits: numpy.ndarray) -> numpy.ndarray:
    """bfloat16, given as uint16, to float32: bfloat16 is the upper half of a float32, so this is exact."""
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def round_bf16(x: numpy.ndarray) -> numpy.ndarray:
    """float32 or float64 to bfloat16 as uint16, one rounding to nearest even; too large becomes infinity.

    float64 goes through float32 rounded *to odd* (toward zero, then the last bit set if that was inexact), which
    keeps the second rounding from seeing a tie that is none."""
    with numpy.errstate(over="ignore", invalid="ignore"):
        narrow = x.astype(numpy.float32)
    if x.dtype == numpy.float64:
        toward_zero = numpy.where(abs(narrow) > abs(x), numpy.nextafter(narrow, numpy.float32(0)), narrow)
        inexact = (toward_zero != x) & numpy.isfinite(x)
        narrow = (toward_zero.view(numpy.uint32) | inexact).view(numpy.float32)
    bits = numpy.asarray(narrow, order="C").view(numpy.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(numpy.uint16)
    return numpy.where(numpy.isnan(x), numpy.uint16(0x7FC0), rounded)


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None,
                  dtype: str | None = None) -> None:
    """Write a safetensors file atomically: after a crash at any moment there is the old file or the new one, whole.

    dtype: how floating-point tensors are stored ("float64", "float32", "float16", "bfloat16"), rounded once; None
    stores them as they are. Raises ValueError, before the file system is touched, if a finite number would overflow
    to infinity or a dtype cannot be stored."""
    if dtype is not None and dtype not in STORAGE:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(STORAGE)}")
    if "__metadata__" in tensors:
        raise ValueError("no tensor can be called __metadata__: in a safetensors file that is the string map")
    stored = {name: _stored(name, to_host(array), dtype) for name, array in tensors.items()}
    specs = {name: safetensors.TensorSpec(dtype=kind, shape=list(array.shape), data_ptr=array.ctypes.data,
                                          data_len=array.nbytes) for name, (kind, array) in stored.items()}
    write_atomic(path, bytes(safetensors.serialize(specs, dict(metadata) if metadata else None)))


def _stored(name: str, array: numpy.ndarray, dtype: str | None) -> tuple[str, numpy.ndarray]:
    """The dtype's name, and the array as its bytes will lie in the file."""
    if array.dtype.name not in _DTYPES.values():
        raise ValueError(f"{name} has dtype {array.dtype}, which a safetensors file cannot hold")
    stored = array.dtype.name
    if dtype is not None and numpy.issubdtype(array.dtype, numpy.floating):
        with numpy.errstate(over="ignore", invalid="ignore"):
            rounded = round_bf16(array) if dtype == _BF16 else array.astype(dtype)
        back = widen_bf16(rounded) if dtype == _BF16 else rounded
        if not numpy.array_equal(numpy.isinf(back), numpy.isinf(array)):
            raise ValueError(f"{name} reaches {abs(array[numpy.isfinite(array)]).max():.6g}, "
                             f"which overflows to infinity in {dtype}; store it as float32")
        array, stored = rounded, dtype
    return stored, numpy.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, flush it to the disk, and rename it over `path`."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def _umask() -> int:
    """The process's file mode mask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object, each name in it once. Raises ValueError that names the file for anything else."""
    try:
        value = json.loads(Path(path).read_text("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value
