"""Norms, scores, logits and activations of huge numbers: what does not fit into the dtype on the way but at the end.

The references are the definitions on longer floats, in which nothing overflows; the bounds are those of law 9. No
warning may be heard: the suite makes an error of each.
"""
from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.engine import ops
from minipeft.engine.tensor import Leaf, value_and_grad
from minipeft.engine.ops import definitions, fused, overflow
from minipeft.laws.bounds import WHOLE_MODEL, close, close_gradients
from tests.models_under_test import FAMILIES, Case, logits
from tests.engine.ops.test_fused import FORMULAS, TINY, U, Call, layer_norm_bound, rms_norm_bound
from tests.strategies import draw_array, dtypes, lay_out, layouts, seeds

pytestmark = pytest.mark.skipif(numpy.finfo(numpy.longdouble).maxexp <= 1024, reason="no longer floats here")
NORMS = {"rms_norm": rms_norm_bound, "layer_norm": layer_norm_bound}
each_norm = pytest.mark.parametrize("name", NORMS)
HUGE = {"float32": [64, 70, 100, 124, 127], "float64": [512, 700, 1000, 1020, 1023]}  # their squares overflow
WIDTH = 7


def norm_call(name: str, seed: int, dtype: str, powers: list[int], layout: str = "plain") -> Call:
    """A row of x for each power of two, times numbers of absolute value in [1/2, 1)."""
    rng = numpy.random.default_rng(seed)
    x = rng.uniform(0.5, 1, (len(powers), WIDTH)) * rng.choice([-1, 1], (len(powers), WIDTH))
    x = numpy.ldexp(x.astype(dtype), numpy.array(powers)[:, None])
    inputs = {"x": lay_out(x, layout), "w": draw_array(seed + 1, (WIDTH,), dtype)}
    if name == "layer_norm":
        inputs["b"] = draw_array(seed + 2, (WIDTH,), dtype)
    return Call(inputs, options={"eps": 1e-6})


def run(f: Any, call: Call, g: Any) -> tuple[Any, dict[str, Any]]:
    """The value, and the gradients of <g, value>."""
    leaves, outs = {leaf: Leaf(x) for leaf, x in call.inputs.items()}, []

    def step() -> Any:
        outs.append(call.run(f, leaves))
        return ops.sum(ops.mul(outs[0], g))

    grads = value_and_grad(step, leaves)[1]
    return outs[0].data, grads


def longer(call: Call) -> Call:
    return Call({leaf: x.astype(numpy.longdouble) for leaf, x in call.inputs.items()}, call.constants, call.options)


@each_norm
@given(st.data(), dtypes(), seeds())
def test_a_norm_of_numbers_whose_squares_overflow_is_that_of_longer_floats_in_value_and_all_gradients(
        name, data, dtype, seed):
    powers = data.draw(st.lists(st.sampled_from([0, 3, *HUGE[dtype]]), min_size=1, max_size=4))
    call = norm_call(name, seed, dtype, powers, data.draw(layouts()))
    g = draw_array(seed + 3, (len(powers), WIDTH), dtype)
    value, grads = run(getattr(fused, name), call, g)
    wide = longer(call)
    wanted, wanted_grads = run(getattr(definitions, name), wide, g.astype(numpy.longdouble))
    bound, *bounds = NORMS[name](wide, g.astype(numpy.longdouble))
    slack = 64 * TINY[dtype]                                   # dx of x near the largest number is no normal number
    assert value.dtype == dtype and (abs(value - wanted) <= 2 * U[dtype] * bound + slack).all()
    for leaf, allowed in zip(call.inputs, bounds, strict=True):
        if leaf != "x":
            allowed = allowed.sum(axis=0) * len(powers)
        assert grads[leaf].dtype == dtype
        assert (abs(grads[leaf] - wanted_grads[leaf]) <= 2 * U[dtype] * allowed + slack).all(), leaf


@each_norm
@given(seeds(), dtypes())
def test_rows_that_do_not_overflow_keep_their_bits_beside_rows_that_do(name, seed, dtype):
    ordinary = norm_call(name, seed, dtype, [0, 5, -3])
    beside = Call(dict(ordinary.inputs), options=ordinary.options)
    huge = norm_call(name, seed, dtype, HUGE[dtype]).inputs["x"]
    beside.inputs["x"] = numpy.concatenate([ordinary.inputs["x"], huge])
    g = draw_array(seed + 3, beside.inputs["x"].shape, dtype)
    value, grads = run(getattr(fused, name), ordinary, g[:3])
    found, found_grads = run(getattr(fused, name), beside, g)
    assert found[:3].tobytes() == value.tobytes() and found_grads["x"][:3].tobytes() == grads["x"].tobytes()


@each_norm
@pytest.mark.parametrize("dtype", U)
def test_a_norm_of_one_axis_overflows_no_more_than_one_of_many(name, dtype):
    call = norm_call(name, 0, dtype, [HUGE[dtype][2]])
    alone = Call({**call.inputs, "x": call.inputs["x"][0]}, options=call.options)
    assert (call_of(name, alone) == call_of(name, call)[0]).all()


def call_of(name: str, call: Call) -> Any:
    return call.run(getattr(fused, name), {leaf: Leaf(x) for leaf, x in call.inputs.items()}).data


@each_norm
@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_nan_or_an_infinity_has_no_norm_and_other_rows_do_not_hear_of_it(name, dtype, bad):
    call = norm_call(name, 0, dtype, [0, HUGE[dtype][1], 0])
    wanted = call_of(name, call)
    call.inputs["x"][0, 2] = bad
    with numpy.errstate(invalid="ignore"):
        found = call_of(name, call)
    assert numpy.isnan(found[0]).all() and found[1:].tobytes() == wanted[1:].tobytes()


@pytest.mark.parametrize("dtype", U)
def test_a_constant_row_of_huge_numbers_has_a_layer_norm_of_0(dtype):
    """Its sum overflows, and its variance is 0; so is epsilon beside it."""
    x = Leaf(numpy.full((2, 8), numpy.finfo(dtype).max, dtype))
    w, b = draw_array(0, (8,), dtype), draw_array(1, (8,), dtype)
    outs = []
    _, grads = value_and_grad(lambda: ops.sum(outs.append(o := ops.layer_norm(x, w, b, eps=1e-12)) or o), {"x": x})
    assert (outs[0].data == b).all() and numpy.isfinite(grads["x"]).all()


def test_the_exponent_bounds_the_largest_number_by_a_power_of_two():
    x = numpy.array([[3.0, -4.5, 0.1], [2 ** -80, 0, 0], [0, 0, 0]], "float32")
    n = overflow.exponent(x, -1)
    assert n.tolist() == [[3], [-79], [0]] and (abs(numpy.ldexp(x, -n)) <= 1).all()


# ---- softmax and cross-entropy


@pytest.mark.parametrize("dtype", U)
def test_softmax_of_both_ends_of_the_range(dtype):
    top = numpy.finfo(dtype).max
    p = ops.softmax(numpy.array([[-top, top, top], [top, -top, 0]], dtype))
    assert p.data.tolist() == [[0, 0.5, 0.5], [1, 0, 0]]


@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_logits_whose_sums_overflow_is_finite_and_right(dtype, smoothing):
    """The losses of two rows, the sum of a row and the sum of the losses do not fit; their means do."""
    top = float(numpy.finfo(dtype).max)
    z = Leaf(numpy.array([[0.8 * top, 0, 0, 0], [0.8 * top, 0, 0, 0], [0.8 * top, -0.8 * top, 0, 0]], dtype))
    labels = numpy.array([1, 2, -100])                                     # the third row's own loss would overflow
    loss, grads = value_and_grad(lambda: ops.cross_entropy(z, labels, smoothing=smoothing), {"z": z})
    target = 1 - smoothing + 3 * smoothing / 4
    assert abs(loss / top - 0.8 * target) <= 16 * U[dtype]
    wanted = numpy.array([[1 - smoothing / 4, smoothing - 1 - smoothing / 4, -smoothing / 4, -smoothing / 4]]) / 2
    assert abs(grads["z"][0] - wanted).max() <= 8 * U[dtype] and (grads["z"][2] == 0).all()


# ---- attention


def attention_call(seed: int, dtype: str, power: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Queries and keys times 2^power, values as they are; a bias, and a causal mask."""
    shapes = {"q": (2, 5, 6), "k": (2, 5, 6), "v": (2, 5, 4)}
    leaves = {name: draw_array(seed + i, shape, dtype) for i, (name, shape) in enumerate(shapes.items())}
    leaves |= {name: numpy.ldexp(leaves[name], power) for name in "qk"}
    mask = numpy.where(numpy.tri(5, dtype=bool), 0, -math.inf).astype(dtype)[None, None]
    return leaves, {"bias": draw_array(seed + 3, (1, 2, 5, 5), dtype), "mask": mask}


@given(seeds(), dtypes(), st.integers(0, 3), st.booleans())
def test_attention_whose_scores_overflow_is_that_of_longer_floats_and_sees_no_hidden_key(seed, dtype, which, masked):
    """Beyond the range the differences of scores are huge, so that a query sees one value; the first sees its own,
    though its score be far below the lowest number that there is."""
    leaves, parts = attention_call(seed, dtype, [63, 66, 90, 120][which] * (8 if dtype == "float64" else 1))
    if not masked:
        parts["mask"] = None
    g = draw_array(seed + 9, (2, 5, 4), dtype)

    def evaluate(f: Any, kind: Any) -> tuple[Any, dict[str, Any]]:
        params = {name: Leaf(x.astype(kind)) for name, x in leaves.items()}
        constants = {name: None if x is None else x.astype(kind) for name, x in parts.items()}
        outs = []

        def step() -> Any:
            outs.append(f(**params, **constants, heads=2, scale=0.5))
            return ops.sum(ops.mul(outs[0], g.astype(kind)))

        grads = value_and_grad(step, params)[1]
        return outs[0].data, grads

    found, grads = evaluate(fused.attention, dtype)
    wanted, wanted_grads = evaluate(definitions.attention, numpy.longdouble)
    assert abs(found - wanted).max() <= 32 * U[dtype] * abs(leaves["v"]).max()
    assert abs(grads["v"] - wanted_grads["v"]).max() <= 64 * U[dtype] * abs(g).max()
    assert all(numpy.isfinite(grad).all() for grad in grads.values())
    if masked:
        assert abs(found[:, 0] - leaves["v"][:, 0]).max() <= 4 * U[dtype] * abs(leaves["v"]).max()


@pytest.mark.parametrize("dtype", U)
def test_scores_that_overflow_are_told_apart_by_a_bias_of_their_own_size(dtype):
    """Scores 1 and 3/4 times a power of two that does not fit: a bias of half of it decides, a small one does not."""
    power = numpy.finfo(dtype).maxexp
    q = numpy.full((1, 2, 1), 2.0 ** (power // 2), dtype)
    k = numpy.array([[[1], [0.75]]], dtype) * q[0, 0, 0]
    bias = numpy.array([[0, 2.0 ** (power - 1)], [0, 2.0 ** (power - 20)]], dtype)
    v = numpy.array([[[5], [7]]], dtype)
    assert ops.attention(q, k, v, bias, heads=1, scale=1.0).data.ravel().tolist() == [7, 5]


@given(seeds(), dtypes())
def test_queries_whose_scores_do_not_overflow_keep_their_bits_beside_those_whose_do(seed, dtype):
    leaves, parts = attention_call(seed, dtype, 3)
    wanted = ops.attention(**leaves, **parts, heads=2, scale=0.5).data
    leaves["q"][:, 3] = numpy.finfo(dtype).max
    found = ops.attention(**leaves, **parts, heads=2, scale=0.5).data
    kept = [0, 1, 2, 4]
    assert found[:, kept].tobytes() == wanted[:, kept].tobytes() and numpy.isfinite(found).all()


@pytest.mark.parametrize("dtype", U)
def test_nan_and_infinities_of_queries_stay_what_they_are(dtype):
    for bad in (math.nan, math.inf, -math.inf):
        leaves, parts = attention_call(1, dtype, 0)
        leaves["q"][0, 2] = bad
        found = ops.attention(**leaves, **parts, heads=2, scale=0.5).data
        assert numpy.isnan(found[0, 2]).all() and numpy.isfinite(found[1]).all()


# ---- activations


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", U)
def test_activations_and_their_derivatives_hold_to_the_end_of_the_range(name, dtype):
    top = float(numpy.finfo(dtype).max)
    x = numpy.array([-top, -1e20, -1e13, -70, 0, 70, 1e13, 1e20, top], dtype)
    p, outs = Leaf(x), []
    f = getattr(ops, name)
    _, grads = value_and_grad(lambda: ops.sum(outs.append(y := f(p)) or ops.mul(y, numpy.ones(9, dtype) / 16)),
                              {"p": p})
    assert outs[0].data.tolist()[4:] == x.tolist()[4:] and (abs(outs[0].data[:4]) < 1e-28).all()
    assert (abs(grads["p"] * 16 - ([0] * 4 + [0.5] + [1] * 4)) < 1e-28).all()


# ---- whole models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float32_model_with_huge_embeddings_computes_what_the_float64_one_does(family):
    """Its activations are some 1e20: their squares and, without a norm in front, their scores overflow in float32."""
    case = Case((family, "q and v"), 1, 1, "float32", 4)
    model, wide = case.model(), Case((family, "q and v"), 1, 1, "float64", 4).model()
    model.embedding.weight.base.data = model.embedding.weight.base.data * numpy.float32(1e20)
    for name, p in wide.base_parameters.items():
        p.data = model.base_parameters[name].data.astype("float64")
    batch = case.batch()
    found, wanted = logits(model, batch), logits(wide, batch)
    assert found.any() and close(found, wanted.astype("float32"), case.u)
    wanted_loss, wanted_grads = value_and_grad(lambda: wide.loss(**batch), dict(wide.base_parameters))
    assert abs(float(model.loss(**batch)) - wanted_loss) <= WHOLE_MODEL * case.u * wanted_loss
    if max(abs(g).max() for g in wanted_grads.values()) < 1e38:  # they do not fit for a post-LN model: 1e20 squared
        _, grads = value_and_grad(lambda: model.loss(**batch), dict(model.base_parameters))
        assert close_gradients(grads, {name: g.astype("float32") for name, g in wanted_grads.items()}, case.u) is None
    else:
        assert family == "post-LN"
