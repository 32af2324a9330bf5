"""The only reader and writer of safetensors files: bounded reads, atomic writes, half precision widened and rounded.

    8 bytes    n, little-endian
    n bytes    JSON {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, .., "__metadata__": {..}}
    the rest   little-endian data; the offsets count from its start

Files are untrusted. Only regular files are opened, every size is checked against the file's own length before anything
is allocated, and nothing is unpickled. float16 and bfloat16 are storage formats. They are widened to float32 on load,
which is exact, and rounded once, to nearest even, on save. (The safetensors package does the writing. Its NumPy
interface does not know bfloat16, so raw bytes are read here.)

The bytes of a file written here depend only on the arguments. Its metadata carries a digest of its tensors (`DIGEST`),
which is checked when it is read. Files of other libraries have no digest and are read without this check.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
from typing import Any, BinaryIO, Container, Iterator, Mapping

import numpy
import safetensors

from minipeft.atomic import check_regular, write_atomic
from minipeft.backend import Array, to_host
from minipeft.checks import shown

DIGEST = "tensors_sha256"  # SHA-256 over all tensors by sorted name: [name, dtype, shape] as a line of JSON, then bytes
LIMIT = 8 * 2 ** 20        # bytes of JSON, in a header or a file; parsed, they take 50 times as much memory
_BF16 = "bfloat16"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": _BF16, "I64": "int64", "I32": "int32",
           "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
           "BOOL": "bool"}
STORAGE = ("float64", "float32", "float16", _BF16)


def read_tensors(path: str | os.PathLike, *, signed: bool = False, raw: Container[str] = ()
                 ) -> tuple[dict[str, numpy.ndarray], dict[str, str]]:
    """({name: array}, metadata) of the safetensors file `path`. float16 and bfloat16 become float32.

    signed: whether it must hold a digest, as files written here do by default. raw: names of tensors that come as their
    bytes, uint8 [n]. Raises ValueError, naming the file and the fault, if it is not a regular file or is damaged."""
    with _opened(path) as file:
        start, spans, metadata = _header(file, path)
        said = metadata.pop(DIGEST, None)
        if signed and said is None:
            raise ValueError(f"{path}: damaged: {DIGEST}, the digest of its tensors, is missing from its metadata")
        digest = None if said is None else _sha256()
        found = {}
        for name in sorted(spans):
            begin, _, stored, shape = spans[name]
            flat = _numbers(file, start + begin, stored, math.prod(shape), path)
            if digest is not None:
                _add(digest, name, stored, shape, flat)
            found[name] = flat.view("uint8") if name in raw else _widened(flat, stored).reshape(shape)
        if digest is not None and digest.hexdigest() != said:
            raise ValueError(f"{path}: damaged: its tensors are not those that were written (their SHA-256 is "
                             f"{digest.hexdigest()}, the file says {shown(said)})")
        return {name: found[name] for name in spans}, metadata


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The string map of a safetensors file. Its header is checked, its tensors not read. Raises OSError, ValueError."""
    with _opened(path) as file:
        metadata = _header(file, path)[2]
    metadata.pop(DIGEST, None)
    return metadata


def read_dtypes(path: str | os.PathLike) -> dict[str, str]:
    """{name: stored dtype, such as "bfloat16"} of a safetensors file; read and checked as in `read_metadata`."""
    with _opened(path) as file:
        return {name: stored for name, (_, _, stored, _) in _header(file, path)[1].items()}


def read_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a safetensors file; read and checked as in `read_metadata`."""
    with _opened(path) as file:
        return {name: shape for name, (_, _, _, shape) in _header(file, path)[1].items()}


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file, open for reading; a symbolic link is followed. Raises ValueError for a folder, and for a FIFO, a device
    or a socket, whose opening may never end."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"the path of a file is {shown(path)}; expected a string or a Path")
    if not os.path.exists(path) and os.fspath(path).startswith("~"):
        raise FileNotFoundError(f"{path}: there is no such file ('~' is not expanded: pass Path(...).expanduser())")
    check_regular(path, os.stat(path).st_mode)  # before it is opened, which can already change a device
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            check_regular(path, os.fstat(file.fileno()).st_mode)
            yield file
    except OSError as error:  # the error of a read does not name the file
        raise error if error.filename else OSError(error.errno, error.strerror, os.fspath(path)) from None


def _header(file: BinaryIO, path: Any) -> tuple[int, dict[str, tuple], dict[str, str]]:
    """The offset of the data, {name: (begin, end, dtype, shape)}, and the metadata."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError(f"{path}: {size} bytes; a safetensors file has at least 8")
    n = int.from_bytes(file.read(8), "little")
    if n > min(size - 8, LIMIT):
        raise ValueError(f"{path}: the header claims {n} bytes, but {size - 8} follow (and at most {LIMIT} are read): "
                         f"truncated, or not a safetensors file")
    header = json_object(f"{path}: the header", file.read(n))
    metadata = header.pop("__metadata__", {})
    return 8 + n, _checked(header, metadata, size - 8 - n, path), metadata


def _checked(header: dict[str, Any], metadata: Any, room: int, path: Any) -> dict[str, tuple]:
    """{name: (begin, end, dtype, shape)}. Raises ValueError unless the tensors lie end to end and fill the data."""
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: __metadata__ is not a map of strings")
    spans = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{path}: {shown(name)} needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{path}: {shown(name)} has dtype {shown(dtype)}; expected one of {', '.join(_DTYPES)}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 32 \
                or math.prod(n or 1 for n in shape) >= 2 ** 59:
            raise ValueError(f"{path}: {shown(name)} has shape {shown(shape)} and offsets {shown(offsets)}; expected "
                             f"sizes >= 0 that an array can have")
        begin, end = offsets
        wanted = math.prod(shape) * _raw(_DTYPES[dtype]).itemsize
        if end - begin != wanted or end > room:
            raise ValueError(f"{path}: {shown(name)}, {dtype} {shown(shape)}, takes {wanted} bytes; its offsets "
                             f"{offsets} give {end - begin}, and the file holds {room} bytes of data")
        spans[name] = (begin, end, _DTYPES[dtype], tuple(shape))
    reached = 0
    for begin, end, *_ in sorted(spans.values(), key=lambda span: span[:2]):
        if begin != reached:
            raise ValueError(f"{path}: a tensor begins at byte {begin} of the data; expected byte {reached}")
        reached = end
    if reached != room:
        raise ValueError(f"{path}: the tensors end at byte {reached}, but there are {room} bytes of data")
    return spans


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2 ** 63 for v in value)


def _raw(stored: str) -> numpy.dtype:
    """The dtype of the numbers in the file: those of bfloat16 are read as uint16, of bool as uint8."""
    return numpy.dtype({_BF16: "uint16", "bool": "uint8"}.get(stored, stored)).newbyteorder("<")


def _numbers(file: BinaryIO, at: int, stored: str, count: int, path: Any) -> numpy.ndarray:
    file.seek(at)
    flat = numpy.fromfile(file, _raw(stored), count=count)
    if flat.size != count:
        raise ValueError(f"{path}: became shorter while it was read")
    return flat


def _widened(flat: numpy.ndarray, stored: str) -> numpy.ndarray:
    if stored == _BF16:
        return widen_bf16(flat)
    if stored == "bool":
        return flat != 0
    return flat.astype(numpy.float32 if stored == "float16" else stored, copy=False)


def _sha256() -> Any:
    import hashlib  # here, because it loads OpenSSL, which would slow down the import of minipeft
    return hashlib.sha256()


def _add(digest: Any, name: str, stored: str, shape: tuple, array: numpy.ndarray) -> None:
    """Add one tensor to the digest. array: its numbers as stored in the file, C-contiguous; nothing is copied."""
    digest.update((json.dumps([name, stored, list(shape)]) + "\n").encode())
    digest.update(array.reshape(-1).view(numpy.uint8))


def widen_bf16(bits: numpy.ndarray) -> numpy.ndarray:
    """bfloat16, given as uint16 bits [...], to float32. A bfloat16 is the upper half of a float32: this is exact."""
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def round_bf16(x: numpy.ndarray) -> numpy.ndarray:
    """x [...], float32 or float64, to bfloat16 as uint16: one rounding to nearest even. Numbers that are too large
    become infinity. float64 goes through float32 rounded *to odd* (toward zero, then the last bit set if that was
    inexact), so that the second rounding cannot see a false tie."""
    with numpy.errstate(over="ignore", invalid="ignore"):
        narrow = x.astype(numpy.float32)
    if x.dtype == numpy.float64:
        toward_zero = numpy.where(abs(narrow) > abs(x), numpy.nextafter(narrow, numpy.float32(0)), narrow)
        inexact = (toward_zero != x) & numpy.isfinite(x)
        narrow = (toward_zero.view(numpy.uint32) | inexact).view(numpy.float32)
    bits = numpy.asarray(narrow, order="C").view(numpy.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(numpy.uint16)
    return numpy.where(numpy.isnan(x), numpy.uint16(0x7FC0), rounded)


def as_stored(name: str, array: Array, dtype: str) -> numpy.ndarray:
    """`array` [...] as it reads back from a file that stores it in `dtype`; an error calls it `name`. Raises ValueError
    as `write_tensors` does."""
    stored, raw = _stored(name, to_host(array), dtype)
    return _widened(raw.reshape(-1), stored).reshape(raw.shape)


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None,
                  dtype: str | None = None, *, signed: bool = True, exact: Container[str] = ()) -> None:
    """Write a safetensors file atomically: after a crash at any moment there is the old file or the new one, whole.

    dtype: how floating-point tensors are stored ("float64", "float32", "float16", "bfloat16"), rounded once; None
    stores them as they are. exact: names of those that always are. signed: whether the metadata gets the digest.
    Raises ValueError, before the file system is touched, if a finite number would overflow to infinity, a dtype cannot
    be stored, or names and metadata are too long to be read again; also raises what `write_atomic` raises."""
    if "__metadata__" in tensors:
        raise ValueError("no tensor can be called __metadata__: in a safetensors file that is the string map")
    if DIGEST in (said := dict(metadata or {})):
        raise ValueError(f"metadata has an entry {DIGEST}, which is computed here: leave it out")
    stored = {name: _stored(name, to_host(array), None if name in exact else dtype) for name, array in tensors.items()}
    if signed:
        digest = _sha256()
        for name in sorted(stored):
            kind, array = stored[name]
            _add(digest, name, kind, array.shape, array)
        said[DIGEST] = digest.hexdigest()
    specs = {name: safetensors.TensorSpec(dtype=kind, shape=list(array.shape), data_ptr=array.ctypes.data,
                                          data_len=array.nbytes) for name, (kind, array) in stored.items()}
    written = memoryview(safetensors.serialize(specs, said or None))
    n = int.from_bytes(written[:8], "little")
    header = _in_order(bytes(written[8:8 + n]))
    if len(header) > LIMIT:
        raise ValueError(f"{path}: names and metadata take {len(header)} bytes; at most {LIMIT} would be read again")
    write_atomic(path, len(header).to_bytes(8, "little") + header, written[8 + n:])


def _in_order(header: bytes) -> bytes:
    """The header with its metadata sorted, because the package writes them in another order in every process."""
    entries = json.loads(header)
    if "__metadata__" in entries:
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text.ljust(-(-len(text) // 8) * 8)


def _stored(name: str, array: numpy.ndarray, dtype: str | None) -> tuple[str, numpy.ndarray]:
    """The name of the stored dtype, and the array as it is stored."""
    if dtype is not None and dtype not in STORAGE:
        raise ValueError(f"dtype is {shown(dtype)}; expected one of {', '.join(STORAGE)}")
    if array.dtype.name not in _DTYPES.values():
        raise ValueError(f"{name} has dtype {array.dtype}, which a safetensors file cannot hold")
    stored = array.dtype.name
    if dtype is not None and numpy.issubdtype(array.dtype, numpy.floating):
        with numpy.errstate(over="ignore", invalid="ignore"):
            rounded = round_bf16(array) if dtype == _BF16 else array.astype(dtype)
        back = widen_bf16(rounded) if dtype == _BF16 else rounded
        if not numpy.array_equal(numpy.isinf(back), numpy.isinf(array)):
            raise ValueError(f"{name} reaches {abs(array[numpy.isfinite(array)]).max():.6g}, "
                             f"which overflows to infinity in {dtype}; store it as "
                             f"{'float64' if dtype == 'float32' else 'float32'}")
        array, stored = rounded, dtype
    return stored, numpy.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def read_json(path: str | os.PathLike, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file for anything else, for an object in which a name
    appears twice, and for a file of more than `limit` bytes."""
    with _opened(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"{path}: more than {limit} bytes; such a file is not read")
    return json_object(str(path), raw)


def json_object(what: str, text: bytes, finite: bool = False) -> dict[str, Any]:
    """The JSON object in `text`, which an error calls `what`. finite: whether NaN and Infinity are refused, too. Raises
    ValueError for anything else, and for an object, at any depth, in which a name appears twice: json would keep the
    last of the two entries, another reader perhaps the first."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates,
                           parse_constant=_no_number if finite else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a JSON {type(value).__name__}; expected an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _no_number(literal: str) -> Any:
    raise ValueError(f"{literal} is not a finite number")
