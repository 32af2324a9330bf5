"""The schemes "nf4" and "fp4" as weights: decoding any rows, devices, dtypes, levels of others, settings."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.backend import use
from minipeft.quant import FourBit, QuantizedWeight, quantize_4bit, scheme
from minipeft.quant.codebooks import LEVELS, NF4
from minipeft.quant.dynamic_map import dynamic_map
from minipeft.quant.scheme import Scheme
from minipeft.quant.weight import decoded
from tests.strict_namespace import strict

KINDS = pytest.mark.parametrize("kind", LEVELS)
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 40))


def matrix(seed: int, shape: tuple[int, int], dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


schemes = st.builds(FourBit, st.sampled_from(sorted(LEVELS)), st.sampled_from([1, 2, 3, 4, 5, 8, 16, 64]),
                    st.booleans())


@given(chosen=schemes, seed=st.integers(0, 2 ** 32 - 1), shape=SHAPES, data=st.data())
def test_any_rows_are_those_rows_of_the_whole_bit_for_bit(chosen, seed, shape, data):
    """Rows begin inside bytes and inside blocks."""
    w = matrix(seed, shape)
    arrays = chosen.encode(w)
    q = quantize_4bit(w, chosen.kind, chosen.blocksize, chosen.double)
    whole = chosen.decode(arrays, shape, slice(None))
    assert whole.tobytes() == q.dequantize().tobytes() and whole.dtype == "float32" and whole.shape == shape
    edges = st.integers(-shape[0], shape[0]) | st.none()
    rows = slice(data.draw(edges), data.draw(edges), data.draw(st.sampled_from([None, 1, 2, -1])))
    assert chosen.decode(arrays, shape, rows).tobytes() == whole[rows].tobytes()
    ids = np.array(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=6)), dtype="int64")
    assert chosen.decode(arrays, shape, ids).tobytes() == whole[ids].tobytes()
    with use(strict):
        device = {leaf: strict.asarray(array) for leaf, array in arrays.items()}
        assert chosen.decode(device, shape, rows).get().tobytes() == whole[rows].tobytes()
        assert chosen.decode(device, shape, strict.asarray(ids)).get().tobytes() == whole[ids].tobytes()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape, size", [((5, 7), 3), ((5, 7), 4), ((6, 8), 3), ((5, 8), 6), ((4, 6), 6), ((3, 5), 64)],
                         ids=str)
def test_rows_begin_anywhere_inside_bytes_and_blocks(shape, size, double):
    chosen, w = FourBit("nf4", size, double), matrix(3, shape)
    arrays = chosen.encode(w)
    whole = quantize_4bit(w, "nf4", size, double).dequantize()
    for first in range(shape[0]):
        for last in range(first, shape[0] + 1):
            assert chosen.decode(arrays, shape, slice(first, last)).tobytes() == whole[first:last].tobytes()
        ids = np.array([first, 0, first])
        assert chosen.decode(arrays, shape, ids).tobytes() == whole[ids].tobytes()


@given(chosen=schemes, seed=st.integers(0, 2 ** 32 - 1), shape=SHAPES, dtype=st.sampled_from(["float16", "float64"]))
def test_numbers_are_computed_in_float32_and_rounded_once(chosen, seed, shape, dtype):
    """Into any dtype of a model, whichever way they are written there."""
    w = matrix(seed, shape, dtype)
    arrays = chosen.encode(w)
    wanted = chosen.decode(arrays, shape, slice(None)).astype(dtype)
    found, plain = decoded(chosen, arrays, shape, dtype), np.empty(shape, dtype)
    Scheme.decode_to(chosen, plain, arrays, shape, slice(0, shape[0]))
    assert found.dtype == dtype and found.tobytes() == wanted.tobytes() == plain.tobytes()
    assert QuantizedWeight.of(w, chosen).dense().data.tobytes() == wanted.tobytes()


def test_a_large_weight_is_decoded_in_pieces_to_the_same_bits():
    w = matrix(0, (301, 1027))
    for chosen in (FourBit("nf4"), FourBit("fp4", 96, double=True)):
        arrays = chosen.encode(w)
        assert decoded(chosen, arrays, w.shape, "float32").tobytes() == chosen.decode(
            arrays, w.shape, slice(None)).tobytes()


@given(chosen=schemes, shape=SHAPES)
def test_leaves_are_as_announced(chosen, shape):
    found = chosen.encode(matrix(0, shape))
    assert {leaf: (a.shape, a.dtype) for leaf, a in found.items()} == chosen.leaves(shape, "float32")


def test_a_weight_takes_four_bits_and_a_scale_for_64_of_them():
    shape = (512, 512)
    assert QuantizedWeight.of(matrix(0, shape), FourBit("nf4")).nbytes * 8 / 512 ** 2 == 4.5
    double = QuantizedWeight.of(matrix(0, shape), FourBit("nf4", double=True)).nbytes - 4  # without the offset
    assert double * 8 / 512 ** 2 == 4 + 8 / 64 + 32 / (64 * 256) == 4.126953125


@KINDS
def test_levels_of_a_checkpoint_are_used_for_both_ways(kind):
    ours = np.array(LEVELS[kind], "float32")
    foreign = FourBit(kind, 8, levels=tuple((ours * np.float32(0.99)).tolist()))
    w = matrix(1, (6, 16))
    arrays = foreign.encode(w)
    codes = np.stack([arrays["packed"] >> 4, arrays["packed"] & 15], axis=1).reshape(-1)
    wanted = np.array(foreign.levels, "float32")[codes] * np.repeat(arrays["absmax"], 8)
    assert foreign.decode(arrays, w.shape, slice(None)).tobytes() == wanted.tobytes()
    y = w.reshape(-1) / np.repeat(arrays["absmax"], 8)
    assert (abs(np.array(foreign.levels)[codes] - y) <= abs(np.array(foreign.levels)[:, None] - y).min(axis=0)
            + 1e-6).all()
    assert foreign != FourBit(kind, 8)


def test_a_nested_map_of_a_checkpoint_is_used():
    other = tuple((np.array(dynamic_map(), "float32") * np.float32(0.5)).tolist())
    ours, foreign = FourBit("nf4", 8, True), FourBit("nf4", 8, True, absmax_levels=other)
    w = matrix(2, (6, 16))
    arrays = ours.encode(w)
    offset = float(arrays["offset"])
    first = lambda chosen: float(abs(chosen.decode(arrays, w.shape, slice(0, 1))[0, :8]).max())  # noqa: E731
    assert first(foreign) - offset == pytest.approx((first(ours) - offset) / 2, rel=1e-4)


def test_levels_that_are_given_and_equal_ours_make_an_equal_scheme():
    assert FourBit("nf4", levels=NF4, absmax_levels=dynamic_map()) == FourBit("nf4") == scheme("nf4")
    assert hash(FourBit("nf4", levels=NF4)) == hash(FourBit("nf4"))
    assert FourBit("nf4", levels=np.array(NF4, "float32")) == FourBit("nf4")


@pytest.mark.parametrize("options, words", [
    ({"levels": (1.0,) * 15}, "levels is .*; expected 16 finite numbers"),
    ({"levels": (float("nan"),) * 16}, "levels is"), ({"levels": (1e39,) * 16}, "levels is"),
    ({"levels": "abc"}, "levels is 'abc'; expected 16 numbers"),
    ({"absmax_levels": (0.0,) * 16}, "absmax_levels is .*; expected 256 finite numbers"),
    ({"blocksize": 0}, "blocksize is 0"), ({"double": None}, "double is None"),
    ({"group": 32}, "nf4 has no option 'group'; expected blocksize, double")])
def test_wrong_settings_are_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        scheme("nf4", **options)


def test_a_scheme_says_what_it_is():
    assert [str(scheme("nf4")), str(scheme("fp4", blocksize=128, double=True))] == [
        "nf4, blocks of 64", "fp4, blocks of 128, double"]


def test_there_is_no_offset_to_merge_into():
    chosen, w = FourBit("nf4", double=True), matrix(0, (4, 8))
    with pytest.raises(ValueError, match="no offset that a change could be merged into"):
        chosen.shifted(chosen.encode(w), w.shape, np.ones((4, 2), "float32"))


@pytest.mark.parametrize("double", [False, True])
def test_an_empty_matrix_is_refused(double):
    chosen = FourBit("nf4", double=double)
    for attempt in (lambda: chosen.encode(np.zeros((0, 3), "float32")), lambda: chosen.leaves((3, 0), "float32")):
        with pytest.raises(ValueError, match="nf4.* cannot hold an empty matrix"):
            attempt()
