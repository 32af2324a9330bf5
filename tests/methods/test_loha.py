"""LoHa: its equation, its rank, and what it refuses."""
from __future__ import annotations

from fractions import Fraction

import numpy
import pytest

import minipeft
from minipeft.laws.models import model_of, moved
from minipeft.methods.loha import Hadamard
from minipeft.nn.slot import Slot
from tests.strategies import fractions
from tests.test_laws_exact import rank_of


def drawn(seed=0, r=2, d_out=5, d_in=6, scale=Fraction(3, 2)):
    """(the piece over W0, its arrays, W0), of Fractions."""
    rng = numpy.random.default_rng(seed)
    arrays = {leaf: fractions(rng.integers(-4, 5, (r, d_in) if leaf[0] == "A" else (d_out, r)), 2)
              for leaf in ("A1", "B1", "A2", "B2")}
    W = fractions(rng.integers(-4, 5, (d_out, d_in)), 3)
    piece = Hadamard(**{leaf: minipeft.Parameter(a) for leaf, a in arrays.items()}, scale=scale)
    return piece.over(minipeft.Parameter(W)), arrays, W


def test_every_entry_is_that_of_the_equation_number_for_number():
    piece, a, W = drawn()
    x = fractions(numpy.random.default_rng(1).integers(-4, 5, (3, 6)), 2)
    for (o, i), w in numpy.ndenumerate(W):
        left, right = (sum(a[f"B{n}"][o, k] * a[f"A{n}"][k, i] for k in range(2)) for n in (1, 2))
        assert piece.dense().data[o, i] == w + Fraction(3, 2) * left * right
    assert (piece.project(x).data == x @ piece.dense().data.T).all()
    assert (piece.rows(numpy.array([4, 0, 4])).data == piece.dense().data[[4, 0, 4]]).all()


def test_the_update_has_the_rank_r_squared_where_a_sum_of_two_products_has_2_r():
    piece, _, W = drawn(r=2)
    assert rank_of(piece.dense().data - W) == 4
    piece, _, W = drawn(r=1)
    assert rank_of(piece.dense().data - W) == 1


def test_one_factor_starts_at_0_and_its_gradient_alone_is_not_0():
    model = model_of("t5 v1.1", "float64", 0)
    method = minipeft.LoHa(2, where=r"encoder\.0\.attn\.q\.")
    attachment = minipeft.attach(model, method, numpy.random.default_rng(0), "a")
    slot = next(iter(attachment.places.values()))
    x = numpy.random.default_rng(1).standard_normal((2, 12))
    _, grads = minipeft.value_and_grad(lambda: (slot.project(x) * slot.project(x)).sum(), attachment.parameters)
    assert {name[-2:]: bool(g.any()) for name, g in grads.items()} == {
        "A1": False, "B1": False, "A2": False, "B2": True}
    assert {name[-2:]: bool(p.data.any()) for name, p in attachment.parameters.items()} == {
        "A1": True, "B1": True, "A2": True, "B2": False}


def test_what_does_not_start_at_0_is_drawn_as_by_a_linear_layer_of_as_many_inputs():
    """Uniform within +- 1/sqrt(columns)."""
    slot, rng = Slot("linear", numpy.zeros((200, 300))), numpy.random.default_rng(0)
    for leaf, declared in minipeft.LoHa(8).arrays("place", slot, None).items():
        numbers, bound = declared.init(declared.shape, numpy.dtype("float64"), rng), declared.shape[1] ** -0.5
        assert not numbers.any() if leaf == "B2" else 0.9 * bound < abs(numbers).max() <= bound, leaf


def test_the_scale_is_alpha_over_r_and_1_by_default():
    def change(**fields):
        model = model_of("t5 v1.1", "float64", 0)
        attachment = minipeft.attach(model, minipeft.LoHa(4, **fields), numpy.random.default_rng(0), "a")
        slot = next(iter(moved(attachment, numpy.random.default_rng(1)).places.values()))
        return slot.fold().dense().data - slot.base.data

    assert numpy.allclose(change(alpha=10), 2.5 * change(alpha=4), rtol=1e-12, atol=0)
    attachment = minipeft.attach(model_of("t5 v1.1", "float64", 0), minipeft.LoHa(), numpy.random.default_rng(0))
    assert {piece.scale for piece in attachment.at.values()} == {1}


@pytest.mark.parametrize("kind", [minipeft.LoHa, minipeft.LoKr, minipeft.HiRA])
def test_a_pattern_gives_some_places_another_rank_and_another_alpha(kind):
    """There the piece is that of the method with this rank and this alpha."""
    scaled = kind is not minipeft.HiRA
    where, there = [r"encoder\.0\.attn\.(q|o)\."], r"\.o\."
    patterns = {"rank_pattern": {there: 1}, **({"alpha_pattern": {there: 5}} if scaled else {})}
    alphas = [(dict(alpha=3), 3), (dict(alpha=5), 5)] if scaled else [({}, 1), ({}, 1)]
    model = model_of("t5 v1.1", "float64", 0)
    both = minipeft.attach(model, kind(2, where=where, **alphas[0][0], **patterns), numpy.random.default_rng(0))
    for place, rank, (fields, alpha) in (("q", 2, alphas[0]), ("o", 1, alphas[1])):
        name = f"encoder.0.attn.{place}.weight"
        alone = kind(rank, where=rf"encoder\.0\.attn\.{place}\.", **fields)
        slot = both.places[name]
        assert {leaf: d.shape for leaf, d in both.method.arrays(name, slot, model).items()} == {
            leaf: d.shape for leaf, d in alone.arrays(name, slot, model).items()}
        assert getattr(both.at[slot], "scale", 1) == Fraction(alpha) / (rank if scaled else 1)
    with pytest.raises(ValueError, match=f"{kind.__name__}: rank_pattern has 'wi', which matches none of the 2 places"):
        minipeft.attach(model, kind(2, where=where, rank_pattern={"wi": 1}), numpy.random.default_rng(0), "b")


@pytest.mark.parametrize("fields, message", [(dict(rank=0), "rank is 0"), (dict(alpha=0), "alpha is 0"),
                                             (dict(alpha=float("nan")), "alpha is nan")])
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"LoHa: {message}; expected"):
        minipeft.LoHa(**fields)


@pytest.mark.parametrize("kind", [minipeft.LoHa, minipeft.HiRA])
def test_a_rank_above_what_a_matrix_can_have_is_refused_with_the_matrix(kind):
    model = model_of("t5 v1.1", "float64", 0)
    with pytest.raises(ValueError, match=r": rank 13 exceeds 12, the largest that encoder.0.attn.q.weight \[15, 12\]"):
        minipeft.attach(model, kind(13), numpy.random.default_rng(0))
    assert not model.attachments
