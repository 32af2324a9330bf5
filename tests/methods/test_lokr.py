"""LoKr: its equation, how sizes are split, which factors are products, and its scale."""
from __future__ import annotations

from fractions import Fraction

import numpy
import pytest

import minipeft
from minipeft.engine.tensor import _observer
from minipeft.laws.models import model_of
from minipeft.methods.lokr import Kronecker, split
from minipeft.nn.slot import Slot
from tests.strategies import fractions


def kron(w1, w2):
    """Entry by entry: w1[i, j] w2[a, b] at [i k + a, j n + b]."""
    (l, m), (k, n) = w1.shape, w2.shape  # noqa: E741
    return numpy.array([[w1[row // k, column // n] * w2[row % k, column % n] for column in range(m * n)]
                        for row in range(l * k)], dtype=object)


@pytest.mark.parametrize("products", [(), ("w2",), ("w1", "w2")], ids=str)
def test_every_entry_is_that_of_the_equation_number_for_number(products):
    rng = numpy.random.default_rng(0)
    w, arrays = {}, {}
    for name, (rows, columns) in {"w1": (2, 3), "w2": (5, 4)}.items():
        if name in products:
            a, b = (fractions(rng.integers(-4, 5, shape), 2) for shape in ((rows, 1), (1, columns)))
            w[name], arrays[f"{name}_a"], arrays[f"{name}_b"] = a @ b, a, b
        else:
            w[name] = arrays[name] = fractions(rng.integers(-4, 5, (rows, columns)), 2)
    W = fractions(rng.integers(-4, 5, (10, 12)), 3)
    piece = Kronecker(**{name: minipeft.Parameter(a) for name, a in arrays.items()}, scale=Fraction(2, 3))
    wanted = W + Fraction(2, 3) * kron(w["w1"], w["w2"])
    found = piece.over(minipeft.Parameter(W))
    x, ids = fractions(rng.integers(-4, 5, (2, 3, 12)), 2), numpy.array([[9, 0], [4, 5]])
    assert (found.dense().data == wanted).all()
    assert (found.project(x).data == x @ wanted.T).all() and (found.rows(ids).data == wanted[ids]).all()


@pytest.mark.parametrize("d, factor, expected", [
    (512, None, (16, 32)), (24, None, (4, 6)), (36, None, (6, 6)), (17, None, (1, 17)), (1, None, (1, 1)),
    (2048, None, (32, 64)), (12, 4, (4, 3)), (12, 6, (6, 2)), (12, 5, (3, 4)), (24, 5, (4, 6)), (34, 4, (2, 17)),
    (12, 100, (3, 4)), (7, 3, (1, 7)), (12, 1, (1, 12)), (30, 4, (3, 10))])
def test_a_size_is_split_near_its_square_root_or_by_the_given_factor(d, factor, expected):
    assert split(d, factor) == expected


def shapes(method, shape):
    """The shapes of the arrays at a matrix of that shape."""
    return {leaf: d.shape for leaf, d in method.arrays("w", Slot("linear", numpy.zeros(shape)), None).items()}


def test_factors_are_products_where_this_is_smaller_as_in_files_of_peft():
    """Shapes in adapters that PEFT wrote for matrices of these sizes."""
    assert shapes(minipeft.LoKr(2), (32, 96)) == {"w1": (4, 8), "w2_a": (8, 2), "w2_b": (2, 12)}
    assert shapes(minipeft.LoKr(16), (16, 32)) == {"w1": (4, 4), "w2": (4, 8)}
    assert shapes(minipeft.LoKr(1, decompose_both=True), (24, 16)) == {
        "w1_a": (4, 1), "w1_b": (1, 4), "w2_a": (6, 1), "w2_b": (1, 4)}
    assert shapes(minipeft.LoKr(2, decompose_both=True), (24, 16)) == {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 4)}
    assert shapes(minipeft.LoKr(3), (24, 16)) == {"w1": (4, 4), "w2": (6, 4)}, "2 r = max(k, n) is no saving"


@pytest.mark.parametrize("method", [minipeft.LoKr(5), minipeft.LoKr(20), minipeft.LoKr(5, decompose_both=True)])
def test_what_does_not_start_at_0_is_drawn_as_by_a_linear_layer_of_as_many_inputs(method):
    """Uniform within +- 1/sqrt(columns)."""
    slot, rng = Slot("linear", numpy.zeros((512, 600))), numpy.random.default_rng(0)
    for leaf, declared in method.arrays("place", slot, None).items():
        numbers, bound = declared.init(declared.shape, numpy.dtype("float64"), rng), declared.shape[1] ** -0.5
        assert not numbers.any() if leaf in ("w1", "w1_a") else 0.9 * bound < abs(numbers).max() <= bound, leaf


def test_kron_is_not_formed_for_a_product_with_x():
    """No op of `project` has an output of the size of the weight."""
    model = model_of("t5 v1.1", "float64", 0)
    attachment = minipeft.attach(model, minipeft.LoKr(1), numpy.random.default_rng(0), "a")
    slot, sizes = next(iter(attachment.places.values())), []
    token = _observer.set(lambda forward, inputs, out, *_: sizes.append(out.size))
    try:
        slot.project(numpy.ones((1, 2, 12)))
    finally:
        _observer.reset(token)
    assert sizes and max(sizes) < 15 * 12


@pytest.mark.parametrize("field", [dict(factor=0), dict(factor=2.0), dict(decompose_both=1), dict(full="r"),
                                   dict(rank=0), dict(alpha=0)])
def test_fields_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=f"LoKr: {next(iter(field))} is .*; expected"):
        minipeft.LoKr(**field)
