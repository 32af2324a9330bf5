"""FLOPs by the table against operations counted while the ops run, and against formulas written by hand."""
from __future__ import annotations

import types
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.engine import ops
from minipeft.engine.flops import PER_ELEMENT, RULES, flops, has_rule
from minipeft.engine.ops import activations, primitives
from tests.strategies import draw_array


class Counted(numpy.ndarray):
    """Counts what is done to it: 2 per multiply-add of a matrix product, 1 per element of anything else."""

    products = others = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [numpy.asarray(x) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(numpy.asarray(x) for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is numpy.matmul:
            Counted.products += 2 * result.size * plain[0].shape[-1]
        else:
            Counted.others += result.size if method == "__call__" else numpy.size(plain[0])
        return out[0] if out is not None else result.view(Counted) if isinstance(result, numpy.ndarray) else result


def counted_einsum(subscripts: str, a: Any, b: Any) -> Any:
    """A product and an addition per element: a mean of products."""
    Counted.others += 2 * max(a.size, b.size)
    return numpy.einsum(subscripts, numpy.asarray(a), numpy.asarray(b)).view(Counted)


KEEPING_THE_CLASS = types.SimpleNamespace(**{name: getattr(numpy, name) for name in dir(numpy)
                                             if not name.startswith("_")}
                                          | {"asarray": numpy.asanyarray, "einsum": counted_einsum})


def counted(shape: tuple, seed: int = 0) -> Any:
    return (draw_array(seed, shape) ** 2 + 0.5).view(Counted)


def measure(op: Any, *inputs: Any, namespace: Any = KEEPING_THE_CLASS,
            **options: Any) -> tuple[tuple[int, int], list[tuple[int, int] | None]]:
    """(products, others) of the forward, and of each VJP by itself."""
    def of(run: Any) -> tuple[Any, tuple[int, int]]:
        Counted.products = Counted.others = 0
        return run(), (Counted.products, Counted.others)

    with minipeft.use(namespace):
        (out, vjps), forward = of(lambda: op.__wrapped__(*inputs, **options))
        return forward, [None if vjp is None else of(lambda: vjp(counted(numpy.shape(out))))[1] for vjp in vjps]


ROWS, COLUMNS = 6, 500  # long rows: what is done once for a row is not 1 per element
X, Y, VECTOR = counted((ROWS, COLUMNS)), counted((ROWS, COLUMNS), 1), counted((COLUMNS,), 2)
CASES: dict[str, tuple] = {
    **{name: (X, Y) for name in ("add", "sub", "mul", "div", "concat")},
    **{name: (X,) for name in ("neg", "exp", "log", "tanh", "erf", "relu", "sum", "matrix_transpose", "softmax", "gelu",
                               "gelu_tanh", "silu")},
    "power": (X, {"exponent": 3}), "where": ((numpy.arange(COLUMNS) > 9).view(Counted) & (X > 0), X, Y),
    "transpose": (X, {"axes": (1, 0)}), "reshape": (X, {"shape": (-1,)}), "index": (X, {"key": slice(1, 3)}),
    "scatter": (VECTOR, numpy.arange(COLUMNS), {"shape": (2 * COLUMNS,)}),
    "layer_norm": (X, VECTOR, VECTOR, {"eps": 1e-6}), "rms_norm": (X, VECTOR, {"eps": 1e-6}),
    "cross_entropy": (X, numpy.arange(ROWS)), "key_first": (X.reshape(1, 1, ROWS, COLUMNS),),
    "toeplitz": (counted((ROWS + COLUMNS - 1, 1)), {"queries": ROWS}),
    "rotate": (X[None], counted((1, ROWS, 2)), counted((1, ROWS, 2)))}


@pytest.mark.parametrize("name", sorted(PER_ELEMENT))
def test_an_op_without_products_takes_the_number_per_element_that_its_text_takes(name, monkeypatch):
    for module in (primitives, activations):
        monkeypatch.setattr(module, "erf_of", lambda x: numpy.tanh(x))  # one call counts as 1
    inputs, options = CASES[name], {}
    if isinstance(inputs[-1], dict):
        inputs, options = inputs[:-1], inputs[-1]
    forward, backward = measure(getattr(ops, name, None) or getattr(primitives, name), *inputs, **options)
    n = 2 * COLUMNS if name == "scatter" else ROWS * COLUMNS
    slack = 0.05 * n
    assert forward[0] == 0 and abs(forward[1] - PER_ELEMENT[name][0] * n) < slack
    rules = PER_ELEMENT[name][1:]
    for i, found in enumerate(backward):
        expected = rules[i] if i < len(rules) else 0
        assert (expected == 0 if found is None else found[0] == 0 and abs(found[1] - expected * n) < slack), (i, found)


def of(op: Any, arrays: list, kept: Any, **options: Any) -> tuple[int, int]:
    """What the rule says."""
    out = op(*arrays, **options)
    return flops(op.__name__, [numpy.shape(x) for x in arrays], out.shape, kept)


def test_linear_takes_2_n_d_in_d_out_for_the_output_for_dx_and_for_dw():
    x, w = counted((2, 3, 5)), counted((7, 5), 1)
    once = 2 * (2 * 3) * 5 * 7
    for kept in ((), (0,), (1,), (0, 1)):
        assert of(ops.linear, [x, w], kept) == (once, once * len(kept))
    assert measure(ops.linear, x, w) == ((once, 0), [(once, 0), (once, 0)])


@pytest.mark.parametrize("a, b, once", [((3, 5), (5, 7), 2 * 3 * 5 * 7), ((4, 3, 5), (5, 7), 2 * 4 * 3 * 5 * 7),
                                        ((3, 5), (4, 5, 7), 2 * 4 * 3 * 5 * 7)])
def test_matmul_takes_twice_the_output_times_the_summed_axis_broadcast_or_not(a, b, once):
    x, y = counted(a), counted(b, 1)
    assert of(ops.matmul, [x, y], (0, 1)) == (once, 2 * once)
    assert measure(ops.matmul, x, y) == ((once, 0), [(once, 0), (once, 0)])


def test_low_rank_linear_takes_two_thin_products_and_shares_g_b_between_dx_and_da():
    n, d_in, d_out, rank = 2 * 3, 5, 11, 4
    arrays = [counted((2, 3, d_out)), counted((2, 3, d_in), 1), counted((rank, d_in), 2), counted((d_out, rank), 3)]
    down, up = 2 * n * rank * d_in, 2 * n * rank * d_out
    backward = {(): 0, (0,): 0, (1,): up + down, (2,): up + down, (3,): up, (1, 2): up + 2 * down,
                (2, 3): 2 * up + down, (0, 1, 2, 3): 2 * up + 2 * down}
    for kept, expected in backward.items():
        assert of(ops.low_rank_linear, arrays, kept, scale=2) == (down + up, expected)
    (products, _), alone = measure(ops.low_rank_linear, *arrays, scale=2)
    assert products == down + up and [found[0] for found in alone if found] == [0, up + down, up + down, up]


def test_attention_takes_its_two_products_and_shares_the_gradient_of_the_scores():
    batch, queries, keys, heads, d_k, d_v = 2, 3, 7, 4, 5, 6
    arrays = [counted((batch, queries, heads * d_k)), counted((batch, keys, heads * d_k), 1),
              counted((batch, keys, heads * d_v), 2), counted((heads, queries, keys), 3)]
    scores, mix = (2 * batch * queries * keys * heads * d for d in (d_k, d_v))
    backward = {(): 0, (0,): mix + scores, (1,): mix + scores, (2,): mix, (3,): mix, (0, 2): 2 * mix + scores,
                (0, 1, 2, 3): 2 * mix + 2 * scores}
    for kept, expected in backward.items():
        assert of(ops.attention, arrays, kept, heads=heads, scale=1.0) == (scores + mix, expected)
    (products, _), alone = measure(ops.attention, *arrays, heads=heads, scale=1.0)
    assert products == scores + mix
    assert [found[0] for found in alone if found] == [mix + scores, mix + scores, mix, mix]


def test_an_embedding_adds_each_row_of_the_gradient_once():
    table, ids = counted((5, 8)), numpy.array([[1, 4, 1], [0, 1, 2]])
    assert of(ops.embedding, [table, ids], (0,)) == (0, 6 * 8) and of(ops.embedding, [table, ids], ()) == (0, 0)
    assert measure(ops.embedding, table, ids, namespace=numpy) == ((0, 0), [(0, 6 * 8), None])


def test_solve_takes_a_factorization_and_two_triangular_solves_and_shares_the_second_system():
    a, b = numpy.eye(6) + numpy.zeros((4, 1, 6, 6)), numpy.ones((3, 6, 2))
    systems, factorize, columns = 4 * 3, 2 * 6 ** 3 // 3, 2 * 6 * 6 * 2
    once = systems * (factorize + columns)
    for kept, expected in {(): 0, (1,): once, (0,): once + systems * columns, (0, 1): once + systems * columns}.items():
        assert of(ops.solve, [a, b], kept) == (once, expected)


def test_an_op_without_a_rule_takes_1_per_element_of_its_output_and_is_told_apart():
    assert flops("convolution", [(4, 5), (3,)], (4, 2), (0,)) == (8, 8)
    assert flops("convolution", [(4, 5), (3,)], (4, 2), (0, 1)) == (8, 16)
    assert not has_rule("convolution") and has_rule("linear") and has_rule("add")
    assert not set(RULES) & set(PER_ELEMENT)
