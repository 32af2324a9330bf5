"""The engine: what is watched, what is kept, in which order gradients are summed, and what is refused."""
from __future__ import annotations

import contextvars
import copy
import gc
import pickle
import threading
import tracemalloc
import weakref
from fractions import Fraction
from typing import Any, Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine import tensor as engine
from minipeft.engine.stopped import stop_gradient
from minipeft.engine.calling import once
from minipeft.engine.tensor import Leaf, Node, Tensor, backward, op, sum_to, value_and_grad
from tests.strategies import arrays, broadcastable, draw_array, dtypes, fractions, layouts, seeds, shapes
from tests.strict_namespace import strict


def vector(*numbers: float) -> Leaf:
    return Leaf(numpy.array(numbers, dtype=numpy.float64))


# ---- random programs: straight-line code over a few parameters, with sharing, broadcasting and views

_BINARY: list[Callable] = [ops.add, ops.sub, ops.mul, lambda a, b: ops.concat(a, b)[:len(a)], ops.matmul]
_UNARY: list[Callable] = [ops.tanh, ops.neg, ops.matrix_transpose, lambda a: a[::-1],
                          lambda a: a.reshape(9).reshape(3, 3),
                          lambda a: ops.mean(a, axis=0, keepdims=True) + a, lambda a: a * a[0]]


@st.composite
def programs(draw: Any) -> tuple[int, list[tuple[int, int, int]]]:
    """A seed and up to 12 instructions (what, left operand, right operand) on 3 x 3 matrices."""
    count = draw(st.integers(1, 12))
    numbers = st.integers(0, 99)
    return draw(seeds()), [draw(st.tuples(numbers, numbers, numbers)) for _ in range(count)]


def parameters(seed: int, dtype: str = "float64") -> dict[str, Leaf]:
    """Four parameters, broadcast to [3, 3] where they are used."""
    shapes_ = {"a": (3, 3), "b": (1, 3), "c": (3, 1), "d": (3, 3)}
    return {name: Leaf(draw_array(seed + i, shape, dtype)) for i, (name, shape) in enumerate(shapes_.items())}


def run(program: list[tuple[int, int, int]], params: dict[str, Leaf]) -> Tensor:
    """The sum over every parameter and everything that the program computed."""
    frame = numpy.zeros((3, 3), dtype=params["a"].dtype)
    pool: list[Any] = [ops.add(p, frame) for p in params.values()]
    functions: list[Callable] = [lambda a, b, f=f: f(a) for f in _UNARY] + _BINARY
    for what, left, right in program:
        result = functions[what % len(functions)](pool[left % len(pool)], pool[right % len(pool)])
        pool.append(ops.tanh(result))
    total = pool[0]
    for x in pool[1:]:
        total = ops.add(total, x)
    return ops.sum(total)


@given(programs(), st.sets(st.sampled_from("abcd"), min_size=1), dtypes())
def test_each_gradient_equals_the_full_gradient_restricted_bit_for_bit(program, chosen, dtype):
    seed, code = program
    params = parameters(seed, dtype)
    full_loss, full = value_and_grad(lambda: run(code, params), params)
    loss, grads = value_and_grad(lambda: run(code, params), {n: params[n] for n in params if n in chosen})
    assert set(full) == set(params) and set(grads) == chosen
    assert loss == full_loss
    for name, g in grads.items():
        assert g.dtype == params[name].dtype and g.shape == params[name].shape
        assert g.tobytes() == full[name].tobytes(), name


@given(programs())
def test_a_random_program_has_the_gradient_of_central_differences(program):
    seed, code = program
    params = parameters(seed)
    minipeft.check_gradients(lambda: run(code, params), params, numpy.random.default_rng(seed))


@given(programs())
def test_the_parameters_are_what_they_were_after_a_gradient(program):
    seed, code = program
    params = parameters(seed)
    before = {name: (p.data, p.data.tobytes()) for name, p in params.items()}
    value_and_grad(lambda: run(code, params), params)
    assert all(p.data is before[name][0] and p.data.tobytes() == before[name][1] for name, p in params.items())


# ---- what is watched

def test_nothing_is_recorded_outside_value_and_grad():
    p = vector(1, 2)
    assert p.node is None
    assert ops.mul(p, p).node is None
    value_and_grad(lambda: ops.sum(p), {"p": p})
    assert p.node is None and ops.mul(p, p).node is None


def test_nothing_is_recorded_for_what_is_not_selected():
    p, frozen = vector(1, 2), vector(3, 4)
    seen = []

    def step() -> Tensor:
        seen.extend([ops.mul(frozen, frozen).node, ops.mul(p, frozen).node])
        return ops.sum(p)

    value_and_grad(step, {"p": p})
    assert seen[0] is None
    assert isinstance(seen[1], Node)


def test_the_vjp_of_a_frozen_input_is_neither_kept_nor_called():
    called = []
    dropped: list[Any] = []

    @op
    def product(a, b):
        def da(g):
            called.append("a")
            return g * b

        def db(g):
            called.append("b")
            return g * a

        dropped.append(weakref.ref(db))
        return a * b, (da, db)

    p, frozen = vector(1, 2), vector(3, 4)

    def step() -> Tensor:
        out = product(p, frozen)
        gc.collect()
        assert dropped[0]() is None
        return ops.sum(out)

    _, grads = value_and_grad(step, {"p": p})
    assert called == ["a"]
    assert grads["p"].tolist() == [3, 4]


def test_an_input_without_a_gradient_gets_none_and_its_absence_no_error():
    table = Leaf(numpy.ones((3, 2)))
    _, grads = value_and_grad(lambda: ops.sum(ops.embedding(table, numpy.array([2, 0, 2]))), {"t": table})
    assert grads["t"].tolist() == [[1, 1], [0, 0], [2, 2]]


def test_inputs_of_an_op_may_be_named_or_left_at_their_default():
    q, k, v = (Leaf(draw_array(i, (2, 3, 4))) for i in range(3))
    bias = Leaf(draw_array(3, (3, 3)))
    full = ops.attention(q, k, v, bias, None, heads=2, scale=0.5).data
    assert (ops.attention(q, k, v, bias=bias, heads=2, scale=0.5).data == full).all()
    assert (ops.attention(q, k=k, v=v, bias=bias, heads=2, scale=0.5).data == full).all()
    plain = ops.attention(q, k, v, heads=2, scale=0.5).data
    assert (plain == ops.attention(q, k, v, None, None, heads=2, scale=0.5).data).all() and (plain != full).any()
    grads = value_and_grad(lambda: ops.sum(ops.attention(q, k, v, bias=bias, heads=2, scale=0.5) ** 2), {"b": bias})[1]
    assert grads["b"].shape == (3, 3) and (grads["b"] != 0).any()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'"):
        ops.add(q)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        ops.add(b=q)


def test_an_op_must_give_one_vjp_for_each_input():
    @op
    def careless(a, b):
        return a * b, (lambda g: g * b,)

    with pytest.raises(ValueError, match="zip"):
        careless(numpy.ones(2), numpy.ones(2))


def test_a_watched_tensor_means_the_parameter_object_and_not_its_array():
    p = vector(1, 2)
    twin = Leaf(p.data)
    _, grads = value_and_grad(lambda: ops.sum(ops.mul(p, twin)), {"p": p})
    assert grads["p"].tolist() == [1, 2]


def test_a_selection_that_the_loss_does_not_reach_raises_and_names_it():
    p, q = vector(1), vector(1)
    with pytest.raises(ValueError, match="1 of 2 selected parameters: q; select fewer, or pass unused='zeros'"):
        value_and_grad(lambda: ops.sum(p), {"p": p, "q": q})
    with pytest.raises(ValueError, match="does not depend on 1 of 1"):
        value_and_grad(lambda: Tensor(numpy.array(1.0)), {"p": p})


@given(dtypes())
def test_a_selection_that_the_loss_does_not_reach_may_have_zeros(dtype):
    p, q = Leaf(numpy.ones(2, dtype)), Leaf(numpy.ones((3, 1), dtype))
    _, grads = value_and_grad(lambda: ops.sum(p), {"p": p, "q": q}, unused="zeros")
    assert list(grads) == ["p", "q"]
    assert grads["q"].dtype == dtype and grads["q"].tolist() == [[0], [0], [0]]


def test_a_parameter_that_only_stopped_values_reach_is_unused():
    p = vector(1, 2)
    with pytest.raises(ValueError, match="does not depend on"):
        value_and_grad(lambda: ops.sum(stop_gradient(p)), {"p": p})


def test_stop_gradient_is_the_identity_in_value_and_a_constant_in_the_gradient():
    p = vector(2, 3)
    loss, grads = value_and_grad(lambda: ops.sum(ops.mul(p, stop_gradient(p))), {"p": p})
    assert loss == 13 and grads["p"].tolist() == [2, 3]


# ---- what value_and_grad refuses

@pytest.mark.parametrize("params, error, words", [
    ({}, ValueError, "nothing is selected"),
    ({"p": numpy.ones(2)}, TypeError, r"params\['p'\] is ndarray; expected a Parameter"),
    ({"p": Tensor(numpy.ones(2))}, TypeError, "is Tensor; expected a Parameter"),
])
def test_an_empty_selection_and_what_is_no_parameter_are_refused_before_the_step_runs(params, error, words):
    with pytest.raises(error, match=words):
        value_and_grad(lambda: pytest.fail("the step ran"), params)
    assert engine._watched.get() is None


def test_one_parameter_under_two_names_is_refused():
    p = vector(1)
    with pytest.raises(ValueError, match="'a' and 'b' are the same parameter"):
        value_and_grad(lambda: ops.sum(p), {"a": p, "b": p})


def test_an_unknown_word_for_unused_is_refused():
    p = vector(1)
    with pytest.raises(ValueError, match="unused is 'ignore'; expected 'raise' or 'zeros'"):
        value_and_grad(lambda: ops.sum(p), {"p": p}, unused="ignore")


@pytest.mark.parametrize("step, error, words", [
    (lambda p: ops.mul(p, p), ValueError, r"returned shape \[2\]; expected one number"),
    (lambda p: p.data.sum(), TypeError, "returned float64; expected a Tensor"),
    (lambda p: None, TypeError, "returned NoneType; expected a Tensor"),
    (lambda p: ops.sum(p[:0], axis=0, keepdims=True)[:0], ValueError, r"returned shape \[0\]"),
])
def test_a_loss_that_is_not_one_number_is_refused(step, error, words):
    p = vector(1, 2)
    with pytest.raises(error, match=words):
        value_and_grad(lambda: step(p), {"p": p})
    assert engine._watched.get() is None


def test_a_loss_of_one_number_may_have_axes():
    p = vector(3)
    loss, grads = value_and_grad(lambda: ops.mul(p, p), {"p": p})
    assert loss == 9 and grads["p"].tolist() == [6]


def test_nesting_is_refused_and_leaves_the_outer_call_working():
    p = vector(1, 2)

    def step() -> Tensor:
        with pytest.raises(RuntimeError, match="only first-order"):
            value_and_grad(lambda: ops.sum(p), {"p": p})
        return ops.sum(p)

    assert value_and_grad(step, {"p": p})[1]["p"].tolist() == [1, 1]


def test_an_exception_in_the_step_stops_the_watching():
    p = vector(1, 2)

    def step() -> Tensor:
        ops.mul(p, p)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        value_and_grad(step, {"p": p})
    assert p.node is None
    assert value_and_grad(lambda: ops.sum(p), {"p": p})[0] == 3


# ---- how terms are summed

@given(st.integers(1, 9), seeds(), dtypes())
def test_terms_of_one_node_add_up_in_reverse_order_of_use(terms, seed, dtype):
    weights = [draw_array(seed + i, (5,), dtype) for i in range(terms)]
    p = Leaf(draw_array(seed, (5,), dtype))

    def step() -> Tensor:
        used = [ops.sum(ops.mul(p, w)) for w in weights]
        total = used[0]
        for x in used[1:]:
            total = ops.add(total, x)
        return total

    expected = weights[-1]
    for w in weights[-2::-1]:
        expected = expected + w
    assert value_and_grad(step, {"p": p})[1]["p"].tobytes() == expected.tobytes()


def test_an_array_that_a_vjp_returned_is_never_written_into():
    handed_out = []

    @op
    def passed_on(a, b):
        def same(g):
            handed_out.append((g, g.copy()))
            return g
        return a + b, (same, same)

    p, q = vector(1, 2), vector(3, 4)

    def step() -> Tensor:  # p collects five terms, of which the first ones are shared with q's
        x = passed_on(p, q)
        return ops.sum(passed_on(passed_on(x, p), passed_on(passed_on(p, q), passed_on(p, p))))

    _, grads = value_and_grad(step, {"p": p, "q": q})
    assert grads["p"].tolist() == [5, 5] and grads["q"].tolist() == [2, 2]
    assert all((g == copy).all() for g, copy in handed_out)


def test_a_vjp_may_return_an_array_that_cannot_be_written_into():
    p = Leaf(numpy.ones((2, 3)))
    _, grads = value_and_grad(lambda: ops.sum(p) + ops.sum(p) + ops.sum(p), {"p": p})
    assert (grads["p"] == 3).all()


def test_a_diamond_takes_one_call_per_edge_however_many_paths_there_are():
    calls = []

    @op
    def twice(a, b):
        def vjp(g):
            calls.append(1)
            return g
        return a + b, (vjp, vjp)

    p = vector(1)

    def step() -> Tensor:
        x: Any = p
        for _ in range(60):
            x = twice(x, x)
        return x

    loss, grads = value_and_grad(step, {"p": p})
    assert loss == 2.0 ** 60 and grads["p"].tolist() == [2.0 ** 60]
    assert len(calls) == 120


def test_ten_thousand_ops_in_a_row_do_not_recurse():
    p = vector(1, 2)

    def step() -> Tensor:
        x: Any = p
        for _ in range(10_000):
            x = ops.add(x, p)
        return ops.sum(x)

    assert value_and_grad(step, {"p": p})[1]["p"].tolist() == [10_001, 10_001]


def test_a_long_graph_that_is_thrown_away_does_not_recurse():
    p = vector(1, 2)

    def step() -> Tensor:
        x: Any = p
        for _ in range(20_000):
            x = ops.neg(x)
        del x
        raise KeyError("thrown away")

    with pytest.raises(KeyError):
        value_and_grad(step, {"p": p})


@given(shapes(0, 3).flatmap(lambda s: st.tuples(arrays(s), broadcastable(s))))
def test_broadcast_axes_are_summed_out(drawn):
    term, shape = drawn
    summed = sum_to(term, shape)
    back = numpy.broadcast_shapes(shape, term.shape)
    assert back == term.shape and summed.shape == shape
    extra = term.ndim - len(shape)
    axes = tuple(i for i, n in enumerate(term.shape) if i < extra or shape[i - extra] != n)
    assert summed.tobytes() == term.sum(axis=axes, keepdims=True).reshape(shape).tobytes()


# ---- what is kept: arrays that are alive after a forward, inside the step

def survivors(step: Callable[[Callable[[str, Tensor], Tensor]], Tensor], params: dict[str, Leaf]) -> set[str]:
    """Names of the tensors whose arrays are still alive when the step has returned its loss."""
    references: dict[str, Any] = {}
    alive: set[str] = set()

    def note(name: str, tensor: Tensor) -> Tensor:
        references[name] = weakref.ref(tensor.data)
        return tensor

    def observed() -> Tensor:
        loss = step(note)
        gc.collect()
        alive.update(name for name, r in references.items() if r() is not None)
        return loss

    value_and_grad(observed, params)
    gc.collect()
    assert not any(r() is not None for r in references.values()), "the backward left arrays behind"
    return alive


def test_a_frozen_weight_keeps_no_input():
    p, w = Leaf(draw_array(0, (4, 3))), Leaf(draw_array(1, (5, 3)))

    def step(note: Callable) -> Tensor:
        return ops.sum(note("y", ops.linear(note("x", ops.mul(p, 2.0)), w)))

    assert survivors(step, {"p": p}) == set()
    assert survivors(step, {"w": w}) == {"x"}
    assert survivors(step, {"p": p, "w": w}) == {"x"}


@pytest.mark.parametrize("selected, kept", [
    ("p", set()), ("y", set()), ("a", {"x"}), ("b", set()), ("ab", {"x"}), ("pyab", {"x"})])
def test_low_rank_linear_keeps_its_input_for_a_alone(selected, kept):
    params = {"p": Leaf(draw_array(0, (4, 3))), "y": Leaf(draw_array(1, (4, 5))), "a": Leaf(draw_array(2, (2, 3))),
              "b": Leaf(draw_array(3, (5, 2)))}

    def step(note: Callable) -> Tensor:
        x = note("x", ops.mul(params["p"], 2.0))
        base = note("base", ops.mul(params["y"], 2.0))
        return ops.sum(note("out", ops.low_rank_linear(base, x, params["a"], params["b"], scale=2)))

    assert survivors(step, {name: params[name] for name in selected}) == kept


def test_sums_and_shapes_keep_no_array():
    p, q = Leaf(draw_array(0, (2, 3))), Leaf(draw_array(1, (2, 3)))

    def step(note: Callable) -> Tensor:
        x = note("add", ops.add(p, q))
        x = note("sub", ops.sub(x, q))
        x = note("matrix_transpose", ops.matrix_transpose(x))
        x = note("reshape", ops.reshape(x, shape=(6,)))
        x = note("index", ops.index(x, key=slice(1, 5)))
        x = note("concat", ops.concat(x, x))
        return ops.sum(x)

    assert survivors(step, {"p": p, "q": q}) == set()


@pytest.mark.parametrize("scale, of_queries", [(1.0, {"q"}), (0.5, set())])
def test_attention_with_frozen_queries_and_keys_keeps_the_probabilities_alone(scale, of_queries):
    """With only v watched, dV = R^T g needs R: no q, k or v. Where there is a scale, dK needs scale Q, not Q."""
    names = ("q", "k", "v")
    params = {name: Leaf(draw_array(i, (2, 3, 4))) for i, name in enumerate(names)}

    def step(note: Callable) -> Tensor:
        return ops.sum(ops.attention(*(note(n, ops.mul(params[n], 0.5)) for n in names), heads=2, scale=scale))

    assert survivors(step, {"v": params["v"]}) == set()
    assert survivors(step, {"q": params["q"]}) == {"k", "v"}
    assert survivors(step, {"k": params["k"]}) == {"v"} | of_queries


def kept_arrays(node: Node | None) -> dict[int, numpy.ndarray]:
    """Every array that the graph below `node` keeps alive: what the VJPs close over, by the identity of its memory."""
    found: dict[int, numpy.ndarray] = {}
    seen: set[int] = set()
    todo: list[Any] = [node]
    while todo:
        thing = todo.pop()
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, numpy.ndarray):
            while isinstance(thing.base, numpy.ndarray):
                thing = thing.base
            found[id(thing)] = thing
        elif isinstance(thing, Node):
            todo += [piece for edge in thing.edges for piece in edge]
        elif isinstance(thing, (list, tuple)):
            todo += thing
        elif hasattr(thing, "__closure__"):
            todo += [cell.cell_contents for cell in thing.__closure__ or ()]
    return found


def test_a_node_holds_no_array():
    p = Leaf(draw_array(0, (2, 3)))
    nodes = []

    def step() -> Tensor:
        x = ops.softmax(ops.mul(ops.add(p, p), 2.0))
        node = x.node
        while node is not None:
            nodes.append(node)
            node = node.edges[0][0] if node.edges else None
        return ops.sum(x)

    value_and_grad(step, {"p": p})
    assert [n.op for n in nodes] == ["softmax", "mul", "add", "p"]
    for node in nodes:
        for slot in Node.__slots__:
            assert not hasattr(getattr(node, slot), "__array__")
        assert not hasattr(node, "__dict__")


def test_a_lora_layer_keeps_the_bytes_that_its_backward_needs_and_no_more():
    """y = W x + s B A x, A and B watched, W frozen: x for dA, h = s x A^T for dB, and A and B themselves (the
    parameters' own arrays). Nothing of the size of W, no copy of y."""
    n, d_in, d_out, rank = 40, 30, 20, 4
    x, w = draw_array(0, (n, d_in), "float32"), Leaf(draw_array(1, (d_out, d_in), "float32"))
    a, b = Leaf(draw_array(2, (rank, d_in), "float32")), Leaf(draw_array(3, (d_out, rank), "float32"))
    counted = {}

    def step() -> Tensor:
        y = ops.linear(x, w)
        loss = ops.sum(ops.low_rank_linear(y, x, a, b, scale=2))
        kept = kept_arrays(loss.node)
        for own in (a.data, b.data):
            kept.pop(id(own if own.base is None else own.base), None)
        counted["bytes"] = sum(array.nbytes for array in kept.values())
        return loss

    value_and_grad(step, {"a": a, "b": b})
    assert counted["bytes"] == 4 * (n * d_in + n * rank)


def test_the_bytes_alive_after_a_forward_are_those_that_the_closures_hold():
    """Measured by the allocator, not by looking at closures: ten frozen layers of 1 MB activations keep nothing, ten
    trained ones keep their ten inputs."""
    size = 2 ** 20
    p = Leaf(numpy.ones((size // 512, 64)))                                   # 1 MB of float64
    weights = {f"w{i}": Leaf(numpy.eye(64)) for i in range(10)}
    alive: dict[str, int] = {}

    def step() -> Tensor:
        before = tracemalloc.get_traced_memory()[0]
        x: Any = ops.mul(p, 1.0)
        for w in weights.values():
            x = ops.linear(x, w)
        loss = ops.sum(x)
        del x
        gc.collect()
        alive["bytes"] = tracemalloc.get_traced_memory()[0] - before
        return loss

    tracemalloc.start()
    try:
        value_and_grad(step, {"p": p})
        frozen = alive["bytes"]
        value_and_grad(step, weights)
        trained = alive["bytes"]
    finally:
        tracemalloc.stop()
    small = size // 8  # nodes, closures, and what the test itself holds
    assert abs(frozen) < small
    assert abs(trained - 10 * size) < small


def test_the_pullback_frees_gradients_and_closures_as_it_passes():
    """Of a chain of 1 MB gradients and 1 MB activations, a few are alive at a time; all at once would be 40 MB."""
    size = 2 ** 20
    p = Leaf(numpy.ones(size // 8))

    def step() -> Tensor:
        x: Any = p
        for _ in range(20):
            x = ops.mul(x, x)                 # keeps its input for both VJPs
        return ops.sum(x)

    tracemalloc.start()
    try:
        engine_step = engine._watched.set({id(p): Node("p", (), p.shape, p.dtype)})
        loss = step()
        engine._watched.reset(engine_step)
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        node = loss.node
        assert node is not None
        grads = backward(node, numpy.ones(()))
        peak = tracemalloc.get_traced_memory()[1]
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(grads) == 1 and kept > 19 * size           # x_1 .. x_19, and the loss's
    assert peak < kept + 4 * size                         # g, two terms and their sum
    assert after < 2 * size                               # the one gradient that was asked for
    assert node.edges == ()


def test_once_computes_again_for_another_g_and_not_for_the_same():
    calls = []
    double = once(lambda g: calls.append(1) or g * 2)
    g, h = numpy.ones(2), numpy.ones(2)
    assert double(g) is double(g) and len(calls) == 1
    assert (double(h) == 2).all() and len(calls) == 2
    double(g)
    assert len(calls) == 3


def test_what_vjps_share_is_computed_once_and_its_memory_goes_with_the_graph():
    calls = []
    references = []

    @op
    def shared(a, b):
        @once
        def work(g):
            calls.append(1)
            out = g * 2
            references.append(weakref.ref(out))
            return out
        return a + b, (lambda g: work(g) * 1, lambda g: work(g) * 1)

    p, q = vector(1, 2), vector(3, 4)
    grads = value_and_grad(lambda: ops.sum(shared(p, q)), {"p": p, "q": q})[1]
    assert len(calls) == 1 and grads["p"].tolist() == grads["q"].tolist() == [2, 2]
    assert references[0]() is None


# ---- kinds of numbers

@given(programs())
def test_float32_in_float32_out(program):
    seed, code = program
    params = parameters(seed, "float32")
    seen = []

    def watch(name: str, inputs: tuple, out: Any, vjps: tuple, node: Any) -> None:
        seen.append((name, out.dtype))

    token = engine._observer.set(watch)
    try:
        _, grads = value_and_grad(lambda: run(code, params), params)
    finally:
        engine._observer.reset(token)
    assert {str(dtype) for _, dtype in seen} == {"float32"}
    assert {str(g.dtype) for g in grads.values()} == {"float32"}


@pytest.mark.parametrize("last", [ops.sum, ops.mean, lambda x: ops.div(ops.sum(x), 3),
                                  lambda x: ops.mean(ops.relu(ops.sub(x, 99)), axis=0)[0]])
def test_fractions_stay_exact_from_the_loss_to_the_gradients(last):
    p = Leaf(fractions(numpy.arange(1, 7).reshape(2, 3), 7))
    w = fractions(numpy.arange(6).reshape(2, 3), 3)
    loss, grads = value_and_grad(lambda: last(ops.mul(p, w)), {"p": p})
    assert isinstance(loss, Fraction)
    assert all(type(v) is Fraction for v in grads["p"].reshape(-1))


def test_the_gradient_of_a_mean_of_fractions_is_a_fraction():
    p = Leaf(fractions([1, 2, 5], 7))
    loss, grads = value_and_grad(lambda: ops.mean(ops.mul(p, p)), {"p": p})
    assert loss == Fraction(30, 49 * 3)
    assert grads["p"].tolist() == [Fraction(2 * n, 21) for n in (1, 2, 5)]


def test_a_parameter_without_axes_has_an_array_for_a_gradient():
    p = Leaf(numpy.array(3.0))
    loss, grads = value_and_grad(lambda: ops.mul(p, p) + p + p, {"p": p})
    assert loss == 15 and isinstance(grads["p"], numpy.ndarray)
    assert grads["p"].shape == () and grads["p"] == 8


@given(shapes(1, 3), layouts(), dtypes())
def test_a_gradient_has_the_shape_and_dtype_of_its_parameter_whatever_its_layout(shape, layout, dtype):
    p = Leaf(draw_array(1, shape, dtype, layout))
    w = draw_array(2, (7, *shape), dtype)
    grads = value_and_grad(lambda: ops.sum(ops.mul(p, w)), {"p": p})[1]
    assert grads["p"].shape == shape and grads["p"].dtype == dtype


def test_nan_reaches_the_loss_and_the_gradients():
    p = vector(1, numpy.nan)
    loss, grads = value_and_grad(lambda: ops.sum(ops.mul(p, p)), {"p": p})
    assert numpy.isnan(loss) and numpy.isnan(grads["p"][1]) and grads["p"][0] == 2


# ---- the tensor

def test_a_tensor_has_no_truth_value_and_is_not_converted_silently():
    x = Tensor(numpy.ones(3))
    with pytest.raises(TypeError, match="no truth value"):
        bool(x)
    with pytest.raises(TypeError, match="use its .data"):
        numpy.asarray(x)
    assert len(x) == 3 and x.shape == (3,) and x.ndim == 1 and x.dtype == numpy.float64
    assert float(Tensor(numpy.array(2.5))) == 2.5
    assert repr(x) == "Tensor([3] float64)"


def test_operators_are_the_ops_of_the_same_name_on_either_side():
    p, a = vector(1.5, -2), numpy.array([3.0, 4])
    cases: list[tuple[Callable, list[float]]] = [
        (lambda: p + a, [4.5, 2]), (lambda: a + p, [4.5, 2]), (lambda: 1 + p, [2.5, -1]),
        (lambda: p - a, [-1.5, -6]), (lambda: a - p, [1.5, 6]), (lambda: 1 - p, [-0.5, 3]),
        (lambda: p * a, [4.5, -8]), (lambda: a * p, [4.5, -8]), (lambda: p / a, [0.5, -0.5]),
        (lambda: a / p, [2, -2]), (lambda: 3 / p, [2, -1.5]), (lambda: -p, [-1.5, 2]), (lambda: p ** 2, [2.25, 4]),
        (lambda: p[::-1], [-2, 1.5]), (lambda: p.reshape(1, 2).transpose(1, 0)[0], [1.5]),
        (lambda: p.sum(keepdims=True), [-0.5]), (lambda: p.mean(axis=0).reshape(1), [-0.25]),
        (lambda: p.reshape((1, 2)) @ a.reshape(2, 1), [[-3.5]]), (lambda: a.reshape(1, 2) @ p.reshape(2, 1), [[-3.5]])]
    for compute, expected in cases:
        recorded = []
        value_and_grad(lambda: recorded.append(compute()) or ops.sum(recorded[0]), {"p": p})
        assert isinstance(recorded[0], Tensor) and recorded[0].data.tolist() == expected
        assert recorded[0].node is not None


def test_an_observer_sees_forward_inputs_output_and_the_node_of_every_op():
    p, frozen = vector(1, 2), vector(3, 4)
    seen: list[tuple] = []
    token = engine._observer.set(lambda *what: seen.append(what))
    try:
        value_and_grad(lambda: ops.sum(ops.mul(ops.neg(frozen), p)), {"p": p})
    finally:
        engine._observer.reset(token)
    assert [what[0].__name__ for what in seen] == ["neg", "mul", "sum"]
    (_, inputs, out, vjps, node), (_, mul_inputs, mul_out, mul_vjps, mul_node) = seen[:2]
    assert inputs == (frozen,) and out.tolist() == [-3, -4] and len(vjps) == 1 and node is None
    assert mul_inputs[1] is p and mul_out.tolist() == [-3, -8] and len(mul_vjps) == 2
    assert mul_node.op == "mul" and mul_node.shape == (2,) and len(mul_node.edges) == 0  # the backward has passed it
    ops.neg(p)
    assert len(seen) == 3


# ---- threads and contexts

def test_threads_do_not_see_each_others_watch():
    """Two threads differentiate with respect to different parameters of one loss at the same time."""
    p, q = vector(1, 2), vector(3, 4)
    both_inside = threading.Barrier(2, timeout=20)
    found: dict[str, Any] = {}

    def work(name: str, leaf: Leaf) -> None:
        def step() -> Tensor:
            both_inside.wait()
            out = ops.sum(ops.mul(p, q))
            found[name + " nodes"] = (p.node is not None, q.node is not None)
            both_inside.wait()
            return out
        found[name] = value_and_grad(step, {name: leaf})[1]

    threads = [threading.Thread(target=work, args=("p", p)), threading.Thread(target=work, args=("q", q))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["p nodes"] == (True, False) and found["q nodes"] == (False, True)
    assert {n: g.tolist() for n, g in found["p"].items()} == {"p": [3, 4]}
    assert {n: g.tolist() for n, g in found["q"].items()} == {"q": [1, 2]}


def test_a_fresh_context_inside_a_step_records_nothing():
    p = vector(1, 2)
    seen = []

    def step() -> Tensor:
        seen.append(contextvars.Context().run(lambda: ops.mul(p, p).node))
        return ops.sum(p)

    value_and_grad(step, {"p": p})
    assert seen == [None]


# ---- two libraries

def test_mixed_backends_raise_and_the_error_names_which_input_lives_where():
    host, device = numpy.ones(2), strict.asarray(numpy.ones(2))
    with pytest.raises(TypeError, match=r"mul: inputs live in different array libraries \(numpy, strict, in order\); "
                                        r"move the model with model\.to\(backend\)"):
        ops.mul(Leaf(host), Tensor(device))
    with minipeft.use(strict), pytest.raises(TypeError, match=r"linear: .*\(strict, numpy, in order\)"):
        ops.linear(device.reshape(1, 2), host.reshape(1, 2))


def test_another_type_error_is_passed_on_as_it_is():
    with pytest.raises(TypeError, match="NoneType"):
        ops.mul(numpy.ones(2), None)


def test_a_vjp_of_another_shape_and_the_same_size_is_refused():
    @op
    def transposed(a):
        return a.T, (lambda g: g,)

    p = Leaf(numpy.ones((2, 3)))
    with pytest.raises(ValueError, match="does not sum to its input's"):
        value_and_grad(lambda: transposed(p).sum(), {"p": p})


def test_a_tensor_of_an_earlier_call_is_refused_and_not_taken_for_a_constant():
    p, kept = Leaf(numpy.array(3.0)), []

    def first():
        kept.append(p * 2)
        return kept[0] * p

    value_and_grad(first, {"p": p})
    with pytest.raises(RuntimeError, match="an earlier value_and_grad recorded"):
        value_and_grad(lambda: kept[0] * p, {"p": p})


def test_a_leaf_is_copied_and_pickled_with_an_array_of_its_own():
    p = Leaf(numpy.arange(3.0))
    for twin in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert type(twin) is Leaf and twin.data is not p.data and (twin.data == p.data).all()
