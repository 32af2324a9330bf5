"""HiRA: its equation, its rank, and the entries that it cannot move."""
from __future__ import annotations

from fractions import Fraction

import numpy
import pytest

import minipeft
from minipeft.methods.hira import Modulated
from minipeft.methods.lora import LowRank
from minipeft.nn.slot import Slot
from tests.strategies import fractions
from tests.test_laws_exact import rank_of


def drawn(seed=0, r=1, d_out=5, d_in=6):
    """(the piece over W0, A, B, W0), of Fractions."""
    rng = numpy.random.default_rng(seed)
    A, B, W = (fractions(rng.integers(-4, 5, shape), 2) for shape in ((r, d_in), (d_out, r), (d_out, d_in)))
    return Modulated(A=minipeft.Parameter(A), B=minipeft.Parameter(B)).over(minipeft.Parameter(W)), A, B, W


def test_every_entry_is_that_of_the_equation_number_for_number():
    piece, A, B, W = drawn(r=2)
    x = fractions(numpy.random.default_rng(1).integers(-4, 5, (3, 6)), 2)
    wanted = W + W * (B @ A)
    assert (piece.dense().data == wanted).all() and (piece.project(x).data == x @ wanted.T).all()
    assert (piece.rows(numpy.array([4, 0, 4])).data == wanted[[4, 0, 4]]).all()


def test_with_rank_1_the_update_has_the_full_rank_of_the_weight():
    """W0 * (b a^T) = diag(b) W0 diag(a), where neither a nor b has a 0."""
    piece, A, B, W = drawn(seed=1)
    A[A == 0], B[B == 0] = fractions(1, 2), fractions(1, 2)
    assert rank_of(piece.dense().data - W) == rank_of(W) == 5


def test_an_entry_that_is_0_stays_0_and_gets_no_gradient_through_it():
    piece, A, B, W = drawn()
    W[2, :] = fractions(numpy.zeros(6), 1)
    assert not piece.dense().data[2].any()
    _, grads = minipeft.value_and_grad(lambda: (piece.dense() * piece.dense()).sum(), {"B": piece.B, "A": piece.A})
    assert not grads["B"][2].any() and grads["B"].any()


def test_it_acts_on_the_weight_below_it_and_not_on_the_base():
    """Two of them: W0 * (1 + B A) * (1 + B' A')."""
    lower, A, B, W = drawn(seed=2)
    upper, C, D, _ = drawn(seed=3)
    assert (upper.over(lower).dense().data == W * (1 + B @ A) * (1 + D @ C)).all()


def test_above_a_weight_with_dropout_the_dropout_acts_on_that_weight_alone():
    """x W^T = (product with the lower weight, and its dropout) + x (W0 * (B A))^T."""
    rng = numpy.random.default_rng(0)
    own = {leaf: minipeft.Parameter(rng.standard_normal(shape)) for leaf, shape in (("A", (2, 6)), ("B", (5, 2)))}
    lower = LowRank(**own, scale=Fraction(3, 2), p=0.5).over(minipeft.Parameter(rng.standard_normal((5, 6))))
    A, B, x = (rng.standard_normal(shape) for shape in ((1, 6), (5, 1), (4, 6)))
    piece = Modulated(A=minipeft.Parameter(A), B=minipeft.Parameter(B)).over(lower)
    found, dropped = (each.project(x, numpy.random.default_rng(7)).data for each in (piece, lower))
    assert piece.drops and abs(dropped - lower.project(x).data).max() > 0.1
    assert abs(found - dropped - x @ (lower.dense().data * (B @ A)).T).max() < 1e-13
    assert abs(piece.project(x).data - x @ (lower.dense().data * (1 + B @ A)).T).max() < 1e-13


def test_what_does_not_start_at_0_is_drawn_as_by_a_linear_layer_of_as_many_inputs():
    """Uniform within +- 1/sqrt(columns)."""
    slot, rng = Slot("linear", numpy.zeros((200, 300))), numpy.random.default_rng(0)
    for leaf, declared in minipeft.HiRA(8).arrays("place", slot, None).items():
        numbers, bound = declared.init(declared.shape, numpy.dtype("float64"), rng), declared.shape[1] ** -0.5
        assert not numbers.any() if leaf == "B" else 0.9 * bound < abs(numbers).max() <= bound, leaf


def test_a_rank_that_is_no_integer_of_at_least_1_is_refused():
    for rank in (0, 1.5, True, "8"):
        with pytest.raises(ValueError, match="HiRA: rank is .*; expected an integer >= 1"):
            minipeft.HiRA(rank)
