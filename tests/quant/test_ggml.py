"""llama.cpp's blocks: the bits of the `gguf` package; their errors; m' is m + delta in float16."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minipeft.backend import to_host, use
from minipeft.laws.bounds import wide, within
from minipeft.quant import ggml
from minipeft.quant.ggml import BLOCK, KINDS, Blocks
from minipeft.quant.ggml_bytes import from_blocks, to_blocks
from minipeft.quant.packing import unpacked
from minipeft.quant.scheme import scheme
from minipeft.quant.weight import QuantizedWeight
from tests.quant.blocks import gguf_blocks, gguf_numbers, weights
from tests.strategies import dtypes, seeds
from tests.strict_namespace import strict

ALL = slice(None)
FIXTURE = Path(__file__).parents[1] / "fixtures" / "gguf" / "blocks.npz"
GOLDEN = ("Q4_0", "Q4_1", "Q5_1", "Q8_0")
MATRICES = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")


def codes(chosen: Blocks, arrays: Any, shape: tuple[int, int]) -> np.ndarray:
    """q - center [rows, blocks, 32], as integers."""
    q = unpacked(arrays["codes"], chosen.bits, shape[1], "int64", minus=chosen.center)
    return q.reshape(shape[0], -1, BLOCK)


# ---- the gguf package

@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("kind", GOLDEN)
def test_bytes_and_numbers_are_those_of_files_that_gguf_wrote(kind, name):
    with np.load(FIXTURE) as golden:
        W, data, numbers = (golden[f"{key}/{name}"] for key in ("F32", f"{kind}/blocks", f"{kind}/numbers"))
    chosen = scheme(kind.lower())
    arrays = chosen.encode(W)
    assert to_blocks(chosen, arrays, W.shape).tobytes() == data.tobytes()
    assert chosen.decode(from_blocks(chosen, data, W.shape), W.shape, ALL).tobytes() == numbers.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_matrix_has_the_bytes_that_gguf_gives_it_and_decodes_to_the_same_bits(kind, data):
    """Also subnormal numbers, negative zeros, ties, constant and one-sided blocks."""
    pytest.importorskip("gguf")
    W, chosen = data.draw(weights()), scheme(kind)
    wanted = gguf_blocks(kind, W)
    arrays = chosen.encode(W)
    assert to_blocks(chosen, arrays, W.shape).tobytes() == wanted.tobytes()
    assert chosen.decode(arrays, W.shape, ALL).tobytes() == gguf_numbers(kind, wanted).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds())
def test_any_bytes_decode_to_the_numbers_of_gguf(kind, seed):
    """Not only those that encoding makes: q8_0 may have -128, and d may have either sign everywhere."""
    pytest.importorskip("gguf")
    chosen = scheme(kind)
    rng = np.random.default_rng(seed)
    size = to_blocks(chosen, chosen.encode(np.zeros((1, BLOCK), "float32")), (1, BLOCK)).size
    data = rng.integers(0, 256, (5, 3, size), dtype="uint8")
    halves = rng.integers(0, 2 ** 16, (5, 3, 2), dtype="uint16")
    halves[(halves & 0x7C00) == 0x7C00] = 1  # neither infinity nor NaN
    data[..., :4 if chosen.has_offset else 2] = halves.view("uint8")[..., :4 if chosen.has_offset else 2]
    data = data.reshape(5, -1)
    arrays = from_blocks(chosen, data, (5, 96))
    assert chosen.decode(arrays, (5, 96), ALL).tobytes() == gguf_numbers(kind, data).tobytes()
    assert to_blocks(chosen, arrays, (5, 96)).tobytes() == data.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_float64_are_taken_as_float32(kind):
    W = np.random.default_rng(0).standard_normal((2, 64))
    chosen = scheme(kind)
    found, wanted = chosen.encode(W), chosen.encode(W.astype("float32"))
    assert {leaf: x.tobytes() for leaf, x in found.items()} == {leaf: x.tobytes() for leaf, x in wanted.items()}


# ---- laws

@given(kind=st.sampled_from(KINDS), data=st.data())
def test_the_error_is_half_a_step_and_the_rounding_of_d_and_m_to_float16(kind, data):
    """A whole step in q4_0 and q5_0, for weights as large as the largest and of the other sign: the codes end at 7.

    d and m here are those before float16. Each of the at most eight roundings in float32 is of a number of at most
    |d| (2^N) + |m|, in the decoder or, as a part of a step, in the encoder."""
    W, chosen = data.draw(weights(subnormal=False)), scheme(kind)
    arrays = chosen.encode(W)
    w, q, eight = wide(W).reshape(len(W), -1, BLOCK), codes(chosen, arrays, W.shape), 8 * 2.0 ** -24
    steps = {"q4_0": 8, "q4_1": 15, "q5_0": 16, "q5_1": 31, "q8_0": 127}[kind]
    m = w.min(axis=2) if chosen.has_offset else 0 * w[..., 0]
    d = (w.max(axis=2) - m if chosen.has_offset else abs(w).max(axis=2)) / steps
    off = abs(q) * abs(abs(wide(arrays["d"])) - d)[..., None]
    if chosen.has_offset:
        off += abs(wide(arrays["m"]) - m)[..., None]
    half = 1.0 if chosen.center else 0.5
    bound = d[..., None] * half + off + eight * (2 ** chosen.bits * d + abs(m))[..., None] + 2.0 ** -126
    assert within(chosen.decode(arrays, W.shape, ALL).reshape(w.shape), w, bound)


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_quantized_again_a_block_has_the_same_codes_d_and_m(kind, data):
    W, chosen = data.draw(weights()), scheme(kind)
    first = chosen.encode(W)
    again = chosen.encode(chosen.decode(first, W.shape, ALL))
    held = first["d"] != 0
    if chosen.has_offset:
        held &= abs(wide(first["m"])) <= 1024 * abs(wide(first["d"]))
    for x, y in ((codes(chosen, first, W.shape), codes(chosen, again, W.shape)), (first["d"], again["d"]),
                 *([(first["m"], again["m"])] if chosen.has_offset else [])):
        assert (x[held] == y[held]).all()


@given(kind=st.sampled_from(KINDS), seed=seeds(), k=st.integers(-4, 4))
def test_weights_times_a_power_of_two_have_the_same_codes_and_d_and_m_times_that_power(kind, seed, k):
    W, chosen = np.random.default_rng(seed).standard_normal((3, 64)).astype("float32"), scheme(kind)
    once, scaled = chosen.encode(W), chosen.encode(np.ldexp(W, k))
    assert once["codes"].tobytes() == scaled["codes"].tobytes()
    for leaf in set(once) - {"codes"}:
        normal = abs(once[leaf]) >= 2.0 ** -10
        assert (np.ldexp(once[leaf], k) == scaled[leaf])[normal].all() and normal.any()


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_no_row_depends_on_another_and_some_rows_decode_to_the_bits_that_they_have_in_the_whole(kind, data):
    W, chosen = data.draw(weights()), scheme(kind)
    W.flags.writeable = False
    arrays = chosen.encode(W)
    assert {leaf: (x.shape, x.dtype) for leaf, x in arrays.items()} == chosen.leaves(W.shape, W.dtype)
    alone = chosen.encode(W[1:2])
    assert all(alone[leaf].tobytes() == arrays[leaf][1:2].tobytes() for leaf in arrays)
    whole = chosen.decode(arrays, W.shape, ALL)
    assert whole.dtype == "float32"
    ids = np.array([2, 0, 2])
    assert chosen.decode(arrays, W.shape, ids).tobytes() == whole[ids].tobytes()
    assert chosen.decode(arrays, W.shape, slice(1, 3)).tobytes() == whole[1:3].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_it_decodes_shifts_and_makes_bytes_to_the_same_bits_in_the_strict_namespace(kind):
    chosen, rng = scheme(kind), np.random.default_rng(0)
    W, delta = rng.standard_normal((3, 96)).astype("float32"), rng.standard_normal((3, 3)).astype("float32")
    arrays = chosen.encode(W)
    wanted = {"rows": chosen.decode(arrays, W.shape, slice(1, 3)),
              **(chosen.shifted(arrays, W.shape, delta) if chosen.has_offset else {})}
    data = to_blocks(chosen, arrays, W.shape)
    with use(strict):
        moved = {leaf: strict.asarray(x) for leaf, x in arrays.items()}
        found = {"rows": chosen.decode(moved, W.shape, slice(1, 3)),
                 **(chosen.shifted(moved, W.shape, strict.asarray(delta)) if chosen.has_offset else {})}
        assert all(isinstance(x, strict.ndarray) for x in found.values())
        assert to_blocks(chosen, moved, W.shape).tobytes() == data.tobytes()
        bits_found = {leaf: to_host(x).tobytes() for leaf, x in found.items()}
    assert bits_found == {leaf: x.tobytes() for leaf, x in wanted.items()}


# ---- changes of m

@given(kind=st.sampled_from(["q4_1", "q5_1"]), data=st.data(), dtype=dtypes(), size=st.integers(-12, 6))
def test_a_shifted_m_is_m_plus_delta_rounded_once_to_float16_and_codes_and_d_are_not_touched(kind, data, dtype, size):
    W, chosen = data.draw(weights()), scheme(kind)
    arrays = chosen.encode(W)
    delta = np.ldexp(np.random.default_rng(data.draw(seeds())).standard_normal(arrays["m"].shape), size).astype(dtype)
    found = chosen.shifted(arrays, W.shape, delta)
    assert found["codes"] is arrays["codes"] and found["d"] is arrays["d"] and found["m"].dtype == "float16"
    wanted = wide(arrays["m"]) + wide(delta)
    half = wide(np.maximum(np.spacing(abs(found["m"])), np.float16(2 ** -24))) / 2
    assert within(found["m"], wanted, half + 2.0 ** -53 * abs(wanted))
    after, step = chosen.decode(found, W.shape, ALL), np.repeat(wanted + 0 * wanted, BLOCK, axis=1)
    exact = np.repeat(wide(arrays["d"]), BLOCK, axis=1) * codes(chosen, arrays, W.shape).reshape(W.shape) + step
    bound = np.repeat(half + 2.0 ** -53 * abs(wanted), BLOCK, axis=1) + 2.0 ** -24 * wide(abs(after))
    assert within(after, exact, bound + 2.0 ** -149)


@given(kind=st.sampled_from(["q4_1", "q5_1"]), seed=seeds())
def test_a_shift_is_exact_on_dyadic_data(kind, seed):
    rng, chosen = np.random.default_rng(seed), scheme(kind)
    last = 2 ** chosen.bits - 1
    q = rng.integers(0, last + 1, (3, 2, BLOCK))
    q[..., 0], q[..., -1] = 0, last
    m = rng.integers(-64, 64, (3, 2)) * 2.0 ** -6
    W = (rng.integers(1, 8, (3, 2, 1)) * 2.0 ** -8 * q + m[..., None]).reshape(3, 64).astype("float32")
    delta = (rng.integers(-64, 64, (3, 2)) * 2.0 ** -6).astype("float32")
    found = chosen.shifted(chosen.encode(W), W.shape, delta)
    assert chosen.decode(found, W.shape, ALL).tobytes() == (W + np.repeat(delta, BLOCK, axis=1)).tobytes()


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q8_0"])
def test_a_kind_without_an_offset_refuses_a_change(kind):
    chosen = scheme(kind)
    arrays = chosen.encode(np.ones((2, 64), "float32"))
    with pytest.raises(ValueError, match=f"{kind.upper()} has no offset that a change could be merged into"):
        chosen.shifted(arrays, (2, 64), np.zeros((2, 2)))


@pytest.mark.parametrize("shape, value, words", [
    ((2, 4), 0.0, r"the change is \[2, 4\], and the weight \[2, 64\] has 2 groups"),
    ((2, 2), np.nan, "NaN or infinity"),
    ((2, 2), -7e4, "the offset m of a group is -69999, too large for float16")])
def test_a_change_that_cannot_be_kept_is_refused(shape, value, words):
    chosen = scheme("q4_1")
    arrays = chosen.encode(np.ones((2, 64), "float32"))
    with pytest.raises(ValueError, match=words):
        chosen.shifted(arrays, (2, 64), np.full(shape, value))


# ---- edges

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1e7, -1e7, 3e38, 1e300])
def test_a_scale_or_an_offset_that_is_too_large_for_float16_is_refused(kind, value):
    for W in (np.full((1, 32), value), np.linspace(-value, value, 32)[None]):
        with pytest.raises(ValueError, match="of a group is .*, too large for float(16|32)"):
            scheme(kind).encode(W if abs(value) > 1e38 else W.astype("float32"))


@pytest.mark.parametrize("kind", [*KINDS, "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused(kind, value):
    W = np.random.default_rng(0).standard_normal((3, 64)).astype("float32")
    W[1, 40] = value
    for chosen in (scheme(kind), *([scheme("int4", zero="rounded")] if kind == "int4" else [])):
        with pytest.raises(ValueError, match="expected finite numbers"), np.errstate(invalid="ignore"):
            chosen.encode(W)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_that_is_not_made_of_whole_blocks_is_refused(kind):
    for shape, words in (((2, 48), "48 columns are not whole groups of 32"), ((0, 32), r"\[0, 32\] is empty")):
        with pytest.raises(ValueError, match=words):
            scheme(kind).encode(np.ones(shape, "float32"))
        with pytest.raises(ValueError, match=words):
            scheme(kind).leaves(shape, "float32")


def test_another_kind_is_refused_and_options_there_are_none():
    with pytest.raises(ValueError, match="kind is 'q4_2'; expected one of q4_0, q4_1"):
        Blocks("q4_2")
    with pytest.raises(ValueError, match="q4_0 has no such options: group"):
        scheme("q4_0", group=32)
    assert scheme("q4_0") == Blocks("q4_0") and str(Blocks("q5_1")) == "Q5_1"


# ---- figures of the page

def table(name: str) -> list[str]:
    found = re.search(rf"^ +{name}" + r" +(\S+)" * len(KINDS) + "$", ggml.__doc__ or "", re.M)
    assert found, name
    return list(found.groups())


def test_bits_and_errors_of_the_page_are_those_that_are_measured():
    W = np.random.default_rng(0).standard_normal((256, 4096)).astype("float32")
    made = [QuantizedWeight.of(W, scheme(kind)) for kind in KINDS]
    assert [f"{q.nbytes * 8 / W.size}" for q in made] == table("bits")
    assert [f"{np.linalg.norm(q.dense().data - W) / np.linalg.norm(W):.1%}" for q in made] == table("error")
