"""files.py: what is written is what is read, what is bad is refused early, and a crash leaves one whole file."""
from __future__ import annotations

import json
import math
import os
import stat
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings, strategies as st

from minipeft import files
from minipeft.files import read_json, read_metadata, read_tensors, round_bf16, widen_bf16, write_atomic, write_tensors

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
        assert file.metadata() == {"k": "v"}


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


def test_float64_is_asked_for_and_integers_stay_as_they_are(tmp_path):
    write_tensors(tmp_path / "a", {"h": np.ones(2, np.float16), "f": np.ones(2, np.float32), "i": np.ones(2, np.int8),
                                   "b": np.ones(2, bool)})
    for asked in ("float32", "float64"):
        found, _ = read_tensors(tmp_path / "a", asked)
        assert {n: a.dtype.name for n, a in found.items()} == {"h": asked, "f": asked, "i": "int8", "b": "bool"}


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
    found = read_tensors(path, "float64")[0]["x"]
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
    found = float(read_tensors(tmp_path / "a", "float64")[0]["x"])
    assert found == expected and math.copysign(1, found) == math.copysign(1, expected)


@pytest.mark.parametrize("storage", files.STORAGE)
@pytest.mark.parametrize("source", ["float16", "float32", "float64"])
def test_infinity_and_nan_pass_through_every_storage(tmp_path, storage, source):
    signalling = {"float16": np.uint16(0x7C01), "float32": np.uint32(0x7F800001),
                  "float64": np.uint64(0x7FF0000000000001)}[source]
    x = np.concatenate([np.array([INF, -INF, NAN, -NAN, 0.0, -0.0], source), np.array([signalling]).view(source)])
    write_tensors(tmp_path / "a", {"x": x}, dtype=storage)
    found = read_tensors(tmp_path / "a", "float64")[0]["x"]
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
    import json, os, signal, sys, tempfile
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

    class File:  # a file whose write is torn in the middle
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *error):
            point("before close")
            self.file.close()
            point("after close")
        def write(self, data):
            point("before write")
            self.file.write(data[:len(data) // 2])
            self.file.flush()
            point("in the middle of write")
            self.file.write(data[len(data) // 2:])
            point("after write")
        def __getattr__(self, name):
            return wrapped(name, getattr(self.file, name))

    def install():
        opened = os.fdopen
        os.fdopen = lambda *args, **options: File(opened(*args, **options))
        tempfile.mkstemp = wrapped("mkstemp", tempfile.mkstemp)
        for name in ("fsync", "chmod", "replace", "open", "close", "umask"):
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
    assert run(target, None) == 0
    with open(target + ".points") as file:
        points = json.load(file)
    for start in ("old", "nothing"):
        for at in range(len(points)):
            target = os.path.join(folder, f"{start}{at}")
            if start == "old":
                with open(target, "wb") as file:
                    file.write(b"old " * 70_000)
            killed = run(target, at)
            left = contents(target)
            again = run(target, None)
            results.append([start, points[at], killed, left, again, contents(target)])
    print(json.dumps(results))
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each point is tried in a fork, which this system does not have")
def test_a_writer_killed_at_any_point_leaves_the_old_file_or_the_new_one_whole(tmp_path):
    done = subprocess.run([sys.executable, "-c", POINTS, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    seen = [point for start, point, *_ in results if start == "old"]
    written = seen.index("after replace")
    for step in ("mkstemp", "write", "flush", "fsync", "chmod", "replace"):
        assert {f"before {step}", f"after {step}"} <= set(seen), step
    assert seen.count("before fsync") == 2, "the file's bytes, and the directory's entry, each reach the disk"
    assert seen.index("after flush") < seen.index("before fsync") < seen.index("before replace")
    assert seen.index("before replace") < len(seen) - 1 - seen[::-1].index("before fsync"), "the directory comes last"
    assert len(results) == 2 * len(seen)
    for i, (start, point, killed, left, again, after) in enumerate(results):
        assert killed == 9, point
        assert left == ("new" if i % len(seen) >= written else start), point
        assert (again, after) == (0, "new"), f"a later write after a crash at {point}"


class Refusing:
    """A file on a full disk: `step` fails with the bytes half written."""

    def __init__(self, file: Any, step: str, error: BaseException):
        self.file, self.step, self.error = file, step, error

    def __enter__(self) -> "Refusing":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        if name != self.step:
            return getattr(self.file, name)

        def fail(data: bytes = b"") -> None:
            self.file.write(data[:len(data) // 2])
            raise self.error
        return fail


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("step", ["mkstemp", "write", "flush", "fsync", "chmod", "replace"])
def test_a_step_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch, step, error):
    target = tmp_path / "a"
    write_tensors(target, {"x": np.zeros(3)})
    before = names_and_contents(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if step in ("write", "flush"):
        opened = os.fdopen
        monkeypatch.setattr(os, "fdopen", lambda *args: Refusing(opened(*args), step, error))
    else:
        monkeypatch.setattr("tempfile.mkstemp" if step == "mkstemp" else f"os.{step}", fail)
    with pytest.raises(type(error)):
        write_tensors(target, {"x": np.ones(3)})
    assert names_and_contents(tmp_path) == before
    monkeypatch.undo()
    write_tensors(target, {"x": np.ones(3)})
    assert set(names_and_contents(tmp_path)) == {"a"} and read_tensors(target)[0]["x"][0] == 1


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
def test_a_file_has_the_permissions_of_any_new_file_and_the_mask_is_put_back(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "a", b"1")
        write_atomic(tmp_path / "a", b"2")
        (tmp_path / "usual").write_bytes(b"")
        found = os.umask(mask)
    finally:
        os.umask(before)
    assert found == mask
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_relative_path_is_written_where_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tensors("a.safetensors", {"x": np.ones(1)})
    assert names_and_contents(tmp_path).keys() == {"a.safetensors"}


def test_a_missing_directory_is_an_error_and_creates_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "none" / "a", {"x": np.ones(1)})
    assert names_and_contents(tmp_path) == {}
