"""The gradient check: it passes what is right, catches what is wrong, and says where."""
from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine.stopped import stop_gradient
from minipeft.engine.tensor import Leaf, Tensor, op
from tests.strategies import draw_array, seeds, shapes


def product_with(db: Any) -> Any:
    """a * b whose VJP for b is the one given: db(g, a)."""
    @op
    def product(a, b):
        return a * b, (lambda g: g * b, lambda g: db(g, a))
    return product


def check(f: Any, params: dict[str, Leaf], seed: int = 0, **options: Any) -> float:
    def step() -> Tensor:  # linear in each parameter, so that differences have no truncation error to hide behind
        out = f(*params.values())
        return ops.sum(ops.mul(out, draw_array(seed + 2, out.shape)))

    return minipeft.check_gradients(step, params, numpy.random.default_rng(seed), **options)


def pair(seed: int, shape: tuple) -> dict[str, Leaf]:
    return {"a": Leaf(draw_array(seed, shape)), "b": Leaf(draw_array(seed + 1, shape))}


@given(seeds(), shapes(0, 3))
def test_a_right_vjp_passes_with_an_error_below_its_tolerance(seed, shape):
    assert 0 <= check(product_with(lambda g, a: g * a), pair(seed, shape), seed) <= 1


WRONG = {
    "sign": lambda g, a: -g * a, "factor": lambda g, a: 2 * g * a, "other input": lambda g, a: g * g,
    "forgotten factor": lambda g, a: g, "zero": lambda g, a: g * 0,
    "off by a millionth": lambda g, a: g * a * (1 + 1e-6),
    "NaN": lambda g, a: g * a * numpy.nan, "infinity": lambda g, a: g * a * numpy.inf,
    "huge": lambda g, a: g * a * 1e200,
    "transposed": lambda g, a: (g * a).T}


@pytest.mark.parametrize("mistake", WRONG)
@given(seeds())
def test_a_wrong_vjp_is_caught_and_its_parameter_named(mistake, seed):
    with pytest.raises(AssertionError, match="^gradient of b: along a random direction the VJP says"), \
            numpy.errstate(invalid="ignore"):
        check(product_with(WRONG[mistake]), pair(seed, (3, 3)), seed)


@pytest.mark.parametrize("claimed", [1e-9, 2e-9])
def test_a_wrong_gradient_of_a_small_parameter_does_not_hide_behind_a_strongly_curved_one(claimed):
    """Along one direction for both, the error of a's differences is larger than all of b's gradient."""
    params = {"a": Leaf(draw_array(0, (5,)) * 0.05), "b": Leaf(draw_array(1, (5,)))}

    @op
    def faint(b):
        return b * 1e-9, (lambda g: g * claimed,)

    def step() -> Tensor:
        return ops.sum(ops.add(ops.tanh(ops.mul(params["a"], 20.0)), faint(params["b"])))

    minipeft.check_gradients(step, params, numpy.random.default_rng(0), each=False)
    if claimed == 1e-9:
        minipeft.check_gradients(step, params, numpy.random.default_rng(0), each=True)
    else:
        with pytest.raises(AssertionError, match="gradient of b"):
            minipeft.check_gradients(step, params, numpy.random.default_rng(0), each=True)


def test_one_direction_for_all_names_them_all():
    with pytest.raises(AssertionError, match="gradient of a, b"):
        check(product_with(WRONG["factor"]), pair(0, (3, 3)), each=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", object])
def test_other_dtypes_than_float64_are_refused_by_name(dtype):
    p = Leaf(numpy.ones(2).astype(dtype))
    with pytest.raises(ValueError, match="low is .*; gradients are checked in float64"):
        minipeft.check_gradients(lambda: pytest.fail("the step ran"), {"low": p}, numpy.random.default_rng(0))


@given(seeds())
def test_values_that_pass_stop_gradient_are_held_fixed(seed):
    """Of p stop(p) the gradient is stop(p): with the stopped value moving too, differences would say 2 p."""
    p = Leaf(draw_array(seed, (3,)))
    minipeft.check_gradients(lambda: ops.sum(ops.mul(p, stop_gradient(p))), {"p": p}, numpy.random.default_rng(seed))


def test_several_stopped_values_are_replayed_in_order():
    p = Leaf(draw_array(3, (3,)))

    def step() -> Tensor:
        first, second = stop_gradient(ops.tanh(p)), stop_gradient(ops.exp(p))
        return ops.sum(ops.mul(ops.mul(p, first), second))

    minipeft.check_gradients(step, {"p": p}, numpy.random.default_rng(0))


def test_stopped_values_move_again_after_a_check():
    p = Leaf(draw_array(3, (3,)))
    minipeft.check_gradients(lambda: ops.sum(ops.mul(p, stop_gradient(p))), {"p": p}, numpy.random.default_rng(0))
    assert stop_gradient(Tensor(numpy.array(7.0))).data == 7


@given(seeds(), st.booleans())
def test_the_parameters_are_restored_to_the_same_arrays(seed, fails):
    params = pair(seed, (2, 3))
    before = {name: (p.data, p.data.copy()) for name, p in params.items()}
    f = product_with(WRONG["sign"] if fails else lambda g, a: g * a)
    try:
        check(f, params, seed)
        assert not fails
    except AssertionError:
        assert fails
    for name, p in params.items():
        assert p.data is before[name][0] and (p.data == before[name][1]).all()


def test_the_parameters_are_restored_when_the_step_raises():
    p = Leaf(numpy.ones(3))
    array, calls = p.data, []

    def step() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("mine")
        return ops.sum(p)

    with pytest.raises(KeyError):
        minipeft.check_gradients(step, {"p": p}, numpy.random.default_rng(0))
    assert p.data is array


# ---- kinks


@op
def off(x, *, by):
    """x, with a gradient that is wrong by this share of itself."""
    return x, (lambda g: g * (1 + by),)


def hinge(distance: float, by: float = 0.0) -> tuple[Any, dict[str, Leaf]]:
    """p^2 + 3 relu(p), p at this distance from the kink on its right, or at it."""
    p = Leaf(numpy.array([distance]))
    return lambda: ops.sum(off(ops.add(ops.mul(p, p), ops.mul(ops.relu(p), 3.0)), by=by)), {"kinky": p}


@given(st.floats(2.0 ** -17, 1), st.sampled_from([-1, 1]), seeds())
def test_a_right_gradient_passes_at_any_distance_from_a_kink(distance, side, seed):
    step, params = hinge(side * distance)
    assert minipeft.check_gradients(step, params, numpy.random.default_rng(seed)) <= 1


@given(st.floats(2.0 ** -17, 1), seeds(), st.sampled_from([1e-3, -1e-3, 0.1, 1, -2, 1e3]))
@example(4 / 9 * 2.0 ** -7, 0, 1e-3)  # there the first two extrapolations agree by chance, both moved by the kink
def test_a_wrong_gradient_does_not_hide_behind_a_kink_at_any_distance(distance, seed, by):
    step, params = hinge(distance, by)
    with pytest.raises(AssertionError, match="gradient of kinky"):
        minipeft.check_gradients(step, params, numpy.random.default_rng(seed))


@pytest.mark.parametrize("distance", [0.0, 1e-300, -1e-300])
def test_a_kink_at_the_very_point_is_called_one_and_says_what_to_do(distance):
    """relu at 0 has no derivative: differences say 1/2, the VJP says 0 or 1."""
    step, params = hinge(distance)
    with pytest.raises(ValueError, match="^kinky: the loss has a kink at this very point .*Move the parameters"):
        minipeft.check_gradients(step, params, numpy.random.default_rng(0))
    p = Leaf(numpy.zeros(3))
    with pytest.raises(ValueError, match="^p: the loss has a kink at this very point"):
        minipeft.check_gradients(lambda: ops.sum(ops.relu(p)), {"p": p}, numpy.random.default_rng(0))


@given(st.floats(2.0 ** -40, 2.0 ** -26))
def test_a_kink_that_differences_cannot_get_past_is_no_wrong_gradient(distance):
    step, params = hinge(distance)
    with pytest.raises(ValueError, match="kink"):
        minipeft.check_gradients(step, params, numpy.random.default_rng(0))


def test_a_loss_that_is_another_at_each_call_has_no_derivative_and_the_message_names_dropout():
    p, rng = Leaf(draw_array(0, (4,))), numpy.random.default_rng(0)
    with pytest.raises(ValueError, match="^p: the loss has no derivative .*dropout"):
        minipeft.check_gradients(lambda: ops.sum(ops.dropout(p, 0.5, rng)), {"p": p}, numpy.random.default_rng(0))


def small_t5(activation: str, seed: int) -> tuple[Any, minipeft.Attachment]:
    """The loss of a T5 with a LoRA whose B is not 0, and that LoRA."""
    rng = numpy.random.default_rng(seed)
    config = minipeft.T5Config(32, 8, 4, 2, 16, 2, 2, dropout_rate=0.0, feed_forward_proj=activation)
    model = minipeft.T5(config, rng, "float64")
    lora = minipeft.attach(model, minipeft.LoRA(2), rng)
    for p in lora.parameters.values():
        p.data = p.data + 0.3 * rng.standard_normal(p.shape)
    ids, labels = rng.integers(2, 32, (2, 5)), rng.integers(2, 32, (2, 4))
    return lambda: model.loss(ids, labels), lora


@pytest.mark.parametrize("activation", ["relu", "gelu", "gated-gelu"])
def test_right_gradients_of_models_with_and_without_kinks_raise_no_alarm(activation):
    for seed in range(8):
        step, lora = small_t5(activation, seed)
        minipeft.check_gradients(step, lora.parameters, numpy.random.default_rng(seed))


@pytest.mark.parametrize("by", [1e-6, -1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, -1, -2, 100])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_wrong_gradients_of_models_are_refused_from_a_millionth_on(activation, by):
    for seed in range(4):
        step, lora = small_t5(activation, seed)
        with pytest.raises(AssertionError, match="^gradient of "):
            minipeft.check_gradients(lambda: off(step(), by=by), lora.parameters, numpy.random.default_rng(seed))


@pytest.mark.parametrize("name", ["encoder.0.attn.q.weight@lora.A", "decoder.1.attn.v.weight@lora.B"])
def test_a_wrong_gradient_of_one_parameter_of_a_relu_model_is_named(name):
    step, lora = small_t5("relu", 7)

    @op
    def nothing(p, *, claims):
        return 0.0 * p.sum(), (lambda g: numpy.full_like(p, g * claims),)

    def check_with(claims: float) -> None:
        minipeft.check_gradients(lambda: ops.add(step(), nothing(lora.parameters[name], claims=claims)),
                                 lora.parameters, numpy.random.default_rng(0))

    check_with(0.0)
    with pytest.raises(AssertionError, match=f"^gradient of {name}"):
        check_with(1e-4)


def test_a_loss_that_is_not_finite_is_no_pass():
    p = Leaf(numpy.array([1.0, 2.0]))
    with pytest.raises(AssertionError):
        minipeft.check_gradients(lambda: ops.sum(ops.mul(p, numpy.nan)), {"p": p}, numpy.random.default_rng(0))


@given(seeds())
def test_a_loss_whose_large_terms_cancel_is_no_false_alarm(seed):
    """Its roundings are those of the terms, thousands of times larger than the loss itself."""
    p = Leaf(draw_array(seed, (40,)) * 1e3)
    twin = p.data.copy()

    def step() -> Tensor:
        return ops.sub(ops.sum(ops.mul(p, p)), ops.sum(ops.mul(p, twin)))

    minipeft.check_gradients(step, {"p": p}, numpy.random.default_rng(seed))


@given(seeds())
def test_a_smooth_loss_costs_six_evaluations(seed):
    params, calls = {"a": Leaf(draw_array(seed, (3, 4))), "b": Leaf(draw_array(seed + 1, (4, 2)))}, []

    def step() -> Tensor:
        calls.append(1)
        return ops.sum(ops.softmax(ops.matmul(ops.tanh(params["a"]), params["b"]))[:, :1])

    minipeft.check_gradients(step, params, numpy.random.default_rng(seed))
    assert len(calls) == 1 + 2 * 6


def test_one_direction_costs_six_evaluations():
    params, calls = pair(0, (3, 3)), []

    def step() -> Tensor:
        calls.append(1)
        return ops.sum(ops.mul(*params.values()))

    minipeft.check_gradients(step, params, numpy.random.default_rng(0), each=False)
    assert len(calls) == 1 + 6
