"""OFT: rotations, the three ways to make them, blocks, and the start at exactly the identity."""
from __future__ import annotations

import numpy
import pytest

import minipeft
from minipeft.laws.models import model_of, moved
from minipeft.methods.oft import Rotated
from tests.strategies import fractions


def skew(q, size):
    """Q [blocks, b, b] of q [blocks, b (b - 1) / 2], number by number."""
    found = numpy.zeros((len(q), size, size), q.dtype)
    for block, numbers in enumerate(q):
        above = [(i, j) for i in range(size) for j in range(i + 1, size)]
        for (i, j), number in zip(above, numbers, strict=True):
            found[block, i, j], found[block, j, i] = number, -number
    return found


def piece_of(q, size, cayley="paper", terms=5):
    return Rotated(q=minipeft.Parameter(q), size=size, cayley=cayley, terms=terms)


def rotation(q, size, cayley="paper", terms=5):
    """R [blocks, b, b] of our piece."""
    return piece_of(q, size, cayley, terms).rotation().data


def some(blocks=3, size=4, std=1.0, seed=0):
    return std * numpy.random.default_rng(seed).standard_normal((blocks, size * (size - 1) // 2))


def test_r_is_the_cayley_form_of_the_paper_its_inverse_or_the_series():
    q = some()
    Q, one = skew(q, 4), numpy.eye(4)
    inverse = numpy.linalg.inv
    for cayley, wanted in {"paper": (one + Q) @ inverse(one - Q), "transposed": (one - Q) @ inverse(one + Q),
                           "neumann": one + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q}.items():
        assert abs(rotation(q, 4, cayley) - wanted).max() < 1e-13, cayley
    assert abs(rotation(q, 4, "neumann", 4) - (one + 2 * Q + 2 * Q @ Q + Q @ Q @ Q)).max() < 1e-13


def test_on_fractions_r_is_orthogonal_number_for_number_and_project_and_rows_are_those_of_w0_r_transposed():
    rng = numpy.random.default_rng(0)
    q, W = (fractions(rng.integers(-4, 5, shape), 2) for shape in ((2, 3), (5, 6)))
    x, ids = fractions(rng.integers(-4, 5, (2, 3, 6)), 3), numpy.array([[4, 0], [1, 1]])
    R = rotation(q, 3)
    assert (R @ R.swapaxes(1, 2) == numpy.eye(3, dtype=int)).all()
    assert (R @ (numpy.eye(3, dtype=int) - skew(q, 3)) == numpy.eye(3, dtype=int) + skew(q, 3)).all()
    whole = fractions(numpy.zeros((6, 6)), 1)
    whole[:3, :3], whole[3:, 3:] = R
    found = piece_of(q, 3).over(minipeft.Parameter(W))
    assert (found.dense().data == W @ whole.T).all() and (found.rows(ids).data == (W @ whole.T)[ids]).all()
    assert (found.project(x).data == x @ (W @ whole.T).T).all()


@pytest.mark.parametrize("cayley", ["paper", "transposed"])
def test_lengths_of_rows_and_angles_between_them_stay_however_large_q_is(cayley):
    """In a block-diagonal rotation all inner products of rows stay: W W^T = W0 W0^T."""
    W = numpy.random.default_rng(1).standard_normal((5, 12))
    found = piece_of(some(std=100.0), 4, cayley).over(minipeft.Parameter(W)).dense().data
    assert abs(found @ found.T - W @ W.T).max() < 1e-11 and abs(found - W).max() > 1


def test_shared_blocks_are_equal_and_have_the_numbers_of_one():
    model = model_of("t5 v1.1", "float64", 0)
    attachment = minipeft.attach(model, minipeft.OFT(4, share=True), numpy.random.default_rng(0), "a")
    assert {p.shape for p in attachment.parameters.values()} == {(1, 6)}
    q, W = some(1), numpy.random.default_rng(1).standard_normal((5, 12))
    one, three = (piece_of(q, 4).over(minipeft.Parameter(W)).dense().data for q in (q, numpy.repeat(q, 3, axis=0)))
    assert (one == three).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cayley", ["paper", "transposed", "neumann"])
def test_at_the_start_r_is_the_identity_and_no_product_changes_a_bit(dtype, cayley):
    """R is exactly I. In x I every product is x or 0, and a sum with zeros rounds nothing in any order: x of any
    magnitude."""
    rng = numpy.random.default_rng(0)
    W = minipeft.Parameter(rng.standard_normal((15, 48)).astype(dtype))
    x = (rng.standard_normal((3, 7, 48)) * 10.0 ** rng.integers(-30, 30, (3, 7, 48))).astype(dtype)
    piece = piece_of(numpy.zeros((3, 120), dtype), 16, cayley).over(W)
    assert (piece.rotation().data == numpy.eye(16)).all()
    assert piece.project(x).data.tobytes() == W.project(x).data.tobytes()
    assert piece.dense().data.tobytes() == W.data.tobytes()


def test_the_gradient_of_q_is_the_derivative_in_every_form():
    for cayley in ("paper", "transposed", "neumann"):
        model = model_of("t5 v1.1", "float64", 0)
        attachment = minipeft.attach(model, minipeft.OFT(3, r"encoder\.0\.attn\.q", cayley=cayley),
                                     numpy.random.default_rng(0), "a")
        slot = next(iter(moved(attachment, numpy.random.default_rng(1), 0.7).places.values()))
        x = numpy.random.default_rng(2).standard_normal((4, 12))
        minipeft.check_gradients(lambda: (slot.project(x) * slot.project(x) * slot.project(x)).sum(),
                                 attachment.parameters, numpy.random.default_rng(3))


def test_a_block_size_that_does_not_divide_the_width_is_refused_with_those_that_do():
    model = model_of("t5 v1.1", "float64", 0)
    with pytest.raises(ValueError, match=r"OFT: block_size 5 does not divide 12, the width of encoder.0.attn.q.weight "
                                         r"\[15, 12\]; expected one of 2, 3, 4, 6, 12"):
        minipeft.attach(model, minipeft.OFT(5), numpy.random.default_rng(0))
    assert not model.attachments


def test_a_pattern_gives_some_places_another_block_size():
    model = model_of("t5 v1.1", "float64", 0)
    method = minipeft.OFT(4, [r"encoder\.0\.attn\.(q|o)\."], block_size_pattern={r"\.o\.": 5})
    attachment = minipeft.attach(model, method, numpy.random.default_rng(0), "a")
    assert {name: p.shape for name, p in attachment.parameters.items()} == {
        "encoder.0.attn.q.weight@a.q": (3, 6), "encoder.0.attn.o.weight@a.q": (3, 10)}
    slot = moved(attachment, numpy.random.default_rng(1)).places["encoder.0.attn.o.weight"]
    W, q = slot.base.data, attachment.parameters["encoder.0.attn.o.weight@a.q"].data
    assert (slot.fold().dense().data == piece_of(q, 5).over(minipeft.Parameter(W)).dense().data).all()
    with pytest.raises(ValueError, match=r"OFT: block_size_pattern has 'wi', which matches none of the 4 places"):
        minipeft.attach(model, minipeft.OFT(3, r"\.q\.", block_size_pattern={"wi": 2}), numpy.random.default_rng(0))


def test_a_row_of_one_number_is_refused_because_nothing_can_turn_it():
    model = minipeft.T5(minipeft.T5Config(5, 1, 1, 1, 1, 1, 1, 8, 20), numpy.random.default_rng(0))
    with pytest.raises(ValueError, match=r"OFT: block_size 2 does not divide 1, the width of encoder.0.attn.q.weight "
                                         r"\[1, 1\]; a row of one number has no rotation$"):
        minipeft.attach(model, minipeft.OFT(2), numpy.random.default_rng(0))


@pytest.mark.parametrize("field", [dict(block_size=1), dict(share=0), dict(cayley="exact"), dict(terms=3),
                                   dict(terms=1001)])
def test_fields_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=f"OFT: {next(iter(field))} is .*; expected"):
        minipeft.OFT(**field)
