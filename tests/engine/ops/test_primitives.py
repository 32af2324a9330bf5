"""Every primitive: its value, its gradient, its dtype, broadcasting, layouts, empty arrays, and exactness on Fractions.

One table says what each op is called with; every property is asked of every op.
"""
from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any, Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine.tensor import Leaf, Tensor, array_of, value_and_grad
from minipeft.engine.ops import primitives
from minipeft.engine.ops.drop import dropout_mask
from tests.strategies import (FRACTION, broadcastable, draw_array, fractions, layouts, seeds, shapes, sizes)

Shapes = tuple[tuple[int, ...], ...]
U = {"float64": 2.0 ** -53, "float32": 2.0 ** -24}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op: the shapes of its differentiable inputs, and its options."""

    shapes: Shapes
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """calls: a strategy. run(*inputs, **options) -> Tensor. value: the same in plain NumPy (also on Fractions).
    domain: from any numbers to numbers where the op is defined and smooth. exact: it is polynomial."""

    calls: st.SearchStrategy[Call]
    run: Callable[..., Tensor]
    value: Callable[..., Any]
    domain: Callable[[Any], Any] = lambda x: x
    exact: bool = True


def one(least: int = 0, most: int = 4) -> st.SearchStrategy[Call]:
    return shapes(least, most).map(lambda s: Call((s,)))


@st.composite
def two(draw: Any) -> Call:
    """Two shapes that broadcast: either may be the narrower one, both may be narrow in different axes."""
    full = draw(shapes(0, 4))
    pair = (draw(broadcastable(full)), full) if draw(st.booleans()) else (full, draw(broadcastable(full)))
    return Call(pair)


@st.composite
def products(draw: Any) -> Call:
    """[..., m, k] @ [..., k, n] with leading axes that broadcast."""
    m, k, n, *lead = draw(sizes(5))
    lead = tuple(lead)[:draw(st.integers(0, 2))]
    left, right = (lead, draw(broadcastable(lead))) if draw(st.booleans()) else (draw(broadcastable(lead)), lead)
    return Call(((*left, m, k), (*right, k, n)))


@st.composite
def reductions(draw: Any) -> Call:
    shape = draw(shapes(0, 4))
    axes = draw(st.lists(st.integers(-len(shape), len(shape) - 1), unique_by=lambda a: a % len(shape), max_size=3)
                if shape else st.just([]))
    axis = draw(st.sampled_from([None, tuple(axes), *axes]))
    return Call((shape,), {"axis": axis, "keepdims": draw(st.booleans())})


@st.composite
def orders(draw: Any) -> Call:
    shape = draw(shapes(0, 4))
    return Call((shape,), {"axes": tuple(draw(st.permutations(range(len(shape)))))})


@st.composite
def reshapes(draw: Any) -> Call:
    shape = draw(shapes(1, 3))
    n = math.prod(shape)
    return Call((shape,), {"shape": draw(st.sampled_from([(n,), (-1,), (1, n), shape[::-1], (*shape, 1)]))})


@st.composite
def subscripts(draw: Any) -> Call:
    shape = draw(shapes(1, 3))
    n = shape[0]
    key = draw(st.sampled_from([0, -1, slice(None), slice(None, None, -1), slice(1, None), slice(0, 0), (), None,
                                (Ellipsis, slice(None, None, 2)), (None, 0), (Ellipsis, None, -1),
                                numpy.arange(n)[::-1].copy(), numpy.arange(0, n, 2), numpy.arange(n) % 2 == 0]))
    return Call((shape,), {"key": key})


@st.composite
def places(draw: Any) -> Call:
    """n numbers for n distinct flat indices, in any order, of an array of one to three axes; all of them, or fewer."""
    shape, rng = draw(shapes(1, 3)), numpy.random.default_rng(draw(seeds()))
    n = draw(st.integers(0, math.prod(shape)))
    return Call(((n,),), {"indices": rng.permutation(math.prod(shape))[:n], "shape": shape})


def scattered(a: Any, indices: Any, shape: Any) -> Any:
    """One number after the other."""
    out = numpy.zeros(shape, a.dtype) if a.dtype != object else fractions(numpy.zeros(shape), 1)
    for number, i in zip(a, indices):
        out[numpy.unravel_index(i, shape)] = number
    return out


@st.composite
def joints(draw: Any) -> Call:
    """One to three parts that agree in all axes but one; a part may have nothing along that one."""
    shape = draw(shapes(1, 3))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any))
    parts = tuple((*shape[:axis % len(shape)], n, *shape[axis % len(shape) + 1:]) for n in lengths)
    return Call(parts, {"axis": axis})


@st.composite
def choices(draw: Any) -> Call:
    call = draw(two())
    full = numpy.broadcast_shapes(*call.shapes)
    condition = numpy.random.default_rng(draw(seeds())).random(draw(broadcastable(full))) < 0.5
    return Call(call.shapes, {"condition": condition})


def off_zero(x: Any) -> Any:
    """Away from 0 by a quarter at least, where division, powers and the kink of relu are harmless."""
    quarter = fractions(1, 4) if x.dtype == object else numpy.array(0.25, x.dtype)
    return x + numpy.where(x < 0, -quarter, quarter)


def positive(x: Any) -> Any:
    return abs(off_zero(x))


erf_of_floats = numpy.vectorize(math.erf, otypes=[float])

CASES: dict[str, Case] = {
    "add": Case(two(), ops.add, lambda a, b: a + b),
    "sub": Case(two(), ops.sub, lambda a, b: a - b),
    "mul": Case(two(), ops.mul, lambda a, b: a * b),
    "div": Case(two(), ops.div, lambda a, b: a / b, off_zero, exact=False),
    "neg": Case(one(), ops.neg, lambda a: -a),
    "power 2": Case(one(), lambda a: ops.power(a, exponent=2), lambda a: a * a),
    "power 3": Case(one(), lambda a: ops.power(a, exponent=3), lambda a: a * a * a),
    "power -1/2": Case(one(), lambda a: ops.power(a, exponent=-0.5), lambda a: 1 / numpy.sqrt(a), positive, False),
    "exp": Case(one(), ops.exp, numpy.exp, exact=False),
    "log": Case(one(), ops.log, numpy.log, positive, False),
    "tanh": Case(one(), ops.tanh, numpy.tanh, exact=False),
    "erf": Case(one(), ops.erf, erf_of_floats, exact=False),
    "relu": Case(one(), ops.relu, lambda a: numpy.where(a > 0, a, a * 0), off_zero),
    "where": Case(choices(), lambda a, b, condition: ops.where(condition, a, b),
                  lambda a, b, condition: numpy.where(condition, a, b)),
    "matmul": Case(products(), ops.matmul, lambda a, b: (a[..., :, :, None] * b[..., None, :, :]).sum(axis=-2)),
    "matrix_transpose": Case(one(2), ops.matrix_transpose, lambda a: numpy.swapaxes(a, -1, -2)),
    "transpose": Case(orders(), ops.transpose, lambda a, axes: numpy.transpose(a, axes)),
    "reshape": Case(reshapes(), ops.reshape, lambda a, shape: numpy.reshape(a, shape)),
    "sum": Case(reductions(), ops.sum, lambda a, axis, keepdims: numpy.sum(a, axis=axis, keepdims=keepdims)),
    "mean": Case(reductions(), ops.mean, lambda a, axis, keepdims: numpy.sum(a, axis=axis, keepdims=keepdims) / (
        Fraction(numpy.ones(a.shape).sum(axis=axis).flat[0]) if a.dtype == object
        else numpy.ones(a.shape, a.dtype).sum(axis=axis).flat[0])),
    "index": Case(subscripts(), ops.index, lambda a, key: a[key]),
    "scatter": Case(places(), lambda a, indices, shape: ops.scatter(a, indices, shape=shape), scattered),
    "concat": Case(joints(), ops.concat, lambda *parts, axis: numpy.concatenate(parts, axis=axis)),
}


@st.composite
def drawn(draw: Any, name: str, dtype: str = "float64") -> tuple[Call, list[Any], int]:
    """A call of the op, inputs in any layout, and the seed."""
    call, seed = draw(CASES[name].calls), draw(seeds())
    inputs = []
    for i, shape in enumerate(call.shapes):
        numbers = CASES[name].domain(draw_array(seed + i, shape, dtype))
        layout = draw(layouts())
        inputs.append(draw_array(0, shape, dtype, layout))   # the view, and then its numbers
        if shape:
            inputs[-1][...] = numbers
        else:
            inputs[-1] = numpy.array(numbers, dtype=object if dtype == FRACTION else dtype)
    return call, inputs, seed


def weighted_sum(out: Tensor, seed: int, dtype: str) -> Tensor:
    """A loss whose gradient at `out` is random numbers, all different."""
    return ops.sum(ops.mul(out, draw_array(seed + 99, out.shape, dtype)))


def named(inputs: list[Any]) -> dict[str, Leaf]:
    return {str(i): Leaf(x) for i, x in enumerate(inputs)}


every = pytest.mark.parametrize("name", CASES)
every_exact = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])


def test_every_primitive_is_in_the_table():
    own = {name for name, f in vars(primitives).items()
           if callable(f) and getattr(f, "__module__", "") == primitives.__name__ and not name.startswith("_")}
    assert own == {name.split()[0] for name in CASES}


@every
@given(st.data())
def test_the_value_is_that_of_plain_numpy(name, data):
    """The same operations on contiguous copies. Products and sums may be added in another order: gamma_n |a| |b|;
    vectorized functions may differ by units in the last place, at most 4 as NumPy's tests have it."""
    call, inputs, _ = data.draw(drawn(name))
    case = CASES[name]
    found = case.run(*inputs, **call.options).data
    wanted = numpy.asarray(case.value(*(numpy.array(x, order="C") for x in inputs), **call.options))
    assert isinstance(found, numpy.ndarray) and found.shape == wanted.shape and found.dtype == wanted.dtype
    if name in ("sum", "mean", "matmul"):
        magnitude = case.value(*(numpy.array(abs(x)) for x in inputs), **call.options)
        assert (abs(found - wanted) <= 2 * inputs[0].size * U["float64"] * magnitude).all()
    elif name in ("exp", "log", "tanh", "erf", "power 3", "power -1/2"):
        assert (abs(found - wanted) <= 8 * U["float64"] * numpy.maximum(abs(wanted), name == "erf")).all()
    else:
        assert (found == wanted).all()


@every
@given(st.data())
def test_the_gradient_is_that_of_central_differences(name, data):
    call, inputs, seed = data.draw(drawn(name))
    params = named(inputs)
    if sum(p.data.size for p in params.values()) == 0:
        return
    minipeft.check_gradients(
        lambda: weighted_sum(CASES[name].run(*params.values(), **call.options), seed, "float64"),
        {n: p for n, p in params.items() if p.data.size}, numpy.random.default_rng(seed))


@every_exact
@given(st.data())
def test_on_fractions_value_and_gradient_are_exact(name, data):
    """f is a polynomial of degree <= 4 along a line, where (4 D(h/2) - D(h)) / 3 is its derivative and no estimate."""
    call, inputs, seed = data.draw(drawn(name, FRACTION))
    case, params = CASES[name], named(inputs)
    loss, grads = value_and_grad(lambda: weighted_sum(case.run(*params.values(), **call.options), seed, FRACTION),
                                 params)
    out = case.run(*inputs, **call.options).data
    assert (out == case.value(*inputs, **call.options)).all()
    for x in (*out.reshape(-1), *(v for g in grads.values() for v in g.reshape(-1))):
        assert type(x) in (Fraction, int)
    directions = {n: draw_array(seed + 7 + i, p.shape, FRACTION) for i, (n, p) in enumerate(params.items())}

    def f(t: Fraction) -> Fraction:
        there = [numpy.asarray(p.data + t * directions[n], dtype=object) for n, p in params.items()]
        return Fraction(weighted_sum(case.run(*there, **call.options), seed, FRACTION).data.item())

    h = Fraction(1, 64)                               # relu: |x| >= 1/4, and no number moves by more than 2 h
    d1, d2 = ((f(s) - f(-s)) / (2 * s) for s in (h, h / 2))
    assert sum(numpy.sum(g * directions[n]) for n, g in grads.items()) == (4 * d2 - d1) / 3


@every
@given(st.data())
def test_float32_in_float32_out(name, data):
    call, inputs, seed = data.draw(drawn(name, "float32"))
    params = named(inputs)
    outs = []

    def step() -> Tensor:
        outs.append(CASES[name].run(*params.values(), **call.options))
        return weighted_sum(outs[0], seed, "float32")

    _, grads = value_and_grad(step, params)
    assert outs[0].dtype == numpy.float32
    for n, g in grads.items():
        assert g.dtype == numpy.float32 and g.shape == params[n].shape


def vjps_of(name: str, call: Call, inputs: list[Any]) -> tuple[Any, list[Callable]]:
    """Output and VJPs of a call of the undecorated op, one for each array."""
    if name == "where":
        out, vjps = primitives.where.__wrapped__(call.options["condition"], *inputs)  # type: ignore[attr-defined]
        return out, list(vjps[1:])
    if name == "scatter":
        out, vjps = primitives.scatter.__wrapped__(*inputs, **call.options)  # type: ignore[attr-defined]
        assert vjps[1] is None, "indices have no gradient"
        return out, [vjps[0]]
    if name.startswith("power"):
        exponent = {"2": 2, "3": 3, "-1/2": -0.5}[name.split()[1]]
        out, vjps = primitives.power.__wrapped__(*inputs, exponent=exponent)  # type: ignore[attr-defined]
    else:
        out, vjps = getattr(primitives, name).__wrapped__(*inputs, **call.options)
    return out, list(vjps)


@pytest.mark.parametrize("name", [name for name in CASES if name != "mean"])  # mean is made of sum and div
@given(st.data())
def test_neither_inputs_nor_g_are_written_into_and_a_vjp_gives_the_same_twice(name, data):
    """All arrays are read-only here. The second answer shows that the first changed nothing that the op keeps."""
    call, inputs, seed = data.draw(drawn(name))
    before = [x.tobytes() for x in inputs]
    for x in inputs:
        x.flags.writeable = False
    out, vjps = vjps_of(name, call, inputs)
    g = numpy.array(draw_array(seed + 99, numpy.shape(out)))
    g.flags.writeable = False
    for x, vjp in zip(inputs, vjps, strict=True):
        first = numpy.array(vjp(g))
        assert numpy.array(vjp(g)).tobytes() == first.tobytes()
        assert numpy.broadcast_shapes(first.shape, x.shape) == first.shape
    assert before == [x.tobytes() for x in inputs]


EMPTY: dict[str, list[Call]] = {
    **{name: [Call(((0,),)), Call(((2, 0, 3),))] for name in (
        "neg", "power 2", "power 3", "power -1/2", "exp", "log", "tanh", "erf", "relu")},
    **{name: [Call(((0,), (1,))), Call(((2, 0), (2, 1))), Call(((0, 3), (3,)))]
       for name in ("add", "sub", "mul", "div")},
    "where": [Call(((0, 3), (3,)), {"condition": numpy.ones((0, 1), bool)})],
    "matmul": [Call(((2, 0), (0, 3))), Call(((0, 2), (2, 3))), Call(((2, 3), (3, 0))), Call(((0, 2, 3), (3, 2)))],
    "matrix_transpose": [Call(((0, 3),))],
    "transpose": [Call(((0, 3, 2),), {"axes": (2, 0, 1)})],
    "reshape": [Call(((0, 3),), {"shape": (3, 0, 2)}), Call(((0,),), {"shape": (0, 4)})],
    "sum": [Call(((0, 3),), {"axis": 0, "keepdims": False}), Call(((0,),), {"axis": None, "keepdims": True})],
    "mean": [Call(((0, 3),), {"axis": -1, "keepdims": True}), Call(((3, 0),), {"axis": 0, "keepdims": False})],
    "index": [Call(((0, 3),), {"key": slice(None)}), Call(((2, 3),), {"key": slice(2, None)})],
    "scatter": [Call(((0,),), {"indices": numpy.zeros(0, int), "shape": (2, 3)}),
                Call(((0,),), {"indices": numpy.zeros(0, int), "shape": (0, 3)})],
    "concat": [Call(((0, 3), (2, 3)), {"axis": 0}), Call(((0,),), {"axis": 0})],
}


@every
def test_empty_arrays_give_what_numpy_gives_and_empty_or_zero_gradients(name):
    for call in EMPTY[name]:
        params = named([numpy.ones(shape, "float32") for shape in call.shapes])
        outs = []

        def step() -> Tensor:
            outs.append(CASES[name].run(*params.values(), **call.options))
            return ops.sum(outs[0])

        _, grads = value_and_grad(step, params)
        wanted = numpy.asarray(CASES[name].value(*(p.data for p in params.values()), **call.options)) \
            if name not in ("matmul", "mean") else None
        if wanted is not None:
            assert outs[0].shape == wanted.shape and (outs[0].data == wanted).all()
        for n, p in params.items():
            assert grads[n].shape == p.shape and grads[n].dtype == numpy.float32
            assert numpy.isfinite(grads[n]).all()


def test_a_product_over_nothing_is_zero():
    assert ops.matmul(numpy.ones((2, 0)), numpy.ones((0, 3))).data.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_the_mean_over_other_axes_than_an_empty_one_is_empty():
    assert ops.mean(numpy.ones((0, 3)), axis=-1).shape == (0,)
    assert ops.mean(numpy.ones((3, 0)), axis=0, keepdims=True).shape == (1, 0)


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "erf", "relu", "neg", "power 2"])
def test_nan_stays_nan_and_its_neighbours_stay_numbers(name):
    found = CASES[name].run(numpy.array([1.0, numpy.nan, 2.0])).data
    assert numpy.isnan(found).tolist() == [False, True, False]


def test_relu_at_its_kink_and_beyond():
    p = Leaf(numpy.array([-numpy.inf, -1.0, -0.0, 0.0, 1e-300, numpy.inf]))
    loss, grads = value_and_grad(lambda: ops.sum(ops.relu(p)[:-1]), {"p": p})
    assert loss == 1e-300 and grads["p"].tolist() == [0, 0, 0, 0, 1, 0]


def test_where_passes_no_gradient_to_what_was_not_chosen():
    a, b = Leaf(numpy.array([1.0, 2.0])), Leaf(numpy.array(3.0))
    _, grads = value_and_grad(lambda: ops.sum(ops.where(numpy.array([True, False]), a, b)), {"a": a, "b": b})
    assert grads["a"].tolist() == [1, 0] and grads["b"] == 1


def test_relu_of_negative_fractions_is_a_fraction():
    """An int 0 in its place would make a float of the mean of such zeros, and of every gradient that meets it."""
    p, q = Leaf(fractions([-1, -2], 7)), Leaf(fractions([1, 2], 7))
    loss, grads = value_and_grad(lambda: ops.add(ops.mean(ops.relu(p)), ops.mean(ops.mul(p, q))), {"p": p, "q": q})
    assert type(loss) is Fraction and {type(x) for g in grads.values() for x in g} == {Fraction}
    assert type(ops.relu(fractions(-1, 2)).data.item()) is Fraction


# ---- index

@pytest.mark.parametrize("key", [numpy.array([0, 0]), [1, 2, 1], numpy.array([[0, 1], [1, 2]]),
                                 (numpy.array([0, 1]), numpy.array([0, 1])), (slice(None), numpy.array([1, 1]))])
def test_repeated_indices_are_refused_because_their_gradients_would_be_lost(key):
    with pytest.raises(ValueError, match="index: .*ops.embedding looks rows up"):
        ops.index(numpy.ones((3, 3)), key=key)
    with pytest.raises(ValueError, match="index: "):
        Tensor(numpy.ones((3, 3)))[key]


# ---- dropout

@given(seeds(), shapes(0, 3), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from(["float32", "float64"]))
def test_dropout_multiplies_by_zero_or_by_one_over_keep(seed, shape, p, dtype):
    x = Leaf(off_zero(draw_array(seed, shape, dtype)))
    outs = []

    def step() -> Tensor:
        outs.append(ops.dropout(x, p, numpy.random.default_rng(seed)))
        return ops.sum(outs[0])

    _, grads = value_and_grad(step, {"x": x})
    one = numpy.ones((), dtype) / (1 - p)
    assert outs[0].dtype == dtype and outs[0].shape == shape
    assert set(grads["x"].reshape(-1).tolist()) <= {0.0, float(one)}
    assert (outs[0].data == x.data * grads["x"]).all()


def test_dropout_is_absent_without_a_generator_or_probability():
    x = Leaf(numpy.ones(3))
    rng = numpy.random.default_rng(0)
    state = rng.bit_generator.state
    assert ops.dropout(x, 0.5, None) is x and ops.dropout(x, 0.0, rng) is x
    assert rng.bit_generator.state == state


def test_dropout_drops_the_share_that_it_was_told():
    """100,000 draws: the share of zeros is within 5 standard deviations of p."""
    n = 100_000
    for p in (0.1, 0.5):
        mask = dropout_mask((n,), p, numpy.random.default_rng(1), numpy.dtype("float32"))
        assert abs((mask == 0).mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
        assert mask.dtype == numpy.float32


def test_one_seed_drops_the_same_in_both_precisions():
    a, b = (dropout_mask((50,), 0.3, numpy.random.default_rng(2), numpy.dtype(d)) for d in U)
    assert ((a == 0) == (b == 0)).all()


def test_ops_take_tensors_parameters_and_arrays_alike():
    a, b = numpy.ones((2, 3)), numpy.full((2, 3), 2.0)
    for x in (a, Tensor(a), Leaf(a)):
        for y in (b, Tensor(b), Leaf(b)):
            assert (array_of(ops.mul(x, y)) == 2).all()
    assert ops.mul(Tensor(a), 3).data.tolist() == (a * 3).tolist()
    assert (ops.mul(fractions([1], 2), Fraction(1, 3)).data == Fraction(1, 6)).all()


def test_transpose_takes_negative_axes():
    p = Leaf(numpy.random.default_rng(0).standard_normal((2, 3, 4)))
    rng = numpy.random.default_rng(1)
    weights = rng.standard_normal((4, 2, 3))
    minipeft.check_gradients(lambda: (ops.transpose(p, axes=(-1, 0, 1)) * weights).sum(), {"p": p}, rng)


def test_a_power_of_0_has_the_gradient_0_also_at_0():
    p = Leaf(numpy.array([0.0, 2.0]))
    assert value_and_grad(lambda: (p ** 0).sum() + (p * p).sum(), {"p": p})[1]["p"].tolist() == [0.0, 4.0]


@pytest.mark.parametrize("key", [((0, 0),), [0, 0], numpy.array([0, 0])])
def test_index_refuses_repeated_indices_in_whatever_holds_them(key):
    with pytest.raises(ValueError, match="indices repeat"):
        ops.index(Leaf(numpy.ones(3)), key=key)


@pytest.mark.parametrize("left, right", [((3,), (3, 2)), ((2, 3), (3,)), ((3,), (3,))])
def test_matmul_refuses_vectors_whose_gradient_it_does_not_have(left, right):
    with pytest.raises(ValueError, match="expected two axes or more"):
        ops.matmul(numpy.ones(left), numpy.ones(right))
