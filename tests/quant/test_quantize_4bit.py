"""`quantize_4bit` against bitsandbytes' bytes on a CPU, published test vectors, and wrong input."""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipeft.quant import FourBit, quantize_4bit, scheme

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nf4"
with np.load(FIXTURES / "cases.npz") as _arrays:
    GOLDEN = dict(_arrays)
CASES = sorted({name.rpartition("/")[0] for name in GOLDEN if name.count("/") == 2})  # "nf4_b64/odd", ...


def same(found: Any, wanted: np.ndarray) -> bool:
    """Whether dtypes, shapes and numbers are equal. -0 equals 0: code 8 of FP4 is a zero, and bitsandbytes' kernels do
    not agree on its sign."""
    return np.shape(found) == wanted.shape and found.dtype == wanted.dtype and np.array_equal(found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_codes_scales_and_numbers_are_those_of_bitsandbytes(case):
    setting, name = case.split("/")
    kind, blocksize = setting.split("_b")
    x = GOLDEN[f"{name}/x"]
    plain, double = (quantize_4bit(x, kind, int(blocksize), double) for double in (False, True))
    found = {"packed": plain.packed, "absmax": plain.absmax, "dequant": plain.dequantize(),
             "dq_qabsmax": double.qabsmax, "dq_nested_absmax": double.nested_absmax, "dq_offset": double.offset,
             "dq_dequant": double.dequantize()}
    checked = [field for field in found if f"{case}/{field}" in GOLDEN]
    assert {"packed", "absmax", "dq_qabsmax", "dq_nested_absmax", "dq_offset"} <= set(checked)
    for field in checked:
        assert same(found[field], GOLDEN[f"{case}/{field}"]), field
    assert same(double.packed, GOLDEN[f"{case}/packed"])


def test_there_are_golden_cases_of_both_kinds_and_two_block_sizes_with_partial_blocks_and_zeros():
    assert len(CASES) == 34 and {case.split("/")[0] for case in CASES} == {"nf4_b64", "nf4_b128", "fp4_b64", "fp4_b128"}


FIRST = np.array([0, 0.1, -0.1, 0.5, -0.5, 1, -1, 2], "float32")


def test_the_first_test_vector():
    nf4, fp4 = quantize_4bit(FIRST), quantize_4bit(FIRST, "fp4")
    assert nf4.packed.tobytes().hex() == "786a4c2f" and nf4.absmax.tolist() == [2.0]
    assert nf4.dequantize().tolist() == [
        0, 0.15916059911251068, -0.1821000725030899, 0.4922246038913727, -0.5688827633857727, 0.8814196586608887,
        -1.0501461029052734, 2]
    assert fp4.packed.tobytes().hex() == "0197f5d3"
    assert fp4.dequantize().tolist() == [0, 0.010416666977107525, -0.010416666977107525, 0.5, -0.5, 1, -1, 2]


def test_the_second_test_vector():
    i = np.arange(64)
    x = np.stack([(i - 31.5) / 32 * np.where(i % 3 != 0, 1, -1), 0.05 * np.sin(0.37 * i)]).astype("float32")
    found = {kind: quantize_4bit(x, kind) for kind in ("nf4", "fp4")}
    assert [float(a).hex() for a in found["nf4"].absmax] == ["0x1.f800000000000p-1", "0x1.9896360000000p-5"]
    assert found["nf4"].packed.tobytes().hex() == (
        "f00f01e11e11d22d22c33b44a5596687768859a4ab4bc3cc2dd1ee1ee1ef0ff0"
        "7befffed9521000137befffed9521000137befffed9521000137befffed95210")
    assert found["fp4"].packed.tobytes().hex() == (
        "3bb3bb2aa2aa2ad5dd5cc4cf7ee6e9191916e66f74c44d55d52a22a22a33b33b"
        "042333256edabbbac142333256edabbbac142333256edabbbac142333256edab")


def test_the_third_test_vector_with_double_quantization():
    x = (np.random.RandomState(0).standard_normal((128, 256)) * 0.02).astype("float32")
    q = quantize_4bit(x, double=True)
    assert float(q.offset).hex() == "0x1.a965480000000p-5"
    assert [float(a).hex() for a in q.nested_absmax] == ["0x1.8aefd00000000p-6", "0x1.5217500000000p-5"]
    assert q.qabsmax[:16].tolist() == [86, 32, 58, 51, 194, 173, 192, 184, 88, 210, 197, 70, 49, 95, 193, 36]
    assert [hashlib.sha256(a.tobytes()).hexdigest() for a in (q.packed, q.qabsmax, q.dequantize())] == [
        "96129c841833adead51906c0081d9bef881a58107acd22e93e77650f1a921486",
        "adcf9a4ab038d11409a7a90953f11041d1336e988b985fd9107450b859347808",
        "de4e1a2b387ee5da566e88e731b2fbdcecc3c5cb3ba3498166ff6d170095d66d"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 11)], ids=str)
def test_any_shape_and_float_is_quantized_as_float32_in_flat_order(shape, dtype):
    x = np.asarray(np.random.default_rng(1).standard_normal(shape)).astype(dtype)
    q, flat = quantize_4bit(x, blocksize=4), quantize_4bit(x.astype("float32").reshape(-1), blocksize=4)
    assert q.packed.tobytes() == flat.packed.tobytes() and q.absmax.tobytes() == flat.absmax.tobytes()
    assert q.packed.shape == (-(-x.size // 2),) and q.absmax.dtype == "float32"
    out = q.dequantize()
    assert out.shape == shape and out.dtype == "float32" and out.tobytes() == flat.dequantize().tobytes()


def test_layouts_in_memory_do_not_matter_and_the_input_stays_as_it_was():
    x = np.random.default_rng(2).standard_normal((6, 10)).astype("float32")
    wanted, kept = quantize_4bit(x.T.copy(), blocksize=8), x.copy()
    assert quantize_4bit(x.T, blocksize=8).packed.tobytes() == wanted.packed.tobytes()
    spread = np.zeros(120, "float32")
    spread[::2] = x.T.reshape(-1)
    assert quantize_4bit(spread[::2], blocksize=8).absmax.tobytes() == wanted.absmax.tobytes()
    assert x.tobytes() == kept.tobytes()


def test_what_is_not_stored_is_none():
    plain, double = quantize_4bit(FIRST), quantize_4bit(FIRST, double=True)
    assert (plain.qabsmax, plain.nested_absmax, plain.offset, double.absmax) == (None,) * 4
    assert isinstance(double.offset, np.float32)


@pytest.mark.parametrize("array, options, error, words", [
    ([0.5, float("nan")], {}, ValueError, "position 1 is nan"),
    ([[0.5, 1.0], [2.0, float("-inf")]], {}, ValueError, "position 3 is -inf"),
    ([1.0] * 70 + [float("inf")], {}, ValueError, "position 70 is inf"),
    ([1.0] * 40000 + [float("nan")] * 9000, {}, ValueError, "position 40000 is nan"),
    ([1e39], {}, ValueError, r"position 0 is 1e\+39; expected finite numbers"),
    ([], {}, ValueError, "empty"), (np.zeros((3, 0)), {}, ValueError, r"empty \[3, 0\]"),
    ([1, 2], {}, TypeError, "int64; expected float16, float32 or float64"), ([True], {}, TypeError, "bool"),
    ([1j], {}, TypeError, "complex128"), (["a"], {}, TypeError, "expected float16"),
    ([1.0], {"blocksize": 0}, ValueError, "blocksize is 0; expected an integer >= 1"),
    ([1.0], {"blocksize": -64}, ValueError, "blocksize is -64"), ([1.0], {"blocksize": 64.0}, ValueError, "64.0"),
    ([1.0], {"blocksize": "64"}, ValueError, "'64'"), ([1.0], {"blocksize": True}, ValueError, "True"),
    ([1.0], {"blocksize": 2 ** 31}, ValueError, r"below 2\^31"), ([1.0], {"blocksize": None}, ValueError, "None"),
    ([1.0], {"kind": "nf3"}, ValueError, "kind is 'nf3'; expected one of nf4, fp4"),
    ([1.0], {"kind": None}, ValueError, "kind is None"), ([1.0], {"kind": ["nf4"]}, ValueError, "kind is"),
    ([1.0], {"double": 1}, ValueError, "double is 1; expected True or False")])
def test_wrong_input_is_refused_in_words(array, options, error, words):
    with pytest.raises(error, match=words):
        quantize_4bit(np.asarray(array), **options)


def test_a_float16_infinity_and_a_float64_number_beyond_float32_are_refused():
    for x in (np.array([np.inf], "float16"), np.array([3.5e38])):
        with pytest.raises(ValueError, match="expected finite numbers, of which float32 can hold those below 3.4e"):
            quantize_4bit(x)


def test_a_numpy_bool_says_whether_to_double():
    for double in np.True_, np.array(False):
        found = quantize_4bit(np.ones(3), double=double).scheme
        assert found == FourBit("nf4", double=bool(double)) and type(found.double) is bool, "for JSON, too"


def test_settings_may_be_arrays_without_axes_as_an_npz_gives_them():
    found = quantize_4bit(np.ones(3), np.array("fp4"), np.array(32), np.array(True)).scheme
    assert found == FourBit("fp4", 32, True) == scheme(np.array("fp4"), blocksize=np.array(32), double=np.array(True))
    assert type(found.kind) is str


def test_a_numpy_integer_is_a_block_size():
    assert quantize_4bit(FIRST, blocksize=np.int64(4)).absmax.tolist() == [0.5, 2.0]
