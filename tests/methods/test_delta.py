"""Differences added to a frozen weight: three kinds, each against the sum of two arrays, and what they do not make."""
import numpy
import pytest
from hypothesis import given

import minipeft
from minipeft.engine import ops
from minipeft.engine.tensor import _observer
from minipeft.files import read_tensors
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Fixed, Parameter
from minipeft.methods.delta import Delta, MaskedDelta, RowDelta
from minipeft.laws.bounds import tau, within
from tests.by_hand import piece_on
from tests.models_under_test import Case, logits
from tests.strategies import dtypes, seeds

TABLE, VOCAB, D = "embedding.weight", 7, 5
RNG = numpy.random.default_rng
U = {"float64": 2.0 ** -53, "float32": 2.0 ** -24}
KINDS = ("whole", "rows", "mask")
TRAINED = (1, 4, 5)  # rows


def made(kind, seed=0, dtype="float64"):
    """(piece with d drawn, W0, what is added to it, a function from a gradient of W to that of d)."""
    rng = RNG(seed)
    base = Parameter(rng.standard_normal((VOCAB, D)).astype(dtype))
    added, flat = numpy.zeros((VOCAB, D), dtype), numpy.array([0, 6, 7, 33])
    fields = {"whole": {}, "rows": {"rows": TRAINED}, "mask": {"mask": {"weight": flat}}}[kind]
    piece = piece_on(minipeft.Selective(**fields), Slot("embedding", base), rng)
    assert type(piece) is {"whole": Delta, "rows": RowDelta, "mask": MaskedDelta}[kind]
    assert not piece.d.data.any() and piece.d.dtype == dtype, "it starts at 0"
    piece.d.data = rng.standard_normal(piece.d.shape).astype(dtype)
    if kind == "mask":
        added.reshape(-1)[flat] = piece.d.data
        return piece, base.data, added, lambda g: g.reshape(-1)[flat]
    added[list(TRAINED) if kind == "rows" else slice(None)] = piece.d.data
    return piece, base.data, added, (lambda g: g[list(TRAINED)]) if kind == "rows" else (lambda g: g)


def shapes_of_ops(run):
    """(what `run` returns, the shape of every op's output)."""
    shapes = []
    token = _observer.set(lambda name, inputs, out, *_: shapes.append(out.shape))
    try:
        return run(), shapes
    finally:
        _observer.reset(token)


def gradients(piece, loss):
    """Those of the base and of d."""
    return minipeft.value_and_grad(loss, {"base": piece.base, "d": piece.d})[1]


@pytest.mark.parametrize("kind", KINDS)
@given(seeds(), dtypes())
def test_the_dense_weight_is_the_sum_bit_for_bit_and_d_has_the_gradient_of_its_elements(kind, seed, dtype):
    piece, base, added, taken = made(kind, seed, dtype)
    assert numpy.array_equal(piece.dense().data, base + added) and piece.dense().data.dtype == dtype
    assert (piece.shape, piece.dtype) == ((VOCAB, D), numpy.dtype(dtype))
    g = RNG([seed, 1]).standard_normal((VOCAB, D)).astype(dtype)
    found = gradients(piece, lambda: ops.sum(ops.mul(piece.dense(), g)))
    assert numpy.array_equal(found["base"], g) and numpy.array_equal(found["d"], taken(g))
    assert found["d"].dtype == dtype and found["d"].shape == piece.d.shape


IDS = {"in and out of the trained rows": [[0, 1, 2], [4, 6, 5]], "each several times": [[1, 1, 1], [0, 0, 4]],
       "none that is trained": [[0, 2, 3], [6, 6, 0]], "only such as are": [[5, 4, 1], [1, 5, 5]], "one": [[6]],
       "the first and the last": [[0], [VOCAB - 1]]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", IDS)
@given(seeds(), dtypes())
def test_a_lookup_is_that_in_the_dense_weight_in_value_bit_for_bit_and_in_gradient(which, kind, seed, dtype):
    """A gradient of a row is a sum of as many terms as the row is looked up, fewer than there are ids."""
    ids = numpy.array(IDS[which])
    piece, base, added, taken = made(kind, seed, dtype)
    assert numpy.array_equal(piece.rows(ids).data, (base + added)[ids]) and piece.rows(ids).data.dtype == dtype
    g = RNG([seed, 2]).standard_normal((*ids.shape, D)).astype(dtype)
    wanted, terms = numpy.zeros((VOCAB, D), "longdouble"), numpy.zeros((VOCAB, D))
    for i, row in zip(ids.reshape(-1), g.reshape(-1, D)):
        wanted[i] += row
        terms[i] += abs(row)
    found = gradients(piece, lambda: ops.sum(ops.mul(piece.rows(ids), g)))
    assert numpy.array_equal(found["base"] == 0, wanted == 0), "rows that were not looked up have no gradient"
    through_dense = gradients(piece, lambda: ops.sum(ops.mul(ops.embedding(piece.dense(), ids), g)))
    for name, (w, t) in {"base": (wanted, terms), "d": (taken(wanted), taken(terms))}.items():
        assert within(found[name], w, tau(t, ids.size, 0, U[dtype])), name
        assert within(through_dense[name], w, tau(t, ids.size, 0, U[dtype])), name


@pytest.mark.parametrize("kind", KINDS)
@given(seeds(), dtypes())
def test_a_product_is_that_with_the_dense_weight_in_value_and_gradient(kind, seed, dtype):
    piece, base, added, taken = made(kind, seed, dtype)
    x, g = (RNG([seed, i]).standard_normal((2, 3, n)).astype(dtype) for i, n in ((3, D), (4, VOCAB)))
    w = (base + added).astype("longdouble")
    assert within(piece.project(x).data, x @ w.T, tau(abs(x) @ abs(w).T, D, 0, U[dtype]))
    found = gradients(piece, lambda: ops.sum(ops.mul(piece.project(x), g)))
    wide = [a.astype("longdouble").reshape(6, -1) for a in (g, x)]
    wanted, terms = wide[0].T @ wide[1], abs(wide[0]).T @ abs(wide[1])
    assert within(found["base"], wanted, tau(terms, 6, 0, U[dtype]))
    assert within(found["d"], taken(wanted), tau(taken(terms), 6, 0, U[dtype]))


@pytest.mark.parametrize("kind, whole", [("whole", False), ("rows", False), ("mask", True)])
def test_a_lookup_adds_up_no_whole_table_where_rows_can_be_told_apart(kind, whole):
    piece, *_ = made(kind)
    _, shapes = shapes_of_ops(lambda: piece.rows(numpy.array([[1, 2]])))
    assert shapes and ((VOCAB, D) in shapes) == whole
    assert max(numpy.prod(shape) for shape in shapes) == (VOCAB * D if whole else max(2, len(TRAINED) + 1) * D
                                                          if kind == "rows" else 2 * D)


def test_a_lookup_in_a_model_makes_no_array_of_the_size_of_the_table():
    model, ids = Case(("t5 v1.1", "q and v"), 1, 1, "float64", 0).model(), numpy.array([[3, 3, 5]])
    attachment = minipeft.attach(model, minipeft.Selective(rows=(5, 3, 11)), RNG(0), "rows")
    attachment.parameters[f"{TABLE}@rows.d"].data += 1.0
    found, shapes = shapes_of_ops(lambda: model.embed(ids).data)
    assert shapes and (13, 12) not in shapes and numpy.array_equal(found, model.state()[TABLE][ids] + 1)


def test_over_another_base_it_is_the_same_difference():
    for kind in KINDS:
        piece, base, added, _ = made(kind)
        other = piece.over(Parameter(2 * base))
        assert other.d is piece.d and numpy.array_equal(other.dense().data, 2 * base + added)
        assert numpy.array_equal(other.rows(numpy.array([[1, 0]])).data, (2 * base + added)[[[1, 0]]])


def test_the_arrays_of_each_kind_are_d_and_for_a_mask_its_indices_of_four_bytes():
    kinds = {kind: {name: (type(p), p.data.shape, str(p.data.dtype)) for name, p in made(kind)[0].arrays.items()}
             for kind in KINDS}
    assert kinds == {"whole": {"d": (Parameter, (7, 5), "float64")}, "rows": {"d": (Parameter, (3, 5), "float64")},
                     "mask": {"d": (Parameter, (4,), "float64"), "indices": (Fixed, (4,), "int32")}}


@pytest.mark.parametrize("rows", [(7,), (9, 2, 4), tuple(range(13))])
def test_a_file_of_rows_holds_d_alone_and_is_about_of_its_size(rows, tmp_path):
    """Which rows is said once, among the fields: besides d there are at most 1.5 kB of names and fingerprints."""
    model = Case(("t5 v1.1", "q and v"), 1, 1, "float32", 0).model()
    attachment = minipeft.attach(model, minipeft.Selective(rows=rows), RNG(0), "rows")
    attachment.parameters[f"{TABLE}@rows.d"].data += RNG(1).standard_normal((len(rows), 12)).astype("float32")
    attachment.save(tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")[0]
    assert list(tensors) == [f"{TABLE}.d"] and tensors[f"{TABLE}.d"].shape == (len(rows), 12)
    assert 0 < (tmp_path / "a").stat().st_size - 4 * 12 * len(rows) < 1500
    batch = Case(("t5 v1.1", "q and v"), 1, 1, "float32", 0).batch()
    output = logits(model, batch)
    attachment.remove()
    assert logits(model, batch).tobytes() != output.tobytes()
    minipeft.load(model, tmp_path / "a")
    assert logits(model, batch).tobytes() == output.tobytes()


def test_rows_that_are_named_in_any_order_are_stored_ascending():
    model = Case(("t5 v1.1", "q and v"), 1, 1, "float64", 0).model()
    d = minipeft.attach(model, minipeft.Selective(rows=(9, 2)), RNG(0), "rows").parameters[f"{TABLE}@rows.d"]
    d.data = numpy.stack([numpy.full(12, 1.0), numpy.full(12, 5.0)])
    different = model.slots[TABLE].fold().dense().data - model.state()[TABLE]
    assert numpy.allclose(different[2], 1) and numpy.allclose(different[9], 5)
    assert numpy.flatnonzero(different.any(axis=1)).tolist() == [2, 9]
