"""Affine quantization in groups: its error, the same codes again, scales by powers of two, offsets that move alone.

u is the unit roundoff of the arithmetic, 2^-24 or 2^-53, and M = 2^N - 1 the largest code. The bound of the error:

    x = (w - b) / a           computed with two roundings; it is at most M (1 + 2u + us), us the roundoff of a as stored
    |q - x| <= 1/2 + M (5u + us)          rounding to a code, those roundings, and the cut at M
    |fl(fl(a q) + b) - (a q + b)| <= 2u (a M + |w~|)
"""
from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minipeft.backend import to_host, use
from minipeft.laws.bounds import wide, within
from minipeft.quant import affine
from minipeft.quant.affine import Affine
from minipeft.quant.packing import unpacked
from minipeft.quant.scheme import scheme
from minipeft.quant.weight import QuantizedWeight
from tests.strategies import dtypes, seeds
from tests.strict_namespace import strict

ALL = slice(None)
BITS = (2, 3, 4, 8)
GROUPS = (2, 5, 32)


def bits_of() -> st.SearchStrategy[int]:
    return st.sampled_from(BITS)


def schemes(**fixed: Any) -> st.SearchStrategy[Affine]:
    drawn = {"bits": bits_of(), "group": st.sampled_from(GROUPS), "zero": st.sampled_from(["float", "rounded"]),
             "stored": st.sampled_from([None, "float16", "float32"])}
    return st.builds(Affine, **{**drawn, **{name: st.just(value) for name, value in fixed.items()}})


@st.composite
def weights(draw: st.DrawFn, group: int, dtype: str) -> np.ndarray:
    """Three rows of four groups, of several sizes and offsets; some are one-sided, constant, sparse or integers."""
    rng = np.random.default_rng(draw(seeds()))
    w = rng.standard_normal((12, group)) * 10.0 ** rng.uniform(-4, 2, (12, 1))
    w += rng.choice([0, 0, 1, -1, 30], (12, 1)) * rng.uniform(0, 2, (12, 1))
    w[rng.random(12) < 0.1] = 0
    w[rng.random(12) < 0.1] = rng.standard_normal()
    w *= rng.random((12, group)) < draw(st.sampled_from([1, 1, 0.2]))
    if draw(st.booleans()):
        w = np.rint(w * 4) / 4
    return w.astype(dtype).reshape(3, 4 * group)


def decoded(chosen: Affine, arrays: Any, shape: tuple[int, int]) -> np.ndarray:
    return chosen.decode(arrays, shape, ALL)


def codes(chosen: Affine, arrays: Any, d_in: int) -> np.ndarray:
    q = unpacked(arrays["codes"], chosen.bits, d_in)
    return q.reshape(len(q), -1, chosen.group).astype("int64")


def dyadic(seed: int, group: int, bits: int) -> dict[str, np.ndarray]:
    """{W, delta}: numbers whose sums and products with a code are exact in float32 and float64; all codes occur."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 2 ** bits, (3, 4, group))
    q[..., 0], q[..., -1] = 0, 2 ** bits - 1
    a = rng.integers(1, 8, (3, 4, 1)) * 2.0 ** -10
    b = rng.integers(-64, 64, (3, 4, 1)) * 2.0 ** -8
    return {"W": (a * q + b).reshape(3, -1), "delta": rng.integers(-64, 64, (3, 4)) * 2.0 ** -8}


# ---- the equation

@given(data=st.data(), chosen=schemes(zero="float", stored=None), dtype=dtypes())
def test_scale_offset_and_codes_are_those_of_the_equation_on_fractions(data, chosen, dtype):
    """Scale and offset up to the rounding of a; the code is one of those nearest to (w - b) / a."""
    W = data.draw(weights(chosen.group, dtype))
    arrays, M, u = chosen.encode(W), 2 ** chosen.bits - 1, Fraction(float(np.finfo(dtype).eps)) / 2
    grouped, q = W.reshape(3, 4, -1), codes(chosen, arrays, W.shape[1])
    for row, group in ((0, 0), (1, 2), (2, 3)):
        w = [Fraction(float(x)) for x in grouped[row, group]]
        a, b = (Fraction(float(arrays[leaf][row, group])) for leaf in ("scale", "offset"))
        assert b == min(w)
        if max(w) == min(w):
            assert a == 1 and not q[row, group].any()
            continue
        assert abs(a - (max(w) - min(w)) / M) <= 3 * u * a
        for x, code in zip(w, q[row, group]):
            assert abs(code - (x - b) / a) <= Fraction(1, 2) + M * 5 * u


@given(data=st.data(), chosen=schemes(zero="rounded", stored=None), dtype=dtypes())
def test_with_rounded_zero_points_0_is_exact_and_z_is_a_code(data, chosen, dtype):
    W = data.draw(weights(chosen.group, dtype))
    W[:, ::3] = 0
    arrays, M = chosen.encode(W), 2 ** chosen.bits - 1
    assert arrays["zero"].dtype == "int16" and (0 <= arrays["zero"]).all() and (arrays["zero"] <= M).all()
    assert (decoded(chosen, arrays, W.shape)[W == 0] == 0).all()
    low, top = (np.clip(f(W.reshape(3, 4, -1), axis=2), *ends) for f, ends in
                ((np.min, (None, 0)), (np.max, (0, None))))
    span = wide(top) - wide(low)
    wanted = np.where(span == 0, 1, span / M)
    assert within(arrays["scale"], wanted, wanted * 3 * float(np.finfo(dtype).eps))
    assert within(arrays["zero"], -wide(low) / wanted, 0.5 + 0 * wanted + M * 5 * float(np.finfo(dtype).eps))


@given(data=st.data(), chosen=schemes(), dtype=dtypes())
def test_the_error_is_at_most_half_a_step_and_what_is_rounded_on_the_way(data, chosen, dtype):
    W = data.draw(weights(chosen.group, dtype))
    arrays = chosen.encode(W)
    found = decoded(chosen, arrays, W.shape)
    kept = arrays["scale"].dtype
    u, us, M = np.finfo(found.dtype).eps / 2, np.finfo(kept).eps / 2, 2 ** chosen.bits - 1
    a = np.repeat(wide(arrays["scale"]), chosen.group, axis=1)
    bound = a * (0.5 + M * (5 * u + us)) + 2 * u * (a * M + abs(wide(found)))
    if chosen.zero == "float":
        lowest = W.reshape(3, 4, -1).min(axis=2)
        bound += np.repeat(abs(wide(arrays["offset"]) - wide(lowest)), chosen.group, axis=1)
    assert found.dtype == ("float64" if kept == "float64" else "float32")
    assert within(found, W, bound)


@given(data=st.data(), chosen=schemes(zero="float", stored="float16"), dtype=dtypes())
def test_codes_are_those_nearest_to_the_weights_under_the_scale_and_offset_that_are_stored(data, chosen, dtype):
    """So an offset that float16 rounds, by more than a step even, costs nothing at most weights."""
    W = data.draw(weights(chosen.group, dtype))
    arrays, M = chosen.encode(W), 2 ** chosen.bits - 1
    a, b = (wide(arrays[leaf])[..., None] for leaf in ("scale", "offset"))
    steps = (wide(W).reshape(3, 4, -1) - b) / a
    wanted = np.clip(steps, 0, M)
    assert within(codes(chosen, arrays, W.shape[1]), wanted, 0.5 + 4 * 2.0 ** -24 * (abs(steps) + 1))


@given(chosen=schemes(), seed=seeds(), dtype=dtypes())
def test_decoding_is_a_q_plus_b_or_a_times_q_less_z_with_each_operation_rounded_once(chosen, seed, dtype):
    W = np.random.default_rng(seed).standard_normal((3, 4 * chosen.group)).astype(dtype)
    arrays = chosen.encode(W)
    found = decoded(chosen, arrays, W.shape)
    q = codes(chosen, arrays, W.shape[1]).astype(found.dtype)
    a, b, z = (arrays[leaf].astype(found.dtype)[..., None] if leaf in arrays else None
               for leaf in ("scale", "offset", "zero"))
    wanted = a * q + b if z is None else a * (q - z)
    assert found.tobytes() == wanted.tobytes()


# ---- laws

@given(data=st.data(), bits=bits_of(), group=st.sampled_from(GROUPS), dtype=dtypes(), far=st.integers(0, 60))
def test_quantized_again_it_has_the_same_codes_and_offset_and_nearly_the_same_scale(data, bits, group, dtype, far):
    """Also where the offset is so much larger than the range that neighboring codes have the same number."""
    chosen = Affine(bits, group)
    W = data.draw(weights(group, dtype)) + np.asarray(2.0 ** (far - 30), dtype)
    first = chosen.encode(W)
    found = decoded(chosen, first, W.shape)
    again = chosen.encode(found)
    assert first["offset"].tobytes() == again["offset"].tobytes()
    assert first["codes"].tobytes() == again["codes"].tobytes()
    u, a, varies = np.finfo(dtype).eps / 2, wide(first["scale"]), codes(chosen, first, W.shape[1]).any(axis=2)
    top = wide(found.reshape(3, 4, -1).max(axis=2))
    bound = (1 + 8 * u) * (3 * u * a + u * abs(top) / (2 ** bits - 1))
    assert within(again["scale"][varies], a[varies], bound[varies])


@given(seed=seeds(), bits=bits_of(), group=st.sampled_from(GROUPS), dtype=dtypes())
def test_where_its_numbers_are_exact_quantized_again_every_bit_is_the_same(seed, bits, group, dtype):
    W = dyadic(seed, group, bits)["W"].astype(dtype)
    chosen = Affine(bits, group)
    first = chosen.encode(W)
    found = decoded(chosen, first, W.shape)
    assert found.tobytes() == W.tobytes()
    again = chosen.encode(found)
    assert {leaf: x.tobytes() for leaf, x in first.items()} == {leaf: x.tobytes() for leaf, x in again.items()}


@given(data=st.data(), chosen=schemes(zero="rounded", stored=None), dtype=dtypes())
def test_with_rounded_zero_points_a_group_that_uses_its_ends_has_the_same_codes_and_z_again(data, chosen, dtype):
    W = data.draw(weights(chosen.group, dtype))
    first = chosen.encode(W)
    again = chosen.encode(decoded(chosen, first, W.shape))
    q, z, M = codes(chosen, first, W.shape[1]), first["zero"], 2 ** chosen.bits - 1
    ends = ((q.min(axis=2) == 0) | (z == 0)) & ((q.max(axis=2) == M) | (z == M))
    assert (codes(chosen, again, W.shape[1]) == q)[ends].all() and (again["zero"] == z)[ends].all()


@given(data=st.data(), chosen=schemes(stored=None), dtype=dtypes(), k=st.integers(-40, 40))
def test_weights_times_a_power_of_two_have_the_same_codes_and_all_else_times_that_power(data, chosen, dtype, k):
    W = data.draw(weights(chosen.group, dtype))
    once, scaled = chosen.encode(W), chosen.encode(np.ldexp(W, k))
    constant = once["scale"] == 1
    assert once["codes"].tobytes() == scaled["codes"].tobytes()
    assert (np.ldexp(once["scale"], k)[~constant] == scaled["scale"][~constant]).all()
    if "offset" in once:
        assert np.ldexp(once["offset"], k).tobytes() == scaled["offset"].tobytes()
    else:
        assert (once["zero"] == scaled["zero"]).all()


@given(data=st.data(), chosen=schemes(), dtype=dtypes())
def test_no_row_depends_on_another_and_some_rows_decode_to_the_bits_that_they_have_in_the_whole(data, chosen, dtype):
    W = data.draw(weights(chosen.group, dtype))
    arrays = chosen.encode(W)
    alone = chosen.encode(W[1:2])
    assert all(alone[leaf].tobytes() == arrays[leaf][1:2].tobytes() for leaf in arrays)
    whole = decoded(chosen, arrays, W.shape)
    ids = np.array([2, 0, 2])
    assert chosen.decode(arrays, W.shape, ids).tobytes() == whole[ids].tobytes()
    assert chosen.decode(arrays, W.shape, slice(1, 3)).tobytes() == whole[1:3].tobytes()


def test_a_matrix_that_is_encoded_a_few_rows_at_a_time_is_the_one_that_is_encoded_at_once(monkeypatch):
    W = np.random.default_rng(0).standard_normal((7, 64)).astype("float32")
    for chosen in (scheme("int3"), scheme("int4", zero="rounded"), scheme("q5_1"), scheme("q8_0")):
        at_once = chosen.encode(W)
        monkeypatch.setattr("minipeft.quant.groups.CHUNK", 130)
        found = chosen.encode(W)
        monkeypatch.undo()
        assert {leaf: x.tobytes() for leaf, x in found.items()} == {leaf: x.tobytes() for leaf, x in at_once.items()}


@given(data=st.data(), chosen=schemes(), dtype=dtypes())
def test_the_leaves_are_those_that_are_announced_and_the_arguments_are_not_written_to(data, chosen, dtype):
    W = data.draw(weights(chosen.group, dtype))
    W.flags.writeable = False
    arrays = chosen.encode(W)
    assert {leaf: (x.shape, x.dtype) for leaf, x in arrays.items()} == chosen.leaves(W.shape, W.dtype)
    before = {leaf: x.tobytes() for leaf, x in arrays.items()}
    for x in arrays.values():
        x.flags.writeable = False
    decoded(chosen, arrays, W.shape)
    chosen.shifted(arrays, W.shape, np.zeros((3, 4)))
    assert {leaf: x.tobytes() for leaf, x in arrays.items()} == before


@pytest.mark.parametrize("zero", ["float", "rounded"])
@pytest.mark.parametrize("bits", BITS)
def test_it_decodes_to_the_same_bits_in_the_strict_namespace_and_shifts_there(bits, zero):
    chosen = Affine(bits, 8, zero, "float16")
    W = np.random.default_rng(0).standard_normal((3, 24)).astype("float32")
    delta = np.random.default_rng(1).standard_normal((3, 3)).astype("float32")
    arrays = chosen.encode(W)
    wanted = {"some rows": decoded(chosen, arrays, W.shape)[1:3], "zero points": chosen.zero_points(arrays),
              **chosen.shifted(arrays, W.shape, delta)}
    with use(strict):
        moved = {leaf: strict.asarray(x) for leaf, x in arrays.items()}
        found = {"some rows": chosen.decode(moved, W.shape, slice(1, 3)), "zero points": chosen.zero_points(moved),
                 **chosen.shifted(moved, W.shape, strict.asarray(delta))}
        assert all(isinstance(x, strict.ndarray) for x in found.values())
        bits_found = {leaf: to_host(x).tobytes() for leaf, x in found.items()}
    assert bits_found == {leaf: x.tobytes() for leaf, x in wanted.items()}


# ---- changes of the offset

@given(seed=seeds(), bits=bits_of(), group=st.sampled_from(GROUPS), dtype=dtypes())
def test_a_change_of_offsets_is_exact_on_dyadic_data_and_moves_neither_codes_nor_scales(seed, bits, group, dtype):
    made, chosen = dyadic(seed, group, bits), Affine(bits, group)
    W, delta = made["W"].astype(dtype), made["delta"].astype(dtype)
    arrays = chosen.encode(W)
    found = chosen.shifted(arrays, W.shape, delta)
    assert found["codes"] is arrays["codes"] and found["scale"] is arrays["scale"]
    assert found["offset"].dtype == dtype
    assert decoded(chosen, found, W.shape).tobytes() == (W + np.repeat(delta, group, axis=1)).tobytes()


@given(data=st.data(), bits=bits_of(), group=st.sampled_from(GROUPS))
def test_in_float64_a_change_of_offsets_is_exact_to_1e_15_of_the_numbers_that_are_added(data, bits, group):
    chosen = Affine(bits, group)
    W = data.draw(weights(group, "float64"))
    delta = data.draw(weights(group, "float64"))[:, :4]
    arrays = chosen.encode(W)
    found = decoded(chosen, chosen.shifted(arrays, W.shape, delta), W.shape)
    change = np.repeat(delta, group, axis=1)
    before = decoded(chosen, arrays, W.shape)
    largest = 2 * abs(np.repeat(arrays["offset"], group, axis=1)) + abs(before) + abs(change)
    assert within(found, wide(before) + wide(change), 1e-15 * wide(largest))


@given(data=st.data(), chosen=schemes(zero="float"), dtype=dtypes())
def test_a_shifted_offset_is_the_number_of_its_dtype_that_is_nearest_to_the_sum(data, chosen, dtype):
    W = data.draw(weights(chosen.group, dtype))
    delta = data.draw(weights(chosen.group, dtype))[:, :4]
    arrays = chosen.encode(W)
    found = chosen.shifted(arrays, W.shape, delta)["offset"]
    wanted = wide(arrays["offset"]) + wide(delta)
    assert within(found, wanted, wide(np.spacing(abs(found))) / 2 + 2.0 ** -53 * abs(wanted))


@given(data=st.data(), chosen=schemes(zero="rounded"), dtype=dtypes())
def test_a_rounded_zero_point_loses_at_most_half_a_step_of_a_change_and_all_of_one_below_that(data, chosen, dtype):
    W = data.draw(weights(chosen.group, dtype))
    arrays = chosen.encode(W)
    a = wide(arrays["scale"])
    steps = np.random.default_rng(data.draw(seeds())).uniform(-1000, 1000, (3, 4))
    found = chosen.shifted(arrays, W.shape, (a * steps).astype("float64"))
    assert found["codes"] is arrays["codes"] and found["scale"] is arrays["scale"] and found["zero"].dtype == "int16"
    moved = -a * (wide(found["zero"]) - wide(arrays["zero"]))
    assert within(moved, a * steps, a * (0.5 + 1e-12))
    small = chosen.shifted(arrays, W.shape, (0.49 * a * np.sign(steps)).astype("float64"))
    assert small["zero"].tobytes() == arrays["zero"].tobytes()


@given(bits=bits_of(), seed=seeds())
def test_a_merge_into_zero_points_below_0_and_above_the_codes_is_decoded(bits, seed):
    """Steps of a power of two, so that whole steps are exact."""
    q = np.random.default_rng(seed).integers(0, 2 ** bits, (2, 32)) - 2 ** (bits - 1)
    q[:, :2] = -2 ** (bits - 1), 2 ** (bits - 1) - 1
    W, delta = q / 8.0, np.array([[1000.0], [-1000.0]])
    chosen = Affine(bits, zero="rounded")
    arrays = chosen.shifted(chosen.encode(W), W.shape, delta)
    assert (arrays["zero"] < 0).any() and (arrays["zero"] > 2 ** bits).any()
    assert decoded(chosen, arrays, W.shape).tobytes() == (W + delta).tobytes()


def test_a_change_may_have_wider_groups_than_the_weight():
    W = np.random.default_rng(0).standard_normal((2, 24))
    chosen = Affine(4, 4)
    arrays = chosen.encode(W)
    delta = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = chosen.shifted(arrays, W.shape, delta)
    assert found["offset"].tobytes() == (arrays["offset"] + np.repeat(delta, 2, axis=1)).tobytes()


@pytest.mark.parametrize("shape", [(2, 4), (2, 12), (1, 6), (3, 6), (2, 0), (6,), (2, 6, 1)])
def test_a_change_of_another_shape_is_refused(shape):
    chosen, W = Affine(4, 4), np.random.default_rng(0).standard_normal((2, 24))
    with pytest.raises(ValueError, match=r"the change is \[.*expected \[2, n\], where n divides 6"):
        chosen.shifted(chosen.encode(W), W.shape, np.zeros(shape))


@pytest.mark.parametrize("zero, stored, change, words", [
    ("float", None, np.nan, "holds NaN or infinity"), ("rounded", None, -np.inf, "holds NaN or infinity"),
    ("float", "float16", 1e5, "the offset of a group is .*, too large for float16"),
    ("float", "float32", 1e39, "the offset of a group is .*, too large for float32"),
    ("rounded", None, 1e5, "a zero point would become -.*; expected at most 32767")])
def test_a_change_that_cannot_be_kept_is_refused_and_the_arrays_stay_as_they_were(zero, stored, change, words):
    chosen, W = Affine(4, 4, zero, stored), np.random.default_rng(0).standard_normal((2, 24))
    arrays = chosen.encode(W)
    before = {leaf: x.tobytes() for leaf, x in arrays.items()}
    delta = np.zeros((2, 6))
    delta[1, 3] = change
    with pytest.raises(ValueError, match=words):
        chosen.shifted(arrays, W.shape, delta)
    assert {leaf: x.tobytes() for leaf, x in arrays.items()} == before


def test_a_scale_of_0_from_a_file_takes_up_no_change_and_none_is_lost_in_silence():
    chosen = Affine(4, 2, zero="rounded")
    arrays = {**chosen.encode(np.array([[1.0, 2.0]])), "scale": np.zeros((1, 1))}
    for change in 0.0, 1.0:
        with pytest.raises(ValueError, match="a zero point would become (nan|-?inf)"):
            chosen.shifted(arrays, (1, 2), np.array([[change]]))


@given(data=st.data(), chosen=schemes(stored=None), dtype=dtypes())
def test_zero_points_give_the_other_form_of_the_equation(data, chosen, dtype):
    W = data.draw(weights(chosen.group, dtype))
    arrays = chosen.encode(W)
    z, u, M = chosen.zero_points(arrays), np.finfo(dtype).eps / 2, 2 ** chosen.bits - 1
    assert z.shape == arrays["scale"].shape and z.dtype == dtype
    a, q = wide(arrays["scale"])[..., None], codes(chosen, arrays, W.shape[1])
    found = (a * (q - wide(z)[..., None])).reshape(W.shape)
    bound = (3 * u * a * (2 * M + 2 * abs(wide(z)[..., None])) + 0 * q).reshape(W.shape)
    assert within(found, decoded(chosen, arrays, W.shape), bound)


# ---- edges

@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", BITS)
def test_groups_of_equal_weights_are_exact(bits, dtype):
    tiny, largest = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    W = np.repeat(np.array([[0, -0.0, 1 / 3, -7], [tiny, -tiny, largest, -largest]], dtype), 32, axis=1)
    chosen = Affine(bits)
    arrays = chosen.encode(W)
    assert (arrays["scale"] == 1).all() and not codes(chosen, arrays, 128).any()
    assert (decoded(chosen, arrays, W.shape) == W).all()


@pytest.mark.parametrize("zero", ["float", "rounded"])
@given(seed=seeds(), bits=bits_of(), dtype=dtypes(), size=st.integers(1, 2000))
def test_subnormal_weights_keep_the_bound_and_few_of_them_are_exact(zero, seed, bits, dtype, size):
    tiny = np.finfo(dtype).smallest_subnormal
    units = np.random.default_rng(seed).integers(-size, size + 1, (3, 64))
    W = (units * tiny).astype(dtype)
    chosen = Affine(bits, zero=zero)
    arrays = chosen.encode(W)
    found = decoded(chosen, arrays, W.shape)
    half = np.repeat(wide(arrays["scale"]) / 2, 32, axis=1)
    assert within(found, W, half)
    if zero == "float" and 2 * size < 2 ** bits:
        assert found.tobytes() == (W + 0.0).tobytes()


def test_a_range_that_the_dtype_can_hold_is_right_up_to_its_end_and_a_longer_one_is_refused():
    largest = np.finfo("float32").max
    W = np.linspace(-0.49 * largest, 0.49 * largest, 32, dtype="float32")[None]
    for zero in ("float", "rounded"):
        found = Affine(4, zero=zero)
        assert within(decoded(found, found.encode(W), W.shape), W, wide(found.encode(W)["scale"]) * 0.5001 + 0 * W)
        for row in (W * 2, W * np.float32(2.04)):
            with pytest.raises(ValueError, match="overflow float32|too large for float32"):
                found.encode(row)
        wider = Affine(4, zero=zero).encode((W * 2).astype("float64"))
        assert np.isfinite(wider["scale"]).all()


def test_weights_that_are_too_large_for_the_dtype_in_which_scales_are_kept_are_refused():
    with pytest.raises(ValueError, match="the offset of a group is -70000, too large for float16"):
        Affine(4, 2, stored="float16").encode(np.array([[-70000.0, 1.0]]))
    with pytest.raises(ValueError, match="the scale of a group is 666667, too large for float16"):
        Affine(2, 2, stored="float16").encode(np.array([[0, 2e6]], "float32"))
    with pytest.raises(ValueError, match="too large for float32"):
        Affine(2, 2, stored="float32").encode(np.array([[0, 1e300]]))


@pytest.mark.parametrize("shape, words", [((2, 48), r"48 columns are not whole groups of 32; .* that 32 divides"),
                                          ((0, 32), r"\[0, 32\] is empty"), ((2, 0), r"\[2, 0\] is empty")])
def test_a_matrix_that_is_not_made_of_whole_groups_is_refused(shape, words):
    for chosen in (Affine(4), Affine(4, zero="rounded")):
        for call in (lambda: chosen.leaves(shape, "float32"), lambda: chosen.encode(np.ones(shape, "float32"))):
            with pytest.raises(ValueError, match=words):
                call()


@pytest.mark.parametrize("options, words", [
    (dict(group=1), "group is 1; expected an integer >= 2"), (dict(group=2.0), "group is 2.0"),
    (dict(group=True), "group is True"), (dict(zero="int"), "zero is 'int'; expected 'float' or 'rounded'"),
    (dict(stored="float8"), "stored is 'float8'; expected one of None, 'float16'"),
    (dict(stored=np.dtype("float16")), r"stored is dtype\('float16'\); expected one of None, 'float16'"),
    (dict(bits=4), "no option 'bits'; expected group, zero, stored")])
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        scheme("int4", **options)


def test_bits_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="bits is 5; expected one of 2, 3, 4, 8"):
        Affine(5)
    with pytest.raises(ValueError, match="kind is 'int5'"):
        scheme("int5")


def test_a_scheme_says_in_words_what_it_is_and_equal_settings_are_equal():
    assert str(scheme("int4")) == "int4, groups of 32"
    assert str(scheme("int3", group=np.int64(64), zero="rounded", stored="float16")) == (
        "int3, groups of 64, rounded zero points, scales in float16")
    assert scheme("int3", group=np.int64(64)) == Affine(3, 64) and scheme("int3").kind == "int3"


# ---- figures of the page

def table(name: str) -> list[str]:
    """The row of the page's table that begins with `name`."""
    found = re.search(rf"^ +{re.escape(name)} +(\S+%) +(\S+%) +(\S+%) +(\S+%)$", affine.__doc__ or "", re.M)
    assert found, name
    return list(found.groups())


def test_the_errors_of_the_page_are_those_that_are_measured():
    W = np.random.default_rng(0).standard_normal((512, 4096))
    delta = np.random.default_rng(1).standard_normal((512, 128))
    rows: dict[str, list[str]] = {'zero="float"': [], 'zero="rounded"': [], "its merge": []}
    for bits in BITS:
        for zero in ("float", "rounded"):
            chosen = Affine(bits, zero=zero)
            arrays = chosen.encode(W)
            found = decoded(chosen, arrays, W.shape)
            rows[f'zero="{zero}"'].append(f"{np.linalg.norm(found - W) / np.linalg.norm(W):.1%}")
        merged = decoded(chosen, chosen.shifted(arrays, W.shape, delta), W.shape)
        lost = merged - found - np.repeat(delta, 32, axis=1)
        rows["its merge"].append(f"{np.linalg.norm(lost) / np.linalg.norm(W):.1%}")
    assert rows == {name: table(name) for name in rows}


@pytest.mark.parametrize("stored, more", [(None, 64), ("float32", 64), ("float16", 32)])
def test_the_bits_per_weight_are_those_of_the_page(stored, more):
    W = np.random.default_rng(0).standard_normal((4, 128)).astype("float32")
    for bits in BITS:
        for group in (32, 64):
            weight = QuantizedWeight.of(W, Affine(bits, group, stored=stored))
            assert weight.nbytes * 8 == W.size * (bits + more / group)


def test_a_group_is_not_confused_with_its_neighbors():
    """One group is changed; the others keep every bit."""
    W = np.random.default_rng(0).standard_normal((2, 96))
    other = W.copy()
    other[1, 32:64] *= 3
    for zero in ("float", "rounded"):
        chosen = Affine(3, zero=zero)
        a, b = chosen.encode(W), chosen.encode(other)
        same = np.ones((2, 3), bool)
        same[1, 1] = False
        assert ((a["scale"] == b["scale"]) == same).all()
        assert (codes(chosen, a, 96) == codes(chosen, b, 96))[same].all()
