"""Law 9: a fused op equals its definition, in value and in every gradient; and what each fused op promises besides.

The bounds are derived. For each output there is a magnitude M, the same equation on absolute values, and a number of
roundings n on the longest path to it (sums of length d count d). Either computation is then off by at most n u M to
first order, u the unit roundoff (Higham, Accuracy and Stability, sec. 3), and the two differ by at most 2 n u M. An
exponential turns an absolute error e of its argument into a relative error e, so scores of size s add their own
roundings times s to n. Nothing was measured to find these numbers.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine.tensor import Leaf, Tensor, sum_to, value_and_grad
from minipeft.engine.ops import definitions, fused
from tests.strategies import FRACTION, draw_array, dtypes, fractions, layouts, seeds, shapes, sizes

U = {"float64": 2.0 ** -53, "float32": 2.0 ** -24}
TINY = {"float64": 2.0 ** -1074, "float32": 2.0 ** -149}
Bound = list[Any]  # n M of the value, then of each gradient


@dataclasses.dataclass
class Call:
    """One call: differentiable inputs by name, constants, options, and n M of the value and of each gradient."""

    inputs: dict[str, Any]
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, f: Callable, leaves: dict[str, Leaf]) -> Tensor:
        return f(**leaves, **self.constants, **self.options)


def mean(x: Any) -> Any:
    return x.mean(axis=-1, keepdims=True)


# ---- what to call, and how far two right answers may be apart; g is the gradient at the output

def linear_bound(c: Call, g: Any) -> Bound:
    x, w = (abs(a) for a in c.inputs.values())
    rows, g = math.prod(x.shape[:-1]), abs(g)
    d_out, d_in = w.shape
    return [d_in * (x @ w.T), d_out * (g @ w),
            rows * (g.reshape(rows, d_out).T @ x.reshape(rows, d_in))]


def dequantized_bound(c: Call, g: Any) -> Bound:
    """As those of `linear`, without dW."""
    x, w = abs(c.inputs["x"]), abs(c.options["dequantize"]().astype("float64"))
    return [w.shape[1] * (x @ w.T), w.shape[0] * (abs(g) @ w)]


def low_rank_bound(c: Call, g: Any) -> Bound:
    y, x, a, b = (abs(v) for v in c.inputs.values())
    s, g = abs(float(c.options["scale"])), abs(g)
    (d_out, rank), d_in, rows = b.shape, a.shape[1], math.prod(x.shape[:-1])
    flat_g, flat_x = g.reshape(rows, d_out), x.reshape(rows, d_in)
    return [(d_in + rank + 4) * (y + s * (x @ a.T) @ b.T), g,
            (d_out + rank + 4) * s * (g @ b) @ a,
            (d_out + rows + 4) * s * (flat_g @ b).T @ flat_x,
            (d_in + rows + 4) * s * flat_g.T @ (flat_x @ a.T)]


def embedding_bound(c: Call, g: Any) -> Bound:
    """The lookup is exact; a row's gradient is the sum of at most ids.size rows."""
    out = numpy.zeros_like(c.inputs["table"])
    numpy.add.at(out, c.constants["ids"], abs(g))
    return [0 * g, c.constants["ids"].size * out]


def softmax_bound(c: Call, g: Any) -> Bound:
    x, axis = c.inputs["x"], c.options["axis"]
    spread = (x.max(axis=axis, keepdims=True) - x).max() if x.size else 0
    p = numpy.exp(x - x.max(axis=axis, keepdims=True))
    p /= p.sum(axis=axis, keepdims=True)
    n = 2 * (x.shape[axis] + 6 + 2 * spread)   # p: the argument's rounding, exp, the sum, the quotient; twice in dx
    return [n * p, 2 * n * p * (abs(g) + (abs(g) * p).sum(axis=axis, keepdims=True))]


def attention_bound(c: Call, g: Any) -> Bound:
    heads, scale = c.options["heads"], abs(c.options["scale"])

    def split(x: Any) -> Any:
        return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(0, 2, 1, 3)

    def joined(x: Any) -> Any:
        return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)

    q, k, v = (split(c.inputs[name]) for name in "qkv")
    keep = numpy.ones(()) if c.constants.get("keep") is None else c.constants["keep"]
    b, added = numpy.zeros(()), numpy.zeros(())
    for name in ("bias", "mask"):
        part = c.inputs.get(name, c.constants.get(name))
        b, added = (b, added) if part is None else (b + part, added + abs(part))
    s = scale * q @ k.swapaxes(-1, -2) + b
    blind = (s == -math.inf).all(axis=-1, keepdims=True)
    s = numpy.where(blind, 0, s)
    p = numpy.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    seen = numpy.where((p > 0) & (added < 1e30), added, 0)        # -1.8e308 swallows its score, in both alike
    size = float((scale * abs(q) @ abs(k).swapaxes(-1, -2) + seen).max())
    g4, q, k, v = abs(split(g)), abs(q), abs(k), abs(v)
    d_s = p * ((g4 @ v.swapaxes(-1, -2)) * keep)
    d_s = (d_s + p * d_s.sum(axis=-1, keepdims=True)) * ~blind
    d_k, keys, queries = q.shape[-1], k.shape[2], q.shape[2]
    # p has a rounding for each term of its sum and 2 (d_k + 4) size for its argument and for those of its sum; it
    # enters dS three times. Every matrix product adds its length.
    n = 3 * (keys + 6 + 4 * (d_k + 4) * size) + d_k + v.shape[-1] + keys + queries + 10
    found = [joined((p * keep) @ v), scale * joined(d_s @ k), scale * joined(d_s.swapaxes(-1, -2) @ q),
             joined((p * keep).swapaxes(-1, -2) @ g4)]
    return [n * m for m in found + ([d_s] if "bias" in c.inputs else [])]


def toeplitz_bound(c: Call, g: Any) -> Bound:
    """The view is exact; a number's gradient is the sum of a diagonal, of one for each query at most."""
    values, queries = c.inputs["values"], c.options["queries"]
    keys = values.shape[-2] + 1 - queries
    out = numpy.zeros((len(g), *values.shape[-2:]))
    for q in range(queries):
        for k in range(keys):
            out[:, q - k + keys - 1] += abs(g[:, :, q, k])
    return [0 * g, queries * out.reshape(values.shape)]


def rotate_bound(c: Call, g: Any) -> Bound:
    """Two products and their sum, in value and gradient."""
    cos, sin = (abs(c.constants[name])[:, :, None] for name in ("cos", "sin"))

    def turned(x: Any) -> Any:
        halves = abs(x).reshape(*x.shape[:2], -1, 2, cos.shape[-1])
        a, b = halves[..., 0, :], halves[..., 1, :]
        return numpy.stack([a * cos + b * sin, b * cos + a * sin], axis=3).reshape(x.shape)

    return [2 * turned(c.inputs["x"]), 2 * turned(g)]


def layer_norm_bound(c: Call, g: Any) -> Bound:
    """z = (x - mean) r. The mean is off by (d + 1) u mean|x|, so z by that times r, and r, through the sum of squares,
    relatively by twice as much; c = r max|x| is the condition."""
    x, w, b = c.inputs.values()
    d, w, g = x.shape[-1], abs(w), abs(g)
    z = x - mean(x)
    r = 1 / numpy.sqrt(mean(z * z) + c.options["eps"])
    z = abs(z * r)
    condition = r * abs(x).max(axis=-1, keepdims=True)
    n = (d + 8) * (1 + 2 * condition)
    error = n * (1 + 2 * z)                                       # of z, over u
    h = g * w
    return [error * w + 4 * (z * w + abs(b)),
            r * (n * (h + mean(h)) + (z + 1) * mean(h * (1 + 2 * z)) * 3 * n),
            (error + 2) * g, g]


def rms_norm_bound(c: Call, g: Any) -> Bound:
    x, w = (abs(v) for v in c.inputs.values())
    d, g = x.shape[-1], abs(g)
    r = 1 / numpy.sqrt(mean(x * x) + c.options["eps"])
    h, z = g * w, x * r
    n = 4 * (d + 8)                                               # r three times in dx, a sum of d products, and change
    return [n * z * w, n * r * (h + z * mean(h * z)), n * z * g]


def gelu_bound(c: Call, g: Any) -> Bound:
    """1 + erf cancels for negative x: its error is absolute. exp(-x^2 / 2) turns 3 roundings of x^2 / 2 into x^2."""
    x, g = abs(c.inputs["x"]), abs(g)
    phi = numpy.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return [8 * x, g * (12 + x * phi * (12 + 2 * x * x))]


def gelu_tanh_bound(c: Call, g: Any) -> Bound:
    """1 + t and 1 - t^2 cancel: their errors are absolute; that of t is 8 roundings of its argument times 1 - t^2,
    which is less than 4 (|a| / cosh^2 a < 1/2)."""
    x, g, k, a = abs(c.inputs["x"]), abs(g), math.sqrt(2 / math.pi), 0.044715
    return [12 * x, g * (12 + 24 * x * k * (1 + 3 * a * x * x))]


def silu_bound(c: Call, g: Any) -> Bound:
    x, g = abs(c.inputs["x"]), abs(g)
    return [8 * x, g * (8 + 20 * x)]


def cross_entropy_bound(c: Call, g: Any) -> Bound:
    z, labels = c.inputs["logits"], c.constants["labels"]
    vocab = z.shape[-1]
    z = z - z.max(axis=-1, keepdims=True)
    p = numpy.exp(z)
    p /= p.sum(axis=-1, keepdims=True)
    counted = (labels != -100)[..., None]
    count = counted.sum()
    target = (labels[..., None] == numpy.arange(vocab)) + 1 / vocab
    n = vocab + 10 + 2 * abs(z).max()
    row = 2 * abs(z).max(axis=-1) + math.log(vocab) + 2
    return [(n + count) * (row * counted[..., 0]).sum() / count, 2 * n * (p + target) * counted * abs(g) / count]


@st.composite
def linear_calls(draw: Any, dtype: str) -> Call:
    d_out, d_in, *lead = draw(sizes(4))
    lead = lead[:draw(st.integers(1, 2))]
    return Call({"x": array(draw, (*lead, d_in), dtype), "w": array(draw, (d_out, d_in), dtype)})


@st.composite
def dequantized_calls(draw: Any, dtype: str) -> Call:
    call = draw(linear_calls(dtype))
    w = call.inputs.pop("w")
    return dataclasses.replace(call, options={"dequantize": lambda: w})


@st.composite
def low_rank_calls(draw: Any, dtype: str) -> Call:
    d_out, d_in, rank, *lead = draw(sizes(5))
    lead = lead[:draw(st.integers(1, 2))]
    shape = {"y": (*lead, d_out), "x": (*lead, d_in), "a": (rank, d_in), "b": (d_out, rank)}
    return Call({n: array(draw, s, dtype) for n, s in shape.items()},
                options={"scale": draw(st.sampled_from([1, 2.5, -0.75, *fractions([1, 7], 3)]))})


@st.composite
def embedding_calls(draw: Any, dtype: str) -> Call:
    vocab, d, *lead = draw(sizes(4))
    lead = lead[:draw(st.integers(1, 2))]
    ids = numpy.random.default_rng(draw(seeds())).integers(0, vocab, lead)
    return Call({"table": array(draw, (vocab, d), dtype)}, {"ids": ids})


@st.composite
def softmax_calls(draw: Any, dtype: str) -> Call:
    shape = draw(shapes(1, 3))
    return Call({"x": array(draw, shape, dtype, 3)}, options={"axis": draw(st.integers(-len(shape), len(shape) - 1))})


@st.composite
def attention_calls(draw: Any, dtype: str) -> Call:
    batch, queries, keys, d_k, d_v = draw(sizes(5))
    heads = draw(st.integers(1, 3))
    alone = draw(st.sampled_from(["", "q", "k", "v", "kv"]))              # what all rows of the batch share
    inputs = {name: array(draw, (1 if name in alone else batch, time, heads * d), dtype)
              for name, time, d in (("q", queries, d_k), ("k", keys, d_k), ("v", keys, d_v))}
    constants: dict[str, Any] = {"bias": None, "keep": None, "mask": None}
    full = (batch, heads, queries, keys)

    def part() -> tuple:
        return tuple(1 if draw(st.booleans()) else n for n in full)[draw(st.integers(0, 2)):]

    for name, kinds in (("bias", ["none", "trained", "lowest", "hidden"]), ("mask", ["none", "lowest", "hidden"])):
        kind = draw(st.sampled_from(kinds))
        if kind == "trained":
            constants.pop(name)
            inputs[name] = array(draw, part(), dtype)
        elif kind != "none":                                              # some hide all keys of a query
            rng = numpy.random.default_rng(draw(seeds()))
            low = numpy.finfo(dtype).min / 2 if kind == "lowest" else -math.inf  # twice half of it is still finite
            constants[name] = numpy.where(rng.random(part()) < 0.6, 0, low).astype(dtype)
    if draw(st.booleans()):
        rng = numpy.random.default_rng(draw(seeds()))
        constants["keep"] = (rng.random(full) < 0.7).astype(dtype) * 2
    return Call(inputs, constants, {"heads": heads, "scale": draw(st.sampled_from([1.0, d_k ** -0.5]))})


@st.composite
def toeplitz_calls(draw: Any, dtype: str) -> Call:
    queries, keys, heads, *batch = draw(sizes(4))
    batch = batch[:draw(st.integers(0, 1))]
    return Call({"values": array(draw, (*batch, queries + keys - 1, heads), dtype)}, options={"queries": queries})


@st.composite
def rotate_calls(draw: Any, dtype: str) -> Call:
    """cos and sin need not be those of an angle."""
    batch, time, heads, half = draw(sizes(4))
    tables = {name: array(draw, (draw(st.sampled_from([1, batch])), time, half), dtype) for name in ("cos", "sin")}
    return Call({"x": array(draw, (batch, time, 2 * heads * half), dtype)}, tables)


@st.composite
def norm_calls(draw: Any, dtype: str, bias: bool) -> Call:
    """The scale and the bias may differ from row to row of the batch, as [batch, 1, d]."""
    batch, time, d = draw(sizes(3))
    shape = (batch, 1, d) if draw(st.booleans()) else (d,)
    inputs = {"x": array(draw, (batch, time, d), dtype), "w": array(draw, shape, dtype)}
    if bias:
        inputs["b"] = array(draw, shape, dtype)
    return Call(inputs, options={"eps": draw(st.sampled_from([1e-3, 1e-5, 1e-6]))})


@st.composite
def elementwise_calls(draw: Any, dtype: str) -> Call:
    return Call({"x": array(draw, draw(shapes(0, 3)), dtype, draw(st.sampled_from([1, 5])))})


@st.composite
def cross_entropy_calls(draw: Any, dtype: str) -> Call:
    vocab, *lead = draw(sizes(3))
    lead = tuple(lead[:draw(st.integers(1, 2))])
    rng = numpy.random.default_rng(draw(seeds()))
    labels = numpy.where(rng.random(lead) < 0.3, -100, rng.integers(0, vocab, lead))
    labels.flat[rng.integers(labels.size)] = vocab - 1
    return Call({"logits": array(draw, (*lead, vocab), dtype, draw(st.sampled_from([1, 5])))}, {"labels": labels},
                {"smoothing": draw(st.sampled_from([0.0, 0.1]))})


def array(draw: Any, shape: tuple, dtype: str, factor: int = 1) -> Any:
    """Halves as Fractions, or normal numbers times `factor`, in any layout."""
    drawn = draw_array(draw(seeds()), shape, dtype, draw(layouts()))
    if dtype != FRACTION:
        drawn *= drawn.dtype.type(factor)
    return drawn


OPS: dict[str, tuple[Callable[[str], st.SearchStrategy[Call]], Callable[[Call, Any], Bound]]] = {
    "linear": (linear_calls, linear_bound),
    "dequantized_linear": (dequantized_calls, dequantized_bound),
    "low_rank_linear": (low_rank_calls, low_rank_bound),
    "embedding": (embedding_calls, embedding_bound),
    "softmax": (softmax_calls, softmax_bound),
    "toeplitz": (toeplitz_calls, toeplitz_bound),
    "rotate": (rotate_calls, rotate_bound),
    "attention": (attention_calls, attention_bound),
    "layer_norm": (lambda dtype: norm_calls(dtype, True), layer_norm_bound),
    "rms_norm": (lambda dtype: norm_calls(dtype, False), rms_norm_bound),
    "gelu": (elementwise_calls, gelu_bound),
    "gelu_tanh": (elementwise_calls, gelu_tanh_bound),
    "silu": (elementwise_calls, silu_bound),
    "cross_entropy": (cross_entropy_calls, cross_entropy_bound),
}
POLYNOMIAL = ("linear", "dequantized_linear", "low_rank_linear", "embedding", "toeplitz", "rotate")
every = pytest.mark.parametrize("name", OPS)


def evaluate(f: Callable, call: Call, g: Any) -> tuple[Any, dict[str, Any]]:
    """The value, and the gradient of <g, value> with respect to each input."""
    leaves = {name: Leaf(x) for name, x in call.inputs.items()}
    outs = []

    def step() -> Tensor:
        outs.append(call.run(f, leaves))
        return ops.sum(ops.mul(outs[0], g))

    _, grads = value_and_grad(step, leaves)
    return outs[0].data, grads


def wide(call: Call) -> Call:
    """The same call on float64 copies."""
    return Call({n: x.astype("float64") for n, x in call.inputs.items()}, call.constants, call.options)


def test_every_fused_op_is_here_and_has_a_definition_of_the_same_name_and_arguments():
    import inspect
    own = {name for name, f in vars(fused).items() if hasattr(f, "__wrapped__") and not name.startswith("_")}
    assert own == set(OPS)
    for name in own:
        assert list(inspect.signature(getattr(fused, name).__wrapped__).parameters) == \
            list(inspect.signature(getattr(definitions, name)).parameters)
        assert getattr(ops, name) is getattr(fused, name)


@every
@given(st.data(), dtypes(), seeds())
def test_a_fused_op_equals_its_definition_in_value_and_all_gradients(name, data, dtype, seed):
    calls, bound = OPS[name]
    call = data.draw(calls(dtype))
    shape = call.run(getattr(fused, name), {n: Leaf(x) for n, x in call.inputs.items()}).shape
    g = draw_array(seed, shape, dtype)
    value, grads = evaluate(getattr(fused, name), call, g)
    wanted, wanted_grads = evaluate(getattr(definitions, name), call, g)
    assert value.dtype == wanted.dtype == dtype and value.shape == wanted.shape
    allowed, *allowed_grads = bound(wide(call), g.astype("float64"))
    assert within(value, wanted, allowed, dtype)
    assert len(allowed_grads) == len(call.inputs)
    for (leaf, x), n_m in zip(call.inputs.items(), allowed_grads, strict=True):
        assert grads[leaf].dtype == dtype and grads[leaf].shape == x.shape
        broadcast = max(1, n_m.size // max(1, x.size))            # a broadcast input's gradient is one more sum
        assert within(grads[leaf], wanted_grads[leaf], sum_to(n_m * broadcast, x.shape), dtype), leaf


def within(a: Any, b: Any, n_m: Any, dtype: str) -> bool:
    """|a - b| <= 2 n u M, and a little for results that are not normal numbers."""
    assert numpy.isfinite(a).all() and numpy.isfinite(b).all()
    return bool((abs(a.astype("float64") - b) <= 2 * U[dtype] * n_m + 64 * TINY[dtype]).all())


@every
@given(st.data(), seeds())
def test_the_gradient_of_a_fused_op_is_that_of_central_differences(name, data, seed):
    call = data.draw(OPS[name][0]("float64"))
    for part in ("bias", "mask"):
        if call.constants.get(part) is not None:
            low = call.constants[part]                            # nothing to an exponential, but no rounding either
            call.constants[part] = numpy.where(numpy.isinf(low), low, numpy.maximum(low, -40))
    leaves = {n: Leaf(x) for n, x in call.inputs.items()}

    def step() -> Tensor:
        out = call.run(getattr(fused, name), leaves)
        loss = ops.sum(ops.mul(out, draw_array(seed, out.shape)))
        for x in leaves.values():                                 # the tolerance is relative to the loss, which gelu
            loss = ops.add(loss, ops.sum(ops.mul(x, x)))          # of -5 alone would make smaller than its roundings
        return loss

    minipeft.check_gradients(step, leaves, numpy.random.default_rng(seed))


@pytest.mark.parametrize("name", POLYNOMIAL)
@given(st.data(), seeds())
def test_polynomial_fused_ops_equal_their_definitions_exactly_on_fractions(name, data, seed):
    call = data.draw(OPS[name][0](FRACTION))
    if isinstance(call.options.get("scale"), float):
        call.options["scale"] = fractions(int(call.options["scale"] * 4), 4).item()
    shape = call.run(getattr(fused, name), {n: Leaf(x) for n, x in call.inputs.items()}).shape
    g = draw_array(seed, shape, FRACTION)
    value, grads = evaluate(getattr(fused, name), call, g)
    wanted, wanted_grads = evaluate(getattr(definitions, name), call, g)
    assert (value == wanted).all() and value.dtype == object
    for leaf in call.inputs:
        assert (grads[leaf] == wanted_grads[leaf]).all() and grads[leaf].shape == call.inputs[leaf].shape
        assert not any(isinstance(x, float) for x in grads[leaf].reshape(-1))


@every
@given(st.data(), seeds(), dtypes())
def test_neither_inputs_nor_g_are_written_into_and_a_vjp_gives_the_same_twice(name, data, seed, dtype):
    """All arrays are read-only. Two different g in turn: what VJPs share must not be that of another g."""
    call = data.draw(OPS[name][0](dtype))
    arrays = [*call.inputs.values(), *(c for c in call.constants.values() if c is not None)]
    before = [x.tobytes() for x in arrays]
    for x in arrays:
        if x.ndim:
            x.flags.writeable = False
    out, vjps = call.run(getattr(fused, name).__wrapped__, call.inputs)  # type: ignore[arg-type]
    gs = [numpy.array(draw_array(seed + i, numpy.shape(out), dtype)) for i in range(2)]
    for g in gs:
        g.flags.writeable = False
    answers = [[numpy.array(vjp(g)).tobytes() for vjp in vjps if vjp is not None] for g in (*gs, *gs)]
    assert answers[:2] == answers[2:]
    assert before == [x.tobytes() for x in arrays]


@every
def test_empty_batches_give_empty_values_and_zero_gradients(name):
    """A batch of no rows: nothing to do for any of them, and a gradient of 0 for what the rows share."""
    x = numpy.ones((0, 2, 6), "float32")
    w, two = numpy.ones(6, "float32"), numpy.ones((4, 6), "float32")
    calls = {
        "linear": Call({"x": x, "w": two}),
        "dequantized_linear": Call({"x": x}, options={"dequantize": lambda: two}),
        "low_rank_linear": Call({"y": x[..., :4], "x": x, "a": two[:3], "b": two[:, :3]}, options={"scale": 2}),
        "embedding": Call({"table": two}, {"ids": numpy.zeros((0, 2), int)}),
        "softmax": Call({"x": x}, options={"axis": -1}),
        "layer_norm": Call({"x": x, "w": w, "b": w}, options={"eps": 1e-5}),
        "rms_norm": Call({"x": x, "w": w}, options={"eps": 1e-5}),
        "toeplitz": Call({"values": x}, options={"queries": 2}),
        "rotate": Call({"x": x}, {"cos": two[None, :2, :3], "sin": two[None, :2, :3]}),
        "gelu": Call({"x": x}), "gelu_tanh": Call({"x": x}), "silu": Call({"x": x}),
    }
    if name not in calls:  # a mean over no labels has no meaning; the models refuse an empty batch before attention
        assert name in ("attention", "cross_entropy")
        return
    for f in (getattr(fused, name), getattr(definitions, name)):
        leaves = {n: Leaf(a) for n, a in calls[name].inputs.items()}
        _, grads = value_and_grad(lambda: ops.sum(calls[name].run(f, leaves)), leaves)
        assert calls[name].run(f, leaves).shape[0] == 0
        for leaf, g in grads.items():
            assert g.shape == leaves[leaf].shape and g.dtype == numpy.float32 and (g == 0).all()


@given(st.data(), dtypes(), seeds())
def test_few_rows_and_many_are_multiplied_alike_by_a_matrix_of_any_number_of_blocks(data, dtype, seed):
    rows, d_in = data.draw(st.integers(1, 2 * fused.FEW_ROWS)), data.draw(st.integers(1, 5))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fused, "BLOCK", data.draw(st.integers(1, 4)))
        patched.setattr(fused, "LARGE", 0)
        x, w = draw_array(seed, (rows, d_in), dtype), draw_array(seed + 1, (data.draw(st.integers(1, 9)), d_in), dtype)
        found = fused.linear(x, w).data
    wanted = definitions.linear(x, w).data
    assert found.dtype == dtype and found.shape == wanted.shape
    assert found.flags.c_contiguous, "sums over a row go in one order, whatever is added to it before"
    assert within(found, wanted, d_in * (abs(x) @ abs(w).T).astype("float64"), dtype)


# ---- numerics, for the definition and the fused op alike

both = pytest.mark.parametrize("module", [fused, definitions])


@both
@pytest.mark.parametrize("dtype", U)
def test_softmax_of_huge_numbers_is_finite_and_right(module, dtype):
    top = float(numpy.finfo(dtype).max)
    with numpy.errstate(over="raise", invalid="raise"):
        for row, wanted in (([top / 2, top / 2], [0.5, 0.5]), ([top / 2, 0], [1, 0]),
                            ([-top / 2, -top / 2], [0.5, 0.5]), ([1e4, 1e4 + math.log(3)], [0.25, 0.75])):
            p = module.softmax(numpy.array([row], dtype)).data[0]
            # the difference of two numbers near 1e4 is off by their own roundings
            assert abs(p - wanted).max() <= 4 * U[dtype] * max(1, 1e4 * (row[0] == 1e4))


@both
@given(seeds(), dtypes(), st.floats(-1e3, 1e3))
def test_softmax_sums_to_one_and_ignores_a_shift(module, seed, dtype, shift):
    x = draw_array(seed, (3, 5), dtype)
    p = module.softmax(x).data
    assert abs(p.sum(axis=-1) - 1).max() <= 12 * U[dtype]
    assert abs(module.softmax(x + x.dtype.type(shift)).data - p).max() <= 4 * U[dtype] * (6 + abs(shift))


@both
def test_nan_propagates(module):
    row = numpy.array([[1.0, numpy.nan, 2.0]])
    good = numpy.array([[1.0, 0.5, 2.0]])
    w = numpy.ones(3)
    outs = [module.softmax(row), module.layer_norm(row, w, w, eps=1e-5), module.rms_norm(row, w, eps=1e-5),
            module.cross_entropy(row, numpy.array([0])), module.linear(row, good),
            module.attention(row[None], good[None], good[None], heads=1, scale=1.0),
            module.attention(good[None], good[None], row[None], heads=1, scale=1.0)[..., 1]]
    assert all(numpy.isnan(out.data).all() for out in outs)
    for f in (module.gelu, module.gelu_tanh, module.silu):
        assert numpy.isnan(f(row).data).tolist() == [[False, True, False]]


@both
@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize("kind", ["lowest", "infinite", "two masks"])
def test_a_query_that_may_look_nowhere_averages_all_values_and_stays_finite(module, dtype, kind):
    q, k, v = (Leaf(draw_array(i, (2, 3, 4), dtype)) for i in range(3))
    bias, mask = numpy.zeros((2, 1, 3, 3), dtype), None
    bias[0, 0, 1] = bias[1] = numpy.finfo(dtype).min if kind == "lowest" else -math.inf
    if kind == "two masks":                                               # neither hides all keys, both together do
        bias[..., 2], mask = 0, numpy.where(numpy.arange(3) == 2, -math.inf, 0).astype(dtype)
    outs = []

    def step() -> Tensor:
        outs.append(module.attention(q, k, v, bias, None, mask, heads=2, scale=1.0))
        return ops.sum(ops.mul(outs[0], outs[0]))

    with numpy.errstate(over="raise", invalid="raise", divide="raise"):
        _, grads = value_and_grad(step, {"q": q, "k": k, "v": v})
    out, average = outs[0].data, v.data.mean(axis=1)
    assert numpy.isfinite(out).all() and all(numpy.isfinite(g).all() for g in grads.values())
    for example, query in ((0, 1), (1, 0), (1, 1), (1, 2)):
        assert abs(out[example, query] - average[example]).max() <= 8 * U[dtype] * abs(v.data).max()
        assert kind == "lowest" or not grads["q"][example, query].any(), "its scores do not matter"


@both
@pytest.mark.parametrize("dtype", U)
def test_a_masked_key_has_no_influence_at_all(module, dtype):
    q, k, v = (draw_array(i, (1, 3, 4), dtype) for i in range(3))
    bias = numpy.zeros((1, 1, 1, 3), dtype)
    bias[..., 1] = numpy.finfo(dtype).min
    first = module.attention(q, k, v, bias, None, heads=2, scale=0.5).data
    k[:, 1], v[:, 1] = 1e3, -1e3
    assert module.attention(q, k, v, bias, None, heads=2, scale=0.5).data.tobytes() == first.tobytes()


@both
def test_each_head_sees_its_own_columns_alone(module):
    q, k, v = (draw_array(i, (2, 3, 6)) for i in range(3))
    whole = module.attention(q, k, v, None, None, heads=3, scale=0.5).data
    for h in range(3):
        own = slice(2 * h, 2 * h + 2)
        part = module.attention(q[..., own], k[..., own], v[..., own], None, None, heads=1, scale=0.5).data
        assert abs(whole[..., own] - part).max() <= 64 * U["float64"] * abs(v).max()


def test_attention_is_the_formula_of_the_paper():
    """One head, one query, two keys with scores 0 and ln 3: a quarter of one value and three quarters of the other."""
    q, k = numpy.array([[[1.0]]]), numpy.array([[[0.0], [2 * math.log(3)]]])
    v = numpy.array([[[8.0, 0.0], [0.0, 4.0]]])
    out = ops.attention(q, k, v, heads=1, scale=0.5).data
    assert abs(out - [[[2.0, 3.0]]]).max() <= 16 * U["float64"] * 8


@both
@pytest.mark.parametrize("dtype", U)
def test_cross_entropy_of_huge_logits_is_finite_and_right(module, dtype):
    z = numpy.array([[1e4, 0, 0], [0, 1e4, 0], [-1e4, -1e4, -1e4]], dtype)
    with numpy.errstate(over="raise", invalid="raise", divide="raise"):
        for labels, wanted in (([0, 1, -100], 0.0), ([1, -100, -100], 1e4), ([-100, -100, 2], math.log(3))):
            p = Leaf(z)
            loss, grads = value_and_grad(lambda: module.cross_entropy(p, numpy.array(labels)), {"p": p})
            assert abs(loss - wanted) <= 8 * U[dtype] * max(1, wanted)
            assert numpy.isfinite(grads["p"]).all()


@both
def test_cross_entropy_is_the_mean_over_counted_labels_with_smoothing_shared_by_all_tokens(module):
    """By hand: the target is 1 - e + e/V at the label and e/V elsewhere, so that it sums to 1."""
    z, labels, e, vocab = draw_array(0, (2, 3, 4)), numpy.array([[0, -100, 3], [-100, -100, 1]]), 0.1, 4
    wanted = []
    for row, label in zip(z.reshape(-1, vocab).tolist(), labels.reshape(-1).tolist()):
        if label != -100:
            log_p = [x - math.log(math.fsum(map(math.exp, row))) for x in row]
            target = [e / vocab + (1 - e) * (i == label) for i in range(vocab)]
            assert abs(math.fsum(target) - 1) < 1e-15
            wanted.append(-math.fsum(t * x for t, x in zip(target, log_p)))
    found = float(module.cross_entropy(z, labels, smoothing=e))
    assert len(wanted) == 3 and abs(found - sum(wanted) / 3) <= 32 * U["float64"] * 10


@both
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_positions_have_no_loss_and_a_gradient_of_zero(module, smoothing):
    labels = numpy.array([2, -100, 0, -100])
    p, kept = Leaf(draw_array(0, (4, 3))), labels != -100
    loss, grads = value_and_grad(lambda: module.cross_entropy(p, labels, smoothing=smoothing), {"p": p})
    only = Leaf(p.data[kept])
    alone, alone_grads = value_and_grad(
        lambda: module.cross_entropy(only, labels[kept], smoothing=smoothing), {"p": only})
    assert abs(loss - alone) <= 16 * U["float64"] * 4
    assert (grads["p"][~kept] == 0).all()
    assert abs(grads["p"][kept] - alone_grads["p"]).max() <= 16 * U["float64"]


@both
def test_another_number_may_mean_ignore(module):
    z = draw_array(0, (3, 4))
    assert float(module.cross_entropy(z, numpy.array([1, 7, 2]), ignore=7)) \
        == float(module.cross_entropy(z, numpy.array([1, -100, 2])))


@both
def test_gradients_of_cross_entropy_sum_to_zero_over_the_vocabulary(module):
    p = Leaf(draw_array(0, (5, 7)))
    for smoothing in (0.0, 0.1):
        _, grads = value_and_grad(lambda: module.cross_entropy(p, numpy.arange(5), smoothing=smoothing), {"p": p})
        assert abs(grads["p"].sum(axis=-1)).max() <= 32 * U["float64"]


FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0}


@both
@pytest.mark.parametrize("name", FORMULAS)
@given(x=st.floats(-1e3, 1e3))
def test_activations_are_their_formulas(module, name, x):
    """1 + erf, 1 + tanh: absolute error of a few u (and erf's 1e-15), times |x|."""
    found = float(getattr(module, name)(numpy.array([x])).data[0])
    assert abs(found - FORMULAS[name](x)) <= 2e-15 * abs(x)


@both
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", U)
def test_activations_do_not_overflow_and_vanish_or_pass_far_out(module, name, dtype):
    x = Leaf(numpy.array([-1e30, -1e4, 0, 1e4], dtype))
    with numpy.errstate(invalid="raise", divide="raise"):
        out = getattr(module, name)(x[1:]).data
        _, grads = value_and_grad(lambda: ops.sum(getattr(module, name)(x[1:])), {"x": x})
    assert out.tolist() == [0, 0, 1e4]
    assert grads["x"].tolist() == [0, 0, 0.5, 1]


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_take_arrays_without_axes(name):
    x = Leaf(numpy.array(0.5))
    loss, grads = value_and_grad(lambda: getattr(ops, name)(x), {"x": x})
    assert abs(loss - FORMULAS[name](0.5)) <= 2e-15
    assert grads["x"].shape == () and isinstance(grads["x"], numpy.ndarray)


@both
@pytest.mark.parametrize("dtype", U)
def test_a_constant_row_has_no_layer_norm_and_a_zero_row_no_rms_norm(module, dtype):
    """The variance is 0; eps keeps the quotient finite."""
    w, b = draw_array(0, (5,), dtype), draw_array(1, (5,), dtype)
    out = module.layer_norm(numpy.full((2, 5), 3, dtype), w, b, eps=1e-5).data
    assert (out == b).all()
    assert (module.rms_norm(numpy.zeros((2, 5), dtype), w, eps=1e-6).data == 0).all()


@both
def test_norms_are_their_formulas_with_the_biased_variance(module):
    x, eps = [1.0, 2.0, 4.0, 9.0], 1e-3
    mean_, n = 4.0, 4
    variance = sum((v - mean_) ** 2 for v in x) / n
    found = module.layer_norm(numpy.array(x), numpy.full(4, 2.0), numpy.full(4, 0.5), eps=eps).data
    assert abs(found - [2 * (v - mean_) / math.sqrt(variance + eps) + 0.5 for v in x]).max() <= 64 * U["float64"]
    found = module.rms_norm(numpy.array(x), numpy.full(4, 2.0), eps=eps).data
    wanted = [2 * v / math.sqrt(sum(u * u for u in x) / n + eps) for v in x]
    assert abs(found - wanted).max() <= 64 * U["float64"]


def test_low_rank_linear_never_makes_a_matrix_of_the_size_of_w():
    """y + s (x A^T) B^T on sizes where B A would be the largest array by far: no allocation comes near it."""
    import tracemalloc
    d, rank, rows = 600, 2, 3
    y, x = Leaf(draw_array(0, (rows, d))), Leaf(draw_array(1, (rows, d)))
    a, b = Leaf(draw_array(2, (rank, d))), Leaf(draw_array(3, (d, rank)))
    leaves = {"y": y, "x": x, "a": a, "b": b}
    tracemalloc.start()
    try:
        value_and_grad(lambda: ops.sum(ops.low_rank_linear(*leaves.values(), scale=2)), leaves)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < d * d * 8 / 10
