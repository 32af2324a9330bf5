"""files.py: what is written is what is read, what is bad is refused early, and a crash leaves one whole file."""
from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings, strategies as st

from minipeft import atomic, files
from minipeft.files import (DIGEST, LIMIT, read_dtypes, read_json, read_metadata, read_shapes, read_tensors, round_bf16,
                            widen_bf16, write_atomic, write_tensors)

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
          "bool"]
SHAPES = [(), (1,), (5,), (3, 4), (2, 1, 3), (0,), (4, 0, 2), (2, 3, 1, 2)]
INF, NAN = math.inf, math.nan


def bits(array: np.ndarray) -> tuple:
    """What makes two arrays the same: dtype, shape, and every byte."""
    return array.dtype.name, array.shape, array.tobytes()


def random_array(seed: int, dtype: str, shape: tuple) -> np.ndarray:
    """Any bytes at all, so NaNs, infinities and subnormals too."""
    if dtype == "bool":
        return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(raw, dtype).reshape(shape)


def put(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (an object that becomes JSON, or bytes), claiming `length` bytes of it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def names_and_contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- what is written is read

@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
           lambda name: name != "__metadata__"),
       st.tuples(st.integers(0, 2**32), st.sampled_from(DTYPES), st.sampled_from(SHAPES)), max_size=5),
       st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.text(
           st.characters(exclude_categories=["Cs"]), max_size=5), max_size=3))
def test_every_dtype_shape_name_and_metadata_come_back_bit_for_bit(tmp_path_factory, drawn, metadata):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    tensors = {name: random_array(*what) for name, what in drawn.items()}
    write_tensors(path, tensors, metadata)
    found, found_metadata = read_tensors(path)
    widened = {name: a.astype(np.float32) if a.dtype == np.float16 else a for name, a in tensors.items()}
    assert {n: bits(a) for n, a in found.items()} == {n: bits(a) for n, a in widened.items()}
    assert found_metadata == metadata == read_metadata(path)


@given(st.integers(0, 2**32), st.sampled_from(DTYPES), st.sampled_from(SHAPES))
def test_the_safetensors_package_reads_what_is_written_here(tmp_path_factory, seed, dtype, shape):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    array = random_array(seed, dtype, shape)
    write_tensors(path, {"x": array, "y": array}, {"k": "v"})
    found = safetensors.numpy.load_file(path)
    assert {n: bits(a) for n, a in found.items()} == {"x": bits(array), "y": bits(array)}
    with safetensors.safe_open(path, framework="np") as file:
        assert set(file.metadata()) == {"k", DIGEST} and file.metadata()["k"] == "v"


@given(st.integers(0, 2**32), st.sampled_from([d for d in DTYPES if d != "float16"]), st.sampled_from(SHAPES))
def test_what_the_safetensors_package_writes_is_read_here(tmp_path_factory, seed, dtype, shape):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    array = random_array(seed, dtype, shape)
    safetensors.numpy.save_file({"x": array, "z": np.arange(3)}, path, {"k": "v"})
    found, metadata = read_tensors(path)
    assert bits(found["x"]) == bits(array) and bits(found["z"]) == bits(np.arange(3)) and metadata == {"k": "v"}


def test_bfloat16_is_in_the_file_what_the_safetensors_package_calls_bf16(tmp_path):
    write_tensors(tmp_path / "a", {"x": np.array([1.0, -2.5, 3e38])}, dtype="bfloat16")
    [(name, found)] = safetensors.deserialize((tmp_path / "a").read_bytes())
    assert (name, found["dtype"], found["shape"]) == ("x", "BF16", [3])
    assert np.frombuffer(found["data"], "<u2").tolist() == [0x3F80, 0xC020, 0x7F62]


def test_views_and_big_endian_arrays_are_stored_by_value(tmp_path):
    x = np.arange(24.0).reshape(4, 6)
    odd = {"transposed": x.T, "strided": x[::2, ::-3], "big": x.astype(">f8"), "column": x[:, 2], "scalar": x[1, 1]}
    for dtype in (None, "bfloat16"):
        write_tensors(tmp_path / "a", odd, dtype=dtype)
        found, _ = read_tensors(tmp_path / "a")
        for name, array in odd.items():  # small integers are exact in bfloat16
            assert np.array_equal(found[name], array) and found[name].shape == np.shape(array)
            assert found[name].flags.writeable and found[name].dtype.isnative


def test_half_precision_is_widened_and_everything_else_stays_as_it_is(tmp_path):
    write_tensors(tmp_path / "a", {"h": np.ones(2, np.float16), "f": np.ones(2, np.float32), "d": np.ones(2),
                                   "i": np.ones(2, np.int8), "b": np.ones(2, bool)})
    assert {name: array.dtype.name for name, array in read_tensors(tmp_path / "a")[0].items()} == {
        "h": "float32", "f": "float32", "d": "float64", "i": "int8", "b": "bool"}


# ------------------------------------------------------------------------------------------- half precision, both ways

def test_every_float16_and_bfloat16_pattern_is_widened_exactly(tmp_path):
    patterns = np.arange(65536, dtype="<u2")
    put(tmp_path / "a", {"h": entry([65536], [0, 131072], "F16"), "b": entry([65536], [131072, 262144], "BF16")},
        patterns.tobytes() * 2)
    found, _ = read_tensors(tmp_path / "a")
    for name, digits, least in (("h", 11, -14), ("b", 8, -126)):
        width = 16 - digits  # exponent bits
        field, fraction = (patterns >> (digits - 1)) & (2**width - 1), patterns & (2**(digits - 1) - 1)
        sign = np.where(patterns >> 15, -1.0, 1.0)
        normal = np.ldexp(1 + fraction / 2.0**(digits - 1), field.astype(int) - 1 + least)
        subnormal = np.ldexp(fraction / 2.0**(digits - 1), least)
        special = field == 2**width - 1
        expected = sign * np.where(special, np.where(fraction > 0, NAN, INF), np.where(field > 0, normal, subnormal))
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected)  # float64 arithmetic on few bits: exact
        assert np.array_equal(np.signbit(found[name])[~np.isnan(expected)], sign[~np.isnan(expected)] < 0)


def nearest(x: float, digits: int, least: int, most: int) -> float:
    """x rounded once to `digits` significant bits, ties to even, in rational arithmetic; exponents least .. most."""
    if x == 0 or not math.isfinite(x):
        return x
    quantum = Fraction(2) ** (max(math.frexp(x)[1] - 1, least) - digits + 1)
    rounded = round(Fraction(x) / quantum) * quantum  # round() of a Fraction goes to even
    return math.copysign(INF if abs(rounded) >= Fraction(2) ** (most + 1) else float(rounded), x)


FORMATS = {"bfloat16": (8, -126, 127), "float16": (11, -14, 15), "float32": (24, -126, 127)}


def hard_cases(seed: int, name: str) -> np.ndarray:
    """Numbers of any size, and numbers at, just above and just below the points halfway between two of the format."""
    rng = np.random.default_rng(seed)
    digits, least, most = FORMATS[name]
    any_bits = rng.integers(0, 2**64, 40, dtype=np.uint64).view(np.float64)
    sizes = np.ldexp(rng.uniform(-2, 2, 60), rng.integers(least - digits - 3, most + 2, 60))
    exponent = rng.integers(least - digits + 1, most - digits + 1, 60)
    half = (rng.integers(0, 2**digits, 60) + 0.5) * rng.choice([-1, 1], 60)
    ties = np.ldexp(half, exponent)
    off = np.ldexp(half * (1 + rng.choice([-1, 1], 60) * 2.0 ** -rng.integers(10, 53, 60)), exponent)
    return np.concatenate([any_bits[np.isfinite(any_bits)], sizes, ties, off])


@given(st.integers(0, 2**32), st.sampled_from(sorted(FORMATS)), st.sampled_from(["float32", "float64"]))
def test_numbers_are_rounded_once_to_nearest_even(tmp_path_factory, seed, storage, source):
    path = tmp_path_factory.mktemp("files") / "a"
    with np.errstate(over="ignore"):
        x = hard_cases(seed, storage).astype(source)
    expected = np.array([nearest(float(v), *FORMATS[storage]) for v in x])
    fits = np.isinf(expected) == np.isinf(x)
    write_tensors(path, {"x": x[fits]}, dtype=storage)
    found = read_tensors(path)[0]["x"]
    np.testing.assert_array_equal(found, expected[fits])
    assert np.array_equal(np.signbit(found), np.signbit(expected[fits]))
    for value in x[~fits]:
        with pytest.raises(ValueError, match="too_large.*overflows to infinity"):
            write_tensors(path, {"too_large": np.array([value])}, dtype=storage)


@pytest.mark.parametrize("storage, x, expected", [
    ("float16", 1 + 2**-11 + 2**-40, 1 + 2**-10),        # through float32 this is the tie 1 + 2^-11, and goes to 1
    ("float16", 1 + 3 * 2**-11 - 2**-40, 1 + 2**-10),    # through float32 it goes to 1 + 2^-9
    ("bfloat16", 1 + 2**-8 + 2**-40, 1 + 2**-7),
    ("bfloat16", 1 + 3 * 2**-8 - 2**-40, 1 + 2**-7),
    ("bfloat16", -(2.0**-127 + 2.0**-134 + 2.0**-170), -(2.0**-127 + 2.0**-133)),  # subnormal
    ("bfloat16", 2.0**-134, 0.0), ("bfloat16", 2.0**-134 * (1 + 2**-50), 2.0**-133),
    ("float16", 2.0**-25, 0.0), ("float16", 2.0**-25 * (1 + 2**-50), 2.0**-24), ("float16", -1e-30, -0.0),
    ("float32", 1 + 2**-24 + 2**-50, 1 + 2**-23), ("bfloat16", -1e-300, -0.0),
])
def test_a_number_that_two_roundings_would_get_wrong_is_right(tmp_path, storage, x, expected):
    write_tensors(tmp_path / "a", {"x": np.array(x)}, dtype=storage)
    found = float(read_tensors(tmp_path / "a")[0]["x"])
    assert found == expected and math.copysign(1, found) == math.copysign(1, expected)


@pytest.mark.parametrize("storage", files.STORAGE)
@pytest.mark.parametrize("source", ["float16", "float32", "float64"])
def test_infinity_and_nan_pass_through_every_storage(tmp_path, storage, source):
    signalling = {"float16": np.uint16(0x7C01), "float32": np.uint32(0x7F800001),
                  "float64": np.uint64(0x7FF0000000000001)}[source]
    x = np.concatenate([np.array([INF, -INF, NAN, -NAN, 0.0, -0.0], source), np.array([signalling]).view(source)])
    write_tensors(tmp_path / "a", {"x": x}, dtype=storage)
    found = read_tensors(tmp_path / "a")[0]["x"]
    assert np.array_equal(found, [INF, -INF, NAN, NAN, 0.0, -0.0, NAN], equal_nan=True)
    assert np.signbit(found[[0, 1, 4, 5]]).tolist() == [False, True, False, True]


@pytest.mark.parametrize("storage, fits, too_large", [
    ("float16", 65520 * (1 - 2.0**-53), 65520.0), ("float16", 65504.0, 1e300),
    ("bfloat16", 2.0**128 * (1 - 2.0**-9) * (1 - 2.0**-53), 2.0**128 * (1 - 2.0**-9)), ("bfloat16", 1e38, 1e39),
    ("float32", 2.0**128 * (1 - 2.0**-25) * (1 - 2.0**-53), 2.0**128 * (1 - 2.0**-25))])
def test_overflow_raises_naming_the_tensor_and_leaves_the_old_file(tmp_path, storage, fits, too_large):
    write_tensors(tmp_path / "a", {"w": np.array([fits, -fits, INF])}, dtype=storage)
    old = names_and_contents(tmp_path)
    for value in (too_large, -too_large):
        with pytest.raises(ValueError, match=r"layer\.w reaches .* overflows to infinity in " + storage):
            write_tensors(tmp_path / "a", {"fine": np.zeros(2), "layer.w": np.array([1.0, value])}, dtype=storage)
    assert names_and_contents(tmp_path) == old


def test_rounding_bfloat16_is_the_inverse_of_widening_it():
    patterns = np.arange(65536, dtype=np.uint16)
    wide = widen_bf16(patterns)
    for x in (wide, wide.astype(np.float64, copy=True) if not np.isnan(wide).any() else
              np.where(np.isnan(wide), NAN, wide).astype(np.float64)):
        back = round_bf16(x)
        assert np.array_equal(back[~np.isnan(wide)], patterns[~np.isnan(wide)])
        assert np.isnan(widen_bf16(back))[np.isnan(wide)].all()


@pytest.mark.parametrize("array", [np.zeros(2, complex), np.zeros(2, "datetime64[s]"), np.array(["a"]),
                                   np.zeros(2, object), np.zeros(2, np.longdouble)], ids=lambda a: a.dtype.name)
def test_a_dtype_that_a_file_cannot_hold_is_refused_by_name(tmp_path, array):
    if array.dtype == np.float64:
        pytest.skip("long double is float64 on this platform")
    with pytest.raises(ValueError, match="w has dtype .*cannot hold"):
        write_tensors(tmp_path / "a", {"w": array})
    assert names_and_contents(tmp_path) == {}


def test_an_unknown_storage_and_the_reserved_name_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="'float8'.*float64, float32, float16, bfloat16"):
        write_tensors(tmp_path / "a", {"w": np.zeros(2)}, dtype="float8")
    with pytest.raises(ValueError, match="__metadata__"):
        write_tensors(tmp_path / "a", {"__metadata__": np.zeros(2)})
    assert names_and_contents(tmp_path) == {}


# ------------------------------------------------------------------------------------------------------ a bad file

FOUR = b"\0" * 4
HUGE = 10**3000
BAD: dict[str, tuple] = {
    "an empty file": (None, b""),
    "seven bytes": (None, b"\x02\0\0\0\0\0\0"),
    "a header of 2**60 bytes": ({}, b"", 2**60),
    "a header of 2**64 - 1 bytes": ({}, b"", 2**64 - 1),
    "a header one byte too long": ({}, b"", 3),
    "text": (None, b"Once upon a time there was a file that was no safetensors file."),
    "a pickle": (None, b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s." * 3),
    "a zip": (None, b"PK\x03\x04" + b"\0" * 60),
    "a header that is a list": ([], b""),
    "a header that is a number": (b"7", b""),
    "a header that is null": (b"null", b""),
    "a header that is empty": (b"", b""),
    "a header that is not JSON": (b"{'a': 1}", b""),
    "a header that is not UTF-8": (b'{"\xff": 1}', b""),
    "a header that goes on after its end": (b"{}{}", b""),
    "deep nesting of lists": (b"[" * 100_000 + b"]" * 100_000, b""),
    "deep nesting of objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""),
    "a name twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                     b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "an entry that is a list": ({"a": [1, 2]}, b""),
    "an entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR),
    "an entry with a field too many": ({"a": {**entry([1], [0, 4]), "more": 1}}, FOUR),
    "an unknown dtype": ({"a": entry([1], [0, 4], "F33")}, FOUR),
    "a dtype in lower case": ({"a": entry([1], [0, 4], "f32")}, FOUR),
    "a dtype that is a number": ({"a": entry([1], [0, 4], 32)}, FOUR),
    "a dtype that is a list": ({"a": entry([1], [0, 4], ["F32"])}, FOUR),
    "a dtype that is null": ({"a": entry([1], [0, 4], None)}, FOUR),
    "a shape that is a number": ({"a": entry(1, [0, 4])}, FOUR),
    "a shape that is null": ({"a": entry(None, [0, 4])}, FOUR),
    "a shape with a negative size": ({"a": entry([-1], [0, 4])}, FOUR),
    "a shape with two negative sizes": ({"a": entry([-1, -1], [0, 4])}, FOUR),
    "a shape with a float": ({"a": entry([1.0], [0, 4])}, FOUR),
    "a shape with a bool": ({"a": entry([True], [0, 4])}, FOUR),
    "a shape with NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FOUR),
    "a shape with a string": ({"a": entry(["1"], [0, 4])}, FOUR),
    "a shape that is a string": ({"a": entry("1", [0, 4])}, FOUR),
    "a shape of too many axes": ({"a": entry([1] * 65, [0, 4])}, FOUR),
    "a shape whose product is huge": ({"a": entry([2**40, 2**40], [0, 4])}, FOUR),
    "a shape that 64 bits cannot hold": ({"a": entry([2**62, 4], [0, 0])}, b""),
    "a shape with a number of 3,001 digits": ({"a": entry([HUGE, HUGE], [0, 4])}, FOUR),
    "a number of more digits than Python reads": (
        b'{"a":{"dtype":"F32","shape":[1%s],"data_offsets":[0,4]}}' % (b"0" * 5000), FOUR),
    "an empty tensor with a size that no array has": ({"a": entry([0, 2**70], [0, 0])}, b""),
    "an empty tensor with a product that no array has": ({"a": entry([0, 2**40, 2**40], [0, 0])}, b""),
    "offsets beyond the end": ({"a": entry([2], [0, 8])}, FOUR),
    "offsets far beyond the end": ({"a": entry([2**58], [0, 2**60])}, FOUR),
    "offsets of 3,001 digits": ({"a": entry([1], [HUGE, HUGE + 4])}, FOUR),
    "offsets that start beyond the end": ({"a": entry([1], [100, 104])}, FOUR),
    "offsets that are reversed": ({"a": entry([1], [4, 0])}, FOUR),
    "offsets that are negative": ({"a": entry([1], [-4, 0])}, FOUR),
    "offsets that are floats": ({"a": entry([1], [0.0, 4.0])}, FOUR),
    "offsets that are bools": ({"a": entry([1], [False, 4])}, FOUR),
    "three offsets": ({"a": entry([1], [0, 4, 4])}, FOUR),
    "one offset": ({"a": entry([1], [0])}, FOUR),
    "offsets that are a number": ({"a": entry([1], 4)}, FOUR),
    "offsets too narrow for the shape": ({"a": entry([2], [0, 4])}, FOUR),
    "offsets too wide for the shape": ({"a": entry([1], [0, 8])}, FOUR * 2),
    "offsets of another dtype": ({"a": entry([1], [0, 4], "F64")}, FOUR),
    "tensors that overlap": ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, FOUR * 3),
    "tensors that share their bytes": ({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, FOUR),
    "a gap between tensors": ({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, FOUR * 3),
    "a gap before the first tensor": ({"a": entry([1], [4, 8])}, FOUR * 2),
    "an empty tensor in a gap": ({"a": entry([1], [0, 4]), "b": entry([0], [6, 6])}, FOUR * 2),
    "bytes after the last tensor": ({"a": entry([1], [0, 4])}, FOUR + b"\0"),
    "bytes without a tensor": ({}, b"\0"),
    "metadata that is a list": ({"__metadata__": []}, b""),
    "metadata that is null": ({"__metadata__": None}, b""),
    "metadata with a number": ({"__metadata__": {"a": 1}}, b""),
    "metadata with an object": ({"__metadata__": {"a": {}}}, b""),
    "metadata that is a tensor": ({"__metadata__": entry([1], [0, 4])}, FOUR),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_a_value_error_that_names_it_before_anything_is_allocated(tmp_path, case):
    header, data, *length = BAD[case]
    path = tmp_path / "the_file.safetensors"
    if header is None:
        path.write_bytes(data)
    else:
        put(path, header, data, *length)
    for read in (read_tensors, read_metadata):
        tracemalloc.start()
        with pytest.raises(ValueError, match="the_file.safetensors"):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # the header itself and its parsed form, of which an entry takes some hundred bytes; never what it claims
        assert peak < 200_000 + 20 * path.stat().st_size


def test_a_large_file_with_one_bad_entry_is_refused_without_reading_its_data(tmp_path):
    size = 1 << 28  # sparse: takes no room on the disk
    path = put(tmp_path / "a", {"x": entry([size // 4], [0, size]), "y": entry([1], [size, size + 5])})
    os.truncate(path, path.stat().st_size + size + 5)
    tracemalloc.start()
    with pytest.raises(ValueError, match="'y'"):
        read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def small_file(path: Path) -> bytes:
    write_tensors(path, {"f": np.arange(3, dtype=np.float32), "é": np.arange(2, dtype=np.int8),
                         "h": np.zeros((2, 1), np.float16), "e": np.zeros((0, 3)), "s": np.array(True)}, {"k": "v"})
    return path.read_bytes()


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path):
    whole = small_file(tmp_path / "whole")
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.safetensors"):
            read_tensors(path)
    path.write_bytes(whole)
    assert set(read_tensors(path)[0]) == {"f", "é", "h", "e", "s"}


def test_a_header_may_list_tensors_in_any_order_and_end_in_spaces(tmp_path):
    header = json.dumps({"b": entry([1], [4, 8]), "e": entry([0], [4, 4]), "a": entry([1], [0, 4])}).encode() + b"   "
    path = put(tmp_path / "a", header, np.array([1, 2], "<f4").tobytes())
    found, _ = read_tensors(path)
    assert (found["a"], found["b"], found["e"].shape) == ([1.0], [2.0], (0,))
    assert safetensors.numpy.load_file(path)["b"] == [2.0]


def holds_only_valid(path: Path) -> bool:
    """Whether `path` is read; anything but a ValueError that names it escapes. What is read here, the package reads."""
    try:
        found, metadata = read_tensors(path)
    except ValueError as error:
        assert str(path) in str(error)
        return False
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert set(theirs) == set(found) and all(isinstance(v, str) for v in metadata.values())
    for name, array in found.items():
        assert list(array.shape) == theirs[name]["shape"]
        if array.dtype != np.float32:  # which may be a widened one
            assert theirs[name]["dtype"] == {v: k for k, v in files._DTYPES.items()}[array.dtype.name]
    return True


@settings(max_examples=400)
@given(st.data())
def test_a_header_with_flipped_bytes_is_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    raw = bytearray(small_file(path))
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(8, header - 1), st.integers(0, header - 1)))
        raw[at] = data.draw(st.one_of(st.sampled_from(b'0123456789"{}[],:- eE.FUIBO_'), st.integers(0, 255)))
    path.write_bytes(raw)
    holds_only_valid(path)


ODD = st.one_of(st.none(), st.booleans(), st.integers(-3, 12), st.floats(), st.text(max_size=3), st.just(2**62),
                st.just(2**64), st.lists(st.integers(0, 8), max_size=3), st.builds(dict))


@settings(max_examples=400)
@given(st.data())
def test_a_header_with_a_wrong_field_is_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    header: dict = {"a": entry([2], [0, 8]), "b": entry([2, 2], [8, 12], "U8"), "c": entry([0], [12, 12], "I64"),
                    "__metadata__": {"k": "v"}}
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        if not isinstance(header[name], dict):
            continue
        if data.draw(st.booleans()):
            header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "k", "more"]))] = data.draw(ODD)
        else:
            header[name] = data.draw(ODD)
    put(path, header, b"\0" * data.draw(st.sampled_from([12, 12, 12, 11, 13, 0])))
    holds_only_valid(path)


def test_the_fuzz_starts_from_files_that_are_read(tmp_path):
    small_file(tmp_path / "a")
    assert holds_only_valid(tmp_path / "a")


@pytest.mark.parametrize("text, message", [("[1]", "holds a JSON list"), ("{", "not valid JSON"),
                                           ("", "not valid JSON"),
                                           ("[" * 100_000, "not valid JSON"), ("{'a': 1}", "not valid JSON"),
                                           ('{"a": 1, "a": 1}', "a name appears twice"),
                                           ('{"a": [{"b": 1, "c": 2, "b": 3}]}', "a name appears twice")],
                         ids=["list", "cut", "empty", "deep", "quotes", "twice", "twice below"])
def test_read_json_names_the_file_for_anything_but_an_object(tmp_path, text, message):
    (tmp_path / "the.json").write_text(text)
    with pytest.raises(ValueError, match="the.json.*" + message):
        read_json(tmp_path / "the.json")
    (tmp_path / "the.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="the.json"):
        read_json(tmp_path / "the.json")
    (tmp_path / "the.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "the.json") == {"a": 1}


def test_a_file_that_is_not_there_is_a_file_not_found_error(tmp_path):
    for read in (read_tensors, read_metadata, read_json):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------ atomic writing

# What write_atomic asks of the system, each step wrapped so that `point` is passed before and after it. Written as
# text because it runs in a process of its own: there each point is tried in a fork, which kills itself on it.
POINTS = textwrap.dedent("""
    import json, os, signal, sys
    from minipeft import files

    passed, doomed = [], None

    def point(name):
        passed.append(name)
        if doomed == len(passed) - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(name, function):
        def call(*args, **options):
            point("before " + name)
            result = function(*args, **options)
            point("after " + name)
            return result
        return call

    def torn(handle, data, write=os.write):
        point("before write")
        done = write(handle, data[:len(data) // 2])
        point("in the middle of write")
        done += write(handle, data[len(data) // 2:])
        point("after write")
        return done

    def install():
        os.write = torn
        for name in ("open", "fsync", "fchmod", "replace", "close"):
            setattr(os, name, wrapped(name, getattr(os, name)))

    def run(target, at):
        global doomed
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            doomed = at
            install()
            files.write_atomic(target, b"new " * 50_000)
            with open(target + ".points", "w") as file:
                json.dump(passed, file)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    def contents(target):
        if not os.path.exists(target):
            return "nothing"
        with open(target, "rb") as file:
            found = file.read()
        return {b"old " * 70_000: "old", b"new " * 50_000: "new"}.get(found, "torn")

    folder = sys.argv[1]
    results = []
    target = os.path.join(folder, "first")
    for start in ("nothing", "old"):
        if start == "old":
            os.chmod(target, 0o640)
        assert run(target, None) == 0
        with open(target + ".points") as file:
            points = json.load(file)
        for at in range(len(points)):
            target = os.path.join(folder, f"{start}{at}")
            if start == "old":
                with open(target, "wb") as file:
                    file.write(b"old " * 70_000)
                os.chmod(target, 0o640)
            killed = run(target, at)
            left = contents(target)
            again = run(target, None)
            hidden = [name for name in os.listdir(folder) if name.startswith(".")]
            results.append([start, points[at], killed, left, again, contents(target), hidden])
    print(json.dumps(results))
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each point is tried in a fork, which this system does not have")
def test_a_writer_killed_at_any_point_leaves_the_old_file_or_the_new_one_whole(tmp_path):
    done = subprocess.run([sys.executable, "-c", POINTS, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for start, steps in (("nothing", ["open", "write", "fsync", "replace", "close"]),
                         ("old", ["open", "write", "fchmod", "fsync", "replace", "close"])):
        seen = [point for begun, point, *_ in results if begun == start]
        for step in steps:
            assert {f"before {step}", f"after {step}"} <= set(seen), step
        assert seen.count("before fsync") == 2, "the file's bytes, and the directory's entry, each reach the disk"
        assert seen.index("after write") < seen.index("before fsync") < seen.index("before replace")
        assert seen.index("before replace") < len(seen) - 1 - seen[::-1].index("before fsync"), "the directory is last"
    renamed: set[str] = set()
    for start, point, killed, left, again, after, hidden in results:
        assert killed == 9, point
        assert left == ("new" if start in renamed or point == "after replace" else start), point
        renamed |= {start} if left == "new" else set()
        assert (again, after, hidden) == (0, "new", []), f"a later write after a crash at {point}"
    assert renamed == {"nothing", "old"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("step", ["open", "write", "fchmod", "fsync", "replace"])
@pytest.mark.parametrize("when", ["instead", "half way"])
def test_a_step_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch, step, error, when):
    """Half way: bytes are half written, or what the step does was done, and then the error came."""
    target = tmp_path / "a"
    write_tensors(target, {"x": np.zeros(3)})
    os.chmod(target, 0o640)
    before, real = names_and_contents(tmp_path), getattr(os, step)

    def fail(*arguments: Any) -> None:
        if when == "half way":
            real(*((arguments[0], arguments[1][:5]) if step == "write" else arguments))
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)) as raised:
        write_tensors(target, {"x": np.ones(3)})
    monkeypatch.undo()
    assert raised.value is error
    if (step, when) == ("replace", "half way"):
        assert set(names_and_contents(tmp_path)) == {"a"} and read_tensors(target)[0]["x"][0] == 1
    else:
        assert names_and_contents(tmp_path) == before
    write_tensors(target, {"x": np.ones(3)})
    assert set(names_and_contents(tmp_path)) == {"a"} and read_tensors(target)[0]["x"][0] == 1


@pytest.mark.parametrize("full", [False, True], ids=["", "on a full disk"])
@pytest.mark.parametrize("exists", [True, False], ids=["replaced", "new"])
def test_an_interrupt_at_any_line_leaves_the_old_file_or_the_new_one_and_no_temporary_one(
        tmp_path, monkeypatch, exists, full):
    """On a full disk the interrupt may also come while the temporary file is removed."""
    target, at, lines, ends = tmp_path / "a", 0, 1, list[str]()

    def write() -> None:
        """In a thread of its own, with an interrupt before its line number `at`."""
        nonlocal lines
        lines = 0

        def tracer(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != atomic.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == at:
                    raise KeyboardInterrupt
            return tracer

        sys.settrace(tracer)
        try:
            write_atomic(target, b"new")
            ends.append("")
        except BaseException as error:
            ends.append(type(error).__name__)
        finally:
            sys.settrace(None)

    if full:
        monkeypatch.setattr(os, "write", lambda *_: os.stat("/no room on this disk"))
    while lines >= at:  # until there is no such line
        at += 1
        target.unlink(missing_ok=True)
        if exists:
            target.write_bytes(b"old")
            target.chmod(0o600)
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        assert [path.name for path in tmp_path.iterdir()] in (["a"], [] if not exists else ["a"]), at
        if target.exists():
            assert target.read_bytes() in (b"old", b"new") and (not exists or not target.stat().st_mode & 0o077), at
    assert ends.count("KeyboardInterrupt") == len(ends) - 1 > 30 and ends[-1] == ("FileNotFoundError" if full else "")


def test_a_directory_that_cannot_be_flushed_is_reported_and_the_new_file_is_whole(tmp_path, monkeypatch):
    target, flushed, real = tmp_path / "a", [], os.fsync

    def fsync(handle: int) -> None:
        flushed.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        if flushed[-1]:
            raise OSError(5, "Input/output error")
        real(handle)

    write_atomic(target, b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(target, b"new")
    assert flushed == [False, True] and names_and_contents(tmp_path) == {"a": b"new"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_any_new_file_and_the_mask_is_never_touched(tmp_path, monkeypatch, mask):
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda _: pytest.fail("the mask belongs to all threads"))
            write_atomic(tmp_path / "a", b"1")
        (tmp_path / "usual").write_bytes(b"")
    finally:
        assert os.umask(before) == mask
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664, 0o666, 0o400, 0o444, 0o755, 0o2640, 0o000, 0o200])
def test_a_file_that_is_replaced_keeps_its_permissions_and_nobody_else_reads_what_is_not_finished(
        tmp_path, monkeypatch, mode):
    target, seen, write = tmp_path / "a", [], os.write
    target.write_bytes(b"old")
    target.chmod(mode)

    def looking(handle: int, data: Any) -> int:
        seen.append(stat.S_IMODE(os.fstat(handle).st_mode))
        return write(handle, data)

    monkeypatch.setattr(os, "write", looking)
    write_atomic(target, b"new")
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert seen and not any(found & ~mode for found in seen)
    target.chmod(0o600)
    assert target.read_bytes() == b"new"


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a file away")
def test_a_file_that_is_replaced_keeps_its_owner_and_its_group(tmp_path, monkeypatch):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    os.chown(target, 1234, 5678)
    target.chmod(0o640)
    write_atomic(target, b"new")
    found = target.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o640)

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    write_atomic(target, b"new")  # what the group 5678 was allowed is not for ours
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_symbolic_link_is_followed_and_stays_one(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    real = tmp_path / "far" / "real"
    real.write_bytes(b"old")
    (tmp_path / "link").symlink_to("far/real")
    (tmp_path / "second").symlink_to(tmp_path / "link")
    (tmp_path / "dangling").symlink_to("far/not yet")
    write_atomic(tmp_path / "second", b"new")
    write_atomic(tmp_path / "dangling", b"first")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink() and real.read_bytes() == b"new"
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "far" / "not yet").read_bytes() == b"first"
    assert names_and_contents(tmp_path / "far").keys() == {"real", "not yet"}
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="circle"):
        write_atomic(tmp_path / "circle", b"")


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "a" * 250 + ".st", "-", " ", "new\nline", ".hidden"])
def test_a_name_as_long_as_the_system_takes_can_be_written_and_written_again(tmp_path, name):
    for data in (b"1", b"2"):
        write_atomic(tmp_path / name, data)
    assert names_and_contents(tmp_path) == {name: b"2"}


def left_by_a_killed_writer(target: Path) -> Path:
    """A writer in a process of its own, which is killed before it renames; its temporary file."""
    code = ("import os, signal, sys\nfrom minipeft.files import write_atomic\n"
            "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nwrite_atomic(sys.argv[1], b'killed')")
    before = set(target.parent.iterdir())
    done = subprocess.run([sys.executable, "-c", code, target], timeout=60)
    assert done.returncode == -signal.SIGKILL
    [left] = set(target.parent.iterdir()) - before
    return left


def test_files_left_by_killed_writers_go_with_the_next_write_to_the_same_target_and_no_others_do(tmp_path):
    mine, other = tmp_path / ("m" * 250), tmp_path / "other"
    left, others = left_by_a_killed_writer(mine), left_by_a_killed_writer(other)
    more = left.with_name(f"{left.name[:19]}1-{'0' * 16}.tmp")  # of a process that lives, but does not write it
    strangers = [tmp_path / name for name in (f"{left.name}x", f"x{left.name}", left.name[:-4], ".minipeft-1-2-3.tmp")]
    for path in (more, *strangers):
        path.write_bytes(b"mine")
    write_atomic(mine, b"new")
    assert set(tmp_path.iterdir()) == {mine, others, *strangers} and mine.read_bytes() == b"new"


@pytest.mark.skipif(atomic.fcntl is None, reason="no locks on this system")
def test_the_file_of_a_writer_that_lives_is_not_removed(tmp_path):
    """Another writer, in the middle of its write, while this one writes the same target: both succeed."""
    code = ("import os, sys\nfrom minipeft.files import write_atomic\nreplace = os.replace\n"
            "def wait(*names):\n    print('ready', flush=True)\n    sys.stdin.readline()\n    replace(*names)\n"
            "os.replace = wait\nwrite_atomic(sys.argv[1], b'theirs')")
    target = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", code, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        write_atomic(target, b"ours")
        assert target.read_bytes() == b"ours" and len(list(tmp_path.iterdir())) == 2
        print(file=process.stdin, flush=True)
        assert process.wait(60) == 0
    assert names_and_contents(tmp_path) == {"a": b"theirs"}


@pytest.mark.skipif(atomic.fcntl is None, reason="no locks on this system")
def test_a_temporary_file_that_is_taken_for_a_dead_one_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Another process may see it in the moment between its creation and its lock."""
    flock, thefts = atomic.fcntl.flock, []

    def stolen(handle: int, how: int) -> None:
        if len(thefts) < 2:
            [temporary] = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
            thefts.append(temporary)
            temporary.unlink()
            if len(thefts) == 2:
                raise BlockingIOError
        flock(handle, how)

    monkeypatch.setattr(atomic.fcntl, "flock", stolen)
    write_atomic(tmp_path / "a", b"new")
    assert len(set(thefts)) == 2 and names_and_contents(tmp_path) == {"a": b"new"}


def test_without_locks_a_file_is_written_all_the_same(tmp_path, monkeypatch):
    left = left_by_a_killed_writer(tmp_path / "a")

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    write_atomic(tmp_path / "a", b"1")
    monkeypatch.setattr(atomic, "fcntl", None)
    write_atomic(tmp_path / "a", b"2")
    assert names_and_contents(tmp_path) == {"a": b"2", left.name: b"killed"}


def special_files(folder: Path) -> dict[str, Path]:
    """{what an error calls it: such a file}."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as opened:
        before = os.getcwd()
        os.chdir(folder)  # the name of a socket has to be short
        try:
            opened.bind("socket")
        finally:
            os.chdir(before)
    (folder / "link").symlink_to("fifo")
    return {"a folder": folder / "folder", "a FIFO": folder / "fifo", "a socket": folder / "socket",
            "a device": Path("/dev/zero")} | {"a FIFO ": folder / "link"}


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path):
    found = special_files(tmp_path)
    for what, path in found.items():
        for read in (read_tensors, read_metadata, read_dtypes, read_shapes, read_json):
            with pytest.raises(ValueError, match=f"{path} is {what.strip()}; expected a regular file"):
                read(path)
        with pytest.raises(ValueError, match=f"{path} is {what.strip()}; expected a regular file"):
            write_atomic(path, b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "fifo", "socket", "link"}


def test_a_link_to_a_regular_file_is_read(tmp_path):
    write_tensors(tmp_path / "real", {"x": np.ones(2)}, {"k": "v"})
    (tmp_path / "link").symlink_to("real")
    assert read_tensors(tmp_path / "link")[0]["x"].tolist() == [1, 1] and read_metadata(tmp_path / "link") == {"k": "v"}


@pytest.mark.parametrize("name, hint", [("none/a", ""), ("~/a", "'~' is not expanded"), ("~user/x/a", "'~' is not")])
def test_a_missing_folder_is_named_and_nothing_is_made(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    folder = (tmp_path / name).parent
    for path in (name, Path(name), tmp_path / name):
        wanted = f"{path}: the folder {folder} does not exist; create it first"
        with pytest.raises(FileNotFoundError) as error:
            write_atomic(path, b"")
        assert str(error.value).startswith(wanted) and (hint in str(error.value) or path == tmp_path / name)
    assert names_and_contents(tmp_path) == {}


def test_a_relative_path_is_written_where_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tensors("a.safetensors", {"x": np.ones(1)})
    assert names_and_contents(tmp_path).keys() == {"a.safetensors"}


def test_a_missing_directory_is_an_error_and_creates_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.* does not exist; create it first"):
        write_tensors(tmp_path / "none" / "a", {"x": np.ones(1)})
    assert names_and_contents(tmp_path) == {}


# -------------------------------------------------------------------------------------------------- bytes and digests

TENSORS = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "é": np.array([True, False]), "none": np.zeros((0, 3)),
           "one": np.array(7, np.int16), "h": np.array([1.5, -2], np.float16)}
METADATA = {str(i): f"value {i} é\n\x1f\x7f/\"\\" for i in range(8)}


def test_two_processes_write_the_same_bytes(tmp_path):
    code = ("import sys, numpy as np\nfrom minipeft.files import write_tensors\n"
            "write_tensors(sys.argv[1], {'w': np.arange(3.), 'a': np.ones(2, np.int8)}, "
            "{str(i): 'x' for i in range(20)}, dtype='bfloat16')")
    for seed in "0123":
        subprocess.run([sys.executable, "-c", code, tmp_path / seed], check=True, timeout=60,
                       env={**os.environ, "PYTHONHASHSEED": seed})
    assert len({(tmp_path / seed).read_bytes() for seed in "0123"}) == 1


def test_the_header_is_that_of_the_package_but_for_the_order_of_the_metadata(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, signed=False)
    assert (tmp_path / "a").read_bytes() == safetensors.numpy.save(TENSORS)
    write_tensors(tmp_path / "a", TENSORS, METADATA, signed=False)
    raw, theirs = (tmp_path / "a").read_bytes(), safetensors.numpy.save(TENSORS, METADATA)
    n = int.from_bytes(raw[:8], "little")
    assert n % 8 == 0 and raw[:8] + raw[8 + n:] == theirs[:8] + theirs[8 + n:]
    header, other = json.loads(raw[8:8 + n]), json.loads(theirs[8:8 + n])
    assert header == other and list(header["__metadata__"]) == sorted(METADATA) and list(header) == list(other)


def test_the_digest_is_the_sha_256_that_the_module_says(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, METADATA)
    with safetensors.safe_open(tmp_path / "a", framework="np") as file:
        said = file.metadata()
        expected = hashlib.sha256()
        kinds = {"F32": "float32", "BOOL": "bool", "F64": "float64", "I16": "int16", "F16": "float16"}
        for name in sorted(file.keys()):
            part = file.get_slice(name)
            line = json.dumps([name, kinds[part.get_dtype()], part.get_shape()]) + "\n"
            expected.update(line.encode() + file.get_tensor(name).tobytes())
    assert said.pop(DIGEST) == expected.hexdigest() and said == METADATA
    assert read_tensors(tmp_path / "a")[1] == METADATA == read_metadata(tmp_path / "a")


def edited(path: Path, change: Any) -> None:
    """The header of a file changed, its data kept."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    change(header)
    put(path, header, raw[8 + n:])


def test_every_bit_of_the_data_and_every_name_dtype_and_shape_is_covered_by_the_digest(tmp_path):
    path = tmp_path / "the_file"
    write_tensors(path, {"w": np.arange(4, dtype=np.float32).reshape(2, 2), "v": np.arange(4, dtype=np.int32)})
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(8 * data, 8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="the_file: damaged: its tensors are not those that were written"):
            read_tensors(path)

    def swap(h: dict) -> None:
        h["w"]["data_offsets"], h["v"]["data_offsets"] = h["v"]["data_offsets"], h["w"]["data_offsets"]

    for change in (swap, lambda h: h.update(u=h.pop("v")), lambda h: h["w"].update(shape=[4]),
                   lambda h: h["w"].update(shape=[1, 4]), lambda h: h["v"].update(dtype="U32"),
                   lambda h: h["w"].update(dtype="I32"), lambda h: h["__metadata__"].update({DIGEST: "0" * 64}),
                   lambda h: h["__metadata__"].update({DIGEST: ""})):
        path.write_bytes(whole)
        edited(path, change)
        with pytest.raises(ValueError, match="the_file: damaged"):
            read_tensors(path)
    path.write_bytes(whole)
    edited(path, lambda h: h["__metadata__"].pop(DIGEST))
    assert set(read_tensors(path)[0]) == {"w", "v"}, "a file of somebody else has none"


def test_a_file_is_hashed_and_read_without_a_second_copy(tmp_path):
    size = 1 << 22
    write_tensors(tmp_path / "a", {"x": np.zeros(size, np.float32)})
    tracemalloc.start()
    found, _ = read_tensors(tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < 1.1 * found["x"].nbytes
    tracemalloc.stop()


def test_the_name_of_the_digest_is_taken(tmp_path):
    with pytest.raises(ValueError, match=DIGEST):
        write_tensors(tmp_path / "a", {"x": np.ones(1)}, {DIGEST: "mine"})
    assert names_and_contents(tmp_path) == {}


# ------------------------------------------------------------------------------------------------------------- limits

def test_a_header_or_a_json_file_beyond_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "the_file"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", LIMIT + 1) + b"{}")
        file.truncate(LIMIT + 100)
    (tmp_path / "the.json").write_bytes(b'{"a": 1}' + b" " * LIMIT)
    os.truncate(tmp_path / "the.json", 8 * LIMIT)
    for read, name in ((read_tensors, "the_file"), (read_shapes, "the_file"), (read_json, "the.json")):
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"{name}.* {LIMIT}"):
            read(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 3 * LIMIT
        tracemalloc.stop()
    with pytest.raises(ValueError, match="the.json: more than 7 bytes"):
        read_json(tmp_path / "the.json", 7)
    put(path, b"{}".ljust(LIMIT))
    assert read_tensors(path) == ({}, {})


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    write_tensors(tmp_path / "a", {"x": np.ones(1)}, {"k": "v" * (LIMIT - 300)})
    assert len(read_metadata(tmp_path / "a")["k"]) == LIMIT - 300
    old = names_and_contents(tmp_path)
    with pytest.raises(ValueError, match=f"a: names and metadata take .* at most {LIMIT}"):
        write_tensors(tmp_path / "a", {"x": np.zeros(1)}, {"k": "v" * LIMIT})
    assert names_and_contents(tmp_path) == old


LONG = "k" * 5000


@pytest.mark.parametrize("header", [
    {LONG: {}}, {LONG: entry([1], [0, 4], LONG)}, {LONG: entry([LONG], [0, 4])}, {LONG: entry([1] * 5000, [0, 4])},
    {LONG: entry([1], [0] * 5000)}, {LONG: entry([1], [0, 8])}, {"x": entry([HUGE], [HUGE] * 2)}],
    ids=["no entry", "dtype", "shape", "axes", "offsets", "too wide", "3,001 digits"])
def test_an_error_about_a_long_name_is_short(tmp_path, header):
    with pytest.raises(ValueError, match="the_file") as error:
        read_tensors(put(tmp_path / "the_file", header, FOUR))
    assert len(str(error.value)) < 600 + len(str(tmp_path))


def test_the_shapes_and_dtypes_of_a_file_are_those_of_its_tensors(tmp_path):
    write_tensors(tmp_path / "a", TENSORS)
    assert read_shapes(tmp_path / "a") == {name: array.shape for name, array in TENSORS.items()}
    assert read_dtypes(tmp_path / "a") == {name: array.dtype.name for name, array in TENSORS.items()}


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a regular file whose reading fails is needed")
@pytest.mark.parametrize("read", [read_tensors, read_metadata, read_json])
def test_an_error_of_the_system_while_reading_names_the_file(tmp_path, read):
    (tmp_path / "odd").symlink_to("/proc/self/mem")
    with pytest.raises((OSError, ValueError), match="odd"):
        read(tmp_path / "odd")
