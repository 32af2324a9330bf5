"""The bytes of llama.cpp's blocks: where each code lies, there and back, and bytes that are refused.

That they are the bytes of the `gguf` package is shown in test_ggml.py."""
from __future__ import annotations

import numpy as np
import pytest

from minipeft.quant.ggml import BLOCK, KINDS
from minipeft.quant.ggml_bytes import block_bytes, from_blocks, to_blocks
from minipeft.quant.packing import packed
from minipeft.quant.scheme import scheme


def arrays_of(kind: str, q: np.ndarray, d: float = 0.5, m: float = -3.0) -> dict[str, np.ndarray]:
    chosen = scheme(kind)
    codes = q.astype("int8") if chosen.bits == 8 else packed(q.astype("uint8"), chosen.bits)
    return {"codes": codes, "d": np.full((1, 1), d, "float16"),
            **({"m": np.full((1, 1), m, "float16")} if chosen.has_offset else {})}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_begins_with_d_and_m_and_each_code_lies_where_the_page_says(kind):
    chosen = scheme(kind)
    start, high = 4 if chosen.has_offset else 2, 4 if chosen.bits == 5 else 0
    for i in range(BLOCK):
        q = np.zeros((1, BLOCK), "int64")
        q[0, i] = {4: 11, 5: 27, 8: -5}[chosen.bits]
        data = to_blocks(chosen, arrays_of(kind, q), (1, BLOCK))
        assert data.shape == (1, block_bytes(chosen)) and data.dtype == "uint8"
        assert bytes(data[0, :start]) == b"\x00\x38" + b"\x00\xc2" * chosen.has_offset  # 0.5 and -3 in float16
        wanted = np.zeros(block_bytes(chosen) - start, "uint8")
        if chosen.bits == 8:
            wanted[i] = 251
        else:
            wanted[high + i % 16] = 11 << 4 * (i // 16)
        if high:
            wanted[i // 8] = 1 << i % 8
        assert data[0, start:].tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_come_back_from_their_bytes_bit_for_bit(kind):
    W = np.random.default_rng(0).standard_normal((7, 96)).astype("float32")
    chosen = scheme(kind)
    arrays = chosen.encode(W)
    found = from_blocks(chosen, to_blocks(chosen, arrays, W.shape), W.shape)
    assert {leaf: (x.dtype, x.shape, x.tobytes()) for leaf, x in found.items()} == {
        leaf: (x.dtype, x.shape, x.tobytes()) for leaf, x in arrays.items()}
    assert all(x.flags.c_contiguous and x.flags.writeable for x in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_takes_as_many_bytes_in_memory_as_in_the_file(kind):
    W = np.random.default_rng(0).standard_normal((7, 96)).astype("float32")
    arrays = scheme(kind).encode(W)
    assert sum(x.nbytes for x in arrays.values()) == to_blocks(scheme(kind), arrays, W.shape).nbytes


@pytest.mark.parametrize("shape, dtype", [((2, 19), "uint8"), ((2, 60), "uint8"), ((3, 40), "uint8"), ((80,), "uint8"),
                                          ((2, 40), "int8"), ((2, 10), "float32")])
def test_bytes_of_another_size_or_dtype_are_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"Q4_1: the blocks of a matrix \[2, 64\] are .*; expected uint8 \[2, 40\]"):
        from_blocks(scheme("q4_1"), np.zeros(shape, dtype), (2, 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [b"\x00\x7c", b"\x00\xfc", b"\x01\x7e"])
def test_a_scale_or_an_offset_that_is_not_finite_is_refused_with_its_place(kind, half):
    chosen = scheme(kind)
    size = block_bytes(chosen)
    for leaf, at in (("d", 0), ("m", 2)) if chosen.has_offset else (("d", 0),):
        data = np.zeros((3, 2 * size), "uint8")
        data[2, size + at:size + at + 2] = list(half)
        with pytest.raises(ValueError, match=f"{leaf} of block 1 in row 2 is (-?inf|nan); expected a finite number"):
            from_blocks(chosen, data, (3, 64))
